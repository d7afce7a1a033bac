"""Train every method from the same base policy and compare held-out accuracies over the steps.

    python -m experiments.compare                                    8 methods: a search, then 5 seeds of each
    python -m experiments.compare --methods smd naive --seeds 3      part of it; finished runs are kept
    python -m experiments.compare --model smollm2 --seeds 3          the same with a real model
    python -m experiments.compare --budget 25 18 --rates 2e-4 4e-4   the same for each of two budgets, with two rates

Each method gets the same search: the same learning rates, on two seeds outside the reported ones. The rate with the
highest mean reward of its own rollouts over the last quarter of the steps wins. Without --rates there are three, and
if the lowest or the highest of them is the best, the search tries one more beyond it. Seed by seed, all methods train
on the same prompts.
"""

import argparse
import itertools
import statistics
from pathlib import Path

import smd
from experiments.common import SHOWN, add_flags, command, group, markdown, run_all
from experiments.tables import draw_curves, draw_leads, over_steps
from harness.cli import require
from harness.settings import count_or_share

RATES_OF_TOY, RATES_OF_MODEL = (1e-4, 2e-4, 4e-4), (5e-6, 1e-5, 2e-5)
SEARCH_SEEDS = [100, 101]


def best_rates(searched: list[dict]) -> dict[tuple, float]:
    """The learning rate of each method with each budget."""
    best = {}
    for (method, budget, lr), rows in group(searched, ["method", "budget", "lr"]).items():
        reward = statistics.mean(row["reward_last"] for row in rows)
        best[method, budget] = max(best.get((method, budget), (reward, lr)), (reward, lr))
    return {case: lr for case, (_, lr) in best.items()}


def beyond(best: dict[tuple, float], rates: list[float]) -> list[tuple]:
    """Method, budget and one more learning rate, where the best is the lowest or the highest that was tried."""
    further = {min(rates): min(rates) / 2, max(rates): 2 * max(rates)}
    return [(*case, further[lr]) for case, lr in best.items() if lr in further]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser, seeds=5)
    parser.add_argument("--budget", nargs="+", type=count_or_share, default=[None], help="keep budgets, as in smd.py")
    parser.add_argument("--rates", nargs="+", type=float, help="learning rates of the search (default: three or four)")
    methods = list(smd.METHODS)
    parser.add_argument("--methods", nargs="+", default=methods, choices=methods, help="default: all")
    parser.add_argument("--out", type=Path, help="folder of the runs (default: out/compare, with --model out/smollm2)")
    given = parser.parse_args()
    others = set(given.methods) - {"smd", "dense"}
    fits = len(given.budget) == 1 or ("smd" in given.methods and len(others) > 0)
    require(fits, "several budgets show the lead of smd; give smd and another method that evicts")
    out = given.out or Path("out/smollm2" if given.model else "out/compare")
    rates = given.rates or (RATES_OF_MODEL if given.model else RATES_OF_TOY)

    def trained(name: str, grid: list[tuple], seeds: list[int], **more) -> list[dict]:
        jobs = [
            dict(method=method, lr=lr, seed=seed, model=given.model, budget=budget) | more
            for seed in seeds
            for method, budget, lr in grid
        ]
        return run_all(out / "runs", jobs, given.jobs, out / f"{name}.csv")

    grid = list(itertools.product(given.methods, given.budget, rates))
    searched = trained("search", grid, SEARCH_SEEDS)
    if not given.rates:
        grid += beyond(best_rates(searched), rates)
        searched = trained("search", grid, SEARCH_SEEDS)
    best = [(*case, lr) for case, lr in best_rates(searched).items()]
    rows = trained("runs", best, list(range(given.seeds)), eval_every=5 if given.model else 20)
    for found, columns in ((searched, SHOWN), (rows, SHOWN), (rows, over_steps(rows))):
        print(markdown(found, ["budget", "method", "lr"], columns), end="\n\n")
    if len(given.budget) == 1:
        draw_curves(rows, out / "curves.png")
    else:
        draw_leads(rows, out / "leads.png")


if __name__ == "__main__":
    command(main)
