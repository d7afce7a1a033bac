"""What an objective needs that the method does not: PPO's critic, DPO's pairs, the distance to a frozen reference.

But for `Policy`, plain tensors. B sequences of R response columns, N prompts with S samples each, X response tokens.
"""

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny_model import TinyModel, wide

GAE_LAMBDA = 0.95  # as in PPO's paper
VALUE_COEF = 0.5  # of the critic's loss, likewise
DPO_BETA = 0.1  # how far the policy may leave the base policy, as in DPO's paper


class Policy(nn.Module):
    """What is trained: the model and, with ppo, a critic on its hidden states; and the frozen base policy, if used."""

    def __init__(self, model: TinyModel, settings):
        super().__init__()
        self.model = model
        self.critic = self.reference = None
        if settings.objective == "ppo":
            self.critic = nn.Linear(model.config.width, 1).to(model.norm.weight)
            nn.init.zeros_(self.critic.weight)
            nn.init.zeros_(self.critic.bias)
        if settings.objective == "dpo" or settings.kl_ref:
            self.reference = copy.deepcopy(model).requires_grad_(False)

    def optimizer(self, lr: float) -> torch.optim.AdamW:
        """Of all that is trained."""
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def value(self, hidden_XC: Tensor) -> Tensor:
        """What the critic expects as the reward (X,)."""
        return self.critic(hidden_XC)[:, 0].to(wide(hidden_XC.dtype))


class Counts(NamedTuple):
    """What the means of a loss are taken over."""

    sequences: float
    tokens: float
    pairs: float  # prompts whose samples have different rewards, which DPO compares

    @classmethod
    def of(cls, mask_BR: Tensor, reward_NS: Tensor) -> "Counts":
        pairs = (reward_NS.amax(dim=1) > reward_NS.amin(dim=1)).sum().item()
        return cls(len(mask_BR), mask_BR.sum().item(), pairs)

    def over(self, whole: "Counts") -> "Counts":
        """The share of each in a whole."""
        return Counts(*(n / max(1, of) for n, of in zip(self, whole, strict=True)))


class Seam:
    """Where a backward pass halts: it goes all the way through what comes after the seam, then through what is before.

    A weight used on both sides gets its gradient from one, and then the other's on top. In a single pass the first
    would wait for the second, beside what earlier parts of a batch have left: all gradients twice.
    """

    def __init__(self):
        self.before: list[Tensor] = []
        self.after: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        """The same numbers, but where they come from is left to `backward`."""
        self.before.append(x)
        self.after.append(x.detach().requires_grad_())
        return self.after[-1]

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        torch.autograd.backward(self.before, [x.grad for x in self.after])


def same_shape(**tensors: Tensor) -> None:
    """ValueError unless these have one shape: broadcasting would make another loss of a mistake."""
    if len({x.shape for x in tensors.values()}) > 1:
        raise ValueError(f"shapes differ: {', '.join(f'{name} {tuple(x.shape)}' for name, x in tensors.items())}")


def of_tokens(logp_XV: Tensor, token_X: Tensor) -> Tensor:
    return logp_XV.gather(-1, token_X[:, None])[:, 0]


def spread(x_X: Tensor, mask_BR: Tensor) -> Tensor:
    """One number for each response token as (B, R), zero past the end."""
    return x_X.new_zeros(mask_BR.shape).masked_scatter(mask_BR, x_X)


def gae(reward_B: Tensor, value_BR: Tensor, mask_BR: Tensor, lam: float) -> Tensor:
    """A_t = Σ_k λ^k δ_{t+k}, δ_t = r_t + V_{t+1} - V_t, γ = 1, the reward at the last token (1506.02438): (B, R)."""
    same_shape(value=value_BR, mask=mask_BR)
    same_shape(reward=reward_B, sequence=value_BR[:, 0])
    last_BR = mask_BR & ~F.pad(mask_BR, (0, 1))[:, 1:]
    next_BR = F.pad(value_BR * mask_BR, (0, 1))[:, 1:]
    delta_BR = (reward_B[:, None] * last_BR + next_BR - value_BR) * mask_BR
    advantage_BR = torch.zeros_like(value_BR)
    running_B = torch.zeros_like(reward_B)
    for t in reversed(range(value_BR.shape[1])):
        running_B = delta_BR[:, t] + lam * running_B
        advantage_BR[:, t] = running_B
    return advantage_BR


def value_loss(value_BR: Tensor, old_BR: Tensor, return_BR: Tensor, mask_BR: Tensor, clip: float) -> Tensor:
    """½ max((V - R)², (V_clip - R)²), V_clip within `clip` of the value at rollout time; mean over tokens."""
    same_shape(value=value_BR, old=old_BR, returns=return_BR, mask=mask_BR)
    near_BR = old_BR + (value_BR - old_BR).clamp(-clip, clip)
    worst_BR = (value_BR - return_BR).square().maximum((near_BR - return_BR).square())
    return 0.5 * worst_BR[mask_BR].mean()


def dpo_loss(logp_B: Tensor, ref_logp_B: Tensor, reward_NS: Tensor, beta: float) -> Tensor:
    """-log σ(β [(ℓ_w - ℓ_w^ref) - (ℓ_l - ℓ_l^ref)]), best against worst sample of each prompt, mean over these pairs.
    Equal rewards make no pair (DPO, 2305.18290; online: 2402.04792)."""
    same_shape(logp=logp_B, ref_logp=ref_logp_B, reward=reward_NS.flatten())
    margin_NS = (logp_B - ref_logp_B).view_as(reward_NS)
    best_N1 = reward_NS.argmax(dim=1, keepdim=True)
    worst_N1 = reward_NS.argmin(dim=1, keepdim=True)
    gap_N = (margin_NS.gather(1, best_N1) - margin_NS.gather(1, worst_N1))[:, 0]
    pair_N = reward_NS.amax(dim=1) > reward_NS.amin(dim=1)
    return -(F.logsigmoid(beta * gap_N) * pair_N).sum() / pair_N.sum().clamp(min=1)


def k3(logp_BR: Tensor, ref_logp_BR: Tensor, mask_BR: Tensor) -> Tensor:
    """r - 1 - log r, r = π_ref / π, mean over tokens. Its value estimates KL(π ‖ π_ref), but its gradient on-policy is
    that of KL(π_ref ‖ π) (Schulman, "Approximating KL divergence")."""
    same_shape(logp=logp_BR, ref_logp=ref_logp_BR, mask=mask_BR)
    log_r_X = (ref_logp_BR - logp_BR)[mask_BR]
    return (log_r_X.exp() - 1 - log_r_X).mean()


def effective_share(log_weight_n: Tensor) -> float:
    """Effective sample size (Σw)² / Σw² over n."""
    weight_n = (log_weight_n - log_weight_n.max()).exp()
    return (weight_n.sum().square() / weight_n.square().sum() / len(weight_n)).item()
