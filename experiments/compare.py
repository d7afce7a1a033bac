"""All methods from one base policy: final accuracies, gradients' troubles, learning curves.

    python -m experiments.compare --policy random                    6 methods x (3 + 5) runs of 200 steps
    python -m experiments.compare --methods smd naive --seeds 3      part of it; what is finished is never run again

Each method gets the same search: three learning rates on one seed outside the reported ones; the one with the highest
mean reward over the last quarter of the steps is taken. Per seed all methods see the same prompts.
"""

import statistics
from pathlib import Path

import matplotlib.pyplot as plt
import torch
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


def best_rates(searched: dict[tuple[str, float], tuple[dict, list[dict]]]) -> dict[str, float]:
    """The learning rate of each method."""
    best = {}
    for (method, lr), (_, rows) in searched.items():
        reward = statistics.mean(row["reward"] for row in rows[-(len(rows) // 4 or 1) :])
        best[method] = max(best.get(method, (-1.0, 0.0)), (reward, lr))
    return {method: lr for method, (_, lr) in best.items()}


def rank_correlation(x: list[float], y: list[float]) -> float:
    rank_2n = torch.tensor([x, y]).argsort(dim=1).argsort(dim=1)
    return torch.corrcoef(rank_2n.double())[0, 1].item()


def predictors(runs: list[tuple[dict, list[dict]]]) -> str:
    """Rank correlation, over runs, of what is diagnosed in the first quarter of a run with its final accuracies."""
    lines = [f"rank correlation over {len(runs)} runs{'':14}with sparse %  with dense %"]
    for name in ("ess_sequence", "ess_token", "overlap_p05", "kl_sparse_dense"):
        early = [statistics.mean(row[name] for row in rows[: len(rows) // 4 or 1] if name in row) for _, rows in runs]
        line = f"  {name + ', first quarter of the steps':43}"
        for cache in ("sparse", "dense"):
            final = [summary["after"][cache] for summary, _ in runs]
            line += f"{rank_correlation(early, final):14.2f}"
        lines.append(line)
    return "\n".join(lines)


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
    grid = {(method, lr): dict(method=method, lr=lr) for method in given.methods for lr in LEARNING_RATES}
    with tqdm(total=len(grid) + len(given.methods) * given.seeds, desc="compare") as bar:
        places = {given.out / "runs" / f"search-{m}-{lr:g}": (m, lr) for m, lr in grid}
        jobs = {out: dict(grid[place], seed=SEARCH_SEED, **common) for out, place in places.items()}
        searched = {places[out]: result for out, result in run_all(jobs, given.jobs, bar).items()}
        rates = best_rates(searched)
        places = {given.out / "runs" / f"{m}-{rates[m]:g}-{n}": (m, n) for n in range(given.seeds) for m in rates}
        common |= dict(eval_every=max(1, given.steps // 8))
        jobs = {out: dict(method=m, lr=rates[m], seed=n, **common) for out, (m, n) in places.items()}
        done = {places[out]: result for out, result in run_all(jobs, given.jobs, bar).items()}
    print(
        table({f"{m}, lr {lr:g}": [figures(*result)] for (m, lr), result in searched.items()}, given.out / "search.md")
    )
    by_method = {m: [result for (method, _), result in done.items() if method == m] for m in rates}
    named = {f"{m}, lr {rates[m]:g}": [figures(*result) for result in runs] for m, runs in by_method.items()}
    print(table(named, given.out / "table.md"))
    mismatched = [result for (m, _), result in [*searched.items(), *done.items()] if smd.METHODS[m].evicts]
    if len(mismatched) > 1:
        print(predictors(mismatched))
    draw(by_method, given.out / "curves.png")


if __name__ == "__main__":
    command(main)
