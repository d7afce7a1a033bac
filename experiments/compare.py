"""All methods from one base policy: final accuracies, gradients' troubles, learning curves.

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
import torch
from tqdm import tqdm

import smd
from experiments.common import colour, command, figures, label_ends, options, run_all, save, steps_of, table
from harness import cli
from harness.agent import CACHES
from harness.report import held_out

RATES_OF_TOY, RATES_OF_MODEL = (1e-4, 2e-4, 4e-4), (5e-6, 1e-5, 2e-5)
SEARCH_SEED = 100


def best_rates(searched: dict[tuple[str, float], tuple[dict, list[dict]]]) -> dict[str, float]:
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


def ranks(values: list[float]) -> torch.Tensor:
    """Ranks less their mean; equal values share one."""
    x = torch.tensor(values, dtype=torch.float64)
    return 0.5 * (x[:, None] > x).sum(dim=1) - 0.5 * (x[:, None] < x).sum(dim=1)


def rank_correlation(x: list[list[float]], y: list[list[float]]) -> float:
    """Of x with y, ranked within each of several groups; NaN where either is the same everywhere."""
    rank_x, rank_y = (torch.cat([ranks(group) for group in groups]) for groups in (x, y))
    return torch.corrcoef(torch.stack((rank_x, rank_y)))[0, 1].item()


def predictors(runs: dict[float, list[tuple[dict, list[dict]]]]) -> str:
    """Does what is diagnosed in the first quarter of a run tell its final accuracies? Ranked within learning rates.

    Within, because a higher rate moves both: the policies apart and the accuracy.
    """
    lines = [f"rank correlation, {sum(map(len, runs.values()))} runs{'':22}with sparse %  with dense %"]
    for name in ("ess_sequence", "ess_token", "overlap_p05", "kl_sparse_dense"):
        line = f"  {name + ', first quarter of the steps':43}"
        early = [
            [statistics.mean(row[name] for row in rows[: len(rows) // 4 or 1] if name in row) for _, rows in group]
            for group in runs.values()
        ]
        for cache in CACHES:
            final = [[summary["after"][cache] for summary, _ in group] for group in runs.values()]
            line += f"{rank_correlation(early, final):14.2f}"
        lines.append(line)
    return "\n".join(lines)


def curve(summary: dict, rows: list[dict], cache: str) -> tuple[list[int], list[float]]:
    """Steps, and the held-out accuracy in percent at each, from before the first step to after the last."""
    steps, values = held_out(rows, summary, cache)
    return steps, [100 * accuracy for accuracy in values]


def along(summary: dict, rows: list[dict]) -> dict[str, float]:
    """The columns of a table of both accuracies over the steps, of one run."""
    found = {}
    for cache in CACHES:
        steps, values = curve(summary, rows, cache)
        found |= {f"{cache} %, {step}": value for step, value in zip(steps, values, strict=True)}
    return found


def draw(done: dict[str, list], path: Path) -> None:
    """Held-out accuracy over the steps, sparse and dense cache side by side; thin: each seed, thick: their mean."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 4), layout="constrained", sharey=True)
    for axis, cache in zip(axes, CACHES, strict=True):
        ends = {}
        for method, runs in done.items():
            curves = [curve(summary, rows, cache) for summary, rows in runs]
            steps = curves[0][0]
            mean = [statistics.mean(values) for values in zip(*(values for _, values in curves), strict=True)]
            for _, values in curves:
                axis.plot(steps, values, color=colour(method), linewidth=0.8, alpha=0.5)
            axis.plot(steps, mean, color=colour(method), linewidth=2.5)
            ends[method] = steps[-1], mean[-1]
        axis.set(title=f"{cache} cache", xlabel="step", ylim=(0, 102), xlim=(0, 1.35 * steps[-1]), xticks=steps)
        label_ends(axis, ends)
    axes[0].set_ylabel("held-out accuracy, %")
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options(parser, seeds=5)
    parser.add_argument("--model")
    parser.add_argument("--eviction", default=smd.Settings.eviction, choices=list(smd.EVICTIONS))
    parser.add_argument("--budget", type=cli.count_or_share, help="keys kept, as for a run (default: a run's)")
    parser.add_argument("--rates", nargs="+", type=float, help="learning rates of the search")
    parser.add_argument("--methods", nargs="+", default=list(smd.METHODS), choices=list(smd.METHODS))
    parser.add_argument("--out", type=Path, default=Path("out/compare"))
    given = parser.parse_args()
    steps = steps_of(given, given.model)
    common = dict(eviction=given.eviction, steps=steps)
    # a run's folder is named by what is set, so nothing is set that was not given
    if given.model is not None:
        common["model"] = given.model
    if given.budget is not None:
        common["budget"] = given.budget
    tried = given.rates or (RATES_OF_MODEL if given.model else RATES_OF_TOY)
    grid = [(method, lr) for method in given.methods for lr in tried]

    def search(grid: list[tuple[str, float]]) -> dict:
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
    named = {f"{m}, lr {lr:g}": [figures(*result)] for (m, lr), result in searched.items()}
    print(table(named, given.out / "search.md"))
    by_method = {m: [result for job, result in zip(jobs, done, strict=True) if job["method"] == m] for m in rates}
    for columns, name in (figures, "table"), (along, "steps"):
        named = {f"{m}, lr {rates[m]:g}": [columns(*result) for result in runs] for m, runs in by_method.items()}
        print(table(named, given.out / f"{name}.md"))
    by_rate = {lr: [] for _, lr in searched}
    for (method, lr), result in searched.items():
        if smd.METHODS[method].evicts:
            by_rate[lr].append(result)
            by_rate[lr] += by_method[method] if lr == rates[method] else []
    print(predictors(by_rate))
    draw(by_method, given.out / "curves.png")


if __name__ == "__main__":
    command(main)
