"""Activation checkpointing of cells, where what cells of a layer pass on is kept once.

T overlaps from chunk to chunk: as the input of each cell it would be kept K / n times over, with n
new entries a chunk. Here each chunk's entries are kept, and T is put together in what is computed
again.

Legend: B rows, W own tokens of a chunk, d width, t entries of T before a chunk, K capacity.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from comet_pl.model.cache import LayerMemory
from comet_pl.model.chunk_batch import Chunk, UniformChunk


class RecomputedLayer:
    """A layer on the chunks of one call, one after the other.

    Args:
        cell: the layer.
        memory: at the start of the call.
        draws: the cell draws random numbers, whose state has to be kept too.
    """

    def __init__(self, cell: nn.Module, memory: LayerMemory, draws: bool):
        self.cell, self.draws = cell, draws
        self.memory = memory._replace(temporary=None)
        self.entries = [] if memory.temporary is None else [memory.temporary]
        self.from_front = True  # one tensor whose first entries are T's; else the last ones are

    def visit(self, hidden: Tensor, chunk: Chunk) -> Tensor:
        """(B, W, d) -> (B, W, d)."""
        uniform, t = isinstance(chunk, UniformChunk), chunk.temporary_before
        entries = self.entries if t else []
        if entries and self.from_front:
            entries = [entries[0][:, :t]]
        elif entries and not uniform:
            entries = [torch.cat(entries, 1)[:, -t:]]
        hidden, self.memory, new = checkpoint(
            self._cell,
            hidden,
            self.memory,
            chunk,
            *entries,
            use_reentrant=False,
            preserve_rng_state=self.draws,
        )
        self.from_front = not uniform
        if not uniform:  # other entries are new in each row
            self.entries = [] if new is None else [new]
        else:
            self.entries = entries if new is None else [*entries, new]
            spare = sum(part.shape[1] for part in self.entries) - chunk.capacity
            while self.entries and self.entries[0].shape[1] <= spare:
                spare -= self.entries[0].shape[1]
                self.entries = self.entries[1:]
        self.capacity = chunk.capacity
        return hidden

    def _cell(
        self, hidden: Tensor, memory: LayerMemory, chunk: Chunk, *entries: Tensor
    ) -> tuple[Tensor, LayerMemory, Tensor | None]:
        """The output, the memory without T, and new entries of T; in ragged rows all of T."""
        temporary = torch.cat(entries, 1)[:, -chunk.temporary_before :] if entries else None
        hidden, memory = self.cell(hidden, memory._replace(temporary=temporary), chunk)
        new = memory.temporary
        if isinstance(chunk, UniformChunk) and new is not None:
            n = min(chunk.pending_after, chunk.capacity) if chunk.closes else 0
            # A copy: a view would keep all of T.
            new = new[:, new.shape[1] - n :].clone() if n else None
        return hidden, memory._replace(temporary=None), new

    def after(self) -> LayerMemory:
        """The memory behind the last chunk."""
        if not self.entries:
            return self.memory
        whole = self.entries[0] if len(self.entries) == 1 else torch.cat(self.entries, 1)
        start = 0 if self.from_front else max(0, whole.shape[1] - self.capacity)
        return self.memory._replace(temporary=whole[:, start:])
