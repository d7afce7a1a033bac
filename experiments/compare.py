"""All methods from one base policy: final accuracies, how far the policies are apart, learning curves.

    python -m experiments.compare                                    6 methods x (3 or 4, and 5) runs
    python -m experiments.compare --methods smd naive --seeds 3      part of it; what is finished is never run again
    python -m experiments.compare --model smollm2 --seeds 3          the same on a real model
    python -m experiments.compare --model smollm2 --seeds 3 --budget 12% --rates 2e-5 4e-5 8e-5 --out out/twelve

Each method gets the same search: three learning rates on one seed outside the reported ones; the one with the highest
mean reward of its own rollouts over the last quarter of the steps is taken. Where it is at an end of the three, one
more beyond it is tried. Per seed all methods see the same prompts.
"""

if not __package__:  # then none of the project's modules is found
    raise SystemExit("run it from the project's folder: python -m experiments.compare")

import argparse
import statistics
from pathlib import Path

import matplotlib.pyplot as plt
from tqdm import tqdm

import smd
from experiments.common import Result, command, figures, options, run_all, steps_of, table
from harness.agent import CACHES
from harness.report import colour, held_out
from harness.settings import count_or_share

RATES_OF_TOY, RATES_OF_MODEL = (1e-4, 2e-4, 4e-4), (5e-6, 1e-5, 2e-5)
SEARCH_SEED = 100


def best_rates(searched: dict[tuple[str, float], Result]) -> dict[str, float]:
    """The learning rate of each method."""
    best = {}
    for (method, lr), (_, rows) in searched.items():
        reward = statistics.mean(row["reward"] for row in rows[-(len(rows) // 4 or 1) :])
        best[method] = max(best.get(method, (-1.0, 0.0)), (reward, lr))
    return {method: lr for method, (_, lr) in best.items()}


def beyond(best: dict[str, float], rates: tuple[float, ...]) -> list[tuple[str, float]]:
    """One more learning rate for each method whose best is the lowest or the highest that was tried."""
    further = {min(rates): min(rates) / 2, max(rates): 2 * max(rates)}
    return [(method, further[lr]) for method, lr in best.items() if lr in further]


def along(summary: dict, rows: list[dict]) -> dict[str, float]:
    """The columns of a table of both accuracies over the steps, of one run."""
    found = {}
    for cache in CACHES:
        for step, accuracy in zip(*held_out(rows, summary, cache), strict=True):
            found[f"{cache} %, {step}"] = 100 * accuracy
    return found


def draw(done: dict[str, list[Result]], path: Path) -> None:
    """Held-out accuracy over the steps, sparse and dense cache side by side; thin: each seed, thick: their mean."""
    plt.rcParams["font.size"] = 12  # readable where a page shows the 8 inches in 600 pixels
    figure, axes = plt.subplots(1, 2, figsize=(8, 4), layout="constrained", sharey=True)
    for axis, cache in zip(axes, CACHES, strict=True):
        for method, runs in done.items():
            curves = []
            for summary, rows in runs:
                steps, accuracies = held_out(rows, summary, cache)
                curves.append([100 * accuracy for accuracy in accuracies])
                axis.plot(steps, curves[-1], color=colour(method), linewidth=0.8, alpha=0.5)
            mean = [statistics.mean(values) for values in zip(*curves, strict=True)]
            axis.plot(steps, mean, color=colour(method), linewidth=2.5, label=method)
        axis.set(title=f"{cache} cache", xlabel="step", ylim=(0, 102), xticks=steps)
    axes[0].set_ylabel("held-out accuracy, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(path, dpi=150)
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options(parser, seeds=5)
    parser.add_argument("--eviction", default="snapkv", choices=list(smd.POLICIES))
    parser.add_argument("--budget", type=count_or_share, help="keys kept, as for a run (default: a run's)")
    parser.add_argument("--rates", nargs="+", type=float, help="learning rates of the search")
    parser.add_argument("--methods", nargs="+", default=list(smd.METHODS), choices=list(smd.METHODS))
    parser.add_argument("--out", type=Path, default=Path("out/compare"))
    given = parser.parse_args()
    steps = steps_of(given)
    # a run's folder is named by what is set, so nothing is set that was not given
    asked = dict(model=given.model, budget=given.budget)
    common = dict(eviction=given.eviction, steps=steps) | {k: v for k, v in asked.items() if v is not None}
    tried = given.rates or (RATES_OF_MODEL if given.model else RATES_OF_TOY)
    grid = [(method, lr) for method in given.methods for lr in tried]

    def search(grid: list[tuple[str, float]]) -> dict[tuple[str, float], Result]:
        jobs = [dict(method=method, lr=lr, seed=SEARCH_SEED, **common) for method, lr in grid]
        return dict(zip(grid, run_all(given.out / "runs", jobs, given.jobs, bar), strict=True))

    with tqdm(total=len(grid) + len(given.methods) * given.seeds, desc="compare") as bar:
        searched = search(grid)
        more = beyond(best_rates(searched), tried)
        bar.total += len(more)
        searched |= search(more)
        rates = best_rates(searched)
        common |= dict(eval_every=max(1, steps // 5))
        jobs = [dict(method=m, lr=rates[m], seed=n, **common) for n in range(given.seeds) for m in rates]
        done = run_all(given.out / "runs", jobs, given.jobs, bar)
    by_method = {method: done[n :: len(rates)] for n, method in enumerate(rates)}
    tables = dict(search={f"{m}, lr {lr:g}": [figures(*result)] for (m, lr), result in searched.items()})
    for name, columns in dict(table=figures, steps=along).items():
        tables[name] = {f"{m}, lr {rates[m]:g}": [columns(*r) for r in results] for m, results in by_method.items()}
    for name, groups in tables.items():
        print(table(groups, given.out / f"{name}.md"))
    draw(by_method, given.out / "curves.png")


if __name__ == "__main__":
    command(main)
