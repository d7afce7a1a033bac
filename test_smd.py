"""A proof, in numbered lemmas, that the learner sees what the sampler saw, and which gradient it then follows.

    python -m pytest -n 2

Each lemma has its oracle in this file, written apart from the code under test, and where one exists a negative control
that must fail. The tolerances: float64 replays are compared at 1e-10 and float32 ones at 1e-5, the rounding of some
hundred operations on numbers of order one; the errors that the lemmas exclude are a hundred times larger or more.

 1  Replay equals the sampler, for every policy, and the sampler equals an oracle that feeds one token at a time to an
    explicit list of keys. What is drawn for a prompt depends on nothing but its key.
 2  `shadow_attention` equals a loop and passes gradcheck.
 3  With a budget that holds everything, sampler and learner are the dense model.
 6  A prompt computed once per group gives the gradients of one repeated for each sample.
 7  Track 2 sends no gradient into the shadow logits.
10  The Triton kernels err no more than twice what plain code of their precision does.
13  The learner through them is the learner.
14  to 22: on a model whose 64 responses can be enumerated, which gradient each method follows; each loss by hand.
26  What a GPU would refuse, or wait for, a CPU finds out.

The lemmas on what a run needs besides are in `tests/`:

 0, 24  test_pretrained.py: the model is of its family: logits, checkpoints and token ids are those of the transformers
        and tokenizers packages, and models of that package replay our rollouts. What cannot be run is refused.
 4      test_cache.py: the cache holds what its budget says, and the bytes that it reports are the allocator's.
 5      test_policies.py: each eviction policy, on cases worked out by hand.
 8      test_runs.py, test_cli.py: a run that is killed and resumed equals one that was not, to the bit; every bad input
        gets one line. A short run learns; with shuffled rewards it does not.
 9      test_tasks.py, test_cli.py: tasks, evaluation, text and what is printed, by hand.
11, 12  test_tiles.py: the kernels' lists of tiles hold every visible pair once, and waste little. The kernels compile
        for GPUs that are not here, fit, do not spill, and load ahead.
20-22   test_objectives.py: PPO, DPO, the reference, minibatches and parts, by hand, by loops and by finite differences.
23      test_experiments.py: the README and the notebook speak of what there is.
25      test_processes.py: processes that share a step's prompts are one process.
"""

import dataclasses
import hashlib
import itertools
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import kernel
import smd
import tiny_model
from experiments import kernels
from experiments.enumerated import World, distance, gradient
from harness import cli, report, streams, text
from kernel import NEVER, shadow_attention
from smd import Eviction, Settings
from tiny_model import ModelConfig, TinyModel, never_evicted

EOS = 19

ROOT = Path(__file__).parent

POLICIES = list(smd.EVICTIONS)


def small_model(dtype=torch.float64, seed=0, **changes) -> TinyModel:
    """Random weights, doubled: attention sharp enough for what is evicted to matter."""
    config = ModelConfig(**dict(vocab=20, width=32, layers=2, heads=4, kv_heads=2, ffn=48) | changes)
    model = TinyModel(config, seed=seed).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.0)
    return model


def ragged_prompts(lengths=(17, 9, 30, 12), seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(EOS, (n,), generator=generator).tolist() for n in lengths]
    return text.pad_left(rows, EOS, "cpu")


def ragged_rollout(model, policy="snapkv", samples=3, max_new=14, budget=8, lengths=(17, 9, 30, 12), seed=0):
    eviction = None if budget is None else Eviction(policy, budget, interval=3, window=3, sinks=1)
    key_N = streams.hashed(seed, torch.arange(len(lengths)))
    return smd.sample(model, *ragged_prompts(lengths), samples, max_new, EOS, eviction, key_N)


def replayed_logp(model, rollout, evicted_at) -> torch.Tensor:
    return smd.response_logp(model, rollout, smd.replay(model, rollout, evicted_at)[0])[rollout.mask_BR]


def compare(name: str, got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    error, scale = (got - want).abs().max().item(), want.square().mean().sqrt().item()
    rms = (got - want).square().mean().sqrt().item() / max(scale, 1e-300)
    assert error <= tolerance, f"{name}: max error {error:.1e} > {tolerance:.0e}, RMS ratio {rms:.1e}"


# Lemma 1: replay equals the sampler


class Key:
    """A key that is still held by one kv head, and what is known of it."""

    def __init__(self, column, number, key, value):
        self.column = column
        self.number = number  # among what was kept when the prompt ended, and what came after
        self.key = key
        self.value = value
        self.received = 0.0  # attention, so far


def pseudo_random(number, g):
    """Scores in place of random ones, so that two implementations can go by the same: never equal twice in a head."""
    return (number * 7919 + g * 104_729) % 1009


class Oracle:
    """One sequence without padding, a token and a kv head at a time, from explicit lists of the keys still held.

    Its own RMSNorm, rotary embedding, attention, SwiGLU, and its own reading of what each policy keeps: it shares
    nothing with the code under test but weights. `logp` holds the log-probs of the response, `died` the record.
    """

    def __init__(self, model, prompt: list[int], response: list[int], eviction: Eviction | None, budget: int):
        self.c, self.w = model.config, model.state_dict()
        self.eviction, self.budget = eviction, budget
        self.M = self.c.heads // self.c.kv_heads
        pairs = list(itertools.product(range(self.c.layers), range(self.c.kv_heads)))
        self.held = {pair: [] for pair in pairs}
        self.queries = {pair: [] for pair in itertools.product(range(self.c.layers), range(self.c.heads))}
        self.died = {pair: {} for pair in pairs}
        self.logp = []
        self.P = P = len(prompt)
        fed = prompt + response[:-1]
        for step, token in enumerate(fed):
            logits = self.feed(step, token)
            if step >= P - 1:
                self.logp.append(logits.log_softmax(0)[response[step + 1 - P]])
            due = step == P - 1 or (step >= P and (step + 1 - P) % (eviction.interval if eviction else 1) == 0)
            # what would be dropped after the last query is dropped from nobody
            if eviction and due and step + 1 < len(fed):
                stay = {pair: self.survivors(*pair, now=step + 1) for pair in pairs}
                for pair, keys in stay.items():
                    self.died[pair] |= {key.column: step + 1 for key in self.held[pair] if key not in keys}
                    if step == P - 1:
                        for number, key in enumerate(keys):
                            key.number = number
                self.held = stay
        self.logp = torch.stack(self.logp)

    def norm(self, x, name):
        return x / (x.square().mean() + self.c.norm_eps).sqrt() * self.w[name + ".weight"]

    def turn(self, x, position):
        half = self.c.head_dim // 2
        angle = [position * self.c.rope_theta ** (-2 * d / self.c.head_dim) for d in range(half)]
        angle = torch.tensor(angle, dtype=torch.float64)
        cos, sin = angle.cos().to(x), angle.sin().to(x)
        return torch.cat((x[:half] * cos - x[half:] * sin, x[half:] * cos + x[:half] * sin))

    def scores(self, query, keys):
        return torch.stack([query @ key.key for key in keys]) / math.sqrt(self.c.head_dim)

    def feed(self, step, token):
        x = self.w["embed_tokens.weight"][token]
        for layer in range(self.c.layers):
            name = f"layers.{layer}."
            y = self.norm(x, name + "input_layernorm")
            projected = (self.w[f"{name}self_attn.{p}_proj.weight"] @ y for p in ("q", "k", "v"))
            q, k, v = (p.view(-1, self.c.head_dim) for p in projected)
            for g in range(self.c.kv_heads):
                number = self.held[layer, g][-1].number + 1 if step else 0  # `random`, which reads it, keeps the last
                self.held[layer, g].append(Key(step, number, self.turn(k[g], step), v[g]))
            outs = []
            for h in range(self.c.heads):
                keys, query = self.held[layer, h // self.M], self.turn(q[h], step)
                self.queries[layer, h].append((step, query))
                weight = self.scores(query, keys).softmax(0)
                for key, share in zip(keys, weight.tolist(), strict=True):
                    key.received += share
                outs.append(weight @ torch.stack([key.value for key in keys]))
            x = x + self.w[name + "self_attn.o_proj.weight"] @ torch.cat(outs)
            y = self.norm(x, name + "post_attention_layernorm")
            gate, up = (self.w[f"{name}mlp.{p}_proj.weight"] @ y for p in ("gate", "up"))
            x = x + self.w[name + "mlp.down_proj.weight"] @ (gate * gate.sigmoid() * up)
        return self.w["lm_head.weight"] @ self.norm(x, "norm")

    def survivors(self, layer, g, now):
        keys = self.held[layer, g]
        e, policy = self.eviction, self.eviction.policy
        protected = sum(key.column < self.P for key in keys) if e.protect else 0
        if len(keys) <= protected + self.budget:
            return keys
        score = getattr(self, policy)(layer, g, keys, now)
        sinks = e.sinks if policy in ("streaming", "snapkv", "random") else 0
        window = e.window if policy in ("snapkv", "rkv", "random") else 0
        for n, key in enumerate(keys):
            if key.column < sinks or key.column >= now - window or (protected and key.column < self.P):
                score[n] = math.inf
        ranked = sorted(range(len(keys)), key=lambda n: -score[n])  # stable: of a tie the earlier key stays
        return [keys[n] for n in sorted(ranked[: protected + self.budget])]

    def window_rows(self, layer, g, keys):
        """Of the last queries of each head that reads this kv head, the scores over its keys: -inf for later ones."""
        for h in range(g * self.M, (g + 1) * self.M):
            for at, query in self.queries[layer, h][-self.eviction.window :]:
                hidden = torch.tensor([key.column > at for key in keys])
                yield at, self.scores(query, keys).masked_fill(hidden, -math.inf)

    def streaming(self, layer, g, keys, now):
        return [key.column for key in keys]

    def snapkv(self, layer, g, keys, now):
        e = self.eviction
        total = sum(row.softmax(0) for _, row in self.window_rows(layer, g, keys)).tolist()
        total = [0.0 if key.column >= now - e.window else t for key, t in zip(keys, total, strict=True)]
        return [sum(total[max(0, n - e.pool // 2) : n + e.pool // 2 + 1]) for n in range(len(keys))]

    def h2o(self, layer, g, keys, now):
        latest = self.budget - self.budget // 2
        return [math.inf if key.column >= now - latest else key.received for key in keys]

    def tova(self, layer, g, keys, now):
        total = 0.0
        for h in range(self.c.heads):
            total += self.scores(self.queries[layer, h][-1][1], self.held[layer, h // self.M]).softmax(0)
        return [*total.tolist()[:-1], math.inf]

    def knorm(self, layer, g, keys, now):
        return [-round(1000 * math.log(key.key.norm().item())) for key in keys]

    def rkv(self, layer, g, keys, now):
        window = [key.column >= now - self.eviction.window for key in keys]
        best = {}
        for at, row in self.window_rows(layer, g, keys):
            row = row.masked_fill(torch.tensor(window), -math.inf)
            best[at] = torch.maximum(best[at], row) if at in best else row
        attention = (sum(row.softmax(0) for row in best.values()) / len(best)).tolist()
        pooled = [max(attention[max(0, n - 3) : n + 4]) for n in range(len(keys))]
        cosine = [[F.cosine_similarity(a.key, b.key, dim=0).item() if a is not b else 0.0 for b in keys] for a in keys]
        for row in cosine:
            alike = [n for n, value in enumerate(row) if value > 0.5]
            if alike:
                row[alike[-1]] = 0.0
        mean = torch.tensor([sum(column) / len(keys) for column in zip(*cosine, strict=True)], dtype=torch.float64)
        return [0.07 * a - 0.93 * r for a, r in zip(pooled, mean.softmax(0).tolist(), strict=True)]

    def random(self, layer, g, keys, now):
        return [pseudo_random(key.number, g) for key in keys]


def check_against_oracle(model, rollout, eviction, sequences) -> None:
    """Log-probs and record of these sequences, and what is padding in the record."""
    S = len(rollout.response_BR) // len(rollout.prompt_NP)
    for b in sequences:
        pad, length = rollout.pad_N[b // S].item(), rollout.length_B[b].item()
        prompt, response = rollout.prompt_NP[b // S, pad:].tolist(), rollout.response_BR[b, :length].tolist()
        budget = eviction.budget
        if isinstance(budget, str):
            budget = math.ceil(int(budget.removesuffix("%")) * len(prompt) / 100 - 1e-9)
        oracle = Oracle(model, prompt, response, eviction, budget)
        compare(f"log-probs of sequence {b}", rollout.logp_BR[b, :length], oracle.logp, 1e-10)
        assert (rollout.logp_BR[b, length:] == 0).all(), "there is a log-prob after the end"
        end = pad + len(prompt) + length
        for (layer, g), died in oracle.died.items():
            want = [0] * pad + [died.get(n, NEVER - pad) + pad for n in range(len(prompt) + length)]
            got = rollout.evicted_at_LBGT[layer, b, g].tolist()
            assert got[:end] == want, f"sequence {b}, layer {layer}, kv head {g}"
            assert not any(got[end:]), "what is past the end is not padding"


def decided_by_number(e):
    """The policy `random` with scores that the oracle has, too."""
    number = e.column_BGK - e.pad_B[:, None, None]
    return pseudo_random(number, torch.arange(number.shape[1])[:, None]).double()


@pytest.mark.parametrize("budget", [8, "40%"])
@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_1_log_probs_and_record_are_those_of_a_list_of_keys(policy, budget, monkeypatch):
    """Would catch any key kept or dropped against the policy's definition, at whatever step and in whatever head."""
    monkeypatch.setitem(smd.EVICTIONS, "random", smd.EVICTIONS["random"]._replace(score=decided_by_number))
    monkeypatch.setitem(smd.SCRATCH, "cpu", 2**11)
    model = small_model()
    eviction = Eviction(policy, budget, interval=3, window=3, sinks=2, pool=3)
    prompts = ragged_prompts((17, 13, 30, 12))
    rollout = smd.sample(model, *prompts, 3, 14, EOS, eviction)
    assert rollout.length_B.min() < rollout.length_B.max(), "no early end of sequence in this rollout"
    decode_time = (rollout.evicted_at_LBGT > 30) & (rollout.evicted_at_LBGT < NEVER)
    assert decode_time.any(), "nothing was evicted while decoding"
    check_against_oracle(model, rollout, eviction, range(0, 12, 2))


@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_1_and_so_for_a_prompt_that_is_read_in_several_parts(policy, monkeypatch):
    monkeypatch.setitem(smd.EVICTIONS, "random", smd.EVICTIONS["random"]._replace(score=decided_by_number))
    model, eviction = small_model(layers=1), Eviction(policy, 20, interval=4, window=3, sinks=1, pool=5)
    prompts = ragged_prompts((150, 131))
    assert prompts[0].shape[1] > 4 * smd.ROWS
    rollout = smd.sample(model, *prompts, 1, 10, -1, eviction)
    check_against_oracle(model, rollout, eviction, range(2))


@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_1_and_so_for_a_prompt_that_is_shorter_than_the_window(policy, monkeypatch):
    monkeypatch.setitem(smd.EVICTIONS, "random", smd.EVICTIONS["random"]._replace(score=decided_by_number))
    model, eviction = small_model(), Eviction(policy, 8, interval=3, window=6, sinks=1, pool=3)
    rollout = smd.sample(model, *ragged_prompts((4, 3)), 2, 24, -1, eviction)
    check_against_oracle(model, rollout, eviction, range(4))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_1_replay_equals_the_sampler(policy, dtype, tolerance, monkeypatch):
    """Would catch a mask rebuilt by another rule, a head or layer mixed up, padding or RoPE off by one."""
    monkeypatch.setitem(smd.SCRATCH, "cpu", 2**11)  # several parts, the last one smaller, as in a long decode
    model = small_model(dtype)
    rollout = ragged_rollout(model, policy)
    drawn = rollout.logp_BR[rollout.mask_BR]
    compare("shadow", replayed_logp(model, rollout, rollout.evicted_at_LBGT), drawn, tolerance)

    # negative controls: the dense learner, and the record shifted by one query either way
    assert (replayed_logp(model, rollout, rollout.never_evicted_LBGT) - drawn).abs().max() > 1e-2
    evicted = (rollout.evicted_at_LBGT > 0) & (rollout.evicted_at_LBGT < NEVER)
    for shift in (-1, 1):
        shifted = rollout.evicted_at_LBGT + shift * evicted.int()
        assert (replayed_logp(model, rollout, shifted) - drawn).abs().max() > 1e-3


@torch.no_grad()
def test_1_a_prompt_in_a_ragged_batch_is_treated_as_if_alone():
    """Would catch padding, or a neighbour that decodes on after a sequence has ended, leaking into what is kept."""
    model = small_model()
    for policy in set(POLICIES) - {"random"}:  # which draws for the batch
        for budget in (8, "50%"):
            together = ragged_rollout(model, policy, samples=1, budget=budget)
            for n, length in enumerate(together.length_B.tolist()):
                pad = together.pad_N[n].item()
                eviction = Eviction(policy, budget, interval=3, window=3, sinks=1)
                alone = smd.sample(
                    model,
                    together.prompt_NP[n : n + 1, pad:],
                    torch.tensor([0]),
                    samples=1,
                    max_new=length,
                    eos=EOS,
                    eviction=eviction,
                    forced_BR=together.response_BR[n : n + 1, :length],
                )
                compare(f"{policy} log-probs", alone.logp_BR[0], together.logp_BR[n, :length], 1e-12)
                record = together.evicted_at_LBGT[:, n, :, pad : alone.evicted_at_LBGT.shape[-1] + pad]
                shift = pad * ((record > 0) & (record < NEVER)).int()
                assert torch.equal(record - shift, alone.evicted_at_LBGT[:, 0]), policy


def test_1_a_response_that_the_record_has_no_room_for_is_refused():
    for new in (1, 2, 3, 40):  # shorter than an interval, and than the room for one
        rollout = smd.sample(small_model(), *ragged_prompts(), 2, new, -1, Eviction("snapkv", 8, interval=20))
        assert rollout.response_BR.shape == (8, new) and rollout.evicted_at_LBGT.shape[-1] == 30 + new
    with pytest.raises(cli.UsageError, match="a response has at most 32767 tokens here, got 32768"):
        smd.sample(small_model(), *ragged_prompts(), 2, 2**15, -1)


def test_1_what_is_evicted_after_the_last_query_was_evicted_from_nobody():
    """A prompt of two columns, a response in 2, 3, 4 whose last query stands in 3; by hand, as in the docstring."""
    written = torch.tensor([2, 3, 4, NEVER, NEVER, NEVER, 0], dtype=torch.int32)
    got = smd.finished_record(written.view(1, 1, 1, 7), torch.tensor([5]))
    assert got.flatten().tolist() == [2, 3, NEVER, NEVER, NEVER, 0, 0]


@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_1_what_is_drawn_for_a_prompt_depends_on_nothing_but_its_key(policy):
    """Would catch draws in the order of a batch, or by a prompt's number in it."""
    model = small_model()
    together = ragged_rollout(model, policy, budget="40%")
    eviction = Eviction(policy, "40%", interval=3, window=3, sinks=1)
    key_N = streams.hashed(0, torch.arange(4))
    # the same padding, so that a column is a column
    for n in ([2], [3, 1], [1, 2, 0]):
        apart = smd.sample(model, together.prompt_NP[n], together.pad_N[n], 3, 14, EOS, eviction, key_N[n])
        rows = [3 * prompt + sample for prompt in n for sample in range(3)]
        R = apart.response_BR.shape[1]
        assert torch.equal(apart.response_BR, together.response_BR[rows, :R]) and apart.length_B.max() == R
        assert torch.equal(apart.evicted_at_LBGT, together.evicted_at_LBGT[:, rows, :, : 30 + R])
        compare("log-probs", apart.logp_BR, together.logp_BR[rows, :R], 1e-12)
    other = smd.sample(model, *ragged_prompts(), 3, 14, EOS, eviction, key_N + 1)
    assert not torch.equal(other.response_BR[:, :2], together.response_BR[:, :2]), "control: another key"


@torch.no_grad()
def test_1_given_tokens_are_scored_as_drawn_ones():
    model = small_model()
    drawn = ragged_rollout(model)
    eviction = Eviction("snapkv", 8, interval=3, window=3, sinks=1)
    prompts = (drawn.prompt_NP, drawn.pad_N)
    given = smd.sample(model, *prompts, 3, drawn.response_BR.shape[1], EOS, eviction, forced_BR=drawn.response_BR)
    for field in dataclasses.fields(drawn):
        a, b = getattr(drawn, field.name), getattr(given, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name


def chi_square_p(counts: torch.Tensor, p: torch.Tensor) -> float:
    """Chance of frequencies at least as far from p, if they are drawn from p (Pearson's χ² test)."""
    expected = counts.sum() * p
    statistic = ((counts - expected).square() / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(p) - 1) / 2, dtype=torch.float64), statistic / 2).item()


@torch.no_grad()
def test_1_tokens_are_drawn_from_the_distribution_that_is_recorded():
    """At the level of 1 in 1,000: first tokens, and second ones behind the first token that was drawn most often."""
    model, prompts, S = small_model(layers=1), ragged_prompts((17,)), 20_000
    model.embed_tokens.weight.mul_(4.0)  # sharper distributions
    eviction = Eviction("snapkv", 8, interval=1, window=2)
    drawn = smd.sample(model, *prompts, S, 2, -1, eviction).response_BR
    every = torch.arange(20)
    first_counts = torch.bincount(drawn[:, 0], minlength=20)
    prefix = first_counts.argmax()
    second_counts = torch.bincount(drawn[drawn[:, 0] == prefix, 1], minlength=20)
    for n, (first, counts) in enumerate(((every, first_counts), (prefix.expand(20), second_counts))):
        forced_BR = torch.stack((first, every), dim=1)
        scored = smd.sample(model, *prompts, 20, 2, -1, eviction, forced_BR=forced_BR)
        p = scored.logp_BR[:, n].exp()
        assert abs(p.sum() - 1) < 1e-12
        assert chi_square_p(counts, p) > 1e-3
        hotter = p.pow(0.9) / p.pow(0.9).sum()
        assert chi_square_p(counts, hotter) < 1e-6, "control: another temperature would be noticed"


@torch.no_grad()
def test_1_the_full_pass_takes_the_backend_that_it_is_given(monkeypatch):
    taken, model, pad = [], small_model(), torch.zeros(1).long()
    monkeypatch.setattr(tiny_model, "shadow_attention", lambda q, *_, backend: taken.append(backend) or q)
    for backend in (None, "torch", "triton"):
        model(torch.zeros(1, 3).long(), pad, never_evicted(pad, 3).expand(2, -1, 2, -1), backend)
    assert taken == [None] * 2 + ["torch"] * 2 + ["triton"] * 2


# digests of tokens and record, made by the code that still kept a copy of the prompt for each sample (commit 37aa05f),
# its draws by `streams.uniform`
AS_BEFORE = dict(
    streaming=("dbad8b502c18", "7b622c6f80cc"),
    snapkv=("722e84338bd3", "1bafe303fb0f"),
    h2o=("95f18f4caaf8", "85eee5f8a646"),
    tova=("d9d0013053de", "8e803990151c"),
    knorm=("139e609516d4", "f871ea8b9812"),
    rkv=("90f742fa2dcb", "ad3d1ece1336"),
)


@pytest.mark.parametrize("at_once", [8, 1])
@pytest.mark.parametrize("policy", list(AS_BEFORE))
@torch.no_grad()
def test_1_tokens_and_record_are_those_of_a_cache_that_shares_nothing(policy, at_once, monkeypatch):
    monkeypatch.setattr(smd, "CHOOSING", at_once)
    long = dict(budget="40%", max_new=40, seed=1, lengths=(17, 13, 30, 12))
    for changes, want in zip(({}, long), AS_BEFORE[policy], strict=True):
        rollout = ragged_rollout(small_model(), policy, **changes)
        drawn = rollout.response_BR.numpy().tobytes() + rollout.evicted_at_LBGT.numpy().tobytes()
        assert hashlib.sha256(drawn).hexdigest()[:12] == want


@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_1_a_protected_prompt_is_kept_whole_beside_a_budget_of_the_response(policy, monkeypatch):
    monkeypatch.setitem(smd.EVICTIONS, "random", smd.EVICTIONS["random"]._replace(score=decided_by_number))
    model, prompts = small_model(), ragged_prompts((17, 13, 30, 12))
    # with 20 % of the prompts, 3 to 6 response keys
    for budget, most in ((5, torch.tensor([5, 5, 5, 5])), ("20%", torch.tensor([4, 3, 6, 3]))):
        eviction = Eviction(policy, budget, interval=3, window=3, sinks=2, pool=3, protect="prompt")
        rollout = smd.sample(model, *prompts, 3, 24, EOS, eviction)
        assert rollout.length_B.min() < rollout.length_B.max(), "no early end of sequence in this rollout"
        check_against_oracle(model, rollout, eviction, range(0, 12, 2))
        drawn = rollout.logp_BR[rollout.mask_BR]
        compare("shadow", replayed_logp(model, rollout, rollout.evicted_at_LBGT), drawn, 1e-10)
        assert (replayed_logp(model, rollout, rollout.never_evicted_LBGT) - drawn).abs().max() > 1e-3
        of_prompt, of_response = rollout.evicted_at_LBGT.tensor_split([30], dim=-1)
        assert (of_prompt % NEVER == 0).all(), "a prompt key died"
        key = torch.arange(of_response.shape[-1])
        query = 30 + key[:, None]
        alive = (30 + key <= query) & (query < of_response[..., None, :])
        alive &= query < (30 + rollout.length_B - 1)[:, None, None, None]  # a query, and not past the end
        assert (alive.sum(dim=-1) <= most.repeat_interleave(3)[:, None, None] + 3).all()
    # a prompt shorter than the sinks makes no sinks of the response
    few = Eviction(policy, 2, interval=1, window=2, sinks=4, protect="prompt")
    short = smd.sample(model, *ragged_prompts((2,)), 1, 12, -1, few).evicted_at_LBGT
    by_recency = smd.EVICTIONS[policy].sinks  # of these policies two keys are the two latest
    assert not by_recency or (short[..., 2:9] < NEVER).all(), "a response key stays for good"
    unprotected = dataclasses.replace(eviction, protect=None, budget=8)
    rollout = smd.sample(model, *prompts, 3, 24, EOS, unprotected)
    assert (rollout.evicted_at_LBGT[..., :30] % NEVER != 0).any(), "control"


@pytest.mark.parametrize("leak", ["own", "shared"])
@torch.no_grad()
def test_1_a_sample_that_sees_what_its_sibling_sees_is_noticed(leak, monkeypatch):
    """Controls of the shared store: a sibling's own keys, and shared keys that a sibling still has."""
    model, real, leaked = small_model(), smd.masked_attention, []

    def leaking(q, k, v, hidden, shared):
        P, first, second = shared[0].shape[2], slice(None, None, 3), slice(1, None, 3)
        k, v, hidden = k.clone(), v.clone(), hidden.clone()
        if leak == "own":
            k[first], v[first] = k[second], v[second]
        else:
            leaked.append((hidden[first, ..., :P] & ~hidden[second, ..., :P]).any())
            hidden[first, ..., :P] &= hidden[second, ..., :P]
        return real(q, k, v, hidden, shared)

    monkeypatch.setattr(smd, "masked_attention", leaking)
    rollout = ragged_rollout(model, max_new=24)
    error = (replayed_logp(model, rollout, rollout.evicted_at_LBGT) - rollout.logp_BR[rollout.mask_BR]).abs()
    by_sample = torch.zeros_like(rollout.logp_BR).masked_scatter(rollout.mask_BR, error).view(4, 3, -1)
    assert by_sample[:, 0].max() > 1e-3 and by_sample[:, 1:].max() < 1e-10
    assert leak == "own" or any(leaked), "no sample evicts what its sibling keeps"


def test_1_the_rollout_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ragged_rollout(small_model()).logp_BR = None


# Lemma 2: shadow_attention is its definition


def brute_force(q, k, v, evicted_at, q_start):
    B, H, Tq, D = q.shape
    G, Tk = k.shape[1:3]
    out = torch.zeros_like(q)
    for b in range(B):
        for h in range(H):
            g = h // (H // G)
            for i in range(Tq):
                at = q_start + i
                seen = [j for j in range(Tk) if j <= at < evicted_at[b, g, j]]
                if seen:
                    weight = torch.stack([q[b, h, i] @ k[b, g, j] / math.sqrt(D) for j in seen]).softmax(0)
                    out[b, h, i] = sum(w * v[b, g, j] for w, j in zip(weight, seen, strict=True))
    return out


def attention_case(Tq=5, Tk=9, q_start=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 4, Tq, 6, dtype=torch.float64, generator=g)
    k, v = torch.randn(2, 2, 2, Tk, 6, dtype=torch.float64, generator=g)
    evicted_at = torch.randint(0, Tk + 2, (2, 2, Tk), generator=g, dtype=torch.int32)
    evicted_at[:, :, 2] = NEVER
    evicted_at[:, :, 3] = 0  # seen by no one
    evicted_at[1, 1] = 0  # rows that see nothing
    return [t.requires_grad_() for t in (q, k, v)], evicted_at, q_start


def test_2_attention_equals_the_loop():
    assert shadow_attention(*(x[:0] for x in attention_case()[0]), attention_case()[1][:0], 4).shape == (0, 4, 5, 6)
    for Tq, Tk, q_start in ((5, 9, 4), (9, 9, 0), (1, 9, 8), (3, 4, 7), (0, 4, 4)):
        qkv, evicted_at, q_start = attention_case(Tq, Tk, q_start)
        got, want = shadow_attention(*qkv, evicted_at, q_start), brute_force(*qkv, evicted_at, q_start)
        assert torch.allclose(got, want, rtol=0, atol=1e-14)


def test_2_attention_has_the_right_gradients():
    qkv, evicted_at, q_start = attention_case()
    assert torch.autograd.gradcheck(lambda *x: shadow_attention(*x, evicted_at, q_start), qkv)
    q, k, v = qkv
    out = shadow_attention(q, k, v, evicted_at, q_start)
    dq, dk, dv = torch.autograd.grad(out.square().sum(), qkv)
    assert (dk[:, :, 3] == 0).all() and (dv[:, :, 3] == 0).all(), "a key that nobody sees has a gradient"
    assert (out[1, 2:] == 0).all() and (dq[1, 2:] == 0).all(), "a row that sees nothing is not zero"
    assert dk[0].abs().amax(-1)[:, 2].min() > 0, "control: a key that is seen has one"


def test_2_a_key_that_nobody_sees_changes_nothing():
    (q, k, v), evicted_at, q_start = attention_case()
    before = shadow_attention(q, k, v, evicted_at, q_start)
    for key, same in ((3, True), (2, False)):
        k2, v2 = k.detach().clone(), v.detach().clone()
        k2[:, :, key] += 100.0
        v2[:, :, key] -= 100.0
        assert torch.equal(shadow_attention(q, k2, v2, evicted_at, q_start), before) == same


def test_2_bad_input_is_named():
    (q, k, v), evicted_at, _ = attention_case()
    for args, message in (
        ((q, k, v[:, :, 1:], evicted_at), "shapes do not fit"),
        ((q, k, v, evicted_at[:, :1]), "shapes do not fit"),
        ((q, k[0, 0, 0], v, evicted_at), "shapes do not fit"),
        ((q, k, v, evicted_at, 0, None, (k[:0], v[:0])), "shapes do not fit"),
        ((q[:, :3], k, v, evicted_at), "multiple of kv heads"),
        ((q, k, v, evicted_at.long()), "int32"),
        ((q, k, v, evicted_at, 0, "cuda12"), "backend must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            shadow_attention(*args)


def with_shared(seed=0):
    """Two prompts with two sequences each, of which the second has a shared key less."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(4, 4, 3, 6, dtype=torch.float64, generator=g)
    k, v = torch.randn(2, 4, 2, 5, 6, dtype=torch.float64, generator=g)
    shared = torch.randn(2, 2, 2, 7, 6, dtype=torch.float64, generator=g)
    evicted_at = torch.randint(0, 14, (4, 2, 12), generator=g, dtype=torch.int32)
    evicted_at[::2, :, 4] = NEVER
    evicted_at[1::2, :, 4] = 0
    return [t.requires_grad_() for t in (q, k, v, *shared)], evicted_at


def repeating(q, k, v, evicted_at, q_start=0, backend=None, shared=None):
    """`shadow_attention` for which what is shared is repeated."""
    repeated = (x.repeat_interleave(len(q) // len(x), dim=0) for x in shared)
    k, v = (torch.cat(both, dim=2) for both in zip(repeated, (k, v), strict=True))
    return shadow_attention(q, k, v, evicted_at, q_start, backend)


def test_2_shared_keys_are_those_of_every_sequence_of_their_prompt():
    (q, k, v, *shared), evicted_at = with_shared()
    tensors = q, k, v, *shared

    def attend(attention):
        return lambda q, k, v, *shared: attention(q, k, v, evicted_at, 9, shared=shared)

    assert torch.autograd.gradcheck(attend(shadow_attention), tensors)
    pairs = [(out, *torch.autograd.grad(out.square().sum(), tensors)) for out in (
        attend(shadow_attention)(*tensors), attend(repeating)(*tensors)
    )]  # fmt: skip
    for name, got, want in zip(("out", "q", "k", "v", "shared k", "shared v"), *pairs, strict=True):
        compare(name, got, want, 1e-13)
    # what is shared and hidden from one sequence only does not reach that one
    louder = [x.detach().clone() for x in shared]
    louder[0][:, :, 4] += 10.0
    before, after = (attend(shadow_attention)(q, k, v, *x) for x in (shared, louder))
    assert torch.equal(before[1::2], after[1::2]) and (before - after)[::2].abs().amax(dim=(1, 2, 3)).min() > 0.1
    for wrong in ((shared[0], shared[1][:, :, 1:]), [x[..., :4] for x in shared], [x[:, :1] for x in shared],
                  [torch.cat((x, x[:1])) for x in shared], [x.float() for x in shared]):  # fmt: skip
        with pytest.raises(ValueError, match=r"shapes do not fit|one floating type"):
            shadow_attention(q, k, v, evicted_at, 9, shared=tuple(wrong))


@pytest.mark.parametrize("pad", [(0, 0, 0), (3, 0, 7)])
def test_2_the_prompts_own_attention_is_causal_and_blind_to_padding(pad):
    g, pad = torch.Generator().manual_seed(0), torch.tensor(pad)
    q = torch.randn(3, 4, 9, 6, dtype=torch.float64, generator=g).requires_grad_()
    k, v = (x.requires_grad_() for x in torch.randn(2, 3, 2, 9, 6, dtype=torch.float64, generator=g))
    real = torch.arange(9) >= pad[:, None]
    record = never_evicted(pad, 9).expand(-1, 2, -1)
    outs = [tiny_model.causal_attention(q, k, v, pad if pad.any() else None), shadow_attention(q, k, v, record)]
    assert outs[0].isfinite().all()
    outs = [out.transpose(1, 2)[real] for out in outs]
    compare("out", *outs, 1e-14)
    gradients = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in outs]
    for name, got, want in zip("qkv", *gradients, strict=True):
        compare(name, got, want, 1e-13)
    if pad.any():
        blind = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)[real]
        assert (blind - outs[1]).abs().max() > 1e-2, "control: padding would be noticed"


# Lemma 3: with a budget that holds everything, nothing is different


def loss_settings(**changes) -> Settings:
    return Settings(**dict(max_new=14, lam=0.1) | changes)


def learner(model, rollout, method, **changes):
    """Loss and gradient of a method, with an arbitrary but fixed advantage."""
    s = loss_settings(method=method, **changes)
    policy = smd.Policy(model, s)
    advantage = torch.linspace(-1, 1, len(rollout.response_BR)).to(rollout.logp_BR)
    batch = smd.prepare(policy, rollout, torch.zeros_like(advantage), s)
    batch = dataclasses.replace(batch, advantage_BR=advantage[:, None].expand_as(rollout.logp_BR))
    loss, figures = smd.learner_loss(policy, batch, s)
    return loss, gradient(loss, model), figures


@pytest.mark.parametrize("policy", POLICIES)
def test_3_a_budget_that_holds_everything_is_the_dense_model(policy):
    model = small_model()
    for budget, same in ((60, True), (8, False)):
        rollout = ragged_rollout(model, policy, budget=budget)
        mask, P = rollout.mask_BR, rollout.prompt_NP.shape[1]
        tokens = torch.cat((rollout.prompt_NP.repeat_interleave(3, 0), rollout.response_BR[:, :-1]), 1)
        with torch.no_grad():
            pad = rollout.pad_N.repeat_interleave(3)
            nothing_evicted = never_evicted(pad, tokens.shape[1]).expand(2, -1, 2, -1)
            logits = model.logits(model(tokens, pad, nothing_evicted)[:, P - 1 :][mask])
        dense = smd.of_tokens(logits.log_softmax(-1), rollout.response_BR[mask])
        assert torch.allclose(rollout.logp_BR[mask], dense, rtol=0, atol=1e-12) == same
        shadow, plain = learner(model, rollout, "smd", lam=0.0), learner(model, rollout, "dense")
        assert torch.allclose(shadow[1], plain[1], rtol=1e-10, atol=1e-12) == same
        if same:
            assert (rollout.evicted_at_LBGT[:, mask.any(1)] % NEVER == 0).all() and report.of_rollout(rollout)[
                "visible_share"
            ] == 1.0
            assert abs(shadow[0] - plain[0]) < 1e-12


def test_3_the_old_log_prob_of_smd_is_the_recorded_one():
    """Would catch a learner that calls its own log-prob the old one, whose ratio is 1 whatever the sampler did."""
    model = small_model()
    rollout = ragged_rollout(model)
    shifted = dataclasses.replace(rollout, logp_BR=rollout.logp_BR - 0.1)
    for method, same in (("smd", False), ("naive", True)):
        assert torch.allclose(learner(model, shifted, method)[1], learner(model, rollout, method)[1]) == same


# Lemma 6: a prompt computed once per group is a prompt repeated for each sample


def repeated(rollout):
    samples = len(rollout.response_BR) // len(rollout.prompt_NP)
    prompts = rollout.prompt_NP.repeat_interleave(samples, 0), rollout.pad_N.repeat_interleave(samples)
    return dataclasses.replace(rollout, prompt_NP=prompts[0], pad_N=prompts[1])


@pytest.mark.parametrize("method", list(smd.METHODS))
def test_6_shared_prompts_equal_repeated_prompts(method):
    model = small_model()
    rollout = ragged_rollout(model)
    (loss, gradient, _), (loss_r, gradient_r, _) = (learner(model, r, method) for r in (rollout, repeated(rollout)))
    assert abs(loss - loss_r) < 1e-12
    compare("gradient", gradient, gradient_r, 1e-11)
    reordered = dataclasses.replace(rollout, response_BR=rollout.response_BR.flip(0), length_B=rollout.length_B.flip(0))
    assert (learner(model, reordered, method)[1] - gradient).abs().max() > 1e-3, "control: whose sample it is matters"


@pytest.mark.parametrize("objective", smd.CHOICES["objective"])
@pytest.mark.parametrize("method", list(smd.METHODS))
def test_6_and_so_for_every_objective(method, objective, monkeypatch):
    """Would catch a gradient that is summed over the wrong samples, or that reaches only one of them."""
    model = small_model()
    rollout = ragged_rollout(model)
    s = loss_settings(method=method, objective=objective, kl_ref=0.1)
    policy = smd.Policy(model, s)
    if policy.critic is not None:
        torch.nn.init.normal_(policy.critic.weight)
    batch = smd.prepare(policy, rollout, torch.linspace(0, 1, 12).roll(5).to(rollout.logp_BR), s)
    found = []
    for attention in (shadow_attention, repeating):
        monkeypatch.setattr(smd, "shadow_attention", attention)
        loss, _ = smd.learner_loss(policy, batch, s)
        found.append((loss, gradient(loss, model)))
    assert abs(found[0][0] - found[1][0]) < 1e-12
    compare("gradient", found[0][1], found[1][1], 1e-11)
    assert found[0][1].abs().max() > 1e-3


# Lemma 7: track 2 sends its gradient through the dense logits alone


def test_7_track_2_sends_no_gradient_into_the_shadow_logits():
    model = small_model()
    frozen = small_model()
    rollout = ragged_rollout(model)
    track_2 = learner(model, rollout, "smd", lam=1.0)[1] - learner(model, rollout, "smd", lam=0.0)[1]

    def kl(target_model):
        shadow, dense = (
            m.logits(smd.replay(m, rollout, record)[0])
            for m, record in ((target_model, rollout.evicted_at_LBGT), (model, rollout.never_evicted_LBGT))
        )
        p, q = dense.softmax(-1), shadow.softmax(-1)
        return (p * (p / q).log()).sum() / len(p)

    # the target computed by a copy of the model: no path from it to the weights exists
    compare("track 2", track_2, gradient(kl(frozen), model), 1e-10)
    assert (track_2 - gradient(kl(model), model)).abs().max() > 1e-3, "control: with a path, the gradient is another"


def test_7_track_2_is_zero_where_nothing_is_evicted():
    model = small_model()
    for budget, zero in ((60, True), (8, False)):
        rollout = ragged_rollout(model, budget=budget)
        with_kl, without = learner(model, rollout, "smd", lam=1.0), learner(model, rollout, "smd", lam=0.0)
        assert (abs(with_kl[0] - without[0]) < 1e-12) == zero
        assert torch.allclose(with_kl[1], without[1], atol=1e-11) == zero


# Lemma 10: the Triton kernels are `shadow_attention`, too

GPU = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU under triton's interpreter

# under the interpreter of triton 3.7.1 the product of two bfloat16 matrices is wrong
DTYPES = kernel.DTYPES if GPU == "cuda" else (torch.float32, torch.float16)


def records(kind, B, G, T):
    """evicted_at (B, G, T); the second sequence is left-padded by a fifth."""
    generator = torch.Generator().manual_seed(0)
    if kind == "random":
        rows = torch.arange(T) + torch.randint(0, T + 1, (B * G, T), generator=generator)
    elif kind == "compressed":
        rows = torch.stack([kernels.compressed_once(T, 0.4, seed) for seed in range(B * G)])
    elif kind == "rolling":
        rows = torch.stack([kernels.rolling(T, 24, 8, seed) for seed in range(B * G)])
    else:
        rows = torch.zeros(B * G, T)
    rows = rows.view(B, G, T).to(torch.int32)
    rows[1:, :, : T // 5] = 0
    return rows


def plain_attention(q, k, v, evicted_at, q_start):
    """Nothing but PyTorch in the tensors' own precision: what the kernel's rounding is measured against."""
    repeat = q.shape[1] // k.shape[1]
    k, v, dies = (t.repeat_interleave(repeat, dim=1) for t in (k, v, evicted_at))
    i, j = q_start + torch.arange(q.shape[2], device=q.device)[:, None], torch.arange(k.shape[2], device=q.device)
    hidden = (j > i) | (i >= dies[:, :, None])
    score = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(hidden, -math.inf)
    return score.softmax(dim=-1).masked_fill(hidden, 0) @ v


def largest_products(q, k, v, evicted_at, q_start, do):
    """The largest product of two numbers that is rounded on the way to each of out, dq, dk, dv."""
    repeat, one = q.shape[1] // k.shape[1], torch.eye(k.shape[2], dtype=q.dtype, device=q.device)
    p = plain_attention(q, k, one.expand(*k.shape[:2], -1, -1), evicted_at, q_start).nan_to_num(0.0)
    # ds = p (dp - δ) is a difference, and may be much smaller than what it is the difference of
    ds = p * (do @ v.repeat_interleave(repeat, dim=1).transpose(-1, -2)) * q.shape[-1] ** -0.5
    return [(a.abs().max() * b.abs().max()).item() for a, b in ((p, v), (ds, k), (ds, q), (p, do))]


CASES = [  # T, D, G, H/G, q_start, record
    (1, 16, 1, 1, 0, "random"),
    (17, 32, 2, 2, 0, "random"),
    (63, 48, 1, 4, 0, "compressed"),
    (63, 16, 2, 1, 40, "nothing"),
    (100, 64, 1, 2, 0, "rolling"),
    (100, 32, 2, 1, 87, "compressed"),
    (129, 64, 1, 4, 0, "compressed"),
    (129, 48, 2, 2, 5, "rolling"),
    (129, 16, 1, 1, 0, "random"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_10_the_kernels_err_no_more_than_plain_code(case, dtype):
    T, D, G, M, q_start, kind = case
    generator = torch.Generator().manual_seed(0)
    shapes = (2, G * M, T - q_start, D), (2, G, T, D), (2, G, T, D), (2, G * M, T - q_start, D)
    *qkv, do = (torch.randn(shape, generator=generator).to(dtype).to(GPU) for shape in shapes)
    record = records(kind, 2, G, T).to(GPU)

    def run(attention, *tensors):
        *qkv, do = (t.detach().requires_grad_() for t in tensors)
        out = attention(*qkv, record, q_start)
        return [t.detach().double() for t in (out, *torch.autograd.grad(out, qkv, do.detach()))]

    exact = [t.double() for t in (*qkv, do)]
    want = run(plain_attention, *exact)
    want = [t.nan_to_num(0.0) for t in want]  # rows that see nothing: 0 / 0 in plain code
    plain = [t.nan_to_num(0.0) for t in run(plain_attention, *qkv, do)]
    got = run(partial(shadow_attention, backend="triton"), *qkv, do)
    products = largest_products(*exact[:3], record, q_start, exact[3])
    for name, g, p, w, product in zip(("out", "dq", "dk", "dv"), got, plain, want, products, strict=True):
        error, bound = (g - w).abs().max().item(), 2 * (p - w).abs().max().item() + 4 * torch.finfo(dtype).eps * product
        rms = ((g - w).square().mean() / w.square().mean().clamp(min=1e-30)).sqrt().item()
        assert error <= bound, f"{name}: max error {error:.2e} above {bound:.2e}, RMS ratio {rms:.2e}"
    if kind == "nothing":
        assert all((g == 0).all() for g in got), "rows that see nothing, and keys that nobody sees, give exact zeros"


def triton_case(T=70, dtype=torch.float32):
    (q, k, v), record = torch.randn(3, 2, 4, T, 32, dtype=dtype, device=GPU), records("random", 2, 2, T).to(GPU)
    return [t.requires_grad_() for t in (q, k[:, :2].detach(), v[:, :2].detach())], record


def test_10_a_key_that_nobody_sees_changes_nothing_and_two_runs_are_equal_to_the_bit():
    (q, k, v), record = triton_case()
    record[:, :, 7] = 0

    def run(k, v):
        out = shadow_attention(q, k, v, record, backend="triton")
        return out, *torch.autograd.grad(out.square().sum(), (q, k, v))

    before = run(k, v)
    assert (before[2][:, :, 7] == 0).all() and (before[3][:, :, 7] == 0).all(), "its gradient is not zero"
    assert all(torch.equal(a, b) for a, b in zip(before, run(k, v), strict=True)), "not deterministic"
    for key, same in ((7, True), (8, False)):
        other = [t.detach().index_fill(2, torch.tensor([key], device=GPU), 50.0).requires_grad_() for t in (k, v)]
        assert torch.equal(run(*other)[0], before[0]) == same


def test_10_the_check_of_the_kernels_passes_and_can_fail(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(kernel.itertools, "product", lambda *_: [(torch.float32, 64, 0), (torch.float16, 64, 87)])
        errors = kernel.check(GPU)
        assert len(errors) == 2 and all(error < kernel.LIMIT for error in errors.values())
        assert capsys.readouterr().out.count("ok") == 2
        real = kernel.attention_torch
        patch.setitem(kernel.BACKENDS, "torch", lambda *args: 1.1 * real(*args))
        assert all(error > kernel.LIMIT for error in kernel.check(GPU).values())
        assert capsys.readouterr().out.count("WRONG") == 2


def test_10_strided_and_empty_inputs():
    (q, k, v), record = triton_case()
    want = shadow_attention(q, k, v, record, backend="triton")
    wide = [torch.stack((t, -t), dim=-1).transpose(1, 2).contiguous().transpose(1, 2)[..., 0] for t in (q, k, v)]
    assert not wide[0].is_contiguous()
    got = shadow_attention(*wide, record.transpose(1, 2).contiguous().transpose(1, 2), backend="triton")
    assert torch.equal(got, want)
    (got.transpose(1, 2) * torch.arange(4.0, device=GPU)[:, None]).sum().backward()  # a gradient with strides
    mine = [t.grad.clone() for t in (q, k, v)]
    for t in (q, k, v):
        t.grad = None
    (
        shadow_attention(q, k, v, record, backend="torch").transpose(1, 2) * torch.arange(4.0, device=GPU)[:, None]
    ).sum().backward()
    for a, t in zip(mine, (q, k, v), strict=True):
        assert torch.allclose(a, t.grad, atol=1e-5)
    for B, Tq, Tk in ((0, 5, 5), (2, 0, 5), (2, 3, 0)):
        q, k, v = (torch.randn(B, 2, T, 16, device=GPU, requires_grad=True) for T in (Tq, Tk, Tk))
        out = shadow_attention(q, k, v, torch.zeros(B, 2, Tk, dtype=torch.int32, device=GPU), backend="triton")
        out.sum().backward()
        assert out.shape == q.shape and all((t.grad == 0).all() for t in (q, k, v))


def test_10_shared_keys_are_repeated_for_the_kernels():
    (q, k, v), _ = triton_case()
    shared, record = (k[:1, :, :40], v[:1, :, :40]), torch.full((2, 2, 110), NEVER, dtype=torch.int32, device=GPU)
    record[1, :, :30] = 60
    got, want = (shadow_attention(q, k, v, record, 40, backend, shared) for backend in ("triton", "torch"))
    compare("out", got, want, 1e-5)


def test_10_bad_input_is_named():
    (q, k, v), record = triton_case()
    for args, message in (
        ((q[0], k, v, record), "shapes do not fit"),
        ((q, k[..., :16], v[..., :16], record), "shapes do not fit"),
        ((q.double(), k.double(), v.double(), record), "takes float32, bfloat16, float16, got torch.float64"),
        ((q, k.half(), v, record), "one floating type"),
        ((q.long(), k.long(), v.long(), record), "one floating type"),
        ((q, k, v, record.long()), "int32, got torch.int64"),
        ((q, k, v, record.to("meta")), "on one device"),
        ((q, k, v, record, -1), "q_start must be at least 0"),
        (([t.repeat(1, 1, 1, 5) for t in (q, k, v)], record), "head dims up to 128, got 160"),
    ):
        args = (*args[0], *args[1:]) if isinstance(args[0], list) else args
        with pytest.raises(ValueError, match=message):
            shadow_attention(*args, backend="triton")
    assert [kernel.backend_for(device, None) for device in ("cpu", "cuda")] == ["torch", "triton"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "triton", None)
        assert kernel.backend_for("cuda", None) == "torch"
    # without the interpreter, and without triton, the reason is said; nothing falls back
    for code, message in (
        ("", "needs CUDA tensors, got cpu; for the interpreter set TRITON_INTERPRET=1"),
        ("import sys; sys.modules['triton'] = None", "needs the package triton"),
    ):
        code += "\nimport torch, kernel; x = torch.ones(1, 1, 2, 16); e = torch.ones(1, 1, 2, dtype=torch.int32)\n"
        code += "kernel.shadow_attention(x, x, x, e); kernel.shadow_attention(x, x, x, e, backend='triton')"
        env = os.environ | {"TRITON_INTERPRET": "0"}
        run = subprocess.run(
            [sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert run.returncode and message in run.stderr.splitlines()[-1]


# Lemma 13: the learner trains through the kernels


@pytest.mark.parametrize("method", ["dense", "naive", "smd"])
def test_13_the_learner_through_the_kernels_is_the_learner(method):
    model = small_model(torch.float32)
    rollout = ragged_rollout(model, budget=None if method == "dense" else 8, samples=2, max_new=8)
    tensors = {name: x.to(GPU) for name, x in vars(rollout).items() if isinstance(x, torch.Tensor)}
    model, rollout = model.to(GPU), dataclasses.replace(rollout, **tensors)
    loss, want, _ = learner(model, rollout, method, backend="torch", kl_ref=0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(kernel.BACKENDS, "torch", lambda *_: pytest.fail("a part of the learner took another backend"))
        through, got, figures = learner(model, rollout, method, backend="triton", kl_ref=0.1)
    assert math.isclose(loss.item(), through.item(), rel_tol=1e-4)
    assert (got - want).norm() <= 1e-4 * want.norm()
    assert figures.get("replay_error", 0.0) < 1e-5


# Lemmas 14 to 22: which gradient each correction and each objective follows. A model so small that all of its
# responses can be enumerated: 4 tokens, a prompt of 12, 3 response tokens, so 64 responses, and every expectation is a
# sum. In 15 to 17 the estimator is one response, its advantage the reward less a constant, before the first update.


def test_14_the_probabilities_of_all_responses_sum_to_1_and_they_evict_differently(world):
    assert abs(world.p.sum() - 1) < 1e-14
    records = world.rollout.evicted_at_LBGT.transpose(0, 1).flatten(1)
    assert len(records.unique(dim=0)) > 1
    dense = world.score(None).logp_BR
    assert (dense - world.rollout.logp_BR).abs().max() > 0.1, "sparse and dense differ"


def test_15_smd_follows_the_gradient_of_the_sparse_policy(world):
    got = world.expected("smd", world.p * (world.reward - 0.3))
    assert distance(got, world.objective_gradient(dense=False)) < 1e-12


def test_15_and_so_says_the_sampler_alone(world):
    """Central differences of J_sparse, without the learner. What is evicted does not change over the step: this is the
    gradient of the piece, and there is none for the choice of what to keep."""
    gradient, weights = world.objective_gradient(dense=False), list(world.model.parameters())
    before = torch.nn.utils.parameters_to_vector(weights).detach()
    for seed in range(3):
        direction = torch.randn(len(before), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        direction /= direction.norm()
        ends = []
        for step in (1e-5, -1e-5):
            torch.nn.utils.vector_to_parameters(before + step * direction, weights)
            rollout = world.score()
            assert torch.equal(rollout.evicted_at_LBGT, world.rollout.evicted_at_LBGT), "the piece ends here"
            ends.append((rollout.logp_BR.sum(dim=1).exp() * world.reward).sum().item())
        torch.nn.utils.vector_to_parameters(before, weights)
        assert abs((ends[0] - ends[1]) / 2e-5 - gradient @ direction) < 1e-6 * gradient.norm()


def test_16_naive_follows_neither_gradient(world):
    got = world.expected("naive", world.p * (world.reward - 0.3))
    assert distance(got, world.objective_gradient(dense=False)) > 0.2
    assert distance(got, world.objective_gradient(dense=True)) > 0.2


def test_17_only_the_untruncated_sequence_weight_follows_the_dense_gradient(world):
    sparse, dense = world.objective_gradient(dense=False), world.objective_gradient(dense=True)
    coefficient = world.p * (world.reward - 0.3)
    assert distance(world.expected("seq_is", coefficient), dense) < 1e-12
    dense_world = World()
    dense_world.rollout = dense_world.score(None)  # sampled with a full cache
    dense_world.p = dense_world.rollout.logp_BR.sum(dim=1).exp()
    assert distance(dense_world.expected("dense", dense_world.p * (world.reward - 0.3)), dense) < 1e-12
    log_ratio = world.logp(dense=True).detach() - world.rollout.logp_BR
    everywhere = torch.ones_like(log_ratio, dtype=torch.bool)
    weights = {"tis": smd.token_is(log_ratio, everywhere, 2.0), "seq_is": smd.sequence_is(log_ratio, everywhere, 2.0)}
    weights["sparse_rl"] = smd.sparse_rl(log_ratio, everywhere, 1.5)
    weights["sparse_rl"] /= world.p @ weights["sparse_rl"].mean(dim=1)  # the exact mean weight, not a batch's
    for method, weight in weights.items():
        got = world.expected(method, coefficient, weight)
        assert distance(got, sparse) > 0.05 and distance(got, dense) > 0.05, method


def test_17_the_weights_by_hand():
    log_ratio, half = torch.tensor([[4.0, 0.5], [0.25, 1.0]]).log(), torch.tensor([[True, True], [True, False]])
    assert torch.allclose(smd.token_is(log_ratio, half, 2.0), torch.tensor([[2.0, 0.5], [0.25, 1.0]]))
    assert torch.allclose(smd.sequence_is(log_ratio, half, math.inf), torch.tensor([[2.0, 2.0], [0.25, 0.25]]))
    assert torch.allclose(smd.sequence_is(log_ratio, half, 1.5), torch.tensor([[1.5, 1.5], [0.25, 0.25]]))
    # (1.5 + 0.5 + 0.25) / 3 = 0.75
    assert torch.allclose(smd.sparse_rl(log_ratio, half, 1.5)[half], torch.tensor([1.5, 0.5, 0.25]) / 0.75)
    vetoed = torch.tensor([[4.0, 9e-5], [0.25, 1.0]]).log()
    assert torch.allclose(smd.sparse_rl(vetoed, half, 1.5)[half], torch.tensor([0.0, 0.0, 3.0]))
    just_not = torch.tensor([[4.0, 1.1e-4], [0.25, 1.0]]).log()
    assert torch.allclose(smd.sparse_rl(just_not, half, 1.5)[half], torch.tensor([1.5, 1.1e-4, 0.25]) * 3 / 1.75011)
    caps = {name: method.cap for name, method in smd.METHODS.items() if method.weight is not None}
    assert caps == {"tis": 2.0, "seq_is": 1e15, "sparse_rl": 1.5} and (smd.CLIP, smd.DPO_BETA) == (0.2, 0.1)
    assert (smd.GAE_LAMBDA, smd.VALUE_COEF, smd.LR_WARMUP) == (0.95, 0.5, 20)


def test_18_the_baseline_of_a_group_halves_the_gradient_and_its_deviation_turns_it(world):
    """All groups of two: the bias is GRPO's own, which SMD neither adds to nor repairs."""
    first, second = (t.flatten() for t in torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij"))
    groups, gradient = world.reward[torch.stack((first, second), dim=1)], world.objective_gradient(dense=False)
    found = {}
    for norm_std in (False, True):
        advantage = smd.group_advantage(groups, norm_std)
        # the loss is the mean over the two, and each group has probability p p'
        weighted = advantage * (world.p[first] * world.p[second] / 2)[:, None]
        coefficient = torch.zeros(64, dtype=torch.float64)
        coefficient.index_add_(0, first, weighted[:, 0]).index_add_(0, second, weighted[:, 1])
        found[norm_std] = world.expected("smd", coefficient)
    assert distance(found[False], gradient / 2) < 1e-12
    assert F.cosine_similarity(found[True], gradient, dim=0) < 0.999


def test_19_the_spread_of_sequence_weights_never_falls_as_responses_grow():
    world = World(length=5)
    with torch.no_grad():
        log_ratio = (world.logp(dense=True) - world.rollout.logp_BR).cumsum(dim=1)
    second_moment = world.p @ (2 * log_ratio).exp()  # of the weight of the first 1 to 5 tokens
    assert second_moment[0] >= 1 and (second_moment.diff() >= -1e-12).all()
    assert second_moment[-1] > 1.1 * second_moment[0], "control: here it grows"
    assert (world.p @ log_ratio.exp() - 1).abs().max() < 1e-12, "and the mean weight is 1 at any length"


def test_20_track_2_is_the_gradient_of_the_enumerated_kl(world):
    """Against a sum over the vocabulary by hand; the sparse distribution comes from the sampler."""
    P, tokens = world.prompt.shape[1], torch.cat((world.prompt.expand(64, -1), world.responses[:, :-1]), dim=1)
    no_padding = torch.zeros(64, dtype=torch.long)
    never = never_evicted(no_padding, tokens.shape[1]).expand(2, -1, 1, -1)
    dense = world.model.logits(world.model(tokens, no_padding, never)[:, P - 1 :]).log_softmax(dim=-1)
    # log π_sparse(v | prefix) is what the sampler recorded for the response that goes on with v
    sparse = torch.empty_like(dense)
    index = {tuple(y): n for n, y in enumerate(world.responses.tolist())}
    for y, n in index.items():
        for t in range(3):
            for v in range(4):
                sparse[n, t, v] = world.rollout.logp_BR[index[(*y[:t], v, *y[t + 1 :])], t]
    with_track, without = (learner(world.model, world.rollout, "smd", lam=lam) for lam in (1.0, 0.0))
    want = (dense.exp() * (dense - sparse)).sum(dim=-1).mean()
    compare("track 2", with_track[1] - without[1], gradient(want, world.model), 1e-10)
    # and the other direction is the other divergence
    dense = world.model.logits(world.model(tokens, no_padding, never)[:, P - 1 :]).log_softmax(dim=-1)
    got = smd.kl_divergence(sparse.flatten(0, 1), dense.flatten(0, 1)).mean()
    compare("KL(sparse ‖ dense)", got, (sparse.exp() * (sparse - dense)).sum(dim=-1).mean(), 1e-12)
    assert abs(got - want) > 1e-4, "control: the two directions differ"


def test_22_the_ratio_of_smd_is_to_the_recorded_log_prob(world):
    s = loss_settings(method="smd")
    old = smd.prepare(smd.Policy(world.model, s), world.rollout, world.reward, s).old_logp_BR
    assert torch.equal(old, world.rollout.logp_BR)
    for dense, one in ((False, True), (True, False)):
        ratio = (world.logp(dense) - old).exp()
        assert torch.allclose(ratio, torch.ones_like(ratio), rtol=0, atol=1e-12) == one


def test_22_the_surrogate_by_hand():
    """Good tokens gain nothing above 1 + ε, bad ones nothing below 1 - ε; the other way round nothing is clipped."""
    ratio, advantage = torch.tensor([[1.5, 0.5], [1.5, 0.5]]), torch.tensor([[2.0, 2.0], [-2.0, -2.0]])
    weight, everywhere = torch.tensor([[1.0, 3.0], [1.0, 1.0]]), torch.ones(2, 2, dtype=torch.bool)
    loss, clipped = smd.policy_loss(ratio.log(), torch.zeros(2, 2), advantage, weight, everywhere, 0.2, longest=5)
    # min(3, 2.4) + 3 min(1, 1.6) + min(-3, -2.4) + min(-1, -1.6) = 2.4 + 3 - 3 - 1.6
    assert math.isclose(loss.item(), -0.8 / (2 * 5), rel_tol=1e-6) and clipped == 0.5


def test_22_group_advantage_by_hand():
    reward = torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    # the population's standard deviation of the first group is 1/2; a group without spread teaches nothing
    want = torch.tensor([[1.0, -1.0, -1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    assert torch.allclose(smd.group_advantage(reward), want, atol=1e-5)
    assert torch.equal(smd.group_advantage(reward, norm_std=False), want / 2)


def test_22_the_diagnostics_by_hand(world):
    assert math.isclose(smd.effective_share(torch.tensor([1.0, 3.0]).log()), 16 / 10 / 2, rel_tol=1e-6)
    assert smd.effective_share(torch.tensor([1000.0, -1000.0, 1000.0, 0.0])) == 0.5
    found = smd.diagnose(world.model, world.rollout, None)
    with torch.no_grad():
        shadow, dense = (
            world.logits(record).softmax(dim=-1)
            for record in (world.rollout.evicted_at_LBGT, world.rollout.never_evicted_LBGT)
        )
        weight = (world.logp(dense=True) - world.rollout.logp_BR).exp()
    want = dict(
        kl_sparse_dense=(shadow * (shadow / dense).log()).sum(dim=-1).mean(),
        overlap_p05=torch.minimum(shadow, dense).sum(dim=-1).quantile(0.05),
        ess_token=weight.sum() ** 2 / weight.square().sum() / weight.numel(),
        ess_sequence=weight.prod(dim=1).sum() ** 2 / weight.prod(dim=1).square().sum() / 64,
        max_weight_token=weight.max(),
        max_weight_sequence=weight.prod(dim=1).max(),
    )
    for name, value in want.items():
        assert math.isclose(found[name], value.item(), rel_tol=1e-9), name


def reward_of_12():
    """A rollout of 4 prompts x 3 samples, and rewards for it."""
    return ragged_rollout(small_model()), torch.arange(12.0, dtype=torch.float64) % 5


def test_22_the_weights_of_track_2_and_of_the_reference(monkeypatch):
    rollout, reward_B = reward_of_12()
    s = loss_settings(kl_ref=0.5, lam=0.0)
    policy = smd.Policy(small_model(), s)
    with torch.no_grad():
        for p in policy.reference.parameters():
            p.mul_(0.9)
    batch = smd.prepare(policy, rollout, reward_B, s)
    (hidden_XC,) = smd.replay(policy.reference, rollout, rollout.evicted_at_LBGT)
    ref_X = policy.reference.logits(hidden_XC).log_softmax(-1).gather(-1, rollout.response_BR[rollout.mask_BR][:, None])
    compare("reference", batch.ref_logp_BR[rollout.mask_BR], ref_X[:, 0], 1e-12)
    losses = {
        key: smd.learner_loss(policy, batch, dataclasses.replace(s, kl_ref=key[0], lam=key[1]))[0].item()
        for key in ((0.0, 0.0), (0.5, 0.0), (0.0, 0.2), (0.0, 0.6))
    }
    log_r = ref_X[:, 0] - rollout.logp_BR[rollout.mask_BR]
    penalty = (log_r.exp() - 1 - log_r).mean().item()
    assert math.isclose(losses[0.5, 0.0] - losses[0.0, 0.0], 0.5 * penalty, rel_tol=1e-6)
    track_2 = losses[0.0, 0.2] - losses[0.0, 0.0]
    assert track_2 > 1e-3 and math.isclose(losses[0.0, 0.6] - losses[0.0, 0.0], 3 * track_2, rel_tol=1e-6)
    # without it, no second pass is paid for
    records, replay = [], smd.replay
    monkeypatch.setattr(
        smd, "replay", lambda *args, **options: records.append(len(args) - 2) or replay(*args, **options)
    )
    for lam in (0.0, 0.2):
        smd.learner_loss(policy, batch, dataclasses.replace(s, lam=lam))
    assert records == [1, 2]


def test_22_the_replay_error_is_the_largest_difference():
    rollout, _ = reward_of_12()
    shifted = rollout.logp_BR.clone()
    shifted[3, 1] -= 0.25
    rollout = dataclasses.replace(rollout, logp_BR=shifted)
    for found in (learner(small_model(), rollout, "smd")[2], smd.diagnose(small_model(), rollout, None)):
        assert math.isclose(found["replay_error"], 0.25, rel_tol=1e-9)


def test_22_weights_that_float32_cannot_hold_do_not_end_the_run():
    model = small_model(torch.float32)
    rollout = ragged_rollout(model)
    for shift in (-30.0, 30.0):  # a token: the weight of a sequence is e^(30 · length), or its inverse
        shifted = dataclasses.replace(rollout, logp_BR=rollout.logp_BR + shift * rollout.mask_BR)
        for method in ("tis", "seq_is", "sparse_rl"):
            loss, slope, _ = learner(model, shifted, method)
            assert loss.isfinite() and slope.norm().isfinite(), method
        assert all(math.isfinite(value) for value in smd.diagnose(model, shifted, None).values())


def test_22_shapes_that_would_be_broadcast_are_named():
    matrix, row, mask = torch.zeros(3, 3), torch.zeros(3), torch.ones(3, 3, dtype=torch.bool)
    for n in range(5):
        args = [matrix, matrix, matrix, matrix, mask]
        args[n] = args[n][:, :1]
        with pytest.raises(ValueError, match=r"shapes differ: .* \(3, 1\)"):
            smd.policy_loss(*args, 0.2, 3)
    for function, args in (
        (smd.value_loss, (matrix, matrix, row, mask, 0.2)),
        (smd.value_loss, (matrix, row, matrix, mask, 0.2)),
        (smd.kl_divergence, (matrix, row)),
        (smd.k3, (matrix, row, mask)),
        (smd.k3, (row, matrix, mask)),
        (smd.k3, (matrix, matrix, mask[0])),
        (smd.value_loss, (row, matrix, matrix, mask, 0.2)),
        (smd.value_loss, (matrix, matrix, matrix, mask[0], 0.2)),
        (smd.kl_divergence, (row, matrix)),
        (smd.dpo_loss, (torch.zeros(1), row, torch.zeros(1, 3), 0.1)),
        (smd.dpo_loss, (row, row, torch.zeros(1, 1), 0.1)),
        (smd.token_is, (matrix, mask[0], 2.0)),
        (smd.sequence_is, (matrix, mask[0], 2.0)),
        (smd.sparse_rl, (matrix, mask[0], 2.0)),
        (smd.gae, (row, matrix, mask[0], 0.9)),
        (smd.gae, (torch.zeros(1), matrix, mask, 0.9)),
        (smd.dpo_loss, (row, torch.zeros(1), torch.zeros(1, 3), 0.1)),
    ):
        with pytest.raises(ValueError, match="shapes differ"):
            function(*args)
    with pytest.raises(ValueError, match=r"rewards must be \(N, S\), a row for each prompt, got \(3,\)"):
        smd.group_advantage(row)


def test_22_the_entropy_by_enumeration(world):
    p = world.logits(world.rollout.evicted_at_LBGT).softmax(-1)
    row = learner(world.model, world.rollout, "smd")[2]
    assert math.isclose(row["entropy"], -(p * p.log()).sum(-1).mean().item(), rel_tol=1e-9)


# Lemma 26: what a GPU would refuse, or wait for, a CPU finds out


class Waits(TorchDispatchMode):
    """Counts what waits on CUDA until the device is done: a number that Python reads, a shape that values decide."""

    READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "repeat_interleave")

    def __init__(self, monkeypatch):
        super().__init__()
        self.count = 0
        real = torch.Tensor.tolist  # of a tensor on the CPU it calls nothing that could be counted

        def tolist(tensor):
            self.count += 1
            return real(tensor)

        monkeypatch.setattr(torch.Tensor, "tolist", tolist)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(x is not None and x.dtype == torch.bool for x in args[1])
        self.count += name in self.READS or by_mask
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", POLICIES)
def test_26_a_rollout_waits_for_the_device_once_in_several_tokens(policy, monkeypatch):
    """Would catch a look at the device in every token, or in every layer whose entries are chosen."""
    monkeypatch.setitem(smd.ASK, "cpu", 4)

    def waits(layers: int, max_new: int) -> int:
        model = small_model(layers=layers)
        eviction = Eviction(policy, 8, interval=8, window=3, sinks=1)
        never_drawn = model.config.vocab
        with monkeypatch.context() as patch, Waits(patch) as mode:
            rollout = smd.sample(model, *ragged_prompts(), 3, max_new, never_drawn, eviction)
        assert rollout.response_BR.shape == (12, max_new)
        return mode.count

    few, many = waits(2, 16), waits(2, 48)
    assert waits(4, 48) == many, "more layers wait more often"
    # of 32 tokens, every fourth asks whether all have ended, and every eighth how many entries are left
    assert many - few == 32 // 4 + 32 // 8
    assert few < 20


def test_26_asking_seldom_changes_nothing(monkeypatch):
    model = small_model()
    for seed in range(4):
        by_token, seldom = [], []
        for every, found in ((1, by_token), (5, seldom)):
            monkeypatch.setitem(smd.ASK, "cpu", every)
            rollout = ragged_rollout(model, seed=seed, max_new=40, samples=1, lengths=(17, 9))
            found += [x for name, x in vars(rollout).items() if name != "kv_bytes"]
        same = [
            torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(by_token, seldom, strict=True)
        ]
        assert all(same)
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        ragged_rollout(model, max_new=40)


def test_26_sums_are_wide_under_autocast_too(monkeypatch):
    """Would catch products of float32 that autocast rounds to bfloat16, which it does not do to those of float64."""
    monkeypatch.setitem(kernel.SUMS, "cpu", torch.float32)
    q, k, v = torch.randn(3, 2, 4, 9, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    shown = torch.zeros(2, 4, 9, 9, dtype=torch.bool)
    want = kernel.masked_attention(q.double(), k.double(), v.double(), shown)
    with torch.autocast("cpu", torch.bfloat16):
        got = kernel.masked_attention(q, k, v, shown)
    for name, a, b in zip(("out", "weights"), got, want, strict=True):
        compare(name, a.double(), b, 1e-5)


def test_26_sums_are_of_the_type_that_the_device_is_fast_in(monkeypatch):
    """On CUDA float32, which leaves a replay error of rounding; float64 on a CPU leaves none."""
    errors = {}
    for sums in (torch.float64, torch.float32):
        monkeypatch.setitem(kernel.SUMS, "cpu", sums)
        rollout = ragged_rollout(small_model(torch.float32), samples=8)
        replayed = replayed_logp(small_model(torch.float32), rollout, rollout.evicted_at_LBGT)
        errors[sums] = (replayed - rollout.logp_BR[rollout.mask_BR]).abs().max().item()
    assert errors[torch.float64] <= errors[torch.float32] < 1e-5
    assert errors[torch.float32] > 0
    double = torch.zeros(1, 1, 1, 4, dtype=torch.float64)
    assert kernel.masked_attention(double, double, double, torch.zeros(1, 1, 1, 1) > 0)[0].dtype == torch.float64


def test_26_the_model_computes_in_bfloat16_where_there_are_units_for_it():
    for name, dtype in (("cuda", "bfloat16"), ("cpu", "float32")):
        assert smd.checked(Settings(device=name)).dtype == dtype
    assert smd.checked(Settings(device="cuda", dtype="float32")).dtype == "float32"
