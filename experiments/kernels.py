"""The area of the tiles that the kernels visit, and the time that they take beside other attentions.

    python -m experiments.kernels                        prints both tables, and writes all figures as JSON
    python -m experiments.kernels --out other/file.json

The kernels are timed on CUDA, beside SDPA's flash (causal and blind to eviction: what the hardware can do), SDPA with a
boolean mask, and FlexAttention with the same mask, after a check that the kernels are right. Without CUDA the plain
version is timed beside dense SDPA. The letters are those of kernel.py.
"""

if not __package__:  # then none of the project's modules is found
    raise SystemExit("run it from the project's folder: python -m experiments.kernels")

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

import kernel
from kernel import EPOCH, NEVER, Blocks, Record

H, G = 16, 4
LENGTHS = 2048, 8192, 32768
CPU_LENGTHS = 512, 1024
ORDERS = {"position": None, "time of death": 1, f"epoch of {EPOCH}": EPOCH}  # of the keys -> epoch of `list_tiles`
CPU_COLUMNS = dict(forward="forward ms", both="+ backward ms")  # figure of `measure` -> heading
CUDA_COLUMNS = CPU_COLUMNS | dict(prepare="prepare ms", tflops_forward="TFLOP/s", tflops_both="+ backward", mib="MiB")


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
    """evicted_at (T,) where every `interval` tokens random victims leave `budget` keys: the worst case for sorting."""
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
    """(query, key) pairs in which the key is visible, over all sequences and kv heads."""
    first = torch.arange(evicted_at.shape[-1], device=evicted_at.device).clamp(min=q_start)
    return (evicted_at.clamp(max=q_start + Tq) - first).clamp(min=0).sum().item()


def tile_ratio(evicted_at: Tensor, q_start: int, Tq: int, blocks: Blocks, epoch: int | None = EPOCH) -> float:
    """Area of the tiles that are visited over visible pairs: 1 would be a kernel that wastes nothing."""
    tiles = kernel.list_tiles(evicted_at, q_start, Tq, blocks, epoch)
    visited = len(tiles.by_block.index) - 1
    return visited * blocks.M * blocks.N / visible_pairs(evicted_at, q_start, Tq)


def tile_table() -> list[dict]:
    """Print what each order of the keys wastes; the same as rows, each ratio for all queries and for the response's."""
    print("area of the tiles of 128 x 64 over visible pairs, in all rows and in the response's, by order of the keys")
    print(f"{'T':>6} {'pattern':9}" + "".join(f"{order:>16}" for order in ORDERS))
    blocks = kernel.block_sizes(torch.bfloat16, 64, room=0)  # of D = 64, the same on all GPUs
    rows = []
    for T, pattern in itertools.product(LENGTHS, PATTERNS):
        record = PATTERNS[pattern](T, seed=0)[None, None]
        found = {
            order: [tile_ratio(record, q_start, T - q_start, blocks, epoch) for q_start in (0, prompt_length(T))]
            for order, epoch in ORDERS.items()
        }
        rows.append(dict(T=T, pattern=pattern) | found)
        print(f"{T:6} {pattern:9}" + "".join(f"{a:11.2f} {b:.2f}" for a, b in found.values()))
    return rows


def milliseconds(run: Callable, device: str) -> float:
    """Median of several runs after warm-up: device time with a cold L2 cache, or wall time on the CPU."""
    if device == "cuda":
        return kernel.triton.testing.do_bench(run, return_mode="median")
    times = []
    for _ in range(8):
        began = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times[1:])


def dense_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention, the queries at the last positions of the keys."""
    Tq, T = q.shape[2], k.shape[2]
    mask = dict(is_causal=True) if Tq == T else dict(attn_mask=causal_lower_right(Tq, T))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **mask)


def cuda_contenders(q: Tensor, k: Tensor, v: Tensor, evicted_at: Tensor, q_start: int) -> dict[str, Callable]:
    """Name -> what prepares all that the record alone decides, and returns the attention to be timed."""
    from torch.nn.attention import SDPBackend, flex_attention, sdpa_kernel

    Tq, T = q.shape[2], k.shape[2]
    by_head = evicted_at.repeat_interleave(H // G, dim=1)
    # its faster kernels want static shapes
    listed = torch.compile(flex_attention.create_block_mask, dynamic=False)
    attention = torch.compile(flex_attention.flex_attention, dynamic=False)

    def ours():
        layer = Record(evicted_at[None])[0]
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

    def seen(b, h, i, j):
        return (j <= i + q_start) & (i + q_start < by_head[b, h, j])

    def flex():
        block_mask = listed(seen, 1, H, Tq, T, device=q.device)
        return lambda: attention(q, k, v, block_mask=block_mask, enable_gqa=True)

    return dict(ours=ours, flash=lambda: flash, mask=mask, flex=flex)


def cpu_contenders(q: Tensor, k: Tensor, v: Tensor, evicted_at: Tensor, q_start: int) -> dict[str, Callable]:
    plain = partial(kernel.attention_torch, q, k, v, Record(evicted_at[None])[0], q_start)
    return dict(torch=lambda: plain, dense=lambda: partial(dense_sdpa, q, k, v))


def measure(prepare: Callable, qkv: list[Tensor], pairs: int) -> dict:
    """Milliseconds forward and forward + backward; on CUDA also to prepare, TFLOP/s on visible pairs, and peak MiB."""
    device = qkv[0].device.type
    row = {}
    try:
        held = torch.cuda.memory_allocated() if device == "cuda" else 0
        attention = prepare()
        do = torch.randn_like(attention())
        row["forward"] = milliseconds(attention, device)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        row["both"] = milliseconds(lambda: torch.autograd.grad(attention(), qkv, do), device)
        if device == "cuda":
            row["mib"] = (torch.cuda.max_memory_allocated() - held) / 2**20  # with what was prepared
            row["prepare"] = milliseconds(prepare, device)
            # two products of matrices forward and five backward, 2 D operations for a pair in each
            for name, products in (("forward", 2), ("both", 7)):
                row[f"tflops_{name}"] = products * 2 * do.shape[-1] * pairs / row[name] / 1e9
    except Exception as e:  # a row that cannot be had says why
        reason = "out of memory" if isinstance(e, torch.OutOfMemoryError) else str(e) or type(e).__name__
        row["error"] = reason.splitlines()[0][:80]
    return row


def shapes(device: str) -> Iterator[tuple[int, int, int, str]]:
    """D, T, q_start and pattern of each measurement."""
    if device == "cuda":
        cases = itertools.product((64, 128), LENGTHS, (False, True), PATTERNS)
    else:
        # the plain version does the same work whatever is evicted
        cases = itertools.product((64,), CPU_LENGTHS, (False, True), ["25% kept"])
    for D, T, response_only, pattern in cases:
        yield D, T, prompt_length(T) if response_only else 0, pattern


def measurements(device: str, dtype: torch.dtype, contenders: Callable) -> Iterator[dict]:
    """Every contender at every shape, on random queries, keys and values and a record for each kv head."""
    for D, T, q_start, pattern in shapes(device):
        record = torch.stack([PATTERNS[pattern](T, seed=seed) for seed in range(G)])[None].to(device)
        sizes = (1, H, T - q_start, D), (1, G, T, D), (1, G, T, D)
        qkv = [torch.randn(size, device=device, dtype=dtype, requires_grad=True) for size in sizes]
        pairs = visible_pairs(record, q_start, T - q_start) * H // G
        for name, prepare in contenders(*qkv, record, q_start).items():
            yield dict(name=name, D=D, T=T, q_start=q_start, pattern=pattern) | measure(prepare, qkv, pairs)


def time_table(device: str) -> list[dict]:
    """Print what `measurements` finds, as it is found; the same as rows."""
    if device == "cuda":
        dtype, contenders, columns = torch.bfloat16, cuda_contenders, CUDA_COLUMNS
        print("\nTFLOP/s count visible pairs only; MiB is the peak of forward and backward, with what was prepared")
    else:
        dtype, contenders, columns = torch.float32, cpu_contenders, CPU_COLUMNS
    print(f"\nB = 1, H = {H}, G = {G}, {dtype}")
    print(f"{'D':>3} {'T':>6} {'pattern':9} {'rows':9} {'name':6}" + "".join(f"{c:>15}" for c in columns.values()))
    rows = []
    for row in measurements(device, dtype, contenders):
        where = "response" if row["q_start"] else "all"
        figures = "  " + row["error"] if "error" in row else "".join(f"{row[key]:15.2f}" for key in columns)
        print(f"{row['D']:3} {row['T']:6} {row['pattern']:9} {where:9} {row['name']:6}" + figures, flush=True)
        rows.append(row)
    return rows


def writable(text: str) -> Path:
    """The path, if a file can be written there: better to know before minutes of work than after."""
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as e:
        raise argparse.ArgumentTypeError(f"cannot write {path}: {e.strerror}") from e
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=writable, default="out/kernels.json", help="file for all figures, as JSON")
    out = parser.parse_args().out
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    found = dict(device=name, torch=torch.__version__)
    errors = {}
    if device == "cuda":
        torch._dynamo.config.recompile_limit = 256  # past it, FlexAttention would run uncompiled
        errors = kernel.check(device)
        # JSON has no NaN
        found["errors"] = {case: error if math.isfinite(error) else None for case, error in errors.items()}
    found["tile_ratios"] = tile_table()
    found["times"] = time_table(device)
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(out)
    return int(not all(error < kernel.LIMIT for error in errors.values()))


if __name__ == "__main__":
    raise SystemExit(main())
