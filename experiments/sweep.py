"""Ablations: what is kept, who chooses it, how hard the dense policy follows, how long the answer is.

    python -m experiments.sweep budget                  the rows of SWEEPS: budget, eviction, lam, length
    python -m experiments.sweep lam --model smollm2     the rows of SWEEPS_OF_MODEL: eviction, lam, answer

Three seeds each (--seeds). What is finished is never run again; another length of the answer has its own base policy.
"""

if not __package__:  # then none of the project's modules is found
    raise SystemExit("run it from the project's folder: python -m experiments.sweep")

import argparse
import itertools
from pathlib import Path

from tqdm import tqdm

import smd
from experiments.common import command, figures, named, options, run_all, steps_of, table


def grid(**values) -> list[dict]:
    """All combinations of these values of settings."""
    return [dict(zip(values, row, strict=True)) for row in itertools.product(*values.values())]


BOTH, THREE = ("smd", "naive"), ("smd", "tis", "naive")
SWEEPS = dict(
    budget=grid(budget=("100%", "75%", "50%", "35%", "25%"), method=BOTH),
    eviction=grid(eviction=smd.POLICIES, method=BOTH),
    lam=grid(budget=("50%", "35%"), lam=(0.0, 0.1, 1.0)),
    length=grid(asked=(3, 6, 9, 12), method=(*BOTH, "seq_is")),
)
SWEEPS_OF_MODEL = dict(
    eviction=grid(eviction=smd.POLICIES),
    lam=grid(lam=(0.0, 0.1, 0.3)),
    # an answer of three codes has 14 tokens; beside the whole prompt, 4 keys of them are kept
    answer=grid(asked=(1,), eviction=("snapkv", "random"), budget=("25%", "12%"), method=THREE)
    + grid(asked=(3,), eviction=("snapkv",), budget=("25%", "12%"), method=THREE)
    + grid(asked=(3,), protect=("prompt",), eviction=("random",), budget=(4,), window=(2,), method=THREE),
)
# the learning rates are those that the search of `experiments.compare` chose
DEFAULTS = dict(method="smd", eviction="snapkv", budget="50%", lam=0.1, asked=6, lr=2e-4)
DEFAULTS_OF_MODEL = dict(method="smd", eviction="snapkv", budget="25%", lam=0.1, asked=1, lr=4e-5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", choices=list(SWEEPS | SWEEPS_OF_MODEL))
    options(parser, seeds=3)
    given = parser.parse_args()
    sweeps, default = (SWEEPS_OF_MODEL, DEFAULTS_OF_MODEL) if given.model else (SWEEPS, DEFAULTS)
    if given.sweep not in sweeps:
        parser.error(f"there is no sweep {given.sweep} {'with' if given.model else 'without'} a --model")
    points = sweeps[given.sweep]
    default = default | dict(steps=steps_of(given)) | ({"model": given.model} if given.model else {})
    jobs = [default | point | dict(seed=seed) for seed in range(given.seeds) for point in points]
    with tqdm(total=len(jobs), desc=given.sweep) as bar:
        done = run_all(Path("out/sweep/runs"), jobs, given.jobs, bar)
    groups = {}
    for n, point in enumerate(points):
        label = ", ".join(f"{name} {value}" for name, value in point.items())
        groups[label] = [figures(*run) for run in done[n :: len(points)]]
    print(table(groups, Path("out/sweep") / f"{named(given.sweep, given.model or 'toy')}.md"))


if __name__ == "__main__":
    command(main)
