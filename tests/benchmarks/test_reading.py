"""benchmarks/reading.py: a real text, as far as the time goes."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest

from comet_pl.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import performance  # noqa: E402
import reading  # noqa: E402

TEXT = ROOT / "README.md"


def test_a_short_reading(tmp_path, capsys):
    """Marks on the way, the text read again where it ends, and the page takes the result."""
    reading.main(
        [
            "conf=passkey",
            str(TEXT),
            "--name",
            "small",
            "--tokens",
            "12000",
            "--threads",
            "1",
            "--out",
            str(tmp_path),
        ]
    )
    found = json.loads((tmp_path / "reading-small.json").read_text())
    marks = found["marks"]
    assert marks[-1]["tokens"] == 12288, "whole calls of 1,024 tokens"
    assert [mark["tokens"] for mark in marks] == sorted({mark["tokens"] for mark in marks})
    assert all(
        one["processor_seconds"] < other["processor_seconds"]
        for one, other in itertools.pairwise(marks)
    )
    # 2 layers x (keys, values) x 192 numbers of four bytes
    assert found["full_attention_bytes"] == 12288 * 2 * 2 * 192 * 4
    assert found["clock"] == "processor" and str(ROOT) not in json.dumps(found)
    assert (tmp_path / "reading-small.png").read_bytes()[:4] == b"\x89PNG"
    out = capsys.readouterr().out
    assert "12,288 tokens in" in out and "ms a token, first quarter" in out
    assert "| 12,288 |" in performance.page(tmp_path)


def test_options_of_the_model_reach_a_confs_too(tmp_path):
    options = ["conf=passkey", "--set", "chunk_size=32", "--dtype", "bfloat16", "--device", "cpu"]
    reading.main(
        [
            *options,
            str(TEXT),
            "--name",
            "small",
            "--tokens",
            "4096",
            "--threads",
            "1",
            "--out",
            str(tmp_path),
        ]
    )
    found = json.loads((tmp_path / "reading-small.json").read_text())
    assert (found["shape"]["chunk"], found["dtype"]) == (32, "bfloat16")
    assert found["command"].endswith("--set chunk_size=32 --dtype bfloat16")


def test_verdict_by_hand():
    marks = [
        {
            "tokens": n * 100,
            "seconds": n * 1.0,
            "processor_seconds": n * n / 10,
            "process_mib": 100.0 + n,
        }
        for n in range(1, 9)
    ]
    found = reading.verdict(marks, "processor_seconds")
    assert found["first_ms"] == pytest.approx(1e3 * 0.4 / 200)
    assert found["last_ms"] == pytest.approx(1e3 * (6.4 - 3.6) / 200)
    assert found["memory"]["grown"] == pytest.approx(108 / 102 - 1) and not found["memory"]["met"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["conf=passkey", str(TEXT), "--name", "a/b"],
            "--name: 'a/b' given, letters, digits, _ and - are allowed",
        ),
        (
            ["conf=passkey", str(TEXT), "--name", "a", "--tokens", "0"],
            "--tokens: 0 given, more than 0 is needed",
        ),
        (
            ["conf=passkey", "-", "--name", "a"],
            "-: a file on disk is needed, it may have to be read again",
        ),
        (
            ["conf=passkey", "nowhere.txt", "--name", "a"],
            "nowhere.txt: cannot be read: No such file or directory",
        ),
        (
            ["conf=passkey", str(TEXT), "--name", "a", "--tokens", "9"],
            "--minutes or --tokens: over before there was anything to compare; give more",
        ),
    ],
)
def test_mistakes_are_one_line(options, message, tmp_path):
    with pytest.raises(UserError) as caught:
        reading.main([*options, "--out", str(tmp_path)])
    assert str(caught.value) == message
