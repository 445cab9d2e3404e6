"""Cuts a batch into windows of whole chunks; gradients flow within a window alone.

Legend: B rows, N columns, W columns of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from comet_pl.model.chunk_layout import ChunkPlan, fixed_chunks
from comet_pl.model.loss import Teacher

IGNORED = -100


@dataclass(frozen=True)
class Window:
    """What the model reads in one call. A row that ended before has a plan without chunks."""

    input_ids: Tensor  # (B, W), right-padded
    attention_mask: Tensor  # (B, W)
    shift_labels: Tensor  # (B, W) each token's target, even if it lies in the next window
    plans: list[ChunkPlan]  # of each row
    targets: int  # labelled positions
    teacher: Teacher | None = None

    @property
    def chunks(self) -> int:
        """Chunks of the row that has most of them."""
        return max(len(plan.sizes) for plan in self.plans)

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of the model."""
        inputs = {name: value for name, value in vars(self).items() if name != "targets"}
        return inputs | {"loss_only": True}

    def part(self, start: int, end: int) -> Window:
        """Chunks start to end (not included) of each row, as a window."""
        starts = [sum(plan.sizes[:start]) for plan in self.plans]
        plans = [plan.part(start, end) for plan in self.plans]
        return _window(self.input_ids, self.shift_labels, starts, plans, self.teacher)


def cut_windows(batch: dict[str, Any], chunk_size: int, chunks: int | None) -> list[Window]:
    """The windows of a batch, up to the last one that has a target; none if there is no target.

    They are on the CPU: what is known there a GPU need not be asked for.

    Args:
        batch: input_ids, attention_mask and labels (unshifted), each (B, N), padded on either side;
            plans, a ChunkPlan for each row, if the data prescribe them.
        chunk_size: C of the fixed plan of a batch without plans.
        chunks: of a window; None: all.

    Raises:
        ValueError: a plan that does not sum to its row's real tokens.
    """
    mask, given, labels = (batch[name].cpu() for name in ("attention_mask", "input_ids", "labels"))
    mask = mask.bool()
    columns = torch.argsort(~mask, dim=1, stable=True)  # real tokens first, in order
    ids = given.gather(1, columns)
    lengths: list[int] = mask.sum(1).tolist()
    targets = torch.full_like(ids, IGNORED)
    targets[:, :-1] = labels.gather(1, columns)[:, 1:]
    past = torch.arange(1, ids.shape[1] + 1) >= _column(lengths)
    targets.masked_fill_(past, IGNORED)
    plans = batch.get("plans") or [ChunkPlan(tuple(fixed_chunks(n, chunk_size))) for n in lengths]
    for row, (plan, n) in enumerate(zip(plans, lengths, strict=True)):
        if plan.tokens != n:
            raise ValueError(f"plans: row {row} sums to {plan.tokens}, but it has {n} real tokens")
    longest = max((len(plan.sizes) for plan in plans), default=0)
    windows, starts = [], [0] * len(plans)
    for first in range(0, longest, chunks or longest):
        parts = [plan.part(first, first + (chunks or longest)) for plan in plans]
        windows.append(_window(ids, targets, starts, parts))
        starts = [start + part.tokens for start, part in zip(starts, parts, strict=True)]
    while windows and not windows[-1].targets:
        windows.pop()
    return windows


def count_targets(batch: dict[str, Any]) -> int:
    """Labelled tokens of a batch: those with a label and a real token before them."""
    real = batch["attention_mask"].bool()
    return int(((batch["labels"][:, 1:] != IGNORED) & real[:, 1:] & real[:, :-1]).sum())


def split_rows(batch: dict[str, Any], parts: int) -> list[dict[str, Any]]:
    """Micro-batches of nearly equal numbers of rows, in order. Tensors and lists with a value for
    each row are split; other values are in every micro-batch."""
    rows = len(batch["input_ids"])
    by_row = {k for k, v in batch.items() if isinstance(v, Tensor | list) and len(v) == rows}
    size = -(-rows // parts)
    return [
        {k: v[start : start + size] if k in by_row else v for k, v in batch.items()}
        for start in range(0, rows, size)
    ]


def _window(
    ids: Tensor,
    targets: Tensor,
    starts: list[int],
    plans: Sequence[ChunkPlan],
    teacher: Teacher | None = None,
) -> Window:
    """Columns [start, start + the plan's tokens) of each row."""
    lengths = [plan.tokens for plan in plans]
    offsets = torch.arange(max(lengths))
    columns = (offsets + _column(starts)).clamp(max=ids.shape[1] - 1)  # (B, W)
    real = offsets < _column(lengths)
    shift_labels = targets.gather(1, columns).masked_fill(~real, IGNORED)
    count = int((shift_labels != IGNORED).sum())
    if teacher is not None:
        rows = torch.arange(len(ids), device=teacher.hidden.device)[:, None]
        teacher = replace(teacher, hidden=teacher.hidden[rows, columns.to(rows.device)])
    return Window(ids.gather(1, columns), real.long(), shift_labels, list(plans), count, teacher)


def _column(values: list[int]) -> Tensor:
    return torch.tensor(values)[:, None]
