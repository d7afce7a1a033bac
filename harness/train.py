"""A run: warm up, evaluate, train, evaluate. It writes files and a log, and uses the processes that torchrun starts.

    train(Settings(steps=50))                                     the chain task
    train(Settings(data="file.jsonl"), reward=my_reward)          a reward of your own

`train` returns the content of summary.json.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import smd
from harness import base, cli, device, files, parallel, report, runs, streams, tasks
from harness.agent import Agent
from harness.objectives import Policy
from harness.settings import Settings, checked, parse

LR_WARMUP = 20  # steps over which the learning rate rises: at first AdamW's moments are empty
DIAGNOSE_EVERY = 10  # steps: a diagnosis costs one more forward pass of the learner


def config_for(agent: Agent, policy: Policy) -> smd.Config:
    s = agent.s
    return smd.Config(s.method, policy.objective, agent.eviction, s.samples, s.max_new, agent.form.ends, s.lam)


@torch.no_grad()
def diagnose(model, rollout: smd.Rollout, runtime: smd.Runtime) -> dict[str, float]:
    """How far π_dense is from π_sparse on the sampled prefixes, by one more forward pass."""

    def compare(token_x: Tensor, shadow_xC: Tensor, dense_xC: Tensor) -> tuple[Tensor, ...]:
        shadow_xV, dense_xV = model.log_probs(shadow_xC), model.log_probs(dense_xC)
        shadow_x, dense_x = (smd.gather_logp(logp_xV, token_x) for logp_xV in (shadow_xV, dense_xV))
        overlap_x = shadow_xV.minimum(dense_xV).exp().sum(dim=-1)
        return shadow_x, dense_x, smd.kl_divergence(shadow_xV, dense_xV), overlap_x

    masks = rollout.evicted_at_LBGT, rollout.never_evicted_LBGT
    hidden = runtime.replay(model, rollout, *masks, backend=runtime.backend)
    tokens_X = rollout.response_BR[rollout.mask_BR]
    shadow_X, dense_X, kl_X, overlap_X = smd.chunked(compare, model.config.vocab, tokens_X, *hidden)
    sampled_X = rollout.logp_BR[rollout.mask_BR]
    log_ratio_X = dense_X.double() - sampled_X
    log_ratio_B = smd.unpack(log_ratio_X, rollout.mask_BR).sum(dim=1)
    found = shadow_X - sampled_X, log_ratio_X, log_ratio_B, kl_X, overlap_X
    of_ranks = zip(*parallel.gather([x.cpu() for x in found]), strict=True)
    error_X, log_ratio_X, log_ratio_B, kl_X, overlap_X = map(torch.cat, of_ranks)
    row = dict(replay_error=error_X.abs().max().item(), dense_error=log_ratio_X.abs().max().item())
    row |= dict(kl_sparse_dense=kl_X.mean().item(), overlap_p05=overlap_X.quantile(0.05).item())
    for name, log_weight_n in (("token", log_ratio_X), ("sequence", log_ratio_B)):
        row[f"ess_{name}"] = effective_sample_size(log_weight_n)
        row[f"max_weight_{name}"] = log_weight_n.max().clamp(max=700).exp().item()  # e^710 exceeds float64
    return row


def effective_sample_size(log_weight_n: Tensor) -> float:
    """(Σw)² / Σw² as a share of n."""
    weight_n = (log_weight_n - log_weight_n.max()).exp()
    return (weight_n.sum().square() / weight_n.square().sum() / len(weight_n)).item()


def split(batch: smd.Batch, parts: int) -> Iterator[smd.Batch]:
    """Parts of a batch: prompt n and its samples go to part n % parts."""
    r = batch.rollout
    row_NS = torch.arange(len(r.response_BR), device=r.pad_N.device).view(len(r.pad_N), -1)
    for first in range(parts):
        n, b = slice(first, None, parts), row_NS[first::parts].flatten()
        samples = r.response_BR[b], r.logp_BR[b], r.length_B[b], r.evicted_at_LBGT[:, b]
        rollout = smd.Rollout(r.prompt_NP[n], r.pad_N[n], *samples, r.stored_bytes)
        extra = {name: x_B[b] for name, x_B in batch.extra.items()}
        yield smd.Batch(rollout, batch.reward_B[b], batch.old_logp_BR[b], batch.weight_BR[b], extra)


def update(
    policy: Policy, optimizer: torch.optim.Optimizer, batch: smd.Batch, s: Settings, config: smd.Config,
    runtime: smd.Runtime,
) -> dict[str, float]:  # fmt: skip
    """s.epochs gradient steps on a batch, each accumulated over s.accumulate parts; figures of all processes.

    FloatingPointError where a loss or a gradient is not finite.
    """
    totals = batch.totals(runtime)
    rows = []
    for _ in range(s.epochs):
        figures = []
        for part in split(batch, s.accumulate):
            with device.precision(s):
                loss, row = smd.learner_loss(policy.model, part, totals, config, runtime)
            loss.backward()
            figures.append(row)
        errors = [row.pop("replay_error") for row in figures if "replay_error" in row]
        row = {name: sum(part[name] for part in figures) for name in figures[0]}
        trained = [p for p in policy.parameters() if p.grad is not None]
        runtime.all_sum([*row.values(), *(p.grad for p in trained)])
        if errors:
            row["replay_error"] = max(errors)  # of this process
        row["grad_norm"] = torch.nn.utils.clip_grad_norm_(trained, smd.MAX_GRAD_NORM)
        row = {name: x.item() for name, x in row.items()}
        if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
            raise FloatingPointError(f"the loss is {row['loss']}, the norm of its gradient {row['grad_norm']}")
        optimizer.step()
        optimizer.zero_grad()  # free the gradients before the next rollout, when memory peaks
        rows.append(row)
    # loss, entropy and replay error of the first update, means of the other two
    return rows[0] | {name: sum(row[name] for row in rows) / len(rows) for name in ("clip_fraction", "grad_norm")}


def train_step(agent: Agent, policy: Policy, optimizer: torch.optim.Optimizer, reward: Callable, step: int) -> dict:
    """Sample, score, diagnose, learn: one row of metrics.jsonl. `smd.train_step` is the plain version."""
    s, config, runtime = agent.s, config_for(agent, policy), agent.runtime
    watch = device.Stopwatch(s.device)
    examples, key_N = agent.draw(step)
    prompt_NP, pad_N = agent.tokenize(examples)  # of all processes, so that all pad alike
    mine = parallel.share(len(examples))
    examples = examples[mine]
    eviction = config.eviction if smd.METHODS[s.method].evicts else None
    limits = config.samples, config.max_new, config.eos, eviction, streams.keyed(key_N[mine], s.samples)
    optimizer.param_groups[0]["lr"] = s.lr * min(1.0, step / LR_WARMUP)
    with device.precision(s):
        rollout = parallel.raise_on_all_ranks(runtime.sample, policy.model, prompt_NP[mine], pad_N[mine], *limits)
        texts = agent.texts(rollout)
        rewards = parallel.raise_on_all_ranks(tasks.score, reward, examples, texts)
        watch.lap("sample")
        diagnosis = diagnose(policy.model, rollout, runtime) if (step - 1) % DIAGNOSE_EVERY == 0 else {}
        watch.lap("diag")
        reward_B = torch.tensor(rewards, dtype=rollout.logp_BR.dtype, device=s.device)
        batch = smd.make_batch(policy.model, rollout, reward_B, config, runtime)
    learned = update(policy, optimizer, batch, s, config, runtime)
    agent.check_finite()
    watch.lap("learn")
    mean_reward = sum(rewards) / len(rewards)
    of_rank = mean_reward, tasks.accuracy(agent.task, texts, examples), learned.get("replay_error")
    rewards, accuracies, errors = zip(*parallel.gather(of_rank), strict=True)
    row = dict(step=step, reward=sum(rewards) / len(rewards), accuracy=sum(accuracies) / len(accuracies)) | learned
    row["replay_error"] = None if errors[0] is None else max(errors)
    return row | diagnosis | report.cache_figures(rollout, agent.entry_bytes) | watch.seconds


def train(settings: Settings, reward: Callable[[str, str, str], float] | None = None, plain: bool = False) -> dict:
    """Warm up, evaluate, train, evaluate. Writes its files into settings.out; returns the content of summary.json.

    reward(prompt, response, answer) -> float: a verifier, a reward model or an AI judge; None: the task's own reward.
    It is called once before training, to find errors early. plain: use the plain cache and replay of smd.py, to compare
    them. UsageError for settings that cannot be used, FloatingPointError where a number is not finite.
    """
    s = checked(settings)
    parallel.begin(s.device)
    run = runs.Run(s)
    agent = parallel.raise_on_all_ranks(Agent, s, plain)
    reward, example = reward or agent.task.reward, agent.task.held_out(1)[0]
    parallel.raise_on_all_ranks(tasks.check_reward, reward, example)
    policy = Policy(agent.model, s.objective, s.kl_ref)
    optimizer = policy.optimizer(s.lr)
    with run:
        if not run.resume(policy, optimizer):
            base.load_base(agent)
            if policy.reference is not None:
                policy.reference.load_state_dict(agent.model.state_dict())
            run.start(agent.evaluate(), policy, optimizer)
        with report.Progress(desc="training", total=s.steps, initial=len(run.rows)) as progress:
            for step in range(len(run.rows) + 1, s.steps + 1):
                row = train_step(agent, policy, optimizer, reward, step)
                if s.eval_every and step % s.eval_every == 0:
                    row |= {f"held_out_{cache}": share for cache, share in agent.evaluate().items()}
                run.log(row, policy, optimizer)
                progress.step(reward=row["reward"], accuracy=row["accuracy"])
        after = run.evaluated() or agent.evaluate()
        if s.model is not None:
            parallel.on_rank0(agent.model.leave, agent.form, run.out / runs.MODEL)
        return parallel.on_rank0(run.finish, after, example.prompt)


def main(argv: list[str] | None = None) -> int:
    def run() -> None:
        settings = parse(argv)
        if settings.prompt is None:
            train(settings)
            return
        agent = Agent(checked(settings))
        if settings.resume:
            runs.check_same(agent.s, runs.fingerprint(agent.s))
            policy = Policy(agent.model, agent.s.objective, agent.s.kl_ref)
            files.restore(Path(settings.out) / "checkpoint.pt", policy)
        print(agent.answer(settings.prompt))

    return cli.run_command(run, "smd.py", prints_errors=parallel.LOCAL_RANK == 0)
