"""One call's arguments, checked and planned: which row reads how much in which step, which outputs are wanted.

Legend: B rows, N columns of input_ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from comet_pl.model.cache import CometCache, wrong_rows
from comet_pl.model.chunk_batch import Step, build_step
from comet_pl.model.chunk_layout import NO_STRIDE, RowClock, Segment, plan_row
from comet_pl.model.configuration_comet import CometConfig


@dataclass
class Call:
    config: CometConfig
    width: int  # N
    clocks: list[RowClock]  # as the call starts
    clocks_after: list[RowClock]
    columns: list[np.ndarray]  # of each row's real tokens
    segments: list[list[Segment]]  # of each row
    targets: Tensor | None  # (B, N) of each column, -100: none
    labelled: int
    keep: int | None  # last columns whose logits are returned; None: no logits
    wanted: np.ndarray | None  # (B, N) columns whose outputs are needed
    use_cache: bool

    @property
    def steps(self) -> int:
        return max(map(len, self.segments), default=0)

    def step(self, t: int, in_place: bool, device: torch.device) -> Step:
        """The t-th step of all rows."""
        now = [row[t] if t < len(row) else None for row in self.segments]
        # A row that rests keeps its place in the cache; without a cache there is nothing of it to keep.
        rest = self.clocks_after if self.use_cache else [RowClock()] * len(self.segments)
        resting = [
            row[t].before if t < len(row) else after
            for row, after in zip(self.segments, rest, strict=True)
        ]
        return build_step(
            now,
            resting,
            self.columns,
            width=self.width,
            global_size=self.config.global_size,
            capacity=self.config.temporary_capacity,
            wanted=self.wanted,
            in_place=in_place,
            keep=self.use_cache,
            device=device,
        )

    @classmethod
    def prepare(
        cls,
        config: CometConfig,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        shift_labels: Tensor | None,
        chunk_sizes: Any,
        strides: Any,
        resets: Any,
        logits_to_keep: int | None,
        cache: CometCache | None,
        use_cache: bool,
    ) -> Call:
        """Raises ValueError, naming the argument, for whatever cannot be meant."""
        if input_ids.ndim != 2:
            raise ValueError(
                f"input_ids: shape {tuple(input_ids.shape)} given, (rows, columns) is needed"
            )
        if cache is not None and not isinstance(cache, CometCache):
            raise ValueError(
                f"past_key_values: a {type(cache).__name__} given, a CometCache is needed"
            )
        if logits_to_keep is not None and (
            isinstance(logits_to_keep, Tensor) or int(logits_to_keep) < 0
        ):
            raise ValueError(
                f"logits_to_keep: {logits_to_keep!r} given, a whole number >= 0 is needed"
            )
        rows, width = input_ids.shape
        real = real_columns(attention_mask, rows, width, cache)
        check_ids(input_ids, real, config)
        columns = [np.flatnonzero(r) for r in real]
        known = (
            list(cache.rows)
            if cache is not None and cache.rows
            else [RowClock(stride=config.compression_stride or NO_STRIDE)] * rows
        )
        if len(known) != rows:
            raise ValueError(wrong_rows(len(known), rows))
        clocks = with_strides(known, strides, config)
        sizes, flags = per_row(chunk_sizes, resets, [len(c) for c in columns])
        plans = [
            plan_row(
                clock,
                len(real_row),
                chunk_size=config.chunk_size,
                global_size=config.global_size,
                capacity=config.temporary_capacity,
                rollover=config.rollover,
                chunk_sizes=row_sizes,
                resets=row_flags,
            )
            for clock, real_row, row_sizes, row_flags in zip(
                clocks, columns, sizes, flags, strict=True
            )
        ]
        segments = [row for row, _ in plans]
        if not use_cache:  # nobody reads the last memories
            segments = [
                [*row[:-1], replace(row[-1], closes=False)] if row else row for row in segments
            ]
        targets = shifted(labels, shift_labels, real, config.vocab_size)
        keep = (
            min(logits_to_keep or width, width)
            if targets is None or logits_to_keep is not None
            else None
        )
        wanted = np.zeros((rows, width), dtype=bool)
        labelled = 0
        if targets is not None:
            wanted |= (targets != -100).numpy()
            labelled = int(wanted.sum())
        if keep is not None:
            wanted[:, width - keep :] = True
        return cls(
            config,
            width,
            clocks,
            [c for _, c in plans],
            columns,
            segments,
            targets,
            labelled,
            keep,
            wanted,
            use_cache,
        )


def real_columns(
    mask: Tensor | None, rows: int, width: int, cache: CometCache | None
) -> np.ndarray:
    """(B, N) bool: which columns of this call are text."""
    if mask is None:
        return np.ones((rows, width), dtype=bool)
    allowed = {width} if cache is None else {width, cache.columns + width}
    if mask.ndim != 2 or len(mask) != rows or mask.shape[1] not in allowed:
        shapes = " or ".join(f"({rows}, {n})" for n in sorted(allowed))
        raise ValueError(f"attention_mask: shape {tuple(mask.shape)} given, {shapes} is needed")
    given = mask[:, mask.shape[1] - width :].cpu().numpy()
    real = given.astype(bool)
    if (given != real).any():
        raise ValueError(
            f"attention_mask: {given[given != real][0]} given, 1 (text) or 0 (padding) is needed"
        )
    if cache is None or not cache.columns:
        edges = np.diff(np.pad(real, ((0, 0), (1, 1))).astype(np.int8), axis=1)
        holes = np.flatnonzero((edges == 1).sum(1) > 1)
        if len(holes):
            raise ValueError(
                f"attention_mask: row {holes[0]} has padding between its tokens; only padding on the left or right is allowed"
            )
    return real


def check_ids(input_ids: Tensor, real: np.ndarray, config: CometConfig) -> None:
    """Refuses ids that are not text. Padding may be anything. Single tokens on a GPU are the model's own: looking would wait for it."""
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise ValueError(f"input_ids: {input_ids.dtype} given, whole numbers are needed")
    if input_ids.device.type != "cpu" and input_ids.shape[1] == 1:
        return
    ids = input_ids.cpu().numpy()
    wrong = np.argwhere(real & ((ids < 0) | (ids >= config.first_new_id)))
    if len(wrong):
        row, column = wrong[0]
        given, text = int(ids[row, column]), f"0 to {config.first_new_id - 1}"
        ours = 0 <= given < config.vocab_size
        why = (
            "; the ids behind are compression and readout tokens, which the model sets itself"
            if ours
            else ""
        )
        raise ValueError(
            f"input_ids: {given} given (row {row}, column {column}), allowed: {text}{why}"
        )


def check_prompt(
    input_ids: Tensor, new: int | None, mask: Tensor | None, cache: CometCache | None
) -> None:
    """Refuses a prompt for `generate` that leaves nothing to go on from.

    Args:
        new: how many last columns of input_ids the cache has not read; None: all.
    """
    columns = input_ids.shape[1]
    read = cache.columns if isinstance(cache, CometCache) else 0
    if new is not None and new <= 0:
        raise ValueError(
            f"input_ids: {columns} columns given, but past_key_values has read {read} already; give all ids so far and at least one more, "
            f"or only the new ids with an attention_mask over {read} + new columns"
        )
    if columns == 0:
        raise ValueError("input_ids: an empty prompt given, at least one token is needed")
    if mask is None or mask.ndim != 2:
        return
    for row, real in enumerate(mask[:, -(new or columns) :].bool().tolist()):
        if not any(real):
            raise ValueError(
                f"attention_mask: row {row} of the prompt has no new token, at least one is needed"
            )
        if not real[-1]:
            raise ValueError(
                f"attention_mask: row {row} of the prompt ends with padding, where generation goes on; pad on the left"
            )


def with_strides(clocks: list[RowClock], strides: Any, config: CometConfig) -> list[RowClock]:
    if strides is None:
        return clocks
    if config.compression_stride is None:
        raise ValueError(
            "strides: given, but this model has no temporary memory (compression_stride is None)"
        )
    given = strides.tolist() if isinstance(strides, Tensor) else strides
    whole = isinstance(given, Sequence) and all(isinstance(s, Integral) and s >= 1 for s in given)
    if not whole or len(given) != len(clocks):
        raise ValueError(
            f"strides: {given} given, one whole number >= 1 for each of {len(clocks)} rows is needed"
        )
    for b, (clock, s) in enumerate(zip(clocks, given, strict=True)):
        if clock.fill and clock.stride != int(s):
            raise ValueError(
                f"strides: row {b} is inside a chunk of stride {clock.stride}, {int(s)} given"
            )
    return [replace(clock, stride=int(s)) for clock, s in zip(clocks, given, strict=True)]


def per_row(
    chunk_sizes: Any, resets: Any, tokens: list[int]
) -> tuple[list[list[int] | None], list[list[bool] | None]]:
    """chunk_sizes and resets as one list a row, checked against the rows' real tokens."""
    rows = len(tokens)
    if chunk_sizes is None:
        if resets is not None:
            raise ValueError(
                "resets: given without chunk_sizes; it needs one bool for each listed chunk"
            )
        return [None] * rows, [None] * rows

    def spread(values: Any) -> list[Any]:
        values = values.tolist() if isinstance(values, Tensor) else values
        if not isinstance(values, Sequence):
            raise ValueError(
                f"chunk_sizes: {values!r} given, a list of whole numbers, or one list a row, is needed"
            )
        nested = len(values) > 0 and isinstance(values[0], Sequence)
        return [list(v) for v in values] if nested else [list(values)] * rows

    sizes = spread(chunk_sizes)
    if len(sizes) != rows:
        raise ValueError(f"chunk_sizes: lists for {len(sizes)} rows given, input_ids has {rows}")
    for b, (row, n) in enumerate(zip(sizes, tokens, strict=True)):
        if any(not isinstance(size, Integral) for size in row):
            raise ValueError(f"chunk_sizes: row {b} has a size that is no whole number: {row}")
        if any(size < 0 for size in row):
            raise ValueError(f"chunk_sizes: row {b} has a negative size: {row}")
        if sum(row) != n:
            raise ValueError(f"chunk_sizes: row {b} sums to {sum(row)}, but it has {n} real tokens")
    if resets is None:
        return sizes, [None] * rows  # type: ignore[return-value]
    flags = spread(resets)
    if [len(f) for f in flags] != [len(s) for s in sizes]:
        raise ValueError("resets: one bool for each listed chunk of each row is needed")
    return sizes, flags  # type: ignore[return-value]


def shifted(
    labels: Tensor | None, shift_labels: Tensor | None, real: np.ndarray, vocabulary: int
) -> Tensor | None:
    """(B, N) on CPU: the target of each column's token, -100: none. A target counts if it and the token before it are real."""
    if labels is not None and shift_labels is not None:
        raise ValueError("labels and shift_labels: give one of the two")
    given = labels if labels is not None else shift_labels
    if given is None:
        return None
    if given.shape != real.shape:
        raise ValueError(
            f"{'labels' if labels is not None else 'shift_labels'}: shape {tuple(given.shape)} given, {real.shape} is needed"
        )
    targets = given.detach().cpu().clone()
    wrong = targets[(targets != -100) & ((targets < 0) | (targets >= vocabulary))]
    if len(wrong):
        raise ValueError(
            f"labels: {int(wrong[0])} given, allowed: 0 to {vocabulary - 1}, or -100 for none"
        )
    mask = torch.from_numpy(real)
    if labels is not None:
        targets[~mask] = -100
        targets = torch.cat([targets[:, 1:], targets.new_full((len(targets), 1), -100)], 1)
    return targets.masked_fill(~mask, -100)
