"""Attention under a shadow mask: each key is visible from the query at its own position until it is evicted.

    visible(i, j) = j <= i < evicted_at[j]
    forward:   s_ij = q_i · k_j / √D     lse_i = log Σ_j exp(s_ij)     p_ij = exp(s_ij - lse_i)     out_i = Σ_j p_ij v_j
    backward:  δ_i = do_i · out_i        ds_ij = p_ij (do_i · v_j - δ_i)
               dq_i = Σ_j ds_ij k_j / √D     dk_j = Σ_i ds_ij q_i / √D     dv_j = Σ_i p_ij do_i     over visible pairs

Eviction is permanent, so a key's life is an interval and one integer describes it. The T×T mask is never stored: it
exists inside one attention call and nowhere else. `attention_torch` is this definition. `attention_triton` computes
the same at a cost that follows the visible pairs, as FlashAttention does (2205.14135, 2307.08691): in tiles of M
queries by N keys, of which it visits those that may hold a visible pair. Softmax does not care about the order of the
keys, so they are sorted first, by the epoch in which they die, latest first, then by position. Sixteen keys, named by
their last digit, four of which (1, 4, 6, 11) survive an eviction at 12; "#" is visible; the last query of each block:

                        in position order                               sorted
    key       0 1 2 3 | 4 5 6 7 | 8 9 0 1 | 2 3 4 5      1 4 6 1 | 2 3 4 5 | 0 2 3 5 | 7 8 9 0
    query 3   # # # # |         |         |              #       |         | # # #   |
    query 7   # # # # | # # # # |         |              # # #   |         | # # # # | #
    query 11  # # # # | # # # # | # # # # |              # # # # |         | # # # # | # # # #
    query 15    #     | #   #   |       # | # # # #      # # # # | # # # # |         |

In position order the last block visits all four tiles, sorted it visits two: survivors stand together, and within an
epoch the keys that a block can see are a prefix, until the epoch's keys begin to die. Why epochs of 512 positions:
sorted by the exact time of death, neighbours under rolling eviction were born far apart, so their tile is visited long
before most of it is visible; with longer epochs it is visited long after most of it has died.

    python kernel.py          checks the kernels, counts their tiles, and on CUDA times them beside others

Dimension letters: B sequences, H query heads, G kv heads (H/G query heads share one), Tq queries, Tk keys, D head dim;
I blocks of M queries, J tiles of N keys, K = J·N sorted places.
"""

import itertools
import json
import math
import os
import statistics
import sys
import time
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it when it is imported

try:
    import triton
    import triton.language as tl
except ImportError:  # there is no triton outside Linux; the plain version runs everywhere
    triton, tl = None, SimpleNamespace(constexpr=None)

jit = triton.jit if triton else lambda kernel: kernel

NEVER = 2**31 - 1  # evicted_at of a key that is never evicted; padding has 0
EPOCH = 512  # positions; deaths closer than this are sorted as if they were one


def attention_torch(q: Tensor, k: Tensor, v: Tensor, evicted_at: Tensor, q_start: int) -> Tensor:
    """The definition, in plain PyTorch: `shadow_attention` without its checks."""
    B, H, Tq, D = q.shape
    G, Tk = k.shape[1:3]
    i = q_start + torch.arange(Tq, device=q.device)[:, None]
    j = torch.arange(Tk, device=q.device)
    hidden = (j > i) | (i >= evicted_at[:, :, None, :])  # [B, G, Tq, Tk]
    hidden = hidden.repeat(1, 1, H // G, 1)  # [B, G, H/G * Tq, Tk]: the rows of the query heads that share a kv head
    # accumulated in float64: then float32 results do not depend on the order or the number of the hidden keys, and a
    # learner with the whole sequence before it reproduces the sampler's small cache to the bit
    score = q.double().reshape(B, G, H // G * Tq, D) @ k.double().transpose(-1, -2) * D**-0.5
    # a finite floor instead of -inf: a row that sees nothing must give zeros and zero gradients, not NaN
    weight = score.masked_fill(hidden, torch.finfo(score.dtype).min).softmax(dim=-1).masked_fill(hidden, 0)
    return (weight @ v.double()).view(B, H, Tq, D).to(q.dtype)


class Blocks(NamedTuple):
    M: int  # queries in a block
    N: int  # keys in a tile
    R: int  # queries at a time in the gradient of the keys
    num_warps: int


def block_sizes(dtype: torch.dtype, D: int, roomy: bool) -> Blocks:
    """The largest blocks that fit registers and shared memory; `roomy` is a GPU with some 200 KB of it per block."""
    if dtype == torch.float32:  # true float32 has no tensor cores: what they would do takes many more registers
        return Blocks(32, 32, 32, 4) if D <= 64 else Blocks(16, 32, 16, 8)
    return Blocks(128 if roomy or D <= 64 else 64, 64, 64, 8)


class Tiles(NamedTuple):
    """What one record makes of the T×T square: the order of the keys, and the tiles that may hold a visible pair."""

    blocks: Blocks
    q_start: int
    order_BGK: Tensor  # int64, position of the key at each sorted place; K is Tk rounded up to whole tiles
    born_BGK: Tensor  # int32, the first query that may see the key; NEVER where no query does
    dies_BGK: Tensor  # int32, the first that no longer does
    tile_BGIJ: Tensor  # int32, tiles of each block: first those that are visible in full, then in part, then the rest
    tiles_BGI2: Tensor  # int32, how many of the first and of the second kind
    block_BGJI: Tensor  # the same from the side of the keys: blocks of each tile
    blocks_BGJ2: Tensor


def list_tiles(evicted_at: Tensor, q_start: int, Tq: int, blocks: Blocks, epoch: int | None = EPOCH) -> Tiles:
    """Sort the keys of evicted_at (B, G, Tk) and list the tiles that Tq queries from q_start on have to visit.

    epoch: None leaves the keys in position order, to see what sorting is worth.
    """
    (M, N, _, _), Tk, last = blocks, evicted_at.shape[-1], q_start + Tq - 1
    j = torch.arange(Tk, device=evicted_at.device)
    unseen_BGT = (evicted_at <= j.clamp(min=q_start)) | (j > last)
    order_BGT = j.expand_as(evicted_at)
    if epoch is not None:
        epoch_BGT = (evicted_at.long() + epoch - 1) // epoch
        # one int64 to sort by: latest epoch first, then position; keys that no query sees come last of all
        order_BGT = (j - epoch_BGT * Tk).masked_fill(unseen_BGT, Tk).argsort(dim=-1, stable=True)
    born_BGT = torch.where(unseen_BGT, NEVER, j).gather(-1, order_BGT)
    dies_BGT = evicted_at.long().masked_fill(unseen_BGT, 0).gather(-1, order_BGT)
    pads = ((order_BGT, 0), (born_BGT, NEVER), (dies_BGT, 0))
    order_BGK, born_BGK, dies_BGK = (F.pad(t, (0, -Tk % N), value=fill) for t, fill in pads)
    born_BGJN, dies_BGJN = born_BGK.unflatten(-1, (-1, N)), dies_BGK.unflatten(-1, (-1, N))
    first_I1 = q_start + torch.arange(0, Tq, M, device=j.device)[:, None]
    last_I1 = (first_I1 + M - 1).clamp(max=last)
    some_BGIJ = (born_BGJN.amin(-1)[:, :, None] <= last_I1) & (dies_BGJN.amax(-1)[:, :, None] > first_I1)
    full_BGIJ = (born_BGJN.amax(-1)[:, :, None] <= first_I1) & (dies_BGJN.amin(-1)[:, :, None] > last_I1)
    kind_BGIJ = 2 - some_BGIJ.to(torch.uint8) - full_BGIJ.to(torch.uint8)  # 0 in full, 1 in part, 2 not at all
    lists = []
    for kind in (kind_BGIJ, kind_BGIJ.transpose(-1, -2).contiguous()):
        lists.append(kind.argsort(dim=-1, stable=True).int())
        lists.append(torch.stack(((kind == 0).sum(-1), (kind == 1).sum(-1)), dim=-1).int())
    return Tiles(blocks, q_start, order_BGK, born_BGK.int(), dies_BGK.int(), *lists)


# In all three kernels: tensors are contiguous, K and V in sorted order; scores are in units of log 2, because exp2 is
# what the hardware has, so SCALE is log2(e)/√D; offsets between heads are 64-bit scalars, those within one 32-bit.


@jit
def visible(BORN, DIES, i, j):
    """Pairs of queries i [M] and sorted places j [N] that see one another: [M, N]."""
    return (tl.load(BORN + j)[None, :] <= i[:, None]) & (i[:, None] < tl.load(DIES + j)[None, :])


@jit
def own_block(H, G, I):
    """This program's block of queries, its place among all query heads (B·H) and among all kv heads (B·G)."""
    # the longest rows first, so that no long one is left over when the others are done
    heads = tl.num_programs(0) // I
    block, bh = I - 1 - tl.program_id(0) // heads, (tl.program_id(0) % heads).to(tl.int64)
    return block, bh, bh // H * G + bh % H // (H // G)


@jit
def forward_kernel(
    Q, K, V, BORN, DIES, LIST, COUNT, OUT, LSE, SCALE, q_start, H, G, Tq, I, J,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head: out_i and lse_i in one pass over its tiles, with a running maximum."""
    block, bh, bg = own_block(H, G, I)
    row, d, n = block * M + tl.arange(0, M), tl.arange(0, D), tl.arange(0, N)
    at, inside = row[:, None] * D + d, row[:, None] < Tq
    q = tl.load(Q + bh * Tq * D + at, mask=inside, other=0.0)  # [M, D]
    top = tl.full([M], -float("inf"), tl.float32)  # largest score so far
    total = tl.zeros([M], tl.float32)  # Σ exp2(score - top)
    out = tl.zeros([M, D], tl.float32)
    LIST += (bg * I + block) * J
    COUNT += (bg * I + block) * 2
    full = tl.load(COUNT)
    # first the tiles that are visible in full, then, with masks, those that are in part
    for masked in tl.static_range(2):
        for step in range(full * masked, full + tl.load(COUNT + 1) * masked):
            first = (bg * J + tl.load(LIST + step)) * N
            k = tl.load(K + first * D + (n[:, None] * D + d))  # [N, D]
            score = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE  # [M, N]
            if masked:
                score = tl.where(visible(BORN + first, DIES + first, q_start + row, n), score, -float("inf"))
            new = tl.maximum(top, tl.max(score, 1))
            # a row that has seen nothing yet has no largest score to subtract
            base = tl.where(new == -float("inf"), 0.0, new) if masked else new
            weight, shrink = tl.exp2(score - base[:, None]), tl.exp2(top - base)
            v = tl.load(V + first * D + (n[:, None] * D + d))
            out = tl.dot(weight.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
            total = total * shrink + tl.sum(weight, 1)
            top = new
    # a row that saw nothing: out = 0, and an lse that harms nobody
    top, total = tl.where(total == 0.0, 0.0, top), tl.where(total == 0.0, 1.0, total)
    tl.store(OUT + bh * Tq * D + at, (out / total[:, None]).to(OUT.dtype.element_ty), mask=inside)
    tl.store(LSE + bh * Tq + row, top + tl.log2(total), mask=row < Tq)


@jit
def query_gradient_kernel(
    Q, K, V, BORN, DIES, LIST, COUNT, OUT, LSE, DOUT, DELTA, DQ, SCALE, scale, q_start, H, G, Tq, I, J,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head: δ_i, for the next kernel, and dq_i."""
    block, bh, bg = own_block(H, G, I)
    row, d, n = block * M + tl.arange(0, M), tl.arange(0, D), tl.arange(0, N)
    at, inside = row[:, None] * D + d, row[:, None] < Tq
    out = tl.load(OUT + bh * Tq * D + at, mask=inside, other=0.0)  # [M, D]
    do = tl.load(DOUT + bh * Tq * D + at, mask=inside, other=0.0)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(DELTA + bh * Tq + row, delta, mask=row < Tq)
    q = tl.load(Q + bh * Tq * D + at, mask=inside, other=0.0)
    lse = tl.load(LSE + bh * Tq + row, mask=row < Tq, other=0.0)
    dq = tl.zeros([M, D], tl.float32)
    LIST += (bg * I + block) * J
    COUNT += (bg * I + block) * 2
    full = tl.load(COUNT)
    for masked in tl.static_range(2):
        for step in range(full * masked, full + tl.load(COUNT + 1) * masked):
            first = (bg * J + tl.load(LIST + step)) * N
            k = tl.load(K + first * D + (n[:, None] * D + d))  # [N, D]
            v = tl.load(V + first * D + (n[:, None] * D + d))
            score = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE  # [M, N]
            if masked:
                score = tl.where(visible(BORN + first, DIES + first, q_start + row, n), score, -float("inf"))
            p = tl.exp2(score - lse[:, None])
            ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    tl.store(DQ + bh * Tq * D + at, (dq * scale).to(DQ.dtype.element_ty), mask=inside)


@jit
def key_gradient_kernel(
    Q, K, V, BORN, DIES, LIST, COUNT, LSE, DOUT, DELTA, DK, DV, SCALE, scale, q_start, H, G, Tq, I, J,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """One tile of keys of one kv head: dk_j and dv_j over all query heads that share it; one writer, no atomics.

    Two sums stay in registers here instead of one, so a block of M queries is taken in slices of R.
    """
    groups = tl.num_programs(0) // J
    tile, bg = tl.program_id(0) // groups, (tl.program_id(0) % groups).to(tl.int64)
    d, r, n = tl.arange(0, D), tl.arange(0, R), tl.arange(0, N)
    first, at = (bg * J + tile) * N, n[:, None] * D + d
    k, v = tl.load(K + first * D + at), tl.load(V + first * D + at)  # [N, D]
    dk, dv = tl.zeros([N, D], tl.float32), tl.zeros([N, D], tl.float32)
    LIST += (bg * J + tile) * I
    COUNT += (bg * J + tile) * 2
    full = tl.load(COUNT)
    for head in range(H // G):
        bh = bg * (H // G) + head
        for masked in tl.static_range(2):
            for step in range(full * masked * (M // R), (full + tl.load(COUNT + 1) * masked) * (M // R)):
                start = tl.load(LIST + step // (M // R)) * M + step % (M // R) * R
                past, inside = bh * Tq + start, r < Tq - start
                q = tl.load(Q + past * D + (r[:, None] * D + d), mask=inside[:, None], other=0.0)  # [R, D]
                do = tl.load(DOUT + past * D + (r[:, None] * D + d), mask=inside[:, None], other=0.0)
                lse = tl.load(LSE + past + r, mask=inside, other=0.0)
                delta = tl.load(DELTA + past + r, mask=inside, other=0.0)
                score = tl.dot(k, tl.trans(q), input_precision="ieee") * SCALE  # [N, R]
                # rows past the end have p = 1 or 0, but do = δ = 0: they add nothing
                p = tl.exp2(score - lse[None, :])
                if masked:
                    p = tl.where(tl.trans(visible(BORN + first, DIES + first, q_start + start + r, n)), p, 0.0)
                dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
                ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :])
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    tl.store(DK + first * D + at, (dk * scale).to(DK.dtype.element_ty))
    tl.store(DV + first * D + at, dv.to(DV.dtype.element_ty))


KERNELS = (forward_kernel, query_gradient_kernel, key_gradient_kernel)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STAGES = 2  # tiles in flight at once


def launch(kernel, programs: int, *args, tiles: Tiles) -> None:
    (M, N, R, num_warps), q = tiles.blocks, args[0]
    sizes = dict(M=M, N=N, D=q.shape[-1]) | (dict(R=R) if kernel is key_gradient_kernel else {})
    if programs:
        with torch.cuda.device_of(q):  # triton launches on the current device
            kernel[(programs,)](*args, **sizes, num_warps=num_warps, num_stages=STAGES)


class TritonAttention(torch.autograd.Function):
    """out = apply(q, k, v, tiles, scale): q (B, H, Tq, D), k and v (B, G, Tk, D), D a power of two."""

    @staticmethod
    def in_order(x_BGTD: Tensor, tiles: Tiles) -> Tensor:
        return x_BGTD.gather(2, tiles.order_BGK[..., None].expand(-1, -1, -1, x_BGTD.shape[-1]))

    @staticmethod
    def in_place(x_BGKD: Tensor, tiles: Tiles, Tk: int) -> Tensor:
        index = tiles.order_BGK[:, :, :Tk, None].expand(-1, -1, -1, x_BGKD.shape[-1])
        return torch.empty_like(x_BGKD[:, :, :Tk]).scatter_(2, index, x_BGKD[:, :, :Tk])

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, scale: float) -> Tensor:
        q = q.contiguous()
        (B, H, Tq, _), G, (I, J) = q.shape, k.shape[1], tiles.tile_BGIJ.shape[-2:]
        out, lse = torch.empty_like(q), q.new_empty(B, H, Tq, dtype=torch.float32)
        ordered = [TritonAttention.in_order(t, tiles) for t in (k, v)]
        mask = tiles.born_BGK, tiles.dies_BGK, tiles.tile_BGIJ, tiles.tiles_BGI2
        numbers = scale / math.log(2), tiles.q_start, H, G, Tq, I, J
        launch(forward_kernel, B * H * I, q, *ordered, *mask, out, lse, *numbers, tiles=tiles)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.tiles, ctx.scale = tiles, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do: Tensor) -> tuple:
        (q, k, v, out, lse), tiles, do = ctx.saved_tensors, ctx.tiles, do.contiguous()
        (B, H, Tq, _), (_, G, Tk, _), (I, J) = q.shape, k.shape, tiles.tile_BGIJ.shape[-2:]
        dq, delta = torch.empty_like(q), torch.empty_like(lse)
        k, v = (TritonAttention.in_order(t, tiles) for t in (k, v))
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        keys = q, k, v, tiles.born_BGK, tiles.dies_BGK
        numbers = ctx.scale / math.log(2), ctx.scale, tiles.q_start, H, G, Tq, I, J
        lists = tiles.tile_BGIJ, tiles.tiles_BGI2, out, lse, do, delta, dq
        launch(query_gradient_kernel, B * H * I, *keys, *lists, *numbers, tiles=tiles)
        lists = tiles.block_BGJI, tiles.blocks_BGJ2, lse, do, delta, dk, dv
        launch(key_gradient_kernel, B * G * J, *keys, *lists, *numbers, tiles=tiles)
        return dq, *(TritonAttention.in_place(t, tiles, Tk) for t in (dk, dv)), None, None


def tiles_for(q: Tensor, evicted_at: Tensor, q_start: int) -> Tiles:
    """`list_tiles` with the blocks that suit q's device and type, and no larger than the tensors."""
    roomy = q.is_cuda and torch.cuda.get_device_properties(q.device).shared_memory_per_block_optin > 200_000
    *largest, num_warps = block_sizes(q.dtype, q.shape[-1], roomy)
    lengths = q.shape[2], evicted_at.shape[2], q.shape[2]
    M, N, R = (min(size, max(16, triton.next_power_of_2(T))) for size, T in zip(largest, lengths, strict=True))
    return list_tiles(evicted_at, q_start, q.shape[2], Blocks(M, N, R, num_warps))


def attention_triton(
    q: Tensor, k: Tensor, v: Tensor, evicted_at: Tensor, q_start: int, tiles: Tiles | None = None
) -> Tensor:
    """`attention_torch` at a cost that follows the visible pairs; accumulates in float32. `tiles`: listed before."""
    D = q.shape[-1]
    if q.dtype not in DTYPES:
        names = ", ".join(str(t).removeprefix("torch.") for t in DTYPES)
        raise ValueError(f"backend 'triton' takes {names}, got {q.dtype}; take 'torch'")
    if D > 128:
        raise ValueError(f"backend 'triton' takes head dims up to 128, got {D}; take 'torch'")
    tiles = tiles or tiles_for(q, evicted_at, q_start)
    if pad := max(16, triton.next_power_of_2(D)) - D:
        q, k, v = (F.pad(t, (0, pad)) for t in (q, k, v))  # zeros add nothing to a score
    return TritonAttention.apply(q, k, v, tiles, D**-0.5)[..., :D]


BACKENDS = {"torch": attention_torch, "triton": attention_triton}


def backend_for(device: str, backend: str | None) -> str:
    """The backend in use on a device: the one asked for, or Triton on CUDA and PyTorch elsewhere.

    Raises ValueError where the one asked for is unknown or cannot run there.
    """
    if backend is None:
        return "triton" if device == "cuda" and triton is not None else "torch"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "triton" and triton is None:
        raise ValueError("backend 'triton' needs the package triton, which is there for Linux only; take 'torch'")
    if backend == "triton" and device != "cuda" and not triton.knobs.runtime.interpret:
        raise ValueError(
            f"backend 'triton' needs CUDA tensors, got {device}; for the interpreter set TRITON_INTERPRET=1 before "
            "Python starts, or take 'torch'"
        )
    return backend


def shadow_attention(
    q: Tensor, k: Tensor, v: Tensor, evicted_at: Tensor, q_start: int = 0, backend: str | None = None
) -> Tensor:
    """Softmax attention in which query i sees key j if j <= i < evicted_at[j].

    q (B, H, Tq, D); k, v (B, G, Tk, D); evicted_at (B, G, Tk) int32. Key j stands at position j, query i at position
    q_start + i. Query head h reads kv head h // (H/G). Returns (B, H, Tq, D); a row that sees nothing returns zeros
    and has zero gradients. backend: a name in BACKENDS, or None for the best one for q's device.
    Raises ValueError where shapes, dtypes or devices do not fit together, or the backend cannot take them.
    """
    tensors = dict(q=q, k=k, v=v, evicted_at=evicted_at)
    shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())
    if (
        q.ndim != 4
        or k.ndim != 4
        or k.shape[::3] != q.shape[::3]
        or v.shape != k.shape
        or evicted_at.shape != k.shape[:3]
    ):
        raise ValueError(f"shapes do not fit: {shapes}; want (B, H, Tq, D), twice (B, G, Tk, D), and (B, G, Tk)")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"query heads must be a multiple of kv heads, got {q.shape[1]} and {k.shape[1]}")
    if evicted_at.dtype != torch.int32:
        raise ValueError(f"evicted_at must be int32, got {evicted_at.dtype}")
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        raise ValueError(f"q, k and v must be of one floating type, got {q.dtype}, {k.dtype}, {v.dtype}")
    if len({t.device for t in tensors.values()}) > 1:
        raise ValueError(f"tensors must be on one device, got {', '.join(str(t.device) for t in tensors.values())}")
    if q_start < 0:
        raise ValueError(f"q_start must be at least 0, got {q_start}")
    return BACKENDS[backend_for(q.device.type, backend)](q, k, v, evicted_at, q_start)


def compressed_once(T: int, kept: float, seed: int) -> Tensor:
    """evicted_at (T,) of a prompt of 7/8 T of which a random share survives, and of a response that stays."""
    P, generator = T * 7 // 8, torch.Generator().manual_seed(seed)
    evicted_at = torch.full((T,), NEVER, dtype=torch.int32)
    evicted_at[torch.randperm(P, generator=generator)[round(P * kept) :]] = P
    return evicted_at


def rolling(T: int, budget: int, interval: int, seed: int) -> Tensor:
    """evicted_at (T,) where every `interval` tokens random victims leave `budget` keys: the worst case for sorting."""
    generator, live = torch.Generator().manual_seed(seed), torch.arange(0)
    evicted_at = torch.full((T,), NEVER, dtype=torch.int32)
    for now in range(interval, T, interval):
        live = torch.cat((live, torch.arange(now - interval, now)))
        shuffled = live[torch.randperm(len(live), generator=generator)]
        live, evicted_at[shuffled[budget:]] = shuffled[:budget], now
    return evicted_at


def visible_pairs(evicted_at: Tensor, q_start: int, Tq: int) -> int:
    """(query, key) pairs in which the key is visible, over all sequences and kv heads."""
    first = torch.arange(evicted_at.shape[-1], device=evicted_at.device).clamp(min=q_start)
    return (evicted_at.clamp(max=q_start + Tq) - first).clamp(min=0).sum().item()


def tile_ratio(evicted_at: Tensor, q_start: int, Tq: int, blocks: Blocks, epoch: int | None = EPOCH) -> float:
    """Area of the tiles that are visited over visible pairs: 1 would be a kernel that wastes nothing."""
    visited = list_tiles(evicted_at, q_start, Tq, blocks, epoch).tiles_BGI2.sum().item()
    return visited * blocks.M * blocks.N / visible_pairs(evicted_at, q_start, Tq)


PATTERNS = {
    f"{kept:.0%} kept": lambda T, seed, kept=kept: compressed_once(T, kept, seed) for kept in (1, 0.5, 0.25, 0.1)
}
PATTERNS["rolling"] = lambda T, seed: rolling(T, 1024, 128, seed)


def check(device: str) -> dict:
    """Largest error of the kernels against `attention_torch`, in units of rounding of the largest value."""
    errors, types, T = {}, *((DTYPES, 1000) if device == "cuda" else ((torch.float32, torch.float16), 100))
    for dtype, D, q_start in itertools.product(types, (64, 128), (0, T * 7 // 8)):
        shapes = (2, 4, T - q_start, D), (2, 2, T, D), (2, 2, T, D), (2, 4, T - q_start, D)
        *qkv, do = (torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes)
        record = torch.stack([compressed_once(T, 0.3, seed) for seed in range(4)]).view(2, 2, T).to(device)
        outs = [shadow_attention(*qkv, record, q_start, backend) for backend in ("triton", "torch")]
        pairs = zip(*((out, *torch.autograd.grad(out, qkv, do)) for out in outs), strict=True)
        worst = torch.stack([(a - b).abs().max() / b.abs().max() for a, b in pairs]).max().item()  # NaN is the largest
        errors[f"{dtype}, D = {D}, q_start = {q_start}"] = worst / torch.finfo(dtype).eps
    return errors


def milliseconds(run, device: str) -> float:
    """Median of several runs after warm-up: device time with a cold L2 cache, or wall time on the CPU."""
    if device == "cuda":
        return triton.testing.do_bench(run, return_mode="median")
    times = []
    for _ in range(8):
        began = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times[1:])


def contenders(q: Tensor, k: Tensor, v: Tensor, evicted_at: Tensor, q_start: int) -> dict:
    """Name -> what prepares all that the record alone decides, and returns the attention to be timed."""
    from torch.nn.attention import SDPBackend, bias, flex_attention, sdpa_kernel

    (_, H, Tq, _), T = q.shape, k.shape[2]
    by_head = evicted_at.repeat_interleave(H // k.shape[1], dim=1)
    causal = dict(is_causal=True) if q_start == 0 else dict(attn_mask=bias.causal_lower_right(Tq, T))

    def sdpa(**mask) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **mask)

    def flash() -> Tensor:  # causal and blind to eviction: what the hardware can do
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return sdpa(**causal)

    def mask():
        i, j = (torch.arange(first, T, device=q.device) for first in (q_start, 0))
        visible_BHqT = (j <= i[:, None]) & (i[:, None] < by_head[:, :, None])
        return lambda: sdpa(attn_mask=visible_BHqT)

    def seen(b, h, i, j):
        return (j <= i + q_start) & (i + q_start < by_head[b, h, j])

    flexible = flex_attention.create_block_mask, flex_attention.flex_attention
    listed, attention = (torch.compile(f, dynamic=False) for f in flexible)  # its faster kernels want static shapes

    def flex():
        block_mask = listed(seen, 1, H, Tq, T, device=q.device)
        return lambda: attention(q, k, v, block_mask=block_mask, enable_gqa=True)

    def ours():
        tiles = tiles_for(q, evicted_at, q_start)
        return lambda: attention_triton(q, k, v, evicted_at, q_start, tiles)

    if q.is_cuda:
        return dict(ours=ours, flash=lambda: flash, mask=mask, flex=flex)
    return dict(
        torch=lambda: partial(attention_torch, q, k, v, evicted_at, q_start), dense=lambda: partial(sdpa, **causal)
    )


def measure(prepare, qkv: list[Tensor], pairs: int) -> dict:
    """Milliseconds to prepare, forward, and forward + backward; TFLOP/s on visible pairs; peak MiB on CUDA."""
    device, row = qkv[0].device.type, {}
    held = torch.cuda.memory_allocated() if device == "cuda" else 0
    try:
        attention = prepare()
        do = torch.randn_like(attention())
        row = dict(prepare=milliseconds(prepare, device), forward=milliseconds(attention, device))
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        row["both"] = milliseconds(lambda: torch.autograd.grad(attention(), qkv, do), device)
        if device == "cuda":
            row["mib"] = (torch.cuda.max_memory_allocated() - held) / 2**20  # with what was prepared
        # two products of matrices forward and five backward, 2 D operations for a pair in each
        for name, products in (("forward", 2), ("both", 7)):
            row[f"tflops_{name}"] = products * 2 * do.shape[-1] * pairs / row[name] / 1e9
    except Exception as e:  # a cell that cannot be had says why
        row["error"] = "out of memory" if isinstance(e, torch.OutOfMemoryError) else str(e).splitlines()[0][:80]
    return row


def main() -> int:
    device, H, G, ratios, times = "cuda" if torch.cuda.is_available() else "cpu", 16, 4, [], []
    torch._dynamo.config.recompile_limit = 256  # past it, FlexAttention would run uncompiled
    errors = check(device)
    for name, error in errors.items():
        print(f"{name:39} error {error:4.1f} eps: {'ok' if error < 16 else 'WRONG'}")
    orders = {"position": None, "time of death": 1, f"epoch of {EPOCH}": EPOCH}
    print("\narea of the tiles of 128 x 64 over visible pairs, in all rows and in the response's, by order of the keys")
    print(f"{'T':>6} {'pattern':9}" + "".join(f"{order:>16}" for order in orders))
    for T, pattern in itertools.product((2048, 8192, 32768), PATTERNS):
        record, blocks = PATTERNS[pattern](T, 0)[None, None], block_sizes(torch.bfloat16, 64, True)
        parts = (0, T), (T * 7 // 8, T // 8)
        found = {name: [tile_ratio(record, *rows, blocks, epoch) for rows in parts] for name, epoch in orders.items()}
        print(f"{T:6} {pattern:9}" + "".join(f"{a:11.2f} {b:.2f}" for a, b in found.values()))
        ratios.append(dict(T=T, pattern=pattern) | found)
    cuda = itertools.product((64, 128), (2048, 8192, 32768), (0, 7), PATTERNS), torch.bfloat16
    # the plain version does the same work whatever is evicted
    shapes, dtype = (
        cuda if device == "cuda" else (itertools.product((64,), (512, 1024), (0, 7), ["25% kept"]), torch.float32)
    )
    print(
        f"\nB = 1, H = {H}, G = {G}, {dtype}: ms forward, forward + backward (prepare; TFLOP/s on visible pairs; MiB)"
    )
    for D, T, eighths, pattern in shapes:
        q_start = T * eighths // 8
        record = torch.stack([PATTERNS[pattern](T, seed) for seed in range(G)])[None].to(device)
        sizes = (1, H, T - q_start, D), (1, G, T, D), (1, G, T, D)
        qkv = [torch.randn(size, device=device, dtype=dtype, requires_grad=True) for size in sizes]
        pairs, line = visible_pairs(record, q_start, T - q_start) * H // G, f"D={D:<3} T={T:<5} {pattern:8} "
        line += "response" if q_start else "all rows"
        for name, prepare in contenders(*qkv, record, q_start).items():
            row = measure(prepare, qkv, pairs)
            cell = "{forward:.2f}, {both:.2f} ({prepare:.1f}; {tflops_forward:.2f}, {tflops_both:.2f}; {mib:.0f})"
            line += f" | {name} " + (row.get("error") or cell.format(**{"mib": math.nan} | row))
            times.append(dict(name=name, D=D, T=T, q_start=q_start, pattern=pattern) | row)
        print(line, flush=True)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(json.dumps(dict(device=name, torch=torch.__version__, errors=errors, tile_ratios=ratios, times=times)))
    return int(not all(error < 16 for error in errors.values()))


if __name__ == "__main__":
    sys.exit(main())
