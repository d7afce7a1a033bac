"""A decoder-only transformer of the Llama family, small enough to read in one sitting.

Pre-norm blocks, x += Attention(RMSNorm(x)) and x += SwiGLU(RMSNorm(x)), rotary positions in the half-rotation
convention, grouped-query attention, a tied output head. Parameters carry the names of Hugging Face's `LlamaModel`.

A layer does not decide which keys a query sees. It hands q, k and v to `attend`, which returns the attention output:
the full pass attends to its own keys, the sampler to a compressed KV cache.

Letters: B sequences, T positions, L layers, C width, H query heads, G kv heads, D head dim, V vocabulary, X tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernel import NEVER, ShadowMask, shadow_attention

# attend(l, q_BHTD, k_BGTD, v_BGTD) -> out_BHTD: the attention output of layer l's queries for these tokens
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ModelConfig:
    vocab: int
    width: int = 128
    layers: int = 3
    heads: int = 4
    kv_heads: int = 4
    ffn: int = 352
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


def never_evicted(pad_B: Tensor, T: int) -> Tensor:
    """evicted_at (B, 1, T) of left-padded sequences under a full cache: 0 for padding, else NEVER."""
    return torch.where(torch.arange(T, device=pad_B.device) < pad_B[:, None], 0, NEVER).to(torch.int32)[:, None]


def rope_positions(pad_B: Tensor, T: int) -> Tensor:
    """RoPE positions (B, T) of left-padded sequences: the column less the padding before it; 0 for padding."""
    return (torch.arange(T, device=pad_B.device) - pad_B[:, None]).clamp(min=0)


def rope_tables(position_BT: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position · theta^(-2d/D) (RoFormer, 2104.09864), each (B, 1, T, D), both halves of D alike."""
    # float64 angles: float32 would lose the fraction of a turn at long positions
    freq = theta ** -(torch.arange(0, head_dim, 2, device=position_BT.device, dtype=torch.float64) / head_dim)
    angle_B1TD = (position_BT[:, None, :, None].double() * freq).repeat(1, 1, 1, 2)
    return angle_B1TD.cos().to(dtype), angle_B1TD.sin().to(dtype)


def rotate(x_BHTD: Tensor, cos_B1TD: Tensor, sin_B1TD: Tensor) -> Tensor:
    """Rotate each pair (d, d + D/2) by the angle of its position."""
    lo, hi = x_BHTD.chunk(2, dim=-1)
    return x_BHTD * cos_B1TD + torch.cat((-hi, lo), dim=-1) * sin_B1TD


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The type of log-probs, KLs, weights and sums, whatever the model computes in."""
    return torch.promote_types(dtype, torch.float32)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, pad_B: Tensor | None) -> Tensor:
    """Dense causal attention of q (B, H, T, D) to k and v (B, G, T, D); the output in padding columns is undefined.

    pad_B: left padding, None where there is none (looking at pad_B in every layer would synchronise CUDA each time).
    Sampler and learner call this same function for the prompts, so that their results are equal.
    """

    def roll(x_BHTD: Tensor, shift_B: Tensor) -> Tensor:
        column_BT = (torch.arange(x_BHTD.shape[2], device=shift_B.device) + shift_B[:, None]) % x_BHTD.shape[2]
        return x_BHTD.gather(2, column_BT[:, None, :, None].expand_as(x_BHTD))

    attention = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    if q.device.type != "cpu":  # not all of the fast kernels support grouped heads
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    if pad_B is None:
        return attention(q, k, v)
    # causality hides padding that is rolled to the end; an explicit T×T mask would rule out the fast kernels
    return roll(attention(*(roll(x, pad_B) for x in (q, k, v))), -pad_B)


class Attention(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(c.width, c.heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.width, c.kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.width, c.kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.width, bias=False)

    def forward(self, x_BTC: Tensor, rope: tuple[Tensor, Tensor], attend: Callable) -> Tensor:
        projected = (proj(x_BTC) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (p.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in projected)
        # keys are rotated by their true position before they are stored, so an eviction never moves the others.
        # Under autocast the rotation computes in float32
        out_BHTD = attend(rotate(q, *rope).to(v.dtype), rotate(k, *rope).to(v.dtype), v)
        return self.o_proj(out_BHTD.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.width, c.ffn, bias=False)
        self.up_proj = nn.Linear(c.width, c.ffn, bias=False)
        self.down_proj = nn.Linear(c.ffn, c.width, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTC)) * self.up_proj(x_BTC))


class Block(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.width, c.norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c.width, c.norm_eps)
        self.mlp = SwiGLU(c)

    def forward(self, x_BTC: Tensor, rope: tuple[Tensor, Tensor], attend: Callable) -> Tensor:
        x_BTC = x_BTC + self.self_attn(self.input_layernorm(x_BTC), rope, attend)
        return x_BTC + self.mlp(self.post_attention_layernorm(x_BTC))


class TinyModel(nn.Module):
    """Maps tokens to final hidden states; `log_probs` maps the states that predict a needed token to log-probs."""

    def __init__(self, config: ModelConfig, seed: int = 0):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, config.norm_eps)
        self.lm_head = nn.Linear(config.width, config.vocab, bias=False)
        self.lm_head.weight = self.embed_tokens.weight  # tied
        # std is fan_in^-1/2 for linear layers, times (2L)^-1/2 for the 2L that write to the residual stream. With
        # GPT-2's constant 0.02, made for a width of 768, a width of 128 learns retrieval far later
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                std = 0.02 if name.startswith("embed") else p.shape[1] ** -0.5
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    std *= (2 * config.layers) ** -0.5
                nn.init.normal_(p, std=std, generator=generator)

    def extend(self, x_BTC: Tensor, position_BT: Tensor, attend: Attend) -> Tensor:
        """Pass embedded tokens (B, T, C) through all layers with this attention: final hidden states (B, T, C)."""
        rope = rope_tables(position_BT, self.config.head_dim, self.config.rope_theta, x_BTC.dtype)
        for l, layer in enumerate(self.layers):
            x_BTC = layer(x_BTC, rope, partial(attend, l))
        return self.norm(x_BTC)

    def forward(self, tokens_BT: Tensor, pad_B: Tensor, evicted_at_LBGT: Tensor, backend: str | None = None) -> Tensor:
        """Hidden states (B, T, C) of whole sequences, left-padded by pad_B columns, under a shadow mask."""
        mask = ShadowMask(evicted_at_LBGT)

        def attend(l: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return shadow_attention(q, k, v, mask[l], backend=backend)

        return self.extend(self.embed_tokens(tokens_BT), rope_positions(pad_B, tokens_BT.shape[1]), attend)

    def logits(self, hidden_XC: Tensor) -> Tensor:
        return self.lm_head(hidden_XC)

    def log_probs(self, hidden_XC: Tensor) -> Tensor:
        """Log-probs over the vocabulary (X, V), in float32 or better."""
        logits_XV = self.logits(hidden_XC)
        return logits_XV.log_softmax(dim=-1, dtype=at_least_float32(logits_XV.dtype))
