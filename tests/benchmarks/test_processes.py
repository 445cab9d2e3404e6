"""Measurements in processes of their own: their costs are theirs, and they end when they should."""

import os
import subprocess
import sys
import time

import pytest
import torch

from benchmarks.shared import processes, ranks
from benchmarks.shared.live_bytes import LiveBytes
from comet_pl.errors import UserError
from comet_pl.files import replacing


def peak(job):
    return {"mib": processes.resident("VmHWM"), "threads": torch.get_num_threads(), **job}


def refuse(job):
    raise UserError("no room")


def die(job):
    os._exit(9)


def linger(job):
    os.fork()
    time.sleep(60)


@pytest.mark.slow
def test_a_measurement_is_of_its_own_process():
    """Not of the parent: 600 MiB of ours do not count."""
    held = torch.ones(150_000_000)
    result = processes.measure(peak, {"threads": 1}, "x")
    if result["mib"] != result["mib"]:
        pytest.skip("no /proc on this system")
    assert result["mib"] < 572 < processes.resident("VmHWM") and held[-1] == 1
    assert result["threads"] == 1 and time.time() - result["started"] < 60


@pytest.mark.slow
def test_a_measurement_that_fails_says_why():
    for function, why in ((refuse, "2: no room"), (die, "9: killed, most likely")):
        with pytest.raises(UserError, match=f"measuring ours ended with status {why}"):
            processes.measure(function, {}, "ours")


@pytest.mark.slow
def test_an_interrupt_leaves_no_process(monkeypatch):
    """Neither the measuring one nor one that it started."""
    pids = []

    def interrupted(process):
        while len(pids) < 2:
            pids[:] = processes.family(process.pid)
        raise KeyboardInterrupt

    monkeypatch.setattr(processes, "watch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        processes.measure(linger, {}, "x", watched=True)
    until = time.monotonic() + 10
    while (left := sum(map(processes.proportional, pids))) and time.monotonic() < until:
        time.sleep(0.05)
    assert left == 0


def test_memory_is_that_of_all_processes():
    """60 MiB of a process and its child: proportional shares count them once."""
    code = "import os, time; a = bytearray(b'x') * (60 << 20)\n"
    code += "os.fork() or time.sleep(1); time.sleep(1)"
    process = subprocess.Popen([sys.executable, "-c", code])
    seen = processes.watch(process)
    assert process.returncode == 0 and seen["processes"] == 2 and 60 < seen["all_mib"] < 100
    assert processes.family(process.pid) == [process.pid]
    assert processes.proportional(process.pid) == 0


def test_a_rank_that_fails_ends_all():
    assert ranks.in_ranks(2, torch.distributed.get_rank) == [0, 1]
    with pytest.raises(Exception, match="division by zero"):
        ranks.in_ranks(2, eval, "1 / torch.distributed.get_rank()", {"torch": torch})


def test_a_killed_run_leaves_results_whole(tmp_path):
    """A run that is killed while it writes leaves the old file."""
    target = tmp_path / "x.json"
    target.write_text("{}")
    if (pid := os.fork()) == 0:
        with replacing(target) as beside:
            beside.write_text("half")
            os._exit(1)
    os.waitpid(pid, 0)
    assert target.read_text() == "{}"


def test_live_bytes_counts_storages_once_and_forgets_them():
    weight = torch.ones(100, requires_grad=True)
    weight.grad = torch.zeros(100)
    with LiveBytes([weight, weight.grad]) as live:
        x = torch.zeros(1000)
        view = x[10:].view(-1, 2)
        assert live.now == 4000
        del x
        assert live.now == 4000  # the view holds it
        view += 1
        assert live.now == 4000
        del view
        assert (live.now, live.peak) == (0, 4000)
        product = weight.t() * 2  # a view of what is known, and something new
        assert live.now == 400
        product.sum().backward()
        del product
    assert live.now == 0 and (weight.grad == 2).all()


@pytest.mark.parametrize(("recompute", "kept"), [(False, 8000), (True, 4000)])
def test_live_bytes_counts_what_autograd_keeps_and_recomputes(recompute, kept):
    """The first exp, which the cos needs too, and the last; recomputed, all is there again."""
    x = torch.ones(1000, requires_grad=True)
    layer = lambda y: y.sin().exp().cos().exp()  # noqa: E731
    with LiveBytes([x]) as live:
        y = (
            torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
            if recompute
            else layer(x)
        )
        assert live.now == kept
        torch.autograd.grad(y.sum(), x)
    assert live.peak > 8000
