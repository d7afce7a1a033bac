"""Processes that share a step's prompts are one process."""

import dataclasses
import json
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
from harness import cli, files, parallel, report, tasks
from harness.agent import Agent
from smd import Settings
from test_smd import ROOT, compare
from tests.common import AGENT_FOR, SECONDS, argv, tiny
from tiny_model import TinyModel

PAIRS = [
    (method, objective)
    for method in smd.METHODS
    for objective in smd.VALUES["objective"]
    if objective != "dpo" or smd.METHODS[method].weight is None
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
    agent = AGENT_FOR(s)
    agent.config = dataclasses.replace(agent.config, layers=1)
    agent.model = TinyModel(agent.config).double()
    table = agent.model.embed_tokens.weight.detach()
    table.mul_(20.0)
    table[:, 0] = 3.0  # what all tokens have in common, and the end of text has more of
    table[agent.encoding.eot_token, 0] = 5.0
    return agent


def reward_of_bytes(prompt: str, response: str, answer: str) -> float:
    return sum(response.encode()) % 7 / 7


def accuracy_of_bytes(task, texts: list[str], examples: list) -> float:
    """Other than 0, and another if an answer is missing, comes twice or stands in another's place."""
    return sum(n * reward_of_bytes("", said, "") for n, said in enumerate(texts)) / len(texts)


def steps_in_float64(method: str, objective: str) -> dict:
    """Five steps: the rows of the log, the gradients of all updates, what was sampled, and the weights."""
    s = Settings(
        method=method, objective=objective, hops=2, prompts=12, samples=3, width=16, interval=2, budget=12, lr=1e-2,
        max_new=6, kl_ref=0.1, device="cpu", **(dict(minibatches=2) if objective == "grpo" else dict(accumulate=2)),
    )  # fmt: skip
    agent = agent_in_float64(smd.checked(s))
    policy = smd.Policy(agent.model, agent.s)
    optimizer = policy.optimizer(s.lr)
    found = dict(rows=[], gradients=[], sampled=[])

    def gradient(policy, batch, s):
        row = real_gradient(policy, batch, s)
        found["gradients"].append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
        return row

    def prepare(policy, rollout, *others):
        response_BR = rollout.response_BR.masked_fill(~rollout.mask_BR, 0)
        found["sampled"].append((response_BR, rollout.evicted_at_LBGT, rollout.length_B))
        return real_prepare(policy, rollout, *others)

    with pytest.MonkeyPatch.context() as patch:
        real_gradient, real_prepare = smd.gradient, smd.prepare
        patch.setattr(smd, "gradient", gradient)
        patch.setattr(smd, "prepare", prepare)
        for step in range(1, 6):
            found["rows"].append(smd.train_step(agent, policy, optimizer, reward_of_bytes, step))
    return found | dict(weights=policy.state_dict())


def train_in_a_group(steps: int) -> None:
    """Write what this process finds, and begin the run in this folder, or go on with it."""
    smd.DIAGNOSE_EVERY = 3
    report.draw_curves = lambda *_: None
    smd.agent_for = agent_in_float64
    tasks.accuracy = accuracy_of_bytes
    parallel.begin("cpu")
    found = {pair: steps_in_float64(*pair) for pair in PAIRS}
    torch.save(found, f"{parallel.RANK} of {parallel.COUNT}.pt")
    smd.train(run_of_a_group(steps), reward_of_bytes)


def run_of_a_group(steps: int, out: str = "run") -> Settings:
    resume = steps > 2
    chain = dict(hops=2, prompts=6, samples=3, width=16, budget=12, warmup_steps=0, eval_prompts=65, eval_every=2)
    return Settings(**chain, steps=steps, out=out, resume=resume, device="cpu")


def assert_close(got, want, name: str) -> None:
    """Equal to 1e-10, in whatever lists and dicts the numbers stand."""
    numbers = []
    for found in (got, want):
        leaves = [torch.as_tensor(-1.0 if x is None else x, dtype=torch.float64) for x in tree_leaves(found)]
        numbers.append(torch.cat([x.flatten() for x in leaves]))
    compare(name, *(x / numbers[1].abs().clamp(min=1.0) for x in numbers), 1e-10)


def test_25_several_processes_are_one(tmp_path, monkeypatch):
    """Two and three: loss, gradients, figures, tokens and records of five steps; and a run that two began, three end.

    Would catch an advantage, weight or mean that is of a process's share, and a process that follows its own gradient.
    """
    monkeypatch.setattr(smd, "agent_for", agent_in_float64)
    monkeypatch.setattr(tasks, "accuracy", accuracy_of_bytes)
    unlike = dict.fromkeys((*SECONDS, "kv_bytes"), 0.0)  # several caches are not one, nor do they choose at one time
    groups = {}
    for count, steps in ((2, 2), (3, 4)):
        processes = in_processes(count, tmp_path, f"train_in_a_group({steps})")
        if not groups:
            want = {pair: steps_in_float64(*pair) for pair in PAIRS}
            smd.train(run_of_a_group(2, "one"), reward_of_bytes)
            smd.train(run_of_a_group(4, "one"), reward_of_bytes)
        for process in processes:
            assert process.wait(timeout=120) == 0, process.stderr.read()
        groups[count] = [torch.load(f"{rank} of {count}.pt") for rank in range(count)]
    rows = [lengths.view(3, -1).amax(dim=1) for one in want.values() for _, _, lengths in one["sampled"]]
    assert any(len(set(longest.tolist())) > 1 for longest in rows), "all processes had responses of one length"
    for pair, one in want.items():
        for ranks in groups.values():
            for got in (found[pair] for found in ranks):
                sampled = zip(tree_leaves(got["sampled"]), tree_leaves(one["sampled"]), strict=True)
                assert all(torch.equal(a, b) for a, b in sampled)
                assert_close([row | unlike for row in got["rows"]], [row | unlike for row in one["rows"]], f"{pair}")
                assert_close(got["gradients"], one["gradients"], f"gradients of {pair}")
                same = zip(tree_leaves(got["weights"]), tree_leaves(ranks[0][pair]["weights"]), strict=True)
                assert all(torch.equal(a, b) for a, b in same), "the weights of two processes differ"
    together, alone = (
        [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()] for run in ("run", "one")
    )
    assert len(together) == 4
    assert_close([row | unlike for row in together], [row | unlike for row in alone], "the run")


def test_a_schedulers_environment_is_not_torchruns():
    """WORLD_SIZE=2, or RANK alone, or an empty WORLD_SIZE, ended in a traceback of torch.distributed."""
    whole = dict(WORLD_SIZE="3", RANK="2", LOCAL_WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="127.0.0.1")
    assert parallel.told_by_torchrun(whole) == [3, 2, 2, 1]
    for name in whole:
        lacking = {other: value for other, value in whole.items() if other != name}
        assert parallel.told_by_torchrun(lacking) == [1, 0, 1, 0], name
    for given in ({}, whole | dict(WORLD_SIZE=""), whole | dict(RANK="two"), dict(WORLD_SIZE="2"), dict(RANK="1")):
        assert parallel.told_by_torchrun(given) == [1, 0, 1, 0], given


def test_25_a_share_by_hand(monkeypatch):
    monkeypatch.setattr(parallel, "COUNT", 3)
    taken = []
    for rank in range(3):
        monkeypatch.setattr(parallel, "RANK", rank)
        taken.append(list(range(8))[parallel.share(8)])
        assert parallel.share_of(torch.zeros(8, 2)).tolist() == taken[-1]
    assert taken == [[0, 1], [2, 3, 4], [5, 6, 7]]


def test_25_what_one_process_finds_is_raised_in_all(monkeypatch):
    found = cli.UsageError("what the second found")
    monkeypatch.setattr(parallel, "of_each", lambda error: [error, found])
    with pytest.raises(cli.UsageError, match="what the second found"):
        parallel.agreed(lambda: 1)


def test_25_being_told_to_end_is_not_taken_for_a_file_that_cannot_be_written(tmp_path):
    """Would catch a signal that arrives while a file is written or read, and becomes an advice to delete it."""
    files.save(tmp_path / "some.pt", {})
    for act in (
        lambda: files.write(tmp_path / "file", parallel.told_to_end),
        lambda: files.restore(tmp_path / "some.pt", SimpleNamespace(parameters=parallel.told_to_end)),
    ):
        with pytest.raises(cli.Ended):
            act()


@pytest.mark.skipif(sys.platform != "linux", reason="it looks for the first process in /proc")
def test_25_where_one_is_killed_all_end_with_a_line_and_the_run_resumes(tmp_path, capsys):
    """The real thing once, under torchrun, and the first process at that, which alone writes."""
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
    assert smd.main(alone) == 0
    assert f"resumed at step {kept} of {kept + 1}" in capsys.readouterr().out


def test_25_what_processes_cannot_share_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(parallel, "COUNT", 4)
    monkeypatch.setattr(parallel, "LOCAL_COUNT", 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for given, message in (
        (["--prompts", "30"], "4 processes take equal shares of the prompts of an update, got --prompts 30"),
        (["--minibatches", "16"], "got --prompts 32, which gives it 2"),
        (["--accumulate", "9"], "at most the 8 prompts that a process has of an update, got 9"),
        (["--device", "cuda"], "4 processes need as many CUDA devices, and here are 2; give torchrun --nproc-per-node"),
        (["--prompt", "hello", "--model", "smollm2"], "--prompt is answered by a single process"),
    ):
        for rank, lines in ((0, 1), (1, 0)):  # of a machine's processes, which all find the same, the first says it
            monkeypatch.setattr(parallel, "LOCAL_RANK", rank)
            assert smd.main(["--device", "cpu", *given]) == 2 * lines
            said = capsys.readouterr().err.splitlines()
            assert len(said) == lines and all(message in line for line in said), said
