"""docs/performance.md is what the committed results say, and each section says all that its benchmark found."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import performance
import startup
import training

from comet_pl.errors import UserError
from tests.benchmarks.test_training import SMALL, cells

ROOT = Path(__file__).resolve().parents[2]
MACHINE = {
    "processor": "one",
    "cores": 2,
    "cpu_kernels": "AVX2",
    "torch": "2",
    "transformers": "5",
    "load_before": 0.0,
}


def section(folder, name, result, file=None):
    """A page of this result of benchmarks/`name`.py alone, without the sections that are not measured. file: its name, if it is another."""
    (folder / f"{file or name}.json").write_text(
        json.dumps({"command": f"python benchmarks/{name}.py", "machine": MACHINE, **result})
    )
    text = performance.page(folder)
    return next(part for part in text.split("\n## ") if f"benchmarks/{name}.py\n" in part)


def test_the_committed_page_is_what_the_results_give():
    """If this fails: python benchmarks/performance.py"""
    assert (ROOT / "docs" / "performance.md").read_text() == performance.page(performance.RESULTS)


def test_links_lead_somewhere():
    text = performance.page(performance.RESULTS)
    pictures = [part.split(")")[0] for part in text.split("](")[1:]]
    assert "../benchmarks/results/prefill.png" in pictures
    assert all((ROOT / "docs" / picture).exists() for picture in pictures)


def test_without_results_nothing_is_measured(tmp_path):
    """Every section names a command that exists."""
    text = performance.page(tmp_path)
    assert text.count("Not measured: `") == len(performance.SECTIONS)
    for _, name, command, _ in performance.SECTIONS:
        assert f"Not measured: `{command}`." in text
        assert (ROOT / command.split()[1]).exists() and command.split()[
            1
        ] == f"benchmarks/{name.split('-')[0]}.py"


def reading(what, length, **rate):
    times = {
        "ms_per_token": 2.0,
        "processor_ms_per_token": 0.5,
        "peak_mib": 400.0,
        "reading_mib": 50.0,
    }
    return {
        "what": what,
        "length": length,
        **times,
        "achieved": {"rate": 4e10, "share": 0.5, "product_rate": 8e10, "linear": {"share": 0.7}},
    }


def test_reading_with_everything(tmp_path):
    names = performance.report.NAMES
    shape = {"layers": 2, "hidden": 8, "chunk": 4, "global_size": 2, "stride": 2, "capacity": 4}
    rates = {what: reading(what, 1)["achieved"] for what in ("comet", "slots_in_full")}
    ratio = {
        "shape": "paper",
        "value": 0.7,
        "floor": 0.66,
        "bound": 0.76,
        "met": True,
        "rounds": 3,
        "achieved": rates,
    }
    beyond = reading("full_attention", 99) | {
        "time": 20.0,
        "memory": 10.0,
        "how": "a straight line",
    }
    result = {
        "ratio": ratio,
        "shapes": {"paper": shape},
        "lengths_shape": "paper",
        "clock": "processor",
        "threads": 1,
        "dtype": "float32",
        "linear_rate": {"value": 0.7, "bound": 0.6, "met": True},
        "flatness": {"peak_mib": 0.01},
        "against_full_attention": {"cheaper_from": None, "longest": None, "extrapolated": beyond},
        "lengths": [reading(what, 64) for what in names],
    }
    text = section(tmp_path, "prefill", result)
    assert (
        "not measured" not in text
        and "| CoMeT | 64 | 0.500 | 2,000 | 400 | 50 | 50% | 70% |" in text
    )
    assert "70%, wanted: 60% (met)" in text and "| 0.700 (met) | 0.660 | 0.760 |" in text
    assert (
        "full attention, *extrapolated" in text
        and "at 99 tokens (extrapolated: a straight line)" in text
    )


def test_the_layer_of_qwen3_4b_has_a_section(tmp_path):
    ratio = {
        "shape": "paper-4b",
        "value": 0.7,
        "floor": 0.589,
        "bound": 0.648,
        "met": False,
        "rounds": 5,
        "achieved": {},
    }
    shape = {"layers": 1, "hidden": 2560, "chunk": 4, "global_size": 2, "stride": 2, "capacity": 4}
    rate = {"value": 0.7, "bound": 0.6, "met": True}
    text = section(
        tmp_path,
        "prefill",
        {"ratio": ratio, "shapes": {"paper-4b": shape}, "linear_rate": rate},
        "prefill-4b",
    )
    assert text.startswith("Reading, Qwen3-4B's layer\n") and "The ratio: 1 layers x 2560" in text
    assert (
        "| 0.700 (missed) | 0.589 | 0.648 |" in text
        and "70%, wanted: 60% (met)" in text
        and "By length" not in text
    )


def lane(what, length, ms):
    return {
        "what": what,
        "length": length,
        "processor_ms_per_token": ms,
        "filled": False,
        "cache_bytes": 2**20,
        "closing_ms": None,
    }


@pytest.mark.parametrize(
    ("floor", "row"),
    [(2.0, "2.20 (met) | 2.00 | 2.30 |"), (None, "2.20 | not measured | not measured |")],
)
def test_decoding_against_its_floor(tmp_path, floor, row):
    """From the times alone: files written before there was a verdict, or a floor, are read too."""
    comet = {"chunk_size": 4, "global_size": 2, "compression_stride": 2, "temporary_capacity": 4}
    result = {
        "model": "m",
        "comet": comet,
        "clock": "processor",
        "cycles": 1,
        "verdict": {"flatness": None, "cheaper_from": {}},
    }
    result |= {"lengths": [lane("comet", 99, 22.0), lane("full_attention", 1024, 10.0)]}
    result |= {"floor": {"context": 1024, "ratio": floor}} if floor else {}
    text = section(tmp_path, "decode", result, "decode-qwen3_0_6b-pair")
    assert text.startswith("Decoding, Qwen3-0.6B's shape\n")
    assert (
        "CoMeT after 99 tokens / full attention after 1,024 | measured | floor by bytes | at most |"
        in text
    )
    assert (
        f"| full attention | {row}" in text
        and "| full attention with its cache in place | not measured |" in text
    )
    text = section(
        tmp_path, "decode", result | {"lengths": [lane("comet", 7, 1.0)]}, "decode-qwen3_0_6b-pair"
    )
    assert (
        "CoMeT with full memory against full attention after a short context: not measured." in text
    )


def test_training_and_start_with_everything(tmp_path):
    found = [one | {"share": 0.4} for one in [*cells(8192, 12.0, 2.0), *cells(16384, 13.0, 3.0)]]
    verdict = training.verdict(found, 8192)
    text = section(
        tmp_path,
        "training",
        {"shape": SMALL, "threads": 1, "clock": "wall", "verdict": verdict, "lengths": found},
    )
    assert (
        "not measured" not in text
        and "| chunk | 8,192 | 6.00 | 1,365 | 40% | 12.0 | 24.0 | 2.0 |" in text
    )
    assert "grows by 0.0%, allowed 15% (met)" in text
    seconds = {case: {"wall": 20.0, "processor": 1.0} for case in [*startup.CASES, "beyond"]}
    verdicts = {
        case: {"bound": bound, "met": seconds[case]["wall"] <= bound}
        for case, bound in startup.BOUNDS.items()
    }
    text = section(tmp_path, "startup", {"rounds": 1, "seconds": seconds, "verdicts": verdicts})
    assert "first step of `python train.py conf=passkey` | 20.00 | 1.00 | 15 (missed) |" in text


@pytest.mark.parametrize("content", ["{", "[]", '{"command": "x"}'])
def test_a_broken_file_is_told_in_one_line(tmp_path, content):
    (tmp_path / "startup.json").write_text(content)
    with pytest.raises(
        UserError, match=r"startup\.json: not a result of `python benchmarks/startup\.py`"
    ) as caught:
        performance.page(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_program_writes_the_page(tmp_path):
    performance.main(["--results", str(tmp_path), "--out", str(tmp_path / "new" / "page.md")])
    assert (tmp_path / "new" / "page.md").read_text() == performance.page(tmp_path)


def test_make_bench_full_ends_with_the_page():
    make = ["make", "--no-print-directory", "-n", "bench-full"]
    commands = subprocess.run(
        make, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert commands[-1].endswith("benchmarks/performance.py")
    for name in ("startup", "prefill", "reading", "pipeline", "training", "decode", "data"):
        assert (
            sum(f"benchmarks/{name}.py" in line and "--small" not in line for line in commands) == 1
        )
    assert any("1048576" in line and "--device auto" in line for line in commands)


def test_a_misspelt_folder_is_no_empty_page(tmp_path):
    with pytest.raises(UserError, match=r"--results: .*/nowhere is no folder$"):
        performance.main(
            ["--results", str(tmp_path / "nowhere"), "--out", str(tmp_path / "page.md")]
        )
    assert not (tmp_path / "page.md").exists()
