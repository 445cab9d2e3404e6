"""A rank that dies, hangs or fails ends all others in time with one line a node that names it.

Nothing else ends a rank.
"""

import itertools
import os
import re
import signal
import socket
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from comet_pl.parallel.watchdog import ADVICE
from tests.support.watched_ranks import (
    ONE_NODE,
    SILENT,
    TIMEOUT,
    TWO_NODES,
    WORLD,
    blocked,
    explaining,
    until,
)


def in_turn(ranks, rank):
    """Each waits inside gloo for the next."""
    with explaining(ranks.watch(rank)):
        dist.recv(torch.zeros(1), src=(rank + 1) % WORLD)


@pytest.mark.parametrize(
    ("victim", "nodes"), [(0, ONE_NODE), (1, ONE_NODE), (2, ONE_NODE), (1, TWO_NODES)]
)
def test_a_killed_rank_is_named(launch, victim, nodes):
    ranks = launch(blocked(victim), nodes=nodes).ready()
    ranks.check(victim, "is gone", ranks.send(signal.SIGKILL, victim))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank_is_named_and_ends_when_it_goes_on(launch, victim):
    ranks = launch(blocked(victim)).ready()
    ranks.check(victim, SILENT, ranks.send(signal.SIGSTOP, victim))
    since = ranks.send(signal.SIGCONT, victim)
    assert ranks.codes(victim, within=TIMEOUT, since=since) == [2]
    (line,) = ranks.lines(victim)
    end = "the others have ended, .*"
    assert re.fullmatch(rf"error: rank {victim} \(pid .*\) {SILENT}; {end}", line), line


def test_a_rank_that_holds_the_interpreter_is_named(launch):
    """Its connections stay open."""

    def act(ranks, rank):
        ranks.watch(rank)
        if rank == 0:
            ranks.ready()
            sum(itertools.repeat(0))  # endless, in C
        time.sleep(60)

    launch(act).ready().check(0, SILENT, within=TIMEOUT + 0.5)


def test_sockets_kept_open_by_a_child_hide_nothing(launch):
    """As a DataLoader's workers do: the killed rank's connections stay open."""

    def act(ranks, rank):
        watch = ranks.watch(rank)
        if rank == 0:
            child = os.fork()
            if child == 0:
                time.sleep(20)
                os._exit(0)
            (ranks.folder / "child").write_text(str(child))
            ranks.mark("forked", 0)
        with explaining(watch):
            dist.recv(torch.zeros(1), src=(rank + 1) % WORLD)

    ranks = launch(act).ready().ready("forked", 1)
    try:
        ranks.check(0, SILENT, ranks.send(signal.SIGKILL, 0))
    finally:
        os.kill(int((ranks.folder / "child").read_text()), signal.SIGKILL)


def test_a_stranger_with_half_a_message_hides_nothing(launch):
    """A port scan, say."""

    def act(ranks, rank):
        ranks.watch(rank)
        if rank == 1:
            port = int(_get_default_store().get("watch/1"))
            with socket.create_connection(("127.0.0.1", port)) as stranger:
                stranger.send(b"\x00\x00")
                ranks.mark("there", 1)
                time.sleep(60)
        time.sleep(60)

    ranks = launch(act).ready().ready("there", 1)
    ranks.check(2, "is gone", ranks.send(signal.SIGKILL, 2))


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_failure_is_told_at_once(launch, culprit):
    def act(ranks, rank):
        watch = ranks.watch(rank)
        if rank == culprit:
            ranks.ready()
            watch.fail("ValueError: no\n  such thing")
            os._exit(5)
        with explaining(watch):
            dist.all_reduce(torch.zeros(1))

    ranks = launch(act, timeout=20, nodes=TWO_NODES).ready()
    # The silence of a dead rank: 10 s.
    ranks.check(culprit, "failed: ValueError: no such thing", within=5)
    assert ranks.codes(culprit, within=6) == [5]
    assert ranks.lines(culprit) == []


def test_after_fail_nothing_ends_the_process(launch):
    def act(ranks, rank):
        watch = ranks.watch(rank)
        if rank == 1:
            until(lambda: len(list(ranks.folder.glob("ready?"))) == WORLD)
            watch.fail("mine")
            until(lambda: ranks.folder.joinpath("output0").read_text() != "")
            time.sleep(0.6 * TIMEOUT)
            watch.explain()
            watch.stop()
            os._exit(5)
        time.sleep(60)

    ranks = launch(act).ready()
    ranks.check(1, "failed: mine")
    assert ranks.codes(1, within=3 * TIMEOUT) == [5]


@pytest.mark.parametrize("victim", [1, 2])
def test_a_communication_error_is_explained_before_the_full_silence(launch, victim):
    ranks = launch(in_turn, timeout=20).ready()  # silence: 10 s
    ranks.check(victim, "is gone", ranks.send(signal.SIGKILL, victim), within=5)


def test_a_rank_that_dies_at_its_start_is_explained_too(launch):
    """It has never been heard, and has 20 s to start; the error tells that it will not."""
    victim = 2

    def act(ranks, rank):
        watch = ranks.new_watch(rank)
        if rank == victim:
            dist.barrier()
            os.kill(os.getpid(), signal.SIGKILL)
        watch.start()
        dist.barrier()
        with explaining(watch):
            dist.recv(torch.zeros(1), src=victim)
        time.sleep(60)

    ranks = launch(act, timeout=20)
    assert ranks.codes(0, 1, within=10) == [2, 2]
    assert ranks.lines(0, 1) == [f"error: rank {victim} is gone; this run ends. {ADVICE}"]


def test_explain_returns_if_all_answer(launch):
    def act(ranks, rank):
        watch = ranks.watch(rank)
        watch.explain()
        dist.barrier()
        watch.stop()

    launch(act).check_regular(within=10)


@pytest.mark.parametrize("pauses", [(0, 0.15, 0.3), (0.8, 0.4, 0)])
def test_a_regular_end_is_silent(launch, pauses):
    """Rank 0 stops first, or last; a second watch on the same store starts afresh."""

    def act(ranks, rank):
        for _ in range(2):
            watch = ranks.watch(rank)
            dist.barrier()
            time.sleep(pauses[rank] * TIMEOUT)
            watch.stop()

    launch(act).check_regular(within=20)


@pytest.mark.parametrize("victim", [0, 2])
def test_stop_waits_for_nobody(launch, victim):
    def act(ranks, rank):
        watch = ranks.watch(rank)
        ranks.ready("stopped", 1)
        watch.stop()
        watch.stop()

    ranks = launch(act).ready()
    since = ranks.send(signal.SIGSTOP, victim)
    ranks.mark("stopped", victim)
    others = [rank for rank in range(WORLD) if rank != victim]
    assert ranks.codes(*others, within=2 * TIMEOUT, since=since) == [0, 0]
    assert ranks.lines(*others) == []


def late(seconds):
    """Rank 1 starts its watch so much later than the others."""

    def act(ranks, rank):
        ranks.mark("there", rank)
        if rank == 1:
            time.sleep(seconds)
        watch = ranks.watch(rank)
        dist.barrier()
        watch.stop()

    return act


def test_a_late_rank_has_the_whole_timeout(launch):
    launch(late(0.8 * TIMEOUT)).ready("there").check_regular(within=3 * TIMEOUT)


def test_a_rank_that_never_starts_is_named(launch):
    ranks, since = launch(late(60)).ready("there"), time.monotonic()
    assert ranks.codes(0, 2, within=2 * TIMEOUT) == [2, 2]
    assert time.monotonic() - since > TIMEOUT - 0.5
    (line,) = ranks.lines(0, 2)
    what = r"has not started for [23]\.\d s; this run ends."
    assert re.fullmatch(f"error: rank 1 {what} {re.escape(ADVICE)}", line), line


def test_a_suspended_run_goes_on(launch):
    """Ctrl-Z, then fg: everyone was silent, nobody is gone."""

    def act(ranks, rank):
        watch = ranks.watch(rank)
        ranks.ready("continued", 1)
        time.sleep(0.75 * TIMEOUT)
        dist.barrier()
        watch.stop()

    ranks = launch(act).ready()
    ranks.send(signal.SIGSTOP, 0, 1, 2)
    time.sleep(0.75 * TIMEOUT)
    since = ranks.send(signal.SIGCONT, 2, 1, 0)
    ranks.mark("continued", 0)
    ranks.check_regular(within=3 * TIMEOUT, since=since)
