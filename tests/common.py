"""Helpers of several test files: small models and rollouts, tiny runs, and a tiny pretrained model."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch

import smd
from harness import cli, runs, shared, streams, tasks, text, train
from harness.settings import Settings
from test_smd import EOS, compare, small_model  # noqa: F401 (also for the files of tests)

ROOT = Path(__file__).parents[1]
POLICIES = list(smd.POLICIES)
# a child process that calls `smd.py` with tiny runs
SMALL_SMD = """
import sys
from harness import train
from tests.common import make_small
make_small(setattr)
sys.exit(train.main(sys.argv[1:]))
"""


def make_small(setattr) -> None:
    """Make runs tiny, with a second checkpoint and a second diagnosis after few steps."""
    setattr(runs, "SAVE_EVERY", 2)
    setattr(train, "DIAGNOSE_EVERY", 3)
    setattr(Settings, "width", 16)
    setattr(Settings, "interval", 2)
    setattr(tasks.Facts, "FACTS", 3)


def ragged_prompts(lengths=(17, 9, 30, 12), seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(EOS, (n,), generator=generator).tolist() for n in lengths]
    return text.pad_left(rows, EOS, "cpu")


def ragged_rollout(
    model, policy="snapkv", samples=3, max_new=14, budget=8, lengths=(17, 9, 30, 12), seed=0, sample=shared.sample
) -> smd.Rollout:
    """A rollout with responses of different lengths. sample: with which cache."""
    eviction = None if budget is None else smd.Eviction(policy, budget, interval=3, window=3, sinks=1)
    uniform = streams.keyed(streams.hashed(seed, torch.arange(len(lengths))), samples)
    return sample(model, *ragged_prompts(lengths), samples, max_new, EOS, eviction, uniform)


def peak_of_trace(work) -> int:
    """Most bytes allocated at once while `work` ran, as the allocator counts them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(alive, default=0)


CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
CHATML += "{% if add_generation_prompt %}<|im_start|>a\n{% endif %}"


def tokenizer_of(**named):
    """A fast tokenizer of the transformers package: all bytes, some merges and two special tokens."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models
    from tokenizers import pre_tokenizers as p

    letters = sorted(p.ByteLevel.alphabet())
    merges = [("Ġ", "t"), ("h", "e"), ("Ġ", "c"), ("o", "d"), ("d", "e")]
    tokens = ["<|im_end|>", "<|im_start|>", *letters, *map("".join, merges)]
    tokenizer = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = p.Sequence([p.Digits(individual_digits=True), p.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(tokens[:2])
    named = dict(eos_token="<|im_end|>", chat_template=CHATML) | named
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


SIZES = dict(vocab_size=263, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
SIZES |= dict(num_key_value_heads=2, max_position_embeddings=512, eos_token_id=0, bos_token_id=None, pad_token_id=None)


def model_folder(path: Path, seed=0, family="Llama", tokenizer=None, saving=None, spread=0.3, **changes) -> str:
    """A model with random weights, biases and norms in the layout of the transformers package."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, family + "Config")(**SIZES | dict(tie_word_embeddings=True) | changes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * spread)
    model.save_pretrained(path, **saving or {})
    (tokenizer or tokenizer_of()).save_pretrained(path)
    return str(path)


TINY = dict(
    asked=2, budget=18, window=3, warmup_steps=3, prompts=4, samples=4, eval_prompts=16, eval_every=4, steps=6, lr=3e-3,
    device="cpu",
)  # fmt: skip

SECONDS = ("seconds_sample", "seconds_diag", "seconds_learn")


def tiny(tmp_path, name="run", **changes) -> Settings:
    return Settings(**TINY | dict(out=str(tmp_path / name)) | changes)


def outcome(out) -> tuple:
    """The results of a run, to the bit: metrics without times, weights, and the optimizer's state."""
    rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    state = torch.load(Path(out) / "checkpoint.pt", weights_only=True)
    moments = [t for per_weight in state["optimizer"]["state"].values() for t in per_weight.values()]
    tensors = [t.tolist() for t in [*state["weights"].values(), *moments]]
    summary = json.loads((Path(out) / "summary.json").read_text())
    return [{k: v for k, v in row.items() if k not in SECONDS} for row in rows], tensors, summary["after"]


def argv(settings: Settings) -> list[str]:
    given = ((cli.flag(f.name), getattr(settings, f.name), f.default) for f in dataclasses.fields(settings))
    pairs = ([name] if value is True else [name, str(value)] for name, value, default in given if value != default)
    return [word for pair in pairs for word in pair]


def write(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


GOOD = '{"prompt": "one and one is", "answer": "two"}'


def small_run(folder: str, out: Path, **changes) -> Settings:
    sizes = dict(prompts=2, samples=4, eval_prompts=4, steps=2, device="cpu", lr=1e-3)
    return Settings(model=folder, out=str(out), **sizes | changes)


PAGES = ROOT / "README.md", ROOT / "experiments" / "README.md"
