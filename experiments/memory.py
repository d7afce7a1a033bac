"""How many bytes of tensors are alive at once, counted where tensors are made, on any device."""

import weakref

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode


class PeakBytes(TorchDispatchMode):
    """`peak` is the most bytes that the tensors made in its `with` block ever held at once.

    Memory is what a storage allocates, however many tensors are views of it. What an operation allocates and frees
    within itself is not counted.
    """

    def __init__(self):
        super().__init__()
        self.alive: dict[int, int] = {}  # id of a storage -> its bytes
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        # a view allocates nothing, nor does what writes into its arguments
        if not (func.is_view or func._schema.is_mutable):
            for x in made if isinstance(made, tuple | list) else (made,):
                if isinstance(x, Tensor):
                    self.count(x.untyped_storage())
        return made

    def count(self, storage: UntypedStorage) -> None:
        if id(storage) not in self.alive:
            self.alive[id(storage)] = storage.nbytes()
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self.freed, id(storage))

    def freed(self, storage: int) -> None:
        self.bytes -= self.alive.pop(storage)
