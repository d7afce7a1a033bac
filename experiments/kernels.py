"""The area of the tiles that the kernels visit, and the time that they take beside other attentions.

    python -m experiments.kernels          prints both tables, and keeps them in out/kernels

The kernels are timed on CUDA, beside SDPA's flash (causal and blind to eviction: what the hardware can do), SDPA with a
boolean mask, and FlexAttention with the same mask, after a check that the kernels are right. TFLOP/s count visible
pairs only. MiB is the peak of forward and backward, with what is prepared once for a mask. Without CUDA the plain
version is timed beside dense SDPA. The letters are those of kernel.py.
"""

if not __package__:  # then none of the project's modules is found
    raise SystemExit("run it from the project's folder: python -m experiments.kernels")

import argparse
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.utils.benchmark import Timer

import kernel
from experiments.common import command, table
from harness.cli import require
from harness.report import Progress
from kernel import EPOCH, NEVER, Blocks, ShadowMask

H, G = 16, 4
LENGTHS = 2048, 8192, 32768
CPU_LENGTHS = 512, 1024
ORDERS = {"position": None, "time of eviction": 1, f"epoch of {EPOCH}": EPOCH}  # of the keys -> epoch of `list_tiles`


def prompt_length(T: int) -> int:
    return T * 7 // 8


def compressed_once(T: int, kept: float, seed: int) -> Tensor:
    """evicted_at (T,) of a prompt of which a random share survives, and of a response that stays."""
    generator = torch.Generator().manual_seed(seed)
    P = prompt_length(T)
    evicted_at = torch.full((T,), NEVER, dtype=torch.int32)
    evicted_at[torch.randperm(P, generator=generator)[round(P * kept) :]] = P
    return evicted_at


def rolling(T: int, budget: int, interval: int, seed: int) -> Tensor:
    """evicted_at (T,) where random evictions leave `budget` keys every `interval` tokens: the worst case to sort."""
    generator = torch.Generator().manual_seed(seed)
    evicted_at = torch.full((T,), NEVER, dtype=torch.int32)
    live = torch.arange(0)
    for now in range(interval, T, interval):
        live = torch.cat((live, torch.arange(now - interval, now)))
        shuffled = live[torch.randperm(len(live), generator=generator)]
        live = shuffled[:budget]
        evicted_at[shuffled[budget:]] = now
    return evicted_at


PATTERNS = {f"{kept:.0%} kept": partial(compressed_once, kept=kept) for kept in (1, 0.5, 0.25, 0.1)}
PATTERNS["rolling"] = partial(rolling, budget=1024, interval=128)


def visible_pairs(evicted_at: Tensor, q_start: int, Tq: int) -> int:
    """(query, key) pairs in which the key is visible, over all rows of evicted_at (..., T)."""
    first = torch.arange(evicted_at.shape[-1], device=evicted_at.device).clamp(min=q_start)
    return (evicted_at.clamp(max=q_start + Tq) - first).clamp(min=0).sum().item()


def tile_ratio(evicted_at: Tensor, q_start: int, Tq: int, blocks: Blocks, epoch: int | None = EPOCH) -> float:
    """Area of the tiles that are visited over visible pairs: 1 would be a kernel that wastes nothing."""
    tiles = kernel.list_tiles(evicted_at.flatten(0, -2), q_start, Tq, blocks, epoch)
    visited = len(tiles.by_block.index) - 1
    return visited * blocks.M * blocks.N / visible_pairs(evicted_at, q_start, Tq)


def tile_ratios() -> dict[str, list[dict]]:
    """What each order of the keys wastes, in all rows and in the response's."""
    blocks = kernel.block_sizes(torch.bfloat16, 64, shared_memory=0)  # of D = 64, the same on all GPUs
    groups = {}
    for T, pattern in itertools.product(LENGTHS, PATTERNS):
        evicted_at = PATTERNS[pattern](T, seed=0)[None]
        row = {}
        for order, epoch in ORDERS.items():
            for rows, q_start in (("all", 0), ("response", prompt_length(T))):
                row[f"{order}, {rows}"] = tile_ratio(evicted_at, q_start, T - q_start, blocks, epoch)
        groups[f"T = {T:,}, {pattern}"] = [row]
    return groups


def milliseconds(run: Callable, device: str) -> float:
    """Median of several runs after warm-up: device time with a cold L2 cache, or wall time on the CPU."""
    if device == "cuda":
        return kernel.triton.testing.do_bench(run, return_mode="median")
    return 1e3 * Timer("run()", globals=dict(run=run)).blocked_autorange().median


def dense_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention, the queries at the last positions of the keys."""
    Tq, T = q.shape[2], k.shape[2]
    mask = dict(is_causal=True) if Tq == T else dict(attn_mask=causal_lower_right(Tq, T))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **mask)


def cuda_contenders(q: Tensor, k: Tensor, v: Tensor, evicted_at: Tensor, q_start: int) -> dict[str, Callable]:
    """Name -> what prepares all that the mask alone decides, and returns the attention to be timed."""
    from torch.nn.attention import SDPBackend, flex_attention, sdpa_kernel

    Tq, T = q.shape[2], k.shape[2]
    by_head = evicted_at.repeat_interleave(H // G, dim=1)
    # its faster kernels want static shapes
    block_mask_of = torch.compile(flex_attention.create_block_mask, dynamic=False)
    attention = torch.compile(flex_attention.flex_attention, dynamic=False)

    def ours():
        layer = ShadowMask(evicted_at[None])[0]
        kernel.tiles_for(q, layer, q_start)  # listed here, not when the attention is timed
        return lambda: kernel.attention_triton(q, k, v, layer, q_start)

    def flash() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return dense_sdpa(q, k, v)

    def mask():
        i = torch.arange(q_start, T, device=q.device)[:, None]
        j = torch.arange(T, device=q.device)
        visible_BHqT = (j <= i) & (i < by_head[:, :, None])
        return lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=visible_BHqT, enable_gqa=True)

    def flex():
        def visible(b, h, i, j):
            return (j <= i + q_start) & (i + q_start < by_head[b, h, j])

        block_mask = block_mask_of(visible, 1, H, Tq, T, device=q.device)
        return lambda: attention(q, k, v, block_mask=block_mask, enable_gqa=True)

    return dict(ours=ours, flash=lambda: flash, mask=mask, flex=flex)


def cpu_contenders(q: Tensor, k: Tensor, v: Tensor, evicted_at: Tensor, q_start: int) -> dict[str, Callable]:
    plain = partial(kernel.attention_torch, q, k, v, ShadowMask(evicted_at[None])[0], q_start)
    return dict(torch=lambda: plain, dense=lambda: partial(dense_sdpa, q, k, v))


def measure(prepare: Callable, qkv: list[Tensor], pairs: int) -> dict[str, float]:
    """Milliseconds forward and forward + backward; on CUDA also to prepare, TFLOP/s on visible pairs, and peak MiB."""
    device = qkv[0].device.type
    held = torch.cuda.memory_allocated() if device == "cuda" else 0
    attention = prepare()
    do = torch.randn_like(attention())
    row = {"forward ms": milliseconds(attention, device)}
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    row["+ backward ms"] = milliseconds(lambda: torch.autograd.grad(attention(), qkv, do), device)
    if device == "cuda":
        row["MiB"] = (torch.cuda.max_memory_allocated() - held) / 2**20  # with what was prepared
        row["prepare ms"] = milliseconds(prepare, device)
        # two products of matrices forward and five backward, 2 D operations for a pair in each
        row["TFLOP/s"] = 2 * 2 * do.shape[-1] * pairs / row["forward ms"] / 1e9
        row["+ backward"] = 7 * 2 * do.shape[-1] * pairs / row["+ backward ms"] / 1e9
    return row


def times(device: str) -> dict[str, list[dict]]:
    """Every contender at every shape, on random queries, keys and values, with another mask for each kv head."""
    dtype, contenders = torch.float32, cpu_contenders
    shapes = [(64, T, "25% kept") for T in CPU_LENGTHS]  # the plain version's work does not depend on the mask
    if device == "cuda":
        dtype, contenders = torch.bfloat16, cuda_contenders
        shapes = list(itertools.product((64, 128), LENGTHS, PATTERNS))
        torch._dynamo.config.recompile_limit = 256  # past it, FlexAttention would run uncompiled
    groups = {}
    with Progress(desc="times", total=2 * len(shapes)) as progress:
        for (D, T, pattern), rows in itertools.product(shapes, ("all rows", "response")):
            q_start = 0 if rows == "all rows" else prompt_length(T)
            evicted_at = torch.stack([PATTERNS[pattern](T, seed=g) for g in range(G)])[None].to(device)
            sizes = (1, H, T - q_start, D), (1, G, T, D), (1, G, T, D)
            qkv = [torch.randn(size, device=device, dtype=dtype, requires_grad=True) for size in sizes]
            pairs = visible_pairs(evicted_at, q_start, T - q_start) * H // G
            for name, prepare in contenders(*qkv, evicted_at, q_start).items():
                name = f"D = {D}, T = {T:,}, {pattern}, {rows}: {name}"
                try:
                    groups[name] = [measure(prepare, qkv, pairs)]
                except Exception as e:  # a row that cannot be had says why
                    groups[f"{name}: {(str(e) or type(e).__name__).splitlines()[0][:80]}"] = [{}]
            progress.step()
    return groups


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    errors = kernel.check(device) if device == "cuda" else {}
    print("area of the tiles of 128 x 64 over visible pairs, by order of the keys")
    print(table(tile_ratios(), Path("out/kernels/tiles.md")))
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"B = 1, H = {H}, G = {G}, on {name}")
    print(table(times(device), Path("out/kernels/times.md")))
    require(all(error < kernel.LIMIT for error in errors.values()), "the kernels are wrong: see the check above")


if __name__ == "__main__":
    command(main)
