"""A model so small that all of its responses can be enumerated: every expectation is a sum, nothing is estimated.

4 tokens, a prompt of 12, responses of exactly 3 tokens, so that there are 64; each is scored through the real sampler
with a budget of 8 keys. What is proved on it in test_smd.py, `experiments.gradients` prints.
"""

import dataclasses
import itertools

import torch
from torch import Tensor

import smd
from tiny_model import ModelConfig, TinyModel

EVICTION = smd.Eviction("snapkv", 8, interval=1, window=2, sinks=1, pool=5)


def gradient(loss: Tensor, model: TinyModel) -> Tensor:
    """Gradient of the loss in all weights, as one vector."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def distance(got: Tensor, want: Tensor) -> float:
    """‖got - want‖ / ‖want‖."""
    return ((got - want).norm() / want.norm()).item()


class World:
    """One prompt, all its responses with a reward for each, and what the sampler recorded of them."""

    def __init__(self, seed: int = 4, length: int = 3):
        # weights larger than at a fresh start: attention and distributions sharp enough to differ much
        config = ModelConfig(vocab=4, width=16, layers=2, heads=2, kv_heads=1, ffn=24)
        self.model = TinyModel(config, seed).double()
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.mul_(15.0 if name.startswith("embed") else 3.0 if p.ndim == 2 else 1.0)
        generator = torch.Generator().manual_seed(seed)
        self.prompt = torch.randint(4, (1, 12), generator=generator)
        self.responses = torch.tensor(list(itertools.product(range(4), repeat=length)))
        self.reward = torch.rand(len(self.responses), generator=generator, dtype=torch.float64)
        self.rollout = self.score()
        self.p = self.rollout.logp_BR.sum(dim=1).exp()  # of each response

    def score(self, eviction: smd.Eviction | None = EVICTION) -> smd.Rollout:
        """All responses through the sampler; None for a full cache."""
        count, length = self.responses.shape
        no_eos = -1
        no_padding = torch.tensor([0])
        return smd.sample(
            self.model, self.prompt, no_padding, count, length, no_eos, eviction, forced_BR=self.responses
        )

    def logits(self, evicted_at_LBGT: Tensor, model: TinyModel | None = None) -> Tensor:
        model = model or self.model
        return model.logits(smd.replay(model, self.rollout, evicted_at_LBGT)[0])

    def logp(self, dense: bool) -> Tensor:
        """Differentiable log-probs (responses, tokens) of π_dense or π_shadow."""
        seen_LBGT = self.rollout.never_evicted_LBGT if dense else self.rollout.evicted_at_LBGT
        return smd.response_logp(self.model, self.rollout, smd.replay(self.model, self.rollout, seen_LBGT)[0])

    def objective_gradient(self, dense: bool) -> Tensor:
        """∇J = ∇ Σ_y p(y) r(y)."""
        return gradient((self.logp(dense).sum(dim=1).exp() * self.reward).sum(), self.model)

    def expected(self, method: str, coefficient_B: Tensor, weight_BR: Tensor | None = None) -> Tensor:
        """-Σ_y coefficient(y) · ∇ of the learner's loss of y with advantage 1, summed over tokens."""
        s = smd.Settings(method=method, lam=0.0, max_new=self.responses.shape[1])
        policy = smd.Policy(self.model, s)
        batch = smd.prepare(policy, self.rollout, self.reward, s)
        batch = dataclasses.replace(batch, advantage_BR=coefficient_B[:, None].expand_as(batch.weight_BR))
        if weight_BR is not None:
            batch = dataclasses.replace(batch, weight_BR=weight_BR)
        return -gradient(smd.learner_loss(policy, batch, s)[0], self.model) * self.responses.numel()
