"""The benchmark of the data path: it runs, both sides do the same work, and memory is that of all processes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import feeding
import measure_data

from comet_pl.errors import UserError, run_cli
from data.jsonl import Complaints, read
from data.tokenizer import train_tokenizer

HERE = Path(__file__).resolve().parents[2] / "benchmarks"
QUICK = ["--small", "--gigabytes", "0.0001", "--workers", "0"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with 60 kB of generated rows, some longer than the 512 tokens that they may have."""
    folder = tmp_path_factory.mktemp("rows")
    feeding.generate(folder / "qmsum" / "train.jsonl", 60_000, 2_000)
    return folder


@pytest.fixture(scope="module")
def tokenizer(root):
    return train_tokenizer((row["input"] for _, row in rows(root)), 512)


def rows(root):
    return list(read(root / "qmsum" / "train.jsonl", Complaints("raise")))


def job(root, cache, **more):
    common = {
        "root": str(root),
        "cache": str(cache),
        "workers": 0,
        "max_length": 512,
        "batch_size": 2,
        "shuffle_window": 16,
    }
    return {**common, "started": time.time(), **more}


def here(job, watched=False):
    """Measurements in this process, which has its imports already; a watched one in a process of its own."""
    if watched:
        return measured(job, watched)
    tokenizer = measure_data.AutoTokenizer.from_pretrained(job["tokenizer"])
    return measure_data.JOBS[job["what"]](job | {"started": time.time()}, tokenizer)


measured = feeding.measure


# ---- what is measured


def test_small_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(feeding, "measure", here)
    feeding.main([*QUICK, "--rounds", "2", "--out", str(tmp_path)])
    told = capsys.readouterr().out
    assert "less than 1024 MiB above the baseline: met" in told and "first batch after" in told
    assert sorted(file.name for file in tmp_path.iterdir()) == ["data-small.json", "data-small.png"]
    assert (tmp_path / "data-small.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "data-small.json").read_text())
    corpus = result["corpora"]["generated"]
    assert (
        85_000 < corpus["bytes"] < 100_000 + 6_100
    )  # the texts of 100 kB of rows, and at most a row more
    speed = result["throughput"]
    assert len(speed["rounds"]) == 2 and speed["ratio"] > 0 and speed["processor_ratio"] > 0
    for found in speed["rounds"]:
        assert found["ours"]["texts"] == found["plain"]["texts"] == corpus["rows"]
        assert (
            0 < found["ours"]["pack_seconds"] < found["ours"]["seconds"]
            and 0 <= found["ours"]["padding_share"] < 0.3
        )
    assert all(0 < result["first_batch"][name] < 60 for name in ("streamed", "cached"))
    [memory] = result["memory"]
    assert (
        memory["texts"] >= corpus["rows"]
        and memory["tokens"] >= speed["rounds"][0]["ours"]["tokens"]
    )
    assert 50 < memory["baseline_mib"] <= memory["peak_mib"] and memory["highest_above_mib"] < 1024
    assert (
        memory["all_mib"] <= memory["all_rss_mib"] * 1.01
        and memory["processes"] >= 1
        and len(memory["curve"]) > 2
    )


@pytest.mark.slow
def test_small_run_with_workers_on_real_rows(tmp_path, shared_data):
    """All in processes of their own, by the name that the README gives."""
    command = [
        sys.executable,
        str(HERE / "data.py"),
        "--small",
        "--root",
        str(shared_data / "scrolls_small"),
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "data-small.json").read_text())
    assert [one["corpus"] for one in result["memory"]] == ["given", "generated"] and result[
        "verdict"
    ]["met"]
    assert all(one["processes"] >= 3 for one in result["memory"])


def test_both_sides_tokenise_the_same_rows(root, tokenizer, tmp_path):
    """Where nothing is cut, ours has the tokens of plain and the template's around them."""
    wide = {"max_length": 4096}
    ours = measure_data.ours(job(root, tmp_path / "ours", **wide), tokenizer)
    plain = measure_data.plain(job(root, tmp_path / "plain"), tokenizer)
    assert ours["texts"] == plain["texts"] == len(rows(root))
    assert plain["tokens"] == sum(
        len(tokenizer(row[key])["input_ids"])
        for _, row in rows(root)
        for key in ("input", "output")
    )
    assert (
        3 <= (ours["tokens"] - plain["tokens"]) / ours["texts"] <= 6
    )  # user, assistant, end; a blank line is split off the document
    assert ours["padding_share"] == pytest.approx(
        1 - ours["tokens"] / (4096 * -(-ours["tokens"] // 4096)), abs=0.2
    )


def test_streaming_ends_after_one_epoch(root, tokenizer, tmp_path):
    """All rows, and those that fill up each window's last batch; more windows than one."""
    found = measure_data.stream(job(root, tmp_path, max_length=4096, shuffle_window=10), tokenizer)
    assert len(rows(root)) <= found["texts"] <= 2 * len(rows(root)) and found["batches"] > 1
    assert found["peak_mib"] >= found["baseline_mib"] > 0 and found["baseline_shared_mib"] > 0


def test_generated_rows_are_always_the_same(root, tmp_path):
    feeding.generate(tmp_path / "x" / "train.jsonl", 60_000, 2_000)
    assert (tmp_path / "x" / "train.jsonl").read_bytes() == (
        root / "qmsum" / "train.jsonl"
    ).read_bytes()
    lengths = [len(row["input"]) for _, row in rows(root)]
    assert max(lengths) < 3 * 2_000 + 100 and 1_000 < sorted(lengths)[len(lengths) // 2] < 4_000
    assert (root / "qmsum" / "train.jsonl").stat().st_size >= 60_000
    assert feeding.text_size(str(root)) == {
        "rows": len(lengths),
        "bytes": sum(
            len(row[key].encode()) for _, row in rows(root) for key in ("input", "output")
        ),
    }


def test_memory_is_that_of_all_processes():
    """A process of 60 MiB that starts one of its own: in the sum of proportional shares what both have is there once."""
    child = "import os, time; a = bytearray(b'x') * (60 << 20); os.fork() or time.sleep(1.5); time.sleep(1.5); print(len(a))"
    process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.DEVNULL, text=True)
    seen = feeding.watch(process)
    assert process.returncode == 0 and seen["processes"] == 2
    assert 60 < seen["all_mib"] < 100 and 110 < seen["all_rss_mib"] < 200
    assert (
        feeding.family(process.pid) == [process.pid]
        and feeding.resident_now(process.pid) == measure_data.proportional(process.pid) == 0
    )


def test_clock_counts_workers():
    clock = measure_data.Clock()
    if (pid := os.fork()) == 0:
        start = time.process_time()
        while time.process_time() - start < 0.2:
            pass
        os._exit(0)
    os.waitpid(pid, 0)
    assert clock.read()["processor_seconds"] >= 0.15


# ---- what is made of it


def test_throughput_is_the_median_of_the_rounds():
    rounds = [
        {
            "ours": {"seconds": s, "processor_seconds": 2.0, "tokens": 60},
            "plain": {"seconds": p, "processor_seconds": 3.0, "tokens": 50},
        }
        for s, p in ((1.0, 2.0), (2.0, 2.0), (4.0, 12.0))
    ]
    found = feeding.throughput(rounds, 10_000_000)
    assert (found["ours_tokens_per_s"], found["plain_tokens_per_s"]) == (30, 25)
    assert (found["ours_mb_per_s"], found["plain_mb_per_s"]) == (5, 5)
    assert (found["ratio"], found["processor_ratio"]) == (2, 1.5)


def test_above_is_the_higher_of_both():
    found = {
        "baseline_mib": 400.0,
        "peak_mib": 500.0,
        "baseline_shared_mib": 300.0,
        "all_mib": 900.0,
    }
    assert feeding.above(found) == {
        "above_mib": 100,
        "all_above_mib": 600,
        "highest_above_mib": 600,
    }
    assert feeding.above(found | {"peak_mib": 1600.0})["highest_above_mib"] == 1200


# ---- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "-1"], "--workers: -1 given, a whole number >= 0"),
        (["--rounds", "0"], "--rounds: 0 given"),
        (["--max-length", "3"], "--max-length: 3 given, a whole number >= 16"),
        (["--gigabytes", "0"], "--gigabytes: 0.0 given, a number > 0"),
        (["--gigabytes", "nan"], "--gigabytes: nan given"),
        (["--gigabytes", "x"], "--gigabytes: invalid float value"),
        (["--root", "/nowhere"], "--root: /nowhere is no folder"),
        (["--root", str(HERE)], "holds no <task>/<split>.jsonl"),
        (["--gigabyte", "1"], "unrecognized arguments"),
        (["--out", f"{__file__}/x"], "cannot be made"),
    ],
)
def test_mistakes_in_options(options, message):
    with pytest.raises(UserError) as caught:
        feeding.parse(options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_root_without_training_rows(tmp_path):
    (tmp_path / "qmsum").mkdir()
    (tmp_path / "qmsum" / "validation.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"--root: .* has no <task>/train.jsonl"):
        feeding.parse(["--root", str(tmp_path)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"id": "1", "input": "x"}\n', "train.jsonl:1: input and output are needed"),
        ("{broken\n", "train.jsonl:1: malformed row: not JSON"),
    ],
)
def test_malformed_rows_are_named(content, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "qmsum").mkdir()
    (tmp_path / "qmsum" / "train.jsonl").write_text(content)
    monkeypatch.setattr(
        sys, "argv", ["data.py", *QUICK, "--root", str(tmp_path), "--out", str(tmp_path / "out")]
    )
    with pytest.raises(SystemExit) as caught:
        run_cli(feeding.main)
    told = capsys.readouterr().err
    assert (
        caught.value.code == 2 and message in told and told.splitlines()[-1].startswith("error: ")
    )
    assert not list((tmp_path / "out").iterdir())


def test_a_measurement_that_fails_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(feeding, "HERE", tmp_path)
    for code, why in (
        ("raise SystemExit('error: no room')", "no room"),
        ("import os; os._exit(9)", "killed, most likely"),
    ):
        (tmp_path / "measure_data.py").write_text(code)
        with pytest.raises(UserError, match=rf"measuring ours ended with status [19]: {why}"):
            feeding.measure({"what": "ours"})


def test_an_interrupt_leaves_no_process(tmp_path, monkeypatch):
    """Neither the measuring one nor one that it started."""
    pids = []

    def interrupted(process):
        while len(pids) < 2:
            pids[:] = feeding.family(process.pid)
        raise KeyboardInterrupt

    (tmp_path / "measure_data.py").write_text("import os, time; os.fork(); time.sleep(60)")
    monkeypatch.setattr(feeding, "HERE", tmp_path)
    monkeypatch.setattr(feeding, "watch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        feeding.measure({"what": "ours"}, watched=True)
    until = time.monotonic() + 10
    while (left := sum(feeding.proportional(pid) > 0 for pid in pids)) and time.monotonic() < until:
        time.sleep(0.05)
    assert left == 0


def test_the_package_stays_within_reach():
    """benchmarks/data.py stands before data/ in the path of every benchmark."""
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import data.filler; print(data.filler.__file__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == str(HERE.parent / "data" / "filler.py"), done.stderr
