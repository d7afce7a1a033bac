"""What is asked and what is rewarded. A task is a class that meets the protocol `Task`, and a line in TASKS."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from harness.cli import UsageError, require
from harness.streams import EVALUATION, PROMPTS, numpy_stream


class Example(NamedTuple):
    prompt: str
    answer: str


class Task(Protocol):
    """What a run asks of a task, which is made from the settings: `TASKS[name](settings)`."""

    examples: list[Example]  # whose lengths are checked: all, or one where all have the same lengths
    lessons: Sequence[int]  # easier versions of the task, not 0, which the warm-up goes through first
    batch: int  # examples in a supervised step of the warm-up

    @staticmethod
    def defaults(settings) -> dict:
        """max_new, budget, pool, warmup_steps and prompts, for where the user leaves them open."""

    def draw(self, count: int, rng: np.random.Generator) -> list[Example]:
        """Examples to train on; never one that is held out."""

    def demonstrate(self, count: int, rng: np.random.Generator, lesson: int | None) -> list[Example]:
        """Examples of a lesson or, with None, of the task itself, as the supervised steps of the warm-up see them."""

    def held_out(self, count: int) -> list[Example]:
        """The examples of the evaluation, at most so many and always the same."""

    def reward(self, prompt: str, response: str, answer: str) -> float:
        """How good a response is: 1 for a right one."""


def is_right(response: str, answer: str) -> bool:
    """The same text, but for the blanks around it."""
    return response.strip() == answer.strip()


def accuracy(texts: list[str], examples: list[Example]) -> float:
    """Share of right responses, as many to each example, grouped by example."""
    samples = len(texts) // len(examples)
    right = [is_right(text, examples[i // samples].answer) for i, text in enumerate(texts)]
    return sum(right) / len(texts)


def score(reward: Callable[[str, str, str], float], examples: list[Example], texts: list[str]) -> list[float]:
    """Rewards of responses, as many to each example, grouped by example; FloatingPointError where one is not finite."""
    samples = len(texts) // len(examples)
    rewards = []
    for i, text in enumerate(texts):
        prompt, answer = examples[i // samples]
        rewards.append(float(reward(prompt, text, answer)))
        if not math.isfinite(rewards[-1]):
            raise FloatingPointError(f"a reward is {rewards[-1]}")
    return rewards


def check_reward(reward: Callable, example: Example) -> None:
    """UsageError where it cannot be called, on a right response, as reward(prompt, response, answer) -> float."""
    try:
        score(reward, [example], [example.answer])
    except (TypeError, ValueError) as e:
        raise UsageError(f"the reward must be a function reward(prompt, response, answer) -> float: {e}") from e


class Chain:
    """Follow a cycle whose edges are listed in random order: "afbc…?c" asks for the letters that come after c.

    Multi-hop retrieval, the small version of RULER's variable tracking: which edge a hop needs is known only after the
    hop before it, so a compressed prompt may have lost what is needed later.
    """

    LETTERS = 16  # of the cycle
    SLIP = 0.13  # chance that a hop of a demonstration is drawn at random: it leaves RL something to improve
    batch = 64
    # a letter stands in the list as a source and as a target, and only its place, odd or even, tells them apart: hard
    # to learn on a long list, easy on a short one, and what is learned there carries over
    lessons = (4, 6, 8)

    def __init__(self, settings):
        require(settings.data is None, f"--task chain reads no file, got --data {settings.data}")
        self.hops = settings.hops
        self.examples = self.draw(1, numpy_stream(0, PROMPTS))

    @staticmethod
    def defaults(settings) -> dict:
        return dict(max_new=settings.hops + 1, budget=22, pool=1, warmup_steps=400, prompts=32)

    def example(self, rng: np.random.Generator, letters: int, hops: int, slip: float) -> Example:
        """A cycle over so many of the letters, followed for so many hops."""
        name = [chr(ord("a") + i) for i in rng.permutation(self.LETTERS)[:letters]]
        edges = [name[i - 1] + name[i] for i in rng.permutation(letters)]
        path = [int(rng.integers(letters))]
        for _ in range(hops):
            path.append(int(rng.integers(letters)) if rng.random() < slip else (path[-1] + 1) % letters)
        text = "".join(name[i] for i in path)
        return Example("".join(edges) + "?" + text[0], text[1:])

    def draw(self, count: int, rng: np.random.Generator) -> list[Example]:
        return [self.example(rng, self.LETTERS, self.hops, slip=0.0) for _ in range(count)]

    def demonstrate(self, count: int, rng: np.random.Generator, lesson: int | None) -> list[Example]:
        """A lesson is a shorter cycle, followed all the way round; in the task itself some hops slip."""
        if lesson is None:
            return [self.example(rng, self.LETTERS, self.hops, self.SLIP) for _ in range(count)]
        return [self.example(rng, lesson, lesson - 1, slip=0.0) for _ in range(count)]

    def held_out(self, count: int) -> list[Example]:
        return self.draw(count, numpy_stream(0, EVALUATION))

    def reward(self, prompt: str, response: str, answer: str) -> float:
        """Half for the share of right letters, half for all of them and nothing more."""
        share = sum(r == a for r, a in zip(response.strip(), answer, strict=False)) / len(answer)
        return 0.5 * share + 0.5 * is_right(response, answer)


class TextFile:
    """The examples of a JSONL file, the last 10 % of them held out. Reward 1 for the right answer, else 0."""

    lessons = ()
    batch = 8

    def __init__(self, settings):
        path = settings.data
        require(path is not None, "--task text needs --data FILE.jsonl")
        self.examples = read_jsonl(path)
        count = len(self.examples)
        require(count >= 2, f"{path}: want at least 2 examples, one of them to hold out, got {count}")
        held = max(1, count // 10)
        self.train = self.examples[:-held]
        self.test = self.examples[-held:]

    @staticmethod
    def defaults(settings) -> dict:
        return dict(max_new=128, budget=0.5, pool=5, warmup_steps=100, prompts=8)

    def draw(self, count: int, rng: np.random.Generator) -> list[Example]:
        return [self.train[i] for i in rng.choice(len(self.train), count, replace=count > len(self.train))]

    def demonstrate(self, count: int, rng: np.random.Generator, lesson: int | None) -> list[Example]:
        return self.draw(count, rng)

    def held_out(self, count: int) -> list[Example]:
        return self.test[:count]

    def reward(self, prompt: str, response: str, answer: str) -> float:
        return float(is_right(response, answer))


TASKS = {"chain": Chain, "text": TextFile}


def read_jsonl(path: str) -> list[Example]:
    """The examples of a JSONL file; UsageError, with the line's number, where one is malformed."""
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as e:
        raise UsageError(f"--data {path} cannot be read: {e.strerror}") from e
    examples = [read_example(line, f"{path}, line {n}: ") for n, line in enumerate(lines, start=1) if line.strip()]
    if not examples:
        raise UsageError(f"--data {path} is empty; want one JSON object a line")
    return examples


def read_example(line: bytes, where: str) -> Example:
    """An object with "prompt" and "answer", or GSM8K's "question" and "answer"; UsageError where it is neither."""
    try:
        row = json.loads(line)
    except ValueError as e:
        raise UsageError(f"{where}not JSON in UTF-8 ({e})") from e
    fields = row if isinstance(row, dict) else {}
    prompt = fields.get("prompt", fields.get("question"))
    answer = fields.get("answer")
    if not isinstance(prompt, str) or not isinstance(answer, str):
        raise UsageError(f"{where}want an object with strings prompt and answer, or question and answer")
    if "prompt" not in fields:
        # GSM8K: the worked solution ends in "#### 1,234", and only that number is learned and matched
        _, mark, answer = answer.rpartition("####")
        if not mark:
            raise UsageError(f"{where}no #### before the final answer")
        prompt += "\n"
        answer = answer.strip().replace(",", "")
    if not prompt.strip() or not answer.strip():
        raise UsageError(f"{where}the prompt and the answer must not be empty")
    return Example(prompt, answer)
