"""What was sampled, as the learner gets it: whole, in parts of some prompts, or put together from several processes.

N prompts, S samples of each, B = N·S sequences, P prompt columns, R response columns, T = P + R, L layers, G kv heads.
"""

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from harness import parallel
from kernel import NEVER


@dataclass(frozen=True)
class Rollout:
    """What the sampler did: recorded once, never recomputed, and all that the learner knows of it."""

    prompt_NP: Tensor  # int64
    pad_N: Tensor  # columns of padding before each prompt
    response_BR: Tensor  # int64; row n·S + s is sample s of prompt n; its end of text included, then padding
    logp_BR: Tensor  # log-prob of each response token in the distribution that it was drawn from; 0 after the end
    length_B: Tensor  # response tokens, the end of text included
    evicted_at_LBGT: Tensor  # int32: the first column whose query can no longer see the key
    kv_bytes: int  # most bytes that the cache, its record and what chooses and moves its entries held
    entry_bytes: int  # keys and values of one token

    @property
    def mask_BR(self) -> Tensor:
        return torch.arange(self.response_BR.shape[1], device=self.length_B.device) < self.length_B[:, None]

    @property
    def never_evicted_LBGT(self) -> Tensor:
        """evicted_at as a full cache would have left it: padding is hidden and nothing is ever evicted."""
        # the same in all layers and heads: one, seen in all their places
        one_1B1T = torch.where(self.evicted_at_LBGT[:1, :, :1] == 0, 0, NEVER).to(torch.int32)
        return one_1B1T.expand_as(self.evicted_at_LBGT)

    @property
    def full_kv_bytes(self) -> int:
        """Of a full cache, a prompt per sample; the last token is never stored."""
        (B, R), P = self.response_BR.shape, self.prompt_NP.shape[1]
        return self.entry_bytes * B * (P + R - 1)

    @property
    def full_kv_bytes_shared(self) -> int:
        """The same with one prompt for its S samples."""
        (B, R), (N, P) = self.response_BR.shape, self.prompt_NP.shape
        return self.entry_bytes * (N * P + B * (R - 1))

    def of_prompts(self, n: Tensor) -> "Rollout":
        """The part of these prompts and of all their samples."""
        b = torch.arange(len(self.length_B), device=n.device).view(len(self.pad_N), -1)[n].flatten()
        by_n = dict(prompt_NP=self.prompt_NP[n], pad_N=self.pad_N[n])
        by_b = dict(response_BR=self.response_BR[b], logp_BR=self.logp_BR[b], length_B=self.length_B[b])
        return dataclasses.replace(self, **by_n, **by_b, evicted_at_LBGT=self.evicted_at_LBGT[:, b])

    def of_this_process(self) -> "Rollout":
        """The part of the prompts that this process takes: all of them where it is alone."""
        if parallel.COUNT == 1:
            return self
        return self.of_prompts(parallel.share_of(self.pad_N))

    def of_all_processes(self) -> "Rollout":
        """What this and the other processes sampled, as one. A shorter response gets more columns of padding."""
        if parallel.COUNT == 1:
            return self
        R = self.response_BR.shape[1]
        more = max(parallel.of_each(R)) - R

        def joined(x: Tensor, dim: int = 0) -> Tensor:
            return parallel.joined(F.pad(x, (0, more)), dim)

        drawn = joined(self.response_BR), joined(self.logp_BR), parallel.joined(self.length_B)
        evicted_at_LBGT = joined(self.evicted_at_LBGT, dim=1)
        prompts = parallel.joined(self.prompt_NP), parallel.joined(self.pad_N)
        return Rollout(*prompts, *drawn, evicted_at_LBGT, sum(parallel.of_each(self.kv_bytes)), self.entry_bytes)
