"""Speed and memory of sampler and learner: the plain ones of smd.py beside the shared ones of runs, and other packages.

    python -m experiments.bench                     prints its tables, and keeps them in out/bench
    python -m experiments.bench --model smollm2     the same for a pretrained model

Contenders take turns, so that a machine that slows down slows all of them; ± is half a 95 % interval. All compute in
the dtype of a run. `stored MB` is what the KV cache stores at most; `peak MB` is the most bytes of tensors that a
contender makes, weights and the optimizer's moments aside. `generate` of the package transformers and GRPOTrainer of
the package trl are contenders where these are installed; they keep and compute a prompt once for each of its samples.

Letters: N prompts of P tokens, S samples of each, R tokens of each response.
"""

if not __package__:  # then none of the project's modules is found
    raise SystemExit("run it from the project's folder: python -m experiments.bench")

import argparse
import dataclasses
import importlib.util
import itertools
import tempfile
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import smd
from experiments.common import agent_of, command, table
from experiments.memory import PeakBytes
from harness import device, runs, shared, streams, train
from harness.agent import Agent
from harness.objectives import Policy
from harness.report import Progress

REPEATS = 3
LONG, LONG_OF_MODEL = (8, 512, 8, 64), (4, 417, 4, 64)  # N, P, S, R
CACHES = list(itertools.product((1,), (128, 512, 2048), (8,), (32, 256, 1024)))
RUNTIMES = dict(shared=shared.RUNTIME, plain=smd.Runtime())


def measure(name: str, contenders: dict[str, Callable[[], dict]]) -> dict[str, list[dict]]:
    """For `table`: what each contender returns, turn by turn. A first turn, which is not counted, tells the peak."""
    groups = {contender: [] for contender in contenders}
    peaks = {}
    with Progress(desc=name, total=(REPEATS + 1) * len(contenders)) as progress:
        for contender, run in contenders.items():
            with PeakBytes() as counted:
                run()
            peaks[contender] = {"peak MB": counted.peak / 1e6}
            progress.step()
        for _, (contender, run) in itertools.product(range(REPEATS), contenders.items()):
            groups[contender].append(run() | peaks[contender])
            progress.step()
    return groups


def prompts(agent: Agent, N: int, P: int) -> Tensor:
    generator = streams.torch_stream(agent.s.device, 0, streams.PROMPTS)
    return torch.randint(256, (N, P), generator=generator, device=agent.s.device)


def draw(agent: Agent, runtime: smd.Runtime, eviction: smd.Eviction | None, N: int, P: int, S: int, R: int):
    prompt_NP = prompts(agent, N, P)
    with device.precision(agent.s):
        # no token is -1, so that no response ends early
        return runtime.sample(agent.model, prompt_NP, torch.zeros_like(prompt_NP[:, 0]), S, R, -1, eviction)


def generate(agent: Agent, theirs, N: int, P: int, S: int, R: int) -> None:
    prompt_NP = prompts(agent, N, P)
    options = dict(attention_mask=torch.ones_like(prompt_NP), do_sample=True, top_k=0, num_return_sequences=S)
    with device.precision(agent.s):
        theirs.generate(prompt_NP, min_new_tokens=R, max_new_tokens=R, **options)


def sampling(agent: Agent, sample: Callable[..., smd.Rollout | None], N: int, P: int, S: int, R: int) -> dict:
    """Seconds until the first token, and tokens per second after it."""
    watch = device.Stopwatch(agent.s.device)
    sample(N, P, S, 1)
    watch.lap("first")
    rollout = sample(N, P, S, R)
    watch.lap("all")
    first, whole = watch.seconds.values()
    row = {"seconds to first token": first, "tokens a second": N * S * (R - 1) / (whole - first)}
    return row if rollout is None else row | {"stored MB": rollout.stored_bytes / 1e6}


def quarter(agent: Agent) -> smd.Eviction:
    return dataclasses.replace(agent.eviction, budget=Fraction(1, 4))


def samplers(agent: Agent, theirs, sizes: tuple) -> dict[str, list[dict]]:
    kept = quarter(agent)
    ours = {f"shared, 25% kept by {p}": (shared.RUNTIME, dataclasses.replace(kept, policy=p)) for p in smd.POLICIES}
    ours["shared, 50% kept"] = shared.RUNTIME, dataclasses.replace(kept, budget=Fraction(1, 2))
    for name, runtime in RUNTIMES.items():
        ours[f"{name}, full cache"] = runtime, None
    ours[f"plain, 25% kept by {kept.policy}"] = RUNTIMES["plain"], kept
    samples = {name: partial(draw, agent, *case) for name, case in ours.items()}
    if theirs is not None:
        samples["generate, full cache"] = partial(generate, agent, theirs)
    return measure("sampling", {name: partial(sampling, agent, sample, *sizes) for name, sample in samples.items()})


def step(agent: Agent, policy: Policy, optimizer, runtime: smd.Runtime, method: str, *sizes: int) -> dict[str, float]:
    """Seconds of a training step on random prompts and rewards, and of its parts."""
    config = dataclasses.replace(train.config_for(agent, policy), method=method, max_new=sizes[-1])
    watch = device.Stopwatch(agent.s.device)
    rollout = draw(agent, runtime, config.eviction if smd.METHODS[method].evicts else None, *sizes)
    watch.lap("sampling")
    reward_B = torch.rand(len(rollout.response_BR), device=agent.s.device)
    with device.precision(agent.s):
        batch = smd.prepare(policy.model, rollout, reward_B, config, runtime)
    watch.lap("old_log_probs")
    train.update(policy, optimizer, batch, agent.s, config, runtime)
    watch.lap("update")
    return {"seconds": sum(watch.seconds.values())} | watch.seconds


def steps(agent: Agent, sizes: tuple, runtimes: dict = RUNTIMES, **others: Callable[[], dict]) -> dict[str, list[dict]]:
    policy = Policy(agent.model, "grpo")
    given = agent, policy, policy.optimizer(lr=0.0)  # every step does the same
    step(*given, shared.RUNTIME, "dense", 1, 8, 2, 2)  # makes the optimizer's moments, which no peak should count
    contenders = dict(others)
    for (name, runtime), method in itertools.product(runtimes.items(), ("smd", "naive", "dense")):
        contenders[f"{name}, {method}"] = partial(step, *given, runtime, method, *sizes)
    return measure("steps", contenders)


def memory(agent: Agent) -> dict[str, list[dict]]:
    """With 25 % of a prompt kept, over a full cache that shares the prompt: bytes stored, and the peak of sampling."""
    kept = quarter(agent)
    cases = dict(full=(shared.RUNTIME, None), shared=(shared.RUNTIME, kept), plain=(smd.Runtime(), kept))
    groups = {}
    with Progress(desc="memory", total=len(CACHES)) as progress:
        for N, P, S, R in CACHES:
            stored, peak = {}, {}
            for name, case in cases.items():
                with PeakBytes() as counted:
                    stored[name] = draw(agent, *case, N, P, S, R).stored_bytes
                peak[name] = counted.peak
            row = {f"{name}, stored": stored[name] / stored["full"] for name in RUNTIMES}
            row |= {f"{name}, peak": peak[name] / peak["full"] for name in RUNTIMES}
            groups[f"{P:,} tokens, {S} x {R:,}"] = [row]
            progress.step()
    return groups


def transformers_model(agent: Agent, folder: str):
    """The pretrained model, or one of the same shape, as the transformers package runs it; None without the package."""
    if importlib.util.find_spec("transformers") is None:
        return None
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, logging

    logging.disable_progress_bar()
    if agent.s.model is not None:
        agent.leave(Path(folder))
        return AutoModelForCausalLM.from_pretrained(Path(folder) / runs.MODEL, dtype=torch.float32).to(agent.s.device)
    c = agent.config
    shape = dict(num_hidden_layers=c.layers, num_attention_heads=c.heads, num_key_value_heads=c.kv_heads)
    shape |= dict(vocab_size=c.vocab, hidden_size=c.width, intermediate_size=c.ffn, tie_word_embeddings=c.tied)
    return LlamaForCausalLM(LlamaConfig(**shape, pad_token_id=0)).to(agent.s.device)


def trl_step(agent: Agent, theirs, folder: str) -> Callable[[], dict]:
    """A step of dense GRPO by TRL on the prompts of a step, with random rewards."""
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast, PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    s = agent.s
    tokenizer = PreTrainedTokenizerFast.from_pretrained(Path(folder) / runs.MODEL)
    tokenizer.pad_token = tokenizer.eos_token
    examples, _ = agent.draw(step=1)
    asked = [dict(prompt=tokenizer.decode(agent.tokenize([example])[0][0])) for example in examples]
    size = dict(per_device_train_batch_size=s.prompts * s.samples, num_generations=s.samples, max_steps=1)
    same = dict(max_completion_length=s.max_new, temperature=1.0, beta=0.0, learning_rate=0.0)
    same |= dict(bf16=s.dtype == "bfloat16", use_cpu=s.device == "cpu", gradient_checkpointing=False)
    quiet = dict(report_to=[], logging_strategy="no", save_strategy="no", disable_tqdm=True)
    trainer = GRPOTrainer(
        theirs, lambda completions, **_: torch.rand(len(completions)).tolist(), processing_class=tokenizer,
        args=GRPOConfig(folder, **size, **same, **quiet), train_dataset=Dataset.from_list(asked),
    )  # fmt: skip

    trainer.remove_callback(PrinterCallback)
    return lambda: {"seconds": trainer.train().metrics["train_runtime"]}


def show(name: str, groups: dict[str, list[dict]], N: int, P: int, S: int, R: int) -> None:
    print(f"{name}, {N} prompts of {P} tokens, {S} samples of {R} tokens of each")
    print(table(groups, Path("out/bench") / f"{name}.md"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a pretrained model, as for a run")
    model = parser.parse_args().model
    agent = agent_of(model=model)
    print(f"device {agent.s.device}, {agent.s.dtype}, {torch.get_num_threads()} threads")
    P = agent.tokenize(agent.draw(step=1)[0])[0].shape[1]
    task = agent.s.prompts, P, agent.s.samples, agent.s.max_new
    with tempfile.TemporaryDirectory() as folder:
        theirs = transformers_model(agent, folder)
        if model is None:
            show("sampling", samplers(agent, theirs, LONG), *LONG)
            show("steps", steps(agent, task), *task)
            show("long steps", steps(agent, LONG), *LONG)
            print("memory with 25 % of a prompt kept, over that with a full cache which shares the prompt")
            print(table(memory(agent), Path("out/bench/memory.md")))
            return
        show("sampling", samplers(agent, theirs, LONG_OF_MODEL), *LONG_OF_MODEL)
        show("steps", steps(agent, task, dict(shared=shared.RUNTIME)), *task)
        # the plain learner and TRL compute a prompt for each sample: more prompts exceed the memory
        few, others = agent_of(model=model, prompts=2), {}
        if theirs is not None and importlib.util.find_spec("trl") is not None:
            others["TRL, dense"] = trl_step(few, theirs, folder)
        show("few prompts", steps(few, (2, *task[1:]), **others), 2, *task[1:])


if __name__ == "__main__":
    command(main)
