"""A real text as far as the time allows."""

import itertools
import json

import pytest

from benchmarks import performance
from benchmarks.inference import reading
from benchmarks.shared.options import ROOT
from comet_pl.errors import UserError

ARGV = ["conf=passkey", str(ROOT / "README.md"), "--name", "small", "--threads", "1"]


def test_a_short_reading(tmp_path, capsys):
    """Marks on the way, the text repeats where it ends, and the page takes the result."""
    reading.main([*ARGV, "--tokens", "12000", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "reading-small.json").read_text())
    marks = result["marks"]
    assert marks[-1]["tokens"] == 12288, "whole calls of 1,024 tokens"
    assert [mark["tokens"] for mark in marks] == sorted({mark["tokens"] for mark in marks})
    times = [mark["processor_seconds"] for mark in marks]
    assert all(a < b for a, b in itertools.pairwise(times))
    # 2 layers x (keys, values) x 192 numbers of four bytes.
    assert result["full_attention_bytes"] == 12288 * 2 * 2 * 192 * 4
    assert result["clock"] == "processor" and str(ROOT) not in json.dumps(result)
    assert (tmp_path / "reading-small.png").read_bytes()[:4] == b"\x89PNG"
    assert "12,288" in capsys.readouterr().out and "| 12,288 |" in performance.page(tmp_path)


def test_options_of_the_model_reach_a_confs_too(tmp_path):
    options = ["--set", "chunk_size=32", "--dtype", "bfloat16", "--device", "cpu"]
    reading.main([*ARGV, *options, "--tokens", "4096", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "reading-small.json").read_text())
    assert (result["shape"]["chunk_size"], result["dtype"]) == (32, "bfloat16")
    assert result["command"].endswith("--set chunk_size=32 --dtype bfloat16")


def test_too_short_to_compare(tmp_path):
    with pytest.raises(UserError, match="--minutes or --tokens: over before"):
        reading.main([*ARGV, "--tokens", "9", "--out", str(tmp_path)])


def test_verdict_by_hand():
    keys = ("tokens", "seconds", "processor_seconds", "process_mib")
    marks = [
        dict(zip(keys, (n * 100, n * 1.0, n * n / 10, 100.0 + n), strict=True)) for n in range(1, 9)
    ]
    verdict = reading.verdict(marks, "processor_seconds")
    assert verdict["first_ms"] == pytest.approx(1e3 * 0.4 / 200)
    assert verdict["last_ms"] == pytest.approx(1e3 * (6.4 - 3.6) / 200)
    memory = verdict["memory"]
    assert memory["grown"] == pytest.approx(108 / 102 - 1) and not memory["met"]
