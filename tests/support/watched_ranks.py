"""Processes that watch each other, and what a test sees of their end."""

import multiprocessing
import os
import re
import socket
import sys
import time
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from comet_pl.parallel.rendezvous import Meeting
from comet_pl.parallel.watchdog import ADVICE, Watch

WORLD = 3
TIMEOUT = 2.0  # seconds; silence is noticed after half of it
BEAT = 0.2
# The first of several ranks that notice it ends, and the others may see its connection close.
SILENT = r"(has not answered for 1\.\d s|is gone)"
ONE_NODE, TWO_NODES = ((0, 1, 2),), ((0, 1), (2,))


class Ranks:
    """WORLD forked processes, each in a gloo group; each runs act(ranks, rank)."""

    def __init__(self, folder, act, timeout, nodes):
        self.folder, self.act, self.timeout, self.nodes = folder, act, timeout, nodes
        make = multiprocessing.get_context("fork").Process
        self.processes = [make(target=self.run, args=(rank,), daemon=True) for rank in range(WORLD)]
        for process in self.processes:
            process.start()

    # ---- in a rank's process

    def run(self, rank):
        output = os.open(self.folder / f"output{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        for number, name in enumerate(("stdout", "stderr"), start=1):
            os.dup2(output, number)
            setattr(sys, name, open(number, "w", closefd=False, buffering=1))
        torch.set_num_threads(1)
        # The store looks up who connects: 5 s where no name server answers.
        os.environ["RES_OPTIONS"] = "timeout:1 attempts:1"
        port = self.folder / "port"
        if rank:
            until(port.exists)
        number = int(port.read_text()) if rank else 0
        store = dist.TCPStore("127.0.0.1", number, None, rank == 0, wait_for_workers=False)
        if not rank:
            (self.folder / "new").write_text(str(store.port))
            (self.folder / "new").rename(port)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
        self.act(self, rank)

    def new_watch(self, rank):
        node = next(node for node in self.nodes if rank in node)
        meeting = Meeting(_get_default_store(), rank, WORLD, "127.0.0.1")
        watch = Watch(self.timeout, meeting, node)
        watch.beat = BEAT
        return watch

    def watch(self, rank):
        """Started and connected."""
        watch = self.new_watch(rank)
        watch.start()
        until(lambda: len(watch.names) == len(watch.heard))
        self.mark("ready", rank)
        return watch

    def mark(self, word, rank):
        (self.folder / f"{word}{rank}").touch()

    # ---- in the test

    def ready(self, word="ready", count=WORLD):
        def marks():
            ended = [process.exitcode for process in self.processes]
            complete = len(list(self.folder.glob(f"{word}?"))) == count
            assert complete or not any(ended), self.lines(0, 1, 2)
            return complete

        until(marks)
        return self

    def send(self, number, *ranks):
        """Sends a signal; returns the time."""
        for rank in ranks:
            os.kill(self.processes[rank].pid, number)
        return time.monotonic()

    def codes(self, *ranks, within, since=None):
        """Exit codes; None for a rank that still runs when the time is over."""
        end = (time.monotonic() if since is None else since) + within
        for rank in ranks:
            self.processes[rank].join(max(0.0, end - time.monotonic()))
        return [self.processes[rank].exitcode for rank in ranks]

    def lines(self, *ranks):
        texts = [(self.folder / f"output{rank}").read_text() for rank in ranks]
        return [line for text in texts for line in text.splitlines()]

    def check(self, culprit, what, since=None, within=TIMEOUT):
        """All others have ended with code 2; the lowest on each node has said so in one line."""
        others = [rank for rank in range(WORLD) if rank != culprit]
        assert self.codes(*others, within=within, since=since) == [2, 2], self.lines(*others)
        pid = self.processes[culprit].pid
        who = re.escape(f"rank {culprit} (pid {pid} on {socket.gethostname()})")
        for node in self.nodes:
            left = [rank for rank in node if rank != culprit]
            (line,) = self.lines(*left)
            assert self.lines(left[0]) == [line]
            assert re.fullmatch(f"error: {who} {what}; this run ends. {re.escape(ADVICE)}", line)

    def check_regular(self, within, since=None):
        """All have ended without a word."""
        assert self.codes(0, 1, 2, within=within, since=since) == [0, 0, 0], self.lines(0, 1, 2)
        assert self.lines(0, 1, 2) == []


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def blocked(victim):
    """The others wait inside gloo, where no error reaches them; the victim does nothing."""

    def act(ranks, rank):
        watch = ranks.watch(rank)
        if rank != victim:
            with explaining(watch):
                dist.recv(torch.zeros(1), src=WORLD - rank - victim)
        time.sleep(60)

    return act


@contextmanager
def explaining(watch):
    """What to do with a communication error."""
    try:
        yield
    except RuntimeError:
        watch.explain()
        print("explain() returned")
