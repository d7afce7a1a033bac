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
import math

import torch
from torch import Tensor
from tqdm import tqdm

import smd
from experiments.common import command
from experiments.enumerated import World, distance, gradient
from harness.report import Progress

LENGTHS, SEEDS = range(1, 6), range(5)


def gradient_of(world: World, n: int, dense: bool) -> Tensor:
    """∇ log π(y) of the n-th response, from a rollout of that response alone."""
    r, only = world.rollout, slice(n, n + 1)
    part = dict(response_BR=r.response_BR[only], logp_BR=r.logp_BR[only], length_B=r.length_B[only])
    r = dataclasses.replace(r, **part, evicted_at_LBGT=r.evicted_at_LBGT[:, only])
    seen_LBGT = r.never_evicted_LBGT if dense else r.evicted_at_LBGT
    (hidden_XC,) = smd.replay(world.model, r, seen_LBGT)
    return gradient(smd.response_logp(world.model, r, hidden_XC).sum(), world.model)


def noise(world: World, dense: bool, progress: Progress) -> float:
    """tr Cov / ‖mean‖² of w (r - E r) ∇ log π(y), y ~ π_sparse; w = π_dense / π_sparse if dense, else 1."""
    with torch.no_grad():
        p_B = world.logp(dense).sum(dim=1).exp()  # of y under the policy that is differentiated
    coefficient_B = p_B / world.p * (world.reward - p_B @ world.reward)
    each = []
    for n, coefficient in enumerate(coefficient_B):
        each.append(coefficient * gradient_of(world, n, dense))
        progress.step()
    each = torch.stack(each)
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
    worlds = {length: [World(seed, length) for seed in SEEDS] for length in LENGTHS}
    responses = sum(len(world.responses) for of_length in worlds.values() for world in of_length)
    with Progress("noise", 2 * responses) as progress:
        for length in LENGTHS:
            line = f"{length:6}"
            for dense in (False, True):
                least, _, median, _, most = sorted(noise(world, dense, progress) for world in worlds[length])
                line += f"{median:12.1f} ({least:.1f}, {most:.1f})".rjust(30)
            tqdm.write(line)  # above the bar


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--noise", action="store_true", help="then print the noise of one response's gradient, too")
    given = parser.parse_args()
    distances()
    if given.noise:
        noises()


if __name__ == "__main__":
    command(main)
