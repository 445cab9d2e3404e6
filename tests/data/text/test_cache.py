"""A cache of tokens that was damaged is made anew, and never used."""

import gzip
import json
import lzma

import numpy as np
import pytest
import zstandard

from comet_pl.errors import UserError
from data.jsonl import Complaints, read
from data.text.tokenized import Sample, Source, cached, file_facts
from data.tokenizer import train_tokenizer
from tests.support.damage import damages

ROWS = [[number, number + 1, 7] for number in range(50)]


class Numbers(Source):
    """A source of rows {"ids": [...]}, each with a remark."""

    on_error = "raise"

    def __init__(self, path):
        self.path, self.tokenizer = path, train_tokenizer(["a b c"], 300)

    def rows(self, complaints):
        return read(self.path, complaints)

    def encode(self, row):
        ids = np.array(row["ids"], dtype=np.int32)
        return Sample(ids, np.ones(len(ids), dtype=bool), {"remarks": ["tools are not shown"]})

    def key(self):
        return {"files": file_facts([self.path])}


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def other(path):
    path.write_text('["train: all is well"]' if path.suffix == ".json" else "text")


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"ids": ids}) + "\n" for ids in ROWS))
    return Numbers(path)


@pytest.mark.parametrize("damage", [cut, flip, empty, other])
@pytest.mark.parametrize("ending", ["arrow", "json"])
def test_a_damaged_cache_is_made_anew(source, tmp_path, capsys, damage, ending):
    def read_back():
        samples = cached(source, tmp_path / "cache", "train")
        return [samples[number].ids.tolist() for number in range(len(samples))]

    assert read_back() == ROWS
    assert "train: tools are not shown: 50 rows" in capsys.readouterr().out
    (file,) = (tmp_path / "cache").glob(f"*/train.{ending}")
    damage(file)
    assert read_back() == ROWS
    said = capsys.readouterr().out
    assert "data.cache: " in said and "is damaged and made anew" in said
    assert read_back() == ROWS
    assert "damaged" not in capsys.readouterr().out


def test_a_cache_that_is_cut_while_it_is_read_is_a_line(source, tmp_path):
    """Beyond the end of a mapped file, the operating system would kill the process."""
    samples = cached(source, tmp_path / "cache", "train")
    assert samples[49].ids.tolist() == ROWS[49]
    with samples.file.open("rb+") as file:
        file.truncate(100)
    with pytest.raises(UserError, match=r"data.cache: .*train.arrow has been cut"):
        samples[0]


def test_a_cache_that_is_removed_while_it_is_read_is_read_to_its_end(source, tmp_path):
    samples = cached(source, tmp_path / "cache", "train")
    samples.file.unlink()
    assert samples[0].ids.tolist() == ROWS[0]


# ---- random damage

often = pytest.mark.parametrize(
    "times", [8, pytest.param(400, marks=pytest.mark.slow)], ids=["", "2,000 in all"]
)


@often
@pytest.mark.parametrize("ending", ["arrow", "json"])
def test_any_damage_of_a_cache_is_made_good(source, tmp_path, times, ending):
    folder = tmp_path / "cache"
    samples = cached(source, folder, "train")
    (file,) = folder.glob(f"*/train.{ending}")
    for _ in damages(file, times):
        samples = cached(source, folder, "train")
        assert [samples[number].ids.tolist() for number in range(len(samples))] == ROWS


PACKED = {
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    # As the program zstd does; without a checksum, which a frame may lack, nothing can be noticed.
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


@often
@pytest.mark.parametrize("ending", PACKED)
def test_any_damage_of_packed_rows_is_refused_or_harmless(source, tmp_path, times, ending):
    file, refused = tmp_path / f"rows.jsonl{ending}", 0
    file.write_bytes(PACKED[ending](source.path.read_bytes()))
    for number in damages(file, times):
        try:
            found = [row["ids"] for _, row in read(file, Complaints("raise"))]
        except UserError as error:
            refused += str(file) in str(error) and "\n" not in str(error)
        else:
            assert found == ROWS, f"damage {number} was read as something else"
    assert refused >= times // 2
