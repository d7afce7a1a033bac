"""Which cache does a trained policy tolerate? Runs of a real model, evaluated with other budgets than their own.

    python -m experiments.tolerance --runs out/smollm2/runs

Evaluates the policies in the model/ folders of the runs that `experiments.compare --model` reports, on the held-out
prompts, with 100, 50, 25 and 12 % of each prompt kept by the run's eviction policy.
"""

import argparse
from pathlib import Path

from tqdm import tqdm

import smd
from experiments.common import agent_of, command, markdown
from experiments.compare import SEARCH_SEEDS
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
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--methods", nargs="+", default=["dense", "naive", "smd"], choices=list(smd.METHODS))
    given = parser.parse_args()
    rows = []
    for run in tqdm([path.parent.parent for path in sorted(given.runs.glob("*/model/config.json"))]):
        config = read_config(run)
        if config["seed"] not in SEARCH_SEEDS and config["method"] in given.methods:
            rows.append(dict(method=config["method"], seed=f"seed {config['seed']}") | tolerated(run, config))
    require(rows, f"{given.runs} has no such run of a model; make some with experiments.compare --model")
    print(markdown([dict(row, seed="all") for row in rows] + rows, ["method", "seed"]))


if __name__ == "__main__":
    command(main)
