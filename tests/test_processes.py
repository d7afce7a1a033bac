"""Processes that share a step's prompts are one process."""

import dataclasses
import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._pytree import tree_leaves

import smd
from harness import cli, files, parallel, report, tasks, train
from harness.agent import Agent
from harness.objectives import Policy
from harness.settings import Settings
from tests.common import ROOT, SECONDS, argv, compare, tiny
from tiny_model import TinyModel

# every method, every objective, and all that is summed over processes: tokens, weights, advantages, pairs, gradients
CASES = [
    dict(method="smd", epochs=2),
    dict(method="smd", objective="ppo", accumulate=2),
    dict(method="sparse_rl", accumulate=2),
    dict(method="sparse_rl", objective="ppo", epochs=2),
    dict(method="naive", objective="dpo", epochs=2),
    dict(method="dense", objective="dpo", accumulate=2),
    dict(method="tis", objective="dr_grpo"),
    dict(method="seq_is", kl_ref=0.0),
]


def in_processes(count: int, folder: Path, call: str) -> list[subprocess.Popen]:
    """So many processes of one group, each of which calls something of this file in a folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = dict(WORLD_SIZE=count, LOCAL_WORLD_SIZE=count, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS=1)
    group = os.environ | {name: str(value) for name, value in group.items()} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", f"from tests import test_processes; test_processes.{call}"]
    ranks = [group | dict(RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(count)]
    return [subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.PIPE, text=True) for env in ranks]


def agent_in_float64(s: Settings) -> Agent:
    """An untrained layer whose responses end early, so that those of one process may all be shorter than another's."""
    agent = Agent(s)
    agent.config = dataclasses.replace(agent.config, layers=1)
    agent.model = TinyModel(agent.config).double()
    table = agent.model.embed_tokens.weight.detach()
    table.mul_(20.0)
    table[:, 0] = 3.0  # what all tokens have in common, and the end of text has more of
    table[agent.form.ends[0], 0] = 5.0
    return agent


def reward_of_bytes(prompt: str, response: str, answer: str) -> float:
    return sum(response.encode()) % 7 / 7


def accuracy_of_bytes(task, texts: list[str], examples: list) -> float:
    """Other than 0; and of an evaluation, another if an answer is missing, comes twice or is in another's place."""
    evaluation = len(texts) == len(examples)
    return sum((n if evaluation else 1) * reward_of_bytes("", said, "") for n, said in enumerate(texts)) / len(texts)


def steps_in_float64(**changes) -> dict:
    """Three steps: the rows of the log, the gradients of all updates, what was sampled, and the weights."""
    sizes = dict(asked=2, prompts=12, samples=3, budget=12, lr=1e-2, max_new=6, kl_ref=0.1)
    agent = agent_in_float64(train.checked(Settings(**sizes | changes, device="cpu")))
    policy = Policy(agent.model, agent.s.objective, agent.s.kl_ref)
    optimizer = policy.optimizer(agent.s.lr)
    found = dict(rows=[], gradients=[], sampled=[])
    clip, prepare = torch.nn.utils.clip_grad_norm_, smd.prepare

    def watched_clip(trained, limit):
        found["gradients"].append(torch.cat([p.grad.flatten() for p in trained]))
        return clip(trained, limit)

    def watched_prepare(model, rollout, *others):
        found["sampled"].append((rollout.response_BR, rollout.evicted_at_LBGT.transpose(0, 1), rollout.length_B))
        return prepare(model, rollout, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", watched_clip)
        patch.setattr(smd, "prepare", watched_prepare)
        for step in range(1, 4):
            found["rows"].append(train.train_step(agent, policy, optimizer, reward_of_bytes, step))
    return found | dict(weights=policy.state_dict())


def train_in_a_group(steps: int) -> None:
    """Write what this process finds, and begin the run in this folder, or go on with it."""
    train.DIAGNOSE_EVERY = 2
    Settings.width, Settings.interval = 16, 2  # as for all tests
    report.draw_curves = lambda *_: None
    train.Agent = agent_in_float64
    tasks.accuracy = accuracy_of_bytes
    parallel.begin("cpu")
    found = [steps_in_float64(**case) for case in CASES[: 8 if parallel.COUNT == 2 else 3]]
    train.train(run_of_a_group(steps), reward_of_bytes)
    rewards = itertools.count()

    def nan_in_the_last_process(*_) -> float:
        # the second step: one call is a rehearsal, and each process scores 9 or 6 responses a step
        last = parallel.RANK == parallel.COUNT - 1
        return math.nan if last and next(rewards) > 10 else 0.5

    try:
        train.train(run_of_a_group(2, f"nan {steps}"), nan_in_the_last_process)
    except FloatingPointError as e:
        torch.save((found, str(e)), f"{parallel.RANK} of {parallel.COUNT}.pt")


def run_of_a_group(steps: int, out: str = "run") -> Settings:
    resume = steps > 2
    chain = dict(asked=2, prompts=6, samples=3, budget=12, warmup_steps=0, eval_prompts=65, eval_every=2)
    return Settings(**chain, steps=steps, out=out, resume=resume, device="cpu")


def assert_close(got, want, name: str) -> None:
    """Equal to rounding, which AdamW enlarges from update to update where a gradient is almost 0."""
    numbers = []
    for found in (got, want):
        leaves = [torch.as_tensor(-1.0 if x is None else x, dtype=torch.float64) for x in tree_leaves(found)]
        numbers.append(torch.cat([x.flatten() for x in leaves]))
    compare(name, *(x / numbers[1].abs().clamp(min=1.0) for x in numbers), 1e-7)


def test_several_processes_are_one(tmp_path, monkeypatch):
    """Two and three: loss, gradients, figures, tokens and shadow masks; and a run that two began, three end.

    Would catch an advantage, weight or mean over a process's share, a process that follows its own gradient, and an
    error of one process for which the others wait forever.
    """
    monkeypatch.setattr(train, "Agent", agent_in_float64)
    monkeypatch.setattr(train, "DIAGNOSE_EVERY", 2)
    monkeypatch.setattr(tasks, "accuracy", accuracy_of_bytes)
    # the caches of several processes are not as long as one
    unlike = dict.fromkeys((*SECONDS, "stored_kv_bytes", "full_kv_bytes", "full_kv_bytes_shared"), 0.0)
    groups = {}
    for count, steps in ((2, 2), (3, 4)):
        processes = in_processes(count, tmp_path, f"train_in_a_group({steps})")
        if not groups:
            want = [steps_in_float64(**case) for case in CASES]
            train.train(run_of_a_group(2, "one"), reward_of_bytes)
            train.train(run_of_a_group(4, "one"), reward_of_bytes)
        for process in processes:
            assert process.wait(timeout=300) == 0, process.stderr.read()
        groups[count], errors = zip(*(torch.load(f"{rank} of {count}.pt") for rank in range(count)), strict=True)
        assert len(set(errors)) == 1 and errors[0].startswith("stopped at step 2: a reward is nan"), errors
    lengths = [lengths.view(3, -1).amax(dim=1).tolist() for one in want for _, _, lengths in one["sampled"]]
    assert any(len(set(longest)) > 1 for longest in lengths), "all processes had responses of one length"
    for ranks in groups.values():
        for case, one, *parts in zip(CASES, want, *ranks, strict=False):
            for n, whole in enumerate(one["sampled"]):
                assert_same_draws([part["sampled"][n] for part in parts], whole)
            for part in parts:
                assert_close([row | unlike for row in part["rows"]], [row | unlike for row in one["rows"]], f"{case}")
                assert_close(part["gradients"], one["gradients"], f"gradients of {case}")
                same = zip(tree_leaves(part["weights"]), tree_leaves(parts[0]["weights"]), strict=True)
                assert all(torch.equal(a, b) for a, b in same), "the weights of two processes differ"
    together, alone = (
        [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()] for run in ("run", "one")
    )
    assert len(together) == 4
    assert_close([row | unlike for row in together], [row | unlike for row in alone], "the run")


def assert_same_draws(parts: list[tuple], whole: tuple) -> None:
    """Responses and shadow masks of all processes, each padded to its own longest response, and those of one."""
    of_parts = [sequence for part in parts for sequence in zip(*part, strict=True)]
    for got, (response_R, evicted_at, length) in zip(of_parts, zip(*whole, strict=True), strict=True):
        T = evicted_at.shape[-1] - len(response_R) + length
        assert torch.equal(got[0][:length], response_R[:length]) and got[2] == length
        assert torch.equal(got[1][..., :T], evicted_at[..., :T])


def test_a_schedulers_environment_is_not_torchruns():
    """WORLD_SIZE=2, or RANK alone, or an empty WORLD_SIZE, ended in a traceback of torch.distributed."""
    whole = dict(WORLD_SIZE="3", RANK="2", LOCAL_WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="127.0.0.1")
    assert parallel.told_by_torchrun(whole) == [3, 2, 2, 1]
    for name in whole:
        lacking = {other: value for other, value in whole.items() if other != name}
        assert parallel.told_by_torchrun(lacking) == [1, 0, 1, 0], name
    for given in ({}, whole | dict(WORLD_SIZE=""), whole | dict(RANK="two"), dict(WORLD_SIZE="2"), dict(RANK="1")):
        assert parallel.told_by_torchrun(given) == [1, 0, 1, 0], given


def test_a_share_by_hand(monkeypatch):
    monkeypatch.setattr(parallel, "COUNT", 3)
    taken = []
    for rank in range(3):
        monkeypatch.setattr(parallel, "RANK", rank)
        taken.append(list(range(8))[parallel.share(8)])
    assert taken == [[0, 1], [2, 3, 4], [5, 6, 7]]


def test_an_error_of_one_process_is_raised_in_all(monkeypatch):
    found = cli.UsageError("what the second found")
    monkeypatch.setattr(parallel, "of_each", lambda error: [error, found])
    with pytest.raises(cli.UsageError, match="what the second found"):
        parallel.raise_on_all_ranks(lambda: 1)
    with pytest.raises(cli.UsageError, match="what the second found"):
        parallel.on_rank0(lambda: 1)
    monkeypatch.setattr(parallel, "RANK", 1)
    with pytest.raises(cli.UsageError, match="what the second found"):
        parallel.on_rank0(lambda: pytest.fail("the second process called it, too"))


def test_being_told_to_end_is_not_taken_for_a_file_that_cannot_be_written(tmp_path):
    """Would catch a signal that arrives while a file is written or read, and becomes an advice to delete it."""
    files.save(tmp_path / "intact.pt", dict(weights={}))
    for act in (
        lambda: files.write(tmp_path / "file", parallel.told_to_end),
        lambda: files.restore(tmp_path / "intact.pt", SimpleNamespace(parameters=parallel.told_to_end)),
    ):
        with pytest.raises(cli.Ended):
            act()


@pytest.mark.skipif(sys.platform != "linux", reason="it looks for the first process in /proc")
def test_where_one_is_killed_all_end_with_a_line_and_the_run_resumes(tmp_path, capsys, monkeypatch):
    """The real thing once, under torchrun, and the first process at that, which alone writes."""
    monkeypatch.setattr(Settings, "width", 128)  # as in the processes
    settings = tiny(tmp_path, "run", steps=10_000, eval_every=0)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    together = subprocess.Popen([*torchrun, smd.__file__, *argv(settings)], **pipes)
    log, deadline = Path(settings.out) / "metrics.jsonl", time.time() + 60
    while time.time() < deadline and not (log.exists() and len(log.read_text().splitlines()) >= 25):
        time.sleep(0.01)
    children = Path(f"/proc/{together.pid}/task/{together.pid}/children").read_text().split()
    (first,) = [pid for pid in children if b"\0RANK=0\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(int(first), signal.SIGKILL)
    error = together.communicate(timeout=60)[1]
    lines = [line for line in error.splitlines() if line.startswith("smd.py: ")]
    assert together.returncode == 1 and len(lines) == 1, error
    assert lines[0].endswith(f"; --resume --out {settings.out} goes on from the last checkpoint")
    kept = torch.load(log.parent / "checkpoint.pt", weights_only=True)["step"]
    assert kept in (20, 40, 60)
    alone = ["--resume", "--out", settings.out, "--device", "cpu", "--steps", str(kept + 1)]
    assert train.main(alone) == 0
    assert f"resumed at step {kept} of {kept + 1}" in capsys.readouterr().out


def test_what_processes_cannot_share_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(parallel, "COUNT", 4)
    monkeypatch.setattr(parallel, "LOCAL_COUNT", 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for given, message in (
        (["--prompts", "30"], "4 processes take equal shares of the prompts of an update, got --prompts 30"),
        (["--accumulate", "9"], "at most the 8 prompts that a process has of an update, got 9"),
        (["--device", "cuda"], "4 processes need as many CUDA devices, and here are 2; give torchrun --nproc-per-node"),
        (["--prompt", "hello", "--model", "smollm2"], "--prompt is answered by a single process"),
    ):
        for rank, lines in ((0, 1), (1, 0)):  # of a machine's processes, which all find the same, the first says it
            monkeypatch.setattr(parallel, "LOCAL_RANK", rank)
            assert train.main(["--device", "cpu", *given]) == 2 * lines
            said = capsys.readouterr().err.splitlines()
            assert len(said) == lines and all(message in line for line in said), said
