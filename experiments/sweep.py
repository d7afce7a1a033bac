"""Ablations: what is kept, who chooses it, how hard the dense policy follows, how long the answer is.

    python -m experiments.sweep budget      kept share 100, 75, 50, 35, 25 %: smd, naive
    python -m experiments.sweep policy      every eviction policy at 50 %: smd, naive
    python -m experiments.sweep lam         λ = 0, 0.1, 1 at 50 and at 35 %: smd
    python -m experiments.sweep length      answers of 3, 6, 9, 12 letters: smd, naive, seq_is

Three seeds each (--seeds), 200 steps (--steps). What is finished is never run again; another task length has its own
base policy.
"""

from pathlib import Path

import matplotlib.pyplot as plt
from tqdm import tqdm

import smd
from experiments.runs import COLOURS, command, figures, mean_and_interval, options, run_all, save, table

# sweep -> its axis, and the points on it: (label, settings, methods)
BOTH, SHARES = ("smd", "naive"), (1.0, 0.75, 0.5, 0.35, 0.25)
LAMS = [(lam, share) for share in (0.5, 0.35) for lam in (0.0, 0.1, 1.0)]
SWEEPS = {
    "budget": ("keys kept, share of the prompt", [(f"{share:.0%}", dict(budget=share), BOTH) for share in SHARES]),
    "policy": ("eviction policy", [(policy, dict(policy=policy), BOTH) for policy in smd.POLICIES]),
    "lam": ("λ, keys kept", [(f"{lam:g}, {b:.0%}", dict(lam=lam, budget=b), ("smd",)) for lam, b in LAMS]),
    "length": ("letters in the answer", [(f"{k}", dict(hops=k), (*BOTH, "seq_is")) for k in (3, 6, 9, 12)]),
}
DEFAULTS = dict(budget=0.5, lam=smd.Settings.lam, hops=smd.Settings.hops)


def draw(groups: dict[tuple[str, str], list], axis_label: str, path: Path) -> None:
    """Final accuracy with the sparse and the dense cache, KL and effective sample size, at each point of the sweep."""
    labels = list(dict.fromkeys(label for label, _ in groups))
    columns = "sparse %", "dense %", "KL(sparse‖dense)", "least ESS"
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.4), layout="constrained")
    for axis, column in zip(axes, columns, strict=True):
        for method in dict.fromkeys(method for _, method in groups):
            at = [n for n, label in enumerate(labels) if (label, method) in groups]
            pairs = [mean_and_interval([run[column] for run in groups[labels[n], method]]) for n in at]
            mean, half = zip(*pairs, strict=True)
            axis.errorbar(at, mean, half, fmt="o-", capsize=3, color=COLOURS[method], label=method)
        axis.set(title=column, xlabel=axis_label, ylim=(0, 100) if "%" in column else (0, None))
        axis.set_xticks(range(len(labels)), labels, rotation=30 if len(labels) > 5 else 0)
    axes[0].legend(frameon=False)
    save(figure, path)


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("sweep", choices=list(SWEEPS))
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    axis_label, points = SWEEPS[given.sweep]
    jobs, group_of = {}, {}
    for seed in range(given.seeds):
        for label, settings, methods in points:
            for method in methods:
                settings = DEFAULTS | dict(policy=given.policy, method=method, seed=seed) | settings
                # a folder is named by all that is set, so that sweeps share the runs that they have in common
                folder = Path("out/sweep/runs") / "-".join(str(value) for value in (*settings.values(), given.steps))
                jobs[folder], group_of[folder] = dict(settings, steps=given.steps), (label, method)
    with tqdm(total=len(jobs), desc=given.sweep) as bar:
        done = run_all(jobs, given.jobs, bar)
    groups: dict[tuple[str, str], list] = {}
    for folder, result in done.items():
        groups.setdefault(group_of[folder], []).append(figures(*result))
    out = Path("out/sweep")
    print(table({f"{label}, {method}": runs for (label, method), runs in groups.items()}, out / f"{given.sweep}.md"))
    draw(groups, axis_label, out / f"{given.sweep}.png")


if __name__ == "__main__":
    command(main)
