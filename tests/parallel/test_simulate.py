"""Schedules of a pipeline: small timelines by hand, closed formulas, laws of every simulation."""

import itertools
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.image import imread

from comet_pl.errors import UserError
from comet_pl.parallel.schedule import SCHEDULES, spans
from comet_pl.parallel.simulate import SIMULATED, compare, main, simulate, text

ROOT = Path(__file__).resolve().parents[2]
COUNTS = st.integers(1, 6)
COSTS = st.lists(st.integers(1, 9), min_size=1, max_size=12)
# Of small powers of two, so that sums are exact.
TRANSFERS = st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.5, 3.0])


def rows(timeline):
    """Each rank's tasks: 'start F|B layer:chunks'."""

    def name(task):
        chunks = "+".join(map(str, range(*task.chunks)))
        return f"{task.start:g} {task.kind[0].upper()}{task.layer}:{chunks}"

    return [", ".join(map(name, tasks)) for tasks in timeline.by_rank]


# Schedule, P, L, costs of the chunks, options; each rank's row; makespan and messages.
BY_HAND = """
layer_level 2 2 1,1,1,1
0 F0:0+1, 2 F1:0+1, 10 B1:0+1, 14 B0:0+1
2 F0:2+3, 4 F1:2+3, 6 B1:2+3, 10 B0:2+3
18 4

interleaved 2 2 1,1,1,1
0 F0:0, 1 F1:0, 2 F0:2, 3 F1:2, 7 B1:2, 9 B0:2, 11 B1:0, 13 B0:0
1 F0:1, 2 F1:1, 3 F0:3, 4 F1:3, 5 B1:3, 7 B0:3, 9 B1:1, 11 B0:1
15 12

chunk_level 2 2 1,1,1 backward=1
0 F0:0, 1 F1:0, 2 F0:1, 3 F1:1, 8 B1:1, 9 B0:1, 10 B1:0, 11 B0:0
4 F0:2, 5 F1:2, 6 B1:2, 7 B0:2
12 4

layer_stages 2 3 1,1 backward=1
0 F0:0, 1 F1:0, 2 F0:1, 3 F1:1, 6 B1:1, 7 B0:1, 8 B1:0, 9 B0:0
2 F2:0, 4 F2:1, 5 B2:1, 6 B2:0
10 4

layer_level 3 2 3,1,1,1 forward_only=1 cell=2
0 F0:0, 6 F1:0
6 F0:1+2, 12 F1:1+2
10 F0:3, 16 F1:3
18 4

layer_level 2 3 1,1 transfer=1.5 forward_only=1
0 F0:0, 1 F1:0, 2 F2:0
2.5 F0:1, 4 F1:1, 5.5 F2:1
6.5 3

chunk_level 2 3 1,1 transfer=1.5 forward_only=1
0 F0:0, 1 F1:0, 2 F2:0
5.5 F0:1, 6.5 F1:1, 7.5 F2:1
8.5 3

layer_level 2 2 1,1 transfer=1 backward_transfer=0.5
0 F0:0, 1 F1:0, 6.5 B1:0, 8.5 B0:0
2 F0:1, 3 F1:1, 4 B1:1, 6 B0:1
10.5 4

interleaved 3 1 1,1,1,1 forward_only=1
0 F0:0, 3 F0:3
1 F0:1
2 F0:2
4 3
"""


@pytest.mark.parametrize("case", BY_HAND.strip().split("\n\n"))
def test_small_timelines_by_hand(case):
    call, *expected, last = case.splitlines()
    schedule, ranks, layers, chunks, *options = call.split()
    times = {name: float(value) for name, value in (option.split("=") for option in options)}
    costs = [float(cost) for cost in chunks.split(",")]
    timeline = simulate(schedule, int(ranks), int(layers), costs, **times)
    assert rows(timeline) == expected
    assert f"{timeline.makespan:g} {timeline.messages}" == last


def test_idle_share_and_speedup_by_hand():
    timeline = simulate("layer_level", 2, 2, 4)
    assert timeline.work == 24
    assert timeline.idle == pytest.approx(1 / 3) and timeline.speedup == pytest.approx(4 / 3)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ranks_without_a_chunk_are_idle(schedule):
    timeline = simulate(schedule, 4, 2, 2)
    assert [bool(row) for row in rows(timeline)] == [True, True, False, False]
    assert timeline.makespan == simulate(schedule, 2, 2, 2).makespan
    assert timeline.idle == pytest.approx(1 - timeline.work / (4 * timeline.makespan))


# ---- closed formulas


@given(
    P=st.integers(1, 8),
    L=st.integers(1, 10),
    n=st.integers(1, 5),
    backward=st.sampled_from([1, 2, 3]),
)
def test_idle_shares_are_the_formulas(P, L, n, backward):
    idle = {one.schedule: one.idle for one in compare(P, L, n * P, backward=backward)}
    assert idle["layer_level"] == pytest.approx((P - 1) / (L + P - 1))
    assert idle["chunk_level"] == pytest.approx((P - 1) / P)
    # A rank's next chunk needs the one before, from a round through all ranks.
    period = max(L, P)
    assert idle["interleaved"] == pytest.approx(1 - n * L / ((n - 1) * period + L + P - 1))
    if L >= P:
        assert idle["interleaved"] == pytest.approx((P - 1) / (n * L + P - 1))
    stages = {one.schedule: one.idle for one in compare(P, n * P, L)}  # T = L chunks
    assert stages["layer_stages"] == pytest.approx((P - 1) / (L + P - 1))


@given(costs=COSTS, P=COUNTS, L=COUNTS, transfer=TRANSFERS)
def test_layer_level_is_a_line_of_machines(costs, P, L, transfer):
    """L layers pass P spans and their links, each one layer at a time.

    All service times count once, the longest L - 1 times more."""
    service = [sum(costs[start:end]) for start, end in spans("layer_level", costs, P)]
    service += [transfer] * (len(service) - 1)
    forward = sum(service) + (L - 1) * max(service)
    timeline = simulate("layer_level", P, L, costs, transfer=transfer, forward_only=True)
    assert timeline.makespan == forward
    both = simulate("layer_level", P, L, costs, transfer=transfer, backward_transfer=2 * transfer)
    assert both.makespan == 3 * forward


@given(
    P=st.integers(2, 5),
    n=st.integers(1, 4),
    spare=st.integers(0, 5),
    transfer=st.sampled_from([0, 0.25, 0.5, 1]),
)
def test_interleaved_hides_transfers_behind_layers(P, n, spare, transfer):
    """With L >= P (1 + transfer), memory arrives before a rank has finished its chunk: only the
    start-up pays for it."""
    L = math.ceil(P * (1 + transfer)) + spare
    timeline = simulate("interleaved", P, L, n * P, transfer=transfer, forward_only=True)
    assert timeline.makespan == n * L + (P - 1) * (1 + transfer)


@given(costs=COSTS, P=COUNTS, L=COUNTS, transfer=TRANSFERS)
def test_chunk_level_adds_up(costs, P, L, transfer):
    parts = spans("chunk_level", costs, P)
    forward = L * sum(costs)
    # A layer's memory leaves as it is ready; the next span waits for the last one.
    for _, end in parts[:-1]:
        forward += transfer + (L - 1) * max(0, transfer - costs[end - 1])
    timeline = simulate("chunk_level", P, L, costs, transfer=transfer, forward_only=True)
    assert timeline.makespan == forward


@given(T=COUNTS, P=COUNTS, extra=st.integers(0, 6), transfer=TRANSFERS)
def test_layer_stages_is_a_line_of_machines(T, P, extra, transfer):
    L = P + extra
    service = [L // P + (q < L % P) for q in range(P)] + [transfer] * (P - 1)
    timeline = simulate("layer_stages", P, L, T, transfer=transfer, forward_only=True)
    assert timeline.makespan == sum(service) + (T - 1) * max(service)


# ---- laws


@st.composite
def cases(draw):
    P, L = draw(COUNTS), draw(st.integers(1, 9))
    return {
        "schedule": draw(st.sampled_from(SIMULATED if P <= L else SCHEDULES)),
        "ranks": P,
        "layers": L,
        "chunks": draw(COSTS),
        "backward": draw(st.sampled_from([0.5, 1.0, 2.0, 3.0])),
        "transfer": draw(TRANSFERS),
        "backward_transfer": draw(st.none() | TRANSFERS),
    }


def cells(timeline):
    """The task of each cell: (kind, t, i) -> task; fails where there are two."""
    pairs = [((a.kind, t, a.layer), a) for a in timeline.tasks for t in range(*a.chunks)]
    found = dict(pairs)
    assert len(found) == len(pairs), "a cell is computed twice"
    return found


@given(case=cases())
def test_every_cell_comes_once_each_way_and_backward_mirrors_forward(case):
    timeline = simulate(**case)
    grid = {(t, i) for t in range(len(case["chunks"])) for i in range(case["layers"])}
    kinds = "forward", "backward"
    assert set(cells(timeline)) == {(kind, *cell) for kind in kinds for cell in grid}
    for tasks in timeline.by_rank:
        done = [[(one.layer, one.chunks) for one in tasks if one.kind == kind] for kind in kinds]
        assert done[0] == done[1][::-1]
    assert set(cells(simulate(**case, forward_only=True))) == {("forward", *cell) for cell in grid}


@given(case=cases())
def test_nothing_starts_before_what_it_needs(case):
    timeline = simulate(**case)
    found, transfer, back = cells(timeline), case["transfer"], case["backward_transfer"]

    def in_order(early, late, transfer=0.0):
        one, two = found[early], found[late]
        if one is not two:  # within a task chunks follow each other
            assert two.start >= one.end + (transfer if one.rank != two.rank else 0)

    for t, i in itertools.product(range(len(case["chunks"])), range(case["layers"])):
        in_order(("forward", t, i), ("backward", t, i))
        for before in [(t, i - 1)] * (i > 0) + [(t - 1, i)] * (t > 0):
            in_order(("forward", *before), ("forward", t, i), transfer)
            back_transfer = transfer if back is None else back
            in_order(("backward", t, i), ("backward", *before), back_transfer)
    for task in timeline.tasks:
        factor = 1 if task.kind == "forward" else case["backward"]
        assert task.end - task.start == factor * sum(case["chunks"][slice(*task.chunks)])


@given(case=cases())
def test_no_rank_does_two_things_at_once_and_none_goes_back_too_early(case):
    for tasks in simulate(**case).by_rank:
        for one, two in itertools.pairwise(tasks):
            assert one.end <= two.start
            assert (one.kind, two.kind) != ("backward", "forward")


@given(case=cases())
def test_bounds_of_the_makespan(case):
    timeline = simulate(**case)
    costs, L, way = case["chunks"], case["layers"], 1 + case["backward"]
    assert timeline.work == way * L * sum(costs)
    assert timeline.makespan >= timeline.work / timeline.ranks
    # The longest path through the grid: along all chunks, up all layers at the dearest one.
    assert timeline.makespan >= way * (sum(costs) + (L - 1) * max(costs))
    assert 0 <= timeline.idle < 1
    assert timeline.speedup == pytest.approx(timeline.ranks * (1 - timeline.idle))


@given(case=cases(), more=TRANSFERS)
def test_slower_transfers_never_help(case, more):
    slower = case | {"transfer": case["transfer"] + more}
    assert simulate(**slower).makespan >= simulate(**case).makespan


@given(case=cases(), unit=st.sampled_from([0.25, 2.0, 8.0]))
def test_the_unit_of_time_is_free(case, unit):
    times = {name: case[name] for name in ("transfer", "backward_transfer")}
    scaled = {name: time if time is None else unit * time for name, time in times.items()}
    found = simulate(**case | scaled, cell=unit).tasks
    expected = [(unit * task.start, unit * task.end) for task in simulate(**case).tasks]
    assert [(task.start, task.end) for task in found] == expected


@given(costs=COSTS, L=COUNTS, transfer=TRANSFERS)
def test_one_rank_is_never_idle(costs, L, transfer):
    for one in compare(1, L, costs, transfer=transfer):
        values = one.makespan, one.idle, one.speedup, one.messages
        assert values == (3 * L * sum(costs), 0, 1, 0)


@given(P=COUNTS, extra=COUNTS, costs=COSTS)
def test_chunk_level_is_the_slowest_and_ours_no_slower_than_the_papers(P, extra, costs):
    """Without transfer time; the second for equal chunks and L >= P."""
    for timeline in compare(P, extra, costs):
        assert timeline.makespan <= simulate("chunk_level", P, extra, costs).makespan
    equal = {one.schedule: one.makespan for one in compare(P, P + extra, len(costs))}
    assert equal["interleaved"] <= equal["layer_level"]


# ---- what the command shows


def test_text_shows_who_does_what_when():
    timeline = simulate("interleaved", 2, 2, 3, transfer=0.5, forward_only=True)
    assert text(timeline, 17) == [
        "interleaved: P=2, L=2",
        # Two columns a cell; memory arrives half a cell after the chunk's first layer.
        "rank 0 0011..0011",
        "rank 1 ...0011...",
    ]


@given(case=cases(), width=st.integers(20, 150))
def test_each_column_of_the_text_shows_its_middle(case, width):
    timeline = simulate(**case)
    _, *lines = text(timeline, width)
    assert len(lines) == timeline.ranks and max(map(len, lines)) <= width
    room = width - len("rank 0 ")
    a_cell = room // timeline.makespan
    step = 1 / a_cell if a_cell else timeline.makespan / room
    for rank, line in enumerate(lines):
        assert line.startswith(f"rank {rank} ")
        mine = [task for task in timeline.tasks if task.rank == rank]
        for column, symbol in enumerate(line.removeprefix(f"rank {rank} ")):
            middle = (column + 0.5) * step
            if any(abs(middle - edge) < 1e-6 for task in mine for edge in (task.start, task.end)):
                continue  # either side is right
            running = [task for task in mine if task.start < middle < task.end]
            symbols = {"forward": "0123456789", "backward": "abcdefghij"}
            shown = "".join(symbols[task.kind][task.layer] for task in running)
            assert symbol == (shown or ".")


def test_command_prints_every_schedule_and_draws_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    main(["2", "4", "4"])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    for line in compare(2, 4, 4):
        figures = f"{line.makespan:.6g} {line.speedup:.2f} {line.idle:.1%} {line.messages}"
        assert f"{line.schedule} {figures}" in " ".join(printed.split())
    assert "pipeline-2-4-4.png" in printed
    picture = imread(tmp_path / "pipeline-2-4-4.png")
    assert picture.shape[0] > 200 and picture.shape[1] > 500 and picture.std() > 0.05


def test_command_with_options(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, format: path.touch())
    out = tmp_path / "one.png"
    options = "--schedule interleaved --transfer 0.5 --backward 3 --forward-only"
    main(["2", "4", "4", *options.split(), "--out", str(out)])
    printed = capsys.readouterr().out
    expected = simulate("interleaved", 2, 4, 4, transfer=0.5, backward=3, forward_only=True)
    assert f"{expected.makespan:g}" in printed and "layer_level" not in printed and out.exists()
    main(["5", "4", "4", "--out", str(out)])  # more ranks than layers: all but layer_stages
    assert "layer_stages" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("0 4 4", "ranks: 0"),
        ("2 4", "CHUNKS"),
        ("2 4 x", "'x'"),
        ("2 4 4 --transfer -1", "transfer: -1.0"),
        ("2 4 4 --schedule interleave", "did you mean interleaved?"),
        ("9 4 4 --schedule layer_stages", "ranks: 9"),
        ("2 99999 99999", "L * CHUNKS: 9,999,800,001 given, allowed: at most 100,000"),
        ("99999 4 4", "P: 99,999"),
        ("2 4 4 --out no/such/folder.png", "no/such/folder.png"),
    ],
)
def test_command_answers_mistakes_in_one_line(arguments, part, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(part)) as error:
        main(arguments.split())
    assert "\n" not in str(error.value)
    assert not capsys.readouterr().out and not list(tmp_path.iterdir())


def test_it_runs_as_a_module(tmp_path):
    """Without a warning. Neither file needs torch, Lightning or (to simulate) matplotlib."""
    bare = (  # a comet_pl without its __init__, which loads torch
        "import runpy, sys, types; package = types.ModuleType('comet_pl'); "
        f"package.__path__ = [{str(ROOT / 'comet_pl')!r}]; sys.modules['comet_pl'] = package; "
        "import comet_pl.parallel.simulate as s; s.simulate('interleaved', 2, 3, 4); "
        "assert not {'torch', 'lightning', 'matplotlib', 'numpy'} & set(sys.modules); "
        "del sys.modules['comet_pl.parallel.simulate']; sys.argv = ['', '2', '3', '4']; "
        "runpy.run_module('comet_pl.parallel.simulate', run_name='__main__', alter_sys=True)"
    )
    argv = [sys.executable, "-W", "error", "-c", bare]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "picture: pipeline-2-3-4.png" in done.stdout
    assert imread(tmp_path / "pipeline-2-3-4.png").std() > 0.05
