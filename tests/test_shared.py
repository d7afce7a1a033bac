"""Plain and shared cache draw what they always drew, and a step computes no more than it needs."""

import hashlib
import json
from fractions import Fraction

import pytest
import torch

import smd
from harness import shared, streams, train
from kernel import NEVER
from tests.common import EOS, compare, ragged_rollout, small_model, tiny

SAMPLERS = {"plain": smd.sample, "shared": shared.sample}

# digests of tokens and shadow mask in both of the test's settings, by a cache that kept a copy of the prompt for each
# sample (commit 37aa05f)
DRAWN = dict(
    streaming=("dbad8b502c18", "7b622c6f80cc"),
    snapkv=("722e84338bd3", "1bafe303fb0f"),
    h2o=("95f18f4caaf8", "85eee5f8a646"),
    tova=("d9d0013053de", "8e803990151c"),
    knorm=("139e609516d4", "f871ea8b9812"),
    rkv=("90f742fa2dcb", "ad3d1ece1336"),
)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("policy", DRAWN)
@torch.no_grad()
def test_tokens_and_shadow_mask_are_what_they_always_were(policy, sampler):
    """Would catch a rewrite of policies, cache or random numbers that changes the runs of earlier versions."""
    long = dict(budget=Fraction(2, 5), max_new=40, seed=1, lengths=(17, 13, 30, 12))
    for settings, want in zip(({}, long), DRAWN[policy], strict=True):
        rollout = ragged_rollout(small_model(), policy, sample=SAMPLERS[sampler], **settings)
        drawn = rollout.response_BR.numpy().tobytes() + rollout.evicted_at_LBGT.numpy().tobytes()
        assert hashlib.sha256(drawn).hexdigest()[:12] == want


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("budget", [8, Fraction(1, 2)], ids=["count", "share"])
@pytest.mark.parametrize("policy", smd.POLICIES)
@torch.no_grad()
def test_a_prompt_in_a_ragged_batch_is_treated_as_if_alone(policy, budget, sampler):
    """Would catch padding, or a neighbour that decodes on after a sequence has ended, leaking into what is kept."""
    model, eviction = small_model(), smd.Eviction(policy, budget, interval=3, window=3, sinks=1)
    batch = ragged_rollout(model, policy, samples=1, budget=budget, sample=SAMPLERS[sampler])
    for n, length in enumerate(batch.length_B.tolist()):
        pad, uniform = batch.pad_N[n].item(), streams.keyed(streams.hashed(0, torch.tensor([n])), 1)
        prompt = batch.prompt_NP[n : n + 1, pad:], torch.tensor([0])
        alone = SAMPLERS[sampler](model, *prompt, 1, 14, EOS, eviction, uniform)
        assert torch.equal(alone.response_BR[0], batch.response_BR[n, :length])
        compare("log-probs", alone.logp_BR[0], batch.logp_BR[n, :length], 1e-12)
        evicted_at = batch.evicted_at_LBGT[:, n, :, pad : pad + alone.evicted_at_LBGT.shape[-1]]
        shift = pad * ((evicted_at > 0) & (evicted_at < NEVER)).int()
        assert torch.equal(evicted_at - shift, alone.evicted_at_LBGT[:, 0])


@pytest.mark.parametrize("max_new", [1, 2, 3, 40])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_response_may_be_shorter_than_an_interval(sampler, max_new):
    eviction = smd.Eviction("snapkv", 8, interval=20)
    prompts = torch.full((4, 30), 7), torch.zeros(4, dtype=torch.int64)
    rollout = SAMPLERS[sampler](small_model(), *prompts, 2, max_new, -1, eviction)
    assert rollout.response_BR.shape == (8, max_new) and rollout.evicted_at_LBGT.shape[-1] == 30 + max_new


@pytest.mark.parametrize("method, lam, masks", [("smd", 0.2, 2), ("smd", 0.0, 1), ("naive", 0.2, 1), ("dense", 0.2, 1)])
def test_a_second_pass_is_paid_for_track_2_alone(method, lam, masks):
    passes, model = [], small_model()

    def replay(model, rollout, *masks_LBGT, backend):
        passes.append(len(masks_LBGT))
        return smd.replay(model, rollout, *masks_LBGT, backend=backend)

    config, runtime = smd.Config(method, lam=lam), smd.Runtime(replay=replay)
    batch = smd.prepare(model, ragged_rollout(model), torch.zeros(12), config, smd.Runtime())
    smd.learner_loss(model, batch, batch.totals(runtime), config, runtime)
    assert passes == [masks]


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
