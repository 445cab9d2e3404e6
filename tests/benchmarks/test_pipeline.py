"""The pipeline benchmark: its clocks agree with the simulator, its findings are computed right."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.pipeline import speedup
from benchmarks.pipeline.clock import PARTS, Event, longest_chain, shares
from benchmarks.pipeline.steps import ARRANGEMENTS, Job
from benchmarks.shared.options import ROOT
from benchmarks.shared.shapes import SHAPES
from comet_pl.parallel.schedule import SCHEDULES
from comet_pl.parallel.simulate import simulate

JOB = Job(SHAPES["pipeline"], 16)


def lived_through(timeline, chunks, stretch=1.0):
    """(events, processor time) of each rank in a simulated step, if messages took no time and wall
    time were slower by `stretch`."""
    events, totals = [[] for _ in range(timeline.ranks)], [0.0] * timeline.ranks
    free = [0.0] * timeline.ranks
    for task in timeline.tasks:
        rank, link = task.rank, "memory" if task.kind == "forward" else "gradient"
        inner = task.chunks[0] > 0, task.chunks[1] < chunks
        receives, sends = inner if link == "memory" else inner[::-1]
        before, totals[rank] = totals[rank], totals[rank] + task.end - task.start
        if receives:
            wall = (free[rank] * stretch, task.start * stretch)
            events[rank].append(Event("receive", link, wall, (before, before)))
        if sends:
            wall = (task.end * stretch,) * 2
            events[rank].append(Event("send", link, wall, (totals[rank],) * 2))
        free[rank] = task.end
    return events, totals


@given(
    schedule=st.sampled_from(["layer_level", "interleaved"]),
    ranks=st.integers(2, 5),
    layers=st.integers(1, 6),
    costs=st.lists(st.integers(1, 4), min_size=2, max_size=9),
    stretch=st.sampled_from([1.0, 3.0]),
)
def test_the_clocks_find_what_was_simulated(schedule, ranks, layers, costs, stretch):
    """The longest chain of processor time is the makespan, however slow the wall clock; what a rank
    waits for is the time before its last task's end that it does not work."""
    timeline = simulate(schedule, ranks, layers, costs)
    events, totals = lived_through(timeline, len(costs), stretch)
    assert longest_chain(events, totals, 0.0) == pytest.approx(timeline.makespan)
    ends = [
        max([task.end for task in timeline.tasks if task.rank == p], default=0.0)
        for p in range(ranks)
    ]
    for share, end, work in zip(shares(events), ends, totals, strict=True):
        assert share["neighbour"] == pytest.approx((end - work) * stretch)
        assert share["transfer"] == share["sending"] == share["flushing"] == 0


@given(layers=st.integers(1, 6), chunks=st.integers(2, 8), transfer=st.floats(0.01, 0.9))
def test_a_message_takes_its_time_on_the_chain(layers, chunks, transfer):
    """Cells take longer than messages here, so that none waits for another."""
    events, totals = lived_through(simulate("layer_level", 2, layers, chunks), chunks)
    slower = simulate("layer_level", 2, layers, chunks, transfer=transfer)
    assert longest_chain(events, totals, transfer) == pytest.approx(slower.makespan)


def test_shares_by_hand():
    """Rank 1 waits from 1 to 5 for what rank 0 sends at 3: two seconds for each."""
    ours = [
        Event("send", "memory", (3.0, 3.5), (3.0, 3.5)),
        Event("flush", "memory", (6.0, 6.25), (4.0, 4.0)),
    ]
    theirs = [Event("receive", "memory", (1.0, 5.0), (1.0, 1.1))]
    parts = [[share[part] for part in PARTS] for share in shares([ours, theirs])]
    assert parts == [[0, 0, 0.5, 0.25], [2, 2, 0, 0]]
    late = [Event("receive", "memory", (4.0, 5.0), (1.0, 1.1))]  # sent before anyone waited
    assert [shares([ours, late])[1][part] for part in PARTS] == [0, 1, 0, 0]


def steps(layer_level=2.5, gradients=1e-7, others=0.01):
    """One round with these seconds a step; a third of each is the forward pass."""
    seconds = {"alone": 4.0, "at_the_same_time": 5.0, "chunk_level": 4.1, "interleaved": 2.2}
    rows = []
    for what, time in (seconds | {"layer_level": layer_level}).items():
        clock = {"step": time, "forward": time / 3}
        row = {"what": what, "wall": clock, "processor": clock, "others": others}
        if what in SCHEDULES:
            row |= {"ranks": [], "loss_differs": 0.0, "gradients_differ": gradients}
        rows.append(row)
    return rows


def findings(**changes):
    rows = steps(**changes)
    return speedup.findings(JOB, rows, speedup.cell_times(JOB, rows, transfer=0.0))


def test_verdict_by_hand():
    """L = 12, P = 2, no transfer time: 24 / 13 predicted; two at once take 5 s, not 4: 1.6."""
    times = speedup.cell_times(JOB, steps(), transfer=0.001)
    assert times["transfer_cells"] == pytest.approx(0.001 / (4 / 3 / (16 * 12)))
    assert times["backward_cells"] == pytest.approx(2)
    result = findings()
    expected = {"ceiling": 1.6, "predicted": 24 / 13, "bound": 0.9 * 1.6 / 2 * 24 / 13}
    for verdict in result["verdict"].values():
        assert verdict == pytest.approx(expected | {"least": 0.9, "speedup": 1.6, "met": True})
    assert not findings(layer_level=3.1)["verdict"]["wall"]["met"]  # 1.29
    assert result["clock"] == "wall" and result["agreement"]["met"]
    assert findings(others=0.2)["clock"] == "processor"
    assert not findings(gradients=1e-3)["agreement"]["met"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A run of the program as a user starts it."""
    out = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "benchmarks.pipeline.speedup", "--small", "--layers", "2"]
    command += ["--chunks", "4", "--rounds", "2", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    pictures = {file.name for file in out.glob("*.png")}
    assert pictures == {"pipeline-small.png", "pipeline-small-simulated.png"}
    return json.loads((out / "pipeline-small.json").read_text())


@pytest.mark.slow
def test_small_run(small):
    assert small["command"].startswith("python -m benchmarks.pipeline.speedup --small --layers 2")
    plan = [(k, what) for k in (0, 1) for what in ARRANGEMENTS]
    assert [(step["round"], step["what"]) for step in small["steps"]] == plan
    assert small["agreement"]["met"] and 0 < small["agreement"]["gradients_differ"] < 1e-5
    for step in small["steps"]:
        assert all(0 < step[clock]["forward"] < step[clock]["step"] for clock in speedup.CLOCKS)


@pytest.mark.slow
def test_small_run_knows_where_the_time_went(small):
    """What the messages tell is what the ring has counted itself."""
    for rank in (rank for step in small["steps"] for rank in step.get("ranks", [])):
        waits = rank["neighbour"] + rank["transfer"]
        assert 0 < waits <= rank["waited"] + 1e-9
        assert rank["waited"] - waits < 0.3 * rank["seconds"]
        assert 0 < rank["sending"] < rank["seconds"] - waits
    assert small["times"]["transfer_cells"] > 0 and JOB.message == (1, 64, 256)


@pytest.mark.slow
def test_small_run_counts_memory(small):
    peaks = {(row["ranks"], row["recompute"]): row["mib"] for row in small["memory"]}
    assert set(peaks) == {(ranks, recompute) for ranks in (1, 2) for recompute in (False, True)}
    assert all(len(mib) == ranks for (ranks, _), mib in peaks.items())
    assert max(peaks[2, False]) == pytest.approx(peaks[1, False][0] / 2, rel=0.1)
    assert peaks[1, True][0] < 0.5 * peaks[1, False][0]
