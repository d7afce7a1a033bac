"""Attention under a shadow mask: each key is visible from the query at its own position until it is evicted.

    visible(i, j) = j <= i < evicted_at[j]
    out_i = Σ_j softmax_j(q_i · k_j / √D over visible j) v_j

Eviction is permanent, so a key's life is an interval and one integer describes it. The T×T mask is never stored: it
exists inside one attention call and nowhere else.

Dimension letters: B sequences, H query heads, G kv heads (H/G query heads share one), Tq queries, Tk keys, D head dim.
"""

import torch
from torch import Tensor

NEVER = 2**31 - 1  # evicted_at of a key that is never evicted; padding has 0


def attention_torch(q: Tensor, k: Tensor, v: Tensor, evicted_at: Tensor, q_start: int) -> Tensor:
    """The definition, in plain PyTorch: `shadow_attention` without its checks."""
    B, H, Tq, D = q.shape
    G, Tk = k.shape[1:3]
    i = q_start + torch.arange(Tq, device=q.device)[:, None]
    j = torch.arange(Tk, device=q.device)
    hidden = (j > i) | (i >= evicted_at[:, :, None, :])  # [B, G, Tq, Tk]
    hidden = hidden.repeat(1, 1, H // G, 1)  # [B, G, H/G * Tq, Tk]: the rows of the query heads that share a kv head
    # accumulated in float64: then float32 results do not depend on the order or the number of the hidden keys, and a
    # learner with the whole sequence before it reproduces the sampler's small cache to the bit
    score = q.double().reshape(B, G, H // G * Tq, D) @ k.double().transpose(-1, -2) * D**-0.5
    # a finite floor instead of -inf: a row that sees nothing must give zeros and zero gradients, not NaN
    weight = score.masked_fill(hidden, torch.finfo(score.dtype).min).softmax(dim=-1).masked_fill(hidden, 0)
    return (weight @ v.double()).view(B, H, Tq, D).to(q.dtype)


BACKENDS = {"torch": attention_torch}


def backend_for(device: str, backend: str | None) -> str:
    """The backend in use on a device: the one asked for, or else the best there is."""
    return backend or "torch"


def shadow_attention(
    q: Tensor, k: Tensor, v: Tensor, evicted_at: Tensor, q_start: int = 0, backend: str | None = None
) -> Tensor:
    """Softmax attention in which query i sees key j if j <= i < evicted_at[j].

    q (B, H, Tq, D); k, v (B, G, Tk, D); evicted_at (B, G, Tk) int32. Key j stands at position j, query i at position
    q_start + i. Query head h reads kv head h // (H/G). Returns (B, H, Tq, D); a row that sees nothing returns zeros
    and has zero gradients. backend: a name in BACKENDS, or None for the best one for q's device.
    Raises ValueError where the shapes do not fit together, evicted_at is not int32, or the backend is unknown.
    """
    B, H, _, D = q.shape
    G, Tk = k.shape[1:3]
    if k.shape != (B, G, Tk, D) or v.shape != k.shape or evicted_at.shape != (B, G, Tk):
        raise ValueError(
            f"shapes do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, "
            f"evicted_at {tuple(evicted_at.shape)}; want (B, H, Tq, D), twice (B, G, Tk, D), and (B, G, Tk)"
        )
    if H % G:
        raise ValueError(f"query heads must be a multiple of kv heads, got {H} and {G}")
    if evicted_at.dtype != torch.int32:
        raise ValueError(f"evicted_at must be int32, got {evicted_at.dtype}")
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return BACKENDS[backend_for(q.device.type, backend)](q, k, v, evicted_at, q_start)
