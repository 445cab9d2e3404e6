"""The tokens of one chunk, of all rows, as tensors that all layers share.

Legend: B rows, W own tokens (padded), M memory slots, L key columns, m global slots,
n compression tokens that enter, d width.

A row's key columns are numbered by its positions: slots (sink, global, temporary), own tokens,
without gaps. In the interleaved layout RoPE positions, key columns and causality are one thing: a
token at position p sees exactly the columns <= p. chunk_layout.py has the other layout.

If all rows do the same, a UniformChunk selects by slices. Else a RaggedChunk gathers and scatters:
what a row lacks stands at a column, or in an entry, that is never read.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from comet_pl.model.cache import LayerMemory

Rope = tuple[Tensor, Tensor]


class Tokens(NamedTuple):
    """The chunk's own tokens."""

    source: Tensor  # (B, W) columns of [input_ids | compression token | m readout tokens]
    positions: Tensor  # (B or 1, W); padding stands at column L, which no token sees
    rope: Rope
    wanted: Tensor | None  # (k,) flat places in (B, W) of the outputs that are wanted; None: all
    target: np.ndarray  # (k,) their flat places in (B, N)
    # (B or 1, W) the last column that each sees beside its own; None: its own
    sees: Tensor | None = None


class Slots(NamedTuple):
    """The memory slots of the rows that open a chunk."""

    sink: int  # 1 if an opening row has a memory and the model a sink, else 0
    global_slots: int  # m if an opening row has a global memory, else 0
    temporary_slots: int  # entries of T that an opening row uses


@dataclass(eq=False)
class Chunk(ABC):
    """One chunk of a batch, as the cell sees it."""

    tokens: Tokens
    slots: Slots | None  # None: no row opens a chunk that has memory
    positions: Tensor  # (B or 1, M + W) of [slots | own tokens]
    rope: Rope  # theirs
    columns: int  # L
    in_place: bool
    capacity: int
    stores: bool  # some row's chunk stays open: its keys and pending outputs are kept
    closes: bool  # some row's chunk closes: its memories are updated
    has_state: bool  # some row has a state S before the chunk
    gated: list[int]  # rows whose state a gate updates: they close and had a state
    read: list[int]  # text tokens that these rows had read before the chunk
    pending: int  # compression outputs held before
    pending_after: int
    temporary_before: int  # entries of T used before

    def append_keys_values(
        self, memory: LayerMemory, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, LayerMemory]:
        """Keys and values of [slots | own tokens], behind what the open chunk holds: (B, H', L, h)
        each, and the memory with them."""
        keys = self.append_columns(memory.keys, keys)
        values = self.append_columns(memory.values, values)
        held = (keys, values) if self.stores else (None, None)
        if self.stores or not self.in_place:
            # Not _replace, which torch.compile loses in torch 2.11.
            memory = LayerMemory(memory.state, memory.temporary, *held, memory.pending)
        return keys[:, :, : self.columns], values[:, :, : self.columns], memory

    def push(self, temporary: Tensor | None, new: Tensor) -> Tensor:
        """T after the chunk: the last K entries of [T ; new]."""
        t = self.temporary_before
        if temporary is not None and t:
            new = torch.cat([temporary[:, :t], new.to(temporary.dtype)], 1)
        return put(temporary, self.newest(new), self.in_place)

    @property
    def mask(self) -> Tensor:
        """(B or 1, 1, W, L): True where a token sees a column.

        Each layer makes it anew: that is little beside the scores it masks, and torch.compile then
        sees one kind of chunk instead of two.
        """
        own, sees = self.tokens.positions[:, None, :, None], self.tokens.sees
        columns = torch.arange(self.columns, device=own.device)
        if sees is None:
            return columns <= own
        return (columns <= sees[:, None, :, None]) | (columns == own)

    # What the kinds of chunk do each in its own way:

    @abstractmethod
    def append_columns(self, held: Tensor | None, new: Tensor) -> Tensor:
        """Keys (or values) of at least L columns."""

    @abstractmethod
    def append_outputs(self, pending: Tensor | None, hidden: Tensor) -> Tensor | None:
        """Outputs X (B, >= pending_after, d) of the chunk's compression tokens so far."""

    @abstractmethod
    def readout(self, hidden: Tensor) -> Tensor:
        """Outputs R (B, m, d) of the readout tokens."""

    @abstractmethod
    def newest(self, entries: Tensor) -> Tensor:
        """The last K of each row's entries of [T ; new]."""

    @abstractmethod
    def settle(self, state: Tensor | None, new: Tensor) -> Tensor:
        """S after the chunk; rows that do not close keep theirs."""

    @property
    def first(self) -> Tensor | None:
        """(B,) rows in their first chunk, if others are not."""
        return None


@dataclass(eq=False)
class UniformChunk(Chunk):
    """All rows do the same: slices, no mask."""

    past: int  # key columns before the own tokens
    compression: slice | Tensor | None  # where the entering compression tokens stand in W
    readout_place: slice
    behind: int = 0  # so many last own tokens do not all see every column up to their own

    def append_columns(self, held: Tensor | None, new: Tensor) -> Tensor:
        before = self.columns - new.shape[2]
        if self.in_place and self.stores:
            assert held is not None
            held = widen(held, self.columns, 2)
            held[:, :, before : self.columns] = new
            return held
        if held is None or not before:
            return new
        return torch.cat([held[:, :, :before].to(new.dtype), new], 2)

    def append_outputs(self, pending: Tensor | None, hidden: Tensor) -> Tensor | None:
        if self.compression is None or not (self.closes or self.stores):
            return pending
        new = (
            hidden[:, self.compression]
            if isinstance(self.compression, slice)
            else take(hidden, self.compression)
        )
        if self.in_place and self.stores:
            assert pending is not None
            pending = widen(pending, self.pending_after, 1)
            pending[:, self.pending : self.pending_after] = new
            return pending
        if pending is None or not self.pending:
            return new
        return torch.cat([pending[:, : self.pending], new], 1)

    def readout(self, hidden: Tensor) -> Tensor:
        return hidden[:, self.readout_place]

    def newest(self, entries: Tensor) -> Tensor:
        return entries[:, -self.capacity :]

    def settle(self, state: Tensor | None, new: Tensor) -> Tensor:
        return put(state, new, self.in_place)


@dataclass(eq=False)
class RaggedChunk(Chunk):
    """Rows differ, or some rest: gathers, scatters and a mask."""

    continues: bool  # some row's open chunk grows, or waits
    first_rows: Tensor  # (B,)
    closing: Tensor  # (B,) rows that close
    compression: Tensor | None  # (B, n) where the entering compression tokens stand in W
    pending_place: Tensor | None  # (B, n) where they go among the pending outputs
    readout_place: Tensor | None  # (B, m) where the readout tokens stand in W
    temporary_entries: Tensor | None  # (B, T') entries of [T | new] that make the new T

    def append_columns(self, held: Tensor | None, new: Tensor) -> Tensor:
        # The last column takes what is never read.
        size, write = self.columns + 1, self.in_place and self.stores
        if held is None or not (write or self.continues):
            held = new.new_zeros(*new.shape[:2], size, new.shape[3])
        held = widen(held, size, 2)
        return scatter(held, 2, self.positions[:, None, :, None], new, write)

    def append_outputs(self, pending: Tensor | None, hidden: Tensor) -> Tensor | None:
        if self.compression is None or not (self.closes or self.stores):
            return pending
        assert self.pending_place is not None
        new, size = take(hidden, self.compression), self.pending_after + 1
        if pending is None:
            pending = new.new_zeros(len(new), size, new.shape[2])
        write = self.in_place and self.stores
        return scatter(widen(pending, size, 1), 1, self.pending_place[..., None], new, write)

    def readout(self, hidden: Tensor) -> Tensor:
        assert self.readout_place is not None
        return take(hidden, self.readout_place)

    def newest(self, entries: Tensor) -> Tensor:
        if self.temporary_entries is not None:
            entries = take(entries, self.temporary_entries)
        return entries[:, -self.capacity :]

    def settle(self, state: Tensor | None, new: Tensor) -> Tensor:
        old = torch.zeros_like(new) if state is None else state.to(new.dtype)
        return put(state, torch.where(self.closing[:, None, None], new, old), self.in_place)

    @property
    def first(self) -> Tensor | None:
        return self.first_rows


@dataclass(eq=False)
class StepChunk(Chunk):
    """One text token of every row at the same place of an open chunk, perhaps after a compression
    token. Only the device knows the place, so that a CUDA graph can repeat it: the key columns are
    all of the buffer's, used or not."""

    places: Tensor  # (W,) the own tokens' key columns
    pending_place: Tensor | None  # (1,) of the compression token's output; None: there is none
    used: Tensor  # (1,) int32: key columns, the own tokens' included
    limits: tuple[Tensor, Tensor]  # [0, W] and [0, L] as int32

    @property
    def mask(self) -> Tensor:
        columns = torch.arange(self.columns, device=self.places.device)
        return (columns <= self.places[:, None])[None, None]

    def append_columns(self, held: Tensor | None, new: Tensor) -> Tensor:
        assert held is not None
        return held.index_copy_(2, self.places, new.to(held.dtype))

    def append_outputs(self, pending: Tensor | None, hidden: Tensor) -> Tensor | None:
        if self.pending_place is None:
            return pending
        assert pending is not None
        return pending.index_copy_(1, self.pending_place, hidden[:, :1].to(pending.dtype))

    # It closes no chunk.

    def readout(self, hidden: Tensor) -> Tensor:
        raise NotImplementedError

    def newest(self, entries: Tensor) -> Tensor:
        raise NotImplementedError

    def settle(self, state: Tensor | None, new: Tensor) -> Tensor:
        raise NotImplementedError


def take(x: Tensor, places: Tensor) -> Tensor:
    """Entries (B, n, d) of (B, W, d) at (B, n) places."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))


def scatter(x: Tensor, dim: int, places: Tensor, new: Tensor, in_place: bool) -> Tensor:
    """x with `new` at these places along dim; places broadcast to the shape of `new`."""
    places, new = places.expand_as(new), new.to(x.dtype)
    return x.scatter_(dim, places, new) if in_place else x.scatter(dim, places, new)


def put(buffer: Tensor | None, new: Tensor, in_place: bool) -> Tensor:
    """`new`; written to the front of the buffer, if there is one to write to."""
    if not in_place or buffer is None:
        return new
    buffer[:, : new.shape[1]] = new
    return buffer


def widen(x: Tensor, size: int, dim: int) -> Tensor:
    """x with at least `size` entries along dim, zeros behind."""
    if x.shape[dim] >= size:
        return x
    shape = list(x.shape)
    shape[dim] = size - x.shape[dim]
    return torch.cat([x, x.new_zeros(shape)], dim)
