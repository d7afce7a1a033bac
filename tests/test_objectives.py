"""PPO, DPO and the reference by hand, by loops and by finite differences; updates, accumulation and the optimizer."""

import copy
import dataclasses
import itertools
import math
import statistics
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import smd
from harness import base, objectives, settings, shared, streams, text, train
from harness.agent import Agent
from harness.objectives import Policy
from harness.settings import Settings
from smd import Eviction
from test_smd import World, distance, gradient
from tests.common import EOS, POLICIES, compare, peak_of_trace, ragged_prompts, ragged_rollout, small_model, tiny

RUNTIME = shared.RUNTIME
OBJECTIVES = settings.OBJECTIVES
# each method with GRPO, and each objective with both masks that a learner may have
PAIRS = [(method, "grpo") for method in smd.METHODS]
PAIRS += itertools.product(("smd", "naive"), sorted(set(OBJECTIVES) - {"grpo"}))


def config_of(policy: Policy, method="smd", lam=0.1, max_new=14) -> smd.Config:
    return smd.Config(method, policy.objective, lam=lam, max_new=max_new)


def loss_of(policy: Policy, batch: smd.Batch, config: smd.Config) -> torch.Tensor:
    return smd.learner_loss(policy.model, batch, batch.totals(RUNTIME), config, RUNTIME)[0]


def replaced(batch: smd.Batch, **extra) -> smd.Batch:
    return dataclasses.replace(batch, extra=batch.extra | extra)


def prepared(objective="grpo", method="smd", lam=0.1, max_new=14, kl_ref=0.0) -> tuple[Policy, smd.Batch, smd.Config]:
    """4 prompts x 3 samples, with fixed rewards."""
    policy = Policy(small_model(), objective, kl_ref)
    config = config_of(policy, method, lam, max_new)
    reward_B = torch.arange(12.0, dtype=torch.float64) % 5
    return policy, smd.make_batch(policy.model, ragged_rollout(policy.model), reward_B, config, RUNTIME), config


def gradient_of(policy: Policy) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


def test_k3_pulls_along_the_kl_from_the_reference(world):
    other, at = World(seed=1), world.rollout.evicted_at_LBGT
    ref = world.logits(at, other.model).log_softmax(dim=-1).detach().view(64, 3, 4)
    logits = world.logits(at).log_softmax(dim=-1).view(64, 3, 4)
    token = world.responses[..., None]
    pairs = [x.gather(-1, token)[..., 0] for x in (logits, ref)]
    everywhere = torch.ones(1, 3, dtype=torch.bool)
    expected = sum(p * objectives.k3(*(x[n : n + 1] for x in pairs), everywhere, 3) for n, p in enumerate(world.p))
    forward = (world.p[:, None, None] * ref.exp() * (ref - logits)).sum() / 3
    backward = (world.p[:, None, None] * logits.exp() * (logits - ref)).sum() / 3
    got, right, wrong = (
        torch.autograd.grad(x, list(world.model.parameters()), retain_graph=True) for x in (expected, forward, backward)
    )
    got, right, wrong = (torch.cat([g.flatten() for g in x]) for x in (got, right, wrong))
    assert distance(got, right) < 1e-12 and distance(got, wrong) > 0.1


def test_ppo_with_both_lambdas_1_is_reinforce(world, monkeypatch):
    monkeypatch.setattr(objectives, "VALUE_COEF", 0.0)
    want = gradient(-(world.p * world.reward)[:, None].mul(world.logp(dense=False)).sum(), world.model)
    for gae_lambda, same in ((1.0, True), (0.95, False)):
        monkeypatch.setattr(objectives, "GAE_LAMBDA", gae_lambda)
        policy = Policy(world.model, "ppo")  # the critic is zero at first
        config = config_of(policy, lam=0.0, max_new=3)
        batch = smd.make_batch(world.model, world.rollout, world.reward, config, RUNTIME)
        # advantages before they are normalised: returns above a value of zero; each response as often as it is drawn
        weighted = batch.extra["return_BR"] * world.p[:, None] * world.responses.numel()
        got = gradient(loss_of(policy, replaced(batch, advantage_BR=weighted), config), world.model)
        assert (distance(got, want) < 1e-12) == same


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_advantages_are_normalised_to_0(dtype):
    """Would catch a standard deviation of rounding errors that makes the next rounding error large."""
    mask_BR = torch.ones(3, 5, dtype=torch.bool)
    mask_BR[1, 2:] = False
    for size in (1e-30, 0.7, 55.55, 1e30):
        x_BR = torch.full((3, 5), size, dtype=dtype)
        assert (objectives.standardised(x_BR, mask_BR, RUNTIME) == 0).all()
        x_BR[0, 0] *= 1 + 2e-7  # differs by one rounding of float32
        assert (objectives.standardised(x_BR, mask_BR, RUNTIME) == 0).all()
        x_BR[0, 0] *= 1.01
        got = objectives.standardised(x_BR, mask_BR, RUNTIME, eps=0.0)[mask_BR].double()
        assert abs(got.mean()) < 1e-4 and abs(got.square().mean() - 1) < 1e-4, "control: others are standardised"


def test_dpo_against_finite_differences_and_without_pairs(world):
    policy = Policy(world.model, "dpo")
    with torch.no_grad():
        for p in policy.reference.parameters():
            p.mul_(0.9)
    config = smd.Config("smd", objectives.DPO(policy.reference, beta=0.5), lam=0.0, max_new=3)
    batch = smd.make_batch(world.model, world.rollout, world.reward, config, RUNTIME)
    slope = gradient(loss_of(policy, batch, config), world.model)
    weights = list(world.model.parameters())
    before = torch.nn.utils.parameters_to_vector(weights).detach()
    generator = torch.Generator().manual_seed(0)
    direction = F.normalize(torch.randn(len(before), generator=generator, dtype=torch.float64), dim=0)
    ends, best, worst = [], world.reward.argmax(), world.reward.argmin()
    for step in (1e-5, -1e-5):
        torch.nn.utils.vector_to_parameters(before + step * direction, weights)
        margin = world.score().logp_BR.sum(dim=1) - batch.extra["ref_logp_BR"].sum(dim=1)
        ends.append(math.log1p(math.exp(-0.5 * (margin[best] - margin[worst]).item())))
    torch.nn.utils.vector_to_parameters(before, weights)
    assert abs((ends[0] - ends[1]) / 2e-5 - slope @ direction) < 1e-6 * slope.norm()
    tied = dataclasses.replace(batch, reward_B=torch.ones(64, dtype=torch.float64))
    loss = loss_of(policy, tied, config)
    assert loss == 0 and (gradient(loss, world.model) == 0).all()


def test_dpo_compares_the_best_with_the_worst_sample_of_each_prompt_by_hand():
    """Three prompts; the second has no pair. Margins over the reference: best 0.5, worst -0.25; 0.1 and 0.4."""
    logp, reference = torch.tensor([-1.0, -2.0, -3.0, -1.0, -1.0, -1.0, -4.0, -5.0, -6.0]), torch.zeros(9)
    reference[:3] = torch.tensor([-1.5, -2.0, -2.75])
    reference[6:] = torch.tensor([-4.1, -5.2, -6.4])
    reward = torch.tensor([[1.0, 0.5, 0.0], [0.7, 0.7, 0.7], [3.0, 3.5, 9.0]])
    want = -(math.log(1 / (1 + math.exp(-2 * 0.75))) + math.log(1 / (1 + math.exp(-2 * 0.3)))) / 2
    assert math.isclose(objectives.dpo_loss(logp, reference, reward, 2.0, 2).item(), want, rel_tol=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_replay_of_a_step_uses_the_chosen_backend(objective):
    """Would catch values of the critic, or log-probs of the reference, computed by another backend."""
    taken = []

    def replay(*args, backend=None):
        taken.append(backend)
        return shared.replay(*args, backend=backend)

    policy = Policy(small_model(), objective, kl_ref=0.1)
    runtime = dataclasses.replace(RUNTIME, replay=replay, backend="torch")
    config = config_of(policy, "naive")
    batch = smd.make_batch(policy.model, ragged_rollout(policy.model), torch.arange(12.0).double(), config, runtime)
    smd.learner_loss(policy.model, batch, batch.totals(runtime), config, runtime)
    assert taken == ["torch"] * (3 + (objective == "ppo"))


@pytest.mark.parametrize("method", ["smd", "naive"])
def test_the_reference_policy_has_the_learners_mask(method):
    policy, batch, config = prepared(method=method, kl_ref=0.1)
    with torch.no_grad():
        for p in policy.reference.parameters():
            p.mul_(0.9)
    rollout = batch.rollout
    batch = smd.make_batch(policy.model, rollout, batch.reward_B, config, RUNTIME)
    seen = rollout.evicted_at_LBGT if method == "smd" else rollout.never_evicted_LBGT
    want = smd.response_logp(policy.reference, rollout, smd.replay(policy.reference, rollout, seen)[0])
    compare("reference", batch.extra["ref_logp_BR"], want, 1e-12)


def test_the_penalty_to_the_reference_counts_with_its_weight():
    policy, batch, config = prepared(kl_ref=0.5, lam=0.0)
    shifted = replaced(batch, ref_logp_BR=batch.extra["ref_logp_BR"] - 0.3 * batch.rollout.mask_BR)
    penalty = loss_of(policy, shifted, config) - loss_of(policy, batch, config)
    assert math.isclose(penalty.item(), 0.5 * (math.exp(-0.3) - 1 + 0.3), rel_tol=1e-6)


def test_tensors_of_different_shapes_are_refused():
    """Would catch a loss that is computed from broadcast tensors."""
    x, mask, row = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool), torch.ones(6)
    for f, tensors, numbers in (
        (objectives.gae, (torch.ones(2), x, mask), (1.0,)),
        (objectives.value_loss, (x, x, x, mask), (1.0, 1.0)),
        (objectives.dpo_loss, (row, row, x), (1.0, 1.0)),
        (objectives.k3, (x, x, mask), (1.0,)),
    ):
        f(*tensors, *numbers)
        for n, tensor in enumerate(tensors):
            with pytest.raises(ValueError, match="shapes differ"):
                f(*tensors[:n], tensor[:1], *tensors[n + 1 :], *numbers)


@pytest.mark.parametrize("parts, prompts", [(1, [[0, 1, 2, 3]]), (2, [[0, 2], [1, 3]]), (3, [[0, 3], [1], [2]])])
def test_the_parts_of_a_batch_by_hand(parts, prompts):
    _, batch, _ = prepared("ppo", kl_ref=0.1)
    assert set(batch.extra) == {"advantage_BR", "value_BR", "return_BR", "ref_logp_BR"}
    for part, numbers in zip(train.split(batch, parts), prompts, strict=True):
        rows = [3 * n + sample for n in numbers for sample in range(3)]
        for name in ("reward_B", "old_logp_BR", "weight_BR"):
            assert torch.equal(getattr(part, name), getattr(batch, name)[rows]), name
        for name, whole in batch.extra.items():
            assert torch.equal(part.extra[name], whole[rows]), name
        for name in ("response_BR", "logp_BR", "length_B"):
            assert torch.equal(getattr(part.rollout, name), getattr(batch.rollout, name)[rows]), name
        for name in ("prompt_NP", "pad_N"):
            assert torch.equal(getattr(part.rollout, name), getattr(batch.rollout, name)[numbers]), name
        assert torch.equal(part.rollout.evicted_at_LBGT, batch.rollout.evicted_at_LBGT[:, rows])


def updated(monkeypatch, lr=0.0, lam=0.1, max_new=14, **changes):
    """The prompts of each part, the model's change, its gradient before, and the row of the log."""
    policy, batch, config = prepared(lam=lam, max_new=max_new)
    s = Settings(**dict(epochs=1, accumulate=1) | changes)
    model, parts, learner_loss = policy.model, [], smd.learner_loss
    row_of = {tuple(row.tolist()): n for n, row in enumerate(batch.rollout.prompt_NP)}
    slope = gradient(loss_of(policy, batch, config), model)
    before = torch.nn.utils.parameters_to_vector(model.parameters())

    def watched(model, part, *rest):
        parts.append([row_of[tuple(row.tolist())] for row in part.rollout.prompt_NP])
        return learner_loss(model, part, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(smd, "learner_loss", watched)
        row = train.update(policy, torch.optim.SGD(model.parameters(), lr=lr), batch, s, config, RUNTIME)
    return parts, torch.nn.utils.parameters_to_vector(model.parameters()) - before, slope, row


def test_each_epoch_goes_through_all_prompts(monkeypatch):
    assert updated(monkeypatch, epochs=2)[0] == [[0, 1, 2, 3]] * 2
    assert updated(monkeypatch, epochs=2, accumulate=2)[0] == [[0, 2], [1, 3]] * 2


def test_an_update_follows_the_gradient_no_further_than_1(monkeypatch):
    for longest, clipped in ((1, True), (1000, False)):
        _, change, slope, row = updated(monkeypatch, lr=0.1, lam=0.0, max_new=longest)
        norm = slope.norm().item()
        assert (norm > 1) == clipped and math.isclose(row["grad_norm"], norm, rel_tol=1e-6)
        compare("change", change, -0.1 * slope / max(1.0, norm), 1e-6)
    # several updates: loss, entropy and replay error of the first, means of the norm and of the clipped share
    one, two = updated(monkeypatch, lr=3.0)[3], updated(monkeypatch, lr=3.0, epochs=2)[3]
    assert all(one[name] == two[name] for name in ("loss", "entropy", "replay_error")) and one["clip_fraction"] == 0
    assert two["clip_fraction"] > 0 and two["grad_norm"] != one["grad_norm"]


def test_the_learning_rate_rises_and_the_optimizer_is_adamw(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "LR_WARMUP", 4)
    seen, update = [], train.update
    monkeypatch.setattr(train, "update", lambda *args: seen.append(dict(args[1].param_groups[0])) or update(*args))
    train.train(tiny(tmp_path, lr=0.01, steps=6, warmup_steps=0, eval_prompts=1, eval_every=0))
    assert [group["lr"] for group in seen] == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])
    assert all(group["betas"] == (0.9, 0.95) and group["weight_decay"] == 0.0 for group in seen)


@pytest.mark.parametrize("method", list(smd.METHODS))
def test_a_step_of_a_run_is_the_plain_step(method, tmp_path):
    """With one epoch and one part, sampling included: weights and figures are equal to rounding."""

    def reward_of(text: str) -> float:
        return sum(text.encode()) % 7 / 7

    agent = Agent(train.checked(tiny(tmp_path, method=method)))
    agent.model.double()
    plain_model = copy.deepcopy(agent.model)
    policy = Policy(agent.model, "grpo")
    row = train.train_step(agent, policy, policy.optimizer(0.0), lambda _, text, __: reward_of(text), step=5)

    def reward(rollout: smd.Rollout) -> torch.Tensor:
        return torch.tensor([reward_of(text) for text in agent.texts(rollout)], dtype=torch.float64)

    examples, key_N = agent.draw(5)
    optimizer = Policy(plain_model, "grpo").optimizer(agent.s.lr * 5 / train.LR_WARMUP)
    runtime = smd.Runtime(sample=partial(smd.sample, uniform=streams.keyed(key_N, agent.s.samples)))
    config = train.config_for(agent, policy)
    plain_row = smd.train_step(plain_model, optimizer, *agent.tokenize(examples), reward, config, runtime)
    assert {name: row[name] for name in plain_row} == pytest.approx(plain_row, abs=1e-9)
    weights, plain_weights = (torch.nn.utils.parameters_to_vector(m.parameters()) for m in (agent.model, plain_model))
    compare("weights", weights, plain_weights, 1e-9)
    before = torch.nn.utils.parameters_to_vector(Agent(agent.s).model.parameters())
    assert (weights - before).abs().max() > 1e-4, "nothing was learned"


def test_ppo_by_loops():
    """Values, advantages and returns at rollout time; and the critic's loss after the critic has moved."""
    policy, batch, config = prepared("ppo", lam=0.0)
    torch.nn.init.normal_(policy.critic.weight, std=0.2, generator=torch.Generator().manual_seed(1))
    rollout, reward_B = batch.rollout, batch.reward_B
    batch = smd.make_batch(policy.model, rollout, reward_B, config, RUNTIME)

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
    as_tensor = partial(torch.tensor, dtype=torch.float64)
    for b, (value, advantage) in enumerate(zip(old, advantages, strict=True)):
        got = {name: x_BR[b, : len(value)] for name, x_BR in batch.extra.items()}
        compare("values", got["value_BR"], as_tensor(value), 1e-12)
        returns = [a + v for a, v in zip(advantage, value, strict=True)]
        compare("returns", got["return_BR"], as_tensor(returns), 1e-12)
        compare("advantages", got["advantage_BR"], as_tensor([(a - mean) / std for a in advantage]), 1e-5)

    with torch.no_grad():
        policy.critic.bias += 0.3  # beyond the clip of 0.2
    losses = []
    for now, then, advantage in zip(values(), old, advantages, strict=True):
        for new, before, a in zip(now, then, advantage, strict=True):
            near = min(max(new, before - 0.2), before + 0.2)
            losses.append(0.5 * max((new - a - before) ** 2, (near - a - before) ** 2))
    with_critic = loss_of(policy, batch, config)
    without = loss_of(policy, batch, dataclasses.replace(config, objective=smd.GRPO()))
    assert math.isclose((with_critic - without).item(), 0.5 * statistics.mean(losses), rel_tol=1e-9)


@pytest.mark.parametrize("method", ["naive", "smd"])
def test_the_logits_of_all_tokens_never_exist_at_once(method, monkeypatch):
    """In 32 chunks the peak of memory is below one copy of the logits, and the results are those of one chunk."""
    assert smd.LOGITS_PER_CHUNK["cpu"] <= 2**24, "a chunk of the default size is not small"
    model = small_model(torch.float32, vocab=20_000, width=16)
    rollout = ragged_rollout(model, samples=4, max_new=20)
    size = int(rollout.length_B.sum()) * 20_000 * 4
    policy = Policy(model, "grpo")
    config, found = config_of(policy, method, lam=0.5), {}

    def step() -> None:
        batch = smd.make_batch(model, rollout, torch.arange(16.0) % 3, config, RUNTIME)
        train.diagnose(model, rollout, RUNTIME)
        loss, row = smd.learner_loss(model, batch, batch.totals(RUNTIME), config, RUNTIME)
        loss.backward()
        found[chunks] = loss.item(), row["entropy"].item(), gradient_of(policy)
        policy.zero_grad()

    for chunks in (32, 1):
        monkeypatch.setitem(smd.LOGITS_PER_CHUNK, "cpu", size // 4 // chunks)  # in numbers, not in bytes
        peak = peak_of_trace(step)
        if chunks == 32:
            assert peak < size, f"{peak / size:.2f} times the logits"
        else:
            assert peak > 1.5 * size, "control: in one chunk they do"
    for n in range(2):
        assert math.isclose(found[32][n], found[1][n], rel_tol=1e-5)
    compare("gradient", found[32][2], found[1][2], 1e-5)


def test_no_chunk_is_much_smaller_than_another(monkeypatch):
    """Would catch a last chunk of one row, with logits that a library may sum in another order than the sampler's."""
    sizes = []
    monkeypatch.setitem(smd.LOGITS_PER_CHUNK, "cpu", 20 * 50)  # two chunks of this size would leave one row
    smd.chunked(lambda row_x: sizes.append(len(row_x)) or (row_x,), 20, torch.arange(101.0))
    assert sum(sizes) == 101 and len(sizes) == 3 and max(sizes) - min(sizes) <= 1, sizes


@pytest.mark.parametrize("automatic", [False, True], ids=["bfloat16 weights", "autocast"])
@torch.no_grad()
def test_log_probs_and_sums_of_a_bfloat16_model_are_float32(automatic):
    """And those of a float32 model under autocast. Would catch log-probs off by 0.03, and sums that stall at 256."""
    caches = []

    def make_cache(*args):
        caches.append(shared.SharedCache(*args))
        return caches[-1]

    prompts = text.pad_left([[1 + i * i % 17 for i in range(600)]], EOS, "cpu")
    model = small_model(torch.float32 if automatic else torch.bfloat16)
    policy = Policy(model, "ppo")
    config = config_of(policy)
    with torch.autocast("cpu", torch.bfloat16, enabled=automatic):
        for name in POLICIES:
            eviction = Eviction(name, 700 if name == "h2o" else 64)
            rollout = smd.sample(model, *prompts, 2, 6, EOS, eviction, make_cache=make_cache)
            batch = smd.make_batch(model, rollout, torch.arange(2.0), config, RUNTIME)
            for x in (rollout.logp_BR, batch.weight_BR, batch.extra["value_BR"], batch.extra["advantage_BR"]):
                assert x.dtype == torch.float32
            (hidden_XC,) = shared.replay(model, rollout, rollout.evicted_at_LBGT)
            logits_XV, tokens_X = model.logits(hidden_XC), rollout.response_BR[rollout.mask_BR]
            exact = logits_XV.double().log_softmax(-1).gather(-1, tokens_X[:, None])[:, 0]
            compare(name, smd.response_logp(model, rollout, hidden_XC)[rollout.mask_BR], exact.float(), 1e-5)
            compare(f"{name}, replay", rollout.logp_BR[rollout.mask_BR], exact.float(), 0.05)
            if name == "h2o":
                received = torch.stack([layer.received_BGK for layer in caches[-1].layers])
                assert received.dtype in (torch.float32, torch.float64)
                # each query hands out 1, in each of the two heads that share a kv head
                fed = 600 + rollout.response_BR.shape[1] - 1
                compare("sums", received.sum(dim=-1), torch.full((2, 2, 2), 2.0 * fed), 1e-2)
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16, enabled=automatic):
        loss = loss_of(policy, batch, config)
    assert loss.dtype == torch.float32 and gradient(loss, model).isfinite().all()


def test_every_update_under_autocast_uses_the_weights_of_the_last():
    """Would catch an autocast cache that keeps bfloat16 copies of the old weights."""
    policy, batch, config = prepared()
    policy.float()
    learner_loss, pairs = smd.learner_loss, []

    def watched(*args):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            _, fresh = learner_loss(*args)
        loss, row = learner_loss(*args)
        pairs.append((row["entropy"].item(), fresh["entropy"].item()))
        return loss, row

    s = Settings(epochs=3, accumulate=1, dtype="bfloat16", device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smd, "learner_loss", watched)
        train.update(policy, torch.optim.SGD(policy.parameters(), lr=0.3), batch, s, config, RUNTIME)
    assert len({entropy for entropy, _ in pairs}) == 3, "the updates change nothing"
    assert all(entropy == pytest.approx(fresh, abs=1e-6) for entropy, fresh in pairs)


@pytest.mark.parametrize("method, objective", PAIRS)
def test_the_gradients_of_parts_add_up_to_that_of_the_whole_batch(method, objective, monkeypatch):
    """Would catch a mean over a part instead of over the batch, or importance weights computed for each part.

    Four prompts in 1, 2, 3 and 4 parts of unequal lengths; the samples of one prompt have equal rewards.
    """
    policy, batch, config = prepared(objective, method, kl_ref=0.1)
    if policy.critic is not None:
        torch.nn.init.normal_(policy.critic.weight)
    reward_B = batch.reward_B.clone()
    reward_B[:3] = 1.0
    batch = smd.make_batch(policy.model, batch.rollout, reward_B, config, RUNTIME)
    with torch.no_grad():  # away from where it sampled: the ratio is not 1, the KL to the reference not 0
        for p in policy.model.parameters():
            p.mul_(1.02)
    loss = loss_of(policy, batch, config)
    loss.backward()  # in a single pass
    want, rows = gradient_of(policy), []
    assert want.norm() > 1e-3
    monkeypatch.setattr(smd, "MAX_GRAD_NORM", math.inf)
    for accumulate in (1, 2, 3, 4):
        policy.zero_grad()
        optimizer = policy.optimizer(lr=0.0)
        optimizer.zero_grad = lambda: None  # so that the gradient stays
        row = train.update(policy, optimizer, batch, Settings(epochs=1, accumulate=accumulate), config, RUNTIME)
        rows.append(row)
        assert row == pytest.approx(rows[0], rel=1e-9)
        assert (gradient_of(policy) - want).norm() < 1e-9 * want.norm()
    assert rows[0]["loss"] == pytest.approx(loss.item(), rel=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_responses_of_one_token_are_learned_from(objective):
    """A response of one token is no query, and every learner sees the whole prompt as the sampler did."""
    found = []
    for method in ("smd", "naive"):
        policy = Policy(small_model(), objective, kl_ref=0.1)
        config = config_of(policy, method, max_new=1)
        rollout = ragged_rollout(policy.model, max_new=1)
        reward_B = torch.arange(12.0, dtype=torch.float64) % 5
        batch = smd.make_batch(policy.model, rollout, reward_B, config, RUNTIME)
        loss_of(policy, batch, config).backward()
        found.append(gradient_of(policy))
    compare("one token", found[0], found[1], 1e-12)
    assert found[0].norm() > 1e-3


def test_the_diagnosis_by_hand(world):
    assert math.isclose(train.effective_sample_size(torch.tensor([1.0, 3.0]).log()), 16 / 10 / 2, rel_tol=1e-6)
    assert train.effective_sample_size(torch.tensor([1000.0, -1000.0, 1000.0, 0.0])) == 0.5
    found = train.diagnose(world.model, world.rollout, RUNTIME)
    with torch.no_grad():
        masks = world.rollout.evicted_at_LBGT, world.rollout.never_evicted_LBGT
        shadow, dense = (world.logits(mask_LBGT).softmax(dim=-1) for mask_LBGT in masks)
        log_weight = world.logp(dense=True) - world.rollout.logp_BR
    weight = log_weight.exp()
    want = dict(
        kl_sparse_dense=(shadow * (shadow / dense).log()).sum(dim=-1).mean(),
        overlap_p05=torch.minimum(shadow, dense).sum(dim=-1).quantile(0.05),
        ess_token=weight.sum() ** 2 / weight.square().sum() / weight.numel(),
        ess_sequence=weight.prod(dim=1).sum() ** 2 / weight.prod(dim=1).square().sum() / 64,
        max_weight_token=weight.max(),
        max_weight_sequence=weight.prod(dim=1).max(),
        dense_error=log_weight.abs().max(),
    )
    for name, value in want.items():
        assert math.isclose(found[name], value.item(), rel_tol=1e-9), name
    assert found.keys() == want.keys() | {"replay_error"} and found["replay_error"] < 1e-12


def test_the_diagnosis_of_a_rollout_that_the_replay_does_not_match():
    model = small_model()
    rollout = ragged_rollout(model)
    shifted = rollout.logp_BR.clone()
    shifted[3, 1] -= 0.25
    found = train.diagnose(model, dataclasses.replace(rollout, logp_BR=shifted), RUNTIME)
    assert math.isclose(found["replay_error"], 0.25, rel_tol=1e-9)
    for shift in (-30.0, 30.0):  # a token: the weight of a sequence is e^(30 · length), or its inverse
        shifted = dataclasses.replace(rollout, logp_BR=rollout.logp_BR + shift * rollout.mask_BR)
        assert all(math.isfinite(value) for value in train.diagnose(model, shifted, RUNTIME).values())


class NoDefaultDevice(TorchDispatchMode):
    """Fails if a tensor is created on the default device, which is "meta"."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, made)):
            # torch 2.11's checkpoint makes empty ones
            without = isinstance(x, torch.Tensor) and x.is_meta and x.numel() > 0
            assert not without, f"{func} uses a tensor without a device"
        return made


def on_given_devices(f):
    """f, but it fails where it creates a tensor without naming a device: on a CUDA machine that is the CPU."""

    def run(*args):
        with torch.device("meta"), NoDefaultDevice():
            return f(*args)

    return run


@pytest.mark.parametrize("method, objective", PAIRS)
def test_every_method_trains_with_every_objective(tmp_path, method, objective):
    """And creates no tensor on the default device, which on a CUDA machine is the CPU."""
    sizes = dict(prompts=2, samples=2, accumulate=2, kl_ref=0.1)
    agent = Agent(train.checked(tiny(tmp_path, method=method, objective=objective, **sizes)))
    policy = Policy(agent.model, objective, 0.1)
    args = agent, policy, policy.optimizer(1e-3), lambda prompt, response, answer: sum(map(ord, response)) % 8 / 8
    row = on_given_devices(train.train_step)(*args, 1)
    names = ["kl_sparse_dense", "overlap_p05", "ess_token", "ess_sequence", "max_weight_token", "max_weight_sequence"]
    assert all(math.isfinite(row[name]) for name in names)
    assert row["grad_norm"] > 0 and all(0 < row[name] <= 1 + 1e-9 for name in ("ess_token", "ess_sequence"))
    if method == "dense":
        assert abs(row["ess_token"] - 1) < 1e-6 and row["overlap_p05"] > 1 - 1e-5


def test_no_tensor_is_created_on_the_default_device(tmp_path):
    """By any policy, the evaluation, or the warm-up; the test above is for a training step."""
    model, prompts = small_model(torch.float32), ragged_prompts()
    for policy in POLICIES:
        eviction = Eviction(policy, 8, interval=3, window=3, sinks=1)
        for sample in (smd.sample, shared.sample):
            on_given_devices(sample)(model, *prompts, 2, 5, -1, eviction)
    agent = Agent(train.checked(tiny(tmp_path, eval_prompts=4)))
    on_given_devices(agent.evaluate)()
    on_given_devices(base.supervised_loss)(agent, None, 0)
    with pytest.raises(AssertionError, match="without a device"):
        on_given_devices(torch.zeros)(2)
