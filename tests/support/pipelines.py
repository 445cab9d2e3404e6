"""A text that one process reads, and the ranks of pipelines: the same loss, gradients and
memory."""

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from comet_pl.model.chunk_layout import ChunkPlan, fixed_chunks
from comet_pl.parallel.p2p import Ring
from comet_pl.parallel.pipeline import Pipeline
from comet_pl.parallel.sharding import Shards, whole
from comet_pl.training.gate_penalty import GatePenalty
from comet_pl.training.windows import IGNORED, count_targets, cut_windows, split_rows
from tests.support.models import text, tiny

CHUNK = 5  # of the tiny model


@dataclass(frozen=True)
class Case:
    """Rows of these lengths, dealt to `data` pipelines in turn, read `window` chunks at a time."""

    ranks: int = 2  # of a pipeline
    data: int = 1
    schedule: str = "layer_level"
    lengths: tuple[int, ...] = (40, 40)
    labelled: tuple[tuple[int, int], ...] = ((0, 1000),)  # columns with labels, for all rows
    window: int | None = None
    packed: bool = False  # smaller chunks, and every second one starts a document
    strides: tuple[int, ...] | None = None  # of the rows in turn
    accumulate: int = 1
    recompute: bool = False
    sharding: str = "none"
    penalised: bool = False
    layers: int = 3
    dtype: torch.dtype = torch.float64
    comet: dict[str, Any] = field(default_factory=dict)

    def model(self):
        model = tiny(layers=self.layers, dtype=self.dtype, **self.comet).train()
        model.gradient_checkpointing = self.recompute
        for memory in model.gates if self.penalised else ():
            memory.penalty = GatePenalty(3.0, 0.8, 0.7, share=0.01)
        return model

    def batch(self, rank: int) -> dict[str, Any]:
        """The rows of a data-parallel rank."""
        columns, ids = torch.arange(max(self.lengths)), text(len(self.lengths), max(self.lengths))
        mask = (columns < torch.tensor(self.lengths)[:, None]).long()
        wanted = torch.zeros_like(columns, dtype=torch.bool)
        for start, end in self.labelled:
            wanted[start:end] = True
        labels = ids.masked_fill(~(wanted & mask.bool()), IGNORED)
        mine = slice(rank, None, self.data)
        batch = {"input_ids": ids[mine], "attention_mask": mask[mine], "labels": labels[mine]}
        if self.packed or self.strides:
            batch["plans"] = [self.plan(row) for row in range(len(self.lengths))][mine]
        return batch

    def plan(self, row: int) -> ChunkPlan:
        sizes = tuple(fixed_chunks(self.lengths[row], CHUNK - self.packed))
        resets = tuple(t % 2 == 0 for t in range(len(sizes))) if self.packed else None
        stride = None if self.strides is None else self.strides[row % len(self.strides)]
        return ChunkPlan(sizes, resets, stride)

    def windows(self, rank: int) -> list[Any]:
        """Windows of each micro-batch of a data-parallel rank."""
        micros = split_rows(self.batch(rank), self.accumulate)
        return [cut_windows(micro, CHUNK, self.window) for micro in micros]

    @property
    def targets(self) -> int:
        return sum(count_targets(self.batch(rank)) for rank in range(self.data))


def alone(case: Case):
    """(loss, gradients, last cache of each data-parallel rank) of the chunk-major walk."""
    return _alone(repr(replace(case, ranks=1, schedule="", sharding="none", recompute=False)))


@cache
def _alone(case: str):
    case = eval(case, {"Case": Case, "torch": torch})
    model, total, caches = case.model(), 0.0, []
    for rank in range(case.data):
        for windows in case.windows(rank):
            memory = None
            for window in windows:
                memory = model(
                    **window.inputs(),
                    past_key_values=memory,
                    use_cache=True,
                    num_items_in_batch=case.targets,
                )
                if window.targets:
                    memory.loss.backward()
                total += float(memory.loss.detach())
                memory = memory.past_key_values.detach()
        caches.append(memory)
    return total, gradients(model), caches


def gradients(model) -> dict[str, torch.Tensor]:
    named = model.named_parameters()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named}


@cache
def ring(ranks: int, data: int) -> Ring | None:
    """This process's; kept for later cases, as a training keeps it for later steps."""
    starts = range(0, data * ranks, ranks)
    return Ring.build([range(start, start + ranks) for start in starts]) if ranks > 1 else None


def together(case: Case):
    """(loss, gradients, last cache or None) of one of data x ranks processes."""
    model, me, total = case.model(), dist.get_rank(), torch.zeros((), dtype=torch.float64)
    own = ring(case.ranks, case.data)
    pipeline = Pipeline(own, me % case.ranks, case.ranks, case.schedule)
    if case.sharding != "none":
        layerwise = case.sharding == "zero3"
        pipeline.shards = Shards.over(model, case.data, case.ranks, layerwise)
        pipeline.shards.gather(all_layers=not layerwise)
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
