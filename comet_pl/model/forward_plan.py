"""One call's arguments, checked and planned: what each row adds to which chunk, and which outputs
are wanted.

Legend: B rows, N columns of input_ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from comet_pl.model.cache import CometCache, wrong_rows
from comet_pl.model.chunk_batch import Chunk
from comet_pl.model.chunk_builder import CallFacts, build_chunk
from comet_pl.model.chunk_layout import ChunkPlan, RowClock, Segment, plan_row
from comet_pl.model.configuration_comet import CometConfig


@dataclass
class Labels:
    """Targets of a call."""

    targets: np.ndarray  # (B, N), of each column, -100: none
    count: int


@dataclass
class ForwardPlan:
    """A call on B rows."""

    config: CometConfig
    clocks: list[RowClock]  # as the call starts
    clocks_after: list[RowClock]
    columns: list[np.ndarray]  # of each row's real tokens
    segments: list[list[Segment]]  # of each row
    labels: Labels | None
    keep: int | None  # last columns whose logits are returned; None: no logits
    wanted: np.ndarray  # (B, N) bool: columns whose outputs are needed
    use_cache: bool

    @property
    def chunks(self) -> int:
        """Chunks of the row that has most of them."""
        return max(map(len, self.segments), default=0)

    def facts(self, in_place: bool, device: torch.device, rope: Any) -> CallFacts:
        """What the chunks of this call share. rope: see CallFacts."""
        return CallFacts(
            width=self.wanted.shape[1],
            columns=self.columns,
            wanted=self.wanted,
            global_size=self.config.global_size,
            capacity=self.config.temporary_capacity,
            trailing=self.config.layout == "trailing",
            in_place=in_place,
            keeps=self.use_cache,
            device=device,
            rope=rope,
        )

    def chunk(self, t: int, facts: CallFacts) -> Chunk:
        """The t-th chunk of all rows."""
        segments, clocks = [], []
        for row, after in zip(self.segments, self.clocks_after, strict=True):
            segments.append(row[t] if t < len(row) else None)
            # Without a cache nothing is kept of a row that rests.
            clocks.append(after if self.use_cache else RowClock())
        return build_chunk(facts, segments, clocks)


def plan_forward(
    config: CometConfig,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None,
    plans: Sequence[ChunkPlan] | None,
    strides: list[int | None] | None,
    labels: Tensor | None,
    shift_labels: Tensor | None,
    logits_to_keep: int | None,
    logits_beside_loss: bool,
    cache: CometCache | None,
    use_cache: bool,
) -> ForwardPlan:
    """The plan of a call of CometForCausalLM.forward, whose arguments these are.

    Args:
        plans, strides: see `row_plans`.
        logits_beside_loss: keep all logits if there are labels and no logits_to_keep.

    Raises:
        ValueError: naming the invalid argument.
    """
    if cache is not None and not isinstance(cache, CometCache):
        raise ValueError(f"past_key_values: a {type(cache).__name__} given, a CometCache is needed")
    if logits_to_keep is not None and (
        isinstance(logits_to_keep, Tensor) or int(logits_to_keep) < 0
    ):
        raise ValueError(f"logits_to_keep: {logits_to_keep!r} given, a whole number >= 0 is needed")
    rows, width = input_ids.shape
    real = real_columns(attention_mask, rows, width, cache)
    check_ids(input_ids, real, config)
    clocks = started_clocks(config, cache, rows, strides)
    columns, segments, after = [], [], []
    for b, (clock, row) in enumerate(zip(clocks, real, strict=True)):
        own = np.flatnonzero(row)
        plan = plans[b] if plans is not None else None
        if plan is not None and plan.tokens != len(own):
            raise ValueError(
                f"chunk_sizes: row {b} sums to {plan.tokens}, but it has {len(own)} real tokens"
            )
        parts, clock = plan_row(
            clock,
            len(own),
            chunk_size=config.chunk_size,
            global_size=config.global_size,
            capacity=config.temporary_capacity,
            rollover=config.rollover,
            chunk_sizes=plan and plan.sizes,
            resets=plan and plan.resets,
        )
        # Without a cache the memory after the last chunk is never used.
        if parts and not use_cache:
            parts[-1] = replace(parts[-1], closes=False)
        columns.append(own)
        segments.append(parts)
        after.append(clock)
    wanted, keep = np.zeros((rows, width), dtype=bool), None
    vocabulary = config.first_new_id if config.layout == "trailing" else config.vocab_size
    found = plan_labels(labels, shift_labels, real, vocabulary)
    if found is not None:
        wanted |= found.targets != -100
    if found is None or logits_beside_loss or logits_to_keep is not None:
        keep = min(logits_to_keep or width, width)
        wanted[:, width - keep :] = True
    return ForwardPlan(config, clocks, after, columns, segments, found, keep, wanted, use_cache)


def started_clocks(
    config: CometConfig, cache: CometCache | None, rows: int, strides: list[int | None] | None
) -> list[RowClock]:
    """The rows' clocks as the call starts. Raises ValueError."""
    if cache is not None and cache.rows:
        clocks = list(cache.rows)
    else:
        clocks = [config.clock()] * rows
    if len(clocks) != rows:
        raise ValueError(wrong_rows(len(clocks), rows))
    if strides is None or not any(strides):
        return clocks
    if config.compression_stride is None:
        raise ValueError(
            "strides: given, but this model has no temporary memory (compression_stride is None)"
        )
    if len(strides) != rows:
        raise ValueError(
            f"strides: {strides} given, one whole number >= 1 for each of {rows} rows is needed"
        )
    for b, (clock, stride) in enumerate(zip(clocks, strides, strict=True)):
        if clock.fill and stride not in (None, clock.stride):
            raise ValueError(
                f"strides: row {b} is inside a chunk of stride {clock.stride}, {stride} given"
            )
    return [
        replace(clock, stride=s or clock.stride) for clock, s in zip(clocks, strides, strict=True)
    ]


def row_plans(
    input_ids: Tensor,
    chunk_sizes: Any,
    resets: Any,
    strides: Any,
    plans: Sequence[ChunkPlan] | None,
) -> tuple[Sequence[ChunkPlan] | None, list[int | None] | None]:
    """The chunks of each row (None: text continues and full chunks roll over) and its stride.

    Args:
        chunk_sizes, resets, strides: as users give them to CometForCausalLM.forward.
        plans: one a row, instead of these three.

    Raises:
        ValueError: naming the invalid argument.
    """
    if input_ids.ndim != 2:
        raise ValueError(
            f"input_ids: shape {tuple(input_ids.shape)} given, (rows, columns) is needed"
        )
    rows = len(input_ids)
    if plans is not None:
        if chunk_sizes is not None or resets is not None or strides is not None:
            raise ValueError("plans: given beside chunk_sizes, resets or strides")
        if len(plans) != rows:
            raise ValueError(f"plans: {len(plans)} given, input_ids has {rows} rows")
        return plans, [plan.stride for plan in plans]
    if strides is not None:
        strides = strides.tolist() if isinstance(strides, Tensor) else strides
        whole = isinstance(strides, Sequence) and all(
            isinstance(s, Integral) and s >= 1 for s in strides
        )
        if not whole:
            raise ValueError(
                f"strides: {strides} given, one whole number >= 1 for each of {rows} rows is needed"
            )
        strides = list(map(int, strides))
    if chunk_sizes is None:
        if resets is not None:
            raise ValueError(
                "resets: given without chunk_sizes; it needs one bool for each listed chunk"
            )
        return None, strides
    sizes = by_row(chunk_sizes, rows)
    if len(sizes) != rows:
        raise ValueError(f"chunk_sizes: lists for {len(sizes)} rows given, input_ids has {rows}")
    for b, row in enumerate(sizes):
        if any(not isinstance(size, Integral) for size in row):
            raise ValueError(f"chunk_sizes: row {b} has a size that is no whole number: {row}")
        if any(size < 0 for size in row):
            raise ValueError(f"chunk_sizes: row {b} has a negative size: {row}")
    flags: list[Any] = [None] * rows if resets is None else by_row(resets, rows)
    if resets is not None and [len(f) for f in flags] != [len(s) for s in sizes]:
        raise ValueError("resets: one bool for each listed chunk of each row is needed")
    return [
        ChunkPlan(tuple(row), row_flags and tuple(row_flags))
        for row, row_flags in zip(sizes, flags, strict=True)
    ], strides


def by_row(values: Any, rows: int) -> list[Any]:
    """A list for each row, from one a row or one for all."""
    values = values.tolist() if isinstance(values, Tensor) else values
    if not isinstance(values, Sequence):
        raise ValueError(
            f"chunk_sizes: {values!r} given, a list of whole numbers, or one list a row, is needed"
        )
    if len(values) and isinstance(values[0], Sequence):
        return [list(row) for row in values]
    return [list(values)] * rows


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
    values = mask[:, mask.shape[1] - width :].cpu().numpy()
    real = values.astype(bool)
    if (values != real).any():
        raise ValueError(
            f"attention_mask: {values[values != real][0]} given, 1 (text) or 0 (padding) is needed"
        )
    if cache is None or not cache.columns:
        edges = np.diff(np.pad(real, ((0, 0), (1, 1))).astype(np.int8), axis=1)
        holes = np.flatnonzero((edges == 1).sum(1) > 1)
        if len(holes):
            raise ValueError(
                f"attention_mask: row {holes[0]} has padding between its tokens; only padding on "
                "the left or right is allowed"
            )
    return real


def check_ids(input_ids: Tensor, real: np.ndarray, config: CometConfig) -> None:
    """Raises ValueError for ids that are not text; padding may be anything.

    Single tokens on a GPU are the model's own: looking at them would wait for the device.
    """
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise ValueError(f"input_ids: {input_ids.dtype} given, whole numbers are needed")
    if input_ids.device.type != "cpu" and input_ids.shape[1] == 1:
        return
    ids = input_ids.cpu().numpy()
    wrong = np.argwhere(real & ((ids < 0) | (ids >= config.first_new_id)))
    if len(wrong):
        row, column = wrong[0]
        value, text = int(ids[row, column]), f"0 to {config.first_new_id - 1}"
        why = ""
        if 0 <= value < config.vocab_size:
            why = "; the ids behind are compression and readout tokens, which the model sets itself"
        raise ValueError(
            f"input_ids: {value} given (row {row}, column {column}), allowed: {text}{why}"
        )


def check_prompt(
    input_ids: Tensor, new: int | None, mask: Tensor | None, cache: CometCache | None
) -> None:
    """Raises ValueError for a prompt of `generate` without a token to continue from.

    Args:
        new: how many last columns of input_ids the cache has not seen; None: all.
    """
    columns = input_ids.shape[1]
    read = cache.columns if isinstance(cache, CometCache) else 0
    if new is not None and new <= 0:
        raise ValueError(
            f"input_ids: {columns} columns given, but past_key_values has read {read} already; "
            "give all ids so far and at least one more, or only the new ids with an attention_mask "
            f"over {read} + new columns"
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
                f"attention_mask: row {row} of the prompt ends with padding, where generation goes "
                "on; pad on the left"
            )


def plan_labels(
    labels: Tensor | None, shift_labels: Tensor | None, real: np.ndarray, vocabulary: int
) -> Labels | None:
    """The target of each column; it counts if it and the token before it are real."""
    if labels is not None and shift_labels is not None:
        raise ValueError("labels and shift_labels: give one of the two")
    values = labels if labels is not None else shift_labels
    if values is None:
        return None
    if values.shape != real.shape:
        name = "labels" if labels is not None else "shift_labels"
        raise ValueError(f"{name}: shape {tuple(values.shape)} given, {real.shape} is needed")
    targets = values.detach().cpu().clone()
    wrong = targets[(targets != -100) & ((targets < 0) | (targets >= vocabulary))]
    if len(wrong):
        raise ValueError(
            f"labels: {int(wrong[0])} given, allowed: 0 to {vocabulary - 1}, or -100 for none"
        )
    mask = torch.from_numpy(real)
    if labels is not None:
        targets[~mask] = -100
        targets = torch.cat([targets[:, 1:], targets.new_full((len(targets), 1), -100)], 1)
    targets = targets.masked_fill(~mask, -100)
    return Labels(targets.numpy(), int((targets != -100).sum()))
