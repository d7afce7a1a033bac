"""Speed of learner and sampler, and the memory of the cache, measured in one go.

    python -m experiments.bench                     prints its tables, and all figures once more as one line of JSON
    python -m experiments.bench --model smollm2     the same for a pretrained model

Times are medians of runs that alternate, so that a machine that slows down slows all of them. The model has its initial
weights: neither time nor memory depends on what it has learned.
"""

if not __package__:  # then none of the project's modules is found
    raise SystemExit("run it from the project's folder: python -m experiments.bench")

import argparse
import copy
import dataclasses
import itertools
import json
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

import smd
from experiments import bench_model
from experiments.common import command
from harness.agent import Agent
from harness.device import clock, precision
from harness.memory import PeakBytes
from harness.streams import PROMPTS as PROMPT_STREAM
from harness.streams import torch_stream
from tiny_model import TinyModel

REPEATS = 7
SHARES = 1.0, 0.5, 0.25
PROMPT, NEW, PROMPTS, SAMPLES = 512, 256, 8, 8
# which library multiplies, before a run lets oneDNN do it
OF_TORCH = torch.backends.mkldnn.matmul.fp32_precision


def medians(contenders: dict[str, Callable], device: str, repeats: int) -> dict[str, float]:
    """Seconds that each takes, after one run that is not counted."""
    seconds = {name: [] for name in contenders}
    for n in range(repeats + 1):
        for name, contender in contenders.items():
            began = clock(device)
            contender()
            if n:
                seconds[name].append(clock(device) - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def repeated(rollout: smd.Rollout) -> smd.Rollout:
    """The same rollout with a prompt for each sample."""
    S = len(rollout.response_BR) // len(rollout.prompt_NP)
    prompts = dict(prompt_NP=rollout.prompt_NP.repeat_interleave(S, dim=0), pad_N=rollout.pad_N.repeat_interleave(S))
    return dataclasses.replace(rollout, **prompts)


def learner() -> dict[str, float]:
    """Seconds of a learner step on a rollout of the default shape, from the old log-probs to the optimizer.

    smd takes the old log-probs from the sampler; the dense learner computes them, as trainers do, in one more pass.
    Where its sampler's are trusted, the last row is its time.
    """
    contenders = {}
    for name, method, shares_prompt, has_old in (
        ("smd", "smd", True, False),
        ("smd, a prompt per sample", "smd", False, False),
        ("dense", "dense", True, False),
        ("dense, old log-probs given", "dense", True, True),
    ):
        s = smd.checked(smd.Settings(method=method))
        agent = smd.agent_for(s)
        examples, key_N = agent.draw(step=1)
        rollout, _ = agent.respond(examples, s.samples, smd.METHODS[method].evicts, key_N)
        reward_B = torch.rand(len(rollout.response_BR), device=s.device)
        policy = smd.Policy(agent.model, s)
        optimizer = policy.optimizer(lr=0.0)  # every repeat does the same
        given = prepared(policy, rollout, reward_B, s) if has_old else None

        def step(args=(policy, rollout, reward_B, s), optimizer=optimizer, given=given, shared=shares_prompt) -> None:
            policy, rollout, _, s = args
            batch = given or prepared(*args)
            batch = batch if shared else dataclasses.replace(batch, rollout=repeated(rollout))
            smd.update(policy, optimizer, batch, s, step=1)

        contenders[name] = step
    return medians(contenders, s.device, REPEATS)


def prepared(policy: smd.Policy, rollout: smd.Rollout, reward_B: torch.Tensor, s: smd.Settings) -> smd.Batch:
    """A batch as a training step makes it, in the type that the model computes in."""
    with precision(s):
        return smd.prepare(policy, rollout, reward_B, s)


def long_learner(agent: Agent) -> dict[str, float]:
    """Seconds and peak bytes of a step of smd on PROMPTS prompts of PROMPT tokens, with responses of 64.

    The peak is that of all tensors that the step makes, on top of weights and moments.
    """
    s = dataclasses.replace(agent.s, prompts=PROMPTS, max_new=64)
    rollout = draw(agent, PROMPTS, PROMPT, SAMPLES, s.max_new, 0.25)
    policy = smd.Policy(agent.model, s)
    optimizer = policy.optimizer(lr=0.0)
    batch = prepared(policy, rollout, torch.rand(len(rollout.response_BR), device=s.device), s)
    smd.update(policy, optimizer, batch, s, step=1)  # which makes the moments
    peak = PeakBytes()
    with peak:
        smd.update(policy, optimizer, batch, s, step=1)
    seconds = medians(dict(smd=lambda: smd.update(policy, optimizer, batch, s, step=1)), s.device, 3)
    return dict(seconds=seconds["smd"], peak_bytes=peak.peak)


def transformers_model(agent: Agent):
    """A model of the transformers package of the same shape, or None where that is not installed."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        print("the transformers package is not installed: it is left out")
        return None
    c = agent.config
    shape = dict(num_hidden_layers=c.layers, num_attention_heads=c.heads, num_key_value_heads=c.kv_heads)
    shape |= dict(vocab_size=c.vocab, hidden_size=c.width, intermediate_size=c.ffn, tie_word_embeddings=c.tied)
    return LlamaForCausalLM(LlamaConfig(**shape, pad_token_id=0)).to(agent.s.device).eval()


def prefill(agent: Agent, theirs) -> dict[str, float]:
    """Seconds until the first token of 4 prompts of PROMPT tokens is drawn."""
    tokens_NP, _ = random_prompts(agent, 4, PROMPT)
    contenders = {f"kept {share:.0%}": lambda share=share: draw(agent, 4, PROMPT, 1, 1, share) for share in (1.0, 0.25)}
    if theirs is not None:
        options = dict(attention_mask=torch.ones_like(tokens_NP), do_sample=True, top_k=0)
        contenders["transformers"] = lambda: theirs.generate(tokens_NP, max_new_tokens=1, **options)
    return medians(contenders, agent.s.device, REPEATS)


def random_prompts(agent: Agent, N: int, P: int) -> tuple[Tensor, Tensor]:
    generator = torch_stream(agent.s.device, 0, PROMPT_STREAM)
    tokens_NP = torch.randint(256, (N, P), generator=generator, device=agent.s.device)
    return tokens_NP, torch.zeros(N, dtype=torch.long, device=agent.s.device)


def draw(agent: Agent, N: int, P: int, S: int, R: int, share: float, policy: str = "snapkv", **changes) -> smd.Rollout:
    """N prompts of P random tokens, S samples of exactly R tokens; with a share of 1 from the full cache."""
    changes |= dict(budget=f"{share:.0%}", policy=policy)
    eviction = None if share == 1 else dataclasses.replace(agent.eviction, **changes)
    # no token is -1, so that no response ends early
    with precision(agent.s):
        return smd.sample(agent.model, *random_prompts(agent, N, P), S, R, -1, eviction)


def sampler(agent: Agent, theirs) -> dict[str, float]:
    """Tokens per second at each kept share; and of `generate` of the transformers package, where it is installed.

    Sampler against sampler: ours reads keys in float64 and keeps a prompt once for all its samples; theirs reads them
    in float32, keeps them all, and prefills a prompt per sample.
    """
    contenders = {
        f"kept {share:.0%}": lambda share=share: draw(agent, PROMPTS, PROMPT, SAMPLES, NEW, share) for share in SHARES
    }
    if theirs is not None:
        tokens_NP, _ = random_prompts(agent, PROMPTS, PROMPT)
        options = dict(do_sample=True, top_k=0, num_return_sequences=SAMPLES, attention_mask=torch.ones_like(tokens_NP))
        options |= dict(min_new_tokens=NEW, max_new_tokens=NEW)
        matmul = torch.backends.mkldnn.matmul
        of_run = matmul.fp32_precision

        def generate() -> None:
            # one token at a time, theirs is faster with the library that torch takes by itself
            matmul.fp32_precision = OF_TORCH
            theirs.generate(tokens_NP, **options)
            matmul.fp32_precision = of_run

        contenders["transformers"] = generate
    seconds = medians(contenders, agent.s.device, 3)
    return {name: PROMPTS * SAMPLES * NEW / value for name, value in seconds.items()}


def policies(agent: Agent) -> dict[str, dict]:
    """Of each policy, 25 % kept: tokens per second over a full cache's, and peak bytes over those of a full cache."""
    names = list(smd.EVICTIONS)
    contenders = {name: lambda name=name: draw(agent, PROMPTS, PROMPT, SAMPLES, NEW, 0.25, name) for name in names}
    contenders["full"] = lambda: draw(agent, PROMPTS, PROMPT, SAMPLES, NEW, 1.0)
    seconds = medians(contenders, agent.s.device, 3)
    rows = {}
    for name in names:
        long = draw(agent, 1, 2048, 1, 32, 0.25, name)
        rows[name] = dict(speed=seconds["full"] / seconds[name], of_full=long.kv_bytes / long.full_kv_bytes)
    return rows


def with_layers(agent: Agent, layers: int) -> Agent:
    """The same agent with a model of so many layers."""
    other = copy.copy(agent)
    other.config = dataclasses.replace(agent.config, layers=layers)
    other.model = TinyModel(other.config).to(agent.s.device)
    return other


def memory(agent: Agent) -> list[dict]:
    """Measured peak bytes of the compressed cache, over the keys and values of a full one."""

    def row(name: str, rollout: smd.Rollout) -> dict:
        r = rollout
        full = dict(of_full=r.kv_bytes / r.full_kv_bytes, of_shared=r.kv_bytes / r.full_kv_bytes_shared)
        return dict(case=name, kv_bytes=r.kv_bytes) | full

    rows = []
    for P, R, S in itertools.product((128, 512, 2048), (32, 256, 1024), (1, 8)):
        rows.append(row(f"{P:,} + {R:,} tokens, {S} x", draw(agent, 1, P, S, R, 0.25)))
    for P, S in ((512, 8), (2048, 8)):
        rows.append(row(f"{P:,} + 32 tokens, {S} x, 12 layers", draw(with_layers(agent, 12), 1, P, S, 32, 0.25)))
    for P, R in ((128, 256), (128, 1024)):
        kept_whole = draw(agent, 1, P, 8, R, 0.25, protect="prompt")
        rows.append(row(f"{P:,} + {R:,} tokens, 8 x, all of it and 25 % beside it", kept_whole))
    examples, key_N = agent.draw(step=1)
    rows.append(row("the default job, 22 of 34 keys kept", agent.respond(examples, agent.s.samples, True, key_N)[0]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="measure a pretrained model instead: whole steps, decoding and prefill")
    parser.add_argument("--only", choices=bench_model.CONTENDERS, help="with --model: one contender, in this process")
    given = parser.parse_args()
    if given.only:
        print(json.dumps(bench_model.contend(given.model, given.only)))
        return
    if given.model:
        bench_model.report(given.model)
        return
    agent = smd.agent_for(smd.checked(smd.Settings()))
    theirs = transformers_model(agent)
    seconds = learner()
    print("learner step, 32 prompts x 8 samples, 34 + 7 tokens                seconds")
    for name, value in seconds.items():
        print(f"  {name:64}{value:.3f}")
    for name, other in zip(("repeated prompts", "dense", "dense, old log-probs given"), list(seconds)[1:], strict=True):
        print(f"  smd over {name:55}{seconds['smd'] / seconds[other]:.2f}")
    long = long_learner(agent)
    print(f"learner step of smd, {PROMPTS} prompts x {SAMPLES} samples, {PROMPT} + 64 tokens:", end=" ")
    print(f"{long['seconds']:.2f} seconds, {long['peak_bytes'] / 1e6:,.0f} MB")
    until_first = prefill(agent, theirs)
    print(f"prefill, 4 prompts of {PROMPT} tokens                                  seconds")
    for name, value in until_first.items():
        print(f"  {name:64}{value:.3f}")
    rates = sampler(agent, theirs)
    print(
        f"sampler, {PROMPTS} prompts x {SAMPLES} samples, {PROMPT} + {NEW} tokens   tokens per second   over kept 100%"
    )
    for name, value in rates.items():
        print(f"  {name:42}{value:12.0f}{value / rates['kept 100%']:18.2f}")
    by_policy = policies(agent)
    print("policy, 25 % kept     tokens per second over kept 100%     peak over a full cache, 2,048 + 32 tokens")
    for name, row in by_policy.items():
        print(f"  {name:12}{row['speed']:36.2f}{row['of_full']:44.2f}")
    rows = memory(agent)
    print("peak of the cache, 25 % of the prompt kept where no more is said, over that of a full cache with")
    print("                                            a prompt per sample  a shared prompt")
    for row in rows:
        print("  {case:42}{of_full:19.2f}{of_shared:17.2f}".format(**row))
    found = dict(device=agent.s.device, threads=torch.get_num_threads(), learner_seconds=seconds, long_learner=long)
    found |= dict(prefill_seconds=until_first, tokens_per_second=rates, policies=by_policy, memory=rows)
    print(json.dumps(found))


if __name__ == "__main__":
    command(main)
