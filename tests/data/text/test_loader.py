"""Samples cached or streamed, and their batches: exact order and resume; documents apart."""

import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from comet_pl.errors import UserError
from data.batches import Shard
from data.jsonl import UnusableRow, read
from data.text import tokenized as module
from data.text.loader import Cached, Feed, Layout, Streamed
from data.text.tokenized import Sample, Source, cached, encoded, file_facts
from data.tokenizer import train_tokenizer
from tests.support.models import VOCABULARY, tiny


@dataclass
class Numbers(Source):
    """A source of rows {"ids": [...]}; the last token is learned."""

    path: Path
    on_error: str = "skip"
    times: int = 1

    def __post_init__(self):
        self.tokenizer = train_tokenizer(["a b c"], 300)

    def rows(self, complaints):
        return read(self.path, complaints)

    def encode(self, row):
        if not row.get("ids"):
            raise UnusableRow("ids: missing")
        ids = np.array(row["ids"] * self.times, dtype=np.int32)
        return Sample(
            ids,
            np.arange(len(ids)) == len(ids) - 1,
            {"name": row["name"]},
            group="even" if row["name"] % 2 == 0 else "odd",
        )

    def key(self):
        return {"files": file_facts([self.path]), "times": self.times}


@pytest.fixture
def source(tmp_path):
    """97 rows of 2 to 30 tokens, three of them unusable."""
    make = random.Random(0)
    rows = [
        {"name": k, "ids": [make.randrange(VOCABULARY) for _ in range(make.randint(2, 30))]}
        for k in range(97)
    ]
    lines = [json.dumps(row) for row in rows]
    lines[5], lines[40], lines[96] = '{"name": 5}', "{broken", "[]"
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return Numbers(tmp_path / "rows.jsonl")


GOOD = [k for k in range(97) if k not in (5, 40, 96)]
LAYOUTS = {
    "single": Layout(max_length=30, chunk_size=7, stride=3),
    "packed": Layout(max_length=40, chunk_size=7, stride=3, packing="documents"),
    "shared, mixture, strides": Layout(
        40, 7, 3, "shared", "mixture", True, ends=np.arange(VOCABULARY) % 5 == 0
    ),
}


def names(samples):
    return [sample.notes["name"] for sample in samples]


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_come_in_order_and_unusable_ones_are_counted(source, workers):
    complaints = module.Complaints("skip")
    assert names(filter(None, encoded(source, complaints, workers))) == GOOD
    assert complaints.count == 3
    assert complaints.first == f"{source.path}:6: ids: missing"
    assert names(filter(None, encoded(source, complaints, workers, start=90))) == [
        k for k in GOOD if k >= 90
    ]
    with pytest.raises(UserError, match=r"rows.jsonl:6: malformed row: ids: missing"):
        list(encoded(source, module.Complaints("raise"), workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_is_written_once_for_the_same_tokenizer_files_and_options(
    source, tmp_path, workers, monkeypatch, capsys
):
    made = cached(source, tmp_path / "cache", "train", workers)
    assert names(made[k] for k in range(len(made))) == GOOD
    assert made.lengths.tolist() == [len(made[k]) for k in range(len(made))]
    assert made[3].ids.dtype == np.int32 and made[3].learned.dtype == bool
    assert made[3].learned.tolist() == [False] * (len(made[3]) - 1) + [True]
    assert "train: 3 unusable rows skipped; the first" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(module, "encoded", None)  # would fail
        again = cached(source, tmp_path / "cache", "train", workers)
    assert names(again[k] for k in range(len(again))) == GOOD
    assert "3 unusable rows" in capsys.readouterr().out  # told each time
    other = Numbers(source.path, times=2)
    assert cached(other, tmp_path / "cache", "train").lengths.tolist() == [
        2 * n for n in made.lengths
    ]
    with source.path.open("a") as file:
        file.write('{"name": 97, "ids": [1, 2]}\n')
    assert len(cached(source, tmp_path / "cache", "train")) == len(made) + 1
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_a_failed_cache_leaves_nothing(source, tmp_path):
    source.on_error = "raise"
    with pytest.raises(UserError, match="ids: missing"):
        cached(source, tmp_path / "cache", "train")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def feed(source, tmp_path, layout, streaming, batches=60, **more):
    windows = (
        Streamed(source, 32) if streaming else Cached(cached(source, tmp_path / "cache", "train"))
    )
    return Feed(
        windows, LAYOUTS[layout], pad_token=0, batches=batches, batch_size=4, seed=7, **more
    )


def same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert (
            torch.equal(value, other[name])
            if isinstance(value, torch.Tensor)
            else value == other[name]
        ), name


STOPS = [(1, 0), (24, 0), (47, 2), (60, 0)]  # (batches, workers): in each epoch, and at its ends
MORE_STOPS = [(8, 2), (23, 0), (25, 0), (59, 0)]


@pytest.mark.parametrize("stops", [STOPS, pytest.param(MORE_STOPS, marks=pytest.mark.slow)])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_stopped_anywhere_and_resumed_it_goes_on_as_if_never_stopped(
    source, tmp_path, layout, streaming, stops
):
    whole = list(feed(source, tmp_path, layout, streaming))
    assert len(whole) == 60
    states, straight = [], feed(source, tmp_path, layout, streaming)
    for _ in straight:
        states.append(json.loads(json.dumps(straight.state_dict())))
    assert states[-1]["epoch"] >= 1
    for stop, workers in stops:
        resumed = feed(source, tmp_path, layout, streaming, num_workers=workers)
        resumed.load_state_dict(states[stop - 1])
        rest = list(resumed)
        assert len(rest) == 60 - stop
        for one, other in zip(rest, whole[stop:], strict=True):
            same(one, other)


@pytest.mark.parametrize("streaming", [False, True])
def test_ranks_share_the_rows_of_one_order(source, tmp_path, streaming):
    alone = feed(source, tmp_path, "packed", streaming, batches=20)
    ranks = [
        list(feed(source, tmp_path, "packed", streaming, batches=10, shard=Shard(rank, 2)))
        for rank in range(2)
    ]

    def rows(batches):
        return [
            row[mask.bool()].tolist()
            for batch in batches
            for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]

    together = [row for pair in zip(*map(rows, ranks), strict=True) for row in pair]
    if streaming:  # windows end in batches of another size
        assert len(together) == 80
    else:
        epoch = len(LAYOUTS["packed"].rows(alone.windows.samples, np.random.default_rng((7, 0, 0))))
        assert together[:epoch] == rows(alone)[:epoch]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (1, 4), (4, 2)])
def test_resumed_on_another_number_of_ranks_the_order_goes_on(
    source, tmp_path, streaming, before, after
):
    """The same rows in each optimizer step: ranks share a batch of four."""

    def steps(world, state=None):
        """The rows of each step, and what rank 0 would save after it."""
        feeds = [
            feed(source, tmp_path, "packed", streaming, shard=Shard(rank, world))
            for rank in range(world)
        ]
        for one in feeds:
            one.batch_size = 4 // world
            if state is not None:
                one.load_state_dict(state)
        for batches in zip(*feeds, strict=True):
            found = [None] * 4
            for rank, batch in enumerate(batches):
                found[rank::world] = [
                    row[mask.bool()].tolist()
                    for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
                ]
            yield found, feeds[0].state_dict()

    straight = list(steps(before))
    assert straight[-1][1]["epoch"] >= 1
    for stop in (1, 24, 47):
        rest = steps(after, straight[stop - 1][1])
        assert [rows for rows, _ in rest] == [rows for rows, _ in straight[stop:]]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("packing", ["none", "documents"])
def test_epochs_without_a_row_end_in_a_line(source, tmp_path, streaming, packing, monkeypatch):
    monkeypatch.setattr("data.text.loader.EMPTY_EPOCHS", 3)
    monkeypatch.setitem(
        LAYOUTS, "none", Layout(40, 7, 3, packing, weights={"even": 0.0, "odd": 0.0})
    )
    with pytest.raises(UserError, match=r"data.weights: 4 epochs in a row had not a single row"):
        list(feed(source, tmp_path, "none", streaming))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_document_once_an_epoch_and_in_new_company_in_the_next(
    source, tmp_path, layout, streaming
):
    texts = {
        tuple(sample.ids.tolist())
        for sample in filter(None, encoded(source, module.Complaints("skip")))
    }
    seen, orders = {0: Counter(), 1: Counter()}, {0: [], 1: []}
    batches = feed(source, tmp_path, layout, streaming, batches=200)
    for batch in batches:
        if batches.epoch > 1:
            break
        columns = (batch[name] for name in ("input_ids", "labels", "attention_mask", "plans"))
        for ids, labels, mask, (sizes, resets, stride) in zip(*columns, strict=True):
            n = int(mask.sum())
            assert (stride is not None) == ("strides" in layout)
            assert sum(sizes) == n <= LAYOUTS[layout].max_length and len(sizes) == len(resets)
            assert (labels[n:] == -100).all()
            if layout.startswith("shared"):
                assert not any(resets)
                continue
            starts = [sum(sizes[:k]) for k, reset in enumerate(resets) if reset]
            assert starts[0] == 0
            for start, end in zip(starts, [*starts[1:], n], strict=True):
                document = tuple(ids[start:end].tolist())
                seen[batches.epoch][document] += 1
                orders[batches.epoch].append(document)
                assert (labels[start : end - 1] == -100).all()
                assert labels[end - 1] == ids[end - 1]
    if not layout.startswith("shared"):
        for counter in seen.values():
            assert set(counter) == texts
        assert orders[0] != orders[1]


@pytest.mark.parametrize("packing", ["none", "documents"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_mixture_has_each_group_as_often_as_it_says(source, tmp_path, packing, streaming):
    samples = cached(source, tmp_path / "cache", "train")
    if streaming:
        samples = [samples[k] for k in range(len(samples))]
    layout = Layout(40, 7, 3, packing, weights={"even": 2.5, "odd": 0.5})
    counts = Counter()
    for epoch in range(40):
        counts.update(
            number
            for row in layout.rows(samples, np.random.default_rng((0, epoch)))
            for number in row
        )
    even = [counts[k] / 40 for k in range(len(samples)) if samples[k].group == "even"]
    odd = [counts[k] / 40 for k in range(len(samples)) if samples[k].group == "odd"]
    assert {round(value) for value in even} <= {2, 3} and 2.3 < np.mean(even) < 2.7
    assert max(odd) <= 1 and 0.4 < np.mean(odd) < 0.6


def test_a_document_in_a_pack_is_a_document_alone(source, tmp_path):
    model = tiny(chunk_size=7, compression_stride=3)
    batch = next(iter(feed(source, tmp_path, "packed", False)))
    with torch.no_grad():
        packed = model(
            batch["input_ids"],
            attention_mask=batch["attention_mask"],
            chunk_sizes=[list(plan.sizes) for plan in batch["plans"]],
            resets=[list(plan.resets) for plan in batch["plans"]],
        ).logits
        documents = 0
        for row, (ids, plan) in enumerate(zip(batch["input_ids"], batch["plans"], strict=True)):
            sizes, resets, _ = plan
            starts = [k for k, reset in enumerate(resets) if reset]
            for first, last in zip(starts, [*starts[1:], len(sizes)], strict=True):
                span = slice(sum(sizes[:first]), sum(sizes[:last]))
                alone = model(ids[None, span], chunk_sizes=list(sizes[first:last])).logits[0]
                torch.testing.assert_close(packed[row, span], alone, atol=1e-10, rtol=1e-10)
                documents += 1
    assert documents > 4
