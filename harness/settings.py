"""All that a run depends on: each setting with its help, and one table of what it is where it is not given."""

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import ClassVar

import kernel
from harness import cli, device, parallel, runs, tasks
from harness.cli import fill_in, opt, require

GROUPS = "everyday", "the sampler", "the learner", "the task", "the run"
everyday, sampling, learning, asking, running = (partial(opt, group) for group in GROUPS)


@dataclass(frozen=True)
class Settings:
    """What is None is not given: it is taken from the run that is resumed or, of a new one, from `defaults`."""

    method: str | None = everyday("smd replays, naive ignores eviction, dense never evicts, the others reweight")
    model: str | None = everyday("begin with a pretrained model: smollm2, or a folder in Hugging Face's layout")
    data: str | None = everyday("JSONL of prompt and answer, or of GSM8K's question and answer")
    eviction: str | None = everyday("eviction policy: which keys the sampler keeps")
    budget: int | str | None = everyday("keys kept: a count, or a share of the prompt in percent")
    steps: int | None = everyday("steps of sampling and learning, in all", 0, free=True)
    lr: float | None = everyday("learning rate", 0)
    seed: int | None = everyday("seed of the training prompts and of the sampler; the base policy has its own", 0)
    out: str | None = everyday("folder of the run (default: a new one under out/)", free=True)
    resume: bool = everyday("continue the run in --out; what is not given is taken from it", free=True, default=False)
    prompt: str | None = everyday("with --resume or --model: answer this prompt with both caches, and stop", free=True)
    protect: str | None = sampling("'prompt': its keys are never evicted, and the budget counts the response's")
    window: int | None = sampling(
        "last queries, which snapkv and rkv read; these two and random always keep their keys", 1
    )
    prompts: int | None = sampling("prompts per step", 1)
    samples: int | None = sampling("samples per prompt: the group of GRPO", 1)
    max_new: int | None = sampling("longest response, in tokens", 1)
    objective: str | None = learning("what is maximised; dr_grpo is grpo without the group's std")
    lam: float | None = learning("smd: weight λ of track 2, the KL that lets the dense policy follow the sparse one", 0)
    kl_ref: float | None = learning("weight of the KL penalty to the base policy, by the estimator k3", 0)
    epochs: int | None = learning("updates on a batch of rollouts", 1)
    accumulate: int | None = learning("parts of an update, one after the other: the same gradient in less memory", 1)
    reward: str | None = asking("--data: right is the same text, or the same last number")
    asked: int | None = asking("letters of an answer or, with --model, codes", 1)
    template: str | None = asking(
        "--model: form of a prompt: plain, or a text with {prompt} (default: its chat template, else plain)"
    )
    warmup_steps: int | None = asking("supervised steps of the base policy", 0)
    eval_every: int | None = running("steps between two evaluations on held-out prompts; 0: only before and after", 0)
    eval_prompts: int | None = running("held-out prompts of an evaluation, at most", 1)
    device: str | None = running("where to compute", free=True)
    backend: str | None = running("attention (default: triton on cuda, else torch)", free=True)
    dtype: str | None = running("what sampler and learner compute in; the weights are float32")

    # what no run sets, though it is named beside the others
    interval: ClassVar[int] = 4  # response tokens between two compressions of the cache
    width: ClassVar[int] = 128  # of the tiny model

    @property
    def task(self) -> str:
        return "text" if self.data is not None else "chain" if self.model is None else "facts"

    @property
    def sinks(self) -> int:
        """First keys, which streaming, snapkv and random always keep."""
        return 1 if self.model is None else 4

    @property
    def pool(self) -> int:
        """Neighbours that a score of snapkv is averaged over: on a prompt of 34 tokens that wipes out the choice."""
        return 1 if self.task == "chain" else 5


def parse_budget(budget: int | str) -> int | Fraction:
    """A count of keys (22), or a share of each prompt ("65%"), exact as it is written; UsageError for all else."""
    text = str(budget)
    percent = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]+)?)%", text)
    share = Fraction(percent[1]) / 100 if percent else 0
    if 0 < share <= 1:
        return share
    # a share was once written as a number from 0 to 1
    old = re.fullmatch(r"(0?\.[0-9]+|1\.0*)", text)
    hint = f"; as a share that is {100 * float(text):g}%" if old else ""
    form = "budget must be a count of keys, such as 22, or a share of the prompt, such as 65% (at most 100%)"
    require(re.fullmatch("[0-9]{1,9}", text) is not None, f"{form}, got {text}{hint}")
    return int(text)


def defaults(s: Settings) -> dict:
    """What a setting is where it is not given; of those that are not in here, None."""
    toy = s.model is None
    where = s.device or device.default()
    found = dict(method="smd", eviction="snapkv", samples=8, seed=0, eval_every=25)
    found |= dict(objective="grpo", lam=0.1, kl_ref=0.0, epochs=1, accumulate=1)
    found |= dict(device=where, dtype="bfloat16" if device.computes_bfloat16(where) else "float32")
    found |= dict(steps=100, lr=2e-4, window=4) if toy else dict(steps=25, lr=1e-5, window=8)
    found |= dict(eval_prompts=1024 if toy else 96)
    if s.task == "chain":
        asked = s.asked or 6
        of_task = dict(asked=asked, max_new=asked + 1, budget=22, prompts=32, warmup_steps=400)
    elif s.task == "facts":
        asked = s.asked or 1
        # of several codes at once SmolLM2 gets none right: it is shown how, until it has something to learn from
        of_task = dict(budget="25%", prompts=8, warmup_steps=0 if asked == 1 else 26)
        # a blank, two digits and the end; for each further code its digits, a blank and what separates them
        of_task |= dict(asked=asked, max_new=5 * asked - 1)
    else:
        of_task = dict(budget="50%", warmup_steps=100) if toy else dict(budget="25%", warmup_steps=0)
        of_task |= dict(reward="exact", max_new=128, prompts=8)
    return found | of_task


def default_in_words(name: str) -> str:
    """What --help says of a setting's default: that of the first command and, where it is another, those beside it."""
    situations = {"": {}, "with --data ": dict(data=""), "with --model ": dict(model="")}
    values = {when: defaults(Settings(**given)).get(name) for when, given in situations.items()}
    first = values[""]
    said = [f"{when}{value}" for when, value in values.items() if value is not None and (not when or value != first)]
    return f" (default: {'; '.join(said)})" if said else ""


# what a setting made of words may be
VALUES = dict(objective=("grpo", "dr_grpo", "ppo", "dpo"), reward=tasks.REWARDS, protect=("prompt",))
VALUES |= dict(device=("cpu", "cuda"), backend=kernel.BACKENDS, dtype=("float32", "bfloat16"))


def completed(s: Settings, choices: dict) -> Settings:
    """Fill in what is not given; UsageError for what is no value, does not fit together or has no effect."""
    if s.budget is not None:
        parse_budget(s.budget)
    cli.check_values(s, choices)
    require(not s.resume or s.out is not None, "--resume needs --out, the folder of the run to continue")
    answers = s.resume or s.model is not None
    require(s.prompt is None or answers, "--prompt needs --resume and --out, the run that is to answer, or a --model")
    if s.resume:
        s = fill_in(s, **runs.read_config(Path(s.out), Settings))
        cli.check_values(s, choices)
    require(s.reward is None or s.data is not None, "--reward needs --data; the other tasks have their own")
    require(s.asked is None or s.data is None, "--asked is for the tasks without --data")
    require(s.template is None or s.model is not None, "--template needs --model, whose form of a chat it is")
    s = fill_in(s, **defaults(s))
    grouped = s.samples > 1 or s.objective == "ppo"
    require(grouped, f"--objective {s.objective} compares a prompt's samples; give --samples 2 or more, got 1")
    parallel.check(s)
    most = s.prompts // parallel.COUNT
    parts = f"--accumulate takes at most the {most} prompts that a process has of an update"
    require(s.accumulate <= most, f"{parts}, got {s.accumulate}")
    inside = None not in (s.model, s.out) and Path(s.model).resolve().is_relative_to(Path(s.out).resolve())
    require(not inside, f"--model {s.model} lies in --out {s.out}; take another --out")
    return s
