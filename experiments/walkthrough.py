"""The method on eight tokens: every step on a model of 984 weights, with the numbers that it computes.

    python -m experiments.walkthrough

A prompt of five tokens is read, each layer evicts two of its keys, and three tokens are sampled. The learner replays
them under the shadow mask. Every claim is asserted before it is printed.
"""

if not __package__:  # then none of the project's modules is found
    raise SystemExit("run it from the project's folder: python -m experiments.walkthrough")

from dataclasses import replace

import torch
from torch import Tensor

import smd
from experiments.common import command
from kernel import NEVER, ShadowMask, masked_attention
from tiny_model import ModelConfig, TinyModel

LETTERS = "abcdef"
NO_PADDING = torch.zeros(1, dtype=torch.long)
EVICTION = smd.Eviction("snapkv", budget=3, interval=1, window=1, sinks=0, pool=1)
P, STEP = 5, 1e-5


def numbers(values) -> str:
    return "  ".join(f"{value:8.4f}" for value in values)


def replayed(model: TinyModel, r: smd.Rollout, mask_LBGT: Tensor) -> Tensor:
    """The learner's log-probs of the three tokens under a mask."""
    return smd.response_logp(model, r, smd.replay(model, r, mask_LBGT)[0])[0]


def deleted(model: TinyModel, r: smd.Rollout, column_K: Tensor, keys: list) -> Tensor:
    """The same by a learner that deletes tokens and leaves these columns, at their true positions."""
    mask = ShadowMask(r.evicted_at_LBGT[..., column_K].contiguous())

    def attend(l: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys.append(k[0, 0])
        visible_KK = (column_K <= column_K[:, None]) & (column_K[:, None] < mask[l].evicted_at[0, 0])
        return masked_attention(q, k, v, ~visible_KK[None, None])[0]

    token_K = torch.cat((r.prompt_NP[0], r.response_BR[0]))[column_K]
    hidden_KC = model.extend(model.embed_tokens(token_K)[None], column_K[None], attend)[0, -3:]
    return smd.gather_logp(model.log_probs(hidden_KC), r.response_BR[0])


def gradient(loss: Tensor, model: TinyModel) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def shifted(model: TinyModel, direction: Tensor) -> None:
    """Move all weights by a vector."""
    with torch.no_grad():
        for p, d in zip(model.parameters(), direction.split([p.numel() for p in model.parameters()]), strict=True):
            p += d.view_as(p)


def show_sampler(model: TinyModel, prompt_NP: Tensor) -> smd.Rollout:
    scores = []

    def score(cache: smd.LayerCache) -> Tensor:
        scores.append(smd.snapkv(cache))
        return scores[-1]

    smd.POLICIES["shown"] = smd.POLICIES["snapkv"]._replace(score=score)
    r = smd.sample(model, prompt_NP, NO_PADDING, 1, 3, -1, replace(EVICTION, policy="shown"))
    names = [LETTERS[t] for t in (*prompt_NP[0], *r.response_BR[0])]
    print(
        "1. The prompt's keys, scored by the attention of its last query; the budget keeps three, the last one always"
    )
    print("            " + "         ".join(names[:P]))
    for l in range(2):
        evicted = [j for j in range(P) if r.evicted_at_LBGT[l, 0, 0, j] == P]
        kept_scores = [scores[l][0, 0, j] for j in range(P - 1) if j not in evicted]
        assert max(scores[l][0, 0, j] for j in evicted) <= min(kept_scores)
        print(f"   layer {l + 1} {numbers(scores[l][0, 0])}   evict {' and '.join(names[j] for j in evicted)}")
    print("2. Three tokens, drawn with at most four keys in the cache, and the log-prob of each under that cache")
    print(f"   {'         '.join(names[P:])}\n{numbers(r.logp_BR[0])}")
    print("3. evicted_at, one integer per key, and the mask that it means: a line for each query")
    for l, row in enumerate(r.evicted_at_LBGT[:, 0, 0].tolist()):
        ends = (f"{name} {'never' if at == NEVER else at}" for name, at in zip(names, row, strict=True))
        print(f"   layer {l + 1}: {', '.join(ends)}")
        for i in range(P - 1, 7):
            print(f"      query {i} ({names[i]}): {' '.join(names[j] if i < row[j] else '·' for j in range(i + 1))}")
    return r


def show_learners(model: TinyModel, r: smd.Rollout) -> None:
    shadow, dense = replayed(model, r, r.evicted_at_LBGT), replayed(model, r, r.never_evicted_LBGT)
    assert (shadow - r.logp_BR[0]).abs().max() < 1e-12 and (dense - r.logp_BR[0]).abs().max() > 1e-3
    gone = (r.evicted_at_LBGT[:, 0, 0] <= P).all(dim=0)
    assert gone.any(), "no token was evicted by both layers"
    kept_K, all_keys, kept_keys = torch.arange(7)[~gone[:7]], [], []
    deleted(model, r, torch.arange(7), all_keys)
    delete = deleted(model, r, kept_K, kept_keys)
    print(
        "4. The learner's log-probs of the same three tokens, and the ratio to the sampler's probability of all three"
    )
    for name, logp in (("under the mask", shadow), ("under all keys", dense), ("with deletion ", delete)):
        print(f"   {name} {numbers(logp)}   ratio {(logp.sum() - r.logp_BR.sum()).exp():.4f}")
    errors = [(one[~gone[:7]] - two).abs().max().item() for one, two in zip(all_keys, kept_keys, strict=True)]
    assert errors[0] == 0 and errors[1] > 1e-3
    deletion = " and ".join(LETTERS[t] for t in r.prompt_NP[0][gone[:P]])
    print(f"   Both layers evicted {deletion}. Deleting it changes no key of layer 1, but the keys of layer 2 by up to")
    print(f"   {errors[1]:.4f}, because the tokens that were kept had attended to it in layer 1.")
    direction = torch.randn(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    direction /= direction.norm()
    slopes = [gradient(logp.sum(), model) @ direction for logp in (shadow, dense, delete)]
    values = []
    for sign in (1, -1):
        shifted(model, sign * STEP * direction)
        again = smd.sample(model, r.prompt_NP, NO_PADDING, 1, 3, -1, EVICTION, forced_BR=r.response_BR)
        values.append(again.logp_BR.sum())
        shifted(model, -sign * STEP * direction)
    slope = (values[0] - values[1]) / (2 * STEP)
    assert abs(slopes[0] - slope) < 1e-6 * abs(slope) < abs(slopes[1] - slope)
    print("5. The slope of log π(response) along a random direction of the weights")
    print(f"   the sampler alone, by finite differences {slope:8.4f}")
    print("   learner: mask {:8.4f}, all keys {:8.4f}, deletion {:8.4f}".format(*slopes))


def show_track_2(model: TinyModel, r: smd.Rollout) -> None:
    def kl() -> Tensor:
        shadow, dense = smd.replay(model, r, r.evicted_at_LBGT, r.never_evicted_LBGT)
        return smd.kl_divergence(model.log_probs(dense), model.log_probs(shadow).detach()).mean()

    before = kl()
    shifted(model, -0.01 * gradient(before, model))
    assert kl() < before
    print(
        f"6. One gradient step of track 2: KL(π_dense ‖ π_shadow) {before.item():.4f} -> {kl().item():.4f} nats a token"
    )


def main() -> None:
    torch.manual_seed(0)
    model = TinyModel(ModelConfig(vocab=6, width=8, layers=2, heads=1, kv_heads=1, ffn=8), seed=0).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(20.0 if name.startswith("embed") else 1.5)  # distributions and attention that are not flat
    rollout = show_sampler(model, torch.tensor([[0, 3, 1, 4, 2]]))
    show_learners(model, rollout)
    show_track_2(model, rollout)


if __name__ == "__main__":
    command(main)
