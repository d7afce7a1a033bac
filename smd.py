"""Shadow Mask Distillation (arXiv 2605.06850): reinforcement learning with a sampler that forgets.

The sampler decodes with a small KV cache and drops entries for good, so π_sparse answers under a context that shrinks.
A learner that scores the answer under the full context follows the gradient of another policy. Here the sampler records
the one integer that is each key's life, evicted_at, and the learner replays exactly what was seen:

    visible(i, j) = j <= i < evicted_at[j]                                   query i, key j
    loss = GRPO(π_shadow) + λ · KL(π_dense ‖ stop-gradient(π_shadow))        λ = 0.1

π_shadow, the learner under that mask, equals π_sparse, so its policy gradient (track 1) is on-policy. π_dense, the
learner under the full causal mask, follows it (track 2), so that the trained model also serves with a full cache.

Departures from the paper: (1) a tiny model and toy-sized tasks; (2) the policy loss is divided by sequences × the
longest possible response, not by each response's own length, so that all tokens weigh the same; (3) the KL of track 2
is averaged over the batch's response tokens; (4) one update per batch of rollouts unless `--epochs` says otherwise;
(5) the S samples of a prompt share its prefill and therefore what is evicted right after it.

    python smd.py                                      the main job: 200 steps on the chain task
    python smd.py --data FILE.jsonl                    the same on prompts and answers of your own
    python smd.py --resume --out out/smd-001           go on after an interruption

Dimension letters: N prompts, S samples of each, B = N·S sequences, P prompt columns (left-padded), R response columns,
T = P + R, K cached keys, W recent queries, L layers, H query heads, G kv heads, M = H/G, D head dim, V vocabulary, X
all response tokens in one row. A column counts from the left edge of the padded batch and is the position in the rule
above; the RoPE position is the column less the padding before it.
"""

import argparse
import copy
import dataclasses
import hashlib
import io
import json
import math
import os
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import kernel
import tiny_model
from kernel import NEVER, shadow_attention
from tiny_model import ModelConfig, TinyModel, padding_record, rope_positions


class UsageError(ValueError):
    """What the user gave cannot be used; the message names the value and the fix. The command line exits with 2."""


def opt(default, help: str, low: float | None = None, free: bool = False):
    """A setting's default, help and least value; `free`: a run that is resumed may be given another."""
    return dataclasses.field(default=default, metadata=dict(help=help, low=low, free=free))


@dataclass(frozen=True)
class Settings:
    data: str | None = opt(None, "JSONL of prompt and answer or GSM8K's question and answer (default: chain task)")
    encoding: str = opt("bytes", "'bytes', which downloads nothing, or the name of one of tiktoken's encodings")
    letters: int = opt(16, "chain: length of the cycle whose edges the prompt lists, at most 26", 2)
    hops: int = opt(6, "chain: letters in the answer", 1)
    context: int | None = opt(None, "longest prompt plus response, in tokens (default: 128; with --data 2048)", 1)
    max_new: int | None = opt(None, "longest response, in tokens (default: hops + 1; with --data 128)", 1)
    width: int = opt(128, "model width", 1)
    layers: int = opt(3, "model layers", 1)
    heads: int = opt(4, "query heads", 1)
    kv_heads: int = opt(4, "key-value heads, each shared by heads / kv-heads query heads", 1)
    warmup_steps: int | None = opt(
        None, "supervised steps, at most so many in each lesson (default: 400; with --data 100)", 0
    )
    warmup_drop: float = opt(0.3, "supervised steps: share of the prompt's keys that are hidden from the answer", 0)
    warmup_slip: float = opt(0.13, "chain, supervised steps: chance that a hop of the answer is drawn at random", 0)
    warmup_lr: float = opt(3e-3, "supervised steps: learning rate", 0)
    warmup_batch: int | None = opt(None, "supervised steps: examples per step (default: 64; with --data 8)", 1)
    warmup_seed: int = opt(0, "seed of the base policy, its initial weights and its examples", 0)
    method: str = opt("smd", "what the learner sees, and the weights it gives to tokens")
    lam: float = opt(0.1, "smd: weight λ of track 2, the KL that lets the dense policy follow the sparse one", 0)
    kl: str = opt("reverse", "smd: KL(dense ‖ shadow) in track 2 or, forward, KL(shadow ‖ dense)")
    is_cap: float | None = opt(None, "truncation of weights (default: tis 2, sparse_rl 1.5, seq_is none)", 0)
    objective: str = opt("grpo", "what the learner maximises; dpo: with dense, naive and smd")
    norm_std: bool = opt(True, "grpo: divide advantages by the group's std; ppo: normalise them over the batch")
    gae_lam: float = opt(0.95, "ppo: λ of generalised advantage estimation", 0)
    value_coef: float = opt(0.5, "ppo: weight of the critic's loss", 0)
    dpo_beta: float = opt(0.1, "dpo: β, how far the policy may leave the base policy", 0)
    kl_ref: float = opt(0.0, "weight of k3, the KL to the base policy", 0)
    policy: str = opt("snapkv", "eviction policy")
    budget: int | float | None = opt(None, "keys kept: count or share of the prompt (default: 18; with --data 0.5)")
    interval: int = opt(4, "response tokens between two compressions of the cache", 1)
    window: int = opt(4, "observation window of snapkv, rkv and random, in queries", 1)
    sinks: int = opt(1, "first keys, which streaming, snapkv and random always keep", 0)
    lr: float = opt(4e-4, "learning rate of the updates", 0)
    lr_warmup: int = opt(20, "steps over which the learning rate rises to --lr", 0)
    clip: float = opt(
        0.2, "the ratio is clipped to 1 ± this, ppo: a value's move, too; bites from a batch's second update", 0
    )
    epochs: int = opt(1, "passes over a batch of rollouts", 1)
    minibatches: int = opt(1, "updates in a pass, each on a part of the prompts", 1)
    steps: int = opt(200, "steps of sampling and learning", 0, free=True)
    prompts: int | None = opt(None, "prompts per step (default: 32; with --data 8)", 1)
    samples: int = opt(8, "samples per prompt: the group of GRPO", 1)
    seed: int = opt(0, "seed of the training prompts and of the sampler", 0)
    eval_prompts: int = opt(1024, "held-out prompts of the evaluation before and after, at most", 1)
    eval_every: int = opt(0, "steps between two evaluations on the held-out prompts while training; 0: none", 0)
    diag_every: int = opt(10, "steps between two measurements of KL(sparse ‖ dense)", 1)
    save_every: int = opt(20, "steps between two checkpoints", 1, free=True)
    device: str | None = opt(None, "default: cuda where there is one", free=True)
    backend: str | None = opt(None, "attention; default: triton on cuda, else torch", free=True)
    out: str | None = opt(None, "folder of the run (default: a new one under out/)", free=True)
    cache: str = opt("out/cache", "folder in which base policies are kept", free=True)
    resume: bool = opt(False, "continue the run in --out; what is not given is taken from it", free=True)
    overwrite: bool = opt(False, "replace the run in --out", free=True)
    prompt: str | None = opt(None, "with --resume: answer this prompt from the checkpoint, and stop", free=True)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def checked(s: Settings) -> Settings:
    """Settings with the defaults that depend on task and machine; UsageError for what no run could use."""
    for f in dataclasses.fields(s):
        value, low, among = getattr(s, f.name), f.metadata["low"], CHOICES.get(f.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{flag(f.name)} must be a finite number, got {value}")
        if value is not None and low is not None and value < low:
            raise UsageError(f"{flag(f.name)} must be at least {low}, got {value}")
        if value is not None and among and value not in among:
            raise UsageError(f"{flag(f.name)} must be one of {', '.join(among)}, got {value!r}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    defaults = dict(context=128, max_new=s.hops + 1, budget=18, warmup_steps=400, warmup_batch=64, prompts=32)
    if s.data is not None:
        defaults = dict(context=2048, max_new=128, budget=0.5, warmup_steps=100, warmup_batch=8, prompts=8)
    s = dataclasses.replace(s, **{k: v for k, v in (defaults | {"device": device}).items() if getattr(s, k) is None})
    for bad, message in (
        (s.width % (2 * s.heads), f"--width must be a multiple of 2 * heads = {2 * s.heads}, got {s.width}"),
        (s.heads % s.kv_heads, f"--kv-heads must divide heads = {s.heads}, got {s.kv_heads}"),
        (s.letters > 26, f"--letters must be at most 26, got {s.letters}"),
        (s.device == "cuda" != device, "--device cuda: this machine has no usable CUDA device; take --device cpu"),
        (
            s.samples == 1 and s.objective != "ppo",
            f"--objective {s.objective} compares a prompt's samples; give --samples 2 or more, got 1",
        ),
        (s.gae_lam > 1, f"--gae-lam must be at most 1, got {s.gae_lam}"),
        (s.minibatches > s.prompts, f"--minibatches must be at most --prompts = {s.prompts}, got {s.minibatches}"),
        (
            s.objective == "dpo" and METHODS[s.method].weight,
            f"--objective dpo weights no tokens; take --method dense, naive or smd, got {s.method}",
        ),
        (s.resume and s.overwrite, "--resume and --overwrite exclude each other; take one of them"),
    ):
        if bad:
            raise UsageError(message)
    try:
        backend = kernel.backend_for(s.device, s.backend)
    except ValueError as e:
        raise UsageError(f"--{e}") from e
    if backend == "triton" and s.width // s.heads > 128:
        raise UsageError(f"--backend triton takes head dims up to 128, got width / heads = {s.width // s.heads}")
    return s


class Example(NamedTuple):
    prompt: str
    answer: str


# what a draw depends on is (seed, stream, step) and nothing else, so that a resumed run needs no generator's state
WARMUP, PROMPTS, SAMPLING, EVALUATION = range(4)


def numpy_stream(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def torch_stream(device: str, *key: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(int(numpy_stream(*key).integers(2**62)))


class Chain:
    """Follow a cycle whose edges are listed in random order: "afbc…?c" asks for the letters that come after c.

    Multi-hop retrieval, the small version of RULER's variable tracking: which edge a hop needs is known only after the
    hop before it, so a compressed prompt may have lost what is needed later.
    """

    def __init__(self, letters: int, hops: int, slip: float):
        self.letters, self.hops, self.slip = letters, hops, slip
        # a letter stands in the list as a source and as a target, and only the place, odd or even, tells them apart:
        # hard to learn on a long list, easy on a short one, and what is learned there carries over
        self.lessons = [n for n in (4, 6, 8) if n < letters]
        self.examples = self.draw(1, numpy_stream(0, PROMPTS))  # all of them have the same lengths

    def draw(self, count: int, rng: np.random.Generator) -> list[Example]:
        return [self.example(rng, self.letters, self.hops, 0.0) for _ in range(count)]

    def supervised(self, count: int, rng: np.random.Generator, lesson: int | None) -> list[Example]:
        """Demonstrations: a lesson is a shorter cycle followed all the way round; in the task itself some hops slip."""
        kind = (self.letters, self.hops, self.slip) if lesson is None else (lesson, lesson - 1, 0.0)
        return [self.example(rng, *kind) for _ in range(count)]

    def example(self, rng: np.random.Generator, letters: int, hops: int, slip: float) -> Example:
        name = [chr(ord("a") + i) for i in rng.permutation(self.letters)[:letters]]
        edges = [name[i - 1] + name[i] for i in rng.permutation(letters)]
        path = [int(rng.integers(letters))]
        for _ in range(hops):
            path.append(int(rng.integers(letters)) if rng.random() < slip else (path[-1] + 1) % letters)
        text = "".join(name[i] for i in path)
        return Example("".join(edges) + "?" + text[0], text[1:])

    def held_out(self, count: int) -> list[Example]:
        return self.draw(count, numpy_stream(0, EVALUATION))

    @staticmethod
    def reward(prompt: str, response: str, answer: str) -> float:
        """Half for the share of right letters, half for all of them and nothing more."""
        share = sum(r == a for r, a in zip(response, answer, strict=False)) / len(answer)
        return 0.5 * share + 0.5 * (response == answer)


class TextFile:
    """The examples of a JSONL file, the last 10 % of them held out. Reward 1 for the right answer, else 0."""

    lessons = ()

    def __init__(self, path: str):
        self.examples = read_jsonl(path)
        if len(self.examples) < 2:
            raise UsageError(f"{path}: want at least 2 examples, one of them to hold out, got {len(self.examples)}")
        held = max(1, len(self.examples) // 10)
        self.train, self.test = self.examples[:-held], self.examples[-held:]

    def draw(self, count: int, rng: np.random.Generator) -> list[Example]:
        return [self.train[i] for i in rng.choice(len(self.train), count, replace=count > len(self.train))]

    def supervised(self, count: int, rng: np.random.Generator, lesson: None) -> list[Example]:
        return self.draw(count, rng)

    def held_out(self, count: int) -> list[Example]:
        return self.test[:count]

    @staticmethod
    def reward(prompt: str, response: str, answer: str) -> float:
        return float(response.strip() == answer.strip())


def read_jsonl(path: str) -> list[Example]:
    """The examples of a JSONL file; UsageError, with the line's number, where one is malformed."""
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as e:
        raise UsageError(f"--data {path} cannot be read: {e.strerror}") from e
    examples = []
    for n, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as e:
            raise UsageError(f"{path}, line {n}: not JSON in UTF-8 ({e})") from e
        asked = next((k for k in ("prompt", "question") if isinstance(row, dict) and k in row), None)
        if asked is None or not isinstance(row[asked], str) or not isinstance(row.get("answer"), str):
            raise UsageError(f"{path}, line {n}: want an object with strings prompt and answer, or question and answer")
        prompt, answer = row[asked], row["answer"]
        if asked == "question":
            # GSM8K: the worked solution ends in "#### 1,234", and only that number is learned and matched
            _, mark, answer = answer.rpartition("####")
            if not mark:
                raise UsageError(f"{path}, line {n}: no #### before the final answer")
            prompt, answer = prompt + "\n", answer.strip().replace(",", "")
        if not prompt.strip() or not answer.strip():
            raise UsageError(f"{path}, line {n}: the prompt and the answer must not be empty")
        examples.append(Example(prompt, answer))
    if not examples:
        raise UsageError(f"--data {path} is empty; want one JSON object a line")
    return examples


def load_encoding(name: str) -> tiktoken.Encoding:
    """By default every byte is a token and one special token ends a text: nothing to learn, nothing to download."""
    if name == "bytes":
        ranks, special = {bytes([i]): i for i in range(256)}, {"<|endoftext|>": 256}
        return tiktoken.Encoding("bytes", pat_str="(?s:.+)", mergeable_ranks=ranks, special_tokens=special)
    if name not in tiktoken.list_encoding_names():
        raise UsageError(
            f"--encoding must be bytes or one of {', '.join(tiktoken.list_encoding_names())}, got {name!r}"
        )
    try:
        return tiktoken.get_encoding(name)
    except Exception as e:  # whatever the download raises
        raise UsageError(f"--encoding {name} could not be fetched ({type(e).__name__}); take --encoding bytes") from e


def decode(encoding: tiktoken.Encoding, tokens: list[int]) -> str:
    """Text of sampled tokens up to the end of text; an id that stands for nothing, as some do, reads as U+FFFD."""
    pieces = []
    for token in tokens:
        if token == encoding.eot_token:
            break
        try:
            pieces.append(encoding.decode_single_token_bytes(token))
        except KeyError:
            pieces.append("\ufffd".encode())
    return b"".join(pieces).decode("utf-8", errors="replace")


def pad_left(rows: list[list[int]], fill: int, device: str) -> tuple[Tensor, Tensor]:
    """Rows of tokens as one tensor (N, P) flush right, and the padding before each row (N,)."""
    P = max(map(len, rows))
    tokens_NP = torch.tensor([[fill] * (P - len(row)) + row for row in rows], device=device)
    return tokens_NP, torch.tensor([P - len(row) for row in rows], device=device)


@dataclass(frozen=True)
class Eviction:
    """What the sampler may keep: the budget is a count, or a share of each prompt."""

    policy: str = "snapkv"
    budget: int | float = 18
    interval: int = 4
    window: int = 4
    sinks: int = 1

    def amount(self, terms: str) -> int:
        """The value of a need that is written like "sinks + window"."""
        return sum(getattr(self, t) if t.isalpha() else int(t) for t in terms.split(" + "))

    def keep(self, length_N: Tensor) -> Tensor:
        """Entries to keep of prompts of these lengths; UsageError where the policy is forced to keep more."""
        if isinstance(self.budget, float) and not 0 < self.budget <= 1:
            raise UsageError(f"budget, as a share of the prompt, must be above 0 and at most 1, got {self.budget}")
        count = isinstance(self.budget, int)
        keep_N = torch.full_like(length_N, self.budget) if count else (length_N * self.budget).ceil().long()
        terms, least = POLICIES[self.policy].forced, self.amount(POLICIES[self.policy].forced)
        if keep_N.min() < least:
            need = terms if terms.isdigit() else f"{terms} = {least}"
            of = "" if count else f" ({self.budget} of a prompt of {length_N.min()} tokens)"
            raise UsageError(f"budget must be at least {need}, got {keep_N.min()}{of}")
        return keep_N


@dataclass
class Entries:
    """One layer's keys as a policy sees them: in column order, those that are not live before all others.

    B counts prompts when the prompt is compressed, sequences later.
    """

    cache: "Cache"
    k_BGKD: Tensor
    v_BGKD: Tensor
    column_BGK: Tensor  # int64
    live_BGK: Tensor  # neither padding nor evicted
    received_BGK: Tensor | None  # attention received so far, where the policy accumulates it
    q_BHWD: Tensor  # recent queries, in any order
    q_column_W: Tensor  # their columns; -1 where there is none yet
    pad_B: Tensor
    keep_B: Tensor
    now: int  # column of the next query

    def newest(self, count: int | Tensor) -> Tensor:
        return self.column_BGK >= self.now - count

    def sinks(self) -> Tensor:
        return self.column_BGK < self.pad_B[:, None, None] + self.cache.eviction.sinks


def window_logits(e: Entries) -> Tensor:
    """Logits of the recent queries over the live keys, (B, G, M, W, K); -inf where a query cannot see a key."""
    q_BGMWD = e.q_BHWD.unflatten(1, (e.k_BGKD.shape[1], -1))
    logits = q_BGMWD @ e.k_BGKD[:, :, None].transpose(-1, -2) * q_BGMWD.shape[-1] ** -0.5
    visible_BGWK = e.live_BGK[:, :, None] & (e.column_BGK[:, :, None] <= e.q_column_W[:, None])
    e.cache.note(e.k_BGKD, e.v_BGKD, logits)
    return logits.masked_fill(~visible_BGWK[:, :, None], -math.inf)


def window_attention(e: Entries) -> Tensor:
    """Softmax of `window_logits`. The row of a query that is padding sees nothing and is zero."""
    return window_logits(e).softmax(dim=-1).nan_to_num(0.0)


def streaming(e: Entries) -> Tensor:
    """Sinks and the most recent keys (StreamingLLM, 2309.17453)."""
    return e.column_BGK.double().masked_fill(e.sinks(), math.inf)


def snapkv(e: Entries) -> Tensor:
    """What the observation window attends to, smoothed over neighbours; sinks and window forced (2404.14469)."""
    window_BGK = e.newest(e.cache.eviction.window)
    score_BGK = window_attention(e).mean(dim=(2, 3)).masked_fill(window_BGK, 0.0)
    score_BGK = F.avg_pool1d(score_BGK, kernel_size=5, stride=1, padding=2)
    return score_BGK.masked_fill(window_BGK | e.sinks(), math.inf)


def h2o(e: Entries) -> Tensor:
    """Half the budget to the most recent keys, half to those that received most attention (2306.14048)."""
    recent_B = e.keep_B - e.keep_B // 2
    return e.received_BGK.masked_fill(e.newest(recent_B[:, None, None]), math.inf)


def tova(e: Entries) -> Tensor:
    """The last query's attention, mean over all heads, one set a layer; the last key forced (2401.06104)."""
    score_BK = window_attention(e).mean(dim=(1, 2, 3))
    return score_BK[:, None].expand_as(e.column_BGK).masked_fill(e.newest(1), math.inf)


def knorm(e: Entries) -> Tensor:
    """Keys of small norm are the ones that receive much attention (2406.11430)."""
    return -e.k_BGKD.norm(dim=-1)


def rkv(e: Entries, mix: float = 0.07, alike: float = 0.5) -> Tensor:
    """Importance less redundancy, Z = mix · A - (1 - mix) · S; the window forced (R-KV, 2505.24133)."""
    window_BGK = e.newest(e.cache.eviction.window)
    logits_BGWK = window_logits(e).amax(dim=2).masked_fill(window_BGK[:, :, None], -math.inf)
    attention_BGK = logits_BGWK.softmax(dim=-1).nan_to_num(0.0).mean(dim=2)
    attention_BGK = F.max_pool1d(attention_BGK, kernel_size=7, stride=1, padding=3)
    unit_BGKD = F.normalize(e.k_BGKD, dim=-1).masked_fill(~e.live_BGK[..., None], 0.0)
    cosine_BGKK = unit_BGKD @ unit_BGKD.transpose(-1, -2)
    cosine_BGKK.diagonal(dim1=-2, dim2=-1).zero_()
    e.cache.note(e.k_BGKD, e.v_BGKD, cosine_BGKK)
    # the last of a key's near copies does not count as one, so that the newest copy survives
    slot_K = torch.arange(cosine_BGKK.shape[-1], device=cosine_BGKK.device)
    last_BGK1 = torch.where(cosine_BGKK > alike, slot_K, -1).amax(dim=-1, keepdim=True)
    mean_BGK = cosine_BGKK.masked_fill(slot_K == last_BGK1, 0.0).sum(dim=-2) / e.live_BGK.sum(dim=-1, keepdim=True)
    redundancy_BGK = mean_BGK.masked_fill(~e.live_BGK, -math.inf).softmax(dim=-1)
    return (mix * attention_BGK - (1 - mix) * redundancy_BGK).masked_fill(window_BGK, math.inf)


def random(e: Entries) -> Tensor:
    """Uniform, sinks and window forced: the control."""
    score_BGK = torch.rand(e.column_BGK.shape, generator=e.cache.generator, device=e.column_BGK.device)
    return score_BGK.masked_fill(e.newest(e.cache.eviction.window) | e.sinks(), math.inf)


class Scoring(NamedTuple):
    score: Callable[[Entries], Tensor]  # (B, G, K): higher is kept, inf is forced
    forced: str  # how many keys it is forced to keep
    queries: str = "0"  # how many recent queries it reads
    accumulates: bool = False  # does it read the attention that each key has received


POLICIES = {
    "streaming": Scoring(streaming, forced="sinks + 1"),
    "snapkv": Scoring(snapkv, forced="sinks + window", queries="window"),
    "h2o": Scoring(h2o, forced="1", accumulates=True),
    "tova": Scoring(tova, forced="1", queries="1"),
    "knorm": Scoring(knorm, forced="1"),
    "rkv": Scoring(rkv, forced="window", queries="window"),
    "random": Scoring(random, forced="sinks + window"),
}


def select_and_record(e: Entries, keep: int, evicted_at_BGT: Tensor) -> Tensor:
    """Pick each head's best entries, write the death of the others into evicted_at_BGT: slots (B, G, keep).

    They are in column order. Where a sequence has fewer live keys, or a smaller budget, than `keep`, the rest is dead
    and comes first, where it cannot stand between two neighbours that a policy pools.
    """
    score_BGK = POLICIES[e.cache.eviction.policy].score(e).masked_fill(~e.live_BGK, -math.inf)  # padding goes first
    # stable, so that equal scores fall the same way on every device
    slot_BGn = score_BGK.argsort(dim=-1, descending=True, stable=True)[..., :keep]
    within_B1n = torch.arange(keep, device=slot_BGn.device) < e.keep_B[:, None, None]
    kept_BGK = torch.zeros_like(e.live_BGK).scatter(-1, slot_BGn, within_B1n.expand_as(slot_BGn)) & e.live_BGK
    record_BGK = evicted_at_BGT.gather(-1, e.column_BGK)
    evicted_at_BGT.scatter_(-1, e.column_BGK, record_BGK.masked_fill(e.live_BGK & ~kept_BGK, e.now))
    order_BGn = torch.where(kept_BGK, e.column_BGK, -1).gather(-1, slot_BGn).argsort(dim=-1, stable=True)
    e.cache.note(e.k_BGKD, e.v_BGKD, score_BGK, slot_BGn, record_BGK, order_BGn)
    return slot_BGn.gather(-1, order_BGn)


@dataclass(frozen=True)
class Rollout:
    """What the sampler did: recorded once, never recomputed, and all that the learner knows of it."""

    prompt_NP: Tensor  # int64
    pad_N: Tensor  # columns of padding before each prompt
    response_BR: Tensor  # int64; row n·S + s is sample s of prompt n; its end of text included, then padding
    logp_BR: Tensor  # log-prob of each response token in the distribution that it was drawn from; 0 after the end
    length_B: Tensor  # response tokens, the end of text included
    evicted_at_LBGT: Tensor  # int32: the first column whose query can no longer see the key
    kv_bytes: int  # most bytes that the cache, its record and the transient of its compression held
    full_kv_bytes: int  # keys and values of a full cache, a prompt per sample
    full_kv_bytes_shared: int  # the same with one prompt for its S samples

    @property
    def mask_BR(self) -> Tensor:
        return torch.arange(self.response_BR.shape[1], device=self.length_B.device) < self.length_B[:, None]

    def record(self, replays: bool) -> Tensor:
        """What a learner goes by: what the sampler saw, or everything."""
        return self.evicted_at_LBGT if replays else self.dense_LBGT

    @property
    def dense_LBGT(self) -> Tensor:
        """The record that a full cache would have left: padding is hidden and nothing is ever evicted."""
        return torch.where(self.evicted_at_LBGT == 0, 0, NEVER).to(torch.int32)

    def kept_share(self) -> float:
        """Visible over causal (query, key) pairs, in the rows of the response tokens that were fed back."""
        first_T = torch.arange(self.evicted_at_LBGT.shape[-1], device=self.length_B.device)
        first_T = first_T.clamp(min=self.prompt_NP.shape[1])
        end_B11 = (self.prompt_NP.shape[1] + self.length_B - 1)[:, None, None]
        records = (self.evicted_at_LBGT, self.dense_LBGT)
        seen, causal = ((record.minimum(end_B11) - first_T).clamp(min=0).sum().item() for record in records)
        return seen / causal if causal else 1.0


def storage_bytes(*tensors: Tensor | None) -> int:
    """Bytes of the distinct storages behind these tensors, each counted once and in full."""
    storages = (t.untyped_storage() for t in tensors if t is not None)
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


# numbers of keys, and of values, that decoding converts to float64 at a time: what a CPU's own cache holds
SCRATCH = {"cpu": 2**20, "cuda": 2**28}


class Cache:
    """Keys, values, columns and what the policy accumulates: K slots for every (layer, sequence, kv head).

    Allocated once, at budget + interval slots; slots [0, used) are in use. `prefill` and `decode` are what the model's
    layers attend with. `peak` is the most bytes ever live: these tensors, the record, and the transient of compression.
    """

    def __init__(
        self, model: TinyModel, pad_N: Tensor, samples: int, P: int, max_new: int, eviction, generator, backend
    ):
        c, weight = model.config, model.embed_tokens.weight
        # a full cache is one whose budget nothing exceeds
        self.eviction = eviction = eviction or Eviction("streaming", P + max_new, sinks=0)
        policy, self.pad_N, self.keep_N = POLICIES[eviction.policy], pad_N, eviction.keep(P - pad_N)
        self.pad_B, self.keep_B = (t.repeat_interleave(samples) for t in (pad_N, self.keep_N))
        self.least, self.most = self.keep_N.min().item(), self.keep_N.max().item()
        B, slots, kind = len(self.pad_B), min(self.most + eviction.interval, P + max_new), dict(device=weight.device)
        self.column = torch.empty(c.layers, B, c.kv_heads, slots, dtype=torch.int32, **kind)
        self.evicted_at = padding_record(self.pad_B, P + max_new).repeat(c.layers, 1, c.kv_heads, 1)
        W = eviction.amount(policy.queries)
        self.q_column = torch.full((W,), -1, **kind)  # a ring: the query of column c stands at c % W
        kind["dtype"] = weight.dtype
        self.q = torch.zeros(c.layers, B, c.heads, W, c.head_dim, **kind)
        self.k = torch.empty(c.layers, B, c.kv_heads, slots, c.head_dim, **kind)
        self.v = torch.empty_like(self.k)
        self.received = torch.zeros(self.column.shape, **kind) if policy.accumulates else None
        self.generator, self.backend = generator, backend
        self.used, self.now, self.peak = 0, P, 0  # slots in use, column of the next query, most bytes so far

    def note(self, *transient: Tensor | None) -> None:
        own = (self.k, self.v, self.column, self.received, self.q, self.q_column, self.evicted_at)
        self.peak = max(self.peak, storage_bytes(*own, *transient))

    def prefill(self, l: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend densely within the prompts, then store what the budget allows of this layer's keys for all samples."""
        N, G, P, _ = k.shape
        by_prompt = self.evicted_at[l].unflatten(0, (N, -1))  # a view (N, S, G, T)
        record_NGP, column_P = by_prompt[:, 0, :, :P], torch.arange(P, device=k.device)
        out = shadow_attention(q, k, v, record_NGP, backend=self.backend)
        recent_W = column_P[max(0, P - len(self.q_column)) :]
        live_NGP, column_NGP = record_NGP.eq(NEVER), column_P.expand(N, G, P)
        recent = q[:, :, recent_W], recent_W
        e = Entries(self, k, v, column_NGP, live_NGP, None, *recent, self.pad_N, self.keep_N, self.now)
        if self.received is not None:
            # 128 queries at a time: P × P weights would be the memory that the cache is there to save
            blocks = (dataclasses.replace(e, q_BHWD=q[:, :, c], q_column_W=c) for c in column_P.split(128))
            e.received_BGK = sum(window_attention(block).sum(dim=(2, 3)) for block in blocks)
        slot_NGn = select_and_record(e, min(P, self.most), record_NGP) if self.least < P else column_NGP
        by_prompt[..., :P] = record_NGP[:, None]
        self.store(l, slot_NGn, e)
        if len(recent_W):
            ring_W = recent_W % len(self.q_column)
            self.q_column[ring_W] = recent_W
            self.q[l].unflatten(0, (N, -1))[..., ring_W, :] = e.q_BHWD[:, None]
        return out

    def decode(self, l: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Add one token to the cache and attend to what is in there: out (B, H, 1, D)."""
        at, column = self.used, self.now - 1
        self.k[l][:, :, at], self.v[l][:, :, at], self.column[l][:, :, at] = k[:, :, 0], v[:, :, 0], column
        hidden_BG1K, out, weight = ~self.live(l, at + 1)[1][:, :, None], [], []
        # in float64, like the plain attention that the learner uses; a part of the sequences at a time, because the
        # float64 copies of all of them would be twice the cache
        part = max(1, SCRATCH[k.device.type] // (k[0].numel() * (at + 1)))
        cache = (t[l][:, :, : at + 1].split(part) for t in (self.k, self.v))
        for q_bHD, hidden_bG1K, k_bGKD, v_bGKD in zip(
            q[:, :, 0].split(part), hidden_BG1K.split(part), *cache, strict=True
        ):
            q_bGMD = q_bHD.double().unflatten(1, (k.shape[1], -1))
            score_bGMK = q_bGMD @ k_bGKD.double().transpose(-1, -2) * q.shape[-1] ** -0.5
            weight.append(score_bGMK.masked_fill(hidden_bG1K, -math.inf).softmax(dim=-1))
            out.append(weight[-1] @ v_bGKD.double())
        if self.received is not None:
            self.received[l][:, :, at] = 0.0
            self.received[l][:, :, : at + 1] += torch.cat(weight).sum(dim=2)
        if len(self.q_column):
            self.q_column[column % len(self.q_column)] = column
            self.q[l][:, :, column % len(self.q_column)] = q[:, :, 0]
        return torch.cat(out).flatten(1, 2)[:, :, None].to(q.dtype)

    def live(self, l: int, used: int) -> tuple[Tensor, Tensor]:
        """Columns of the first slots, and which of them hold a key that is neither padding nor evicted (B, G, used)."""
        column_BGK = self.column[l][:, :, :used].long()
        return column_BGK, self.evicted_at[l].gather(-1, column_BGK) == NEVER

    def compress(self) -> None:
        """Return to the budget, in place, one layer after the other."""
        if self.used <= self.least:
            return
        keep = min(self.used, self.most)
        for l in range(len(self.k)):
            k, v = self.k[l][:, :, : self.used], self.v[l][:, :, : self.used]
            received = None if self.received is None else self.received[l][:, :, : self.used]
            recent = self.q[l], self.q_column
            e = Entries(self, k, v, *self.live(l, self.used), received, *recent, self.pad_B, self.keep_B, self.now)
            self.store(l, select_and_record(e, keep, self.evicted_at[l]), e)
        self.used = keep

    def store(self, l: int, slot_XGn: Tensor, e: Entries) -> None:
        """Move the chosen entries to the front of layer l: keys, values, columns and attention received together.

        X counts sequences, or, right after the prompt, prompts: then each of its samples gets a copy.
        """
        X, _, n = slot_XGn.shape
        own = ((self.k, e.k_BGKD), (self.v, e.v_BGKD), (self.column, e.column_BGK), (self.received, e.received_BGK))
        for slots, entries in own:
            if slots is not None:
                index = slot_XGn if entries.ndim == 3 else slot_XGn[..., None].expand(-1, -1, -1, entries.shape[-1])
                chosen = entries.gather(2, index)
                self.note(e.k_BGKD, e.v_BGKD, slot_XGn, chosen)
                slots[l].unflatten(0, (X, -1))[:, :, :, :n] = chosen[:, None]


@torch.no_grad()
def sample(
    model: TinyModel,
    prompt_NP: Tensor,
    pad_N: Tensor,
    samples: int,
    max_new: int,
    eos: int,
    eviction: Eviction | None = None,
    generator: torch.Generator | None = None,
    forced_BR: Tensor | None = None,
    backend: str | None = None,
) -> Rollout:
    """Draw responses with a small cache, and record which query could see which key.

    prompt_NP: int64 tokens, left-padded by pad_N columns. A response ends with `eos` or after max_new tokens. eviction:
    None for a full cache. forced_BR: "draw" these tokens. Raises UsageError where the budget does not hold what the
    policy is forced to keep, FloatingPointError where the logits are not finite.

    Temperature 1 and no truncation: the recorded log-prob is that of the distribution drawn from, and only if that is
    the model's own can a learner reproduce and improve it.
    """
    (N, P), B = prompt_NP.shape, len(pad_N) * samples
    cache = Cache(model, pad_N, samples, P, max_new, eviction, generator, backend)
    pad_B = cache.pad_B
    hidden_NPC = model.extend(prompt_NP, rope_positions(pad_N, P), cache.prefill)
    cache.used = min(P, cache.most)
    hidden_BC = hidden_NPC[:, -1].repeat_interleave(samples, dim=0)
    response_BR = torch.full((B, max_new), eos, device=pad_N.device)
    logp_BR = torch.zeros(B, max_new, dtype=hidden_BC.dtype, device=pad_N.device)
    length_B, alive_B = torch.zeros_like(pad_B), torch.ones_like(pad_B, dtype=torch.bool)
    for r in range(max_new):
        logp_BV = model.logits(hidden_BC).log_softmax(dim=-1)
        if not logp_BV.isfinite().all():
            raise FloatingPointError("the policy's logits are not finite")
        drawn_B = forced_BR[:, r] if forced_BR is not None else logp_BV.exp().multinomial(1, generator=generator)[:, 0]
        response_BR[:, r] = torch.where(alive_B, drawn_B, eos)
        logp_BR[:, r] = torch.where(alive_B, logp_BV.gather(1, drawn_B[:, None])[:, 0], 0.0)
        length_B += alive_B
        alive_B = alive_B & (drawn_B != eos)
        if r + 1 == max_new or not alive_B.any():
            break
        # a sequence that has ended runs along with the others; the record forgets what it does from here on
        cache.now = P + r + 1
        hidden_BC = model.extend(response_BR[:, r, None], (P + r - pad_B)[:, None], cache.decode)[:, 0]
        cache.used += 1
        if (r + 1) % cache.eviction.interval == 0:
            cache.compress()
    cache.note()
    R = r + 1
    end_B11, column_T = (P + length_B)[:, None, None], torch.arange(P + R, device=pad_N.device)
    evicted_at_LBGT = cache.evicted_at[..., : P + R]
    # what was dropped after a sequence's last query, at column end - 2, was hidden from none; past its end is padding
    evicted_at_LBGT = evicted_at_LBGT.masked_fill(evicted_at_LBGT >= end_B11 - 1, NEVER)
    evicted_at_LBGT = evicted_at_LBGT.masked_fill(column_T >= end_B11, 0)
    entry_bytes = 2 * cache.k[:, 0, :, 0].numel() * cache.k.element_size()
    return Rollout(
        prompt_NP,
        pad_N,
        response_BR[:, :R],
        logp_BR[:, :R],
        length_B,
        evicted_at_LBGT,
        kv_bytes=cache.peak,
        full_kv_bytes=B * (P + R - 1) * entry_bytes,
        full_kv_bytes_shared=(N * P + B * (R - 1)) * entry_bytes,
    )


def encode_prompts(model: TinyModel, rollout: Rollout, backend: str | None = None) -> tuple[Tensor, list]:
    """Run each prompt once, dense like the sampler's: the state that predicts the first token (N, C), and all k, v."""
    P, keys = rollout.prompt_NP.shape[1], []
    record_NGP = padding_record(rollout.pad_N, P).expand(-1, model.config.kv_heads, -1)

    def attend(l: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys.append((k, v))
        return shadow_attention(q, k, v, record_NGP, backend=backend)

    hidden_NPC = model.extend(rollout.prompt_NP, rope_positions(rollout.pad_N, P), attend)
    return hidden_NPC[:, -1], keys


def replay(
    model: TinyModel, rollout: Rollout, prompts: tuple, record_LBGT: Tensor, backend: str | None = None
) -> Tensor:
    """Hidden states (X, C) that predict the response tokens, each from what its query sees under record_LBGT.

    With `rollout.evicted_at_LBGT` their logits are π_shadow, with `rollout.dense_LBGT` π_dense. `prompts` comes from
    `encode_prompts`; the x-th row belongs to the x-th True of `rollout.mask_BR`.
    """
    (last_NC, keys), P, R = prompts, rollout.prompt_NP.shape[1], rollout.response_BR.shape[1]
    S = len(rollout.response_BR) // len(last_NC)

    def attend(l: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pairs = zip(keys[l], (k, v), strict=True)
        k, v = (torch.cat((prompt.repeat_interleave(S, dim=0), own), dim=2) for prompt, own in pairs)
        return shadow_attention(q, k, v, record_LBGT[l][..., : P + R - 1], q_start=P, backend=backend)

    hidden_BRC = last_NC.repeat_interleave(S, dim=0)[:, None]
    if R > 1:
        # the last token is only ever predicted, by the token before it
        position_BR = rope_positions(rollout.pad_N, P + R - 1)[:, P:].repeat_interleave(S, dim=0)
        hidden_BRC = torch.cat((hidden_BRC, model.extend(rollout.response_BR[:, :-1], position_BR, attend)), dim=1)
    return hidden_BRC[rollout.mask_BR]


def token_logp(logits_XV: Tensor, token_X: Tensor) -> Tensor:
    return logits_XV.log_softmax(dim=-1).gather(-1, token_X[:, None])[:, 0]


def spread(x_X: Tensor, mask_BR: Tensor) -> Tensor:
    """One number for each response token as (B, R), zero past the end."""
    return x_X.new_zeros(mask_BR.shape).masked_scatter(mask_BR, x_X)


# What follows, down to `Batch`, takes plain tensors, to be lifted into another trainer. log_ratio_BR is the log of
# ρ = π_dense / π_sparse at rollout time, the learner's log-prob less the sampler's, zero where mask_BR is False.


def token_is(log_ratio_BR: Tensor, mask_BR: Tensor, cap: float) -> Tensor:
    """w_t = min(ρ_t, cap): token-level truncated importance sampling (Yao et al. 2025)."""
    return log_ratio_BR.exp().clamp(max=cap)


def sequence_is(log_ratio_BR: Tensor, mask_BR: Tensor, cap: float) -> Tensor:
    """w = min(Π_t ρ_t, cap), the same for all tokens of a sequence; untruncated, it is unbiased for π_dense."""
    return log_ratio_BR.sum(dim=1, keepdim=True).exp().clamp(max=cap).expand_as(log_ratio_BR)


def sparse_rl(log_ratio_BR: Tensor, mask_BR: Tensor, cap: float) -> Tensor:
    """w_t = min(ρ_t, cap), 0 in a sequence with any ρ_t < 1e-4, over the batch's mean (Sparse-RL, 2601.10079)."""
    weight_BR = token_is(log_ratio_BR, mask_BR, cap) * (log_ratio_BR >= math.log(1e-4)).all(dim=1, keepdim=True)
    return weight_BR / weight_BR[mask_BR].mean().clamp(min=1e-9)


class Method(NamedTuple):
    evicts: bool  # does the sampler forget
    replays: bool  # does the learner see what the sampler saw, and call the recorded log-prob the old one
    weight: Callable[[Tensor, Tensor, float], Tensor] | None = None  # of each token's loss, from log ρ; None: 1
    cap: float = math.inf  # the weight's truncation unless --is-cap says otherwise


METHODS = {
    "dense": Method(evicts=False, replays=False),
    "naive": Method(evicts=True, replays=False),  # sampled sparse, learned dense, as if they were one policy
    "tis": Method(evicts=True, replays=False, weight=token_is, cap=2.0),
    "seq_is": Method(evicts=True, replays=False, weight=sequence_is),
    "sparse_rl": Method(evicts=True, replays=False, weight=sparse_rl, cap=1.5),
    "smd": Method(evicts=True, replays=True),
}


def group_advantage(reward_NS: Tensor, norm_std: bool = True, eps: float = 1e-6) -> Tensor:
    """A = (r - mean) / (std + eps) over a prompt's samples, the population's std (GRPO, 2402.03300): (N, S).

    Without norm_std A = r - mean (Dr. GRPO, 2503.20783).
    """
    centred_NS = reward_NS - reward_NS.mean(dim=1, keepdim=True)
    return centred_NS / (reward_NS.std(dim=1, keepdim=True, correction=0) + eps) if norm_std else centred_NS


def gae(reward_B: Tensor, value_BR: Tensor, mask_BR: Tensor, lam: float) -> Tensor:
    """A_t = Σ_k λ^k δ_{t+k}, δ_t = r_t + V_{t+1} - V_t, γ = 1, the reward at the last token (1506.02438): (B, R)."""
    last_BR = mask_BR & ~F.pad(mask_BR, (0, 1))[:, 1:]
    next_BR = F.pad(value_BR * mask_BR, (0, 1))[:, 1:]
    delta_BR = (reward_B[:, None] * last_BR + next_BR - value_BR) * mask_BR
    advantage_BR, running_B = torch.zeros_like(value_BR), torch.zeros_like(reward_B)
    for t in reversed(range(value_BR.shape[1])):
        advantage_BR[:, t] = running_B = delta_BR[:, t] + lam * running_B
    return advantage_BR


def policy_loss(
    logp_BR: Tensor,
    old_logp_BR: Tensor,
    advantage_BR: Tensor,
    weight_BR: Tensor,
    mask_BR: Tensor,
    clip: float,
    longest: int,
) -> tuple[Tensor, float]:
    """-Σ w min(r A, clip(r, 1 - ε, 1 + ε) A) / (B · longest), r = exp(logp - old); and the share of tokens clipped."""
    ratio_BR = (logp_BR - old_logp_BR).exp()
    free_BR, clipped_BR = (r * advantage_BR for r in (ratio_BR, ratio_BR.clamp(1 - clip, 1 + clip)))
    loss = -(weight_BR * free_BR.minimum(clipped_BR) * mask_BR).sum() / (len(logp_BR) * longest)
    return loss, ((clipped_BR < free_BR) & mask_BR).sum().item() / mask_BR.sum().item()


def value_loss(value_BR: Tensor, old_BR: Tensor, return_BR: Tensor, mask_BR: Tensor, clip: float) -> Tensor:
    """½ max((V - R)², (V_clip - R)²), V_clip within `clip` of the value at rollout time; mean over tokens."""
    near_BR = old_BR + (value_BR - old_BR).clamp(-clip, clip)
    worst_BR = (value_BR - return_BR).square().maximum((near_BR - return_BR).square())
    return 0.5 * worst_BR[mask_BR].mean()


def dpo_loss(logp_B: Tensor, ref_logp_B: Tensor, reward_NS: Tensor, beta: float) -> Tensor:
    """-log σ(β [(ℓ_w - ℓ_w^ref) - (ℓ_l - ℓ_l^ref)]), best against worst sample of each prompt, mean over the pairs.

    A prompt whose samples have equal rewards makes no pair (DPO, 2305.18290; online: 2402.04792).
    """
    margin_NS = (logp_B - ref_logp_B).view_as(reward_NS)
    best_N, worst_N = (f(dim=1, keepdim=True) for f in (reward_NS.argmax, reward_NS.argmin))
    pair_N = reward_NS.amax(dim=1) > reward_NS.amin(dim=1)
    gap_N = (margin_NS.gather(1, best_N) - margin_NS.gather(1, worst_N))[:, 0]
    return -(F.logsigmoid(beta * gap_N) * pair_N).sum() / pair_N.sum().clamp(min=1)


def kl_divergence(p_logits_XV: Tensor, q_logits_XV: Tensor) -> Tensor:
    """KL(p ‖ q) = Σ_v p (log p - log q) over the whole vocabulary, mean over tokens."""
    p_XV, q_XV = p_logits_XV.log_softmax(dim=-1), q_logits_XV.log_softmax(dim=-1)
    return (p_XV.exp() * (p_XV - q_XV)).sum(dim=-1).mean()


# track 2: the dense policy follows the sparse one; the target's logits get no gradient
TRACK_2 = {
    "reverse": lambda dense_XV, shadow_XV: kl_divergence(dense_XV, shadow_XV.detach()),
    "forward": lambda dense_XV, shadow_XV: kl_divergence(shadow_XV.detach(), dense_XV),
}


def k3(logp_BR: Tensor, ref_logp_BR: Tensor, mask_BR: Tensor) -> Tensor:
    """r - 1 - log r, r = π_ref / π, mean over tokens. Its value estimates KL(π ‖ π_ref), but its gradient on-policy is
    that of KL(π_ref ‖ π) (Schulman, "Approximating KL divergence")."""
    log_r_X = (ref_logp_BR - logp_BR)[mask_BR]
    return (log_r_X.exp() - 1 - log_r_X).mean()


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

    def of_prompts(self, n: Tensor) -> "Batch":
        """The part of these prompts and all their samples."""
        S = len(self.reward_B) // len(self.rollout.prompt_NP)
        b = (n[:, None] * S + torch.arange(S, device=n.device)).flatten()
        r, rest = self.rollout, [getattr(self, f.name) for f in dataclasses.fields(self)[1:]]
        by_b = dict(response_BR=r.response_BR[b], logp_BR=r.logp_BR[b], length_B=r.length_B[b])
        by_b |= dict(prompt_NP=r.prompt_NP[n], pad_N=r.pad_N[n], evicted_at_LBGT=r.evicted_at_LBGT[:, b])
        return Batch(dataclasses.replace(r, **by_b), *(x if x is None else x[b] for x in rest))


@torch.no_grad()
def prepare(policy: "Policy", rollout: Rollout, reward_B: Tensor, s: Settings) -> Batch:
    """Old log-probs, weights, advantages, values and reference log-probs, with the policy as it sampled."""
    method, mask_BR, token_X = METHODS[s.method], rollout.mask_BR, rollout.response_BR[rollout.mask_BR]
    record_LBGT = rollout.record(method.replays)

    def hidden(model: TinyModel) -> Tensor:
        return replay(model, rollout, encode_prompts(model, rollout, s.backend), record_LBGT, s.backend)

    old_logp_BR, weight_BR, value_BR, ref_logp_BR = rollout.logp_BR, torch.ones_like(rollout.logp_BR), None, None
    if not method.replays or policy.critic is not None:
        hidden_XC = hidden(policy.model)
        if not method.replays:
            old_logp_BR = spread(token_logp(policy.model.logits(hidden_XC), token_X), mask_BR)
        if policy.critic is not None:
            value_BR = spread(policy.critic(hidden_XC)[:, 0], mask_BR)
    if method.weight is not None:
        cap = method.cap if s.is_cap is None else s.is_cap
        weight_BR = method.weight(old_logp_BR - rollout.logp_BR, mask_BR, cap)
    if policy.reference is not None:
        ref_logp_BR = spread(token_logp(policy.reference.logits(hidden(policy.reference)), token_X), mask_BR)
    return_BR = None
    if value_BR is None:
        advantage_NS = group_advantage(reward_B.view(len(rollout.prompt_NP), -1), s.norm_std)
        advantage_BR = advantage_NS.reshape(-1, 1).expand_as(mask_BR)
    else:
        advantage_BR = gae(reward_B, value_BR, mask_BR, s.gae_lam)
        return_BR = advantage_BR + value_BR
        if s.norm_std:
            seen_X = advantage_BR[mask_BR]
            advantage_BR = (advantage_BR - seen_X.mean()) / (seen_X.std(correction=0) + 1e-6)
    return Batch(rollout, reward_B, old_logp_BR, weight_BR, advantage_BR, value_BR, return_BR, ref_logp_BR)


# An objective: log-probs and values of the policy that is being updated -> its loss, and the share of tokens clipped.


def grpo(batch: Batch, logp_BR: Tensor, value_BR: None, s: Settings) -> tuple[Tensor, float]:
    """`policy_loss` with the group's advantage."""
    rest = batch.advantage_BR, batch.weight_BR, batch.rollout.mask_BR, s.clip, s.max_new
    return policy_loss(logp_BR, batch.old_logp_BR, *rest)


def ppo(batch: Batch, logp_BR: Tensor, value_BR: Tensor, s: Settings) -> tuple[Tensor, float]:
    """`policy_loss` with GAE's advantage + coefficient · `value_loss` (1707.06347)."""
    loss, clipped = grpo(batch, logp_BR, None, s)
    old = batch.value_BR, batch.return_BR, batch.rollout.mask_BR
    return loss + s.value_coef * value_loss(value_BR, *old, s.clip), clipped


def dpo(batch: Batch, logp_BR: Tensor, value_BR: None, s: Settings) -> tuple[Tensor, float]:
    """`dpo_loss` on sequence log-probs."""
    reward_NS = batch.reward_B.view(len(batch.rollout.prompt_NP), -1)
    return dpo_loss(logp_BR.sum(dim=1), batch.ref_logp_BR.sum(dim=1), reward_NS, s.dpo_beta), 0.0


OBJECTIVES = {"grpo": grpo, "ppo": ppo, "dpo": dpo}

# what a setting may be chosen from
CHOICES = dict(method=METHODS, kl=TRACK_2, objective=OBJECTIVES, policy=POLICIES)
CHOICES |= dict(device=("cpu", "cuda"), backend=kernel.BACKENDS)


class Policy(nn.Module):
    """What is trained: the model and, with ppo, a critic on its hidden states; and the frozen base policy, if used."""

    def __init__(self, model: TinyModel, s: Settings):
        super().__init__()
        self.model, self.reference, self.critic = model, None, None
        if s.objective == "ppo":
            self.critic = nn.Linear(model.config.width, 1).to(model.norm.weight)
            nn.init.zeros_(self.critic.weight), nn.init.zeros_(self.critic.bias)
        if s.objective == "dpo" or s.kl_ref:
            self.reference = copy.deepcopy(model).requires_grad_(False)


def learner_loss(policy: Policy, batch: Batch, s: Settings) -> tuple[Tensor, dict]:
    """The loss of s.method and s.objective on a batch, and figures for the log."""
    method, rollout, mask_BR = METHODS[s.method], batch.rollout, batch.rollout.mask_BR
    prompts = encode_prompts(policy.model, rollout, s.backend)
    hidden_XC = replay(policy.model, rollout, prompts, rollout.record(method.replays), s.backend)
    logits_XV = policy.model.logits(hidden_XC)
    logp_BR = spread(token_logp(logits_XV, rollout.response_BR[mask_BR]), mask_BR)
    value_BR = None if policy.critic is None else spread(policy.critic(hidden_XC)[:, 0], mask_BR)
    loss, clip_fraction = OBJECTIVES[s.objective](batch, logp_BR, value_BR, s)
    if method.replays and s.lam:
        dense_XC = replay(policy.model, rollout, prompts, rollout.dense_LBGT, s.backend)
        loss = loss + s.lam * TRACK_2[s.kl](policy.model.logits(dense_XC), logits_XV)
    if s.kl_ref:
        loss = loss + s.kl_ref * k3(logp_BR, batch.ref_logp_BR, mask_BR)
    policy_XV = logits_XV.detach().log_softmax(dim=-1)
    figures = dict(
        loss=loss.item(),
        replay_error=(logp_BR - rollout.logp_BR).abs().max().item(),
        entropy=-(policy_XV.exp() * policy_XV).sum(dim=-1).mean().item(),
        clip_fraction=clip_fraction,
    )
    if method.evicts and not method.replays:
        del figures["replay_error"]  # a learner that does not replay has none; `diagnose` measures it
    return loss, figures


def update(policy: Policy, optimizer: torch.optim.Optimizer, batch: Batch, s: Settings) -> dict:
    """s.epochs times s.minibatches gradient steps. Raises FloatingPointError where a loss is not finite."""
    prompt_N, rows = torch.arange(len(batch.rollout.prompt_NP), device=batch.reward_B.device), []
    parts = prompt_N.tensor_split(s.minibatches)
    for part_n in parts * s.epochs:
        loss, figures = learner_loss(policy, batch.of_prompts(part_n) if len(parts) > 1 else batch, s)
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is {loss.item()}")
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        rows.append(figures | {"grad_norm": norm.item()})
    # loss, entropy and replay error are those before the first update, of its part; the other two are means
    return rows[0] | {k: sum(row[k] for row in rows) / len(rows) for k in ("clip_fraction", "grad_norm")}


def effective_share(log_weight_n: Tensor) -> float:
    """Effective sample size (Σw)² / Σw² over n."""
    weight_n = (log_weight_n - log_weight_n.max()).exp()
    return (weight_n.sum().square() / weight_n.square().sum() / len(weight_n)).item()


@torch.no_grad()
def diagnose(model: TinyModel, rollout: Rollout, backend: str | None) -> dict:
    """How far π_dense is from π_sparse on the sampled prefixes, by one pass without gradients."""
    prompts, mask_BR = encode_prompts(model, rollout, backend), rollout.mask_BR
    records = (rollout.evicted_at_LBGT, rollout.dense_LBGT)
    logits = [model.logits(replay(model, rollout, prompts, record, backend)) for record in records]
    shadow_X, dense_X = (token_logp(t, rollout.response_BR[mask_BR]) for t in logits)
    log_ratio_X = dense_X.double() - rollout.logp_BR[mask_BR]
    log_ratio_B = spread(log_ratio_X, mask_BR).sum(dim=1)
    overlap_X = torch.minimum(*(t.softmax(dim=-1) for t in logits)).sum(dim=-1)
    return dict(
        replay_error=(shadow_X - rollout.logp_BR[mask_BR]).abs().max().item(),
        kl_sparse_dense=kl_divergence(*logits).item(),
        overlap_p05=overlap_X.quantile(0.05).item(),
        ess_token=effective_share(log_ratio_X),
        ess_sequence=effective_share(log_ratio_B),
        # e^700 is about the largest number there is
        max_weight_token=log_ratio_X.max().clamp(max=700).exp().item(),
        max_weight_sequence=log_ratio_B.max().clamp(max=700).exp().item(),
    )


class Agent:
    """A policy with its task and its encoding: text in, text out."""

    def __init__(self, s: Settings):
        """Load the task and check it against the settings: nothing is computed or written before this has passed."""
        self.s, self.encoding = s, load_encoding(s.encoding)
        self.task = Chain(s.letters, s.hops, s.warmup_slip) if s.data is None else TextFile(s.data)
        self.eviction = Eviction(s.policy, s.budget, s.interval, s.window, s.sinks)
        self.config = ModelConfig(self.encoding.n_vocab, s.width, s.layers, s.heads, s.kv_heads)
        self.model = TinyModel(self.config, seed=s.warmup_seed).to(s.device)
        for i, (prompt, answer) in enumerate(self.task.examples, start=1):
            where = f"{s.data}, example {i}: " if s.data is not None else ""
            self.check_length(prompt, where)
            if (tokens := len(self.encoding.encode_ordinary(answer)) + 1) > s.max_new:
                raise UsageError(f"{where}an answer of {tokens} tokens with its end exceeds --max-new {s.max_new}")
        self.eviction.keep(torch.tensor([len(self.encoding.encode_ordinary(e.prompt)) for e in self.task.examples]))

    def check_length(self, prompt: str, where: str = "") -> None:
        tokens, s = len(self.encoding.encode_ordinary(prompt)), self.s
        if not tokens:
            raise UsageError(f"{where}the prompt must not be empty")
        if tokens + s.max_new > s.context:
            raise UsageError(
                f"{where}a prompt of {tokens} tokens with --max-new {s.max_new} exceeds --context {s.context}"
            )

    def prompts(self, examples: list[Example]) -> tuple[Tensor, Tensor]:
        rows = [self.encoding.encode_ordinary(e.prompt) for e in examples]
        return pad_left(rows, self.encoding.eot_token, self.s.device)

    def respond(self, examples: list[Example], samples: int, evict: bool, generator) -> tuple[Rollout, list[str]]:
        eviction = self.eviction if evict else None
        eos, s = self.encoding.eot_token, self.s
        args = self.model, *self.prompts(examples), samples, s.max_new, eos, eviction, generator
        rollout = sample(*args, backend=s.backend)
        return rollout, [decode(self.encoding, row) for row in rollout.response_BR.tolist()]

    def evaluate(self) -> dict:
        """Accuracy on fixed held-out prompts, one sample each, with the sparse and with the full cache."""
        held_out = self.task.held_out(self.s.eval_prompts)
        result = {"prompts": len(held_out)}
        for name, evict in (("sparse", True), ("dense", False)):
            texts, generator = [], torch_stream(self.s.device, 0, EVALUATION, 1)
            for i in range(0, len(held_out), self.s.prompts):
                texts += self.respond(held_out[i : i + self.s.prompts], 1, evict, generator)[1]
            result[name] = accuracy(texts, held_out)
        return result

    def answer_logp(self, examples: list[Example], drop: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Log-probs of the right answers, end of text included, (B, R), and their mask.

        Each layer and kv head loses a random share `drop` of the prompt's keys when the prompt ends.
        """
        (prompt_BP, pad_B), eos, device = self.prompts(examples), self.encoding.eot_token, self.s.device
        answers = [[*self.encoding.encode_ordinary(e.answer), eos] for e in examples]
        R, P = max(map(len, answers)), prompt_BP.shape[1]
        answer_BR = torch.tensor([row + [eos] * (R - len(row)) for row in answers], device=device)
        mask_BR = torch.arange(R, device=device) < torch.tensor([[len(row)] for row in answers], device=device)
        record_LBGT = padding_record(pad_B, P + R - 1).repeat(self.config.layers, 1, self.config.kv_heads, 1)
        dropped = torch.rand(record_LBGT[..., :P].shape, generator=generator, device=device) < drop
        record_LBGT[..., :P] = record_LBGT[..., :P].masked_fill(dropped, P).minimum(record_LBGT[..., :P])
        hidden_BTC = self.model(torch.cat((prompt_BP, answer_BR[:, :-1]), dim=1), pad_B, record_LBGT, self.s.backend)
        logits_XV = self.model.logits(hidden_BTC[:, P - 1 :][mask_BR])
        return spread(token_logp(logits_XV, answer_BR[mask_BR]), mask_BR), mask_BR

    def warm_up(self) -> None:
        """Supervised steps: lessons, each until a right answer has probability 0.5, then the task itself."""
        s, taken = self.s, 0
        # Muon for the matrices of the layers: they learn retrieval in half the steps that AdamW takes
        weights = dict(self.model.named_parameters())
        matrices = [
            weights.pop(name) for name in list(weights) if name.startswith("layers") and weights[name].ndim == 2
        ]
        muon = torch.optim.Muon(matrices, lr=s.warmup_lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        adamw = torch.optim.AdamW(weights.values(), lr=s.warmup_lr, betas=(0.9, 0.95), weight_decay=0.0)
        for lesson in (*self.task.lessons, None):
            right = 0.0
            with tqdm(range(s.warmup_steps), desc=f"warm-up, {lesson or 'task'}", leave=False) as bar:
                for step in bar:
                    key = (s.warmup_seed, WARMUP, lesson or 0, step)
                    examples = self.task.supervised(s.warmup_batch, numpy_stream(*key), lesson)
                    logp_BR, mask_BR = self.answer_logp(examples, s.warmup_drop, torch_stream(s.device, *key))
                    # a running mean over examples that are new to the model
                    right += 0.1 * (logp_BR.detach().sum(dim=1).exp().mean().item() - right)
                    bar.set_postfix(right=f"{right:.2f}")
                    if lesson is not None and right >= 0.5:
                        break
                    loss = -logp_BR.sum() / mask_BR.sum()
                    if not loss.isfinite():
                        raise FloatingPointError(
                            f"the warm-up's loss is {loss.item()} at step {step}; lower --warmup-lr"
                        )
                    self.model.zero_grad()
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                    # up in 50 steps, and down to zero over the second half of the task
                    down = 2 - 2 * step / s.warmup_steps if lesson is None else 1.0
                    taken += 1
                    for optimizer in (muon, adamw):
                        optimizer.param_groups[0]["lr"] = s.warmup_lr * min(1.0, taken / 50, down)
                        optimizer.step()

    def base_path(self) -> Path:
        """Where the base policy is kept, named by all that determines it."""
        s = self.s
        # settings, data, code, and how this machine does its arithmetic
        names = [f.name for f in dataclasses.fields(s) if f.name.startswith("warmup")]
        names += ["encoding", "letters", "hops", "context", "max_new", "device", "backend"]
        key = [self.config, [getattr(s, name) for name in names], torch.__version__, torch.get_num_threads()]
        key += [torch.backends.cpu.get_cpu_capability(), s.device == "cuda" and torch.cuda.get_device_name()]
        files = [__file__, kernel.__file__, tiny_model.__file__] + ([s.data] if s.data is not None else [])
        digest = hashlib.sha256(repr(key).encode() + b"".join(Path(f).read_bytes() for f in files)).hexdigest()
        return Path(s.cache) / f"base-{digest[:16]}.pt"

    def load_base(self) -> None:
        """The policy that RL starts from: out of the cache, or warmed up and put there."""
        path = self.base_path()
        if path.exists():
            restore(path, self.model)
        else:
            self.warm_up()
            save(path, dict(weights=self.model.state_dict()))


def accuracy(texts: list[str], examples: list[Example]) -> float:
    """Share of exactly right responses, as many to each example."""
    samples = len(texts) // len(examples)
    return sum(t.strip() == examples[i // samples].answer.strip() for i, t in enumerate(texts)) / len(texts)


def write(path: Path, content: str | bytes) -> None:
    """Write a file such that, whenever the process dies, the old one or the new one is there whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            f.write(content.encode() if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        raise UsageError(f"{path} cannot be written: {e.strerror}; make room or choose another folder") from e


def save(path: Path, state: dict) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write(path, buffer.getvalue())


def restore(path: Path, module: nn.Module) -> dict:
    """Load a checkpoint's weights into a module, and return it whole; UsageError where it is damaged."""
    try:
        state = torch.load(path, map_location=next(module.parameters()).device, weights_only=True)
        module.load_state_dict(state["weights"])
    except Exception as e:  # there are many ways to be damaged
        what = f"{type(e).__name__}: {str(e).splitlines()[0][:80] if str(e) else ''}"
        raise UsageError(f"checkpoint {path} is missing or damaged ({what}); delete it or use --overwrite") from e
    return state


FIXED = {f.name for f in dataclasses.fields(Settings) if not f.metadata["free"]}
FILES = ("config.json", "checkpoint.pt", "metrics.jsonl", "summary.json", "curves.png")


def read_config(out: Path) -> dict:
    try:
        config = json.loads((out / "config.json").read_text())
        return {name: config[name] for name in (*FIXED, "steps")}
    except OSError as e:
        raise UsageError(f"{out} holds no run to resume ({e.strerror})") from e
    except (ValueError, KeyError, TypeError) as e:
        raise UsageError(f"{out / 'config.json'} is damaged ({e!r}); use --overwrite to start again") from e


def find_run(s: Settings) -> Path:
    """The folder of the run, new or to be continued; UsageError where it is another's. Writes nothing."""
    taken = [int(p.name.rpartition("-")[2]) for p in Path("out").glob(f"{s.method}-[0-9][0-9][0-9]")]
    out = Path(s.out or f"out/{s.method}-{max(taken, default=0) + 1:03d}")
    if (out / "config.json").exists() and not s.overwrite:
        if not s.resume:
            raise UsageError(f"--out {out} holds a run; add --resume to continue it or --overwrite to replace it")
        for name, old in read_config(out).items():
            if name in FIXED and old != getattr(s, name):
                now = getattr(s, name)
                raise UsageError(f"--out {out} holds a run with {flag(name)} {old}, not {now}; use another --out")
    return out


def open_run(out: Path, s: Settings) -> None:
    """Make the folder and write its config.json; UsageError where that cannot be done."""
    config = {name: getattr(s, name) for name in sorted(FIXED)} | {"steps": s.steps}
    # the old run goes before the new config comes: a kill in between must not leave its checkpoint under that config
    for path in [out / name for name in FILES[1:] if s.overwrite and (out / name).exists()]:
        try:
            path.unlink()
        except OSError as e:
            raise UsageError(f"{path} cannot be replaced: {e.strerror}; use another --out") from e
    write(out / "config.json", json.dumps(config, indent=1) + "\n")


def read_metrics(path: Path, steps: int) -> list[dict]:
    lines = path.read_text().splitlines()[:steps] if path.exists() else []
    if len(lines) < steps:
        raise UsageError(f"{path} holds {len(lines)} of the checkpoint's {steps} steps; use --overwrite to start again")
    return [json.loads(line) for line in lines]


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def train_step(agent: Agent, policy: Policy, optimizer: torch.optim.Optimizer, reward: Callable, step: int) -> dict:
    """Sample, score, diagnose, learn: one row of metrics.jsonl."""
    s, began = agent.s, clock(agent.s.device)
    examples = agent.task.draw(s.prompts, numpy_stream(s.seed, PROMPTS, step))
    generator = torch_stream(s.device, s.seed, SAMPLING, step)
    rollout, texts = agent.respond(examples, s.samples, METHODS[s.method].evicts, generator)
    asked = (examples[i // s.samples] for i in range(len(texts)))
    rewards = [float(reward(e.prompt, text, e.answer)) for e, text in zip(asked, texts, strict=True)]
    if not all(map(math.isfinite, rewards)):
        raise FloatingPointError(f"a reward is {next(r for r in rewards if not math.isfinite(r))}")
    sampled = clock(s.device)
    diagnosis = diagnose(policy.model, rollout, s.backend) if (step - 1) % s.diag_every == 0 else {}
    diagnosed = clock(s.device)
    optimizer.param_groups[0]["lr"] = s.lr * min(1.0, step / max(1, s.lr_warmup))
    reward_B = torch.tensor(rewards, dtype=rollout.logp_BR.dtype, device=s.device)
    learned = update(policy, optimizer, prepare(policy, rollout, reward_B, s), s)
    row = dict(step=step, reward=sum(rewards) / len(rewards), accuracy=accuracy(texts, examples), replay_error=None)
    row |= learned | diagnosis | dict(kept_share=rollout.kept_share())
    row |= {name: getattr(rollout, name) for name in ("kv_bytes", "full_kv_bytes", "full_kv_bytes_shared")}
    row |= dict(seconds_sample=sampled - began, seconds_diag=diagnosed - sampled)
    return row | dict(seconds_learn=clock(s.device) - diagnosed)


def train(settings: Settings, reward: Callable[[str, str, str], float] | None = None) -> dict:
    """Warm up, evaluate, train, evaluate. Leaves its files in settings.out; returns what summary.json holds.

    reward(prompt, response, answer) -> float may be anything: a verifier, a reward model, an AI judge; None takes the
    task's own. Raises UsageError for what cannot be used, FloatingPointError where loss or logits stop being finite.
    """
    s, began = checked(settings), time.perf_counter()
    agent, out = Agent(s), find_run(s)
    policy = Policy(agent.model, s)
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=s.lr, betas=(0.9, 0.95), weight_decay=0.0)
    checkpoint, metrics, state, rows = out / "checkpoint.pt", out / "metrics.jsonl", None, []
    if s.resume and checkpoint.exists():
        state = restore(checkpoint, policy)
        optimizer.load_state_dict(state["optimizer"])
        rows = read_metrics(metrics, state["step"])
        if len(rows) > s.steps:
            raise UsageError(
                f"--out {out} is at step {len(rows)} already, got --steps {s.steps}; give at least that many"
            )
    open_run(out, s)
    print(f"run {out} | device {s.device} | attention backend {kernel.backend_for(s.device, s.backend)}", flush=True)
    if state is None:
        agent.load_base()
        if policy.reference is not None:
            policy.reference.load_state_dict(agent.model.state_dict())
        state = dict(step=0, before=agent.evaluate(), weights=policy.state_dict(), optimizer=optimizer.state_dict())
        save(checkpoint, state)
    before = state["before"]
    # what a killed run logged beyond its checkpoint, whole or in part, is done again
    write(metrics, "".join(json.dumps(row) + "\n" for row in rows))
    with tqdm(initial=len(rows), total=s.steps, desc="train") as bar, open(metrics, "a") as log:
        for step in range(len(rows) + 1, s.steps + 1):
            try:
                rows.append(train_step(agent, policy, optimizer, reward or agent.task.reward, step))
            except FloatingPointError as e:
                raise FloatingPointError(f"stopped at step {step}: {e}; {checkpoint} keeps the last good policy") from e
            if s.eval_every and step % s.eval_every == 0:
                rows[-1] |= {f"held_out_{name}": share for name, share in agent.evaluate().items() if name != "prompts"}
            print(json.dumps(rows[-1]), file=log, flush=True)
            bar.update()
            bar.set_postfix({name: f"{rows[-1][name]:.2f}" for name in ("reward", "accuracy")})
            if step % s.save_every == 0 or step == s.steps:
                os.fsync(log.fileno())
                weights = dict(weights=policy.state_dict(), optimizer=optimizer.state_dict())
                save(checkpoint, dict(step=step, before=before) | weights)
    errors = [row["replay_error"] for row in rows if row["replay_error"] is not None]
    summary = dict(
        out=str(out),
        steps=s.steps,
        before=before,
        after=agent.evaluate(),
        kept_share=rows[-1]["kept_share"] if rows else None,
        replay_error=max(errors, default=None),
        seconds=time.perf_counter() - began,
    )
    write(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    draw_curves(rows, summary, out / "curves.png")
    return summary


def draw_curves(rows: list[dict], summary: dict, path: Path) -> None:
    """Left: reward and accuracy, while training and held out. Right: how far sparse, replayed and dense lie apart."""
    import matplotlib.pyplot as plt  # here, because it takes a second that a test or an error message need not wait

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axis, name, colour, label in (
        (left, "reward", "tab:gray", "reward of the rollouts"),
        (left, "accuracy", "tab:green", "accuracy of the rollouts"),
        (right, "replay_error", "tab:blue", "replay error: max |log π_shadow - log π_sparse|"),
        (right, "kl_sparse_dense", "tab:orange", "KL(π_sparse ‖ π_dense), nats a token"),
    ):
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        axis.plot(*np.reshape(points, (-1, 2)).T, ".-", markersize=3, color=colour, label=label)
    for name, colour in (("sparse", "tab:blue"), ("dense", "tab:orange")):
        ends = [summary[when][name] for when in ("before", "after")]
        left.plot([0, summary["steps"]], ends, "o:", color=colour, label=f"held-out accuracy, {name} cache")
    for axis, top in ((left, 1), (right, None)):
        axis.set(xlabel="step", ylim=(0, top))
        axis.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def report(summary: dict) -> str:
    lines = ["held-out accuracy     before    after"]
    for name in ("sparse", "dense"):
        lines.append(f"  {name:6} cache {summary['before'][name]:13.1%} {summary['after'][name]:8.1%}")
    if summary["replay_error"] is not None:
        lines.append(
            f"share of keys kept {summary['kept_share']:.2f}, largest replay error {summary['replay_error']:.1e}"
        )
    lines.append(f"{summary['seconds']:.0f} s; {', '.join(FILES)} in {summary['out']}")
    return "\n".join(lines)


def answer(settings: Settings) -> str:
    """Answer settings.prompt from the checkpoint in settings.out, with the sparse and with the full cache."""
    agent = Agent(checked(settings))
    agent.check_length(settings.prompt, "--prompt: ")
    restore(Path(settings.out) / "checkpoint.pt", Policy(agent.model, agent.s))
    lines = []
    for name, evict in (("sparse cache", True), ("full cache", False)):
        generator = torch_stream(agent.s.device, settings.seed, EVALUATION, 2)
        lines.append(f"{name + ':':14}{agent.respond([Example(settings.prompt, '')], 1, evict, generator)[1][0]}")
    return "\n".join(lines)


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UsageError(f"{message}; see --help")


def number(text: str) -> int | float:
    """A count ("18") or a share ("0.5"): how it is written says which."""
    return int(text) if text.lstrip("+-").isdigit() else float(text)


def parse(argv: list[str] | None) -> Settings:
    """Settings from a command line. With --resume, what is not given comes from the run's config.json."""
    parser = Parser(
        "smd.py", description=__doc__.splitlines()[0], argument_default=argparse.SUPPRESS, allow_abbrev=False
    )
    for f in dataclasses.fields(Settings):
        among = CHOICES.get(f.name)
        default = "" if f.default is None or isinstance(f.default, bool) else f" (default: {f.default})"
        help = f.metadata["help"] + (f": {', '.join(among)}" if among else "") + default
        kinds = [t for t in get_args(f.type) or (f.type,) if t is not types.NoneType]
        if kinds == [bool]:
            action = argparse.BooleanOptionalAction if f.default else "store_true"
            parser.add_argument(flag(f.name), action=action, help=help)
        else:
            kind = number if float in kinds and int in kinds else kinds[0]
            parser.add_argument(flag(f.name), type=kind, metavar=kind.__name__.upper(), help=help.replace("%", "%%"))
    given = vars(parser.parse_args(argv))
    if "resume" in given and "out" not in given:
        raise UsageError("--resume needs --out, the folder of the run to continue")
    if "prompt" in given and "resume" not in given:
        raise UsageError("--prompt needs --resume and --out, the run that is to answer")
    return Settings(**(read_config(Path(given["out"])) if "resume" in given else {}) | given)


def main(argv: list[str] | None = None) -> int:
    try:
        settings = parse(argv)
        print(report(train(settings)) if settings.prompt is None else answer(settings))
    except (UsageError, FloatingPointError) as e:
        print(f"smd.py: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("smd.py: interrupted; --resume --out FOLDER goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
