"""Law 3 over several processes: loss, every gradient and the final memory of a pipeline are those of one process."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from comet_pl.model.chunk_layout import fixed_chunks
from comet_pl.parallel.p2p import Ring
from comet_pl.parallel.pipeline import Pipeline
from comet_pl.parallel.schedule import SCHEDULES
from comet_pl.parallel.sharding import Shards, whole
from comet_pl.training.windows import IGNORED, count_targets, cut_windows, split_rows
from tests.support.models import same_cache, text, tiny
from tests.support.ranks import in_processes

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
    assert (model.walk, model.seam) == (case.model().walk, case.model().seam)
    return float(total), found, pipeline.cache if pipeline.holds_last else None


def check(case: Case) -> None:
    tolerance = (
        {"atol": 1e-10, "rtol": 1e-10}
        if case.dtype == torch.float64
        else {"atol": 1e-7, "rtol": 1e-5}
    )
    loss, expected, caches = alone(case)
    results = in_processes(case.ranks * case.data, together, case)
    for other, found, _ in results:
        assert other == pytest.approx(loss, rel=1e-10 if case.dtype == torch.float64 else 1e-5)
        for name, gradient in expected.items():
            scale = {"atol": float(tolerance["rtol"] * gradient.abs().max()) + 1e-12, "rtol": 0.0}
            torch.testing.assert_close(
                found[name], gradient, **scale, msg=lambda text, name=name: f"{name}: {text}"
            )
    for rank, cache in enumerate(caches):
        last = [
            held
            for _, _, held in results[rank * case.ranks : (rank + 1) * case.ranks]
            if held is not None
        ]
        assert len(last) == (cache is not None)  # none: no labels, nothing was read
        if cache is not None:
            same_cache(last[0].detach(), cache, 1e-10 if case.dtype == torch.float64 else 1e-4)


CASES = {
    "plain": Case(),
    "recompute": Case(recompute=True),
    "ragged": Case(lengths=(38, 12, 27)),
    "windows": Case(window=3, lengths=(38, 21)),
    "uneven": Case(lengths=(33, 33)),  # 7 chunks
    "packed documents": Case(packed=True, lengths=(40, 23)),
    "packed, in windows, with strides of their own": Case(
        packed=True, lengths=(38, 21), strides=(1, 2), window=3
    ),
    "no labels on the first rank": Case(labelled=((35, 1000),)),
    "no labels on the last rank": Case(labelled=((0, 12),)),
    "one chunk": Case(lengths=(4, 3)),  # a rank has nothing to do
    "a window without labels": Case(window=2, labelled=((24, 29),)),
    "accumulate": Case(accumulate=3, lengths=(40, 31, 22)),
    "float32": Case(dtype=torch.float32),
    "zero2, float32": Case(dtype=torch.float32, sharding="zero2"),
    "no memory": Case(comet={"global_size": 0, "compression_stride": None}),
    "global memory only": Case(comet={"compression_stride": None}),
    "temporary memory only": Case(comet={"global_size": 0}),
}
OTHERS = ("ragged", "windows", "recompute")  # of the other schedules, in CI


def cases():
    for schedule in SCHEDULES:
        for name in CASES:
            quick = schedule == "layer_level" or name in OTHERS
            yield pytest.param(
                name, schedule, marks=[] if quick else pytest.mark.slow, id=f"{name}, {schedule}"
            )


@pytest.mark.parametrize(("name", "schedule"), list(cases()))
def test_two_ranks_are_one_process(name, schedule):
    check(replace(CASES[name], schedule=schedule))


def test_zero3_in_float32():
    check(Case(ranks=1, data=2, sharding="zero3", dtype=torch.float32, lengths=(40, 17)))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", CASES)
def test_four_ranks_are_one_process(name, schedule):
    check(replace(CASES[name], schedule=schedule, ranks=4))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", CASES)
def test_two_pipelines_of_two_ranks_are_one_process(name, schedule):
    check(replace(CASES[name], schedule=schedule, data=2, lengths=(40, 17, 33, 28)))


# ---- no shape hangs


def random_case(number: int) -> Case:
    """A shape drawn at random: any number of ranks, rows, chunks, windows; labels anywhere or nowhere."""
    draw = random.Random(number)
    start = draw.randint(0, 60)
    ranks, data, sharding = draw.choice(
        [
            (2, 1, "none"),
            (3, 1, "none"),
            (4, 1, "none"),
            (2, 2, "none"),
            (2, 1, "zero2"),
            (2, 2, "zero3"),
        ]
    )
    lengths = tuple(draw.randint(0 if row else 2, 60) for row in range(data * draw.randint(1, 3)))
    return Case(
        ranks=ranks,
        data=data,
        sharding=sharding,
        schedule=draw.choice(
            [one for one in SCHEDULES if (sharding, one) != ("zero3", "chunk_level")]
        ),
        lengths=lengths,
        labelled=((start, start + draw.choice([1, 8, 1000])), (0, draw.choice([0, 0, 3]))),
        window=draw.choice([None, None, 1, 2, 3, 5]),
        accumulate=draw.choice([1, 1, 2, 3]),
        recompute=draw.random() < 0.3,
        layers=draw.randint(1, 4),
        comet={
            "global_size": draw.choice([0, 1, 3]),
            "compression_stride": draw.choice([None, 1, 3, 4]),
            "temporary_capacity": draw.choice([1, 4, 9]),
            "gate": draw.choice(["scalar", "elementwise", "none"]),
        },
    )


@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=[] if n < 10 else pytest.mark.slow) for n in range(200)]
)
def test_random_shapes_neither_hang_nor_differ(number):
    """Each under the watchdog of `in_processes`."""
    check(random_case(number))


# ---- what is handed over


def touched(case: Case):
    """Bytes this rank has sent, by direction, for a plain text."""
    ring, model = Ring.build([[0, 1]]), case.model()
    sent = {"memory": [], "gradient": []}
    for name, channel in (("memory", ring.to_next), ("gradient", ring.gradient_to_previous)):
        send = channel.send
        channel.send = lambda message, send=send, name=name: (
            sent[name].append(tuple(message.shape)),
            send(message),
        )
    pipeline = Pipeline(ring, dist.get_rank(), 2, case.schedule)
    for windows in case.windows(0):
        for loss in pipeline.read(model, windows, case.targets):
            if loss is not None:
                loss.backward()
    return sent


def test_only_memory_crosses_layer_by_layer():
    """m = 2 global and K = 4 temporary slots of width 16, once a layer, and their gradients once back; nothing else."""
    first, second = in_processes(2, touched, Case(layers=3))
    assert first == {"memory": [(2, 6, 16)] * 3, "gradient": []}
    assert second == {"memory": [], "gradient": [(2, 6, 16)] * 3}


def broken(case: Case):
    raise RuntimeError("a rank fails")


def test_the_harness_sees_failures():
    with pytest.raises(AssertionError, match="a rank fails"):
        in_processes(2, broken, Case())
