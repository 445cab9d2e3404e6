"""Law 3 over several processes: a pipeline's loss, gradients and memory are those of one
process."""

import random
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from comet_pl.parallel.pipeline import Pipeline
from comet_pl.parallel.schedule import SCHEDULES
from tests.support.models import same_cache
from tests.support.pipelines import Case, alone, ring, together
from tests.support.ranks import in_processes, in_shared_processes


def check(case: Case) -> None:
    exact = case.dtype == torch.float64
    relative = 1e-10 if exact else 1e-5
    loss, expected, caches = alone(case)
    results = in_shared_processes(case.ranks * case.data, together, case)
    for other, found, _ in results:
        assert other == pytest.approx(loss, rel=relative)
        for name, gradient in expected.items():
            scale = float(relative * gradient.abs().max()) + 1e-12
            torch.testing.assert_close(
                found[name], gradient, atol=scale, rtol=0.0, msg=f"{name}: {scale=}"
            )
    for rank, cache in enumerate(caches):
        mine = results[rank * case.ranks : (rank + 1) * case.ranks]
        last = [held for _, _, held in mine if held is not None]
        assert len(last) == (cache is not None)  # none: without labels nothing is read
        if cache is not None:
            same_cache(last[0].detach(), cache, 1e-10 if exact else 1e-4)


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
            marks = [] if quick else pytest.mark.slow
            yield pytest.param(name, schedule, marks=marks, id=f"{name}, {schedule}")


@pytest.mark.parametrize(("name", "schedule"), list(cases()))
def test_two_ranks_are_one_process(name, schedule):
    check(replace(CASES[name], schedule=schedule))


def test_zero3_in_float32():
    check(Case(ranks=1, data=2, sharding="zero3", dtype=torch.float32, lengths=(40, 17)))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "mesh", [{"ranks": 4}, {"data": 2, "lengths": (40, 17, 33, 28)}], ids=["4", "2 x 2"]
)
def test_four_ranks_are_one_process(mesh, name, schedule):
    check(replace(CASES[name], schedule=schedule, **mesh))


# ---- no shape hangs

MESHES = [(2, 1, "none"), (3, 1, "none"), (4, 1, "none"), (2, 2, "none"), (2, 1, "zero2")]
MESHES += [(2, 2, "zero3")]


def random_case(number: int, meshes=MESHES) -> Case:
    """A shape drawn at random: ranks, rows, chunks and windows of any number, labels anywhere."""
    draw = random.Random(number)
    start = draw.randint(0, 60)
    ranks, data, sharding = draw.choice(meshes)
    lengths = tuple(draw.randint(0 if row else 2, 60) for row in range(data * draw.randint(1, 3)))
    schedules = SCHEDULES if sharding != "zero3" else ("layer_level", "interleaved")
    return Case(
        ranks=ranks,
        data=data,
        sharding=sharding,
        schedule=draw.choice(schedules),
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


@pytest.mark.parametrize("number", range(10))
def test_random_shapes_on_two_ranks(number):
    check(random_case(number, [mesh for mesh in MESHES if mesh[:2] == (2, 1)]))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(200))
def test_random_shapes_neither_hang_nor_differ(number):
    check(random_case(number))


# ---- what crosses


def crossed(case: Case):
    """Shapes of the messages that this rank sends, by direction, for a plain text."""
    own, model = ring(2, 1), case.model()
    sent: dict[str, list] = {"memory": [], "gradient": []}
    with pytest.MonkeyPatch.context() as patch:
        for name, channel in (("memory", own.to_next), ("gradient", own.gradient_to_previous)):

            def send(message, send=channel.send, name=name):
                sent[name].append(tuple(message.shape))
                send(message)

            patch.setattr(channel, "send", send)
        pipeline = Pipeline(own, dist.get_rank(), 2, case.schedule)
        for windows in case.windows(0):
            for loss in pipeline.read(model, windows, case.targets):
                if loss is not None:
                    loss.backward()
    return sent


def test_only_memory_crosses_layer_by_layer():
    """2 global and 4 temporary slots of width 16 once a layer, and their gradients once back."""
    first, second = in_shared_processes(2, crossed, Case(layers=3))
    assert first == {"memory": [(2, 6, 16)] * 3, "gradient": []}
    assert second == {"memory": [], "gradient": [(2, 6, 16)] * 3}


def broken():
    raise RuntimeError("a rank fails")


def test_the_harness_sees_failures():
    with pytest.raises(AssertionError, match="a rank fails"):
        in_processes(2, broken)
