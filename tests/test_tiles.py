"""The kernels' lists of tiles, their benchmark, and their compilation for GPUs that are not here."""

import itertools
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernel
from experiments import kernels
from harness.memory import PeakBytes
from kernel import NEVER, shadow_attention
from test_smd import GPU, ROOT, compare, records, triton_case
from tiny_model import never_evicted


def lists_by_loops(record_T, order_K, q_start, Tq, M, N):
    """For each block of queries the tiles visible in full and in part, and for each tile the blocks."""
    T, end = len(record_T), q_start + Tq
    lives = []
    for place, j in enumerate(order_K):
        # places behind the last key hold copies of it, which nobody sees
        seen = place < T and max(j, q_start) < min(record_T[j], end)
        lives.append((j, record_T[j]) if seen else (NEVER, 0))
    by_block = [([], []) for _ in range(0, Tq, M)]
    by_tile = [([], []) for _ in range(0, len(lives), N)]
    for block, first in enumerate(range(q_start, end, M)):
        last = min(first + M, end) - 1
        for tile in range(len(by_tile)):
            born, dies = zip(*lives[tile * N : (tile + 1) * N], strict=True)
            in_full = max(born) <= first and last < min(dies)
            if in_full or (min(born) <= last and first < max(dies)):
                by_block[block][not in_full].append(tile)
                by_tile[tile][not in_full].append(block)
    return by_block, by_tile


def listed_for(lists, rows):
    """What `lists` hold for each of these rows: visible in full, and in part."""
    bounds = lists.bounds[rows].tolist()
    return [(lists.index[a:b].tolist(), lists.index[b:c].tolist()) for a, b, c in bounds]


@pytest.mark.parametrize("pairs", [1, 50, kernel.PAIRS])
@pytest.mark.parametrize("kind", ["random", "compressed", "rolling", "nothing"])
def test_11_the_lists_hold_every_visible_pair_once(kind, pairs, monkeypatch):
    T, q_start, M, N = 100, 15, 16, 32
    monkeypatch.setattr(kernel, "PAIRS", pairs)  # looked at at once: a row, some rows, all
    record = records(kind, 2, 2, T)
    record[0, 1] = T  # then a tile's last key is born with the first query of a block, and all die after the last query
    tiles = kernel.list_tiles(record, q_start, T - q_start, kernel.Blocks(M, N, 16, 4), epoch=20)
    I, J = -(-(T - q_start) // M), -(-T // N)
    i, j = torch.arange(q_start, T)[:, None], torch.arange(T)
    assert tiles.row_BG.tolist() == [[0, 1], [2, 3]]
    for lists in (tiles.by_block, tiles.by_tile):
        assert len(lists.index) == lists.bounds[-1, -1] + 1, "the kernels read one ahead"
    for u, record_T in enumerate(record.flatten(0, 1)):
        order = tiles.order_UK[u].tolist()
        assert sorted(order[:T]) == list(range(T))
        by_block = listed_for(tiles.by_block, range(u * I, (u + 1) * I))
        by_tile = listed_for(tiles.by_tile, range(u * J, (u + 1) * J))
        assert (by_block, by_tile) == lists_by_loops(record_T.tolist(), order, q_start, T - q_start, M, N)
        for block, (full, part) in enumerate(by_block):
            visible = ((j <= i) & (i < record_T))[block * M : (block + 1) * M]
            in_full, in_part = ([order[tile * N + n] for tile in kind for n in range(N)] for kind in (full, part))
            assert visible[:, in_full].all(), "a tile is not visible in full"
            visible[:, in_full + in_part] = False
            assert not visible.any(), "a visible pair is in no tile"


@pytest.mark.parametrize("M, N", [(128, 64), (16, 32)], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["compressed", "rolling"])
def test_11_the_memory_of_the_lists_follows_the_tiles_that_are_visited(kind, M, N):
    """Catches lists with a place for every pair of a block and a tile: 47 and 677 MB for one head."""
    T = 131_072
    row = kernels.compressed_once(T, 0.25, 0) if kind == "compressed" else kernels.rolling(T, 1024, 128, 0)
    with PeakBytes() as memory:
        tiles = kernel.list_tiles(row[None, None], 0, T, kernel.Blocks(M, N, 16, 4))
    visited = len(tiles.by_block.index) - 1
    # while the one side is put together, the other is there
    assert memory.peak < 12 * visited + 100 * T + 2**24
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


def test_11_the_tiles_of_all_layers_and_records_are_listed_once():
    N, S, G, T, q_start = 2, 3, 2, 40, 25
    how = q_start, T - q_start, kernel.Blocks(16, 16, 16, 4)

    def pair(L):
        evicted_at = torch.stack([records(kind, N * S, G, T) for kind in ("random", "compressed", "rolling")[:L]])
        pad = torch.arange(N).repeat_interleave(S)
        return evicted_at, never_evicted(pad, T).expand(L, N * S, G, T)

    two = pair(3)
    record = kernel.Record(*two, prompts=N)
    # by hand: of each prompt, its samples under the first record, then under the second
    order = [sample + track * N * S for n in range(N) for track in range(2) for sample in range(n * S, (n + 1) * S)]
    for l in range(3):
        layer = record[l]
        assert torch.equal(layer.evicted_at, torch.cat([x[l] for x in two])[order])
        got, want = layer.tiles(*how), kernel.list_tiles(layer.evicted_at, *how)
        for name in ("order_UK", "born_UK", "dies_UK"):
            assert torch.equal(getattr(got, name)[got.row_BG].flatten(0, 1), getattr(want, name)), name
        for got_lists, want_lists in ((got.by_block, want.by_block), (got.by_tile, want.by_tile)):
            count = len(want_lists.bounds) // want.row_BG.numel()
            rows = [row * count + i for row in got.row_BG.flatten().tolist() for i in range(count)]
            assert listed_for(got_lists, rows) == listed_for(want_lists, range(len(rows)))
    assert len(got.born_UK) == 3 * N * S * G + N * S, "what is never evicted is listed for each layer or head"

    two, three = (kernel.Record(*pair(L), prompts=N) for L in (2, 3))
    assert operations(lambda: two[0].tiles(*how)) == operations(lambda: three[0].tiles(*how)), "layer after layer"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "list_tiles", lambda *_: pytest.fail("listed again"))
        assert three[2].tiles(*how).by_block is three[0].tiles(*how).by_block
        with pytest.raises(pytest.fail.Exception):
            three[0].tiles(*how[:2], kernel.Blocks(32, 16, 16, 4))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_11_attention_takes_a_layer_of_a_record(backend):
    (q, k, v), record = triton_case(T=40)
    q, k, v = (x.detach().repeat_interleave(2, dim=0).requires_grad_() for x in (q, k, v))
    # in the second layer no head's row is where it would be if there were that layer only
    two, never = torch.stack((record, record.flip(1))), never_evicted(torch.arange(2, device=GPU), 40)
    for l, layer in enumerate(kernel.Record(two, never.expand(2, 2, 2, 40), prompts=2)):
        evicted_at = torch.stack((two[l], never.expand(2, 2, 40)), dim=1).flatten(0, 1)
        outs = [shadow_attention(q, k, v, seen, backend=backend) for seen in (layer, evicted_at)]
        got, want = ((out, *torch.autograd.grad(out.square().sum(), (q, k, v))) for out in outs)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("T", [8192, 32768])
def test_11_the_area_of_the_tiles_follows_the_visible_pairs(T):
    blocks, P = kernel.block_sizes(torch.bfloat16, 128, ARCHITECTURES[90]), T * 7 // 8
    for kept in (1.0, 0.5, 0.25, 0.1):
        record = kernels.compressed_once(T, kept, 0)[None, None]
        for q_start in (0, P):
            assert kernels.tile_ratio(record, q_start, T - q_start, blocks) <= 1.15
    record = kernels.rolling(T, 1024, 128, 0)[None, None]
    assert kernels.tile_ratio(record, 0, T, blocks) <= 1.85
    # controls: in the order of position, and of the exact time of death, it does not hold
    assert kernels.tile_ratio(record, 0, T, blocks, epoch=None) > 3
    assert kernels.tile_ratio(record, 0, T, blocks, epoch=1) > 2


def test_11_the_benchmark_times_the_kernels_with_tiles_listed_before(monkeypatch):
    """Catches tiles that were given in the place of the shared keys."""
    (q, k, v), record = triton_case()
    monkeypatch.setattr(kernels, "H", 4)
    monkeypatch.setattr(kernels, "G", 2)
    attention = kernels.cuda_contenders(q[:, :, 40:], k, v, record, 40)["ours"]()
    monkeypatch.setattr(kernel, "list_tiles", lambda *_: pytest.fail("listed while the attention is timed"))
    compare("out", attention(), shadow_attention(q[:, :, 40:], k, v, record, 40, backend="torch"), 1e-5)


def test_11_the_benchmark_on_a_cpu_prints_only_what_it_measured(tmp_path, monkeypatch, capsys):
    """Catches columns that only a GPU can fill: `nan` MiB and 0.00 TFLOP/s stood beside the milliseconds."""
    file = tmp_path / "new" / "kernels.json"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(kernels, "LENGTHS", (128,))
    monkeypatch.setattr(kernels, "CPU_LENGTHS", (16,))
    monkeypatch.setattr(sys, "argv", ["kernels", "--out", str(file)])
    assert kernels.main() == 0
    *tables, path = capsys.readouterr().out.splitlines()
    assert path == str(file) and not [line for line in tables if "nan" in line or "TFLOP" in line]
    found = json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert len(found["tile_ratios"]) == len(kernels.PATTERNS) and len(found["times"]) == 4
    assert all(row["forward"] > 0 and row["both"] > 0 for row in found["times"])


ARCHITECTURES = {80: 166_912, 90: 232_448, 100: 232_448, 120: 101_376}  # bytes of shared memory that a block may have


def compile_ahead(job) -> dict:
    """Compile one kernel for one architecture, without a GPU and outside the interpreter: what its code shows."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name, dtype, D, capability, least = job
    source, t = getattr(kernel, name), {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[dtype]
    blocks = kernel.block_sizes(getattr(torch, dtype), D, ARCHITECTURES[capability])
    # no query or key of a short sequence fills a larger one
    blocks = blocks._replace(**{size: min(getattr(blocks, size), least) for size in "MNR"})
    options = kernel.compiled_with(source, blocks, D)
    sizes = {n: options.pop(n) for n in source.arg_names if n in options}
    kinds = dict.fromkeys(("Q", "K", "V", "OUT", "DOUT", "DQ", "DK", "DV"), "*" + t)
    kinds |= dict.fromkeys(("BORN", "DIES", "INDEX"), "*i32") | dict.fromkeys(("ROW", "BOUNDS"), "*i64")
    kinds |= dict(LSE="*fp32", DELTA="*fp32", SCALE="fp32", scale="fp32") | dict.fromkeys(sizes, "constexpr")
    signature = {n: kinds.get(n, "i32") for n in source.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(ASTSource(source, signature, sizes, aligned), target=target, options=options)
    code = compiled.asm
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "cubin"
        cubin.write_bytes(code["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        said = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    used = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", said)
    units = re.findall(r"\b(?:wgmma|mma\.sync|tcgen05\.mma|atom|red)\b|tf32", code["ptx"])
    # the first step from where a tensor begins, which leads to a head's part of it
    steps = re.findall(r"tt\.addptr %(\w+), .*, (i\d+) loc", code["ttir"])
    return dict(
        job=job,
        shared=compiled.metadata.shared,
        registers=int(used[1]),
        spilled=int(used[2]) + int(used[3]),
        units=sorted(set(units)),
        steps=sorted({step for step in steps if step[0] in signature}),
        # how many copies are still on their way when a turn of a loop begins to compute
        ahead=[int(n) for n in re.findall(r"ttg\.async_wait .*num = (\d+)", code["ttgir"])],
    )


def compile_all() -> None:
    names = ("forward_kernel", "query_gradient_kernel", "key_gradient_kernel")
    jobs = list(itertools.product(names, ("bfloat16", "float32"), (64, 128), ARCHITECTURES, (128,)))
    # of short sequences
    short = ("float32", 64, 90, 16), ("float32", 64, 120, 16), ("bfloat16", 64, 80, 64)
    jobs += [(name, *job) for name in names for job in short]
    with ProcessPoolExecutor(2) as pool:
        print(json.dumps(list(pool.map(compile_ahead, jobs))))


def test_12_the_kernels_compile_ahead_of_time():
    pytest.importorskip("triton")
    command = [sys.executable, "-c", "from tests.test_tiles import compile_all; compile_all()"]
    env = os.environ | {"TRITON_INTERPRET": "0"}
    run = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    results = json.loads(run.stdout.splitlines()[-1])
    assert len(results) == 3 * (2 * 2 * 4 + 3)
    for r in results:
        name, dtype, D, capability, least = r["job"]
        assert r["shared"] <= ARCHITECTURES[capability] and r["spilled"] == 0, r
        assert not {"atom", "red", "tf32"} & set(r["units"]), r
        tensor_core = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma", 120: "mma.sync"}[capability]
        if least == 128:  # a small product may be left to other units
            assert (tensor_core in r["units"]) == (dtype == "bfloat16"), r
        # catches a program's number that is not made 64-bit before it is multiplied
        assert {"Q", "K", "V", "BOUNDS", "LSE"} <= {tensor for tensor, _ in r["steps"]}, r
        assert {bits for _, bits in r["steps"]} == {"i64"}, r
        # catches an index that is only loaded in the turn that needs its tile: then no tile is loaded ahead
        assert sum(n > 0 for n in r["ahead"]) >= 2, r
        if dtype == "bfloat16" and D == 64 and ARCHITECTURES[capability] > 200_000 and name != "key_gradient_kernel":
            assert r["registers"] <= 128 and 2 * (r["shared"] + 1024) <= ARCHITECTURES[capability], "two do not fit"
