"""The pipeline benchmark: its clocks agree with the simulator, it counts memory right, its program writes what it says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import pipeline
import pipeline_steps
from live_bytes import LiveBytes
from pipeline_clock import Event, longest_chain, shares

from comet_pl.errors import UserError
from comet_pl.parallel.schedule import SCHEDULES
from comet_pl.parallel.simulate import simulate

ROOT = Path(__file__).resolve().parents[2]


# ---- the clocks


def events_of(timeline, chunks, stretch=1.0):
    """What ranks would write down while they live through a simulated step of so many chunks, if messages took no time.

    Wall time goes slower by `stretch`.
    """
    found, totals = [[] for _ in range(timeline.ranks)], [0.0] * timeline.ranks
    free = [0.0] * timeline.ranks
    for task in timeline.tasks:
        rank, link = task.rank, "memory" if task.kind == "forward" else "gradient"
        first, last = task.chunks[0] == 0, task.chunks[1] == chunks
        receives, sends = (not first, not last) if link == "memory" else (not last, not first)
        before = totals[rank]
        totals[rank] += task.end - task.start
        if receives:
            found[rank].append(
                Event(
                    "receive", link, (free[rank] * stretch, task.start * stretch), (before, before)
                )
            )
        if sends:
            found[rank].append(
                Event(
                    "send",
                    link,
                    (task.end * stretch, task.end * stretch),
                    (totals[rank], totals[rank]),
                )
            )
        free[rank] = task.end
    return found, totals


@given(
    schedule=st.sampled_from(["layer_level", "interleaved"]),
    ranks=st.integers(2, 5),
    layers=st.integers(1, 6),
    costs=st.lists(st.integers(1, 4), min_size=2, max_size=9),
    stretch=st.sampled_from([1.0, 3.0]),
)
def test_the_clocks_find_what_was_simulated(schedule, ranks, layers, costs, stretch):
    """The longest chain of processor time is the makespan, however slow the wall clock; waits are the simulated ones."""
    timeline = simulate(schedule, ranks, layers, costs)
    events, totals = events_of(timeline, len(costs), stretch)
    assert longest_chain(events, totals, 0.0) == pytest.approx(timeline.makespan)
    expected = pipeline.idle_before_the_end(timeline)
    for found, idle in zip(shares(events), expected, strict=True):
        assert found["neighbour"] == pytest.approx(idle * timeline.makespan * stretch)
        assert found["transfer"] == found["sending"] == found["flushing"] == 0


@given(layers=st.integers(1, 6), chunks=st.integers(2, 8), transfer=st.floats(0.01, 0.9))
def test_a_message_takes_its_time_on_the_chain(layers, chunks, transfer):
    """Cells take longer than messages here, so that none waits for another."""
    events, totals = events_of(simulate("layer_level", 2, layers, chunks), chunks)
    assert longest_chain(events, totals, transfer) == pytest.approx(
        simulate("layer_level", 2, layers, chunks, transfer=transfer).makespan
    )


def test_shares_by_hand():
    """Rank 1 waits from 1 to 5; rank 0 sends at 3, taking until 3.5. So two seconds for the neighbour, two for the transfer."""
    ours = [
        Event("send", "memory", (3.0, 3.5), (3.0, 3.5)),
        Event("flush", "memory", (6.0, 6.25), (4.0, 4.0)),
    ]
    theirs = [Event("receive", "memory", (1.0, 5.0), (1.0, 1.1))]
    assert shares([ours, theirs]) == [
        {"neighbour": 0.0, "transfer": 0.0, "sending": 0.5, "flushing": 0.25},
        {"neighbour": 2.0, "transfer": 2.0, "sending": 0.0, "flushing": 0.0},
    ]
    late = [Event("receive", "memory", (4.0, 5.0), (1.0, 1.1))]  # it was sent before anyone waited
    assert shares([ours, late])[1] == {
        "neighbour": 0.0,
        "transfer": 1.0,
        "sending": 0.0,
        "flushing": 0.0,
    }


def test_a_message_that_nobody_sent_is_an_error():
    with pytest.raises(AssertionError, match="nobody sent"):
        longest_chain([[], [Event("receive", "memory", (0.0, 1.0), (0.0, 0.0))]], [1.0, 1.0], 0.0)


# ---- memory


def test_live_bytes_counts_storages_once_and_forgets_them():
    weight = torch.ones(100, requires_grad=True)
    weight.grad = torch.zeros(100)
    with LiveBytes([weight, weight.grad]) as live:
        x = torch.zeros(1000)
        view = x[10:].view(-1, 2)
        assert live.now == 4000
        del x
        assert live.now == 4000  # the view holds it
        view += 1
        assert live.now == 4000
        del view
        assert (live.now, live.peak) == (0, 4000)
        product = weight.t() * 2  # a view of what is known, and something new
        assert live.now == 400
        product.sum().backward()
        del product
    assert live.now == 0 and (weight.grad == 2).all()


def test_live_bytes_counts_what_autograd_keeps_and_what_it_recomputes():
    from torch.utils.checkpoint import checkpoint

    x = torch.ones(1000, requires_grad=True)

    def layer(y):
        return y.sin().exp().cos().exp()

    def peak(recompute):
        with LiveBytes([x]) as live:
            y = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
            kept = live.now
            torch.autograd.grad(y.sum(), x)
        return kept, live.peak

    assert (
        peak(False)[0] == 8000
    )  # the result of the first exp, which the cos wants too, and of the last
    assert peak(True)[0] == 4000  # what comes out
    assert peak(True)[1] > 8000  # in the backward pass all of the layer is there again


# ---- the findings


def steps(layer_level=2.5, gradients=1e-7, others=0.01):
    """One round with these seconds a step; a third of each is the forward pass."""
    ranks = [
        {
            "waited": 0.2,
            "seconds": 2.0,
            "neighbour": 0.1,
            "transfer": 0.05,
            "sending": 0.01,
            "flushing": 0.0,
        }
    ] * 2
    found = []
    for what, seconds in {
        "alone": 4.0,
        "at_the_same_time": 5.0,
        "chunk_level": 4.1,
        "interleaved": 2.2,
        "layer_level": layer_level,
    }.items():
        clock = {"step": seconds, "forward": seconds / 3, "reduced": seconds + 0.5}
        step = {"what": what, "wall": clock, "processor": clock, "others": others}
        found.append(
            step
            | (
                {"ranks": ranks, "loss_differs": 0.0, "gradients_differ": gradients}
                if what in SCHEDULES
                else {}
            )
        )
    return found


def findings(**given):
    job, found = pipeline.Job(pipeline.SHAPE, 16), steps(**given)
    return pipeline.findings(job, found, pipeline.cell_times(job, found, transfer=0.0))


def test_verdict_by_hand():
    """L = 12, P = 2, no transfer time: 24 / 13 predicted; two at once take 5 s instead of 4, so the ceiling is 1.6."""
    found = findings()
    for verdict in found["verdict"].values():
        assert verdict["predicted"] == pytest.approx(24 / 13) and verdict[
            "ceiling"
        ] == pytest.approx(1.6)
        assert verdict["bound"] == pytest.approx(0.9 * 1.6 / 2 * 24 / 13)  # 1.329
        assert verdict["speedup"] == pytest.approx(1.6) and verdict["met"]
    assert not findings(layer_level=3.1)["verdict"]["wall"]["met"]  # 1.29
    assert found["clock"] == "wall" and found["agreement"]["met"]
    assert findings(others=0.2)["clock"] == "processor"
    assert not findings(gradients=1e-3)["agreement"]["met"]


def test_cell_times_by_hand():
    times = pipeline.cell_times(pipeline.Job(pipeline.SHAPE, 16), steps(), transfer=0.001)
    cell = 4 / 3 / (16 * 12)
    assert times["cell_seconds"] == pytest.approx(cell) and times[
        "transfer_cells"
    ] == pytest.approx(0.001 / cell)
    assert times["backward_cells"] == pytest.approx(2)
    assert times["message_bytes"] == 4 * 64 * 256


def test_the_best_schedule_of_a_simulation():
    rows = pipeline.simulations({"transfer_cells": 0.0, "backward_cells": 2.0}, (64,), (2, 64))
    assert len(rows) == 2 * (1 + len(pipeline.TRANSFERS))
    assert rows[0]["best"] == "interleaved" and rows[0]["efficiency"][
        "layer_level"
    ] == pytest.approx(36 / 37)
    assert "layer_stages" not in rows[1]["efficiency"]  # more ranks than layers
    assert rows[1]["best"] == "layer_level"  # one chunk a rank: interleaved is the same


# ---- the program


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """One run of the program as a user starts it: (folder, stdout)."""
    out = tmp_path_factory.mktemp("results")
    command = [
        sys.executable,
        "benchmarks/pipeline.py",
        "--small",
        "--layers",
        "2",
        "--chunks",
        "4",
        "--rounds",
        "2",
        "--out",
        str(out),
    ]
    done = subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=300
    )
    return out, done.stdout


def test_small_run(small):
    out, shown = small
    names = ["pipeline-small-simulated.png", "pipeline-small.json", "pipeline-small.png"]
    assert sorted(file.name for file in out.iterdir()) == names
    assert all(
        (out / name).read_bytes().startswith(b"\x89PNG") for name in names if name.endswith("png")
    )
    result = json.loads((out / "pipeline-small.json").read_text())
    assert result["command"].startswith("python benchmarks/pipeline.py --small --layers 2")
    assert (result["chunks"], result["rounds"], result["shape"]["layers"]) == (4, 2, 2)
    assert [(step["round"], step["what"]) for step in result["steps"]] == [
        (k, what) for k in (0, 1) for what in pipeline_steps.ARRANGEMENTS
    ]
    assert result["agreement"]["met"] and 0 < result["agreement"]["gradients_differ"] < 1e-5
    assert "bound = 0.9 * (ceiling / 2) * predicted" in " ".join(shown.split())
    for step in result["steps"]:
        for clock in ("wall", "processor"):
            assert 0 < step[clock]["forward"] < step[clock]["step"] <= step[clock]["reduced"]
    for row in result["arrangements"]:
        assert row["wall"]["step"] == min(
            step["wall"]["step"] for step in result["steps"] if step["what"] == row["what"]
        )


def test_small_run_knows_where_the_time_went(small):
    """What the messages tell is what the ring has counted itself."""
    result = json.loads((small[0] / "pipeline-small.json").read_text())
    for step in result["steps"]:
        for rank in step.get("ranks", []):
            waits = rank["neighbour"] + rank["transfer"]
            assert (
                0 < waits <= rank["waited"] + 1e-9
                and rank["waited"] - waits < 0.3 * rank["seconds"]
            )
            assert 0 < rank["sending"] < rank["seconds"] - waits
    times = result["times"]
    assert times["message_bytes"] == 4 * (32 + 32) * 64
    assert 0 < times["transfer_seconds"] < times["cell_seconds"] * times["transfer_cells"] * 1.01


def test_small_run_counts_memory(small):
    result = json.loads((small[0] / "pipeline-small.json").read_text())
    peaks = {(one["ranks"], one["recompute"]): one["mib"] for one in result["memory"]}
    assert set(peaks) == {(ranks, recompute) for ranks in (1, 2) for recompute in (False, True)}
    assert all(len(peaks[key]) == key[0] for key in peaks)
    assert max(peaks[2, False]) == pytest.approx(peaks[1, False][0] / 2, rel=0.1)
    assert peaks[1, True][0] < 0.5 * peaks[1, False][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds", "0"], "--rounds: 0 given, a whole number >= 1"),
        (["--layers", "-3"], "--layers: -3 given"),
        (["--chunks", "1"], "--chunks: 1 given, a whole number >= 2"),
        (["--chunks", "x"], "--chunks: invalid int value: 'x'"),
        (["--out", "Makefile"], "--out: Makefile cannot be made: File exists"),
        (["--round", "5"], "unrecognized arguments: --round"),
    ],
)
def test_mistakes_are_one_line(options, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as caught:
        pipeline.parse(options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_make_bench_runs_small_sizes():
    commands = subprocess.run(
        ["make", "-n", "bench"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    for name in ("prefill", "pipeline", "decode", "training", "data"):
        assert f"benchmarks/{name}.py --small" in commands
    assert "benchmarks/startup.py --rounds 1" in commands and "--lengths" not in commands
