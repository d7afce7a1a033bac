"""`python -m experiments.walkthrough` shows the method on eight tokens, with a model of 1,000 weights.

Each claim is asserted before its numbers are printed. Letters as in smd.py.
"""

import torch
from torch import Tensor
from torch.autograd import grad
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import smd
from kernel import NEVER, ShadowMask, shadow_attention
from tiny_model import ModelConfig, TinyModel

LETTERS = "abcdefgh"
P, R = 5, 3  # tokens of the prompt and of the response


def sample(model: TinyModel, prompt_NP: Tensor, forced_BR: Tensor | None = None) -> smd.Rollout:
    eviction = smd.Eviction("snapkv", budget=3, interval=1, window=1, sinks=0, pool=1)
    return smd.sample(model, prompt_NP, torch.tensor([0]), 1, R, -1, eviction, forced_BR=forced_BR)


def learner(model: TinyModel, r: smd.Rollout, mask_LBGT: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Log-probs of the response tokens under a mask, and the queries and keys of each layer."""
    tokens_BT = torch.cat((r.prompt_NP, r.response_BR[:, :-1]), dim=1)
    mask, layers = ShadowMask(mask_LBGT[..., :-1]), []

    def attend(l: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layers.append((q[0, 0], k[0, 0]))
        return shadow_attention(q, k, v, mask[l])

    hidden_BTC = model.extend(model.embed_tokens(tokens_BT), torch.arange(P + R - 1)[None], attend)
    return smd.gather_logp(model.log_probs(hidden_BTC[0, P - 1 :]), r.response_BR[0]), layers


def shown(values: Tensor) -> str:
    return "".join(f"{x:9.4f}" for x in values.tolist())


def show_sampler(model: TinyModel, r: smd.Rollout) -> None:
    names = [LETTERS[token] for token in (*r.prompt_NP[0], *r.response_BR[0])]
    print("1. Attention of the prompt's last token to each key. Its own key and the two best others are kept.")
    print("            " + "        ".join(names[:P]))
    for l, (q, k) in enumerate(learner(model, r, r.evicted_at_LBGT)[1]):
        score_P = (k[:P] @ q[P - 1] * k.shape[1] ** -0.5).softmax(dim=0)
        gone = [j for j in range(P) if r.evicted_at_LBGT[l, 0, 0, j] == P]
        assert sorted([*gone, *score_P[:-1].topk(2).indices.tolist(), P - 1]) == list(range(P))
        print(f"   layer {l + 1}{shown(score_P)}   evicted: {' and '.join(names[j] for j in gone)}")
    print("2. Three tokens are sampled. The first two enter the cache, which is compressed after each. Probabilities:")
    print("            " + "        ".join(names[P:]) + f"\n          {shown(r.logp_BR[0].exp())}")
    print("3. evicted_at, the first query that can no longer see the key. 'never': all queries of the response saw it.")
    for l, row in enumerate(r.evicted_at_LBGT[:, 0, 0].tolist()):
        ends = [f"{name} {'never' if end == NEVER else end}" for name, end in zip(names, row, strict=True)]
        print(f"   layer {l + 1}: {', '.join(ends)}")
        for i in range(P - 1, P + R - 1):
            seen = [names[j] if i < row[j] else "·" for j in range(i + 1)]
            assert i == P - 1 or len(seen) - seen.count("·") == 4, "three keys and the query's own"
            print(f"      query {i} ({names[i]}): {' '.join(seen)}")


def show_learners(model: TinyModel, r: smd.Rollout) -> None:
    deleted_T = (r.evicted_at_LBGT[:, 0, 0] == P).all(dim=0)  # evicted by both layers when the prompt ended
    deletion_LBGT = r.evicted_at_LBGT.masked_fill(deleted_T, 0)  # no query ever sees them
    masks = {"sampler's mask": r.evicted_at_LBGT, "full mask": r.never_evicted_LBGT, "deletion": deletion_LBGT}
    results = {name: learner(model, r, mask_LBGT) for name, mask_LBGT in masks.items()}
    print("4. Log-probs of the three tokens, and the ratio of the learner's probability of all three to the sampler's.")
    print("   It is 1 under the sampler's mask only. 'deletion' hides the key that both layers evicted.")
    print(f"   {'sampler':14}{shown(r.logp_BR[0])}")
    for name, (logp, _) in results.items():
        ratio = (logp.sum() - r.logp_BR.sum()).exp().item()
        (hidden_XC,) = smd.replay(model, r, masks[name])
        assert name == "deletion" or torch.allclose(smd.response_logp(model, r, hidden_XC)[0], logp)
        assert (shown(logp) == shown(r.logp_BR[0])) == (abs(ratio - 1) < 1e-12) == (name == "sampler's mask")
        print(f"   {name:14}{shown(logp)}   ratio {ratio:.4f}")
    layers = zip(results["sampler's mask"][1], results["deletion"][1], strict=True)
    errors = [(k - wrong_k)[~deleted_T[:-1]].abs().max().item() for (_, k), (_, wrong_k) in layers]
    assert errors[0] == 0 and errors[1] > 0.1
    name = LETTERS[r.prompt_NP[0][deleted_T[:P]].item()]
    print("   Deleting {} changes later keys by {:.4f} in layer 1 and up to {:.4f} in layer 2.".format(name, *errors))
    weights = list(model.parameters())
    direction = torch.nn.functional.normalize(torch.randn(1000, dtype=torch.float64), dim=0)
    slopes = {name: parameters_to_vector(grad(logp.sum(), weights)) @ direction for name, (logp, _) in results.items()}
    start, totals = parameters_to_vector(weights).detach(), []
    for step in (1e-5, -1e-5, 0):
        vector_to_parameters(start + step * direction, weights)
        totals.append(sample(model, r.prompt_NP, r.response_BR).logp_BR.sum().item())
    slope = (totals[0] - totals[1]) / 2e-5
    print("5. Slope of the response's log-prob along a random direction of the weights.")
    print(f"   {'sampler':14}{slope:9.4f}   by finite differences")
    for name, found in slopes.items():
        assert (abs(found - slope) < 1e-6) == (name == "sampler's mask")
        print(f"   {name:14}{found:9.4f}")


def show_track_2(model: TinyModel, r: smd.Rollout) -> None:
    def kl() -> Tensor:
        shadow, dense = smd.replay(model, r, r.evicted_at_LBGT, r.never_evicted_LBGT)
        return smd.kl_divergence(model.log_probs(dense), model.log_probs(shadow).detach()).mean()

    before = kl()
    before.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert kl() < before
    print("6. One gradient step of track 2 moves the policy under the full mask towards the sampler's policy.")
    print(f"   KL(π_dense ‖ π_shadow): {before.item():.4f} -> {kl().item():.4f} nats a token")


def main() -> None:
    torch.manual_seed(217)  # with this seed, all eight tokens differ
    model = TinyModel(ModelConfig(vocab=8, width=8, layers=2, heads=1, kv_heads=1, ffn=8), seed=217).double()
    model.embed_tokens.weight.data *= 20.0  # so that probabilities and attention are not flat
    rollout = sample(model, torch.tensor([[0, 3, 1, 4, 2]]))
    for show in (show_sampler, show_learners, show_track_2):
        show(model, rollout)


if __name__ == "__main__":
    main()
