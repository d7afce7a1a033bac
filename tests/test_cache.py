"""The cache that samples of a prompt share: what it holds, what it frees, and the bytes that it reports."""

import gc
import itertools
import subprocess
import sys

import pytest
import torch

import smd
from harness import text
from harness.store import Store
from kernel import NEVER, shadow_attention
from smd import Eviction
from test_smd import EOS, POLICIES, ROOT, ragged_rollout, small_model
from tiny_model import never_evicted


def grown(call: str) -> int:
    """Bytes by which a process of its own grows while it attends to a long prompt, forward and backward."""
    code = f"""
import resource, torch
from kernel import shadow_attention
from tiny_model import causal_attention, never_evicted
pad = torch.tensor([100])
record = never_evicted(pad, 4096).expand(-1, 3, -1)
q, k, v = (torch.randn(1, n, 4096, 64).requires_grad_() for n in (9, 3, 3))
small = [x[:, :, :200] for x in (q, k, v)]
causal_attention(*small, pad).sum().backward()  # what the first call loads
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
{call}
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return int(run.stdout) * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not say how much memory a process has had")
def test_2_the_attention_of_a_long_prompt_fits_half_a_gigabyte():
    assert grown("causal_attention(q, k, v, pad).sum().backward()") < 0.5e9
    assert grown("shadow_attention(q, k, v, record)") > 0.8e9, "control: pairs of all rows and keys in float64"


@pytest.mark.parametrize("policy", POLICIES)
def test_4_a_layer_holds_the_budget_of_each_prompt_and_the_new_tokens_of_each_sample(policy, monkeypatch):
    """Never more than N · budget + B · min(R, budget + interval) entries a head, and the bytes of storages."""
    model, held, chosen = small_model(), [], []
    add, victims = Store.add, smd.victims

    def watched(layer, *token, column):
        add(layer, *token, column)
        held.append((column - layer.kept_NGC.shape[2] + 1, layer.shared.k_XGKD.shape[2], layer.own.k_XGKD.shape[2]))

    monkeypatch.setattr(Store, "add", watched)
    monkeypatch.setattr(smd, "victims", lambda e: chosen.append(e.column_BGK.shape[2]) or victims(e))
    rollout = ragged_rollout(model, policy, budget=8, max_new=40)
    L, N, B, R, T = 2, 4, 12, rollout.response_BR.shape[1], rollout.evicted_at_LBGT.shape[-1]
    assert R > 20 and held[-1][0] == R - 1
    assert all(shared <= 8 and own <= min(R, 8 + 3, tokens + 2) for tokens, shared, own in held)
    last = held[-1]
    assert last[2] > 3 + 3, "own tokens never stay longer than an interval"
    assert set(chosen) == {30, 8 + 3}, "compressed at another time than the prompt's end or 8 + 3"
    held.clear()
    ragged_rollout(model, policy, budget=8, max_new=3)
    assert {own for _, _, own in held} == {2}, "there is room for tokens that never come"
    entry = 2 * 8 * 8 + 4  # key and value in float64, column
    least = L * 2 * (N * last[1] + B * last[2]) * entry + L * B * 2 * T * 2  # the record: 16 bits a column
    full = L * B * 2 * (T - 1) * 2 * 8 * 8
    assert rollout.full_kv_bytes == full and rollout.full_kv_bytes_shared == full - L * (B - 4) * 2 * 30 * 2 * 8 * 8
    assert least - L * B * 2 * 22 * 2 <= rollout.kv_bytes < 3 * least
    bigger = ragged_rollout(model, policy, budget=16, max_new=2).kv_bytes
    smaller = ragged_rollout(model, policy, budget=8, max_new=2).kv_bytes
    assert bigger - smaller >= N * 2 * 8 * entry, "twice the budget must show in the bytes"


def test_4_a_shared_key_leaves_when_no_sample_of_its_prompt_sees_it():
    """By hand: a prompt of 4 keys, two samples; one evicts columns 1 and 2, the other 2 and its own token."""
    k = torch.arange(4.0).view(1, 1, 4, 1)
    layer = Store(k, k + 10, torch.ones(1, 1, 4, dtype=torch.bool), None, torch.zeros(1, 1, 0, 1), count=4)
    layer.branch(S=2, R=4, room=2)
    token = torch.tensor([[[[4.0]]], [[[5.0]]]])
    layer.add(torch.zeros(2, 1, 1, 1), token, token + 10, column=4)
    assert layer.seen_BGK[:, 0].tolist() == [[True] * 5 + [False]] * 2
    slot = torch.tensor([[[1, 2, 3]], [[2, 3, 4]]])
    dies = torch.tensor([[[True, True, False]], [[True, False, True]]])
    layer.bury(slice(0, 2), slot, slot, dies, tokens=1)  # at first, slots stand in the order of columns
    layer.drop_dead(*layer.seen_at_most().tolist(), room=1)
    assert layer.shared.k_XGKD.flatten().tolist() == [0, 1, 3]
    assert layer.shared.v_XGKD.flatten().tolist() == [10, 11, 13]
    assert layer.shared.column_XGK.flatten().tolist() == [0, 1, 3]
    assert layer.filled == 1 and layer.own.k_XGKD[0, 0, 0] == 4
    assert layer.seen_BGK[:, 0].tolist() == [[True, False, True, True, False], [True, True, True, False, False]]
    assert layer.columns(slice(0, 1), slice(0, 2))[0, 0, :4].tolist() == [0, 1, 3, 4]
    record = layer.record(torch.tensor([0]), P=4)
    assert record[:, 0].tolist() == [[NEVER, 5, 5, NEVER] + [NEVER] * 4, [NEVER, NEVER, 5, NEVER, 5] + [NEVER] * 3]
    # and all of it may go
    slot, column, dies = torch.tensor([[[0, 2]]] * 2), torch.tensor([[[0, 3]]] * 2), torch.ones(2, 1, 2).bool()
    layer.bury(slice(0, 2), slot, column, dies, tokens=1)
    one, dies = torch.tensor([[[1]]]), torch.ones(1, 1, 1).bool()
    layer.bury(slice(1, 2), one, one, dies, tokens=1)
    layer.drop_dead(*layer.seen_at_most().tolist(), room=0)
    assert layer.shared.k_XGKD.shape[2] == 0 and layer.own.k_XGKD[0].flatten().tolist() == [4]


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
    for eviction, slots in ((Eviction("snapkv", 16, interval=3), 16), (None, 400)):
        gc.collect()
        largest.clear()
        smd.sample(model, *prompts, 2, 5, EOS, eviction)
        assert set(largest) == {slots}


def peak_of_trace(work) -> int:
    """Most bytes that were allocated at once while `work` ran, by the allocator's own account."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(alive, default=0)


@pytest.mark.parametrize("heads", [4, 16])
@pytest.mark.parametrize("policy", POLICIES)
def test_4_the_bytes_are_those_of_the_allocator_and_few(policy, heads):
    """The prompt's end, where they are most: the first layer of one long prompt, up to the choice of its entries."""
    P = 1024
    q, k, v = (torch.randn(1, n, P, 32, generator=torch.Generator().manual_seed(n)) for n in (heads, 4, 4))
    eviction, pad = Eviction(policy, 256, window=4), torch.tensor([0])

    def chosen() -> smd.Cache:
        cache = smd.Cache(pad, 1, P, 8, eviction, torch.arange(1))
        cache.prefill(0, q, k, v)
        return cache

    cache = chosen()
    (layer,) = cache.layers
    assert (layer.received_BGT is not None) == (policy == "h2o"), "it holds sums that nobody reads, or none"
    assert layer.q_BHWD.shape[2] == dict(snapkv=4, rkv=4, tova=1).get(policy, 0), "it holds other queries than are read"
    attention = peak_of_trace(lambda: shadow_attention(q, k, v, never_evicted(pad, P).expand(-1, 4, -1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smd, "causal_attention", lambda *_: None)
        traced, counted = peak_of_trace(chosen), chosen().memory.peak
    layer = 2 * 4 * P * 32 * 4  # keys and values of the prompt in one layer
    traced += layer  # made before, and counted by the cache
    assert abs(counted - traced) < 0.05 * traced, f"{counted} counted, {traced} allocated"
    assert attention > counted, "control: the trace sees what it should"
    # a full cache of three layers holds three times `layer`; what chooses must not need more than it saves
    assert counted < 3 * layer, f"{counted / layer:.1f} layers"


@pytest.mark.parametrize("policy", POLICIES)
def test_4_and_so_while_decoding(policy, monkeypatch):
    """Prompts that share, 13 tokens of 8 samples each, three choices, the record; but for attention itself."""

    def no_attention(q, k, v, hidden, shared):
        N, G, P, _ = shared[0].shape
        return q, q.new_zeros(()).expand(N, G, 8, 1, 1, P + k.shape[2])

    monkeypatch.setattr(smd, "masked_attention", no_attention)
    monkeypatch.setattr(smd, "causal_attention", lambda *_: None)
    generator = torch.Generator().manual_seed(0)
    kv = torch.randn(2, 2, 4, 128, 32, generator=generator)
    tokens = torch.randn(13, 3, 16, 4, 1, 32, generator=generator)
    caches = []

    def decoded() -> None:
        cache = smd.Cache(torch.tensor([0, 5]), 8, 128, 14, Eviction(policy, 16), torch.arange(2))
        caches.append(cache)
        cache.prefill(0, kv[0], *kv)
        cache.branch()
        for token in tokens:
            cache.decode(0, *token)
            cache.token_done()
        with cache.memory:
            cache.layers.pop(0).record(cache.pad_N, 128)

    traced = peak_of_trace(decoded) + 2 * kv[0].nbytes  # made before, and counted by the cache, which holds them
    counted = caches[0].memory.peak
    assert counted < 1.05 * traced, f"{counted} counted, {traced} allocated"


@pytest.mark.parametrize("max_new, held", [(5, 0), (6, 4), (9, 4)])
def test_4_queries_are_held_while_a_choice_is_to_come(max_new, held):
    """Every sample has its own: of a short answer they would be more than all its keys."""
    cache = smd.Cache(torch.tensor([0, 3]), 3, 12, max_new, Eviction("snapkv", 6, interval=5), torch.arange(2))
    for l in range(2):
        cache.prefill(l, *torch.randn(3, 2, 4, 12, 8, generator=torch.Generator().manual_seed(l)))
    cache.branch()
    assert [layer.q_BHWD.shape[2] for layer in cache.layers] == [held, held]
    for token in torch.randn(max_new - 1, 3, 6, 4, 1, 8, generator=torch.Generator().manual_seed(2)):
        for l in range(2):
            cache.decode(l, *token)
        cache.token_done()
    assert [layer.q_BHWD.shape[2] for layer in cache.layers] == [0, 0], "after the last choice"
