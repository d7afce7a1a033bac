"""The base policy that RL starts from: supervised steps on the task, computed once and kept on disk.

The warm-up begins with the task's lessons, each until a right answer has probability LEARNED, and ends with the task
itself. Each layer and head hides a random share DROP of the prompt's keys from the answer, so that heads learn not to
rely on a single copy of a fact.

B examples, P prompt columns, R answer columns, T = P + R - 1, V vocabulary, G kv heads.

The base policy of the default task is in assets/. This command makes it again, in two minutes on two cores:

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
from harness.text import Form
from tiny_model import TinyModel, never_evicted

VERSION = 1  # raise it with any change that leads to other weights: then all base policies are made again
DETERMINE = ("task", "asked", "template", "width", "warmup_steps")  # the settings on which a base policy depends
SHIPPED = Path(__file__).resolve().parent.parent / "assets"
CACHE = Path("out/cache")
SEED = 0  # of the weights and of the demonstrations
DROP = 0.3
LEARNED = 0.5
# learning rate, and the steps over which it rises
RATE, RISE = 3e-3, 50
PRETRAINED_RATE, PRETRAINED_RISE = 1e-4, 5


def answer_logp(
    model: TinyModel, form: Form, examples: list[Example], generator: torch.Generator, backend: str | None
) -> tuple[Tensor, Tensor]:
    """Log-probs (B, R) of the right answers with their end of text, zero after it; and their lengths (B,).

    Each layer and kv head loses a random share DROP of the prompt's keys when the prompt ends.
    """
    device = model.embed_tokens.weight.device
    prompt_BP, pad_B = form.tokenize(examples, device)
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


def supervised_loss(agent, lesson: int | None, step: int) -> tuple[Tensor, float]:
    """Mean over the tokens of one batch, and the mean probability of a whole right answer."""
    key = (SEED, WARMUP, lesson or 0, step)
    examples = agent.task.demonstrate(agent.task.batch, numpy_stream(*key), lesson)
    generator = torch_stream(agent.model.embed_tokens.weight.device.type, *key)
    logp_BR, length_B = answer_logp(agent.model, agent.form, examples, generator, agent.s.backend)
    right = logp_BR.detach().sum(dim=1).exp().mean().item()
    return -logp_BR.sum() / length_B.sum(), right


def optimizers_for(model: torch.nn.Module, fresh: bool) -> list[torch.optim.Optimizer]:
    """AdamW; and Muon for the matrices in the layers of a fresh model, which then learns in half the steps."""
    weights = dict(model.named_parameters())
    names = [name for name, weight in weights.items() if fresh and name.startswith("layers") and weight.ndim == 2]
    matrices = [weights.pop(name) for name in names]
    optimizers = [torch.optim.AdamW(weights.values(), betas=(0.9, 0.95), weight_decay=0.0)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def learn(model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], loss: Tensor, rate: float) -> None:
    model.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if not norm.isfinite():
        raise FloatingPointError(f"the warm-up's loss is {loss.item()}, the norm of its gradient {norm.item()}")
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()


def warm_up(agent) -> int:
    """Take the supervised steps on an agent's model. Returns how many."""
    fresh = agent.s.model is None
    highest, rise = (RATE, RISE) if fresh else (PRETRAINED_RATE, PRETRAINED_RISE)
    optimizers = optimizers_for(agent.model, fresh)
    steps, taken = agent.s.warmup_steps, 0
    for lesson in (*agent.task.lessons, None):
        right = 0.0
        name = "warm-up, the task" if lesson is None else f"warm-up, lesson {lesson}"
        with Progress(desc=name, total=steps) as progress:
            for step in range(steps):
                loss, now = supervised_loss(agent, lesson, step)
                right += 0.1 * (now - right)  # a running mean over new examples
                if lesson is not None and right >= LEARNED:
                    break
                taken += 1
                # the rate rises over the first steps of all lessons; on the task itself, it falls over the second half
                fall = 2 - 2 * step / steps if lesson is None else 1.0
                learn(agent.model, optimizers, loss, highest * min(1.0, taken / rise, fall))
                progress.step(right=right)
    agent.model.zero_grad()
    return taken


def base_path(s: Settings) -> Path:
    """The file of a run's base policy, named by the settings and files that it depends on; in assets/ if shipped."""
    key = [VERSION, runs.fingerprint(s), *(getattr(s, name) for name in DETERMINE)]
    name = f"base-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.pt"
    return SHIPPED / name if (SHIPPED / name).exists() else CACHE / name


def load_base(agent) -> None:
    """Load the weights that RL starts from into an agent's model; if there are none, the first process makes them."""
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
    """Take the supervised steps and write the weights to a file."""
    print(f"base policy: supervised steps first, kept in {path.parent} for later runs", flush=True)
    began = time.perf_counter()
    taken = warm_up(agent)
    files.save(path, dict(weights=agent.model.state_dict()))
    print(f"base policy: {taken} steps in {time.perf_counter() - began:.0f} s", flush=True)


def main() -> None:
    from harness import train  # here, because train imports this file

    agent = train.Agent(train.checked(Settings(device="cpu")))
    make_base(agent, SHIPPED / base_path(agent.s).name)


if __name__ == "__main__":
    main()
