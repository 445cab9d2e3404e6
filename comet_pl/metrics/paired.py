"""Two systems on the same rows: how far their losses are apart, and how sure that is.

Legend: R rows, K buckets. Sums (R, 2, K) hold each row's summed loss and number of targets
(comet_pl/metrics/loss_by_position.py::row_sums).
"""

import math
from typing import Any

import torch
from torch import Tensor


def shared(sums: Tensor, other: Tensor) -> Tensor:
    """The sums where the other system has targets too, and zero elsewhere.

    Of a bucket of a row, a system has all targets or none.
    """
    return torch.where(other[:, 1:] > 0, sums, 0.0)


def differences(model: Tensor, baseline: Tensor) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(of all buckets, of each bucket) {"difference", "standard_error", "rows"}.

    difference: the model's mean loss minus the baseline's, on the baseline's targets.
    standard_error: over rows; None with less than two. rows: those with such targets.
    """
    apart = baseline.clone()
    apart[:, 0] = (shared(model, baseline) - baseline)[:, 0]
    return _difference(apart.sum(2)), [_difference(bucket) for bucket in apart.unbind(2)]


def _difference(sums: Tensor) -> dict[str, Any]:
    """Of (R, 2) summed differences and numbers of targets. The mean is a ratio of two sums over
    rows, and so has the error of one; with rows of equal length that is s / sqrt(R)."""
    total, count = sums[sums[:, 1] > 0].unbind(1)
    rows = len(count)
    if not rows:
        return {"difference": None, "standard_error": None, "rows": 0}
    mean = total.sum() / count.sum()
    error = None
    if rows > 1:
        squares = (total - mean * count).square().sum() * rows / (rows - 1)
        error = _finite(squares.sqrt() / count.sum())
    return {"difference": _finite(mean), "standard_error": error, "rows": rows}


def closed(model: Tensor, blocks: Tensor, full: Tensor) -> dict[str, Any]:
    """{"all", "by_chunk"}: the share (blocks - model) / (blocks - full) of mean losses on `full`'s
    targets.

    None where full context is no better than blocks, and in chunk 0, where they are the same.
    """
    parts = (shared(sums, full)[:, 0].sum(0) for sums in (model, blocks, full))
    model, blocks, full = parts
    gaps, gains = blocks - full, blocks - model
    gaps[0] = 0.0  # but for rounding
    by_chunk = [_share(gain, gap) for gain, gap in zip(gains, gaps, strict=True)]
    return {"all": _share(gains.sum(), gaps.sum()), "by_chunk": by_chunk}


def _share(gain: Tensor, gap: Tensor) -> float | None:
    return _finite(gain / gap) if gap > 0 else None


def _finite(value: Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None
