"""Which gradient does each method follow, and how noisy is it for a single response? Both as exact sums.

    python -m experiments.gradients          the distances: four seconds
    python -m experiments.gradients --noise  also the noise: minutes

On the model of the proofs in test_smd.py, whose responses can be enumerated. Distances: of a method's expected gradient
from those of J_sparse and J_dense, relative, for one response, its reward less a constant, before the first update.
Noise: tr Cov / ‖mean‖² for five random models; a response's advantage is a random number less its mean. There both
estimators are unbiased, SMD for the gradient of J_sparse, sequence weights for that of J_dense.
"""

import argparse
import itertools

import torch
from tqdm import tqdm

from experiments.common import command, markdown
from test_smd import FOLLOWS, World, distances, gradient

LENGTHS = range(1, 5)  # tokens of a response whose noise is computed


def rows_of_distances() -> list[dict]:
    names = "to J_sparse", "to J_dense"
    return [dict(method=row) | dict(zip(names, distances(row), strict=True)) for row in FOLLOWS]


def noise(world: World, dense: bool) -> float:
    """tr Cov / ‖mean‖² of w (r - E r) ∇ log π(y), y ~ π_sparse; w = π_dense / π_sparse if dense, else 1."""
    logp_B = world.logp(dense).sum(dim=1)  # of the policy that is differentiated
    p_B = logp_B.detach().exp()
    coefficient_B = p_B / world.p * (world.reward - p_B @ world.reward)
    each = coefficient_B[:, None] * torch.stack([gradient(logp, world.model) for logp in logp_B])
    mean = world.p @ each
    return ((world.p @ each.square().sum(dim=1) - mean.square().sum()) / mean.square().sum()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--noise", action="store_true", help="also print the noise of one response's gradient")
    given = parser.parse_args()
    print(markdown(rows_of_distances(), ["method"]))
    if given.noise:
        rows = []
        for tokens, seed in tqdm(list(itertools.product(LENGTHS, range(5)))):
            world = World(seed, tokens)
            rows.append(dict(tokens=tokens, model=seed, smd=noise(world, False), seq_is=noise(world, True)))
        print("tr Cov / |mean|^2 of one response's gradient")
        print(markdown(rows, ["tokens", "model"]))


if __name__ == "__main__":
    command(main)
