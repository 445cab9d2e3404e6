"""A sweep's trainings end with it, whatever ends it.

The place of train.py is taken by a script that is quick to start.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from comet_pl import sweep
from comet_pl.errors import run_cli
from tests.commands.test_sweep import GRID

STAND_IN = """
import os, signal, sys, time
from pathlib import Path
given = dict(one.split("=", 1) for one in sys.argv[1:])
run = Path(given["run.root"]) / given.get("conf", "passkey") / given["run.name"]
run.mkdir(parents=True, exist_ok=True)

def save(number, frame):
    time.sleep(0.3)
    (run / "saved").write_text(str(number))
    sys.exit(128 + number)

for number in (1, 2, 15):
    if signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, save)
(run / "pid").write_text(str(os.getpid()))
time.sleep(60)
"""


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """begun(prepare): a sweep in a process of its own, and its two trainings' process ids."""
    (tmp_path / "train.py").write_text(STAND_IN)
    monkeypatch.setattr(sweep, "TRAIN", tmp_path / "train.py")
    argv = ["sweep", f"run.root={tmp_path / 'runs'}", *GRID, "sweep.jobs=2"]
    started = []

    def make(prepare=lambda: None):
        def run():
            os.setsid()
            prepare()
            sys.argv = argv
            run_cli(sweep.main)

        process = multiprocessing.get_context("fork").Process(target=run)
        process.start()
        started.append(process)
        until(lambda: len(files(tmp_path, "pid")) == 2 or not process.is_alive())
        return process, [int(text) for text in files(tmp_path, "pid")]

    yield make
    for process in started:
        process.kill()
        process.join()
    for pid in files(tmp_path, "pid"):
        subprocess.run(["kill", "-9", pid], check=False, capture_output=True)


def files(root, name):
    return [text for path in root.rglob(name) if (text := path.read_text())]


def until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("number", sweep.SIGNALS)
def test_a_signal_reaches_the_trainings(tmp_path, begun, number):
    process, pids = begun()
    os.kill(process.pid, number)
    process.join(20)
    assert process.exitcode == 128 + number
    assert files(tmp_path, "saved") == [str(int(number))] * 2
    assert not any(map(alive, pids))
    assert not list(tmp_path.rglob(sweep.DONE)) and len(files(tmp_path, "pid")) == 2


def test_a_signal_that_is_ignored_reaches_nobody(tmp_path, begun):
    """nohup."""
    process, pids = begun(lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    os.kill(process.pid, signal.SIGHUP)
    time.sleep(0.5)
    assert process.is_alive() and all(map(alive, pids)) and not files(tmp_path, "saved")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's end")
def test_the_trainings_of_a_killed_sweep_save_and_end(tmp_path, begun):
    process, pids = begun()
    process.kill()
    process.join()
    until(lambda: files(tmp_path, "saved") == ["15", "15"])
    until(lambda: not any(map(alive, pids)))
