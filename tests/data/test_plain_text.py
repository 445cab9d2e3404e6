"""data.kind=text: documents cut into rows, packed, cached and streamed."""

import json
import random
from itertools import chain

import pytest

from comet_pl.config.schema import PlainTextData
from comet_pl.errors import UserError
from data import plain_text as module
from data.batches import IGNORED, Shard
from data.encoding import encode
from data.jsonl import Complaints
from data.plain_text import PlainTextBatches, PlainTextSource, validation_rows
from data.text.tokenized import encoded, usable
from data.tokenizer import train_tokenizer

WORDS = "rain sun wind cloud north south sea town evening morning cold warm".split()
TOKENIZER = train_tokenizer([" ".join(WORDS)] * 3, 320)
END = TOKENIZER.eos_token_id


def words(count, seed=0):
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def write(folder, texts):
    (folder / "texts").mkdir(exist_ok=True)
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "texts/train.jsonl").write_text(rows)
    (folder / "texts/validation.jsonl").write_text(rows)
    return folder / "texts"


def source_of(root, tokenizer=TOKENIZER, split="train", **options):
    return PlainTextSource(PlainTextData(root=str(root), **options), tokenizer, split)


def rows_of(source, workers=0, complaints=None):
    complaints = complaints or Complaints("raise")
    samples = source.cut(usable(encoded(source, complaints, workers)))
    return [sample.ids.tolist() for sample in samples]


def joined(rows):
    return list(chain.from_iterable(rows))


def batches(root, **options):
    options = {"max_length": 64, "cache": str(root.parent / "cache"), "batch_size": 2} | options
    data = PlainTextData(root=str(root), **options)
    return PlainTextBatches(data, TOKENIZER, seed=0, chunk_size=16, stride=4, max_steps=10**6)


def epoch(source, world=1, steps=10**6):
    """(ids, labels) of the rows of the first epoch, batch by batch, of all ranks."""
    loaders = [source.train_loader(Shard(rank, world)) for rank in range(world)]
    read = []
    for parts in zip(*loaders, strict=True):
        if loaders[0].epoch or len(read) == steps:
            break
        for part in parts:
            real = part["attention_mask"].bool()
            read += [
                (ids[mask].tolist(), labels[mask].tolist(), plan)
                for ids, labels, mask, plan in zip(
                    part["input_ids"], part["labels"], real, part["plans"], strict=True
                )
            ]
    return read


# ---- rows


@pytest.mark.parametrize("max_length", [4, 16, 61])
def test_a_document_is_cut_into_rows_and_nothing_is_lost(tmp_path, max_length):
    texts = [words(count, count) for count in (1, 3, 10, 40, 41, 42, 43, 44, 300)]
    rows = rows_of(source_of(write(tmp_path, texts), max_length=max_length))
    whole = [[*encode(TOKENIZER, text, True), END] for text in texts]
    assert joined(rows) == joined(whole)
    assert all(2 <= len(row) <= max_length for row in rows)
    for document in whole:
        parts = []
        while joined(parts) != document:
            parts.append(rows.pop(0))
        short = [len(part) for part in parts if len(part) < max_length]
        assert len(short) <= 1 or short == [max_length - 1, 2]
        assert len(parts) == -(-len(document) // max_length)


def test_every_token_is_learnt_but_a_rows_first(tmp_path):
    source = source_of(write(tmp_path, [words(50)]), max_length=16)
    for sample in source.cut(usable(encoded(source, Complaints("raise")))):
        ids, labels = sample.pair()
        assert ids.tolist() == labels.tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_pieces_of_a_long_document_are_joined(tmp_path, monkeypatch, workers):
    root = write(tmp_path, [words(5), words(3000), words(7), words(1000)])
    whole = rows_of(source_of(root, max_length=4))
    monkeypatch.setattr(module, "PIECE", 1)
    source = source_of(root, max_length=4)
    assert len(list(source.rows(Complaints("raise")))) > 50
    assert rows_of(source, workers) == whole


def test_begin_and_end_are_the_tokenizers(tmp_path, monkeypatch):
    root = write(tmp_path, [words(30)])
    monkeypatch.setattr(module, "text_start", lambda tokenizer: [2])
    rows = rows_of(source_of(root, max_length=16))
    assert joined(rows) == [2, *encode(TOKENIZER, words(30), True), END]
    # a single document's part for training does not end, that for validation does not begin
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": words(30)}))
    train = joined(rows_of(source_of(tmp_path / "one.jsonl")))
    validation = joined(rows_of(source_of(tmp_path / "one.jsonl", split="validation")))
    assert train[0] == 2 and train[-1] != END and validation[0] != 2 and validation[-1] == END
    text = TOKENIZER.decode(train[1:]) + TOKENIZER.decode(validation[:-1])
    assert text == words(30)
    endless = train_tokenizer([words(30)], 300)
    endless.eos_token = None
    assert END not in joined(rows_of(source_of(root, endless, max_length=16)))


def test_texts_without_a_token_are_counted(tmp_path, capsys):
    root = write(tmp_path, ["", words(20), ""])
    source = batches(root)
    assert len(epoch(source)) == 2  # the first row fills the batch
    out = capsys.readouterr().out
    assert "train: no text, or a single token: left out: 2 rows" in out
    count = len(encode(TOKENIZER, words(20))) + 1
    line = f"train: {count} tokens in rows of up to 64: 1, shorter than a chunk: 0"
    assert line in out
    assert len(validation_rows(source_of(root, split="validation"), None)) == 1
    assert "validation: no text, or a single token: left out: 2 rows" in capsys.readouterr().out


# ---- batches


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_packed_rows_hold_the_content_of_the_others(tmp_path, streaming, workers):
    texts = [words(count, count) for count in range(3, 43, 2)]
    root = write(tmp_path, texts)
    rows = [(*row,) for row in rows_of(source_of(root, max_length=64))]
    options = {"streaming": streaming, "num_workers": workers, "shuffle_window": 7}
    options |= {"packing": "documents", "chunk_plan": "mixture", "dynamic_stride": True}
    packed = epoch(batches(root, batch_size=1, **options))
    assert len(packed) < len(rows)
    held = []
    for ids, labels, plan in packed:
        resets = [n for n, reset in enumerate(plan.resets) if reset]
        starts = [sum(plan.sizes[:n]) for n in resets]
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            held.append((*ids[start:end],))
            assert labels[start] == IGNORED or start == 0
            assert labels[start + 1 : end] == ids[start + 1 : end]
    assert sorted(held) == sorted(rows)
    again = epoch(batches(root, batch_size=1, **options | {"num_workers": 0}))
    assert [row[0] for row in again] == [row[0] for row in packed]


@pytest.mark.parametrize("packing", ["none", "documents"])
def test_a_long_document_is_streamed_and_goes_on_anywhere(tmp_path, monkeypatch, packing):
    monkeypatch.setattr(module, "PIECE", 1)
    root = write(tmp_path, [words(4), words(900), words(4), words(300)])
    options = {"max_length": 6, "packing": packing, "streaming": True, "shuffle_window": 7}
    whole = list(batches(root, **options, num_workers=2).train_loader().windows.window(0, 0))
    source = batches(root, **options)
    assert [a.ids.tolist() for a in source.windows.window(0, 0)] == [a.ids.tolist() for a in whole]
    tokens = [ids for number in range(99) for ids in source.windows.window(0, number) or ()]
    expected = joined([*encode(TOKENIZER, words(n), True), END] for n in (4, 900, 4, 300))
    assert joined(sample.ids.tolist() for sample in tokens) == expected
    assert all(2 <= len(sample) <= 6 for sample in tokens)
    alone = source.train_loader()
    rows = [batch["input_ids"].tolist() for _, batch in zip(range(150), alone, strict=False)]
    begun = batches(root, **options).train_loader()
    for _, batch in zip(range(71), begun, strict=False):
        assert batch["input_ids"].tolist() == rows.pop(0)
    resumed = batches(root, **options).train_loader()
    resumed.load_state_dict(begun.state_dict())
    for batch in resumed:
        if not rows:
            break
        assert batch["input_ids"].tolist() == rows.pop(0)


@pytest.mark.parametrize("options", [{}, {"streaming": True, "shuffle_window": 3}])
def test_ranks_are_dealt_the_rows_of_one(tmp_path, options):
    source = batches(write(tmp_path, [words(30 + n, n) for n in range(11)]), **options)
    alone = [row[0] for row in epoch(source)]
    shared = [row[0] for row in epoch(source, world=2)]
    if not options:
        assert {*map(tuple, alone)} == {*map(tuple, shared)}
    assert sorted(alone[:4]) == sorted(shared[:4])


def test_the_cache_is_used_until_something_changes(tmp_path, monkeypatch):
    root = write(tmp_path, [words(90)])
    batches(root)
    made = []
    encode_row = PlainTextSource.encode
    monkeypatch.setattr(
        PlainTextSource, "encode", lambda self, row: made.append(1) or encode_row(self, row)
    )
    batches(root)
    assert not made
    batches(root, max_length=32)
    assert len(made) == 1
    write(tmp_path, [words(91)])
    batches(root)
    assert len(made) == 2


def test_validation_takes_the_first_rows(tmp_path):
    root = write(tmp_path, [words(200), words(300)])
    whole = rows_of(source_of(root, max_length=64))
    for count in (3, None):
        rows = batches(root, val_examples=count).validation_rows()
        assert [ids.tolist() for ids, _ in rows] == whole[:count]


# ---- mistakes, and what is told


def test_no_root_is_one_line():
    with pytest.raises(UserError, match=r"^data.root: missing, give the texts: data.root=PATH"):
        PlainTextBatches.files(PlainTextData())


@pytest.mark.parametrize("streaming", [False, True])
def test_texts_too_short_for_a_row(tmp_path, streaming):
    root = write(tmp_path, ["", ""])
    with pytest.raises(UserError, match=r"has no training rows of two tokens or more"):
        batches(root, streaming=streaming)
    with pytest.raises(UserError, match=r"has no validation rows of two tokens or more; data.val"):
        validation_rows(source_of(root, split="validation"), 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_malformed_rows_are_skipped_and_counted(tmp_path, capsys, workers):
    root = write(tmp_path, [words(20)])
    file = root / "train.jsonl"
    file.write_text(file.read_text() + '{"text": 1}\n{"title": "x"}\n')
    source = batches(root, on_error="skip", num_workers=workers)
    assert len(source.windows.samples) == 1
    line = f"train: 2 unusable rows skipped; the first: {file}:2: text: 1 given, text is needed"
    assert line in capsys.readouterr().out


def test_a_single_document_and_files_that_are_not_read_are_told(tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text(words(300))
    (tmp_path / "texts/b.md").touch()
    batches(tmp_path / "texts")
    out = capsys.readouterr().out
    assert f"{tmp_path}/texts: not read: b.md\n" in out
    line = "a single document: the last 10% of its characters are for validation"
    assert f"{tmp_path}/texts: {line}\n" in out


def test_a_tokenizer_is_trained_on_the_training_documents_alone(tmp_path, monkeypatch):
    root = write(tmp_path, [words(30), words(40)])
    (root / "validation.jsonl").write_text('{"text": "unseen"}\n')
    data = PlainTextData(root=str(root))
    assert list(PlainTextBatches.texts(data)) == [words(30), words(40)]
    monkeypatch.setattr(module, "TOKENIZER_CHARACTERS", 10)
    assert list(PlainTextBatches.texts(data)) == [words(30)]


def test_real_books(shared_data, tmp_path):
    source = source_of(shared_data / "books", max_length=2048)
    for _, row in source.rows(Complaints("raise")):
        assert row["text"]
        break
    validation = source_of(shared_data / "books", split="validation", max_length=2048)
    rows = validation_rows(validation, 2)
    assert [len(ids) for ids, _ in rows] == [2048, 2048]
