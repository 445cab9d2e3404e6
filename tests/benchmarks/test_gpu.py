"""One script on a GPU: nothing that ends badly costs more than itself, and the page has it all."""

import json
import os
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks import performance
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import commands, law, measure, plan, report
from benchmarks.gpu.measure import Place, line_of, planned
from benchmarks.shared import processes
from benchmarks.shared.options import ROOT, SIZES
from comet_pl import CometForCausalLM
from comet_pl.errors import UserError

TINY = ["--tiny", "--device", "cpu"]
MODULE = [sys.executable, "-m", "benchmarks.gpu"]
CLOCK_SLACK = 3  # seconds that a busy machine may add to the end of a run


@pytest.fixture
def place(tmp_path):
    return Place("cpu", tiny=True, scratch=tmp_path)


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """Runs groups of tests/support/gpu_plan.py; the lines of gpu.json."""
    monkeypatch.setattr(gpu, "PLAN", "tests.support.gpu_plan")

    def run(groups, minutes):
        out = ["--out", str(tmp_path / "out"), "--minutes", str(minutes)]
        gpu.main([*TINY, *out, "--groups", *groups])
        return json.loads((tmp_path / "out" / "gpu.json").read_text())["lines"]

    return run


# ---- the driver


def test_a_group_that_breaks_loses_its_rest_alone(toy, capsys, tmp_path):
    """One is killed in its third measurement, one meets an error of its own, one an error of CUDA
    after which nothing can be measured there."""
    lines = toy(["training", "law", "speed"], minutes=3)
    results = [
        line.get("sum", line.get("error", line.get("skipped"))) for line in lines
    ]  # in the plan's order, whatever the order of --groups
    assert [line["what"] for line in lines][:5] == ["sum 1", "sum 2", "dies", "sum 3", "sum 4"]
    assert results == [
        2,
        results[1],
        "its process ended with status -9",
        "its group had ended",
        "its group had ended",
        "ValueError: no such luck",
        6,
        "RuntimeError: CUDA error: an illegal memory access was encountered",
        "its process ended with status 1",
    ]
    assert re.fullmatch(r"\d+ s left, 1000000 s needed", results[1])
    assert lines[5]["where"].rpartition(":")[0].endswith("tests/support/gpu_plan.py")
    assert "illegal memory access" in (tmp_path / "out" / "gpu-log.txt").read_text()
    printed = capsys.readouterr().out
    assert "2 of 9 measured" in printed and "error: ValueError: no such luck" in printed


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked up in /proc")
def test_what_hangs_is_killed_in_time_with_all_its_processes(toy, monkeypatch, tmp_path):
    note = tmp_path / "pid"
    monkeypatch.setenv("GPU_PLAN_NOTE", str(note))
    start, minutes = time.monotonic(), 0.3
    first, hung, after = toy(["commands"], minutes)
    assert time.monotonic() - start < 60 * minutes + CLOCK_SLACK
    assert first["sum"] == 8 and hung["error"] == "its group's time was over"
    assert after["skipped"] == "its group had ended"
    pid = int(note.read_text())
    until = time.monotonic() + 10
    while processes.proportional(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert processes.proportional(pid) == 0


def test_half_a_line_is_left_out(tmp_path):
    file = tmp_path / "lines"
    measure.append_line(file, {"group": "law", "what": "a"})
    measure.append_line(file, {"group": "speed", "what": "b"})
    with file.open("a") as lines:
        lines.write('{"group": "law", "wh')
    assert gpu.lines_of(file, "law") == [{"group": "law", "what": "a"}]
    assert gpu.lines_of(tmp_path / "none", "law") == []


def test_deadlines_share_the_time_among_the_chosen_groups():
    everything = gpu.deadlines(list(gpu.SHARES), 1000, 8)
    assert list(everything) == ["law", "speed", "training", "commands"]
    assert everything["law"] == pytest.approx(1000 + 0.27 * 472)
    assert everything["commands"] == pytest.approx(1000 + 472)
    two = gpu.deadlines(["speed", "law"], 0, 1)
    assert two == pytest.approx({"law": 52 * 27 / 70, "speed": 52})
    assert gpu.deadlines(["law"], 0, 0.5) == pytest.approx({"law": 24})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cpu"], "--device: cpu given, but its models are for a GPU; --tiny is need"),
        (["--groups", "laws"], "--groups: invalid choice: 'laws' (choose from"),
        (["--minutes", "0"], "--minutes: 0.0 given, a number > 0"),
        (["--minute", "5"], "unrecognized arguments: --minute"),
        ([*TINY, "--out", f"{__file__}/x"], "cannot be made: Not a directory"),
        ([], "--device: torch sees no GPU here; --tiny --device cpu tries"),
    ],
)
def test_mistakes_in_one_line(options, message, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = options if "--out" in options else [*options, "--out", str(tmp_path)]
    with pytest.raises(UserError) as caught:
        gpu.main(options)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_plan_names_each_measurement_once():
    assert list(plan.PLAN) == list(plan.SHARES)
    assert sum(plan.SHARES.values()) == pytest.approx(1)
    assert SIZES["options"]["gpu"]["arguments"]["--groups"]["choices"] == list(plan.PLAN)
    names = [one.what for group in plan.PLAN.values() for one in group]
    assert len(set(names)) == len(names)


# ---- a measurement


def test_too_little_time_is_said_and_nothing_is_measured(place):
    asked = []

    def note(place, a):
        asked.append(a)
        return {"a": a}

    long = planned("x", 50, note, tiny_seconds=2, a=1)
    real = Place("cpu", tiny=False, scratch=place.scratch)
    skipped = line_of(long, real, time.time() + 10.2)
    assert skipped == {"what": "x", "kind": "note", "skipped": "10 s left, 50 s needed"}
    assert line_of(long, place, time.time() - 5)["skipped"] == "0 s left, 2 s needed"
    only = planned("y", 0, note, gpu_only=True, a=2)
    assert line_of(only, place, time.time() + 99)["skipped"] == "it needs a GPU"
    assert asked == []
    assert line_of(long, place, time.time() + 10)["a"] == 1 and asked == [1]


def test_the_worst_error_is_nan_where_there_is_one():
    verdict = measure.within({"a": 0.5, "b": float("nan"), "c": 3.0}, 1)
    assert verdict["worst"] != verdict["worst"] and not verdict["met"]
    assert set(verdict["bad"]) == {"b", "c"}
    assert measure.within({"a": 0.5}, 0.5)["met"]
    one = torch.tensor([3.0, 4.0])
    assert measure.relative(one * 1.5, one) == pytest.approx(0.5)
    assert measure.relative(one / 0, one) != measure.relative(one / 0, one)


def test_golden_sees_a_changed_weight(place, monkeypatch):
    assert law.golden(place, "float32")["met"] and law.golden(place, "float32")["greedy_equal"]
    load = CometForCausalLM.from_pretrained

    def spoiled(folder):
        model = load(folder)
        model.model.layers[0].mlp.down_proj.weight.data *= 1.01
        return model

    monkeypatch.setattr(law.CometForCausalLM, "from_pretrained", spoiled)
    result = law.golden(place, "float32")
    assert not result["met"] and result["worst"] > 1e-4


def test_the_laws_see_a_changed_weight(place, monkeypatch):
    monkeypatch.setattr(law, "FAMILIES", ("qwen3",))
    result = law.laws(place)
    assert result["checks"] == 10 and result["met"]
    make, made = law.tiny_decoder, []

    def other(family):
        made.append(make(family))
        made[-1].lm_head.weight.data[0] *= len(made)
        return made[-1]

    monkeypatch.setattr(law, "tiny_decoder", other)
    monkeypatch.setattr(CometForCausalLM, "weight_digest", lambda self: "the same")
    bad = set(law.laws(place)["bad"])
    assert {f"qwen3, {what}" for what in ("whole", "ragged", "token by token")} <= bad
    assert "qwen3, gradients chunk, offloaded" in bad


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_sees_a_wrong_scale(place, monkeypatch, dtype):
    result = law.attention(place, dtype)
    assert result["met"] and result["checks"] == 4 * 4 * 2
    right = law.attend
    monkeypatch.setattr(law, "attend", lambda *args: right(*args[:-1], 1.2 * args[-1]))
    assert not law.attention(place, dtype)["met"]


def test_a_command_that_fails_says_why(place):
    done = commands.start(place, "a", "-c", "print(7)").finish(60)
    assert done == "7\n"
    failing = commands.start(place, "b", "-c", "print(1, 2, 3, sep='\\n'); print('so'); exit(3)")
    with pytest.raises(commands.CommandFailed, match=r"^status 3: 2 / 3 / so$"):
        failing.finish(60)
    with pytest.raises(commands.CommandFailed, match=r"^status none after 0\.5 s"):
        commands.start(place, "c", "-c", "import time; time.sleep(60)").finish(0.5)
    text = "step 1/4 loss 6.24 tokens/s 2,857\nstep 2/4 loss nan\nx step 3/4 loss 1\n"
    assert list(commands.losses(text)) == [1, 2] and commands.losses(text)[1] == 6.24


def test_a_watched_script_tells_its_seconds(place, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys, time; time.sleep(0.2); print(sys.argv[1:], __name__)")
    text, facts = commands.watched(place, "x", str(script), "a=1")
    assert text.startswith("['a=1'] __main__\n") and 0.2 < facts["seconds"] < 30


# ---- the whole


def test_the_speed_of_both_sides_is_measured(tmp_path, capsys):
    """A group of the real plan, from its options to its picture."""
    gpu.main([*TINY, "--groups", "speed", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert [line["what"] for line in result["lines"]] == [one.what for one in plan.SPEED]
    done = [line for line in result["lines"] if report.measured(line)]
    assert [line["what"] for line in result["lines"] if line not in done] == [
        "4B, kernels of a chunk",
        "0.6B, kernels of a chunk",
    ]
    assert all(line.get("ms", line.get("seconds", 0)) > 0 for line in done)
    rows = report.comparison(report.of_kind(result["lines"], "prefill"))
    assert [(row["model"], row["tokens"]) for row in rows] == [
        *(("0.6B", n) for n in (64, 256, 1024, 4096)),
        *(("4B", n) for n in (64, 256, 512, 1024, 4096)),
    ]
    assert [row["extrapolated"] for row in rows] == [False] * 3 + [True] + [False] * 3 + [True] * 2
    assert (tmp_path / "gpu-prefill.png").stat().st_size > 1000
    assert not (tmp_path / "gpu-training.png").exists()
    assert f"{len(done)} of {len(plan.SPEED)} measured" in capsys.readouterr().out


@pytest.mark.slow
def test_everything_is_tried(tmp_path):
    command = [*MODULE, *TINY, "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "gpu.json").read_text())
    missing = {line["what"] for line in result["lines"] if not report.measured(line)}
    assert missing == {one.what for group in plan.PLAN.values() for one in group if one.gpu_only}
    assert len(missing) == 5
    assert all(line["met"] for line in result["lines"] if "met" in line)
    for what in ("authors' numbers, float32", "two processes on one device", "train.py, resumed"):
        assert what in {line["what"] for line in result["lines"] if "met" in line}
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "gpu-lines.jsonl",
        "gpu-log.txt",
        "gpu-prefill.png",
        "gpu.json",
    ]


# ---- the page


def a_prefill(attention, tokens, seconds, peak):
    facts = {"what": f"{attention} {tokens}", "kind": "prefill", "model": "4B", "took": seconds}
    facts |= {"attention": attention, "tokens": tokens, "seconds": seconds, "peak_gib": peak}
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
    # A token after n others costs n seconds / 10^6: 1 s, 4 s; then 16 s.
    a_prefill("full", 1000, 1.0, 10.0),
    a_prefill("full", 2000, 4.0, 12.0),
    {
        "what": "decoding",
        "kind": "decode",
        "model": "4B",
        "attention": "CoMeT",
        "cudnn": False,
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
    for row in (
        "| laws | 50 | 2.0e-16 | 1e-09 | met |",
        "| numbers | 5 | 3.0e-01 | 1e-04 | missed |",
        f"| {SHAPE} | 4e-03 `flash_fwd` |",
        "| 4B, all | 3,492 | 84.50 |",
        "| 4B, `flash_fwd` | 36 | 17.50 |",
        "| 4B | 1,000 | 1.00 | 1,000 | 1.00 | 1.0 | 9.5 | 10.0 |",
        "| 4B | 2,000 | not measured | not measured | 4.00 | not measured | not measured | 12.0 |",
        "| 4B | 4,000 | 2.00 | 2,000 | 16.00 * | 8.0 | 9.5 | not measured |",
        "| 4B, CoMeT | 13.25 | 20.0 | not measured | not measured |",
        "| step: 4B, memory | 6.75 | 0.012 | 4,855 | 45.7 |",
        "| step: 4B, all | out of memory |  |  | 78.0 |",
        "- late: skipped: 12 s left, 45 s needed.",
    ):
        assert row in text
    assert "Measured: 12 of 14." in text and "A trial" not in text
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
