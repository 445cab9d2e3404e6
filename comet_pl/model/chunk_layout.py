"""Where every token of a chunk stands: pure Python and numpy, no tensors.

Legend: C chunk size, s stride, m readout tokens, K temporary capacity; f "fill" = text tokens already in the open chunk.

A chunk's own tokens are numbered p = 0, 1, 2, ...: text with one compression token after each complete group of s text tokens, one more
after a shorter last group, then m readout tokens. Hence, for n text tokens in a closed chunk:

    text token o          at  p = o + o // s
    compression token j   at  p = min((j + 1) * s, n) + j          (j < ceil(n / s))
    readout token k       at  p = n + ceil(n / s) + k

and an open chunk that has taken f text tokens holds f + (f - 1) // s own tokens: the compression token of a complete group enters only when
the next text token arrives. In a row with g global and t temporary slots, own token p has position g + t + p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

NO_STRIDE = 1 << 40  # a stride that no chunk reaches: no temporary memory


def compression_tokens(n: int, stride: int) -> int:
    """Compression tokens of a closed chunk of n text tokens: ceil(n / s)."""
    return 0 if stride == NO_STRIDE else -(-n // stride)


def open_tokens(fill: int, stride: int) -> int:
    """Own tokens of an open chunk that has taken `fill` text tokens."""
    return fill + (fill - 1) // stride if fill else 0


@dataclass(frozen=True)
class RowClock:
    """What a row has read so far, in numbers; its tensors live in the cache."""

    fill: int = 0  # text tokens in the open chunk
    stride: int = NO_STRIDE
    global_slots: int = 0  # 0 or m
    temporary_slots: int = 0  # 0..K
    num_tokens: int = 0  # real text tokens read

    @property
    def memory(self) -> int:
        return self.global_slots + self.temporary_slots


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
    """A row's share of one step: `count` text tokens from `start` (index among the row's real tokens of this call) enter its chunk."""

    before: RowClock  # the row's clock as the segment starts (after a reset, if there is one)
    start: int
    count: int
    closes: bool  # the last compression token, the readout tokens and the memory update follow

    @property
    def text(self) -> int:
        return self.before.fill + self.count

    def span(self, global_size: int) -> tuple[int, int]:
        """First and last + 1 own position p that this segment adds."""
        s = self.before.stride
        first = open_tokens(self.before.fill, s)
        last = (
            self.text + compression_tokens(self.text, s) + global_size
            if self.closes
            else open_tokens(self.text, s)
        )
        return first, last


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
    """Cuts `tokens` new text tokens of one row into segments; returns them and the row's clock afterwards."""
    segments: list[Segment] = []
    if not tokens:
        return segments, clock  # a row without real tokens stays unchanged

    def add(start: int, count: int, closes: bool) -> None:
        nonlocal clock
        segment = Segment(clock, start, count, closes)
        if count or closes:
            segments.append(segment)
        clock = replace(clock, fill=segment.text, num_tokens=clock.num_tokens + count)
        if closes:
            new = compression_tokens(clock.fill, clock.stride)
            clock = replace(
                clock,
                fill=0,
                global_slots=global_size,
                temporary_slots=min(capacity, clock.temporary_slots + new),
            )

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
        count = tokens - start if grows else min(max(chunk_size - clock.fill, 0), tokens - start)
        closes = start + count < tokens
        add(start, count, closes)
        if not closes:
            return segments, clock
        start += count


def own_layout(segment: Segment, global_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(kind, index) of each own token that the segment adds, in order.

    kind 0: text, index = its offset in the chunk; 1: compression token, index = j; 2: readout token, index = k.
    """
    s, n = segment.before.stride, segment.text
    first, last = segment.span(global_size)
    p = np.arange(first, last)
    group = p // (s + 1)
    body = n + compression_tokens(n, s)  # readout tokens start here
    compression = p % (s + 1) == s
    if segment.closes and s != NO_STRIDE:
        compression |= p == body - 1  # the last, perhaps shorter group
    kind, index = np.where(compression, 1, 0), np.where(compression, group, p - group)
    if segment.closes:
        kind, index = np.where(p >= body, 2, kind), np.where(p >= body, p - body, index)
    return kind, index


def fixed_chunks(tokens: int, chunk_size: int) -> list[int]:
    """C, C, ..., rest."""
    full, rest = divmod(tokens, chunk_size)
    return [chunk_size] * full + [rest] * (rest > 0)
