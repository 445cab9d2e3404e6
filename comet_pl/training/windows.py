"""Cuts a batch into windows of whole chunks: gradients flow within a window, the detached memory flows on to the next.

Legend: B rows, N columns, W columns of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from comet_pl.model.chunk_layout import fixed_chunks

IGNORED = -100


@dataclass(frozen=True)
class Window:
    """What the model reads in one call.

    chunk_sizes: the chunks of each row; [] for a row that has ended before. resets: for each of them, whether the row's memory is emptied
    before it (a packed document's start). strides: each row's compression stride. None: no resets; the model's own stride.
    """

    input_ids: Tensor  # (B, W), right-padded
    attention_mask: Tensor  # (B, W)
    shift_labels: Tensor  # (B, W) each token's target: the row's next token, also where that lies in the next window
    chunk_sizes: list[list[int]]
    targets: int  # labelled positions
    resets: list[list[bool]] | None = None
    strides: list[int] | None = None

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of the model."""
        names = ("input_ids", "attention_mask", "shift_labels", "chunk_sizes", "resets", "strides")
        return {name: getattr(self, name) for name in names}

    def part(self, start: int, end: int) -> Window:
        """Chunks start to end (not included) of each row, as a window."""
        starts = [sum(sizes[:start]) for sizes in self.chunk_sizes]
        resets = self.resets and [flags[start:end] for flags in self.resets]
        return _window(
            self.input_ids,
            self.shift_labels,
            starts,
            [sizes[start:end] for sizes in self.chunk_sizes],
            resets,
            self.strides,
        )


def cut_windows(batch: dict[str, Any], chunk_size: int, chunks: int | None) -> list[Window]:
    """The windows of a batch, up to the last one that has a target; none if there is no target.

    Args:
        batch: input_ids, attention_mask and labels (unshifted), each (B, N); padding on either side. Where the data prescribe them,
            chunk_sizes, resets and strides: a list, a list and a number for each row, as the model takes them.
        chunk_size: C of the fixed plan, if the batch has no chunk_sizes. chunks: chunks a window; None: all in one.

    Raises:
        ValueError: chunk_sizes that do not sum to the rows' real tokens.
    """
    mask = batch["attention_mask"].bool()
    columns = torch.argsort(~mask, dim=1, stable=True)  # real tokens first, in order
    ids = batch["input_ids"].gather(1, columns)
    lengths: list[int] = mask.sum(1).tolist()
    targets = torch.full_like(ids, IGNORED)
    targets[:, :-1] = batch["labels"].gather(1, columns)[:, 1:]
    targets.masked_fill_(
        torch.arange(ids.shape[1], device=ids.device) + 1 >= _column(lengths, ids), IGNORED
    )
    plans = [
        list(plan)
        for plan in batch.get("chunk_sizes") or (fixed_chunks(n, chunk_size) for n in lengths)
    ]
    resets, strides = batch.get("resets"), batch.get("strides")
    for row, (plan, n) in enumerate(zip(plans, lengths, strict=True)):
        if sum(plan) != n:
            raise ValueError(
                f"chunk_sizes: row {row} sums to {sum(plan)}, but it has {n} real tokens"
            )
    size = chunks or max(map(len, plans), default=0) or 1
    windows, starts = [], [0] * len(plans)
    for first in range(0, max(map(len, plans), default=0), size):
        parts = [plan[first : first + size] for plan in plans]
        flags = resets and [row[first : first + size] for row in resets]
        windows.append(_window(ids, targets, starts, parts, flags, strides))
        starts = [start + sum(part) for start, part in zip(starts, parts, strict=True)]
    while windows and not windows[-1].targets:
        windows.pop()
    return windows


def count_targets(batch: dict[str, Any]) -> int:
    """Labelled tokens of a batch: those with a label and a real token before them."""
    real = batch["attention_mask"].bool()
    return int(((batch["labels"][:, 1:] != IGNORED) & real[:, 1:] & real[:, :-1]).sum())


def count_gates(windows: Sequence[Window]) -> int:
    """Gates of one layer that learn, over all rows: of chunks that start with a state and have, in their window, a later target of their
    row, before its memory is emptied."""
    count = 0
    started = [False] * (len(windows[0].chunk_sizes) if windows else 0)
    for window in windows:
        labelled = (window.shift_labels != IGNORED).tolist()
        for b, sizes in enumerate(window.chunk_sizes):
            resets = window.resets[b] if window.resets else [False] * len(sizes)
            ends = list(accumulate(sizes, initial=0))
            state, had = started[b], []
            for size, reset in zip(sizes, resets, strict=True):
                had.append(state and not reset and size > 0)
                state = (state and not reset) or size > 0
            started[b], wanted = state, False
            for t in reversed(range(len(sizes))):
                count += had[t] and wanted
                wanted = (wanted or any(labelled[b][ends[t] : ends[t + 1]])) and not resets[t]
    return count


def split_rows(batch: dict[str, Any], parts: int) -> list[dict[str, Any]]:
    """Micro-batches of nearly equal numbers of rows, in order. Tensors and lists with a value a row are split, the rest is shared."""
    rows = len(batch["input_ids"])
    size = -(-rows // parts)

    def part(value: Any, start: int) -> Any:
        by_row = isinstance(value, (Tensor, list)) and len(value) == rows
        return value[start : start + size] if by_row else value

    return [
        {key: part(value, start) for key, value in batch.items()} for start in range(0, rows, size)
    ]


def _window(
    ids: Tensor,
    targets: Tensor,
    starts: list[int],
    chunk_sizes: list[list[int]],
    resets: list[list[bool]] | None = None,
    strides: list[int] | None = None,
) -> Window:
    """Columns [start, start + the chunks' tokens) of each row."""
    lengths = [sum(part) for part in chunk_sizes]
    offsets = torch.arange(max(lengths), device=ids.device)
    columns = (offsets + _column(starts, ids)).clamp(max=ids.shape[1] - 1)  # (B, W)
    real = offsets < _column(lengths, ids)
    shift_labels = targets.gather(1, columns).masked_fill(~real, IGNORED)
    count = int((shift_labels != IGNORED).sum())
    return Window(
        ids.gather(1, columns), real.long(), shift_labels, chunk_sizes, count, resets, strides
    )


def _column(values: list[int], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device)[:, None]
