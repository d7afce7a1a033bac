"""Which gradient does each method follow, and how noisy is one response's? Both as exact sums.

    python -m experiments.gradients          88 s on 2 cores; prints two tables and writes assets/variance.png

On the models of the proofs in test_smd.py, so small that all 4^k responses of k tokens can be scored through the real
sampler. Distances: relative, of a method's expected gradient from those of J_sparse and J_dense; one response, its
reward less a constant, before the first update. Noise: tr Cov / ‖mean‖² over five random models; the reward of a
response is a random number less its mean. There both estimators are unbiased, SMD for the gradient of J_sparse,
sequence weights for that of J_dense.
"""

import argparse
import dataclasses
import math
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import smd
from experiments.runs import COLOURS, command, save
from test_smd import World, apart, grads

LENGTHS, SEEDS = range(1, 6), range(5)


def gradient(world: World, n: int, dense: bool) -> torch.Tensor:
    """∇ log π(y) of the n-th response, from a rollout of that response alone."""
    r, only = world.rollout, slice(n, n + 1)
    part = dict(response_BR=r.response_BR[only], logp_BR=r.logp_BR[only], length_B=r.length_B[only])
    r = dataclasses.replace(r, **part, evicted_at_LBGT=r.evicted_at_LBGT[:, only])
    record, prompts = r.dense_LBGT if dense else r.evicted_at_LBGT, smd.encode_prompts(world.model, r)
    logits = world.model.logits(smd.replay(world.model, r, prompts, record))
    return grads(smd.token_logp(logits, r.response_BR[0]).sum(), world.model)


def noise(world: World, dense: bool) -> float:
    """tr Cov / ‖mean‖² of w (r - E r) ∇ log π(y), y ~ π_sparse; w = π_dense / π_sparse if dense, else 1."""
    with torch.no_grad():
        p_B = world.logp(dense).sum(dim=1).exp()  # of y under the policy that is differentiated
    coefficient_B = p_B / world.p * (world.reward - p_B @ world.reward)
    each = torch.stack([c * gradient(world, n, dense) for n, c in enumerate(coefficient_B)])
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
        print(f"{name:16}{apart(got, sparse):12.2g}{apart(got, dense):12.2g}")


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    distances()
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    print(
        "tr Cov / |mean|^2, median (least, most) over five models\ntokens"
        + "".join(f"{n:>30}" for n in ("smd", "seq_is"))
    )
    found = {name: [] for name in ("smd", "seq_is")}
    for length in LENGTHS:
        worlds = [World(seed, length) for seed in SEEDS]
        line = f"{length:6}"
        for name, values in found.items():
            values.append(sorted(noise(world, dense=name == "seq_is") for world in worlds))
            line += f"{values[-1][2]:12.1f} ({values[-1][0]:.1f}, {values[-1][-1]:.1f})".rjust(30)
        print(line, flush=True)
    for name, values in found.items():
        least, _, median, _, most = zip(*values, strict=True)
        axis.fill_between(LENGTHS, least, most, color=COLOURS[name], alpha=0.2, linewidth=0)
        axis.plot(LENGTHS, median, "o-", color=COLOURS[name])
        axis.annotate(name, (5.1, median[-1]), color=COLOURS[name], va="center")
    axis.set(xlabel="response tokens", ylabel="tr Cov / ‖mean‖² of one response's gradient", yscale="log")
    axis.set(xticks=LENGTHS, xlim=(0.8, 5.6))  # room for the names
    save(figure, Path("assets/variance.png"))


if __name__ == "__main__":
    command(main)
