"""Chunk layouts against a token-by-token specification written from the rules, one token at a
time."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from comet_pl.model.chunk_layout import NO_STRIDE, RowClock, fixed_chunks, own_layout, plan_row

TEXT, COMPRESSION, READOUT = 0, 1, 2


def specification(tokens, chunk_size, stride, m):
    """Reads one text token at a time, as the definition of open and closed chunks says; returns the
    chunks' own tokens (closed, open)."""
    closed, chunk, fill = [], [], 0
    for _ in range(tokens):
        if fill == chunk_size:  # the chunk is full and more text comes: it closes
            if stride and (fill % stride or chunk[-1][0] == TEXT):
                chunk.append((COMPRESSION, sum(kind == COMPRESSION for kind, _ in chunk)))
            chunk += [(READOUT, k) for k in range(m)]
            closed.append(chunk)
            chunk, fill = [], 0
        elif (
            stride and fill and fill % stride == 0
        ):  # a complete group: its compression token enters before the next text token
            chunk.append((COMPRESSION, fill // stride - 1))
        chunk.append((TEXT, fill))
        fill += 1
    return closed, chunk


strides = st.one_of(st.none(), st.integers(1, 9))


@given(
    tokens=st.integers(0, 60), chunk_size=st.integers(1, 12), stride=strides, m=st.integers(0, 3)
)
def test_layout_is_the_specification(tokens, chunk_size, stride, m):
    closed, last = specification(tokens, chunk_size, stride, m)
    clock = RowClock(stride=stride or NO_STRIDE)
    segments, after = plan_row(clock, tokens, chunk_size=chunk_size, global_size=m, capacity=5)
    ours = [list(zip(*(a.tolist() for a in own_layout(s, m)), strict=True)) for s in segments]
    assert ours == closed + ([last] if last else [])
    assert after.fill == sum(kind == TEXT for kind, _ in last)
    assert after.num_tokens == tokens


@given(
    pieces=st.lists(st.integers(0, 15), max_size=8),
    chunk_size=st.integers(1, 12),
    stride=strides,
    m=st.integers(0, 3),
)
def test_pieces_lay_out_the_whole(pieces, chunk_size, stride, m):
    def tokens(segments):
        return [
            pair
            for s in segments
            for pair in zip(*(a.tolist() for a in own_layout(s, m)), strict=True)
        ]

    clock = RowClock(stride=stride or NO_STRIDE)
    whole, after = plan_row(clock, sum(pieces), chunk_size=chunk_size, global_size=m, capacity=5)
    parts = []
    for piece in pieces:
        segments, clock = plan_row(clock, piece, chunk_size=chunk_size, global_size=m, capacity=5)
        parts += segments
    assert tokens(parts) == tokens(whole)
    assert clock == after


def test_the_example_of_the_specification():
    """C=4, s=2, tokens a b c d e: `a b * c d * [readout]` and then e."""
    segments, _ = plan_row(RowClock(stride=2), 5, chunk_size=4, global_size=1, capacity=8)
    kinds = ["".join("t*r"[k] for k in own_layout(s, 1)[0]) for s in segments]
    assert kinds == ["tt*tt*r", "t"]


def test_a_short_last_group_still_gets_its_token():
    segments, _ = plan_row(
        RowClock(stride=4), 6, chunk_size=99, global_size=2, capacity=8, chunk_sizes=[6]
    )
    kind, index = own_layout(segments[0], 2)
    assert kind.tolist() == [0, 0, 0, 0, 1, 0, 0, 1, 2, 2]
    assert index[np.flatnonzero(kind == COMPRESSION)].tolist() == [0, 1]


def test_fixed_chunks():
    assert fixed_chunks(10, 4) == [4, 4, 2]
    assert fixed_chunks(8, 4) == [4, 4]
    assert fixed_chunks(0, 4) == []
