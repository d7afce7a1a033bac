"""A model that is asked in text and answers in text: the task and the encoding around a sampler, and the evaluation."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from harness import device, parallel, pretrained, runs, streams, tasks
from harness.base import SEED
from harness.cli import UsageError, require
from harness.report import Progress, heartbeat
from harness.tasks import TASKS, Example
from harness.text import Form, check_example, decode, load_encoding, tokenize
from tiny_model import ModelConfig, TinyModel

CACHES = "sparse", "dense"  # the sampler's, which is compressed, and one that keeps everything
EVALUATION_BATCH = 64  # held-out prompts at a time
PRETRAINED_BATCH = 16  # of a pretrained model, whose dense cache of 64 prompts would be the most that a run ever holds
CONTEXT = 2048  # tokens of a prompt and its response: more of them do not fit into a laptop's memory
ANSWER = 32  # tokens of an answer to --prompt in a chat, at least


def swiglu_width(width: int) -> int:
    """8/3 of the model's, up to a multiple of 32: so its three matrices weigh what two of 4 times the width would."""
    return 32 * math.ceil(width * 8 / 96)


class Agent:
    """Task, encoding and model of the settings. `sample` and `eviction` are the sampler and what it may keep."""

    def __init__(self, settings, sample: Callable, eviction):
        """Load the task and check it against the settings: nothing is computed or written before this has passed."""
        self.s = s = settings
        self.sample = sample
        self.eviction = eviction
        self.source = None if s.model is None else pretrained.open_model(s.model)
        if self.source is None:
            encoding = load_encoding(s.encoding)
            unit = 2 * ModelConfig.heads
            require(s.width % unit == 0, f"--width must be a multiple of {unit}, got {s.width}")
            self.config = ModelConfig(encoding.n_vocab, s.width, ffn=swiglu_width(s.width))
            self.form = Form(encoding)
            self.context = CONTEXT
        else:
            with pretrained.naming(s.model):
                self.config = self.source.model_config()
                self.form = self.source.form(s.template)
            self.context = self.source.config["max_position_embeddings"]
        device.check(s.device, s.backend, self.config.head_dim)
        device.faster_products()
        self.encoding = self.form.encoding
        self.task = TASKS[s.task](s)
        lengths = [check_example(self.form, example, s.max_new, self.context) for example in self.task.examples]
        length, shortest = min(zip(lengths, self.task.examples, strict=True))
        try:
            eviction.keep(torch.tensor([length]))
        except ValueError as e:
            raise UsageError(f"{shortest.where}--{e}") from e
        self.model = TinyModel(self.config, seed=SEED)
        if self.source is not None:
            with pretrained.naming(s.model):
                self.source.load(self.model)
        self.model.to(s.device)
        for layers in (module for module in self.model.modules() if isinstance(module, nn.ModuleList)):
            for layer in layers:
                layer.register_forward_hook(lambda *_: heartbeat())

    def draw(self, step: int) -> tuple[list[Example], Tensor]:
        """The prompts of a training step, and the keys (N,) of what is sampled for them."""
        examples = self.task.draw(self.s.prompts, streams.numpy_stream(self.s.seed, streams.PROMPTS, step))
        return examples, self.keys(len(examples), self.s.seed, streams.SAMPLING, step)

    def keys(self, count: int, *stream: int) -> Tensor:
        return streams.hashed(*stream, torch.arange(count, device=self.s.device))

    def respond(
        self, examples: list[Example], samples: int, evict: bool, key_N: Tensor, some: slice = slice(None),
        max_new: int | None = None,
    ):  # fmt: skip
        """So many samples for some of the prompts, grouped by prompt: the rollout, and its responses as text.

        All prompts are padded alike, whichever are answered.
        """
        prompt_NP, pad_N = tokenize(self.form, examples, self.s.device)
        limits = samples, max_new or self.s.max_new, self.encoding.eot_token
        eviction = self.eviction if evict else None
        with device.precision(self.s):
            rollout = self.sample(self.model, prompt_NP[some], pad_N[some], *limits, eviction, key_N[some])
        return rollout, [decode(self.encoding, row) for row in rollout.response_BR.tolist()]

    def check_finite(self) -> None:
        """FloatingPointError where the weights are not finite; what they make of a prompt, the sampler looks at."""
        # one look at the device for all of them
        if not torch.stack([x.isfinite().all() for x in self.model.parameters()]).all():
            raise FloatingPointError("the updated policy is not finite")

    def evaluate(self, caches: tuple[str, ...] = CACHES) -> dict[str, float]:
        """Accuracy on fixed held-out prompts, one sample each, with the sparse cache and with the dense one."""
        held_out = self.task.held_out(self.s.eval_prompts)
        key_N = self.keys(len(held_out), 0, streams.EVALUATION, 1)
        size = EVALUATION_BATCH if self.source is None else PRETRAINED_BATCH
        batches = [slice(start, start + size) for start in range(0, len(held_out), size)]
        # of several processes, each takes whole batches: so they are those of a single one
        batches = batches[parallel.share(len(batches))]

        def answers(cache: str) -> list[str]:
            texts = []
            for batch in batches:
                texts += self.respond(held_out[batch], 1, cache == "sparse", key_N[batch])[1]
                progress.step()
            return texts

        found = {}
        with Progress("evaluation", len(caches) * len(batches), lines=0) as progress:
            for cache in caches:
                texts = parallel.listed(parallel.agreed(answers, cache))
                found[cache] = tasks.accuracy(self.task, texts, held_out)
        return found

    def leave(self, out: Path) -> None:
        """Write a pretrained model, as it has become, into a run's folder."""
        if self.source is not None:
            pretrained.write_folder(self.model, self.source, out / runs.MODEL)

    def answer(self, prompt: str) -> str:
        """One sample with either cache, a line each; UsageError for a prompt that is empty or too long.

        Of a prompt so short that the policy is forced to keep more than the budget, as much is kept as it is forced to.
        """
        # in a chat the answer is not begun for the model, as a task may do, and it is longer
        max_new = self.s.max_new if self.source is None else max(ANSWER, self.s.max_new)
        example = Example(prompt, "", where="--prompt: ")
        length = check_example(self.form, example, max_new, self.context)
        lines = []
        wanted = self.eviction.wanted(torch.tensor([length])).item()
        forced = sum(self.eviction.forced.values())
        if wanted < forced:
            asked = f"--budget {self.eviction.budget} of {length} tokens is {wanted}"
            lines.append(f"{asked}, but {self.eviction.policy} keeps at least {forced}: {forced} are kept")
            self.eviction = dataclasses.replace(self.eviction, budget=forced)
        key_N = self.keys(1, self.s.seed, streams.EVALUATION, 2)
        for cache in CACHES:
            _, (response,) = self.respond([example], 1, cache == "sparse", key_N, max_new=max_new)
            lines.append(f"{cache + ' cache:':14}{response}")
        return "\n".join(lines)
