"""Print the tables and draw the figures of the CSV files in experiments/results, from these files alone.

    python -m experiments.tables

A comment before each table names it. Where a page has such a comment, a test compares its table with the file's. The
figures are assets/pays.png and assets/saves.png.
"""

import dataclasses
import statistics
from pathlib import Path

import matplotlib.pyplot as plt

from experiments.common import DIAGNOSED, command, group, markdown, mean_and_interval, numbers, read_csv
from harness.agent import CACHES
from harness.cli import require
from harness.report import COLOURS
from harness.settings import Settings

RESULTS = Path(__file__).parent / "results"
ASSETS = Path(__file__).parents[1] / "assets"
FIGURES = ["sparse", "dense", "reward", "kl_sparse_dense_last", "bytes", "tokens_per_second"]
# "reward" is a setting, too, but in a file of results it is the mean reward
SETTINGS = {"cache", "tokens", *(field.name for field in dataclasses.fields(Settings))} - {"seed", *FIGURES}


def over_steps(rows: list[dict]) -> list[str]:
    """The columns with the held-out accuracy over the steps."""
    return [name for name in rows[0] if "_at_" in name]


def tables() -> dict[str, str]:
    """Name -> Markdown. The settings that differ between the rows of a file make the groups."""
    found = {}
    for path in sorted(RESULTS.glob("*.csv")):
        rows = read_csv(path)
        varied = [name for name in rows[0] if name in SETTINGS and len(group(rows, [name])) > 1]
        found[path.stem] = markdown(rows, varied, FIGURES)
    found["leads"] = markdown(leads(read_csv(RESULTS / "pays.csv")), ["budget"], [*DIAGNOSED, *LEADS.values()])
    return found


def draw_curves(rows: list[dict], picture: Path) -> None:
    """Held-out accuracy over the steps with either cache; thin: each seed, thick: the mean."""
    plt.rcParams["font.size"] = 12  # readable where a page shows the 8 inches in 600 pixels
    figure, axes = plt.subplots(1, 2, figsize=(8, 4), layout="constrained", sharey=True)
    for axis, cache in zip(axes, CACHES, strict=True):
        names = [name for name in over_steps(rows) if name.startswith(cache)]
        steps = [int(name.rpartition("_")[2]) for name in names]
        for (method,), members in group(rows, ["method"]).items():
            colour = COLOURS.get(method, "black")
            curves = [[float(row[name]) for name in names] for row in members]
            for curve in curves:
                axis.plot(steps, curve, color=colour, linewidth=0.8, alpha=0.5)
            mean = [statistics.mean(values) for values in zip(*curves, strict=True)]
            axis.plot(steps, mean, color=colour, linewidth=2.5, label=method)
        axis.set(title=f"{cache} cache", xlabel="step", ylim=(0, 102), xticks=steps)
    axes[0].set_ylabel("held-out accuracy, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(picture, dpi=150)
    print(picture)


LEADS = {cache: f"lead, {cache} cache" for cache in CACHES}


def leads(rows: list[dict]) -> list[dict]:
    """The lead of smd over the best other method that evicts, in points, for each budget and seed.

    The best is the method with the highest mean. A row also has the figures of the mismatch before training.
    UsageError unless each of the methods has one row for each seed.
    """
    found = []
    for (budget,), members in group(rows, ["budget"]).items():
        of_method = {method: rows for (method,), rows in group(members, ["method"]).items() if method != "dense"}
        ours = of_method["smd"]
        seeds = {row["seed"] for row in ours}
        for method, others in of_method.items():
            one_each = [row["seed"] for row in others] == [row["seed"] for row in ours] and len(others) == len(seeds)
            advice = "keep the rows of one learning rate and of the same seeds"
            require(one_each, f"budget {budget}: method {method} has not one row for each seed of smd; {advice}")
        del of_method["smd"]
        best = {}
        for cache in CACHES:
            means = {method: statistics.mean(numbers(others, cache)) for method, others in of_method.items()}
            best[cache] = of_method[max(means, key=means.get)]
        for n, row in enumerate(ours):
            lead = dict(budget=budget, seed=row["seed"]) | {name: row[name] for name in DIAGNOSED}
            for cache, name in LEADS.items():
                lead[name] = float(row[cache]) - float(best[cache][n][cache])
            found.append(lead)
    return found


def draw_leads(rows: list[dict], picture: Path) -> None:
    """The lead of smd with each budget, against the overlap of the sparse and the dense policy before training."""
    of_budget = group(leads(rows), ["budget"])
    figure, axes = plt.subplots(1, 2, figsize=(8, 4), layout="constrained", sharey=True)
    for axis, (cache, name) in zip(axes, LEADS.items(), strict=True):
        axis.axhline(0, color="grey", linewidth=0.8)
        for (budget,), members in of_budget.items():
            overlap = statistics.mean(numbers(members, "overlap_p05"))
            mean, half = mean_and_interval(numbers(members, name))
            axis.errorbar(overlap, mean, half, fmt="o", capsize=3, color=COLOURS["smd"])
            axis.annotate(budget, (overlap, mean), (6, 4), textcoords="offset points")
        axis.set(title=f"{cache} cache", xlabel="overlap p05 before training; labels: keys kept", xmargin=0.2)
    axes[0].set_ylabel("lead of smd over the best other method, points")
    figure.savefig(picture, dpi=150)
    print(picture)


def draw_memory(rows: list[dict], picture: Path) -> None:
    """The peak of the stored cache over the length of the response."""
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    rows = sorted(rows, key=lambda row: int(row["tokens"]))
    for (cache, budget), members in group(rows, ["cache", "budget"]).items():
        tokens, label = numbers(members, "tokens"), f"{cache}, {budget} keys" if budget else cache
        (line,) = axis.plot(tokens, numbers(members, "bytes"), "o-", markersize=4, label=label)
        axis.plot(tokens, numbers(members, "formula_bytes"), ":", color=line.get_color())
    axis.set_xscale("log", base=2)
    ticks = sorted(set(numbers(rows, "tokens")))
    axis.set_xticks(ticks, [f"{x:,.0f}" for x in ticks])
    axis.set(yscale="log", xlabel="tokens of each response", ylabel="bytes of the cache (dotted: formula)")
    axis.legend(loc="upper left", frameon=False)
    figure.savefig(picture, dpi=150)
    print(picture)


def main() -> None:
    for name, table in tables().items():
        print(f"<!-- table: {name} -->\n{table}\n")
    draw_leads(read_csv(RESULTS / "pays.csv"), ASSETS / "pays.png")
    draw_memory(read_csv(RESULTS / "saves.csv"), ASSETS / "saves.png")


if __name__ == "__main__":
    command(main)
