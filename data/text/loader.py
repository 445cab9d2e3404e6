"""Training batches from samples: packed, cut into chunks, dealt to ranks; in an order that is a pure function of (seed, epoch).

Samples come in windows: the whole corpus at once, if it is cached, or so many rows at a time, if it is streamed. Within a window the
samples are packed into rows of the batch and shuffled; the last batch of a window is filled up with the window's first rows. One pass of
the loader is the whole training, however many epochs of the data that is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from comet_pl.errors import UserError
from data.batches import IGNORED, loader, pad_rows
from data.jsonl import Complaints
from data.text.chunk_plans import chunk_plan, draw_stride
from data.text.packing import join, pack
from data.text.tokenized import CachedSamples, Sample, Source, encoded

EMPTY_EPOCHS = 1000  # small weights may leave an epoch without a row, by lot; so many are no chance
FIRST_WINDOW = (
    32  # rows; each window has twice as many as the one before, up to data.shuffle_window
)


@dataclass(frozen=True)
class Layout:
    """How samples become rows of a batch.

    Args:
        max_length: tokens of a row. chunk_size, stride: the model's (C, s; None: no temporary memory). packing: none, documents (each with
            a memory of its own) or shared. plan: one of data.plans.KINDS, or mixture. dynamic_stride: draws each row's stride.
        ends: (V,) ids that may end a chunk, for the plans that ask for them. weights: how often an epoch has the samples of a group; groups
            without one, and None: once.
    """

    max_length: int
    chunk_size: int
    stride: int | None
    packing: str = "none"
    plan: str = "fixed"
    dynamic_stride: bool = False
    ends: np.ndarray | None = None
    weights: dict[str, float] | None = None

    def rows(
        self, samples: Sequence[Sample] | CachedSamples, random: np.random.Generator
    ) -> list[list[int]]:
        """Which samples make a row, in the order of the rows."""
        if isinstance(samples, CachedSamples):
            lengths, names = samples.lengths, samples.groups
        else:
            lengths, names = (
                np.array([len(one) for one in samples]),
                np.array([one.group for one in samples]),
            )
        numbers = np.arange(len(lengths))
        if self.weights is not None and len(numbers):
            times = np.array([self.weights.get(name, 1.0) for name in names])
            numbers = np.repeat(
                numbers, (times + random.random(len(times))).astype(int)
            )  # 1.5: once or twice, by lot
        if self.packing == "none":
            return [[number] for number in random.permutation(numbers).tolist()]
        return [
            numbers[group].tolist() for group in pack(lengths[numbers], self.max_length, random)
        ]

    def row(self, samples: Sequence[Sample], random: np.random.Generator) -> dict[str, Any]:
        """ids and labels (n,) int64, chunk_sizes, resets, and stride if it is drawn."""
        plans = [self._plan(sample, random) for sample in samples]
        pairs = [
            (one.ids.astype(np.int64), np.where(one.learned, one.ids, IGNORED).astype(np.int64))
            for one in samples
        ]
        ids, labels, chunk_sizes, resets = join(pairs, plans, shared=self.packing == "shared")
        row: dict[str, Any] = {
            "ids": ids,
            "labels": labels,
            "chunk_sizes": chunk_sizes,
            "resets": resets,
        }
        if self.dynamic_stride and self.stride is not None:
            row["stride"] = draw_stride(self.stride, random)
        return row

    def _plan(self, sample: Sample, random: np.random.Generator) -> list[int]:
        ends = None if self.ends is None else self.ends[sample.ids]
        return chunk_plan(self.plan, len(sample), self.chunk_size, self.max_length, random, ends)


def collate(rows: Sequence[dict[str, Any]], pad_token: int) -> dict[str, Tensor | list[Any]]:
    """Rows -> input_ids, attention_mask, labels, each (B, longest); chunk_sizes and resets, a list a row; strides, if they were drawn."""
    batch: dict[str, Any] = dict(pad_rows([(row["ids"], row["labels"]) for row in rows], pad_token))
    batch |= {name: [row[name] for row in rows] for name in ("chunk_sizes", "resets")}
    if all("stride" in row for row in rows):
        batch["strides"] = [row["stride"] for row in rows]
    return batch


class Windows(Protocol):
    """Samples of an epoch, so many at a time."""

    def window(self, epoch: int, number: int) -> Sequence[Sample] | CachedSamples | None:
        """None: the epoch has no more."""
        ...


@dataclass
class Cached:
    """The whole corpus is one window."""

    samples: CachedSamples

    def window(self, epoch: int, number: int) -> CachedSamples | None:
        return self.samples if number == 0 else None


class Streamed:
    """Rows are read and encoded as they are needed; a window is shuffled within itself. The first windows are small, so that the first
    batch comes soon. Going on in mid-epoch reads the earlier rows again, but encodes none of them.

    Args:
        size: rows a window. workers: processes that encode.

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
            complaints = Complaints(
                self.source.on_error
            )  # each row is complained about once, not in each epoch
            self.complaints = complaints if epoch == 0 else self.complaints
            self.rows = encoded(self.source, complaints, self.workers, start)
        self.place, found = (epoch, number), list(islice(self.rows, self._size(number)))
        self.held = [sample for sample in found if sample is not None] if found else None
        return self.held

    def _size(self, number: int) -> int:
        return min(self.size, FIRST_WINDOW << min(number, 32))


class Feed:
    """The batches of a training, the same whatever the number of worker processes; stopped anywhere and resumed, the rest comes as if never
    stopped. The order of the rows does not depend on the number of ranks: each batch of rows is dealt to them in turn.

    Its state is (epoch, window, place): how many rows of the window all ranks together have been given. Lightning saves it.

    Args:
        batches: of the whole training, on each rank. batch_size: rows a batch on each rank.
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
        rank: int = 0,
        world: int = 1,
    ):
        self.windows, self.layout, self.pad_token = windows, layout, pad_token
        self.batches, self.batch_size, self.seed, self.num_workers = (
            batches,
            batch_size,
            seed,
            num_workers,
        )
        self.rank, self.world = rank, world
        self.epoch = self.window = self.place = self.given = 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[dict[str, Any]]:
        given, empty = self.given, 0
        while self.given < self.batches:
            samples = self.windows.window(self.epoch, self.window)
            if samples is None:
                empty = empty + 1 if self.given == given else 0
                if empty > EMPTY_EPOCHS:
                    raise UserError(
                        f"data.weights: {empty} epochs in a row had not a single row; larger weights are needed"
                    )
                given, self.epoch, self.window, self.place = self.given, self.epoch + 1, 0, 0
                continue
            yield from self._window(samples)
            self.window, self.place = self.window + 1, 0

    def _window(self, samples: Sequence[Sample] | CachedSamples) -> Iterator[dict[str, Any]]:
        rows = _Rows(samples, self.layout, (self.seed, self.epoch, self.window))
        step = self.batch_size * self.world
        numbers = [
            [place % len(rows) for place in range(start + self.rank, start + step, self.world)]
            for start in range(self.place, len(rows), step)
        ]
        for batch in loader(
            rows, numbers[: self.batches - self.given], self._collate, self.num_workers
        ):
            self.place, self.given = self.place + step, self.given + 1
            yield batch

    def _collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return collate(rows, self.pad_token)

    def state_dict(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("epoch", "window", "place", "given")}

    def load_state_dict(self, state: dict[str, int]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


class _Rows:
    """The rows of a window, by number; each a pure function of (seed, epoch, window, number)."""

    def __init__(
        self, samples: Sequence[Sample] | CachedSamples, layout: Layout, key: tuple[int, int, int]
    ):
        self.samples, self.layout, self.key = samples, layout, key
        self.groups = layout.rows(samples, np.random.default_rng(key))

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, number: int) -> dict[str, Any]:
        random = np.random.default_rng([*self.key, number + 1])
        return self.layout.row([self.samples[one] for one in self.groups[number]], random)
