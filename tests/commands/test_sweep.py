"""Sweeps: which runs a grid has, what is refused, and that a killed sweep continues to the same
table."""

import json
import multiprocessing
import os
import re
import shlex
import signal
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from comet_pl import sweep
from comet_pl.config.load import load
from comet_pl.errors import UserError
from comet_pl.experiment import sweep_table
from tests.support.models import FEW
from tests.support.tiny_runs import ROOT, TINY

SMALL = [
    *TINY,
    "trainer.max_steps=6",
    "trainer.limit_val_batches=1",
    "trainer.val_check_interval=3",
    "checkpoint.every_steps=2",
    "data.train_length=48",
    "data.length_schedule=null",
    "data.batch_size=2",
    "data.val_depths=2",
    "data.val_examples=1",
    "eval.lengths=[48]",
    "eval.depths=1",
    "eval.examples=1",
]
GRID = ["model.gate=[scalar,none]", "seed=[0,1]"]


def points(*argv):
    return [run.point for run in sweep.plan([*argv])[1]]


# ---- the grid


def test_every_combination_and_the_last_list_fastest():
    found = points("model.global_size=[0,4]", "seed=[0,1,2]", "train.lr=1e-3")
    assert found == [{"model.global_size": m, "seed": s} for m in "04" for s in "012"]


@pytest.mark.parametrize(
    ("argument", "items"),
    [
        ("model.gate=[scalar,none]", ["scalar", "none"]),
        ("model.gate_bias=[null,5.0]", ["null", "5.0"]),
        ("eval.lengths=[64,128]", None),
        ("eval.lengths=[[64],[128,256]]", ["[64]", "[128, 256]"]),
        ("data.length_schedule=[[0,64],[60,128]]", None),
        ("data.length_schedule=[[[0,64],[60,128]],null]", ["[[0, 64], [60, 128]]", "null"]),
        ("train.betas=[0.9,0.99]", None),
        ("trainer.devices=[0,1]", None),
        ("data.haystack=[a b.txt,'null']", ["a b.txt", "'null'"]),
        ("model=[{}, {gate: none}]", ["{}", "{gate: none}"]),
        ("seed=3", None),
    ],
)
def test_a_list_is_swept_unless_the_key_takes_it(argument, items):
    assert sweep.list_items(*argument.split("=", 1)) == items


@FEW
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True),
    st.lists(st.floats(1e-6, 1), min_size=1, max_size=2, unique=True),
)
def test_the_runs_are_what_train_py_makes_of_each_point(sizes, rates):
    _, runs = sweep.plan([f"model.global_size={sizes}", f"train.lr={rates}"])
    configs = [load(run.arguments) for run in runs]
    assert [(one.model.global_size, one.train.lr) for one in configs] == [
        (size, rate) for size in sizes for rate in rates
    ]
    assert len({run.folder for run in runs}) == len(runs)


def test_sections_and_nulls_reach_the_run():
    _, runs = sweep.plan(
        [
            "model=[{}, {global_size: 0, compression_stride: null}]",
            "data.length_schedule=[null,[[0,64]]]",
        ]
    )
    configs = [load(run.arguments) for run in runs]
    assert [one.model.global_size for one in configs] == [8, 8, 0, 0]
    assert configs[2].model.compression_stride is None
    assert [one.data.length_schedule for one in configs[:2]] == [None, [[0, 64]]]


def test_a_folder_depends_on_the_whole_configuration(tmp_path):
    root = f"run.root={tmp_path}"
    [[one], [other], [again]] = [
        sweep.plan([root, *keys])[1]
        for keys in (["seed=[1]"], ["seed=[1]", "train.lr=1e-5"], ["seed=[1]"])
    ]
    assert one.folder == again.folder != other.folder
    one.folder.mkdir(parents=True)
    [_, found] = sweep.plan([root, "train.clip=[2.0,1.0]", "seed=1"])[1]
    assert found.folder == one.folder  # the same run in a grid of other lists


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (
            ["model.globl_size=[0,4]"],
            r"^model\.globl_size: no such key \(did you mean model\.global_size\?\)$",
        ),
        (["seed=[]"], r"^seed: \[\] given, which makes a sweep of no runs"),
        (["eval.lengths=[]"], r"^eval\.lengths: \[\] given"),
        (["seed=[0,-1]"], r"^seed: -1 given, allowed"),
        (["seed=[0,1"], r"^seed: '\[0,1' cannot be read"),
        (["seed=[0,0]"], r"^seed=0: the same configuration as seed=0"),
        (
            ["model=[{}, {gate: scalar}]"],
            r"^model=gate_scalar: the same configuration as model=default",
        ),
        (["model=[{gat: none}]"], r"^model\.gat: no such key"),
        (["train.betas=[[0.9,0.9],[2,0.9]]"], r"^train\.betas: \[2, 0\.9\] given"),
        (["run.name=x"], r"^run\.name: x given, but a sweep names its runs itself"),
        (["resume=true"], r"^resume: true given, but"),
        (["conf=[passkey,scrolls]"], r"^conf: \[passkey,scrolls\] given, but a sweep has one"),
        (["conf=ablation/memory_size"], r"no such conf \(did you mean ablation/memory_sizes\?\)"),
        (["sweep.job=2"], r"^sweep\.job: no such key \(did you mean sweep\.jobs\?\)"),
        (["sweep.jobs=0"], r"^sweep\.jobs: 0 given, allowed: integer >= 1"),
        (["sweep.name=a/b"], r"^sweep\.name: 'a/b' given, allowed: letters"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_written(tmp_path, argv, match):
    with pytest.raises(UserError, match=match) as error:
        sweep.main([f"run.root={tmp_path}", *argv])
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_shows_the_grid_and_writes_nothing(tmp_path, capsys):
    sweep.main([f"run.root={tmp_path}", *GRID, "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["new"] * 4 + ["4"]
    assert "gate=none,seed=1-" in lines[3]
    assert not list(tmp_path.iterdir())


def test_the_commands_of_the_experiments_page_are_grids():
    page = (ROOT / "docs" / "experiments.md").read_text("utf-8")
    commands = [
        shlex.split(text)[3:] for text in re.findall(r"python -m comet_pl\.sweep [^`]*", page)
    ]
    sizes = {
        argv[0].removeprefix("conf=ablation/"): len(sweep.plan(argv)[1])
        for argv in commands
        if argv[0].startswith("conf=")
    }
    confs = {path.stem for path in (ROOT / "conf" / "ablation").glob("*.yaml")} - {"task"}
    assert set(sizes) == confs
    assert sizes["memory_sizes"] == 24 and sizes["which_memory"] == 21 and sizes["chunk_plans"] == 6


# ---- the table

FOUND = [
    (
        {"model.gate": "scalar", "seed": "0"},
        {"val/loss": 1.0, "passkey/64": 0.5, "passkey/128": 0.25},
    ),
    (
        {"model.gate": "scalar", "seed": "1"},
        {"val/loss": 2.0, "passkey/64": 1.0, "passkey/128": 0.25},
    ),
    ({"model.gate": "a|b", "seed": "0"}, {"val/loss": 30.0, "passkey/64": 0.0}),
]


def test_seeds_are_taken_together():
    groups = sweep_table.group(FOUND)
    assert list(groups) == [(("model.gate", "scalar"),), (("model.gate", "a|b"),)]
    assert groups[(("model.gate", "scalar"),)]["val/loss"] == (1.5, pytest.approx(0.5**0.5), 2)
    assert groups[(("model.gate", "a|b"),)] == {
        "val/loss": (30.0, None, 1),
        "passkey/64": (0.0, None, 1),
    }


def test_markdown_csv_and_picture(tmp_path, capsys):
    sweep_table.write(tmp_path / "table", FOUND, ["passkey/*", "val/loss"], Console())
    assert (tmp_path / "table.md").read_text().splitlines() == [
        "| model.gate | passkey/64 | passkey/128 | val/loss |",
        "| :-- | --: | --: | --: |",
        "| scalar | 0.750 ± 0.354 | 0.250 ± 0.000 | 1.500 ± 0.707 |",
        "| a\\|b | 0.000 |  | 30.0 |",
        "",
        "1 to 2 seeds; mean ± standard deviation",
    ]
    assert (tmp_path / "table.csv").read_text().splitlines() == [
        "model.gate,seed,val/loss,passkey/64,passkey/128",
        "scalar,0,1.0,0.5,0.25",
        "scalar,1,2.0,1.0,0.25",
        "a|b,0,30.0,0.0,",
    ]
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*"))
    assert "a|b" in capsys.readouterr().out


def test_a_metric_that_no_run_has():
    with pytest.raises(
        UserError, match=r"^sweep\.metrics: 'passky/\*' given, but no metric is called so"
    ):
        sweep_table.choose(FOUND, ["passky/*"])


def test_numbers_of_an_evaluation(tmp_path):
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "scrolls.json").write_text(
        json.dumps({"qmsum": {"f1": 3, "n": 9, "ok": True, "cells": [1]}, "average": 2.5})
    )
    (tmp_path / "eval" / "passkey.json").write_text(
        json.dumps({"mean": {"64": 0.5}, "train_length": 64, "weights": "ab"})
    )
    assert sweep_table.read_values(tmp_path) == {
        "passkey/64": 0.5,
        "scrolls/qmsum/f1": 3.0,
        "scrolls/average": 2.5,
    }


# ---- runs (train.py's place is taken by a script that is quick to start, but for the last test)

STAND_IN = """
import json, os, sys, time
from pathlib import Path
given = dict(one.split("=", 1) for one in sys.argv[1:])
assert given["resume"] == "true"
run = Path(given["run.root"]) / given.get("conf", "passkey") / given["run.name"]
run.mkdir(parents=True, exist_ok=True)
with open(run / "starts", "a") as file:
    file.write("x")
if given["seed"] == os.environ.get("FAILS"):
    sys.exit("error: this seed is unlucky")
if given["seed"] == "1" and "SLOW" in os.environ:
    time.sleep(60)
(run / "eval").mkdir(exist_ok=True)
score = int(given["seed"]) + (given["model.gate"] == "none") / 2
(run / "eval" / "passkey.json").write_text(json.dumps({"mean": {"48": score}}))
"""


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """A sweep's arguments, with the stand-in for train.py."""
    (tmp_path / "train.py").write_text(STAND_IN)
    monkeypatch.setattr(sweep, "TRAIN", tmp_path / "train.py")
    return [f"run.root={tmp_path / 'runs'}", *GRID]


def tables(root: Path):
    return [(root / "passkey" / f"sweep.{end}").read_text() for end in ("md", "csv")]


def starts(root: Path):
    """How often each run was started, by name."""
    return {
        path.parent.name.rsplit("-", 1)[0]: len(path.read_text()) for path in root.rglob("starts")
    }


def kill_when(ready, target, *arguments):
    """Calls the target in a process of its own, and kills it with all that it has started once
    ready() is true."""

    def session():
        os.setsid()
        target(*arguments)

    process = multiprocessing.get_context("fork").Process(target=session)
    process.start()
    try:
        end = (
            time.monotonic() + 900
        )  # a watchdog: on a machine that does much else a start takes minutes
        while not ready() and time.monotonic() < end:
            assert process.is_alive(), "it ended by itself"
            time.sleep(0.02)
        assert ready()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()


def test_killed_in_two_of_its_runs_and_started_again(tmp_path, quick, monkeypatch, capsys):
    root, argv = tmp_path / "runs", [*quick, "sweep.jobs=2"]
    monkeypatch.setenv("SLOW", "1")
    kill_when(
        lambda: len(starts(root)) == 4 and len(list(root.rglob(sweep.DONE))) == 2, sweep.main, argv
    )
    assert not (root / "passkey" / "sweep.md").exists()
    monkeypatch.delenv("SLOW")
    sweep.main(argv)
    assert starts(root) == {
        "gate=scalar,seed=0": 1,
        "gate=scalar,seed=1": 2,
        "gate=none,seed=0": 1,
        "gate=none,seed=1": 2,
    }
    assert tables(root)[0].splitlines()[2:4] == [
        "| scalar | 0.500 ± 0.707 |",
        "| none | 1.000 ± 0.707 |",
    ]
    before = tables(root)
    capsys.readouterr()
    sweep.main(argv)
    assert "4 of them finished already" in capsys.readouterr().out
    assert tables(root) == before
    assert max(starts(root).values()) == 2


def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path, quick, monkeypatch, capsys):
    root = tmp_path / "runs"
    monkeypatch.setenv("FAILS", "0")
    with pytest.raises(SystemExit, match="1"):
        sweep.main(quick)
    shown = capsys.readouterr().out
    assert shown.count("failed: gate=") == 2
    assert "exit code 1: error: this seed is unlucky" in shown
    assert f"all it said: {root / 'passkey'}" in shown
    assert shown.splitlines()[-1] == "2 of 4 runs are not finished; the same command continues them"
    assert tables(root)[0].splitlines()[2:4] == ["| scalar | 1.000 |", "| none | 1.500 |"]
    monkeypatch.delenv("FAILS")
    sweep.main(quick)
    assert starts(root) == {
        "gate=scalar,seed=0": 2,
        "gate=scalar,seed=1": 1,
        "gate=none,seed=0": 2,
        "gate=none,seed=1": 1,
    }


def test_a_run_that_another_process_is_at_is_left_alone(tmp_path):
    _, [run] = sweep.plan([f"run.root={tmp_path}", "seed=[1]"])
    run.log.parent.mkdir(parents=True)
    with run.log.open("ab") as log:
        sweep.fcntl.flock(log, sweep.fcntl.LOCK_EX)
        assert sweep.run_all([run], 1, Console()) == [run]
    assert run.log.read_bytes() == b""


@pytest.mark.slow
def test_a_sweep_of_real_runs_killed_in_the_middle_of_one_gives_the_same_table(tmp_path):
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    argv = [*SMALL, *GRID]
    kill_when(
        lambda: len(list(killed.rglob("last.ckpt"))) == 2, sweep.main, [f"run.root={killed}", *argv]
    )
    assert len(list(killed.rglob(sweep.DONE))) == 1
    sweep.main([f"run.root={killed}", *argv])
    sweep.main([f"run.root={straight}", *argv])
    assert tables(killed) == tables(straight)
    assert "passkey/48" in tables(killed)[0] and "val/loss" in tables(killed)[0]
    begun = sweep.plan([f"run.root={killed}", *argv])[1][1]
    assert [
        path for path in killed.rglob("*.log") if "continues from step" in path.read_text()
    ] == [begun.log]


@pytest.mark.parametrize(
    "content",
    ["[1]", "null", '{"val/loss": {"a": 1}}', '{"val/loss": NaN}', '{"val/loss": "x"}', "{"],
)
def test_a_result_that_is_no_number_is_no_result(tmp_path, content):
    """Such a run is not finished; the same sweep does it again."""
    run = sweep.SweptRun({}, [], tmp_path)
    (tmp_path / sweep.DONE).write_text('{"val/loss": 1.5}')
    assert run.values == {"val/loss": 1.5}
    (tmp_path / sweep.DONE).write_text(content)
    assert run.values is None
