"""The area of the tiles that the kernels visit and, on CUDA, their time beside other attentions.

    python -m experiments.kernels

The kernels are timed beside SDPA's flash (causal, without evictions: the hardware's limit), SDPA with a boolean mask,
and FlexAttention with the same mask, once in position order and once with our sorted keys and tile lists, after a check
that they are right. TFLOP/s count visible pairs only. MiB is the peak of forward and backward, with what is prepared
once for a mask. The letters are those of kernel.py.
"""

import argparse
import itertools
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import BlockMask
from tqdm import tqdm

import kernel
from experiments.common import command, markdown
from harness.cli import in_short, require
from kernel import EPOCH, NEVER, Blocks, ShadowMask

H, G = 16, 4
LENGTHS = 2048, 8192, 32768
ORDERS = {"position": None, "time of eviction": 1, f"epoch of {EPOCH}": EPOCH}  # of the keys -> epoch of `list_tiles`


def prompt_length(T: int) -> int:
    return T * 7 // 8


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


def compressed_once(T: int, kept: float, seed: int) -> Tensor:
    """evicted_at (T,) where a random share of the prompt's keys is kept when it ends, and all of the response."""
    P = prompt_length(T)
    return rolling(T, round(P * kept), P, seed)


PATTERNS = {f"{kept:.0%} kept": partial(compressed_once, kept=kept) for kept in (1, 0.5, 0.25, 0.1)}
PATTERNS["rolling"] = partial(rolling, budget=1024, interval=128)


def visible_pairs(evicted_at: Tensor, q_start: int, Tq: int) -> int:
    """(query, key) pairs in which the key is visible, over all rows of evicted_at (..., T)."""
    first = torch.arange(evicted_at.shape[-1], device=evicted_at.device).clamp(min=q_start)
    return (evicted_at.clamp(max=q_start + Tq) - first).clamp(min=0).sum().item()


def tile_ratio(evicted_at: Tensor, q_start: int, Tq: int, blocks: Blocks, epoch: int | None = EPOCH) -> float:
    """Area of the visited tiles over visible pairs: 1 if no tile holds a hidden pair."""
    tiles = kernel.list_tiles(evicted_at.flatten(0, -2), q_start, Tq, blocks, epoch)
    visited = len(tiles.by_block.index) - 1
    return visited * blocks.M * blocks.N / visible_pairs(evicted_at, q_start, Tq)


def tile_ratios() -> list[dict]:
    """`tile_ratio` for each order of the keys, for all queries and for those of the response."""
    blocks = kernel.block_sizes(torch.bfloat16, 64, shared_memory=0)  # for D = 64, the same on all GPUs
    rows = []
    for T, pattern in itertools.product(LENGTHS, PATTERNS):
        evicted_at = PATTERNS[pattern](T, seed=0)[None]
        row = dict(T=T, keys=pattern)
        starts = dict(all=0, response=prompt_length(T))
        for (order, epoch), (queries, q_start) in itertools.product(ORDERS.items(), starts.items()):
            row[f"{order}, {queries}"] = tile_ratio(evicted_at, q_start, T - q_start, blocks, epoch)
        rows.append(row)
    return rows


def flex_on_sorted_keys(q: Tensor, k: Tensor, v: Tensor, layer: kernel.LayerMask, q_start: int, attention: Callable):
    """FlexAttention on the sorted keys and tile lists of the kernels. It tells the kernels from the sorting."""
    tiles, per_group = kernel.tiles_for(q, layer, q_start), q.shape[1] // k.shape[1]
    M, N = tiles.blocks[:2]
    U, K = tiles.first_query_UK.shape
    I, J = -(-q.shape[2] // M), K // N
    row_BH = tiles.row_BG.repeat_interleave(per_group, dim=1)
    index, bounds_3X = tiles.by_block.index, tiles.by_block.bounds.T

    def padded(begin_X: Tensor, end_X: Tensor) -> tuple[Tensor, Tensor]:  # how many tiles each block visits, and which
        at_XJ = (begin_X[:, None] + torch.arange(J, device=q.device)).clamp(max=len(index) - 1)
        return (end_X - begin_X).int().view(U, I)[row_BH], index[at_XJ].view(U, I, J)[row_BH]

    def visible(b, h, i, n):
        row = row_BH[b, h]
        return (tiles.first_query_UK[row, n] <= i + q_start) & (i + q_start < tiles.evicted_at_UK[row, n])

    lists = *padded(*bounds_3X[1:]), *padded(*bounds_3X[:2])  # the partly visible, then the fully visible
    block_mask = BlockMask.from_kv_blocks(*lists, (M, N), mask_mod=visible, seq_lengths=(q.shape[2], K))
    order_BGK1 = tiles.order_UK[tiles.row_BG][..., None]
    k, v = (x.take_along_dim(order_BGK1, dim=2) for x in (k, v))
    return lambda: attention(q, k, v, block_mask=block_mask, enable_gqa=True)


def contenders(q: Tensor, k: Tensor, v: Tensor, evicted_at: Tensor, q_start: int) -> dict[str, Callable]:
    """Name -> a function that prepares what depends on the mask alone, and returns the attention to be timed."""
    from torch.nn.attention import SDPBackend, flex_attention, sdpa_kernel

    Tq, T = q.shape[2], k.shape[2]
    by_head = evicted_at.repeat_interleave(H // G, dim=1)
    # its faster kernels need static shapes
    block_mask_of = torch.compile(flex_attention.create_block_mask, dynamic=False)
    attention = torch.compile(flex_attention.flex_attention, dynamic=False)

    def ours():
        layer = ShadowMask(evicted_at[None])[0]
        kernel.tiles_for(q, layer, q_start)  # listed here, not when the attention is timed
        return lambda: kernel.attention_triton(q, k, v, layer, q_start)

    def flash() -> Tensor:
        causal = dict(is_causal=True) if Tq == T else dict(attn_mask=causal_lower_right(Tq, T))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **causal)

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

    def flex_sorted():
        return flex_on_sorted_keys(q, k, v, ShadowMask(evicted_at[None])[0], q_start, attention)

    return dict(ours=ours, flash=lambda: flash, mask=mask, flex=flex, flex_sorted=flex_sorted)


def measure(prepare: Callable, qkv: list[Tensor], pairs: int) -> dict[str, float]:
    """Median milliseconds with a cold L2 cache, forward, with backward, and to prepare; TFLOP/s; peak MiB."""
    milliseconds = partial(kernel.triton.testing.do_bench, return_mode="median")
    held = torch.cuda.memory_allocated()
    attention = prepare()
    do = torch.randn_like(attention())
    forward = milliseconds(attention)
    torch.cuda.reset_peak_memory_stats()
    both = milliseconds(lambda: torch.autograd.grad(attention(), qkv, do))
    row = {"forward ms": forward, "+ backward ms": both}
    row["MiB"] = (torch.cuda.max_memory_allocated() - held) / 2**20
    row["prepare ms"] = milliseconds(prepare)  # after the peak was read, because it makes a second mask
    # two products of matrices forward and five backward, 2 D operations for a pair in each
    row["TFLOP/s"] = 2 * 2 * do.shape[-1] * pairs / forward / 1e9
    row["+ backward"] = 7 * 2 * do.shape[-1] * pairs / both / 1e9
    return row


def times(device: str) -> list[dict]:
    """A row for each contender and shape, with random queries, keys and values, and a mask for each kv head."""
    torch._dynamo.config.recompile_limit = 256  # past it, FlexAttention would run uncompiled
    found = []
    for D, T, pattern, queries in tqdm(list(itertools.product((64, 128), LENGTHS, PATTERNS, ("all", "response")))):
        q_start = 0 if queries == "all" else prompt_length(T)
        evicted_at = torch.stack([PATTERNS[pattern](T, seed=g) for g in range(G)])[None].to(device)
        sizes = (1, H, T - q_start, D), (1, G, T, D), (1, G, T, D)
        qkv = [torch.randn(size, device=device, dtype=torch.bfloat16, requires_grad=True) for size in sizes]
        pairs = visible_pairs(evicted_at, q_start, T - q_start) * H // G
        for name, prepare in contenders(*qkv, evicted_at, q_start).items():
            row = dict(D=D, T=T, keys=pattern, queries=queries, attention=name)
            try:
                row |= measure(prepare, qkv, pairs)
            except Exception as e:  # out of memory, or a shape that the contender does not support
                row["attention"] += f": {in_short(e)}"
            found.append(row)
    return found


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print("area of the tiles of 128 x 64 over visible pairs, by order of the keys")
    print(markdown(tile_ratios(), ["T", "keys"]))
    if not torch.cuda.is_available():
        print("there is no CUDA device: the kernels are not timed")
        return
    errors = kernel.check("cuda")
    require(all(error < kernel.LIMIT for error in errors.values()), "the kernels are wrong: see the check above")
    print(f"B = 1, H = {H}, G = {G}, on {torch.cuda.get_device_name()}")
    print(markdown(times("cuda"), ["D", "T", "keys", "queries", "attention"]))


if __name__ == "__main__":
    command(main)
