"""Eviction policies, on cases small enough to work out by hand."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

import smd
from harness import shared, streams, text
from kernel import NEVER, shadow_attention
from smd import Eviction
from tests.common import EOS, POLICIES, compare, ragged_prompts, ragged_rollout, small_model


@torch.no_grad()
def test_random_keeps_every_key_equally_often_and_each_head_chooses_for_itself():
    """At five standard deviations: 600 prompts of 12, of which 6 stay: the sink, the last two, and 3 of 9."""
    model, tokens = small_model(), torch.randint(EOS, (1, 12)).expand(600, -1)
    eviction = Eviction("random", 6, interval=1, window=2, sinks=1)
    # the second response token is what the first one is a query for
    args = model, tokens, torch.zeros(600).long(), 1, 2, -1, eviction, streams.keyed(torch.arange(600), 1)
    rollout, again = shared.sample(*args), shared.sample(*args)
    assert torch.equal(again.evicted_at_LBGT, rollout.evicted_at_LBGT), "the choice depends on more than the key"
    kept_LBGT = rollout.evicted_at_LBGT[..., :12] > 12
    assert kept_LBGT[..., [0, 10, 11]].all() and (kept_LBGT.sum(dim=-1) == 6).all()
    share = kept_LBGT[..., 1:10].double().mean(dim=1)  # of each layer, head and key
    assert (share - 1 / 3).abs().max() < 5 * math.sqrt(1 / 3 * 2 / 3 / 600)
    for pair in itertools.combinations(kept_LBGT[..., 1:10].transpose(1, 2).flatten(0, 1), 2):
        both = (pair[0] & pair[1]).double().mean()
        assert abs(both - 1 / 9) < 5 * math.sqrt(1 / 9 * 8 / 9 / 5400), "two heads do not choose independently"


@torch.no_grad()
def test_ties_of_knorm_do_not_depend_on_the_precision():
    """Prompts repeat their tokens, so keys of the first layer have norms that are equal but for rounding."""
    double = small_model()
    single = small_model().float()
    prompts = ragged_prompts([40] * 50)
    eviction = Eviction("knorm", 12, interval=1)
    uniform = streams.keyed(torch.arange(50), 1)
    rollouts = [shared.sample(m, *prompts, 1, 4, -1, eviction, uniform) for m in (double, single)]
    stay_NGP = rollouts[0].evicted_at_LBGT[0, ..., :40] > 40
    assert torch.equal(stay_NGP, rollouts[1].evicted_at_LBGT[0, ..., :40] > 40)
    token = prompts[0][:, None].expand(-1, 2, -1)
    for n, g in itertools.product(range(50), range(2)):
        stays = stay_NGP[n, g]
        for value in token[n, g][~stays].unique():
            same = (token[n, g] == value).nonzero().flatten()
            assert stays[same].int().diff().max() <= 0 if len(same) > 1 else True, "of a tie a later key stayed"


@pytest.mark.parametrize(
    "percent, length, kept",
    [(30, 100, 30), (7, 100, 7), (7, 101, 8), (50, 17, 9), (100, 9, 9), (Fraction(1, 10), 200, 1)],
)
def test_a_share_of_the_prompt_is_exact(percent, length, kept):
    """In floating point, 7 % of 100 tokens are more than 7."""
    share = Fraction(percent) / 100
    assert Eviction("knorm", share).budget_for(torch.tensor([length, 1000])).tolist() == [kept, 10 * percent]
    assert Eviction("knorm", 5).budget_for(torch.tensor([length, 1000])).tolist() == [5, 5]


def layer_of(k=None, pad=0, K=8, policy="streaming", q=None, received=None, keep=4, key=0, **eviction):
    """One sequence, one kv head with as many query heads as q has, K keys in columns 0 to K - 1."""
    k = torch.zeros(1, 1, K, 2, dtype=torch.float64) if k is None else torch.tensor(k, dtype=torch.float64)[None, None]
    q = torch.zeros(1, 1, 0, 2, dtype=torch.float64) if q is None else torch.tensor(q, dtype=torch.float64)[None]
    K, column = k.shape[2], torch.arange(k.shape[2])[None, None]
    received = None if received is None else torch.tensor([[received]], dtype=torch.float64)
    uniform = streams.keyed(torch.tensor([key]), 1)
    rows = torch.tensor([pad]), torch.tensor([keep]), torch.tensor([0])
    keys = k, k, column, column >= pad, torch.full((1, 1, K), NEVER)
    return smd.LayerCache(Eviction(policy, keep, **eviction), uniform, 0, K, K, *rows, *keys, q, received)


def kept(layer) -> list[int]:
    evicted_BGK, valid = smd.eviction_mask(layer)
    assert valid
    return layer.column_BGK[layer.live_BGK & ~evicted_BGK].tolist()


def test_streaming_keeps_sinks_and_the_latest():
    assert kept(layer_of(policy="streaming", sinks=2, keep=5)) == [0, 1, 5, 6, 7]
    assert kept(layer_of(policy="streaming", sinks=0, keep=3)) == [5, 6, 7]
    assert kept(layer_of(policy="streaming", sinks=2, keep=5, pad=2)) == [2, 3, 5, 6, 7]


def test_knorm_keeps_the_shortest_keys():
    assert kept(layer_of([[3, 4], [0, 1], [2, 0], [0, 9], [1, 1], [7, 7]], policy="knorm", keep=3)) == [1, 2, 4]


def test_h2o_splits_the_budget_between_the_latest_and_the_most_attended():
    received = [0.1, 0.9, 0.2, 0.8, 0.7, 0.1, 0.0, 0.0]
    assert kept(layer_of(policy="h2o", received=received, keep=4)) == [1, 3, 6, 7]
    assert kept(layer_of(policy="h2o", received=received, keep=5)) == [1, 3, 5, 6, 7]  # the odd one to the latest
    assert kept(layer_of(policy="h2o", received=received, keep=1)) == [7]


@pytest.mark.parametrize("cache_class", [smd.Cache, shared.SharedCache])
@torch.no_grad()
def test_the_attention_that_a_key_received_adds_up_over_prompt_and_response(cache_class):
    """Would catch sums that restart after the prompt, mix up heads, or miss a chunk of queries."""
    caches = []

    def make_cache(*args):
        caches.append(cache_class(*args))
        return caches[0]

    model, P = small_model(), 50
    assert 3 * shared.QUERIES_PER_SCORE["cpu"] < P
    prompts = text.pad_left([[1 + i * i % 17 for i in range(P)]], EOS, "cpu")
    rollout = smd.sample(model, *prompts, 2, 6, -1, Eviction("h2o", P + 10), make_cache=make_cache)
    tokens = torch.cat((rollout.prompt_NP.expand(2, -1), rollout.response_BR[:, :-1]), dim=1)
    T, received = tokens.shape[1], []
    position = torch.arange(T).expand(2, -1)
    never = torch.full((2, 2, T), NEVER, dtype=torch.int32)

    def attend(_, q, k, v):
        score = (q @ k.repeat_interleave(2, dim=1).transpose(-1, -2)) / math.sqrt(q.shape[-1])
        weight = score.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).softmax(dim=-1)
        received.append(weight.sum(dim=2).unflatten(1, (2, 2)).sum(dim=2))  # over queries and the heads of a group
        return shadow_attention(q, k, v, never)

    model.extend(model.embed_tokens(tokens), position, attend)
    for layer, want in zip(caches[0].layers, received, strict=True):
        compare("attention", layer.received_BGK[..., :T], want, 1e-10)  # slots stand in the order of columns


def test_tova_follows_the_last_query_and_keeps_the_last_key():
    k = [[2, 0], [0, 0], [1, 0], [0, 2], [0, 0], [-1, -1]]
    # head 0 looks for the first component, head 1 for the second: their mean favours keys 0 and 3
    layer = layer_of(k, policy="tova", q=[[[4, 0]], [[0, 4]]], keep=3)
    assert kept(layer) == [0, 3, 5]
    weight = (torch.tensor([[2, 0, 1, 0, 0, -1], [0, 0, 0, 2, 0, -1]], dtype=torch.float64) * 4 / 2**0.5).softmax(-1)
    compare("tova score", smd.tova(layer)[0, 0, :-1], weight.mean(0)[:-1], 1e-15)


def test_snapkv_pools_what_the_window_attends_to():
    k = [[0, 0], [0, 0], [0, 0], [1, 0], [0, 0], [0, 0], [0, 0], [0, 0], [0, 0], [0, 0]]
    layer = layer_of(k, policy="snapkv", q=[[[4, 0], [4, 0]]], keep=7, window=2, sinks=1)
    # key 3 lifts its neighbours 1, 2, 4 and 5, but what is beyond the edge counts as zero in the mean around 1
    assert kept(layer) == [0, 2, 3, 4, 5, 8, 9]
    hot = math.exp(4 / 2**0.5)
    rows = [[(hot if j == 3 else 1.0) / (hot + last) for j in range(8)] for last in (9, 8)]  # query 9 sees ten keys
    mean = [(a + b) / 2 for a, b in zip(*rows, strict=True)] + [0.0, 0.0]
    pooled = [sum(mean[max(0, j - 2) : j + 3]) / 5 for j in range(8)]
    compare("snapkv score", smd.snapkv(layer)[0, 0, 1:8], torch.tensor(pooled[1:], dtype=torch.float64), 1e-15)


def test_rkv_drops_the_older_of_two_like_keys():
    """Importance is equal throughout (the query is zero), so redundancy alone decides."""
    k = [[1, 0], [0, 1], [1, 0.01], [-1, 0], [1, 0.02], [0, -1]]
    layer = layer_of(k, policy="rkv", q=[[[0, 0]]], keep=5, window=1)
    # 0, 2 and 4 are alike, and for each the last of the other two is forgiven: of columns 0, 2, 4 only 4 (by 0 and 2)
    # and 2 (by 4) are; column 0 keeps both counts against it
    assert kept(layer) == [1, 2, 3, 4, 5]
    unit = F.normalize(layer.k_BGKD[0, 0], dim=-1)
    cosine = (unit @ unit.T).fill_diagonal_(0)
    for row in range(6):
        above = [j for j in range(6) if cosine[row, j] > 0.5]
        if above:
            cosine[row, above[-1]] = 0
    score = 0.07 * torch.full((6,), 0.2, dtype=torch.float64) - 0.93 * cosine.mean(0).softmax(0)
    compare("rkv score", smd.rkv(layer)[0, 0, :5], score[:5], 1e-15)


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "random"])
def test_autocast_does_not_change_the_choice(policy, monkeypatch):
    """Keys in bfloat16 are chosen as the same keys in float32. Would catch scores in bfloat16, in which many tie."""
    # in float64, the type on a CPU, autocast does nothing
    monkeypatch.setattr(smd, "accumulation_dtype", lambda *_: torch.float32)
    g = torch.Generator().manual_seed(0)
    k, q = torch.randn(200, 1, 16, 8, generator=g).bfloat16(), torch.randn(200, 2, 3, 8, generator=g).bfloat16()
    column = torch.arange(16).expand(200, 1, -1)
    received = torch.rand(200, 1, 16, generator=g)

    def choice(k, q):
        rows = torch.zeros(200).long(), torch.full((200,), 8), torch.arange(200)
        keys = k, k, column, column >= 0, torch.full((200, 1, 16), NEVER)
        layer = smd.LayerCache(Eviction(policy, 8), smd.torch_uniform, 0, 16, 16, *rows, *keys, q, received)
        return smd.eviction_mask(layer)[0]

    with torch.autocast("cpu", torch.bfloat16):
        got = choice(k, q)
    assert torch.equal(got, choice(k.float(), q.float()))


@pytest.mark.parametrize("sample", [smd.sample, shared.sample], ids=["plain", "shared"])
def test_a_score_that_is_nan_is_an_error(sample, monkeypatch):
    """Also one that a policy returns only later, in the middle of a response."""
    for first_column in (0, 30 + 2):
        spec = smd.PolicySpec(lambda layer, first=first_column: torch.where(layer.column_BGK == first, math.nan, 0.0))
        monkeypatch.setitem(smd.POLICIES, "knorm", spec)
        with pytest.raises(FloatingPointError, match="the scores of its keys, are not finite"):
            ragged_rollout(small_model(), "knorm", max_new=8, sample=sample)
