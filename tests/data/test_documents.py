"""Documents out of files and the hub, and their splits."""

import gzip
import json
import lzma

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from comet_pl.errors import UserError
from data import documents as module
from data.documents import Texts, digest_of, files, not_read, text_of
from data.jsonl import Complaints, UnusableRow

TEXTS = ["It rained all day.", "Nobody saw the dög\r\nin the night.", "The sun came out."]
PACK = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress}
NONE = Complaints("raise")


def write(path, texts=TEXTS, key="text"):
    """A file of the kind and packing that its name says; a .txt file has the first text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        table = pyarrow.table({"number": list(range(len(texts))), key: texts})
        pyarrow.parquet.write_table(table, path)
        return path
    rows = "".join(json.dumps({"number": n, key: text}) + "\n" for n, text in enumerate(texts))
    content = texts[0] if ".txt" in path.suffixes else rows
    packing = path.suffix if path.suffix in PACK else ""
    path.write_bytes(PACK[packing](content.encode()))
    return path


def read(root, split="train", complaints=NONE, **options):
    """The texts of a split."""
    rows = Texts(str(root), split, **options).rows(complaints, 10**6)
    return [row["text"] for _, row in rows]


def both(root, **options):
    return read(root, "train", **options), read(root, "validation", **options)


# ---- files


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
def test_a_file_plain_or_packed(tmp_path, kind, packing):
    path = write(tmp_path / f"a{kind}{packing}")
    found = list(module.documents(path, "text", NONE))
    texts = TEXTS if kind == ".jsonl" else TEXTS[:1]
    assert ["".join(document.parts()) for document in found] == texts
    assert [document.digest for document in found] == [digest_of([text]) for text in texts]
    assert [one.place for one in found] == (
        [f"{path}:{n}" for n in (1, 2, 3)] if kind == ".jsonl" else [str(path)]
    )


def test_a_parquet_file_with_another_column(tmp_path):
    path = write(tmp_path / "a.parquet", key="body")
    found = list(module.documents(path, "body", NONE))
    assert [document.text for document in found] == TEXTS
    assert found[1].place == f"{path}:2"


def test_a_folder_is_read_in_the_order_of_names_and_folders_too(tmp_path):
    write(tmp_path / "c.txt", ["first"])
    write(tmp_path / "b/x.jsonl", ["second", "third"])
    write(tmp_path / "a.parquet", ["fourth"])
    write(tmp_path / "b/x2.txt", ["fifth"])
    write(tmp_path / ".git/z.txt", ["hidden"])
    (tmp_path / "notes.md").touch()
    names = [str(path.relative_to(tmp_path)) for path in files(str(tmp_path), "train")[0]]
    assert names == ["a.parquet", "b/x.jsonl", "b/x2.txt", "c.txt"]
    assert not_read(str(tmp_path)) == ["notes.md"]
    train, validation = both(tmp_path, val_share=0.4)
    assert sorted(train + validation) == ["fifth", "first", "fourth", "second", "third"]


@pytest.mark.parametrize(
    "names",
    [
        ("train.txt", "validation.jsonl.gz"),
        ("train-00000-of-00001.parquet", "validation.txt"),
        ("train/a.txt", "validation/b/a.parquet"),
    ],
)
def test_splits_by_name(tmp_path, names):
    train, validation = (write(tmp_path / name, [name]) for name in names)
    write(tmp_path / "test.txt")
    assert files(str(tmp_path), "train") == ([train], False)
    assert files(str(tmp_path), "validation") == ([validation], False)
    assert both(tmp_path) == ([names[0]], [names[1]])
    assert not_read(str(tmp_path)) == ["test.txt"]


@pytest.mark.parametrize("name", ["train.txt", "test.jsonl", "validation/a.txt"])
def test_one_split_by_name_beside_other_files_is_refused(tmp_path, name):
    write(tmp_path / name)
    assert read(tmp_path)
    write(tmp_path / "other.txt")
    split = name.partition(".")[0].partition("/")[0]
    with pytest.raises(UserError, match=rf"holds {split} beside other files, so that train and"):
        read(tmp_path)


# ---- splits


def test_equal_texts_are_in_one_split_whatever_their_order_and_file(tmp_path):
    texts = [f"text {n}" for n in range(200)]
    train, validation = both(write(tmp_path / "a.jsonl", texts), val_share=0.2)
    assert sorted(train + validation) == sorted(texts)
    assert 20 <= len(validation) <= 60
    again = both(write(tmp_path / "b.parquet", texts[::-1] + texts), val_share=0.2)
    assert sorted(again[1]) == sorted(validation * 2)
    assert not {*again[0]} & {*again[1]}


@pytest.mark.parametrize("share", [1e-9, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("count", [2, 3])
def test_each_split_has_a_document(tmp_path, share, count):
    train, validation = both(write(tmp_path / "a.jsonl", TEXTS[:count]), val_share=share)
    assert train and validation and sorted(train + validation) == sorted(TEXTS[:count])


def test_no_share_leaves_all_for_training(tmp_path):
    assert both(write(tmp_path / "a.jsonl"), val_share=0.0) == (TEXTS, [])
    assert both(write(tmp_path / "a.txt"), val_share=0.0) == (TEXTS[:1], [])


def test_a_single_document_is_cut(tmp_path):
    text = "The rain in the north. " * 100
    for path in (write(tmp_path / "a.txt", [text]), write(tmp_path / "a.jsonl", [text, text])):
        train, validation = both(path, val_share=0.25)
        assert {*train} == {text[:1725]} and {*validation} == {text[1725:]}
    rows = Texts(str(path), "train").rows(NONE, 500)
    marks = [(row["begins"], row["ends"], row["last"]) for _, row in rows]
    assert marks[0] == (True, False, False) and marks[-1] == (False, False, True)
    rows = Texts(str(path), "validation").rows(NONE, 10**6)
    assert [(row["begins"], row["ends"], row["last"]) for _, row in rows] == [(0, 1, 1)] * 2


def test_pieces_are_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 7)
    text = "Wörter und 日本語 " * 300
    rows = [row for _, row in Texts(str(write(tmp_path / "a.txt", [text])), "train").rows(NONE, 99)]
    assert "".join(row["text"] for row in rows) == text[: round(len(text) * 0.9)]
    assert all(99 <= len(row["text"]) <= 198 for row in rows[:-1])
    assert "".join(text_of(tmp_path / "a.txt")) == text


def test_the_mark_of_an_editor_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfIt rained.")
    assert list(text_of(tmp_path / "a.txt")) == ["It rained."]


# ---- the hub


def test_a_dataset_of_the_hub(monkeypatch):
    rows = [{"text": text} for text in TEXTS]
    loaded = {"train": rows, "validation": rows[:1]}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, streaming: loaded)
    assert both("owner/name") == (TEXTS, TEXTS[:1])
    del loaded["validation"]
    train, validation = both("owner/name")
    assert len(validation) == 1 and sorted(train + validation) == sorted(TEXTS)
    with pytest.raises(UnusableRow, match=r"owner/name/train:1: malformed row: body: missing"):
        read("owner/name", key="body")


def test_no_hub_is_one_line(monkeypatch):
    def fails(name, streaming):
        raise ConnectionError("Couldn't reach it\nmore")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    line = r"^data.root: a/b is no file or folder, and no dataset of the hub: Couldn't reach it$"
    with pytest.raises(UserError, match=line):
        Texts("a/b", "train")
    with pytest.raises(UserError, match=r"^data.root: a/b.txt is no file or folder$"):
        Texts("a/b.txt", "train")


# ---- mistakes


def test_roots_that_hold_no_texts(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.md").touch()
    allowed = r"\.txt or \.jsonl\[\.xz\|\.gz\|\.zst\] or \.parquet"
    for root, line in {
        "nowhere": r"nowhere is no file or folder",
        "empty": rf"empty holds no file {allowed}: it is empty",
        "": rf"holds no file {allowed}: empty, notes.md",
        "notes.md": rf"notes.md given, allowed: a folder, or a file {allowed}",
    }.items():
        with pytest.raises(UserError, match=line):
            Texts(str(tmp_path / root), "train")


def test_files_that_differ_in_their_endings_are_refused(tmp_path):
    for name in ("a/x.txt", "b/x.txt", "b/x.txt.gz"):
        write(tmp_path / name)
    with pytest.raises(UserError, match=r"b: holds x.txt and x.txt.gz, of which one can be meant"):
        files(str(tmp_path), "train")


BAD = {
    "not UTF-8 (invalid start byte at byte 1,600,002, line 2)": b"x" * 1600000 + b"\ny\xffz",
    "not UTF-8 (unexpected end of data at byte 9, line 1)": b"It rained\xe6\x97",
    "an empty file": b"",
}


@pytest.mark.parametrize("reason", BAD)
def test_a_text_that_cannot_be_used(tmp_path, reason):
    (tmp_path / "b.txt").write_bytes(BAD[reason])
    write(tmp_path / "a.jsonl")
    with pytest.raises(UnusableRow) as caught:
        read(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/b.txt: malformed row: {reason} (")
    complaints = Complaints("skip")
    assert len(read(tmp_path, complaints=complaints)) == 2
    assert complaints.summary() == f"1 unusable row skipped; the first: {tmp_path}/b.txt: {reason}"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"txt": "a", "id": 1}, "text: missing, data.text_key names the text (did you mean txt?)"),
        ({"text": 5}, "text: 5 given, text is needed"),
        ({"text": None}, "text: None given, text is needed"),
        ({"text": "\ud800"}, "text: not Unicode text (half of a surrogate pair)"),
    ],
)
def test_a_row_without_a_text(tmp_path, row, reason):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "good"}\n\n' + json.dumps(row) + "\n")
    with pytest.raises(UnusableRow) as caught:
        read(file)
    assert str(caught.value).startswith(f"{file}:3: malformed row: {reason}")


def test_a_column_that_is_not_there(tmp_path):
    file = write(tmp_path / "a.parquet", key="texts")
    line = r"a.parquet: no column 'text' \(did you mean texts\?\); it has: number, texts"
    with pytest.raises(UserError, match=line):
        read(file)


@pytest.mark.parametrize("packing", [".gz", ".xz", ".zst", ".parquet"])
def test_a_damaged_file(tmp_path, packing):
    name = "a.parquet" if packing == ".parquet" else f"a.txt{packing}"
    file = write(tmp_path / name, ["It rained all day. " * 99])
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match=rf"{name}: cannot be read after (byte|line) 0: "):
        read(file, complaints=Complaints("skip"))
