"""What cache does a trained policy tolerate? Runs of a real model, each evaluated with other budgets than its own.

    python -m experiments.tolerance --runs out/compare/runs

Of the runs in the folder, those that `experiments.compare --model` reports, seed by seed: the policy in their model/,
on the held-out prompts, with 100, 50, 25 and 12 % of each prompt kept by the run's eviction policy.
"""

import argparse
import json
from pathlib import Path

from tqdm import tqdm

import smd
from experiments.common import command, table
from experiments.compare import SEARCH_SEED

BUDGETS = 1.0, 0.5, 0.25, 0.12


def tolerated(run: Path, eviction: str) -> dict[str, float]:
    """Accuracy in percent with each budget."""
    found = {}
    for budget in BUDGETS:
        s = smd.Settings(model=str(run / "model"), eviction=eviction, budget=budget)
        found[f"{budget:.0%} kept"] = 100 * smd.agent_for(smd.checked(s)).evaluate()["sparse"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True)
    given = parser.parse_args()
    configs = {path.parent: json.loads(path.read_text()) for path in sorted(given.runs.glob("*/config.json"))}
    reported = {run: config for run, config in configs.items() if config["model"] and config["seed"] != SEARCH_SEED}
    smd.require(reported, f"{given.runs} holds no run of a model; make some with experiments.compare --model")
    groups: dict[str, list] = {}
    for run, config in tqdm(reported.items()):
        groups.setdefault(config["method"], []).append(tolerated(run, config["eviction"]))
    print(table(groups, Path("out/tolerance.md")))


if __name__ == "__main__":
    command(main)
