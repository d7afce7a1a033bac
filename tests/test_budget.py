"""How many keys stay: a count, or a share of the prompt, and nothing that could be taken for the other."""

from fractions import Fraction

import pytest
import torch

import smd
from harness import cli
from harness.settings import Settings


@pytest.mark.parametrize(
    "budget, want",
    [(22, 22), ("22", 22), (1, 1), ("1", 1), ("65%", Fraction(13, 20)), ("100%", 1), ("0.5%", Fraction(1, 200))],
)
def test_a_budget_is_a_count_or_a_share_in_percent(budget, want):
    assert smd.parse_budget(budget) == want


@pytest.mark.parametrize("given", [0.25, 1.0, "0.25", "1.0", ".25", "1."])
def test_a_share_written_as_a_number_is_refused_with_the_way_to_write_it(given):
    """Would catch `--budget 1` keeping one key where `--budget 1.0` kept all."""
    want = "25%" if "25" in str(given) else "100%"
    with pytest.raises(ValueError, match=f"such as 65% .*, got {given}; as a share that is {want}"):
        smd.checked(Settings(budget=given))


@pytest.mark.parametrize("budget", ["many", "-3", "1.5", "101%", "0%", "%", "5 %", "nan", True, 2.0, "9" * 19, "٣"])
def test_what_is_neither_a_count_nor_a_share_is_refused(budget):
    with pytest.raises(ValueError, match=f"budget must be a count of keys, such as 22, or a share .*, got {budget}"):
        smd.checked(Settings(budget=budget))


def test_a_share_is_exact_as_it_is_written():
    """In floating point 7 % of 100 tokens are more than 7."""
    length_N = torch.tensor([100, 200, 101])
    assert smd.Eviction("knorm", "7%").keep(length_N).tolist() == [7, 14, 8]
    assert smd.Eviction("knorm", "100%").keep(length_N).tolist() == [100, 200, 101]
    assert smd.Eviction("knorm", "0.1%").keep(length_N).tolist() == [1, 1, 1]


def test_the_command_line_takes_both_forms():
    parse = lambda *words: cli.parse(Settings, smd.CHOICES, "about", list(words))  # noqa: E731
    assert parse("--budget", "22") == dict(budget=22)
    assert parse("--budget", "65%") == dict(budget="65%")


def test_a_short_prompt_is_answered_with_what_the_policy_is_forced_to_keep(tmp_path, monkeypatch):
    """Would catch "budget must be at least 12, got 10" as the answer to a question."""
    monkeypatch.chdir(tmp_path)
    s = Settings(budget="50%", window=6, width=16, eval_prompts=2, warmup_steps=0, device="cpu")
    agent = smd.agent_for(smd.checked(s))
    said, answers = agent.answer("ab?a").split("\n", 1)
    assert said == "--budget 50% of 4 tokens is 2, but snapkv keeps at least 7: 7 are kept"
    assert answers.startswith("sparse cache: ") and "dense cache: " in answers
    assert smd.agent_for(smd.checked(s)).answer("abcdefghijkl?a").startswith("sparse cache: ")
