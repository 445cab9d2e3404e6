"""Whatever a stranger sends to the watchdog's port, nobody ends of it, and a lost rank is named."""

import os
import signal
import socket
import struct
import time

import pytest
from torch.distributed.distributed_c10d import _get_default_store

from tests.support.watched_ranks import BEAT, TIMEOUT, WORLD, blocked, until


def framed(*messages):
    """Messages as the watchdog's connections carry them."""
    return b"".join(struct.pack("!i", len(one)) + one for one in messages)


def send(data, close=False, reset=False):
    port = int(_get_default_store().get("watch/1"))
    stranger = socket.create_connection(("127.0.0.1", port))
    stranger.sendall(data)
    if reset:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    if close or reset:
        stranger.close()
    return stranger


MESSAGES = {
    "a rank that is no number": framed(b"rank x (pid 1 on y)"),
    "a rank without a number": framed(b"rank"),
    "a rank that is there": framed(b"rank 1 (pid 1 on y)"),
    "a rank out of the world": framed(b"rank 7 (pid 1 on y)"),
    "a lost rank": framed(b"lost 1 rank 1 is gone"),
    "a lost rank that is no number": framed(b"lost me now"),
    "a regular end": framed(b"rank 2 (pid 1 on y)", b"left"),
    "nothing": framed(b""),
    "another word": framed(b"0" * 32, b"lost 1 rank 1 is gone"),
    "a browser": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "a negative length": struct.pack("!i", -1) + struct.pack("!Q", 2**63),
    "not text": framed(b"rank \xff\xfe"),
}


@pytest.mark.parametrize("end", [{}, {"close": True}, {"reset": True}])
def test_a_stranger_ends_nobody_and_hides_nobody(launch, end):
    def act(ranks, rank):
        ranks.watch(rank)
        if rank == 1:
            kept = [send(data, **end) for data in MESSAGES.values()]
            time.sleep(TIMEOUT)
            ranks.mark("there", 1)
            time.sleep(60 * len(kept))
        time.sleep(60)

    ranks = launch(act).ready().ready("there", 1)
    ranks.check(2, "is gone", ranks.send(signal.SIGKILL, 2))


def test_many_strangers_are_sent_away(launch):
    """Each would cost rank 0 a file."""

    def act(ranks, rank):
        watch = ranks.watch(rank)
        if rank == 0:
            until(lambda: len(watch.strangers) == 20)
            until(lambda: not watch.strangers)
            ranks.mark("there", 0)
        elif rank == 1:
            kept = [send(b"") for _ in range(20)]
            time.sleep(60 * len(kept))
        time.sleep(60)

    ranks = launch(act).ready().ready("there", 1)
    ranks.check(2, "is gone", ranks.send(signal.SIGKILL, 2))


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_watch_that_fails_is_not_silent(launch, culprit):
    """Its own process would be watched by nobody."""

    def act(ranks, rank):
        watch = ranks.watch(rank)
        if rank == culprit:
            ranks.ready()

            def broken():
                raise ZeroDivisionError("as planned")

            watch._count = broken
        time.sleep(60)

    ranks = launch(act).ready()
    ranks.check(culprit, "cannot watch: ZeroDivisionError: as planned", within=5)
    assert ranks.codes(culprit, within=5) == [2]
    (line,) = ranks.lines(culprit)
    assert "cannot watch: ZeroDivisionError: as planned; the others have ended" in line


def test_a_rank_without_files_left_goes_on(launch):
    """accept() fails for as long as the process may open no file."""

    def act(ranks, rank):
        import resource

        ranks.watch(rank)
        if rank == 0:
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)
            highest = max(int(name) for name in os.listdir("/proc/self/fd")) + 1
            full = [os.dup(1) for _ in range(highest)]
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(full) + 1, limit[1]))
            os.mkdir(ranks.folder / "full0")  # opens nothing
            time.sleep(4 * BEAT)
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
            ranks.mark("there", 0)
        elif rank == 1:
            until((ranks.folder / "full0").exists)
            kept = send(b"")
            time.sleep(60 * bool(kept))
        time.sleep(60)

    ranks = launch(act).ready().ready("there", 1)
    assert ranks.codes(*range(WORLD), within=0.5) == [None] * WORLD
    ranks.check(2, "is gone", ranks.send(signal.SIGKILL, 2))


def test_a_friend_that_is_killed_among_strangers(launch):
    """The plain case beside them, so that the tests above could fail."""
    ranks = launch(blocked(1)).ready()
    ranks.check(1, "is gone", ranks.send(signal.SIGKILL, 1))
