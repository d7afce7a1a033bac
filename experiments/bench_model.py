"""What `experiments.bench --model` measures: whole steps, decoding and prefill of a pretrained model, beside others.

Each contender runs in a process of its own, so that its peak of memory is its own, and the processes take turns. TRL's
GRPOTrainer and `generate` of the transformers package are contenders where these are installed.
"""

if not __package__:  # then none of the project's modules is found
    raise SystemExit("run it from the project's folder: python -m experiments.bench_model")

import dataclasses
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import smd
from harness import device, pretrained, tasks
from harness.report import Progress
from harness.streams import PROMPTS, torch_stream

STEPS = 3  # that are counted, after one that is not
ROUNDS = 2  # processes of each contender
LONG = dict(prompts=4, samples=4, prompt=417, new=64)  # of decoding and prefill


def agent_of(model: str, **given) -> smd.Agent:
    return smd.agent_for(smd.checked(smd.Settings(model=model, **given)))


def seconds_of(do: Callable[[int], object], where: str) -> list[float]:
    found = []
    for step in range(1, STEPS + 2):
        began = device.clock(where)
        do(step)
        found.append(device.clock(where) - began)
    return found[1:]


def step(model: str, method: str, prompts: int) -> list[float]:
    """Seconds of a step: sampling, old log-probs, update."""
    agent = agent_of(model, method=method, prompts=prompts)
    s = agent.s
    policy = smd.Policy(agent.model, s)
    optimizer = policy.optimizer(s.lr)

    def once(number: int) -> None:
        examples, key_N = agent.draw(number)
        rollout, texts = agent.respond(examples, s.samples, smd.METHODS[method].evicts, key_N)
        reward_B = torch.tensor(tasks.score(agent.task.reward, examples, texts), device=s.device)
        with device.precision(s):
            batch = smd.prepare(policy, rollout, reward_B, s)
        smd.update(policy, optimizer, batch, s, number)

    return seconds_of(once, s.device)


def transformers_model(agent: smd.Agent, folder: Path):
    """The same checkpoint, as the transformers package runs it."""
    from transformers import AutoModelForCausalLM

    pretrained.write_folder(agent.model, agent.source, folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(agent.s.device)


def step_of_trl(model: str, prompts: int) -> list[float]:
    """The same step of dense GRPO by TRL, on the same checkpoint and prompts; it computes a prompt for each sample."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    agent = agent_of(model, prompts=prompts)
    s = agent.s
    asked = [e for number in range(1, STEPS + 2) for e in agent.draw(number)[0]]
    rows = [dict(prompt=agent.encoding.decode(agent.form.tokens(e)), asked=e.prompt, answer=e.answer) for e in asked]

    def reward(completions: list[str], asked: list[str], answer: list[str], **_) -> list[float]:
        return [agent.task.reward(*texts) for texts in zip(asked, completions, answer, strict=True)]

    began, found = [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__) -> None:
            began.append(time.perf_counter())

        def on_step_end(self, *_, **__) -> None:
            found.append(time.perf_counter() - began[-1])

    with tempfile.TemporaryDirectory() as folder:
        theirs = transformers_model(agent, Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder, pad_token=agent.source.tokenizer_config["eos_token"])
        size = dict(per_device_train_batch_size=prompts * s.samples, num_generations=s.samples, max_steps=STEPS + 1)
        sampling = dict(max_completion_length=s.max_new, temperature=1.0, beta=0.0, learning_rate=s.lr)
        quiet = dict(report_to=[], logging_strategy="no", save_strategy="no", disable_tqdm=True, shuffle_dataset=False)
        exact = dict(use_cpu=s.device == "cpu", bf16=False, gradient_checkpointing=False)
        options = GRPOConfig(folder, **size, **sampling, **quiet, **exact)
        agent.model = None
        GRPOTrainer(
            theirs, reward, args=options, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
            callbacks=[Clock()],
        ).train()  # fmt: skip
    return found[1:]


def generation(model: str, kept: float, new: int) -> list[float]:
    """Seconds of drawing so many tokens from long prompts; kept 0: by `generate`."""
    agent = agent_of(model)
    N, S, P = LONG["prompts"], LONG["samples"], LONG["prompt"]
    generator = torch_stream(agent.s.device, 0, PROMPTS)
    tokens_NP = torch.randint(1000, 40_000, (N, P), generator=generator, device=agent.s.device)
    if kept:
        eviction = None if kept == 1 else dataclasses.replace(agent.eviction, budget=f"{kept:.0%}")
        pad_N = torch.zeros(N, dtype=torch.long, device=agent.s.device)
        with device.precision(agent.s):
            return seconds_of(lambda _: smd.sample(agent.model, tokens_NP, pad_N, S, new, -1, eviction), agent.s.device)
    with tempfile.TemporaryDirectory() as folder:
        theirs = transformers_model(agent, Path(folder)).eval()
    options = dict(attention_mask=torch.ones_like(tokens_NP), do_sample=True, top_k=0, num_return_sequences=S)
    lengths = dict(min_new_tokens=new, max_new_tokens=new)
    return seconds_of(lambda _: theirs.generate(tokens_NP, **options, **lengths), agent.s.device)


CONTENDERS = {
    **{f"step of 8 x 8, {method}": (step, method, 8) for method in ("dense", "naive", "smd")},
    **{f"step of 2 x 8, {method}": (step, method, 2) for method in ("dense", "smd")},
    "step of 2 x 8, dense, TRL": (step_of_trl, 2),
    **{f"first token, {kept:.0%} kept": (generation, kept, 1) for kept in (1.0, 0.25)},
    "first token, generate": (generation, 0.0, 1),
    **{f"64 tokens, {kept:.0%} kept": (generation, kept, LONG["new"]) for kept in (1.0, 0.25)},
    "64 tokens, generate": (generation, 0.0, LONG["new"]),
}
NEEDED = {"TRL": "trl", "generate": "transformers"}


def contend(model: str, name: str) -> dict:
    measure, *arguments = CONTENDERS[name]
    seconds = measure(model, *arguments)
    return dict(seconds=seconds, peak_bytes=device.peak_memory(device.default()))


def compare(model: str) -> dict[str, dict]:
    """Median seconds and largest peak of every contender."""
    missing = [last for last, package in NEEDED.items() if importlib.util.find_spec(package) is None]
    names = [name for name in CONTENDERS if not name.endswith(tuple(missing))] if missing else list(CONTENDERS)
    runs = {name: [] for name in names}
    with Progress("bench", ROUNDS * len(names)) as progress:
        for _ in range(ROUNDS):
            for name in names:
                command = [sys.executable, "-m", "experiments.bench", "--model", model, "--only", name]
                said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                runs[name].append(json.loads(said.splitlines()[-1]))
                progress.step()
    return {
        name: dict(
            seconds=statistics.median(second for run in found for second in run["seconds"]),
            peak_bytes=max(run["peak_bytes"] for run in found),
        )
        for name, found in runs.items()
    }


def report(model: str) -> None:
    found = compare(model)
    print(f"{model:32}seconds   peak GB of the process")
    for name, row in found.items():
        print(f"  {name:30}{row['seconds']:7.2f}{row['peak_bytes'] / 1e9:14.2f}")
    tokens = LONG["prompts"] * LONG["samples"] * (LONG["new"] - 1)
    for last in ("100% kept", "25% kept", "generate"):
        if f"64 tokens, {last}" in found:
            spent = found[f"64 tokens, {last}"]["seconds"] - found[f"first token, {last}"]["seconds"]
            print(f"  decoding, {last:20}{tokens / spent:7.0f} tokens a second")
    print(json.dumps(dict(model=model, threads=torch.get_num_threads(), found=found)))
