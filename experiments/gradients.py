"""Which gradient does each method follow, and how noisy is one response's? Both as exact sums.

    python -m experiments.gradients          the distances: four seconds
    python -m experiments.gradients --noise  and then the noise: five minutes on one core

On a model whose responses can be enumerated, the one of the proofs in test_smd.py. Distances: relative, of a method's
expected gradient from those of J_sparse and J_dense; one response, its reward less a constant, before the first update.
Noise: tr Cov / ‖mean‖² over five random models; the reward of a response is a random number less its mean. There both
estimators are unbiased, SMD for the gradient of J_sparse, sequence weights for that of J_dense.
"""

if not __package__:  # then none of the project's modules is found
    raise SystemExit("run it from the project's folder: python -m experiments.gradients")

import argparse
import dataclasses
from pathlib import Path

import torch
from torch import Tensor

import smd
from experiments.common import command, table
from harness.report import Progress
from test_smd import World, distance, gradient

LENGTHS = range(1, 6)  # tokens of a response whose noise is computed


def distances() -> dict[str, list[dict]]:
    world = World()
    sparse, dense = (world.objective_gradient(dense) for dense in (False, True))
    log_ratio_BR = world.logp(dense=True).detach() - world.rollout.logp_BR
    weights = {"smd": torch.ones_like(log_ratio_BR), "naive": torch.ones_like(log_ratio_BR)}
    for name, method in smd.METHODS.items():
        if method.weight is not None:
            weights[name] = method.weight(log_ratio_BR, method.cap)
    weights["seq_is, cap 2"] = smd.sequence_is(log_ratio_BR, 2.0)
    weights["sparse_rl"] /= world.p @ weights["sparse_rl"].mean(dim=1)  # the exact mean, not that of a batch
    groups = {}
    for name, weight_BR in weights.items():
        # the clipped ratio is 1 before the first update, so its gradient is that of the log-probs
        advantage_B1 = (world.p * (world.reward - 0.3))[:, None]
        found = gradient((weight_BR * advantage_B1 * world.logp(dense=name != "smd")).sum(), world.model)
        groups[name] = [{"to J_sparse": distance(found, sparse), "to J_dense": distance(found, dense)}]
    return groups


def gradient_of(world: World, n: int, dense: bool) -> Tensor:
    """∇ log π(y) of the n-th response, from a rollout of that response alone."""
    r, only = world.rollout, slice(n, n + 1)
    part = dict(response_BR=r.response_BR[only], logp_BR=r.logp_BR[only], length_B=r.length_B[only])
    r = dataclasses.replace(r, **part, evicted_at_LBGT=r.evicted_at_LBGT[:, only])
    (hidden_XC,) = smd.replay(world.model, r, r.never_evicted_LBGT if dense else r.evicted_at_LBGT)
    return gradient(smd.response_logp(world.model, r, hidden_XC).sum(), world.model)


def noise(world: World, dense: bool, progress: Progress) -> float:
    """tr Cov / ‖mean‖² of w (r - E r) ∇ log π(y), y ~ π_sparse; w = π_dense / π_sparse if dense, else 1."""
    p_B = world.logp(dense).detach().sum(dim=1).exp()  # of y under the policy that is differentiated
    coefficient_B = p_B / world.p * (world.reward - p_B @ world.reward)
    each = []
    for n, coefficient in enumerate(coefficient_B):
        each.append(coefficient * gradient_of(world, n, dense))
        progress.step()
    each = torch.stack(each)
    mean = world.p @ each
    return ((world.p @ each.square().sum(dim=1) - mean.square().sum()) / mean.square().sum()).item()


def noises() -> dict[str, list[dict]]:
    """Least, median and most over five models."""
    groups = {}
    with Progress(desc="noise", total=2 * 5 * sum(4**length for length in LENGTHS)) as progress:
        for length in LENGTHS:
            row = {}
            for name, dense in (("smd", False), ("seq_is", True)):
                least, _, median, _, most = sorted(noise(World(seed, length), dense, progress) for seed in range(5))
                row |= {f"{name}, least": least, f"{name}, median": median, f"{name}, most": most}
            groups[f"{length} tokens"] = [row]
    return groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--noise", action="store_true", help="then print the noise of one response's gradient, too")
    given = parser.parse_args()
    print(table(distances(), Path("out/gradients.md")))
    if given.noise:
        print("tr Cov / |mean|^2 of one response's gradient, over five models")
        print(table(noises(), Path("out/noise.md")))


if __name__ == "__main__":
    command(main)
