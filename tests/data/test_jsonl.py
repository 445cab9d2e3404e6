"""Lines of files: damaged, endless, ambiguous ones."""

import gzip
import json
import lzma
import tracemalloc

import pytest
import zstandard

from comet_pl.errors import UserError
from data import jsonl
from data.jsonl import Complaints, check_distinct, find, read

PACK = {"": bytes, ".xz": lzma.compress, ".gz": gzip.compress, ".zst": zstandard.compress}


def places(path, complaints):
    return [place.rpartition(":")[2] for place, _ in read(path, complaints)]


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_a_flipped_bit_of_a_packed_file_is_a_line(tmp_path, suffix):
    content = "".join(json.dumps({"a": n * 7919 % 104729}) + "\n" for n in range(400)).encode()
    whole, path = PACK[suffix](content), tmp_path / f"rows.jsonl{suffix}"
    for bit in range(0, 8 * len(whole), 97):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        error, rows = None, []
        try:
            rows = list(read(path, Complaints("raise")))
        except UserError as raised:
            error = str(raised)
        # a flip in a name or a date of the header changes nothing
        assert error.startswith(f"{path}") if error else len(rows) == 400


@pytest.mark.parametrize("suffix", PACK)
def test_a_line_without_an_end_is_no_row_and_is_not_held_in_memory(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(jsonl, "LONGEST_LINE", 100_000)
    path = tmp_path / f"rows.jsonl{suffix}"
    # a little of .zst may unpack to 64 MB at once
    size, most = (200_000_000, 140_000_000) if suffix == ".zst" else (30_000_000, 25_000_000)
    long = b'{"a": "' + b"x" * size + b'"}\n'
    path.write_bytes(PACK[suffix](b'{"a": 1}\n' + long + b'{"a": 3}\n'))
    complaints = Complaints("skip")
    del long
    tracemalloc.start()
    assert places(path, complaints) == ["1", "3"]
    assert tracemalloc.get_traced_memory()[1] < most
    tracemalloc.stop()
    assert f"{path}:2: a line of more than" in complaints.first
    with pytest.raises(UserError, match=r":2: malformed row: a line of more than"):
        places(path, Complaints("raise"))


def test_a_key_twice_is_no_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"b": {"item": 1, "c": 2, "item": 3}}\n')
    with pytest.raises(UserError, match=r":2: malformed row: the key 'item' twice in one object"):
        places(path, Complaints("raise"))
    assert places(path, Complaints("skip")) == ["1"]


def test_of_files_that_differ_in_their_endings_alone_none_is_chosen(tmp_path):
    assert find(tmp_path, "train") is None
    (tmp_path / "train.jsonl").touch()
    assert find(tmp_path, "train") == tmp_path / "train.jsonl"
    (tmp_path / "train.jsonl.gz").touch()
    with pytest.raises(UserError, match=r"holds train.jsonl and train.jsonl.gz, of which one"):
        find(tmp_path, "train")
    check_distinct([tmp_path / "events.0.jsonl", tmp_path / "events.1.jsonl"])
    with pytest.raises(UserError, match=r"holds events.csv.gz and events.parquet"):
        check_distinct([tmp_path / "events.csv.gz", tmp_path / "events.parquet"])
