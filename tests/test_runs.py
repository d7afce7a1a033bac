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
from harness import cli, device, files, runs, shared, tasks, train
from harness.agent import Agent
from harness.objectives import Policy
from harness.settings import Settings
from tests.common import SECONDS, argv, outcome, tiny


def test_a_run_leaves_its_files(tmp_path):
    summary, keys = train.train(tiny(tmp_path)), {"kl_sparse_dense"}
    assert {p.name for p in (tmp_path / "run").iterdir()} == set(runs.FILES)
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if keys <= row.keys()] == [1, 4], (
        "every DIAGNOSE_EVERY steps, the first included"
    )
    assert max(row["replay_error"] for row in rows) == summary["replay_error"] < 1e-5
    assert all(row["stored_kv_bytes"] > 0 and 0 < row["visible_share"] < 1 and row["entropy"] > 0 for row in rows)


def test_evaluations_stand_where_they_were_made(tmp_path, monkeypatch):
    """Before, every `--eval-every` steps, and after; the last one is not made twice."""
    for steps, every, in_rows, after in ((6, 4, {4: 0.02}, 0.03), (6, 3, {3: 0.02, 6: 0.03}, 0.03), (2, 0, {}, 0.02)):
        made = []

        def evaluate(agent, made=made):
            made.append(len(made) + 1)
            return dict(sparse=made[-1] / 100, dense=made[-1] / 10)

        monkeypatch.setattr(Agent, "evaluate", evaluate)
        out = tmp_path / f"every-{every}"
        summary = train.train(tiny(tmp_path, out.name, steps=steps, eval_every=every))
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert {row["step"]: row["held_out_sparse"] for row in rows if "held_out_sparse" in row} == in_rows
        assert all(
            row["held_out_dense"] == pytest.approx(10 * row["held_out_sparse"]) for row in rows[3:4] if every == 4
        )
        assert summary["before"] == dict(sparse=0.01, dense=0.1) and summary["after"]["sparse"] == after
        assert summary["steps"] == steps and summary["out"] == str(out)
        assert summary["visible_share"] == rows[-1]["visible_share"]
        assert summary["replay_error"] == max(row["replay_error"] for row in rows)
        assert json.loads((out / "summary.json").read_text()) == summary


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train.train(tiny(tmp_path, name, seed=seed))
    a, b, c = (outcome(tmp_path / name) for name in "abc")
    assert a == b and a != c


def test_killed_and_resumed_equals_uninterrupted(tmp_path, monkeypatch):
    """Killed in the middle of a step, of a line of the log, of a checkpoint, of an evaluation; then --steps grows."""
    train.train(tiny(tmp_path, "whole", steps=8))

    class Killed(BaseException):
        pass

    def dies(name, call):
        """Let the call-th call of a function die after it has done its work in part or in full."""
        module = files if name in ("save", "restore") else train
        real, calls = getattr(module, name), []

        def dying(*args, **options):
            calls.append(1)
            if len(calls) == call:
                if name == "save":
                    args[0].with_name("checkpoint.pt.dead.tmp").write_bytes(b"half a checkpoint")
                else:
                    real(*args, **options)
                raise Killed
            return real(*args, **options)

        return module, name, dying

    for n, (name, call) in enumerate([("update", 2), ("save", 3), ("train_step", 5), ("diagnose", 1), ("restore", 1)]):
        settings, log = tiny(tmp_path, f"killed-{n}"), tmp_path / f"killed-{n}" / "metrics.jsonl"
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(*dies(name, call))
            train.train(settings)
        with open(log, "a") as f:
            f.write('{"step": 99, "rew')
        train.train(dataclasses.replace(settings, resume=True))
        train.train(dataclasses.replace(settings, resume=True, steps=8))
        assert outcome(settings.out) == outcome(tmp_path / "whole"), f"killed in call {call} of {name}"
        assert not list(Path(settings.out).glob("*.tmp")), "what was written by half is still there"


@pytest.mark.parametrize("objective", ["ppo", "dpo"])
def test_a_critic_and_a_reference_resume(tmp_path, objective):
    changes = dict(objective=objective, kl_ref=0.1, epochs=2)
    train.train(tiny(tmp_path, "whole", **changes))
    train.train(tiny(tmp_path, "half", **changes | dict(steps=3)))
    assert torch.load(tmp_path / "half" / "checkpoint.pt", weights_only=True)["step"] == 3, "the last step is not kept"
    train.train(tiny(tmp_path, "half", **changes, resume=True))
    assert outcome(tmp_path / "half") == outcome(tmp_path / "whole")
    # the reference is the base policy, before and after
    train.train(tiny(tmp_path, "base", **changes | dict(steps=0)))
    begun, done = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["weights"] for name in ("base", "half")
    )
    for name in [name.removeprefix("reference.") for name in begun if name.startswith("reference.")]:
        assert torch.equal(begun[f"reference.{name}"], begun[f"model.{name}"])
        assert torch.equal(done[f"reference.{name}"], begun[f"model.{name}"])
    assert not torch.equal(done["model.norm.weight"], begun["model.norm.weight"])


def test_a_killed_process_leaves_a_run_that_resumes(tmp_path, capsys, monkeypatch):
    """The real thing once, in the middle of a run. tests/test_cli.py has SIGTERM and Ctrl-C."""
    # as in the process that is killed
    monkeypatch.setattr(runs, "SAVE_EVERY", 20)
    monkeypatch.setattr(train, "DIAGNOSE_EVERY", 10)
    monkeypatch.setattr(Settings, "width", 128)
    monkeypatch.setattr(Settings, "interval", 4)
    long = dict(steps=40, eval_every=30, prompts=2)
    train.train(tiny(tmp_path, "whole", **long))
    settings = tiny(tmp_path, "killed", **long)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen([sys.executable, smd.__file__, *argv(settings)], **pipes)
    deadline, log = time.time() + 60, Path(settings.out) / "metrics.jsonl"
    while time.time() < deadline and not (log.exists() and len(log.read_text().splitlines()) >= 22):
        time.sleep(0.01)
    process.kill()
    error = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, error
    assert train.main(["--resume", "--out", settings.out, "--device", "cpu"]) == 0
    assert outcome(settings.out) == outcome(tmp_path / "whole")
    assert "held-out accuracy" in capsys.readouterr().out


def test_a_checkpoint_answers_a_prompt(tmp_path, capsys, monkeypatch):
    train.train(tiny(tmp_path))
    command = ["--resume", "--out", str(tmp_path / "run"), "--device", "cpu", "--prompt", "abbccddeefghijklmnop?b"]
    assert train.main(command) == 0
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert lines[0].startswith("sparse cache: ") and lines[1].startswith("dense cache:  ")
    # and not the weights of a fresh start
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["weights"]
    monkeypatch.setattr(Agent, "answer", lambda agent, _: str(agent.model.norm.weight.tolist()))
    assert train.main(command) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(state["model.norm.weight"].tolist())


def is_finite(out: str) -> bool:
    """Is all that a run has written finite, and can it be gone on from?"""
    state = torch.load(Path(out) / "checkpoint.pt", weights_only=True)
    tensors = [t for t in tree_leaves(state) if isinstance(t, torch.Tensor)]
    log = (Path(out) / "metrics.jsonl").read_text()
    assert train.main(["--resume", "--out", out, "--device", "cpu", "--prompt", "abbccddeefghijklmnop?b"]) == 0
    return all(t.isfinite().all() for t in tensors) and not re.search("NaN|Infinity", log)


def test_nan_stops_the_run_and_names_the_step(tmp_path):
    calls = []

    def reward(prompt, response, answer):
        calls.append(response)
        return math.nan if len(calls) > 1 + 16 * 2 else float(len(response))  # the first call is a rehearsal

    with pytest.raises(FloatingPointError, match=r"stopped at step 3: a reward is nan; .* keeps the last good policy"):
        train.train(tiny(tmp_path), reward=reward)
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 2
    assert is_finite(str(tmp_path / "run"))


def test_what_is_not_finite_is_never_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "LR_WARMUP", 1)
    monkeypatch.setattr(runs, "SAVE_EVERY", 1)
    # an update that destroys the weights
    for n, lr in enumerate((1e30, 1e15, 1e5)):
        settings = tiny(tmp_path, f"explodes-{n}", lr=lr, steps=5, eval_every=1)
        code = train.main(argv(settings))
        last = capsys.readouterr().err.splitlines()[-1]  # below the progress bars
        assert (code == 2 and last.startswith("smd.py: stopped at step")) or (code == 0 and lr == 1e5), last
        assert is_finite(settings.out)

    def root_of_zero(model, *_):
        """A loss of 0 whose gradient is not finite."""
        loss = (0 * model.norm.weight).sqrt().sum()
        return loss, dict(loss=loss.detach(), clip_fraction=torch.zeros(()))

    def nowhere(*_):
        raise FloatingPointError("the policy's logits are not finite")

    # a gradient, a figure of the log, an evaluation in the middle of the run
    for name, owner, function, message in (
        ("learner_loss", smd, root_of_zero, "step 1: the loss is 0.0, the norm of its gradient nan"),
        ("diagnose", train, lambda *_: dict(kl_sparse_dense=math.inf), "step 1: kl_sparse_dense is inf"),
        ("evaluate", Agent, nowhere, "step 4: the policy's logits are not finite"),
    ):
        settings = tiny(tmp_path, name)
        train.train(dataclasses.replace(settings, steps=0))
        before = outcome(settings.out)[1]
        with monkeypatch.context() as patch, pytest.raises(FloatingPointError, match=message):
            patch.setattr(owner, name, function)
            train.train(dataclasses.replace(settings, resume=True))
        assert is_finite(settings.out)
        rows = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        assert len(rows) == (3 if name == "evaluate" else 0)
        if name != "evaluate":
            state = torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
            assert [t.tolist() for t in state["weights"].values()] == before


def test_a_checkpoint_that_is_not_finite_is_not_written(tmp_path, monkeypatch):
    for bad in (math.nan, math.inf):
        state = dict(weights=dict(a=torch.ones(3), b=torch.tensor([1.0, bad])), step=1)
        with pytest.raises(FloatingPointError, match="the weights, or the optimizer's moments, are not finite"):
            files.save(tmp_path / "checkpoint.pt", state)
        assert not list(tmp_path.iterdir())
    agent = Agent(train.checked(tiny(tmp_path)))
    agent.check_finite()
    with monkeypatch.context() as patch, pytest.raises(FloatingPointError, match="stopped at step 1: it is not"):
        patch.setattr(Agent, "check_finite", lambda _: (_ for _ in ()).throw(FloatingPointError("it is not")))
        train.train(tiny(tmp_path, "step", steps=1))
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
    settings = train.checked(tiny(tmp_path))
    with runs.Run(settings) as first, pytest.raises(cli.UsageError, match="in use by another run"):
        assert first.out == tmp_path / "run"
        runs.Run(settings).__enter__()
    with runs.Run(settings):  # the first one has let go of it
        pass
    link = tmp_path / "linked"
    link.mkdir()
    (link / "out").symlink_to(tmp_path / "not there")
    monkeypatch.chdir(link)
    with pytest.raises(cli.UsageError, match="out cannot be written: File exists"):
        runs.Run(dataclasses.replace(settings, out=None)).__enter__()
    monkeypatch.chdir(tmp_path)
    with runs.Run(dataclasses.replace(settings, out="")) as unnamed:
        assert str(unnamed.out) == "out/smd-001"
    shutil.rmtree(unnamed.out)
    unnamed = dataclasses.replace(settings, out=None)
    with runs.Run(unnamed) as first, runs.Run(unnamed) as second:
        assert (str(first.out), str(second.out)) == ("out/smd-001", "out/smd-002")

    # another run that begins and ends between the check of --out and the claim
    late = runs.Run(settings)
    train.train(tiny(tmp_path, steps=1))
    with pytest.raises(cli.UsageError, match="add --resume to continue it, delete it"):
        late.__enter__()

    # two that write the same base policy
    replace = os.replace
    with monkeypatch.context() as patch:

        def interrupted(source, target):
            patch.setattr(os, "replace", replace)
            files.write(target, "of the other")
            replace(source, target)

        patch.setattr(os, "replace", interrupted)
        files.write(tmp_path / "base", "ours")
    assert (tmp_path / "base").read_text() == "ours"
    with monkeypatch.context() as patch, pytest.raises(cli.UsageError, match="cannot be written: No space left"):
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        files.write(tmp_path / "base", "more")
    assert not list(tmp_path.glob("*.tmp"))


def test_a_damaged_base_policy_says_what_helps(tmp_path, capsys):
    settings = tiny(tmp_path, steps=0)
    train.train(settings)
    (file,) = Path("out/cache").glob("base-*.pt")
    file.write_bytes(file.read_bytes()[:1000])
    assert train.main(argv(tiny(tmp_path, "again", steps=0))) == 2
    error = capsys.readouterr().err
    assert "its checksum is wrong); delete it to begin anew" in error
    file.unlink()
    train.train(tiny(tmp_path, "anew", steps=0))
    assert outcome(tmp_path / "anew") == outcome(settings.out)


def test_the_seconds_of_a_run_include_those_before_it_was_resumed(tmp_path):
    train.train(tiny(tmp_path, steps=2))
    path = tmp_path / "run" / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    assert 0 < state["seconds"] < 60
    files.save(path, state | dict(seconds=1000.0))
    assert 1000 < train.train(tiny(tmp_path, steps=2, resume=True))["seconds"] < 1060


def test_the_seconds_of_a_step_are_counted_where_they_are_spent(tmp_path, monkeypatch):
    """Would catch a diagnosis that is counted as learning."""
    now = [0.0]

    def taking(seconds, f):
        def slow(*args):
            now[0] += seconds
            return f(*args)

        return slow

    monkeypatch.setattr(device, "clock", lambda _: now[0])
    for owner, name, seconds in (
        (shared, "sample", 1), (tasks, "score", 2), (train, "diagnose", 10), (smd, "prepare", 100),
        (train, "update", 200),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, taking(seconds, getattr(owner, name)))
    agent = Agent(train.checked(tiny(tmp_path)))
    policy = Policy(agent.model, agent.s.objective, agent.s.kl_ref)
    for step, diagnosis in ((1, 10), (2, 0)):
        row = train.train_step(agent, policy, policy.optimizer(agent.s.lr), agent.task.reward, step)
        assert [row[name] for name in SECONDS] == [3, diagnosis, 300]


def judge(prompt: str, response: str, answer: str) -> float:
    """A reward that even a model of a few thousand weights can learn in seconds: the share of the letter a."""
    return response.count("a") / 3


def held_out_reward(out: Path, count: int = 512) -> tuple[float, float]:
    """Mean reward of a run's checkpoint on held-out prompts with the sparse cache, and its standard error."""
    agent = Agent(train.checked(Settings(**runs.read_config(out, Settings), device="cpu")))
    files.restore(out / "checkpoint.pt", Policy(agent.model, agent.s.objective, agent.s.kl_ref))
    examples = agent.task.held_out(count)
    texts = agent.respond(examples, 1, True, torch.arange(count))[1]
    rewards = [judge(e.prompt, text, e.answer) for e, text in zip(examples, texts, strict=True)]
    return statistics.mean(rewards), statistics.stdev(rewards) / count**0.5


def test_a_short_run_learns_and_shuffled_rewards_do_not(tmp_path, monkeypatch):
    order, pool = torch.Generator().manual_seed(0), []

    def shuffled(*texts):
        """The same rewards, handed out to the wrong responses."""
        pool.append(judge(*texts))
        return pool[int(torch.randint(len(pool), (), generator=order))]

    monkeypatch.setattr(train, "LR_WARMUP", 1)
    changes = dict(warmup_steps=20, prompts=8, samples=8, lr=1e-2, eval_every=0)
    for name, reward, steps in (("base", None, 0), ("learned", judge, 20), ("shuffled", shuffled, 20)):
        train.train(tiny(tmp_path, name, **changes, steps=steps), reward=reward)
    results = [held_out_reward(tmp_path / name) for name in ("base", "learned", "shuffled")]
    (base, se), (learned, se_learned), (lost, _) = results
    assert learned - base > 3 * math.hypot(se, se_learned), f"{base:.3f} -> {learned:.3f}"
    # what is learned from noise is a random walk, which the standard error of an evaluation does not know
    assert abs(lost - base) < (learned - base) / 5, f"control: {base:.3f} -> {lost:.3f}, and not {learned:.3f}"


def test_a_checkpoint_with_a_bit_flipped_is_refused(tmp_path):
    """torch.load took 182 of 200, and the run went on with other weights."""
    train.train(tiny(tmp_path, steps=1))
    path = tmp_path / "run" / "checkpoint.pt"
    whole = path.read_bytes()
    generator = random.Random(0)
    for bit in (generator.randrange(8 * len(whole)) for _ in range(200)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(cli.UsageError, match=r"is missing or damaged .* its checksum is wrong"):
            files.restore(path, torch.nn.Linear(1, 1))


def test_a_log_is_that_of_its_checkpoint_whatever_became_of_the_file(tmp_path):
    train.train(tiny(tmp_path, "whole"))
    train.train(tiny(tmp_path, steps=4))
    (tmp_path / "run" / "metrics.jsonl").write_bytes(b"\xff{")
    train.train(tiny(tmp_path, resume=True))
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


@pytest.mark.skipif(sys.platform == "win32", reason="files have no limit there")
@pytest.mark.parametrize("limit", [0, 700, 90_000, 110_000])
def test_a_full_disk_is_one_line_and_keeps_what_is_there(limit, tmp_path):
    """torch.save makes a RuntimeError of it, "enforce fail"."""
    path = tmp_path / "checkpoint.pt"
    files.save(path, dict(weights=dict(a=torch.ones(3))))
    kept = path.read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(cli.UsageError, match=r"checkpoint.pt cannot be written: File too large; make room"):
            files.save(path, dict(weights=dict(a=torch.ones(40_000))))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == kept and list(tmp_path.iterdir()) == [path]


def reward_at_step_3(tmp_path, act):
    """Train with a reward that does something else once, in step 3; the checkpoint is of step 2."""
    calls = []

    def reward(prompt, response, answer):
        calls.append(response)
        if len(calls) == 1 + 16 * 2 + 5:
            act()
        return float(len(response))

    train.train(tiny(tmp_path), reward=reward)


def test_a_reward_that_raises_is_named_with_its_step(tmp_path):
    """Its traceback stays, and so does the checkpoint."""
    with pytest.raises(ZeroDivisionError) as raised:
        reward_at_step_3(tmp_path, lambda: 1 / 0)
    by_reward, by_run = raised.value.__notes__
    assert by_reward == "raised by the reward reward_at_step_3.<locals>.reward"
    assert by_run == f"stopped at step 3; {tmp_path}/run/checkpoint.pt keeps the last good policy"
    assert raised.traceback[-1].name == "<lambda>"
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 2


def test_a_machine_without_memory_is_told_what_takes_less(tmp_path):
    with pytest.raises(cli.UsageError) as raised:
        reward_at_step_3(tmp_path, lambda: torch.empty(10**14))
    assert "out of memory (RuntimeError" in str(raised.value) and "; stopped at step 3; " in str(raised.value)
    assert "give fewer --prompts, --samples or --eval-prompts, or a larger --accumulate" in str(raised.value)


def test_a_folder_that_is_deleted_while_its_run_goes_on_is_one_line(tmp_path):
    with pytest.raises(cli.UsageError, match=r"metrics.jsonl cannot be written: No such file or directory"):
        reward_at_step_3(tmp_path, lambda: shutil.rmtree(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_run_is_resumed_from_python_as_from_the_command_line(tmp_path):
    """Settings that are not given came from the defaults, and a run with --prompts 4 was refused."""
    settings = tiny(tmp_path, steps=2)
    train.train(settings)
    train.train(Settings(resume=True, out=settings.out, steps=3, device="cpu"))
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3
