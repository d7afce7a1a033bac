"""The optimised cache and replay: each prompt is stored and computed once for all of its samples.

`sample` and `replay` have the signatures of `smd.sample` and `smd.replay`. Tests prove that tokens and shadow masks are
equal to the bit, losses and gradients to rounding. When a prompt ends, all its samples evict the same keys. A prompt
key that one sample evicts later is hidden from that sample, and leaves the store when no sample sees it any more.

Letters as in smd.py; C prompt slots, K slots of each sample's own tokens.
"""

from dataclasses import dataclass
from dataclasses import replace as replaced
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import smd
from kernel import LayerMask, ShadowMask, accumulation_dtype, backend_for, shadow_attention
from smd import Cache, LayerCache, Rollout, Runtime, live_last, take, window_attention
from tiny_model import TinyModel, causal_attention, rope_positions

# elements of K (and of V) that are upcast per decode chunk: the float64 copies should stay in a CPU's cache
UPCAST_PER_CHUNK = {"cpu": 2**19, "cuda": 2**25}
QUERIES_PER_SCORE = {"cpu": 16, "cuda": 512}  # h2o sums the attention of this many queries of a prompt at a time
SCORES_PER_CHUNK = {"cpu": 2**22, "cuda": 2**26}  # pairs of keys that a policy may compare at once
PROMPTS_PER_EVICTION = {"cpu": 8, "cuda": 64}  # prompts whose samples' keys are copied together to score them


def shared_attention(
    q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor]:
    """`kernel.masked_attention` of q (B, H, Tq, D) to the prompts' keys (N, G, C, D), then to own keys (B, G, K, D).

    hidden (B, G, Tq, C + K). Returns out (B, H, Tq, D) and the weights that each key receives (B, G, H/G, Tq, C + K).
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
    return out.reshape(B, H, Tq, D), weight.transpose(1, 2).flatten(0, 1)


@dataclass
class SharedLayer:
    """The keys of one layer: those of the prompts once, and those of each sample's own tokens."""

    prompt_k_NGCD: Tensor
    prompt_v_NGCD: Tensor
    prompt_column_NGC: Tensor
    k_BGKD: Tensor
    v_BGKD: Tensor
    column_BGK: Tensor
    live_BGK: Tensor  # of C + K slots, first the prompt's
    evicted_at_BGT: Tensor
    q_BHWD: Tensor
    received_BGK: Tensor | None  # of C + K slots
    filled: int = 0  # slots of own tokens in use

    @classmethod
    def of(cls, layer: LayerCache, S: int, room: int) -> "SharedLayer":
        """From a layer after the prefill: S samples of each prompt, with room for so many tokens."""
        prompt = layer.k_BGKD, layer.v_BGKD, layer.column_BGK
        rows = len(layer.k_BGKD) * S
        own = (x.new_zeros(rows, x.shape[1], room, *x.shape[3:]) for x in prompt)
        live_BGK = F.pad(layer.live_BGK.repeat_interleave(S, dim=0), (0, room))
        rest = (x.repeat_interleave(S, dim=0) for x in (layer.evicted_at_BGT, layer.q_BHWD))
        received_BGK = layer.received_BGK
        if received_BGK is not None:
            received_BGK = F.pad(received_BGK.repeat_interleave(S, dim=0), (0, room))
        return cls(*prompt, *own, live_BGK, *rest, received_BGK)

    def append(self, q_BH1D: Tensor, k_BG1D: Tensor, v_BG1D: Tensor, column: int) -> None:
        """Store one token of each sequence."""
        self.k_BGKD[:, :, self.filled] = k_BG1D[:, :, 0]
        self.v_BGKD[:, :, self.filled] = v_BG1D[:, :, 0]
        self.column_BGK[:, :, self.filled] = column
        self.live_BGK[:, :, self.prompt_k_NGCD.shape[2] + self.filled] = True
        if W := self.q_BHWD.shape[2]:
            self.q_BHWD = torch.cat((self.q_BHWD, q_BH1D), dim=2)[:, :, -W:]
        self.filled += 1

    def live_prompt_and_own(self) -> tuple[Tensor, Tensor]:
        """Live slots of the prompt for any of its samples (N, G, C), and of own tokens (B, G, K)."""
        N, _, C = self.prompt_column_NGC.shape
        prompt_BGC, own_BGK = self.live_BGK.tensor_split([C], dim=-1)
        return prompt_BGC.unflatten(0, (N, -1)).any(dim=1), own_BGK

    def compact(self, prompt_slots: int, own_slots: int, room: int) -> None:
        """Keep this many slots of either part, among them all live ones, and add room for new tokens."""
        prompt_NGC, own_BGK = self.live_prompt_and_own()
        S, C = len(own_BGK) // len(prompt_NGC), prompt_NGC.shape[2]
        slot_NGc, slot_BGk = torch.arange(C, device=own_BGK.device).expand_as(prompt_NGC), live_last(own_BGK, own_slots)
        if prompt_slots < C:
            slot_NGc = live_last(prompt_NGC, prompt_slots)
            for name in ("prompt_k_NGCD", "prompt_v_NGCD", "prompt_column_NGC"):
                setattr(self, name, take(getattr(self, name), slot_NGc))
        for name in ("k_BGKD", "v_BGKD", "column_BGK"):
            # the new slots hold copies of slot 0 until they are filled, and are not live
            setattr(self, name, take(getattr(self, name), F.pad(slot_BGk, (0, room))))
        slot_BGn = torch.cat((slot_NGc.repeat_interleave(S, dim=0), C + slot_BGk), dim=-1)
        self.live_BGK = F.pad(self.live_BGK.gather(-1, slot_BGn), (0, room))
        if self.received_BGK is not None:
            self.received_BGK = F.pad(self.received_BGK.gather(-1, slot_BGn), (0, room))
        self.filled = own_slots


class SharedCache(Cache):
    """`smd.Cache` with the prompt's keys stored once."""

    layers: list

    def room(self) -> int:
        """Tokens until the next compression, or until the last token that is stored."""
        return min(self.eviction.interval, self.max_new - 1 - self.tokens)

    def attention_in_prompt(self, layer: LayerCache, q_BHPD: Tensor) -> Tensor:
        # in chunks of queries: P × P weights would be the memory that the cache is there to save
        rows = QUERIES_PER_SCORE.get(q_BHPD.device.type, 16)
        received_BGK = 0.0
        for first in range(0, self.P, rows):
            end = min(self.P, first + rows)
            chunk = replaced(layer, q_BHWD=q_BHPD[:, :, first:end], now=end)
            received_BGK = received_BGK + window_attention(chunk).sum(dim=(2, 3))
        return received_BGK

    def evict(self, layer: LayerCache) -> None:
        # in chunks of rows, because rkv compares all keys of a row with each other
        rows = max(1, SCORES_PER_CHUNK.get(layer.k_BGKD.device.type, 2**22) // layer.k_BGKD.shape[2] ** 2)
        masks = []
        for first in range(0, len(layer.k_BGKD), rows):
            tensors = {name: x[first : first + rows] for name, x in vars(layer).items() if isinstance(x, Tensor)}
            evicted_bGK, valid = smd.eviction_mask(replaced(layer, **tensors))
            self.valid &= valid
            masks.append(evicted_bGK)
        layer.mark_evicted(torch.cat(masks))

    def branch(self) -> None:
        # one layer after the other, so that no two copies of all layers exist at once
        for l, layer in enumerate(self.layers):
            self.layers[l] = SharedLayer.of(layer, self.S, self.room())
        self.pad_B, self.keep_B = (x_N.repeat_interleave(self.S) for x_N in (self.pad_N, self.keep_N))
        self.row_B = torch.arange(len(self.pad_B), device=self.pad_N.device)
        self.used = self.layers[0].live_BGK.shape[-1] - self.room()  # slots that a sequence uses at most
        self.drop_queries()
        self.measure()

    def drop_queries(self) -> None:
        """Drop the last queries when no compression will read them: they may be larger than all keys."""
        if self.room() < self.eviction.interval:
            for layer in self.layers:
                layer.q_BHWD = layer.q_BHWD[:, :, :0].clone()

    def chunks(self, prompts: int) -> list[tuple[slice, slice]]:
        """So many prompts at a time, and their samples."""
        firsts = range(0, len(self.pad_N), prompts)
        return [(slice(n, n + prompts), slice(n * self.S, (n + prompts) * self.S)) for n in firsts]

    def decode(self, l: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layer = self.layers[l]
        layer.append(q, k, v, column=self.P + self.tokens)
        elements = layer.prompt_k_NGCD[0].numel() + self.S * layer.k_BGKD[0].numel()
        outs = []
        for n, b in self.chunks(max(1, UPCAST_PER_CHUNK.get(q.device.type, 2**25) // max(1, elements))):
            prompt = layer.prompt_k_NGCD[n], layer.prompt_v_NGCD[n]
            own = q[b], layer.k_BGKD[b], layer.v_BGKD[b]
            out_bH1D, weight_bGM1K = shared_attention(*own, *prompt, ~layer.live_BGK[b, :, None])
            outs.append(out_bH1D.to(q.dtype))
            if self.spec.accumulates:
                layer.received_BGK[b] += weight_bGM1K.sum(dim=(2, 3)).to(layer.received_BGK.dtype)
        return torch.cat(outs)

    def token_done(self) -> None:
        self.tokens += 1
        self.used += 1
        self.measure()
        if self.tokens % self.eviction.interval:
            return
        if self.used > self.least:
            for l, layer in enumerate(self.layers):
                for n, b in self.chunks(PROMPTS_PER_EVICTION.get(self.pad_N.device.type, 8)):
                    self.evict_in(l, layer, n, b)
        # the counts of all layers at once, because CUDA has to wait for them
        live = [layer.live_prompt_and_own() for layer in self.layers]
        counts = [torch.stack([x.sum(dim=-1).max() for x in parts]) for parts in live]
        for layer, (prompt_slots, own_slots) in zip(self.layers, torch.stack(counts).tolist(), strict=True):
            layer.compact(prompt_slots, own_slots, self.room())
        self.drop_queries()
        self.used = min(self.used, self.most)

    def evict_in(self, l: int, layer: SharedLayer, n: slice, b: slice) -> None:
        """Return to the budget in these sequences, through the same view of the keys as `smd.Cache`."""
        slot_bGK = live_last(layer.live_BGK[b], self.used)

        def joined(prompt: Tensor, own: Tensor) -> Tensor:
            return take(torch.cat((prompt[n].repeat_interleave(self.S, dim=0), own[b]), dim=2), slot_bGK)

        k_bGKD = joined(layer.prompt_k_NGCD, layer.k_BGKD)
        v_bGKD = joined(layer.prompt_v_NGCD, layer.v_BGKD)
        column_bGK = joined(layer.prompt_column_NGC, layer.column_BGK)
        live_bGK = layer.live_BGK[b].gather(-1, slot_bGK)
        received_bGK = None if layer.received_BGK is None else layer.received_BGK[b].gather(-1, slot_bGK)
        evicted_at_bGT = layer.evicted_at_BGT[b]  # a view, so that the eviction is recorded in place
        rows = self.pad_B[b], self.keep_B[b], self.row_B[b], k_bGKD, v_bGKD, column_bGK, live_bGK, evicted_at_bGT
        now = self.P + self.tokens
        view = LayerCache(self.eviction, self.uniform, l, self.P, now, *rows, layer.q_BHWD[b], received_bGK)
        self.evict(view)
        layer.live_BGK[b] = layer.live_BGK[b].scatter(-1, slot_bGK, view.live_BGK)


sample = partial(smd.sample, make_cache=SharedCache)


def replay(model: TinyModel, rollout: Rollout, *masks_LBGT: Tensor, backend: str | None = None) -> list[Tensor]:
    """`smd.replay` with each prompt computed once. Under several masks, a prompt has as many times S samples."""
    (N, P), (B, R) = rollout.prompt_NP.shape, rollout.response_BR.shape
    masks, S = len(masks_LBGT), B // N
    per_prompt = [mask_LBGT[..., : P + R - 1].unflatten(1, (N, S)) for mask_LBGT in masks_LBGT]
    mask = ShadowMask(torch.stack(per_prompt, dim=2).flatten(1, 3) if masks > 1 else masks_LBGT[0][..., : P + R - 1])
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
    prompt_position_NP = rope_positions(rollout.pad_N, P)
    hidden_NPC = model.extend(prompt_XC.unflatten(0, (N, P)), prompt_position_NP, attend_in_prompts)
    first_B1C = hidden_NPC[:, -1:].repeat_interleave(masks * S, dim=0)
    response_BRC = response_XC.view(N, 1, S, R - 1, prompt_XC.shape[-1]).expand(-1, masks, -1, -1, -1).flatten(0, 2)
    position_BR = rope_positions(rollout.pad_N, P + R - 1)[:, P:].repeat_interleave(masks * S, dim=0)
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
    i = P + torch.arange(R, device=q.device)[:, None]
    j = torch.arange(P + R, device=q.device)
    visible = (j <= i) & (i < mask.evicted_at[:, :, None])
    inputs = q, k, v, prompt_k, prompt_v, ~visible
    out, _ = checkpoint(shared_attention, *inputs, use_reentrant=False, preserve_rng_state=False)
    return out.to(q.dtype)


RUNTIME = Runtime(sample=sample, replay=replay)
