"""Whole words of a tokenizer from scratch."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import tokenizer as module
from data.encoding import pieces
from data.tokenizer import train_tokenizer

LINE = (
    "2011-05-31 14:05 purchase 6 x 85123A at 2.55\n\nOn which day is the last purchase of 85123A?"
)
WORDS = train_tokenizer([LINE] * 5, 400, whole_words=True)


@given(st.text(max_size=60))
def test_whole_words_lose_nothing(text: str):
    ids = WORDS(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert WORDS.decode(ids) == text


def test_a_number_is_one_token_with_and_without_a_space_before_it():
    texts = ("2011-05-31 at 2.55\n", "85123A", "purchase of 85123A?", "14:05")
    tokens = [WORDS.tokenize(text) for text in texts]
    assert [len(found) for found in tokens] == [6, 1, 6, 1]  # a day is one token, and so is a space
    assert tokens[1][0] == tokens[2][4]


@pytest.mark.parametrize("whole_words", [False, True])
def test_a_long_text_in_pieces_makes_the_same_tokenizer(monkeypatch, whole_words):
    draw = random.Random(0)
    text = "".join(draw.choice(LINE.split()) + draw.choice([" ", "\n", "  "]) for _ in range(2000))
    whole = train_tokenizer([text], 330, whole_words=whole_words).backend_tokenizer.to_str()
    monkeypatch.setattr(module, "PIECE", 50)
    assert train_tokenizer([text], 330, whole_words=whole_words).backend_tokenizer.to_str() == whole
    assert "".join(pieces(["x" * 1000], module.PIECE)) == "x" * 1000
