"""A run survives being killed, leaves its files, writes nothing that is not finite, and learns."""

import dataclasses
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

import smd
from harness import base, cli, device, files, runs, shared, tasks, train
from harness.agent import Agent
from harness.objectives import Policy
from harness.settings import Settings, checked, read_config
from tests.common import ROOT, SECONDS, SMALL_SMD, argv, outcome, tiny


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def state_of(out: Path) -> dict:
    return torch.load(out / "checkpoint.pt", weights_only=True)


def test_a_run_leaves_its_files(tmp_path):
    out = tmp_path / "run"
    summary = train.train(tiny(tmp_path, steps=4))
    assert {p.name for p in out.iterdir()} == set(runs.FILES)
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    rows = rows_of(out)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    diagnosed = [row["step"] for row in rows if "kl_sparse_dense" in row]
    assert diagnosed == [1, 4], "every DIAGNOSE_EVERY steps, the first included"
    assert max(row["replay_error"] for row in rows) == summary["replay_error"] < 1e-5
    assert all(row["stored_kv_bytes"] > 0 and 0 < row["visible_share"] < 1 and row["entropy"] > 0 for row in rows)
    # a checkpoint answers a prompt, with its own weights
    taken = []

    def answer(agent, prompt):
        taken.append(agent.model.norm.weight)
        return "an answer"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Agent, "answer", answer)
        assert train.main(["--resume", "--out", str(out), "--device", "cpu", "--prompt", "abba?a"]) == 0
    assert torch.equal(taken[0], state_of(out)["weights"]["model.norm.weight"])


def test_evaluations_stand_where_they_were_made(tmp_path, monkeypatch):
    """Before, every `--eval-every` steps, and after; the last one is not made twice."""
    for steps, every, in_rows, after in ((3, 2, {2: 0.02}, 0.03), (4, 2, {2: 0.02, 4: 0.03}, 0.03), (2, 0, {}, 0.02)):
        made = []

        def evaluate(agent, made=made):
            made.append(len(made) + 1)
            return dict(sparse=made[-1] / 100, dense=made[-1] / 10)

        monkeypatch.setattr(Agent, "evaluate", evaluate)
        out = tmp_path / f"{steps}-{every}"
        summary = train.train(tiny(tmp_path, out.name, steps=steps, eval_every=every))
        rows = rows_of(out)
        assert {row["step"]: row["held_out_sparse"] for row in rows if "held_out_sparse" in row} == in_rows
        assert summary["before"] == dict(sparse=0.01, dense=0.1)
        assert summary["after"] == dict(sparse=after, dense=pytest.approx(10 * after))
        assert summary["steps"] == steps and summary["out"] == str(out)
        assert summary["visible_share"] == rows[-1]["visible_share"]
        assert summary["replay_error"] == max(row["replay_error"] for row in rows)
        assert json.loads((out / "summary.json").read_text()) == summary


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    "module, name, call", [(train, "update", 2), (files, "save", 3), (train, "train_step", 3), (files, "restore", 1)]
)
def test_killed_and_resumed_equals_uninterrupted(module, name, call, tmp_path, monkeypatch):
    """Killed within a step, a line of the log, a checkpoint, or at the start; then --steps grows."""
    train.train(tiny(tmp_path, "whole", steps=4))
    settings, calls, real = tiny(tmp_path, "killed", steps=3), [], getattr(module, name)

    def dying(*args, **options):
        calls.append(args)
        if len(calls) < call:
            return real(*args, **options)
        if name == "save":
            args[0].with_name("checkpoint.pt.dead.tmp").write_bytes(b"half a checkpoint")
            args[0].with_name("notes.tmp").write_text("the user's own")
        else:
            real(*args, **options)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, name, dying)
        train.train(settings)
    with open(tmp_path / "killed" / "metrics.jsonl", "ab") as f:
        f.write(b'\xff{"step": 99, "rew')
    train.train(dataclasses.replace(settings, resume=True))
    # the settings that are not given are those of the run
    train.train(Settings(out=settings.out, resume=True, steps=4, device="cpu"))
    assert outcome(settings.out) == outcome(tmp_path / "whole")
    left = [file.name for file in tmp_path.glob("killed/*.tmp")]
    assert left == (["notes.tmp"] if name == "save" else []), "only files that are not complete are deleted"


@pytest.mark.parametrize("objective", ["ppo", "dpo"])
def test_a_critic_and_a_reference_resume(tmp_path, objective):
    changes = dict(objective=objective, kl_ref=0.1, epochs=2)
    train.train(tiny(tmp_path, "whole", **changes, steps=2))
    train.train(tiny(tmp_path, "half", **changes, steps=1))
    assert state_of(tmp_path / "half")["step"] == 1, "there is no checkpoint of the last step"
    train.train(tiny(tmp_path, "half", **changes, steps=2, resume=True))
    assert outcome(tmp_path / "half") == outcome(tmp_path / "whole")
    # the reference is the base policy, before and after
    train.train(tiny(tmp_path, "base", **changes, steps=0))
    before, after = (state_of(tmp_path / name)["weights"] for name in ("base", "half"))
    for name in [name.removeprefix("reference.") for name in before if name.startswith("reference.")]:
        assert torch.equal(before[f"reference.{name}"], before[f"model.{name}"])
        assert torch.equal(after[f"reference.{name}"], before[f"model.{name}"])
    assert not torch.equal(after["model.norm.weight"], before["model.norm.weight"])


def test_a_killed_process_leaves_a_run_that_resumes(tmp_path):
    """A real process, killed in the middle of a run."""
    settings = tiny(tmp_path, "killed", steps=100_000)
    words = [sys.executable, "-c", SMALL_SMD, *argv(settings)]
    process = subprocess.Popen(words, env=os.environ | dict(PYTHONPATH=str(ROOT)), stdout=subprocess.DEVNULL)
    log, deadline = tmp_path / "killed" / "metrics.jsonl", time.time() + 60
    while time.time() < deadline and not (log.exists() and len(log.read_text().splitlines()) >= 3):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    steps = state_of(tmp_path / "killed")["step"] + 1
    assert train.main(["--resume", "--out", settings.out, "--device", "cpu", "--steps", str(steps)]) == 0
    train.train(tiny(tmp_path, "whole", steps=steps))
    assert outcome(settings.out) == outcome(tmp_path / "whole")


def is_finite(out: Path) -> bool:
    """Is everything that a run has written finite, and does its policy answer?"""
    tensors = [t for t in tree_leaves(state_of(out)) if isinstance(t, torch.Tensor)]
    log = (out / "metrics.jsonl").read_text()
    assert train.main(["--resume", "--out", str(out), "--device", "cpu", "--prompt", "abbccddeefghijklmnop?b"]) == 0
    return all(t.isfinite().all() for t in tensors) and not re.search("NaN|Infinity", log)


def test_no_value_that_is_not_finite_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "LR_WARMUP", 1)
    monkeypatch.setattr(runs, "SAVE_EVERY", 1)
    for lr in (1e18, 1e15, 1e5):  # an update that destroys the weights
        out = tmp_path / f"explodes {lr}"
        code = train.main(argv(tiny(tmp_path, out.name, lr=lr, steps=3, eval_every=1)))
        last = capsys.readouterr().err.splitlines()[-1]  # below the progress bars
        assert (code == 2 and "; stopped after step " in last) or (code == 0 and lr == 1e5), last
        assert is_finite(out)

    def root_of_zero(model, *_):
        """A loss of 0 whose gradient is not finite."""
        loss = (0 * model.norm.weight).sqrt().sum()
        return loss, dict(loss=loss.detach(), clip_fraction=torch.zeros(()))

    def not_finite(*_):
        raise FloatingPointError("the policy's logits are not finite")

    # a gradient, a figure of the log, a weight, an evaluation in the middle of the run
    for name, owner, function, message, steps in (
        ("learner_loss", smd, root_of_zero, "the loss is 0.0, the norm of its gradient nan", 0),
        ("diagnose", train, lambda *_: dict(kl_sparse_dense=math.inf), "kl_sparse_dense is inf", 0),
        ("check_finite", Agent, not_finite, "the policy's logits are not finite", 0),
        ("evaluate", Agent, not_finite, "the policy's logits are not finite", 1),
    ):
        settings, out = tiny(tmp_path, name, steps=3, eval_every=2), tmp_path / name
        train.train(dataclasses.replace(settings, steps=0))
        before = outcome(out)[1]
        with monkeypatch.context() as patch, pytest.raises(FloatingPointError, match=message) as raised:
            patch.setattr(owner, name, function)
            train.train(dataclasses.replace(settings, resume=True))
        kept = f"stopped after step {steps}; start again with --resume --out={out} to continue from step {steps}"
        assert raised.value.__notes__ == [kept]
        assert is_finite(out) and len(rows_of(out)) == steps
        if steps == 0:
            assert [t.tolist() for t in state_of(out)["weights"].values()] == before


def test_a_checkpoint_that_is_not_finite_is_not_written(tmp_path):
    for bad in (math.nan, math.inf):
        state = dict(weights=dict(a=torch.ones(3), b=torch.tensor([1.0, bad])), step=1)
        with pytest.raises(FloatingPointError, match="the weights, or the optimizer's moments, are not finite"):
            files.save(tmp_path / "checkpoint.pt", state)
        assert not list(tmp_path.iterdir())
    agent = Agent(checked(tiny(tmp_path)))
    agent.check_finite()
    for p in (agent.model.norm.weight, agent.model.layers[0].mlp.up_proj.weight):
        before = p.detach().clone()
        with torch.no_grad():
            p.view(-1)[-1] = math.inf
        with pytest.raises(FloatingPointError, match="the updated policy is not finite"):
            agent.check_finite()
        p.data.copy_(before)
    with torch.no_grad():
        agent.model.embed_tokens.weight.mul_(1e12)
        agent.model.norm.weight.mul_(1e30)  # finite weights whose logits are not finite
    with pytest.raises(FloatingPointError, match="the policy's logits"):
        agent.check_finite()


def test_two_runs_at_once_do_not_share_a_folder(tmp_path, monkeypatch):
    settings = checked(tiny(tmp_path))
    with runs.Run(settings) as first, pytest.raises(cli.UsageError, match="in use by another run"):
        assert first.out == tmp_path / "run"
        runs.Run(settings).__enter__()
    with runs.Run(settings):  # the first run has released its lock
        pass
    with runs.Run(dataclasses.replace(settings, out="")) as unnamed:
        assert str(unnamed.out) == "out/smd-001"
    shutil.rmtree(unnamed.out)
    unnamed = dataclasses.replace(settings, out=None)
    with runs.Run(unnamed) as first, runs.Run(unnamed) as second:
        assert (str(first.out), str(second.out)) == ("out/smd-001", "out/smd-002")
    # another run that begins and ends between the check of --out and the lock
    late = runs.Run(settings)
    train.train(tiny(tmp_path, steps=0))
    with pytest.raises(cli.UsageError, match="add --resume to continue, delete it"):
        late.__enter__()


def test_files_are_written_completely_or_not_at_all(tmp_path, monkeypatch):
    replace, path = os.replace, tmp_path / "checkpoint.pt"

    def interrupted(source, target):
        """Another process writes the same file."""
        monkeypatch.setattr(os, "replace", replace)
        files.write(target, "of the other")
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    files.write(path, "ours")
    assert path.read_text() == "ours"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 700, 90_000, 110_000):  # a full disk, for which torch.save raises RuntimeError
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                files.save(path, dict(weights=dict(a=torch.ones(40_000))))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert path.read_text() == "ours" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(ZeroDivisionError):
        files.write(path, lambda _: 1 / 0)


def test_a_checkpoint_with_a_flipped_bit_is_refused_or_intact(tmp_path):
    """torch.load ignores checksums: it took 182 of 200, and the run went on with other weights."""
    path, model, other = tmp_path / "checkpoint.pt", torch.nn.Linear(9, 9), torch.nn.Linear(9, 9)
    files.save(path, dict(weights=model.state_dict(), step=1))
    whole, refused, generator = path.read_bytes(), 0, random.Random(0)
    for bit in (generator.randrange(8 * len(whole)) for _ in range(200)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            assert files.restore(path, other) == dict(step=1)
            assert torch.equal(other.weight, model.weight) and torch.equal(other.bias, model.bias)
        except cli.UsageError as e:
            assert "is missing or damaged" in str(e)
            refused += 1
    assert refused > 100


def test_a_damaged_file_of_weights_says_what_helps(tmp_path, capsys, monkeypatch):
    """A base policy that is cut off, and a checkpoint without its optimizer."""
    monkeypatch.setattr(base, "CACHE", Path("cache"))  # other tests must not read the damaged file
    settings = tiny(tmp_path, steps=0)
    train.train(settings)
    path = tmp_path / "run" / "checkpoint.pt"
    state = state_of(tmp_path / "run")
    del state["optimizer"]
    files.save(path, state)
    assert train.main(argv(dataclasses.replace(settings, resume=True))) == 2
    assert "or damaged (KeyError: 'optimizer'); delete a damaged file to start again" in capsys.readouterr().err
    (file,) = Path("cache").glob("base-*.pt")
    file.write_bytes(file.read_bytes()[:1000])
    assert train.main(argv(tiny(tmp_path, "again", steps=0))) == 2
    assert "zip file); delete a damaged file to start again" in capsys.readouterr().err
    file.unlink()
    path.unlink()
    train.train(dataclasses.replace(settings, resume=True))
    assert torch.equal(
        state_of(tmp_path / "run")["weights"]["model.norm.weight"], state["weights"]["model.norm.weight"]
    )


def test_the_seconds_of_a_run_include_those_before_it_was_resumed(tmp_path):
    train.train(tiny(tmp_path, steps=1))
    state = state_of(tmp_path / "run")
    assert 0 < state["seconds"] < 60
    files.save(tmp_path / "run" / "checkpoint.pt", state | dict(seconds=1000.0))
    assert 1000 < train.train(tiny(tmp_path, steps=1, resume=True))["seconds"] < 1060


def test_the_seconds_of_a_step_are_counted_where_they_are_spent(tmp_path, monkeypatch):
    """Would catch a diagnosis that is counted as learning."""
    now = [0.0]

    def taking(seconds, f):
        def slow(*args):
            now[0] += seconds
            return f(*args)

        return slow

    monkeypatch.setattr(device.Stopwatch, "now", lambda _: now[0])
    for owner, name, seconds in (
        (shared, "sample", 1), (tasks, "score", 2), (train, "diagnose", 10), (smd, "make_batch", 100),
        (train, "update", 200),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, taking(seconds, getattr(owner, name)))
    agent = Agent(checked(tiny(tmp_path)))
    policy = Policy(agent.model, agent.s.objective, agent.s.kl_ref)
    for step, diagnosis in ((1, 10), (2, 0)):
        row = train.train_step(agent, policy, policy.optimizer(agent.s.lr), agent.task.reward, step)
        assert [row[name] for name in SECONDS] == [3, diagnosis, 300]


def judge(prompt: str, response: str, answer: str) -> float:
    """A reward that even a model of a few thousand weights learns in seconds: the share of the letter a."""
    return response.count("a") / 3


def held_out_reward(out: Path, count: int = 256) -> tuple[float, float]:
    """Mean reward of a run's checkpoint on held-out prompts with the sparse cache, and its standard error."""
    agent = Agent(checked(Settings(**read_config(out), device="cpu")))
    files.restore(out / "checkpoint.pt", Policy(agent.model, agent.s.objective, agent.s.kl_ref))
    examples = agent.task.held_out(count)
    texts = agent.respond(examples, 1, agent.eviction, torch.arange(count))[1]
    rewards = [judge(e.prompt, text, e.answer) for e, text in zip(examples, texts, strict=True)]
    return statistics.mean(rewards), statistics.stdev(rewards) / count**0.5


def test_a_short_run_learns_and_shuffled_rewards_do_not(tmp_path, monkeypatch):
    order, pool = torch.Generator().manual_seed(0), []

    def shuffled(*texts):
        """The same rewards, given to the wrong responses."""
        pool.append(judge(*texts))
        return pool[int(torch.randint(len(pool), (), generator=order))]

    monkeypatch.setattr(train, "LR_WARMUP", 1)
    changes = dict(warmup_steps=20, prompts=8, samples=8, lr=1e-2, eval_every=0)
    for name, reward, steps in (("base", None, 0), ("learned", judge, 12), ("shuffled", shuffled, 12)):
        train.train(tiny(tmp_path, name, **changes, steps=steps), reward=reward)
    results = [held_out_reward(tmp_path / name) for name in ("base", "learned", "shuffled")]
    (base, se), (learned, se_learned), (lost, _) = results
    assert learned - base > 3 * math.hypot(se, se_learned), f"{base:.3f} -> {learned:.3f}"
    # noise leads to a random walk, whose size the standard error of an evaluation does not include
    assert abs(lost - base) < (learned - base) / 5, f"control: {base:.3f} -> {lost:.3f}, and not {learned:.3f}"


@pytest.mark.parametrize(
    "error, act, message",
    [
        (FloatingPointError, lambda: math.nan, "a reward is nan"),
        (ZeroDivisionError, lambda: 1 / 0, "division by zero"),
        (KeyboardInterrupt, lambda: signal.raise_signal(signal.SIGINT), None),
    ],
)
def test_an_error_in_a_reward_stops_the_run_and_says_where(error, act, message, tmp_path):
    """Its traceback stays, and so does the checkpoint."""
    calls = []

    def reward(prompt, response, answer):
        calls.append(response)
        return act() if len(calls) == 1 + 16 * 2 + 5 else 0.5  # in step 3; the first call is a rehearsal

    with pytest.raises(error, match=message) as raised:
        train.train(tiny(tmp_path, eval_prompts=1), reward=reward)
    *by_reward, by_run = raised.value.__notes__
    assert by_run == f"stopped after step 2; start again with --resume --out={tmp_path}/run to continue from step 2"
    if error is ZeroDivisionError:
        assert by_reward[0].startswith("raised by the reward test_an_error_in_a_reward")
        assert raised.traceback[-1].name == "<lambda>"
    assert state_of(tmp_path / "run")["step"] == 2 and is_finite(tmp_path / "run")
