"""Train every method from the same base policy and compare held-out accuracies over the steps.

    python -m experiments.compare                                    8 methods: a search, then 5 seeds of each
    python -m experiments.compare --methods smd naive --seeds 3      part of it; finished runs are kept
    python -m experiments.compare --model smollm2 --seeds 3          the same with a real model
    python -m experiments.compare --model smollm2 --seeds 3 --budget 12% --rates 2e-5 4e-5 8e-5 --out out/twelve

Each method gets the same search: three learning rates, on two seeds outside the reported ones. The rate with the
highest mean reward of its own rollouts over the last quarter of the steps wins. If it is the lowest or the highest of
the three, the search tries one more rate beyond it. Seed by seed, all methods train on the same prompts.
"""

import argparse
import statistics
from pathlib import Path

import smd
from experiments.common import SHOWN, add_flags, command, group, markdown, run_all
from experiments.tables import draw_curves, over_steps
from harness.settings import count_or_share

RATES_OF_TOY, RATES_OF_MODEL = (1e-4, 2e-4, 4e-4), (5e-6, 1e-5, 2e-5)
SEARCH_SEEDS = [100, 101]


def best_rates(searched: list[dict]) -> dict[str, float]:
    """The learning rate of each method."""
    best = {}
    for (method, lr), rows in group(searched, ["method", "lr"]).items():
        reward = statistics.mean(row["reward_last"] for row in rows)
        best[method] = max(best.get(method, (reward, lr)), (reward, lr))
    return {method: lr for method, (_, lr) in best.items()}


def beyond(best: dict[str, float], rates: list[float]) -> list[tuple[str, float]]:
    """One more learning rate for each method whose best is the lowest or the highest that was tried."""
    further = {min(rates): min(rates) / 2, max(rates): 2 * max(rates)}
    return [(method, further[lr]) for method, lr in best.items() if lr in further]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser, seeds=5)
    parser.add_argument("--budget", type=count_or_share, help="keep budget, as in smd.py")
    parser.add_argument("--rates", nargs="+", type=float, help="learning rates of the search (default: three)")
    methods = list(smd.METHODS)
    parser.add_argument("--methods", nargs="+", default=methods, choices=methods, help="default: all")
    parser.add_argument("--out", type=Path, help="folder of the runs (default: out/compare, with --model out/smollm2)")
    given = parser.parse_args()
    out = given.out or Path("out/smollm2" if given.model else "out/compare")
    rates = given.rates or (RATES_OF_MODEL if given.model else RATES_OF_TOY)

    def trained(name: str, grid: list[tuple[str, float]], seeds: list[int], **more) -> list[dict]:
        common = dict(model=given.model, budget=given.budget) | more
        jobs = [dict(method=method, lr=lr, seed=seed) | common for seed in seeds for method, lr in grid]
        return run_all(out / "runs", jobs, given.jobs, out / f"{name}.csv")

    grid = [(method, lr) for method in given.methods for lr in rates]
    grid += beyond(best_rates(trained("search", grid, SEARCH_SEEDS)), rates)
    searched = trained("search", grid, SEARCH_SEEDS)
    best = list(best_rates(searched).items())
    rows = trained("runs", best, list(range(given.seeds)), eval_every=5 if given.model else 20)
    for found, columns in ((searched, SHOWN), (rows, SHOWN), (rows, over_steps(rows))):
        print(markdown(found, ["method", "lr"], columns), end="\n\n")
    draw_curves(rows, out / "curves.png")


if __name__ == "__main__":
    command(main)
