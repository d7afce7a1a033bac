"""All that a run depends on, each setting with its default and its help, and what --model changes of the defaults."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import kernel
from harness import device, parallel, tasks
from harness.cli import fill_in, flag, opt, require

GROUPS = "everyday", "the sampler", "the learner", "task and model", "the run"
everyday, sampling, learning, asking, running = (partial(opt, group) for group in GROUPS)


@dataclass(frozen=True)
class Settings:
    """What is None here is decided by `smd.checked`: by the task, the machine, and whether there is a --model."""

    method: str = everyday("smd", "smd replays, naive ignores eviction, dense never evicts, the others reweight")
    model: str | None = everyday(None, "begin with a pretrained model: smollm2, a GGUF file, or a Hugging Face folder")
    eviction: str = everyday("snapkv", "eviction policy: which keys the sampler keeps")
    budget: int | str | None = everyday(
        None, "keys kept: a count, or a share of the prompt (default: 22; text 50%; with --model 25%)"
    )
    steps: int | None = everyday(
        None, "steps of sampling and learning, in all (default: 100; with --model 25)", 0, free=True
    )
    lr: float | None = everyday(None, "learning rate (default: 4e-4; with --model 1e-5)", 0)
    seed: int = everyday(0, "seed of the training prompts and of the sampler; the base policy has its own", 0)
    data: str | None = everyday(None, "JSONL of prompt and answer, or of GSM8K's question and answer")
    out: str | None = everyday(None, "folder of the run (default: a new one under out/)", free=True)
    resume: bool = everyday(False, "continue the run in --out; what is not given is taken from it", free=True)
    prompt: str | None = everyday(
        None, "with --resume or --model: answer this prompt with both caches, and stop", free=True
    )
    protect: str | None = sampling(None, "'prompt': its keys are never evicted, and the budget counts the response's")
    interval: int = sampling(4, "response tokens between two compressions of the cache", 1)
    window: int | None = sampling(
        None,
        "last queries, which snapkv and rkv read; these two and random always keep their keys "
        "(default: 4; with --model 8)",
        1,
    )
    sinks: int | None = sampling(
        None, "first keys, which streaming, snapkv and random always keep (default: 1; with --model 4)", 0
    )
    pool: int | None = sampling(None, "snapkv: neighbours that a score is averaged over (default: 5; chain 1)", 1)
    prompts: int | None = sampling(None, "prompts per step (default: 8; chain 32)", 1)
    samples: int = sampling(8, "samples per prompt: the group of GRPO", 1)
    max_new: int | None = sampling(
        None, "longest response, in tokens (default: hops + 1; text 128; facts 5 x asked - 1)", 1
    )
    objective: str = learning("grpo", "what is maximised; dr_grpo is grpo without the group's std")
    lam: float = learning(0.1, "smd: weight λ of track 2, the KL that lets the dense policy follow the sparse one", 0)
    kl_ref: float = learning(0.0, "weight of the KL penalty to the base policy, by the estimator k3", 0)
    epochs: int = learning(1, "passes over a batch of rollouts", 1)
    minibatches: int = learning(1, "updates in a pass, each on a part of the prompts", 1)
    accumulate: int = learning(1, "parts of an update, one after the other: the same gradient in less memory", 1)
    reward: str | None = learning(None, "text: right is the same text, or the same last number (default: exact)")
    task: str | None = asking(None, "what is asked (default: chain; with --model facts; with --data text)")
    hops: int | None = asking(None, "chain: letters in the answer (default: 6)", 1)
    facts: int | None = asking(None, "facts: how many a prompt lists (default: 12)", 1)
    asked: int | None = asking(None, "facts: how many the answer repeats (default: 1)", 1)
    template: str | None = asking(
        None, "form of a prompt: chatml, plain, or a text with {prompt} (default: the ChatML of --model, else plain)"
    )
    encoding: str | None = asking(
        None, "'bytes', which downloads nothing, or the name of one of tiktoken's encodings (default: bytes)"
    )
    width: int | None = asking(None, "model width (default: 128)", 1)
    warmup_steps: int | None = asking(
        None, "supervised steps of the base policy (default: 400; text 100; with --model 0, for several codes 26)", 0
    )
    eval_every: int = running(25, "steps between two evaluations on held-out prompts; 0: only before and after", 0)
    eval_prompts: int | None = running(
        None, "held-out prompts of an evaluation, at most (default: 1024; with --model 96)", 1
    )
    device: str | None = running(None, "where to compute (default: cuda where there is one)", free=True)
    backend: str | None = running(None, "attention (default: triton on cuda, else torch)", free=True)
    dtype: str | None = running(
        None, "what sampler and learner compute in; the weights are float32 (default: bfloat16 on cuda, else float32)"
    )


# what a setting made of words may be
VALUES = dict(objective=("grpo", "dr_grpo", "ppo", "dpo"), task=tasks.TASKS, reward=tasks.REWARDS, protect=("prompt",))
VALUES |= dict(device=("cpu", "cuda"), backend=kernel.BACKENDS, dtype=("float32", "bfloat16"))
# defaults of all tasks, without --model and with it
OF_TOY = dict(steps=100, lr=4e-4, window=4, sinks=1, eval_prompts=1024, encoding="bytes", width=128)
OF_MODEL = dict(steps=25, lr=1e-5, window=8, sinks=4, eval_prompts=96, budget="25%", pool=5, prompts=8)
# settings that only one task reads
OF_TASK = dict(hops="chain", facts="facts", asked="facts", reward="text")


def completed(s: Settings) -> Settings:
    """Fill in what task, model and machine decide; UsageError for what does not fit together or has no effect."""
    task = "text" if s.data is not None else "chain" if s.model is None else "facts"
    s = fill_in(s, device=device.default(), task=task)
    s = fill_in(s, dtype="bfloat16" if s.device == "cuda" else "float32")
    for name, task in OF_TASK.items():
        unread = getattr(s, name) is not None and s.task != task
        require(not unread, f"{flag(name)} is read by --task {task} only, got --task {s.task}")
    if s.model is None:
        require(s.template is None, "--template needs --model, whose form of a chat it is")
        s = fill_in(s, **OF_TOY)
    else:
        for name in ("width", "encoding"):
            require(getattr(s, name) is None, f"--model brings its own {name}; leave {flag(name)} out")
        s = fill_in(s, **OF_MODEL)
    s = fill_in(s, **tasks.TASKS[s.task].defaults(s))
    require(s.pool % 2 == 1, f"--pool must be odd, a key and as many neighbours on either side, got {s.pool}")
    grouped = s.samples > 1 or s.objective == "ppo"
    require(grouped, f"--objective {s.objective} compares a prompt's samples; give --samples 2 or more, got 1")
    parts = f"--minibatches must divide --prompts = {s.prompts}, so that all sequences weigh the same"
    require(s.prompts % s.minibatches == 0, f"{parts}; got {s.minibatches}")
    parallel.check(s)
    most = s.prompts // s.minibatches // parallel.COUNT
    parts = f"--accumulate takes at most the {most} prompts that a process has of an update"
    require(s.accumulate <= most, f"{parts}, got {s.accumulate}")
    inside = None not in (s.model, s.out) and Path(s.model).resolve().is_relative_to(Path(s.out).resolve())
    require(not inside, f"--model {s.model} lies in --out {s.out}; take another --out")
    return s
