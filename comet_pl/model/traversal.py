"""Orders of the cells (chunk t, layer i), and the transport of memory in and out of a call.

A cell needs the hidden states of (t, i - 1) and the memory of (t - 1, i), nothing else. All orders
therefore compute the same; the chunk-major one is the specification.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

from comet_pl.model.cache import LayerMemory


def chunk_major(chunks: int, layers: int) -> Iterator[tuple[int, int]]:
    """All layers of a chunk, then the next chunk: constant memory; any depth of backpropagation."""
    for t in range(chunks):
        for i in range(layers):
            yield t, i


def layer_major(chunks: int, layers: int) -> Iterator[tuple[int, int]]:
    """A layer over all chunks, then the next layer: what a pipeline rank does."""
    for i in range(layers):
        for t in range(chunks):
            yield t, i


TRAVERSALS: dict[str, Callable[[int, int], Iterator[tuple[int, int]]]] = {
    "chunk_major": chunk_major,
    "layer_major": layer_major,
}


class Transport(Protocol):
    """What crosses the border of a call or of a pipeline rank: one layer's memory at a time."""

    def receive(self, layer: int) -> LayerMemory:
        """The memory that `layer` starts from."""
        ...

    def send(self, layer: int, memory: LayerMemory) -> None:
        """The memory that `layer` leaves behind."""
        ...


class LocalTransport:
    """The default: memory comes from the call's cache and goes into the next one."""

    def __init__(self, memories: list[LayerMemory]):
        self.memories = memories

    def receive(self, layer: int) -> LayerMemory:
        return self.memories[layer]

    def send(self, layer: int, memory: LayerMemory) -> None:
        self.memories[layer] = memory
