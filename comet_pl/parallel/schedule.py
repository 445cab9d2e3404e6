"""Who runs what when: the chunks of a window over the ranks of a pipeline, and a simulator of it. Pure Python, no devices.

    python -m comet_pl.parallel.schedule P L CHUNKS     prints and draws the timelines (timeline.py)

Legend: T chunks of a window, t chunk; L layers, i layer; P ranks; n = T / P; R runs of a window, k run.

Cell (t, i) needs the hidden states of (t, i - 1) and the memory of (t - 1, i). The chunks are cut into R contiguous runs, and run k is on
rank k mod P (the next window goes on with the rank after). A rank takes its runs in order; layer by layer it receives memory from the run
before and sends its own to the run after. Backward is the exact mirror: the same cells in reverse order, the gradients of the memory on
the way back; on each rank it starts after the whole forward pass.

    schedule       runs                order in a run; what is handed on                        idle share (equal chunks, no transfer time)
    layer_level    P                   layer by layer over all its chunks; a layer's memory     (P - 1) / (L + P - 1)
    interleaved    T, one chunk each   layer by layer; a layer's memory                         (P - 1) / (n L + P - 1), if L >= P
    chunk_level    P                   chunk by chunk; the next run waits for all layers        (P - 1) / P
    layer_stages   none: rank q owns the q-th block of layers; a chunk's hidden states          (P - 1) / (T + P - 1), if P divides L

layer_level is the paper's pipeline, chunk_level what it compares with. interleaved is ours: n times less idle time for n times as many
messages. layer_stages is only simulated, for comparison.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal

from comet_pl.errors import nearest

SCHEDULES: tuple[str, ...] = ("layer_level", "interleaved", "chunk_level")
SIMULATED: tuple[str, ...] = (*SCHEDULES, "layer_stages")

Kind = Literal["forward", "backward"]
Cell = tuple[int, int]  # (block of chunks, layer)


@dataclass(frozen=True)
class Task:
    """One layer over some chunks, without a pause. start and end are times, in the unit of the simulation's `cell`."""

    rank: int
    kind: Kind
    chunks: tuple[int, int]  # first, last + 1
    layer: int
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What `simulate` found. Tasks stand in the order in which they start."""

    schedule: str
    ranks: int
    layers: int
    tasks: tuple[Task, ...]
    messages: (
        int  # between ranks, both ways; each is one layer's memory or one chunk's hidden states
    )

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


def cut(costs: Sequence[float], parts: int) -> list[tuple[int, int]]:
    """Cuts a list into contiguous, non-empty ranges whose largest sum is as small as possible.

    Among the best cuts it takes an even one: from the left, each range takes its share of what is left, rounded up, wherever that keeps the
    largest sum. Exact for floats too, because it counts in their common unit.

    Returns:
        min(parts, len(costs)) ranges [start, end).

    Raises:
        ValueError: no costs, a cost that is negative or not finite, parts < 1.
    """
    _check_count("parts", parts)
    _check_costs(costs)
    ratios = [cost.as_integer_ratio() for cost in costs]
    unit = math.lcm(*(below for _, below in ratios))
    sums = [0, *accumulate(above * (unit // below) for above, below in ratios)]
    count, parts = len(costs), min(parts, len(costs))

    def furthest(start: int, limit: int) -> int:
        """The last end of a range from `start` that sums to at most `limit`."""
        return bisect_right(sums, sums[start] + limit, start) - 1

    low, high = max(b - a for a, b in pairwise(sums)), sums[-1]
    while (
        low < high
    ):  # bisection, but over sums that occur: fill greedily up to a limit, see which limits would do the same
        limit, start, fullest, next_limit = (low + high) // 2, 0, 0, high
        for _ in range(parts):
            end = furthest(start, limit)
            fullest = max(fullest, sums[end] - sums[start])
            if end < count:
                next_limit = min(next_limit, sums[end + 1] - sums[start])
            start = end
            if start == count:
                break
        low, high = (low, fullest) if start == count else (next_limit, high)

    needed = [0] * (count + 1)  # ranges that the rest from here on needs
    for start in reversed(range(count)):
        needed[start] = 1 + needed[furthest(start, low)]
    ranges, start = [], 0
    for left in range(parts, 0, -1):
        share = -((sums[start] - sums[-1]) // left)
        end = bisect_left(sums, sums[start] + share, start + 1)
        while needed[end] > left - 1:
            end += 1
        end = min(end, furthest(start, low), count - (left - 1))
        ranges.append((start, end))
        start = end
    return ranges


def runs(schedule: str, costs: Sequence[float], ranks: int) -> list[tuple[int, int]]:
    """The runs of a window, as ranges [start, end) of its chunks; run k is on rank (first + k) mod ranks.

    Args:
        schedule: one of SCHEDULES. costs: of each chunk, in any unit (tokens). ranks: P; those beyond the number of chunks get no run.

    Raises:
        ValueError: an unknown schedule, ranks < 1, and as in `cut`.
    """
    _check_schedule(schedule, SCHEDULES)
    _check_count("ranks", ranks)
    _check_costs(costs)
    return (
        [(t, t + 1) for t in range(len(costs))] if schedule == "interleaved" else cut(costs, ranks)
    )


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
    """Plays a window event by event over the graph of what waits for what.

    A sender goes on at once, and receives are posted ahead: a rank waits only for what has not arrived. Messages from one rank to another
    are served one after the other, in the order of sending. The head costs nothing.

    Args:
        schedule: one of SIMULATED. ranks: P. layers: L. chunks: how many equal ones, or the relative cost of each.
        cell: time of a layer's forward pass over a chunk of cost 1; all times are in its unit. backward: how many times as long the
            backward pass takes (3 with recomputation). transfer: time that a layer's memory (layer_stages: a chunk's hidden states) takes
            to the next rank. backward_transfer: the same for the gradients; None: as `transfer`. forward_only: no backward pass.

    Raises:
        ValueError: an unknown schedule, counts < 1, times or costs that cannot be, layer_stages with more ranks than layers.
    """
    _check_schedule(schedule, SIMULATED)
    _check_count("ranks", ranks)
    _check_count("layers", layers)
    if isinstance(chunks, int):
        _check_count("chunks", chunks)
    costs = [1.0] * chunks if isinstance(chunks, int) else list(chunks)
    _check_costs(costs, above_zero=True)
    gradient_transfer = transfer if backward_transfer is None else backward_transfer
    _check_number("cell", cell, above_zero=True)
    _check_number("backward", backward, above_zero=True)
    _check_number("transfer", transfer)
    _check_number("backward_transfer", gradient_transfer)
    if schedule == "layer_stages" and ranks > layers:
        raise ValueError(
            f"ranks: {ranks} given, allowed with layer_stages: at most the {layers} layers"
        )

    forward = _forward(schedule, costs, ranks, layers)
    passes = [forward] if forward_only else [forward, forward.mirror()]
    tasks = _play(
        passes,
        costs,
        {"forward": cell, "backward": backward * cell},
        {"forward": transfer, "backward": gradient_transfer},
    )
    return Timeline(schedule, ranks, layers, tuple(tasks), len(forward.sends) * len(passes))


def compare(ranks: int, layers: int, chunks: int | Sequence[float], **times: Any) -> list[Timeline]:
    """`simulate` for each of SIMULATED that is possible (layer_stages needs ranks <= layers), with the same arguments."""
    return [
        simulate(name, ranks, layers, chunks, **times)
        for name in SIMULATED
        if name != "layer_stages" or ranks <= layers
    ]


def table(timelines: Iterable[Timeline]) -> list[dict[str, Any]]:
    """One row a timeline: schedule, makespan, speedup, idle, messages. Plain types, fit for JSON."""
    names = ("schedule", "makespan", "speedup", "idle", "messages")
    return [{name: getattr(timeline, name) for name in names} for timeline in timelines]


@dataclass(frozen=True)
class _Pass:
    """What the ranks do in one direction; times apart."""

    kind: Kind
    blocks: list[tuple[int, int]]  # ranges of chunks; a layer runs over one without a pause
    orders: list[list[Cell]]  # each rank's cells
    sends: dict[Cell, Cell]  # cell -> the cell of another rank that its message is for
    waits: dict[Cell, Cell]  # cell -> the cell of another rank whose message must have arrived

    def mirror(self) -> _Pass:
        """The backward pass of a forward pass."""
        sends, waits = ({b: a for a, b in pairs.items()} for pairs in (self.sends, self.waits))
        return _Pass("backward", self.blocks, [order[::-1] for order in self.orders], sends, waits)


def _forward(schedule: str, costs: list[float], ranks: int, layers: int) -> _Pass:
    blocks = [(t, t + 1) for t in range(len(costs))]
    if schedule == "layer_stages":
        stages = cut([1] * layers, ranks)
        orders = [[(t, i) for t in range(len(costs)) for i in range(*stage)] for stage in stages]
        sends = {(t, i - 1): (t, i) for i, _ in stages[1:] for t in range(len(costs))}
        return _Pass("forward", blocks, orders, sends, {b: a for a, b in sends.items()})
    dealt = runs(schedule, costs, ranks)
    orders = [[] for _ in range(ranks)]
    if schedule == "chunk_level":
        for order, run in zip(orders, dealt, strict=False):
            order += [(t, i) for t in range(*run) for i in range(layers)]
        sends = {(t - 1, i): (t, i) for t, _ in dealt[1:] for i in range(layers)}
        waits = {
            (t, 0): (t - 1, layers - 1) for t, _ in dealt[1:]
        }  # the last layer's message arrives last
        return _Pass("forward", blocks, orders, sends, waits)
    for k in range(len(dealt)):
        orders[k % ranks] += [(k, i) for i in range(layers)]
    sends = (
        {(k - 1, i): (k, i) for k in range(1, len(dealt)) for i in range(layers)}
        if ranks > 1
        else {}
    )
    return _Pass("forward", dealt, orders, sends, {b: a for a, b in sends.items()})


def _play(
    passes: list[_Pass],
    costs: list[float],
    cell_time: dict[Kind, float],
    message_time: dict[Kind, float],
) -> list[Task]:
    """Every rank goes through its cells of the first pass, then of the second, each as early as it can."""
    ranks, blocks = len(passes[0].orders), passes[0].blocks
    programs = [
        [(one, cell) for one in passes for cell in one.orders[rank]] for rank in range(ranks)
    ]
    rank_of = {cell: rank for rank, order in enumerate(passes[0].orders) for cell in order}
    block_costs = [math.fsum(costs[start:end]) for start, end in blocks]
    tasks: list[Task] = []
    clocks, positions = [0.0] * ranks, [0] * ranks
    links: dict[tuple[int, int], float] = {}  # (from, to): busy until
    arrived: dict[tuple[Kind, Cell], float] = {}  # what a cell has sent: when it is there
    waiting: dict[
        tuple[Kind, Cell], int
    ] = {}  # what a cell has not sent yet: the rank that can't go on without it
    able = deque(range(ranks))
    while able:
        rank = able.popleft()
        while positions[rank] < len(programs[rank]):
            one, cell = programs[rank][positions[rank]]
            start = clocks[rank]
            if cell in one.waits:
                message = one.kind, one.waits[cell]
                if message not in arrived:
                    waiting[message] = rank
                    break
                start = max(start, arrived[message])
            end = clocks[rank] = start + cell_time[one.kind] * block_costs[cell[0]]
            tasks.append(Task(rank, one.kind, blocks[cell[0]], cell[1], start, end))
            positions[rank] += 1
            if cell in one.sends:
                message, link = (one.kind, cell), (rank, rank_of[one.sends[cell]])
                arrived[message] = links[link] = (
                    max(end, links.get(link, 0.0)) + message_time[one.kind]
                )
                if message in waiting:
                    able.append(waiting.pop(message))
    assert not waiting, "ranks wait for each other"
    return sorted(tasks, key=lambda task: (task.start, task.end, task.rank))


def _check_schedule(schedule: str, allowed: tuple[str, ...]) -> None:
    if schedule not in allowed:
        raise ValueError(
            f"schedule: {schedule!r} given, allowed: {', '.join(allowed)}{nearest(str(schedule), allowed)}"
        )


def _check_count(name: str, count: int) -> None:
    if count < 1:
        raise ValueError(f"{name}: {count} given, allowed: a whole number >= 1")


def _check_costs(costs: Sequence[float], above_zero: bool = False) -> None:
    if not costs:
        raise ValueError("chunks: none given, allowed: at least one")
    for cost in costs:
        _check_number("cost of a chunk", cost, above_zero)


def _check_number(name: str, number: float, above_zero: bool = False) -> None:
    if not math.isfinite(number) or number < 0 or (above_zero and number == 0):
        raise ValueError(
            f"{name}: {number} given, allowed: a number {'> 0' if above_zero else '>= 0'}"
        )


if __name__ == "__main__":
    from comet_pl.errors import run_cli
    from comet_pl.parallel.simulate import main

    run_cli(main)
