"""Processes that share the prompts of a step train as one process."""

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

import pytest
import torch
from torch.utils._pytree import tree_leaves

import smd
from harness import base, cli, parallel, report, tasks, train
from harness.agent import Agent
from harness.objectives import Policy
from harness.settings import Settings, checked
from tests.common import ROOT, SECONDS, SMALL_SMD, argv, compare, make_small, tiny
from tiny_model import TinyModel

# every objective, every kind of weight, and everything that is summed over processes
CASES = [
    dict(method="smd", objective="ppo", epochs=2, accumulate=2),
    dict(method="sparse_rl", epochs=2, accumulate=2),
    dict(method="sparse_rl", objective="ppo"),
    dict(method="naive", objective="dpo", epochs=2),
    dict(method="tis", objective="dr_grpo"),
    dict(method="seq_is", kl_ref=0.0),
]


def in_processes(count: int, folder: Path, call: str) -> list[subprocess.Popen]:
    """Processes of one group, as torchrun starts them; each calls a function of this file in a folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = dict(WORLD_SIZE=count, LOCAL_WORLD_SIZE=count, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    group |= dict(TORCHELASTIC_RUN_ID="test", OMP_NUM_THREADS=1, PYTHONPATH=ROOT)
    group = os.environ | {name: str(value) for name, value in group.items()}
    command = [sys.executable, "-c", f"from tests import test_processes; test_processes.{call}"]
    ranks = [group | dict(RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(count)]
    return [subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.PIPE, text=True) for env in ranks]


def agent_in_float64(s: Settings, plain: bool = False) -> Agent:
    """An untrained layer whose responses end early, so that those of one process may all be shorter than another's."""
    agent = Agent(s, plain)
    agent.config = dataclasses.replace(agent.config, layers=1)
    agent.model = TinyModel(agent.config).double()
    table = agent.model.embed_tokens.weight.detach()
    table.mul_(20.0)
    table[:, 0] = 3.0  # all tokens have this in common, and EOS has more of it
    table[agent.form.ends[0], 0] = 5.0
    return agent


def reward_of_bytes(prompt: str, response: str, answer: str) -> float:
    return sum(response.encode()) % 7 / 7


def accuracy_of_bytes(task, texts: list[str], examples: list) -> float:
    """An accuracy that is not 0; in an evaluation it depends on the order of the answers, too."""
    evaluation = len(texts) == len(examples)
    return sum((n if evaluation else 1) * reward_of_bytes("", text, "") for n, text in enumerate(texts)) / len(texts)


def steps_in_float64(**changes) -> dict:
    """Two steps: the rows of the log, the gradients of all updates, the rollouts, and the weights."""
    sizes = dict(asked=2, prompts=12, samples=3, budget=12, lr=1e-2, max_new=6, kl_ref=0.1)
    agent = agent_in_float64(checked(Settings(**sizes | changes, device="cpu")))
    policy = Policy(agent.model, agent.s.objective, agent.s.kl_ref)
    optimizer = policy.optimizer(agent.s.lr)
    found = dict(rows=[], gradients=[], sampled=[])
    clip, make_batch = torch.nn.utils.clip_grad_norm_, smd.make_batch

    def watched_clip(trained, limit):
        found["gradients"].append(torch.cat([p.grad.flatten() for p in trained]))
        return clip(trained, limit)

    def watched_batch(model, rollout, *others):
        found["sampled"].append((rollout.response_BR, rollout.evicted_at_LBGT.transpose(0, 1), rollout.length_B))
        return make_batch(model, rollout, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", watched_clip)
        patch.setattr(smd, "make_batch", watched_batch)
        for step in (1, 2):
            found["rows"].append(train.train_step(agent, policy, optimizer, reward_of_bytes, step))
    return found | dict(weights=policy.state_dict())


def train_in_a_group() -> None:
    """Continue the run in this folder, begin one that meets NaN, and write the results of CASES."""
    make_small(setattr)
    report.draw_curves = lambda *_: None
    train.Agent = agent_in_float64
    tasks.accuracy = accuracy_of_bytes
    parallel.begin("cpu")
    train.train(run_of_a_group("run", 4, resume=True), reward_of_bytes)
    rewards = itertools.count()

    def nan_in_the_last_process(*_) -> float:
        # in the second step: one call is a rehearsal, and each process scores 6 responses a step
        last = parallel.RANK == parallel.COUNT - 1
        return math.nan if last and next(rewards) > 7 else 0.5

    try:
        train.train(run_of_a_group("nan", 2), nan_in_the_last_process)
    except FloatingPointError as e:
        error = "; ".join([str(e), *e.__notes__])
        torch.save(([steps_in_float64(**case) for case in CASES], error), f"{parallel.RANK}.pt")


def run_of_a_group(out: str, steps: int, resume: bool = False) -> Settings:
    chain = dict(asked=2, prompts=6, samples=3, budget=12, warmup_steps=0, eval_prompts=65, eval_every=2)
    return Settings(**chain, steps=steps, out=out, resume=resume, device="cpu")


def assert_close(got, want, name: str) -> None:
    """Equal to rounding; AdamW amplifies it with each update where a gradient is almost 0."""
    numbers = []
    for found in (got, want):
        leaves = [torch.as_tensor(-1.0 if x is None else x, dtype=torch.float64) for x in tree_leaves(found)]
        numbers.append(torch.cat([x.flatten() for x in leaves]))
    compare(name, *(x / numbers[1].abs().clamp(min=1.0) for x in numbers), 1e-7)


def test_three_processes_are_one(tmp_path, monkeypatch):
    """Loss, gradients, figures, tokens and shadow masks; and three processes continue a run that one began.

    Would catch an advantage, weight or mean over a process's share, a process that follows its own gradient, and an
    error of one process for which the others wait forever.
    """
    monkeypatch.setattr(base, "CACHE", tmp_path / "base")  # this model has one layer, that of other tests two
    monkeypatch.setattr(train, "Agent", agent_in_float64)
    monkeypatch.setattr(tasks, "accuracy", accuracy_of_bytes)
    train.train(run_of_a_group("run", 2), reward_of_bytes)
    processes = in_processes(3, tmp_path, "train_in_a_group()")
    train.train(run_of_a_group("one", 4), reward_of_bytes)
    want = [steps_in_float64(**case) for case in CASES]
    for process in processes:
        assert process.wait(timeout=300) == 0, process.stderr.read()
    ranks, errors = zip(*(torch.load(f"{rank}.pt") for rank in range(3)), strict=True)
    assert len(set(errors)) == 1, errors
    assert errors[0].startswith("a reward is nan") and "; stopped after step 1; start again" in errors[0], errors
    lengths = [lengths.view(3, -1).amax(dim=1).tolist() for one in want for _, _, lengths in one["sampled"]]
    assert any(len(set(longest)) > 1 for longest in lengths), "all processes had responses of one length"
    # padding, and so the cache, depends on the longest response of a process
    unlike = dict.fromkeys((*SECONDS, "stored_kv_bytes", "full_kv_bytes", "full_kv_bytes_shared"), 0.0)
    for case, one, *parts in zip(CASES, want, *ranks, strict=True):
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
    """Responses and shadow masks of all processes, each padded to its longest response, equal those of one process."""
    of_parts = [sequence for part in parts for sequence in zip(*part, strict=True)]
    for got, (response_R, evicted_at, length) in zip(of_parts, zip(*whole, strict=True), strict=True):
        T = evicted_at.shape[-1] - len(response_R) + length
        assert torch.equal(got[0][:length], response_R[:length]) and got[2] == length
        assert torch.equal(got[1][..., :T], evicted_at[..., :T])


def test_the_share_of_a_process(monkeypatch):
    monkeypatch.setattr(parallel, "COUNT", 3)
    taken = []
    for rank in range(3):
        monkeypatch.setattr(parallel, "RANK", rank)
        taken.append(list(range(8))[parallel.share(8)])
    assert taken == [[0, 1], [2, 3, 4], [5, 6, 7]]


def test_an_error_of_one_process_is_raised_in_all(monkeypatch):
    with pytest.raises(FileNotFoundError):  # a single process keeps the type and the traceback
        parallel.raise_on_all_ranks(open, "missing")
    monkeypatch.setattr(parallel, "COUNT", 2)
    monkeypatch.setattr(parallel, "gather", lambda error: [error, cli.UsageError("of the second process")])
    for rank, on_rank0 in ((0, lambda: 1), (1, lambda: pytest.fail("the second process called it, too"))):
        monkeypatch.setattr(parallel, "RANK", rank)
        with pytest.raises(cli.UsageError, match="of the second process"):
            parallel.raise_on_all_ranks(lambda: 1)
        with pytest.raises(cli.UsageError, match="of the second process"):
            parallel.on_rank0(on_rank0)


@pytest.mark.skipif(sys.platform != "linux", reason="it looks for the first process in /proc")
def test_where_one_process_is_killed_all_end_and_the_run_resumes(tmp_path, capsys):
    """Under torchrun; the first process is killed, because only it writes."""
    settings = tiny(tmp_path, "run", steps=100_000, eval_every=0)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    words = [*torchrun, sys.executable, "-c", SMALL_SMD, *argv(settings)]
    environment = os.environ | dict(PYTHONPATH=str(ROOT), WORLD_SIZE="1")  # a scheduler may set some variables, too
    together = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    log, deadline = Path(settings.out) / "metrics.jsonl", time.time() + 60
    while time.time() < deadline and not (log.exists() and len(log.read_text().splitlines()) >= 3):
        time.sleep(0.01)
    children = Path(f"/proc/{together.pid}/task/{together.pid}/children").read_text().split()
    (first,) = [pid for pid in children if b"\0RANK=0\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(int(first), signal.SIGKILL)
    error = together.communicate(timeout=60)[1]
    assert together.returncode == 1, error
    kept = torch.load(log.parent / "checkpoint.pt", weights_only=True)["step"]
    assert kept >= 2 and kept % 2 == 0
    assert train.main(["--resume", "--out", settings.out, "--device", "cpu", "--steps", str(kept + 1)]) == 0
    assert f"resumed at step {kept} of {kept + 1}" in capsys.readouterr().out


def test_settings_that_processes_cannot_share(monkeypatch, capsys):
    monkeypatch.setattr(parallel, "COUNT", 4)
    monkeypatch.setattr(parallel, "LOCAL_COUNT", 4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for given, message in (
        (["--prompts", "30"], "--prompts must be a multiple of the 4 processes, got 30"),
        (["--accumulate", "9"], "--accumulate must be at most the 8 prompts per process, got 9"),
        (["--device", "cuda"], "--nproc-per-node must be at most the 2 CUDA devices"),
        (["--prompt", "hello", "--model", "smollm2"], "--prompt does not work under torchrun; start one process"),
    ):
        for rank, lines in ((0, 1), (1, 0)):  # all processes of a machine find the same error; the first prints it
            monkeypatch.setattr(parallel, "LOCAL_RANK", rank)
            assert train.main(["--device", "cpu", *given]) == 2 * lines
            printed = capsys.readouterr().err.splitlines()
            assert len(printed) == lines and all(message in line for line in printed), printed
