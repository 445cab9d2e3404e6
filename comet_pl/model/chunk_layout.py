"""Where every token of a chunk stands: pure Python and numpy, no tensors.

Legend: C chunk size, s stride, m readout tokens, K temporary capacity; f "fill" = text tokens in
the open chunk.

A chunk's own tokens are numbered p = 0, 1, 2, ...: text with one compression token after each
complete group of s text tokens, one after a shorter last group, then m readout tokens. For n text
tokens in a closed chunk:

    text token o          at  p = o + o // s
    compression token j   at  p = min((j + 1) * s, n) + j          (j < ceil(n / s))
    readout token k       at  p = n + ceil(n / s) + k

An open chunk with f text tokens holds f + (f - 1) // s own tokens: the compression token of a
complete group enters when the next text token arrives. In a row with g global and t temporary
slots, own token p has position g + t + p, which is its key column and its RoPE position, and sees
all columns up to its own.

That is the authors' layout, "interleaved". In the "trailing" one internal tokens enter when their
chunk closes, and text is as it is in a plain decoder:

                          key column p     RoPE position       sees own columns
    text token o          o                o                   <= o
    compression token j   n + j            min((j + 1) s, n)   < min((j + 1) s, n), and its own
    readout token k       n + ceil(n/s) + k   n + k            <= its own

A sink, if there is one, is a slot before all others wherever there are others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

NO_STRIDE = 1 << 40  # a stride that no chunk reaches: no temporary memory
TEXT, COMPRESSION, READOUT = range(3)  # kinds of own tokens


def compression_tokens(n: int, stride: int) -> int:
    """Compression tokens of a closed chunk of n text tokens: ceil(n / s)."""
    return 0 if stride == NO_STRIDE else -(-n // stride)


@dataclass(frozen=True)
class RowClock:
    """How far a row has come, in numbers; its tensors are in the cache."""

    fill: int = 0  # text tokens in the open chunk
    stride: int = NO_STRIDE
    global_slots: int = 0  # 0 or m
    temporary_slots: int = 0  # 0..K
    num_tokens: int = 0  # real text tokens so far
    trailing: bool = False  # the layout
    sink: bool = False  # wherever there is memory

    @property
    def sink_slots(self) -> int:
        """0 or 1."""
        return int(self.sink and self.global_slots + self.temporary_slots > 0)

    @property
    def memory(self) -> int:
        """Memory slots that the chunk sees, a sink included."""
        slots = self.global_slots + self.temporary_slots
        return slots + 1 if slots and self.sink else slots

    @property
    def own_tokens(self) -> int:
        """Own tokens of the open chunk."""
        if self.trailing or not self.fill:
            return self.fill
        return self.fill + (self.fill - 1) // self.stride

    @property
    def pending_tokens(self) -> int:
        """Compression tokens that the open chunk holds."""
        return 0 if self.trailing or not self.fill else (self.fill - 1) // self.stride

    @property
    def closed_tokens(self) -> int:
        """Text tokens before the open chunk."""
        return self.num_tokens - self.fill


class ChunkPlan(NamedTuple):
    """How one row of text is cut: the same value from the data to the forward pass.

    A tuple, so that it travels between processes and through Lightning's batch transfer.
    """

    sizes: tuple[int, ...]  # text tokens of each chunk
    resets: tuple[bool, ...] | None = None  # of each chunk: its row's memory is emptied before it
    stride: int | None = None  # None: the model's own

    @property
    def tokens(self) -> int:
        """Text tokens of the row."""
        return sum(self.sizes)

    def part(self, start: int, end: int) -> ChunkPlan:
        """Chunks start to end (not included)."""
        resets = self.resets and self.resets[start:end]
        return ChunkPlan(self.sizes[start:end], resets, self.stride)


@dataclass(frozen=True)
class Segment:
    """What a row adds to one chunk: `count` of this call's real tokens, from the start-th on."""

    before: RowClock  # the row's clock as the segment starts, after a reset if there is one
    start: int
    count: int
    closes: bool  # the last compression token, the readout tokens and the memory update follow

    @property
    def text(self) -> int:
        """Text tokens of the chunk after the segment."""
        return self.before.fill + self.count

    def span(self, global_size: int) -> tuple[int, int]:
        """First and last + 1 own position p that the segment adds."""
        s, first = self.before.stride, self.before.own_tokens
        text = self.before.fill + self.count
        if self.closes:
            return first, text + compression_tokens(text, s) + global_size
        return first, replace(self.before, fill=text).own_tokens


def plan_row(
    clock: RowClock,
    tokens: int,
    *,
    chunk_size: int,
    global_size: int,
    capacity: int,
    rollover: bool = True,
    chunk_sizes: Sequence[int] | None = None,
    resets: Sequence[bool] | None = None,
) -> tuple[list[Segment], RowClock]:
    """`tokens` new text tokens of a row as segments, and the row's clock afterwards.

    Without chunk_sizes the text continues the open chunk, and full chunks roll over. With them the
    open chunk closes first and every listed chunk closes.
    """
    segments: list[Segment] = []
    # A row without real tokens stays unchanged.
    if not tokens:
        return segments, clock

    def add(start: int, count: int, closes: bool) -> None:
        nonlocal clock
        if count or closes:
            segments.append(Segment(clock, start, count, closes))
        text, read = clock.fill + count, clock.num_tokens + count
        if closes:
            new = clock.temporary_slots + compression_tokens(text, clock.stride)
            kept = min(capacity, new)
            clock = replace(
                clock, fill=0, num_tokens=read, global_slots=global_size, temporary_slots=kept
            )
        else:
            clock = replace(clock, fill=text, num_tokens=read)

    start = 0
    if chunk_sizes is not None:
        if clock.fill:
            add(0, 0, True)
        for size, reset in zip(chunk_sizes, resets or [False] * len(chunk_sizes), strict=True):
            if reset:
                clock = replace(clock, global_slots=0, temporary_slots=0)
            add(start, size, size > 0)
            start += size
        return segments, clock
    grows = not rollover and clock.num_tokens > 0
    while True:
        left = tokens - start
        count = left if grows else min(max(chunk_size - clock.fill, 0), left)
        closes = start + count < tokens
        add(start, count, closes)
        if not closes:
            return segments, clock
        start += count


def own_layout(segment: Segment, global_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(kind, index) of each own token that the segment adds, in order.

    TEXT: index = its offset in the chunk; COMPRESSION: index = j; READOUT: index = k.
    """
    s = segment.before.stride
    first, last = segment.span(global_size)
    p = np.arange(first, last)
    if segment.before.trailing:
        n, body = segment.text, last - segment.closes * global_size
        kind = np.where(p < n, TEXT, np.where(p < body, COMPRESSION, READOUT))
        return kind, p - np.select([kind == TEXT, kind == COMPRESSION], [0, n], body)
    group = p // (s + 1)
    compression = p % (s + 1) == s
    body = last
    if segment.closes:
        body = last - global_size
        # The last, perhaps shorter group.
        if s != NO_STRIDE:
            compression |= p == body - 1
    kind = np.where(compression, COMPRESSION, TEXT)
    index = np.where(compression, group, p - group)
    if segment.closes:
        kind, index = np.where(p >= body, READOUT, kind), np.where(p >= body, p - body, index)
    return kind, index


def apart(segment: Segment, kind: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(RoPE position, last own column seen beside its own) of each own token of a segment that
    closes a trailing chunk, in the numbering p. Of all others both are p.

    Args:
        kind, index: of `own_layout`.
    """
    n, p = segment.text, segment.before.own_tokens + np.arange(len(kind))
    group_end = np.minimum((index + 1) * segment.before.stride, n)
    compression = kind == COMPRESSION
    rope = np.select([compression, kind == READOUT], [group_end, n + index], p)
    return rope, np.where(compression, group_end - 1, p)


def fixed_chunks(tokens: int, chunk_size: int) -> list[int]:
    """C, C, ..., rest."""
    full, rest = divmod(tokens, chunk_size)
    return [chunk_size] * full + [rest] * (rest > 0)
