"""Bytes of the tensors that are alive, on any device, as an allocator without waste would count them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Within `with LiveBytes(known) as live:`, live.now and live.peak count the storages of all tensors that operations make, once each.

    Saved-tensor hooks would not do: checkpointing has hooks of its own, and what it recomputes and the arguments it keeps pass them by.

    Args:
        known: tensors that are not counted (weights, their gradients).
    """

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.known = list(known)  # held, so that no new storage takes the place of one of them
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in self.known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: Any) -> None:
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.now += self.sizes[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)
