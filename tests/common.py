"""What several files of tests need: tiny runs, and a tiny pretrained model."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import smd
from harness import cli, pretrained, tokenizer
from harness.store import Store
from smd import Settings
from test_smd import ROOT
from tiny_model import TinyModel

AGENT_FOR = smd.agent_for


def model_folder(path: Path, seed: int = 0) -> str:
    """A Llama with random weights in Hugging Face's layout: every byte a token, some merges, and ChatML."""
    pytest.importorskip("safetensors")
    letters = tokenizer.byte_of_letter()
    tokens = ["<|im_end|>", "<|im_start|>", *sorted(letters, key=letters.get), "Ġt", "he", "Ġc", "ode"[:2], "de"]
    of_tokens = tokenizer.tokenizer_json(
        tokens, [3, 3] + [1] * 261, ["Ġ t", "h e", "Ġ c", "o d", "d e"], "smollm", None
    )
    config = dict(model_type="llama", vocab_size=263, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    config |= dict(num_key_value_heads=2, intermediate_size=48, max_position_embeddings=256, rms_norm_eps=1e-5)
    config |= dict(tie_word_embeddings=True, hidden_act="silu")
    of_messages = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    template = of_messages + "{{ '<|im_start|>a\n' }}"
    of_text = dict(eos_token="<|im_end|>", chat_template=template)
    source = pretrained.Pretrained(Path("model.gguf"), config, of_tokens, of_text, {})
    pretrained.write_folder(TinyModel(source.model_config(), seed), source, path)
    return str(path)


def sums_of_layers(monkeypatch) -> list:
    """Of the layers of each rollout from here on, the attention that each column received."""
    sums, record = [], Store.record
    monkeypatch.setattr(Store, "record", lambda layer, *args: sums.append(layer.received_BGT) or record(layer, *args))
    return sums


TINY = dict(
    hops=2, width=16, budget=18, window=3, interval=2, pool=3, warmup_steps=3, prompts=4, samples=4, eval_prompts=16,
    eval_every=4, steps=6, lr=3e-3, device="cpu",
)  # fmt: skip

SECONDS = ("seconds_sample", "seconds_diag", "seconds_learn")


def tiny(tmp_path, name="run", **changes) -> Settings:
    return Settings(**TINY | dict(out=str(tmp_path / name)) | changes)


def outcome(out) -> tuple:
    """All that a run computed: metrics without their times, and the weights and the optimizer's state, to the bit."""
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
    sizes = dict(prompts=2, samples=4, facts=3, eval_prompts=4, steps=2, device="cpu", lr=1e-3)
    return Settings(model=folder, out=str(out), **sizes | changes)


PAGES = ROOT / "README.md", ROOT / "experiments" / "README.md"
