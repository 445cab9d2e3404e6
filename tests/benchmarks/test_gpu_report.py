"""What a GPU script has measured, on the page and in pictures; and what it needs to start there."""

import json
import os
import re
import subprocess
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks import performance
from benchmarks.gpu import report
from benchmarks.shared.options import ROOT


def a_prefill(attention, tokens, seconds, peak, graphs=False):
    facts = {"what": f"{attention} {tokens}", "kind": "prefill", "model": "4B", "took": seconds}
    facts |= {"attention": attention, "tokens": tokens, "seconds": seconds, "peak_gib": peak}
    facts["graphs"] = graphs
    return facts | {"tokens_s": round(tokens / seconds)}


SHAPE = "2,816 own after 2,560, 16/8 heads of 128, ragged"
LINES = [
    {"what": "ceilings", "kind": "ceilings", "gib": 79.1, "gpu": "A card", "took": 1},
    {"what": "laws", "kind": "laws", "checks": 50, "worst": 2e-16, "bound": 1e-9, "met": True},
    {"what": "numbers", "kind": "golden", "checks": 5, "worst": 0.3, "bound": 1e-4, "met": False},
    {
        "what": "attention, bfloat16",
        "kind": "attention",
        "dtype": "bfloat16",
        "errors": {f"{SHAPE}: out": 1e-3, f"{SHAPE}: dq": 4e-3},
    },
    {
        "what": "attention's kernels",
        "kind": "attention_kernels",
        "kernels": {SHAPE: {"bfloat16": "flash_fwd", "float32": "other"}},
    },
    {
        "what": "kernels of a chunk",
        "kind": "chunk_kernels",
        "model": "4B",
        "gpu_ms": 84.5,
        "launches": 3492,
        "top": [["gemm", 252, 60.25], ["flash_fwd", 36, 17.5]],
    },
    a_prefill("CoMeT", 1000, 1.0, 9.5),
    a_prefill("CoMeT", 4000, 2.0, 9.5),
    a_prefill("CoMeT", 4000, 1.6, 9.6, graphs=True),
    # A token after n others costs n seconds / 10^6: 1 s, 4 s; then 16 s.
    a_prefill("full", 1000, 1.0, 10.0),
    a_prefill("full", 2000, 4.0, 12.0),
    {
        "what": "decoding",
        "kind": "decode",
        "model": "4B",
        "attention": "CoMeT",
        "graphs": False,
        "ms": 13.25,
        "worst_ms": 20.0,
    },
    {
        "what": "step: 4B, memory",
        "kind": "train_step",
        "seconds": 6.75,
        "optimizer_seconds": 0.012,
        "tokens_s": 4855,
        "peak_gib": 45.7,
    },
    {
        "what": "step: 4B, all",
        "kind": "train_step",
        "error": "OutOfMemoryError: CUDA out of memory. Tried to allocate 1 GiB",
        "peak_gib": 78.0,
    },
    {"what": "late", "kind": "train_step", "skipped": "12 s left, 45 s needed"},
]
RESULT = {
    "command": "python -m benchmarks.gpu",
    "machine": {"torch": "2.11", "transformers": "5.17", "processor": "P", "cores": 16}
    | {"cpu_kernels": "AVX512", "load_before": 0.5, "gpu": "A card"},
    "device": "cuda",
    "dtype": "bfloat16",
    "tiny": False,
    "minutes": 8.0,
    "seconds": 420.0,
    "lines": LINES,
}


def test_the_section_of_the_page(tmp_path):
    folder = tmp_path / "gpu"
    folder.mkdir()
    (folder / "gpu.json").write_text(json.dumps(RESULT))
    (folder / "gpu-training.png").write_bytes(b"")
    text = performance.page(tmp_path).split("## On a GPU\n")[1].split("\n## ")[0]
    assert "A card, bfloat16, torch 2.11" in text
    none = "not measured"
    for row in (
        "| laws | 50 | 2.0e-16 | 1e-09 | met |",
        "| numbers | 5 | 3.0e-01 | 1e-04 | missed |",
        f"| {SHAPE} | 4e-03 `flash_fwd` |",
        "| 4B, all | 3,492 | 84.50 |",
        "| 4B, `flash_fwd` | 36 | 17.50 |",
        "| 4B | 1,000 | 1.00 | not measured | 1,000 | 1.00 | 1.0 | 9.5 | 10.0 |",
        f"| 4B | 2,000 | {none} | {none} | {none} | 4.00 | {none} | {none} | 12.0 |",
        "| 4B | 4,000 | 2.00 | 1.60 | 2,500 | 16.00 * | 10.0 | 9.6 | not measured |",
        "| 4B, CoMeT | 13.25 | 20.0 | not measured | not measured |",
        "| step: 4B, memory | 6.75 | 0.012 | 4,855 | 45.7 |",
        "| step: 4B, all | out of memory |  |  | 78.0 |",
        "- late: skipped: 12 s left, 45 s needed.",
    ):
        assert row in text
    assert "Measured: 13 of 15." in text and "A trial" not in text
    assert "](../benchmarks/results/gpu/gpu-training.png)" in text
    assert "gpu-prefill.png" not in text


def test_the_pictures_show_each_side_and_the_card():
    figure = report.plot_prefill(RESULT)
    (axes,) = figure.axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines["CoMeT"] == [[1000, 1], [4000, 2]]
    assert lines["full attention"] == [[1000, 1], [2000, 4]]
    (axes,) = report.plot_training(RESULT).axes
    assert [bar.get_width() for bar in axes.patches] == [45.7, 78.0]
    assert [text.get_text() for text in axes.texts] == ["6.8 s", "out of memory"]
    assert axes.lines[0].get_xdata() == [79.1, 79.1]
    nothing = RESULT | {"lines": LINES[:1]}
    assert report.plot_prefill(nothing) is None and report.plot_training(nothing) is None


# ---- the bundle


def closure(names):
    """Installed packages that these need, with themselves."""
    known, todo = set(), list(names)
    while todo:
        name = canonicalize_name(todo.pop())
        if name not in known:
            known.add(name)
            needed = map(Requirement, metadata.requires(name) or [])
            todo += [
                one.name for one in needed if not one.marker or one.marker.evaluate({"extra": ""})
            ]
    return known


def test_the_bundle_has_what_a_gpu_machine_lacks():
    """What the script and the tests marked gpu import, beyond the packages that are there."""
    (listed,) = re.findall(r"^BUNDLE := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    there = closure(["torch", "transformers", "lightning", "tensorboard", "matplotlib"])
    wanted = closure(["omegaconf", "peft", "zstandard", "pytest", "hypothesis"])
    assert set(listed.split()) == wanted - there


def test_the_bundle_installs_without_a_network_and_starts(tmp_path):
    """With a Python that only tells how it was called, and refuses one wheel."""
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\necho "$PYTHONPATH|$@" >> "$CALLS"\ncase "$*" in *pip*b.whl*) exit 1;; esac\n'
    )
    python.chmod(0o755)
    for name in ("a.whl", "b.whl"):
        (tmp_path / name).touch()
    script = tmp_path / "run.sh"
    script.write_text((ROOT / "benchmarks" / "gpu" / "run.sh").read_text())
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "OUT")}
    env |= {"PYTHON": str(python), "CALLS": str(tmp_path / "calls")}
    command = ["sh", str(script), "--minutes", "2"]
    without = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert without.returncode and "OUT=FOLDER is needed" in without.stderr
    assert not (tmp_path / "calls").exists()
    env["OUT"] = "results"
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == "left out: b.whl\n"
    calls = (tmp_path / "calls").read_text().splitlines()
    installs = [call for call in calls if "-m pip install" in call]
    assert [re.findall(r"\w\.whl", call) for call in installs] == [
        ["a.whl", "b.whl"],
        ["a.whl"],
        ["b.whl"],
    ]
    assert all("--no-index" in call for call in installs)
    path, start = calls[-1].split("|")
    assert start == "-u -m benchmarks.gpu --out results --minutes 2"
    assert f"--target {path} " in installs[0] and not Path(path).exists()
