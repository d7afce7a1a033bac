"""Pretrained language models, computed by the transformers package: opened, checked, and left in its own layout.

Their layers hand q, k and v to the method's `attend`. A wrong model never runs: what no `attend` computes is refused by
name, and when a model is opened its logits must be those of the package's own attention.
"""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from harness.checkpoint import check_weights, files_of, folder_of, library, naming
from harness.cli import UsageError, in_short, require
from harness.text import Chat
from kernel import shadow_attention
from tiny_model import TinyModel, never_evicted, rope_positions

HARMLESS = "position_ids", "cache_position", "use_cache", "output_attentions"  # attention makes nothing of these
LARGEST_ERROR = 1e-3  # of a logit, in float32
# numbers of config.json and what they may be at most: a model with more would not be made in any time
SIZES = dict(vocab_size=10**7, hidden_size=10**6, intermediate_size=10**7, num_hidden_layers=10**3, head_dim=10**4)
SIZES |= dict(num_attention_heads=10**4, num_key_value_heads=10**4, max_position_embeddings=10**9)


def attention(
    module, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, _, dropout=0.0, *,
    attend: Callable, scaling: float | None = None, is_causal: bool | None = True, **more,
):  # fmt: skip
    """The caller's `attend`, in place of the package's attention; UsageError for what `attend` does not compute."""
    more |= dict(dropout=dropout or None, is_causal=False if is_causal is False else None)
    asked = [name for name, value in more.items() if value is not None and name not in HARMLESS]
    require(not asked, f"its attention asks for {', '.join(asked)}, which is not computed here")
    root = q_BHTD.shape[-1] ** 0.5
    if scaling not in (None, 1 / root):
        q_BHTD = q_BHTD * (scaling * root)
    # under autocast rotary positions leave q and k in float32
    out_BHTD = attend(module.layer_idx, q_BHTD.to(v_BGTD.dtype), k_BGTD.to(v_BGTD.dtype), v_BGTD)
    return out_BHTD.transpose(1, 2), None


class NoLayers(nn.Module):
    """A body that hands on what it is given."""

    def forward(self, *_, inputs_embeds: Tensor, **__):
        from transformers.modeling_outputs import MoeModelOutputWithPast

        found = MoeModelOutputWithPast(last_hidden_state=inputs_embeds)
        found.cross_attentions = None  # for which some heads ask
        return found


class Pretrained(nn.Module):
    """What the method asks of a model, around one of the package."""

    forward, log_probs = TinyModel.forward, TinyModel.log_probs  # which are made of the methods below

    def __init__(self, whole: nn.Module, folder: Path):
        super().__init__()
        self.whole = whole
        self.folder = folder
        vocab, width = self.embed_tokens.weight.shape
        self.config = SimpleNamespace(vocab=vocab, width=width, layers=whole.config.num_hidden_layers)

    @property
    def embed_tokens(self) -> nn.Module:
        return self.whole.get_input_embeddings()

    def extend(self, x_BTC: Tensor, position_BT: Tensor, attend: Callable) -> Tensor:
        body = self.whole.base_model
        return body(inputs_embeds=x_BTC, position_ids=position_BT, use_cache=False, attend=attend).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """By the package's own head, which may scale them: the same model, but for its layers."""
        head = copy.copy(self.whole)
        head._modules = self.whole._modules | {self.whole.base_model_prefix: NoLayers()}
        return head(inputs_embeds=hidden.reshape(1, -1, hidden.shape[-1])).logits.view(*hidden.shape[:-1], -1)

    @torch.no_grad()
    def check(self, pad_B: Tensor, T: int) -> None:
        """UsageError unless logits of T tokens are those of the package's own attention.

        They are passed in two parts, as a sampler does, so that whatever else goes from token to token is noticed.
        """
        tokens_BT = torch.randint(self.config.vocab, (len(pad_B), T), generator=torch.Generator().manual_seed(T))
        position_BT = rope_positions(pad_B, T)
        real_BT = torch.arange(T) >= pad_B[:, None]
        options = dict(attention_mask=real_BT.long(), position_ids=position_BT, use_cache=False)
        self.whole.set_attn_implementation("eager")
        want_BTV = self.whole(tokens_BT, **options).logits
        self.whole.set_attn_implementation("shadow")
        record_BGT, keys, hidden = never_evicted(pad_B, T), {}, []

        def attend(l: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.config.heads, self.config.kv_heads, self.config.head_dim = q.shape[1], *k.shape[1::2]
            keys[l] = [torch.cat(pair, dim=2) for pair in zip(keys[l], (k, v), strict=True)] if l in keys else [k, v]
            end = keys[l][0].shape[2]
            return shadow_attention(q, *keys[l], record_BGT[..., :end].repeat(1, k.shape[1], 1), end - q.shape[2])

        for part in slice(0, T // 2), slice(T // 2, T):
            hidden.append(self.extend(self.embed_tokens(tokens_BT[:, part]), position_BT[:, part], attend))
        require(list(keys) == list(range(self.config.layers)), "not all of its layers are attention")
        error = (self.logits(torch.cat(hidden, dim=1)) - want_BTV)[real_BT].abs().max()
        require(error <= LARGEST_ERROR, f"its logits, as they are computed here, are off by {error:.1e}")

    def leave(self, chat: Chat, out: Path) -> None:
        """Write it in the package's layout; UsageError where that cannot be written."""
        given = self.folder / "generation_config.json"
        # this one is copied: there are some that the package reads and refuses to write
        self.whole.generation_config = library().GenerationConfig(eos_token_id=list(chat.ends))
        try:
            out.mkdir(parents=True, exist_ok=True)
            self.whole.save_pretrained(out)
            chat.tokenizer.save_pretrained(out)
            if given.exists():
                shutil.copyfile(given, out / given.name)
        except Exception as e:  # safetensors has errors of its own
            raise UsageError(f"{out} cannot be written: {in_short(e)}; make room or choose another folder") from e


def open_model(model: str, template: str | None) -> tuple[Pretrained, Chat]:
    """The model, and how it is asked; UsageError where it is not whole, or cannot be computed here."""
    with naming(model):
        transformers, folder = library(), folder_of(model)
        weights = [file for file in files_of(folder) if file.suffix == ".safetensors"]
        require(bool(weights), "the folder holds no .safetensors")
        local = dict(local_files_only=True, trust_remote_code=False)
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder, **local)
        config = transformers.AutoConfig.from_pretrained(folder, **local)
        for name, most in SIZES.items():
            value = getattr(config, name, None)
            usable = value is None or (type(value) is int and 0 < value <= most)
            require(usable, f"config.json has no usable {name}: {value!r}")
        options = dict(dtype=torch.float32, use_safetensors=True, attn_implementation="eager")
        options |= dict(output_loading_info=True, ignore_mismatched_sizes=True)
        transformers.AttentionInterface.register("shadow", attention)
        whole, found = transformers.AutoModelForCausalLM.from_pretrained(folder, config=config, **local, **options)
        for kind, wrong in found.items():
            require(not wrong, f"{kind.replace('_', ' ')}: {', '.join(map(str, sorted(wrong)[:3]))}")
        check_weights(whole, weights)
        ours = Pretrained(whole, folder)
        ours.config.context = config.max_position_embeddings
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":  # whose frequencies change, for the whole of a text, beyond
            ours.config.context = rope["original_max_position_embeddings"]
        ours.check(torch.tensor([0, 5]), 16)
        ours.check(torch.tensor([0]), min(300, ours.config.context))
        largest, vocab = max(tokenizer.get_vocab().values()), ours.config.vocab
        require(largest < vocab, f"its tokenizer has an id {largest}, and the model {vocab} tokens")
        return ours, Chat(tokenizer, template, whole.generation_config.eos_token_id)
