"""A model that is asked in text and answers in text: the task and the encoding around a sampler, and the evaluation."""

import dataclasses
import math
from types import SimpleNamespace

import torch
from torch import Tensor, nn

import smd
from harness import device, parallel, pretrained, shared, streams, tasks
from harness.base import SEED
from harness.cli import UsageError
from harness.report import Progress, heartbeat
from harness.settings import parse_budget
from harness.tasks import TASKS, Example
from harness.text import Form, check_example
from tiny_model import ModelConfig, TinyModel

CACHES = "sparse", "dense"  # the sampler's compressed cache, and a full one
EVALUATION_BATCH = 64  # held-out prompts at a time
PRETRAINED_BATCH = 16  # the same for a pretrained model: a dense cache of 64 prompts would set a run's peak memory
CONTEXT = 2048  # most tokens of a prompt and its response for the tiny model
ANSWER = 32  # a chat's answer to --prompt may have at least this many tokens


def greedy(model) -> SimpleNamespace:
    """The model, but its most probable token has all of the probability."""

    def log_probs(hidden_XC: Tensor) -> Tensor:
        logp_XV = model.log_probs(hidden_XC)
        return torch.full_like(logp_XV, -1e9).scatter(-1, logp_XV.argmax(dim=-1, keepdim=True), 0.0)

    return SimpleNamespace(extend=model.extend, embed_tokens=model.embed_tokens, log_probs=log_probs)


class Agent:
    """Task, encoding, model and eviction of the settings."""

    def __init__(self, settings, plain: bool = False):
        """Load model and task, and check them against the settings; UsageError.

        plain: sample and replay by the definition in smd.py, in place of the optimised version in harness/shared.py.
        """
        self.s = s = settings
        versions = (smd.sample, smd.replay) if plain else (shared.sample, shared.replay)
        self.runtime = smd.Runtime(*versions, s.backend, parallel.all_sum)
        limits = s.interval, s.window, s.sinks, s.pool, s.protect
        self.eviction = smd.Eviction(s.eviction, parse_budget(s.budget), *limits)
        if s.model is None:
            self.form, self.context = Form(), CONTEXT
            # 8/3 of the width, rounded up to a multiple of 32: as many weights as an MLP of 4 times the width
            ffn = 32 * math.ceil(s.width * 8 / 96)
            self.model = TinyModel(ModelConfig(self.form.encoding.n_vocab, s.width, ffn=ffn), seed=SEED)
        else:
            self.model, self.form = pretrained.open_model(s.model, s.template)
            self.context = self.model.config.context
        self.config = self.model.config
        device.check(s.device, s.backend, self.config.head_dim)
        self.task = TASKS[s.task](s)
        lengths = [check_example(self.form, example, s.max_new, self.context) for example in self.task.examples]
        length, shortest = min(zip(lengths, self.task.examples, strict=True))
        try:
            self.eviction.budget_for(torch.tensor([length]))
        except ValueError as e:
            raise UsageError(f"{shortest.where}--{e} of a prompt's {length} tokens") from e
        self.model.to(s.device)
        for layers in (module for module in self.model.modules() if isinstance(module, nn.ModuleList)):
            for layer in layers:
                layer.register_forward_hook(lambda *_: heartbeat())

    def draw(self, step: int) -> tuple[list[Example], Tensor]:
        """The prompts of a training step, and the keys (N,) of the random numbers for their responses."""
        examples = self.task.draw(self.s.prompts, streams.numpy_stream(self.s.seed, streams.PROMPTS, step))
        return examples, self.keys(len(examples), self.s.seed, streams.SAMPLING, step)

    @property
    def entry_bytes(self) -> int:
        """Bytes of a token's keys and values in all layers."""
        c = self.config
        return 2 * c.layers * c.kv_heads * c.head_dim * (2 if self.s.dtype == "bfloat16" else 4)

    def keys(self, count: int, *stream: int) -> Tensor:
        return streams.hashed(*stream, torch.arange(count, device=self.s.device))

    def tokenize(self, examples: list[Example]) -> tuple[Tensor, Tensor]:
        return self.form.tokenize(examples, self.s.device)

    def texts(self, rollout: smd.Rollout) -> list[str]:
        return [self.form.decode(row) for row in rollout.response_BR.tolist()]

    def respond(
        self, examples: list[Example], samples: int, eviction: smd.Eviction | None, key_N: Tensor,
        max_new: int | None = None, model=None,
    ) -> tuple[smd.Rollout, list[str]]:  # fmt: skip
        """This many samples for each prompt, grouped by prompt: the rollout, and its responses as text."""
        limits = samples, max_new or self.s.max_new, self.form.ends, eviction
        with device.precision(self.s):
            prompts = self.tokenize(examples)
            rollout = self.runtime.sample(model or self.model, *prompts, *limits, streams.keyed(key_N, samples))
        return rollout, self.texts(rollout)

    def check_finite(self) -> None:
        """FloatingPointError where a weight is not finite, or the logits after a short prompt."""
        if not torch.stack([x.isfinite().all() for x in self.model.parameters()]).all():
            raise FloatingPointError("the updated policy is not finite")
        prompt, uniform = self.tokenize([Example("a", "")]), streams.keyed(self.keys(1, 0), 1)
        with device.precision(self.s):
            smd.sample(self.model, *prompt, 1, 1, self.form.ends, uniform=uniform)

    def evaluate(self, caches: tuple[str, ...] = CACHES) -> dict[str, float]:
        """Accuracy on fixed held-out prompts, one sample each, with the sparse cache and with the dense one."""
        held_out = self.task.held_out(self.s.eval_prompts)
        key_N = self.keys(len(held_out), 0, streams.EVALUATION, 1)
        size = EVALUATION_BATCH if self.s.model is None else PRETRAINED_BATCH
        batches = [slice(start, start + size) for start in range(0, len(held_out), size)]
        # each process takes whole batches, so that any number of processes computes the same batches
        batches = batches[parallel.share(len(batches))]

        def answers(cache: str) -> list[str]:
            texts, eviction = [], self.eviction if cache == "sparse" else None
            for batch in batches:
                texts += self.respond(held_out[batch], 1, eviction, key_N[batch])[1]
                progress.step()
            return texts

        found = {}
        with Progress(desc="evaluation", total=len(caches) * len(batches)) as progress:
            for cache in caches:
                parts = parallel.gather(parallel.raise_on_all_ranks(answers, cache))
                texts = [text for part in parts for text in part]
                found[cache] = tasks.accuracy(self.task, texts, held_out)
        return found

    def answer(self, prompt: str) -> str:
        """The greedy answer with either cache, a line each; UsageError for a prompt that is empty or too long.

        A prompt of the task's form is asked as in training. The budget of a short prompt is raised to the number of
        keys that the policy always keeps.
        """
        begun = self.task.begun(prompt)
        chat = self.s.model is not None and not begun
        max_new = max(ANSWER, self.s.max_new) if chat else self.s.max_new
        example = Example(prompt, "", begun, where="--prompt: ")
        length = check_example(self.form, example, max_new, self.context)
        lines, eviction = [], self.eviction
        try:
            eviction.budget_for(torch.tensor([length]))
        except ValueError:
            least = eviction.minimum_budget()
            asked = f"--budget {self.s.budget} of {length} tokens is less than {eviction.policy} always keeps"
            lines.append(f"{asked}: {least} are kept")
            eviction = dataclasses.replace(eviction, budget=least)
        key_N = self.keys(1, self.s.seed, streams.EVALUATION, 2)
        for cache, evicts in zip(CACHES, (eviction, None), strict=True):
            _, (response,) = self.respond([example], 1, evicts, key_N, max_new, greedy(self.model))
            lines.append(f"{cache + ' cache:':14}{response}")
        return "\n".join(lines)
