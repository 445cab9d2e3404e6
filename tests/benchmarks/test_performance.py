"""The page names the results, and each section says all that its benchmark measured."""

import json
import subprocess
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks import performance
from benchmarks.inference import prefill
from benchmarks.loading import startup
from benchmarks.shared.options import RESULTS, ROOT, SIZES
from benchmarks.training import step
from comet_pl.errors import UserError
from tests.benchmarks.test_prefill import row
from tests.benchmarks.test_step import cells

FACTS = {"processor": "one", "cores": 2, "cpu_kernels": "AVX2", "torch": "2", "transformers": "5"}
SHAPE = {"layers": 2, "hidden": 8, "chunk": 4, "global_size": 2, "stride": 2, "capacity": 4}
RATE = {"rate": 4e10, "share": 0.5, "product_rate": 8e10, "linear": {"share": 0.7}}
RATIO = {"shape": "x", "value": 0.7, "floor": 0.66, "bound": 0.76, "met": True, "rounds": 3}
LINEAR = {"value": 0.7, "bound": 0.6, "met": True}


def section(folder, name, result):
    """The page's section about this result."""
    facts = {"command": "python -m benchmarks.x", "machine": FACTS | {"load_before": 0.0}}
    (folder / f"{name}.json").write_text(json.dumps(facts | result))
    title = next(title for file, title, _ in SIZES["page"] if file == name)
    parts = performance.page(folder).split("## ")
    return next(part for part in parts if part.startswith(f"{title}\n"))


def test_the_page_of_the_committed_results():
    """Every result that has a section is on the page, with its command, and every link is there."""
    text = performance.page(RESULTS)
    for name, *_ in SIZES["page"]:
        file = RESULTS / f"{name}.json"
        if file.exists():
            command = json.loads(file.read_text())["command"]
            assert command in text and command.startswith("python -m benchmarks.")
    links = [part.split(")")[0] for part in text.split("](")[1:]]
    assert "../benchmarks/results/prefill.png" in links
    assert all((ROOT / "docs" / link).exists() for link in links)
    assert "## Reading a million tokens" in (ROOT / "docs" / "performance.md").read_text()


def test_without_results_nothing_is_measured(tmp_path):
    """Every section names a program that exists."""
    commands = performance.page(tmp_path).split("Not measured: `")[1:]
    assert len(commands) == len(SIZES["page"])
    for command in commands:
        python, option, module, *_ = command.split("`")[0].split()
        assert (python, option) == ("python", "-m") and import_module(module).main


def test_prefill_with_everything(tmp_path):
    rows = [row(what, 64, 0.5, 100.0) | {"achieved": RATE} for what in prefill.NAMES]
    beyond = row("full_attention", 99, 0.5, 50.0) | {"time": 20.0, "memory": 10.0, "how": "a line"}
    result = {
        "ratio": RATIO | {"achieved": dict.fromkeys(prefill.NAMES, RATE)},
        "shapes": {"x": SHAPE},
        "lengths_shape": "x",
        "clock": "processor",
        "linear_rate": LINEAR,
        "flatness": {"peak_mib": 0.01},
        "against_full_attention": {"cheaper_from": None, "longest": None, "extrapolated": beyond},
        "lengths": rows,
    }
    text = section(tmp_path, "prefill", result)
    assert "not measured" not in text
    assert "| CoMeT | 64 | 0.500 | 2,000 | 400 | 100 | 50% | 70% |" in text
    assert "70%, wanted: 60% (met)" in text and "| 0.700 (met) | 0.660 | 0.760 |" in text
    assert "*extrapolated: a line*" in text and "at 99 tokens (extrapolated: a line)" in text


def test_the_layer_of_qwen3_4b_has_no_lengths(tmp_path):
    """Rates that an old file does not have are not measured."""
    result = {"ratio": RATIO | {"met": False}, "shapes": {"x": SHAPE}, "linear_rate": LINEAR}
    text = section(tmp_path, "prefill-4b", result)
    assert "| 0.700 (missed) | 0.660 | 0.760 |" in text and "By length" not in text
    assert "| CoMeT | not measured | not measured |" in text


def lane(what, length, ms):
    times = {"processor_ms_per_token": ms, "closing_ms": None}
    return {"what": what, "length": length, **times, "filled": False, "cache_bytes": 2**20}


@pytest.mark.parametrize(
    ("floor", "cells"), [(2.0, "2.20 (met) | 2.00 | 2.30 |"), (None, "2.20 | not measured | not")]
)
def test_decoding_against_its_floor(tmp_path, floor, cells):
    """From the times alone: files from before there was a floor have a section too."""
    keys = ("chunk_size", "global_size", "compression_stride", "temporary_capacity")
    result = {
        "model": "m",
        "comet": dict(zip(keys, (4, 2, 2, 4), strict=True)),
        "clock": "processor",
        "cycles": 1,
        "verdict": {"flatness": None, "cheaper_from": {}},
        "lengths": [lane("comet", 99, 22.0), lane("full_attention", 1024, 10.0)],
    }
    result |= {"floor": {"context": 1024, "ratio": floor}} if floor else {}
    text = section(tmp_path, "decode", result)
    assert "CoMeT after 99 tokens / full attention after 1,024 | measured | floor by" in text
    assert f"| full attention | {cells}" in text
    assert "| full attention with its cache in place | not measured |" in text
    text = section(tmp_path, "decode", result | {"lengths": [lane("comet", 7, 1.0)]})
    assert "full attention after a short context: not measured." in text


def test_training_and_start_with_everything(tmp_path):
    rows = [row | {"share": 0.4} for row in [*cells(8192, 12.0, 2.0), *cells(16384, 13.0, 3.0)]]
    result = {"shape": SHAPE, "clock": "wall", "lengths": rows}
    text = section(tmp_path, "training", result | {"verdict": step.verdict(rows, 8192)})
    assert "not measured" not in text and "grows by 0.0%, allowed 15% (met)" in text
    assert "| chunk | 8,192 | 6.00 | 1,365 | 40% | 12.0 | 24.0 | 2.0 |" in text
    seconds = {case: {"wall": 20.0, "processor": 1.0} for case in startup.CASES}
    verdicts = {"first step": {"bound": 15.0, "met": False}}
    result = {"rounds": 1, "seconds": seconds, "verdicts": verdicts}
    text = section(tmp_path, "startup", result)
    assert "`python train.py conf=passkey` | 20.00 | 1.00 | 15 (missed) |" in text


@pytest.mark.parametrize("content", ["{", "[]", '{"command": "x"}'])
def test_a_broken_file_is_named_in_one_line(tmp_path, content):
    (tmp_path / "startup.json").write_text(content)
    named = r"startup\.json: not a result of `python -m benchmarks\.loading\.startup`"
    with pytest.raises(UserError, match=named) as caught:
        performance.page(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_program_writes_the_page(tmp_path):
    page = tmp_path / "new" / "page.md"
    performance.main(["--results", str(tmp_path), "--out", str(page)])
    text = page.read_text()
    assert text.startswith("# Performance\n") and text.endswith(performance.page(tmp_path))
    with pytest.raises(UserError, match=r"--results: .*/nowhere is no folder$"):
        performance.main(["--results", str(tmp_path / "nowhere"), "--out", str(page)])
    assert page.read_text() == text


@pytest.mark.parametrize("target", ["bench", "bench-full"])
def test_the_make_targets_measure_everything(target):
    make = ["make", "--no-print-directory", "-n", target]
    lines = subprocess.run(make, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for module in {command.split()[0] for _, _, command in SIZES["page"]}:
        (line,) = (line for line in lines.splitlines() if f"-m benchmarks.{module}" in line)
        assert Path(ROOT, "benchmarks", *module.split(".")).with_suffix(".py").exists()
        small = any(flag in line for flag in ("--small", "--name small", "--rounds 1 "))
        assert small or target == "bench-full"
    assert (lines.splitlines()[-1].endswith("-m benchmarks.performance")) == (
        target == "bench-full"
    )
