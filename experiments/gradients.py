"""Which gradient does each method follow, and how noisy is one response's? Both as exact sums.

    python -m experiments.gradients          prints two tables

On a model whose responses can be enumerated, the one of the proofs in test_smd.py. Distances: relative, of a method's
expected gradient from those of J_sparse and J_dense; one response, its reward less a constant, before the first update.
Noise: tr Cov / ‖mean‖² over five random models; the reward of a response is a random number less its mean. There both
estimators are unbiased, SMD for the gradient of J_sparse, sequence weights for that of J_dense.
"""

if not __package__:  # then none of the project's modules is found
    raise SystemExit("run it from the project's folder: python -m experiments.gradients")

import argparse
import dataclasses
import math

import torch
from torch import Tensor

import smd
from experiments.common import command
from experiments.enumerated import World, distance, gradient

LENGTHS, SEEDS = range(1, 6), range(5)


def gradient_of(world: World, n: int, dense: bool) -> Tensor:
    """∇ log π(y) of the n-th response, from a rollout of that response alone."""
    r, only = world.rollout, slice(n, n + 1)
    part = dict(response_BR=r.response_BR[only], logp_BR=r.logp_BR[only], length_B=r.length_B[only])
    r = dataclasses.replace(r, **part, evicted_at_LBGT=r.evicted_at_LBGT[:, only])
    seen_LBGT = r.never_evicted_LBGT if dense else r.evicted_at_LBGT
    (hidden_XC,) = smd.replay(world.model, r, seen_LBGT)
    return gradient(smd.response_logp(world.model, r, hidden_XC).sum(), world.model)


def noise(world: World, dense: bool) -> float:
    """tr Cov / ‖mean‖² of w (r - E r) ∇ log π(y), y ~ π_sparse; w = π_dense / π_sparse if dense, else 1."""
    with torch.no_grad():
        p_B = world.logp(dense).sum(dim=1).exp()  # of y under the policy that is differentiated
    coefficient_B = p_B / world.p * (world.reward - p_B @ world.reward)
    each = torch.stack([c * gradient_of(world, n, dense) for n, c in enumerate(coefficient_B)])
    mean = world.p @ each
    return ((world.p @ each.square().sum(dim=1) - mean.square().sum()) / mean.square().sum()).item()


def distances() -> None:
    world = World()
    sparse, dense = (world.objective_gradient(dense) for dense in (False, True))
    log_ratio_BR = world.logp(dense=True).detach() - world.rollout.logp_BR
    everywhere_BR = torch.ones_like(log_ratio_BR, dtype=torch.bool)
    weights = {"smd": None, "naive": None}
    weights |= {"tis, cap 2": smd.token_is(log_ratio_BR, everywhere_BR, 2.0)}
    weights |= {f"seq_is, cap {cap:g}": smd.sequence_is(log_ratio_BR, everywhere_BR, cap) for cap in (math.inf, 2.0)}
    veto_BR = smd.sparse_rl(log_ratio_BR, everywhere_BR, 1.5)
    weights["sparse_rl"] = veto_BR / (world.p @ veto_BR.mean(dim=1))  # over the exact mean, not a batch's
    print(f"{'':16}{'to J_sparse':>12}{'to J_dense':>12}")
    for name, weight_BR in weights.items():
        got = world.expected(name.split(",")[0], world.p * (world.reward - 0.3), weight_BR)
        print(f"{name:16}{distance(got, sparse):12.2g}{distance(got, dense):12.2g}")


def noises() -> None:
    print("tr Cov / |mean|^2, median (least, most) over five models")
    print("tokens" + "".join(f"{name:>30}" for name in ("smd", "seq_is")))
    for length in LENGTHS:
        worlds = [World(seed, length) for seed in SEEDS]
        line = f"{length:6}"
        for dense in (False, True):
            least, _, median, _, most = sorted(noise(world, dense) for world in worlds)
            line += f"{median:12.1f} ({least:.1f}, {most:.1f})".rjust(30)
        print(line, flush=True)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    distances()
    noises()


if __name__ == "__main__":
    command(main)
