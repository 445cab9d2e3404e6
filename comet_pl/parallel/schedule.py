"""Which rank of a pipeline computes which chunks of a window, and when. Pure Python.

Legend: T chunks of a window, t chunk; L layers, i layer; P ranks; n = T / P; k span.

Cell (t, i) needs the hidden states of (t, i - 1) and the memory of (t - 1, i). The chunks are cut
into contiguous spans, and span k is on rank k mod P; the next window continues with the rank after.
A rank takes its spans in order; layer by layer it receives memory from the span before and sends
its own to the span after. Backward is the mirror: the same cells in reverse order, with gradients
of the memory on the way back; it starts on each rank after that rank's whole forward pass.

    schedule      spans               order in a span; what is sent      idle share
    layer_level   P                   layer by layer; a layer's memory   (P - 1) / (L + P - 1)
    interleaved   T, one chunk each   layer by layer; a layer's memory   (P - 1) / (n L + P - 1)
    chunk_level   P                   chunk by chunk; all layers         (P - 1) / P
    layer_stages  rank q owns a block of layers; a chunk's hidden states (P - 1) / (T + P - 1)

The shares are for equal chunks without transfer time; interleaved needs L >= P, layer_stages that P
divides L. layer_level is the paper's pipeline, chunk_level what it compares with. interleaved is
ours: n times less idle time for n times as many messages. layer_stages is only simulated
(simulate.py).
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise

from comet_pl.errors import nearest

SCHEDULES: tuple[str, ...] = ("layer_level", "interleaved", "chunk_level")


def cut(costs: Sequence[float], parts: int) -> list[tuple[int, int]]:
    """Cuts a list into contiguous, non-empty ranges whose largest sum is as small as possible.

    Of the best cuts it is an even one: from the left, each range takes its share of the rest,
    rounded up, wherever that keeps the largest sum. Sums are exact for floats too, as they are
    counted in the costs' common unit.

    Returns:
        min(parts, len(costs)) ranges [start, end).

    Raises:
        ValueError: no costs, a cost that is negative or not finite, parts < 1.
    """
    check_count("parts", parts)
    check_costs(costs)
    ratios = [cost.as_integer_ratio() for cost in costs]
    unit = math.lcm(*(below for _, below in ratios))
    sums = [0, *accumulate(above * (unit // below) for above, below in ratios)]
    count, parts = len(costs), min(parts, len(costs))

    def furthest(start: int, limit: int) -> int:
        """The last end of a range from `start` that sums to at most `limit`."""
        return bisect_right(sums, sums[start] + limit, start) - 1

    low, high = max(b - a for a, b in pairwise(sums)), sums[-1]
    # Bisection over the sums that occur: fill ranges greedily up to a limit, and see which limits
    # would fill them alike.
    while low < high:
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


def spans(schedule: str, costs: Sequence[float], ranks: int) -> list[tuple[int, int]]:
    """The spans [start, end) of a window's chunks; span k is on rank (first + k) mod ranks.

    Args:
        schedule: one of SCHEDULES.
        costs: of each chunk, in any unit (tokens).
        ranks: P; those beyond the number of chunks get no span.

    Raises:
        ValueError: an unknown schedule, ranks < 1, and as in `cut`.
    """
    check_schedule(schedule, SCHEDULES)
    check_count("ranks", ranks)
    check_costs(costs)
    singles = [(t, t + 1) for t in range(len(costs))]
    return singles if schedule == "interleaved" else cut(costs, ranks)


def check_schedule(schedule: str, allowed: tuple[str, ...]) -> None:
    if schedule not in allowed:
        raise ValueError(
            f"schedule: {schedule!r} given, allowed: {', '.join(allowed)}"
            f"{nearest(str(schedule), allowed)}"
        )


def check_count(name: str, count: int) -> None:
    if count < 1:
        raise ValueError(f"{name}: {count} given, allowed: a whole number >= 1")


def check_costs(costs: Sequence[float], above_zero: bool = False) -> None:
    if not costs:
        raise ValueError("chunks: none given, allowed: at least one")
    for cost in costs:
        check_number("cost of a chunk", cost, above_zero)


def check_number(name: str, number: float, above_zero: bool = False) -> None:
    if not math.isfinite(number) or number < 0 or (above_zero and number == 0):
        bound = "> 0" if above_zero else ">= 0"
        raise ValueError(f"{name}: {number} given, allowed: a number {bound}")
