"""How far are the sparse and the dense policy of a real model apart under each eviction policy, before training?

    python -m experiments.mismatch --model smollm2

All seven policies keep 50 and 25 % of the prompt, and go on evicting during responses of up to 10 tokens. The table has
KL(π_sparse ‖ π_dense) in nats a token, the effective sample size of sequence weights, and the 5th percentile over
tokens of the overlap Σ min(π_sparse, π_dense): mean ± 95 % interval over five batches of prompts, which all share.
"""

import argparse
import itertools

from tqdm import tqdm

import smd
from experiments.common import DIAGNOSED, agent_of, command, markdown
from harness import device, tasks, train


def measured(agent, step: int) -> dict[str, float]:
    """The diagnosis of one batch of prompts, and the accuracy of its responses."""
    examples, key_N = agent.draw(step)
    rollout, texts = agent.respond(examples, agent.s.samples, agent.eviction, key_N)
    with device.precision(agent.s):
        found = train.diagnose(agent.model, rollout, agent.runtime)
    return found | dict(accuracy=tasks.accuracy(agent.task, texts, examples))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    model = parser.parse_args().model
    rows = []
    for budget, policy in tqdm(list(itertools.product(("50%", "25%"), smd.POLICIES))):
        agent = agent_of(model=model, eviction=policy, budget=budget, max_new=10)
        rows += [dict(kept=budget, policy=policy) | measured(agent, step) for step in range(1, 6)]
    print(markdown(rows, ["kept", "policy"], [*DIAGNOSED, "accuracy"]))


if __name__ == "__main__":
    command(main)
