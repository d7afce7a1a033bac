"""The optimised cache and replay: each prompt is stored and computed once for all of its samples.

`sample` and `replay` have the signatures of `smd.sample` and `smd.replay`. Tests prove that tokens and shadow masks are
equal to the bit, losses and gradients to rounding. After the prefill, all samples of a prompt evict the same keys. A
prompt key that one sample evicts later is hidden from that sample only; it is deleted when all samples evicted it.

Letters as in smd.py; C prompt slots, K slots of each sample's own tokens.
"""

from dataclasses import dataclass
from dataclasses import replace as replaced
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import smd
from kernel import LayerMask, ShadowMask, accumulation_dtype, backend_for, shadow_attention, visibility
from smd import Cache, LayerCache, Rollout, Runtime, live_last, take, window_attention
from tiny_model import TinyModel, causal_attention, rope_positions

# elements of keys that are upcast at a time: the float64 copies should stay in a CPU's cache
ELEMENTS_PER_CHUNK = {"cpu": 2**19, "cuda": 2**25}
KEY_PAIRS_PER_CHUNK = {"cpu": 2**20, "cuda": 2**26}  # pairs of keys that a policy may compare at a time
QUERIES_PER_SCORE = {"cpu": 16, "cuda": 512}  # queries of a prompt whose attention h2o sums at a time


def shared_attention(
    q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor]:
    """`kernel.masked_attention` of q (B, H, Tq, D) to the prompts' keys (N, G, C, D), then to own keys (B, G, K, D).

    hidden (B, G, Tq, C + K). Returns out (B, H, Tq, D) and the attention that each key receives (B, G, C + K).
    """
    (B, H, Tq, D), (N, G, C, _), K = q.shape, prompt_k.shape, k.shape[2]
    S, M = B // max(N, 1), H // G
    dtype = accumulation_dtype(q.dtype, q.device)
    q, k, v, prompt_k, prompt_v = (x.to(dtype) for x in (q, k, v, prompt_k, prompt_v))
    with torch.autocast(q.device.type, enabled=False):
        q_BGRD = (q * D**-0.5).reshape(B, G, M * Tq, D)
        # the queries of all samples of a prompt in one product, which reads the prompt's keys once
        q_NGRD = q_BGRD.unflatten(0, (N, S)).transpose(1, 2).reshape(N, G, S * M * Tq, D)
        prompt_score = (q_NGRD @ prompt_k.transpose(-1, -2)).view(N, G, S, M, Tq, C)
        own_score = (q_BGRD @ k.transpose(-1, -2)).view(N, S, G, M, Tq, K).transpose(1, 2)
        score = torch.cat((prompt_score, own_score), dim=-1)
        hidden = hidden.unflatten(0, (N, S)).transpose(1, 2)[:, :, :, None]
        weight = score.masked_fill_(hidden, torch.finfo(dtype).min).softmax(dim=-1)
        on_prompt, on_own = weight.split((C, K), dim=-1)
        prompt_out = on_prompt.reshape(N, G, S * M * Tq, C) @ prompt_v
        own_out = on_own.transpose(1, 2).reshape(B, G, M * Tq, K) @ v
        out = prompt_out.unflatten(2, (S, M * Tq)).transpose(1, 2) + own_out.unflatten(0, (N, S))
    return out.reshape(B, H, Tq, D), weight.sum(dim=(3, 4)).transpose(1, 2).flatten(0, 1)


@dataclass
class SharedLayer:
    """The KV cache of one layer: the keys of each prompt once, and the keys of each sample's own tokens."""

    prompt_k_NGCD: Tensor
    prompt_v_NGCD: Tensor
    prompt_column_NGC: Tensor
    k_BGKD: Tensor
    v_BGKD: Tensor
    column_BGK: Tensor
    live_BGK: Tensor  # of C + K slots, the prompt's first
    evicted_at_BGT: Tensor
    q_BHWD: Tensor
    received_BGK: Tensor | None  # of C + K slots
    now: int  # column of the next query

    append = LayerCache.append  # stores one token of each sequence

    @classmethod
    def of(cls, layer: LayerCache, S: int) -> "SharedLayer":
        """S samples of each prompt, from a layer after the prefill."""
        prompt = layer.k_BGKD, layer.v_BGKD, layer.column_BGK
        own = (x[:, :, :0].repeat_interleave(S, dim=0) for x in prompt)
        of_prompt = layer.live_BGK, layer.evicted_at_BGT, layer.q_BHWD, layer.received_BGK
        of_sample = (None if x is None else x.repeat_interleave(S, dim=0) for x in of_prompt)
        return cls(*prompt, *own, *of_sample, layer.now)

    def live_prompt_and_own(self) -> tuple[Tensor, Tensor]:
        """Prompt slots that are live for any sample of the prompt (N, G, C), and live slots of own tokens (B, G, K)."""
        N, _, C = self.prompt_column_NGC.shape
        prompt_BGC, own_BGK = self.live_BGK.tensor_split([C], dim=-1)
        return prompt_BGC.unflatten(0, (N, -1)).any(dim=1), own_BGK

    def compact(self, prompt_slots: int, own_slots: int) -> None:
        """Keep this many slots of the prompt and of own tokens, among them all live ones."""
        prompt_NGC, own_BGK = self.live_prompt_and_own()
        S, C = len(own_BGK) // len(prompt_NGC), prompt_NGC.shape[2]
        slot_BGk = live_last(own_BGK, own_slots)
        for name in ("k_BGKD", "v_BGKD", "column_BGK"):
            setattr(self, name, take(getattr(self, name), slot_BGk))
        slot_NGc = torch.arange(C, device=own_BGK.device).expand_as(prompt_NGC)
        if prompt_slots < C:
            slot_NGc = live_last(prompt_NGC, prompt_slots)
            for name in ("prompt_k_NGCD", "prompt_v_NGCD", "prompt_column_NGC"):
                setattr(self, name, take(getattr(self, name), slot_NGc))
        slot_BGn = torch.cat((slot_NGc.repeat_interleave(S, dim=0), C + slot_BGk), dim=-1)
        self.live_BGK = self.live_BGK.gather(-1, slot_BGn)
        if self.received_BGK is not None:
            self.received_BGK = self.received_BGK.gather(-1, slot_BGn)


def chunks(rows: int, elements: int, device: torch.device, limits: dict[str, int]) -> list[slice]:
    """Slices of rows within the device's limit of elements, at least one row each. elements: of one row."""
    step = max(1, limits.get(device.type, limits["cuda"]) // max(1, elements))
    return [slice(first, first + step) for first in range(0, rows, step)]


class SharedCache(Cache):
    """`smd.Cache` with the prompt's keys stored once."""

    def attention_in_prompt(self, layer: LayerCache, q_BHPD: Tensor) -> Tensor:
        # in chunks of queries: P × P weights would take the memory that the cache is there to save
        queries = QUERIES_PER_SCORE.get(q_BHPD.device.type, 16)
        received_BGK = 0.0
        for first in range(0, self.P, queries):
            end = min(self.P, first + queries)
            chunk = replaced(layer, q_BHWD=q_BHPD[:, :, first:end], now=end)
            received_BGK = received_BGK + window_attention(chunk).sum(dim=(2, 3))
        return received_BGK

    def evict(self, layer: LayerCache) -> None:
        # in chunks of sequences, because rkv compares all pairs of a sequence's keys
        B, G, K, _ = layer.k_BGKD.shape
        for b in chunks(B, G * K * K, layer.k_BGKD.device, KEY_PAIRS_PER_CHUNK):
            view = replaced(layer, **{name: x[b] for name, x in vars(layer).items() if isinstance(x, Tensor)})
            super().evict(view)  # records in layer.evicted_at_BGT, of which the view has a slice
            layer.live_BGK[b] = view.live_BGK

    def evict_samples(self, l: int, layer: SharedLayer) -> None:
        """Evict while decoding, through the same view of a sequence's keys as in `smd.Cache`."""
        slot_BGK = live_last(layer.live_BGK, self.slots)

        def joined(prompt: Tensor, own: Tensor) -> Tensor:
            return take(torch.cat((prompt.repeat_interleave(self.S, dim=0), own), dim=2), slot_BGK)

        k_BGKD = joined(layer.prompt_k_NGCD, layer.k_BGKD)
        v_BGKD = joined(layer.prompt_v_NGCD, layer.v_BGKD)
        column_BGK = joined(layer.prompt_column_NGC, layer.column_BGK)
        live_BGK = layer.live_BGK.gather(-1, slot_BGK)
        received_BGK = None if layer.received_BGK is None else layer.received_BGK.gather(-1, slot_BGK)
        keys = k_BGKD, v_BGKD, column_BGK, live_BGK, layer.evicted_at_BGT, layer.q_BHWD, received_BGK
        rows = self.pad_B, self.keep_B, self.row_B
        view = LayerCache(self.eviction, self.uniform, l, self.P, layer.now, *rows, *keys)
        self.evict(view)
        layer.live_BGK = layer.live_BGK.scatter(-1, slot_BGK, view.live_BGK)

    def branch(self) -> None:
        # one layer after the other, so that no two copies of all layers exist at once
        for l, layer in enumerate(self.layers):
            self.layers[l] = SharedLayer.of(layer, self.S)
        self.pad_B, self.keep_B = (x_N.repeat_interleave(self.S) for x_N in (self.pad_N, self.keep_N))
        self.row_B = torch.arange(len(self.pad_B), device=self.pad_N.device)
        self.slots = self.layers[0].live_BGK.shape[-1]  # of a sequence in `smd.Cache`
        self.drop_queries()
        self.measure()

    def drop_queries(self) -> None:
        """Delete the last queries when no compression will read them: they may be larger than all keys."""
        if self.max_new - 1 - self.tokens < self.eviction.interval:
            for layer in self.layers:
                layer.q_BHWD = layer.q_BHWD[:, :, :0].clone()

    def decode(self, l: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layer = self.layers[l]
        layer.append(q, k, v)
        elements = layer.prompt_k_NGCD[0].numel() + self.S * layer.k_BGKD[0].numel()
        outs = []
        for n in chunks(len(self.pad_N), elements, q.device, ELEMENTS_PER_CHUNK):
            b = slice(n.start * self.S, n.stop * self.S)
            keys = layer.k_BGKD[b], layer.v_BGKD[b], layer.prompt_k_NGCD[n], layer.prompt_v_NGCD[n]
            out_bH1D, received_bGK = shared_attention(q[b], *keys, ~layer.live_BGK[b, :, None])
            outs.append(out_bH1D.to(q.dtype))
            if self.spec.accumulates:
                layer.received_BGK[b] += received_bGK.to(layer.received_BGK.dtype)
        return torch.cat(outs)

    def token_done(self) -> None:
        self.tokens += 1
        self.slots += 1
        self.measure()
        if self.tokens % self.eviction.interval:
            return
        if self.slots > self.fewest:
            for l, layer in enumerate(self.layers):
                self.evict_samples(l, layer)
        # the counts of all layers at once, because each transfer of a number synchronises CUDA
        live = [layer.live_prompt_and_own() for layer in self.layers]
        counts = [torch.stack([x.sum(dim=-1).max() for x in parts]) for parts in live]
        for layer, (prompt_slots, own_slots) in zip(self.layers, torch.stack(counts).tolist(), strict=True):
            layer.compact(prompt_slots, own_slots)
        self.drop_queries()
        self.slots = min(self.slots, self.most)


sample = partial(smd.sample, make_cache=SharedCache)


def replay(model: TinyModel, rollout: Rollout, *masks_LBGT: Tensor, backend: str | None = None) -> list[Tensor]:
    """`smd.replay` with each prompt computed once. Under several masks, a prompt has that many times S responses."""
    (N, P), (B, R) = rollout.prompt_NP.shape, rollout.response_BR.shape
    masks, S, T = len(masks_LBGT), B // N, P + R - 1
    if masks == 1:
        mask = ShadowMask(masks_LBGT[0][..., :T])
    else:
        per_prompt = [mask_LBGT[..., :T].unflatten(1, (N, S)) for mask_LBGT in masks_LBGT]
        mask = ShadowMask(torch.stack(per_prompt, dim=2).flatten(1, 3))
    padding_N = rollout.pad_N if rollout.pad_N.any() else None
    prompt_keys = []

    def attend_in_prompts(l: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        prompt_keys.append((k, v))
        return causal_attention(q, k, v, padding_N)

    def attend_in_responses(l: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return response_attention(q, k, v, *prompt_keys[l], mask[l], backend)

    # all tokens in one lookup, because the gradient of each lookup is as large as the table
    tokens = torch.cat((rollout.prompt_NP.flatten(), rollout.response_BR[:, :-1].flatten()))
    prompt_XC, response_XC = model.embed_tokens(tokens).tensor_split([N * P])
    prompt_NPC = prompt_XC.unflatten(0, (N, P))
    hidden_NPC = model.extend(prompt_NPC, rope_positions(rollout.pad_N, P), attend_in_prompts)
    first_B1C = hidden_NPC[:, -1:].repeat_interleave(masks * S, dim=0)
    response_BRC = response_XC.view(N, 1, S, R - 1, prompt_XC.shape[-1]).expand(-1, masks, -1, -1, -1).flatten(0, 2)
    position_BR = rope_positions(rollout.pad_N, T)[:, P:].repeat_interleave(masks * S, dim=0)
    later_BRC = model.extend(response_BRC, position_BR, attend_in_responses)
    hidden_BRC = torch.cat((first_B1C, later_BRC), dim=1).unflatten(0, (N, masks, S))
    return [hidden_BRC[:, number].flatten(0, 1)[rollout.mask_BR] for number in range(masks)]


def response_attention(
    q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, mask: LayerMask, backend: str | None
) -> Tensor:
    """`shadow_attention` of response queries to their prompt's keys (N, G, P, D) and their own (B, G, R, D)."""
    P, R = prompt_k.shape[2], q.shape[2]
    if backend_for(q.device.type, backend) == "triton":  # the kernels read the keys of single sequences
        S = len(q) // len(prompt_k)
        k, v = (torch.cat((p.repeat_interleave(S, dim=0), x), dim=2) for p, x in ((prompt_k, k), (prompt_v, v)))
        return shadow_attention(q, k, v, mask, P, backend)

    def attend(q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, evicted_at: Tensor) -> Tensor:
        out, _ = shared_attention(q, k, v, prompt_k, prompt_v, ~visibility(evicted_at, P, R))
        return out.to(q.dtype)

    # the backward pass recomputes the mask and the weights, as in `kernel.attention_torch`
    inputs = q, k, v, prompt_k, prompt_v, mask.evicted_at
    return checkpoint(attend, *inputs, use_reentrant=False, preserve_rng_state=False)


RUNTIME = Runtime(sample=sample, replay=replay)
