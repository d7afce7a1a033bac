"""Tasks, rewards, text, the evaluation and the warm-up of the base policy."""

import dataclasses
import hashlib
import itertools
import json
import math
import re
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import smd
from harness import base, cli, files, report, runs, shared, streams, tasks, text, train
from harness.agent import Agent, greedy
from harness.number import last_number
from harness.settings import Settings
from harness.streams import numpy_stream, torch_stream
from kernel import NEVER
from tests.common import GOOD, ROOT, compare, small_model, tiny, write
from tiny_model import ModelConfig, TinyModel, never_evicted


def split_mix(*key: int) -> int:
    """SplitMix64 as it is defined, in Python's integers: each part of a key moves the state on."""
    state = 0
    for part in key:
        state = (state + part + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state - 2**64 if state >= 2**63 else state


def test_the_counter_based_generator_is_splitmix64_and_uniform():
    parts = [5, -3, 2**62, -(2**63)]
    got = streams.hashed(7, torch.tensor(parts)[:, None], torch.tensor(parts))
    assert got.tolist() == [[split_mix(7, a, b) for b in parts] for a in parts]
    number = streams.uniform(1, torch.arange(300)[:, None], torch.arange(300))
    assert number.min() >= 0 and number.max() < 1 and number.dtype == torch.float64
    counts = torch.histc(number.flatten().float(), 100, 0, 1)
    assert (counts / 900 - 1).abs().max() < 5 / 900**0.5, "five standard deviations"
    # neighbours in either direction are not correlated
    for pairs in ((number[1:], number[:-1]), (number[:, 1:], number[:, :-1])):
        assert abs(torch.corrcoef(torch.stack([x.flatten() for x in pairs]))[0, 1]) < 5 / 300


def test_a_file_of_text_trains_end_to_end(tmp_path):
    """Both formats, through --data; the second with a reward of its own."""
    ours = [json.dumps({"prompt": f"what comes after {n} is ", "answer": str(n + 1)}) for n in range(20)]
    gsm8k = [
        json.dumps({"question": f"{n} and one?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1:,}"})
        for n in range(995, 1015)
    ]
    judged = []
    for name, lines, judge in (("ours", ours, None), ("gsm8k", gsm8k, lambda *texts: judged.append(texts) or 0.5)):
        file = write(tmp_path / f"{name}.jsonl", *lines)
        changes = dict(data=file, asked=None, budget="80%", max_new=8, steps=1, eviction="h2o")
        summary = train.train(tiny(tmp_path, name, **changes), reward=judge)
        assert summary["replay_error"] < 1e-5 and 0 <= summary["after"]["sparse"] <= 1
    prompt, _, answer = judged[0]
    assert prompt.endswith(" and one?\n") and answer.isdigit(), "the answer is the number after ####, without commas"


GSM8K = ROOT.parent / "shared/data/gsm8k_test.jsonl"


@pytest.mark.skipif(not GSM8K.exists(), reason="the real file is not here")
def test_real_text_is_read(tmp_path):
    examples = tasks.read_jsonl(str(GSM8K), "")
    assert len(examples) == 1319 and examples[0].answer == "18" and examples[3].answer == "540"
    assert tasks.TextFile(train.checked(Settings(data=str(GSM8K), reward="number"))).reward("?", "so $18.", "18") == 1


def follow(prompt: str, hops: int) -> str:
    """The letters that come after the one behind the question mark, read off the edges."""
    edges, start = prompt.split("?")
    after = {edges[i]: edges[i + 1] for i in range(0, len(edges), 2)}
    path = [start]
    for _ in range(hops):
        path.append(after[path[-1]])
    return "".join(path[1:])


def chain(**changes) -> tasks.Chain:
    return tasks.Chain(Settings(**dict(asked=6) | changes))


def test_the_chain_is_followed_along_its_edges():
    task = chain(asked=5)
    examples = task.draw(200, numpy_stream(1, 2))
    for prompt, answer, *_ in examples:
        edges = prompt.split("?")[0]
        sources, targets = edges[::2], edges[1::2]
        assert sorted(sources) == sorted(targets) == sorted("abcdefghijklmnop"), "not a cycle over all letters"
        assert answer == follow(prompt, 5) and len(prompt) == 34
        assert len(follow(prompt, 16)) == len(set(follow(prompt, 16))) == 16, "more than one cycle"
    assert len(set(examples)) == 200 and len({answer for _, answer, *_ in examples}) > 190
    # the edges are in random order: how often an edge directly follows the edge that leads to it
    behind = [prompt[i + 1] == prompt[i + 2] for prompt, *_ in examples for i in range(0, 30, 2)]
    assert abs(statistics.mean(behind) - 1 / 15) < 0.02
    assert task.draw(3, numpy_stream(1, 2)) == examples[:3] != task.draw(3, numpy_stream(1, 3))


def test_a_lesson_is_a_shorter_cycle_and_demonstrations_slip():
    task = chain(asked=5)
    for lesson in task.lessons:
        for prompt, answer, *_ in task.demonstrate(20, numpy_stream(0, lesson), lesson):
            assert len(prompt) == 2 * lesson + 2 and answer == follow(prompt, lesson - 1)
    assert task.lessons == (4, 6, 8) and task.batch == 64  # the base policy of the README is made of these
    shown = task.demonstrate(2000, numpy_stream(0), None)
    assert {len(prompt) for prompt, *_ in shown} == {34}
    # a hop that slips lands anywhere, one time in 16 on the right letter
    hops = [follow(p.split("?")[0] + "?" + a, 1) == b for p, answer, *_ in shown for a, b in itertools.pairwise(answer)]
    right = 1 - 0.13 * 15 / 16
    assert abs(statistics.mean(hops) - right) < 5 * math.sqrt(right * (1 - right) / len(hops))


def test_the_rewards_of_the_tasks_by_hand(tmp_path):
    task = chain(asked=4)
    for response, want in (("bcda", 1.0), ("bcdd", 0.375), ("bc", 0.25), ("", 0.0), ("xcxa", 0.25), ("bcdab", 0.5)):
        assert task.reward("abbccdda?a", response, "bcda") == want, response
    # the reward and the accuracy agree about blanks
    assert task.reward("abbccdda?a", " bcda ", "bcda") == 1.0
    examples = [tasks.Example("", "bcda"), tasks.Example("", "bcda ")]
    assert tasks.accuracy(task, [" bcda ", "b cda", "bcda", "x"], examples) == 0.5
    text = tasks.TextFile(Settings(data=write(tmp_path / "two.jsonl", GOOD, GOOD), reward="exact"))
    assert [text.reward("?", said, " two ") for said in ("two", " two\n", "Two", "two two", "")] == [1, 1, 0, 0, 0]
    examples, seen = [tasks.Example("p", "a"), tasks.Example("q", "b")], []
    scores = tasks.score(lambda *texts: seen.append(texts) or len(seen), examples, ["w", "x", "y", "z"])
    assert scores == [1.0, 2.0, 3.0, 4.0]
    assert seen == [("p", "w", "a"), ("p", "x", "a"), ("q", "y", "b"), ("q", "z", "b")]
    assert tasks.accuracy(text, ["a", "b", "b", "a"], examples) == 0.5
    for bad in (math.inf, -math.inf, math.nan, 1e39):
        with pytest.raises(FloatingPointError, match=r"a reward is (-?inf|nan|1e\+39); it must be a finite number"):
            tasks.score(lambda prompt, *_, bad=bad: bad if prompt == "q" else 3e38, examples, ["w"] * 2)


def facts(**changes) -> tasks.Facts:
    return tasks.Facts(Settings(**dict(model="smollm2", asked=1) | changes))


def test_the_facts_are_looked_up(monkeypatch):
    """The answer has the listed codes of the nouns in the question."""
    for asked, count in ((1, 12), (2, 5), (3, 16)):
        monkeypatch.setattr(tasks.Facts, "FACTS", count)
        task = facts(asked=asked)
        examples = task.draw(50, numpy_stream(1, 2))
        for prompt, answer, begun, _ in examples:
            codes = dict(re.findall(r"The code of (\w+) is ([1-9][0-9])\.", prompt))
            assert len(codes) == count and set(codes) <= set(task.NOUNS)
            question = prompt.rpartition(" What ")[2]
            nouns = re.findall("|".join(task.NOUNS), question)
            assert len(set(nouns)) == asked and [codes[noun] for noun in nouns] == re.findall("[0-9]+", answer)
            assert task.right(answer, answer) and task.reward(prompt, answer, answer) == 1.0
            assert re.findall("|".join(task.NOUNS), begun) == nouns
        assert len({e.prompt for e in examples}) == 50
        assert not {e.prompt for e in examples} & {e.prompt for e in task.held_out(500)}
    one, three = facts().example(numpy_stream(0, 0)), facts(asked=3).example(numpy_stream(0, 0))
    assert re.search(r"\. What is the code of (\w+)\?$", one.prompt) and one.begun.endswith(" is")
    assert re.search(r"\. What are the codes of \w+, \w+ and \w+\?$", three.prompt) and three.begun.endswith(" are")
    assert re.fullmatch(r" [0-9]+, [0-9]+ and [0-9]+", three.answer)


FACT_REWARDS = {
    " 22": {" 22": 1.0, " 22.": 1.0, "22, or 35": 1.0, " 25": 0.5, " 221": 0.5, " 32": 0.0, "": 0.0},
    " 22, 45 and 67": {
        " 22, 45 and 67.": 1.0, " 22 45 67 12": 1.0, " 22, 45 and 66": 1 / 3, " 45, 22, 67": 1 / 6, " 22": 1 / 6,
        "none": 0.0,
    },
}  # fmt: skip


def test_the_rewards_of_facts_by_hand():
    for asked, (answer, rewards) in zip((1, 3), FACT_REWARDS.items(), strict=True):
        task = facts(asked=asked)
        for response, want in rewards.items():
            assert task.reward("?", response, answer) == pytest.approx(want), response
            assert task.right(response, answer) == (want == 1.0), response


def test_held_out_examples_are_never_trained_on(tmp_path):
    for count, held in ((40, 4), (9, 1), (2, 1)):
        lines = [json.dumps(dict(prompt=f"question {n}", answer=str(n))) for n in range(count)]
        task = tasks.TextFile(Settings(data=write(tmp_path / f"{count}.jsonl", *lines), reward="exact"))
        test = task.held_out(1000)
        assert [e[:2] for e in test] == [(f"question {n}", str(n)) for n in range(count - held, count)]
        assert task.held_out(1) == test[:1]
        for drawn in (task.draw(500, numpy_stream(0)), task.demonstrate(500, numpy_stream(1), None)):
            assert {int(e.answer) for e in drawn} == set(range(count - held)), "too few are trained on, or too many"
        # no example twice in a step, as long as there are enough
        assert len(set(task.draw(count - held, numpy_stream(2)))) == count - held
    held_out = chain(asked=5).held_out(500)
    assert held_out == chain(asked=5).held_out(500) and len({e.prompt for e in held_out}) == 500
    agent = Agent(train.checked(tiny(Path("."), asked=5, prompts=100)))
    trained = {e.prompt for step in range(1, 6) for e in agent.draw(step)[0]}
    assert len(trained) == 500 and not trained & {e.prompt for e in held_out}


def test_prompts_depend_on_seed_and_step_alone():
    def prompts(step, **changes):
        examples, key_N = Agent(train.checked(tiny(Path("."), **changes))).draw(step)
        return examples, key_N.tolist()

    assert prompts(1) == prompts(1, method="naive", eviction="random", lr=0.1, samples=2)
    drawn = chain(asked=2).draw(4, numpy_stream(3, 1, 7))
    assert prompts(7, seed=3) == (drawn, [split_mix(3, 2, 7, n) for n in range(4)])
    for other in (prompts(2), prompts(1, seed=1)):
        assert other[0] != prompts(1)[0] and not set(other[1]) & set(prompts(1)[1])


class Solver:
    """Replaces the sampler. A full cache answers right; a compressed one does if the start is the letter a."""

    def __init__(self):
        self.calls = []

    def __call__(self, model, prompt_NP, pad_N, samples, max_new, eos, eviction, uniform):
        draws = uniform(0, torch.arange(len(prompt_NP))).tolist()
        self.calls.append((len(prompt_NP), samples, eviction, draws))
        rows = []
        for prompt, pad in zip(prompt_NP.tolist(), pad_N.tolist(), strict=True):
            question = bytes(prompt[pad:]).decode()
            answer = follow(question, max_new - 1)
            wrong = eviction is not None and question[-1] != "a"
            rows += [[*(b"?" * len(answer) if wrong else answer.encode()), eos[0]]] * samples
        return SimpleNamespace(response_BR=torch.tensor(rows))


@pytest.fixture
def solver(monkeypatch) -> Solver:
    solver = Solver()
    monkeypatch.setattr(shared, "sample", solver)
    return solver


def agent_of(**changes) -> Agent:
    return Agent(train.checked(tiny(Path("."), **dict(asked=4, eval_prompts=150) | changes)))


def test_the_evaluation_counts_right_answers_of_each_cache(solver):
    agent = agent_of()
    found = agent.evaluate()
    of_a = statistics.mean(e.prompt[-1] == "a" for e in agent.task.held_out(150))
    assert found == {"sparse": of_a, "dense": 1.0} and 0 < of_a < 0.2
    assert [call[:3] for call in solver.calls] == [(n, 1, agent.eviction) for n in (64, 64, 22)] + [
        (n, 1, None) for n in (64, 64, 22)
    ]
    draws = [draw for *_, draws in solver.calls for draw in draws]
    assert draws[:150] == draws[150:] and len(set(draws)) == 150, "each prompt draws the same with both caches"
    assert agent_of(seed=5).evaluate() == found and solver.calls[-1] == solver.calls[5], "the seed of the run decides"
    assert agent.evaluate(("sparse",)) == {"sparse": of_a}


def test_the_answers_of_both_caches_are_printed(solver):
    agent = agent_of()
    prompt = agent.task.draw(1, numpy_stream(5))[0].prompt[:-1] + "b"
    assert agent.answer(prompt) == f"sparse cache: ????\ndense cache:  {follow(prompt, 4)}"
    assert [call[2] for call in solver.calls] == [agent.eviction, None]
    for wrong, message in (
        ("", "--prompt: the prompt must not be empty"),
        ("x" * 2044, "--prompt: a prompt of 2044 tok"),
        ("ab\udcff", r"--prompt: prompt and answer must be Unicode text; remove '\\udcff'"),
    ):
        with pytest.raises(cli.UsageError, match=message):
            agent.answer(wrong)


def test_a_seed_gives_the_same_prompts_on_any_machine():
    """Would catch other random streams, which would change the base policy and all reported results."""
    assert chain().held_out(1)[0].prompt == "knjcmpalpjbfhenmciobiddhfaeggolk?g"
    assert torch_stream("cpu", 0, 1, 2).initial_seed() == 4_066_139_880_823_384_728
    assert streams.hashed(0, 1, torch.tensor(2)).item() == split_mix(0, 1, 2)


@torch.no_grad()
def test_the_warm_up_scores_right_answers_and_hides_a_share_of_the_prompt(monkeypatch):
    model, form, records = small_model(vocab=257), text.Form(), []
    forward = TinyModel.forward
    monkeypatch.setattr(TinyModel, "forward", lambda m, *args: records.append(args[2].clone()) or forward(m, *args))
    examples = [tasks.Example("abcdefgh", "xyz"), tasks.Example("abcde", "y"), tasks.Example("a", "xx")]
    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(base, "DROP", 0.0)
    logp_BR, length_B = base.answer_logp(model, form, examples, generator, None)
    assert length_B.tolist() == [4, 2, 3] and logp_BR.shape == (3, 4)
    for b, (prompt, answer, *_) in enumerate(examples):
        tokens, P, no_padding = [*prompt.encode(), *answer.encode(), 256], len(prompt), torch.tensor([0])
        never = never_evicted(no_padding, len(tokens)).expand(2, 1, 2, -1)
        logp_TV = model.log_probs(model(torch.tensor([tokens]), no_padding, never)[0])
        want = torch.stack([logp_TV[t - 1, tokens[t]] for t in range(P, len(tokens))])
        compare("log-probs", logp_BR[b, : length_B[b]], want, 1e-10)
        assert (logp_BR[b, length_B[b] :] == 0).all()

    monkeypatch.setattr(base, "DROP", 0.3)
    examples = [tasks.Example("abcdefgh" * 50, "xyz"), tasks.Example("abcdefgh" * 40, "xyz")]
    found, _ = base.answer_logp(model, form, examples, generator, None)
    record = records[-1]
    assert record.shape == (2, 2, 2, 400 + 4 - 1)
    assert (record[:, 0, :, 400:] == NEVER).all() and (record[:, 1, :, :80] == 0).all(), "answers and padding"
    prompt = torch.cat((record[:, 0, :, :400].flatten(), record[:, 1, :, 80:400].flatten()))
    assert set(prompt.unique().tolist()) == {400, NEVER}, "what is dropped is dropped at the prompt's end"
    assert abs((prompt == 400).double().mean() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / len(prompt))
    assert len(record[:, 0].flatten(0, 1).unique(dim=0)) == 4, "all heads lose the same keys"
    again, _ = base.answer_logp(model, form, examples, torch.Generator().manual_seed(1), None)
    assert not torch.equal(found, again)


def small_agent(**changes) -> SimpleNamespace:
    """The parts of an agent that the warm-up reads."""
    s = SimpleNamespace(**dict(backend=None, model=None, warmup_steps=20) | changes)
    model = TinyModel(ModelConfig(vocab=257, width=16, layers=1, ffn=32))
    return SimpleNamespace(model=model, task=chain(asked=2), form=text.Form(), s=s)


def test_the_warm_up_goes_through_the_lessons(monkeypatch):
    """Each until a right answer has probability LEARNED, by a running mean; then the task, while the rate falls."""
    agent, seen, rates = small_agent(), [], []

    def loss(agent, lesson, step):
        seen.append((lesson, step))
        return agent.model.norm.weight.sum(), 1.0 if lesson == 6 else 0.4

    monkeypatch.setattr(base, "supervised_loss", loss)
    monkeypatch.setattr(base, "learn", lambda *args: rates.append(args[3]))
    assert base.warm_up(agent) == 20 + 6 + 20 + 20
    # in lesson 6, the running mean exceeds one half at the seventh example: 1 - 0.9^7 > 0.5
    assert [lesson for lesson, _ in seen] == [4] * 20 + [6] * 7 + [8] * 20 + [None] * 20
    assert [step for lesson, step in seen if lesson is None] == list(range(20))
    rise = [min(1.0, n / 50) for n in range(1, 47)] + [min(n / 50, 2 - 0.1 * (n - 47), 1.0) for n in range(47, 67)]
    assert rates == pytest.approx([3e-3 * rate for rate in rise])


def test_a_supervised_step(monkeypatch):
    """Matrices of the layers belong to Muon; the gradient is clipped; batches of lessons and steps differ."""
    agent = small_agent()
    model, optimizers = agent.model, base.optimizers_for(agent.model, fresh=True)
    adamw, muon = (o.param_groups[0] for o in optimizers)
    in_layers = {id(p) for name, p in model.named_parameters() if name.startswith("layers") and p.ndim == 2}
    assert {id(p) for p in muon["params"]} == in_layers
    assert len(muon["params"]) + len(adamw["params"]) == len(list(model.parameters()))
    assert adamw["weight_decay"] == muon["weight_decay"] == 0.0
    assert adamw["betas"] == (0.9, 0.95) and muon["adjust_lr_fn"] == "match_rms_adamw"
    base.learn(model, optimizers, (model.norm.weight * 100).sum(), rate=2e-3)
    assert adamw["lr"] == muon["lr"] == 2e-3 and model.norm.weight.grad.norm() < 1.001
    with pytest.raises(FloatingPointError, match="the warm-up's loss is nan, the norm of its gradient nan"):
        base.learn(model, optimizers, (model.norm.weight * math.nan).sum(), rate=1.0)
    found = [base.supervised_loss(agent, *at) for at in ((4, 0), (6, 0), (None, 0), (None, 1), (None, 1))]
    assert len({loss.item() for loss, _ in found}) == 4 and found[3][0] == found[4][0]
    assert all(2 < loss.item() < 8 and 0 < right < 1 for loss, right in found), "the loss is not a mean over tokens"


def test_the_file_of_a_base_policy_is_named_by_its_settings_and_data(tmp_path, monkeypatch):
    """Would catch a base policy that is made again for each run, or one that is used for other settings."""

    def path(**changes):
        return base.base_path(train.checked(tiny(tmp_path, **changes)))

    file = write(tmp_path / "a.jsonl", *numbered(20))
    text = dict(data=file, asked=None)
    names = [path(), path(warmup_steps=4), path(asked=3), path(**text)]
    assert path(**text) == names[-1]
    write(tmp_path / "a.jsonl", *numbered(21))
    names.append(path(**text))
    with monkeypatch.context() as patch:
        patch.setattr(Settings, "width", 32)
        names.append(path())
    assert len(set(names)) == 6 and {name.parent for name in names} == {base.CACHE}
    assert path(seed=1, lr=1.0, method="naive", prompts=2, budget=16, steps=3) == names[0]


TWO_LOSSES = [5.587438, 5.581090]
# SHA-256 of the weights after two steps, with torch 2.13.0 on a CPU with AVX2, by any number of threads
TWO_STEPS = "a327382dc4fb9cd5"


def test_the_supervised_steps_are_those_that_made_the_shipped_base_policy(monkeypatch):
    """A change of the steps must come with another base.VERSION, and with `python -m harness.base`."""
    monkeypatch.setattr(Settings, "width", 128)
    agent = Agent(train.checked(Settings(device="cpu")))
    optimizers, losses = base.optimizers_for(agent.model, fresh=True), []
    for step in range(2):
        loss, _ = base.supervised_loss(agent, 4, step)
        losses.append(loss.item())
        base.learn(agent.model, optimizers, loss, base.RATE * (step + 1) / base.RISE)
    assert losses == pytest.approx(TWO_LOSSES, rel=1e-5)
    if (torch.__version__.split("+")[0], torch.backends.cpu.get_cpu_capability()) == ("2.13.0", "AVX2"):
        digest = hashlib.sha256()
        for name, weight in agent.model.state_dict().items():
            digest.update(name.encode() + weight.numpy().tobytes())
        assert digest.hexdigest()[:16] == TWO_STEPS


def test_the_base_policy_that_is_shipped_is_that_of_the_default_task(capsys, monkeypatch):
    monkeypatch.setattr(Settings, "width", 128)
    agent = Agent(train.checked(Settings(device="cpu", eval_prompts=128)))
    (shipped,) = base.SHIPPED.glob("base-*.pt")
    assert base.base_path(agent.s) == shipped and shipped.stat().st_size < 2.6e6
    base.load_base(agent)
    assert f"read from {shipped}" in capsys.readouterr().out
    # of 1,024 prompts it is 18.2 % and 41.1 %
    assert agent.evaluate() == pytest.approx(ACCURACY, abs=3 / 128)


ACCURACY = dict(sparse=0.1875, dense=0.421875)


def test_the_base_policy_that_is_shipped_can_be_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "SHIPPED", tmp_path)
    monkeypatch.setattr(base, "warm_up", lambda _: 0)
    base.main()
    agent = Agent(train.checked(Settings()))
    (made,) = tmp_path.glob("*.pt")
    assert made == base.base_path(agent.s)
    files.restore(made, agent.model)


def test_text_to_tokens_and_back():
    form = text.Form()
    rows, pad = form.tokenize([tasks.Example(prompt, "") for prompt in ("abc", "é", "<|endoftext|>")], "cpu")
    assert pad.tolist() == [10, 11, 0] and rows.shape == (3, 13)
    assert rows[0].tolist() == [256] * 10 + [97, 98, 99] and rows[1, 11:].tolist() == [0xC3, 0xA9]
    assert rows[2].tolist() == list(b"<|endoftext|>"), "the text of a special token is plain text"
    for tokens, want in (([97, 98, 256, 99], "ab"), ([256, 97], ""), ([0xC3, 0xA9], "é"), ([0xC3, 97], "\ufffda")):
        assert form.decode(tokens) == want
    four, seven = tasks.Example("four", "abc", where="line 1: "), tasks.Example("seven..", "a", where="line 2: ")
    assert [text.check_example(form, example, 4, 11) for example in (four, seven)] == [4, 7]
    for example, max_new, context, message in (
        (four, 3, 99, "line 1: an answer of 4 tokens"),
        (seven, 4, 10, "line 2: a prompt of 7"),
    ):
        with pytest.raises(cli.UsageError, match=message):
            text.check_example(form, example, max_new, context)


def test_the_figures_of_a_rollout_by_hand():
    """A prompt of 3, of which the first column is padding, and responses of 3 and 1 tokens in columns 3 to 5.

    The queries in columns 3 and 4 see, if nothing is evicted, 3 and 4 keys. Column 1 is evicted at 3: two pairs less.
    Column 3, at 4: one less, so 4 of 7. The second response has no query of its own. A full cache holds 5 keys of each
    sample, or the prompt once.
    """
    evicted_at = torch.tensor([[0, 3, NEVER, 4, NEVER, NEVER], [0, 3, NEVER, NEVER, 0, 0]], dtype=torch.int32)
    drawn = torch.zeros(2, 3).long(), torch.zeros(2, 3), torch.tensor([3, 1])
    rollout = smd.Rollout(torch.zeros(1, 3).long(), torch.tensor([1]), *drawn, evicted_at[None, :, None], 8)
    bytes_of_one = dict(stored_kv_bytes=8, full_kv_bytes=10 * 2 * 5, full_kv_bytes_shared=10 * (3 + 2 * 2))
    assert report.cache_figures(rollout, entry_bytes=10) == dict(visible_share=4 / 7) | bytes_of_one
    alone = dataclasses.replace(rollout, length_B=torch.tensor([1, 1]))
    assert report.cache_figures(alone, entry_bytes=10)["visible_share"] == 1.0, "of nothing, everything was seen"


def numbered(count: int, words: str = "what comes after {} is ") -> list[str]:
    return [json.dumps(dict(prompt=words.format(n), answer=str(n + 1))) for n in range(count)]


DIFFERENT = [
    ("5/3", "2/3"), ("−3", "3"), ("-$5", "5"), ("2e3", "1e3"), ("5", ".5"), ("2 000", "1 000"), ("12 cm^2", "10 cm^2"),
    ("12:30", "11:30"), (r"\frac{5}{3}", r"\frac{2}{3}"), ("5-10", "4-10"), ("1,5", "2,5"), ("1/2/2024", "3/2/2024"),
    ("3√2", "2"), (r"3\sqrt{2}", "2"), (r"2\pi", "2"), ("5²", "5"), ("3½", "3"), ("3 × 10^8", "2 × 10^8"), ("1/0", "0"),
    ("3 ½", "3"), ("1'000", "0"), ("1’000", "0"), ("1_000", "1"), ("0x1F", "0"), ("9^9^9", "9"), ("1e99999", "1"),
    ("9" * 5000, "9"), ("v1.2.3", "3"), (r"\frac{x}{2}", "2"), ("no", "5"),
]  # fmt: skip
EQUAL = [
    ("−3", "-3"), ("-$5", "-5"), ("1e3", "1000"), (".5", "0.5"), ("0.5", "1/2"), ("1{,}234", "1234"),
    ("10 cm^2", "10"), ("3 1/2", "3.5"), ("10^6", "1000000"), ("١٢", "12"), ("-3", "-3"), ("1,234.50", "1234.5"),
    ("$18", "18"), ("$-5", "-5"), ("18%", "18"), (r"\boxed{7}", "7"), ("The answer is 18.", "18"), ("18.0", "18"),
    ("**18**", "18"), ("3 + 4 = 7", "7"), ("10 or 1,000,000", "1000000"), (r"-\frac{1}{2}", "-0.5"),
    (r"3\frac{1}{2}", "3.5"), (r"3\times10^{8}", "3e8"), ("10^{-2}", "0.01"), ("1 234 567", "1234567"),
    ("9.8 m/s^2", "9.8"), ("Step 12: 30", "30"), ("答案是18。", "18"), ("10-3=7", "7"), ("18km", "18"), ("+5", "5"),
]  # fmt: skip


@pytest.mark.parametrize("said, answer", DIFFERENT)
def test_a_wrong_number_is_not_paid(said, answer):
    assert not tasks.same_number(said, answer)


@pytest.mark.parametrize("said, answer", EQUAL)
def test_a_right_number_is_paid_however_it_is_written(said, answer):
    assert tasks.same_number(said, answer)


def test_a_text_without_a_number_is_never_right():
    assert last_number("none") is None and not tasks.same_number("none", "none")


def test_an_answer_without_a_number_is_refused_with_its_line(tmp_path):
    file = write(tmp_path / "a.jsonl", *numbered(3), json.dumps(dict(prompt="when?", answer="12:30")))
    with pytest.raises(cli.UsageError, match=r"a\.jsonl, line 4: --reward number cannot read a number in .*12:30"):
        tasks.TextFile(Settings(data=file, reward="number"))


@pytest.mark.parametrize(
    "row, message",
    [
        ('{"prompt": "half a pair \\ud800 is", "answer": "x"}', r".*Unicode text; remove '\\ud800'"),
        ('{"prompt": "what is it?", "answer": "\\udfff"}', r".*Unicode text; remove '\\udfff'"),
        ("[" * 100_000 + "]" * 100_000, "not JSON in UTF-8"),
        ('{"prompt": "' + "long " * 500 + '", "answer": "x"}', "a prompt of 2500 tokens with --max-new 128 exceeds"),
    ],
)
def test_an_example_that_no_run_can_use_is_refused_with_its_line(row, message, tmp_path):
    """Would catch a line number that does not count blank lines, and a crash when a run prints its last prompt."""
    file = write(tmp_path / "a.jsonl", *numbered(1), "", row)
    with pytest.raises(cli.UsageError, match=rf"a\.jsonl, line 3: {message}"):
        train.train(Settings(data=file))
    assert not (tmp_path / "out").exists(), "something was written"


SMALL = dict(device="cpu", warmup_steps=1, steps=1, prompts=2, samples=2, max_new=4, budget="80%", eval_every=0)


def test_a_run_is_not_resumed_on_other_data(tmp_path, capsys):
    """Would catch accuracies before and after training on different questions."""
    file = write(tmp_path / "a.jsonl", *numbered(20))
    train.train(Settings(**SMALL, data=file, out="run"))
    train.train(Settings(**SMALL | dict(steps=2), data=file, out="run", resume=True))
    same = runs.fingerprint(Settings(data=file))
    write(tmp_path / "a.jsonl", *numbered(20, "what follows {} is "))
    assert runs.fingerprint(Settings(data=file)) != same
    capsys.readouterr()
    for more in (["--steps", "3"], ["--prompt", "what comes after 3 is "]):
        assert train.main(["--resume", "--out", "run", *more]) == 2
        assert f"--out run holds a run whose --data {file} has changed since" in capsys.readouterr().err


def test_a_prompt_of_the_facts_is_asked_as_in_training():
    """Would catch an answer to --prompt that does not begin as in training."""
    for asked in (1, 3):
        task = tasks.Facts(SimpleNamespace(asked=asked))
        for example in task.draw(3, numpy_stream(1)):
            assert example.begun and task.begun(example.prompt) == example.begun
    assert task.begun("What is the capital of France?") == "" == chain().begun("abbc?a")


def test_a_prompt_is_answered_with_the_most_probable_tokens():
    model = small_model(torch.float32, vocab=257)
    hidden = torch.randn(5, 32)
    logp_XV = greedy(model).log_probs(hidden)
    assert torch.equal(logp_XV.argmax(-1), model.log_probs(hidden).argmax(-1))
    assert (logp_XV.exp().sum(-1) == 1).all() and logp_XV.isfinite().all()
