"""Simulates the schedules of a pipeline; prints and draws who computes what when.

    python -m comet_pl.parallel.simulate P L CHUNKS --transfer T

Legend: T chunks of a window, t chunk; L layers, i layer; P ranks. Times are in forward cells: one
layer over one chunk takes 1.
"""

from __future__ import annotations

import argparse
import math
import shutil
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from comet_pl.errors import Parser, UserError, os_errors, run_cli
from comet_pl.parallel.schedule import (
    SCHEDULES,
    check_costs,
    check_count,
    check_number,
    check_schedule,
    cut,
    spans,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIMULATED: tuple[str, ...] = (*SCHEDULES, "layer_stages")
# The symbol of layer i is the one at i mod 10.
SYMBOLS = {"forward": "0123456789", "backward": "abcdefghij"}
IDLE = "."
# What takes about half a minute on a slow core; what a picture can show.
MOST_CELLS, MOST_RANKS = 100_000, 1024

Kind = Literal["forward", "backward"]
Cell = tuple[int, int]  # (block of chunks, layer)


@dataclass(frozen=True)
class Task:
    """One layer over some chunks, without a pause."""

    rank: int
    kind: Kind
    chunks: tuple[int, int]  # first, last + 1
    layer: int
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What `simulate` finds."""

    schedule: str
    ranks: int
    layers: int
    tasks: list[Task]  # in the order in which they start
    messages: int  # between ranks, both ways: a layer's memory or a chunk's hidden states

    @property
    def makespan(self) -> float:
        """The time at which the last task ends."""
        return max(task.end for task in self.tasks)

    @property
    def work(self) -> float:
        """The time that one rank alone would take."""
        return math.fsum(task.end - task.start for task in self.tasks)

    @property
    def idle(self) -> float:
        """The share of the ranks' time in which they wait: 1 - work / (P * makespan)."""
        return max(0.0, 1 - self.work / (self.ranks * self.makespan))

    @property
    def speedup(self) -> float:
        """Over one rank: work / makespan."""
        return self.work / self.makespan

    @property
    def by_rank(self) -> list[list[Task]]:
        """Each rank's tasks in order; [] for a rank without work."""
        rows: list[list[Task]] = [[] for _ in range(self.ranks)]
        for task in self.tasks:
            rows[task.rank].append(task)
        return rows


def simulate(
    schedule: str,
    ranks: int,
    layers: int,
    chunks: int | Sequence[float],
    *,
    cell: float = 1.0,
    backward: float = 2.0,
    transfer: float = 0.0,
    backward_transfer: float | None = None,
    forward_only: bool = False,
) -> Timeline:
    """Plays a window event by event.

    A rank waits only for messages that have not arrived, never to send. Messages from one rank to
    another are served one by one in the order of sending. The head costs nothing.

    Args:
        schedule: one of SIMULATED.
        chunks: how many equal ones, or the relative cost of each.
        cell: time of a layer's forward pass over a chunk of cost 1, the unit of all times.
        backward: how many times as long the backward pass takes (3 with activation checkpointing).
        transfer: time that a layer's memory (layer_stages: a chunk's hidden states) takes to the
            next rank.
        backward_transfer: the same for the gradients; None: as `transfer`.

    Raises:
        ValueError: an unknown schedule, counts < 1, impossible times or costs, layer_stages with
            more ranks than layers.
    """
    check_schedule(schedule, SIMULATED)
    check_count("ranks", ranks)
    check_count("layers", layers)
    if isinstance(chunks, int):
        check_count("chunks", chunks)
        chunks = [1.0] * chunks
    costs = list(chunks)
    check_costs(costs, above_zero=True)
    check_number("cell", cell, above_zero=True)
    check_number("backward", backward, above_zero=True)
    check_number("transfer", transfer)
    gradient_transfer = transfer if backward_transfer is None else backward_transfer
    check_number("backward_transfer", gradient_transfer)
    if schedule == "layer_stages" and ranks > layers:
        raise ValueError(
            f"ranks: {ranks} given, allowed with layer_stages: at most the {layers} layers"
        )
    forward = _forward(schedule, costs, ranks, layers, cell, transfer)
    passes = [forward]
    if not forward_only:
        passes.append(forward.mirror(backward * cell, gradient_transfer))
    return Timeline(schedule, ranks, layers, _play(passes, costs), len(forward.sends) * len(passes))


def compare(ranks: int, layers: int, chunks: int | Sequence[float], **times: Any) -> list[Timeline]:
    """`simulate` for each possible one of SIMULATED; layer_stages needs ranks <= layers."""
    return [
        simulate(name, ranks, layers, chunks, **times)
        for name in SIMULATED
        if name != "layer_stages" or ranks <= layers
    ]


@dataclass(frozen=True)
class _Pass:
    """What the ranks do in one direction."""

    kind: Kind
    cell: float  # time of a layer over a chunk of cost 1
    transfer: float  # time of a message
    blocks: list[tuple[int, int]]  # ranges of chunks; a layer goes over one without a pause
    orders: list[list[Cell]]  # each rank's cells
    sends: dict[Cell, Cell]  # cell -> the cell of another rank that its message is for
    waits: dict[Cell, Cell]  # cell -> the cell of another rank whose message it needs

    def mirror(self, cell: float, transfer: float) -> _Pass:
        """The backward pass of a forward pass."""
        sends, waits = ({b: a for a, b in pairs.items()} for pairs in (self.sends, self.waits))
        orders = [order[::-1] for order in self.orders]
        return _Pass("backward", cell, transfer, self.blocks, orders, sends, waits)


def _forward(
    schedule: str, costs: list[float], ranks: int, layers: int, cell: float, transfer: float
) -> _Pass:
    blocks = [(t, t + 1) for t in range(len(costs))]
    waits: dict[Cell, Cell] | None = None
    if schedule == "layer_stages":
        stages = cut([1] * layers, ranks)
        orders = [[(t, i) for t in range(len(costs)) for i in range(*stage)] for stage in stages]
        sends = {(t, i - 1): (t, i) for i, _ in stages[1:] for t in range(len(costs))}
    elif schedule == "chunk_level":
        parts = spans(schedule, costs, ranks)
        orders = [[(t, i) for t in range(*part) for i in range(layers)] for part in parts]
        orders += [[] for _ in range(ranks - len(parts))]
        sends = {(t - 1, i): (t, i) for t, _ in parts[1:] for i in range(layers)}
        # The last layer's message arrives last.
        waits = {(t, 0): (t - 1, layers - 1) for t, _ in parts[1:]}
    else:
        blocks = spans(schedule, costs, ranks)
        orders = [
            [(k, i) for k in range(rank, len(blocks), ranks) for i in range(layers)]
            for rank in range(ranks)
        ]
        later = range(1, len(blocks)) if ranks > 1 else ()
        sends = {(k - 1, i): (k, i) for k in later for i in range(layers)}
    waits = {b: a for a, b in sends.items()} if waits is None else waits
    return _Pass("forward", cell, transfer, blocks, orders, sends, waits)


def _play(passes: list[_Pass], costs: list[float]) -> list[Task]:
    """All tasks: every rank takes its cells of each pass in order, as early as it can."""
    ranks, blocks = len(passes[0].orders), passes[0].blocks
    programs = [
        deque((each, cell) for each in passes for cell in each.orders[rank])
        for rank in range(ranks)
    ]
    rank_of = {cell: rank for rank, order in enumerate(passes[0].orders) for cell in order}
    block_costs = [math.fsum(costs[start:end]) for start, end in blocks]
    tasks: list[Task] = []
    clocks = [0.0] * ranks
    links: dict[tuple[int, int], float] = {}  # (from, to): busy until
    arrived: dict[tuple[Kind, Cell], float] = {}  # when a cell's message is there
    waiting: dict[tuple[Kind, Cell], int] = {}  # the rank that waits for a cell's message
    able = deque(range(ranks))
    while able:
        rank = able.popleft()
        while programs[rank]:
            direction, cell = programs[rank][0]
            kind, start = direction.kind, clocks[rank]
            if cell in direction.waits:
                message = kind, direction.waits[cell]
                if message not in arrived:
                    waiting[message] = rank
                    break
                start = max(start, arrived[message])
            end = clocks[rank] = start + direction.cell * block_costs[cell[0]]
            tasks.append(Task(rank, kind, blocks[cell[0]], cell[1], start, end))
            programs[rank].popleft()
            if cell in direction.sends:
                message, link = (kind, cell), (rank, rank_of[direction.sends[cell]])
                links[link] = max(end, links.get(link, 0.0)) + direction.transfer
                arrived[message] = links[link]
                if message in waiting:
                    able.append(waiting.pop(message))
    assert not waiting, "ranks wait for each other"
    return sorted(tasks, key=lambda task: (task.start, task.end, task.rank))


# ---- the command


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m comet_pl.parallel.simulate",
        description="Who computes what when, and how long ranks wait: CHUNKS chunks and L layers "
        "on a pipeline of P ranks.",
        epilog="Times are in forward cells: one layer over one chunk takes 1.",
    )
    add = parser.add_argument
    add("ranks", type=int, metavar="P", help="ranks")
    add("layers", type=int, metavar="L", help="layers")
    add("chunks", type=int, metavar="CHUNKS", help="chunks of a window, of equal cost")
    transfer = "time of a message between ranks (default: 0)"
    add("--transfer", type=float, default=0.0, metavar="X", help=transfer)
    backward = "time of a backward cell (default: 2; 3 with checkpointing)"
    add("--backward", type=float, default=2.0, metavar="X", help=backward)
    add("--schedule", metavar="NAME", help=f"only this one of {', '.join(SIMULATED)}")
    add("--forward-only", action="store_true", help="no backward pass")
    picture = "the picture (default: pipeline-P-L-CHUNKS.png in the current folder)"
    add("--out", type=Path, metavar="FILE.png", help=picture)
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Prints timelines and a table, and writes the picture to a file.

    Raises:
        UserError: impossible numbers, an unknown schedule, a picture that cannot be written.
    """
    options = parse(argv)
    shape = options.ranks, options.layers, options.chunks
    cells = options.layers * options.chunks
    for name, value, most in ("L * CHUNKS", cells, MOST_CELLS), ("P", options.ranks, MOST_RANKS):
        if value > most:
            raise UserError(f"{name}: {value:,} given, allowed: at most {most:,}")
    times = {name: getattr(options, name) for name in ("transfer", "backward", "forward_only")}
    try:
        only = options.schedule
        every = only is None
        timelines = compare(*shape, **times) if every else [simulate(only, *shape, **times)]
    except ValueError as error:
        raise UserError(str(error)) from None
    path = options.out or Path("pipeline-{}-{}-{}.png".format(*shape))
    with os_errors(f"--out: {path} cannot be written"):
        draw(timelines).savefig(path, format="png")
    for timeline in timelines:
        print("\n".join(text(timeline, shutil.get_terminal_size((100, 24)).columns)), end="\n\n")
    print(f"0-9 forward, a-j backward (layer mod 10), {IDLE} idle\n")
    print(f"{'schedule':13}{'makespan':>10}{'speedup':>9}{'idle':>9}{'messages':>10}")
    for line in timelines:
        figures = f"{line.makespan:10,.6g}{line.speedup:9.2f}{line.idle:9.1%}{line.messages:10,}"
        print(f"{line.schedule:13}{figures}")
    print(f"\npicture: {path}")


def text(timeline: Timeline, width: int) -> list[str]:
    """A title and one line a rank, at most `width` columns wide.

    Each column shows what the rank does in the middle of the column's time. A forward cell of cost
    1 takes a whole number of columns where that fits.
    """
    labels = [f"rank {rank:<{len(str(timeline.ranks - 1))}} " for rank in range(timeline.ranks)]
    room = max(width - len(labels[0]), 10)
    a_cell = math.floor(room / timeline.makespan)
    column = 1 / a_cell if a_cell else timeline.makespan / room
    columns = min(math.ceil(timeline.makespan / column - 1e-9), room)
    lines = [f"{timeline.schedule}: P={timeline.ranks}, L={timeline.layers}"]
    for label, tasks in zip(labels, timeline.by_rank, strict=True):
        line = [IDLE] * columns
        for task in tasks:
            times = task.start, task.end
            first, end = (min(math.ceil(t / column - 0.5 - 1e-9), columns) for t in times)
            line[first:end] = SYMBOLS[task.kind][task.layer % 10] * (end - first)
        lines.append(label + "".join(line))
    return lines


def draw(timelines: list[Timeline]) -> Figure:
    """One panel a timeline, one row a rank; darker means a higher layer.

    The common time axis ends with the longest schedule but the serial chunk_level.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    maps = {"forward": matplotlib.colormaps["Blues"], "backward": matplotlib.colormaps["Oranges"]}
    parallel = [each.makespan for each in timelines if each.schedule != "chunk_level"]
    end = max(parallel or [timelines[0].makespan])
    height = min(max(1.2, 0.45 + 0.22 * timelines[0].ranks), 7.0)
    size = (12, 0.9 + height * len(timelines))
    figure = Figure(figsize=size, layout="constrained", dpi=110)
    panels = figure.subplots(len(timelines), 1, sharex=True, squeeze=False)[:, 0]
    for axes, timeline in zip(panels, timelines, strict=True):
        for rank, tasks in enumerate(timeline.by_rank):
            seen = [task for task in tasks if task.start < end]
            shades = [0.3 + 0.65 * (task.layer + 1) / timeline.layers for task in seen]
            colours = [maps[task.kind](shade) for task, shade in zip(seen, shades, strict=True)]
            bars = [(task.start, task.end - task.start) for task in seen]
            axes.broken_barh(bars, (rank - 0.42, 0.84), facecolors=colours, linewidth=0)
        title = f"{timeline.schedule}: {timeline.makespan:,.6g} cells, "
        title += f"speed-up {timeline.speedup:.2f}, idle {timeline.idle:.1%}"
        title += " (continues to the right)" if timeline.makespan > end else ""
        axes.set_title(title, loc="left", fontsize=10)
        axes.set(xlim=(0, end), ylim=(timeline.ranks - 0.5, -0.5), ylabel="rank")
        axes.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.set_xlabel("time, in forward cells")
    label = "{} (darker: higher layer)".format
    patches = [Patch(color=colours(0.7), label=label(kind)) for kind, colours in maps.items()]
    figure.legend(handles=patches, loc="outside upper right", ncols=2, frameon=False)
    return figure


if __name__ == "__main__":
    run_cli(main)
