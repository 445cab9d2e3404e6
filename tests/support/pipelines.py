"""A pipeline's cases, read by one process and by several."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from comet_pl.model.chunk_layout import fixed_chunks
from comet_pl.parallel.p2p import Ring
from comet_pl.parallel.pipeline import Pipeline
from comet_pl.parallel.sharding import Shards, whole
from comet_pl.training.windows import IGNORED, count_targets, cut_windows, split_rows
from tests.support.models import text, tiny

CHUNK = 5  # of the tiny model


@dataclass(frozen=True)
class Case:
    """Rows of these lengths, dealt to `data` pipelines in turn; each reads them in windows of `window` chunks."""

    ranks: int = 2  # of a pipeline
    data: int = 1
    schedule: str = "layer_level"
    lengths: tuple[int, ...] = (40, 40)
    labelled: tuple[tuple[int, int], ...] = ((0, 1000),)  # columns with labels, for all rows
    window: int | None = None
    packed: bool = (
        False  # chunks of other sizes, and every second one but the first starts a document
    )
    strides: tuple[int, ...] | None = None  # of the rows in turn
    accumulate: int = 1
    recompute: bool = False
    sharding: str = "none"
    layers: int = 3
    dtype: torch.dtype = torch.float64
    comet: dict[str, Any] = field(default_factory=dict)

    def model(self):
        model = tiny(layers=self.layers, dtype=self.dtype, **self.comet).train()
        model.gradient_checkpointing = self.recompute
        return model

    def batch(self, rank: int) -> dict[str, Any]:
        """The rows of a data-parallel rank."""
        ids, mask = (
            text(len(self.lengths), max(self.lengths)),
            torch.zeros(len(self.lengths), max(self.lengths), dtype=torch.long),
        )
        labels = torch.full_like(ids, IGNORED)
        for row, length in enumerate(self.lengths):
            mask[row, :length] = 1
            for start, end in self.labelled:
                labels[row, start : min(end, length)] = ids[row, start : min(end, length)]
        mine = slice(rank, None, self.data)
        batch = {"input_ids": ids[mine], "attention_mask": mask[mine], "labels": labels[mine]}
        if self.packed:
            sizes = [fixed_chunks(length, CHUNK - 1) for length in self.lengths[mine]]
            batch |= {
                "chunk_sizes": sizes,
                "resets": [[t % 2 == 0 for t in range(len(row))] for row in sizes],
            }
        if self.strides is not None:
            batch["strides"] = [
                self.strides[row % len(self.strides)] for row in range(len(self.lengths))
            ][mine]
        return batch

    def windows(self, rank: int) -> list[Any]:
        """Windows of each micro-batch of a data-parallel rank."""
        return [
            cut_windows(micro, CHUNK, self.window)
            for micro in split_rows(self.batch(rank), self.accumulate)
        ]

    @property
    def targets(self) -> int:
        return sum(count_targets(self.batch(rank)) for rank in range(self.data))


def alone(case: Case):
    """The chunk-major walk of one process: (loss, gradients, last cache of each data-parallel rank)."""
    model, total, caches = case.model(), 0.0, []
    for rank in range(case.data):
        for windows in case.windows(rank):
            cache = None
            for window in windows:
                output = model(
                    **window.inputs(),
                    past_key_values=cache,
                    use_cache=True,
                    num_items_in_batch=case.targets,
                )
                if window.targets:
                    output.loss.backward()
                total += float(output.loss.detach())
                cache = output.past_key_values.detach()
        caches.append(cache)
    return total, gradients(model), caches


def gradients(model) -> dict[str, torch.Tensor]:
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }


def together(case: Case):
    """On one of data x ranks processes: (loss, gradients, last cache or None)."""
    pipelines = [list(range(d * case.ranks, (d + 1) * case.ranks)) for d in range(case.data)]
    ring = Ring.build(pipelines) if case.ranks > 1 else None
    model, me, total = case.model(), dist.get_rank(), torch.zeros((), dtype=torch.float64)
    pipeline = Pipeline(ring, me % case.ranks, case.ranks, case.schedule)
    if case.sharding != "none":
        pipeline.shards = Shards.over(
            model, case.data, case.ranks, layerwise=case.sharding == "zero3"
        )
        pipeline.shards.gather(all_layers=case.sharding == "zero2")
    for windows in case.windows(me // case.ranks):
        for loss in pipeline.read(model, windows, case.targets, keep_cache=True):
            if loss is not None:
                loss.backward()
                total += loss.detach()
    dist.all_reduce(total)
    if pipeline.shards is not None:
        pipeline.shards.reduce()
        found = whole(gradients(model))
    else:
        found = gradients(model)
        for gradient in found.values():
            dist.all_reduce(gradient)
    assert (model.traversal, model.transport) == (case.model().traversal, case.model().transport)
    return float(total), found, pipeline.cache if pipeline.holds_last else None
