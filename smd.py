"""Shadow Mask Distillation (arXiv 2605.06850): on-policy reinforcement learning with a compressed KV cache.

The sampler decodes with a small KV cache and evicts keys for good, so its policy π_sparse answers under a shrinking
context. A learner that scores the answer under the full context follows the gradient of another policy. Here the
sampler records one integer per key, evicted_at, and the learner applies exactly that mask:

    visible(i, j) = j <= i < evicted_at[j]                                   query i, key j
    loss = GRPO(π_shadow) + λ · KL(π_dense ‖ stop-gradient(π_shadow))        λ = 0.1

π_shadow is the learner under this *shadow mask*. It equals π_sparse, so its policy gradient (track 1) is on-policy.
π_dense is the learner under the full causal mask. It follows π_shadow (track 2), so that the trained model also serves
with a full cache. The gradient takes the choice of keys as given: it does not learn which keys to keep.

GRPO is simplified: (1) one update per batch of rollouts, so the clipped ratio is 1 (a run's `--epochs` allows more);
(2) no KL to a reference policy (`--kl-ref` adds it); (3) the policy loss is divided by sequences × the longest possible
response, so that all tokens weigh the same (Dr. GRPO). Further departures from the paper: (4) the model and the tasks
are small; (5) the KL of track 2 is averaged over the response tokens of the batch; (6) the S samples of a prompt share
its prefill and the evictions that follow it directly.

`python smd.py` runs the demonstration, 100 steps on a retrieval task. It uses harness/shared.py, which stores and
replays each prompt once instead of S times; tests prove it equal to the cache and the replay in this file.

Letters: N prompts, S samples of each, B = N·S sequences, P prompt columns (left-padded), R response columns, T all
columns, K cache slots, W recent queries, L layers, H query heads, G kv heads, M = H/G, D head dim, C width, V
vocabulary, X all response tokens in one row. A column counts from the left edge of the padded batch and is the position
i or j in the rule above. The RoPE position is the column less the padding before it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernel import NEVER, ShadowMask, accumulation_dtype, masked_attention, shadow_attention
from tiny_model import TinyModel, at_least_float32, causal_attention, rope_positions

EOS_CHECK_EVERY = {"cpu": 1, "cuda": 8}  # tokens between two checks for EOS and NaN; each check synchronises CUDA
LOGITS_PER_CHUNK = {"cpu": 2**23, "cuda": 2**27}  # the learner's memory peaks at about ten times as many numbers
MAX_GRAD_NORM = 1.0  # gradients are clipped to this norm
ROUNDING = 4 * torch.finfo(torch.float32).eps  # rewards with a relative spread up to this count as equal
Uniform = Callable[..., Tensor]  # see `torch_uniform`


# --- 1. eviction policies: which keys does the sampler keep? ---


@dataclass(frozen=True)
class Eviction:
    """A policy and its settings; `window`, `sinks` and `pool` matter where the policy's `PolicySpec` says so."""

    policy: str
    budget: int | Fraction  # keys per layer, sequence and kv head: 22, or Fraction(65, 100) of the prompt
    interval: int = 4  # response tokens between two compressions
    window: int = 4  # observation window: the last queries, and their keys
    sinks: int = 1  # attention sinks: the first keys
    pool: int = 5  # snapkv: neighbouring keys over which scores are averaged
    protect: str | None = None  # "prompt": its keys are never evicted, and the budget counts keys of the response

    def minimum_budget(self) -> int:
        """The sinks and the window that the policy always keeps, at least one key."""
        spec = POLICIES[self.policy]
        sinks = self.sinks if spec.keeps_sinks and not self.protect else 0
        return sinks + (self.window if spec.keeps_window else 1)

    def budget_for(self, length_N: Tensor) -> Tensor:
        """Keys to keep (N,) of prompts of these lengths (N,); ValueError below the minimum budget."""
        if not isinstance(self.budget, int | Fraction):
            raise ValueError(f"budget must be a count of keys or a Fraction of the prompt, got {self.budget!r}")
        share = isinstance(self.budget, Fraction)
        keys = [math.ceil(self.budget * length) if share else self.budget for length in length_N.tolist()]
        if min(keys) < self.minimum_budget():
            raise ValueError(f"budget must be at least {self.minimum_budget()} for {self.policy}, got {min(keys)}")
        return length_N.new_tensor(keys)


def torch_uniform(*index: int | Tensor) -> Tensor:
    """Uniform numbers in [0, 1) from torch's generator, one for each element that the indices broadcast to.

    `sample` calls it with the indices of a draw. `harness.streams.keyed` depends on nothing but these indices.
    """
    shape = torch.broadcast_shapes(*(x.shape for x in index if isinstance(x, Tensor)))
    return torch.rand(shape, dtype=torch.float64, device=index[-1].device)


@dataclass
class LayerCache:
    """The KV cache of one layer, and the shadow mask that it records. A policy reads it to score the keys.

    B: sequences; during the prefill, prompts. Slots that are not live come first, then the live ones by column.
    """

    eviction: Eviction
    uniform: Uniform
    l: int  # layer
    P: int  # columns of the prompt
    now: int  # column of the next query
    pad_B: Tensor
    keep_B: Tensor  # keys to keep
    row_B: Tensor  # number of the sequence, for `uniform`
    k_BGKD: Tensor
    v_BGKD: Tensor
    column_BGK: Tensor
    live_BGK: Tensor  # neither padding nor evicted
    evicted_at_BGT: Tensor  # int32
    q_BHWD: Tensor  # the last W queries, if the policy reads them
    received_BGK: Tensor | None = None  # attention that each key received so far, if the policy accumulates it

    def newest(self, count: int | Tensor) -> Tensor:  # slots, live or not, with one of the last `count` columns
        return self.column_BGK >= self.now - count

    def keys(self) -> Tensor:
        return self.k_BGKD.to(accumulation_dtype(self.k_BGKD.dtype, self.k_BGKD.device))

    def mark_evicted(self, evicted_BGK: Tensor) -> None:
        """Record that these keys are invisible from the next query on."""
        invisible_from_BGK = torch.where(evicted_BGK, self.now, NEVER).int()
        self.evicted_at_BGT.scatter_reduce_(-1, self.column_BGK, invisible_from_BGK, "amin")
        self.live_BGK = self.live_BGK & ~evicted_BGK

    def compact(self, count: int) -> None:
        """Keep this many slots, among them all live ones. Keys, values and columns move together."""
        slot_BGn = live_last(self.live_BGK, count)
        for name in ("k_BGKD", "v_BGKD", "column_BGK", "live_BGK", "received_BGK"):
            if getattr(self, name) is not None:
                setattr(self, name, take(getattr(self, name), slot_BGn))

    def append(self, q_BH1D: Tensor, k_BG1D: Tensor, v_BG1D: Tensor) -> None:
        """Store one token."""
        self.q_BHWD = torch.cat((self.q_BHWD, q_BH1D), dim=2)[:, :, 1:]
        self.k_BGKD = torch.cat((self.k_BGKD, k_BG1D), dim=2)
        self.v_BGKD = torch.cat((self.v_BGKD, v_BG1D), dim=2)
        self.column_BGK = F.pad(self.column_BGK, (0, 1), value=self.now)
        self.live_BGK = F.pad(self.live_BGK, (0, 1), value=True)
        if self.received_BGK is not None:
            self.received_BGK = F.pad(self.received_BGK, (0, 1))
        self.now += 1


def window_logits(cache: LayerCache) -> Tensor:
    """Logits of the last queries over the live keys, (B, G, M, W, K); -inf where a query does not see a key."""
    k_BGKD = cache.keys()
    (B, H, W, D), G = cache.q_BHWD.shape, k_BGKD.shape[1]
    assert W, "a policy that reads queries must say so in its PolicySpec"
    with torch.autocast(k_BGKD.device.type, enabled=False):
        q_rows = cache.q_BHWD.to(k_BGKD.dtype).reshape(B, G, H // G * W, D)
        logits_BGMWK = (q_rows @ k_BGKD.transpose(-1, -2)).view(B, G, H // G, W, -1) * D**-0.5
    q_column_W = torch.arange(cache.now - W, cache.now, device=k_BGKD.device)
    visible_BGWK = cache.live_BGK[:, :, None] & (cache.column_BGK[:, :, None] <= q_column_W[:, None])
    return logits_BGMWK.masked_fill_(~visible_BGWK[:, :, None], -math.inf)


def window_attention(cache: LayerCache) -> Tensor:
    """Softmax of `window_logits`; zero for a query that is padding."""
    return window_logits(cache).softmax(dim=-1).nan_to_num_(0.0)


def streaming(cache: LayerCache) -> Tensor:
    """The most recent keys, and sinks (StreamingLLM, 2309.17453)."""
    return cache.column_BGK.double()


def snapkv(cache: LayerCache) -> Tensor:
    """Attention of the observation window, averaged over `pool` neighbouring keys (SnapKV, 2404.14469)."""
    score_BGK = window_attention(cache).mean(dim=(2, 3)).masked_fill(cache.newest(cache.eviction.window), 0.0)
    return F.avg_pool1d(score_BGK, kernel_size=cache.eviction.pool, stride=1, padding=cache.eviction.pool // 2)


def h2o(cache: LayerCache) -> Tensor:
    """Half the budget for the most recent keys, half for those that received most attention (H2O, 2306.14048)."""
    recent_B = cache.keep_B - cache.keep_B // 2
    return cache.received_BGK.masked_fill(cache.newest(recent_B[:, None, None]), math.inf)


def tova(cache: LayerCache) -> Tensor:
    """The last query's attention, averaged over all heads: one set of keys per layer (TOVA, 2401.06104)."""
    score_BK = window_attention(cache).mean(dim=(1, 2, 3))
    return score_BK[:, None].expand_as(cache.column_BGK).masked_fill(cache.newest(1), math.inf)


def knorm(cache: LayerCache) -> Tensor:
    """Minus the log of the key's norm: keys of small norm receive much attention (2406.11430)."""
    # in steps of 0.1 %: in the first layer, the norms of equal tokens differ by rounding only, and should tie
    return -(1000 * cache.keys().norm(dim=-1).log()).round()


def rkv(cache: LayerCache, mix: float = 0.07, similar: float = 0.5) -> Tensor:
    """Importance less redundancy, Z = mix · A - (1 - mix) · S (R-KV, 2505.24133)."""
    window_BGK = cache.newest(cache.eviction.window)
    logits_BGWK = window_logits(cache).amax(dim=2).masked_fill(window_BGK[:, :, None], -math.inf)
    attention_BGK = logits_BGWK.softmax(dim=-1).nan_to_num(0.0).mean(dim=2)
    attention_BGK = F.max_pool1d(attention_BGK, kernel_size=7, stride=1, padding=3)
    unit_BGKD = F.normalize(cache.keys(), dim=-1).masked_fill_(~cache.live_BGK[..., None], 0.0)
    slot_K = torch.arange(unit_BGKD.shape[2], device=unit_BGKD.device)
    with torch.autocast(slot_K.device.type, enabled=False):
        cosine_BGKK = unit_BGKD @ unit_BGKD.transpose(-1, -2)
    cosine_BGKK = cosine_BGKK.masked_fill(slot_K[:, None] == slot_K, 0.0)
    # the newest near copy of a key does not count as redundant, so that one copy survives
    newest_BGK1 = torch.where(cosine_BGKK > similar, slot_K, -1).amax(dim=-1, keepdim=True)
    total_BGK = cosine_BGKK.masked_fill(slot_K == newest_BGK1, 0.0).sum(dim=-2)
    mean_BGK = total_BGK / cache.live_BGK.sum(dim=-1, keepdim=True)
    redundancy_BGK = mean_BGK.masked_fill(~cache.live_BGK, -math.inf).softmax(dim=-1)
    return mix * attention_BGK - (1 - mix) * redundancy_BGK


def random(cache: LayerCache) -> Tensor:
    """Uniform scores, other ones in each head, so that few keys are lost to all (Random Attention, 2609.03430)."""
    first_B11 = cache.pad_B[:, None, None]  # counted from the first token, because padding depends on the batch
    head_G1 = torch.arange(cache.column_BGK.shape[1], device=first_B11.device)[:, None]
    index = cache.l, cache.now - first_B11, head_G1, cache.column_BGK - first_B11
    return cache.uniform(*index, cache.row_B[:, None, None])


class PolicySpec(NamedTuple):
    """An eviction policy: its score, the keys it always keeps, and what it reads."""

    score: Callable[[LayerCache], Tensor]  # (B, G, K): the keys with the highest scores are kept
    keeps_sinks: bool = False  # always keeps the first keys, as many as `Eviction.sinks`
    keeps_window: bool = False  # always keeps the last keys, as many as `Eviction.window`
    reads_queries: bool = False  # reads the last query, or `Eviction.window` of them if `keeps_window`
    accumulates: bool = False  # reads the attention that each key received


POLICIES = {
    "streaming": PolicySpec(streaming, keeps_sinks=True),
    "snapkv": PolicySpec(snapkv, keeps_sinks=True, keeps_window=True, reads_queries=True),
    "h2o": PolicySpec(h2o, accumulates=True),
    "tova": PolicySpec(tova, reads_queries=True),
    "knorm": PolicySpec(knorm),
    "rkv": PolicySpec(rkv, keeps_window=True, reads_queries=True),
    "random": PolicySpec(random, keeps_sinks=True, keeps_window=True),
}


def eviction_mask(cache: LayerCache) -> tuple[Tensor, Tensor]:
    """The live keys to evict, those outside the top-k of their head (B, G, K); and True if no score is NaN."""
    spec = POLICIES[cache.eviction.policy]
    always_BGK = torch.zeros_like(cache.live_BGK)
    keep_BG1 = cache.keep_B[:, None, None]
    if spec.keeps_sinks and not cache.eviction.protect:
        always_BGK |= cache.column_BGK < cache.pad_B[:, None, None] + cache.eviction.sinks
    if spec.keeps_window:
        always_BGK |= cache.newest(cache.eviction.window)
    if cache.eviction.protect:
        prompt_BGK = cache.live_BGK & (cache.column_BGK < cache.P)
        always_BGK |= prompt_BGK
        keep_BG1 = keep_BG1 + prompt_BGK.sum(dim=-1, keepdim=True)
    # in float32, most scores that differ by float64 rounding only are equal, and the stable sort keeps the earlier key
    score_BGK = spec.score(cache).float()
    valid = ~score_BGK.isnan().any()
    score_BGK = score_BGK.masked_fill(always_BGK, math.inf).masked_fill(~cache.live_BGK, -math.inf)
    order_BGK = score_BGK.argsort(dim=-1, descending=True, stable=True)
    rank_BGK = order_BGK.argsort(dim=-1)
    return cache.live_BGK & (rank_BGK >= keep_BG1), valid


# --- 2. the compressed KV cache ---


def live_last(live_BGK: Tensor, count: int) -> Tensor:
    """Slots (B, G, count): all live ones in their order, preceded by others to fill up the row."""
    return live_BGK.byte().argsort(dim=-1, stable=True)[..., max(0, live_BGK.shape[-1] - count) :]


def take(x_BGK: Tensor, slot_BGn: Tensor) -> Tensor:
    """The contents of these slots of (B, G, K) or (B, G, K, D)."""
    B, G, K = x_BGK.shape[:3]
    first_BG1 = K * torch.arange(B * G, device=slot_BGn.device).view(B, G, 1)
    return x_BGK.flatten(0, 2).index_select(0, (first_BG1 + slot_BGn).flatten()).unflatten(0, slot_BGn.shape)


class Cache:
    """The sampler's KV cache in all layers, which attend through `prefill`, then through `decode`."""

    def __init__(self, pad_N: Tensor, S: int, P: int, max_new: int, eviction: Eviction | None, uniform: Uniform):
        # a full cache is a budget that is never exceeded
        self.eviction = eviction or Eviction("streaming", P + max_new, interval=P + max_new, sinks=0)
        self.spec = POLICIES[self.eviction.policy]
        self.pad_N, self.S, self.P, self.max_new, self.uniform = pad_N, S, P, max_new, uniform
        self.padding_N = pad_N if pad_N.any() else None
        self.keep_N = self.eviction.budget_for(P - pad_N)
        protected = P if self.eviction.protect else 0
        # slots after a compression, in the sequences with the smallest and the largest budget
        self.fewest, self.most = (protected + keep.item() for keep in self.keep_N.aminmax())
        W = self.eviction.window if self.spec.keeps_window else 1
        self.W = W if self.spec.reads_queries else 0
        self.tokens = 0  # of each response, in the cache
        self.valid = torch.ones((), dtype=torch.bool, device=pad_N.device)  # no score was NaN
        self.layers: list[LayerCache] = []
        self.stored_bytes = 0  # the most that all layers stored between two tokens

    def prefill(self, l: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend densely within the prompts, then keep what the budget allows of this layer's keys."""
        N, G, P, _ = k.shape
        column_NGP = torch.arange(P, device=k.device).expand(N, G, P)
        live_NGP = column_NGP >= self.pad_N[:, None, None]
        evicted_at_NGT = F.pad(torch.where(live_NGP, NEVER, 0).int(), (0, self.max_new), value=NEVER)
        row_N = N * self.S + torch.arange(N, device=k.device)  # prompts are numbered after the sequences
        of_prompts = self.pad_N, self.keep_N, row_N, k, v, column_NGP, live_NGP, evicted_at_NGT
        layer = LayerCache(self.eviction, self.uniform, l, P, P, *of_prompts, q[:, :, max(0, P - self.W) :])
        if self.spec.accumulates:
            layer.received_BGK = self.attention_in_prompt(layer, q)
        if self.fewest < P:
            self.evict(layer)
        layer.compact(self.most)
        # W queries also after a prompt that is shorter than the window
        layer.q_BHWD = F.pad(layer.q_BHWD, (0, 0, self.W - layer.q_BHWD.shape[2], 0)).clone()
        self.layers.append(layer)
        return causal_attention(q, k, v, self.padding_N)

    def attention_in_prompt(self, layer: LayerCache, q_BHPD: Tensor) -> Tensor:
        """Attention that each key receives from all queries of its prompt and group of heads: (B, G, K)."""
        return window_attention(replace(layer, q_BHWD=q_BHPD)).sum(dim=(2, 3))

    def branch(self) -> None:
        """Repeat the cache of each prompt S times, once for each sample."""
        for layer in self.layers:
            for name, x in vars(layer).items():
                if isinstance(x, Tensor):
                    setattr(layer, name, x.repeat_interleave(self.S, dim=0))
            layer.row_B = torch.arange(len(layer.pad_B), device=layer.pad_B.device)
        self.measure()

    def decode(self, l: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Add one token to the cache and attend to all live keys: out (B, H, 1, D)."""
        layer = self.layers[l]
        layer.append(q, k, v)
        out_BH1D, weight_BGM1K = masked_attention(q, layer.k_BGKD, layer.v_BGKD, ~layer.live_BGK[:, :, None])
        if self.spec.accumulates:
            layer.received_BGK = layer.received_BGK + weight_BGM1K.sum(dim=(2, 3))
        return out_BH1D.to(q.dtype)

    def token_done(self) -> None:
        """Count a token that all layers have stored; at the end of an interval, evict down to the budget."""
        self.tokens += 1
        self.measure()
        if self.tokens % self.eviction.interval == 0:
            for layer in self.layers:
                if layer.live_BGK.shape[-1] > self.fewest:
                    self.evict(layer)
                layer.compact(self.most)

    def evict(self, layer: LayerCache) -> None:
        evicted_BGK, valid = eviction_mask(layer)
        self.valid &= valid
        layer.mark_evicted(evicted_BGK)

    def measure(self) -> None:
        stored = sum(x.nbytes for layer in self.layers for x in vars(layer).values() if isinstance(x, Tensor))
        self.stored_bytes = max(self.stored_bytes, stored)

    def shadow_mask(self) -> Tensor:
        """evicted_at of all layers, (L, B, G, P + max_new)."""
        return torch.stack([layer.evicted_at_BGT for layer in self.layers])


# --- 3. the sampler ---


@dataclass(frozen=True)
class Rollout:
    """What the sampler did. The learner takes evictions and log-probs from here, and evicts nothing itself."""

    prompt_NP: Tensor  # int64
    pad_N: Tensor  # columns of padding before each prompt
    response_BR: Tensor  # int64; row n·S + s is sample s of prompt n; up to and with its EOS, then EOS as padding
    logp_BR: Tensor  # log-prob of each response token in the distribution that it was drawn from; 0 after the end
    length_B: Tensor  # response tokens, EOS included
    evicted_at_LBGT: Tensor  # int32: the shadow mask
    stored_bytes: int  # most bytes that the cache and its record stored

    @property
    def mask_BR(self) -> Tensor:
        return torch.arange(self.response_BR.shape[1], device=self.length_B.device) < self.length_B[:, None]

    @property
    def never_evicted_LBGT(self) -> Tensor:
        """The mask of a full cache: padding is hidden, and nothing is ever evicted."""
        row_1B1T = torch.where(self.evicted_at_LBGT[:1, :, :1] == 0, 0, NEVER).to(torch.int32)
        return row_1B1T.expand_as(self.evicted_at_LBGT)  # a view: the same in all layers and heads


def inverse_cdf(logp_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The token (B,) at which the cumulative distribution passes each uniform number."""
    # float64: sums of many small float32 numbers would depend on the device
    cdf_BV = logp_BV.double().exp().cumsum(dim=-1)
    token_B = torch.searchsorted(cdf_BV, uniform_B[:, None] * cdf_BV[:, -1:], right=True)[:, 0]
    return token_B.clamp(max=logp_BV.shape[1] - 1)  # only NaN exceeds it, and `sample` raises an error for NaN


@torch.no_grad()
def sample(
    model: TinyModel, prompt_NP: Tensor, pad_N: Tensor, samples: int, max_new: int, eos: int | Sequence[int],
    eviction: Eviction | None = None, uniform: Uniform = torch_uniform, forced_BR: Tensor | None = None,
    make_cache: Callable[..., Cache] = Cache,
) -> Rollout:  # fmt: skip
    """Draw responses with a compressed KV cache, and record which query could see which key.

    prompt_NP: int64 tokens, left-padded by pad_N columns. A response ends with an `eos` token or after max_new tokens.
    eviction: None for a full cache. forced_BR: "draw" these max_new tokens. ValueError where the budget is less than
    the policy always keeps, FloatingPointError where logits or scores are not finite. The temperature is 1, without
    truncation: the recorded log-prob is the model's own.
    """
    P, pad_B = prompt_NP.shape[1], pad_N.repeat_interleave(samples)
    row_B = torch.arange(len(pad_B), device=pad_N.device)
    eos_E = torch.tensor([eos] if isinstance(eos, int) else list(eos), device=pad_N.device)
    cache = make_cache(pad_N, samples, P, max_new, eviction, uniform)
    hidden_NPC = model.extend(model.embed_tokens(prompt_NP), rope_positions(pad_N, P), cache.prefill)
    hidden_BC = hidden_NPC[:, -1].repeat_interleave(samples, dim=0)
    cache.branch()
    tokens, logps, length_B = [], [], torch.zeros_like(pad_B)
    running_B, finite = torch.ones_like(pad_B, dtype=torch.bool), torch.ones_like(cache.valid)
    for t in range(max_new):
        logp_BV = model.log_probs(hidden_BC)
        finite &= logp_BV.isfinite().all()
        drawn_B = inverse_cdf(logp_BV, uniform(t, row_B)) if forced_BR is None else forced_BR[:, t]
        tokens.append(torch.where(running_B, drawn_B, eos_E[0]))
        logps.append(torch.where(running_B, logp_BV.gather(1, drawn_B[:, None])[:, 0], 0.0))
        length_B = length_B + running_B
        running_B = running_B & ~torch.isin(drawn_B, eos_E)
        if t + 1 == max_new or (t + 1) % EOS_CHECK_EVERY.get(pad_B.device.type, 8) == 0:
            all_finite, some_running = torch.stack((finite & cache.valid, running_B.any())).tolist()
            if not all_finite:
                raise FloatingPointError("the policy's logits, or the scores of its keys, are not finite")
            if not some_running:
                break
        if t + 1 < max_new:
            # a sequence that has ended runs along with the others; `finished_mask` removes what it records
            position_B1 = (P + t - pad_B)[:, None]
            hidden_BC = model.extend(model.embed_tokens(tokens[-1][:, None]), position_B1, cache.decode)[:, 0]
            cache.token_done()
    R = length_B.max().item()
    evicted_at_LBGT = finished_mask(cache.shadow_mask()[..., : P + R], P + length_B)
    drawn = torch.stack(tokens[:R], dim=1), torch.stack(logps[:R], dim=1), length_B
    return Rollout(prompt_NP, pad_N, *drawn, evicted_at_LBGT, cache.stored_bytes)


def finished_mask(evicted_at_LBGT: Tensor, end_B: Tensor) -> Tensor:
    """The shadow mask without what was recorded after a sequence's last query, so that it depends on no other sequence.

    Example: a prompt in columns 0 and 1 and a response in 2, 3, 4 end at column 5. The token in column 4 is predicted
    by the query in column 3 and is never a query itself. So a key evicted at 3 is hidden from that query, and a key
    evicted at 4 or later was visible to every query: NEVER. Columns from 5 on are padding: 0.
    """
    end_B11 = end_B[:, None, None]
    column_T = torch.arange(evicted_at_LBGT.shape[-1], device=end_B.device)
    evicted_at_LBGT = evicted_at_LBGT.masked_fill(evicted_at_LBGT >= end_B11 - 1, NEVER)
    return evicted_at_LBGT.masked_fill(column_T >= end_B11, 0)


# --- 4. the learner's forward pass under a shadow mask ---


def replay(model: TinyModel, rollout: Rollout, *masks_LBGT: Tensor, backend: str | None = None) -> list[Tensor]:
    """For each mask, the hidden states (X, C) that predict the response tokens.

    Under `rollout.evicted_at_LBGT` their log-probs are those of π_shadow, under `rollout.never_evicted_LBGT` those of
    π_dense. Row x belongs to the x-th True of `rollout.mask_BR`. backend: of `shadow_attention`.

    Two things must not be simplified. An evicted token stays in the sequence, hidden from later queries only: above the
    first layer, the keys that were kept depend on it. And keys keep their true RoPE positions.
    """
    P, S = rollout.prompt_NP.shape[1], len(rollout.response_BR) // len(rollout.prompt_NP)
    prompt_BP, pad_B = (x.repeat_interleave(S, dim=0) for x in (rollout.prompt_NP, rollout.pad_N))
    padding_B = pad_B if pad_B.any() else None
    tokens_BT = torch.cat((prompt_BP, rollout.response_BR[:, :-1]), dim=1)  # the last token is never an input
    T = tokens_BT.shape[1]

    def hidden_under(mask_LBGT: Tensor) -> Tensor:
        mask = ShadowMask(mask_LBGT[..., :T])

        def attend(l: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # nothing is evicted before the prompt ends, so its queries attend as in the sampler's prefill
            prompt_BHPD = causal_attention(q[:, :, :P], k[:, :, :P], v[:, :, :P], padding_B)
            response_BHRD = shadow_attention(q[:, :, P:], k, v, mask[l], q_start=P, backend=backend)
            return torch.cat((prompt_BHPD, response_BHRD), dim=2)

        hidden_BTC = model.extend(model.embed_tokens(tokens_BT), rope_positions(pad_B, T), attend)
        return hidden_BTC[:, P - 1 :][rollout.mask_BR]

    return [hidden_under(mask_LBGT) for mask_LBGT in masks_LBGT]


def chunked(f: Callable[..., tuple[Tensor, ...]], vocab: int, *rows: Tensor) -> list[Tensor]:
    """f of all rows, in chunks, because its logits are large. The backward pass computes those of each chunk again."""
    chunks = math.ceil(len(rows[0]) * vocab / LOGITS_PER_CHUNK.get(rows[0].device.type, 2**23))
    if chunks <= 1:
        return list(f(*rows))
    # chunks of about equal size, because a library may sum the rows of a small matrix in another order
    parts = zip(*(x.tensor_split(chunks) for x in rows), strict=True)
    results = [checkpoint(f, *part, use_reentrant=False) for part in parts]
    return [torch.cat(pieces) for pieces in zip(*results, strict=True)]


def gather_logp(logp_XV: Tensor, token_X: Tensor) -> Tensor:
    return logp_XV.gather(-1, token_X[:, None])[:, 0]


def unpack(x_X: Tensor, mask_BR: Tensor) -> Tensor:
    """One number per response token as (B, R), zero past the end."""
    return x_X.new_zeros(mask_BR.shape).masked_scatter(mask_BR, x_X)


def response_logp(model: TinyModel, rollout: Rollout, hidden_XC: Tensor) -> Tensor:
    """Log-probs (B, R) of the response tokens; zero past the end."""
    rows = rollout.response_BR[rollout.mask_BR], hidden_XC
    (logp_X,) = chunked(lambda x, hidden: (gather_logp(model.log_probs(hidden), x),), model.config.vocab, *rows)
    return unpack(logp_X, rollout.mask_BR)


# --- 5. importance weights: the corrections with which smd is compared ---
# Up to `kl_divergence`, all functions take plain tensors, for any trainer. log_ratio_BR is log ρ, the learner's dense
# log-prob less the sampler's at rollout time, and zero past the end of a response.


def token_is(log_ratio_BR: Tensor, cap: float) -> Tensor:
    """w_t = min(ρ_t, cap): token-level truncated importance sampling (Yao et al. 2025; verl, cap 2)."""
    return log_ratio_BR.exp().clamp(max=cap)


def icepop(log_ratio_BR: Tensor, cap: float, floor: float = 0.5) -> Tensor:
    """w_t = ρ_t where floor <= ρ_t <= cap, else 0 (IcePop; verl, rollout_is "token", thresholds 0.5 and 5)."""
    ratio_BR = log_ratio_BR.exp()
    return ratio_BR.masked_fill((ratio_BR < floor) | (ratio_BR > cap), 0.0)


def sequence_is(log_ratio_BR: Tensor, cap: float) -> Tensor:
    """w = min(Π_t ρ_t, cap), the same for all tokens of a sequence; without a cap it is unbiased for π_dense."""
    return log_ratio_BR.sum(dim=1, keepdim=True).exp().clamp(max=cap).expand_as(log_ratio_BR)


def sequence_mask(log_ratio_BR: Tensor, cap: float) -> Tensor:
    """w = Π_t ρ_t, and 0 for a sequence in which it exceeds cap (TRL's default, "sequence_mask", cap 3)."""
    weight_BR = sequence_is(log_ratio_BR, math.inf)
    return weight_BR.masked_fill(weight_BR > cap, 0.0)


def sparse_rl(log_ratio_BR: Tensor, cap: float) -> Tensor:
    """w_t = min(ρ_t, cap), and 0 in a sequence with any ρ_t < 1e-4 (Sparse-RL, 2601.10079, cap 1.5)."""
    return token_is(log_ratio_BR, cap) * (log_ratio_BR >= math.log(1e-4)).all(dim=1, keepdim=True)


class Method(NamedTuple):
    evicts: bool  # does the sampler evict?
    replays: bool  # does the learner run under the sampler's mask? Then the old log-probs are the sampler's
    weight: Callable[[Tensor, float], Tensor] | None = None  # of each token's loss, from log ρ; None: 1
    cap: float = math.inf  # the weight's upper limit
    mean_one: bool = False  # divide the weights by their mean over the batch's tokens


METHODS = {
    "dense": Method(evicts=False, replays=False),
    "naive": Method(evicts=True, replays=False),  # samples sparse and learns dense, as if they were one policy
    "tis": Method(evicts=True, replays=False, weight=token_is, cap=2.0),
    "icepop": Method(evicts=True, replays=False, weight=icepop, cap=5.0),
    # practically untruncated; beyond 1e15, float32 cannot hold the square of a gradient
    "seq_is": Method(evicts=True, replays=False, weight=sequence_is, cap=1e15),
    "seq_mask": Method(evicts=True, replays=False, weight=sequence_mask, cap=3.0),
    "sparse_rl": Method(evicts=True, replays=False, weight=sparse_rl, cap=1.5, mean_one=True),
    "smd": Method(evicts=True, replays=True),
}


# --- 6. advantage, policy loss and KL ---


def group_advantage(reward_NS: Tensor, norm_std: bool = True, eps: float = 1e-6) -> Tensor:
    """(r - mean) / (std + eps) within a prompt's samples (GRPO, 2402.03300), or r - mean (Dr. GRPO, 2503.20783)."""
    if reward_NS.ndim != 2:
        raise ValueError(f"rewards must be (N, S), a row for each prompt, got {tuple(reward_NS.shape)}")
    r_NS = reward_NS.double()
    centred_NS = r_NS - r_NS.mean(dim=1, keepdim=True)
    std_N1 = r_NS.std(dim=1, keepdim=True, correction=0)
    advantage_NS = centred_NS / (std_N1 + eps) if norm_std else centred_NS
    # rewards that differ by a few float32 roundings of the largest are equal: their spread would amplify noise
    equal_N1 = std_N1 <= ROUNDING * r_NS.abs().amax(dim=1, keepdim=True)
    return advantage_NS.masked_fill(equal_N1, 0.0).to(at_least_float32(reward_NS.dtype))


def same_shape(**tensors: Tensor) -> None:
    """ValueError unless these have one shape: broadcasting would turn a mistake into another loss."""
    if len({x.shape for x in tensors.values()}) > 1:
        raise ValueError(f"shapes differ: {', '.join(f'{name} {tuple(x.shape)}' for name, x in tensors.items())}")


def policy_loss(
    logp_BR: Tensor, old_logp_BR: Tensor, advantage_BR: Tensor, weight_BR: Tensor, mask_BR: Tensor,
    clip: float, denominator: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-Σ w min(r A, clip(r, 1 - ε, 1 + ε) A) / denominator, r = exp(logp - old); and which tokens were clipped."""
    same_shape(logp=logp_BR, old_logp=old_logp_BR, advantage=advantage_BR, weight=weight_BR, mask=mask_BR)
    ratio_BR = (logp_BR - old_logp_BR).exp()
    unclipped_BR = ratio_BR * advantage_BR
    clipped_BR = ratio_BR.clamp(1 - clip, 1 + clip) * advantage_BR
    loss = -(weight_BR * unclipped_BR.minimum(clipped_BR) * mask_BR).sum() / denominator
    return loss, (clipped_BR < unclipped_BR) & mask_BR


def kl_divergence(p_logp_XV: Tensor, q_logp_XV: Tensor) -> Tensor:
    """KL(p ‖ q) = Σ_v p (log p - log q) of each token over the whole vocabulary, from log-probs: (X,)."""
    same_shape(p=p_logp_XV, q=q_logp_XV)
    return (p_logp_XV.exp() * (p_logp_XV - q_logp_XV)).sum(dim=-1)


# --- 7. one training step ---


@dataclass(frozen=True)
class Runtime:
    """How a step is computed. None of this changes a result by more than rounding."""

    sample: Callable[..., Rollout] = sample
    replay: Callable[..., list[Tensor]] = replay
    backend: str | None = None  # of `shadow_attention`
    all_sum: Callable[[Sequence[Tensor]], None] = lambda tensors: None  # sums tensors over all processes, in place


class Totals(NamedTuple):
    """Denominators of the means in a loss, over the whole batch, so that the losses of its parts add up."""

    sequences: int
    tokens: int
    pairs: int  # prompts whose samples have different rewards, which DPO compares


@dataclass(frozen=True)
class Batch:
    """A rollout, and what is computed once before the first update on it."""

    rollout: Rollout
    reward_B: Tensor
    old_logp_BR: Tensor
    weight_BR: Tensor
    extra: dict[str, Tensor]  # what the objective needs besides, a row for each sequence

    def totals(self, runtime: Runtime) -> Totals:
        """Of this batch in all processes."""
        reward_NS, tokens = self.reward_B.view(len(self.rollout.pad_N), -1), self.rollout.mask_BR.sum()
        pairs = (reward_NS.amax(dim=1) > reward_NS.amin(dim=1)).sum()
        totals = torch.stack((torch.full_like(tokens, len(self.reward_B)), tokens, pairs))
        runtime.all_sum([totals])
        return Totals(*totals.tolist())


@dataclass(frozen=True)
class GRPO:
    """The default objective: group baseline and clipped ratio. harness/objectives.py has PPO and DPO in this form."""

    norm_std: bool = True  # False: Dr. GRPO
    clip: float = 0.2  # PPO's ε

    def prepare(self, model, rollout: Rollout, seen_LBGT: Tensor, reward_B: Tensor, runtime: Runtime) -> dict:
        """What `loss` needs of a rollout, computed once: tensors with a row for each sequence."""
        advantage_NS = group_advantage(reward_B.view(len(rollout.pad_N), -1), self.norm_std)
        return {"advantage_BR": advantage_NS.reshape(-1, 1).expand_as(rollout.mask_BR)}

    def loss(self, batch: Batch, logp_BR: Tensor, hidden_XC: Tensor, max_new: int, totals: Totals) -> tuple:
        """The policy-gradient loss, and which tokens were clipped."""
        terms = batch.old_logp_BR, batch.extra["advantage_BR"], batch.weight_BR, batch.rollout.mask_BR
        return policy_loss(logp_BR, *terms, self.clip, totals.sequences * max_new)


@dataclass(frozen=True)
class Config:
    """What a training step computes."""

    method: str = "smd"
    objective: GRPO = GRPO()
    eviction: Eviction = Eviction("snapkv", Fraction(65, 100))
    samples: int = 8  # per prompt: the group of GRPO
    max_new: int = 16  # longest response
    eos: int | tuple[int, ...] = -1  # tokens that end a response; -1: none does
    lam: float = 0.1  # weight λ of track 2


@torch.no_grad()
def make_batch(model: TinyModel, rollout: Rollout, reward_B: Tensor, config: Config, runtime: Runtime) -> Batch:
    """Old log-probs and importance weights under the policy that sampled, and what the objective adds."""
    method, mask_BR = METHODS[config.method], rollout.mask_BR
    seen_LBGT = rollout.evicted_at_LBGT if method.replays else rollout.never_evicted_LBGT
    old_logp_BR = rollout.logp_BR  # a learner that replays has the recorded log-probs
    if not method.replays:
        (hidden_XC,) = runtime.replay(model, rollout, seen_LBGT, backend=runtime.backend)
        old_logp_BR = response_logp(model, rollout, hidden_XC)
    weight_BR = torch.ones_like(rollout.logp_BR)
    if method.weight is not None:
        weight_BR = method.weight(old_logp_BR - rollout.logp_BR, method.cap)
    if method.mean_one:
        total, count = weight_BR[mask_BR].sum(), mask_BR.sum().to(weight_BR.dtype)
        runtime.all_sum([total, count])
        weight_BR = weight_BR / (total / count).clamp(min=1e-9)
    extra = config.objective.prepare(model, rollout, seen_LBGT, reward_B, runtime)
    return Batch(rollout, reward_B, old_logp_BR, weight_BR, extra)


def learner_loss(model: TinyModel, batch: Batch, totals: Totals, config: Config, runtime: Runtime) -> tuple:
    """The loss of a batch, or of a part of it, and figures for the log. All but replay_error add up over the parts."""
    method, rollout, mask_BR = METHODS[config.method], batch.rollout, batch.rollout.mask_BR
    seen_LBGT = rollout.evicted_at_LBGT if method.replays else rollout.never_evicted_LBGT
    track_2 = method.replays and config.lam > 0
    masks = (seen_LBGT, rollout.never_evicted_LBGT) if track_2 else (seen_LBGT,)
    hidden = runtime.replay(model, rollout, *masks, backend=runtime.backend)

    def per_token(token_x: Tensor, hidden_xC: Tensor, dense_xC: Tensor | None = None) -> tuple[Tensor, ...]:
        logp_xV = model.log_probs(hidden_xC)
        target_xV = logp_xV.detach()  # track 2 sends no gradient into π_shadow
        entropy_x = -(target_xV.exp() * target_xV).sum(dim=-1)
        kl_x = kl_divergence(model.log_probs(dense_xC), target_xV) if track_2 else torch.zeros_like(entropy_x)
        return gather_logp(logp_xV, token_x), entropy_x, kl_x

    logp_X, entropy_X, kl_X = chunked(per_token, model.config.vocab, rollout.response_BR[mask_BR], *hidden)
    logp_BR = unpack(logp_X, mask_BR)
    loss, clipped_BR = config.objective.loss(batch, logp_BR, hidden[0], config.max_new, totals)
    loss = loss + config.lam * kl_X.sum() / totals.tokens
    row = dict(loss=loss.detach(), clip_fraction=clipped_BR.sum() / totals.tokens)
    row["entropy"] = entropy_X.sum() / totals.tokens
    if method.replays or not method.evicts:
        row["replay_error"] = (logp_BR.detach() - rollout.logp_BR).abs().max()
    return loss, row


def train_step(
    model: TinyModel, optimizer: torch.optim.Optimizer, prompt_NP: Tensor, pad_N: Tensor,
    reward: Callable[[Rollout], Tensor], config: Config, runtime: Runtime = Runtime(),
) -> dict[str, float]:  # fmt: skip
    """Sample, score, learn: one update on these prompts, and figures for the log.

    reward(rollout): a float tensor (B,). harness/train.py adds epochs, gradient accumulation and several processes.
    """
    eviction = config.eviction if METHODS[config.method].evicts else None
    rollout = runtime.sample(model, prompt_NP, pad_N, config.samples, config.max_new, config.eos, eviction)
    reward_B = reward(rollout)
    batch = make_batch(model, rollout, reward_B, config, runtime)
    loss, row = learner_loss(model, batch, batch.totals(runtime), config, runtime)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad()
    return {name: x.item() for name, x in dict(row, reward=reward_B.mean(), grad_norm=norm).items()}


if __name__ == "__main__":
    from harness.train import main

    raise SystemExit(main())
