"""Threads of a CPU that others use: as many as there are free cores."""

import os
import time

import pytest
import torch

from callbacks.cpu_share import CpuShare
from comet_pl import threads
from comet_pl.progress import Bar
from tests.support.models import tiny
from tests.support.training import fit, ragged

TICKS = os.sysconf("SC_CLK_TCK")


class Machine:
    """Two cores of which others take a part, for a process that uses what it can."""

    def __init__(self, monkeypatch, file):
        self.file, self.now, self.own, self.idle = file, 0.0, 0.0, [0.0, 0.0]
        self.threads = 2
        monkeypatch.setattr(threads, "STAT", file)
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3})
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "process_time", lambda: self.own)
        monkeypatch.setattr(torch, "get_num_threads", lambda: self.threads)
        monkeypatch.setattr(torch, "set_num_threads", lambda n: setattr(self, "threads", n))
        self.write()

    def write(self):
        ticks = [0, 0, 0, *(round(idle * TICKS) for idle in self.idle)]
        idle = {0: ticks[3], 1: 10**6 * self.now, 2: 0, 3: ticks[4]}  # 1 is not this process's
        lines = [f"cpu{core} 9 9 9 {int(n)} 0 9" for core, n in idle.items()]
        self.file.write_text("\n".join(["cpu 1 2 3 4 5 6", *lines, "intr 7"]))

    def run(self, seconds, others):
        """Others have so many busy processes; the system shares the cores evenly."""
        self.now += seconds
        mine = min(self.threads, 2 * self.threads / (self.threads + others))
        self.own += mine * seconds
        self.idle[0] += max(0.0, 2 - mine - min(others, 2 - mine)) * seconds
        self.write()


@pytest.fixture
def machine(monkeypatch, tmp_path):
    return Machine(monkeypatch, tmp_path / "stat")


def test_threads_follow_the_free_cores(machine):
    share, seen = threads.ThreadShare(), []
    for others in (0, 0, 1, 1, 2, 5, 1, 0, 0):
        machine.run(1.5, others)
        share.adjust()
        seen.append(machine.threads)
    assert seen == [2, 2, 1, 1, 1, 1, 1, 2, 2]
    machine.run(1.5, 3)
    share.adjust()
    share.restore()
    assert machine.threads == 2


def test_it_looks_once_a_second(machine):
    share = threads.ThreadShare()
    machine.run(0.9, 5)
    share.adjust()
    assert machine.threads == 2
    machine.run(0.2, 5)
    share.adjust()
    assert machine.threads == 1


@pytest.mark.parametrize("absent", ["file", "second thread"])
def test_nothing_changes_where_nothing_is_known(absent, machine, monkeypatch):
    if absent == "file":
        machine.file.unlink()
    else:
        machine.threads = 1
    before, share = machine.threads, threads.ThreadShare()
    machine.now, machine.own = 100.0, 0.0
    share.adjust()
    assert machine.threads == before


def test_the_system_says_how_idle_it_is():
    before = threads.idle_seconds()
    time.sleep(0.05)
    assert threads.idle_seconds() >= before >= 0
    assert not threads.STAT.exists() or before > 0


def test_training_and_progress_bars_adjust(machine, monkeypatch):
    counted = []
    monkeypatch.setattr(threads.ThreadShare, "adjust", lambda self: counted.append("adjusted"))
    monkeypatch.setattr(threads.ThreadShare, "restore", lambda self: counted.append("restored"))
    fit(tiny(), [ragged([6, 9], 1.0)] * 3, callbacks=[CpuShare()])
    assert counted == [*["adjusted"] * 3, "restored"]
    with Bar(10) as bar:
        bar.add(4)
    assert counted[4:] == ["adjusted", "restored"]
