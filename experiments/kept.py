"""Why snapkv does not learn the chain: are the needed keys there, and does training change which are kept?

    python -m experiments.kept hold             under each policy, are the keys that the hops need held by any head?
    python -m experiments.kept freeze           train while snapkv's choice after the prompt stays the base policy's
    python -m experiments.kept freeze --live    the same run with the live choice, to compare with

`freeze` compresses once, after the prompt (interval 8), so that nothing else is chosen while decoding.
"""

import argparse
import copy
import dataclasses

import torch

import smd
from experiments.runs import command, positive


def needed(examples: list[smd.Example]) -> torch.Tensor:
    """Columns of the letters that hops 2, 3, … read; hop 1 is answered by the last prompt row, which sees them all."""
    columns = []
    for prompt, answer in examples:
        target = {prompt[i]: i + 1 for i in range(0, len(prompt) - 2, 2)}
        columns.append([target[letter] for letter in answer[:-1]])
    return torch.tensor(columns)


def hold(count: int = 512) -> None:
    agent = smd.Agent(smd.checked(smd.Settings()))
    agent.load_base()
    examples = agent.task.held_out(count)
    column_BH, last = needed(examples), agent.s.layers - 1
    print("share of keys, and of prompts with all their keys, that at least one head holds")
    print(f"{'':10}{'last layer':>16}{'last two layers':>16}")
    for policy in smd.POLICIES:
        agent.eviction = dataclasses.replace(agent.eviction, policy=policy)
        rollout, _ = agent.respond(examples, 1, True, smd.torch_stream(agent.s.device, 0, smd.EVALUATION, 3))
        P, line = rollout.prompt_NP.shape[1], f"{policy:10}"
        for layers in (slice(last, None), slice(last - 1, None)):
            held_BP = (rollout.evicted_at_LBGT[layers, ..., :P] > P).any(dim=2).any(dim=0)
            held_BH = held_BP.gather(1, column_BH.to(held_BP.device))
            line += f"{held_BH.double().mean():9.0%} {held_BH.all(dim=1).double().mean():6.0%}"
        print(line)


def freeze(live: bool, seed: int, steps: int) -> None:
    """Score the prompt's keys with a copy of the base policy, whatever the policy that is trained would choose."""
    scores, base, choose, sample = [], [], smd.POLICIES["snapkv"].score, smd.sample
    load_base = smd.Agent.load_base

    def load_and_copy(agent: smd.Agent) -> None:
        load_base(agent)
        base.append(copy.deepcopy(agent.model))

    def record(entries: smd.Entries) -> torch.Tensor:
        scores.append(choose(entries))
        return scores[-1]

    def score_with(score) -> None:
        smd.POLICIES["snapkv"] = smd.POLICIES["snapkv"]._replace(score=score)

    def sample_frozen(model, prompt_NP, pad_N, samples, max_new, eos, eviction=None, *rest, **options) -> smd.Rollout:
        if eviction is not None:
            score_with(record)
            first = torch.zeros(len(prompt_NP), 1, dtype=torch.long, device=prompt_NP.device)
            sample(base[0], prompt_NP, pad_N, 1, 1, eos, eviction, forced_BR=first)
            score_with(lambda entries: scores.pop(0))  # layer after layer, as they were recorded
        return sample(model, prompt_NP, pad_N, samples, max_new, eos, eviction, *rest, **options)

    if not live:
        smd.Agent.load_base, smd.sample = load_and_copy, sample_frozen
    print(smd.report(smd.train(smd.Settings(interval=8, seed=seed, steps=steps))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_subparsers(dest="what", required=True)
    what.add_parser("hold")
    training = what.add_parser("freeze")
    training.add_argument("--live", action="store_true")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--steps", type=positive, default=200)
    given = parser.parse_args()
    hold() if given.what == "hold" else freeze(given.live, given.seed, given.steps)


if __name__ == "__main__":
    command(main)
