"""How many bytes are alive at once, counted where tensors are made, on any device."""

import weakref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class PeakBytes(TorchDispatchMode):
    """`peak` is the most bytes that were ever alive: of the tensors it holds, and of all that its `with` block makes.

    Memory is what a storage allocates, however many tensors look into it. A tensor made inside the block counts until
    it is freed, be that after the block. What operations allocate within themselves is not seen.
    """

    def __init__(self):
        super().__init__()
        self.alive: dict[int, tuple[weakref.ref, int]] = {}  # id of a storage -> the storage, its bytes
        self.count = 0  # bytes of `alive`, some of them freed since
        self.peak = 0

    def hold(self, *tensors: Tensor | None) -> None:
        """Count these from here on, until they are freed."""
        for tensor in tensors:
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            held = self.alive.get(id(storage))
            # an id may have been that of another storage, which was freed
            if held is None or held[0]() is not storage:
                self.alive[id(storage)] = weakref.ref(storage), storage.nbytes()
                self.count += storage.nbytes()
        if self.count > self.peak:
            # who was freed is looked up, not told by a callback: Ctrl-C in a callback would be lost
            self.alive = {key: held for key, held in self.alive.items() if held[0]() is not None}
            self.count = sum(count for _, count in self.alive.values())
            self.peak = max(self.peak, self.count)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        # a view allocates nothing, nor does what writes into its arguments
        if not (func.is_view or func._schema.is_mutable):
            self.hold(*(made if isinstance(made, tuple | list) else (made,)))
        return made
