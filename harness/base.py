"""Where the policy comes from that RL starts with: supervised steps on the task, made once and kept on disk.

First the task's lessons, each until a right answer has probability LEARNED, then the task itself. A share DROP of the
prompt's keys is hidden from the answer in each layer and head, so that heads learn not to rely on a single copy of what
they need. B examples, P prompt columns, R answer columns, T = P + R - 1, V vocabulary, G kv heads.
"""

import ast
import hashlib
import inspect
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

import kernel
import tiny_model
from harness import files, parallel, streams, tasks, text
from harness.report import Progress
from harness.streams import WARMUP, numpy_stream, torch_stream
from harness.tasks import Example
from harness.text import Form, tokenize
from tiny_model import TinyModel, never_evicted

CACHE = Path("out/cache")
SEED = 0  # of the weights and of the demonstrations
DROP = 0.3
LEARNED = 0.5
LEARNING_RATE = 3e-3
RISING = 50  # steps over which the rate rises
PRETRAINED_RATE = 1e-4  # of a pretrained model, all of it by AdamW
PRETRAINED_RISING = 5


def answer_logp(
    model: TinyModel, form: Form, examples: list[Example], generator: torch.Generator, backend: str | None
) -> tuple[Tensor, Tensor]:
    """Log-probs of the right answers, end of text included, zero past their ends (B, R); and how many tokens (B,).

    Each layer and kv head loses a random share DROP of the prompt's keys when the prompt ends.
    """
    device = model.embed_tokens.weight.device
    encoding = form.encoding
    prompt_BP, pad_B = tokenize(form, examples, device)
    answers = [[*encoding.encode_ordinary(e.answer), encoding.eot_token] for e in examples]
    length_B = torch.tensor([len(answer) for answer in answers], device=device)
    R, P = max(map(len, answers)), prompt_BP.shape[1]
    answer_BR = torch.tensor([answer + [encoding.eot_token] * (R - len(answer)) for answer in answers], device=device)
    evicted_at_LBGT = never_evicted(pad_B, P + R - 1).repeat(model.config.layers, 1, model.config.kv_heads, 1)
    prompt_LBGP = evicted_at_LBGT[..., :P]  # a view: what is written to it is written to the record
    dropped_LBGP = torch.rand(prompt_LBGP.shape, generator=generator, device=device) < DROP
    prompt_LBGP.copy_(torch.where(dropped_LBGP, prompt_LBGP.clamp(max=P), prompt_LBGP))  # padding stays hidden

    hidden_BTC = model(torch.cat((prompt_BP, answer_BR[:, :-1]), dim=1), pad_B, evicted_at_LBGT, backend)
    logp_BRV = model.log_probs(hidden_BTC[:, P - 1 :])
    logp_BR = logp_BRV.gather(-1, answer_BR[..., None])[..., 0]
    past_end_BR = torch.arange(R, device=device) >= length_B[:, None]
    return logp_BR.masked_fill(past_end_BR, 0.0), length_B


class WarmUp:
    """The supervised steps of an agent's model on its task."""

    def __init__(self, agent):
        self.model, self.task, self.form, self.backend = agent.model, agent.task, agent.form, agent.s.backend
        weights = dict(agent.model.named_parameters())
        self.rate = LEARNING_RATE if agent.source is None else PRETRAINED_RATE
        self.rising = RISING if agent.source is None else PRETRAINED_RISING
        self.optimizers = []
        if agent.source is None:
            # Muon for the matrices of the layers: they learn retrieval in half the steps that AdamW takes
            names = [name for name in weights if name.startswith("layers") and weights[name].ndim == 2]
            matrices = [weights.pop(name) for name in names]
            options = dict(lr=self.rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
            self.optimizers.append(torch.optim.Muon(matrices, **options))
        adamw = torch.optim.AdamW(weights.values(), lr=self.rate, betas=(0.9, 0.95), weight_decay=0.0)
        self.optimizers.append(adamw)
        self.taken = 0

    def loss(self, lesson: int | None, step: int) -> tuple[Tensor, float]:
        """Of one batch: the mean over its tokens, and the mean probability of a whole right answer."""
        key = (SEED, WARMUP, lesson or 0, step)
        examples = self.task.demonstrate(self.task.batch, numpy_stream(*key), lesson)
        generator = torch_stream(self.model.embed_tokens.weight.device.type, *key)
        logp_BR, length_B = answer_logp(self.model, self.form, examples, generator, self.backend)
        right = logp_BR.detach().sum(dim=1).exp().mean().item()
        return -logp_BR.sum() / length_B.sum(), right

    def learn(self, loss: Tensor, down: float) -> None:
        self.model.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if not norm.isfinite():
            raise FloatingPointError(f"the warm-up's loss is {loss.item()}, the norm of its gradient {norm.item()}")
        self.taken += 1
        for optimizer in self.optimizers:
            # the rate rises over the first steps, counted over all lessons
            optimizer.param_groups[0]["lr"] = self.rate * min(1.0, self.taken / self.rising, down)
            optimizer.step()
        torch.clear_autocast_cache()  # it would go on with the old weights

    def lesson(self, lesson: int | None, steps: int) -> None:
        """Take so many steps on a lesson, or fewer if it is learned before; all of them on the task itself (None)."""
        name = "warm-up, the task" if lesson is None else f"warm-up, lesson {lesson}"
        right = 0.0
        with Progress(name, steps) as progress:
            for step in range(steps):
                loss, now = self.loss(lesson, step)
                right += 0.1 * (now - right)  # a running mean over examples that are new to the model
                if lesson is not None and right >= LEARNED:
                    return
                # of the task itself, the rate falls to zero over the second half
                self.learn(loss, down=1.0 if lesson is not None else 2 - 2 * step / steps)
                progress.step(right=right)


def meaning(source: Path) -> str:
    """A Python file without its comments, docstrings and layout: what may change without changing what it computes."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documented and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.dump(tree)


def base_path(agent, fingerprint: str | None) -> Path:
    """Where the base policy is kept, named by all that determines it: model, task, steps, code and arithmetic.

    The number of threads is not part of it: after 25 steps with one and with two, the weights were equal to the bit.
    """
    device = agent.model.embed_tokens.weight.device
    products = torch.backends.mkldnn.matmul.fp32_precision
    arithmetic = [torch.__version__, torch.backends.cpu.get_cpu_capability(), products, device.type, agent.s.backend]
    if device.type == "cuda":
        arithmetic.append(torch.cuda.get_device_name(device))
    modules = (kernel, tiny_model, streams, tasks, text, sys.modules[__name__])
    files = {Path(module.__file__) for module in modules} | {Path(inspect.getsourcefile(type(agent.task)))}
    code = [meaning(file) for file in sorted(files)]
    form = [agent.encoding.name, agent.form.template]
    task = [type(agent.task).__name__, vars(agent.task), agent.s.warmup_steps]
    key = [agent.config, fingerprint, form, task, arithmetic, code]
    return CACHE / f"base-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.pt"


def load_base(agent, fingerprint: str | None) -> None:
    """Give an agent's model the weights that RL starts from: kept from an earlier run, or made by the first process."""
    if agent.source is not None and agent.s.warmup_steps == 0:
        parallel.say(f"base policy: {agent.s.model}")
        return
    path = parallel.by_first(base_path, agent, fingerprint)
    if parallel.by_first(path.exists):
        parallel.say(f"base policy: read from {path}")
    else:
        parallel.by_first(make_base, agent, path)
    parallel.agreed(files.restore, path, agent.model)


def make_base(agent, path: Path) -> None:
    """Take the supervised steps, and keep what they lead to."""
    print(
        f"base policy: supervised steps first, for chain about a minute on 2 cores; kept in {CACHE} for later runs",
        flush=True,
    )
    began = time.perf_counter()
    warm_up = WarmUp(agent)
    for lesson in agent.task.lessons:
        warm_up.lesson(lesson, agent.s.warmup_steps)
    warm_up.lesson(None, agent.s.warmup_steps)
    agent.model.zero_grad()
    files.save(path, dict(weights=agent.model.state_dict()))
    print(f"base policy: {warm_up.taken} steps in {time.perf_counter() - began:.0f} s", flush=True)
