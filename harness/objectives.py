"""PPO, online DPO and a KL to the base policy: objectives with the two methods of `smd.GRPO`.

`prepare` computes the inputs of `loss` once per rollout. `loss` is a sum over a part of a batch, divided by the totals
of the whole batch. B sequences of R response columns, N prompts with S samples each, X response tokens.
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smd import GRPO, ROUNDING, Batch, Rollout, Runtime, Totals, response_logp, same_shape, unpack
from tiny_model import at_least_float32

GAE_LAMBDA = 0.95  # as in PPO's paper
VALUE_COEF = 0.5  # weight of the critic's loss, as in PPO's paper
DPO_BETA = 0.1  # how far the policy may move from the base policy, as in DPO's paper


class Policy(nn.Module):
    """All modules of a run: the model, PPO's critic, and the frozen base policy if the objective needs it."""

    def __init__(self, model: nn.Module, objective: str, kl_ref: float = 0.0):
        super().__init__()
        self.model = model
        self.critic = self.reference = None
        if objective == "dpo" or kl_ref:
            self.reference = copy.deepcopy(model).requires_grad_(False)
        if objective == "ppo":
            self.critic = nn.Linear(model.config.width, 1).to(next(model.parameters()))
            nn.init.zeros_(self.critic.weight)
            nn.init.zeros_(self.critic.bias)
            self.objective = PPO(self.critic)
        elif objective == "dpo":
            self.objective = DPO(self.reference)
        else:
            self.objective = GRPO(norm_std=objective == "grpo")
        if kl_ref:
            self.objective = WithReference(self.objective, self.reference, kl_ref)

    def optimizer(self, lr: float) -> torch.optim.AdamW:
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


@dataclass(frozen=True)
class PPO:
    """A clipped ratio with advantages from a linear critic, which reads hidden states under the policy's mask."""

    critic: nn.Linear
    clip: float = 0.2

    def values(self, hidden_XC: Tensor, mask_BR: Tensor) -> Tensor:
        value_X = self.critic(hidden_XC)[:, 0]
        return unpack(value_X.to(at_least_float32(value_X.dtype)), mask_BR)

    def prepare(self, model, rollout: Rollout, seen_LBGT: Tensor, reward_B: Tensor, runtime: Runtime) -> dict:
        (hidden_XC,) = runtime.replay(model, rollout, seen_LBGT, backend=runtime.backend)
        value_BR = self.values(hidden_XC, rollout.mask_BR)
        advantage_BR = gae(reward_B, value_BR, rollout.mask_BR, GAE_LAMBDA)
        normalised_BR = standardised(advantage_BR, rollout.mask_BR, runtime)
        return {"advantage_BR": normalised_BR, "value_BR": value_BR, "return_BR": advantage_BR + value_BR}

    def loss(self, batch: Batch, logp_BR: Tensor, hidden_XC: Tensor, max_new: int, totals: Totals) -> tuple:
        # the policy-gradient loss is GRPO's, with other advantages
        loss, clipped_BR = GRPO(clip=self.clip).loss(batch, logp_BR, hidden_XC, max_new, totals)
        mask_BR, extra = batch.rollout.mask_BR, batch.extra
        value_BR = self.values(hidden_XC, mask_BR)
        of_critic = value_loss(value_BR, extra["value_BR"], extra["return_BR"], mask_BR, self.clip, totals.tokens)
        return loss + VALUE_COEF * of_critic, clipped_BR


@dataclass(frozen=True)
class DPO:
    """Online DPO: the best against the worst sample of each prompt."""

    reference: nn.Module
    beta: float = DPO_BETA

    def prepare(self, model, rollout: Rollout, seen_LBGT: Tensor, reward_B: Tensor, runtime: Runtime) -> dict:
        return {"ref_logp_BR": reference_logp(self.reference, rollout, seen_LBGT, runtime)}

    def loss(self, batch: Batch, logp_BR: Tensor, hidden_XC: Tensor, max_new: int, totals: Totals) -> tuple:
        reward_NS = batch.reward_B.view(len(batch.rollout.pad_N), -1)
        logps = logp_BR.sum(dim=1), batch.extra["ref_logp_BR"].sum(dim=1)
        return dpo_loss(*logps, reward_NS, self.beta, totals.pairs), torch.zeros_like(batch.rollout.mask_BR)


@dataclass(frozen=True)
class WithReference:
    """Another objective, plus a KL penalty to a frozen reference policy, estimated by k3."""

    objective: GRPO | PPO | DPO
    reference: nn.Module
    coefficient: float

    def prepare(self, model, rollout: Rollout, seen_LBGT: Tensor, reward_B: Tensor, runtime: Runtime) -> dict:
        extra = self.objective.prepare(model, rollout, seen_LBGT, reward_B, runtime)
        if "ref_logp_BR" not in extra:
            extra["ref_logp_BR"] = reference_logp(self.reference, rollout, seen_LBGT, runtime)
        return extra

    def loss(self, batch: Batch, logp_BR: Tensor, hidden_XC: Tensor, max_new: int, totals: Totals) -> tuple:
        loss, clipped_BR = self.objective.loss(batch, logp_BR, hidden_XC, max_new, totals)
        penalty = k3(logp_BR, batch.extra["ref_logp_BR"], batch.rollout.mask_BR, totals.tokens)
        return loss + self.coefficient * penalty, clipped_BR


def reference_logp(reference: nn.Module, rollout: Rollout, seen_LBGT: Tensor, runtime: Runtime) -> Tensor:
    (hidden_XC,) = runtime.replay(reference, rollout, seen_LBGT, backend=runtime.backend)
    return response_logp(reference, rollout, hidden_XC)


def gae(reward_B: Tensor, value_BR: Tensor, mask_BR: Tensor, lam: float) -> Tensor:
    """A_t = δ_t + λ A_{t+1}, δ_t = r_t + V_{t+1} - V_t, γ = 1, the reward at the last token (1506.02438): (B, R)."""
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


def standardised(x_BR: Tensor, mask_BR: Tensor, runtime: Runtime, eps: float = 1e-6) -> Tensor:
    """(x - mean) / (std + eps) over the tokens of all processes; 0 where they are equal but for rounding."""
    x_X = x_BR[mask_BR].double()
    count, total, squares = x_X.new_tensor(len(x_X)), x_X.sum(), x_X.square().sum()
    runtime.all_sum([count, total, squares])
    mean = total / count
    deviations = (x_X - mean).square().sum()
    runtime.all_sum([deviations])
    std = (deviations / count).sqrt()
    if std <= ROUNDING * (squares / count).sqrt():
        return torch.zeros_like(x_BR)
    return ((x_BR - mean) / (std + eps)).to(x_BR.dtype)


def value_loss(
    value_BR: Tensor, old_BR: Tensor, return_BR: Tensor, mask_BR: Tensor, clip: float, denominator: float
) -> Tensor:
    """Σ ½ max((V - R)², (V_clip - R)²) / denominator, V_clip within `clip` of the value at rollout time."""
    same_shape(value=value_BR, old=old_BR, returns=return_BR, mask=mask_BR)
    clipped_BR = old_BR + (value_BR - old_BR).clamp(-clip, clip)
    worst_BR = (value_BR - return_BR).square().maximum((clipped_BR - return_BR).square())
    return 0.5 * worst_BR[mask_BR].sum() / denominator


def dpo_loss(logp_B: Tensor, ref_logp_B: Tensor, reward_NS: Tensor, beta: float, denominator: float) -> Tensor:
    """-Σ log σ(β [(ℓ_w - ℓ_w^ref) - (ℓ_l - ℓ_l^ref)]) / denominator over prompts, w the best and l the worst sample.

    A prompt whose samples have equal rewards makes no pair (DPO, 2305.18290; online: 2402.04792).
    """
    same_shape(logp=logp_B, ref_logp=ref_logp_B, reward=reward_NS.flatten())
    margin_NS = (logp_B - ref_logp_B).view_as(reward_NS)
    best_N1 = reward_NS.argmax(dim=1, keepdim=True)
    worst_N1 = reward_NS.argmin(dim=1, keepdim=True)
    gap_N = (margin_NS.gather(1, best_N1) - margin_NS.gather(1, worst_N1))[:, 0]
    pair_N = reward_NS.amax(dim=1) > reward_NS.amin(dim=1)
    return -(F.logsigmoid(beta * gap_N) * pair_N).sum() / max(1, denominator)


def k3(logp_BR: Tensor, ref_logp_BR: Tensor, mask_BR: Tensor, denominator: float) -> Tensor:
    """Σ (r - 1 - log r) / denominator, r = π_ref / π (Schulman, "Approximating KL divergence").

    Its value estimates KL(π ‖ π_ref), but its on-policy gradient is that of KL(π_ref ‖ π).
    """
    same_shape(logp=logp_BR, ref_logp=ref_logp_BR, mask=mask_BR)
    log_r_X = (ref_logp_BR - logp_BR)[mask_BR]
    return (log_r_X.exp() - 1 - log_r_X).sum() / denominator
