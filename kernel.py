"""Attention under a shadow mask: each key is visible from the query at its own position until it is evicted.

    visible(i, j) = j <= i < evicted_at[j]
    forward:   s_ij = q_i · k_j / √D     lse_i = log Σ_j exp(s_ij)     p_ij = exp(s_ij - lse_i)     out_i = Σ_j p_ij v_j
    backward:  δ_i = do_i · out_i        ds_ij = p_ij (do_i · v_j - δ_i)
               dq_i = Σ_j ds_ij k_j / √D     dk_j = Σ_i ds_ij q_i / √D     dv_j = Σ_i p_ij do_i     over visible pairs

Eviction is permanent, so one integer per key describes the mask, and no T×T mask outlives an attention call.
`attention_torch` is the definition. `attention_triton` computes the same in tiles of M queries by N keys, as
FlashAttention does (2205.14135, 2307.08691), and visits only the tiles that may hold a visible pair. Softmax does not
depend on the order of the keys, so the kernels sort them first: by the epoch of their eviction, latest first, then by
position. Below, keys a to p stand at positions 0 to 15. Of the keys a to l, only b, e, g and l survive an eviction at
12. Tiles are 4 by 4, and a row shows the last query of a block. # is a visible key, and . is a hidden key in a tile
that the block visits:

               in position order                    sorted
    key        a b c d | e f g h | i j k l | m n o p   b e g l | m n o p | a c d f | h i j k
    query 3    # # # # |         |         |           # . . . |         | # # # . |
    query 7    # # # # | # # # # |         |           # # # . |         | # # # # | # . . .
    query 11   # # # # | # # # # | # # # # |           # # # # |         | # # # # | # # # #
    query 15   . # . . | # . # . | . . . # | # # # #   # # # # | # # # # |         |

In position order the last block visits all four tiles. Sorted, it visits two, because the surviving keys share a tile.
The three blocks above it then visit eight tiles instead of six, so sorting pays in long responses. The length of an
epoch, 512 positions, is a compromise. A tile is visited from the position of its earliest key until the last of its
keys is evicted. Under rolling eviction, keys that are evicted together stand far apart. With short epochs, a tile
therefore mixes distant positions and is visited long before most of its keys are visible. With long epochs, it is
visited long after most of its keys are evicted.

    python kernel.py          checks the kernels against the definition; on a CPU under Triton's interpreter

Letters: B sequences, H query and G kv heads, Tq queries, Tk keys, D head dim, I blocks of M queries, J tiles of N keys,
K keys in all tiles, L layers, U distinct rows of a mask.
"""

import itertools
import math
import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it when it is imported

try:
    import triton
    import triton.language as tl
    from triton import jit
except ImportError:  # there is no triton outside Linux; the plain version runs everywhere
    triton, tl, jit = None, SimpleNamespace(constexpr=None), lambda kernel: kernel

NEVER = 2**31 - 1  # evicted_at of a key that is never evicted; padding has 0
EPOCH = 512  # positions; evictions in the same epoch count as simultaneous when keys are sorted
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PAIRS_PER_CHUNK = {"cpu": 2**19, "cuda": 2**23}  # pairs of a block and a tile that are tested at once
STAGES = 3  # software pipelining: tiles of K and V in shared memory at a time
ALL_REGISTERS = 255  # registers per thread; without an explicit limit the compiler may spill to raise the occupancy
LIMIT = 16  # units of rounding by which the kernels may differ from the definition in float64


def accumulation_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The type in which the plain version computes: float64 on a CPU, else float32 or better.

    A float64 sum that is rounded to float32 hardly ever depends on the order of the keys or on the number of hidden
    ones. So a learner with the whole sequence reproduces the sampler with a small cache, almost always to the bit. Most
    GPUs run float64 at 1/64 of float32's rate.
    """
    return torch.promote_types(dtype, torch.float64 if device.type == "cpu" else torch.float32)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention without the hidden pairs (B, G, Tq, Tk). The output is undefined where a query sees no key.

    Returns the output (B, H, Tq, D) and the attention weights (B, G, H/G, Tq, Tk), both in `accumulation_dtype`.
    """
    (B, H, Tq, D), (G, Tk) = q.shape, k.shape[1:3]
    q, k, v = (x.to(accumulation_dtype(x.dtype, x.device)) for x in (q, k, v))
    # autocast would round the inputs of these products to bfloat16
    with torch.autocast(q.device.type, enabled=False):
        q_rows = (q * D**-0.5).reshape(B, G, H // G * Tq, D)  # the query heads of a group read the same keys
        score = (q_rows @ k.transpose(-1, -2)).view(B, G, H // G, Tq, Tk)
        # a finite minimum, because -inf gives NaN where a query sees nothing
        weight = score.masked_fill_(hidden[:, :, None], torch.finfo(score.dtype).min).softmax(dim=-1)
        out = weight.flatten(2, 3) @ v
    return out.reshape(B, H, Tq, D), weight


def visibility(evicted_at: Tensor, q_start: int, Tq: int) -> Tensor:
    """visible(i, j) of Tq queries from position q_start on and all keys, (B, G, Tq, Tk), from evicted_at (B, G, Tk)."""
    i = q_start + torch.arange(Tq, device=evicted_at.device)[:, None]
    j = torch.arange(evicted_at.shape[-1], device=evicted_at.device)
    return (j <= i) & (i < evicted_at[:, :, None, :])


def attention_torch(q: Tensor, k: Tensor, v: Tensor, mask: "LayerMask", q_start: int) -> Tensor:
    """The definition, in plain PyTorch: `shadow_attention` without its checks."""

    def attend(q: Tensor, k: Tensor, v: Tensor, evicted_at: Tensor) -> Tensor:
        visible = visibility(evicted_at, q_start, q.shape[2])
        out, _ = masked_attention(q, k, v, ~visible)
        # a query that sees nothing gives zeros and zero gradients
        blind = ~visible.any(dim=-1).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        return out.masked_fill(blind[..., None], 0).to(q.dtype)

    # the backward pass recomputes mask, weights and float64 copies: stored for all layers, they were most of its memory
    return checkpoint(attend, q, k, v, mask.evicted_at, use_reentrant=False, preserve_rng_state=False)


class Blocks(NamedTuple):
    M: int  # queries in a block
    N: int  # keys in a tile
    R: int  # queries in a slice of a block, for the key gradient, which keeps two accumulators in registers, not one
    num_warps: int
    registers: int = ALL_REGISTERS  # per thread, in the other two kernels


def block_sizes(dtype: torch.dtype, D: int, shared_memory: int) -> Blocks:
    """The largest blocks that fit the registers and the bytes of shared memory of a thread block."""
    large = shared_memory > 200_000
    if dtype == torch.float32:  # true float32 has no tensor cores and needs more registers
        return Blocks(32, 32, 16, 4) if D <= 64 else Blocks(16, 32, 16, 8)
    if D <= 64:
        # half of the registers each: of two thread blocks on a multiprocessor, one computes while the other loads
        return Blocks(128, 64, 64, 8, 128) if large else Blocks(128, 64, 32, 8)
    M = 128 if large else 64
    # tiles of 64 keys take 107,520 bytes, more than GPUs for graphics have
    N = 64 if shared_memory > 110_000 else 32
    return Blocks(M, N, 64, 8)


class TileLists(NamedTuple):
    """The tiles that each block visits, or the blocks that each tile is visited by, in CSR form."""

    index: Tensor  # int32; per row first the fully visible, then the partly visible; one more at the end (prefetched)
    bounds: Tensor  # int64 (U·I, 3) or (U·J, 3): start of the full ones, start of the partial ones, end


class Tiles(NamedTuple):
    """The sorted keys of a mask, and the tiles that may hold a visible pair."""

    blocks: Blocks
    q_start: int
    row_BG: Tensor  # int64, the row among the U distinct rows that belongs to each head
    order_UK: Tensor  # int64, position of the key in each sorted slot
    first_query_UK: Tensor  # int32, the first query that sees the key; NEVER where none does
    evicted_at_UK: Tensor  # int32, the first query that no longer sees it
    by_block: TileLists
    by_tile: TileLists


def tile_visibility(queries_2: Tensor, first_query_2: Tensor, evicted_at_2: Tensor) -> Tensor:
    """Whether blocks see tiles in full, and whether possibly in part: (rows, 2, columns).

    queries_2: first and last query of each block; the others: least and largest value in each tile.
    """
    first, last = queries_2
    full = (first_query_2[1] <= first) & (last < evicted_at_2[0])
    some = (first_query_2[0] <= last) & (first < evicted_at_2[1])
    return torch.stack((full, some & ~full), dim=1)


def tile_lists(row_X: Tensor, columns: int, seen: Callable) -> TileLists:
    """CSR lists, one for each block or tile numbered in row_X; seen(numbers) gives their `tile_visibility`."""
    index, count = [], []
    # in chunks, so that memory follows the length of the lists and not the number of all pairs
    pairs = PAIRS_PER_CHUNK.get(row_X.device.type, 2**19)
    for row_x in row_X.split(max(1, pairs // max(1, columns))):
        seen_x2y = seen(row_x)
        index.append(seen_x2y.flatten(0, 1).nonzero()[:, 1].int())
        count.append(seen_x2y.sum(dim=-1))
    count_X2 = torch.cat(count)
    end_X2 = count_X2.flatten().cumsum(0).view_as(count_X2)
    sentinel = row_X.new_zeros(1, dtype=torch.int32)
    return TileLists(torch.cat((*index, sentinel)), torch.cat((end_X2[:, :1] - count_X2[:, :1], end_X2), dim=1))


def list_tiles(evicted_at_UT: Tensor, q_start: int, Tq: int, blocks: Blocks, epoch: int | None = EPOCH) -> Tiles:
    """Sort the keys of each row (U, Tk) and list the tiles that Tq queries from q_start on have to visit."""
    Tk = evicted_at_UT.shape[1]
    last = q_start + Tq - 1
    # the last tile is filled up with keys that no query sees
    evicted_at_UK = F.pad(evicted_at_UT, (0, -Tk % blocks.N))
    U, K = evicted_at_UK.shape
    j = torch.arange(K, device=evicted_at_UT.device)
    unseen_UK = (evicted_at_UK <= j.clamp(min=q_start)) | (j > last)
    order_UK = j.expand(U, K)
    if epoch is not None:
        # latest first, keys that no query sees last; the stable sort keeps the order of positions within an epoch
        epoch_UK = ((evicted_at_UK - 1) // epoch).masked_fill(unseen_UK, -1)
        order_UK = epoch_UK.argsort(dim=-1, descending=True, stable=True)
    first_query_UK = torch.where(unseen_UK, NEVER, j).int().gather(-1, order_UK)
    evicted_at_UK = evicted_at_UK.masked_fill(unseen_UK, 0).gather(-1, order_UK)
    # least and largest value in each tile
    first_2UJ, evicted_2UJ = (
        torch.stack(x_UK.unflatten(-1, (-1, blocks.N)).aminmax(dim=-1)) for x_UK in (first_query_UK, evicted_at_UK)
    )
    first_I = q_start + torch.arange(0, Tq, blocks.M, device=j.device)
    queries_2I = torch.stack((first_I, (first_I + blocks.M - 1).clamp(max=last)))
    I, J = len(first_I), K // blocks.N

    def tiles_of(x: Tensor) -> Tensor:  # blocks x, counted over all rows, against all tiles of their row
        return tile_visibility(queries_2I[:, x % I, None], first_2UJ[:, x // I], evicted_2UJ[:, x // I])

    def blocks_of(x: Tensor) -> Tensor:  # tiles x, counted over all rows, against all blocks
        return tile_visibility(queries_2I, first_2UJ.flatten(1)[:, x, None], evicted_2UJ.flatten(1)[:, x, None])

    by_block = tile_lists(torch.arange(U * I, device=j.device), J, tiles_of)
    by_tile = tile_lists(torch.arange(U * J, device=j.device), I, blocks_of)
    row_BG = torch.arange(U, device=j.device)[:, None]  # `ShadowMask.tiles` puts the rows of a layer's heads here
    order_UK = order_UK.clamp(max=max(0, Tk - 1))  # slots of padding read a real key, which stays hidden
    return Tiles(blocks, q_start, row_BG, order_UK, first_query_UK, evicted_at_UK, by_block, by_tile)


class ShadowMask:
    """evicted_at of all layers, int32 (L, B, G, T): mask[l] is the mask of layer l, as `shadow_attention` takes it.

    The tiles of all layers are listed together, when the first layer needs them. Rows that a view repeats (dimensions
    of stride 0) are listed once.
    """

    def __init__(self, evicted_at_LBGT: Tensor):
        distinct = tuple(slice(1 if stride == 0 else None) for stride in evicted_at_LBGT.stride()[:3])
        rows = evicted_at_LBGT[distinct]
        number = torch.arange(math.prod(rows.shape[:3]), device=rows.device).view(rows.shape[:3])
        self.evicted_at_LBGT = evicted_at_LBGT
        self.evicted_at_UT = rows.flatten(0, 2)
        self.row_LBG = number.expand(evicted_at_LBGT.shape[:3]).contiguous()  # as the kernels index it
        self.listed: dict[tuple, Tiles] = {}  # by q_start, Tq and blocks, which depend on the type of the queries

    def __getitem__(self, l: int) -> "LayerMask":
        return LayerMask(self, l)

    def tiles(self, l: int, q_start: int, Tq: int, blocks: Blocks) -> Tiles:
        key = q_start, Tq, blocks
        if key not in self.listed:
            self.listed[key] = list_tiles(self.evicted_at_UT, q_start, Tq, blocks)
        return self.listed[key]._replace(row_BG=self.row_LBG[l])


class LayerMask(NamedTuple):
    all_layers: ShadowMask
    l: int

    @property
    def evicted_at(self) -> Tensor:
        """(B, G, T) int32."""
        return self.all_layers.evicted_at_LBGT[self.l]


@jit
def visible(FIRST, EVICTED, i, N: tl.constexpr):
    """Whether queries i [M] see the N keys of a tile: [M, N]."""
    n = tl.arange(0, N)
    return (tl.load(FIRST + n)[None, :] <= i[:, None]) & (i[:, None] < tl.load(EVICTED + n)[None, :])


# The three kernels. Tensors are contiguous, K and V in sorted order. exp2 is the hardware's instruction, so scores and
# LSE are in base 2, and scale_log2 is log2(e)/√D; multiplying by it and subtracting fuse into one instruction. LSE and
# DELTA are padded to whole blocks, so that they need no mask. Offsets between heads are 64-bit scalars, those within a
# head 32-bit. `group` is H/G, the number of query heads per kv head. The grid is heads by blocks, or heads by tiles. K
# and V are indexed by kv head, the tile lists by row of the mask; ROW gives the mask row of a kv head.
# Each turn of a loop loads the tile index of the next turn; without this, the compiler does not prefetch that tile.
@jit
def forward_kernel(Q, K, V, ROW, FIRST, EVICTED, INDEX, BOUNDS, OUT, LSE, scale_log2,
                   q_start, group, Tq, I, J, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr):  # fmt: skip
    """One block of queries of one head: out_i and lse_i in one pass over its tiles, with a running maximum."""
    bh = tl.program_id(0).to(tl.int64)
    bg = bh // group
    # the blocks with most tiles start first, so that none of them runs alone at the end
    block = I - 1 - tl.program_id(1)
    row = block * M + tl.arange(0, M)
    inside = row[:, None] < Tq
    at = row[:, None] * D + tl.arange(0, D)
    at_key = tl.arange(0, N)[:, None] * D + tl.arange(0, D)
    q = tl.load(Q + bh * Tq * D + at, mask=inside, other=0.0)  # [M, D]
    top = tl.full([M], -3e38, tl.float32)  # largest score so far; finite, because a row that sees nothing subtracts it
    total = tl.zeros([M], tl.float32)  # Σ exp2(score - top)
    out = tl.zeros([M, D], tl.float32)
    mask_row = tl.load(ROW + bg)
    BOUNDS += (mask_row * I + block) * 3
    # first the fully visible tiles, then the partly visible ones, with the mask
    for masked in tl.static_range(2):
        begin, end = tl.load(BOUNDS + masked), tl.load(BOUNDS + masked + 1)
        tile = tl.load(INDEX + begin)
        for step in range(begin, end):
            slot, in_mask = (bg * J + tile) * N, (mask_row * J + tile) * N
            tile = tl.load(INDEX + step + 1)
            k = tl.load(K + slot * D + at_key)  # [N, D]
            score = tl.dot(q, tl.trans(k), input_precision="ieee")  # [M, N]
            if masked:
                score = tl.where(visible(FIRST + in_mask, EVICTED + in_mask, q_start + row, N), score, -float("inf"))
            new = tl.maximum(top, tl.max(score, 1) * scale_log2)
            weight = tl.exp2(score * scale_log2 - new[:, None])
            shrink = tl.exp2(top - new)
            v = tl.load(V + slot * D + at_key)
            out = tl.dot(weight.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
            total = total * shrink + tl.sum(weight, 1)
            top = new
    total = tl.where(total == 0.0, 1.0, total)  # a row that sees nothing: out = 0
    tl.store(OUT + bh * Tq * D + at, (out / total[:, None]).to(OUT.dtype.element_ty), mask=inside)
    tl.store(LSE + bh * I * M + row, top + tl.log2(total))


@jit
def query_gradient_kernel(Q, K, V, ROW, FIRST, EVICTED, INDEX, BOUNDS, OUT, LSE, DOUT, DELTA, DQ, scale_log2, scale,
                          q_start, group, Tq, I, J, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr):  # fmt: skip
    """One block of queries of one head: dq_i, and δ_i for the next kernel."""
    bh = tl.program_id(0).to(tl.int64)
    bg = bh // group
    block = I - 1 - tl.program_id(1)
    row = block * M + tl.arange(0, M)
    inside = row[:, None] < Tq
    at = row[:, None] * D + tl.arange(0, D)
    at_key = tl.arange(0, N)[:, None] * D + tl.arange(0, D)
    out = tl.load(OUT + bh * Tq * D + at, mask=inside, other=0.0)  # [M, D]
    do = tl.load(DOUT + bh * Tq * D + at, mask=inside, other=0.0)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(DELTA + bh * I * M + row, delta)
    q = tl.load(Q + bh * Tq * D + at, mask=inside, other=0.0)
    lse = tl.load(LSE + bh * I * M + row)
    dq = tl.zeros([M, D], tl.float32)
    mask_row = tl.load(ROW + bg)
    BOUNDS += (mask_row * I + block) * 3
    for masked in tl.static_range(2):
        begin, end = tl.load(BOUNDS + masked), tl.load(BOUNDS + masked + 1)
        tile = tl.load(INDEX + begin)
        for step in range(begin, end):
            slot, in_mask = (bg * J + tile) * N, (mask_row * J + tile) * N
            tile = tl.load(INDEX + step + 1)
            k = tl.load(K + slot * D + at_key)  # [N, D]
            v = tl.load(V + slot * D + at_key)
            score = tl.dot(q, tl.trans(k), input_precision="ieee")  # [M, N]
            if masked:
                score = tl.where(visible(FIRST + in_mask, EVICTED + in_mask, q_start + row, N), score, -float("inf"))
            p = tl.exp2(score * scale_log2 - lse[:, None])
            ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    tl.store(DQ + bh * Tq * D + at, (dq * scale).to(DQ.dtype.element_ty), mask=inside)


@jit
def key_gradient_kernel(Q, K, V, ROW, FIRST, EVICTED, INDEX, BOUNDS, LSE, DOUT, DELTA, DK, DV, scale_log2, scale,
                        q_start, group, Tq, I, J, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
                        R: tl.constexpr):  # fmt: skip
    """One tile of keys of one kv head: dk_j and dv_j over all query heads that share it; one writer, no atomics."""
    bg = tl.program_id(0).to(tl.int64)
    slot = (bg * J + tl.program_id(1)) * N
    r = tl.arange(0, R)
    at = r[:, None] * D + tl.arange(0, D)
    at_key = tl.arange(0, N)[:, None] * D + tl.arange(0, D)
    k, v = tl.load(K + slot * D + at_key), tl.load(V + slot * D + at_key)  # [N, D]
    dk, dv = tl.zeros([N, D], tl.float32), tl.zeros([N, D], tl.float32)
    mask_tile = tl.load(ROW + bg) * J + tl.program_id(1)  # index of the tile among the tiles of all rows
    FIRST += mask_tile * N
    EVICTED += mask_tile * N
    BOUNDS += mask_tile * 3
    slices: tl.constexpr = M // R  # of a block
    for head in range(group):
        bh = bg * group + head
        for masked in tl.static_range(2):
            begin, end = tl.load(BOUNDS + masked), tl.load(BOUNDS + masked + 1)
            block = tl.load(INDEX + begin)
            # one loop over the slices of all blocks, because the compiler prefetches in the innermost loop only
            for step in range(begin * slices, end * slices):
                start = block * M + tl.cast(step % slices, tl.int32) * R
                block = tl.load(INDEX + (step + 1) // slices)
                inside = r[:, None] < Tq - start
                q = tl.load(Q + (bh * Tq + start) * D + at, mask=inside, other=0.0)  # [R, D]
                do = tl.load(DOUT + (bh * Tq + start) * D + at, mask=inside, other=0.0)
                lse = tl.load(LSE + bh * I * M + start + r)
                delta = tl.load(DELTA + bh * I * M + start + r)
                score = tl.dot(k, tl.trans(q), input_precision="ieee")  # [N, R]
                if masked:
                    seen = tl.trans(visible(FIRST, EVICTED, q_start + start + r, N))
                    score = tl.where(seen, score, -float("inf"))
                # rows past the end have p <= 1 and do = δ = 0: they add nothing
                p = tl.exp2(score * scale_log2 - lse[None, :])
                dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
                ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :])
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    tl.store(DK + slot * D + at_key, (dk * scale).to(DK.dtype.element_ty))
    tl.store(DV + slot * D + at_key, dv.to(DV.dtype.element_ty))


def compiled_with(kernel, blocks: Blocks, D: int) -> dict:
    """Compile-time constants and options of a kernel."""
    M, N, R, num_warps, registers = blocks
    constants = dict(M=M, N=N, D=D, num_warps=num_warps, num_stages=STAGES, maxnreg=registers)
    if kernel is key_gradient_kernel:
        constants |= dict(R=R, maxnreg=ALL_REGISTERS)
    return constants


def launch(kernel, q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, *others) -> None:
    B, H, Tq, D = q.shape
    G, K = k.shape[1:3]
    I, J = triton.cdiv(Tq, tiles.blocks.M), K // tiles.blocks.N
    if kernel is key_gradient_kernel:
        grid, lists = (B * G, J), tiles.by_tile
    else:
        grid, lists = (B * H, I), tiles.by_block
    keys = tiles.first_query_UK, tiles.evicted_at_UK
    args = q, k, v, tiles.row_BG, *keys, *lists, *others, tiles.q_start, H // G, Tq, I, J
    with torch.cuda.device_of(q):  # triton launches on the current device
        kernel[grid](*args, **compiled_with(kernel, tiles.blocks, D))


class TritonAttention(torch.autograd.Function):
    """out = apply(q, k, v, tiles, scale): contiguous q (B, H, Tq, D) and sorted k, v (B, G, K, D), D a power of two."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, scale: float) -> Tensor:
        out = torch.empty_like(q)
        padded = triton.cdiv(q.shape[2], tiles.blocks.M) * tiles.blocks.M
        lse = q.new_empty(*q.shape[:2], padded, dtype=torch.float32)
        ctx.tiles = tiles
        ctx.scales = scale / math.log(2), scale
        launch(forward_kernel, q, k, v, tiles, out, lse, ctx.scales[0])
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do: Tensor) -> tuple:
        q, k, v, out, lse = ctx.saved_tensors
        do = do.contiguous()
        dq, dk, dv, delta = (torch.empty_like(t) for t in (q, k, v, lse))
        launch(query_gradient_kernel, q, k, v, ctx.tiles, out, lse, do, delta, dq, *ctx.scales)
        launch(key_gradient_kernel, q, k, v, ctx.tiles, lse, do, delta, dk, dv, *ctx.scales)
        return dq, dk, dv, None, None


def tiles_for(q: Tensor, mask: LayerMask, q_start: int) -> Tiles:
    """The layer's tiles, in blocks that suit q's device and type and are no larger than the tensors."""
    Tq, D = q.shape[2:]
    shared_memory = torch.cuda.get_device_properties(q.device).shared_memory_per_block_optin if q.is_cuda else 0
    blocks = block_sizes(q.dtype, D, shared_memory)
    # triton multiplies matrices of 16 rows or more, in powers of two
    queries, keys = (max(16, triton.next_power_of_2(T)) for T in (Tq, mask.evicted_at.shape[2]))
    M, N, R = min(blocks.M, queries), min(blocks.N, keys), min(blocks.R, queries)
    return mask.all_layers.tiles(mask.l, q_start, Tq, blocks._replace(M=M, N=N, R=R))


def attention_triton(q: Tensor, k: Tensor, v: Tensor, mask: LayerMask, q_start: int) -> Tensor:
    """`attention_torch` at a cost that follows the visible pairs; accumulates in float32."""
    D = q.shape[-1]
    demand(q.dtype in DTYPES, f"backend 'triton' takes float32, bfloat16, float16, got {q.dtype}; take 'torch'")
    demand(D <= 128, f"backend 'triton' takes head dims up to 128, got {D}; take 'torch'")
    tiles = tiles_for(q, mask, q_start)
    order_BGK = tiles.order_UK[tiles.row_BG]
    k, v = (t.take_along_dim(order_BGK[..., None], dim=2) for t in (k, v))
    if pad := max(16, triton.next_power_of_2(D)) - D:
        q, k, v = (F.pad(t, (0, pad)) for t in (q, k, v))  # zeros add nothing to a score
    return TritonAttention.apply(q.contiguous(), k, v, tiles, D**-0.5)[..., :D]


BACKENDS = {"torch": attention_torch, "triton": attention_triton}


def demand(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def backend_for(device: str, backend: str | None) -> str:
    """The backend asked for, ValueError if the device cannot run it. Default: Triton on a recent GPU, else PyTorch.

    A GPU is recent from compute capability 8.0 on. Older ones lack bfloat16 tensor cores and enough shared memory.
    """
    if backend is None:
        recent = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "triton" if recent and triton is not None else "torch"
    demand(backend in BACKENDS, f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "triton":
        demand(triton is not None, "backend 'triton' needs the package triton, which is for Linux only; take 'torch'")
        how = "for the interpreter set TRITON_INTERPRET=1 before Python starts, or take 'torch'"
        runs = device == "cuda" or triton.knobs.runtime.interpret
        demand(runs, f"backend 'triton' needs CUDA tensors, got {device}; {how}")
    return backend


def shadow_attention(
    q: Tensor, k: Tensor, v: Tensor, evicted_at: Tensor | LayerMask, q_start: int = 0, backend: str | None = None
) -> Tensor:
    """Softmax attention in which query i sees key j if j <= i < evicted_at[j].

    q (B, H, Tq, D); k, v (B, G, Tk, D); evicted_at (B, G, Tk) int32, or a layer of a `ShadowMask`. Key j stands at
    position j, and row r of q at position i = q_start + r. Query head h reads kv head h // (H/G). Returns
    (B, H, Tq, D); a query that sees nothing returns zeros and has zero gradients. backend: a name in BACKENDS, or None
    for the default of q's device. Raises ValueError where shapes, types or devices do not fit together, or the backend
    does not support them.
    """
    mask = ShadowMask(evicted_at[None])[0] if isinstance(evicted_at, Tensor) else evicted_at
    tensors = q, k, v, mask.evicted_at
    fits = [t.ndim for t in tensors] == [4, 4, 4, 3]
    if fits:
        (B, H, Tq, D), (G, Tk) = q.shape, k.shape[1:3]
        fits = [tuple(t.shape) for t in tensors] == [(B, H, Tq, D), (B, G, Tk, D), (B, G, Tk, D), (B, G, Tk)]
    if not fits:
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
        raise ValueError(f"shapes do not fit: {shapes}; want (B, H, Tq, D), twice (B, G, Tk, D), and (B, G, Tk)")
    demand(G > 0 and H % G == 0, f"query heads must be a multiple of kv heads, got {H} and {G}")
    demand(mask.evicted_at.dtype == torch.int32, f"evicted_at must be int32, got {mask.evicted_at.dtype}")
    types = {t.dtype for t in (q, k, v)}
    one_type = len(types) == 1 and q.dtype.is_floating_point
    demand(one_type, f"queries, keys and values must be of one floating type, got {', '.join(map(str, types))}")
    devices = {t.device for t in tensors}
    demand(len(devices) == 1, f"tensors must be on one device, got {', '.join(map(str, devices))}")
    demand(q_start >= 0, f"q_start must be at least 0, got {q_start}")
    return BACKENDS[backend_for(q.device.type, backend)](q, k, v, mask, q_start)


def check(device: str) -> dict[str, float]:
    """Print the largest error of the kernels against the definition in float64, in units of rounding (eps)."""
    # under the interpreter the product of two bfloat16 matrices is wrong
    types, T = (DTYPES, 1000) if device == "cuda" else ((torch.float32, torch.float16), 100)
    P = T * 7 // 8
    torch.manual_seed(0)
    # a random third of the first P keys survives an eviction at P
    evicted = (torch.arange(T) < P) & (torch.rand(2, 2, T) > 1 / 3)
    evicted_at = torch.where(evicted, P, NEVER).int().to(device)
    errors = {}
    for dtype, D, q_start in itertools.product(types, (64, 128), (0, P)):
        shapes = (2, 4, T - q_start, D), (2, 2, T, D), (2, 2, T, D), (2, 4, T - q_start, D)
        *qkv, do = (torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes)
        exact = [x.detach().double().requires_grad_() for x in qkv]
        out = shadow_attention(*qkv, evicted_at, q_start, "triton")
        want = shadow_attention(*exact, evicted_at, q_start, "torch")
        found = out, *torch.autograd.grad(out, qkv, do)
        wanted = want, *torch.autograd.grad(want, exact, do.double())
        worst = torch.stack([(a - b).abs().max() / b.abs().max() for a, b in zip(found, wanted, strict=True)]).max()
        name = f"{dtype}, D = {D}, q_start = {q_start}"
        errors[name] = worst.item() / torch.finfo(dtype).eps  # NaN if any is
        print(f"{name:39} error {errors[name]:4.1f} eps: {'ok' if errors[name] < LIMIT else 'WRONG'}")
    return errors


def main() -> int:
    if triton is None:
        print("kernel.py: nothing to check without the package triton, which is for Linux only", file=sys.stderr)
        return 2
    errors = check("cuda" if torch.cuda.is_available() else "cpu")
    return int(not all(error < LIMIT for error in errors.values()))


if __name__ == "__main__":
    sys.exit(main())
