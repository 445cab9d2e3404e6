"""The training step: all ways take the same step, and its figures are computed right."""

import pytest
import torch

from benchmarks.shared.shapes import SHAPES
from benchmarks.training import measure_step, step
from comet_pl.analysis import flops
from comet_pl.model.chunk_layout import ChunkPlan
from comet_pl.training import chunk_checkpointing

SMALL = SHAPES["training-small"]
JOB = {"length": 320, "threads": 1, "clock": "processor", "shape": vars(SMALL)}


@pytest.fixture
def measured(monkeypatch):
    # measure() puts a class that counts in place of Boundaries.
    monkeypatch.setattr(chunk_checkpointing, "Boundaries", chunk_checkpointing.Boundaries)
    monkeypatch.setattr(measure_step.Watched, "most", 0)

    def measure(what):
        torch.manual_seed(0)
        return measure_step.measure(JOB | {"recompute": what})

    return measure


@pytest.mark.slow
def test_all_ways_take_the_same_step(measured):
    none, cell, chunk = rows = [measured(what) for what in step.RECOMPUTE]
    for row in (cell, chunk):
        assert row["loss"] == pytest.approx(none["loss"], rel=1e-6)
        assert row["grad_norm"] == pytest.approx(none["grad_norm"], rel=1e-5)
    memory = [*(row["tensors_mib"] for row in rows), chunk["boundaries_mib"]]
    assert memory == sorted(memory, reverse=True)
    assert none["boundaries_mib"] == cell["boundaries_mib"] == 0
    # Layers, boundaries of 5 chunks, slots and new entries, width, bytes.
    assert chunk["boundaries_mib"] == 2 * 4 * (16 + 8) * 32 * 4 / 2**20
    config = SMALL.comet()
    operations = flops.training_step(config, [ChunkPlan((64,) * 5)], 319).total
    for row in rows:
        assert row["operations"] == operations
        assert row["product_rate"] > 1e8 and row["processor"] > 0


def test_slots_in_full_take_the_same_step():
    torch.manual_seed(0)
    result = measure_step.measure_ratio(JOB | {"pairs": 2})
    assert result["grad_norms_differ"] < 1e-5 and result["processor_ratio"] > 0
    assert all(len(times["processor"]) == 2 for times in result["seconds"].values())


def cells(length, chunk_mib, boundaries_mib, grad_norm=1.0):
    common = {"length": length, "loss": 5.0, "grad_norm": 1.0, "boundaries_mib": 0.0}
    sizes = {"none": (100.0, 4.0), "cell": (40.0, 5.0), "chunk": (chunk_mib, 6.0)}
    rows = [
        {"what": what, **common, "tensors_mib": mib, "process_mib": 2 * mib, "seconds": s}
        for what, (mib, s) in sizes.items()
    ]
    rows[-1] |= {"boundaries_mib": boundaries_mib, "grad_norm": grad_norm}
    return rows


def test_verdict_by_hand():
    """Texts that are too short do not count. Memory beyond the boundaries grows from 10 to 11."""
    short = cells(1024, 30.0, 1.0)
    verdict = step.verdict([*short, *cells(8192, 12.0, 2.0), *cells(16384, 15.0, 4.0)], 8192)
    first, *_, last = verdict["ratios"]
    keys = ("tensors_mib", "process_mib", "seconds_to_cell", "seconds_to_none")
    assert first["tensors_mib"] == 0.75
    assert [last[key] for key in keys] == pytest.approx([0.375, 0.375, 1.2, 1.5])
    assert verdict["growth"]["beyond_boundaries"] == pytest.approx(0.1)
    bad = [*cells(8192, 12.0, 2.0), *cells(16384, 25.0, 4.0, grad_norm=1.001)]
    for rows, expected in (
        ([*short, *cells(8192, 12.0, 2.0), *cells(16384, 15.0, 4.0)], (True, True, True)),
        (bad, (False, False, False)),
        (short, (None, None, True)),
    ):
        verdict = step.verdict(rows, 8192)
        assert tuple(verdict[key]["met"] for key in ("less", "growth", "same")) == expected
