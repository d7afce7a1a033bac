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

Letters: B sequences, H query and G kv heads, Tq queries, Tk keys, D head dim, I blocks of M queries, J tiles of N keys.
"""

import itertools
import math
import os
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
STAGES = 2  # tiles in flight at once
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


def attention_torch(q: Tensor, k: Tensor, v: Tensor, evicted_at: Tensor, q_start: int, shared: Shared = None) -> Tensor:
    """The definition, in plain PyTorch: `shadow_attention` without its checks."""
    i = q_start + torch.arange(q.shape[2], device=q.device)[:, None]
    j = torch.arange(evicted_at.shape[2], device=q.device)
    hidden = (j > i) | (i >= evicted_at[:, :, None, :])  # [B, G, Tq, P + Tk]
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
    """Sort the keys of evicted_at (B, G, Tk) and list the tiles that Tq queries from q_start on have to visit."""
    last = q_start + Tq - 1
    # the last tile is filled up with copies of the last key that no query sees
    evicted_at_BGK = F.pad(evicted_at, (0, -evicted_at.shape[-1] % blocks.N))
    j = torch.arange(evicted_at_BGK.shape[-1], device=evicted_at.device)
    first_query = j.clamp(min=q_start)  # that could see the key
    unseen_BGK = (evicted_at_BGK <= first_query) | (j > last)
    order_BGK = j.expand_as(evicted_at_BGK)
    if epoch is not None:
        # latest first, keys that no query sees last; a stable sort leaves each epoch in the order of positions
        epoch_BGK = ((evicted_at_BGK - 1) // epoch).masked_fill(unseen_BGK, -1)
        order_BGK = epoch_BGK.argsort(dim=-1, descending=True, stable=True)
    born_BGK = torch.where(unseen_BGK, NEVER, j).int().gather(-1, order_BGK)
    dies_BGK = evicted_at_BGK.masked_fill(unseen_BGK, 0).gather(-1, order_BGK)
    # of the keys in each tile, the first and the last to be born and to die: each [B, G, 1, J]
    born, all_born = born_BGK.unflatten(-1, (1, -1, blocks.N)).aminmax(dim=-1)
    dies, all_dead = dies_BGK.unflatten(-1, (1, -1, blocks.N)).aminmax(dim=-1)
    first_I1 = q_start + torch.arange(0, Tq, blocks.M, device=j.device)[:, None]
    last_I1 = (first_I1 + blocks.M - 1).clamp(max=last)
    some_BGIJ = (born <= last_I1) & (all_dead > first_I1)
    full_BGIJ = (all_born <= first_I1) & (dies > last_I1)
    # 0: visible in full, 1: perhaps in part, 2: not at all
    kind_BGIJ = torch.where(full_BGIJ, 0, torch.where(some_BGIJ, 1, 2)).byte()
    lists = []
    for kind in (kind_BGIJ, kind_BGIJ.transpose(-1, -2).contiguous()):
        lists.append(kind.argsort(dim=-1, stable=True).int())
        lists.append(torch.stack(((kind == 0).sum(-1), (kind == 1).sum(-1)), dim=-1).int())
    return Tiles(blocks, q_start, order_BGK.clamp(max=evicted_at.shape[-1] - 1), born_BGK, dies_BGK, *lists)


@jit
def visible(BORN, DIES, i, N: tl.constexpr):
    """Pairs of queries i [M] and the N keys of a tile in which the query sees the key: [M, N]."""
    n = tl.arange(0, N)
    return (tl.load(BORN + n)[None, :] <= i[:, None]) & (i[:, None] < tl.load(DIES + n)[None, :])


# In this and the next two kernels: tensors are contiguous, K and V in sorted order; scores are in units of log 2, since
# exp2 is what the hardware has, so SCALE is log2(e)/√D; offsets between heads are 64-bit scalars, those within one
# 32-bit. `shared` is H/G, the number of query heads that share a kv head. The grid is heads by blocks, or by tiles.
@jit
def forward_kernel(Q, K, V, BORN, DIES, LIST, COUNT, OUT, LSE,
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
    LIST += (bg * I + block) * J
    COUNT += (bg * I + block) * 2
    full = tl.load(COUNT)
    # first the tiles that are visible in full, then, with the mask, those that are visible in part
    for masked in tl.static_range(2):
        begin = full if masked else 0
        end = full + tl.load(COUNT + 1) if masked else full
        for step in range(begin, end):
            first = (bg * J + tl.load(LIST + step)) * N
            k = tl.load(K + first * D + at_key)  # [N, D]
            score = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE  # [M, N]
            if masked:
                score = tl.where(visible(BORN + first, DIES + first, q_start + row, N), score, -float("inf"))
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
def query_gradient_kernel(Q, K, V, BORN, DIES, LIST, COUNT, OUT, LSE, DOUT, DELTA, DQ, SCALE, scale, q_start, shared,
                          Tq, I, J, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr):  # fmt: skip
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
    LIST += (bg * I + block) * J
    COUNT += (bg * I + block) * 2
    full = tl.load(COUNT)
    for masked in tl.static_range(2):
        begin = full if masked else 0
        end = full + tl.load(COUNT + 1) if masked else full
        for step in range(begin, end):
            first = (bg * J + tl.load(LIST + step)) * N
            k = tl.load(K + first * D + at_key)  # [N, D]
            v = tl.load(V + first * D + at_key)
            score = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE  # [M, N]
            if masked:
                score = tl.where(visible(BORN + first, DIES + first, q_start + row, N), score, -float("inf"))
            p = tl.exp2(score - lse[:, None])
            ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    tl.store(DQ + bh * Tq * D + at, (dq * scale).to(DQ.dtype.element_ty), mask=inside)


@jit
def key_gradient_kernel(Q, K, V, BORN, DIES, LIST, COUNT, LSE, DOUT, DELTA, DK, DV, SCALE, scale, q_start, shared,
                        Tq, I, J, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, R: tl.constexpr):  # fmt: skip
    """One tile of keys of one kv head: dk_j and dv_j over all query heads that share it; one writer, no atomics."""
    bg = tl.program_id(0).to(tl.int64)
    tile = bg * J + tl.program_id(1)  # among those of all kv heads
    first = tile * N
    r = tl.arange(0, R)
    at = r[:, None] * D + tl.arange(0, D)
    at_key = tl.arange(0, N)[:, None] * D + tl.arange(0, D)
    k, v = tl.load(K + first * D + at_key), tl.load(V + first * D + at_key)  # [N, D]
    dk, dv = tl.zeros([N, D], tl.float32), tl.zeros([N, D], tl.float32)
    LIST += tile * I
    COUNT += tile * 2
    full = tl.load(COUNT)
    slices: tl.constexpr = M // R  # of a block
    for head in range(shared):
        bh = bg * shared + head
        for masked in tl.static_range(2):
            begin = full if masked else 0
            end = full + tl.load(COUNT + 1) if masked else full
            # one loop over the slices of all blocks, because only the innermost loop loads ahead
            for step in range(begin * slices, end * slices):
                block = tl.load(LIST + step // slices)
                start = block * M + step % slices * R
                past = bh * Tq + start
                inside = r < Tq - start
                q = tl.load(Q + past * D + at, mask=inside[:, None], other=0.0)  # [R, D]
                do = tl.load(DOUT + past * D + at, mask=inside[:, None], other=0.0)
                lse = tl.load(LSE + past + r, mask=inside, other=0.0)
                delta = tl.load(DELTA + past + r, mask=inside, other=0.0)
                score = tl.dot(k, tl.trans(q), input_precision="ieee") * SCALE  # [N, R]
                if masked:
                    seen = tl.trans(visible(BORN + first, DIES + first, q_start + start + r, N))
                    score = tl.where(seen, score, -float("inf"))
                # rows past the end have p = 1 or 0, but do = δ = 0: they add nothing
                p = tl.exp2(score - lse[None, :])
                dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
                ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :])
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    tl.store(DK + first * D + at_key, (dk * scale).to(DK.dtype.element_ty))
    tl.store(DV + first * D + at_key, dv.to(DV.dtype.element_ty))


def launch(kernel, q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, *others) -> None:
    H, Tq, D = q.shape[1:]
    B, G, I, J = tiles.tile_BGIJ.shape
    M, N, R, num_warps = tiles.blocks
    sizes = dict(M=M, N=N, D=D)
    grid, lists = (B * H, I), (tiles.tile_BGIJ, tiles.tiles_BGI2)
    if kernel is key_gradient_kernel:
        sizes["R"] = R
        grid, lists = (B * G, J), (tiles.block_BGJI, tiles.blocks_BGJ2)
    args = q, k, v, tiles.born_BGK, tiles.dies_BGK, *lists, *others, tiles.q_start, H // G, Tq, I, J
    with torch.cuda.device_of(q):  # triton launches on the current device
        kernel[grid](*args, **sizes, num_warps=num_warps, num_stages=STAGES)


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


def tiles_for(q: Tensor, evicted_at: Tensor, q_start: int) -> Tiles:
    """`list_tiles` with the blocks that suit q's device and type, and no larger than the tensors."""
    Tq, D = q.shape[2:]
    roomy = q.is_cuda and torch.cuda.get_device_properties(q.device).shared_memory_per_block_optin > 200_000
    M, N, R, num_warps = block_sizes(q.dtype, D, roomy)
    # triton multiplies matrices of 16 rows or more, in powers of two
    queries, keys = (max(16, triton.next_power_of_2(T)) for T in (Tq, evicted_at.shape[2]))
    blocks = Blocks(min(M, queries), min(N, keys), min(R, queries), num_warps)
    return list_tiles(evicted_at, q_start, Tq, blocks)


def attention_triton(
    q: Tensor, k: Tensor, v: Tensor, evicted_at: Tensor, q_start: int, shared: Shared = None, tiles: Tiles | None = None
) -> Tensor:
    """`attention_torch` at a cost that follows the visible pairs; accumulates in float32. `tiles`: listed before."""
    D = q.shape[-1]
    demand(q.dtype in DTYPES, f"backend 'triton' takes float32, bfloat16, float16, got {q.dtype}; take 'torch'")
    demand(D <= 128, f"backend 'triton' takes head dims up to 128, got {D}; take 'torch'")
    if shared:  # for now the kernels know keys of single sequences only
        repeated = (x.repeat_interleave(len(q) // len(x), dim=0) for x in shared)
        k, v = (torch.cat(both, dim=2) for both in zip(repeated, (k, v), strict=True))
    tiles = tiles or tiles_for(q, evicted_at, q_start)
    k, v = (t.take_along_dim(tiles.order_BGK[..., None], dim=2) for t in (k, v))
    if pad := max(16, triton.next_power_of_2(D)) - D:
        q, k, v = (F.pad(t, (0, pad)) for t in (q, k, v))  # zeros add nothing to a score
    return TritonAttention.apply(q.contiguous(), k, v, tiles, D**-0.5)[..., :D]


KERNELS = (forward_kernel, query_gradient_kernel, key_gradient_kernel)
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
    q: Tensor, k: Tensor, v: Tensor, evicted_at: Tensor, q_start: int = 0, backend: str | None = None,
    shared: Shared = None,
) -> Tensor:  # fmt: skip
    """Softmax attention in which query i sees key j if j <= i < evicted_at[j].

    q (B, H, Tq, D); k, v (B, G, Tk, D); evicted_at (B, G, P + Tk) int32. shared: keys and values (N, G, P, D) of
    prompts; sequence b reads those of prompt b // (B/N) before its own. Without it, P is 0. Key j stands at position j,
    query i at position q_start + i. Query head h reads kv head h // (H/G). Returns (B, H, Tq, D); a row that sees
    nothing returns zeros and has zero gradients. backend: a name in BACKENDS, or None for the best one for q's device.
    Raises ValueError where shapes, types or devices do not fit together, or the backend cannot take them.
    """
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
    return BACKENDS[backend_for(q.device.type, backend)](q, k, v, evicted_at, q_start, shared)


def check(device: str) -> dict[str, float]:
    """Print the largest error of the kernels beside `attention_torch`, in units of rounding of the largest value."""
    # under the interpreter the product of two bfloat16 matrices is wrong
    types, T = (DTYPES, 1000) if device == "cuda" else ((torch.float32, torch.float16), 100)
    P = T * 7 // 8
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
