"""All methods from one base policy: final accuracies, gradients' troubles, learning curves.

    python -m experiments.compare --policy random                    6 methods x (3 + 5) runs of 200 steps
    python -m experiments.compare --methods smd naive --seeds 3      part of it; what is finished is never run again

Each method gets the same search: three learning rates on one seed outside the reported ones; the one with the highest
mean reward over the last quarter of the steps is taken. Per seed all methods see the same prompts.
"""

import statistics
from pathlib import Path

import matplotlib.pyplot as plt
from tqdm import tqdm

import smd
from experiments.runs import (
    COLOURS,
    command,
    figures,
    label_ends,
    mean_and_interval,
    options,
    positive,
    run_all,
    save,
    table,
)

LEARNING_RATES, SEARCH_SEED = (1e-4, 2e-4, 4e-4), 100


def chosen_rates(methods: list[str], out: Path, common: dict, workers: int, bar: tqdm) -> dict[str, float]:
    """The learning rate of each method."""
    jobs = {
        out / "runs" / f"search-{method}-{lr:g}": dict(method=method, lr=lr, seed=SEARCH_SEED, **common)
        for method in methods
        for lr in LEARNING_RATES
    }
    done, best = run_all(jobs, workers, bar), {}
    for folder, (_, rows) in done.items():
        reward = statistics.mean(row["reward"] for row in rows[-(len(rows) // 4 or 1) :])
        best[jobs[folder]["method"]] = max(best.get(jobs[folder]["method"], (-1.0, 0.0)), (reward, jobs[folder]["lr"]))
    return {method: lr for method, (_, lr) in best.items()}


def draw(done: dict[str, list], path: Path) -> None:
    """Held-out accuracy over the steps, sparse and dense cache side by side; band: 95 % interval over seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for axis, cache in zip(axes, ("sparse", "dense"), strict=True):
        ends = {}
        for method, runs in done.items():
            curves = []
            for summary, rows in runs:
                points = [(row["step"], row[f"held_out_{cache}"]) for row in rows if f"held_out_{cache}" in row]
                curves.append([(0, summary["before"][cache]), *points])
            steps = [step for step, _ in curves[0]]
            pairs = [mean_and_interval([curve[n][1] for curve in curves]) for n in range(len(steps))]
            low, mean, high = zip(*((m - half, m, m + half) for m, half in pairs), strict=True)
            axis.fill_between(steps, low, high, color=COLOURS[method], alpha=0.15, linewidth=0)
            axis.plot(steps, mean, color=COLOURS[method])
            ends[method] = steps[-1], mean[-1]
        axis.set(title=f"{cache} cache", xlabel="step", ylim=(0, 1), xlim=(0, 1.16 * steps[-1]))
        label_ends(axis, ends)
    axes[0].set_ylabel("held-out accuracy")
    save(figure, path)


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(smd.METHODS), choices=list(smd.METHODS))
    parser.add_argument("--seeds", type=positive, default=5)
    parser.add_argument("--out", type=Path, default=Path("out/compare"))
    given = parser.parse_args()
    common = dict(steps=given.steps, policy=given.policy)
    with tqdm(total=len(given.methods) * (len(LEARNING_RATES) + given.seeds), desc="compare") as bar:
        rates = chosen_rates(given.methods, given.out, common, given.jobs, bar)
        jobs = {
            given.out / "runs" / f"{method}-{rates[method]:g}-{seed}": dict(
                method=method, lr=rates[method], seed=seed, eval_every=max(1, given.steps // 8), **common
            )
            for seed in range(given.seeds)
            for method in given.methods
        }
        done = run_all(jobs, given.jobs, bar)
    by_method = {m: [result for out, result in done.items() if jobs[out]["method"] == m] for m in given.methods}
    named = {f"{m}, lr {rates[m]:g}": [figures(*result) for result in runs] for m, runs in by_method.items()}
    print(table(named, given.out / "table.md"))
    draw(by_method, given.out / "curves.png")


if __name__ == "__main__":
    command(main)
