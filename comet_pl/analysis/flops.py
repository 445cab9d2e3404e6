"""How many operations a cell, a reading and a training step take, from the configuration alone. Bytes of decoding: traffic.py.

Counted are matrix products, a multiply-add as two operations: projections, MLP, scores and values of attention, the memories' gates and
adapters, the head. Norms, softmax, RoPE and biases are no matrix products. A row counts as if it were alone: padding is no work.

Attention is counted in one of two ways. By default causally: the pairs (token, key column) that a token sees, which is what a kernel that
skips masked blocks comes down to (flash, and our split of memory and own tokens on CPUs). `dense=True`: all W x L pairs, masked or not,
which is what eager attention does and torch's FlopCounterMode reports. Backward is twice forward for both; a kernel that makes the scores
again in the backward pass (flash) does half a forward more, which is not counted: it is no work of the model.

The memory slots [G | T] of a cell, `slots`:
    "recomputed"  keys and values of all of them in each chunk: what the model does
    "kept"        those of T are kept from the chunk in which an entry was new
    "in_full"     ordinary tokens, with queries, attention output and MLP: comet_pl/model/naive.py, and the authors' code

Legend: C chunk size, s stride, m readout tokens = global slots, K temporary slots, L layers, d width, H query heads, H' key/value heads,
h head width, f width of the MLP, r adapter rank, V vocabulary rows (new ones included), W own tokens that enter, M memory slots.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from comet_pl.model.chunk_layout import (
    NO_STRIDE,
    RowClock,
    Segment,
    compression_tokens,
    fixed_chunks,
    plan_row,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from comet_pl.model.configuration_comet import CometConfig

SLOTS = ("recomputed", "kept", "in_full")


@dataclass(frozen=True)
class Operations:
    """Operations by kind; they add up, and `total` is their sum."""

    linear: int = 0  # projections and MLP of own tokens, LoRA included
    slots: int = 0  # keys and values of memory slots
    attention: int = 0  # scores and values
    memory: int = 0  # gates and adapters
    head: int = 0

    @property
    def total(self) -> int:
        return sum(astuple(self))

    def __add__(self, other: Operations) -> Operations:
        return Operations(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: int) -> Operations:
        return Operations(*(a * times for a in astuple(self)))


@dataclass(frozen=True)
class Learning:
    """What gets gradients: train.parameters and train.lora_rank."""

    parameters: str = "all"
    lora_rank: int = 8

    @property
    def decoder(self) -> bool:
        return self.parameters == "all"

    @property
    def memory(self) -> bool:
        return self.decoder or "memory" in self.parameters

    @property
    def rank(self) -> int:
        return self.lora_rank if "lora" in self.parameters else 0

    @property
    def tokens(self) -> bool:
        """Rows of the embedding learn, so that what enters the first layer has a gradient."""
        return self.memory


class Product(NamedTuple):
    """(rows, inner) x (inner, outer)."""

    kind: str  # field of Operations
    rows: int
    inner: int
    outer: int
    learns: bool = True  # the second factor has a gradient
    passes: bool = True  # the first one has

    @property
    def forward(self) -> int:
        return 2 * self.rows * self.inner * self.outer

    @property
    def backward(self) -> int:
        return self.forward * (self.learns + self.passes)


# ---- one cell


def heads(backbone: PretrainedConfig) -> tuple[int, int]:
    """(H h, H' h): widths of all queries and of all keys of a token."""
    width = (
        getattr(backbone, "head_dim", None) or backbone.hidden_size // backbone.num_attention_heads
    )
    return backbone.num_attention_heads * width, backbone.num_key_value_heads * width


def cell(
    config: CometConfig,
    segment: Segment,
    slots: str = "recomputed",
    fresh: int | None = None,
    dense: bool = False,
) -> Operations:
    """Forward operations of one layer on one row's share of a chunk.

    Args:
        segment: which tokens enter, with the row's clock before (comet_pl/model/chunk_layout.py); `whole_chunk` makes the usual one.
        slots: see above. fresh: with "kept", entries of T that are new since the chunk before; None: those of a chunk of C tokens.
    """
    found = cell_products(config, segment, slots, fresh, dense)
    return _sum((p.kind, p.forward) for p in [*found.body, *found.written])


class CellProducts(NamedTuple):
    body: list[Product]  # what the cell's output takes
    written: list[Product]  # what the memory after the chunk takes besides


def cell_products(
    config: CometConfig,
    segment: Segment,
    slots: str = "recomputed",
    fresh: int | None = None,
    dense: bool = False,
    learning: Learning | None = None,
    detached: bool = True,
    first_layer: bool = False,
) -> CellProducts:
    """The matrix products of a cell. What learns, whether the memory that comes in has a gradient (not detached) and whether it is the
    first layer decide on backward alone."""
    backbone, learning = config.backbone_config, learning or Learning()
    d, f, r, m = (
        backbone.hidden_size,
        backbone.intermediate_size,
        config.adapter_rank,
        config.global_size,
    )
    queries, keys = heads(backbone)
    before = segment.before
    first, last = segment.span(m)
    own, opens = last - first, before.fill == 0
    g, t = (before.global_slots, before.temporary_slots) if opens else (0, 0)
    if slots == "kept":
        t = min(t, compression_tokens(config.chunk_size, before.stride) if fresh is None else fresh)
    in_full = slots == "in_full"
    own_passes = not first_layer or learning.tokens
    slots_pass = (
        learning.decoder or not detached or (learning.memory and g > 0)
    )  # decoder: the norm before the projection learns

    body: list[Product] = []

    def projection(kind: str, rows: int, inner: int, outer: int, passes: bool) -> None:
        body.append(Product(kind, rows, inner, outer, learning.decoder, passes))
        if learning.rank:
            body.append(Product(kind, rows, inner, learning.rank, True, passes))
            body.append(Product(kind, rows, learning.rank, outer))

    if g:
        body.append(Product("memory", m, d, r, learning.memory, not detached))
        body.append(Product("memory", m, r, d, learning.memory, learning.memory or not detached))
    if g + t and not in_full:
        for _ in "kv":
            projection("slots", g + t, d, keys, slots_pass)
    tokens = own + (g + t) * in_full
    for outer in (queries, keys, keys):
        projection("linear", tokens, d, outer, own_passes or (in_full and slots_pass))
    for inner, outer in ((queries, d), (d, f), (d, f), (f, d)):
        projection("linear", tokens, inner, outer, True)
    past = before.memory + first - (g + t) * in_full
    pairs = tokens * (past + tokens) if dense else tokens * past + tokens * (tokens + 1) // 2
    body += [Product("attention", pairs, queries, 1)] * 2

    written: list[Product] = []
    if segment.closes and before.stride != NO_STRIDE:
        new = compression_tokens(segment.text, before.stride)
        written += [
            Product("memory", new, d, r, learning.memory),
            Product("memory", new, r, d, learning.memory),
        ]
    if segment.closes and before.global_slots and config.gate == "scalar":
        written.append(Product("memory", m, 2 * d, 1, learning.memory))
    elif segment.closes and before.global_slots and config.gate == "elementwise":
        written += [
            Product("memory", m, 2 * d, r, learning.memory),
            Product("memory", m, r, d, learning.memory),
        ]
    return CellProducts(body, written)


def _sum(parts: Iterable[tuple[str, int]]) -> Operations:
    sums = dict.fromkeys(Operations.__dataclass_fields__, 0)
    for kind, operations in parts:
        sums[kind] += operations
    return Operations(**sums)


def start(config: CometConfig, full: bool = False, stride: int | None = None) -> RowClock:
    """A row before its first token; or after a chunk that left the memory full."""
    s = config.compression_stride and (stride or config.compression_stride)
    slots = (
        {
            "global_slots": config.global_size,
            "temporary_slots": config.temporary_capacity if s else 0,
        }
        if full
        else {}
    )
    return RowClock(stride=s or NO_STRIDE, **slots)


def whole_chunk(config: CometConfig) -> Segment:
    """A chunk of C tokens that closes, the memory full before it."""
    return Segment(start(config, full=True), 0, config.chunk_size, closes=True)


def floor(config: CometConfig, slots: str = "recomputed") -> float:
    """The least that the time of a chunk can be, as a share of slots in full, if both run at the same rate: memory full, head left out."""
    return (
        cell(config, whole_chunk(config), slots).total
        / cell(config, whole_chunk(config), "in_full").total
    )


# ---- readings


def head(backbone: PretrainedConfig, rows: int) -> Operations:
    """Logits of so many positions."""
    return Operations(head=2 * rows * backbone.hidden_size * backbone.vocab_size)


def reading(
    config: CometConfig,
    tokens: int,
    chunk_sizes: Sequence[int] | None = None,
    clock: RowClock | None = None,
    logits: int = 1,
    keep: bool = True,
    slots: str = "recomputed",
    dense: bool = False,
) -> Operations:
    """Operations of one call of the model without gradients, a row.

    Args:
        tokens, chunk_sizes: as the model takes them; None: C each, the last chunk stays open. clock: where the row stands before.
        logits: positions that get some. keep: the cache is used afterwards (the last chunk closes, if chunk_sizes are given).
        slots: see above. With "kept" a reading that goes on starts as if the chunk before had had C tokens.
    """
    clock = clock or start(config)
    segments, _ = plan_row(
        clock, tokens, rollover=config.rollover, chunk_sizes=chunk_sizes, **plan_sizes(config)
    )
    segments = segments if keep else _left_open(segments)
    total, fresh = Operations(), None
    for segment in segments:
        total += cell(config, segment, slots, fresh, dense)
        fresh = compression_tokens(segment.text, segment.before.stride)
    return total * config.backbone_config.num_hidden_layers + head(config.backbone_config, logits)


def full_attention(
    backbone: PretrainedConfig, tokens: int, past: int = 0, logits: int = 1, dense: bool = False
) -> Operations:
    """Operations of a plain decoder on `tokens` tokens of a row, `past` more being in its cache; no gradients."""
    d, f = backbone.hidden_size, backbone.intermediate_size
    queries, keys = heads(backbone)
    pairs = tokens * (past + tokens) if dense else tokens * past + tokens * (tokens + 1) // 2
    layer = Operations(
        linear=2 * tokens * (2 * d * queries + 2 * d * keys + 3 * d * f),
        attention=4 * pairs * queries,
    )
    return layer * backbone.num_hidden_layers + head(backbone, logits)


def plan_sizes(config: CometConfig) -> dict[str, Any]:
    """What plan_row wants to know of a configuration."""
    return {
        "chunk_size": config.chunk_size,
        "global_size": config.global_size,
        "capacity": config.temporary_capacity,
    }


def _left_open(segments: Sequence[Segment]) -> list[Segment]:
    """Nobody reads the last memories, so that the last chunk need not close."""
    return [*segments[:-1], *(replace(last, closes=False) for last in segments[-1:])]


# ---- training


@dataclass(frozen=True)
class Row:
    """A training row: its chunks, how many positions with a target each has, whether memory restarts before it, its stride."""

    chunk_sizes: Sequence[int]
    targets: Sequence[int]
    resets: Sequence[bool] | None = None
    stride: int | None = None

    @classmethod
    def of(cls, config: CometConfig, tokens: int) -> Row:
        """Chunks of C; every token but the last has a target."""
        sizes = fixed_chunks(tokens, config.chunk_size)
        return cls(sizes, [size - (i == len(sizes) - 1) for i, size in enumerate(sizes)])


def training_step(
    config: CometConfig,
    rows: Sequence[Row],
    chunks: int | None = None,
    learning: Learning | None = None,
    recompute: bool = False,
    slots: str = "recomputed",
    dense: bool = False,
) -> Operations:
    """Forward and backward operations of rows that are read together, in windows as comet_pl/training/windows.py cuts them.

    A window without targets has no backward pass, nor has what no later target of its window depends on. Frozen weights get no gradient,
    but what lies before them may. LoRA's own products count, those of the loss's recomputed logits don't.

    Args:
        chunks: train.bptt_chunks. recompute: one forward pass more of every cell that has a backward pass (torch ends it a little
            earlier, where nothing more is needed). slots, dense: see above.
    """
    learning = learning or Learning()
    longest = max((len(row.chunk_sizes) for row in rows), default=0)
    size = chunks or longest or 1
    windows = [range(first, min(first + size, longest)) for first in range(0, longest, size)]
    while windows and not any(sum(row.targets[windows[-1].start :]) for row in rows):
        windows.pop()
    clocks = [start(config, stride=row.stride) for row in rows]
    visits: Counter[_Visit] = Counter()  # rows mostly look alike: each kind of cell is counted once
    for window in windows:
        parts = []
        for b, row in enumerate(rows):
            sizes = list(row.chunk_sizes[window.start : window.stop])
            resets = row.resets and list(row.resets[window.start : window.stop])
            segments, clocks[b] = plan_row(
                clocks[b], sum(sizes), chunk_sizes=sizes, resets=resets, **plan_sizes(config)
            )
            parts.append(segments if window is not windows[-1] else _left_open(segments))
        visits.update(_visits(parts, [row.targets[window.start : window.stop] for row in rows]))
    layers = config.backbone_config.num_hidden_layers
    total = Operations()
    for visit, times in visits.items():
        kinds = {False: layers} if learning.tokens else {True: 1, False: layers - 1}
        for first_layer, count in kinds.items():
            total += _both_passes(config, visit, learning, first_layer, recompute, slots, dense) * (
                count * times
            )
    labelled = sum(sum(row.targets[: windows[-1].stop]) for row in rows) if windows else 0
    learns = learning.decoder or (
        learning.memory and bool(config.backbone_config.tie_word_embeddings)
    )  # a tied head's new rows do
    return total + head(config.backbone_config, labelled) * (2 + learns)


class _Visit(NamedTuple):
    """A row's share of a chunk of a window, and what the window needs of it."""

    segment: Segment
    fresh: int | None  # entries of T that the chunk before wrote, if the window has one
    needed: bool  # its output, for a target here or later
    read: bool  # the memory that it leaves, too


def _visits(
    parts: Sequence[Sequence[Segment]], targets: Sequence[Sequence[int]]
) -> Iterator[_Visit]:
    """All rows' chunks of a window. parts, targets: of each row, its segments and the number of targets in each."""
    needed = read = (
        False  # of the chunk behind: is its output needed, and does some row read the memory there
    )
    for t in reversed(range(max(map(len, parts)))):
        here = [b for b, row in enumerate(parts) if t < len(row)]
        needed_behind, needed = needed, (needed and read) or any(targets[b][t] for b in here)
        for b in here:
            behind = needed_behind and t + 1 < len(parts[b]) and parts[b][t + 1].before.memory > 0
            segment = parts[b][t]
            fresh = compression_tokens(parts[b][t - 1].text, segment.before.stride) if t else None
            alike = replace(segment, start=0, before=replace(segment.before, num_tokens=0))
            yield _Visit(alike, fresh, needed, behind)
        read = any(parts[b][t].before.memory for b in here)


def _both_passes(
    config: CometConfig,
    visit: _Visit,
    learning: Learning,
    first_layer: bool,
    recompute: bool,
    slots: str,
    dense: bool,
) -> Operations:
    """Forward and backward of a cell. The memory that enters a window has no gradient."""
    detached = visit.fresh is None
    body, written = cell_products(
        config, visit.segment, slots, visit.fresh, dense, learning, detached, first_layer
    )
    forward = 2 if recompute and visit.needed else 1
    parts = [(p.kind, p.forward * forward + p.backward * visit.needed) for p in body]
    return _sum(
        [*parts, *((p.kind, p.forward * forward + p.backward * visit.read) for p in written)]
    )
