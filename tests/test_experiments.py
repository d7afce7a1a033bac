"""The README, the notebook and the experiments speak of what there is."""

import dataclasses
import importlib.util
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.run
from tqdm import tqdm

import kernel
import smd
from experiments import bench, common, compare, gradients, mismatch, sweep, tolerance
from experiments.memory import PeakBytes
from harness import cli, files, tasks, train
from harness.agent import Agent
from harness.settings import Settings, read_config
from test_smd import gradient
from tests.common import PAGES, ROOT, TINY, model_folder, ragged_rollout, small_model, small_run
from tests.common import compare as compare_tensors


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_what_the_pages_name_exists(page):
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


def test_the_readme_knows_how_long_the_files_are():
    text = PAGES[0].read_text()
    rows = re.findall(r"^\| \[`([\w/.]+)`\]\([^)]+\) \| ([\d,]+) \|", text, re.M)
    assert len(rows) == 6
    for name, lines in rows:
        sources = sorted((ROOT / name).glob("*.py")) if name.endswith("/") else [ROOT / name]
        count = sum(len(source.read_text().splitlines()) for source in sources)
        assert abs(count - int(lines.replace(",", ""))) <= 0.03 * count, f"{name} has {count} lines"


def test_the_loss_that_the_notebook_lifts_out_is_the_learners():
    text, names = PAGES[1].read_text(), {}
    exec(next(code for code in re.findall(r"```python\n(.*?)```", text, re.S) if "def smd_loss" in code), names)
    model = small_model()
    r = ragged_rollout(model)
    reward_B = torch.rand(len(r.response_BR), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    config, runtime = smd.Config(max_new=14), smd.Runtime()
    batch = smd.prepare(model, r, reward_B, config, runtime)
    want, _ = smd.learner_loss(model, batch, batch.totals(runtime), config, runtime)

    def forward(record_LBGT):
        """A model that knows nothing of shared prompts: the whole sequence, each with its own."""
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


def jobs_asked(words, monkeypatch):
    """The runs with which an experiment would begin."""
    experiment = importlib.import_module(f"experiments.{words[0]}")
    asked = []

    def stop(folder, jobs, *_):
        asked.extend(jobs)
        raise InterruptedError

    monkeypatch.setattr(experiment, "run_all", stop)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(InterruptedError):
        experiment.main()
    return asked


@pytest.mark.parametrize("model", [None, "smollm2"])
@pytest.mark.parametrize("command", ["compare", "sweep lam"])
def test_an_experiment_takes_as_many_steps_as_a_run(command, model, monkeypatch):
    asked = jobs_asked(command.split() + (["--model", model] if model else []), monkeypatch)
    assert {job["steps"] for job in asked} == {train.checked(Settings(model=model)).steps}
    assert {job.get("model") for job in asked} == {model}


def test_a_comparison_takes_a_cache_and_rates_of_its_own(monkeypatch):
    words = ["compare", "--budget", "12%", "--rates", "0.5", "0.25", "--methods", "smd", "tis"]
    asked = [(job["method"], job["lr"], job["budget"]) for job in jobs_asked(words, monkeypatch)]
    assert asked == [("smd", 0.5, "12%"), ("smd", 0.25, "12%"), ("tis", 0.5, "12%"), ("tis", 0.25, "12%")]


def test_a_sweep_of_answers_asks_as_it_says(monkeypatch):
    """One code with a choice that reads the question and one that does not; three with one, and beside the prompt."""
    jobs = jobs_asked(["sweep", "answer", "--model", "smollm2", "--seeds", "1"], monkeypatch)
    asked = [tuple(job.get(name) for name in ("asked", "budget", "eviction", "protect", "method")) for job in jobs]
    caches = [(1, "25%", "snapkv", None), (1, "12%", "snapkv", None)]
    caches += [(1, "25%", "random", None), (1, "12%", "random", None)]
    caches += [(3, "25%", "snapkv", None), (3, "12%", "snapkv", None), (3, 4, "random", "prompt")]
    assert asked == [(*cache, method) for cache in caches for method in ("smd", "tis", "naive")]


def test_a_sweep_puts_each_run_into_its_row(monkeypatch, capsys):
    """Runs are made seed by seed and shown row by row."""
    monkeypatch.setattr(sweep, "run_all", lambda folder, jobs, *_: [(job, []) for job in jobs])
    monkeypatch.setattr(sweep, "figures", lambda job, _: dict(lam=job["lam"], seed=job["seed"]))
    monkeypatch.setattr(sys, "argv", ["sweep", "lam", "--model", "smollm2"])
    sweep.main()
    rows = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    assert [(row[0], row[-1]) for row in rows[1:]] == [(f"lam {v}", "1 ± 2.5") for v in (0.0, 0.1, 0.3)]
    assert [float(row[1].split()[0]) for row in rows[1:]] == [0.0, 0.1, 0.3]


def test_a_model_is_measured_with_other_caches(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks.Facts, "FACTS", 3)  # the model's context is short
    s = small_run(model_folder(tmp_path / "first"), tmp_path / "run")
    train.train(s)
    found = mismatch.measured(Agent(train.checked(s)), 1)
    assert list(found) == list(mismatch.COLUMNS.values()) and found["KL(sparse‖dense)"] > 0
    asked = []
    monkeypatch.setattr(tolerance, "agent_of", lambda **given: asked.append(given) or common.agent_of(**given))
    found = tolerance.tolerated(tmp_path / "run", read_config(tmp_path / "run"))
    assert list(found) == ["100% kept", "50% kept", "25% kept", "12% kept"]
    assert [given["budget"] for given in asked] == ["100%", "50%", "25%", "12%"], "each column has its own budget"
    assert {given["model"] for given in asked} == {str(tmp_path / "run" / "model")}, "and the policy that was trained"


def test_an_experiment_draws_its_table_and_never_runs_twice(tmp_path, monkeypatch):
    jobs = [TINY | dict(warmup_steps=0, steps=2, eval_every=1, seed=n) for n in range(2)]
    with tqdm(total=4) as bar:
        done = common.run_all(tmp_path, jobs, 2, bar)
        with monkeypatch.context() as patch:
            patch.setattr(common.subprocess, "run", lambda *_, **__: pytest.fail("a finished run was run again"))
            assert common.run_all(tmp_path, jobs, 2, bar) == done
    assert bar.n == 4
    by_method = {"smd": done}
    groups = {m: [common.figures(*result) for result in results] for m, results in by_method.items()}
    assert common.table(groups, tmp_path / "table.md").count("±") >= 2
    assert (tmp_path / "table.md").read_text(encoding="utf-8").count("\n") == 3
    compare.draw(by_method, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").exists()
    folder = Path(done[0][0]["out"])
    summary = json.loads((folder / "summary.json").read_text())
    summary["before"]["dense"] += 0.5
    (folder / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(cli.UsageError, match="different base policies"), tqdm(total=2) as bar:
        common.run_all(tmp_path, jobs, 2, bar)


@pytest.mark.parametrize("said", ["warning\nsmd.py: --out x is in use by another run\n", ""], ids=["refused", "killed"])
def test_a_run_that_fails_ends_the_experiment_with_its_last_line(said, tmp_path, monkeypatch):
    def ended(words, env, **_):
        assert env["OMP_NUM_THREADS"] == "3" and f"--out={tmp_path}" in words and "--max-new=5" in words
        return subprocess.CompletedProcess(words, returncode=2, stderr=said)

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(common.subprocess, "run", ended)
    last = "smd.py: --out x is in use by another run" if said else "it was killed, perhaps for want of memory"
    with pytest.raises(cli.UsageError, match=f"the run in {tmp_path} failed: {last}"):
        common.run(tmp_path, dict(max_new=5), threads=3)


def test_a_base_policy_is_made_by_one_run_before_the_others_begin(tmp_path, monkeypatch):
    """Two runs at a time would otherwise both make it."""
    ran = []

    def run(folder, job, threads):
        assert threads == max(1, common.CORES // 2)
        ran.append((job["asked"], job["seed"]))
        files.write(folder / "summary.json", json.dumps(dict(steps=1, before=dict(dense=job["asked"]))))
        files.write(folder / "metrics.jsonl", "")

    monkeypatch.setattr(common, "run", run)
    with tqdm(total=6) as bar:
        common.run_all(tmp_path, [dict(asked=h, seed=n, steps=1) for n in range(3) for h in (3, 6)], 2, bar)
    assert len(ran) == 6 and {asked for asked, _ in ran[:2]} == {3, 6}


def test_the_search_takes_the_rate_whose_last_quarter_is_best_and_looks_beyond_the_ends():
    of_run = dict(steps=5, before=dict(sparse=0.1, dense=0.2), after=dict(sparse=0.5, dense=0.75))
    rows = [dict(step=2, held_out_sparse=0.25, held_out_dense=0.5), dict(step=3)]
    sparse = {"sparse %, 0": 10.0, "sparse %, 2": 25.0, "sparse %, 5": 50.0}
    assert compare.along(of_run, rows) == sparse | {"dense %, 0": 20.0, "dense %, 2": 50.0, "dense %, 5": 75.0}
    rows = {0.1: [9, 9, 9, 1], 0.3: [0, 0, 0, 3], 0.2: [0, 0, 0, 2]}
    searched = {("smd", lr): (None, [{"reward": float(r)} for r in rewards]) for lr, rewards in rows.items()}
    assert compare.best_rates(searched) == {"smd": 0.3}
    assert compare.beyond({"smd": 0.3, "naive": 0.1, "tis": 0.2}, (0.1, 0.2, 0.3)) == [("smd", 0.6), ("naive", 0.05)]


def test_a_table_has_means_intervals_and_empty_cells(tmp_path):
    mean, half = common.mean_and_interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and math.isclose(half, 4.30 / 3**0.5)
    groups = {"a": [{"x": n, "y": 1.0} for n in (1.0, 2.0, 3.0)], "b": [{"y": 1234.5}]}
    assert common.table(groups, tmp_path / "t.md").splitlines() == [
        "   x        y",
        "a  2 ± 2.5  1",
        "b           1,234",
    ]
    marked = ["|  | x | y |", "|---|---|---|", "| a | 2 ± 2.5 | 1 |", "| b |  | 1,234 |"]
    assert (tmp_path / "t.md").read_text(encoding="utf-8").splitlines() == marked


def test_the_noise_of_a_gradient_is_computed_only_when_asked_for(monkeypatch, capsys):
    """The first table came after four seconds, and then nothing for minutes, as the second was always computed."""
    monkeypatch.setattr(gradients, "distances", lambda: {"smd": [{"to J_sparse": 0.0}]})
    monkeypatch.setattr(gradients, "LENGTHS", range(1, 2))
    for words, lines in (([], 2), (["--noise"], 5)):
        monkeypatch.setattr(sys, "argv", ["gradients", *words])
        gradients.main()
        said = capsys.readouterr()
        assert len(said.out.splitlines()) == lines
        assert ("noise: " in said.err and "0/40" in said.err) == bool(words), (
            "a bar has a step for each of 5 × 2 × 4 gradients"
        )


def test_the_bench_prints_plain_and_shared_side_by_side(monkeypatch, capsys):
    monkeypatch.setattr(smd, "POLICIES", dict(snapkv=smd.POLICIES["snapkv"], streaming=smd.POLICIES["streaming"]))
    monkeypatch.setattr(bench, "REPEATS", 1)
    monkeypatch.setattr(bench, "LONG", (1, 40, 2, 3))
    monkeypatch.setattr(bench, "CACHES", [(1, 40, 2, 5)])
    monkeypatch.setattr(bench, "transformers_model", lambda *_: None)
    monkeypatch.setattr(bench, "agent_of", lambda **given: common.agent_of(**given | TINY))
    monkeypatch.setattr(sys, "argv", ["bench"])
    bench.main()
    out = capsys.readouterr().out
    for title in ("sampling, 1 prompts", "steps, 4 prompts", "long steps, 1 prompts", "memory with 25 %"):
        assert f"\n{title}" in out, title
    for name in ("full cache", "25% kept by snapkv", "smd", "naive", "dense"):
        assert f"shared, {name} " in out and f"plain, {name} " in out, name
    for column in ("tokens a second", "stored MB", "peak MB", "shared, stored", "plain, peak"):
        assert column in out, column


def test_the_bench_counts_what_is_alive_at_once():
    """Three tensors of 4 kB, of which two are alive at a time; views and what is written in place are none."""
    with PeakBytes() as counted:
        first = torch.zeros(1024)
        second = first + 1
        del first
        second.view(32, 32).add_(1)
        second = second[:512] * torch.ones(512)
    assert counted.peak == 4096 + 4096 and counted.bytes == 2048
    del second
    assert counted.bytes == 0
