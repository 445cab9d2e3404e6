"""One script on a GPU: nothing that ends badly costs more than itself, and the page has it all."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

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

    def run(groups, minutes, more=()):
        out = ["--out", str(tmp_path / "out"), "--minutes", str(minutes)]
        gpu.main([*TINY, *more, *out, "--groups", *groups])
        return json.loads((tmp_path / "out" / "gpu.json").read_text())["lines"]

    return run


# ---- the driver


@pytest.mark.slow
def test_a_group_that_breaks_loses_its_rest_alone(toy, capsys, tmp_path):
    """One is killed in its third measurement, one meets an error of its own, one an error of CUDA
    after which nothing can be measured there."""
    lines = toy(["training", "law", "speed"], minutes=3)
    results = [line.get("sum", line.get("error", line.get("skipped"))) for line in lines]
    # In the plan's order, whatever the order of --groups.
    assert [line["what"] for line in lines][:5] == ["sum 1", "sum 2", "dies", "sum 3", "sum 4"]
    assert results == [
        2,
        results[1],
        "its process ended with status -9",
        "its group had ended",
        "its group had ended",
        "RuntimeError: mat1 and mat2 shapes cannot be multiplied (1x3 and 2x2)",
        6,
        "RuntimeError: CUDA error: an illegal memory access was encountered",
        "its process ended with status 1",
    ]
    assert re.fullmatch(r"\d+ s left, 1000000 s needed", results[1])
    # The project's line, not torch's.
    assert re.fullmatch(r"tests/support/gpu_plan\.py:\d+", lines[5]["where"])
    assert "illegal memory access" in (tmp_path / "out" / "gpu-log.txt").read_text()
    printed = capsys.readouterr().out
    assert "2 of 9 measured" in printed and "error: RuntimeError: mat1 and mat2" in printed


@pytest.mark.slow
def test_the_rest_of_a_run_before(toy, tmp_path):
    """What has a result keeps it; the lines that had none are measured."""
    toy(["law", "speed"], minutes=3)
    file = tmp_path / "out" / "gpu.json"
    before = json.loads(file.read_text())
    before["lines"][0]["sum"] = "kept"
    file.write_text(json.dumps(before))
    results = [
        line.get("sum", line.get("error", line.get("skipped")))
        for line in toy(["law", "speed"], minutes=3, more=["--rest"])
    ]
    assert results[0] == "kept" and len(results) == len(before["lines"])
    assert results[2] == "its process ended with status -9"
    before["machine"]["gpu"] = "another card"
    file.write_text(json.dumps(before))
    with pytest.raises(UserError, match=r"--rest: .* of another kind: another card"):
        toy(["law"], minutes=3, more=["--rest"])
    file.unlink()
    with pytest.raises(UserError, match="--rest: no results of a run before in"):
        toy(["law"], minutes=3, more=["--rest"])


@pytest.mark.slow  # it waits for the end of the time
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


def test_the_gpu_tests_are_those_of_the_files_that_have_one(place, monkeypatch):
    called = []

    def start(place, name, *argv, **env):
        called.extend(argv)
        return real(place, name, "-c", "print('8 passed')")

    real = commands.start
    monkeypatch.setattr(commands, "start", start)
    assert commands.gpu_tests(place)["summary"] == "8 passed"
    files = [Path(name) for name in called if name.endswith(".py")]
    names = {str(file.relative_to(ROOT / "tests")) for file in files}
    assert {"model/test_attention.py", "benchmarks/test_decode.py"} <= names
    assert all("mark.gpu" in file.read_text() for file in files) and len(files) < 10
    assert called[:5] == ["-m", "pytest", "-q", "-m", "gpu"]


def test_a_watched_script_tells_its_seconds(place, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys, time; time.sleep(0.3); print(sys.argv[1:], __name__)")
    text, facts = commands.watched(place, "x", str(script), "a=1")
    assert text.startswith("['a=1'] __main__\n") and 0.2 <= facts["seconds"] < 30


# ---- the whole


@pytest.mark.slow
def test_the_speed_of_both_sides_is_measured(tmp_path, capsys):
    """A group of the real plan, from its options to its picture."""
    gpu.main([*TINY, "--groups", "speed", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert [line["what"] for line in result["lines"]] == [one.what for one in plan.SPEED]
    done = [line for line in result["lines"] if report.measured(line)]
    assert [line["what"] for line in result["lines"] if line not in done] == [
        "4B, attention of a chunk by two kernels",
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
