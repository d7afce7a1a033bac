"""A run: warm up, evaluate, train, evaluate; with its files, its log, and several processes where torchrun starts them.

    train(Settings(steps=50))                                     the chain task
    train(Settings(data="file.jsonl"), reward=my_reward)          a reward of your own

`train` returns what summary.json holds.
"""

import math
from collections.abc import Callable
from dataclasses import replace
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
    limits = s.samples, s.max_new, agent.form.ends
    return smd.Config(s.method, policy.objective, agent.eviction, *limits, s.lam)


@torch.no_grad()
def diagnose(model, rollout: smd.Rollout, runtime: smd.Runtime) -> dict[str, float]:
    """How far π_dense is from π_sparse on the sampled prefixes, by one more forward pass."""
    seen = rollout.evicted_at_LBGT, rollout.never_evicted_LBGT

    def compare(token_x: Tensor, shadow_xC: Tensor, dense_xC: Tensor) -> tuple[Tensor, ...]:
        shadow_xV, dense_xV = model.log_probs(shadow_xC), model.log_probs(dense_xC)
        overlap_x = shadow_xV.minimum(dense_xV).exp().sum(dim=-1)
        drawn = smd.gather_logp(shadow_xV, token_x), smd.gather_logp(dense_xV, token_x)
        return *drawn, smd.kl_divergence(shadow_xV, dense_xV), overlap_x

    hidden = runtime.replay(model, rollout, *seen, backend=runtime.backend)
    rows = rollout.response_BR[rollout.mask_BR], *hidden
    shadow_X, dense_X, kl_X, overlap_X = smd.chunked(compare, model.config.vocab, *rows)
    drawn_X = rollout.logp_BR[rollout.mask_BR]
    log_ratio_X = dense_X.double() - drawn_X
    log_ratio_B = smd.unpack(log_ratio_X, rollout.mask_BR).sum(dim=1)
    found = [shadow_X - drawn_X, log_ratio_X, log_ratio_B, kl_X, overlap_X]
    parts = parallel.gather([x.cpu() for x in found])
    error_X, log_ratio_X, log_ratio_B, kl_X, overlap_X = (torch.cat(part) for part in zip(*parts, strict=True))
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


def split(batch: smd.Batch, parts: int) -> list[smd.Batch]:
    """Parts of a batch: prompt n and its samples go to part n % parts."""
    N = len(batch.rollout.pad_N)

    def part(first: int) -> smd.Batch:
        def of(x_B: Tensor) -> Tensor:
            return x_B.unflatten(0, (N, -1))[first::parts].flatten(0, 1)

        r = batch.rollout
        prompts = dict(prompt_NP=r.prompt_NP[first::parts], pad_N=r.pad_N[first::parts])
        samples = dict(response_BR=of(r.response_BR), logp_BR=of(r.logp_BR), length_B=of(r.length_B))
        mask_LBGT = of(r.evicted_at_LBGT.transpose(0, 1)).transpose(0, 1)
        rollout = replace(r, **prompts, **samples, evicted_at_LBGT=mask_LBGT)
        rest = of(batch.reward_B), of(batch.old_logp_BR), of(batch.weight_BR)
        return smd.Batch(rollout, *rest, {name: of(x_B) for name, x_B in batch.extra.items()})

    return [part(first) for first in range(parts)] if parts > 1 else [batch]


def gradient(model, batch: smd.Batch, s: Settings, config: smd.Config, runtime: smd.Runtime) -> dict[str, Tensor]:
    """Accumulate this process's gradient in s.accumulate parts. Returns figures for the log, over all processes."""
    totals = batch.totals(runtime)
    rows = []
    for part in split(batch, s.accumulate):
        with device.precision(s):
            loss, row = smd.learner_loss(model, part, totals, config, runtime)
        loss.backward()
        rows.append(row)
    largest = [row.pop("replay_error") for row in rows if "replay_error" in row]
    row = {name: sum(part[name] for part in rows) for name in rows[0]}
    runtime.all_sum(list(row.values()))
    return row | ({"replay_error": max(largest)} if largest else {})


def update(
    policy: Policy, optimizer: torch.optim.Optimizer, batch: smd.Batch, s: Settings, config: smd.Config,
    runtime: smd.Runtime,
) -> dict[str, float]:  # fmt: skip
    """s.epochs gradient steps; FloatingPointError where a loss or a gradient is not finite."""
    rows = []
    for _ in range(s.epochs):
        row = gradient(policy.model, batch, s, config, runtime)
        trained = [p for p in policy.parameters() if p.grad is not None]
        runtime.all_sum([p.grad for p in trained])
        row["grad_norm"] = torch.nn.utils.clip_grad_norm_(trained, smd.MAX_GRAD_NORM)
        row = {name: x.item() for name, x in row.items()}
        if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
            raise FloatingPointError(f"the loss is {row['loss']}, the norm of its gradient {row['grad_norm']}")
        optimizer.step()
        optimizer.zero_grad()  # free the gradients before the next rollout, when memory peaks
        torch.clear_autocast_cache()  # it holds bfloat16 copies of the old weights
        rows.append(row)
    # loss, entropy and replay error are those of the first update; the other two are means
    return rows[0] | {name: sum(row[name] for row in rows) / len(rows) for name in ("clip_fraction", "grad_norm")}


def train_step(agent: Agent, policy: Policy, optimizer: torch.optim.Optimizer, reward: Callable, step: int) -> dict:
    """Sample, score, diagnose, learn: one row of metrics.jsonl. `smd.train_step` is the plain version."""
    s, config, runtime = agent.s, config_for(agent, policy), agent.runtime
    watch = device.Stopwatch(s.device)
    examples, key_N = agent.draw(step)
    prompt_NP, pad_N = agent.tokenize(examples)  # those of all processes, so that all pad alike
    mine = parallel.share(len(examples))
    eviction = config.eviction if smd.METHODS[s.method].evicts else None
    limits = config.samples, config.max_new, config.eos, eviction, streams.keyed(key_N[mine], s.samples)
    optimizer.param_groups[0]["lr"] = s.lr * min(1.0, step / LR_WARMUP)
    with device.precision(s):
        rollout = parallel.raise_on_all_ranks(runtime.sample, policy.model, prompt_NP[mine], pad_N[mine], *limits)
        texts = agent.texts(rollout)
        rewards = parallel.raise_on_all_ranks(tasks.score, reward, examples[mine], texts)
        watch.lap("sample")
        diagnosis = diagnose(policy.model, rollout, runtime) if (step - 1) % DIAGNOSE_EVERY == 0 else {}
        watch.lap("diag")
        reward_B = torch.tensor(rewards, dtype=rollout.logp_BR.dtype, device=s.device)
        batch = smd.prepare(policy.model, rollout, reward_B, config, runtime)
    learned = update(policy, optimizer, batch, s, config, runtime)
    agent.check_finite()
    watch.lap("learn")
    found = sum(rewards) / len(rewards), tasks.accuracy(agent.task, texts, examples[mine]), learned.get("replay_error")
    rewards, accuracies, errors = zip(*parallel.gather(found), strict=True)
    mean = dict(reward=sum(rewards) / len(rewards), accuracy=sum(accuracies) / len(accuracies))
    error = dict(replay_error=None if errors[0] is None else max(errors))
    cache = report.cache_figures(rollout, agent.entry_bytes)
    return dict(step=step) | mean | learned | error | diagnosis | cache | watch.seconds


def train(settings: Settings, reward: Callable[[str, str, str], float] | None = None, plain: bool = False) -> dict:
    """Warm up, evaluate, train, evaluate. Leaves its files in settings.out; returns what summary.json holds.

    reward(prompt, response, answer) -> float may be a verifier, a reward model, an AI judge; None: the task's own. It
    is called once before anything else. plain: use the plain cache and replay of smd.py, for comparison. UsageError for
    what cannot be used, FloatingPointError where something is not finite.
    """
    s = checked(settings)
    parallel.begin(s.device)
    run = runs.Run(s)
    agent = parallel.raise_on_all_ranks(Agent, s, plain)
    reward = reward or agent.task.reward
    parallel.raise_on_all_ranks(tasks.check_reward, reward, agent.task.held_out(1)[0])
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
        parallel.on_rank0(agent.leave, run.out)
        return parallel.on_rank0(run.finish, after, agent.task.held_out(1)[0].prompt)


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

    return cli.run_command(run, "smd.py", speaks=parallel.LOCAL_RANK == 0)
