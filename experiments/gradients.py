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

import smd
from experiments.common import command, markdown
from test_smd import World, distance, gradient

LENGTHS = range(1, 5)  # tokens of a response whose noise is computed


def distances() -> list[dict]:
    world = World()
    sparse, dense = (world.objective_gradient(dense) for dense in (False, True))
    log_ratio_BR = world.logp(dense=True).detach() - world.rollout.logp_BR
    weights = {"smd": torch.ones_like(log_ratio_BR), "naive": torch.ones_like(log_ratio_BR)}
    for name, method in smd.METHODS.items():
        if method.weight is not None:
            weights[name] = method.weight(log_ratio_BR, method.cap)
    weights["seq_is, cap 2"] = smd.sequence_is(log_ratio_BR, 2.0)
    weights["sparse_rl"] /= world.p @ weights["sparse_rl"].mean(dim=1)  # the exact mean, not that of a batch
    rows = []
    for name, weight_BR in weights.items():
        # the clipped ratio is 1 before the first update, so its gradient is that of the log-probs
        advantage_B1 = (world.p * (world.reward - 0.3))[:, None]
        found = gradient((weight_BR * advantage_B1 * world.logp(dense=name != "smd")).sum(), world.model)
        rows.append({"method": name, "to J_sparse": distance(found, sparse), "to J_dense": distance(found, dense)})
    return rows


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
    print(markdown(distances(), ["method"]))
    if given.noise:
        rows = []
        for tokens, seed in tqdm(list(itertools.product(LENGTHS, range(5)))):
            world = World(seed, tokens)
            rows.append(dict(tokens=tokens, model=seed, smd=noise(world, False), seq_is=noise(world, True)))
        print("tr Cov / |mean|^2 of one response's gradient")
        print(markdown(rows, ["tokens", "model"]))


if __name__ == "__main__":
    command(main)
