"""From rows' segments to the chunk that the cells see.

Legend: B rows, N columns of input_ids, W own tokens (padded), M memory slots, L key columns,
m global slots, n compression tokens that enter.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor

from comet_pl.model.chunk_batch import Chunk, RaggedChunk, Rope, Slots, Tokens, UniformChunk
from comet_pl.model.chunk_layout import (
    COMPRESSION,
    READOUT,
    TEXT,
    RowClock,
    Segment,
    apart,
    own_layout,
)
from comet_pl.model.transfer import to_device


@dataclass
class CallFacts:
    """What all chunks of a call share."""

    width: int  # N, columns of input_ids
    columns: list[np.ndarray]  # of each row's real tokens
    wanted: np.ndarray  # (B, N) bool: whose output is needed
    global_size: int
    capacity: int
    trailing: bool  # the layout
    in_place: bool  # tensors are written into the cache's buffers; only without gradients
    keeps: bool  # the cache is kept after the call
    device: torch.device
    rope: Callable[[Tensor, int], Rope]  # of positions (B, W) in a chunk of L columns


def build_chunk(
    facts: CallFacts, segments: Sequence[Segment | None], clocks: Sequence[RowClock]
) -> Chunk:
    """The chunk that these segments make, one a row; None: the row rests.

    Args:
        clocks: of each row before the chunk.
    """
    active = [segment for segment in segments if segment is not None]
    if len(active) == len(segments) and all_alike(active):
        return uniform_chunk(facts, active)
    return ragged_chunk(facts, segments, clocks)


def all_alike(segments: Sequence[Segment]) -> bool:
    """Whether all rows do the same at the same positions."""
    head = segments[0]
    for other in segments[1:]:
        a, b = head.before, other.before
        if (a.fill, a.stride, a.global_slots, a.temporary_slots, head.count, head.closes) != (
            b.fill,
            b.stride,
            b.global_slots,
            b.temporary_slots,
            other.count,
            other.closes,
        ):
            return False
    return True


def uniform_chunk(facts: CallFacts, segments: Sequence[Segment]) -> UniformChunk:
    """Slices for rows that do the same."""
    segment, before, m = segments[0], segments[0].before, facts.global_size
    kinds, index = own_layout(segment, m)
    first, last = segment.span(m)
    W, rows, memory = last - first, len(segments), before.memory
    text = np.flatnonzero(kinds == TEXT)
    entering = np.flatnonzero(kinds == COMPRESSION)
    source = np.empty((rows, W), dtype=np.int64)
    source[:] = facts.width
    if segment.closes and m:
        source[:, W - m :] = facts.width + 1 + np.arange(m)
    offsets = index[text] - before.fill
    for row, columns, own in zip(source, facts.columns, segments, strict=True):
        row[text] = columns[own.start + offsets]
    text_places = np.nonzero((kinds == TEXT)[None].repeat(rows, 0))
    opens = bool(memory and not before.fill)
    entered: slice | np.ndarray | None = evenly(entering) if len(entering) else None
    if entered is None and len(entering):
        entered = entering[None].repeat(rows, 0)
    uneven = entered if isinstance(entered, np.ndarray) else None
    positions = np.arange(0 if opens else memory + first, memory + last)[None]
    sight = None
    if facts.trailing and segment.closes:
        sight = sight_apart(segments[:1], [before], kinds[None], index[None], positions)
    own, compression = own_tokens(
        facts, source, positions, memory + last, text_places, uneven, sight=sight
    )
    held, gated = before.pending_tokens, segment.closes and before.global_slots > 0
    return UniformChunk(
        **own,
        slots=slots_of(before) if opens else None,
        columns=memory + last,
        in_place=facts.in_place,
        capacity=facts.capacity,
        stores=facts.keeps and not segment.closes,
        closes=segment.closes,
        has_state=before.global_slots > 0,
        gated=list(range(rows)) if gated else [],
        read=[own.before.closed_tokens for own in segments] if gated else [],
        pending=held,
        pending_after=held + len(entering),
        temporary_before=before.temporary_slots,
        past=memory + first,
        compression=entered if isinstance(entered, slice) else compression,
        readout_place=slice(W - m, W),
        behind=0 if sight is None else W - len(text),
    )


def slots_of(clock: RowClock) -> Slots:
    return Slots(clock.sink_slots, clock.global_slots, clock.temporary_slots)


def sight_apart(
    segments: Sequence[Segment | None],
    before: Sequence[RowClock],
    kinds: np.ndarray,
    index: np.ndarray,
    positions: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The `sight` of `own_tokens` where rows close a trailing chunk.

    Args:
        kinds, index: (B, W) of the own tokens; kind -1: padding. positions: (B, M + W).
    """
    turned, sees = positions.copy(), positions[:, positions.shape[1] - kinds.shape[1] :].copy()
    own = turned[:, positions.shape[1] - kinds.shape[1] :]
    for b, segment in enumerate(segments):
        if segment is not None and segment.closes:
            n = np.count_nonzero(kinds[b] >= 0)
            numbers = apart(segment, kinds[b, :n], index[b, :n])
            own[b, :n], sees[b, :n] = (before[b].memory + each for each in numbers)
    return turned, sees


class OwnTokens(TypedDict):
    """Fields of a Chunk."""

    tokens: Tokens
    positions: Tensor
    rope: Rope


def own_tokens(
    facts: CallFacts,
    source: np.ndarray,
    positions: np.ndarray,
    columns: int,
    text: tuple[np.ndarray, ...],
    *others: np.ndarray | None,
    sight: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[Any, ...]:
    """The OwnTokens of a chunk, and other arrays as tensors.

    Args:
        source: (B, W). positions: (B or 1, M + W). columns: L.
        text: rows and places of the text tokens.
        sight: (RoPE positions like `positions`, Tokens.sees), where they are not the columns.
    """
    wanted, target = wanted_places(facts, source, text)
    own, places, chosen, turned, sees, *arrays = to_device(
        facts.device, source, positions, wanted, *(sight or (None, None)), *others
    )
    assert own is not None and places is not None
    cos, sin = facts.rope(places if turned is None else turned, columns)
    first = positions.shape[1] - source.shape[1]
    rope = cos[:, first:], sin[:, first:]
    tokens = Tokens(own, places[:, first:], rope, chosen, target, sees)
    return OwnTokens(tokens=tokens, positions=places, rope=(cos, sin)), *arrays


def wanted_places(
    facts: CallFacts, source: np.ndarray, text: tuple[np.ndarray, ...]
) -> tuple[np.ndarray | None, np.ndarray]:
    """Flat places in (B, W), None: all, and in (B, N) of the text tokens (row, place) that are
    wanted."""
    row, place = text
    column = source[row, place]
    hit = facts.wanted[row, column]
    row, place, column = row[hit], place[hit], column[hit]
    target = row * facts.width + column
    return (None if len(row) == source.size else row * source.shape[1] + place), target


class RowLayout(NamedTuple):
    """The own tokens of ragged rows, as arrays (B, W)."""

    kinds: np.ndarray  # -1: padding
    indices: np.ndarray
    source: np.ndarray
    positions: np.ndarray


def row_layout(
    facts: CallFacts, segments: Sequence[Segment | None], before: Sequence[RowClock], columns: int
) -> RowLayout:
    """Every row's own tokens, padded behind."""
    m = facts.global_size
    spans = [s.span(m) if s else (0, 0) for s in segments]
    shape = len(segments), max(last - first for first, last in spans)
    kinds, index = np.full(shape, -1), np.zeros(shape, dtype=np.int64)
    source, positions = np.full(shape, facts.width), np.full(shape, columns)
    for b, (segment, (first, last)) in enumerate(zip(segments, spans, strict=True)):
        if segment is None:
            continue
        n = last - first
        kinds[b, :n], index[b, :n] = own_layout(segment, m)
        positions[b, :n] = before[b].memory + np.arange(first, last)
        text, readout = kinds[b] == TEXT, kinds[b] == READOUT
        source[b, text] = facts.columns[b][index[b, text] + segment.start - segment.before.fill]
        source[b, readout] = facts.width + 1 + index[b, readout]
    return RowLayout(kinds, index, source, positions)


def ragged_chunk(
    facts: CallFacts, segments: Sequence[Segment | None], clocks: Sequence[RowClock]
) -> RaggedChunk:
    """Indices for rows that differ, or of which some rest."""
    before = [s.before if s else clock for s, clock in zip(segments, clocks, strict=True)]
    columns = max(
        clock.memory + (s.span(facts.global_size)[1] if s else clock.own_tokens)
        for clock, s in zip(before, segments, strict=True)
    )
    layout = row_layout(facts, segments, before, columns)
    closes = [s is not None and s.closes for s in segments]
    opening = [b for b, s in enumerate(segments) if s and not before[b].fill]
    held = [clock.pending_tokens for clock in before]
    entering = (layout.kinds == COMPRESSION).sum(1)
    pending_after = max(h + int(n) for h, n in zip(held, entering, strict=True))
    gated = [b for b, clock in enumerate(before) if closes[b] and clock.global_slots]
    stays = any(
        not c and (s or old.fill) for c, s, old in zip(closes, segments, before, strict=True)
    )
    slots, positions = ragged_slots(before, opening, layout.positions, columns)
    sight = None
    if facts.trailing and any(closes):
        sight = sight_apart(segments, before, layout.kinds, layout.indices, positions)
    new = [h + int(n) if c else 0 for h, n, c in zip(held, entering, closes, strict=True)]
    places = compression_places(layout, entering, pending_after)
    readout = readout_places(facts, layout) if any(closes) else None
    entries = temporary_entries(facts, before, new) if any(closes) else None
    rows = np.array([[clock.global_slots == 0 for clock in before], closes], dtype=np.int64)
    own, compression, pending_place, readout_place, kept, flags = own_tokens(
        facts,
        layout.source,
        positions,
        columns,
        np.nonzero(layout.kinds == TEXT),
        *places,
        readout,
        entries,
        rows,
        sight=sight,
    )
    first_rows, closing = flags.bool()
    return RaggedChunk(
        **own,
        slots=slots,
        columns=columns,
        in_place=facts.in_place,
        capacity=facts.capacity,
        stores=facts.keeps and stays,
        closes=any(closes),
        has_state=any(clock.global_slots for clock in before),
        gated=gated,
        read=[before[b].closed_tokens for b in gated],
        pending=max(held),
        pending_after=pending_after,
        temporary_before=max(clock.temporary_slots for clock in before),
        continues=any(clock.fill for clock in before),
        first_rows=first_rows,
        closing=closing,
        compression=compression,
        pending_place=pending_place,
        readout_place=readout_place,
        temporary_entries=kept,
    )


def ragged_slots(
    before: Sequence[RowClock], opening: Sequence[int], own: np.ndarray, columns: int
) -> tuple[Slots | None, np.ndarray]:
    """Slots of the rows that open a chunk, and positions (B, M + W): those that a row lacks stand
    at column L.

    Args:
        own: positions (B, W) of the own tokens.
    """
    own_slots = [slots_of(before[b]) for b in opening]
    slots = Slots(*map(max, zip(*own_slots, strict=True))) if opening else Slots(0, 0, 0)
    if not sum(slots):
        return None, own
    place = np.full((len(before), sum(slots)), columns)
    for b, counts in zip(opening, own_slots, strict=True):
        start = taken = 0
        for count, room in zip(counts, slots, strict=True):
            place[b, start : start + count] = taken + np.arange(count)
            start, taken = start + room, taken + count
    return slots, np.concatenate([place, own], 1)


def compression_places(
    layout: RowLayout, entering: np.ndarray, pending_after: int
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """(B, n) where the entering compression tokens stand in W, and among the pending outputs."""
    n = int(entering.max(initial=0))
    if not n:
        return None, None
    place = np.zeros((len(entering), n), dtype=np.int64)
    pending = np.full_like(place, pending_after)
    for b, kinds in enumerate(layout.kinds):
        where = np.flatnonzero(kinds == COMPRESSION)
        place[b, : len(where)], pending[b, : len(where)] = where, layout.indices[b, where]
    return place, pending


def readout_places(facts: CallFacts, layout: RowLayout) -> np.ndarray | None:
    """(B, m) where the readout tokens stand in W; anywhere in rows that do not close."""
    if not facts.global_size:
        return None
    first = (layout.kinds == READOUT).argmax(1)
    return (first[:, None] + np.arange(facts.global_size)) % layout.kinds.shape[1]


def temporary_entries(
    facts: CallFacts, before: Sequence[RowClock], new: Sequence[int]
) -> np.ndarray | None:
    """(B, T') entries of [T | new] that make each row's T: its last K."""
    old = [clock.temporary_slots for clock in before]
    used, longest = max(old), max(min(facts.capacity, t + n) for t, n in zip(old, new, strict=True))
    if not longest:
        return None
    entries = np.zeros((len(old), longest), dtype=np.int64)
    for row, t, n in zip(entries, old, new, strict=True):
        kept = np.arange(max(0, t + n - facts.capacity), t + n)
        row[: len(kept)] = np.where(kept < t, kept, used + kept - t)
    return entries


def evenly(places: np.ndarray) -> slice | None:
    """The slice that selects these places, if they are evenly spaced."""
    if len(places) == 1:
        return slice(int(places[0]), int(places[0]) + 1)
    gaps = np.diff(places)
    even = (gaps == gaps[0]).all()
    return slice(int(places[0]), int(places[-1]) + 1, int(gaps[0])) if even else None
