"""Loss by position in the document, and its picture: does far context help?

The position of a target is the chunk, counted from the document's first, of the token that it is
predicted from. What lies in earlier chunks is known through the memory alone.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics import Metric

from comet_pl.model.chunk_layout import ChunkPlan, fixed_chunks

BUCKETS = 48  # 2^46 chunks and more are counted together
Bucket = dict[str, Any]
"""{"from", "to": chunks, both included, "loss": mean or None, "labels": targets}"""


class LossByPosition(Metric):
    """Mean loss of targets in chunk 0, 1, 2-3, 4-7, 8-15, ... of their document."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        for name in ("total", "count"):
            self.add_state(name, torch.zeros(BUCKETS, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, places: Tensor, losses: Tensor, chunks: np.ndarray) -> None:
        """Adds targets.

        Args:
            places: (k,) flat columns in (B, N) that have a target.
            losses: (k,) of these.
            chunks: (B, N), see chunk_of_columns.
        """
        self._add(row_sums(places, losses, chunks))

    def _add(self, sums: Tensor) -> None:
        total, count = sums.sum(0).to(self.device)
        self.total += total
        self.count += count

    def compute(self) -> list[Bucket]:
        """All buckets up to the last one with a target; loss None: no target, or not finite."""
        total, count = self.total.tolist(), self.count.tolist()
        last = max((number for number, n in enumerate(count) if n), default=-1)
        buckets = []
        for number in range(last + 1):
            mean = total[number] / count[number] if count[number] else np.nan
            bounds = {"from": 1 << number >> 1, "to": (1 << number) - 1}
            loss = mean if np.isfinite(mean) else None
            buckets.append({**bounds, "loss": loss, "labels": int(count[number])})
        return buckets


class LossByRow(LossByPosition):
    """The same, with the sums of each row: for comparisons of those who read the same rows.

    rows: (B, 2, BUCKETS) of each update, see row_sums.
    """

    rows: list[Tensor]

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.add_state("rows", [], dist_reduce_fx="cat")

    def _add(self, sums: Tensor) -> None:
        super()._add(sums)
        self.rows.append(sums)


def row_sums(places: Tensor, losses: Tensor, chunks: np.ndarray) -> Tensor:
    """(B, 2, BUCKETS) float64 on the CPU: each row's summed losses, and numbers of targets.

    The arguments are those of LossByPosition.update.
    """
    places = places.cpu()
    # The exponent of x = f 2^e with f in [0.5, 1): 0 for chunk 0, 1 for 1, 2 for 2-3, 3 for 4-7
    _, exponents = np.frexp(chunks.reshape(-1)[places.numpy()])
    bucket = torch.from_numpy(exponents.clip(max=BUCKETS - 1)).long()
    cells, shape = places // chunks.shape[1] * BUCKETS + bucket, (len(chunks), BUCKETS)
    size = len(chunks) * BUCKETS
    sums = torch.zeros(size, dtype=torch.float64).index_add(0, cells, losses.double().cpu())
    counts = torch.bincount(cells, minlength=size).double()
    return torch.stack([sums.view(shape), counts.view(shape)], 1)


def chunk_of_columns(
    mask: Tensor, chunk_size: int, plans: Sequence[ChunkPlan] | None = None
) -> np.ndarray:
    """(B, N) int: the chunk of each real column, from 0 on at its document's begin; 0 at padding.

    Args:
        mask: (B, N), 0 = padding on any side.
        chunk_size: C, where no plans are prescribed.
        plans: one a row.
    """
    real = mask.bool().cpu().numpy()
    chunks = np.zeros(real.shape, dtype=np.int64)
    for row, columns in enumerate(real):
        fixed = tuple(fixed_chunks(int(columns.sum()), chunk_size))
        sizes, resets, _ = ChunkPlan(fixed) if plans is None else plans[row]
        numbers = np.arange(len(sizes))
        # a document's first chunk is number 0
        if resets is not None:
            numbers -= np.maximum.accumulate(np.where(resets, numbers, 0))
        chunks[row, columns] = np.repeat(numbers, sizes)
    return chunks


def name(bucket: Bucket) -> str:
    """0, 1, 2-3, 4-7, ..."""
    first, last = bucket["from"], bucket["to"]
    return str(first) if last <= first else f"{first}-{last}"


def curve(buckets: Sequence[Bucket], **others: Sequence[Bucket]) -> Figure:
    """Mean loss (y) by position in the document (x, log-spaced), with the number of targets.

    Buckets without targets are left out.

    Args:
        buckets: CoMeT's. others: by name, of the same targets or some of them.
    """
    figure = Figure(figsize=(2.6 + 0.7 * max(4, len(buckets)), 3.4), layout="constrained", dpi=100)
    axes = figure.subplots()
    for label, those in {"CoMeT": buckets, **others}.items():
        losses = [(place, each["loss"]) for place, each in enumerate(those)]
        seen = [(place, loss) for place, loss in losses if loss is not None]
        xs, ys = [place for place, _ in seen], [loss for _, loss in seen]
        axes.plot(xs, ys, marker="o", label=label)
    axes.set_xticks(range(len(buckets)), [f"{name(each)}\n{each['labels']:,}" for each in buckets])
    axes.set_xlabel("chunk of the document, number of targets below")
    axes.set_ylabel("mean loss")
    axes.grid(axis="y", alpha=0.3)
    axes.set_title("Loss by position in the document", fontsize=11)
    if others:
        axes.legend(frameon=False)
    return figure
