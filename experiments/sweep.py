"""Ablations: what is kept, who chooses it, how hard the dense policy follows, how long the answer is.

    python -m experiments.sweep budget      kept share 100, 75, 50, 35, 25 %: smd, naive
    python -m experiments.sweep policy      every eviction policy at 50 %: smd, naive
    python -m experiments.sweep lam         λ = 0, 0.1, 1 at 50 and at 35 %: smd
    python -m experiments.sweep length      answers of 3, 6, 9, 12 letters: smd, naive, seq_is

Three seeds each (--seeds), 200 steps (--steps), snapkv (--policy). What is finished is never run again; another length
of the answer has its own base policy.
"""

import itertools
from pathlib import Path

import matplotlib.pyplot as plt
from tqdm import tqdm

import smd
from experiments.runs import (
    colour,
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

# sweep -> its axis, and the runs at each point of it: (label of the point, label of the line, settings)
BOTH, SHARES = ("smd", "naive"), (1.0, 0.75, 0.5, 0.35, 0.25)
SWEEPS = {
    "budget": ("prompt's keys kept", [(f"{b:.0%}", m, dict(budget=b, method=m)) for b in SHARES for m in BOTH]),
    "policy": ("eviction policy", [(p, m, dict(policy=p, method=m)) for p in smd.POLICIES for m in BOTH]),
    "lam": ("λ", [(f"{v:g}", f"smd, {b:.0%}", dict(lam=v, budget=b)) for b in (0.5, 0.35) for v in (0.0, 0.1, 1.0)]),
    "length": (
        "letters in the answer",
        [(f"{k}", m, dict(hops=k, method=m)) for k in (3, 6, 9, 12) for m in (*BOTH, "seq_is")],
    ),
}
DEFAULTS = dict(budget=0.5, lam=smd.Settings.lam, hops=smd.Settings.hops)


def draw(groups: dict[tuple[str, str], list], axis_label: str, path: Path) -> None:
    """Final accuracy with the sparse and the dense cache, KL and effective sample size, at each point of the sweep."""
    labels = list(dict.fromkeys(label for label, _ in groups))
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.6), layout="constrained")
    for axis, column in zip(axes, ("sparse %", "dense %", "KL(sparse‖dense)", "least ESS"), strict=True):
        ends, style = {}, itertools.cycle(("o-", "s--"))
        for line in dict.fromkeys(line for _, line in groups):
            at = [n for n, label in enumerate(labels) if (label, line) in groups]
            mean, half = zip(
                *(mean_and_interval([run[column] for run in groups[labels[n], line]]) for n in at), strict=True
            )
            axis.errorbar(at, mean, half, fmt=next(style), capsize=3, color=colour(line))
            ends[line] = at[-1], mean[-1]
        if "%" in column:
            base = [
                next(runs[0]["base " + column] for (at, _), runs in groups.items() if at == label) for label in labels
            ]
            axis.plot(base, ":", color="black", zorder=0)
            ends["base"] = len(labels) - 1, base[-1]
        axis.set(title=column, xlabel=axis_label, ylim=(0, 100) if "%" in column else (0, None))
        axis.set(xlim=(-0.2, 1.25 * len(labels) - 0.9))
        axis.set_xticks(range(len(labels)), labels, rotation=40 if len(labels) > 5 else 0)
        label_ends(axis, ends)
    save(figure, path)


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("sweep", choices=list(SWEEPS))
    parser.add_argument("--seeds", type=positive, default=3)
    given = parser.parse_args()
    axis_label, points = SWEEPS[given.sweep]
    jobs, place = {}, {}
    for seed in range(given.seeds):
        for label, line, settings in points:
            settings = (
                DEFAULTS | dict(policy=given.policy, method="smd", seed=seed) | settings | dict(steps=given.steps)
            )
            # a folder is named by all that is set, so that sweeps share the runs that they have in common
            folder = Path("out/sweep/runs") / "-".join(map(str, settings.values()))
            jobs[folder], place[folder] = settings, (label, line)
    with tqdm(total=len(jobs), desc=given.sweep) as bar:
        done = run_all(jobs, given.jobs, bar)
    groups: dict[tuple[str, str], list] = {}
    for folder, result in done.items():
        groups.setdefault(place[folder], []).append(figures(*result))
    name = f"{given.sweep}-{given.policy}"
    print(table({", ".join(at): runs for at, runs in groups.items()}, Path("out/sweep") / f"{name}.md"))
    draw(groups, axis_label, Path("out/sweep") / f"{name}.png")


if __name__ == "__main__":
    command(main)
