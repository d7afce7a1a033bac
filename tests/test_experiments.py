"""The pages name files, flags and functions that exist, and each experiment computes what it says."""

import contextlib
import dataclasses
import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.distributed.run

import kernel
import smd
from experiments import bench, common, compare, gradients, memory, mismatch, show, tables, tolerance, walkthrough
from harness import cli, report, train
from harness.agent import Agent
from harness.settings import Settings, read_config
from test_smd import gradient
from tests.common import PAGES, ROOT, TINY, model_folder, ragged_rollout, small_model, small_run
from tests.common import compare as compare_tensors


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_files_flags_and_functions_that_a_page_names_exist(page):
    text = page.read_text()
    flags = {cli.flag(f.name) for f in dataclasses.fields(Settings)}
    flags |= set(torch.distributed.run.get_args_parser()._option_string_actions)
    for source in ROOT.glob("experiments/*.py"):
        flags |= set(re.findall(r'add_argument\("(--[a-z-]+)"', source.read_text()))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", re.sub(r"pip install[^&\n]*", "", text)))
    assert named and named <= flags, named - flags
    modules = {"smd": smd, "kernel": kernel}
    names = set(re.findall(r"`(smd|kernel)\.(\w+)", text)) - {("smd", "py"), ("kernel", "py")}
    assert names and not [name for module, name in names if not hasattr(modules[module], name)]
    commands = [f"{m.replace('.', '/')}.py" for m in re.findall(r"-m (experiments\.\w+)", text)]
    assert commands and not [file for file in commands if not (ROOT / file).exists()]
    links = [link.partition("#") for link in re.findall(r"\]\(([\w/.#-]+)\)", text)]
    assert len(links) >= 10
    for path, _, anchor in links:
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), anchor
    for code in re.findall(r"```python\n(.*?)```", text, re.S):
        compile(code, page.name, "exec")


def test_the_readme_has_the_line_counts_of_the_files():
    text = PAGES[0].read_text()
    rows = re.findall(r"^\| \[`([\w/.]+)`\]\([^)]+\) \| ([\d,]+) \|", text, re.M)
    assert len(rows) == 6
    for name, lines in rows:
        sources = sorted((ROOT / name).glob("*.py")) if name.endswith("/") else [ROOT / name]
        count = sum(len(source.read_text().splitlines()) for source in sources)
        assert abs(count - int(lines.replace(",", ""))) <= 0.03 * count, f"{name} has {count} lines"


def test_the_loss_in_the_notebook_has_the_gradient_of_the_learner():
    text, names = PAGES[1].read_text(), {}
    exec(next(code for code in re.findall(r"```python\n(.*?)```", text, re.S) if "def smd_loss" in code), names)
    model = small_model()
    r = ragged_rollout(model)
    reward_B = torch.rand(len(r.response_BR), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    config, runtime = smd.Config(max_new=14), smd.Runtime()
    batch = smd.make_batch(model, r, reward_B, config, runtime)
    want, _ = smd.learner_loss(model, batch, batch.totals(runtime), config, runtime)

    def forward(record_LBGT):
        """The model on whole sequences, each with its own copy of the prompt."""
        tokens_BT = torch.cat((r.prompt_NP.repeat_interleave(3, dim=0), r.response_BR), dim=1)
        return model.log_probs(
            model(tokens_BT, r.pad_N.repeat_interleave(3), record_LBGT)[:, r.prompt_NP.shape[1] - 1 : -1]
        )

    args = r.response_BR, r.logp_BR, r.mask_BR, r.evicted_at_LBGT, reward_B.view(4, 3)
    got = names["smd_loss"](forward, *args, longest=14)
    compare_tensors("gradient of the loss", gradient(got, model), gradient(want, model), 1e-10)
    for wrong in (
        (args[0][:, :1], *args[1:]),
        (*args[:2], args[2][:, :-1], *args[3:]),
        (*args[:4], reward_B[None, :4]),
    ):
        with pytest.raises(ValueError, match="shapes differ"):
            names["smd_loss"](forward, *wrong, longest=14)
    with pytest.raises(AssertionError, match="sampler and learner"):
        names["smd_loss"](forward, r.response_BR, r.logp_BR + 0.1 * r.mask_BR, *args[2:], longest=14)


def run_in(monkeypatch, words: str, rows_of=lambda job: {}) -> list[list[dict]]:
    """The lists of runs that an experiment asks for, where `rows_of` gives the figures of a run."""
    name, *flags = words.split()
    experiment = importlib.import_module(f"experiments.{name}")
    asked = []

    def run_all(folder, jobs, *_):
        asked.append(jobs)
        return [job | rows_of(job) for job in jobs]

    monkeypatch.setattr(experiment, "run_all", run_all)
    monkeypatch.setattr(sys, "argv", [name, *flags])
    experiment.main()
    return asked


def test_a_comparison_searches_beyond_the_ends_and_reports_the_best_rates(monkeypatch, tmp_path, capsys):
    def figures(job):
        # tis likes a rate of 0.2, smd the highest
        found = dict(reward_last=job["lr"] if job["method"] == "smd" else -abs(job["lr"] - 0.2), sparse=job["seed"])
        return found | {f"{cache}_at_{step}": 50 for cache in ("sparse", "dense") for step in (0, 5)}

    monkeypatch.setattr(compare, "RATES_OF_MODEL", (0.1, 0.2, 0.4))
    words = f"compare --model smollm2 --seeds 2 --methods smd tis --out {tmp_path}"
    first, second, last = run_in(monkeypatch, f"{words} --budget 12%", figures)
    assert {(job["model"], job["budget"]) for job in first + second + last} == {("smollm2", "12%")}
    grid = [(method, lr) for method in ("smd", "tis") for lr in (0.1, 0.2, 0.4)]
    for jobs, rates in ((first, grid), (second, [*grid, ("smd", 0.8)])):
        searched = [(*rate, seed) for seed in (100, 101) for rate in rates]
        assert [(job["method"], job["lr"], job["seed"]) for job in jobs] == searched
    rewards = (1, 0.0), (1, 0.9), (2, 0.5), (2, 0.5)
    means = [dict(method="smd", budget=22, lr=lr, reward_last=reward) for lr, reward in rewards]
    assert compare.best_rates(means) == {("smd", 22): 2}, "the mean over the seeds decides"
    best = [("smd", 0.8), ("tis", 0.2)]
    assert [(job["method"], job["lr"], job["seed"]) for job in last] == [(*b, seed) for seed in (0, 1) for b in best]
    out = capsys.readouterr().out
    assert "| 12%    | smd    | 0.8 | 0.5 ± 6.4 |" in out
    assert "| 12%    | smd    | 0.8 | 50          | 50          |" in out
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert compare.beyond({("smd", 22): 0.1}, [0.1, 0.2, 0.4]) == [("smd", 22, 0.05)]

    with pytest.raises(cli.UsageError, match="give smd and another method that evicts"):
        run_in(monkeypatch, "compare --methods smd dense --budget 25 18", figures)
    for flag in ("--jobs", "--seeds"):
        with pytest.raises(SystemExit):
            run_in(monkeypatch, f"compare {flag} 0", figures)
        assert "must be at least 1, got 0" in capsys.readouterr().err

    # rates on the command line are all that is tried, for each budget
    drawn = []
    monkeypatch.setattr(compare, "draw_leads", lambda rows, picture: drawn.append((len(rows), picture)))
    search, last = run_in(monkeypatch, f"{words} --budget 25 18 --rates 0.2 0.4", figures)
    cases = [(method, budget) for method in ("smd", "tis") for budget in (25, 18)]
    searched = [(*case, lr, seed) for seed in (100, 101) for case in cases for lr in (0.2, 0.4)]
    assert [(job["method"], job["budget"], job["lr"], job["seed"]) for job in search] == searched
    best = {(job["method"], job["budget"]): job["lr"] for job in last}
    assert best == {("smd", 25): 0.4, ("smd", 18): 0.4, ("tis", 25): 0.2, ("tis", 18): 0.2}
    assert drawn == [(8, tmp_path / "leads.png")]


def test_the_sweep_of_answers_has_one_code_and_three(monkeypatch):
    """One code under a policy that reads the question and one that does not; three codes, also beside the prompt."""
    (jobs,) = run_in(monkeypatch, "sweep answer --model smollm2 --seeds 1")
    asked = [tuple(job.get(name) for name in ("asked", "budget", "eviction", "protect", "method")) for job in jobs]
    caches = [(1, "25%", "snapkv", None), (1, "12%", "snapkv", None)]
    caches += [(1, "25%", "random", None), (1, "12%", "random", None)]
    caches += [(3, "25%", "snapkv", None), (3, "12%", "snapkv", None), (3, 4, "random", "prompt")]
    assert asked == [(*cache, method) for cache in caches for method in ("smd", "tis", "naive")]


def test_a_sweep_prints_a_row_for_each_point(monkeypatch, capsys):
    """Runs are made seed by seed and shown point by point."""
    run_in(monkeypatch, "sweep lam --model smollm2", lambda job: dict(sparse=job["seed"]))
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [[x.strip() for x in row] for row in rows[2:]] == [[str(lam), "1 ± 2.5"] for lam in (0.0, 0.1, 0.3)]


@pytest.fixture(scope="module")
def runs_of_two_seeds(tmp_path_factory):
    """Two tiny runs: their folder, their settings, and the rows of their table. They are made in this process."""
    out = tmp_path_factory.mktemp("runs")
    jobs = [TINY | dict(warmup_steps=0, steps=2, eval_every=1, seed=seed, model=None) for seed in range(2)]
    in_turn = contextlib.nullcontext(types.SimpleNamespace(map=map))

    def run(words, **_):
        return subprocess.CompletedProcess(words, train.main(words[2:]), stderr="")

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out)  # a base policy is kept in the current folder
        patch.setattr(common.subprocess, "run", run)
        patch.setattr(common, "ThreadPoolExecutor", lambda workers: in_turn)  # a command must be in the main thread
        patch.setattr(report, "draw_curves", lambda *_: None)
        return out, jobs, common.run_all(out, jobs, 1, out / "table.csv")


def test_a_finished_run_is_not_run_again(runs_of_two_seeds, monkeypatch):
    out, jobs, rows = runs_of_two_seeds
    monkeypatch.setattr(common.subprocess, "run", lambda *_, **__: pytest.fail("a finished run was run again"))
    assert common.run_all(out, jobs, 1, out / "again.csv") == rows
    assert (out / "again.csv").read_text() == (out / "table.csv").read_text()


def test_runs_from_different_base_policies_are_not_compared(runs_of_two_seeds, tmp_path):
    out, jobs, _ = runs_of_two_seeds
    shutil.copytree(out, tmp_path / "runs")
    path = next((tmp_path / "runs").glob("*/summary.json"))
    summary = json.loads(path.read_text())
    summary["before"]["dense"] += 0.5
    path.write_text(json.dumps(summary))
    with pytest.raises(cli.UsageError, match="different base policies"):
        common.run_all(tmp_path / "runs", jobs, 1, tmp_path / "table.csv")


def test_a_row_holds_settings_and_figures_of_a_run(runs_of_two_seeds):
    out, _, rows = runs_of_two_seeds
    kept = common.read_csv(out / "table.csv")
    assert [row["seed"] for row in kept] == ["0", "1"] and kept[0].keys() == rows[0].keys()
    assert {"method", "budget", "lr", "kl_sparse_dense", "ess_sequence", "overlap_p05"} <= rows[0].keys()
    (folder,) = out.glob("*-0")
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    assert rows[0]["overlap_p05"] == log[0]["overlap_p05"], "before training"
    assert rows[0]["sparse_at_1"] == 100 * log[0]["held_out_sparse"]
    assert rows[0]["dense"] == rows[0]["dense_at_2"] == 100 * summary["after"]["dense"]
    assert rows[0]["before_dense"] == rows[0]["dense_at_0"] == 100 * summary["before"]["dense"]


def test_a_run_shows_what_its_sampler_saw(runs_of_two_seeds, tmp_path, monkeypatch, capsys):
    (folder,) = runs_of_two_seeds[0].glob("*-0")
    monkeypatch.setattr(Settings, "width", 128)  # of the run, which was made without the settings of tests
    monkeypatch.setattr(sys, "argv", ["show", "--out", str(folder)])
    show.main()
    out = capsys.readouterr().out.splitlines()
    prompt, view = out[0].removeprefix("prompt    "), out[4:-1]
    assert view[0] == prompt and all(line.count("·") == len(prompt) - 18 for line in view[1:3]), "18 keys stay"
    assert out[-1] == str(folder / "mask.png") and (folder / "mask.png").exists()
    # a dense run evicts nothing
    dense = Path(shutil.copytree(folder, tmp_path / "dense"))
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps(config | dict(method="dense")))
    monkeypatch.setattr(sys, "argv", ["show", "--out", str(dense)])
    show.main()
    assert "·" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "code, said",
    [(2, "warning\nsmd.py: --out x is in use by another run\n"), (-9, "training: 0%| | 0/25"), (1, "")],
    ids=["refused", "killed", "silent"],
)
def test_a_run_that_fails_ends_the_experiment_with_its_last_line(code, said, tmp_path, monkeypatch):
    def ended(words, env, **_):
        assert words == [sys.executable, smd.__file__, f"--out={tmp_path}", "--max-new=5"]
        assert env["OMP_NUM_THREADS"] == "3"
        return subprocess.CompletedProcess(words, returncode=code, stderr=said)

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(common.subprocess, "run", ended)
    last = "smd.py: --out x is in use by another run" if code == 2 else "it was killed, perhaps because memory ran out"
    with pytest.raises(cli.UsageError, match=f"the run in {tmp_path} failed: {last}"):
        common.run(tmp_path, dict(max_new=5), threads=3)


def test_a_table_has_means_intervals_and_empty_cells(tmp_path):
    mean, half = common.mean_and_interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and math.isclose(half, 4.30 / 3**0.5)
    rows = [dict(name="a", x=x, y=1.0) for x in (1.0, 2.0, 3.0)] + [dict(name="b", y=1234.5)]
    want = [
        "| name | x       | y     |",
        "| ---- | ------- | ----- |",
        "| a    | 2 ± 2.5 | 1     |",
        "| b    |         | 1,234 |",
    ]
    assert common.markdown(rows, ["name"]).splitlines() == want
    common.write_csv(tmp_path / "t.csv", rows)
    assert (tmp_path / "t.csv").read_text() == "name,x,y\na,1,1\na,2,1\na,3,1\nb,,1234.5\n"
    assert common.markdown(common.read_csv(tmp_path / "t.csv"), ["name"]).splitlines() == want


TOY = """method,budget,lr,seed,sparse,dense,overlap_p05,kl_sparse_dense,ess_sequence
naive,22,0.0002,0,38,86,0.3,0.25,0.1
naive,22,0.0002,1,39,88,0.32,0.25,0.1
smd,22,0.0001,0,46,84,0.3,0.25,0.1
smd,22,0.0001,1,43,82,0.32,0.25,0.1
tis,22,0.0002,0,37,90,0.3,0.25,0.1
tis,22,0.0002,1,41,80,0.32,0.25,0.1
dense,22,0.0002,0,50,99,0.3,0.25,0.1
dense,22,0.0002,1,50,99,0.32,0.25,0.1
"""


def outdated(page: str) -> list[str]:
    """The tables that a page names, but not as the files have them."""
    made = tables.tables()
    named = re.findall(r"<!-- table: ([\w ]+) -->\n((?:\|.*\n)*)", page)
    return [name for name, table in named if made.get(name, "") + "\n" != table]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_tables_with_a_file_are_those_of_the_file(page):
    assert not outdated(page.read_text(encoding="utf-8"))


def test_the_command_makes_tables_and_figures_of_files_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (tmp_path / "pays.csv").write_text(TOY)
    (tmp_path / "saves.csv").write_text("cache,budget,tokens,bytes,formula_bytes\ndense,,256,9,8\ndense,,512,17,16\n")
    drawn = []
    monkeypatch.setattr(tables.plt.Figure, "savefig", lambda self, path, **_: drawn.append((path, self)))
    tables.main()
    said = capsys.readouterr().out
    assert "| smd    | 0.0001 | 44.5 ± 19  | 83 ± 13 |" in said and "<!-- table: saves -->" in said
    assert [path for path, _ in drawn] == [ROOT / "assets" / f"{name}.png" for name in ("pays", "saves")]
    assert not outdated(said) and outdated(said.replace("44.5", "44.6")) == ["pays"], "control"
    # dense training evicts nothing. The best other method with the sparse cache is tis (39 against 38.5), with the
    # dense one naive (87 against 85)
    rows = common.read_csv(tmp_path / "pays.csv")
    leads = [[row[f"lead, {cache} cache"] for row in tables.leads(rows)] for cache in ("sparse", "dense")]
    assert leads == [[9, 2], [-2, -6]]
    assert "| 22     | 0.25            | 0.1          | 0.31 ± 0.13 | 5.5 ± 44           | -4 ± 25           |" in said
    for wrong in (rows + rows[:1], [row for row in rows if (row["method"], row["seed"]) != ("tis", "0")], rows + rows):
        with pytest.raises(cli.UsageError, match="keep the rows of one learning rate"):
            tables.leads(wrong)
    sparse = drawn[0][1].axes[0]
    ((line, _, _),) = [container.lines for container in sparse.containers]
    assert line.get_xydata().round(6).tolist() == [[0.31, 5.5]] and sparse.texts[0].get_text() == "22"


def test_a_small_case_of_the_memory_is_measured_once(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "PROMPT", 24)
    monkeypatch.setattr(memory, "CASES", [*memory.CASES[:2], ("compressed shared", "shared", 8)])
    monkeypatch.setattr(sys, "argv", ["memory", "--tokens", "8", "16", "--out", str(tmp_path / "saves.csv")])
    memory.main()
    rows = common.read_csv(tmp_path / "saves.csv")
    assert [(row["cache"], row["tokens"]) for row in rows] == [
        (cache, tokens) for tokens in ("8", "16") for cache, _, _ in memory.CASES
    ]
    stored = {(row["cache"], row["tokens"]): int(row["bytes"]) for row in rows}
    assert stored["dense per sample", "8"] > stored["dense sharing the prompt", "8"] > stored["compressed shared", "8"]
    for row in rows:
        T = 24 + int(row["tokens"])
        assert int(row["mask_bytes_int"]) == 3 * 8 * 4 * T * 4, "int32: layers, samples, kv heads, columns"
        assert int(row["mask_bytes_TxT"]) == 3 * 8 * 4 * T * T
    entry = 3 * 2 * 16 * 4  # float32: layers, keys and values, width
    formula = [int(row["formula_bytes"]) - int(row["mask_bytes_int"]) for row in rows]
    # a sequence that keeps 8 keys has up to 2 more until the cache is compressed again
    assert formula[:3] == [entry * 8 * 32, entry * (24 + 8 * 8), entry * (8 + 8 * 8)]
    assert formula[3:] == [entry * 8 * 40, entry * (24 + 8 * 16), entry * (8 + 8 * 10)]
    monkeypatch.setattr(memory, "measure", lambda agent, version, budget, tokens: dict(bytes=0))
    memory.main()
    assert common.read_csv(tmp_path / "saves.csv") == rows, "a row was measured again"


def test_a_model_is_measured_with_other_caches(tmp_path, monkeypatch):
    s = small_run(model_folder(tmp_path / "first"), tmp_path / "run", steps=1)
    train.train(s)
    found = mismatch.measured(Agent(train.checked(s)), 1)
    assert {*common.DIAGNOSED, "accuracy"} <= found.keys() and found["kl_sparse_dense"] > 0
    asked = []
    monkeypatch.setattr(tolerance, "agent_of", lambda **given: asked.append(given) or common.agent_of(**given))
    found = tolerance.tolerated(tmp_path / "run", read_config(tmp_path / "run"))
    assert list(found) == ["100% kept", "50% kept", "25% kept", "12% kept"]
    assert [given["budget"] for given in asked] == ["100%", "50%", "25%", "12%"], "each column has its own budget"
    assert {given["model"] for given in asked} == {str(tmp_path / "run" / "model")}, "and the policy that was trained"


def test_the_noise_of_a_gradient_is_computed_only_when_asked_for(monkeypatch, capsys):
    """The first table takes four seconds, the second takes minutes."""
    monkeypatch.setattr(gradients, "rows_of_distances", lambda: [{"method": "smd", "to J_sparse": 0.0}])
    monkeypatch.setattr(gradients, "LENGTHS", range(1, 2))
    for words, lines in (([], 3), (["--noise"], 11)):
        monkeypatch.setattr(sys, "argv", ["gradients", *words])
        gradients.main()
        assert len(capsys.readouterr().out.splitlines()) == lines


def test_the_walkthrough_holds(capsys):
    """Its claims are asserted inside; here, that it reaches the last one."""
    walkthrough.main()
    said = capsys.readouterr().out.splitlines()
    assert [line[0] for line in said if line[0] != " "] == list("123456")
    assert said[-1].endswith("nats a token")


@pytest.mark.parametrize("pretrained", [False, True], ids=["toy", "pretrained"])
def test_the_bench_prints_all_contenders(pretrained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(smd, "POLICIES", dict(snapkv=smd.POLICIES["snapkv"], streaming=smd.POLICIES["streaming"]))
    monkeypatch.setattr(bench, "REPEATS", 1)
    monkeypatch.setattr(bench, "LONG", (1, 48, 2, 3))
    monkeypatch.setattr(bench, "LONG_OF_MODEL", (1, 48, 2, 3))
    small = dict(prompts=4, samples=2, device="cpu")
    monkeypatch.setattr(bench, "agent_of", lambda **given: common.agent_of(**given | small))
    monkeypatch.setattr(sys, "argv", ["bench", *(["--model", model_folder(tmp_path)] if pretrained else [])])
    bench.main()
    out = capsys.readouterr().out
    for title in ("sampling, 1 prompts", "steps, 4 prompts", "long steps, 1 prompts"):
        assert f"\n{title}" in out, title
    for name in ("full cache", "25% kept by snapkv"):
        assert f"| shared, {name} " in out and f"| plain, {name} " in out, name
    for name in ("smd", "naive", "dense"):
        assert f"| shared, {name} " in out and (f"| plain, {name} " in out) != pretrained, name
    assert ("| generate, full cache " in out) == pretrained
    for column in ("tokens a second", "stored MB", "seconds_update"):
        assert column in out, column
