"""Shadow Mask Distillation (arXiv 2605.06850): reinforcement learning with a sampler that forgets.

The sampler decodes with a small KV cache and drops entries for good, so π_sparse answers under a context that shrinks.
A learner that scores the answer under the full context follows the gradient of another policy. Here the sampler records
the one integer that is each key's life, evicted_at, and the learner replays exactly what was seen:

    visible(i, j) = j <= i < evicted_at[j]                                   query i, key j
    loss = GRPO(π_shadow) + λ · KL(π_dense ‖ stop-gradient(π_shadow))        λ = 0.1

π_shadow, the learner under that mask, equals π_sparse, so its policy gradient (track 1) is on-policy. It takes the
choice of keys as given: which keys are kept jumps as the weights move, and the gradient says nothing about that choice.
π_dense, the learner under the full causal mask, follows π_shadow (track 2), so that the trained model also serves with
a full cache.

Departures from the paper: (1) a tiny model and toy-sized tasks; (2) the policy loss is divided by sequences × the
longest possible response, not by each response's own length, so that all tokens weigh the same; (3) the KL of track 2
is averaged over the batch's response tokens; (4) one update per batch of rollouts unless `--epochs` says otherwise;
(5) the S samples of a prompt share its prefill and therefore what is evicted right after it.

    python smd.py                                  the demonstration: 100 steps on the chain task
    python smd.py --data FILE.jsonl                on prompts and answers of your own

Dimension letters: N prompts, S samples of each, B = N·S sequences, P prompt columns (left-padded), R response columns,
T = P + R, K cached keys, W recent queries, L layers, H query heads, G kv heads, M = H/G, D head dim, V vocabulary, X
all response tokens in one row. A column counts from the left edge of the padded batch and is the position in the rule
above; the RoPE position is the column less the padding before it.
"""

import dataclasses
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import NamedTuple

# threads that spin while they wait for one another cost, beside a busy process, far more than the core that it takes
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# large tensors in large pages: those of a real model are given back and taken again all the time
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from harness import base, cli, device, files, memory, parallel, report, runs, streams, tasks
from harness.agent import Agent
from harness.cli import require
from harness.objectives import (
    DPO_BETA,
    GAE_LAMBDA,
    VALUE_COEF,
    Counts,
    Policy,
    Seam,
    dpo_loss,
    effective_share,
    gae,
    k3,
    of_tokens,
    same_shape,
    spread,
    value_loss,
)
from harness.rollout import Rollout
from harness.settings import VALUES, Settings, completed
from harness.store import LIVES, Store, pack
from kernel import NEVER, Record, masked_attention, products, shadow_attention
from tiny_model import TinyModel, causal_attention, rope_positions, wide

# what nobody has to turn, and why it is what it is
CLIP = 0.2  # PPO's ε; bites from a batch's second update on
LR_WARMUP = 20  # steps over which the learning rate rises: at first AdamW's moments are empty
SCRATCH = {"cpu": 2**19, "cuda": 2**25}  # numbers, in keys and again in values, made wider at a time in decoding
ASK = {"cpu": 1, "cuda": 8}  # tokens after which it is asked whether all have ended: on CUDA an answer is waited for
LOGITS = 2**23  # logits of a part of the learner's tokens, and some ten times as many numbers come of them
ROWS = 16  # of a head's square of queries, or keys, by keys: so many at once need no more memory than keys and values
CHOOSING = 8  # prompts whose samples choose at a time what they keep: what a choice makes is a part of the cache's peak
DIAGNOSE_EVERY = 10  # steps: it costs one more pass of the learner


def checked(s: Settings) -> Settings:
    """Settings with what task, model and machine decide filled in; UsageError for what no run could use."""
    if s.budget is not None:
        parse_budget(s.budget)
    cli.check_values(s, CHOICES)
    weighted_dpo = s.objective == "dpo" and METHODS[s.method].weight is not None
    require(not weighted_dpo, f"--objective dpo weights no tokens; take --method dense, naive or smd, got {s.method}")
    return completed(s)


@dataclass(frozen=True)
class Eviction:
    """What the sampler keeps in each layer and kv head; window, sinks and pool where the policy's `Rule` says so."""

    policy: str
    budget: int | str  # entries: a count (22), or a share of each prompt ("65%")
    interval: int = 4  # tokens between two compressions
    window: int = 4
    sinks: int = 1
    pool: int = 5
    protect: str | None = None  # "prompt": its keys stay, beside a budget that is the response's own

    def keep(self, length_N: Tensor) -> Tensor:
        """Entries to keep of prompts of these lengths (N,); UsageError where the policy is forced to keep more."""
        keep_N = self.wanted(length_N)
        least = sum(self.forced.values())
        need = f"{' + '.join(self.forced)} = {least}".removeprefix("1 = ")
        of = f" ({self.budget} of a prompt of {length_N.min()} tokens)" if "%" in str(self.budget) else ""
        require(keep_N.min() >= least, f"budget must be at least {need}, got {keep_N.min()}{of}")
        return keep_N

    def wanted(self, length_N: Tensor) -> Tensor:
        """Entries (N,) that the budget asks for of prompts of these lengths (N,)."""
        budget = parse_budget(self.budget)
        if isinstance(budget, int):
            return torch.full_like(length_N, budget)
        return length_N.new_tensor([math.ceil(budget * length) for length in length_N.tolist()])

    @property
    def forced(self) -> dict[str, int]:
        """Entries that the policy keeps whatever the budget says, by the name of their setting; at least one."""
        rule = EVICTIONS[self.policy]
        sinks = {"sinks": self.sinks} if rule.sinks and not self.protect else {}
        return sinks | ({"window": self.window} if rule.window else {"1": 1})


def parse_budget(budget: int | str) -> int | Fraction:
    """A count of entries (22), or a share of each prompt ("65%"), exact as it is written; UsageError for all else."""
    text = str(budget)
    percent = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]+)?)%", text)
    share = Fraction(percent[1]) / 100 if percent else 0
    if 0 < share <= 1:
        return share
    # a share was once written as a number from 0 to 1
    old = re.fullmatch(r"(0?\.[0-9]+|1\.0*)", text)
    hint = f"; as a share that is {100 * float(text):g}%" if old else ""
    form = "budget must be a count of keys, such as 22, or a share of the prompt, such as 65% (at most 100%)"
    require(re.fullmatch("[0-9]{1,9}", text) is not None, f"{form}, got {text}{hint}")
    return int(text)


@dataclass
class Entries:
    """A layer's keys as a policy sees them: the dead, then the live in column order. B: prompts, or later sequences.

    Slots count through the two parts of the store, first what is shared, of which the prompts themselves have nothing.
    """

    eviction: Eviction
    key_B: Tensor  # of what is drawn at random
    l: int  # the layer
    shared_k_NGKD: Tensor
    own_k_BGKD: Tensor
    slot_BGK: Tensor
    column_BGK: Tensor
    live_BGK: Tensor  # neither padding nor evicted
    received_BGK: Tensor | None  # attention received so far, where the policy accumulates it
    q_BHWD: Tensor  # the last W queries
    pad_B: Tensor
    keep_B: Tensor  # entries to keep
    P: int  # columns of the prompt
    now: int  # column of the next query

    def newest(self, count: int | Tensor) -> Tensor:
        return self.column_BGK >= self.now - count

    def sinks(self) -> Tensor:
        return self.column_BGK < self.pad_B[:, None, None] + self.eviction.sinks

    def of_keys(self, f: Callable[[Tensor], Tensor]) -> Tensor:
        """f (B, G, K, n) of each key in float32 or better; of a shared one it is computed once."""
        shared_k, own_k = (k.to(wide(k.dtype)) for k in (self.shared_k_NGKD, self.own_k_BGKD))
        both = torch.cat((f(shared_k).repeat_interleave(len(own_k) // len(shared_k), dim=0), f(own_k)), dim=2)
        return both.gather(2, self.slot_BGK[..., None].expand(-1, -1, -1, both.shape[-1]))


def window_logits(e: Entries) -> Tensor:
    """Logits of the recent queries over the live keys, (B, G, M, W, K); -inf where a query cannot see a key."""
    assert e.q_BHWD.shape[2], "a policy that reads queries says so in its rule"
    _, H, W, D = e.q_BHWD.shape
    with torch.autocast(e.q_BHWD.device.type, enabled=False):
        given = (x.to(wide(x.dtype)) for x in (e.q_BHWD, e.own_k_BGKD, e.shared_k_NGKD))
        logits_BGMWK = products(*given).transpose(1, 2).flatten(0, 1)
    slot_BGMWK = e.slot_BGK[:, :, None, None].expand(-1, -1, H // e.slot_BGK.shape[1], W, -1)
    logits_BGMWK = logits_BGMWK.gather(-1, slot_BGMWK).mul_(D**-0.5)
    q_column_W = torch.arange(e.now - W, e.now, device=e.q_BHWD.device)
    visible_BGWK = e.live_BGK[:, :, None] & (e.column_BGK[:, :, None] <= q_column_W[:, None])
    return logits_BGMWK.masked_fill_(~visible_BGWK[:, :, None], -math.inf)


def window_attention(e: Entries) -> Tensor:
    """Softmax of `window_logits`. A query that sees nothing, because it is padding, attends to nothing."""
    return window_logits(e).softmax(dim=-1).nan_to_num_(0.0)


def streaming(e: Entries) -> Tensor:
    """The most recent keys, and sinks (StreamingLLM, 2309.17453)."""
    return e.column_BGK.double()


def snapkv(e: Entries) -> Tensor:
    """What the observation window attends to, averaged over `pool` neighbours (SnapKV, 2404.14469).

    The paper's 5 suits prompts of thousands of tokens; on one of 34 it wipes out the choice, and 1 does not average.
    """
    score_BGK = window_attention(e).mean(dim=(2, 3)).masked_fill(e.newest(e.eviction.window), 0.0)
    return F.avg_pool1d(score_BGK, kernel_size=e.eviction.pool, stride=1, padding=e.eviction.pool // 2)


def h2o(e: Entries) -> Tensor:
    """Half the budget to the most recent keys, half to those that received most attention (H2O, 2306.14048)."""
    recent_B = e.keep_B - e.keep_B // 2
    return e.received_BGK.masked_fill(e.newest(recent_B[:, None, None]), math.inf)


def tova(e: Entries) -> Tensor:
    """The last query's attention, mean over all heads, one set a layer; the last key stays (TOVA, 2401.06104)."""
    score_BK = window_attention(e).mean(dim=(1, 2, 3))
    return score_BK[:, None].expand_as(e.column_BGK).masked_fill(e.newest(1), math.inf)


def knorm(e: Entries) -> Tensor:
    """Keys of small norm are the ones that receive much attention (2406.11430)."""
    # in steps of 0.1 %: in the first layer the norms of equal tokens differ by rounding alone, and of those the earlier
    # key is to stay, in float32 as in float64
    norm_BGK = e.of_keys(lambda k: k.norm(dim=-1, keepdim=True))[..., 0]
    return -(1000 * norm_BGK.log()).round()


def rkv(e: Entries, mix: float = 0.07, alike: float = 0.5) -> Tensor:
    """Importance less redundancy, Z = mix · A - (1 - mix) · S (R-KV, 2505.24133)."""
    window_BGK = e.newest(e.eviction.window)
    logits_BGWK = window_logits(e).amax(dim=2).masked_fill(window_BGK[:, :, None], -math.inf)
    attention_BGK = logits_BGWK.softmax(dim=-1).nan_to_num(0.0).mean(dim=2)
    attention_BGK = F.max_pool1d(attention_BGK, kernel_size=7, stride=1, padding=3)
    unit_BGKD = e.of_keys(partial(F.normalize, dim=-1)).masked_fill_(~e.live_BGK[..., None], 0.0)
    slot_K = torch.arange(unit_BGKD.shape[2], device=unit_BGKD.device, dtype=torch.int32)
    total_BGK = torch.zeros_like(attention_BGK)
    for slot_r in slot_K.split(ROWS):
        with torch.autocast(slot_K.device.type, enabled=False):
            cosine_BGrK = unit_BGKD[:, :, slot_r] @ unit_BGKD.transpose(-1, -2)
        cosine_BGrK.masked_fill_(slot_r[:, None] == slot_K, 0.0)
        # the last of a key's near copies does not count as one, so that the newest copy survives
        last_BGr1 = torch.where(cosine_BGrK > alike, slot_K, -1).amax(dim=-1, keepdim=True)
        total_BGK += cosine_BGrK.masked_fill_(slot_K == last_BGr1, 0.0).sum(dim=-2)
    mean_BGK = total_BGK / e.live_BGK.sum(dim=-1, keepdim=True)
    redundancy_BGK = mean_BGK.masked_fill(~e.live_BGK, -math.inf).softmax(dim=-1)
    return mix * attention_BGK - (1 - mix) * redundancy_BGK


def random(e: Entries) -> Tensor:
    """Uniform. Each head keeps other keys, so that together they lose little (Random Attention, 2609.03430)."""
    # counted from where the sequence begins, because how many columns stand before it depends on its batch
    begin_B11 = e.pad_B[:, None, None]
    head_G1 = torch.arange(e.column_BGK.shape[1], device=begin_B11.device)[:, None]
    return streams.uniform(e.key_B[:, None, None], e.l, e.now - begin_B11, head_G1, e.column_BGK - begin_B11)


class Rule(NamedTuple):
    """An eviction policy: its score, and what it needs and keeps besides."""

    score: Callable[[Entries], Tensor]  # (B, G, K): higher is kept
    sinks: bool = False  # the first keys always stay, as many as `Eviction.sinks`
    window: bool = False  # the last keys always stay, as many as `Eviction.window`
    reads_queries: bool = False  # the last ones, `Eviction.window` of them or, in a rule without a window, one
    accumulates: bool = False  # reads the attention that each key has received


EVICTIONS = {
    "streaming": Rule(streaming, sinks=True),
    "snapkv": Rule(snapkv, sinks=True, window=True, reads_queries=True),
    "h2o": Rule(h2o, accumulates=True),
    "tova": Rule(tova, reads_queries=True),
    "knorm": Rule(knorm),
    "rkv": Rule(rkv, window=True, reads_queries=True),
    "random": Rule(random, sinks=True, window=True),
}


def victims(e: Entries) -> Tensor:
    """The live entries (B, G, K) that are not among their head's best, as many as the budget."""
    rule = EVICTIONS[e.eviction.policy]
    stays_BGK = torch.zeros_like(e.live_BGK)
    keep_BG1 = e.keep_B[:, None, None]
    if rule.sinks and not e.eviction.protect:
        stays_BGK |= e.sinks()
    if rule.window:
        stays_BGK |= e.newest(e.eviction.window)
    if e.eviction.protect:
        of_prompt_BGK = e.live_BGK & (e.column_BGK < e.P)
        stays_BGK |= of_prompt_BGK
        keep_BG1 = keep_BG1 + of_prompt_BGK.sum(dim=-1, keepdim=True)
    score_BGK = rule.score(e).masked_fill(stays_BGK, math.inf).masked_fill(~e.live_BGK, -math.inf)
    # stable, so that ties fall the same way on every device
    order_BGK = score_BGK.argsort(dim=-1, descending=True, stable=True)
    beyond_BGK = torch.arange(order_BGK.shape[-1], device=order_BGK.device) >= keep_BG1
    return e.live_BGK & torch.zeros_like(e.live_BGK).scatter(-1, order_BGK, beyond_BGK.expand_as(order_BGK))


class Cache:
    """What the sampler still has: of each prompt what was kept of it, once, and each sample's own tokens.

    Layers attend with `prefill` and `decode`. `memory` counts what is alive here and while entries are chosen.
    """

    def __init__(self, pad_N: Tensor, S: int, P: int, max_new: int, eviction: Eviction | None, key_N: Tensor):
        require(max_new <= LIVES, f"a response has at most {LIVES} tokens here, got {max_new}")
        # a full cache: nothing exceeds the budget
        self.eviction = eviction or Eviction("streaming", P + max_new, interval=32, sinks=0)
        self.rule = EVICTIONS[self.eviction.policy]
        self.key_N = key_N
        self.key_B = streams.hashed(key_N[:, None], torch.arange(S, device=pad_N.device)).flatten()
        self.pad_N, self.S, self.P, self.max_new = pad_N, S, P, max_new
        self.padding_N = pad_N if pad_N.any() else None
        self.keep_N = self.eviction.keep(P - pad_N)
        protected = P if self.eviction.protect else 0
        self.least, self.most = (protected + keep.item() for keep in self.keep_N.aminmax())
        self.kept = min(P, self.most)  # of a prompt's columns, with dead ones where another prompt keeps more
        kept_pad_N = self.kept - torch.minimum(P - pad_N, protected + self.keep_N)
        self.kept_pad_B, self.keep_B = (x_N.repeat_interleave(S) for x_N in (kept_pad_N, self.keep_N))
        self.used = self.kept  # entries of a sample, likewise
        self.tokens = 0  # stored of each response
        W = self.eviction.window if self.rule.window else 1
        self.W = W if self.rule.reads_queries else 0
        self.layers: list[Store] = []
        self.memory = memory.PeakBytes()

    def prefill(self, l: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend densely within the prompts, then store what the budget allows of this layer's keys."""
        N, G, P, _ = k.shape
        with self.memory:
            self.memory.hold(k, v)
            column_NGP = torch.arange(P, device=k.device).expand(N, G, P)
            live_NGP = column_NGP >= self.pad_N[:, None, None]
            q_NHWD = q[:, :, max(0, P - self.W) :]
            entries = k[:, :, :0], k, column_NGP, column_NGP, live_NGP, None, q_NHWD
            e = Entries(self.eviction, self.key_N, l, *entries, self.pad_N, self.keep_N, P, now=P)
            if self.rule.accumulates:
                # some queries at a time: P × P weights would be the memory that the cache is there to save
                rows = max(1, ROWS * G // q.shape[1])
                spans = ((first, min(first + rows, P)) for first in range(0, P, rows))
                blocks = (dataclasses.replace(e, q_BHWD=q[:, :, first:end], now=end) for first, end in spans)
                e.received_BGK = sum(window_attention(block).sum(dim=(2, 3)) for block in blocks)
            if self.least < P:
                live_NGP = live_NGP & ~victims(e)
            q_NHWD = F.pad(q_NHWD, (0, 0, self.W - q_NHWD.shape[2], 0))
            self.layers.append(Store(k, v, live_NGP, e.received_BGK, q_NHWD, self.kept))
        return causal_attention(q, k, v, self.padding_N)

    def room(self) -> int:
        """Tokens until entries are chosen again, or until the last that is stored."""
        return min(self.eviction.interval, self.max_new - 1 - self.tokens)

    def branch(self) -> None:
        """All layers have the prompts: make room for what their samples add."""
        with self.memory:
            for layer in self.layers:
                self.forget_queries(layer)
                layer.branch(self.S, self.max_new, self.room())

    def forget_queries(self, layer: Store) -> None:
        """Drop the last queries once no choice will read them: those of all samples may be more than all their keys."""
        if self.room() < self.eviction.interval:
            layer.q_BHWD = layer.q_BHWD[:, :, :0].clone()

    def decode(self, l: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Add one token to the cache and attend to what is in there: out (B, H, 1, D)."""
        layer = self.layers[l]
        layer.add(q, k, v, column=self.kept + self.tokens)
        shared, own = layer.shared, layer.own
        # some prompts at a time: on a CPU the float64 copies of all keys would leave the processor's cache
        numbers = shared.k_XGKD[0].numel() + self.S * own.k_XGKD[0].numel()
        outs = []
        for n, b in layer.parts(max(1, SCRATCH[q.device.type] // numbers)):
            of_samples = q[b], own.k_XGKD[b], own.v_XGKD[b], ~layer.seen_BGK[b, :, None]
            out_BH1D, weight_NGSM1K = masked_attention(*of_samples, (shared.k_XGKD[n], shared.v_XGKD[n]))
            outs.append(out_BH1D.to(q.dtype))
            if self.rule.accumulates:
                layer.receive(n, b, weight_NGSM1K.sum(dim=(3, 4)).transpose(1, 2).flatten(0, 1))
        return torch.cat(outs)

    def evict(self, l: int, n: slice, b: slice) -> None:
        """Return to the budget in these sequences."""
        layer = self.layers[l]
        slot_BGK = pack(layer.seen_BGK[b], self.used)
        live_BGK = layer.seen_BGK[b].gather(-1, slot_BGK)
        column_BGK = layer.columns(n, b).gather(-1, slot_BGK)
        received_BGK = layer.received_BGT[b].gather(-1, column_BGK) if self.rule.accumulates else None
        keys = layer.shared.k_XGKD[n], layer.own.k_XGKD[b], slot_BGK, column_BGK, live_BGK, received_BGK
        limits = self.kept_pad_B[b], self.keep_B[b], self.kept, self.kept + self.tokens
        e = Entries(self.eviction, self.key_B[b], l, *keys, layer.q_BHWD[b], *limits)
        layer.bury(b, slot_BGK, column_BGK, victims(e), self.tokens)

    def token_done(self) -> None:
        """Every layer has the token: count it, and at the end of an interval return to the budget."""
        self.used += 1
        self.tokens += 1
        if self.tokens % self.eviction.interval:
            return
        over = self.used > self.least
        with self.memory:
            for l, layer in enumerate(self.layers):
                if over:
                    for n, b in layer.parts(CHOOSING):
                        self.evict(l, n, b)
                self.forget_queries(layer)
            # of all layers at once, because on CUDA the answer is waited for
            counts = torch.stack([layer.seen_at_most() for layer in self.layers]).tolist()
            for layer, (shared, own) in zip(self.layers, counts, strict=True):
                layer.drop_dead(shared, own, self.room())
        self.used = min(self.used, self.most)


@torch.no_grad()
def sample(
    model: TinyModel, prompt_NP: Tensor, pad_N: Tensor, samples: int, max_new: int, eos: int,
    eviction: Eviction | None = None, key_N: Tensor | None = None, forced_BR: Tensor | None = None,
) -> Rollout:  # fmt: skip
    """Draw responses with a small cache, and record which query could see which key.

    prompt_NP: int64 tokens, left-padded by pad_N columns. A response ends with `eos` or after max_new tokens. eviction:
    None for a full cache. key_N: an int64 for each prompt, which alone decides what is drawn for it; None: its number.
    forced_BR: "draw" these max_new tokens. Raises UsageError where the budget does not hold what the policy is forced
    to keep, FloatingPointError where the logits are not finite.
    Temperature 1 and no truncation: only if the recorded log-prob is the model's own can a learner reproduce it.
    """
    N, P = prompt_NP.shape
    key_N = torch.arange(N, device=pad_N.device) if key_N is None else key_N
    cache = Cache(pad_N, samples, P, max_new, eviction, key_N)
    hidden_NPC = model.extend(model.embed_tokens(prompt_NP), rope_positions(pad_N, P), cache.prefill)
    hidden_BC = hidden_NPC[:, -1].repeat_interleave(samples, 0)
    cache.branch()
    pad_B = pad_N.repeat_interleave(samples)
    tokens, logps = [], []
    length_B = torch.zeros_like(pad_B)
    alive_B = torch.ones_like(pad_B, dtype=torch.bool)
    finite = torch.ones_like(alive_B[0])
    while True:
        logp_BV = model.log_probs(hidden_BC)
        finite &= logp_BV.isfinite().all()
        if forced_BR is None:
            drawn_B = streams.drawn(logp_BV, streams.uniform(len(tokens), cache.key_B))
        else:
            drawn_B = forced_BR[:, len(tokens)]
        tokens.append(torch.where(alive_B, drawn_B, eos))
        logps.append(torch.where(alive_B, logp_BV.gather(1, drawn_B[:, None])[:, 0], 0.0))
        length_B += alive_B
        alive_B = alive_B & (drawn_B != eos)
        if len(tokens) == max_new or len(tokens) % ASK[pad_B.device.type] == 0:
            all_finite, some_alive = torch.stack((finite, alive_B.any())).tolist()
            if not all_finite:
                raise FloatingPointError("the policy's logits are not finite")
            if len(tokens) == max_new or not some_alive:
                break
        # a sequence that has ended runs along with the others; `finished_record` drops what it writes from here on
        position_B1 = (P + cache.tokens - pad_B)[:, None]
        hidden_BC = model.extend(model.embed_tokens(tokens[-1][:, None]), position_B1, cache.decode)[:, 0]
        cache.token_done()
    R, c = length_B.max().item(), model.config
    entry_bytes = 2 * c.layers * c.kv_heads * c.head_dim * cache.layers[0].own.k_XGKD.element_size()
    with cache.memory:  # one layer after the other is given up for its record
        evicted_at_LBGT = torch.stack([cache.layers.pop(0).record(pad_N, P) for _ in range(c.layers)])
    evicted_at_LBGT = finished_record(evicted_at_LBGT[..., : P + R], P + length_B)
    drawn = torch.stack(tokens[:R], dim=1), torch.stack(logps[:R], dim=1), length_B
    return Rollout(prompt_NP, pad_N, *drawn, evicted_at_LBGT, cache.memory.peak, entry_bytes)


def finished_record(evicted_at_LBGT: Tensor, end_B: Tensor) -> Tensor:
    """evicted_at without what was written after a sequence's last query.

    A prompt in columns 0 and 1 and a response in 2, 3, 4 end at column 5. The token in column 4 is predicted by the
    query in column 3 and never is a query itself. So a key evicted at 3 is hidden from that query, and one evicted at 4
    or later was seen by every query there was: NEVER. Columns from 5 on are padding: 0.
    """
    end_B11 = end_B[:, None, None]
    column_T = torch.arange(evicted_at_LBGT.shape[-1], device=end_B.device)
    evicted_at_LBGT = evicted_at_LBGT.masked_fill(evicted_at_LBGT >= end_B11 - 1, NEVER)
    return evicted_at_LBGT.masked_fill(column_T >= end_B11, 0)


def replay(
    model: TinyModel, rollout: Rollout, *records_LBGT: Tensor, backend: str | None = None, seam: Callable = lambda x: x
) -> list[Tensor]:
    """For each record, the hidden states (X, C) that predict the response tokens from what their queries see under it.

    Under `rollout.evicted_at_LBGT` their logits are π_shadow, under `rollout.never_evicted_LBGT` π_dense. The prompts
    are computed once, dense like the sampler's; the x-th row belongs to the x-th True of `rollout.mask_BR`.
    An evicted token stays in the sequence and has its own row: only later queries cannot see it. Leaving it out would
    change the keys that were kept, for those above the first layer were computed while it was still visible.
    seam: between the prompts and the responses, whose backward passes then run one after the other.
    """
    (N, P), (B, R) = rollout.prompt_NP.shape, rollout.response_BR.shape
    # under a further record, a prompt has as many samples more: all of them go through the layers together
    tracks, S = len(records_LBGT), B // N
    # the last token is only ever predicted, by the token before it
    seen = Record(*(record[..., : P + R - 1] for record in records_LBGT), prompts=N)
    padding_N = rollout.pad_N if rollout.pad_N.any() else None
    prompt_keys = []

    def attend_in_prompts(l: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        prompt_keys.append((seam(k), seam(v)))
        return causal_attention(q, k, v, padding_N)

    def attend_behind_prompts(l: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return shadow_attention(q, k, v, seen[l], q_start=P, backend=backend, shared=prompt_keys[l])

    # all tokens in one lookup, because the gradient of each is as large as the table
    tokens = torch.cat((rollout.prompt_NP.flatten(), rollout.response_BR[:, :-1].flatten()))
    of_prompts, of_responses = model.embed_tokens(tokens).tensor_split([N * P])
    hidden_NPC = model.extend(of_prompts.unflatten(0, (N, P)), rope_positions(rollout.pad_N, P), attend_in_prompts)
    first_B1C = seam(hidden_NPC[:, -1:]).repeat_interleave(tracks * S, dim=0)
    of_samples = seam(of_responses).view(N, 1, S, R - 1, model.config.width)
    response_BRC = of_samples.expand(-1, tracks, -1, -1, -1).flatten(0, 2)
    position_BR = rope_positions(rollout.pad_N, P + R - 1)[:, P:].repeat_interleave(tracks * S, dim=0)
    later_BRC = model.extend(response_BRC, position_BR, attend_behind_prompts)
    hidden_BRC = torch.cat((first_B1C, later_BRC), dim=1)
    return [track.flatten(0, 1)[rollout.mask_BR] for track in hidden_BRC.unflatten(0, (N, tracks, S)).unbind(1)]


def by_parts(f: Callable, model: TinyModel, rollout: Rollout, *hidden: Tensor) -> list[Tensor]:
    """What f makes of the response tokens (X,) and of the log-probs (X, V) that each of `hidden` (X, C) leads to.

    Of many tokens some at a time, and the backward pass makes their logits again: all are never there at once.
    """

    def part(token_x: Tensor, *hidden: Tensor) -> tuple[Tensor, ...]:
        # in one product, because its gradient is as large as the table of tokens
        return f(token_x, *model.log_probs(torch.stack(hidden)))

    rows = rollout.response_BR[rollout.mask_BR], *hidden
    count = math.ceil(len(rows[0]) * model.config.vocab / LOGITS)
    if count == 1:
        return list(part(*rows))
    # of equal size: a library may sum the rows of a small one in another order
    parts = zip(*(x.tensor_split(count) for x in rows), strict=True)
    found = [checkpoint(part, *some, use_reentrant=False) for some in parts]
    return [torch.cat(pieces) for pieces in zip(*found, strict=True)]


def response_logp(model: TinyModel, rollout: Rollout, hidden_XC: Tensor) -> Tensor:
    """Log-probs (B, R) of the response tokens; zero past the end."""
    (logp_X,) = by_parts(lambda token_X, logp_XV: (of_tokens(logp_XV, token_X),), model, rollout, hidden_XC)
    return spread(logp_X, rollout.mask_BR)


# Down to `kl_divergence`: plain tensors, to be lifted into another trainer, ValueError where their shapes differ.
# log_ratio_BR is the log of ρ = π_dense / π_sparse at rollout time, the learner's log-prob less the sampler's; zero
# where mask_BR is False.


def token_is(log_ratio_BR: Tensor, mask_BR: Tensor, cap: float) -> Tensor:
    """w_t = min(ρ_t, cap): token-level truncated importance sampling (Yao et al. 2025)."""
    same_shape(log_ratio=log_ratio_BR, mask=mask_BR)
    return log_ratio_BR.exp().clamp(max=cap)


def sequence_is(log_ratio_BR: Tensor, mask_BR: Tensor, cap: float) -> Tensor:
    """w = min(Π_t ρ_t, cap), the same for all tokens of a sequence; untruncated, it is unbiased for π_dense."""
    same_shape(log_ratio=log_ratio_BR, mask=mask_BR)
    return log_ratio_BR.sum(dim=1, keepdim=True).exp().clamp(max=cap).expand_as(log_ratio_BR)


def sparse_rl(log_ratio_BR: Tensor, mask_BR: Tensor, cap: float) -> Tensor:
    """w_t = min(ρ_t, cap), 0 in a sequence with any ρ_t < 1e-4, over the batch's mean (Sparse-RL, 2601.10079)."""
    weight_BR = token_is(log_ratio_BR, mask_BR, cap) * (log_ratio_BR >= math.log(1e-4)).all(dim=1, keepdim=True)
    return weight_BR / weight_BR[mask_BR].mean().clamp(min=1e-9)


class Method(NamedTuple):
    evicts: bool  # does the sampler forget
    replays: bool  # does the learner see what the sampler saw, and call the recorded log-prob the old one
    weight: Callable[[Tensor, Tensor, float], Tensor] | None = None  # of each token's loss, from log ρ; None: 1
    cap: float | None = None  # the weight's truncation


METHODS = {
    "dense": Method(evicts=False, replays=False),
    "naive": Method(evicts=True, replays=False),  # sampled sparse, learned dense, as if they were one policy
    "tis": Method(evicts=True, replays=False, weight=token_is, cap=2.0),
    # all but untruncated: beyond, float32 could not hold the square of a gradient
    "seq_is": Method(evicts=True, replays=False, weight=sequence_is, cap=1e15),
    "sparse_rl": Method(evicts=True, replays=False, weight=sparse_rl, cap=1.5),
    "smd": Method(evicts=True, replays=True),
}


def group_advantage(reward_NS: Tensor, norm_std: bool = True, eps: float = 1e-6) -> Tensor:
    """(r - mean) / (std + eps) in a prompt's samples (GRPO, 2402.03300), or r - mean (Dr. GRPO, 2503.20783): (N, S)."""
    if reward_NS.ndim != 2:
        raise ValueError(f"rewards must be (N, S), a row for each prompt, got {tuple(reward_NS.shape)}")
    centred_NS = reward_NS - reward_NS.mean(dim=1, keepdim=True)
    return centred_NS / (reward_NS.std(dim=1, keepdim=True, correction=0) + eps) if norm_std else centred_NS


def policy_loss(
    logp_BR: Tensor, old_logp_BR: Tensor, advantage_BR: Tensor, weight_BR: Tensor, mask_BR: Tensor,
    clip: float, longest: int,
) -> tuple[Tensor, float]:  # fmt: skip
    """-Σ w min(r A, clip(r, 1 - ε, 1 + ε) A) / (B · longest), r = exp(logp - old); and the share of tokens clipped."""
    same_shape(logp=logp_BR, old_logp=old_logp_BR, advantage=advantage_BR, weight=weight_BR, mask=mask_BR)
    ratio_BR = (logp_BR - old_logp_BR).exp()
    free_BR = ratio_BR * advantage_BR
    clipped_BR = ratio_BR.clamp(1 - clip, 1 + clip) * advantage_BR
    loss = -(weight_BR * free_BR.minimum(clipped_BR) * mask_BR).sum() / (len(logp_BR) * longest)
    return loss, ((clipped_BR < free_BR) & mask_BR).sum().item() / mask_BR.sum().item()


def kl_divergence(p_logp_XV: Tensor, q_logp_XV: Tensor) -> Tensor:
    """KL(p ‖ q) = Σ_v p (log p - log q) of each token over the whole vocabulary, from log-probs: (X,)."""
    same_shape(p=p_logp_XV, q=q_logp_XV)
    return (p_logp_XV.exp() * (p_logp_XV - q_logp_XV)).sum(dim=-1)


@torch.no_grad()
def diagnose(model: TinyModel, rollout: Rollout, backend: str | None) -> dict:
    """How far π_dense is from π_sparse on the sampled prefixes, by one pass without gradients."""

    def compare(token_X: Tensor, shadow_XV: Tensor, dense_XV: Tensor) -> tuple[Tensor, ...]:
        overlap_X = shadow_XV.minimum(dense_XV).exp().sum(dim=-1)
        drawn = of_tokens(shadow_XV, token_X), of_tokens(dense_XV, token_X)
        return *drawn, kl_divergence(shadow_XV, dense_XV), overlap_X

    mine = rollout.of_this_process()
    hidden = replay(model, mine, mine.evicted_at_LBGT, mine.never_evicted_LBGT, backend=backend)
    found_BRF = torch.stack([spread(x, mine.mask_BR) for x in by_parts(compare, model, mine, *hidden)], dim=-1)
    shadow_X, dense_X, kl_X, overlap_X = parallel.joined(found_BRF)[rollout.mask_BR].unbind(-1)
    drawn_X = rollout.logp_BR[rollout.mask_BR]
    log_ratio_X = dense_X.double() - drawn_X
    log_ratio_B = spread(log_ratio_X, rollout.mask_BR).sum(dim=1)
    found = dict(replay_error=(shadow_X - drawn_X).abs().max().item(), dense_error=log_ratio_X.abs().max().item())
    found |= dict(kl_sparse_dense=kl_X.mean().item(), overlap_p05=overlap_X.quantile(0.05).item())
    for name, log_weight_n in (("token", log_ratio_X), ("sequence", log_ratio_B)):
        found[f"ess_{name}"] = effective_share(log_weight_n)
        found[f"max_weight_{name}"] = log_weight_n.max().clamp(max=700).exp().item()  # e^710 is beyond float64
    return found


@dataclass(frozen=True)
class Batch:
    """A rollout and all that is settled before the first update on it; what does not apply is None."""

    rollout: Rollout
    reward_B: Tensor
    old_logp_BR: Tensor
    weight_BR: Tensor
    advantage_BR: Tensor
    value_BR: Tensor | None
    return_BR: Tensor | None
    ref_logp_BR: Tensor | None

    @property
    def counts(self) -> Counts:
        return Counts.of(self.rollout.mask_BR, self.reward_B.view(len(self.rollout.prompt_NP), -1))

    def of_prompts(self, n: Tensor) -> "Batch":
        """The part of these prompts and of all their samples."""
        rest = [getattr(self, f.name) for f in dataclasses.fields(self)[1:]]
        N = len(self.rollout.pad_N)
        of_n = [None if x is None else x.unflatten(0, (N, -1))[n].flatten(0, 1) for x in rest]
        return Batch(self.rollout.of_prompts(n), *of_n)


@torch.no_grad()
def prepare(policy: Policy, rollout: Rollout, reward_B: Tensor, s: Settings) -> Batch:
    """Old log-probs, weights, advantages, values and reference log-probs, with the policy as it sampled."""
    method, mask_BR = METHODS[s.method], rollout.mask_BR
    mine = rollout.of_this_process()
    seen_LBGT = mine.evicted_at_LBGT if method.replays else mine.never_evicted_LBGT
    old_logp_BR = rollout.logp_BR  # which is its own for a learner that replays
    value_BR = return_BR = ref_logp_BR = None
    if not method.replays or policy.critic is not None:
        (hidden_XC,) = replay(policy.model, mine, seen_LBGT, backend=s.backend)
        if not method.replays:
            old_logp_BR = parallel.joined(response_logp(policy.model, mine, hidden_XC))
        if policy.critic is not None:
            value_BR = parallel.joined(spread(policy.value(hidden_XC), mine.mask_BR))
    if policy.reference is not None:
        (hidden_XC,) = replay(policy.reference, mine, seen_LBGT, backend=s.backend)
        ref_logp_BR = parallel.joined(response_logp(policy.reference, mine, hidden_XC))
    weight_BR = torch.ones_like(rollout.logp_BR)
    if method.weight is not None:
        weight_BR = method.weight(old_logp_BR - rollout.logp_BR, mask_BR, method.cap)
    if value_BR is None:
        reward_NS = reward_B.view(len(rollout.prompt_NP), -1)
        advantage_NS = group_advantage(reward_NS, norm_std=s.objective != "dr_grpo")
        advantage_BR = advantage_NS.reshape(-1, 1).expand_as(mask_BR)
    else:
        advantage_BR = gae(reward_B, value_BR, mask_BR, GAE_LAMBDA)
        return_BR = advantage_BR + value_BR
        advantage_X = advantage_BR[mask_BR]  # normalised over the batch's tokens, as PPO usually does
        advantage_BR = (advantage_BR - advantage_X.mean()) / (advantage_X.std(correction=0) + 1e-6)
    return Batch(rollout, reward_B, old_logp_BR, weight_BR, advantage_BR, value_BR, return_BR, ref_logp_BR)


CHOICES = VALUES | dict(method=METHODS, eviction=EVICTIONS)


def learner_loss(
    policy: Policy, batch: Batch, s: Settings, whole: Counts | None = None, seam: Callable = lambda x: x
) -> tuple[Tensor, dict]:
    """The loss of s.method and s.objective on a batch, and figures for the log.

    whole: the counts of the batch of which this is a part. Then each mean of the loss weighs as much as the part's
    share of what it is taken over, so that the losses of all parts add up to that of the whole. seam: see `replay`.
    """
    method, rollout, model = METHODS[s.method], batch.rollout, policy.model
    mask_BR = rollout.mask_BR
    share = batch.counts.over(whole or batch.counts)
    seen_LBGT = rollout.evicted_at_LBGT if method.replays else rollout.never_evicted_LBGT
    track_2 = method.replays and s.lam > 0
    records = (seen_LBGT, rollout.never_evicted_LBGT) if track_2 else (seen_LBGT,)
    hidden = replay(model, rollout, *records, backend=s.backend, seam=seam)

    def figures(token_X: Tensor, logp_XV: Tensor, dense_XV: Tensor | None = None) -> tuple[Tensor, ...]:
        fixed_XV = logp_XV.detach()
        entropy_X = -(fixed_XV.exp() * fixed_XV).sum(dim=-1)
        # no gradient reaches the target's logits, but both policies share their weights: a bad sparse policy (λ = 1, a
        # budget too small) drags the dense one down. Reward and KL fall together then
        kl_X = kl_divergence(dense_XV, fixed_XV) if track_2 else torch.zeros_like(entropy_X)
        return of_tokens(logp_XV, token_X), entropy_X, kl_X

    logp_X, entropy_X, kl_X = by_parts(figures, model, rollout, *hidden)
    logp_BR = spread(logp_X, mask_BR)
    if s.objective == "dpo":
        reward_NS = batch.reward_B.view(len(rollout.prompt_NP), -1)
        loss = share.pairs * dpo_loss(logp_BR.sum(dim=1), batch.ref_logp_BR.sum(dim=1), reward_NS, DPO_BETA)
        clip_fraction = 0.0
    else:
        surrogate = logp_BR, batch.old_logp_BR, batch.advantage_BR, batch.weight_BR, mask_BR
        loss, clip_fraction = policy_loss(*surrogate, CLIP, s.max_new)
        loss = share.sequences * loss
    if policy.critic is not None:
        value_BR = spread(policy.value(hidden[0]), mask_BR)
        of_values = value_loss(value_BR, batch.value_BR, batch.return_BR, mask_BR, CLIP)
        loss = loss + share.tokens * VALUE_COEF * of_values
    if track_2:
        loss = loss + share.tokens * s.lam * kl_X.mean()
    if s.kl_ref:
        loss = loss + share.tokens * s.kl_ref * k3(logp_BR, batch.ref_logp_BR, mask_BR)
    row = dict(loss=loss.item(), clip_fraction=share.tokens * clip_fraction)
    row["entropy"] = share.tokens * entropy_X.mean().item()
    if method.replays or not method.evicts:
        row["replay_error"] = (logp_BR - rollout.logp_BR).abs().max().item()
    return loss, row


def update(policy: Policy, optimizer: torch.optim.Optimizer, batch: Batch, s: Settings, step: int) -> dict:
    """s.epochs times s.minibatches gradient steps; FloatingPointError where a loss or a gradient is not finite."""
    N = len(batch.rollout.prompt_NP)
    rng = streams.numpy_stream(s.seed, streams.MINIBATCHES, step)
    rows = []
    for _ in range(s.epochs):
        order_N = rng.permutation(N) if s.minibatches > 1 else range(N)
        for n in torch.tensor(order_N, device=batch.reward_B.device).tensor_split(s.minibatches):
            row = gradient(policy, batch.of_prompts(n), s)
            norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            if not (math.isfinite(row["loss"]) and norm.isfinite()):
                raise FloatingPointError(f"the loss is {row['loss']}, the norm of its gradient {norm.item()}")
            optimizer.step()
            optimizer.zero_grad()  # here, because memory is short when the next rollout is drawn and scored
            torch.clear_autocast_cache()  # it would go on with the old weights
            rows.append(row | {"grad_norm": norm.item()})
    # loss, entropy and replay error are those before the first update, of its part; the other two are means
    return rows[0] | {name: sum(row[name] for row in rows) / len(rows) for name in ("clip_fraction", "grad_norm")}


def gradient(policy: Policy, batch: Batch, s: Settings) -> dict:
    """Add up the gradient of the loss, s.accumulate parts of the prompts one after the other; figures for the log.

    Of several processes each takes its share of the prompts, and all get the sum.
    """
    whole = batch.counts
    rows = []
    for n in parallel.share_of(batch.rollout.pad_N).tensor_split(s.accumulate):
        seam = Seam()
        with device.precision(s):
            loss, row = learner_loss(policy, batch.of_prompts(n), s, whole, seam)
        seam.backward(loss)
        rows.append(row)
    parallel.add_gradients(policy.parameters())
    rows = parallel.listed(rows)
    total = {name: max if name == "replay_error" else sum for name in rows[0]}
    return {name: total[name](row[name] for row in rows) for name in rows[0]}


def agent_for(s: Settings) -> Agent:
    """Task, model and sampler; UsageError where they do not fit, before anything is computed or written."""
    return Agent(s, sample, Eviction(s.eviction, s.budget, s.interval, s.window, s.sinks, s.pool, s.protect))


def train_step(agent: Agent, policy: Policy, optimizer: torch.optim.Optimizer, reward: Callable, step: int) -> dict:
    """Sample, score, diagnose, learn: one row of metrics.jsonl."""
    s = agent.s
    watch = device.Stopwatch(s.device)
    examples, key_N = agent.draw(step)
    mine = parallel.share(len(examples))

    def sample_mine() -> tuple[Rollout, list[str], list[float]]:
        rollout, texts = agent.respond(examples, s.samples, METHODS[s.method].evicts, key_N, mine)
        return rollout, texts, tasks.score(reward, examples[mine], texts)

    rollout, *lists = parallel.agreed(sample_mine)
    rollout = rollout.of_all_processes()
    texts, rewards = map(parallel.listed, lists)
    row = dict(step=step, reward=sum(rewards) / len(rewards), accuracy=tasks.accuracy(agent.task, texts, examples))
    watch.lap("sample")
    due = (step - 1) % DIAGNOSE_EVERY == 0
    reward_B = torch.tensor(rewards, dtype=rollout.logp_BR.dtype, device=s.device)
    optimizer.param_groups[0]["lr"] = s.lr * min(1.0, step / max(1, LR_WARMUP))
    with device.precision(s):
        diagnosis = diagnose(policy.model, rollout, s.backend) if due else {}
        watch.lap("diag")
        batch = prepare(policy, rollout, reward_B, s)
    learned = update(policy, optimizer, batch, s, step)
    agent.check_finite()
    watch.lap("learn")
    return row | dict(replay_error=None) | learned | diagnosis | report.of_rollout(rollout) | watch.seconds


def train(settings: Settings, reward: Callable[[str, str, str], float] | None = None) -> dict:
    """Warm up, evaluate, train, evaluate. Leaves its files in settings.out; returns what summary.json holds.

    reward(prompt, response, answer) -> float may be a verifier, a reward model, an AI judge; None: the task's own. It
    is tried once first. UsageError for what cannot be used, FloatingPointError where something is not finite.
    """
    s = checked(settings)
    parallel.begin(s.device)
    run = runs.Run(s)
    agent = parallel.agreed(agent_for, s)
    reward = reward or agent.task.reward
    parallel.agreed(tasks.check_reward, reward, agent.task.held_out(1)[0])
    policy = Policy(agent.model, s)
    optimizer = policy.optimizer(s.lr)
    with run:
        if not run.resume(policy, optimizer):
            base.load_base(agent)
            if policy.reference is not None:
                policy.reference.load_state_dict(agent.model.state_dict())
            run.start(agent.evaluate(), policy, optimizer)
        with report.Progress("training", s.steps, len(run.rows)) as progress:
            for step in range(len(run.rows) + 1, s.steps + 1):
                with run.naming(step):
                    row = train_step(agent, policy, optimizer, reward, step)
                    if s.eval_every and step % s.eval_every == 0:
                        row |= {f"held_out_{cache}": share for cache, share in agent.evaluate().items()}
                    run.log(row, policy, optimizer)
                progress.step(reward=row["reward"], accuracy=row["accuracy"])
        after = run.evaluated() or agent.evaluate()
        parallel.by_first(agent.leave, run.out)
        return run.finish(after, agent.task.held_out(1)[0].prompt)


def main(argv: list[str] | None = None) -> int:
    def run() -> None:
        settings = runs.parse(Settings, CHOICES, __doc__.splitlines()[0], argv)
        if settings.prompt is None:
            train(settings)
        else:
            agent = agent_for(checked(settings))
            if settings.resume:
                runs.check_same(agent.s, runs.fingerprint(agent.s))
                files.restore(Path(settings.out) / "checkpoint.pt", Policy(agent.model, agent.s))
            print(agent.answer(settings.prompt))

    return cli.run_command(run, "smd.py", speaks=parallel.LOCAL_RANK == 0)


if __name__ == "__main__":
    sys.exit(main())
