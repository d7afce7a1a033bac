"""What is asked and what is rewarded. A task is a class that meets the protocol `Task`, and a line in TASKS."""

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from harness import parallel
from harness.cli import UsageError, require
from harness.number import last_number
from harness.streams import EVALUATION, PROMPTS, numpy_stream


class Example(NamedTuple):
    prompt: str
    answer: str
    begun: str = ""  # how the answer begins, which the model is given
    where: str = ""  # what an error message about it begins with: its file and line


class Task(Protocol):
    """What a run asks of a task, which is made as `TASKS[name](settings)`; a subclass inherits what has a default."""

    examples: list[Example]  # whose lengths are checked: all, or one where all have the same lengths
    lessons: Sequence[int] = ()  # easier versions of the task, not 0, which the warm-up goes through first
    batch: int  # examples in a supervised step of the warm-up

    def draw(self, count: int, rng: np.random.Generator) -> list[Example]:
        """Examples to train on; never one that is held out."""

    def demonstrate(self, count: int, rng: np.random.Generator, lesson: int | None) -> list[Example]:
        """Examples of a lesson or, with None, of the task itself, as the supervised steps of the warm-up see them."""
        return self.draw(count, rng)

    def begun(self, prompt: str) -> str:
        """How the answer to a prompt of this task begins, which the model is given."""
        return ""

    def held_out(self, count: int) -> list[Example]:
        """The examples of the evaluation, at most so many and always the same."""
        return self.draw(count, numpy_stream(0, EVALUATION))

    def right(self, response: str, answer: str) -> bool:
        """What accuracy counts."""

    def reward(self, prompt: str, response: str, answer: str) -> float:
        """How good a response is: 1 for a right one."""


def same_text(response: str, answer: str) -> bool:
    """The same text, but for the blanks around it."""
    return response.strip() == answer.strip()


def same_number(response: str, answer: str) -> bool:
    """The last number of either text has the same value."""
    number = last_number(response)
    return number is not None and number == last_number(answer)


REWARDS = {"exact": same_text, "number": same_number}


def accuracy(task: Task, texts: list[str], examples: list[Example]) -> float:
    """Share of right responses, as many to each example, grouped by example."""
    samples = len(texts) // len(examples)
    right = [task.right(text, examples[i // samples].answer) for i, text in enumerate(texts)]
    return sum(right) / len(texts)


def score(reward: Callable[[str, str, str], float], examples: list[Example], texts: list[str]) -> list[float]:
    """Rewards of responses, as many to each example, grouped by example; FloatingPointError beyond float32."""
    samples = len(texts) // len(examples)
    rewards = []
    for i, text in enumerate(texts):
        example = examples[i // samples]
        try:
            given = reward(example.prompt, text, example.answer)
        except Exception as e:
            e.add_note(f"raised by the reward {getattr(reward, '__qualname__', reward)}")
            raise
        try:
            value = float(given)
        except OverflowError:  # an int that no float can hold
            value = math.inf
        if not abs(value) <= float(np.finfo(np.float32).max):
            raise FloatingPointError(f"a reward is {value}; it must be a finite number, at most 3.4e38 in size")
        rewards.append(value)
    return rewards


def check_reward(reward: Callable, example: Example) -> None:
    """UsageError where it cannot be called, on a right response, as reward(prompt, response, answer) -> float."""
    try:
        score(reward, [example], [example.answer])
    except (TypeError, ValueError) as e:
        raise UsageError(f"the reward must be a function reward(prompt, response, answer) -> float: {e}") from e


class Chain(Task):
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
        self.hops = settings.asked
        self.examples = self.draw(1, numpy_stream(0, PROMPTS))

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

    def reward(self, prompt: str, response: str, answer: str) -> float:
        """Half for the share of right letters, half for all of them and nothing more."""
        share = sum(r == a for r, a in zip(response.strip(), answer, strict=False)) / len(answer)
        return 0.5 * share + 0.5 * self.right(response, answer)

    def right(self, response: str, answer: str) -> bool:
        return same_text(response, answer)


class Facts(Task):
    """Look up the codes of some things in a list: "The code of apple is 61. … What is the code of river?".

    Retrieval for a pretrained model: which of the facts will be needed is said only at the end of the prompt.
    """

    NOUNS = (
        "apple", "river", "stone", "lemon", "tiger", "piano", "cloud", "bread",
        "chair", "ocean", "garden", "window", "candle", "mountain", "bridge", "lantern",
    )  # fmt: skip
    FACTS = 12  # that a prompt lists
    batch = 8

    def __init__(self, settings):
        self.asked = settings.asked
        require(
            self.asked <= self.FACTS, f"--asked must be at most the {self.FACTS} facts of a prompt, got {self.asked}"
        )
        self.examples = self.draw(1, numpy_stream(0, PROMPTS))

    def example(self, rng: np.random.Generator) -> Example:
        nouns = [self.NOUNS[i] for i in rng.permutation(len(self.NOUNS))[: self.FACTS]]
        codes = rng.integers(10, 100, self.FACTS).tolist()
        asked = rng.permutation(self.FACTS)[: self.asked]
        listed = " ".join(f"The code of {noun} is {code}." for noun, code in zip(nouns, codes, strict=True))
        of = enumerated([nouns[i] for i in asked])
        verb, code = ("is", "code") if self.asked == 1 else ("are", "codes")
        answer = " " + enumerated([str(codes[i]) for i in asked])
        prompt = f"{listed} What {verb} the {code} of {of}?"
        return Example(prompt, answer, self.begun(prompt))

    def begun(self, prompt: str) -> str:
        question = re.search(r"What (is|are) (the codes? of .*)\?$", prompt)
        return f"T{question[2][1:]} {question[1]}" if question else ""

    def draw(self, count: int, rng: np.random.Generator) -> list[Example]:
        return [self.example(rng) for _ in range(count)]

    def numbers(self, text: str) -> list[str]:
        return re.findall(r"[0-9]+", text)[: self.asked]

    def right(self, response: str, answer: str) -> bool:
        return self.numbers(response) == self.numbers(answer)

    def reward(self, prompt: str, response: str, answer: str) -> float:
        """Half for the share that is right, of one code for its first digit, and half for all of it."""
        given, wanted = self.numbers(response), self.numbers(answer)
        if self.asked == 1:
            given, wanted = [number[0] for number in given], [number[0] for number in wanted]
        share = sum(g == w for g, w in zip(given, wanted, strict=False)) / len(wanted)
        return 0.5 * share + 0.5 * self.right(response, answer)


def enumerated(words: list[str]) -> str:
    """As in "river, tiger and lemon"."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


class TextFile(Task):
    """The examples of a JSONL file, the last 10 % of them held out. Reward 1 for a right answer, else 0."""

    batch = 8

    def __init__(self, settings):
        path = settings.data
        # where there is no chat around it, a line of its own is what tells GSM8K's question from the answer
        self.examples = read_jsonl(path, "\n" if settings.model is None else "")
        self.right = REWARDS[settings.reward]
        for _, answer, _, where in self.examples if settings.reward == "number" else ():
            unread = last_number(answer) is None
            require(not unread, f"{where}--reward number cannot read a number in the answer {answer[:40]!r}")
        count = len(self.examples)
        require(count >= 2, f"{path}: want at least 2 examples, one of them to hold out, got {count}")
        held = max(1, count // 10)
        self.train = self.examples[:-held]
        self.test = self.examples[-held:]
        trained_on = {example.prompt for example in self.train}
        repeated = sum(example.prompt in trained_on for example in self.test)
        said = f"{path}: {count - held} examples to train on, {held} held out"
        said += f", of which {repeated} repeat a prompt to train on" if repeated else ""
        said += f"; one of them is {1 / held:.0%} of the accuracy" if held < 10 else ""
        parallel.say(said)

    def draw(self, count: int, rng: np.random.Generator) -> list[Example]:
        return [self.train[i] for i in rng.choice(len(self.train), count, replace=count > len(self.train))]

    def held_out(self, count: int) -> list[Example]:
        return self.test[:count]

    def reward(self, prompt: str, response: str, answer: str) -> float:
        return float(self.right(response, answer))


# what is asked of the tiny model, of --model, and with --data
TASKS = {"chain": Chain, "facts": Facts, "text": TextFile}


def read_data(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as e:
        raise UsageError(f"--data {path} cannot be read: {e.strerror}") from e


def read_jsonl(path: str, after_question: str) -> list[Example]:
    """The examples of a JSONL file; UsageError, with the line's number, where one is malformed."""
    lines = read_data(path).splitlines()
    numbered = [(n, line) for n, line in enumerate(lines, start=1) if line.strip()]
    examples = [read_example(line, f"{path}, line {n}: ", after_question) for n, line in numbered]
    if not examples:
        raise UsageError(f"--data {path} is empty; want one JSON object a line")
    return examples


def read_example(line: bytes, where: str, after_question: str) -> Example:
    """An object with "prompt" and "answer", or GSM8K's "question" and "answer"; UsageError where it is neither."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:
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
        prompt += after_question
        answer = answer.strip().replace(",", "")
    if not prompt.strip() or not answer.strip():
        raise UsageError(f"{where}the prompt and the answer must not be empty")
    return Example(prompt, answer, where=where)
