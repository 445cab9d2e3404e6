"""How many threads torch computes with on a CPU that others use too.

Threads of one operation wait for each other, and while they wait they spin: with more threads than
free cores most of the time goes into waiting for a thread that the system has put aside.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

STAT = Path("/proc/stat")
EVERY = 1.0  # seconds
# Of a core: so much of it may be taken by others before a thread is given up.
SLACK = 0.25


class ThreadShare:
    """Gives torch as many threads as there are cores for them, now and again; at least one, at most
    as many as it had. Where the system does not say how busy it is, nothing changes."""

    def __init__(self) -> None:
        import torch

        self.torch, self.most = torch, torch.get_num_threads()
        self.works = self.most > 1 and STAT.exists()
        self.since, self.own, self.idle = time.monotonic(), time.process_time(), idle_seconds()

    def adjust(self) -> None:
        """Called often; looks once a second."""
        now = time.monotonic()
        if not self.works or now - self.since < EVERY:
            return
        own, idle = time.process_time(), idle_seconds()
        cores = (own - self.own + idle - self.idle) / (now - self.since)
        self.since, self.own, self.idle = now, own, idle
        self.torch.set_num_threads(min(self.most, max(1, int(cores + SLACK))))

    def restore(self) -> None:
        """Gives back all threads."""
        if self.works:
            self.torch.set_num_threads(self.most)


def idle_seconds() -> float:
    """Time that the cores which this process may use have been idle, of all of them together."""
    try:
        lines = STAT.read_text(encoding="ascii").splitlines()
        mine = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        ticks = sum(
            int(fields[4]) + int(fields[5])
            for fields in map(str.split, lines)
            if fields and fields[0] in mine
        )
        return ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):  # not Linux
        return 0.0
