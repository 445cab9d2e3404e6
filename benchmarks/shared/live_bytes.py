"""Bytes of the live tensors on any device, as an allocator without waste would count them."""

import weakref
from collections.abc import Iterable

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts in `now` and `peak` the storages of all tensors that operations make within its block.

    Args:
        known: tensors that are not counted (weights, their gradients).
    """

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.known = list(known)  # held, so that no new storage takes the place of one of them
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in self.known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage):
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += self.sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key):
        self.now -= self.sizes.pop(key)
