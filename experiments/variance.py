"""How noisy is one response's gradient? tr Cov / ‖mean‖² of SMD and of sequence importance weights, enumerated.

    python -m experiments.variance          75 s on one core; writes assets/variance.png and prints the table

Five random models of the size that the proofs in test_smd.py use; all 4^k responses of k tokens are scored through the
real sampler, so that mean and covariance are sums, not estimates. The reward of a response is a random number less its
mean. Both estimators are unbiased, SMD for the gradient of J_sparse, sequence weights for that of J_dense.
"""

import dataclasses

import matplotlib.pyplot as plt
import torch

import smd
from test_smd import World, grads

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


def main() -> None:
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
    for (name, values), colour in zip(found.items(), ("#1f77b4", "#d62728"), strict=True):
        least, _, median, _, most = zip(*values, strict=True)
        axis.fill_between(LENGTHS, least, most, color=colour, alpha=0.2, linewidth=0)
        axis.plot(LENGTHS, median, "o-", color=colour)
        axis.annotate(
            name, (LENGTHS[-1], median[-1]), xytext=(6, 0), textcoords="offset points", color=colour, va="center"
        )
    axis.set(xlabel="response tokens", ylabel="tr Cov / ‖mean‖² of one response's gradient", yscale="log")
    axis.set(xticks=LENGTHS, xlim=(0.8, 5.6))  # room for the names
    figure.savefig("assets/variance.png", dpi=120)


if __name__ == "__main__":
    main()
