"""Where the policy comes from that RL starts with: supervised steps on the task, made once and kept on disk.

First the task's lessons, each until a right answer has probability LEARNED, then the task itself. A share DROP of the
prompt's keys is hidden from the answer in each layer and head, so that heads learn not to rely on a single copy of what
they need. B examples, P prompt columns, R answer columns, T = P + R - 1, V vocabulary, G kv heads.

The base policy of the default task comes with the project, in assets/. This makes it anew, in two minutes on two cores:

    python -m harness.base
"""

import hashlib
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from harness import files, parallel, runs
from harness.report import Progress
from harness.settings import Settings
from harness.streams import WARMUP, numpy_stream, torch_stream
from harness.tasks import Example
from harness.text import Form, tokenize
from tiny_model import TinyModel, never_evicted

VERSION = 1  # to be raised with any change that leads to other weights: then all base policies are made anew
DETERMINE = ("task", "asked", "template", "width", "warmup_steps")  # the settings that a base policy is of
SHIPPED = Path(__file__).resolve().parent.parent / "assets"
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
    prompt_BP, pad_B = tokenize(form, examples, device)
    end = form.ends[0]
    answers = [torch.tensor([*form.encode(e.answer), end], device=device) for e in examples]
    length_B = torch.tensor([len(answer) for answer in answers], device=device)
    answer_BR = pad_sequence(answers, batch_first=True, padding_value=end)
    P, R = prompt_BP.shape[1], answer_BR.shape[1]
    evicted_at_LBGT = never_evicted(pad_B, P + R - 1).repeat(model.config.layers, 1, model.config.kv_heads, 1)
    prompt_LBGP = evicted_at_LBGT[..., :P]
    dropped_LBGP = torch.rand(prompt_LBGP.shape, generator=generator, device=device) < DROP
    # clamped, because padding stays hidden
    evicted_at_LBGT[..., :P] = torch.where(dropped_LBGP, prompt_LBGP.clamp(max=P), prompt_LBGP)

    hidden_BTC = model(torch.cat((prompt_BP, answer_BR[:, :-1]), dim=1), pad_B, evicted_at_LBGT, backend)
    logp_BRV = model.log_probs(hidden_BTC[:, P - 1 :])
    logp_BR = logp_BRV.gather(-1, answer_BR[..., None])[..., 0]
    past_end_BR = torch.arange(R, device=device) >= length_B[:, None]
    return logp_BR.masked_fill(past_end_BR, 0.0), length_B


class WarmUp:
    """The supervised steps of an agent's model on its task."""

    def __init__(self, agent):
        self.agent = agent
        self.model = agent.model
        self.taken = 0
        fresh = agent.s.model is None
        self.rate = LEARNING_RATE if fresh else PRETRAINED_RATE
        self.rising = RISING if fresh else PRETRAINED_RISING
        rest = dict(self.model.named_parameters())
        # Muon for the matrices in the layers of a fresh model: they learn retrieval in half the steps that AdamW takes
        names = [name for name, weight in rest.items() if fresh and name.startswith("layers") and weight.ndim == 2]
        matrices = [rest.pop(name) for name in names]
        self.optimizers = [torch.optim.AdamW(rest.values(), betas=(0.9, 0.95), weight_decay=0.0)]
        if matrices:
            self.optimizers.append(torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))

    def loss(self, lesson: int | None, step: int) -> tuple[Tensor, float]:
        """Of one batch: the mean over its tokens, and the mean probability of a whole right answer."""
        key = (SEED, WARMUP, lesson or 0, step)
        task = self.agent.task
        examples = task.demonstrate(task.batch, numpy_stream(*key), lesson)
        generator = torch_stream(self.model.embed_tokens.weight.device.type, *key)
        logp_BR, length_B = answer_logp(self.model, self.agent.form, examples, generator, self.agent.s.backend)
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

    def lesson(self, lesson: int | None, steps: int) -> None:
        """Take so many steps on a lesson, or fewer if it is learned before; all of them on the task itself (None)."""
        right = 0.0
        name = "warm-up, the task" if lesson is None else f"warm-up, lesson {lesson}"
        with Progress(desc=name, total=steps) as progress:
            for step in range(steps):
                loss, now = self.loss(lesson, step)
                right += 0.1 * (now - right)  # a running mean over examples that are new to the model
                if lesson is not None and right >= LEARNED:
                    return
                # of the task itself, the rate falls to zero over the second half
                self.learn(loss, down=1.0 if lesson is not None else 2 - 2 * step / steps)
                progress.step(right=right)


def base_path(s: Settings) -> Path:
    """Where the base policy of a run is kept, named by what it depends on; where it comes with the project, there."""
    key = [VERSION, runs.fingerprint(s), *(getattr(s, name) for name in DETERMINE)]
    name = f"base-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.pt"
    return SHIPPED / name if (SHIPPED / name).exists() else CACHE / name


def load_base(agent) -> None:
    """Give an agent's model the weights that RL starts from: kept from an earlier run, or made by the first process."""
    if agent.s.model is not None and agent.s.warmup_steps == 0:
        ends = " or ".join(map(agent.form.tokenizer.decode, agent.form.ends))
        parallel.say(f"base policy: {agent.s.model}; a response ends with {ends}")
        return
    path = parallel.on_rank0(base_path, agent.s)
    if parallel.on_rank0(path.exists):
        parallel.say(f"base policy: read from {path}")
    else:
        parallel.on_rank0(make_base, agent, path)
    parallel.raise_on_all_ranks(files.restore, path, agent.model)


def make_base(agent, path: Path) -> None:
    """Take the supervised steps, and keep what they lead to."""
    print(f"base policy: supervised steps first, kept in {path.parent} for later runs", flush=True)
    began = time.perf_counter()
    warm_up = WarmUp(agent)
    for lesson in (*agent.task.lessons, None):
        warm_up.lesson(lesson, agent.s.warmup_steps)
    agent.model.zero_grad()
    files.save(path, dict(weights=agent.model.state_dict()))
    print(f"base policy: {warm_up.taken} steps in {time.perf_counter() - began:.0f} s", flush=True)


def main() -> None:
    from harness import train  # here, because train imports this file

    agent = train.Agent(train.checked(Settings()))
    path = SHIPPED / base_path(agent.s).name
    make_base(agent, path)
    for old in set(SHIPPED.glob("base-*.pt")) - {path}:
        old.unlink()


if __name__ == "__main__":
    main()
