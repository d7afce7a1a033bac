"""An unchanged model of the transformers package as learner, and as sampler with a press of kvpress.

    python -m experiments.hugging_face          both on SmolLM2

What a press keeps of the prompt under `generate` becomes `evicted_at`. Letters as in smd.py; K columns are kept.
"""

if not __package__:  # then none of the project's modules is found
    raise SystemExit("run it from the project's folder: python -m experiments.hugging_face")

import copy
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

if importlib.util.find_spec("transformers") is None:
    raise SystemExit("the package transformers is needed for this: pip install transformers")

from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

import smd
from experiments.common import command
from kernel import NEVER, demand, shadow_attention
from tiny_model import rope_positions


def attention(module, q_BHTD, k_BGTD, v_BGTD, _, dropout=0.0, *, scaling: float, record_LBGT: Tensor, **more):
    """`shadow_attention`, as transformers calls it; the record comes with the call of the model."""
    asks = [name for name in ("dropout", "sliding_window", "softcap") if (more | dict(dropout=dropout)).get(name)]
    demand(not asks, f"the model asks for {', '.join(asks)}, which shadow_attention does not compute")
    q_BHTD = q_BHTD * (scaling * q_BHTD.shape[-1] ** 0.5)  # 1 in most families
    return shadow_attention(q_BHTD, k_BGTD, v_BGTD, record_LBGT[module.layer_idx]).transpose(1, 2), None


AttentionInterface.register("shadow", attention)
AttentionMaskInterface.register("shadow", lambda *_, **__: None)  # no T×T mask: the record says it all


def learner(model, tokens_BT: Tensor, pad_B: Tensor, P: int) -> Callable[[Tensor], Tensor]:
    """forward(record), as `smd_loss` of the notebook takes it: log-probs (B, R, V) of the response tokens."""
    T = tokens_BT.shape[1]
    given = dict(position_ids=rope_positions(pad_B, T), use_cache=False, logits_to_keep=T - P + 1)

    def forward(record_LBGT: Tensor) -> Tensor:
        model.set_attn_implementation("shadow")  # here, because the sampler may have had the model since
        return model(tokens_BT, record_LBGT=record_LBGT, **given).logits[:, :-1].float().log_softmax(dim=-1)

    return forward


def recording(press, kept: list[Tensor]):
    """The press, appending to `kept`, layer by layer, which columns (B, G, K) it keeps of the prompts."""
    watching = copy.copy(press)

    def watched(module, hidden, k_BGPD: Tensor, v_BGPD: Tensor, *rest):
        # columns take the way of the values: integers, so that a press whose scores read the values' norms fails
        column_BGPD = torch.arange(k_BGPD.shape[2], device=k_BGPD.device)[:, None].expand_as(v_BGPD)
        k_BGKD, column_BGKD = type(press).compress(watching, module, hidden, k_BGPD, column_BGPD, *rest)
        kept.append(column_BGKD[..., 0])
        return k_BGKD, v_BGPD.gather(2, column_BGKD)

    watching.compress = watched
    return watching


@torch.no_grad()
def sample(model, press, tokens_BP: Tensor, max_new: int) -> tuple[Tensor, Tensor, Tensor]:
    """Responses (B, R) by `generate` under a press, their log-probs, and evicted_at (L, B, G, T); no end of text."""
    model.set_attn_implementation("sdpa")
    kept = []
    given = dict(attention_mask=torch.ones_like(tokens_BP), max_new_tokens=max_new, do_sample=True)
    given |= dict(temperature=1.0, top_k=0, top_p=1.0, eos_token_id=model.config.vocab_size, pad_token_id=0)
    with recording(press, kept)(model):
        found = model.generate(tokens_BP, return_dict_in_generate=True, output_logits=True, output_scores=True, **given)
    demand(all(map(torch.equal, found.scores, found.logits)), "model.generation_config changes the distribution")
    P = tokens_BP.shape[1]
    response_BR = found.sequences[:, P:]
    kept_LBGK = torch.stack(kept)
    logp_BRV = torch.stack(found.logits, dim=1).float().log_softmax(dim=-1)
    dropped_LBGP = kept_LBGK.new_full((*kept_LBGK.shape[:3], P), P, dtype=torch.int32)
    record_LBGT = torch.nn.functional.pad(dropped_LBGP.scatter(-1, kept_LBGK, NEVER), (0, max_new), value=NEVER)
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
    presses = kvpress.SnapKVPress(0.75, window_size=8), kvpress.KnormPress(0.75)
    rollouts |= {type(press).__name__: sample(model, press, prompt_BP, 16) for press in presses}
    print("largest |log π of the learner - log π that the sampler recorded|")
    for name, (response_BR, logp_BR, record_LBGT) in rollouts.items():
        forward = learner(model, torch.cat((prompt_BP, response_BR), dim=1), r.pad_N.expand(12), prompt_BP.shape[1])
        for seen, record in (("under the record", record_LBGT), ("dense", torch.full_like(record_LBGT, NEVER))):
            found_BR = forward(record).gather(-1, response_BR[..., None])[..., 0]
            print(f"  {name:12} {seen:18} {(found_BR - logp_BR)[logp_BR != 0].abs().max().item():.1e}")


if __name__ == "__main__":
    command(main)
