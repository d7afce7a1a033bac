"""All settings of a run: their help, their limits and defaults, and how they are read from a command line."""

import argparse
import dataclasses
import itertools
import json
import re
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import ClassVar, get_args

import torch

import kernel
import smd
from harness import parallel, tasks
from harness.cli import UsageError, flag, in_short, require
from smd import METHODS, POLICIES


def opt(group: str, help: str, limit=None, free: bool = False, default=None):
    """A field of the settings, with its heading and its text in --help.

    limit: the least value of a number, or the names that a text may take. free: a resumed run may change it.
    """
    return dataclasses.field(default=default, metadata=dict(group=group, help=help, limit=limit, free=free))


GROUPS = "everyday", "the sampler", "the learner", "the task", "the run"
everyday, sampling, learning, asking, running = (partial(opt, group) for group in GROUPS)
OBJECTIVES = "grpo", "dr_grpo", "ppo", "dpo"


@dataclass(frozen=True)
class Settings:
    """None means "not given": the value comes from the run that is resumed or, in a new run, from `defaults`."""

    method: str | None = everyday("correction: smd replays, naive ignores eviction, dense never evicts", METHODS)
    model: str | None = everyday("start from a pretrained model: smollm2, or a folder in Hugging Face's layout")
    data: str | None = everyday("JSONL file with prompt and answer, or with GSM8K's question and answer")
    eviction: str | None = everyday("eviction policy: which keys the sampler keeps", POLICIES)
    budget: int | str | None = everyday("keys to keep: a count, or a share of the prompt in percent")
    steps: int | None = everyday("total number of steps; each samples and learns", 0, free=True)
    lr: float | int | None = everyday("learning rate", 0)
    seed: int | None = everyday("seed of the training prompts and of the sampler; the base policy has its own", 0)
    out: str | None = everyday("folder of the run (default: a new one under out/)", free=True)
    resume: bool = everyday("continue the run in --out, with its settings", free=True, default=False)
    prompt: str | None = everyday("with --resume or --model: answer this prompt with both caches, and stop", free=True)
    protect: str | None = sampling("never evict prompt keys; --budget then counts response keys only", ("prompt",))
    window: int | None = sampling("last tokens, always kept by snapkv, rkv and random; their queries score the keys", 1)
    prompts: int | None = sampling("prompts per step", 1)
    samples: int | None = sampling("samples per prompt: the group of GRPO", 1)
    max_new: int | None = sampling("maximum length of a response, in tokens", 1)
    objective: str | None = learning("dr_grpo is grpo without division by the group's std", OBJECTIVES)
    lam: float | int | None = learning("smd: weight λ of track 2, KL(π_dense ‖ π_shadow)", 0)
    kl_ref: float | int | None = learning("weight of the KL penalty to the base policy (estimator k3)", 0)
    epochs: int | None = learning("updates per batch of rollouts", 1)
    accumulate: int | None = learning("gradient accumulation: parts of a batch, for less memory", 1)
    reward: str | None = asking("--data: compare the whole text, or the last number", tasks.REWARDS)
    asked: int | None = asking("length of an answer: letters or, with --model, codes", 1)
    template: str | None = asking("--model: plain, or a text with {prompt} (default: its chat template, else plain)")
    warmup_steps: int | None = asking("supervised steps of the base policy", 0)
    eval_every: int | None = running("steps between evaluations on held-out prompts; 0: only before and after", 0)
    eval_prompts: int | None = running("maximum number of held-out prompts per evaluation", 1)
    device: str | None = running("device to compute on", ("cpu", "cuda"), free=True)
    backend: str | None = running("attention (default: triton on cuda, else torch)", kernel.BACKENDS, free=True)
    dtype: str | None = running("type of activations; weights are float32", ("float32", "bfloat16"))

    # constants that tests make smaller
    interval: ClassVar[int] = 4  # response tokens between two compressions of the cache
    width: ClassVar[int] = 128  # of the tiny model

    @property
    def task(self) -> str:
        return "text" if self.data is not None else "chain" if self.model is None else "facts"

    @property
    def sinks(self) -> int:
        """Attention sinks: the first keys, which streaming, snapkv and random never evict."""
        return 1 if self.model is None else 4

    @property
    def pool(self) -> int:
        """Neighbouring keys over which snapkv averages scores; on a prompt of 34 tokens, all averages are alike."""
        return 1 if self.task == "chain" else 5


FIXED = [f.name for f in dataclasses.fields(Settings) if not f.metadata["free"]]  # a resumed run cannot change these


def defaults(s: Settings) -> dict:
    """Values of the settings that are not given; a setting that is missing here stays None."""
    toy = s.model is None
    where = s.device or ("cuda" if torch.cuda.is_available() else "cpu")
    found = dict(method="smd", eviction="snapkv", samples=8, seed=0, eval_every=25, prompts=8)
    found |= dict(objective="grpo", lam=0.1, kl_ref=0.0, epochs=1, accumulate=1)
    # GPUs before compute capability 8.0 have no tensor cores for bfloat16
    has_bfloat16 = where == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    found |= dict(device=where, dtype="bfloat16" if has_bfloat16 else "float32")
    found |= dict(budget="50%", warmup_steps=100) if toy else dict(budget="25%", warmup_steps=0)
    if toy:
        found |= dict(steps=100, lr=2e-4, window=4, eval_prompts=1024)
    else:
        found |= dict(steps=25, lr=1e-5, window=8, eval_prompts=96)
    if s.task == "text":
        found |= dict(reward="exact", max_new=128)
    elif s.task == "chain":
        asked = s.asked or 6
        found |= dict(asked=asked, max_new=asked + 1, budget=22, prompts=32, warmup_steps=400)
    else:
        asked = s.asked or 1
        # SmolLM2 gets no answer with several codes right: the warm-up teaches it enough to earn a first reward
        found |= dict(asked=asked, warmup_steps=0 if asked == 1 else 26)
        # a blank, two digits and the end; for each further code its digits, a blank and a separator
        found |= dict(max_new=5 * asked - 1)
    return found


def count_or_share(text: str) -> int | str:
    """A budget on a command line: a count ("18") becomes an int, a share ("50%") stays text."""
    return int(text) if text.isascii() and text.isdigit() else text


def parse_budget(budget: int | str) -> int | Fraction:
    """A count of keys (22), or a share of each prompt ("65%") as an exact fraction; UsageError otherwise."""
    text = str(budget)
    if re.fullmatch("[0-9]{1,9}", text):
        return int(text)
    percent = re.fullmatch(r"([0-9]{1,3}(\.[0-9]+)?)%", text)
    share = Fraction(percent[1]) / 100 if percent else 0
    require(0 < share <= 1, f"--budget must be a count of keys, such as 22, or a share, such as 65%, got {text}")
    return share


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UsageError(f"{message}; see --help")

    def print_help(self, file=None) -> None:
        print(self.format_help(), end="", file=file)  # argparse ignores errors in writing


def parse(argv: list[str] | None) -> Settings:
    """The settings on a command line."""
    about = smd.__doc__.splitlines()[0]
    parser = Parser("smd.py", description=about, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for title, fields in itertools.groupby(dataclasses.fields(Settings), lambda f: f.metadata["group"]):
        group = parser.add_argument_group(title)
        for f in fields:
            limit = f.metadata["limit"]
            names = "" if limit is None or isinstance(limit, int) else f" {{{', '.join(limit)}}}"
            options = dict(help=f"{f.metadata['help']}{names}{default_in_words(f.name)}".replace("%", "%%"))
            if f.type is bool:
                options["action"] = "store_true"
            else:
                options["type"] = count_or_share if f.name == "budget" else get_args(f.type)[0]
            group.add_argument(flag(f.name), **options)
    return Settings(**vars(parser.parse_args(argv)))


def default_in_words(name: str) -> str:
    """The default of a setting for --help, and the defaults with --data and with --model where they differ."""
    cases = {"": Settings(), "with --data ": Settings(data=""), "with --model ": Settings(model="")}
    values = {case: defaults(s).get(name) for case, s in cases.items()}
    differ = {case: value for case, value in values.items() if case == "" or value != values[""]}
    texts = [f"{case}{value}" for case, value in differ.items() if value is not None]
    return f" (default: {'; '.join(texts)})" if texts else ""


def check_values(s: Settings) -> None:
    """UsageError where a value has the wrong type, or is not within its limit."""
    for f in dataclasses.fields(s):
        value, name, limit = getattr(s, f.name), flag(f.name), f.metadata["limit"]
        if value is None:
            continue
        types = [kind.__name__ for kind in get_args(f.type) or [f.type] if kind is not type(None)]
        fits = isinstance(value, f.type) and (f.type is bool or not isinstance(value, bool))
        require(fits, f"{name} must be {' or '.join(types)}, got {value!r}")
        if isinstance(value, str):  # no file name may hold NUL
            require("\0" not in value, f"{name} must be text without NUL characters, got {value!r}")
        if isinstance(limit, int):
            require(limit <= value < 2**63, f"{name} must be at least {limit} and below 2**63, got {value}")
        elif limit is not None:
            require(value in limit, f"{name} must be one of {', '.join(limit)}, got {value!r}")


def fill_in(s: Settings, values: dict) -> Settings:
    """Set the settings that are not given (None)."""
    missing = {name: value for name, value in values.items() if getattr(s, name) is None}
    return dataclasses.replace(s, **missing)


def read_config(out: Path, *more: str) -> dict:
    """config.json of a run: the settings that cannot change, its steps, and more entries by name."""
    try:
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
        return {name: config[name] for name in [*FIXED, "steps", *more]}
    except OSError as e:
        raise UsageError(f"--out {out} holds no run to resume ({e.strerror})") from e
    except (ValueError, KeyError, TypeError) as e:
        raise UsageError(f"{out / 'config.json'} is damaged ({in_short(e)}); choose another --out") from e


def checked(s: Settings) -> Settings:
    """The settings with all defaults filled in; UsageError for values that are wrong or do not fit together."""
    require(s.out is not None or not s.resume, "--resume needs --out, the folder of the run to continue")
    can_answer = s.resume or s.model is not None
    require(s.prompt is None or can_answer, "--prompt needs a policy: give --resume and --out, or --model")
    check_values(s)
    if s.resume:
        s = fill_in(s, read_config(Path(s.out)))
        check_values(s)
    s = fill_in(s, defaults(s))
    budget = parse_budget(s.budget)
    if isinstance(budget, int):
        s = dataclasses.replace(s, budget=budget)  # "22" is 22
    require(s.reward is None or s.data is not None, "--reward needs --data; the other tasks have their own reward")
    require(s.asked is None or s.data is None, "--asked has no effect with --data; leave it out")
    require(s.template is None or s.model is not None, "--template needs --model")
    weighted = METHODS[s.method].weight is not None
    advice = f"--objective dpo uses no importance weights; choose --method dense, naive or smd, got {s.method}"
    require(s.objective != "dpo" or not weighted, advice)
    advice = f"--objective {s.objective} needs at least two samples per prompt; give --samples 2 or more, got 1"
    require(s.objective == "ppo" or s.samples > 1, advice)
    require(s.prompt is None or parallel.COUNT == 1, "--prompt does not work under torchrun; start one process")
    share, rest = divmod(s.prompts, parallel.COUNT)
    require(rest == 0, f"--prompts must be a multiple of the {parallel.COUNT} processes, got {s.prompts}")
    require(s.accumulate <= share, f"--accumulate must be at most the {share} prompts per process, got {s.accumulate}")
    folder = None if s.model in (None, "smollm2") else Path(s.model).resolve()
    inside = None not in (folder, s.out) and folder.is_relative_to(Path(s.out).resolve())
    require(not inside, f"--model {s.model} lies in --out {s.out}; choose another --out")
    return s
