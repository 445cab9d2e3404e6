"""What a forward pass shows to instruments, apart from what it computes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class Observer:
    """Functions that a model calls while `observing` is active; None: that value is not shown.

    Values are detached, and each is shown once, also where activation checkpointing computes it
    again.
    """

    # (layer, read, g): g (n, m, 1 or d) of the n rows that close a chunk and had a state before;
    # read: the n numbers of text tokens that they had read before that chunk.
    gate: Callable[[int, list[int], Tensor], Any] | None = None
    # (places, losses): flat places (k,) in (B, N) of the columns that have a target, in any order,
    # and the cross-entropy (k,) of each. Only of forward passes without gradients.
    losses: Callable[[Tensor, Tensor], Any] | None = None


@contextmanager
def observing(model: Any, observer: Observer | None) -> Iterator[None]:
    """Within the block `observer` watches the model's forward passes; None: nothing does."""
    before = model.observer
    model.observer = observer
    try:
        yield
    finally:
        model.observer = before
