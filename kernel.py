"""Attention under a shadow mask: each key is visible from the query at its own position until it is evicted.

    visible(i, j) = j <= i < evicted_at[j]
    forward:   s_ij = q_i · k_j / √D     lse_i = log Σ_j exp(s_ij)     p_ij = exp(s_ij - lse_i)     out_i = Σ_j p_ij v_j
    backward:  δ_i = do_i · out_i        ds_ij = p_ij (do_i · v_j - δ_i)
               dq_i = Σ_j ds_ij k_j / √D     dk_j = Σ_i ds_ij q_i / √D     dv_j = Σ_i p_ij do_i     over visible pairs

Eviction is permanent, so one integer describes the life of a key, and no T×T mask outlives an attention call.
`attention_torch` is the definition. `attention_triton` does the same in tiles of M queries by N keys, as FlashAttention
does (2205.14135, 2307.08691), and visits only the tiles that may hold a visible pair. Softmax does not care about the
order of the keys, so they are sorted first: by the epoch in which they die, latest first, then by position. Below, keys
a to p stand at positions 0 to 15, and of a to l only b, e, g and l survive an eviction at 12. Tiles are 4 by 4, and a
row shows the last query of a block. # is a visible key, and . is a hidden key in a tile that the block visits:

               in position order                    sorted
    key        a b c d | e f g h | i j k l | m n o p   b e g l | m n o p | a c d f | h i j k
    query 3    # # # # |         |         |           # . . . |         | # # # . |
    query 7    # # # # | # # # # |         |           # # # . |         | # # # # | # . . .
    query 11   # # # # | # # # # | # # # # |           # # # # |         | # # # # | # # # #
    query 15   . # . . | # . # . | . . . # | # # # #   # # # # | # # # # |         |

In position order the last block visits all four tiles, sorted it visits two: survivors stand together. The length of an
epoch, 512 positions, is a compromise. A tile is visited from the birth of its first key to the death of its last. Under
rolling eviction, keys that die together were born far apart. With short epochs, a tile therefore waits long for most of
its keys to be born. With long epochs, it is visited long after most of its keys have died.

    python kernel.py          checks the kernels against the definition; on a CPU under Triton's interpreter

Letters: B sequences, H query and G kv heads, Tq queries, Tk keys, D head dim, I blocks of M queries, J tiles of N keys,
K keys in all tiles, L layers, U rows of a record that may differ from each other.
"""

import itertools
import math
import os
from collections.abc import Callable
from functools import partial
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
EPOCH = 512  # positions; deaths in the same epoch are sorted as if they were one
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PAIRS = 2**19  # of a block and a tile, looked at at once
STAGES = 3  # tiles in shared memory: while one is at work, the next is on its way
ALL_REGISTERS = 255  # that a thread can have; told no number, the compiler may spill a few to fit one block more
LIMIT = 16  # units of rounding by which the kernels may differ from the definition
# in which the plain version adds up. In float64, float32 results do not depend on the order or the number of the hidden
# keys, and a learner with the whole sequence before it reproduces the sampler's small cache to the bit; but most GPUs
# do it at 1/64 of the rate of float32
SUMS = {"cpu": torch.float64, "cuda": torch.float32}
Shared = tuple[Tensor, Tensor] | None  # keys and values (N, G, P, D) of prompts, each read by all samples of its prompt


def products(q: Tensor, k: Tensor, shared_k: Tensor) -> Tensor:
    """Of queries (B, H, Tq, D) with their prompts' P keys, then their own Tk: (N, G, S, H/G, Tq, P + Tk), S = B/N."""
    (B, H, Tq, D), (N, G, P, _) = q.shape, shared_k.shape
    S, M = B // max(N, 1), H // G
    rows = q.reshape(B, G, M * Tq, D)
    own = (rows @ k.transpose(-1, -2)).reshape(N, S, G, M, Tq, k.shape[2]).transpose(1, 2)
    # the rows of a prompt's samples in one product, which reads its keys once
    rows = rows.unflatten(0, (N, S)).transpose(1, 2).reshape(N, G, S * M * Tq, D)
    return torch.cat(((rows @ shared_k.transpose(-1, -2)).reshape(N, G, S, M, Tq, P), own), dim=-1)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, shared: Shared = None) -> tuple[Tensor, Tensor]:
    """Softmax attention without the hidden pairs (B, G, Tq, P + Tk); a row needs a pair that is not hidden.

    Returns the output (B, H, Tq, D), and the weights in the shape of `products`.
    """
    sums = torch.promote_types(q.dtype, SUMS[q.device.type])
    q, k, v, shared_k, shared_v = (x.to(sums) for x in (q, k, v, *(shared or (k[:, :, :0], v[:, :, :0]))))
    with torch.autocast(q.device.type, enabled=False):  # it would round what the products are made of to bfloat16
        score = products(q, k, shared_k).mul_(q.shape[-1] ** -0.5)
        N, G, S, M, Tq, _ = score.shape
        P, Tk = shared_k.shape[2], k.shape[2]
        hidden = hidden.unflatten(0, (N, S)).transpose(1, 2)[:, :, :, None]
        # a finite floor instead of -inf, which gives NaN where a row sees nothing
        weight = score.masked_fill_(hidden, torch.finfo(score.dtype).min).softmax(dim=-1)
        on_shared, on_own = weight.split((P, Tk), dim=-1)
        of_shared = on_shared.reshape(N, G, S * M * Tq, P) @ shared_v
        of_own = on_own.transpose(1, 2).reshape(N * S, G, M * Tq, Tk) @ v
        out = of_shared.unflatten(2, (S, M * Tq)).transpose(1, 2) + of_own.unflatten(0, (N, S))
    return out.reshape(q.shape), weight


class Layer(NamedTuple):
    """One layer of a `Record`."""

    evicted_at: Tensor  # (B, G, P + Tk) int32
    tiles: Callable  # (q_start, Tq, blocks) -> `Tiles`; only the kernels ask for them


def attention_torch(q: Tensor, k: Tensor, v: Tensor, layer: Layer, q_start: int, shared: Shared = None) -> Tensor:
    """The definition, in plain PyTorch: `shadow_attention` without its checks."""
    i = q_start + torch.arange(q.shape[2], device=q.device)[:, None]
    j = torch.arange(layer.evicted_at.shape[2], device=q.device)
    hidden = (j > i) | (i >= layer.evicted_at[:, :, None, :])  # [B, G, Tq, P + Tk]
    # the backward pass makes weights and float64 copies again: kept for all layers, they were most of its memory
    out, _ = checkpoint(masked_attention, q, k, v, hidden, shared, use_reentrant=False, preserve_rng_state=False)
    # a row that sees nothing gives zeros and zero gradients
    blind = hidden.all(dim=-1).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return out.masked_fill(blind[..., None], 0).to(q.dtype)


class Blocks(NamedTuple):
    M: int  # queries in a block
    N: int  # keys in a tile
    R: int  # queries in a slice of a block, for the gradient of the keys, which keeps two sums in registers, not one
    num_warps: int
    registers: int = ALL_REGISTERS  # that a thread may have in the other two kernels


def block_sizes(dtype: torch.dtype, D: int, room: int) -> Blocks:
    """The largest blocks that fit registers, and the `room` bytes of shared memory that the GPU has for a block."""
    roomy = room > 200_000
    if dtype == torch.float32:  # true float32 has no tensor cores: what they would do takes many more registers
        return Blocks(32, 32, 32, 4) if D <= 64 else Blocks(16, 32, 16, 8)
    if D <= 64:
        # with half of all registers each, a multiprocessor works on two blocks: one computes while the other waits
        return Blocks(128, 64, 64, 8, 128) if roomy else Blocks(128, 64, 32, 8)
    # tiles of 64 keys take 107,520 bytes, which GPUs for graphics do not have
    return Blocks(128 if roomy else 64, 64 if room > 110_000 else 32, 64, 8)


class Lists(NamedTuple):
    """The tiles of each block, or the blocks of each tile, one after another in one vector, the rest left out."""

    index: Tensor  # int32, in each: those visible in full, then those in part; one more at the end, for who looks ahead
    bounds: Tensor  # int64 (U·I, 3) or (U·J, 3): where the first kind begins, where the second does, and where it ends


class Tiles(NamedTuple):
    """What a record makes of the T×T square: the order of the keys, and the tiles that may hold a visible pair."""

    blocks: Blocks
    q_start: int
    row_BG: Tensor  # int64, which of the U rows belongs to each head
    order_UK: Tensor  # int64, position of the key at each sorted place
    born_UK: Tensor  # int32, the first query that may see the key; NEVER where no query does
    dies_UK: Tensor  # int32, the first that no longer does
    by_block: Lists
    by_tile: Lists


def visibility(first: Tensor, last: Tensor, born: Tensor, all_born: Tensor, dies: Tensor, all_dead: Tensor) -> Tensor:
    """Whether blocks of queries first to last see tiles in full, and whether perhaps in part: (rows, 2, columns)."""
    full = (all_born <= first) & (last < dies)
    some = (born <= last) & (first < all_dead)
    return torch.stack((full, some & ~full), dim=1)


def listed(row_X: Tensor, columns: int, seen: Callable) -> Lists:
    """What each of the rows numbered row_X sees of the columns; `seen` gives the `visibility` of some of them."""
    index, count = [], []
    # some at a time: then memory grows with what is listed, not with all pairs
    for x in row_X.split(max(1, PAIRS // max(1, columns))):
        seen_x2y = seen(x)
        index.append(seen_x2y.flatten(0, 1).nonzero()[:, 1].int())
        count.append(seen_x2y.sum(dim=-1))
    count_X2 = torch.cat(count)
    end_X2 = count_X2.flatten().cumsum(0).view_as(count_X2)
    one_more = row_X.new_zeros(1, dtype=torch.int32)
    return Lists(torch.cat((*index, one_more)), torch.cat((end_X2[:, :1] - count_X2[:, :1], end_X2), dim=1))


def list_tiles(evicted_at: Tensor, q_start: int, Tq: int, blocks: Blocks, epoch: int | None = EPOCH) -> Tiles:
    """Sort the keys of evicted_at (B, G, Tk) and list the tiles that Tq queries from q_start on have to visit."""
    B, G, Tk = evicted_at.shape
    last = q_start + Tq - 1
    # the last tile is filled up with copies of the last key that no query sees
    evicted_at_UK = F.pad(evicted_at.flatten(0, 1), (0, -Tk % blocks.N))
    U, K = evicted_at_UK.shape
    j = torch.arange(K, device=evicted_at.device)
    first_query = j.clamp(min=q_start)  # that could see the key
    unseen_UK = (evicted_at_UK <= first_query) | (j > last)
    order_UK = j.expand(U, K)
    if epoch is not None:
        # latest first, keys that no query sees last; a stable sort leaves each epoch in the order of positions
        epoch_UK = ((evicted_at_UK - 1) // epoch).masked_fill(unseen_UK, -1)
        order_UK = epoch_UK.argsort(dim=-1, descending=True, stable=True)
    born_UK = torch.where(unseen_UK, NEVER, j).int().gather(-1, order_UK)
    dies_UK = evicted_at_UK.masked_fill(unseen_UK, 0).gather(-1, order_UK)
    # of the keys in each tile, the first and the last to be born and to die
    (born, all_born), (dies, all_dead) = (x.unflatten(-1, (-1, blocks.N)).aminmax(dim=-1) for x in (born_UK, dies_UK))
    life_4UJ = torch.stack((born, all_born, dies, all_dead))
    first_I = q_start + torch.arange(0, Tq, blocks.M, device=j.device)
    time_2I = torch.stack((first_I, (first_I + blocks.M - 1).clamp(max=last)))
    I, J = len(first_I), K // blocks.N
    block_X, tile_X = (torch.arange(U * number, device=j.device) for number in (I, J))
    by_block = listed(block_X, J, lambda x: visibility(*time_2I[:, x % I, None], *life_4UJ[:, x // I]))
    by_tile = listed(tile_X, I, lambda x: visibility(*time_2I, *life_4UJ.flatten(1)[:, x, None]))
    row_BG = torch.arange(U, device=j.device).view(B, G)
    return Tiles(blocks, q_start, row_BG, order_UK.clamp(max=Tk - 1), born_UK, dies_UK, by_block, by_tile)


class Record:
    """When the keys of all layers are evicted, int32 (L, B, G, Tk): `shadow_attention` takes record[l] in layer l.

    The tiles of all layers are listed together, when the first layer asks for them. Where a view repeats its rows, in
    dimensions of stride 0, they are listed once. Given several records, the sequences of each of the N `prompts` come
    under the first of them, then under the second, and so on.
    """

    def __init__(self, *records_LBGT: Tensor, prompts: int = 1):
        rows, numbers = [], []
        for record in records_LBGT:
            once = record[tuple(slice(1 if stride == 0 else None) for stride in record.stride()[:3])]
            number = sum(map(len, rows)) + torch.arange(once[..., 0].numel(), device=record.device)
            rows.append(once.flatten(0, 2))
            numbers.append(number.view(once.shape[:3]).expand(record.shape[:3]).unflatten(1, (prompts, -1)))
        self.evicted_at_UT = torch.cat(rows)
        self.row_LBG = torch.cat(numbers, dim=2).flatten(1, 2)
        self.listed = {}  # by q_start, Tq and blocks, which may change from layer to layer with the type of the queries

    def __getitem__(self, l: int) -> Layer:
        row_BG = self.row_LBG[l]
        return Layer(self.evicted_at_UT[row_BG], partial(self.tiles, row_BG))

    def tiles(self, row_BG: Tensor, *asked) -> Tiles:
        if asked not in self.listed:
            self.listed[asked] = list_tiles(self.evicted_at_UT[:, None], *asked)
        return self.listed[asked]._replace(row_BG=row_BG)


@jit
def visible(BORN, DIES, i, N: tl.constexpr):
    """Pairs of queries i [M] and the N keys of a tile in which the query sees the key: [M, N]."""
    n = tl.arange(0, N)
    return (tl.load(BORN + n)[None, :] <= i[:, None]) & (i[:, None] < tl.load(DIES + n)[None, :])


# In this and the next two kernels: tensors are contiguous, K and V in sorted order; scores are in units of log 2, since
# exp2 is what the hardware has, so SCALE is log2(e)/√D; offsets between heads are 64-bit scalars, those within one
# 32-bit. `shared` is H/G, the number of query heads that share a kv head. The grid is heads by blocks, or by tiles.
# K and V lie by kv heads, lists and lives of keys by rows of the record, of which ROW tells each head its own.
# A turn of a loop loads the index for the next turn. Only where the index is there when a turn begins does the compiler
# load a tile ahead, while another is at work.
@jit
def forward_kernel(Q, K, V, ROW, BORN, DIES, INDEX, BOUNDS, OUT, LSE,
                   SCALE, q_start, shared, Tq, I, J, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr):  # fmt: skip
    """One block of queries of one head: out_i and lse_i in one pass over its tiles, with a running maximum."""
    bh = tl.program_id(0).to(tl.int64)
    bg = bh // shared
    # the longest rows first, so that no long one is left over when the others are done
    block = I - 1 - tl.program_id(1)
    row = block * M + tl.arange(0, M)
    inside = row[:, None] < Tq
    at = row[:, None] * D + tl.arange(0, D)
    at_key = tl.arange(0, N)[:, None] * D + tl.arange(0, D)
    q = tl.load(Q + bh * Tq * D + at, mask=inside, other=0.0)  # [M, D]
    top = tl.full([M], -3e38, tl.float32)  # largest score so far; finite: a row that sees nothing subtracts it
    total = tl.zeros([M], tl.float32)  # Σ exp2(score - top)
    out = tl.zeros([M, D], tl.float32)
    own = tl.load(ROW + bg)
    BOUNDS += (own * I + block) * 3
    # first the tiles that are visible in full, then, with the mask, those that are visible in part
    for masked in tl.static_range(2):
        begin, end = tl.load(BOUNDS + masked), tl.load(BOUNDS + masked + 1)
        tile = tl.load(INDEX + begin)
        for step in range(begin, end):
            first, life = (bg * J + tile) * N, (own * J + tile) * N
            tile = tl.load(INDEX + step + 1)
            k = tl.load(K + first * D + at_key)  # [N, D]
            score = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE  # [M, N]
            if masked:
                score = tl.where(visible(BORN + life, DIES + life, q_start + row, N), score, -float("inf"))
            new = tl.maximum(top, tl.max(score, 1))
            weight = tl.exp2(score - new[:, None])
            shrink = tl.exp2(top - new)
            v = tl.load(V + first * D + at_key)
            out = tl.dot(weight.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
            total = total * shrink + tl.sum(weight, 1)
            top = new
    total = tl.where(total == 0.0, 1.0, total)  # a row that saw nothing: out = 0
    tl.store(OUT + bh * Tq * D + at, (out / total[:, None]).to(OUT.dtype.element_ty), mask=inside)
    tl.store(LSE + bh * Tq + row, top + tl.log2(total), mask=row < Tq)


@jit
def query_gradient_kernel(Q, K, V, ROW, BORN, DIES, INDEX, BOUNDS, OUT, LSE, DOUT, DELTA, DQ, SCALE, scale, q_start,
                          shared, Tq, I, J, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr):  # fmt: skip
    """One block of queries of one head: δ_i, for the next kernel, and dq_i."""
    bh = tl.program_id(0).to(tl.int64)
    bg = bh // shared
    block = I - 1 - tl.program_id(1)
    row = block * M + tl.arange(0, M)
    inside = row[:, None] < Tq
    at = row[:, None] * D + tl.arange(0, D)
    at_key = tl.arange(0, N)[:, None] * D + tl.arange(0, D)
    out = tl.load(OUT + bh * Tq * D + at, mask=inside, other=0.0)  # [M, D]
    do = tl.load(DOUT + bh * Tq * D + at, mask=inside, other=0.0)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(DELTA + bh * Tq + row, delta, mask=row < Tq)
    q = tl.load(Q + bh * Tq * D + at, mask=inside, other=0.0)
    lse = tl.load(LSE + bh * Tq + row, mask=row < Tq, other=0.0)
    dq = tl.zeros([M, D], tl.float32)
    own = tl.load(ROW + bg)
    BOUNDS += (own * I + block) * 3
    for masked in tl.static_range(2):
        begin, end = tl.load(BOUNDS + masked), tl.load(BOUNDS + masked + 1)
        tile = tl.load(INDEX + begin)
        for step in range(begin, end):
            first, life = (bg * J + tile) * N, (own * J + tile) * N
            tile = tl.load(INDEX + step + 1)
            k = tl.load(K + first * D + at_key)  # [N, D]
            v = tl.load(V + first * D + at_key)
            score = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE  # [M, N]
            if masked:
                score = tl.where(visible(BORN + life, DIES + life, q_start + row, N), score, -float("inf"))
            p = tl.exp2(score - lse[:, None])
            ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    tl.store(DQ + bh * Tq * D + at, (dq * scale).to(DQ.dtype.element_ty), mask=inside)


@jit
def key_gradient_kernel(Q, K, V, ROW, BORN, DIES, INDEX, BOUNDS, LSE, DOUT, DELTA, DK, DV, SCALE, scale, q_start,
                        shared, Tq, I, J, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
                        R: tl.constexpr):  # fmt: skip
    """One tile of keys of one kv head: dk_j and dv_j over all query heads that share it; one writer, no atomics."""
    bg = tl.program_id(0).to(tl.int64)
    first = (bg * J + tl.program_id(1)) * N
    r = tl.arange(0, R)
    at = r[:, None] * D + tl.arange(0, D)
    at_key = tl.arange(0, N)[:, None] * D + tl.arange(0, D)
    k, v = tl.load(K + first * D + at_key), tl.load(V + first * D + at_key)  # [N, D]
    dk, dv = tl.zeros([N, D], tl.float32), tl.zeros([N, D], tl.float32)
    own = tl.load(ROW + bg) * J + tl.program_id(1)  # the tile's number among those of all rows
    BORN += own * N
    DIES += own * N
    BOUNDS += own * 3
    slices: tl.constexpr = M // R  # of a block
    for head in range(shared):
        bh = bg * shared + head
        for masked in tl.static_range(2):
            begin, end = tl.load(BOUNDS + masked), tl.load(BOUNDS + masked + 1)
            block = tl.load(INDEX + begin)
            # one loop over the slices of all blocks, because only the innermost loop loads ahead
            for step in range(begin * slices, end * slices):
                start = block * M + tl.cast(step % slices, tl.int32) * R
                block = tl.load(INDEX + (step + 1) // slices)
                past = bh * Tq + start
                inside = r < Tq - start
                q = tl.load(Q + past * D + at, mask=inside[:, None], other=0.0)  # [R, D]
                do = tl.load(DOUT + past * D + at, mask=inside[:, None], other=0.0)
                lse = tl.load(LSE + past + r, mask=inside, other=0.0)
                delta = tl.load(DELTA + past + r, mask=inside, other=0.0)
                score = tl.dot(k, tl.trans(q), input_precision="ieee") * SCALE  # [N, R]
                if masked:
                    seen = tl.trans(visible(BORN, DIES, q_start + start + r, N))
                    score = tl.where(seen, score, -float("inf"))
                # rows past the end have p = 1 or 0, but do = δ = 0: they add nothing
                p = tl.exp2(score - lse[None, :])
                dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
                ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :])
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    tl.store(DK + first * D + at_key, (dk * scale).to(DK.dtype.element_ty))
    tl.store(DV + first * D + at_key, dv.to(DV.dtype.element_ty))


def compiled_with(kernel, blocks: Blocks, D: int) -> dict:
    """The constants and the options that a kernel is compiled with."""
    M, N, R, num_warps, registers = blocks
    constants = dict(M=M, N=N, D=D, num_warps=num_warps, num_stages=STAGES, maxnreg=registers)
    return constants | dict(R=R, maxnreg=ALL_REGISTERS) if kernel is key_gradient_kernel else constants


def launch(kernel, q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, *others) -> None:
    B, H, Tq, D = q.shape
    G, K = k.shape[1:3]
    I, J = triton.cdiv(Tq, tiles.blocks.M), K // tiles.blocks.N
    grid, lists = ((B * G, J), tiles.by_tile) if kernel is key_gradient_kernel else ((B * H, I), tiles.by_block)
    args = q, k, v, tiles.row_BG, tiles.born_UK, tiles.dies_UK, *lists, *others, tiles.q_start, H // G, Tq, I, J
    with torch.cuda.device_of(q):  # triton launches on the current device
        kernel[grid](*args, **compiled_with(kernel, tiles.blocks, D))


class TritonAttention(torch.autograd.Function):
    """out = apply(q, k, v, tiles, scale): contiguous q (B, H, Tq, D) and sorted k, v (B, G, K, D), D a power of two."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, scale: float) -> Tensor:
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
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


def tiles_for(q: Tensor, layer: Layer, q_start: int) -> Tiles:
    """The layer's tiles, in blocks that suit q's device and type and are no larger than the tensors."""
    Tq, D = q.shape[2:]
    room = torch.cuda.get_device_properties(q.device).shared_memory_per_block_optin if q.is_cuda else 0
    blocks = block_sizes(q.dtype, D, room)
    # triton multiplies matrices of 16 rows or more, in powers of two
    queries, keys = (max(16, triton.next_power_of_2(T)) for T in (Tq, layer.evicted_at.shape[2]))
    M, N, R = min(blocks.M, queries), min(blocks.N, keys), min(blocks.R, queries)
    return layer.tiles(q_start, Tq, blocks._replace(M=M, N=N, R=R))


def attention_triton(q: Tensor, k: Tensor, v: Tensor, layer: Layer, q_start: int, shared: Shared = None) -> Tensor:
    """`attention_torch` at a cost that follows the visible pairs; accumulates in float32."""
    D = q.shape[-1]
    demand(q.dtype in DTYPES, f"backend 'triton' takes float32, bfloat16, float16, got {q.dtype}; take 'torch'")
    demand(D <= 128, f"backend 'triton' takes head dims up to 128, got {D}; take 'torch'")
    if shared:  # for now the kernels know keys of single sequences only
        repeated = (x.repeat_interleave(len(q) // len(x), dim=0) for x in shared)
        k, v = (torch.cat(both, dim=2) for both in zip(repeated, (k, v), strict=True))
    tiles = tiles_for(q, layer, q_start)
    order_BGK = tiles.order_UK[tiles.row_BG]
    k, v = (t.take_along_dim(order_BGK[..., None], dim=2) for t in (k, v))
    if pad := max(16, triton.next_power_of_2(D)) - D:
        q, k, v = (F.pad(t, (0, pad)) for t in (q, k, v))  # zeros add nothing to a score
    return TritonAttention.apply(q.contiguous(), k, v, tiles, D**-0.5)[..., :D]


BACKENDS = {"torch": attention_torch, "triton": attention_triton}


def demand(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def backend_for(device: str, backend: str | None) -> str:
    """The backend asked for, ValueError if it cannot run on the device; by default Triton on CUDA, else PyTorch."""
    if backend is None:
        return "triton" if device == "cuda" and triton is not None else "torch"
    demand(backend in BACKENDS, f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "triton":
        demand(triton is not None, "backend 'triton' needs the package triton, which is for Linux only; take 'torch'")
        how = "for the interpreter set TRITON_INTERPRET=1 before Python starts, or take 'torch'"
        runs = device == "cuda" or triton.knobs.runtime.interpret
        demand(runs, f"backend 'triton' needs CUDA tensors, got {device}; {how}")
    return backend


def shadow_attention(
    q: Tensor, k: Tensor, v: Tensor, evicted_at: Tensor | Layer, q_start: int = 0, backend: str | None = None,
    shared: Shared = None,
) -> Tensor:  # fmt: skip
    """Softmax attention in which query i sees key j if j <= i < evicted_at[j].

    q (B, H, Tq, D); k, v (B, G, Tk, D); evicted_at (B, G, P + Tk) int32, or a layer of a `Record`. shared: keys and
    values (N, G, P, D) of prompts; sequence b reads those of prompt b // (B/N) before its own. Without it, P is 0. Key
    j stands at position j, query i at position q_start + i. Query head h reads kv head h // (H/G). Returns (B, H, Tq,
    D); a row that sees nothing returns zeros and has zero gradients. backend: a name in BACKENDS, or None for the best
    one for q's device. Raises ValueError where shapes, types or devices do not fit together, or the backend cannot
    take them.
    """
    layer = evicted_at
    if isinstance(evicted_at, Tensor):
        layer = Layer(evicted_at, partial(list_tiles, evicted_at))
    evicted_at = layer.evicted_at
    tensors = q, k, v, evicted_at, *(shared or ())
    fits = [t.ndim for t in tensors] == [4, 4, 4, 3, 4, 4][: len(tensors)]
    if fits:
        (B, H, Tq, D), (G, Tk), (N, P) = q.shape, k.shape[1:3], shared[0].shape[::2] if shared else (q.shape[0], 0)
        want = (B, H, Tq, D), (B, G, Tk, D), (B, G, Tk, D), (B, G, P + Tk), (N, G, P, D), (N, G, P, D)
        fits = tuple(tuple(t.shape) for t in tensors) == want[: len(tensors)] and N * (B // max(N, 1)) == B
    if not fits:
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
        letters = "(B, H, Tq, D), twice (B, G, Tk, D), (B, G, P + Tk), and of what is shared twice (N, G, P, D)"
        raise ValueError(f"shapes do not fit: {shapes}; want {letters}")
    demand(G > 0 and H % G == 0, f"query heads must be a multiple of kv heads, got {H} and {G}")
    demand(evicted_at.dtype == torch.int32, f"evicted_at must be int32, got {evicted_at.dtype}")
    types = {t.dtype for t in tensors if t is not evicted_at}
    one_type = len(types) == 1 and q.dtype.is_floating_point
    demand(one_type, f"queries, keys and values must be of one floating type, got {', '.join(map(str, types))}")
    devices = {t.device for t in tensors}
    demand(len(devices) == 1, f"tensors must be on one device, got {', '.join(map(str, devices))}")
    demand(q_start >= 0, f"q_start must be at least 0, got {q_start}")
    return BACKENDS[backend_for(q.device.type, backend)](q, k, v, layer, q_start, shared)


def check(device: str) -> dict[str, float]:
    """Print the largest error of the kernels beside `attention_torch`, in units of rounding of the largest value."""
    # under the interpreter the product of two bfloat16 matrices is wrong
    types, T = (DTYPES, 1000) if device == "cuda" else ((torch.float32, torch.float16), 100)
    P = T * 7 // 8
    torch.manual_seed(0)
    # of the first P keys a random third survives an eviction at P
    evicted = (torch.arange(T) < P) & (torch.rand(2, 2, T) > 1 / 3)
    record = torch.where(evicted, P, NEVER).int().to(device)
    errors = {}
    for dtype, D, q_start in itertools.product(types, (64, 128), (0, P)):
        shapes = (2, 4, T - q_start, D), (2, 2, T, D), (2, 2, T, D), (2, 4, T - q_start, D)
        *qkv, do = (torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes)
        outs = [shadow_attention(*qkv, record, q_start, backend) for backend in ("triton", "torch")]
        ours, theirs = ((out, *torch.autograd.grad(out, qkv, do)) for out in outs)
        worst = torch.stack([(a - b).abs().max() / b.abs().max() for a, b in zip(ours, theirs, strict=True)]).max()
        name = f"{dtype}, D = {D}, q_start = {q_start}"
        errors[name] = worst.item() / torch.finfo(dtype).eps  # NaN if any is
        print(f"{name:39} error {errors[name]:4.1f} eps: {'ok' if errors[name] < LIMIT else 'WRONG'}")
    return errors


if __name__ == "__main__":
    errors = check("cuda" if torch.cuda.is_available() else "cpu")
    raise SystemExit(not all(error < LIMIT for error in errors.values()))
