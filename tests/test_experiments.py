"""The README, the notebook and the experiments speak of what there is."""

import dataclasses
import importlib.util
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.run
from tqdm import tqdm

import kernel
import smd
from experiments.enumerated import gradient
from harness import cli, runs
from smd import Settings
from test_smd import ROOT, compare, ragged_rollout, small_model
from tests.common import AGENT_FOR, PAGES, TINY, model_folder, small_run


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_23_what_the_pages_name_exists(page):
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


def test_23_the_readme_is_short_and_knows_how_long_the_files_are():
    text = PAGES[0].read_text()
    assert len(text.splitlines()) <= 170 and len(text.split()) <= 2000
    rows = re.findall(r"^\| \[`([\w/.]+)`\]\([^)]+\) \| ([\d,]+) \|", text, re.M)
    assert len(rows) == 6
    for name, lines in rows:
        sources = sorted((ROOT / name).glob("*.py")) if name.endswith("/") else [ROOT / name]
        count = sum(len(source.read_text().splitlines()) for source in sources)
        assert abs(count - int(lines.replace(",", ""))) <= 0.03 * count, f"{name} has {count} lines"


def test_23_the_loss_that_the_notebook_lifts_out_is_the_learners():
    text, names = PAGES[1].read_text(), {}
    exec(next(code for code in re.findall(r"```python\n(.*?)```", text, re.S) if "def smd_loss" in code), names)
    model, s = small_model(), smd.checked(Settings(max_new=14))
    r = ragged_rollout(model)
    reward_B = torch.rand(len(r.response_BR), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    policy = smd.Policy(model, s)
    want, _ = smd.learner_loss(policy, smd.prepare(policy, r, reward_B, s), s)

    def forward(record_LBGT):
        """A model that knows nothing of shared prompts: the whole sequence, each with its own."""
        tokens_BT = torch.cat((r.prompt_NP.repeat_interleave(3, dim=0), r.response_BR), dim=1)
        return model.log_probs(
            model(tokens_BT, r.pad_N.repeat_interleave(3), record_LBGT)[:, r.prompt_NP.shape[1] - 1 : -1]
        )

    args = r.response_BR, r.logp_BR, r.mask_BR, r.evicted_at_LBGT, reward_B.view(4, 3)
    got = names["smd_loss"](forward, *args, longest=s.max_new)
    compare("gradient of the loss", gradient(got, model), gradient(want, model), 1e-10)
    for wrong in (
        (args[0][:, :1], *args[1:]),
        (*args[:2], args[2][:, :-1], *args[3:]),
        (*args[:4], reward_B[None, :4]),
    ):
        with pytest.raises(ValueError, match="shapes differ"):
            names["smd_loss"](forward, *wrong, longest=s.max_new)
    with pytest.raises(AssertionError, match="sampler and learner"):
        names["smd_loss"](forward, r.response_BR, r.logp_BR + 0.1 * r.mask_BR, *args[2:], longest=s.max_new)


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
def test_23_an_experiment_takes_as_many_steps_as_a_run(command, model, monkeypatch):
    asked = jobs_asked(command.split() + (["--model", model] if model else []), monkeypatch)
    assert {job["steps"] for job in asked} == {smd.checked(Settings(model=model)).steps}
    assert {job.get("model") for job in asked} == {model}


def test_23_a_comparison_with_a_cache_and_rates_of_its_own(monkeypatch):
    words = ["compare", "--budget", "12%", "--rates", "0.5", "0.25", "--methods", "smd", "tis"]
    asked = [(job["method"], job["lr"], job["budget"]) for job in jobs_asked(words, monkeypatch)]
    assert asked == [("smd", 0.5, "12%"), ("smd", 0.25, "12%"), ("tis", 0.5, "12%"), ("tis", 0.25, "12%")]


def test_23_a_sweep_of_answers_asks_as_it_says(monkeypatch):
    """One code with a choice that reads the question and one that does not; three with one, and beside the prompt."""
    jobs = jobs_asked(["sweep", "answer", "--model", "smollm2", "--seeds", "1"], monkeypatch)
    asked = [tuple(job.get(name) for name in ("asked", "budget", "eviction", "protect", "method")) for job in jobs]
    caches = [(1, "25%", "snapkv", None), (1, "12%", "snapkv", None)]
    caches += [(1, "25%", "random", None), (1, "12%", "random", None)]
    caches += [(3, "25%", "snapkv", None), (3, "12%", "snapkv", None), (3, 4, "random", "prompt")]
    assert asked == [(*cache, method) for cache in caches for method in ("smd", "tis", "naive")]


def test_23_a_model_is_measured_with_other_caches(tmp_path, monkeypatch):
    from experiments import mismatch, tolerance

    s = small_run(model_folder(tmp_path / "first"), tmp_path / "run")
    smd.train(s)
    found = mismatch.measured(smd.agent_for(smd.checked(s)), 1)
    assert list(found) == list(mismatch.COLUMNS.values()) and found["KL(sparse‖dense)"] > 0
    asked = []
    monkeypatch.setattr(smd, "agent_for", lambda s: asked.append(s) or AGENT_FOR(s))
    found = tolerance.tolerated(tmp_path / "run", runs.read_config(tmp_path / "run", Settings))
    assert list(found) == ["100% kept", "50% kept", "25% kept", "12% kept"]
    assert [s.budget for s in asked] == ["100%", "50%", "25%", "12%"], "each column has its own budget"
    assert {s.model for s in asked} == {str(tmp_path / "run" / "model")}, "and the policy that was trained"


def test_23_an_experiment_draws_its_table_and_never_runs_twice(tmp_path, monkeypatch):
    from experiments import common, compare, sweep

    monkeypatch.chdir(tmp_path)
    jobs = [dict(TINY, eval_every=2, method=m, seed=n) for m in ("smd", "naive") for n in range(2)]
    with tqdm(total=8) as bar:
        done = common.run_all(tmp_path, jobs, 2, bar)
        monkeypatch.setattr(smd, "train", lambda *_: pytest.fail("a finished run was run again"))
        monkeypatch.setattr(common.ProcessPoolExecutor, "submit", lambda *_: pytest.fail("nothing was left to do"))
        assert common.run_all(tmp_path, jobs, 2, bar) == done
    by_method = {"smd": done[:2], "naive": done[2:]}
    groups = {m: [common.figures(*result) for result in results] for m, results in by_method.items()}
    assert common.table(groups, tmp_path / "table.md").count("±") >= 2
    folder = Path(done[0][0]["out"])
    with pytest.raises(cli.UsageError, match="holds a run with --eviction snapkv, not random"):
        common.run(folder, **jobs[0] | {"eviction": "random"})
    compare.draw(by_method, tmp_path / "curves.png")
    of_run = dict(steps=5, before=dict(sparse=0.1, dense=0.2), after=dict(sparse=0.5, dense=0.75))
    rows = [dict(step=2, held_out_sparse=0.25, held_out_dense=0.5), dict(step=3)]
    assert compare.curve(of_run, rows, "dense") == ([0, 2, 5], [20.0, 50.0, 75.0])
    assert compare.along(of_run, rows)["sparse %, 5"] == 50.0
    sweep.draw({("50%", method): runs for method, runs in groups.items()}, "kept", tmp_path / "sweep.png")
    assert (tmp_path / "curves.png").exists() and (tmp_path / "sweep.png").exists()
    assert (tmp_path / "table.md").read_text().count("\n") == 4
    summary = json.loads((folder / "summary.json").read_text())
    summary["before"]["dense"] += 0.5
    (folder / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(cli.UsageError, match="different base policies"), tqdm(total=4) as bar:
        common.run_all(tmp_path, jobs, 2, bar)
    rows = {0.1: [9, 9, 9, 1], 0.3: [0, 0, 0, 3], 0.2: [0, 0, 0, 2]}  # the last quarter counts
    searched = {("smd", lr): (None, [{"reward": float(r)} for r in rewards]) for lr, rewards in rows.items()}
    assert compare.best_rates(searched) == {"smd": 0.3}
    assert compare.beyond({"smd": 0.3, "naive": 0.1, "tis": 0.2}, (0.1, 0.2, 0.3)) == [("smd", 0.6), ("naive", 0.05)]
    assert compare.ranks([3.0, 1.0, 3.0, 2.0]).tolist() == [1.0, -1.5, 1.0, -0.5]
    rise, fall, constant = [[1.0, 2.0, 9.0], [70.0, 80.0]], [[5.0, 4.0, 1.0], [2.0, 1.0]], [[1.0] * 3, [7.0] * 2]
    found = [compare.rank_correlation(rise, y) for y in (rise, fall, constant)]
    assert found[:2] == pytest.approx([1.0, -1.0]) and math.isnan(found[2])
    mean, half = common.mean_and_interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and math.isclose(half, 4.30 / 3**0.5)
    assert common.table({"a": [{"x": n, "y": 1.0} for n in (1.0, 2.0, 3.0)]}, tmp_path / "t.md").endswith(
        "a  2 ± 2.5  1"
    )


def test_the_noise_of_a_gradient_is_computed_only_when_asked_for(monkeypatch, capsys):
    """The first table came after four seconds, and then nothing for minutes, as the second was always computed."""
    from experiments import gradients

    monkeypatch.setattr(gradients, "distances", lambda: print("distances"))
    monkeypatch.setattr(gradients, "LENGTHS", range(1, 2))
    for words, lines in (([], 1), (["--noise"], 4)):
        monkeypatch.setattr(sys, "argv", ["gradients", *words])
        gradients.main()
        said = capsys.readouterr()
        assert len(said.out.splitlines()) == lines and said.out.startswith("distances\n")
        assert ("noise: 40 of 40" in said.err) == bool(words), "a bar has a step for each of 5 × 2 × 4 gradients"
