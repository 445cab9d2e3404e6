"""Chunk plans: sizes, places, the authors' mixtures, sentence ends."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.text.chunk_plans import (
    KINDS,
    SENTENCE_ENDS,
    chunk_plan,
    draw_kind,
    draw_stride,
    sentence_ends,
)
from data.tokenizer import train_tokenizer


def generator(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@st.composite
def texts(draw):
    """(n, C, M, ends, seed): n around C and M too, texts longer than M included."""
    size, chunks = draw(st.integers(1, 40)), draw(st.integers(1, 20))
    length = size * chunks + draw(st.integers(0, size - 1))
    n = draw(st.integers(0, 2 * length) | st.sampled_from([size, size + 1, length, length - 1]))
    ends = generator(draw(st.integers(0, 99))).random(n) < draw(
        st.sampled_from([0.0, 0.05, 0.3, 1.0])
    )
    return n, size, length, ends, draw(st.integers(0, 99))


@given(kind=st.sampled_from([*KINDS, "mixture"]), text=texts())
def test_every_plan_covers_the_text_in_chunks_of_at_most_c(kind: str, text):
    n, size, length, ends, seed = text
    plan = chunk_plan(kind, n, size, length, generator(seed), ends)
    assert sum(plan) == n and all(type(one) is int and 1 <= one <= size for one in plan)
    assert plan == chunk_plan(kind, n, size, length, generator(seed), ends.tolist())


@given(text=texts())
def test_fixed_and_right_aligned_have_one_short_chunk(text):
    n, size, length, _, seed = text
    fixed, right = (
        chunk_plan(kind, n, size, length, generator(seed)) for kind in ("fixed", "right_aligned")
    )
    assert len(fixed) == math.ceil(n / size) and all(one == size for one in fixed[:-1])
    assert right == fixed[::-1]


@given(text=texts())
def test_uniform_chunks_differ_by_one_token_at_most(text):
    n, size, length, _, seed = text
    plan = chunk_plan("uniform", n, size, length, generator(seed))
    assert len(plan) == min(n, math.ceil(max(n, length) / size))
    assert not plan or max(plan) - min(plan) <= 1


@given(text=texts())
def test_random_chunks_are_as_many_and_as_long_as_allowed(text):
    n, size, length, _, seed = text
    plan = chunk_plan("random", n, size, length, generator(seed))
    fewest = math.ceil(n / size)
    assert fewest <= len(plan) <= max(fewest, math.ceil(length / size))
    assert not plan or min(plan) >= min(4, n // fewest)


def test_random_counts_and_sizes_are_spread():
    plans = [chunk_plan("random", 100, 32, 256, generator(1, index)) for index in range(2000)]
    counts = np.bincount([len(plan) for plan in plans], minlength=9)
    assert counts[:4].sum() == 0 and len(counts) == 9  # from ceil(100 / 32) to 256 / 32
    assert counts[4:] == pytest.approx(400, abs=80)
    assert {size for plan in plans for size in plan} == set(range(4, 33))
    places = np.array([plan for plan in plans if len(plan) == 6])
    assert places.mean(0) == pytest.approx(
        100 / 6, abs=2
    )  # no place in the text has longer chunks than another


@given(text=texts())
def test_sentence_plans_end_at_the_last_end_within_c(text):
    n, size, length, ends, seed = text
    plan = chunk_plan("sentence", n, size, length, generator(seed), ends)
    start = 0
    for one in plan[:-1]:
        within = np.flatnonzero(ends[start : start + size])
        assert one == (within[-1] + 1 if len(within) else size)
        start += one


@pytest.mark.parametrize(
    ("n", "weights"),
    [
        (63, [0.8, 0.1, 0.1, 0, 0]),
        (64, [0.6, 0.1, 0.2, 0.05, 0.05]),
        (767, [0.6, 0.1, 0.2, 0.05, 0.05]),
        (768, [0.6, 0.1, 0.1, 0.2, 0]),
    ],
)
def test_the_mixture_has_the_authors_weights(n: int, weights: list[float]):
    trials = 4000
    drawn = [draw_kind(n, 64, 1024, generator(0, index)) for index in range(trials)]
    counts = np.array([drawn.count(kind) for kind in KINDS])
    expected = trials * np.array(weights)
    assert (counts[expected == 0] == 0).all()
    used = expected > 0
    assert (
        (counts - expected)[used] ** 2 / expected[used]
    ).sum() < 18.5  # chi-square, 4 degrees of freedom: 1 in 1,000


def test_the_mixture_is_a_draw_and_its_plan():
    ends = np.ones(600, dtype=bool)
    for index in range(50):
        random = generator(0, index)
        kind = draw_kind(600, 64, 1024, random)
        assert chunk_plan("mixture", 600, 64, 1024, generator(0, index), ends) == chunk_plan(
            kind, 600, 64, 1024, random, ends
        )


@pytest.mark.parametrize(
    ("stride", "choices"),
    [
        (8, [8, 16, 32, 64, 128]),
        (100, [100]),
        (128, [128]),
        (300, [300]),
        (3, [3, 6, 12, 24, 48, 96]),
    ],
)
def test_strides_double_and_the_shortest_is_the_likeliest(stride: int, choices: list[int]):
    trials = 3000
    drawn = [draw_stride(stride, generator(0, index)) for index in range(trials)]
    weights = np.arange(len(choices), 0, -1) ** 2
    expected = trials * weights / weights.sum()
    counts = np.array([drawn.count(choice) for choice in choices])
    assert counts.sum() == trials
    assert (
        (counts - expected) ** 2 / expected
    ).sum() < 20.6  # chi-square, 5 degrees of freedom: 1 in 1,000
    assert draw_stride(stride, generator(1), longest=stride) == stride


def test_what_is_refused():
    random = generator(0)
    for arguments, message in [
        (("fixd", 5, 2, 8), "kind: 'fixd' given"),
        (("fixed", -1, 2, 8), "n >= 0"),
        (("fixed", 5, 0, 8), "chunk_size >= 1"),
        (("sentence", 5, 2, 8), "ends: none given"),
        (("mixture", 5, 2, 8), "ends: none given"),
    ]:
        with pytest.raises(ValueError, match=message):
            chunk_plan(*arguments, random)
    with pytest.raises(ValueError, match="ends: 4 given, sentence needs one for each of 5"):
        chunk_plan("sentence", 5, 2, 8, random, [True] * 4)
    with pytest.raises(ValueError, match="stride: 0"):
        draw_stride(0, random)


def test_sentence_ends_of_a_tokenizer_of_our_own():
    text = "One, two. Three\n\nfour 四。"
    tokenizer = train_tokenizer([text * 200], 400)
    ends = sentence_ends(tokenizer)
    assert ends.shape == (len(tokenizer),) and ends.dtype == bool
    assert ends[tokenizer.eos_token_id] and not ends[tokenizer.pad_token_id]
    pieces = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    found = [piece for piece, end in zip(pieces, ends, strict=True) if end]
    assert (
        {".", ",", "\n"} <= set(found)
        and "<|user|>" not in found
        and not any(piece.isalnum() for piece in found)
    )
    ids = tokenizer(text + "<|end|>")["input_ids"]
    plan = chunk_plan("sentence", len(ids), 8, 64, generator(0), ends[ids])
    starts = np.cumsum([0, *plan])
    parts = [tokenizer.decode(ids[start:end]) for start, end in pairwise(starts)]
    assert len(parts) > 1 and "".join(parts) == text + "<|end|>"
    assert all(part.endswith((*SENTENCE_ENDS, "<|end|>")) for part in parts)
