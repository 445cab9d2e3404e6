"""One step of a call: the tokens that every row's current chunk takes, as tensors that all layers share.

Legend: B rows, W own tokens of the step (padded), M memory slots, L key columns, m global slots, n compression tokens entering.
The rule that carries everything: **a row's key columns are numbered by its positions** - global slots, temporary slots, own tokens, without
gaps. So RoPE positions, key columns and causality are one thing, and a token at position p sees exactly the columns <= p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from comet_pl.model.chunk_layout import RowClock, Segment, open_tokens, own_layout

Rope = tuple[Tensor, Tensor]


def pending_tokens(clock: RowClock) -> int:
    """Compression tokens that an open chunk already holds."""
    return open_tokens(clock.fill, clock.stride) - clock.fill


@dataclass
class Step:
    uniform: bool  # all rows do the same: slices instead of scatters, no mask
    in_place: bool  # write into the cache's buffers (no gradient) instead of making new tensors
    source: Tensor  # (B, W) columns of [input_ids | compression token | m readout tokens]
    positions: Tensor  # (B, W), or (1, W) if uniform; padding stands at column L, which nobody sees
    opens: bool  # some row opens a chunk: its memory slots get keys and values
    continues: bool  # some row's open chunk goes on
    stores: bool  # some row's chunk stays open: keys and pending compression outputs are kept
    closes: bool  # some row's chunk closes: its memory is updated
    columns: int  # L
    past: int  # uniform: key columns before the own tokens
    global_slots: int  # m if an opening row has global memory, else 0
    temporary_slots: int  # columns of T that an opening row uses
    slot_positions: Tensor | None  # (B or 1, M) positions of the memory slots
    first: Tensor | None  # ragged: (B,) rows in their first chunk
    has_state: bool  # some row has a state S before the step
    closing: Tensor | None  # ragged: (B,) rows that close
    readout: Tensor | slice | None  # where the readout tokens stand in W: slice, or (B, m)
    compression: (
        Tensor | slice | None
    )  # where the entering compression tokens stand in W: slice with step, or (B, n)
    pending: int  # columns of pending outputs used before the step
    pending_after: int
    pending_slot: (
        Tensor | None
    )  # ragged: (B, n) column of each entering compression token among the pending
    temporary_before: int  # columns of T used before the step
    temporary_index: Tensor | None  # ragged: (B, T') columns of [T | new] that make the new T
    capacity: int
    gated: list[int]  # rows whose state a gate updates: they close a chunk and had a state before
    read: list[int]  # their text tokens before that chunk
    selected: Tensor | None = (
        None  # (k,) flat places in (B, W) of the text tokens whose output is wanted
    )
    target: Tensor | None = None  # (k,) their flat places in (B, N)
    rope: Rope = field(default=None, repr=False)  # type: ignore[assignment]
    slot_rope: Rope | None = field(default=None, repr=False)

    @property
    def mask(self) -> Tensor:
        """(B, 1, W, L) or (W, L): True where a token sees a column. Made anew for each layer: little beside what it masks, and
        torch.compile then sees one kind of step instead of two."""
        columns = torch.arange(self.columns, device=self.positions.device)
        seen = columns <= self.positions[:, :, None]
        return seen[0] if self.uniform else seen[:, None]


def build_step(
    segments: Sequence[Segment | None],
    clocks: Sequence[RowClock],
    text_columns: Sequence[np.ndarray],
    *,
    width: int,
    global_size: int,
    capacity: int,
    wanted: np.ndarray | None,
    in_place: bool,
    keep: bool,
    device: torch.device,
) -> Step:
    """Turns one segment a row (None: the row rests) into a Step.

    clocks: each row's clock before the step, for rows that rest. text_columns[b]: the columns of row b's real tokens in this call.
    width: N, columns of input_ids. wanted: (B, N) bool. keep: the cache is kept after the call.
    """
    before = [s.before if s else c for s, c in zip(segments, clocks, strict=True)]
    spans = [s.span(global_size) if s else (0, 0) for s in segments]
    active = [b for b, s in enumerate(segments) if s]
    uniform = len(active) == len(segments) and all(
        (
            s.before.fill,
            s.before.stride,
            s.before.global_slots,
            s.before.temporary_slots,
            s.count,
            s.closes,
        )
        == (
            t.before.fill,
            t.before.stride,
            t.before.global_slots,
            t.before.temporary_slots,
            t.count,
            t.closes,
        )
        for s in segments[:1]
        for t in segments[1:]
        if s and t
    )
    rows, W = len(segments), max(last - first for first, last in spans)
    columns = max(
        c.memory + (last if s else open_tokens(c.fill, c.stride))
        for c, s, (_, last) in zip(before, segments, spans, strict=True)
    )

    # Own tokens: where they come from, where they stand, which of them are wanted.
    source, positions = np.full((rows, W), width), np.full((rows, W), columns)
    kinds = np.full((rows, W), -1)
    slots = np.zeros((rows, W), dtype=np.int64)
    for b in active:
        if uniform and b:
            kinds[b], slots[b], positions[b] = kinds[0], slots[0], positions[0]
        else:
            kind, index = own_layout(segments[b], global_size)  # type: ignore[arg-type]
            n = len(kind)
            kinds[b, :n], slots[b, :n] = kind, index
            positions[b, :n] = before[b].memory + np.arange(*spans[b])
        text = kinds[b] == 0
        start = segments[b].start - before[b].fill  # type: ignore[union-attr]
        source[b, text] = text_columns[b][slots[b, text] + start]
        readout = kinds[b] == 2
        source[b, readout] = width + 1 + slots[b, readout]
    selected = target = None
    if wanted is not None:
        row, place = np.nonzero(kinds == 0)
        column = source[row, place]
        hit = wanted[row, column]
        if hit.any():
            selected, target = row[hit] * W + place[hit], row[hit] * width + column[hit]

    opening = [b for b in active if before[b].fill == 0]
    going = [b for b in active if before[b].fill]
    closing = [b for b in active if segments[b].closes]  # type: ignore[union-attr]
    gated = [b for b in closing if before[b].global_slots]
    entering = (kinds == 1).sum(1)
    held = [pending_tokens(c) for c in before]
    stays = [b for b in range(rows) if b not in closing and (segments[b] or before[b].fill)]
    global_slots = max((before[b].global_slots for b in opening), default=0)
    temporary_slots = max((before[b].temporary_slots for b in opening), default=0)

    def tensor(array: np.ndarray | list[int] | list[bool] | None) -> Tensor | None:
        return None if array is None else torch.as_tensor(np.asarray(array), device=device)

    step = Step(
        uniform=uniform,
        in_place=in_place,
        source=tensor(source),  # type: ignore[arg-type]
        positions=tensor(positions[:1] if uniform else positions),  # type: ignore[arg-type]
        opens=bool(opening) and global_slots + temporary_slots > 0,
        continues=bool(going) or any(c.fill for c in before),
        stores=keep and bool(stays),
        closes=bool(closing),
        columns=columns,
        past=int(positions[0, 0]) if uniform and W else 0,
        global_slots=global_slots,
        temporary_slots=temporary_slots,
        slot_positions=None,
        first=None,
        has_state=any(c.global_slots for c in before),
        closing=None,
        readout=None,
        compression=None,
        pending=max(held),
        pending_after=max(h + int(e) for h, e in zip(held, entering, strict=True)),
        pending_slot=None,
        temporary_before=max(c.temporary_slots for c in before),
        temporary_index=None,
        capacity=capacity,
        gated=gated,
        read=[before[b].num_tokens - before[b].fill for b in gated],
        selected=tensor(selected),
        target=tensor(target),
    )
    if uniform:
        where = np.flatnonzero(kinds[0] == 1)
        if len(where):
            step.compression = _evenly(where) or tensor(where[None].repeat(rows, 0))
        if closing and global_size:
            step.readout = slice(W - global_size, W)
        if step.opens:
            step.slot_positions = tensor(np.arange(global_slots + temporary_slots)[None])
        return step

    # Ragged: whatever a row lacks stands at a column, or in an entry, that nobody reads.
    if step.opens:
        slot = np.full((rows, global_slots + temporary_slots), columns)
        for b in opening:
            g, t = before[b].global_slots, before[b].temporary_slots
            slot[b, :g] = np.arange(g)
            slot[b, global_slots : global_slots + t] = g + np.arange(t)
        step.slot_positions = tensor(slot)
    step.first = tensor([c.global_slots == 0 for c in before])
    step.closing = tensor([b in closing for b in range(rows)])
    if entering.max(initial=0):
        place, slot = (
            np.zeros((rows, entering.max()), dtype=np.int64),
            np.full((rows, entering.max()), step.pending_after),
        )
        for b in active:
            where = np.flatnonzero(kinds[b] == 1)
            place[b, : len(where)], slot[b, : len(where)] = where, slots[b, where]
        step.compression, step.pending_slot = tensor(place), tensor(slot)
    if closing and global_size:
        step.readout = tensor(
            np.stack([_first(kinds[b] == 2) + np.arange(global_size) for b in range(rows)])
            % max(W, 1)
        )
    old = [c.temporary_slots for c in before]
    new = [held[b] + int(entering[b]) if b in closing else 0 for b in range(rows)]
    longest = max(min(capacity, t + n) for t, n in zip(old, new, strict=True))
    if closing and longest:
        index = np.zeros((rows, longest), dtype=np.int64)
        for b, (t, n) in enumerate(zip(old, new, strict=True)):
            entry = np.arange(max(0, t + n - capacity), t + n)  # the last K of [T ; new]
            index[b, : len(entry)] = np.where(entry < t, entry, step.temporary_before + entry - t)
        step.temporary_index = tensor(index)
    return step


def _first(mask: np.ndarray) -> int:
    return int(mask.argmax()) if mask.any() else 0


def _evenly(where: np.ndarray) -> slice | None:
    """The slice that selects these places, if they are evenly spaced."""
    if len(where) == 1:
        return slice(int(where[0]), int(where[0]) + 1)
    gaps = np.diff(where)
    return (
        slice(int(where[0]), int(where[-1]) + 1, int(gaps[0])) if (gaps == gaps[0]).all() else None
    )
