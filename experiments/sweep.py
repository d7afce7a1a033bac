"""Ablations: what is kept, who chooses it, how hard the dense policy follows, how long the answer is.

    python -m experiments.sweep budget      kept share 100, 75, 50, 35, 25 %: smd, naive
    python -m experiments.sweep eviction    every eviction policy at 50 %: smd, naive
    python -m experiments.sweep lam         λ = 0, 0.1, 1 at 50 and at 35 %: smd
    python -m experiments.sweep length      answers of 3, 6, 9, 12 letters: smd, naive, seq_is

    python -m experiments.sweep eviction --model smollm2    every eviction policy at 25 %: smd
    python -m experiments.sweep lam --model smollm2         λ = 0, 0.1, 0.3 at 25 %: smd
    python -m experiments.sweep answer --model smollm2      smd, tis, naive: one code asked, 25 and 12 % kept, by snapkv
                                                            and at random; three, by snapkv and beside the whole prompt

Three seeds each (--seeds), snapkv (--eviction), each method at its own learning rate. What is finished is never run
again; another length of the answer has its own base policy.
"""

if not __package__:  # then none of the project's modules is found
    raise SystemExit("run it from the project's folder: python -m experiments.sweep")

import argparse
import itertools
import statistics
from pathlib import Path

import matplotlib.pyplot as plt
from tqdm import tqdm

import smd
from experiments.common import colour, command, figures, label_ends, named, options, run_all, save, steps_of, table

# sweep -> its axis, and the runs at each point of it: (label of the point, label of the line, settings)
BOTH, SHARES = ("smd", "naive"), ("100%", "75%", "50%", "35%", "25%")
SWEEPS = {
    "budget": ("prompt's keys kept", [(b, m, dict(budget=b, method=m)) for b in SHARES for m in BOTH]),
    "eviction": ("eviction policy", [(p, m, dict(eviction=p, method=m)) for p in smd.EVICTIONS for m in BOTH]),
    "lam": ("λ", [(f"{v:g}", f"smd, {b}", dict(lam=v, budget=b)) for b in ("50%", "35%") for v in (0.0, 0.1, 1.0)]),
    "length": (
        "letters in the answer",
        [(f"{k}", m, dict(hops=k, method=m)) for k in (3, 6, 9, 12) for m in (*BOTH, "seq_is")],
    ),
}
DEFAULTS = dict(budget="50%", lam=smd.Settings.lam, hops=6, method="smd")
# what the search of `experiments.compare` chose; below, with --model
RATES = dict(smd=2e-4, naive=2e-4, seq_is=2e-4)

# the same of a real model
BY_SNAPKV = {f"{b} by snapkv": dict(budget=b, eviction="snapkv") for b in ("25%", "12%")}
AT_RANDOM = {f"{b} at random": dict(budget=b, eviction="random") for b in ("25%", "12%")}
# of three codes, which are 14 tokens: beside the whole prompt, 4 keys of the response
BESIDE = {"4 keys beside the prompt": dict(budget=4, window=2, eviction="random", protect="prompt")}
ANSWERS = [(f"1, {kept}", dict(asked=1) | given) for kept, given in (BY_SNAPKV | AT_RANDOM).items()]
ANSWERS += [(f"3, {kept}", dict(asked=3) | given) for kept, given in (BY_SNAPKV | BESIDE).items()]
SWEEPS_OF_MODEL = {
    "eviction": ("eviction policy", [(p, "smd", dict(eviction=p)) for p in smd.EVICTIONS]),
    "lam": ("λ", [(f"{v:g}", "smd", dict(lam=v)) for v in (0.0, 0.1, 0.3)]),
    "answer": (
        "codes asked, keys kept",
        [(kept, m, given | dict(method=m)) for kept, given in ANSWERS for m in ("smd", "tis", "naive")],
    ),
}
DEFAULTS_OF_MODEL = dict(budget="25%", lam=smd.Settings.lam, asked=1, method="smd")
RATES_OF_MODEL = dict(smd=4e-5, tis=4e-5, naive=4e-5)


def draw(groups: dict[tuple[str, str], list], axis_label: str, path: Path) -> None:
    """Final accuracy with either cache, KL and effective sample size along the sweep: mean, and a dot for each seed."""
    labels = list(dict.fromkeys(label for label, _ in groups))
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained")
    for axis, column in zip(axes.flat, ("sparse %", "dense %", "KL(sparse‖dense)", "least ESS"), strict=True):
        ends, style = {}, itertools.cycle(("o-", "s--", "^-."))
        axis.set(title=column, xlim=(-0.2, 1.25 * len(labels) - 0.9))
        axis.set_xticks(range(len(labels)), labels, rotation=40 if len(labels) > 5 else 0)
        for line in dict.fromkeys(line for _, line in groups):
            at = [n for n, label in enumerate(labels) if (label, line) in groups]
            values = [[run[column] for run in groups[labels[n], line]] for n in at]
            mean = [statistics.mean(seeds) for seeds in values]
            axis.plot(at, mean, next(style), color=colour(line), markersize=4)
            dots = [(n, value) for n, seeds in zip(at, values, strict=True) for value in seeds]
            axis.scatter(*zip(*dots, strict=True), s=14, color=colour(line), alpha=0.35, linewidth=0)
            ends[line] = at[-1], mean[-1]
            if "%" in column:
                base = [groups[labels[n], line][0]["base " + column] for n in at]
                axis.plot(at, base, ":", color="black", zorder=0)
                ends["base"] = at[-1], base[-1]
        if "%" in column:
            axis.set(ylim=(0, 100))
        elif "ESS" in column:
            axis.set(yscale="log", ylim=(None, 1.1))
        else:
            axis.set(ylim=(0, None))
        label_ends(axis, ends)
    for axis in axes[1]:
        axis.set_xlabel(axis_label)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", choices=list(SWEEPS | SWEEPS_OF_MODEL))
    options(parser, seeds=3)
    parser.add_argument("--model")
    parser.add_argument("--eviction", choices=list(smd.EVICTIONS), help="default: snapkv")
    given = parser.parse_args()
    sweeps, default, rates = SWEEPS, DEFAULTS, RATES
    if given.model:
        sweeps, default, rates = SWEEPS_OF_MODEL, DEFAULTS_OF_MODEL | dict(model=given.model), RATES_OF_MODEL
    if given.sweep not in sweeps:
        parser.error(f"there is no sweep {given.sweep} {'with' if given.model else 'without'} a --model")
    axis_label, points = sweeps[given.sweep]
    if given.eviction and any("eviction" in settings for *_, settings in points):
        parser.error(f"the sweep {given.sweep} takes no --eviction")
    default = default | dict(eviction=given.eviction or smd.Settings.eviction)
    jobs, places = [], []
    for seed in range(given.seeds):
        for label, line, settings in points:
            settings = default | settings
            jobs.append(settings | dict(lr=rates[settings["method"]], seed=seed, steps=steps_of(given, given.model)))
            places.append((label, line))
    with tqdm(total=len(jobs), desc=given.sweep) as bar:
        done = run_all(Path("out/sweep/runs"), jobs, given.jobs, bar)
    groups: dict[tuple[str, str], list] = {}
    for place, result in zip(places, done, strict=True):
        groups.setdefault(place, []).append(figures(*result))
    name = named(*filter(None, (given.sweep, given.eviction, given.model)))
    print(table({", ".join(place): runs for place, runs in groups.items()}, Path("out/sweep") / f"{name}.md"))
    draw(groups, axis_label, Path("out/sweep") / f"{name}.png")


if __name__ == "__main__":
    command(main)
