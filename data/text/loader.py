"""Training batches from samples: packed, cut into chunks, sharded, in an order that is a pure
function of (seed, epoch).

Samples come in windows: the whole corpus if it is cached, some rows if it is streamed. A window's
samples are packed into rows of the batch and shuffled. The first rows of a window fill its last
batch. One pass of the loader is the whole training, over any number of epochs of the data.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import numpy as np

from comet_pl.errors import UserError
from comet_pl.model.chunk_layout import ChunkPlan
from data.batches import ALL, Pair, Place, Shard, loader, pad_rows
from data.jsonl import Complaints
from data.text.chunk_plans import chunk_plan, draw_stride
from data.text.packing import join, pack
from data.text.tokenized import CachedSamples, Sample, Source, encoded, usable
from data.workers import received

Samples = Sequence[Sample] | CachedSamples
Row = tuple[Pair, ChunkPlan]
MOST_ROWS = 100_000_000  # of an epoch: their numbers are held in memory
PLACE = ("epoch", "window", "place", "given")
EMPTY_EPOCHS = 1000  # in a row are no chance, as single ones are if weights are small
FIRST_WINDOW = 32  # rows; each window has twice the rows of the last one, up to shuffle_window


@dataclass(frozen=True)
class Layout:
    """How samples become rows of a batch.

    Args:
        max_length: tokens of a row.
        chunk_size: C, the model's.
        stride: s, the model's; None: no temporary memory.
        packing: none, documents (each with a memory of its own) or shared.
        plan: one of data.text.chunk_plans.KINDS, or mixture.
        dynamic_stride: draws each row's stride.
        ends: (V,) ids that may end a chunk, for the plans sentence and mixture.
        weights: how often an epoch has the samples of a group; groups without one, and None: once.
    """

    max_length: int
    chunk_size: int
    stride: int | None
    packing: str = "none"
    plan: str = "fixed"
    dynamic_stride: bool = False
    ends: np.ndarray | None = None
    weights: dict[str, float] | None = None

    def rows(self, samples: Samples, random: np.random.Generator) -> list[list[int]]:
        """The samples of each row, in the order of the rows."""
        if isinstance(samples, CachedSamples):
            lengths, groups = samples.lengths, samples.groups
        else:
            lengths = np.array([len(sample) for sample in samples])
            groups = np.array([sample.group for sample in samples])
        numbers = np.arange(len(lengths))
        if self.weights is not None and len(numbers):
            times = np.array([self.weights.get(group, 1.0) for group in groups])
            if (total := times.sum()) > MOST_ROWS:
                raise UserError(
                    f"data.weights: {max(self.weights.values()):g} given, an epoch would have "
                    f"{total:.3g} rows; allowed: up to {MOST_ROWS:,}"
                )
            # a weight of 1.5 gives one row or two, at random
            numbers = np.repeat(numbers, (times + random.random(len(times))).astype(int))
        if self.packing == "none":
            return [[number] for number in random.permutation(numbers).tolist()]
        packed = pack(lengths[numbers], self.max_length, random)
        return [numbers[row].tolist() for row in packed]

    def row(self, samples: Sequence[Sample], random: np.random.Generator) -> Row:
        sizes = [self._sizes(sample, random) for sample in samples]
        pairs = [sample.pair() for sample in samples]
        ids, labels, plan = join(pairs, sizes, shared=self.packing == "shared")
        if self.dynamic_stride and self.stride is not None:
            plan = plan._replace(stride=draw_stride(self.stride, random))
        return (ids, labels), plan

    def _sizes(self, sample: Sample, random: np.random.Generator) -> list[int]:
        ends = None if self.ends is None else self.ends[sample.ids]
        return chunk_plan(self.plan, len(sample), self.chunk_size, self.max_length, random, ends)


def collate(rows: Sequence[Row], pad_token: int) -> dict[str, Any]:
    """Rows -> input_ids, attention_mask, labels, each (B, longest), and plans, one a row."""
    pairs, plans = zip(*rows, strict=True)
    return {**pad_rows(pairs, pad_token), "plans": list(plans)}


class Windows(Protocol):
    """Samples of an epoch, window by window."""

    def window(self, epoch: int, number: int) -> Samples | None:
        """None: the epoch has no more."""
        ...


@dataclass
class Cached:
    """The whole corpus as one window."""

    samples: CachedSamples
    counts: dict[tuple[int, int], int] = field(default_factory=dict)

    def window(self, epoch: int, number: int) -> CachedSamples | None:
        return self.samples if number == 0 else None

    def rows(self, layout: Layout, seed: int, epoch: int) -> int:
        """Rows of an epoch, counted once: all calls are about one layout."""
        if (seed, epoch) not in self.counts:
            random = np.random.default_rng((seed, epoch, 0))
            self.counts[seed, epoch] = len(layout.rows(self.samples, random))
        return self.counts[seed, epoch]


class Streamed:
    """Windows whose rows are read and encoded when they are needed.

    Rows are shuffled within their window. The first windows are small, so that the first batch
    comes soon. Resuming in mid-epoch reads the earlier rows again, but does not encode them.

    Args:
        size: rows of a window.
        workers: processes that encode.

    Attributes:
        complaints: about the rows of the first epoch, as far as it has been read.
    """

    def __init__(self, source: Source, size: int, workers: int = 0):
        self.source, self.size, self.workers = source, size, workers
        self.complaints = Complaints(source.on_error)
        self.place: tuple[int, int] | None = None  # epoch and number of the window that is held
        self.held: list[Sample] | None = None
        self.rows: Iterator[Sample | None] = iter(())

    def window(self, epoch: int, number: int) -> list[Sample] | None:
        if self.place == (epoch, number):
            return self.held
        if number == 0 or self.place != (epoch, number - 1):
            start = sum(self._size(earlier) for earlier in range(number))
            complaints = Complaints(self.source.on_error)
            if epoch == 0:  # each row is counted once, not once an epoch
                self.complaints = complaints
            self.rows = encoded(self.source, complaints, self.workers, start)
        rows = list(islice(self.rows, self._size(number)))
        self.place = epoch, number
        self.held = list(self.source.cut(usable(rows))) if rows else None
        return self.held

    def _size(self, number: int) -> int:
        return min(self.size, FIRST_WINDOW << min(number, 32))


class Feed:
    """The batches of a training, the same for any number of worker processes.

    Stopped anywhere and resumed, it yields the batches that an uninterrupted feed yields. The order
    of the rows does not depend on the number of ranks: each batch is dealt to them in turn.
    Lightning saves its state: epoch, window, the number of the window's rows that all ranks
    together have received (place), batches given, and the rows of a batch on all ranks. Resumed on
    another number of ranks, it gives the rest of the epochs in batches of their size.

    Args:
        batches: of the whole training, on each rank, at most.
        batch_size: rows of a batch on each rank.
        epochs: after which it ends, of a Cached; None: none.
    """

    def __init__(
        self,
        windows: Windows,
        layout: Layout,
        pad_token: int,
        batches: int,
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        shard: Shard = ALL,
        epochs: int | None = None,
    ):
        self.windows, self.layout, self.pad_token = windows, layout, pad_token
        self.batches, self.batch_size, self.seed = batches, batch_size, seed
        self.num_workers, self.shard, self.epochs = num_workers, shard, epochs
        self.epoch = self.window = self.place = self.given = 0

    @property
    def step(self) -> int:
        """Rows of a batch on all ranks together."""
        return self.batch_size * self.shard.world

    def __len__(self) -> int:
        """Batches of the whole training: those given so far, and those that are left."""
        if self.epochs is None:
            return self.batches
        assert isinstance(self.windows, Cached)
        left = 0
        for epoch in range(self.epoch, self.epochs):
            rows = self.windows.rows(self.layout, self.seed, epoch)
            if epoch == self.epoch:
                rows = 0 if self.window else max(0, rows - self.place)
            left += -(-rows // self.step)
        return min(self.batches, self.given + left)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        given, empty, batches = self.given, 0, len(self)
        while self.given < batches:
            samples = self.windows.window(self.epoch, self.window)
            if samples is None:
                empty = empty + 1 if self.given == given else 0
                if empty > EMPTY_EPOCHS and self.layout.weights is None:
                    raise UserError(f"data.root: {empty} epochs in a row had not a single row")
                if empty > EMPTY_EPOCHS:
                    raise UserError(
                        f"data.weights: {empty} epochs in a row had not a single row; "
                        "larger weights are needed"
                    )
                given, self.epoch, self.window, self.place = self.given, self.epoch + 1, 0, 0
                continue
            yield from self._window(samples, batches)
            self.window, self.place = self.window + 1, 0

    def _window(self, samples: Samples, batches: int) -> Iterator[dict[str, Any]]:
        rows = _Rows(samples, self.layout, (self.seed, self.epoch, self.window))
        (rank, world), step = self.shard, self.step
        numbers = [
            [place % len(rows) for place in range(start + rank, start + step, world)]
            for start in range(self.place, len(rows), step)
        ]
        left = numbers[: batches - self.given]
        for batch in received(loader(rows, left, self._collate, self.num_workers)):
            self.place, self.given = self.place + step, self.given + 1
            yield batch

    def _collate(self, rows: Sequence[Row]) -> dict[str, Any]:
        return collate(rows, self.pad_token)

    def state_dict(self) -> dict[str, int]:
        return {**{name: getattr(self, name) for name in PLACE}, "rows": self.step}

    def load_state_dict(self, state: Place) -> None:
        for name in PLACE:
            setattr(self, name, state[name])


class _Rows:
    """The rows of a window, by number; each a pure function of (seed, epoch, window, number)."""

    def __init__(self, samples: Samples, layout: Layout, key: tuple[int, int, int]):
        self.samples, self.layout, self.key = samples, layout, key
        self.groups = layout.rows(samples, np.random.default_rng(key))

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, number: int) -> Row:
        random = np.random.default_rng([*self.key, number + 1])
        return self.layout.row([self.samples[sample] for sample in self.groups[number]], random)
