"""The benchmark of the training step: it measures what it says, and its figures are computed right."""

import dataclasses
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import measure_training
import training

from comet_pl.analysis import flops
from comet_pl.errors import UserError
from comet_pl.model.chunk_layout import ChunkPlan
from comet_pl.training import chunk_checkpointing as recompute

SMALL = dataclasses.asdict(training.SHAPES["small"])


@pytest.fixture
def measured(monkeypatch):
    monkeypatch.setattr(
        recompute, "Boundaries", recompute.Boundaries
    )  # measure() puts one that counts in its place
    monkeypatch.setattr(measure_training.Watched, "most", 0)
    job = {"length": 320, "threads": 1, "clock": "processor", "shape": SMALL}
    return lambda what: measure_training.measure(job | {"recompute": what})


def test_all_ways_take_the_same_step(measured):
    none, cell, chunk = (measured(what) for what in training.RECOMPUTE)
    for one in (cell, chunk):
        assert one["loss"] == pytest.approx(none["loss"], rel=1e-6) and one[
            "grad_norm"
        ] == pytest.approx(none["grad_norm"], rel=1e-5)
    assert (
        none["tensors_mib"] > cell["tensors_mib"] > chunk["tensors_mib"] > chunk["boundaries_mib"]
    )
    assert none["boundaries_mib"] == cell["boundaries_mib"] == 0
    assert (
        chunk["boundaries_mib"] == 2 * 4 * (16 + 8) * 32 * 4 / 2**20
    )  # layers, boundaries of 5 chunks, slots and new entries, width, bytes
    config = training.SHAPES["small"].comet()
    assert (
        none["operations"]
        == cell["operations"]
        == chunk["operations"]
        == flops.training_step(config, [ChunkPlan((64,) * 5)], 319).total
    )
    assert none["product_rate"] > 1e8
    assert all(one["processor"] > 0 for one in (none, cell, chunk))


def cells(length, chunk_mib, boundaries_mib, grad_norm=1.0):
    common = {"length": length, "loss": 5.0, "grad_norm": 1.0, "boundaries_mib": 0.0}
    sizes = {"none": (100.0, 4.0), "cell": (40.0, 5.0), "chunk": (chunk_mib, 6.0)}
    found = [
        {"what": what, **common, "tensors_mib": mib, "process_mib": 2 * mib, "seconds": s}
        for what, (mib, s) in sizes.items()
    ]
    found[-1] |= {"boundaries_mib": boundaries_mib, "grad_norm": grad_norm}
    return found


def test_slots_in_full_take_the_same_step():
    found = measure_training.measure_ratio(
        {"length": 320, "pairs": 2, "threads": 1, "shape": SMALL}
    )
    assert found["grad_norms_differ"] < 1e-5
    assert all(len(one["processor"]) == 2 for one in found["seconds"].values())
    assert found["processor_ratio"] > 0


def test_the_floor_is_that_of_32k_tokens_of_the_paper():
    """The first chunks have no memory, so it lies above the 0.66 of a reading with full memory."""
    floors = [training.floor(training.PREFILL_SHAPES[name]) for name in ("paper", "quarter")]
    assert floors[0] == pytest.approx(0.707, abs=2e-3) and floors[1] == pytest.approx(
        floors[0], rel=0.02
    )


def test_verdict_by_hand():
    found = training.verdict(
        [*cells(1024, 30.0, 1.0), *cells(8192, 12.0, 2.0), *cells(16384, 15.0, 4.0)], 8192
    )
    first, *_, last = found["ratios"]
    assert (first["tensors_mib"], last["tensors_mib"], last["process_mib"]) == pytest.approx(
        (0.75, 0.375, 0.375)
    )
    assert (last["seconds_to_cell"], last["seconds_to_none"]) == pytest.approx((1.2, 1.5))
    assert found["growth"]["beyond_boundaries"] == pytest.approx(0.1)  # 11 instead of 10
    assert (
        found["less"]["met"] and found["growth"]["met"] and found["same"]["met"]
    )  # 1,024 tokens are too few to count
    worse = training.verdict(
        [*cells(8192, 12.0, 2.0), *cells(16384, 25.0, 4.0, grad_norm=1.001)], 8192
    )
    assert not (worse["less"]["met"] or worse["growth"]["met"] or worse["same"]["met"])
    short = training.verdict(cells(1024, 30.0, 1.0), 8192)
    assert short["less"]["met"] is None and short["growth"]["met"] is None and short["same"]["met"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pairs", "0"], "--pairs: 0 given, a whole number >= 1"),
        (["--lengths", "4", "-3"], "--lengths: -3 given"),
        (["--pair", "5"], "unrecognized arguments: --pair"),
    ],
)
def test_mistakes_are_one_line(options, message):
    with pytest.raises(UserError) as caught:
        training.parse(options)
    assert message in str(caught.value) and "\n" not in str(caught.value)
