"""Prompts, right answers and rewards. A task is a subclass of `Task` and a line in TASKS."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from harness import parallel
from harness.cli import UsageError, in_short, require, with_notes
from harness.number import last_number
from harness.streams import EVALUATION, PROMPTS, numpy_stream


class Example(NamedTuple):
    prompt: str
    answer: str
    begun: str = ""  # the beginning of the answer, which the model is given with the prompt
    where: str = ""  # file and line, with which an error message about the example begins


class Task:
    """The interface of a task, made by TASKS[name](settings). A subclass defines `example` and overrides defaults."""

    examples: list[Example]  # the examples whose lengths are checked: all, or one if all have the same lengths
    lessons: Sequence[int] = ()  # easier versions of the task, with which the warm-up begins; numbers above 0
    batch = 8  # examples in a supervised step of the warm-up

    def __init__(self, settings):
        self.asked = settings.asked
        self.examples = self.draw(1, numpy_stream(0, PROMPTS))

    def example(self, rng: np.random.Generator) -> Example:
        raise NotImplementedError

    def draw(self, count: int, rng: np.random.Generator) -> list[Example]:
        """Examples to train on, none of them held out."""
        return [self.example(rng) for _ in range(count)]

    def demonstrate(self, count: int, rng: np.random.Generator, lesson: int | None) -> list[Example]:
        """Examples for the warm-up: of a lesson, or of the task itself (None)."""
        return self.draw(count, rng)

    def held_out(self, count: int) -> list[Example]:
        """At most this many examples for evaluation, always the same."""
        return self.draw(count, numpy_stream(0, EVALUATION))

    def begun(self, prompt: str) -> str:
        """The beginning of the answer to a prompt, which the model is given; "" for a prompt of another form."""
        return ""

    def right(self, response: str, answer: str) -> bool:
        """Whether a response counts as right in the accuracy."""
        return same_text(response, answer)

    def share(self, response: str, answer: str) -> float:
        """The share of an answer that is right, for a reward that is less sparse."""
        return self.right(response, answer)

    def reward(self, prompt: str, response: str, answer: str) -> float:
        return 0.5 * self.share(response, answer) + 0.5 * self.right(response, answer)


def same_text(response: str, answer: str) -> bool:
    """The same text, apart from blanks around it."""
    return response.strip() == answer.strip()


def same_number(response: str, answer: str) -> bool:
    """The last numbers of both texts have the same value."""
    number = last_number(response)
    return number is not None and number == last_number(answer)


REWARDS = {"exact": same_text, "number": same_number}


def accuracy(task: Task, texts: list[str], examples: list[Example]) -> float:
    """Share of right responses; each example has the same number of responses, one after the other."""
    samples = len(texts) // len(examples)
    right = [task.right(text, examples[i // samples].answer) for i, text in enumerate(texts)]
    return sum(right) / len(texts)


def score(reward: Callable[[str, str, str], float], examples: list[Example], texts: list[str]) -> list[float]:
    """Rewards of responses, grouped as in `accuracy`; FloatingPointError for a reward that float32 cannot hold."""
    samples = len(texts) // len(examples)
    rewards = []
    for i, text in enumerate(texts):
        example = examples[i // samples]
        try:
            value = float(reward(example.prompt, text, example.answer))
        except Exception as e:
            e.add_note(f"raised by the reward {getattr(reward, '__qualname__', reward)}")
            raise
        if not abs(value) <= float(np.finfo(np.float32).max):
            raise FloatingPointError(f"a reward is {value}; it must be a finite number, at most 3.4e38 in size")
        rewards.append(value)
    return rewards


def check_reward(reward: Callable, example: Example) -> None:
    """UsageError unless reward(prompt, response, answer) returns a number for a right response."""
    try:
        score(reward, [example], [example.answer])
    except (TypeError, ValueError) as e:
        wanted, said = "a function reward(prompt, response, answer) -> float", with_notes(in_short(e), e)
        raise UsageError(f"the reward must be {wanted}; for a right answer it fails ({said})") from e


class Chain(Task):
    """Follow a cycle whose edges are listed in random order: "afbc…?c" asks for the letters that come after c.

    Multi-hop retrieval, a small version of RULER's variable tracking. Which edge a hop needs is known only after the
    hop before it, so the cache may have evicted an edge that is needed later.
    """

    LETTERS = 16  # of the cycle
    SLIP = 0.13  # probability that a hop of a demonstration is random, so that RL has something to improve
    batch = 64
    # a letter is listed as a source and as a target, and only the parity of its position tells them apart. This is hard
    # to learn on a long list and easy on a short one
    lessons = (4, 6, 8)

    def example(self, rng: np.random.Generator, letters: int = LETTERS, hops: int = 0, slip: float = 0.0) -> Example:
        """A cycle over this many letters, followed for this many hops (0: as the task asks)."""
        name = [chr(ord("a") + i) for i in rng.permutation(self.LETTERS)[:letters]]
        edges = [name[i - 1] + name[i] for i in rng.permutation(letters)]
        path = [int(rng.integers(letters))]
        for _ in range(hops or self.asked):
            path.append(int(rng.integers(letters)) if rng.random() < slip else (path[-1] + 1) % letters)
        text = "".join(name[i] for i in path)
        return Example("".join(edges) + "?" + text[0], text[1:])

    def demonstrate(self, count: int, rng: np.random.Generator, lesson: int | None) -> list[Example]:
        """In a lesson, a shorter cycle, followed all the way round; in the task itself, some hops slip."""
        if lesson is None:
            return [self.example(rng, slip=self.SLIP) for _ in range(count)]
        return [self.example(rng, letters=lesson, hops=lesson - 1) for _ in range(count)]

    def share(self, response: str, answer: str) -> float:
        """Share of right letters."""
        return sum(r == a for r, a in zip(response.strip(), answer, strict=False)) / len(answer)


class Facts(Task):
    """Look up the codes of some things in a list: "The code of apple is 61. … What is the code of river?".

    Retrieval for a pretrained model: only the end of the prompt says which of the facts are needed.
    """

    NOUNS = (
        "apple", "river", "stone", "lemon", "tiger", "piano", "cloud", "bread",
        "chair", "ocean", "garden", "window", "candle", "mountain", "bridge", "lantern",
    )  # fmt: skip
    FACTS = 12  # in a prompt

    def __init__(self, settings):
        fits = settings.asked <= self.FACTS
        require(fits, f"--asked must be at most the {self.FACTS} facts of a prompt, got {settings.asked}")
        super().__init__(settings)

    def example(self, rng: np.random.Generator) -> Example:
        nouns = [self.NOUNS[i] for i in rng.permutation(len(self.NOUNS))[: self.FACTS]]
        codes = rng.integers(10, 100, self.FACTS).tolist()
        asked = rng.permutation(self.FACTS)[: self.asked]
        listed = " ".join(f"The code of {noun} is {code}." for noun, code in zip(nouns, codes, strict=True))
        verb, code = ("is", "code") if self.asked == 1 else ("are", "codes")
        prompt = f"{listed} What {verb} the {code} of {enumerated([nouns[i] for i in asked])}?"
        return Example(prompt, " " + enumerated([str(codes[i]) for i in asked]), self.begun(prompt))

    def begun(self, prompt: str) -> str:
        question = re.search(r"What (is|are) (the codes? of .*)\?$", prompt)
        return f"T{question[2][1:]} {question[1]}" if question else ""

    def numbers(self, text: str) -> list[str]:
        return re.findall(r"[0-9]+", text)[: self.asked]

    def right(self, response: str, answer: str) -> bool:
        return self.numbers(response) == self.numbers(answer)

    def share(self, response: str, answer: str) -> float:
        """Share of right codes; of a single code, whether its first digit is right."""
        given, wanted = self.numbers(response), self.numbers(answer)
        if self.asked == 1:
            given, wanted = [number[0] for number in given], [number[0] for number in wanted]
        return sum(g == w for g, w in zip(given, wanted, strict=False)) / len(wanted)


def enumerated(words: list[str]) -> str:
    """For example "river, tiger and lemon"."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


class TextFile(Task):
    """The examples of a JSONL file, the last 10 % of them held out. The reward is 1 for a right answer, else 0."""

    def __init__(self, settings):
        # without a chat template, only a line break separates GSM8K's question from the answer
        self.examples = read_jsonl(settings.data, "\n" if settings.model is None else "")
        self.right = REWARDS[settings.reward]
        for _, answer, _, where in self.examples if settings.reward == "number" else ():
            unread = last_number(answer) is None
            require(not unread, f"{where}--reward number cannot read a number in the answer {answer[:40]!r}")
        count = len(self.examples)
        require(count >= 2, f"{settings.data}: want at least 2 examples, one of them held out, got {count}")
        held = max(1, count // 10)
        self.train, self.test = self.examples[:-held], self.examples[-held:]
        parallel.say(f"{settings.data}: {count - held} examples to train on, {held} held out")

    def draw(self, count: int, rng: np.random.Generator) -> list[Example]:
        return [self.train[i] for i in rng.choice(len(self.train), count, replace=count > len(self.train))]

    def held_out(self, count: int) -> list[Example]:
        return self.test[:count]


# for the tiny model, for --model, and for --data
TASKS = {"chain": Chain, "facts": Facts, "text": TextFile}


def read_data(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as e:
        raise UsageError(f"--data {path} cannot be read: {e.strerror}") from e


def read_jsonl(path: str, after_question: str) -> list[Example]:
    """The examples of a JSONL file; UsageError with the number of a line that is malformed."""
    numbered = enumerate(read_data(path).splitlines(), start=1)
    return [read_example(line, f"{path}, line {n}: ", after_question) for n, line in numbered if line.strip()]


def read_example(line: bytes, where: str, after_question: str) -> Example:
    """An object with "prompt" and "answer", or GSM8K's "question" and "answer"."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise UsageError(f"{where}not JSON in UTF-8 ({e})") from e
    fields = row if isinstance(row, dict) else {}
    prompt, answer = fields.get("prompt", fields.get("question")), fields.get("answer")
    fits = isinstance(prompt, str) and isinstance(answer, str)
    require(fits, f"{where}want an object with strings prompt and answer, or question and answer")
    if "prompt" not in fields:
        # GSM8K: the solution ends in "#### 1,234", and only this number is learned and compared
        _, mark, number = answer.rpartition("####")
        require(mark != "", f"{where}no #### before the final answer")
        prompt, answer = prompt + after_question, number.strip().replace(",", "")
    require(all(map(str.strip, (prompt, answer))), f"{where}the prompt and the answer must not be empty")
    return Example(prompt, answer, where=where)
