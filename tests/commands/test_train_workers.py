"""train.py with workers: one that is killed or stopped, and signals to all processes at once."""

import os
import signal
import time

import pytest
import torch

from tests.support.pipeline_runs import (
    ENDLESS,
    LONG,
    ONE,
    Training,
    on_one,
    processes,
    same_run,
    until,
)

WORKERS = [*ONE, "data.num_workers=2", "checkpoint.every_steps=2"]
pytestmark = pytest.mark.slow


def begun(run):
    """Waits for a few steps; returns the workers."""
    run.at_step(6)
    until(lambda: len(processes(run.main.pid)) == 3, 20, run.err)
    return sorted(set(processes(run.main.pid)) - {run.main.pid})


def test_a_killed_worker_is_one_line_and_the_run_goes_on(tmp_path):
    with Training(tmp_path, "killed", *LONG, on=WORKERS) as run:
        os.kill(begun(run)[0], signal.SIGKILL)
        assert run.ended(30) == 2
    (line,) = run.errors()
    assert line.startswith("error: data.num_workers: DataLoader worker (pid")
    assert line.endswith("resume=true goes on from the last checkpoint")
    folder = on_one(tmp_path, "killed", *LONG, "resume=true")
    same_run(folder, on_one(tmp_path / "straight", "run", *LONG))


def test_a_stopped_worker_is_one_line(tmp_path):
    with Training(tmp_path, "stopped", *ENDLESS, on=WORKERS) as run:
        victim = begun(run)[0]
        os.kill(victim, signal.SIGSTOP)
        started = time.monotonic()
        assert run.ended(90) == 2
        assert time.monotonic() - started < 60
    (line,) = run.errors()
    assert line.startswith(f"error: data.num_workers: worker process {victim} has been stopped for")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_to_all_processes_saves(tmp_path, number):
    """As a terminal and a scheduler send it; twice at once, as timeout does."""
    with Training(tmp_path, "signal", *ENDLESS, on=WORKERS) as run:
        begun(run)
        os.killpg(run.main.pid, number)
        time.sleep(0.05)
        os.kill(run.main.pid, number)
        assert run.ended(30) == 128 + number, run.err.read_text()
    assert run.errors() == []
    saved = torch.load(run.path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert f"stopped after step {saved}, saved in" in run.out.read_text()
