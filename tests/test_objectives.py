"""PPO, DPO and the reference by hand, by loops and by finite differences; minibatches, accumulation, optimizer."""

import dataclasses
import json
import math
import statistics
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import smd
from experiments.enumerated import World, distance, gradient
from harness import base, text
from harness.agent import Agent
from harness.memory import PeakBytes
from smd import Eviction
from test_smd import EOS, POLICIES, compare, loss_settings, ragged_prompts, ragged_rollout, reward_of_12, small_model
from tests.common import argv, sums_of_layers, tiny
from tiny_model import TinyModel


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


def test_21_dpo_compares_the_best_with_the_worst_sample_of_each_prompt_by_hand():
    """Three prompts; the second has no pair. Margins over the reference: best 0.5, worst -0.25; 0.1 and 0.4."""
    logp, reference = torch.tensor([-1.0, -2.0, -3.0, -1.0, -1.0, -1.0, -4.0, -5.0, -6.0]), torch.zeros(9)
    reference[:3] = torch.tensor([-1.5, -2.0, -2.75])
    reference[6:] = torch.tensor([-4.1, -5.2, -6.4])
    reward = torch.tensor([[1.0, 0.5, 0.0], [0.7, 0.7, 0.7], [3.0, 3.5, 9.0]])
    want = -(math.log(1 / (1 + math.exp(-2 * 0.75))) + math.log(1 / (1 + math.exp(-2 * 0.3)))) / 2
    assert math.isclose(smd.dpo_loss(logp, reference, reward, 2.0).item(), want, rel_tol=1e-6)


def test_22_the_part_of_some_prompts_by_hand():
    batch = smd.prepare(smd.Policy(small_model(), s := loss_settings(objective="ppo", kl_ref=0.1)), *reward_of_12(), s)
    part, rows = batch.of_prompts(torch.tensor([2, 0])), [6, 7, 8, 0, 1, 2]
    for name in ("reward_B", "old_logp_BR", "weight_BR", "advantage_BR", "value_BR", "return_BR", "ref_logp_BR"):
        assert torch.equal(getattr(part, name), getattr(batch, name)[rows]), name
    for name in ("response_BR", "logp_BR", "length_B"):
        assert torch.equal(getattr(part.rollout, name), getattr(batch.rollout, name)[rows]), name
    for name in ("prompt_NP", "pad_N"):
        assert torch.equal(getattr(part.rollout, name), getattr(batch.rollout, name)[[2, 0]]), name
    assert torch.equal(part.rollout.evicted_at_LBGT, batch.rollout.evicted_at_LBGT[:, rows])


def updated(monkeypatch, lr=0.0, step=1, **changes):
    """The prompts of each update's part in order, the model's change, its gradient before, and the row of the log."""
    model, s, parts, loss = small_model(), loss_settings(**changes), [], smd.learner_loss
    policy = smd.Policy(model, s)
    rollout, reward_B = reward_of_12()
    batch = smd.prepare(policy, rollout, reward_B, s)
    row_of = {tuple(row.tolist()): n for n, row in enumerate(rollout.prompt_NP)}
    slope, before = gradient(loss(policy, batch, s)[0], model), torch.nn.utils.parameters_to_vector(model.parameters())

    def watched(policy, part, *rest):
        parts.append([row_of[tuple(row.tolist())] for row in part.rollout.prompt_NP])
        return loss(policy, part, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(smd, "learner_loss", watched)
        row = smd.update(policy, torch.optim.SGD(model.parameters(), lr=lr), batch, s, step)
    return parts, torch.nn.utils.parameters_to_vector(model.parameters()) - before, slope, row


def test_22_each_pass_goes_through_all_prompts_in_an_order_of_its_own(monkeypatch):
    parts = updated(monkeypatch, epochs=5, minibatches=2)[0]
    passes = [parts[n] + parts[n + 1] for n in range(0, 10, 2)]
    assert len(parts) == 10 and all(sorted(order) == [0, 1, 2, 3] for order in passes)
    assert len({tuple(order) for order in passes}) > 2, "the passes are not shuffled"
    assert parts == updated(monkeypatch, epochs=5, minibatches=2)[0]
    assert parts != updated(monkeypatch, epochs=5, minibatches=2, step=2)[0]
    assert parts != updated(monkeypatch, epochs=5, minibatches=2, seed=1)[0]
    assert updated(monkeypatch, epochs=2)[0] == [[0, 1, 2, 3]] * 2, "one part is the batch as it is"


def test_22_an_update_follows_the_gradient_no_further_than_1(monkeypatch):
    for longest, clipped in ((1, True), (1000, False)):
        _, change, slope, row = updated(monkeypatch, lr=0.1, lam=0.0, max_new=longest)
        norm = slope.norm().item()
        assert (norm > 1) == clipped and math.isclose(row["grad_norm"], norm, rel_tol=1e-6)
        compare("change", change, -0.1 * slope / max(1.0, norm), 1e-6)
    # of several updates: loss, entropy and replay error of the first, means of the norm and of what was clipped
    one, two = updated(monkeypatch, lr=3.0)[3], updated(monkeypatch, lr=3.0, epochs=2)[3]
    assert all(one[name] == two[name] for name in ("loss", "entropy", "replay_error")) and one["clip_fraction"] == 0
    assert two["clip_fraction"] > 0 and two["grad_norm"] != one["grad_norm"]


def test_22_the_learning_rate_rises_and_the_optimizer_is_adamw(tmp_path, monkeypatch):
    monkeypatch.setattr(smd, "LR_WARMUP", 4)
    seen, update = [], smd.update
    monkeypatch.setattr(smd, "update", lambda *args: seen.append(dict(args[1].param_groups[0])) or update(*args))
    smd.train(tiny(tmp_path, lr=0.01, steps=6))
    assert [group["lr"] for group in seen] == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])
    assert all(group["betas"] == (0.9, 0.95) and group["weight_decay"] == 0.0 for group in seen)


def test_22_the_log_says_what_the_rewards_were(tmp_path):
    given = []

    def reward(prompt, response, answer):
        given.append(len(given) % 7 / 3)
        return given[-1]

    smd.train(tiny(tmp_path, steps=2), reward=reward)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(given) == 1 + 2 * 16
    assert [row["reward"] for row in rows] == pytest.approx([statistics.mean(given[1:17]), statistics.mean(given[17:])])


def test_22_ppo_by_loops():
    """Values, advantages and returns at rollout time; and the critic's loss after the critic has moved."""
    s = loss_settings(objective="ppo", lam=0.0)
    policy, (rollout, reward_B) = smd.Policy(small_model(), s), reward_of_12()
    generator = torch.Generator().manual_seed(1)
    torch.nn.init.normal_(policy.critic.weight, std=0.2, generator=generator)
    batch = smd.prepare(policy, rollout, reward_B, s)

    def values():
        (hidden_XC,) = smd.replay(policy.model, rollout, rollout.evicted_at_LBGT)
        of_tokens = iter((hidden_XC @ policy.critic.weight[0] + policy.critic.bias).tolist())
        return [[next(of_tokens) for _ in range(length)] for length in rollout.length_B.tolist()]

    old, advantages = values(), []
    for value, reward in zip(old, reward_B.tolist(), strict=True):
        later, running, advantage = 0.0, 0.0, []
        for t in reversed(range(len(value))):
            delta = (reward if t == len(value) - 1 else 0.0) + later - value[t]
            running = delta + 0.95 * running
            later = value[t]
            advantage.insert(0, running)
        advantages.append(advantage)
    flat = [a for advantage in advantages for a in advantage]
    mean, std = statistics.mean(flat), statistics.pstdev(flat)
    for b, (value, advantage) in enumerate(zip(old, advantages, strict=True)):
        R, as_tensor = len(value), partial(torch.tensor, dtype=torch.float64)
        compare("values", batch.value_BR[b, :R], as_tensor(value), 1e-12)
        compare(
            "returns", batch.return_BR[b, :R], as_tensor([a + v for a, v in zip(advantage, value, strict=True)]), 1e-12
        )
        compare("advantages", batch.advantage_BR[b, :R], as_tensor([(a - mean) / std for a in advantage]), 1e-5)

    with torch.no_grad():
        policy.critic.bias += 0.3  # beyond the clip of 0.2
    losses = []
    for now, then, advantage in zip(values(), old, advantages, strict=True):
        for new, before, a in zip(now, then, advantage, strict=True):
            near = min(max(new, before - 0.2), before + 0.2)
            losses.append(0.5 * max((new - a - before) ** 2, (near - a - before) ** 2))
    with_critic = smd.learner_loss(policy, batch, s)[0]
    without = smd.learner_loss(smd.Policy(policy.model, dataclasses.replace(s, objective="grpo")), batch, s)[0]
    assert math.isclose((with_critic - without).item(), 0.5 * statistics.mean(losses), rel_tol=1e-9)


@pytest.mark.parametrize("method", ["naive", "smd"])
def test_22_the_logits_of_all_tokens_are_never_there_at_once(method, monkeypatch):
    """In 32 parts the peak stays below one copy of them; and in one part nothing else comes out."""
    assert smd.LOGITS <= 2**24, "a part of the default size is not small"
    model = small_model(torch.float32, vocab=20_000, width=16)
    rollout = ragged_rollout(model, samples=4, max_new=20)
    size = int(rollout.length_B.sum()) * 20_000 * 4
    s = loss_settings(method=method, lam=0.5)
    policy = smd.Policy(model, s)
    found = {}
    for parts in (32, 1):
        monkeypatch.setattr(smd, "LOGITS", size // 4 // parts)  # in numbers, not in bytes
        with PeakBytes() as peak:
            batch = smd.prepare(policy, rollout, torch.arange(16.0) % 3, s)
            smd.diagnose(model, rollout, None)
            loss, row = smd.learner_loss(policy, batch, s)
            loss.backward()
        slope = torch.cat([p.grad.flatten() for p in model.parameters()])
        model.zero_grad()
        found[parts] = loss.item(), row["entropy"], slope
        if parts == 32:
            assert peak.peak < size, f"{peak.peak / size:.2f} times the logits"
        else:
            assert peak.peak > 1.5 * size, "control: in one part they are"
    for n in range(2):
        assert math.isclose(found[32][n], found[1][n], rel_tol=1e-5)
    compare("gradient", found[32][2], found[1][2], 1e-5)


@torch.no_grad()
def test_22_no_part_is_much_smaller_than_another(monkeypatch):
    """Would catch a last part of one row, whose logits a library may sum in another order than the sampler's."""
    model = small_model()
    rollout = ragged_rollout(model)
    tokens = int(rollout.length_B.sum())
    hidden_XC = smd.replay(model, rollout, rollout.evicted_at_LBGT)[0]
    sizes = []
    monkeypatch.setattr(smd, "LOGITS", 20 * (tokens - 1) // 2)  # two parts of this size would leave one token over
    smd.by_parts(lambda token_x, logp_xV: sizes.append(len(token_x)) or (token_x,), model, rollout, hidden_XC)
    assert sum(sizes) == tokens and len(sizes) == 3 and max(sizes) - min(sizes) <= 1, sizes


@torch.no_grad()
def test_22_log_probs_and_sums_of_a_bfloat16_model_are_float32(monkeypatch):
    """And those of a float32 model under autocast. Would catch log-probs off by 0.03, and sums that stall at 256."""
    sums = sums_of_layers(monkeypatch)
    prompts = text.pad_left([[1 + i * i % 17 for i in range(600)]], EOS, "cpu")
    for model, automatic in ((small_model(torch.bfloat16), False), (small_model(torch.float32), True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=automatic):
            for policy in POLICIES:
                eviction = Eviction(policy, 700 if policy == "h2o" else 64)
                rollout = smd.sample(model, *prompts, 2, 6, EOS, eviction)
                s = loss_settings(objective="ppo")
                batch = smd.prepare(smd.Policy(model, s), rollout, torch.arange(2.0), s)
                for x in (rollout.logp_BR, batch.value_BR, batch.weight_BR, batch.advantage_BR):
                    assert x.dtype == torch.float32
                (hidden_XC,) = smd.replay(model, rollout, rollout.evicted_at_LBGT)
                logits_XV, tokens_X = model.logits(hidden_XC), rollout.response_BR[rollout.mask_BR]
                exact = logits_XV.double().log_softmax(-1).gather(-1, tokens_X[:, None])[:, 0]
                compare(policy, smd.response_logp(model, rollout, hidden_XC)[rollout.mask_BR], exact.float(), 1e-5)
                compare(f"{policy}, replay", rollout.logp_BR[rollout.mask_BR], exact.float(), 0.05)
                if policy == "h2o":
                    received = torch.stack(sums[-2:])
                    assert received.dtype == torch.float32
                    # each query hands out 1, in each of the two heads that share a kv head
                    fed = 600 + rollout.response_BR.shape[1] - 1
                    compare("sums", received.sum(dim=-1), torch.full((2, 2, 2), 2.0 * fed), 1e-2)
        with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16, enabled=automatic):
            loss, _ = smd.learner_loss(smd.Policy(model, s), batch, s)
        assert loss.dtype == torch.float32 and gradient(loss, model).isfinite().all()


@pytest.mark.parametrize("automatic", [False, True])
def test_22_every_update_of_a_bfloat16_model_goes_by_the_weights_of_the_last(automatic):
    """Would catch what autocast remembers of them: with that memory turned off, the same comes out."""
    rollout, reward_B = reward_of_12()
    rollout = dataclasses.replace(rollout, logp_BR=rollout.logp_BR.float())
    s, loss_of = loss_settings(objective="ppo", epochs=2), smd.learner_loss
    entropies = []
    for remembers in (True, False):
        model = small_model(torch.float32 if automatic else torch.bfloat16)
        policy = smd.Policy(model, s)
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.3)
        losses = []
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=automatic, cache_enabled=remembers)
        with autocast, pytest.MonkeyPatch.context() as patch:
            patch.setattr(smd, "learner_loss", lambda *args, losses=losses: losses.append(loss_of(*args)) or losses[-1])
            smd.update(policy, optimizer, smd.prepare(policy, rollout, reward_B.float(), s), s, step=1)
        entropies.append([row["entropy"] for _, row in losses])
    assert len(set(entropies[0])) == 2, "the updates change nothing"
    # gradients of a weight add up in bfloat16 or, where each use of it is cast anew, in float32
    assert entropies[0] == pytest.approx(entropies[1], abs=1e-4)


@pytest.mark.parametrize("objective", smd.CHOICES["objective"])
@pytest.mark.parametrize("method", list(smd.METHODS))
def test_22_parts_add_up_to_the_whole(method, objective):
    """Would catch a mean over a part that counts as much as one over the whole, weights that a part makes anew, or a
    tensor at the seam between prompts and responses whose gradient is lost or counted twice.

    Four prompts, of which one has no pair of different rewards, in 1, 2, 3 and 4 parts of unequal lengths.
    """
    model, (rollout, reward_B) = small_model(), reward_of_12()
    reward_B[:3] = 1.0
    s = loss_settings(method=method, objective=objective, kl_ref=0.1)
    policy = smd.Policy(model, s)
    if policy.critic is not None:
        torch.nn.init.normal_(policy.critic.weight)
    batch = smd.prepare(policy, rollout, reward_B, s)
    with torch.no_grad():  # away from where it sampled: the ratio is not 1, the distance to the reference not 0
        for p in model.parameters():
            p.mul_(1.02)
    found = []
    for accumulate in (1, 2, 3, 4):
        policy.zero_grad()
        row = smd.gradient(policy, batch, dataclasses.replace(s, accumulate=accumulate))
        slope = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
        found.append((row, slope))
    whole, slope = found[0]
    policy.zero_grad()
    loss, _ = smd.learner_loss(policy, batch, s)
    loss.backward()  # in a single pass
    single = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    assert whole["loss"] == pytest.approx(loss.item(), rel=1e-12)
    assert (single - slope).norm() < 1e-12 * slope.norm() and slope.norm() > 1e-3
    for row, other in found[1:]:
        assert row == pytest.approx(whole, rel=1e-9)
        assert (other - slope).norm() < 1e-9 * slope.norm()


@pytest.mark.parametrize("objective", smd.CHOICES["objective"])
def test_22_responses_of_one_token_are_learned_from(objective):
    """They have no rows behind their prompts, and what predicts them was seen by every learner alike."""
    model, found = small_model(), []
    eviction = Eviction("snapkv", 8, interval=3, window=3)
    rollout = smd.sample(model, *ragged_prompts(), 3, 1, -1, eviction)
    for method in ("smd", "naive"):
        s = loss_settings(method=method, objective=objective, kl_ref=0.1, max_new=1)
        policy = smd.Policy(model, s)
        batch = smd.prepare(policy, rollout, torch.arange(12.0, dtype=torch.float64) % 5, s)
        model.zero_grad()
        smd.gradient(policy, batch, s)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    compare("one token", found[0], found[1], 1e-12)
    assert found[0].norm() > 1e-3


def test_22_minibatches_of_all_prompts_are_the_batch():
    """The mean over parts of a gradient that is a sum over prompts, before the first update."""
    model, s = small_model(), loss_settings(method="smd", lam=0.0)
    rollout, policy = ragged_rollout(model), smd.Policy(model, s)
    batch = smd.prepare(policy, rollout, torch.arange(12.0, dtype=torch.float64) % 5, s)
    whole = gradient(smd.learner_loss(policy, batch, s)[0], model)
    parts = [gradient(smd.learner_loss(policy, batch.of_prompts(n), s)[0], model) for n in torch.arange(4).chunk(2)]
    compare("minibatches", (parts[0] + parts[1]) / 2, whole, 1e-12)


class OnlyWhereItIsSaid(TorchDispatchMode):
    """Fails where anything is made on the default device, if that is "meta"."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, made)):
            assert not (isinstance(x, torch.Tensor) and x.is_meta), f"{func} has to do with a tensor of no device"
        return made


def only_where_it_is_said(f):
    def run(*args):
        with torch.device("meta"), OnlyWhereItIsSaid():
            return f(*args)

    return run


@pytest.mark.parametrize("objective", list(smd.CHOICES["objective"]))
@pytest.mark.parametrize("method", list(smd.METHODS))
def test_22_every_pair_trains(tmp_path, method, objective, capsys, monkeypatch):
    """And never on the default device, which on a CUDA machine is the CPU, and refuses what lies on CUDA."""
    plan = dict(warmup_steps=0, steps=2, epochs=2, minibatches=2, kl_ref=0.1)
    settings = tiny(tmp_path, method=method, objective=objective, **plan)
    if objective == "dpo" and smd.METHODS[method].weight:
        assert smd.main(argv(settings)) == 2 and "take --method dense, naive or smd" in capsys.readouterr().err
        return
    for of, name in ((smd, "train_step"), (Agent, "evaluate")):
        monkeypatch.setattr(of, name, only_where_it_is_said(getattr(of, name)))
    smd.train(settings, reward=lambda prompt, response, answer: sum(map(ord, response)) % 8 / 8)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    names = ["kl_sparse_dense", "overlap_p05", "ess_token", "ess_sequence", "max_weight_token", "max_weight_sequence"]
    assert len(rows) == 2 and all(math.isfinite(rows[0][name]) for name in names)
    assert rows[1]["grad_norm"] > 0 and all(0 < rows[0][name] <= 1 + 1e-9 for name in ("ess_token", "ess_sequence"))
    if method == "dense":
        assert abs(rows[0]["ess_token"] - 1) < 1e-6 and rows[0]["overlap_p05"] > 1 - 1e-5


def test_26_nothing_is_made_on_the_default_device(tmp_path):
    """Of a whole training step lemma 22 shows it, with every method and objective; here with every policy."""
    model, prompts = small_model(torch.float32), ragged_prompts()
    for policy in POLICIES:
        eviction = Eviction(policy, 8, interval=3, window=3, sinks=1)
        only_where_it_is_said(smd.sample)(model, *prompts, 3, 9, EOS, eviction)
    warm_up = base.WarmUp(smd.agent_for(smd.checked(tiny(tmp_path))))
    warm_up.learn(*only_where_it_is_said(warm_up.loss)(None, 0))
    with pytest.raises(AssertionError, match="no device"):
        only_where_it_is_said(torch.zeros)(2)
