"""A press of kvpress as the sampler, under `generate` of the transformers package, and our learner of the same model.

    python -m experiments.hugging_face                  presses with SmolLM2, beside our own sampler
    python -m experiments.hugging_face --model FOLDER   with another model

The keys of the prompt that a press keeps give evicted_at. Letters as in smd.py; K of the P columns are kept.
"""

import argparse

import torch
from torch import Tensor

from experiments.common import agent_of, command
from harness.pretrained import Pretrained
from kernel import NEVER, demand

SAMPLES, NEW = 12, 16
LARGEST_ERROR = 1e-3  # of a log-prob in float32; above it, the press did more than evict


def kept_columns(prompt, cache, K: int) -> Tensor:
    """Which columns of a prompt (B, G, P) are the first K keys of a layer's cache; ValueError if some key is none."""
    same_BGKP = (cache.keys[:, :, :K, None] == prompt.keys[:, :, None]).all(dim=-1)
    column_BGK = same_BGKP.int().argmax(dim=-1)
    kept_BGP = torch.zeros_like(same_BGKP[:, :, 0]).scatter(-1, column_BGK, True)
    value_BGKD = prompt.values.gather(2, column_BGK[..., None].expand_as(cache.values[:, :, :K]))
    found = same_BGKP.any(dim=-1).all() and (kept_BGP.sum(dim=-1) == K).all()
    only_evicts = found and value_BGKD.equal(cache.values[:, :, :K])
    demand(only_evicts, "the press does more than evict keys from each head when the prompt ends")
    return kept_BGP


@torch.no_grad()
def sample(model: Pretrained, press, tokens_BP: Tensor, max_new: int) -> tuple[Tensor, Tensor, Tensor]:
    """Responses (B, R) by `generate` under a press, their log-probs, and evicted_at (L, B, G, T).

    EOS does not end a response. ValueError if the press does more than evict keys of each head when the prompt ends.
    """
    whole, P = model.whole, tokens_BP.shape[1]
    whole.set_attn_implementation("sdpa")
    try:
        given = dict(attention_mask=torch.ones_like(tokens_BP), use_cache=True)
        of_prompt = whole(tokens_BP, **given).past_key_values
        given |= dict(temperature=1.0, top_k=0, top_p=1.0, eos_token_id=model.config.vocab, pad_token_id=0)
        given |= dict(max_new_tokens=max_new, do_sample=True, return_dict_in_generate=True)
        with press(whole):
            found = whole.generate(tokens_BP, output_logits=True, output_scores=True, **given)
    finally:
        whole.set_attn_implementation("shadow")
    demand(all(map(torch.equal, found.scores, found.logits)), "model.generation_config changes the distribution")
    response_BR = found.sequences[:, P:]
    logp_BRV = torch.stack(found.logits, dim=1).float().log_softmax(dim=-1)
    logp_BR = logp_BRV.gather(-1, response_BR[..., None])[..., 0]
    kept = []
    for before, after in zip(of_prompt.layers, found.past_key_values.layers, strict=True):
        K = after.keys.shape[2] - (max_new - 1)  # the keys of the response follow, except for the last token
        kept.append(kept_columns(before, after, K))
    evicted_at_LBGP = torch.where(torch.stack(kept), NEVER, P).int()
    record_LBGT = torch.nn.functional.pad(evicted_at_LBGP, (0, max_new), value=NEVER)
    error = (replayed(model, tokens_BP, response_BR, record_LBGT) - logp_BR).abs().max().item()
    demand(error < LARGEST_ERROR, f"the press does more than evict: log-probs are off by {error:.1e}")
    return response_BR, logp_BR, record_LBGT


@torch.no_grad()
def replayed(model: Pretrained, tokens_BP: Tensor, response_BR: Tensor, record_LBGT: Tensor) -> Tensor:
    """Log-probs (B, R) of the response tokens by the learner under a shadow mask."""
    no_padding_B = tokens_BP.new_zeros(len(tokens_BP))
    hidden_BTC = model(torch.cat((tokens_BP, response_BR), dim=1), no_padding_B, record_LBGT)
    logp_BRV = model.log_probs(hidden_BTC[:, tokens_BP.shape[1] - 1 : -1])
    return logp_BRV.gather(-1, response_BR[..., None])[..., 0]


def main() -> None:
    import kvpress

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    agent = agent_of(model=parser.parse_args().model, device="cpu")
    r, _ = agent.respond(agent.task.held_out(1), SAMPLES, agent.eviction, agent.keys(1, 0), max_new=NEW)
    prompt_BP = r.prompt_NP.expand(SAMPLES, -1)
    rollouts = dict(ours=(r.response_BR, r.logp_BR, r.evicted_at_LBGT))
    for press in (
        kvpress.SnapKVPress(0.75, window_size=8),
        kvpress.KnormPress(0.75),
        kvpress.ExpectedAttentionPress(0.75),
    ):
        rollouts[type(press).__name__] = sample(agent.model, press, prompt_BP, NEW)
    print("largest |log π of the learner - log π that the sampler recorded|")
    for name, (response_BR, logp_BR, record_LBGT) in rollouts.items():
        for seen, record in (("under the record", record_LBGT), ("dense", torch.full_like(record_LBGT, NEVER))):
            found_BR = replayed(agent.model, prompt_BP, response_BR, record)
            print(f"  {name:22} {seen:18} {(found_BR - logp_BR)[logp_BR != 0].abs().max().item():.1e}")


if __name__ == "__main__":
    command(main)
