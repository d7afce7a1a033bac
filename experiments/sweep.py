"""Ablations: how many keys stay, which policy chooses them, the weight of track 2, the length of the answer.

    python -m experiments.sweep budget                  a grid of GRIDS: budget, eviction, lam, length
    python -m experiments.sweep lam --model smollm2     a grid of GRIDS_OF_MODEL: eviction, lam, answer

Three seeds each (--seeds); finished runs are kept. The learning rates are those that the search of
`experiments.compare` chose.
"""

import argparse
import itertools
from pathlib import Path

import smd
from experiments.common import SHOWN, add_flags, command, markdown, run_all
from harness.cli import require


def grid(**values) -> list[dict]:
    """All combinations of these values of settings."""
    return [dict(zip(values, row, strict=True)) for row in itertools.product(*values.values())]


BOTH, THREE = ("smd", "naive"), ("smd", "tis", "naive")
GRIDS = dict(
    budget=grid(budget=("100%", "75%", "50%", "35%", "25%"), method=BOTH),
    eviction=grid(eviction=smd.POLICIES, method=BOTH),
    lam=grid(budget=("50%", "35%"), lam=(0.0, 0.1, 1.0)),
    length=grid(asked=(3, 6, 9, 12), method=(*BOTH, "seq_is")),
)
GRIDS_OF_MODEL = dict(
    eviction=grid(eviction=smd.POLICIES),
    lam=grid(lam=(0.0, 0.1, 0.3)),
    # the third grid evicts only the response: an answer of three codes has 14 tokens, of which 4 keys stay
    answer=grid(asked=(1,), eviction=("snapkv", "random"), budget=("25%", "12%"), method=THREE)
    + grid(asked=(3,), eviction=("snapkv",), budget=("25%", "12%"), method=THREE)
    + grid(asked=(3,), protect=("prompt",), eviction=("random",), budget=(4,), window=(2,), method=THREE),
)
DEFAULTS = dict(method="smd", eviction="snapkv", budget="50%", lam=0.1, asked=6, lr=2e-4)
DEFAULTS_OF_MODEL = dict(method="smd", eviction="snapkv", budget="25%", lam=0.1, asked=1, lr=4e-5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", choices=list(GRIDS | GRIDS_OF_MODEL))
    add_flags(parser, seeds=3)
    given = parser.parse_args()
    grids, default = (GRIDS_OF_MODEL, DEFAULTS_OF_MODEL) if given.model else (GRIDS, DEFAULTS)
    case = "with --model" if given.model else "without --model"
    require(given.sweep in grids, f"{case}, sweep must be one of {', '.join(grids)}, got {given.sweep}")
    points = grids[given.sweep]
    default = dict(model=given.model) | default
    jobs = [default | point | dict(seed=seed) for seed in range(given.seeds) for point in points]
    out = Path("out/sweep-of-model" if given.model else "out/sweep")
    rows = run_all(out / "runs", jobs, given.jobs, out / f"{given.sweep}.csv")
    by = list(dict.fromkeys(name for point in points for name in point))
    print(markdown(rows, by, SHOWN))


if __name__ == "__main__":
    command(main)
