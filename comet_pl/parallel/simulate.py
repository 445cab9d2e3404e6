"""What `python -m comet_pl.parallel.schedule P L CHUNKS` shows: the ranks' timelines as text, a table, a picture."""

from __future__ import annotations

import argparse
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from comet_pl.errors import UserError
from comet_pl.parallel.schedule import SIMULATED, Task, Timeline, compare, simulate, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORWARD, BACKWARD, IDLE = (
    "0123456789",
    "abcdefghij",
    ".",
)  # the symbol of layer i is the one at i mod 10
MOST_CELLS, MOST_RANKS = (
    100_000,
    1024,
)  # what takes about half a minute on a slow core; what a picture can show


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the options")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m comet_pl.parallel.schedule",
        description="Who runs what when, and how long ranks wait: CHUNKS chunks and L layers on a pipeline of P ranks.",
        epilog="Times are in forward cells: one layer over one chunk takes 1.",
        allow_abbrev=False,
    )
    for name, metavar, meaning in (
        ("ranks", "P", "ranks"),
        ("layers", "L", "layers"),
        ("chunks", "CHUNKS", "chunks of a window, of equal cost"),
    ):
        parser.add_argument(name, type=int, metavar=metavar, help=meaning)
    parser.add_argument(
        "--schedule", metavar="NAME", help=f"only this one of {', '.join(SIMULATED)}"
    )
    parser.add_argument(
        "--transfer",
        type=float,
        default=0.0,
        metavar="X",
        help="time of a message between ranks (default: 0)",
    )
    parser.add_argument(
        "--backward",
        type=float,
        default=2.0,
        metavar="X",
        help="time of a backward cell (default: 2; 3 with recomputation)",
    )
    parser.add_argument("--forward-only", action="store_true", help="no backward pass")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.png",
        help="the picture (default: pipeline-P-L-CHUNKS.png in the current folder)",
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Timelines and table to stdout, the picture to a file.

    Raises:
        UserError: impossible numbers, an unknown schedule, a picture that cannot be written.
    """
    options = parse(argv)
    for name, given, most in (
        ("L * CHUNKS", options.layers * options.chunks, MOST_CELLS),
        ("P", options.ranks, MOST_RANKS),
    ):
        if given > most:
            raise UserError(f"{name}: {given:,} given, allowed: at most {most:,}")
    shape = options.ranks, options.layers, options.chunks
    times = {name: getattr(options, name) for name in ("transfer", "backward", "forward_only")}
    try:
        found = (
            [simulate(options.schedule, *shape, **times)]
            if options.schedule is not None
            else compare(*shape, **times)
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    path = options.out or Path(f"pipeline-{options.ranks}-{options.layers}-{options.chunks}.png")
    try:
        draw(found).savefig(path, format="png")
    except OSError as error:
        raise UserError(f"--out: {path} cannot be written: {error.strerror or error}") from None
    for timeline in found:
        print("\n".join(text(timeline, shutil.get_terminal_size((100, 24)).columns)), end="\n\n")
    print(
        f"{FORWARD[0]}-{FORWARD[-1]} forward, {BACKWARD[0]}-{BACKWARD[-1]} backward (layer mod 10), {IDLE} idle\n"
    )
    print(f"{'schedule':13}{'makespan':>10}{'speedup':>9}{'idle':>9}{'messages':>10}")
    for row in table(found):
        print(
            f"{row['schedule']:13}{row['makespan']:10,.6g}{row['speedup']:9.2f}{row['idle']:9.1%}{row['messages']:10,}"
        )
    print(f"\npicture: {path}")


def by_rank(timeline: Timeline) -> list[list[Task]]:
    """Each rank's tasks in order; [] for a rank without work."""
    rows: list[list[Task]] = [[] for _ in range(timeline.ranks)]
    for task in timeline.tasks:
        rows[task.rank].append(task)
    return rows


def text(timeline: Timeline, width: int) -> list[str]:
    """A title and one line a rank, at most `width` columns wide; each column shows what the rank does in the middle of the column's time.

    A forward cell of cost 1 takes a whole number of columns where that fits.
    """
    labels = [f"rank {rank:<{len(str(timeline.ranks - 1))}} " for rank in range(timeline.ranks)]
    room = max(width - len(labels[0]), 10)
    a_cell = math.floor(room / timeline.makespan)
    step = 1 / a_cell if a_cell else timeline.makespan / room
    columns = min(math.ceil(timeline.makespan / step - 1e-9), room)
    lines = [f"{timeline.schedule}: P={timeline.ranks}, L={timeline.layers}"]
    for label, tasks in zip(labels, by_rank(timeline), strict=True):
        line = [IDLE] * columns
        for task in tasks:
            symbol = (FORWARD if task.kind == "forward" else BACKWARD)[task.layer % 10]
            first, end = (
                min(math.ceil(time / step - 0.5 - 1e-9), columns) for time in (task.start, task.end)
            )
            line[first:end] = symbol * (end - first)
        lines.append(label + "".join(line))
    return lines


def draw(timelines: list[Timeline]) -> Figure:
    """One panel a timeline, one row a rank, all on one time axis; darker means a higher layer.

    The axis ends with the longest schedule other than the serial chunk_level, which would squeeze them all.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    maps = {"forward": matplotlib.colormaps["Blues"], "backward": matplotlib.colormaps["Oranges"]}
    end = max(
        [one.makespan for one in timelines if one.schedule != "chunk_level"]
        or [timelines[0].makespan]
    )
    height = min(max(1.2, 0.45 + 0.22 * timelines[0].ranks), 7.0)
    figure = Figure(figsize=(12, 0.9 + height * len(timelines)), layout="constrained", dpi=110)
    for axes, timeline in zip(
        figure.subplots(len(timelines), 1, sharex=True, squeeze=False)[:, 0], timelines, strict=True
    ):
        for rank, tasks in enumerate(by_rank(timeline)):
            seen = [task for task in tasks if task.start < end]
            colours = [
                maps[task.kind](0.3 + 0.65 * (task.layer + 1) / timeline.layers) for task in seen
            ]
            axes.broken_barh(
                [(task.start, task.end - task.start) for task in seen],
                (rank - 0.42, 0.84),
                facecolors=colours,
                linewidth=0,
            )
        title = f"{timeline.schedule}: {timeline.makespan:,.6g} cells, speed-up {timeline.speedup:.2f}, idle {timeline.idle:.1%}"
        axes.set_title(
            title + (" (goes on to the right)" if timeline.makespan > end else ""),
            loc="left",
            fontsize=10,
        )
        axes.set(xlim=(0, end), ylim=(timeline.ranks - 0.5, -0.5), ylabel="rank")
        axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("time, in forward cells")
    patches = [
        Patch(color=colours(0.7), label=f"{kind} (darker: higher layer)")
        for kind, colours in maps.items()
    ]
    figure.legend(handles=patches, loc="outside upper right", ncols=2, frameon=False)
    return figure
