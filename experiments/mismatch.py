"""How far is a real model from itself under each eviction policy, before it is trained?

    python -m experiments.mismatch --model smollm2

All seven policies at 50 and at 25 % of the prompt, responses of 10 tokens at most, which are evicted while they grow.
KL(π_sparse ‖ π_dense) in nats a token, effective sample size of sequence weights, and the 5th percentile over tokens of
the overlap Σ min(π_sparse, π_dense): mean and 95 % interval over batches of prompts, which all policies share.
"""

if not __package__:  # then none of the project's modules is found
    raise SystemExit("run it from the project's folder: python -m experiments.mismatch")

import argparse
import itertools
from pathlib import Path

from tqdm import tqdm

import smd
from experiments.common import agent_of, command, positive, table
from harness import device, tasks, train

COLUMNS = dict(kl_sparse_dense="KL(sparse‖dense)", ess_sequence="ESS", overlap_p05="overlap p05", accuracy="right %")


def measured(agent, step: int) -> dict[str, float]:
    """The diagnosis of one batch, and how many of its responses are right."""
    examples, key_N = agent.draw(step)
    rollout, texts = agent.respond(examples, agent.s.samples, True, key_N)
    with device.precision(agent.s):
        found = train.diagnose(agent.model, rollout, agent.runtime)
    found["accuracy"] = 100 * tasks.accuracy(agent.task, texts, examples)
    return {heading: found[name] for name, heading in COLUMNS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--batches", type=positive, default=5)
    given = parser.parse_args()
    groups = {}
    for policy, budget in tqdm(list(itertools.product(smd.POLICIES, ("50%", "25%")))):
        agent = agent_of(model=given.model, eviction=policy, budget=budget, max_new=10)
        groups[f"{policy}, {budget}"] = [measured(agent, step) for step in range(1, given.batches + 1)]
    print(table(groups, Path("out/mismatch.md")))


if __name__ == "__main__":
    command(main)
