"""How a process takes part in a training step."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from torch import Tensor, nn

from comet_pl.model.modeling_comet import CometForCausalLM
from comet_pl.training.optimization import sum_gradients
from comet_pl.training.windows import Window

Read = Callable[[CometForCausalLM, Sequence[Window], int], Iterator[Tensor | None]]


@runtime_checkable
class TextReader(Protocol):
    """What CometModule needs for a training step: a strategy that reads, or WindowReader."""

    @property
    def shard(self) -> tuple[int, int]:
        """(rank, size) among the processes that read different rows."""
        ...

    def read(
        self, model: CometForCausalLM, windows: Sequence[Window], num_items: int
    ) -> Iterator[Tensor | None]:
        """Yields this process's losses of a micro-batch, each a sum divided by num_items, or None.

        The caller backpropagates a loss before it asks for the next.
        """
        ...

    def block_backward_sync(self) -> AbstractContextManager[None]:
        """Spans a step's forward and backward passes; no gradient is summed over ranks in it."""
        ...

    def sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Sums gradients over all ranks, after block_backward_sync."""
        ...


class WindowReader:
    """One device, or Lightning's data-parallel ranks: each reads whole texts, by `read`."""

    def __init__(self, strategy: Strategy, read: Read):
        self.ranks = strategy if isinstance(strategy, ParallelStrategy) else None
        self.read = read

    @property
    def shard(self) -> tuple[int, int]:
        if self.ranks is None:
            return 0, 1
        layout = self.ranks.distributed_sampler_kwargs
        return layout["rank"], layout["num_replicas"]

    def block_backward_sync(self) -> AbstractContextManager[None]:
        # DDP would average in each window's backward, but ranks may have different numbers of them.
        return nullcontext() if self.ranks is None else self.ranks.block_backward_sync()

    def sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        if self.ranks is not None and self.shard[1] > 1:
            sum_gradients(parameters, partial(self.ranks.reduce, reduce_op="sum"))


def read_windows(
    model: CometForCausalLM, windows: Sequence[Window], num_items: int
) -> Iterator[Tensor | None]:
    """Reads the windows in order and yields each one's loss, or None if it has no target."""
    cache = None
    for number, window in enumerate(windows, start=1):
        last = number == len(windows)
        # A window without targets only writes the memory.
        with torch.set_grad_enabled(window.targets > 0):
            output = model(
                **window.inputs(),
                past_key_values=cache,
                use_cache=not last,
                num_items_in_batch=num_items,
            )
        yield output.loss if window.targets else None
        cache = None if last else output.past_key_values.detach()
