"""Where a layer's keys and values lie while responses are drawn: those of a prompt once, those of each sample's tokens.

When a prompt ends, all its samples lose the same keys. From there on, columns count what was kept of it, then the
response. A shared key that a sample evicts later is hidden from that sample, and leaves the store when none sees it.

Letters: N prompts, S samples of each, B = N·S sequences, X either of them, H query and G kv heads, D head dim, K slots,
P prompt columns, of which C are kept, R response columns, T = C + R, W recent queries.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernel import NEVER

LIVES = torch.iinfo(torch.int16).max  # also the longest response: nothing is evicted after its last token


def pack(live_XGK: Tensor, count: int) -> Tensor:
    """Slots (X, G, count) of the live in their order, behind as many of the dead as fill up the row.

    There are no more than K.
    """
    return live_XGK.byte().argsort(dim=-1, stable=True)[..., max(0, live_XGK.shape[-1] - count) :]


@dataclass
class Keys:
    """Keys and values in their slots, and the column of each."""

    k_XGKD: Tensor
    v_XGKD: Tensor
    column_XGK: Tensor

    def take(self, slot_XGn: Tensor) -> None:
        """What is in these slots, in this order; one tensor after the other, so that never all are there twice."""
        X, G, K = self.column_XGK.shape
        first_XG1 = K * torch.arange(X * G, device=slot_XGn.device).view(X, G, 1)
        row_n = (first_XG1 + slot_XGn).flatten().int()
        for name in list(vars(self)):
            taken_nD = getattr(self, name).flatten(0, 2).index_select(0, row_n)
            setattr(self, name, taken_nD.unflatten(0, slot_XGn.shape))


class Store:
    """The store of one layer: `shared` of the prompts, `own` of their samples, and the record of who died when.

    seen_BGK: slots, first of `shared`, then of `own`, whose keys a sample still sees. died_BGT: how many response
    tokens there were when a key died, LIVES if it did not; 16 bits, because every sample has one for every column.
    received_BGT: the attention that a key received, where a policy asks for it. q_BHWD: the last queries.
    """

    def __init__(self, k: Tensor, v: Tensor, live_NGP: Tensor, received_NGP: Tensor | None, q_NHWD: Tensor, count: int):
        """Keep so many columns of the prompts' k and v (N, G, P, D), the live ones among them."""
        kept_NGC = pack(live_NGP, count)
        index_NGCD = kept_NGC[..., None].expand(-1, -1, -1, k.shape[-1])
        column_C = torch.arange(count, dtype=torch.int32, device=k.device)
        self.shared = Keys(k.gather(2, index_NGCD), v.gather(2, index_NGCD), column_C.expand_as(kept_NGC))
        self.kept_NGC = kept_NGC.int()  # by the prompts' own columns
        self.seen_BGK = live_NGP.gather(-1, kept_NGC)
        self.received_BGT = None if received_NGP is None else received_NGP.gather(-1, kept_NGC)
        self.q_BHWD = q_NHWD

    def branch(self, S: int, R: int, room: int) -> None:
        """From prompts to S samples of each: responses of R tokens at most, and room for some of them now."""
        self.S = S
        seen_BGC, self.q_BHWD = (x.repeat_interleave(S, dim=0) for x in (self.seen_BGK, self.q_BHWD))
        own_shape = *seen_BGC.shape[:2], room
        self.own = Keys(*(x.new_zeros(*own_shape, *x.shape[3:]) for x in vars(self.shared).values()))
        self.filled = 0  # slots of `own`
        self.seen_BGK = F.pad(seen_BGC, (0, room))
        self.died_BGT = F.pad(torch.where(seen_BGC, LIVES, 0).short(), (0, R), value=LIVES)
        if self.received_BGT is not None:
            self.received_BGT = F.pad(self.received_BGT.repeat_interleave(S, dim=0), (0, R))

    def add(self, q_BH1D: Tensor, k_BG1D: Tensor, v_BG1D: Tensor, column: int) -> None:
        """One token more in each sequence."""
        self.own.k_XGKD[:, :, self.filled] = k_BG1D[:, :, 0]
        self.own.v_XGKD[:, :, self.filled] = v_BG1D[:, :, 0]
        self.own.column_XGK[:, :, self.filled] = column
        self.seen_BGK[:, :, self.shared.k_XGKD.shape[2] + self.filled] = True
        self.q_BHWD.copy_(torch.cat((self.q_BHWD, q_BH1D), dim=2)[:, :, 1:])
        self.filled += 1

    def parts(self, size: int) -> Iterator[tuple[slice, slice]]:
        """So many prompts at a time, and their samples."""
        for first in range(0, len(self.kept_NGC), size):
            yield slice(first, first + size), slice(first * self.S, (first + size) * self.S)

    def columns(self, n: slice, b: slice) -> Tensor:
        """The column of each slot for these prompts and their samples: (B, G, K)."""
        shared_BGK = self.shared.column_XGK[n].repeat_interleave(self.S, dim=0)
        return torch.cat((shared_BGK, self.own.column_XGK[b]), dim=2).long()

    def receive(self, n: slice, b: slice, attention_BGK: Tensor) -> None:
        """Add the attention that slots received to what their keys had."""
        received_BGT = self.received_BGT[b]
        received_BGT.scatter_add_(-1, self.columns(n, b), attention_BGK.to(received_BGT.dtype))

    def bury(self, b: slice, slot_BGn: Tensor, column_BGn: Tensor, dies_BGn: Tensor, tokens: int) -> None:
        """Record who dies in these sequences, whose responses have so many tokens."""
        seen_BGK, died_BGT = self.seen_BGK[b], self.died_BGT[b]
        seen_BGK.scatter_(-1, slot_BGn, seen_BGK.gather(-1, slot_BGn) & ~dies_BGn)
        died_BGT.scatter_(-1, column_BGn, died_BGT.gather(-1, column_BGn).masked_fill(dies_BGn, tokens))

    def seen_parts(self) -> tuple[Tensor, Tensor]:
        """Which slots of `shared`, and which of `own`, each sample sees: (B, G, K) twice."""
        return self.seen_BGK.tensor_split([self.shared.column_XGK.shape[2]], dim=-1)

    def by_any(self, seen_BGK: Tensor) -> Tensor:
        """What any sample of a prompt sees: (N, G, K)."""
        return seen_BGK.unflatten(0, (-1, self.S)).any(dim=1)

    def seen_at_most(self) -> Tensor:
        """How many slots of `shared`, and how many of `own`, are seen where they are most: (2,)."""
        shared_BGK, own_BGK = self.seen_parts()
        return torch.stack([seen_XGK.sum(dim=-1).max() for seen_XGK in (self.by_any(shared_BGK), own_BGK)])

    def drop_dead(self, shared: int, own: int, room: int) -> None:
        """Keep so many slots of either, which hold all that is seen, closed up, and add room for so many new tokens."""
        shared_BGK, own_BGK = self.seen_parts()
        if shared < shared_BGK.shape[2]:
            slot_NGn = pack(self.by_any(shared_BGK), shared)
            self.shared.take(slot_NGn)
            shared_BGK = shared_BGK.gather(-1, slot_NGn.repeat_interleave(self.S, dim=0))
        slot_BGn = pack(own_BGK, own)
        self.own.take(F.pad(slot_BGn, (0, room)))  # the new slots hold what slot 0 did, and nobody sees it
        self.filled = own
        self.seen_BGK = torch.cat((shared_BGK, F.pad(own_BGK.gather(-1, slot_BGn), (0, room))), dim=-1)

    def record(self, pad_N: Tensor, P: int) -> Tensor:
        """evicted_at by the columns of prompts of P columns, and of their responses: int32 (B, G, P + R)."""
        evicted_at_BGT = (P + self.died_BGT.int()).masked_fill(self.died_BGT == LIVES, NEVER)
        of_kept_BGC, of_response_BGR = evicted_at_BGT.tensor_split([self.kept_NGC.shape[2]], dim=-1)
        of_prompt_BGP = of_kept_BGC.new_full((*of_kept_BGC.shape[:2], P), P)
        of_prompt_BGP.scatter_(-1, self.kept_NGC.repeat_interleave(self.S, dim=0).long(), of_kept_BGC)
        padding_BP = torch.arange(P, device=pad_N.device) < pad_N.repeat_interleave(self.S)[:, None]
        return torch.cat((of_prompt_BGP.masked_fill_(padding_BP[:, None], 0), of_response_BGR), dim=-1)
