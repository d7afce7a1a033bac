"""The shared cache and replay equal the plain ones and earlier versions, and take little memory."""

import dataclasses
import gc
import hashlib
import json
from fractions import Fraction

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import smd
from harness import shared, streams, text, train
from harness.objectives import Policy
from kernel import NEVER, ShadowMask, shadow_attention
from smd import Eviction, LayerCache
from test_smd import gradient
from tests.common import EOS, POLICIES, compare, peak_of_trace, ragged_prompts, ragged_rollout, small_model, tiny
from tiny_model import TinyModel, causal_attention, never_evicted

PLAIN = smd.Runtime()
LONG = dict(max_new=40, seed=1, lengths=(17, 13, 30, 12))

# digests of tokens and shadow masks with a budget of 8, and of the long case with a budget of 40 %: drawn by a cache
# that kept a copy of the prompt for each sample (commit 37aa05f)
DRAWN = dict(
    streaming=("dbad8b502c18", "7b622c6f80cc"),
    snapkv=("722e84338bd3", "1bafe303fb0f"),
    h2o=("95f18f4caaf8", "85eee5f8a646"),
    tova=("d9d0013053de", "8e803990151c"),
    knorm=("139e609516d4", "f871ea8b9812"),
    rkv=("90f742fa2dcb", "ad3d1ece1336"),
)


def digest(rollout: smd.Rollout) -> str:
    drawn = rollout.response_BR.numpy().tobytes() + rollout.evicted_at_LBGT.numpy().tobytes()
    return hashlib.sha256(drawn).hexdigest()[:12]


def assert_same_draws(got: smd.Rollout, want: smd.Rollout) -> None:
    """Equal to the bit, except for the rounding of log-probs and for the stored bytes."""
    for field in set(f.name for f in dataclasses.fields(want)) - {"logp_BR", "stored_bytes"}:
        assert torch.equal(getattr(got, field), getattr(want, field)), field
    compare("log-probs", got.logp_BR, want.logp_BR, 1e-12)


@pytest.mark.parametrize("policy", POLICIES)
def test_both_caches_draw_the_same_as_ever(policy, monkeypatch):
    """Would catch a key that one cache keeps and the other evicts, in any head and step; or other random numbers."""
    model = small_model()
    for n, case in enumerate((dict(budget=8), LONG | dict(budget=Fraction(2, 5)), dict(budget=15, max_new=30, seed=1))):
        got, want = (ragged_rollout(model, policy, **case, sample=sample) for sample in (shared.sample, smd.sample))
        assert_same_draws(got, want)
        with monkeypatch.context() as patch:
            patch.setitem(shared.ELEMENTS_PER_CHUNK, "cpu", 2**11)
            patch.setitem(shared.KEY_PAIRS_PER_CHUNK, "cpu", 2**11)
            assert_same_draws(ragged_rollout(model, policy, **case), want)
        if policy in DRAWN and n < 2:
            assert digest(want) == DRAWN[policy][n]
        assert want.length_B.min() < want.length_B.max(), "no sequence ends early"
        while_decoding = (want.evicted_at_LBGT > 30) & (want.evicted_at_LBGT < NEVER)
        assert while_decoding.any() and (want.evicted_at_LBGT == 30).any(), "nothing is evicted"


EDGES = {
    "protected prompt": (dict(budget=5, sinks=2, protect="prompt"), (17, 9, 30, 12), 24),
    "prompts shorter than the window": (dict(budget=8, window=6, pool=3), (4, 3), 24),
    "budget that is never exceeded": (dict(budget=60), (17, 9, 30, 12), 24),
    "answer shorter than the interval": (dict(budget=8, interval=20), (17, 9, 30, 12), 3),
    "one token": (dict(budget=8), (17, 9), 1),
    "full cache": (None, (17, 9), 9),
}


@pytest.mark.parametrize("case", EDGES)
def test_both_caches_draw_alike_in_edge_cases(case):
    changes, lengths, max_new = EDGES[case]
    for policy in POLICIES:
        eviction = changes and Eviction(policy, **dict(interval=3, window=3, sinks=1) | changes)
        limits = 3, max_new, EOS, eviction, streams.keyed(torch.arange(len(lengths)), 3)
        got, want = (sample(small_model(), *ragged_prompts(lengths), *limits) for sample in (shared.sample, smd.sample))
        assert_same_draws(got, want)
        R = want.length_B.max().item()
        assert 1 <= R <= max_new and want.evicted_at_LBGT.shape[-1] == max(lengths) + R


@pytest.mark.parametrize("budget", [8, Fraction(1, 2)], ids=["count", "share"])
@pytest.mark.parametrize("policy", smd.POLICIES)
@torch.no_grad()
def test_a_prompt_in_a_ragged_batch_is_treated_as_if_alone(policy, budget):
    """Would catch padding, or a neighbour that decodes on after its end, that changes which keys are kept."""
    model, eviction = small_model(), smd.Eviction(policy, budget, interval=3, window=3, sinks=1)
    batch = ragged_rollout(model, policy, samples=1, budget=budget)
    for n, length in enumerate(batch.length_B.tolist()):
        pad, uniform = batch.pad_N[n].item(), streams.keyed(streams.hashed(0, torch.tensor([n])), 1)
        prompt = batch.prompt_NP[n : n + 1, pad:], torch.tensor([0])
        alone = shared.sample(model, *prompt, 1, 14, EOS, eviction, uniform)
        assert torch.equal(alone.response_BR[0], batch.response_BR[n, :length])
        compare("log-probs", alone.logp_BR[0], batch.logp_BR[n, :length], 1e-12)
        evicted_at = batch.evicted_at_LBGT[:, n, :, pad : pad + alone.evicted_at_LBGT.shape[-1]]
        shift = pad * ((evicted_at > 0) & (evicted_at < NEVER)).int()
        assert torch.equal(evicted_at - shift, alone.evicted_at_LBGT[:, 0])


def replayed_logp(model, rollout) -> torch.Tensor:
    return smd.response_logp(model, rollout, smd.replay(model, rollout, rollout.evicted_at_LBGT)[0])


@pytest.mark.parametrize("leak", ["own keys", "prompt keys"])
@torch.no_grad()
def test_a_sample_that_attends_to_keys_of_its_sibling_is_noticed(leak, monkeypatch):
    """Controls: the plain replay finds a sample that attends to its sibling's keys, or to keys that it has evicted."""
    model, real, leaked = small_model(), shared.shared_attention, []

    def leaking(q, k, v, prompt_k, prompt_v, hidden):
        C, first, second = prompt_k.shape[2], slice(None, None, 3), slice(1, None, 3)
        k, v, hidden = k.clone(), v.clone(), hidden.clone()
        if leak == "own keys":
            k[first], v[first] = k[second], v[second]
        else:
            leaked.append((hidden[first, ..., :C] & ~hidden[second, ..., :C]).any())
            hidden[first, ..., :C] &= hidden[second, ..., :C]
        return real(q, k, v, prompt_k, prompt_v, hidden)

    monkeypatch.setattr(shared, "shared_attention", leaking)
    rollout = ragged_rollout(model, max_new=24)
    error = (replayed_logp(model, rollout) - rollout.logp_BR).abs().view(4, 3, -1)
    assert error[:, 0].max() > 1e-3 and error[:, 1:].max() < 1e-10
    assert leak == "own keys" or any(leaked), "no sample evicts what its sibling keeps"


def response_case(seed=0):
    """Two prompts of 5 keys with two sequences each; the second sequence has evicted a key that the first still has."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(4, 4, 3, 2, dtype=torch.float64, generator=g)
    k, v = torch.randn(2, 4, 2, 3, 2, dtype=torch.float64, generator=g)
    of_prompts = torch.randn(2, 2, 2, 5, 2, dtype=torch.float64, generator=g)
    evicted_at = torch.randint(5, 9, (4, 2, 8), generator=g, dtype=torch.int32)
    evicted_at[..., 5:] = NEVER
    evicted_at[::2, :, 4] = NEVER
    evicted_at[1::2, :, 4] = 0
    return [x.requires_grad_() for x in (q, k, v, *of_prompts)], evicted_at


def test_all_sequences_of_a_prompt_attend_to_its_shared_keys():
    tensors, evicted_at = response_case()
    mask = ShadowMask(evicted_at[None])[0]

    def optimised(*tensors):
        return shared.response_attention(*tensors, mask, "torch")

    def plain(q, k, v, prompt_k, prompt_v):
        k, v = (torch.cat((p.repeat_interleave(2, dim=0), x), dim=2) for p, x in ((prompt_k, k), (prompt_v, v)))
        return shadow_attention(q, k, v, evicted_at, 5, "torch")

    assert torch.autograd.gradcheck(optimised, tensors)
    outs = [attend(*tensors) for attend in (optimised, plain)]
    pairs = [(out, *torch.autograd.grad(out.square().sum(), tensors)) for out in outs]
    for name, got, want in zip(("out", "q", "k", "v", "prompt k", "prompt v"), *pairs, strict=True):
        compare(name, got, want, 1e-13)
    # a change of the key that the second sequences have evicted does not reach them
    q, k, v, prompt_k, prompt_v = (x.detach() for x in tensors)
    louder = prompt_k.clone()
    louder[:, :, 4] += 10.0
    before, after = (optimised(q, k, v, x, prompt_v) for x in (prompt_k, louder))
    assert torch.equal(before[1::2], after[1::2])
    assert (before - after)[::2].abs().amax(dim=(1, 2, 3)).min() > 0.1


def test_shared_keys_are_repeated_for_the_kernels():
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors, evicted_at = response_case()
    tensors, mask = [x.detach().float().to(device) for x in tensors], ShadowMask(evicted_at[None].to(device))[0]
    compare("out", *(shared.response_attention(*tensors, mask, backend) for backend in ("triton", "torch")), 1e-5)


def learned(model, rollout, method, objective, runtime) -> tuple[torch.Tensor, torch.Tensor]:
    policy = Policy(model, objective, kl_ref=0.1)
    if objective == "ppo":
        torch.nn.init.normal_(policy.critic.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    config = smd.Config(method, policy.objective, max_new=14)
    batch = smd.make_batch(model, rollout, torch.linspace(0, 1, 12).roll(5).to(rollout.logp_BR), config, runtime)
    with torch.no_grad():  # away from the base policy: the ratio is not 1, the KL to the reference not 0
        for p in model.parameters():
            p.mul_(1.02)
    loss, _ = smd.learner_loss(model, batch, batch.totals(runtime), config, runtime)
    return loss, gradient(loss, model)


@pytest.mark.parametrize("objective", ["grpo", "ppo", "dpo"])
@pytest.mark.parametrize("method", list(smd.METHODS))
def test_loss_and_gradient_equal_the_plain_replays(method, objective):
    """Would catch a gradient that is summed over the wrong samples, or that reaches only one of them."""
    rollout = ragged_rollout(small_model())
    flipped = dataclasses.replace(rollout, response_BR=rollout.response_BR.flip(0), length_B=rollout.length_B.flip(0))
    found = []
    for drawn, runtime in ((rollout, PLAIN), (rollout, shared.RUNTIME), (flipped, shared.RUNTIME)):
        found.append(learned(small_model(), drawn, method, objective, runtime))
    (want, want_slope), (got, slope), (_, other_slope) = found
    assert abs(got - want) < 1e-12
    compare("gradient", slope, want_slope, 1e-11)
    assert (other_slope - want_slope).abs().max() > 1e-3, "control: whose sample a response is matters"


def test_only_track_2_takes_a_second_pass():
    model, passes = small_model(), []

    def replay(model, rollout, *masks_LBGT, backend):
        passes.append(len(masks_LBGT))
        return smd.replay(model, rollout, *masks_LBGT, backend=backend)

    rollout, runtime = ragged_rollout(model), smd.Runtime(replay=replay)
    for method, lam in (("smd", 0.2), ("smd", 0.0), ("naive", 0.2), ("dense", 0.2)):
        config = smd.Config(method, lam=lam)
        batch = smd.make_batch(model, rollout, torch.zeros(12), config, smd.Runtime())
        smd.learner_loss(model, batch, batch.totals(runtime), config, runtime)
    assert passes == [2, 1, 1, 1]


def test_a_prompt_is_computed_once_for_all_samples_and_masks(monkeypatch):
    passes, extend = [], TinyModel.extend
    monkeypatch.setattr(TinyModel, "extend", lambda m, x, *rest: passes.append(x.shape[:2]) or extend(m, x, *rest))
    model = small_model()
    rollout = ragged_rollout(model)
    passes.clear()
    masks = rollout.evicted_at_LBGT, rollout.never_evicted_LBGT
    got = shared.replay(model, rollout, *masks)
    assert passes == [(4, 30), (2 * 12, rollout.response_BR.shape[1] - 1)]
    for name, x, y in zip(("shadow", "dense"), got, smd.replay(model, rollout, *masks), strict=True):
        compare(name, x, y, 1e-11)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_layer_holds_the_budget_of_each_prompt_and_the_new_tokens_of_each_sample(policy, monkeypatch):
    """Never more than N · budget + B · min(R, budget + interval) keys a head."""
    held, scored = [], []
    append, eviction_mask = shared.SharedLayer.append, smd.eviction_mask

    def watched(layer, *token):
        append(layer, *token)
        held.append((layer.now - 30, layer.prompt_k_NGCD.shape[2], layer.k_BGKD.shape[2]))

    monkeypatch.setattr(shared.SharedLayer, "append", watched)
    monkeypatch.setattr(smd, "eviction_mask", lambda x: scored.append(x.column_BGK.shape[2]) or eviction_mask(x))
    R = ragged_rollout(small_model(), policy, budget=8, max_new=40).response_BR.shape[1]
    assert R > 20 and held[-1][0] == R - 1
    assert all(prompt <= 8 and own <= min(8 + 3, tokens) for tokens, prompt, own in held)
    assert held[-1][2] > 3 + 3, "own tokens never stay longer than an interval"
    assert set(scored) == {30, 8 + 3}, "keys are evicted at another time than at the prompt's end or at 8 + 3"


@pytest.mark.parametrize("policy", POLICIES)
def test_the_stored_bytes_by_hand(policy):
    L, N, B, G, H, D, budget, max_new = 2, 4, 12, 2, 4, 8, 8, 4
    rollout = ragged_rollout(small_model(), policy, budget=budget, max_new=max_new)
    assert rollout.response_BR.shape[1] == max_new
    key_and_value, column, slots = 2 * D * 8, 8, budget + 3  # of the prompt, and of own tokens until the interval ends
    stored = G * (N * budget + B * 3) * (key_and_value + column)
    stored += B * G * slots  # which slots are live
    stored += B * G * (30 + max_new) * 4  # the shadow mask
    stored += B * H * dict(snapkv=3, rkv=3, tova=1).get(policy, 0) * D * 8  # the last queries
    stored += B * G * slots * 8 * (policy == "h2o")  # the attention that each key received
    assert rollout.stored_bytes == L * stored


def test_a_prompt_key_is_deleted_when_all_samples_have_evicted_it():
    """By hand: a prompt of 4 keys, two samples; one evicts columns 1 and 2, the other 2 and its own token."""
    k, column = torch.arange(4.0).view(1, 1, 4, 1), torch.arange(4).view(1, 1, 4)
    eviction, rows = Eviction("knorm", 4), (torch.tensor([0]), torch.tensor([4]), torch.tensor([2]))
    keys = k, k + 10, column, column >= 0, torch.full((1, 1, 8), NEVER, dtype=torch.int32)
    prompt = LayerCache(eviction, smd.torch_uniform, 0, 4, 4, *rows, *keys, torch.zeros(1, 1, 0, 1))
    layer = shared.SharedLayer.of(prompt, S=2)
    token = torch.tensor([[[[4.0]]], [[[5.0]]]])
    layer.append(torch.zeros(2, 1, 1, 1), token, token + 10)
    assert layer.live_BGK[:, 0].tolist() == [[True] * 5] * 2
    layer.live_BGK[0, 0, [1, 2]] = False
    layer.live_BGK[1, 0, [2, 4]] = False
    layer.compact(3, 1)
    assert layer.prompt_k_NGCD.flatten().tolist() == [0, 1, 3]
    assert layer.prompt_v_NGCD.flatten().tolist() == [10, 11, 13]
    assert layer.prompt_column_NGC.flatten().tolist() == [0, 1, 3]
    assert layer.k_BGKD[0, 0, 0] == 4 and layer.column_BGK[0, 0, 0] == 4
    assert layer.live_BGK[:, 0].tolist() == [[True, False, True, True], [True, True, True, False]]
    # all keys of a prompt may be deleted
    layer.live_BGK[..., :3] = False
    layer.compact(0, 1)
    assert layer.prompt_k_NGCD.shape[2] == 0 and layer.k_BGKD[0].flatten().tolist() == [4]


def test_no_full_layer_of_keys_survives_the_prefill(monkeypatch):
    """Would catch an eviction that only masks: while decoding, no tensor of keys is as long as the prompt."""
    model, prompts = small_model(), text.pad_left([[1 + i % 17 for i in range(400)]] * 2, EOS, "cpu")
    largest, decode = [], shared.SharedCache.decode

    def watched(cache, l, *args):
        if l == 1:
            keys = (x for x in gc.get_objects() if type(x) is torch.Tensor and x.ndim >= 4 and x.shape[-1] == 8)
            largest.append(max(x.shape[-2] for x in keys))
        return decode(cache, l, *args)

    monkeypatch.setattr(shared.SharedCache, "decode", watched)
    # the full cache is the control, in which the prompt's keys are found
    for eviction, slots in ((Eviction("snapkv", 16, interval=3), 16), (None, 400)):
        gc.collect()
        largest.clear()
        shared.sample(model, *prompts, 2, 3, -1, eviction)
        assert set(largest) == {slots}


def test_the_attention_of_a_long_prompt_makes_no_matrix_of_all_pairs():
    T, pad = 1024, torch.tensor([100])
    q, k, v = (torch.randn(1, n, T, 64).requires_grad_() for n in (9, 3, 3))
    assert peak_of_trace(lambda: causal_attention(q, k, v, pad).sum().backward()) < 10 * q.nbytes
    never = never_evicted(pad, T).expand(-1, 3, -1)
    all_pairs = peak_of_trace(lambda: shadow_attention(q, k, v, never))
    assert all_pairs > 9 * T * T * 8, "control: attention weights of all pairs in float64"


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"rkv"}))  # rkv compares all pairs of keys
def test_choosing_keys_takes_little_memory(policy, monkeypatch):
    """Memory peaks when the prompt ends: here in the first layer of one long prompt."""
    monkeypatch.setattr(smd, "causal_attention", lambda *_: None)
    q, k, v = (torch.randn(1, n, 1024, 32, generator=torch.Generator().manual_seed(n)) for n in (16, 4, 4))
    layers = []

    def prefill(cache_class) -> None:
        cache = cache_class(torch.tensor([0]), 1, 1024, 8, Eviction(policy, 256, window=4), smd.torch_uniform)
        cache.prefill(0, q, k, v)
        layers.append(cache.layers[0])

    assert peak_of_trace(lambda: prefill(shared.SharedCache)) < 3 * q.nbytes
    layer = layers[0]
    assert (layer.received_BGK is not None) == (policy == "h2o"), "only h2o reads sums of attention"
    assert layer.q_BHWD.shape[2] == dict(snapkv=4, tova=1).get(policy, 0), "only queries that are read are stored"
    if policy == "h2o":
        assert peak_of_trace(lambda: prefill(smd.Cache)) > 16 * 1024**2 * 8, "control: weights of all pairs"


@pytest.mark.parametrize("max_new, held", [(5, 0), (6, 4), (9, 4)])
def test_queries_are_stored_until_the_last_compression(max_new, held):
    """Would catch queries of every sample beside a short answer: they would be larger than all its keys."""
    eviction = Eviction("snapkv", 6, interval=5)
    cache = shared.SharedCache(torch.tensor([0, 3]), 3, 12, max_new, eviction, smd.torch_uniform)
    for l in range(2):
        cache.prefill(l, *torch.randn(3, 2, 4, 12, 8, generator=torch.Generator().manual_seed(l)))
    cache.branch()
    assert [layer.q_BHWD.shape[2] for layer in cache.layers] == [held, held]
    for token in torch.randn(max_new - 1, 3, 6, 4, 1, 8, generator=torch.Generator().manual_seed(2)):
        for l in range(2):
            cache.decode(l, *token)
        cache.token_done()
    assert [layer.q_BHWD.shape[2] for layer in cache.layers] == [0, 0], "after the last compression"


class Waits(TorchDispatchMode):
    """Counts operations that synchronise CUDA: Python reads a number, or values determine a shape."""

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
def test_a_rollout_synchronises_once_in_several_tokens(policy, monkeypatch):
    """Would catch a synchronisation in every token, or in every layer that evicts."""
    monkeypatch.setitem(smd.EOS_CHECK_EVERY, "cpu", 4)

    def waits(layers: int, max_new: int) -> int:
        model = small_model(layers=layers)
        eviction = Eviction(policy, 8, interval=8, window=3, sinks=1)
        uniform = streams.keyed(torch.arange(4), 3)
        with monkeypatch.context() as patch, Waits(patch) as mode:
            rollout = shared.sample(model, *ragged_prompts(), 3, max_new, -1, eviction, uniform)
        assert rollout.response_BR.shape == (12, max_new)
        return mode.count

    few, many = waits(2, 8), waits(2, 16)
    assert waits(3, 16) == many, "more layers synchronise more often"
    # of 8 tokens, every fourth checks whether all have ended, and every eighth how many keys are left
    assert many - few == 8 // 4 + 8 // 8
    assert few < 20


def test_a_run_with_the_plain_versions_is_the_same_run(tmp_path):
    for plain in (False, True):
        train.train(tiny(tmp_path, str(plain), steps=2), plain=plain)
    shared_rows, plain_rows = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("False", "True")
    )
    for name in ("reward", "accuracy", "visible_share"):
        assert [row[name] for row in shared_rows] == [row[name] for row in plain_rows]
    assert [row["loss"] for row in shared_rows] == pytest.approx([row["loss"] for row in plain_rows], abs=1e-5)
    assert all(
        row["stored_kv_bytes"] > other["stored_kv_bytes"] for row, other in zip(plain_rows, shared_rows, strict=True)
    )
