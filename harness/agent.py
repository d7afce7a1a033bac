"""A model that is asked in text and answers in text: the task and the encoding around a sampler, and the evaluation."""

from collections.abc import Callable

import torch

from harness import streams, tasks
from harness.base import SEED
from harness.report import Progress
from harness.tasks import TASKS, Example
from harness.text import check_examples, check_prompt, decode, load_encoding, tokenize
from tiny_model import ModelConfig, TinyModel, never_evicted, swiglu_width

EVALUATION_BATCH = 64  # held-out prompts at a time
CONTEXT = 2048  # tokens of a prompt and its response: more of them do not fit into a laptop's memory


class Agent:
    """Task, encoding and model of the settings. `sample` and `eviction` are the sampler and what it may keep."""

    def __init__(self, settings, sample: Callable, eviction):
        """Load the task and check it against the settings: nothing is computed or written before this has passed."""
        self.s = s = settings
        self.sample = sample
        self.eviction = eviction
        self.encoding = load_encoding(s.encoding)
        self.task = TASKS[s.task](s)
        self.eviction.keep(check_examples(self.encoding, self.task.examples, s.max_new, CONTEXT, s.data))
        self.config = ModelConfig(self.encoding.n_vocab, s.width, ffn=swiglu_width(s.width))
        self.model = TinyModel(self.config, seed=SEED).to(s.device)

    def draw(self, step: int) -> tuple[list[Example], torch.Generator]:
        """The prompts of a training step, and the generator of its samples."""
        examples = self.task.draw(self.s.prompts, streams.numpy_stream(self.s.seed, streams.PROMPTS, step))
        return examples, streams.torch_stream(self.s.device, self.s.seed, streams.SAMPLING, step)

    def respond(self, examples: list[Example], samples: int, evict: bool, generator: torch.Generator):
        """So many samples for each prompt, grouped by prompt: the rollout, and its responses as text."""
        prompts = tokenize(self.encoding, [e.prompt for e in examples], self.s.device)
        limits = samples, self.s.max_new, self.encoding.eot_token
        eviction = self.eviction if evict else None
        rollout = self.sample(self.model, *prompts, *limits, eviction, generator)
        return rollout, [decode(self.encoding, row) for row in rollout.response_BR.tolist()]

    @torch.no_grad()
    def check_finite(self) -> None:
        """FloatingPointError where the weights, or what they make of a prompt, are not finite."""
        tokens_NP, pad_N = tokenize(self.encoding, [self.task.examples[0].prompt], self.s.device)
        record_L1GP = never_evicted(pad_N, tokens_NP.shape[1]).repeat(self.config.layers, 1, self.config.kv_heads, 1)
        logits_V = self.model.logits(self.model(tokens_NP, pad_N, record_L1GP)[0, -1])
        if not all(x.isfinite().all() for x in (logits_V, *self.model.parameters())):
            raise FloatingPointError("the updated policy is not finite")

    def evaluate(self) -> dict[str, float]:
        """Accuracy on fixed held-out prompts, one sample each, with the sparse and with the full cache."""
        held_out = self.task.held_out(self.s.eval_prompts)
        batches = [held_out[i : i + EVALUATION_BATCH] for i in range(0, len(held_out), EVALUATION_BATCH)]
        found = {}
        with Progress("evaluation", 2 * len(batches), lines=0) as progress:
            for cache, evict in (("sparse", True), ("dense", False)):
                generator = streams.torch_stream(self.s.device, 0, streams.EVALUATION, 1)
                texts = []
                for batch in batches:
                    texts += self.respond(batch, 1, evict, generator)[1]
                    progress.step()
                found[cache] = tasks.accuracy(texts, held_out)
        return found

    def answer(self, prompt: str) -> str:
        """One sample with either cache, a line each; UsageError for a prompt that is empty or too long."""
        check_prompt(self.encoding, prompt, self.s.max_new, CONTEXT, "--prompt: ")
        lines = []
        for name, evict in (("sparse cache", True), ("full cache", False)):
            generator = streams.torch_stream(self.s.device, self.s.seed, streams.EVALUATION, 2)
            _, (response,) = self.respond([Example(prompt, "")], 1, evict, generator)
            lines.append(f"{name + ':':14}{response}")
        return "\n".join(lines)
