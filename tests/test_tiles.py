"""The kernels' lists of tiles, their benchmark, and their compilation for GPUs that this machine lacks."""

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernel
from experiments import kernels
from kernel import NEVER, ShadowMask, shadow_attention
from test_smd import DEVICE, kernel_case, needs_triton, shadow_masks
from tests.common import ROOT, compare, peak_of_trace
from tiny_model import never_evicted


def lists_by_loops(evicted_at_T, order_K, q_start, Tq, M, N):
    """For each block of queries the fully and the partly visible tiles, and for each tile the blocks."""
    T, end = len(evicted_at_T), q_start + Tq
    seen_from_to = []
    for place, j in enumerate(order_K):
        # slots after the last key hold copies of it, which no query sees
        seen = place < T and max(j, q_start) < min(evicted_at_T[j], end)
        seen_from_to.append((j, evicted_at_T[j]) if seen else (NEVER, 0))
    by_block = [([], []) for _ in range(0, Tq, M)]
    by_tile = [([], []) for _ in range(0, len(order_K), N)]
    for block, first in enumerate(range(q_start, end, M)):
        last = min(first + M, end) - 1
        for tile in range(len(by_tile)):
            first_query, evicted_at = zip(*seen_from_to[tile * N : (tile + 1) * N], strict=True)
            in_full = max(first_query) <= first and last < min(evicted_at)
            if in_full or (min(first_query) <= last and first < max(evicted_at)):
                by_block[block][not in_full].append(tile)
                by_tile[tile][not in_full].append(block)
    return by_block, by_tile


def listed_for(lists, rows):
    """The entries of `lists` for each of these rows: fully visible, and partly visible."""
    bounds = lists.bounds[rows].tolist()
    return [(lists.index[a:b].tolist(), lists.index[b:c].tolist()) for a, b, c in bounds]


@pytest.mark.parametrize("pairs", [1, 50, 2**19])
@pytest.mark.parametrize("kind", ["random", "compressed", "rolling", "nothing"])
def test_the_lists_hold_every_visible_pair_once(kind, pairs, monkeypatch):
    T, q_start, M, N = 100, 15, 16, 32
    monkeypatch.setitem(kernel.PAIRS_PER_CHUNK, "cpu", pairs)  # tested per chunk: a row, some rows, all
    evicted_at_UT = shadow_masks(kind, 2, 2, T).flatten(0, 1)
    # the first query of a block is a tile's last key, and all are evicted after the block's last query
    evicted_at_UT[1] = T
    tiles = kernel.list_tiles(evicted_at_UT, q_start, T - q_start, kernel.Blocks(M, N, 16, 4), epoch=20)
    I, J = -(-(T - q_start) // M), -(-T // N)
    i, j = torch.arange(q_start, T)[:, None], torch.arange(T)
    for lists in (tiles.by_block, tiles.by_tile):
        assert len(lists.index) == lists.bounds[-1, -1] + 1, "the kernels read one ahead"
    for u, evicted_at_T in enumerate(evicted_at_UT):
        order = tiles.order_UK[u].tolist()
        assert sorted(order[:T]) == list(range(T))
        by_block = listed_for(tiles.by_block, range(u * I, (u + 1) * I))
        by_tile = listed_for(tiles.by_tile, range(u * J, (u + 1) * J))
        assert (by_block, by_tile) == lists_by_loops(evicted_at_T.tolist(), order, q_start, T - q_start, M, N)
        for block, (full, part) in enumerate(by_block):
            visible = ((j <= i) & (i < evicted_at_T))[block * M : (block + 1) * M]
            in_full, in_part = ([order[tile * N + n] for tile in kind for n in range(N)] for kind in (full, part))
            assert visible[:, in_full].all(), "a tile is not visible in full"
            visible[:, in_full + in_part] = False
            assert not visible.any(), "a visible pair is in no tile"


@pytest.mark.parametrize("M, N", [(128, 64), (16, 32)], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["compressed", "rolling"])
def test_the_lists_need_memory_for_visited_tiles_only(kind, M, N):
    """Would catch lists with an entry for every pair of a block and a tile: 47 and 677 MB for one head."""
    T = 131_072
    row = kernels.compressed_once(T, 0.25, 0) if kind == "compressed" else kernels.rolling(T, 1024, 128, 0)
    made = []
    peak = peak_of_trace(lambda: made.append(kernel.list_tiles(row[None], 0, T, kernel.Blocks(M, N, 16, 4))))
    (tiles,) = made
    visited = len(tiles.by_block.index) - 1
    # the lists by block exist while those by tile are made
    assert peak < 12 * visited + 100 * T + 2**24
    kept = 8 * visited + 24 * (T // M + T // N) + 16 * T
    assert sum(x.nbytes for x in tree_leaves(tiles) if isinstance(x, torch.Tensor)) < kept + 100
    assert visited < (T // M) * (T // N) / (2 if kind == "compressed" else 50), "control"


def operations(run) -> int:
    class Counting(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += 1
            return func(*args, **(kwargs or {}))

    with Counting() as counting:
        run()
    return counting.count


def test_the_tiles_of_all_layers_are_listed_together():
    B, G, T, q_start = 3, 2, 40, 25
    how = q_start, T - q_start, kernel.Blocks(16, 16, 16, 4)
    layers = [shadow_masks(kind, B, G, T) for kind in ("random", "compressed", "rolling")]
    never = never_evicted(torch.tensor([0, 4, 9]), T)
    for evicted_at_LBGT, rows in (
        (torch.stack(layers), 3 * B * G),
        (never.expand(3, B, G, T), B),  # a view: the same in all layers and heads
        (layers[0].expand(3, B, G, T), B * G),
    ):
        mask = ShadowMask(evicted_at_LBGT)
        for l in range(3):
            assert torch.equal(mask[l].evicted_at, evicted_at_LBGT[l])
            got, want = mask.tiles(l, *how), kernel.list_tiles(evicted_at_LBGT[l].flatten(0, 1), *how)
            heads = got.row_BG.flatten()
            for name in ("order_UK", "first_query_UK", "evicted_at_UK"):
                assert torch.equal(getattr(got, name)[heads], getattr(want, name)), name
            for got_lists, want_lists in ((got.by_block, want.by_block), (got.by_tile, want.by_tile)):
                count = len(want_lists.bounds) // (B * G)
                of_heads = [row * count + i for row in heads.tolist() for i in range(count)]
                assert listed_for(got_lists, of_heads) == listed_for(want_lists, range(B * G * count))
        assert len(got.order_UK) == rows, "a row is listed more than once"
    two, three = (ShadowMask(torch.stack(layers[:L])) for L in (2, 3))
    assert operations(lambda: two.tiles(0, *how)) == operations(lambda: three.tiles(0, *how)), "layer after layer"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "list_tiles", lambda *_: pytest.fail("listed again"))
        assert three.tiles(2, *how).by_block is three.tiles(0, *how).by_block
        with pytest.raises(pytest.fail.Exception):
            three.tiles(0, *how[:2], kernel.Blocks(32, 16, 16, 4))


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
def test_attention_takes_a_layer_of_a_mask(backend):
    qkv, evicted_at = kernel_case()
    never = never_evicted(torch.tensor([0, 9], device=DEVICE), 48)
    # the rows of the second layer follow those of the first, so an offset that forgets the layer is an error
    for mask in (ShadowMask(torch.stack((evicted_at, evicted_at.flip(0)))), ShadowMask(never.expand(2, 2, 1, 48))):
        for l in range(2):
            outs = [
                shadow_attention(*qkv, seen, backend=backend) for seen in (mask[l], mask.evicted_at_LBGT[l].clone())
            ]
            got, want = ((out, *torch.autograd.grad(out.square().sum(), qkv)) for out in outs)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("T", [8192, 32768])
def test_the_area_of_the_tiles_follows_the_visible_pairs(T):
    blocks, P = kernel.block_sizes(torch.bfloat16, 128, ARCHITECTURES[90]), T * 7 // 8
    for kept in (1.0, 0.5, 0.25, 0.1):
        evicted_at = kernels.compressed_once(T, kept, 0)[None]
        for q_start in (0, P):
            assert kernels.tile_ratio(evicted_at, q_start, T - q_start, blocks) <= 1.15
    evicted_at = kernels.rolling(T, 1024, 128, 0)[None]
    assert kernels.tile_ratio(evicted_at, 0, T, blocks) <= 1.85
    # controls: in the order of position, and of the exact time of eviction, it does not hold
    assert kernels.tile_ratio(evicted_at, 0, T, blocks, epoch=None) > 3
    assert kernels.tile_ratio(evicted_at, 0, T, blocks, epoch=1) > 2


@needs_triton
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_on_our_sorted_keys_equals_the_definition():
    """An independent attention. Uncompiled, it reads the mask and not the lists, which other tests check."""
    qkv, evicted_at = kernel_case()
    q, k, v = (x.detach() for x in qkv)  # on a CPU, FlexAttention has no backward pass
    layer = ShadowMask(evicted_at[None])[0]
    want = shadow_attention(q[:, :, 40:], k, v, layer, 40, backend="torch")
    compare("out", kernels.flex_on_sorted_keys(q[:, :, 40:], k, v, layer, 40, flex_attention)(), want, 1e-5)
    late = kernels.flex_on_sorted_keys(q[:, :, 40:], k, v, layer, 41, flex_attention)()
    assert (late - want).abs().max() > 1e-3, "control: every query one position later"


@needs_triton
def test_the_benchmark_times_the_kernels_with_tiles_listed_before(monkeypatch):
    (q, k, v), evicted_at = kernel_case()
    monkeypatch.setattr(kernels, "H", 2)
    monkeypatch.setattr(kernels, "G", 1)
    attention = kernels.contenders(q[:, :, 40:], k, v, evicted_at, 40)["ours"]()
    monkeypatch.setattr(kernel, "list_tiles", lambda *_: pytest.fail("listed while the attention is timed"))
    compare("out", attention(), shadow_attention(q[:, :, 40:], k, v, evicted_at, 40, backend="torch"), 1e-5)


def test_without_a_gpu_only_the_tiles_are_printed(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(kernels, "LENGTHS", (128,))
    monkeypatch.setattr(sys, "argv", ["kernels"])
    kernels.main()
    out = capsys.readouterr().out
    assert all(re.search(rf"\| 128 +\| {pattern} ", out) for pattern in kernels.PATTERNS)
    assert out.endswith("there is no CUDA device: the kernels are not timed\n")


def test_a_contender_that_fails_says_why_and_the_others_go_on(monkeypatch):
    def lost():
        raise RuntimeError("no kernel\nfor this shape")

    monkeypatch.setattr(kernels, "LENGTHS", (16,))
    monkeypatch.setattr(kernels, "PATTERNS", {"all kept": kernels.PATTERNS["100% kept"]})
    monkeypatch.setattr(kernels, "contenders", lambda q, k, v, *_: dict(lost=lost, other=lambda: lambda: q))
    monkeypatch.setattr(kernels, "measure", lambda prepare, *_: {"forward ms": len(prepare()().shape)})
    found = [(row["attention"], row.get("forward ms")) for row in kernels.times("cpu")]
    assert found == [("lost: RuntimeError: no kernel", None), ("other", 4)] * 4


ARCHITECTURES = {80: 166_912, 90: 232_448, 100: 232_448, 120: 101_376}  # bytes of shared memory that a block may have


def spills_in_main_loop(sass: str) -> int:
    """Instructions that spill registers in the loop over fully visible tiles, the shortest with a matrix product."""
    instructions = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", sass)]
    loops = []
    for end, text in instructions:
        branch = re.search(r"BRA.* 0x([0-9a-f]+)", text)
        if branch and int(branch[1], 16) < end:
            body = [text for at, text in instructions if int(branch[1], 16) <= at <= end]
            loops += [body] if any("MMA" in text or "FFMA" in text for text in body) else []
    return sum("STL" in text or "LDL" in text for text in min(loops, key=len))


def compile_ahead(job) -> dict:
    """Compile one kernel for one architecture, without a GPU and outside the interpreter: properties of its code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name, dtype, D, capability, least = job
    source, t = getattr(kernel, name), {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[dtype]
    blocks = kernel.block_sizes(getattr(torch, dtype), D, ARCHITECTURES[capability])
    # a short sequence takes smaller blocks
    blocks = blocks._replace(**{size: min(getattr(blocks, size), least) for size in "MNR"})
    options = kernel.compiled_with(source, blocks, D)
    sizes = {n: options.pop(n) for n in source.arg_names if n in options}
    kinds = dict.fromkeys(("Q", "K", "V", "OUT", "DOUT", "DQ", "DK", "DV"), "*" + t)
    kinds |= dict.fromkeys(("FIRST", "EVICTED", "INDEX"), "*i32") | dict.fromkeys(("ROW", "BOUNDS"), "*i64")
    kinds |= dict(LSE="*fp32", DELTA="*fp32", scale_log2="fp32", scale="fp32") | dict.fromkeys(sizes, "constexpr")
    signature = {n: kinds.get(n, "i32") for n in source.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(ASTSource(source, signature, sizes, aligned), target=target, options=options)
    code = compiled.asm
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "cubin"
        cubin.write_bytes(code["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        said = subprocess.run([tool, "-res-usage", "-sass", cubin], capture_output=True, text=True, check=True).stdout
    units = re.findall(r"\b(?:wgmma|mma\.sync|tcgen05\.mma|atom|red)\b|tf32", code["ptx"])
    # the first offset from the start of a tensor leads to its head
    steps = re.findall(r"tt\.addptr %(\w+), .*, (i\d+) loc", code["ttir"])
    return dict(
        job=job,
        shared=compiled.metadata.shared,
        registers=int(re.search(r"REG:(\d+)", said)[1]),
        spilled=spills_in_main_loop(said),
        units=sorted(set(units)),
        steps=sorted({step for step in steps if step[0] in signature}),
        # copies in flight when an iteration of a loop begins to compute
        ahead=[int(n) for n in re.findall(r"ttg\.async_wait .*num = (\d+)", code["ttgir"])],
    )


def compile_all() -> None:
    names = ("forward_kernel", "query_gradient_kernel", "key_gradient_kernel")
    shapes = [("bfloat16", 128, capability, 128) for capability in ARCHITECTURES]
    # with D = 64, two programs should fit on a large multiprocessor
    shapes += [("bfloat16", 64, 90, 128), ("bfloat16", 64, 100, 128)]
    # float32 takes the same blocks everywhere: on the architecture with the least shared memory
    shapes += [("float32", 128, 120, 128)]
    # short sequences
    shapes += [("float32", 64, 90, 16), ("bfloat16", 64, 80, 64)]
    jobs = [(name, *shape) for name in names for shape in shapes]
    with ProcessPoolExecutor(2) as pool:
        print(json.dumps(list(pool.map(compile_ahead, jobs))))


def test_the_kernels_compile_ahead_of_time():
    pytest.importorskip("triton")
    command = [sys.executable, "-c", "from tests.test_tiles import compile_all; compile_all()"]
    env = os.environ | {"TRITON_INTERPRET": "0"}
    run = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    results = json.loads(run.stdout.splitlines()[-1])
    assert len(results) == 3 * (4 + 2 + 1 + 2)
    for r in results:
        name, dtype, D, capability, least = r["job"]
        assert r["shared"] <= ARCHITECTURES[capability] and r["spilled"] == 0, r
        assert not {"atom", "red", "tf32"} & set(r["units"]), r
        tensor_core = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma", 120: "mma.sync"}[capability]
        if least == 128:  # small products may run without tensor cores
            assert (tensor_core in r["units"]) == (dtype == "bfloat16"), r
        # would catch a program id that is not cast to 64 bits before it is multiplied
        assert {"Q", "K", "V", "BOUNDS", "LSE"} <= {tensor for tensor, _ in r["steps"]}, r
        assert {bits for _, bits in r["steps"]} == {"i64"}, r
        # would catch an index that is loaded in the iteration that needs its tile, because no tile is prefetched then
        assert sum(n > 0 for n in r["ahead"]) >= 2, r
        if dtype == "bfloat16" and D == 64 and ARCHITECTURES[capability] > 200_000 and name != "key_gradient_kernel":
            assert r["registers"] <= 128 and 2 * (r["shared"] + 1024) <= ARCHITECTURES[capability], "two do not fit"
