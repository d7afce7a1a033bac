"""What cache does a trained policy tolerate? Runs of a real model, each evaluated with other budgets than its own.

    python -m experiments.tolerance --runs out/compare/runs

Of the runs in the folder, those of three methods (--methods) that `experiments.compare --model` reports, seed by seed:
the policy in their model/, on the held-out prompts, with 100, 50, 25 and 12 % of each prompt kept by the run's eviction
policy.
"""

if not __package__:  # then none of the project's modules is found
    raise SystemExit("run it from the project's folder: python -m experiments.tolerance")

import argparse
from pathlib import Path

from tqdm import tqdm

import smd
from experiments.common import agent_of, command, table
from experiments.compare import SEARCH_SEED
from harness.cli import require
from harness.settings import read_config


def tolerated(run: Path, config: dict) -> dict[str, float]:
    """Accuracy in percent with each budget; config: the run's settings."""
    found = {}
    for budget in ("100%", "50%", "25%", "12%"):
        agent = agent_of(**config | dict(model=str(run / "model"), budget=budget))
        found[f"{budget} kept"] = 100 * agent.evaluate(("sparse",))["sparse"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=["dense", "naive", "smd"], choices=list(smd.METHODS))
    given = parser.parse_args()
    groups: dict[str, list] = {}
    for run in tqdm([path.parent.parent for path in sorted(given.runs.glob("*/model/config.json"))]):
        config = read_config(run)
        if config["seed"] != SEARCH_SEED and config["method"] in given.methods:
            found = tolerated(run, config)
            groups.setdefault(config["method"], []).append(found)
            groups[f"{config['method']}, seed {config['seed']}"] = [found]
    require(groups, f"{given.runs} holds no such run of a model; make some with experiments.compare --model")
    print(table(groups, Path("out/tolerance.md")))


if __name__ == "__main__":
    command(main)
