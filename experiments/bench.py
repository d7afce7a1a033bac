"""Speed of sampler and learner: the plain versions of smd.py, the shared ones that runs use, and transformers.

    python -m experiments.bench
    python -m experiments.bench --model smollm2     beside `generate` of the transformers package

Contenders take turns, so that a machine that slows down slows all of them; ± is half a 95 % interval. `stored MB` is
the most that the KV cache stores. `generate` keeps and computes a prompt once for each of its samples.

Letters: N prompts of P tokens, S samples of each, R tokens of each response.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Callable
from fractions import Fraction
from functools import partial

import torch
from tqdm import tqdm

import smd
from experiments.common import agent_of, command, markdown
from harness import device, shared, train
from harness.agent import Agent
from harness.objectives import Policy

REPEATS = 3
LONG, LONG_OF_MODEL = (8, 512, 8, 64), (4, 417, 4, 64)  # N, P, S, R
RUNTIMES = dict(shared=shared.RUNTIME, plain=smd.Runtime())


def compare(title: str, contenders: dict[str, Callable[[], dict]], sizes: tuple) -> None:
    """Print what each contender measures, turn by turn; a first turn is not counted."""
    rows = []
    for turn, (name, measure) in tqdm(list(itertools.product(range(REPEATS + 1), contenders.items())), desc=title):
        row = dict(contender=name) | measure()
        rows += [row] if turn else []
    print("{}, {} prompts of {} tokens, {} samples of {} tokens of each".format(title, *sizes))
    print(markdown(rows, ["contender"]))


def prompts(agent: Agent, N: int, P: int) -> torch.Tensor:
    return torch.randint(256, (N, P), generator=torch.Generator().manual_seed(0)).to(agent.s.device)


def sample(agent: Agent, runtime: smd.Runtime, eviction: smd.Eviction | None, N: int, P: int, S: int, R: int):
    prompt_NP = prompts(agent, N, P)
    with device.precision(agent.s):
        # no token is -1, so no response ends early
        return runtime.sample(agent.model, prompt_NP, torch.zeros_like(prompt_NP[:, 0]), S, R, -1, eviction)


def generate(agent: Agent, N: int, P: int, S: int, R: int) -> None:
    prompt_NP, whole = prompts(agent, N, P), agent.model.whole
    options = dict(attention_mask=torch.ones_like(prompt_NP), do_sample=True, top_k=0, num_return_sequences=S)
    whole.set_attn_implementation("sdpa")
    with device.precision(agent.s):
        whole.generate(prompt_NP, min_new_tokens=R, max_new_tokens=R, **options)
    whole.set_attn_implementation("shadow")


def decoding(agent: Agent, draw: Callable, N: int, P: int, S: int, R: int) -> dict[str, float]:
    """Seconds until the first token, and tokens per second after it."""
    watch = device.Stopwatch(agent.s.device)
    draw(N, P, S, 1)
    watch.lap("first")
    rollout = draw(N, P, S, R)
    watch.lap("all")
    first, whole = watch.seconds.values()
    row = {"seconds to first token": first, "tokens a second": N * S * (R - 1) / (whole - first)}
    return row if rollout is None else row | {"stored MB": rollout.stored_bytes / 1e6}


def samplers(agent: Agent) -> dict[str, Callable]:
    kept = dataclasses.replace(agent.eviction, budget=Fraction(1, 4))
    cases = {f"shared, 25% kept by {p}": (shared.RUNTIME, dataclasses.replace(kept, policy=p)) for p in smd.POLICIES}
    cases["shared, 50% kept"] = shared.RUNTIME, dataclasses.replace(kept, budget=Fraction(1, 2))
    cases[f"plain, 25% kept by {kept.policy}"] = RUNTIMES["plain"], kept
    cases |= {f"{name}, full cache": (runtime, None) for name, runtime in RUNTIMES.items()}
    found = {name: partial(sample, agent, *case) for name, case in cases.items()}
    return found | ({"generate, full cache": partial(generate, agent)} if agent.s.model else {})


def step(agent: Agent, policy: Policy, optimizer, runtime: smd.Runtime, method: str, *sizes: int) -> dict[str, float]:
    """Seconds of a training step on random prompts and rewards, and of its parts."""
    config = dataclasses.replace(train.config_for(agent, policy), method=method, max_new=sizes[-1])
    watch = device.Stopwatch(agent.s.device)
    rollout = sample(agent, runtime, config.eviction if smd.METHODS[method].evicts else None, *sizes)
    watch.lap("sampling")
    reward_B = torch.rand(len(rollout.response_BR), device=agent.s.device)
    with device.precision(agent.s):
        batch = smd.make_batch(policy.model, rollout, reward_B, config, runtime)
    watch.lap("old_log_probs")
    train.update(policy, optimizer, batch, agent.s, config, runtime)
    watch.lap("update")
    return {"seconds": sum(watch.seconds.values())} | watch.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a pretrained model, as for a run")
    agent = agent_of(model=parser.parse_args().model)
    print(f"device {agent.s.device}, {agent.s.dtype}, {torch.get_num_threads()} threads")
    long = LONG_OF_MODEL if agent.s.model else LONG
    compare("sampling", {name: partial(decoding, agent, draw, *long) for name, draw in samplers(agent).items()}, long)
    policy = Policy(agent.model, "grpo")
    given = agent, policy, policy.optimizer(lr=0.0)  # every step does the same
    P = agent.tokenize(agent.draw(step=1)[0])[0].shape[1]
    # the plain learner computes a prompt for each of its samples, which a pretrained model has no memory for
    runtimes = dict(shared=shared.RUNTIME) if agent.s.model else RUNTIMES
    for title, sizes in (("steps", (agent.s.prompts, P, agent.s.samples, agent.s.max_new)), ("long steps", long)):
        cases = itertools.product(runtimes.items(), ("smd", "naive", "dense"))
        contenders = {f"{name}, {m}": partial(step, *given, runtime, m, *sizes) for (name, runtime), m in cases}
        compare(title, contenders, sizes)


if __name__ == "__main__":
    command(main)
