"""An unchanged model of the transformers package as learner, and as sampler with a press of kvpress.

    python -m experiments.hugging_face          both on SmolLM2

The learner's attention is `shadow_attention` under the record of the layer at hand. The sampler is `generate`, and what
its press keeps of the prompt becomes `evicted_at`. Letters as in smd.py; of P prompt columns, K are kept.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface

import smd
from experiments.common import command
from kernel import NEVER, shadow_attention
from tiny_model import rope_positions


def attention(module, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, *_, record_LBGT: Tensor, **__):
    """What transformers asks of an attention implementation; the record comes with the call of the model."""
    return shadow_attention(q_BHTD, k_BGTD, v_BGTD, record_LBGT[module.layer_idx]).transpose(1, 2), None


AttentionInterface.register("shadow", attention)
AttentionMaskInterface.register("shadow", lambda *_, **__: None)  # no T×T mask: the record says it all


def learner(model, tokens_BT: Tensor, pad_B: Tensor, P: int) -> Callable[[Tensor], Tensor]:
    """forward(record), as `smd_loss` of the README takes it: log-probs (B, R, V) of the response tokens."""
    model.set_attn_implementation("shadow")
    position_BT = rope_positions(pad_B, tokens_BT.shape[1])

    def forward(record_LBGT: Tensor) -> Tensor:
        out = model(tokens_BT, position_ids=position_BT, use_cache=False, record_LBGT=record_LBGT)
        return out.logits[:, P - 1 : -1].float().log_softmax(dim=-1)

    return forward


def recording(press, kept: list[Tensor]):
    """The press, appending to `kept`, layer by layer, which columns (B, G, K) it keeps of the prompts."""
    press = copy.copy(press)
    compress = press.compress

    def watched(module, hidden, k_BGPD: Tensor, v_BGPD: Tensor, *rest):
        # columns take the way of the values, which the scores of SnapKV and Knorm do not read
        column_BGPD = torch.arange(k_BGPD.shape[2], device=k_BGPD.device)[:, None].expand_as(v_BGPD).to(v_BGPD.dtype)
        k_BGKD, column_BGKD = compress(module, hidden, k_BGPD, column_BGPD, *rest)
        kept.append(column_BGKD[..., 0].long())
        return k_BGKD, v_BGPD.gather(2, column_BGKD.long())

    press.compress = watched
    return press


@torch.no_grad()
def sample(model, press, tokens_BP: Tensor, max_new: int) -> tuple[Tensor, Tensor, Tensor]:
    """Responses (B, R) by `generate` under a press, their log-probs, and evicted_at (L, B, G, T); no end of text."""
    model.set_attn_implementation("sdpa")
    kept = []
    drawing = dict(do_sample=True, top_k=0, eos_token_id=-1, return_dict_in_generate=True, output_logits=True)
    with recording(press, kept)(model):
        found = model.generate(tokens_BP, attention_mask=torch.ones_like(tokens_BP), max_new_tokens=max_new, **drawing)
    P = tokens_BP.shape[1]
    response_BR = found.sequences[:, P:]
    kept_LBGK = torch.stack(kept)
    logp_BRV = torch.stack(found.logits, dim=1).float().log_softmax(dim=-1)
    record_LBGT = kept_LBGK.new_full((*kept_LBGK.shape[:3], P + max_new), NEVER, dtype=torch.int32)
    record_LBGT[..., :P] = P
    record_LBGT[..., :P].scatter_(-1, kept_LBGK, NEVER)
    return response_BR, logp_BRV.gather(-1, response_BR[..., None])[..., 0], record_LBGT


@torch.no_grad()
def main() -> None:
    import kvpress

    agent = smd.agent_for(smd.checked(smd.Settings(model="smollm2", device="cpu")))
    file = dict(gguf_file=agent.source.path.name, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(agent.source.path.parent, **file)
    r, _ = agent.respond(agent.task.held_out(1), 12, True, torch.Generator().manual_seed(0), max_new=16)
    prompt_BP = r.prompt_NP.expand(12, -1)
    rollouts = dict(ours=(r.response_BR, r.logp_BR, r.evicted_at_LBGT))
    for press in (kvpress.SnapKVPress(0.75, window_size=8), kvpress.KnormPress(0.75)):
        rollouts[type(press).__name__] = sample(model, press, prompt_BP, 16)
    print("largest |log π of the learner - log π that the sampler recorded|")
    for name, (response_BR, logp_BR, record_LBGT) in rollouts.items():
        tokens_BT = torch.cat((prompt_BP, response_BR), dim=1)
        forward = learner(model, tokens_BT, torch.zeros(12, dtype=torch.long), prompt_BP.shape[1])
        for seen, record in (("under the record", record_LBGT), ("dense", torch.full_like(record_LBGT, NEVER))):
            found_BR = forward(record).gather(-1, response_BR[..., None])[..., 0]
            print(f"  {name:12} {seen:18} {(found_BR - logp_BR)[logp_BR != 0].abs().max().item():.1e}")


if __name__ == "__main__":
    command(main)
