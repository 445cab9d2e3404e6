"""The data path: both sides do the same work, and memory is that of all processes."""

import json
import os
import subprocess
import sys
import time

import pytest

from benchmarks.loading import data, feeding
from benchmarks.shared.options import ROOT
from data.jsonl import Complaints, read
from data.tokenizer import train_tokenizer

MEASURE = data.measure


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with 60 kB of generated rows, some over the 512 tokens that they may have."""
    folder = tmp_path_factory.mktemp("rows")
    data.generate(folder / "qmsum" / "train.jsonl", 60_000, 2_000)
    return folder


@pytest.fixture(scope="module")
def rows(root):
    return [row for _, row in read(root / "qmsum" / "train.jsonl", Complaints("raise"))]


@pytest.fixture(scope="module")
def tokenizer(rows):
    return train_tokenizer((row["input"] for row in rows), 512)


@pytest.fixture
def job(root, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(feeding, "load_tokenizer", lambda job: tokenizer)
    layout = {"workers": 0, "max_length": 4096, "batch_size": 2, "shuffle_window": 10}
    return {"root": str(root), "cache": str(tmp_path / "cache"), **layout}


def in_this_process(job, watched=False):
    """A watched measurement has a process of its own."""
    if watched:
        return MEASURE(job, watched)
    return getattr(feeding, job["what"])(job | {"started": time.time()})


@pytest.mark.slow
def test_small_run(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "measure", in_this_process)
    argv = ["--small", "--gigabytes", "0.0001", "--workers", "0", "--rounds", "2"]
    data.main([*argv, "--out", str(tmp_path)])
    assert (tmp_path / "data-small.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "data-small.json").read_text())
    corpus, speed = result["corpora"]["generated"], result["throughput"]
    # The texts of 100 kB of rows, and at most one row more.
    assert 85_000 < corpus["bytes"] < 100_000 + 6_100
    for both in speed["rounds"]:
        assert both["ours"]["texts"] == both["plain"]["texts"] == corpus["rows"]
    assert len(speed["rounds"]) == 2 and min(result["first_batch"].values()) > 0
    [memory] = result["memory"]
    assert memory["tokens"] >= speed["rounds"][0]["ours"]["tokens"] and result["verdict"]["met"]
    assert 50 < memory["baseline_mib"] <= memory["peak_mib"] and memory["processes"] >= 1


@pytest.mark.slow
def test_small_run_with_workers_on_real_rows(tmp_path, shared_data):
    """All in processes of their own, as a user starts it."""
    command = [sys.executable, "-m", "benchmarks.loading.data", "--small", "--out", str(tmp_path)]
    command += ["--root", str(shared_data / "scrolls_small")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "data-small.json").read_text())
    assert [row["corpus"] for row in result["memory"]] == ["given", "generated"]
    assert result["verdict"]["met"] and all(row["processes"] >= 3 for row in result["memory"])


def test_both_sides_tokenise_the_same_rows(job, rows, tokenizer):
    """Where nothing is cut, ours has the tokens of plain and the template's around them: user,
    assistant, end, and a blank line that is split off the document."""
    ours, plain = feeding.ours(job), feeding.plain(job | {"cache": f"{job['cache']}-plain"})
    texts = [row[key] for row in rows for key in ("input", "output")]
    assert ours["texts"] == plain["texts"] == len(rows)
    assert plain["tokens"] == sum(len(tokenizer(text)["input_ids"]) for text in texts)
    assert 3 <= (ours["tokens"] - plain["tokens"]) / len(rows) <= 6
    filled = ours["tokens"] / (4096 * -(-ours["tokens"] // 4096))
    assert ours["padding_share"] == pytest.approx(1 - filled, abs=0.2)


def test_streaming_ends_after_one_epoch(job):
    """All rows, and those that fill up each window's last batch; more windows than one."""
    streamed, tokens = feeding.stream(job), feeding.ours(job)["tokens"]
    assert tokens <= streamed["tokens"] <= 2 * tokens and streamed["batches"] > 1
    assert streamed["peak_mib"] >= streamed["baseline_mib"] > 0
    assert streamed["baseline_shared_mib"] > 0


def test_generated_rows_are_always_the_same(root, rows, tmp_path):
    data.generate(tmp_path / "x" / "train.jsonl", 60_000, 2_000)
    written = (tmp_path / "x" / "train.jsonl").read_bytes()
    assert written == (root / "qmsum" / "train.jsonl").read_bytes() and len(written) >= 60_000
    lengths = sorted(len(row["input"]) for row in rows)
    assert lengths[-1] < 3 * 2_000 + 100 and 1_000 < lengths[len(lengths) // 2] < 4_000
    size = sum(len(row[key].encode()) for row in rows for key in ("input", "output"))
    assert data.text_size(str(root)) == {"rows": len(lengths), "bytes": size}


def test_clock_counts_workers():
    clock = feeding.Clock()
    if (pid := os.fork()) == 0:
        start = time.process_time()
        while time.process_time() - start < 0.2:
            pass
        os._exit(0)
    os.waitpid(pid, 0)
    assert clock.seconds()["processor_seconds"] >= 0.15


def test_throughput_is_the_median_of_the_rounds():
    rounds = [
        {
            "ours": {"seconds": ours, "processor_seconds": 2.0, "tokens": 60},
            "plain": {"seconds": plain, "processor_seconds": 3.0, "tokens": 50},
        }
        for ours, plain in ((1.0, 2.0), (2.0, 2.0), (4.0, 12.0))
    ]
    speeds = {"ours_tokens_per_s": 30, "plain_tokens_per_s": 25, "ours_mb_per_s": 5}
    ratios = {"plain_mb_per_s": 5, "ratio": 2, "processor_ratio": 1.5}
    assert data.throughput(rounds, 10_000_000) == {"rounds": rounds} | speeds | ratios


def test_above_is_the_higher_of_both():
    keys = ("baseline_mib", "peak_mib", "baseline_shared_mib", "all_mib")
    for peak, expected in ((500.0, [100, 600, 600]), (1600.0, [1200, 600, 1200])):
        row = dict(zip(keys, (400.0, peak, 300.0, 900.0), strict=True))
        assert [*data.above(row).values()] == expected
