"""How many bytes are alive at once, counted where tensors are made, on any device."""

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def storages(values) -> dict[int, torch.UntypedStorage]:
    """The distinct storages behind the tensors in a nest of values, by their addresses."""
    found = (value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor))
    return {storage._cdata: storage for storage in found}


class PeakBytes(TorchDispatchMode):
    """`peak` is the most bytes that were ever alive: of the tensors it holds, and of all that its `with` block makes.

    Memory is what a storage allocates, however many tensors look into it. A tensor made inside the block counts until
    it is freed, be that after the block. What operations allocate within themselves is not seen.
    """

    def __init__(self):
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}  # address -> the storage, its bytes
        self.peak = 0

    def hold(self, *tensors: Tensor | None) -> None:
        """Count these from here on, until they are freed."""
        # who was freed is looked up, not told by a callback: Ctrl-C in a callback would be lost
        self.alive = {address: held for address, held in self.alive.items() if not held[0].expired()}
        for address, storage in storages(tensors).items():
            if address not in self.alive:
                self.alive[address] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(count for _, count in self.alive.values()))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        given = storages((args, kwargs))
        # a view of what was there before allocates nothing
        new = [t for t in tree_leaves(made) if isinstance(t, Tensor) and t.untyped_storage()._cdata not in given]
        self.hold(*new)
        return made
