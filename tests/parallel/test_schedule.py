"""Cuts of a window into spans: the best of all cuts, even ones, quick ones; mistakes of numbers."""

import itertools
import math
import time
import timeit
from fractions import Fraction
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comet_pl.parallel.schedule import cut, spans
from comet_pl.parallel.simulate import simulate


@settings(max_examples=300)
@given(
    costs=st.lists(st.integers(0, 9), min_size=1, max_size=9)
    | st.lists(st.floats(0, 10), min_size=1, max_size=6),
    parts=st.integers(1, 9),
)
def test_cut_is_the_best_of_all_cuts(costs, parts):
    exact = [Fraction(cost) for cost in costs]  # float sums would depend on their order

    def largest(ends):
        return max(sum(exact[a:b], Fraction()) for a, b in itertools.pairwise(ends))

    ranges = cut(costs, parts)
    assert len(ranges) == min(parts, len(costs)) and all(start < end for start, end in ranges)
    assert [t for start, end in ranges for t in range(start, end)] == list(range(len(costs)))
    cuts = itertools.combinations(range(1, len(exact)), len(ranges) - 1)
    best = min(largest((0, *ends, len(exact))) for ends in cuts)
    assert largest((0, *(end for _, end in ranges))) == best


@given(count=st.integers(1, 200), parts=st.integers(1, 70), cost=st.sampled_from([1, 0.1, 2176]))
def test_equal_costs_are_cut_evenly_and_the_first_parts_take_the_rest(count, parts, cost):
    parts = min(parts, count)
    sizes = [end - start for start, end in cut([cost] * count, parts)]
    assert sizes == [count // parts + (k < count % parts) for k in range(parts)]


@pytest.mark.parametrize(
    ("costs", "parts", "expected"),
    [
        # A short last chunk goes where it does not count.
        ([4, 4, 4, 4, 4, 4, 1], 3, [(0, 2), (2, 4), (4, 7)]),
        ([9, 1, 1, 1, 1], 3, [(0, 1), (1, 3), (3, 5)]),
        ([1, 1, 1, 1, 9], 3, [(0, 3), (3, 4), (4, 5)]),
        ([0, 0, 0], 2, [(0, 1), (1, 3)]),
        ([0.1, 0.2, 0.3], 2, [(0, 2), (2, 3)]),
    ],
)
def test_cut_by_hand(costs, parts, expected):
    assert cut(costs, parts) == expected


def test_spans_of_each_schedule():
    costs = [5, 1, 1, 1, 2]
    assert spans("layer_level", costs, 2) == spans("chunk_level", costs, 2) == [(0, 1), (1, 5)]
    assert spans("interleaved", costs, 2) == [(t, t + 1) for t in range(5)]
    assert len(spans("layer_level", costs, 9)) == 5


def test_quick_enough_to_plan_every_window():
    """A window is cut once a training step. Bounds are wide."""

    def seconds(what, *arguments):
        return min(timeit.repeat(lambda: what(*arguments), time.process_time, number=1, repeat=3))

    uneven = [2048 + (37 * t) % 101 for t in range(512)]
    assert seconds(cut, uneven[:64], 8) < 0.005
    assert seconds(cut, uneven, 64) < 0.05
    assert seconds(simulate, "interleaved", 64, 36, 64) < 0.5


level = partial(partial, simulate, "layer_level")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (level(0, 4, 4), "ranks: 0 given, allowed: a whole number >= 1"),
        (level(2, 0, 4), "layers: 0 given"),
        (level(2, 4, 0), "chunks: 0 given"),
        (level(2, 4, []), "chunks: none given"),
        (level(2, 4, [1, 0]), "cost of a chunk: 0 given, allowed: a number > 0"),
        (level(2, 4, 4, transfer=-1), "transfer: -1 given, allowed: a number >= 0"),
        (level(2, 4, 4, backward_transfer=math.nan), "backward_transfer: nan given"),
        (level(2, 4, 4, cell=0), "cell: 0 given, allowed: a number > 0"),
        (level(2, 4, 4, backward=math.inf), "backward: inf given"),
        (
            partial(simulate, "layer_stages", 5, 4, 4),
            "ranks: 5 given, allowed with layer_stages: at most the 4 layers",
        ),
        (
            partial(simulate, "layer-level", 2, 4, 4),
            r"'layer-level' given, allowed: .*layer_stages \(did you mean layer_level\?\)",
        ),
        (
            partial(spans, "layer_stages", [1], 2),
            "'layer_stages' given, allowed: layer_level, interleaved, chunk_level",
        ),
        (partial(spans, "interleaved", [1], 0), "ranks: 0 given"),
        (partial(cut, [1, 2], 0), "parts: 0 given"),
        (partial(cut, [], 1), "chunks: none given"),
        (partial(cut, [1, -1], 1), "cost of a chunk: -1 given, allowed: a number >= 0"),
    ],
)
def test_impossible_numbers_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
