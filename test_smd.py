"""A proof, in numbered lemmas, that the learner sees what the sampler saw, and that this trains.

    python -m pytest

Each lemma has its oracle in this file, written apart from the code under test, and where one exists a negative control
that must fail. The tolerances: float64 replays are compared at 1e-10 and float32 ones at 1e-5, the rounding of some
hundred operations on numbers of order one; the errors that the lemmas exclude are a hundred times larger or more.
"""

import dataclasses
import gc
import itertools
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as smd.py does, and why is said there

import torch
import torch.nn.functional as F
from tqdm import tqdm

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads it when it is imported

import kernel
import smd
from experiments import kernels
from experiments.enumerated import World, distance, gradient
from harness import cli, report, runs, tasks, text
from kernel import NEVER, shadow_attention
from smd import Eviction, Settings
from tiny_model import ModelConfig, TinyModel, never_evicted

EOS = 19
HERE = Path(__file__).parent
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
    generator = torch.Generator().manual_seed(seed)
    return smd.sample(model, *ragged_prompts(lengths), samples, max_new, EOS, eviction, generator)


def replayed_logp(model, rollout, evicted_at) -> torch.Tensor:
    return rollout.logp(model.logits(smd.replay(model, rollout, evicted_at)[0]))[rollout.mask_BR]


def compare(name: str, got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    error, scale = (got - want).abs().max().item(), want.square().mean().sqrt().item()
    rms = (got - want).square().mean().sqrt().item() / max(scale, 1e-300)
    assert error <= tolerance, f"{name}: max error {error:.1e} > {tolerance:.0e}, RMS ratio {rms:.1e}"


# Lemma 0: the model is of the family it claims


@pytest.mark.parametrize("family, bias", [("Llama", False), ("Qwen2", True)])
@torch.no_grad()
def test_0_weights_of_the_family_load_by_name_and_give_the_same_logits(family, bias):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, family + "Config")(
        vocab_size=20, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-5, tie_word_embeddings=False,
    )  # fmt: skip
    theirs = getattr(transformers, family + "ForCausalLM")(config).double().eval()
    ours = small_model(qkv_bias=bias, tied=False)
    ours.load_state_dict({name.removeprefix("model."): w for name, w in theirs.state_dict().items()})
    tokens, pad = torch.randint(20, (3, 17)), torch.zeros(3, dtype=torch.long)
    hidden = ours(tokens, pad, never_evicted(pad, 17).expand(2, -1, 2, -1))
    compare("logits", ours.logits(hidden), theirs(tokens).logits, 1e-6)  # their rotary angles are in float32


# Lemma 1: replay equals the sampler


def oracle_logp(model, prompt: list[int], response: list[int], evicted_at_LGT, pad: int) -> list[float]:
    """Log-probs of a response, one token and one kv head at a time, from an explicit list of the keys still held.

    Its own RMSNorm, rotary embedding, attention and SwiGLU: it shares nothing with the code under test but weights.
    """
    c, w = model.config, model.state_dict()
    half = c.head_dim // 2
    held = {(layer, g): [] for layer in range(c.layers) for g in range(c.kv_heads)}  # lists of (column, key, value)
    logps = []

    def norm(x, name):
        return x / (x.square().mean() + c.norm_eps).sqrt() * w[name + ".weight"]

    def turn(x, position):
        angle = torch.tensor(
            [position * c.rope_theta ** (-2 * d / c.head_dim) for d in range(half)], dtype=torch.float64
        )
        cos, sin = angle.cos().to(x), angle.sin().to(x)
        return torch.cat((x[:half] * cos - x[half:] * sin, x[half:] * cos + x[:half] * sin))

    for step, token in enumerate(prompt + response[:-1]):
        column, x = pad + step, w["embed_tokens.weight"][token]
        for layer in range(c.layers):
            name = f"layers.{layer}."
            y = norm(x, name + "input_layernorm")
            q, k, v = ((w[f"{name}self_attn.{p}_proj.weight"] @ y).view(-1, c.head_dim) for p in ("q", "k", "v"))
            outs = []
            for h in range(c.heads):
                g = h * c.kv_heads // c.heads
                if h % (c.heads // c.kv_heads) == 0:
                    mine = [e for e in held[layer, g] if column < evicted_at_LGT[layer, g, e[0]]]
                    held[layer, g] = [*mine, (column, turn(k[g], step), v[g])]
                query = turn(q[h], step)
                score = torch.stack([query @ key for _, key, _ in held[layer, g]]) / math.sqrt(c.head_dim)
                outs.append(score.softmax(0) @ torch.stack([value for _, _, value in held[layer, g]]))
            x = x + w[name + "self_attn.o_proj.weight"] @ torch.cat(outs)
            y = norm(x, name + "post_attention_layernorm")
            gate, up = w[name + "mlp.gate_proj.weight"] @ y, w[name + "mlp.up_proj.weight"] @ y
            x = x + w[name + "mlp.down_proj.weight"] @ (gate * gate.sigmoid() * up)
        if step >= len(prompt) - 1:
            logits = w["lm_head.weight"] @ norm(x, "norm")
            logps.append(logits.log_softmax(0)[response[step + 1 - len(prompt)]])
    return torch.stack(logps)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_1_replay_equals_the_sampler(policy, dtype, tolerance, monkeypatch):
    """Would catch a mask rebuilt by another rule, a head or layer mixed up, padding or RoPE off by one."""
    monkeypatch.setitem(smd.SCRATCH, "cpu", 2**11)  # several parts, the last one smaller, as in a long decode
    model = small_model(dtype)
    rollout = ragged_rollout(model, policy)
    lengths = rollout.length_B.tolist()
    assert min(lengths) < max(lengths), "no early end of sequence in this rollout"
    P, drawn = rollout.prompt_NP.shape[1], rollout.logp_BR[rollout.mask_BR]
    decode_time = (rollout.evicted_at_LBGT > P) & (rollout.evicted_at_LBGT < NEVER)
    assert decode_time.any(), "nothing was evicted while decoding"
    compare("shadow", replayed_logp(model, rollout, rollout.evicted_at_LBGT), drawn, tolerance)

    # the oracle, for two sequences of each prompt length
    for b in range(0, len(lengths), 2):
        pad, response = rollout.pad_N[b // 3].item(), rollout.response_BR[b, : lengths[b]].tolist()
        prompt = rollout.prompt_NP[b // 3, pad:].tolist()
        logp = oracle_logp(model, prompt, response, rollout.evicted_at_LBGT[:, b], pad)
        compare(f"oracle, sequence {b}", rollout.logp_BR[b, : lengths[b]], logp, tolerance)

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
    # not random, which draws for the batch, nor knorm: in the first layer the keys of a token that occurs twice have
    # the same norm, so which of them goes is up to rounding
    for policy in set(POLICIES) - {"random", "knorm"}:
        for budget in (8, 0.5):
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


def test_1_what_is_evicted_after_the_last_query_was_evicted_from_nobody():
    """A prompt of two columns, a response in 2, 3, 4 whose last query stands in 3; by hand, as in the docstring."""
    written = torch.tensor([2, 3, 4, NEVER, NEVER, NEVER, 0], dtype=torch.int32)
    got = smd.finished_record(written.view(1, 1, 1, 7), torch.tensor([5]))
    assert got.flatten().tolist() == [2, 3, NEVER, NEVER, NEVER, 0, 0]


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
        ((q[:, :3], k, v, evicted_at), "multiple of kv heads"),
        ((q, k, v, evicted_at.long()), "int32"),
        ((q, k, v, evicted_at, 0, "cuda12"), "backend must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            shadow_attention(*args)


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
        dense = smd.token_logp(logits, rollout.response_BR[mask])
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


# Lemma 4: the cache is small


@pytest.mark.parametrize("policy", POLICIES)
def test_4_the_cache_holds_budget_plus_interval_entries(policy, monkeypatch):
    """And the bytes are those of the storages: counted here by hand for what must be there at the least."""
    model, seen = small_model(), []
    store = smd.Cache.store

    def watched(cache, layer, slots, entries):
        store(cache, layer, slots, entries)
        seen.append((cache.k.shape[3], entries.k_BGKD.shape[2], slots.shape[2]))

    monkeypatch.setattr(smd.Cache, "store", watched)
    rollout = ragged_rollout(model, policy, budget=8, max_new=14)
    L, B, T = 2, 12, rollout.evicted_at_LBGT.shape[-1]
    assert {slots for slots, _, _ in seen} == {8 + 3}
    assert {before for _, before, _ in seen} == {30, 8 + 3}, "compressed at another time than the prompt's end or 8 + 3"
    assert {kept for _, _, kept in seen} == {8}
    least = L * B * 2 * (8 + 3) * (2 * 8 * 8 + 4) + L * B * 2 * T * 4  # k, v in float64, columns; the record
    full = L * B * 2 * (T - 1) * 2 * 8 * 8
    assert rollout.full_kv_bytes == full and rollout.full_kv_bytes_shared == full - L * (B - 4) * 2 * 30 * 2 * 8 * 8
    layer_of_prompts = 4 * 30 * 2 * 8 * 8 * 2  # the keys and values of the layer that is being compressed
    assert least + layer_of_prompts <= rollout.kv_bytes
    bigger = ragged_rollout(model, policy, budget=16, max_new=14).kv_bytes
    assert bigger - rollout.kv_bytes >= L * B * 2 * 8 * (2 * 8 * 8 + 4), "twice the budget must show in the bytes"


def test_4_no_full_layer_of_keys_survives_the_prefill(monkeypatch):
    """Would catch an eviction that only masks: while decoding, no tensor of keys as long as the prompt is alive."""
    model, prompts = small_model(), text.pad_left([[1 + i % 17 for i in range(400)]] * 2, EOS, "cpu")
    largest, decode = [], smd.Cache.decode

    def watched(cache, *args):
        keys = (t for t in gc.get_objects() if type(t) is torch.Tensor and t.ndim >= 4 and t.shape[-1] == 8)
        largest.append(max(t.shape[-2] for t in keys))
        return decode(cache, *args)

    monkeypatch.setattr(smd.Cache, "decode", watched)
    # the full cache is the control: there, the prompt's keys are found
    for eviction, slots in ((Eviction("snapkv", 16, interval=3), 16 + 3), (None, 400 + 5)):
        gc.collect()
        largest.clear()
        smd.sample(model, *prompts, 2, 5, EOS, eviction)
        assert set(largest) == {slots}


# Lemma 5: policies, on cases small enough to work out by hand


GENERATOR = torch.Generator().manual_seed(0)


def entries(k=None, pad=0, K=8, policy="streaming", q=None, received=None, keep=4, **eviction):
    """One sequence, one kv head with as many query heads as q has, K keys in columns 0 to K - 1."""
    k = torch.zeros(1, 1, K, 2, dtype=torch.float64) if k is None else torch.tensor(k, dtype=torch.float64)[None, None]
    q = torch.zeros(1, 1, 0, 2, dtype=torch.float64) if q is None else torch.tensor(q, dtype=torch.float64)[None]
    K, column = k.shape[2], torch.arange(k.shape[2])[None, None]
    received = None if received is None else torch.tensor([[received]], dtype=torch.float64)
    eviction = Eviction(policy, keep, **eviction)
    limits = torch.tensor([pad]), torch.tensor([keep])
    return smd.Entries(eviction, GENERATOR, k, k, column, column >= pad, received, q, *limits, now=K)


def kept(e) -> list[int]:
    record = torch.full((1, 1, e.column_BGK.shape[2]), NEVER, dtype=torch.int32)
    return smd.select_and_record(e, int(e.keep_B), record)[0, 0].tolist()


def test_5_streaming_keeps_sinks_and_the_latest():
    assert kept(entries(policy="streaming", sinks=2, keep=5)) == [0, 1, 5, 6, 7]
    assert kept(entries(policy="streaming", sinks=0, keep=3)) == [5, 6, 7]
    assert kept(entries(policy="streaming", sinks=2, keep=5, pad=2)) == [2, 3, 5, 6, 7]


def test_5_knorm_keeps_the_shortest_keys():
    assert kept(entries([[3, 4], [0, 1], [2, 0], [0, 9], [1, 1], [7, 7]], policy="knorm", keep=3)) == [1, 2, 4]


def test_5_h2o_splits_the_budget_between_the_latest_and_the_most_attended():
    received = [0.1, 0.9, 0.2, 0.8, 0.7, 0.1, 0.0, 0.0]
    assert kept(entries(policy="h2o", received=received, keep=4)) == [1, 3, 6, 7]
    assert kept(entries(policy="h2o", received=received, keep=5)) == [1, 3, 5, 6, 7]  # the odd one to the latest
    assert kept(entries(policy="h2o", received=received, keep=1)) == [7]


@torch.no_grad()
def test_5_the_attention_that_a_key_received_adds_up_over_prompt_and_response(monkeypatch):
    """Would catch sums that start anew after the prompt, take the wrong heads, or miss blocks of queries."""
    caches, make = [], smd.Cache
    monkeypatch.setattr(smd, "Cache", lambda *args: caches.append(make(*args)) or caches[-1])
    model, P = small_model(), 150  # more than one block of queries
    prompts = text.pad_left([[1 + i * i % 17 for i in range(P)]], EOS, "cpu")
    rollout = smd.sample(model, *prompts, 2, 6, -1, Eviction("h2o", P + 10), torch.Generator().manual_seed(0))
    tokens = torch.cat((rollout.prompt_NP.expand(2, -1), rollout.response_BR[:, :-1]), dim=1)
    T, received = tokens.shape[1], []
    position = torch.arange(T).expand(2, -1)
    never = torch.full((2, 2, T), NEVER, dtype=torch.int32)

    def attend(_, q, k, v):
        score = (q @ k.repeat_interleave(2, dim=1).transpose(-1, -2)) / math.sqrt(q.shape[-1])
        weight = score.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).softmax(dim=-1)
        received.append(weight.sum(dim=2).unflatten(1, (2, 2)).sum(dim=2))  # over queries and the heads of a group
        return shadow_attention(q, k, v, never)

    model.extend(tokens, position, attend)
    for layer, want in enumerate(received):
        compare(f"layer {layer}", caches[0].received[layer][:, :, :T], want, 1e-10)


def test_5_tova_follows_the_last_query_and_keeps_the_last_key():
    k = [[2, 0], [0, 0], [1, 0], [0, 2], [0, 0], [-1, -1]]
    # head 0 looks for the first component, head 1 for the second: their mean favours keys 0 and 3
    e = entries(k, policy="tova", q=[[[4, 0]], [[0, 4]]], keep=3)
    assert kept(e) == [0, 3, 5]
    weight = (torch.tensor([[2, 0, 1, 0, 0, -1], [0, 0, 0, 2, 0, -1]], dtype=torch.float64) * 4 / 2**0.5).softmax(-1)
    compare("tova score", smd.tova(e)[0, 0, :-1], weight.mean(0)[:-1], 1e-15)


def test_5_snapkv_pools_what_the_window_attends_to():
    k = [[0, 0], [0, 0], [0, 0], [6, 0], [0, 0], [0, 0], [0, 0], [0, 0], [0, 0], [0, 0]]
    e = entries(k, policy="snapkv", q=[[[4, 0], [4, 0]]], keep=7, window=2, sinks=1)
    # key 3 lifts its neighbours 1, 2, 4 and 5, but what is beyond the edge counts as zero in the mean around 1
    assert kept(e) == [0, 2, 3, 4, 5, 8, 9]
    hot = math.exp(24 / 2**0.5)
    rows = [[(hot if j == 3 else 1.0) / (hot + last) for j in range(8)] for last in (9, 8)]  # query 9 sees ten keys
    mean = [(a + b) / 2 for a, b in zip(*rows, strict=True)] + [0.0, 0.0]
    pooled = [sum(mean[max(0, j - 2) : j + 3]) / 5 for j in range(8)]
    compare("snapkv score", smd.snapkv(e)[0, 0, 1:8], torch.tensor(pooled[1:], dtype=torch.float64), 1e-15)


def test_5_rkv_drops_the_older_of_two_like_keys():
    """Importance is equal throughout (the query is zero), so redundancy alone decides."""
    k = [[1, 0], [0, 1], [1, 0.01], [-1, 0], [1, 0.02], [0, -1]]
    e = entries(k, policy="rkv", q=[[[0, 0]]], keep=5, window=1)
    # 0, 2 and 4 are alike, and for each the last of the other two is forgiven: of columns 0, 2, 4 only 4 (by 0 and 2)
    # and 2 (by 4) are; column 0 keeps both counts against it
    assert kept(e) == [1, 2, 3, 4, 5]
    unit = F.normalize(e.k_BGKD[0, 0], dim=-1)
    cosine = (unit @ unit.T).fill_diagonal_(0)
    for row in range(6):
        above = [j for j in range(6) if cosine[row, j] > 0.5]
        if above:
            cosine[row, above[-1]] = 0
    score = 0.07 * torch.full((6,), 0.2, dtype=torch.float64) - 0.93 * cosine.mean(0).softmax(0)
    compare("rkv score", smd.rkv(e)[0, 0, :5], score[:5], 1e-15)


def test_5_random_is_uniform_between_sinks_and_window():
    e = entries(policy="random", K=12, keep=6, sinks=1, window=2)
    counts = torch.bincount(torch.tensor([kept(e) for _ in range(900)]).flatten(), minlength=12)
    assert (counts[[0, 10, 11]] == 900).all()
    assert (counts[1:10] - 300).abs().max() < 5 * math.sqrt(900 * 1 / 3 * 2 / 3), counts


@pytest.mark.parametrize("policy", POLICIES)
def test_5_padding_is_never_kept_before_a_real_key(policy):
    """Right after the prompt of each sequence, min(budget, length) of its own keys are alive."""
    model, lengths = small_model(), (17, 3, 30, 6)
    rollout = ragged_rollout(model, policy, lengths=lengths, samples=1, max_new=2)
    P = rollout.prompt_NP.shape[1]
    for n, length in enumerate(lengths):
        record = rollout.evicted_at_LBGT[:, n, :, :P]
        assert (record[..., : P - length] == 0).all()
        assert ((record > P).sum(-1) == min(8, length)).all(), f"prompt of {length}"


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


# Lemma 8: a run survives being killed, and bad input


TINY = dict(
    hops=2, width=16, budget=18, window=3, interval=2, pool=3, warmup_steps=3, prompts=4, samples=4, eval_prompts=16,
    eval_every=4, steps=6, lr=3e-3, device="cpu",
)  # fmt: skip
SECONDS = ("seconds_sample", "seconds_diag", "seconds_learn")


@pytest.fixture(autouse=True)
def small_and_apart(monkeypatch, tmp_path):
    """Tests share no base policies with anybody's runs, and reach the second checkpoint and diagnosis soon."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "SAVE_EVERY", 2)
    monkeypatch.setattr(smd, "DIAGNOSE_EVERY", 3)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch, request):
    """Drawing takes longer than a tiny run; one test asks for the picture."""
    if request.node.name != "test_8_a_run_leaves_its_files":
        monkeypatch.setattr(report, "draw_curves", lambda *_: None)


def tiny(tmp_path, name="run", **changes) -> Settings:
    return Settings(**TINY | dict(out=str(tmp_path / name)) | changes)


def outcome(out) -> tuple:
    """All that a run computed: metrics without their times, and the weights and the optimizer's state, to the bit."""
    rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    state = torch.load(Path(out) / "checkpoint.pt", weights_only=True)
    moments = [t for per_weight in state["optimizer"]["state"].values() for t in per_weight.values()]
    tensors = [t.tolist() for t in [*state["weights"].values(), *moments]]
    summary = json.loads((Path(out) / "summary.json").read_text())
    return [{k: v for k, v in row.items() if k not in SECONDS} for row in rows], tensors, summary["after"]


def argv(settings: Settings) -> list[str]:
    given = ((cli.flag(f.name), getattr(settings, f.name), f.default) for f in dataclasses.fields(settings))
    pairs = ([name] if value is True else [name, str(value)] for name, value, default in given if value != default)
    return [word for pair in pairs for word in pair]


def test_8_a_run_leaves_its_files(tmp_path):
    summary, keys = smd.train(tiny(tmp_path)), {"kl_sparse_dense"}
    assert {p.name for p in (tmp_path / "run").iterdir()} == set(runs.FILES)
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if keys <= row.keys()] == [1, 4], (
        "every DIAGNOSE_EVERY steps, the first included"
    )
    assert max(row["replay_error"] for row in rows) == summary["replay_error"] < 1e-5
    assert all(row["kv_bytes"] > 0 and 0 < row["visible_share"] < 1 and row["entropy"] > 0 for row in rows)


def test_8_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        smd.train(tiny(tmp_path, name, seed=seed))
    a, b, c = (outcome(tmp_path / name) for name in "abc")
    assert a == b and a != c


def test_8_killed_and_resumed_equals_uninterrupted(tmp_path, monkeypatch):
    """Killed in the middle of a step, of a line of the log, of a checkpoint, of an evaluation; then --steps grows."""
    smd.train(tiny(tmp_path, "whole", steps=8))

    class Killed(BaseException):
        pass

    def dies(name, call):
        """Let the call-th call of a function die after it has done its work in part or in full."""
        module = runs if name in ("save", "restore") else smd
        real, calls = getattr(module, name), []

        def dying(*args):
            calls.append(1)
            if len(calls) == call:
                if name == "save":
                    args[0].with_name("checkpoint.pt.tmp").write_bytes(b"half a checkpoint")
                else:
                    real(*args)
                raise Killed
            return real(*args)

        return module, name, dying

    for n, (name, call) in enumerate([("update", 2), ("save", 3), ("train_step", 5), ("diagnose", 1), ("restore", 1)]):
        settings, log = tiny(tmp_path, f"killed-{n}"), tmp_path / f"killed-{n}" / "metrics.jsonl"
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(*dies(name, call))
            smd.train(settings)
        with open(log, "a") as f:
            f.write('{"step": 99, "rew')
        smd.train(dataclasses.replace(settings, resume=True))
        smd.train(dataclasses.replace(settings, resume=True, steps=8))
        assert outcome(settings.out) == outcome(tmp_path / "whole"), f"killed in call {call} of {name}"


@pytest.mark.parametrize("objective", ["ppo", "dpo"])
def test_8_a_critic_and_a_reference_resume(tmp_path, objective):
    changes = dict(objective=objective, kl_ref=0.1, epochs=2, minibatches=2)
    smd.train(tiny(tmp_path, "whole", **changes))
    smd.train(tiny(tmp_path, "half", **changes | dict(steps=3)))
    smd.train(tiny(tmp_path, "half", **changes, resume=True))
    assert outcome(tmp_path / "half") == outcome(tmp_path / "whole")


def test_8_a_killed_process_leaves_a_run_that_resumes(tmp_path, capsys):
    """The real thing once: SIGKILL, and Ctrl-C, which exits with 130."""
    smd.train(tiny(tmp_path, "whole", steps=40))
    for name, number, code in (("killed", signal.SIGKILL, -9), ("stopped", signal.SIGINT, 130)):
        settings = tiny(tmp_path, name, steps=40)
        command = [sys.executable, smd.__file__, *argv(settings)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        deadline, log = time.time() + 60, Path(settings.out) / "metrics.jsonl"
        while time.time() < deadline and not (log.exists() and len(log.read_text().splitlines()) >= 5):
            time.sleep(0.01)
        os.kill(process.pid, number)
        error = process.communicate()[1]
        assert process.returncode == code, error
        assert "Traceback" not in error
        assert smd.main(["--resume", "--out", settings.out]) == 0
        assert outcome(settings.out) == outcome(tmp_path / "whole")
    assert "held-out accuracy" in capsys.readouterr().out


def test_8_a_checkpoint_answers_a_prompt(tmp_path, capsys):
    smd.train(tiny(tmp_path))
    command = ["--resume", "--out", str(tmp_path / "run"), "--device", "cpu", "--prompt", "abbccddeefghijklmnop?b"]
    assert smd.main(command) == 0
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert lines[0].startswith("sparse cache: ") and lines[1].startswith("full cache:   ")


def test_8_the_evaluation_says_which_cache_was_right(monkeypatch):
    """Would catch sparse and dense swapped: here the full cache is always right, the other in the first of two."""
    agent = smd.agent_for(smd.checked(tiny(Path("."), eval_prompts=100)))

    def respond(examples, samples, evict, generator):
        return None, [e.answer if not evict or n % 2 == 0 else "wrong" for n, e in enumerate(examples)]

    monkeypatch.setattr(agent, "respond", respond)
    assert agent.evaluate() == {"sparse": 0.5, "dense": 1.0}


def test_8_overwrite_replaces_a_run_even_if_killed_while_it_does(tmp_path, monkeypatch):
    """Would catch a new config.json beside the old run's checkpoint, from which a resumption would go on."""
    new = tiny(tmp_path, seed=1, overwrite=True)
    smd.train(tiny(tmp_path, "fresh", seed=1))
    smd.train(tiny(tmp_path))
    write_file = runs.write

    def killed_after(*args):
        write_file(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs, "write", killed_after)
        smd.train(new)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 1
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
    smd.train(dataclasses.replace(new, overwrite=False, resume=True))
    assert outcome(new.out) == outcome(tmp_path / "fresh")


def write(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


GOOD = '{"prompt": "one and one is", "answer": "two"}'


def bad_inputs(tmp: Path) -> list:
    data = [
        ("", "is empty"),
        ('{"prompt": "a"', "line 2: not JSON"),
        ('["prompt"]', "line 2: want an object"),
        ('{"prompt": "what is it?"}', "line 2: want an object"),
        ('{"prompt": 3, "answer": "x"}', "line 2: want an object with strings"),
        ('{"prompt": "  ", "answer": "x"}', "line 2: the prompt and the answer must not be empty"),
        ('{"question": "how many of them?", "answer": "seven"}', "line 2: no ####"),
        (
            json.dumps({"prompt": "long " * 500, "answer": "x"}),
            "2500 tokens with --max-new 128 exceeds the context of 2048",
        ),
        (
            json.dumps({"prompt": "how long is it?", "answer": "x" * 200}),
            "201 tokens with its end exceeds --max-new 128",
        ),
        (json.dumps({"prompt": "hi", "answer": "x"}), "budget must be at least sinks + window = 5, got 1"),
    ]
    files = [(write(tmp / f"{n}.jsonl", *([GOOD, line] if line else [])), part) for n, (line, part) in enumerate(data)]
    (tmp / "latin.jsonl").write_bytes(GOOD.encode() + b'\n{"prompt": "caf\xe9", "answer": "x"}\n')
    (tmp / "broken").mkdir()
    (tmp / "broken" / "config.json").write_text("{")
    damaged = tiny(tmp, "damaged", steps=1)
    smd.train(damaged)
    (tmp / "damaged" / "checkpoint.pt").write_bytes((tmp / "damaged" / "checkpoint.pt").read_bytes()[:1000])
    done = tiny(tmp, "done", steps=2)
    smd.train(done)
    resume = ["--resume", "--out", done.out]
    return [
        *[(["--data", file], part) for file, part in files],
        (["--data", str(tmp / "latin.jsonl")], "line 2: not JSON in UTF-8"),
        (["--data", str(tmp / "none.jsonl")], "cannot be read: No such file"),
        (["--data", str(tmp)], "cannot be read: Is a directory"),
        (["--data", write(tmp / "one.jsonl", GOOD)], "want at least 2 examples"),
        (["--budget", "4"], "budget must be at least sinks + window = 5, got 4"),
        (["--budget", "2", "--eviction", "streaming", "--sinks", "2"], "at least sinks + 1 = 3, got 2"),
        (["--budget", "4", "--eviction", "random"], "at least sinks + window = 5, got 4"),
        (["--budget", "3", "--eviction", "rkv"], "at least window = 4, got 3"),
        *[(["--budget", "0", "--eviction", policy], "at least 1, got 0") for policy in ("tova", "knorm", "h2o")],
        (["--budget", "0.05"], "at least sinks + window = 5, got 2 (0.05 of a prompt of 34 tokens)"),
        (["--budget", "1.5"], "at most 1, got 1.5"),
        (["--budget", "nan"], "--budget must be a finite number, got nan"),
        (["--budget", "many"], "invalid number value: 'many'"),
        (["--interval", "0"], "--interval must be at least 1, got 0"),
        (["--samples", "0"], "--samples must be at least 1, got 0"),
        (["--steps", "-1"], "--steps must be at least 0, got -1"),
        (["--steps", "2.5"], "invalid int value: '2.5'"),
        (["--lr", "nan"], "--lr must be a finite number, got nan"),
        (["--lr", "-0.001"], "--lr must be at least 0, got -0.001"),
        (["--lam", "inf"], "--lam must be a finite number, got inf"),
        (["--eviction", "lru"], "--eviction must be one of streaming, snapkv"),
        (["--method", "ppo"], "--method must be one of dense, naive, tis, seq_is, sparse_rl, smd, got 'ppo'"),
        (["--objective", "dpo", "--method", "tis"], "weights no tokens; take --method dense, naive or smd, got tis"),
        (["--objective", "reinforce"], "--objective must be one of grpo, dr_grpo, ppo, dpo"),
        (["--samples", "1"], "--objective grpo compares a prompt's samples; give --samples 2 or more, got 1"),
        (["--minibatches", "33"], "--minibatches must be at most --prompts = 32, got 33"),
        (["--encoding", "klingon"], "--encoding must be bytes or one of"),
        (["--device", "tpu"], "--device must be one of cpu, cuda, got 'tpu'"),
        (["--backend", "magic"], "--backend must be one of torch"),
        (["--bugdet", "3"], "unrecognized arguments: --bugdet"),
        (["--width", "100"], "--width must be a multiple of 8, got 100"),
        (["--out", "/dev/null/run"], "/dev/null/run/config.json cannot be written: Not a directory"),
        (["--out", done.out, *argv(dataclasses.replace(done, out=None))], "add --resume to continue it or --overwrite"),
        ([*resume, "--method", "naive"], "holds a run with --method smd, not naive"),
        ([*resume, "--steps", "1"], "is at step 2 already"),
        ([*resume, "--overwrite"], "--resume and --overwrite exclude each other"),
        ([*resume, "--prompt", ""], "the prompt must not be empty"),
        ([*resume, "--prompt", "x" * 2048], "a prompt of 2048 tokens with --max-new 3 exceeds the context of 2048"),
        (["--prompt", "abba?a"], "--prompt needs --resume"),
        (["--resume"], "--resume needs --out"),
        (["--resume", "--out", str(tmp / "nowhere")], "holds no run to resume"),
        (["--resume", "--out", str(tmp / "broken")], "config.json is damaged"),
        (["--resume", "--out", damaged.out], "is missing or damaged"),
        (["--pool", "4"], "--pool must be odd, a key and as many neighbours on either side, got 4"),
        (["--task", "riddle"], "--task must be one of chain, text, got 'riddle'"),
        (["--task", "text"], "--task text needs --data FILE.jsonl"),
        (["--task", "chain", "--data", files[0][0]], "--task chain reads no file, got --data"),
    ]  # fmt: skip


def test_8_bad_input_gets_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys):
    cases = bad_inputs(tmp_path)
    workplace = tmp_path / "workplace"
    workplace.mkdir()
    monkeypatch.chdir(workplace)
    for arguments, message in cases:
        capsys.readouterr()
        before = sorted((p, p.stat().st_size) for p in tmp_path.rglob("*"))
        code, error = smd.main(arguments), capsys.readouterr().err
        assert code == 2 and message in error and error.count("\n") == 1, f"{arguments}: {code}, {error}"
        assert sorted((p, p.stat().st_size) for p in tmp_path.rglob("*")) == before, f"{arguments} wrote something"


def test_8_an_encoding_that_cannot_be_fetched_is_one_line(monkeypatch, capsys, tmp_path):
    def no_network(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(text.tiktoken, "get_encoding", no_network)
    assert smd.main(["--encoding", "gpt2", "--out", str(tmp_path / "run")]) == 2
    assert "--encoding gpt2 could not be fetched (ConnectionError)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_8_nan_stops_the_run_and_names_the_step(tmp_path, capsys, monkeypatch):
    calls = []

    def reward(prompt, response, answer):
        calls.append(response)
        return math.nan if len(calls) > 16 * 2 else float(len(response))

    settings = tiny(tmp_path)
    with pytest.raises(FloatingPointError, match="stopped at step 3: a reward is nan"):
        smd.train(settings, reward=reward)
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["step"] == 2 and all(w.isfinite().all() for w in state["weights"].values())
    # an update that destroys the weights is noticed when the sampler meets them, and the command line says so
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(smd, "LR_WARMUP", 0)
    monkeypatch.setattr(runs, "SAVE_EVERY", 100)
    assert smd.main(argv(tiny(tmp_path, "explodes", lr=1e30))) == 2
    last = capsys.readouterr().err.splitlines()[-1]  # below the progress bars
    assert last.startswith("smd.py: stopped at step") and "logits are not finite" in last


# every setting that a run may not change on resumption, with a value that must show in what a tiny run computes
CHANGES = dict(
    hops=3, max_new=6, width=32, warmup_steps=1, method="naive", lam=0.0, objective="ppo", kl_ref=1.0, eviction="knorm",
    budget=14, interval=1, window=2, sinks=3, pool=1, lr=1e-3, epochs=1, minibatches=2, prompts=3, samples=3, seed=1,
    eval_prompts=5, eval_every=2,
)  # fmt: skip


def test_8_every_flag_changes_the_result(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "accuracy", lambda texts, examples: len(texts))  # of this tiny model it is 0
    untested = {"data", "encoding", "task"}  # they decide what is accepted at all, and are tested as such
    assert set(CHANGES) == set(cli.fixed_names(Settings)) - untested
    # two epochs, or nothing could be clipped; sinks that matter need keys that the window would not keep anyway
    base = dict(epochs=2, steps=3, hops=4, budget=20, lr=1e-2)
    smd.train(tiny(tmp_path, "as it is", **base))
    for name, value in CHANGES.items():
        smd.train(tiny(tmp_path, name, **base | {name: value}))
        assert outcome(tmp_path / name) != outcome(tmp_path / "as it is"), f"{cli.flag(name)} {value} changes nothing"


def test_8_a_file_of_text_trains_end_to_end(tmp_path):
    """Both formats, through --data; the second with the reward of a judge instead of the match."""
    ours = [json.dumps({"prompt": f"what comes after {n} is ", "answer": str(n + 1)}) for n in range(20)]
    gsm8k = [
        json.dumps({"question": f"{n} and one?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1:,}"})
        for n in range(995, 1015)
    ]
    judged = []
    for name, lines, judge in (("ours", ours, None), ("gsm8k", gsm8k, lambda *texts: judged.append(texts) or 0.5)):
        changes = dict(data=write(tmp_path / f"{name}.jsonl", *lines), budget=0.8, max_new=8, steps=2, eviction="h2o")
        summary = smd.train(tiny(tmp_path, name, **changes), reward=judge)
        assert summary["replay_error"] < 1e-5 and 0 <= summary["after"]["sparse"] <= 1
    prompt, _, answer = judged[0]
    assert prompt.endswith(" and one?\n") and answer.isdigit(), (
        "a GSM8K answer is the number after ####, without commas"
    )


GSM8K = HERE.parent / "shared/data/gsm8k_test.jsonl"


@pytest.mark.skipif(not GSM8K.exists(), reason="the real file is not here")
def test_8_real_text_is_read(tmp_path):
    examples = tasks.read_jsonl(str(GSM8K))
    assert len(examples) == 1319 and examples[0].answer == "18" and examples[3].answer == "540"


# Lemma 9: it learns


def judge(prompt: str, response: str, answer: str) -> float:
    """A reward that even a model of a few thousand weights can learn in seconds: the share of the letter a."""
    return response.count("a") / 3


def held_out_reward(out: Path, count: int = 512) -> tuple[float, float]:
    """Mean reward of a run's checkpoint on held-out prompts with the sparse cache, and its standard error."""
    agent = smd.agent_for(smd.checked(Settings(**runs.read_config(out, Settings), device="cpu")))
    runs.restore(out / "checkpoint.pt", smd.Policy(agent.model, agent.s))
    examples = agent.task.held_out(count)
    texts = agent.respond(examples, 1, True, torch.Generator().manual_seed(0))[1]
    rewards = [judge(e.prompt, text, e.answer) for e, text in zip(examples, texts, strict=True)]
    return statistics.mean(rewards), statistics.stdev(rewards) / count**0.5


def test_9_a_short_run_learns_and_shuffled_rewards_do_not(tmp_path, monkeypatch):
    order, pool = torch.Generator().manual_seed(0), []

    def shuffled(*texts):
        """The same rewards, handed out to the wrong responses."""
        pool.append(judge(*texts))
        return pool[int(torch.randint(len(pool), (), generator=order))]

    monkeypatch.setattr(smd, "LR_WARMUP", 1)
    changes = dict(warmup_steps=60, prompts=8, samples=8)
    for name, reward, steps in (("base", None, 0), ("learned", judge, 30), ("shuffled", shuffled, 30)):
        smd.train(tiny(tmp_path, name, **changes, steps=steps), reward=reward)
    results = [held_out_reward(tmp_path / name) for name in ("base", "learned", "shuffled")]
    (base, se), (learned, se_learned), (lost, se_lost) = results
    assert learned - base > 3 * math.hypot(se, se_learned), f"{base:.3f} -> {learned:.3f}"
    assert lost - base < 3 * math.hypot(se, se_lost), f"control: {base:.3f} -> {lost:.3f}"


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
    # without the interpreter, and without triton, the reason is said; nothing falls back
    for code, message in (
        ("", "needs CUDA tensors, got cpu; for the interpreter set TRITON_INTERPRET=1"),
        ("import sys; sys.modules['triton'] = None", "needs the package triton"),
    ):
        code += "\nimport torch, kernel; x = torch.ones(1, 1, 2, 16); e = torch.ones(1, 1, 2, dtype=torch.int32)\n"
        code += "kernel.shadow_attention(x, x, x, e); kernel.shadow_attention(x, x, x, e, backend='triton')"
        env = os.environ | {"TRITON_INTERPRET": "0"}
        run = subprocess.run(
            [sys.executable, "-c", code], env=env, cwd=HERE, capture_output=True, text=True, check=False
        )
        assert run.returncode and message in run.stderr.splitlines()[-1]


# Lemma 11: the kernels visit what they must and little more


@pytest.mark.parametrize("kind", ["random", "compressed", "rolling", "nothing"])
def test_11_the_lists_hold_every_visible_pair_once(kind):
    T, q_start, M, N = 100, 13, 16, 32
    record = records(kind, 2, 2, T)
    tiles = kernel.list_tiles(record, q_start, T - q_start, kernel.Blocks(M, N, 16, 4), epoch=20)
    i, j = torch.arange(q_start, T)[:, None], torch.arange(T)
    for b, g in ((0, 0), (1, 1)):
        visible = (j <= i) & (i < record[b, g])
        order = tiles.order_BGK[b, g]
        assert sorted(order[:T].tolist()) == list(range(T))
        for block in range(-(-(T - q_start) // M)):
            rows, seen = visible[block * M : (block + 1) * M], torch.zeros(T, dtype=torch.bool)
            full, part = tiles.tiles_BGI2[b, g, block].tolist()
            for n, tile in enumerate(tiles.tile_BGIJ[b, g, block, : full + part].tolist()):
                places = range(tile * N, (tile + 1) * N)
                keys = order[[p for p in places if p < T]]
                assert not seen[keys].any(), "a tile is visited twice"
                seen[keys] = True
                assert n >= full or (len(keys) == N and rows[:, keys].all()), "a tile is not visible in full"
                full_blocks, part_blocks = tiles.blocks_BGJ2[b, g, tile].tolist()
                listed = tiles.block_BGJI[b, g, tile, : full_blocks + part_blocks].tolist()
                assert listed.index(block) < full_blocks if n < full else listed.index(block) >= full_blocks
            assert not rows[:, ~seen].any(), "a visible pair is in no tile"
        assert tiles.blocks_BGJ2[b, g].sum() == tiles.tiles_BGI2[b, g].sum()


@pytest.mark.parametrize("T", [8192, 32768])
def test_11_the_area_of_the_tiles_follows_the_visible_pairs(T):
    blocks, P = kernel.block_sizes(torch.bfloat16, 128, roomy=True), T * 7 // 8
    for kept in (1.0, 0.5, 0.25, 0.1):
        record = kernels.compressed_once(T, kept, 0)[None, None]
        for q_start in (0, P):
            assert kernels.tile_ratio(record, q_start, T - q_start, blocks) <= 1.15
    record = kernels.rolling(T, 1024, 128, 0)[None, None]
    assert kernels.tile_ratio(record, 0, T, blocks) <= 1.85
    # controls: in the order of position, and of the exact time of death, it does not hold
    assert kernels.tile_ratio(record, 0, T, blocks, epoch=None) > 3
    assert kernels.tile_ratio(record, 0, T, blocks, epoch=1) > 2


def test_11_the_benchmark_on_a_cpu_prints_only_what_it_measured(tmp_path, monkeypatch, capsys):
    """Catches columns that only a GPU can fill: `nan` MiB and 0.00 TFLOP/s stood beside the milliseconds."""
    file = tmp_path / "new" / "kernels.json"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(kernels, "LENGTHS", (128,))
    monkeypatch.setattr(kernels, "CPU_LENGTHS", (16,))
    monkeypatch.setattr(sys, "argv", ["kernels", "--out", str(file)])
    assert kernels.main() == 0
    *tables, path = capsys.readouterr().out.splitlines()
    assert path == str(file) and not [line for line in tables if "nan" in line or "TFLOP" in line]
    found = json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert len(found["tile_ratios"]) == len(kernels.PATTERNS) and len(found["times"]) == 4
    assert all(row["forward"] > 0 and row["both"] > 0 for row in found["times"])


# Lemma 12: the kernels compile for GPUs that are not here, fit, and do not spill

ARCHITECTURES = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes of shared memory that a block may have


def compile_ahead(job) -> dict:
    """Compile one kernel for one architecture, without a GPU and outside the interpreter: what ptxas says of it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name, dtype, D, capability = job
    source, t = getattr(kernel, name), {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[dtype]
    M, N, R, num_warps = kernel.block_sizes(getattr(torch, dtype), D, roomy=ARCHITECTURES[capability] > 200_000)
    sizes = {n: s for n, s in dict(M=M, N=N, D=D, R=R).items() if n in source.arg_names}
    kinds = dict.fromkeys(("Q", "K", "V", "OUT", "DOUT", "DQ", "DK", "DV"), "*" + t)
    kinds |= dict.fromkeys(("BORN", "DIES", "LIST", "COUNT"), "*i32") | dict.fromkeys(sizes, "constexpr")
    kinds |= dict(LSE="*fp32", DELTA="*fp32", SCALE="fp32", scale="fp32")
    signature = {n: kinds.get(n, "i32") for n in source.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
    options = dict(num_warps=num_warps, num_stages=kernel.STAGES)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(ASTSource(source, signature, sizes, aligned), target=target, options=options)
    ptx, tools = compiled.asm["ptx"], Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    tool = tools / ("ptxas-blackwell" if capability >= 100 else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "ptx").write_text(ptx)
        arch = re.search(r"\.target (\w+)", ptx)[1]
        command = [tool, "-v", f"-arch={arch}", "ptx", "-o", "cubin"]
        said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stderr
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", said)]
    units = set(re.findall(r"\b(wgmma|mma\.sync|tcgen05\.mma|atom|red)\b", ptx)) | (
        {"tf32"} if "tf32" in ptx else set()
    )
    return dict(
        job=job, cubin=len(compiled.asm["cubin"]), shared=compiled.metadata.shared, spills=spills, units=sorted(units)
    )


def compile_all() -> None:
    names = [k.__name__ for k in kernel.KERNELS]
    jobs = list(itertools.product(names, ("bfloat16", "float32"), (64, 128), ARCHITECTURES))
    with ProcessPoolExecutor(2) as pool:
        print(json.dumps(list(pool.map(compile_ahead, jobs))))


def test_12_the_kernels_compile_ahead_of_time():
    pytest.importorskip("triton")
    command = [sys.executable, "-c", "import test_smd; test_smd.compile_all()"]
    env = os.environ | {"TRITON_INTERPRET": "0"}
    run = subprocess.run(command, env=env, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    results = json.loads(run.stdout.splitlines()[-1])
    assert len(results) == 3 * 2 * 2 * 3
    for r in results:
        _, dtype, _, capability = r["job"]
        assert r["cubin"] > 0 and r["shared"] <= ARCHITECTURES[capability], r
        assert len(r["spills"]) >= 2 and not any(r["spills"]), r
        assert not {"atom", "red", "tf32"} & set(r["units"]), r
        tensor_core = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}[capability]
        assert (tensor_core in r["units"]) == (dtype == "bfloat16"), r


# Lemma 13: the learner trains through the kernels


@pytest.mark.parametrize("method", ["dense", "naive", "smd"])
def test_13_the_learner_through_the_kernels_is_the_learner(method):
    model = small_model(torch.float32)
    rollout = ragged_rollout(model, budget=None if method == "dense" else 8, samples=2, max_new=8)
    tensors = {name: x.to(GPU) for name, x in vars(rollout).items() if isinstance(x, torch.Tensor)}
    model, rollout = model.to(GPU), dataclasses.replace(rollout, **tensors)
    loss, want, _ = learner(model, rollout, method, backend="torch")
    through, got, figures = learner(model, rollout, method, backend="triton")
    assert math.isclose(loss.item(), through.item(), rel_tol=1e-4)
    assert (got - want).norm() <= 1e-4 * want.norm()
    assert figures.get("replay_error", 0.0) < 1e-5


# Lemmas 14 to 22: which gradient each correction and each objective follows. A model so small that all of its
# responses can be enumerated: 4 tokens, a prompt of 12, 3 response tokens, so 64 responses, and every expectation is a
# sum. In 15 to 17 the estimator is one response, its advantage the reward less a constant, before the first update.


@pytest.fixture(scope="module")
def world():
    return World()


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
    got = smd.kl_divergence(sparse.flatten(0, 1), dense.flatten(0, 1))
    compare("KL(sparse ‖ dense)", got, (sparse.exp() * (sparse - dense)).sum(dim=-1).mean(), 1e-12)
    assert abs(got - want) > 1e-4, "control: the two directions differ"


def test_20_k3_pulls_along_the_kl_from_the_reference(world):
    other, at = World(seed=1), world.rollout.evicted_at_LBGT
    ref = world.logits(at, other.model).log_softmax(dim=-1).detach().view(64, 3, 4)
    logits = world.logits(at).log_softmax(dim=-1).view(64, 3, 4)
    token = world.responses[..., None]
    pairs = [t.gather(-1, token)[..., 0] for t in (logits, ref)]
    everywhere = torch.ones(1, 3, dtype=torch.bool)
    expected = sum(p * smd.k3(*(t[n : n + 1] for t in pairs), everywhere) for n, p in enumerate(world.p))
    forward = (world.p[:, None, None] * ref.exp() * (ref - logits)).sum() / 3
    backward = (world.p[:, None, None] * logits.exp() * (logits - ref)).sum() / 3
    got, right, wrong = (
        torch.autograd.grad(x, list(world.model.parameters()), retain_graph=True) for x in (expected, forward, backward)
    )
    got, right, wrong = (torch.cat([g.flatten() for g in x]) for x in (got, right, wrong))
    assert distance(got, right) < 1e-12 and distance(got, wrong) > 0.1


def test_21_ppo_with_both_lambdas_1_is_reinforce(world, monkeypatch):
    monkeypatch.setattr(smd, "VALUE_COEF", 0.0)
    s = loss_settings(objective="ppo", method="smd", lam=0.0, max_new=3)
    want = gradient(-(world.p * world.reward)[:, None].mul(world.logp(dense=False)).sum(), world.model)
    for gae_lambda, same in ((1.0, True), (0.95, False)):
        monkeypatch.setattr(smd, "GAE_LAMBDA", gae_lambda)
        policy = smd.Policy(world.model, s)  # the critic is zero at first
        batch = smd.prepare(policy, world.rollout, world.reward, s)
        # before they are normalised, the advantages are what the returns are above a value of zero;
        # each response as often as it is drawn
        weighted = batch.return_BR * world.p[:, None] * world.responses.numel()
        batch = dataclasses.replace(batch, advantage_BR=weighted)
        got = gradient(smd.learner_loss(policy, batch, s)[0], world.model)
        assert (distance(got, want) < 1e-12) == same


def test_21_gae_by_hand():
    # two tokens, then one; γ = 1, λ = 1/2: δ = V' - V = 0.25, then r - V = 1 - 0.5; A = 0.25 + 0.5 · 0.5, 0.5
    reward, value = torch.tensor([1.0, 2.0]), torch.tensor([[0.25, 0.5], [0.5, 9.0]])
    got = smd.gae(reward, value, torch.tensor([[True, True], [True, False]]), 0.5)
    assert torch.equal(got, torch.tensor([[0.5, 0.5], [1.5, 0.0]]))


def test_21_the_value_loss_is_clipped_by_hand():
    value, old, want = torch.tensor([[1.0, 0.1]]), torch.zeros(1, 2), torch.ones(1, 2)
    # V = 1 is right, but 0.2 is as far as it may have moved: ½ (0.2 - 1)²; V = 0.1 has moved less: ½ (0.1 - 1)²
    got = smd.value_loss(value, old, want, torch.ones(1, 2, dtype=torch.bool), 0.2)
    assert torch.isclose(got, torch.tensor((0.5 * 0.64 + 0.5 * 0.81) / 2))


def test_21_the_critic_sees_what_the_sampler_saw(world, monkeypatch):
    hidden, logits = [], TinyModel.logits
    with monkeypatch.context() as patch:
        patch.setattr(TinyModel, "logits", lambda m, x: hidden.append(x) or logits(m, x))
        world.score()
    s = loss_settings(objective="ppo", method="smd", max_new=3)
    policy = smd.Policy(world.model, s)
    torch.nn.init.normal_(policy.critic.weight)
    seen = policy.critic(torch.stack(hidden, dim=1))[..., 0]
    for method, same in (("smd", True), ("naive", False)):
        batch = smd.prepare(policy, world.rollout, world.reward, dataclasses.replace(s, method=method))
        assert torch.allclose(batch.value_BR, seen, atol=1e-10) == same


def test_21_dpo_against_finite_differences_and_without_pairs(world, monkeypatch):
    monkeypatch.setattr(smd, "DPO_BETA", 0.5)
    s = loss_settings(objective="dpo", method="smd", lam=0.0)
    policy = smd.Policy(world.model, s)
    with torch.no_grad():
        for p in policy.reference.parameters():
            p.mul_(0.9)
    batch = smd.prepare(policy, world.rollout, world.reward, s)
    slope = gradient(smd.learner_loss(policy, batch, s)[0], world.model)
    weights = list(world.model.parameters())
    before = torch.nn.utils.parameters_to_vector(weights).detach()
    direction = F.normalize(
        torch.randn(len(before), generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=0
    )
    ends, best, worst = [], world.reward.argmax(), world.reward.argmin()
    for step in (1e-5, -1e-5):
        torch.nn.utils.vector_to_parameters(before + step * direction, weights)
        margin = world.score().logp_BR.sum(dim=1) - batch.ref_logp_BR.sum(dim=1)
        ends.append(math.log1p(math.exp(-0.5 * (margin[best] - margin[worst]).item())))
    torch.nn.utils.vector_to_parameters(before, weights)
    assert abs((ends[0] - ends[1]) / 2e-5 - slope @ direction) < 1e-6 * slope.norm()
    tied = dataclasses.replace(batch, reward_B=torch.ones(64, dtype=torch.float64))
    loss = smd.learner_loss(policy, tied, s)[0]
    assert loss == 0 and (gradient(loss, world.model) == 0).all()


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


def test_22_minibatches_of_all_prompts_are_the_batch():
    """The mean over parts of a gradient that is a sum over prompts, before the first update."""
    model, s = small_model(), loss_settings(method="smd", lam=0.0)
    rollout, policy = ragged_rollout(model), smd.Policy(model, s)
    batch = smd.prepare(policy, rollout, torch.arange(12.0, dtype=torch.float64) % 5, s)
    whole = gradient(smd.learner_loss(policy, batch, s)[0], model)
    parts = [gradient(smd.learner_loss(policy, batch.of_prompts(n), s)[0], model) for n in torch.arange(4).chunk(2)]
    compare("minibatches", (parts[0] + parts[1]) / 2, whole, 1e-12)


@pytest.mark.parametrize("objective", list(smd.CHOICES["objective"]))
@pytest.mark.parametrize("method", list(smd.METHODS))
def test_22_every_pair_trains(tmp_path, method, objective, capsys):
    settings = tiny(tmp_path, method=method, objective=objective, steps=2, epochs=2, minibatches=2, lam=0.0)
    if objective == "dpo" and smd.METHODS[method].weight:
        assert smd.main(argv(settings)) == 2 and "take --method dense, naive or smd" in capsys.readouterr().err
        return
    smd.train(settings, reward=lambda prompt, response, answer: sum(map(ord, response)) % 8 / 8)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    names = ["kl_sparse_dense", "overlap_p05", "ess_token", "ess_sequence", "max_weight_token", "max_weight_sequence"]
    assert len(rows) == 2 and all(math.isfinite(rows[0][name]) for name in names)
    assert rows[1]["grad_norm"] > 0 and all(0 < rows[0][name] <= 1 + 1e-9 for name in ("ess_token", "ess_sequence"))
    if method == "dense":
        assert abs(rows[0]["ess_token"] - 1) < 1e-6 and rows[0]["overlap_p05"] > 1 - 1e-5


# Lemma 23: the README speaks of what there is


def test_23_what_the_readme_names_exists():
    folder = Path(__file__).parent
    text = (folder / "README.md").read_text()
    flags = {cli.flag(f.name) for f in dataclasses.fields(Settings)} | set()
    for source in folder.glob("experiments/*.py"):
        flags |= set(re.findall(r'add_argument\("(--[a-z-]+)"', source.read_text()))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))
    assert named and named <= flags, named - flags
    modules = {"smd": smd, "kernel": kernel}
    names = set(re.findall(r"`(smd|kernel)\.(\w+)", text)) - {("smd", "py"), ("kernel", "py")}
    assert len(names) >= 10 and not [name for module, name in names if not hasattr(modules[module], name)]
    files = re.findall(r"\]\(([\w/.]+)\)", text) + [
        f"{m.replace('.', '/')}.py" for m in re.findall(r"-m (experiments\.\w+)", text)
    ]
    assert "assets/compare.png" in files and not [file for file in files if not (folder / file).exists()]
    anchors = {
        re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in re.findall(r"^#+ (.+)$", text, re.M)
    }
    assert set(re.findall(r"\]\(#([\w-]+)\)", text)) <= anchors
    for code in re.findall(r"```python\n(.*?)```", text, re.S):
        compile(code, "README.md", "exec")


def test_23_the_loss_that_the_readme_lifts_out_is_the_learners():
    text, names = (Path(__file__).parent / "README.md").read_text(), {}
    exec(next(code for code in re.findall(r"```python\n(.*?)```", text, re.S) if "def smd_loss" in code), names)
    model, s = small_model(), smd.checked(Settings(max_new=14))
    r = ragged_rollout(model)
    reward_B = torch.rand(len(r.response_BR), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    policy = smd.Policy(model, s)
    want, _ = smd.learner_loss(policy, smd.prepare(policy, r, reward_B, s), s)

    def forward(record_LBGT):
        """A model that knows nothing of shared prompts: the whole sequence, each with its own."""
        tokens_BT = torch.cat((r.prompt_NP.repeat_interleave(3, dim=0), r.response_BR), dim=1)
        return model.logits(
            model(tokens_BT, r.pad_N.repeat_interleave(3), record_LBGT)[:, r.prompt_NP.shape[1] - 1 : -1]
        )

    args = r.response_BR, r.logp_BR, r.mask_BR, r.evicted_at_LBGT, reward_B.view(4, 3)
    got = names["smd_loss"](forward, *args, longest=s.max_new)
    compare("gradient of the loss", gradient(got, model), gradient(want, model), 1e-10)
    with pytest.raises(AssertionError, match="sampler and learner"):
        names["smd_loss"](forward, r.response_BR, r.logp_BR + 0.1 * r.mask_BR, *args[2:], longest=s.max_new)


def test_23_an_experiment_draws_its_table_and_never_runs_twice(tmp_path, monkeypatch):
    from experiments import common, compare, sweep

    monkeypatch.chdir(tmp_path)
    jobs = [dict(TINY, eval_every=2, method=m, seed=n) for m in ("smd", "naive") for n in range(2)]
    with tqdm(total=8) as bar:
        done = common.run_all(tmp_path, jobs, 2, bar)
        monkeypatch.setattr(smd, "train", lambda *_: pytest.fail("a finished run was run again"))
        monkeypatch.setattr(common.ProcessPoolExecutor, "submit", lambda *_: pytest.fail("nothing was left to do"))
        assert common.run_all(tmp_path, jobs, 2, bar) == done
    by_method = {"smd": done[:2], "naive": done[2:]}
    groups = {m: [common.figures(*result) for result in results] for m, results in by_method.items()}
    assert common.table(groups, tmp_path / "table.md").count("±") >= 2
    folder = Path(done[0][0]["out"])
    with pytest.raises(cli.UsageError, match="holds a run with --eviction snapkv, not random"):
        common.run(folder, **jobs[0] | {"eviction": "random"})
    compare.draw(by_method, tmp_path / "curves.png")
    sweep.draw({("50%", method): runs for method, runs in groups.items()}, "kept", tmp_path / "sweep.png")
    assert (tmp_path / "curves.png").exists() and (tmp_path / "sweep.png").exists()
    assert (tmp_path / "table.md").read_text().count("\n") == 4
    summary = json.loads((folder / "summary.json").read_text())
    summary["before"]["dense"] += 0.5
    (folder / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(cli.UsageError, match="different base policies"), tqdm(total=4) as bar:
        common.run_all(tmp_path, jobs, 2, bar)
    rows = {0.1: [9, 9, 9, 1], 0.3: [0, 0, 0, 3], 0.2: [0, 0, 0, 2]}  # the last quarter counts
    searched = {("smd", lr): (None, [{"reward": float(r)} for r in rewards]) for lr, rewards in rows.items()}
    assert compare.best_rates(searched) == {"smd": 0.3}
    assert compare.ranks([3.0, 1.0, 3.0, 2.0]).tolist() == [1.0, -1.5, 1.0, -0.5]
    rise, fall, constant = [[1.0, 2.0, 9.0], [70.0, 80.0]], [[5.0, 4.0, 1.0], [2.0, 1.0]], [[1.0] * 3, [7.0] * 2]
    found = [compare.rank_correlation(rise, y) for y in (rise, fall, constant)]
    assert found[:2] == pytest.approx([1.0, -1.0]) and math.isnan(found[2])
    mean, half = common.mean_and_interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and math.isclose(half, 4.30 / 3**0.5)
    assert common.table({"a": [{"x": n, "y": 1.0} for n in (1.0, 2.0, 3.0)]}, tmp_path / "t.md").endswith(
        "a  2 ± 2.5  1"
    )
