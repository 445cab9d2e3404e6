"""Passkey examples: exact length, one whole key, labels, purity, schedule, haystacks, refusals."""

import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from callbacks.passkey_heatmap import PasskeyHeatmap
from comet_pl.config.schema import PasskeyData
from comet_pl.errors import UserError
from data.batches import Shard, length_at
from data.passkey import (
    ANSWER,
    PasskeyBatches,
    PasskeyExamples,
    collate,
    even_depths,
    texts,
)
from data.tokenizer import train_tokenizer
from tests.support.models import tiny

KEY = r" The pass key is (\d{5}) \. Remember it \."
SHAPE = re.compile(rf"(?s)(.*){KEY}(.*) What is the pass key \? The pass key is (\d{{5}})<\|end\|>")
TOKENIZER = train_tokenizer(texts(PasskeyData()), 512)
EXAMPLES = PasskeyExamples(PasskeyData(), TOKENIZER, 0, "train")


def test_the_tokenizer_has_about_one_token_a_word_and_single_digits():
    text = TOKENIZER.decode(EXAMPLES.row(0, 1024))
    assert len(TOKENIZER) == 512
    assert 1024 / len(text.split()) < 1.3
    assert TOKENIZER.convert_ids_to_tokens(TOKENIZER(" 48213")["input_ids"])[1:] == list("48213")
    assert train_tokenizer(texts(PasskeyData()), 512).get_vocab() == TOKENIZER.get_vocab()
    assert TOKENIZER.eos_token == "<|end|>"
    assert TOKENIZER.pad_token == "<|pad|>"


@settings(deadline=None, max_examples=60)
@given(
    index=st.integers(0, 2**40),
    length=st.integers(EXAMPLES.min_length, 3000),
    depth=st.none() | st.floats(0, 1),
)
def test_an_example(index: int, length: int, depth: float | None):
    row = EXAMPLES.row(index, length, depth)
    assert row.shape == (length,)
    assert row.dtype == np.int64
    found = SHAPE.fullmatch(TOKENIZER.decode(row))
    assert found, TOKENIZER.decode(row)
    before, key, after, answer = found.groups()
    assert key == answer
    assert not re.search(r"\d", before + after), "no rival of the key"
    if depth is not None:
        size = length - EXAMPLES.min_length
        place = len(TOKENIZER(before)["input_ids"])
        assert abs(place - depth * size) <= 15, "the nearest end of a sentence"
    assert np.array_equal(row, EXAMPLES.row(index, length, depth)), "a pure function"


def test_depth_0_and_1_are_the_very_ends():
    assert TOKENIZER.decode(EXAMPLES.row(3, 200, 0.0)).startswith(" The pass key is ")
    assert re.search(KEY + r" What is the pass key", TOKENIZER.decode(EXAMPLES.row(3, 200, 1.0)))


def test_index_length_seed_and_split_all_change_an_example():
    others = [EXAMPLES.row(1, 500), EXAMPLES.row(0, 501)[:500]]
    others += [PasskeyExamples(PasskeyData(), TOKENIZER, 1, "train").row(0, 500)]
    others += [
        PasskeyExamples(PasskeyData(), TOKENIZER, 0, split).row(0, 500)
        for split in ("validation", "evaluation")
    ]
    rows = [EXAMPLES.row(0, 500), *others]
    assert len({row.tobytes() for row in rows}) == len(rows)


def test_random_depths_and_keys_are_uniform():
    depths, keys = [], []
    for index in range(400):
        before, key, _, _ = SHAPE.fullmatch(TOKENIZER.decode(EXAMPLES.row(index, 400))).groups()
        depths.append(len(TOKENIZER(before)["input_ids"]) / (400 - EXAMPLES.min_length))
        keys.append(key)
    assert np.abs(np.quantile(depths, [0.1, 0.5, 0.9]) - [0.1, 0.5, 0.9]).max() < 0.1
    digits = np.array([list(key) for key in keys], int)
    assert (np.abs(digits.mean(0) - 4.5) < 0.6).all()


def test_labels_are_the_digits_and_the_stop_token():
    batch = collate([EXAMPLES.row(index, 128) for index in range(3)])
    assert batch["attention_mask"].all()
    assert (batch["labels"] != -100).nonzero()[:, 1].tolist() == [*range(128 - ANSWER, 128)] * 3
    assert torch.equal(batch["labels"][:, -ANSWER:], batch["input_ids"][:, -ANSWER:])
    assert TOKENIZER.decode(batch["labels"][0, -1]) == "<|end|>"


def test_batches_follow_the_schedule():
    data = PasskeyData(
        train_length=256, length_schedule=[[0, 64], [2, 128], [4, 256], [99, 512]], batch_size=4
    )
    module = PasskeyBatches(data, TOKENIZER, seed=0, max_steps=6, accumulate=2)
    batches = list(module.train_loader())
    assert [batch["input_ids"].shape for batch in batches] == [
        (8, length_at(data, step)) for step in range(6)
    ]
    assert [length_at(data, step) for step in (0, 1, 2, 4, 98, 99)] == [64, 64, 128, 256, 256, 512]
    assert torch.equal(
        batches[3]["input_ids"][5], torch.from_numpy(module.training.row(3 * 8 + 5, 128))
    )
    loader = module.train_loader()
    loader.load_state_dict({"epoch": 0, "position": 3 * 8})
    assert all(
        torch.equal(one["input_ids"], other["input_ids"])
        for one, other in zip(loader, batches[3:], strict=True)
    )


def test_validation_batches_hold_every_cell_once():
    data = PasskeyData(
        train_length=64, val_lengths=[64, 128], val_depths=3, val_examples=4, batch_size=5
    )
    module = PasskeyBatches(data, TOKENIZER, seed=0, max_steps=1)
    cells = []
    for batch in module.validation_loader():
        assert batch["input_ids"].shape == (len(batch["depth"]), batch["length"])
        assert (batch["labels"][:, : -batch["logits_to_keep"] + 1] == -100).all()
        assert batch["logits_to_keep"] == ANSWER + 1
        cells += [(batch["length"], depth) for depth in batch["depth"]]
    assert sorted(cells) == sorted(
        [(length, depth) for length in (64, 128) for depth in (0.0, 0.5, 1.0)] * 4
    )
    assert even_depths(1) == [0.5]


def test_ranks_without_a_validation_batch_get_one_that_does_not_count():
    data = PasskeyData(
        train_length=64, val_depths=3, val_examples=2, batch_size=5
    )  # batches of 5 and 1 rows
    module, parts = PasskeyBatches(data, TOKENIZER, seed=0, max_steps=1), []
    for rank in range(3):
        parts.append(list(module.validation_loader(Shard(rank, 3))))
    assert [[len(batch["depth"]) for batch in part] for part in parts] == [[5], [1], [0]]
    (idle,) = parts[2]
    assert idle["length"] == 64
    assert idle["input_ids"].shape == idle["attention_mask"].shape == idle["labels"].shape == (1, 1)
    assert (idle["labels"] == -100).all()
    model, heatmap = tiny(), PasskeyHeatmap(64)
    asked = {
        name: idle[name] for name in ("input_ids", "attention_mask", "labels", "logits_to_keep")
    }
    output = model(**asked, num_items_in_batch=1)
    assert output.loss == 0
    heatmap.on_validation_batch_end(
        None, SimpleNamespace(model=model), {"logits": output.logits}, idle, 0
    )
    assert heatmap.metric.update_called, "or the other ranks wait for it"
    assert heatmap.metric.compute() == []


def book(folder: Path, words: int) -> str:
    path = folder / "book.txt"
    path.write_text(
        "\n".join(f"line {number} of the good old book" for number in range(words // 7)),
        encoding="utf-8",
    )
    return str(path)


def check_book(data: PasskeyData) -> None:
    tokenizer = train_tokenizer(texts(data), 400)
    examples = PasskeyExamples(data, tokenizer, 0, "train")
    rows = [examples.row(index, 300) for index in range(5)]
    assert {row.shape for row in rows} == {(300,)}
    assert len({row.tobytes() for row in rows}) == 5
    text = Path(data.haystack).read_text(encoding="utf-8")
    for row in rows:
        before, key, after, answer = SHAPE.fullmatch(tokenizer.decode(row)).groups()
        assert key == answer
        assert before + after in text, "one window of the file"


def test_a_text_file_as_haystack(tmp_path: Path):
    check_book(PasskeyData(haystack=book(tmp_path, 3000)))


@pytest.mark.slow
def test_a_real_book_as_haystack(shared_data: Path):
    check_book(PasskeyData(haystack=str(shared_data / "books" / "moby_dick.txt")))


def test_a_short_file_is_refused_for_training_and_starts_over_in_evaluation(tmp_path: Path):
    data = PasskeyData(haystack=book(tmp_path, 140))
    tokenizer = train_tokenizer(texts(data), 400)
    message = (
        r"^data.haystack: .*book.txt has \d+ tokens, but data.train_length = 1024 needs \d+ to"
    )
    with pytest.raises(UserError, match=message):
        PasskeyBatches(data, tokenizer, seed=0, max_steps=5)
    examples = PasskeyExamples(data, tokenizer, 0, "evaluation")
    examples.check([5000], "eval.lengths", wrap=True)
    assert examples.repeats(5000)
    assert not examples.repeats(64)
    before, _, after, _ = SHAPE.fullmatch(tokenizer.decode(examples.row(0, 5000))).groups()
    assert (before + after).count("line 7 of") > 2


def test_bad_input_is_one_line(tmp_path: Path):
    (tmp_path / "latin").write_bytes(b"caf\xe9 noir")
    os.mkfifo(tmp_path / "pipe")
    messages = {
        "pipe": "is no file; a text file is needed",
        "none.txt": "cannot be read: No such file",
        "latin": "not a text file in UTF-8",
        ".": "cannot be read: Is a dir",
    }
    for name, message in messages.items():
        with pytest.raises(UserError, match=rf"^data.haystack: .*{message}[^\n]*$"):
            list(texts(PasskeyData(haystack=str(tmp_path / name))))
    for keys, message in (
        ({"train_length": 20}, r"train_length: 20 given, allowed: >= \d+ tokens"),
        ({"length_schedule": [[0, 8]]}, "length_schedule: 8 given"),
        ({"val_lengths": [64, 9]}, "val_lengths: 9 given"),
    ):
        with pytest.raises(UserError, match=f"^data.{message}"):
            PasskeyBatches(PasskeyData(**keys), TOKENIZER, seed=0, max_steps=5)
