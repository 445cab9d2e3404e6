"""Ends all processes of a distributed run when one dies, hangs or fails; one line names it.

The others of a lost rank wait in collectives that may never return. A thread of each rank therefore
keeps a connection to rank 0 and sends its name with every beat; rank 0 tells all who is lost. (A
store's calls have no time limit, and a store does not see that a process dies.)
"""

import math
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

ADVICE = "Go on from the last checkpoint with resume=true."
LONGEST = 1000  # bytes of a message


class Watch:
    """Ends this process (exit code 1) when another rank of the default group is lost.

    A rank is lost when its connection breaks, when its heartbeat stops for timeout / 2 (so none may
    hold the interpreter's lock for that long), or when it does not start within `timeout`. Silence
    counts only while this process runs: a run that is suspended as a whole continues.

    Args:
        timeout: seconds from a rank's end to everyone's.
        host: rank 0's address.
        speakers: the ranks of this node; the lowest that is left prints the line, and a lost rank
            that wakes prints it too.
    """

    def __init__(self, timeout: float, host: str, speakers: Sequence[int]):
        self.timeout, self.host, self.speakers = timeout, host, speakers
        self.beat = min(1.0, timeout / 10)
        self.rank = dist.get_rank()
        self.name = f"rank {self.rank} (pid {os.getpid()} on {socket.gethostname()})"
        # Seconds listened so far; those at which a rank was last heard and at which explain() came.
        self.now, self.asked = 0.0, -math.inf
        watched = [0] if self.rank else range(1, dist.get_world_size())
        self.heard = dict.fromkeys(watched, 0.0)
        self.names: dict[int, str] = {}
        self.server: list[socket.socket] = []  # rank 0's
        self.connections: dict[Connection, int | None] = {}  # the rank at the other end, once heard
        self.over = threading.Lock()  # the first to take it ends the watch

    def start(self) -> None:
        """Finds rank 0 and starts the heartbeat."""
        # A store may serve several watches, one after the other.
        store = _get_default_store()
        key = f"watch/{store.add(f'watch/starts/{self.rank}', 1)}"
        if self.rank == 0:
            dual = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if dual else socket.AF_INET
            self.server.append(socket.create_server(("", 0), family=family, dualstack_ipv6=dual))
            store.set(key, str(self.server[0].getsockname()[1]))
        else:
            address = self.host, int(store.get(key))
            with suppress(OSError):
                self._add(socket.create_connection(address, self.timeout / 2))
        threading.Thread(target=self._watch, daemon=True).start()

    def stop(self) -> None:
        """Ends the watch regularly: after a barrier, before the process group is destroyed."""
        self._leave("left")

    def fail(self, reason: str) -> None:
        """Tells the others why this rank ends; its own process is left alone from then on."""
        self._leave(f"lost {self.rank} {self.name} failed: {' '.join(reason.split())[:200]}")

    def explain(self) -> None:
        """Finds the lost rank after a communication error and ends this process.

        Returns after ten beats (a beat: timeout / 10, at most 1 s) if no rank is lost.
        """
        self.asked = self.now
        self._say("ask")
        time.sleep(10 * self.beat)

    # ---- the thread

    def _watch(self) -> None:
        last, spoken = time.monotonic(), -math.inf
        while not self.over.locked():
            if last >= spoken + self.beat:
                spoken = last
                self._say(self.name)
            for ready in wait([*self.server, *self.connections], self.beat / 2):
                if isinstance(ready, Connection):
                    self._hear(ready)
                else:
                    self._add(self.server[0].accept()[0])
            elapsed, last = time.monotonic() - last, time.monotonic()
            self.now += min(elapsed, 2 * self.beat)
            # A few beats suffice where a communication error says that some rank is gone.
            hurry = self.now < self.asked + 10 * self.beat
            for rank, heard in sorted(self.heard.items(), key=lambda item: item[1]):
                word, limit = ("answered", 2) if rank in self.names else ("started", 1)
                silence = self.now - heard
                if silence > (4 * self.beat if hurry else self.timeout / limit):
                    gone = hurry or silence == math.inf
                    what = "is gone" if gone else f"has not {word} for {silence:.1f} s"
                    self._end(rank, f"{self.names.get(rank, f'rank {rank}')} {what}")

    def _add(self, end: socket.socket) -> None:
        end.settimeout(None)
        # A stranger that sends half a message, or a full pipe, holds the thread for a beat at most.
        limit = struct.pack("ll", int(self.beat), int(self.beat % 1 * 1e6))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            end.setsockopt(socket.SOL_SOCKET, option, limit)
        self.connections[Connection(end.detach())] = None

    def _hear(self, connection: Connection) -> None:
        try:
            message = connection.recv_bytes(LONGEST).decode(errors="replace")
        except (EOFError, OSError):
            rank = self.connections.pop(connection)
            if rank in self.heard:
                self.heard[rank] = -math.inf
            return
        word, _, text = message.partition(" ")
        if word == "rank":
            rank = self.connections[connection] = int(text.split()[0])
            self.names[rank] = message
            if rank in self.heard:
                self.heard[rank] = self.now
        elif word == "lost":
            culprit, _, sentence = text.partition(" ")
            self._end(int(culprit), sentence)
        elif word == "ask":
            self.asked = self.now
        elif word == "left":
            self.heard.pop(self.connections[connection] or 0, None)

    def _say(self, message: str) -> None:
        for connection in list(self.connections):
            with suppress(OSError):
                connection.send_bytes(message.encode())

    # ---- the end

    def _leave(self, message: str) -> None:
        if self.over.acquire(blocking=False):
            self._say(message)

    def _end(self, culprit: int, sentence: str) -> None:
        """Tells all, prints the line if this rank speaks, ends the process."""
        if not self.over.acquire(blocking=False):
            return
        # The process ends even if a full pipe blocks what follows.
        threading.Timer(3 * self.beat, os._exit, [1]).start()
        self._say(f"lost {culprit} {sentence}")
        if self.rank in (culprit, min(set(self.speakers) - {culprit}, default=None)):
            own = "the others have ended, and so does this process"
            end = own if culprit == self.rank else "this run ends"
            # One write: lines of several ranks do not mix.
            sys.stderr.write(f"error: {sentence}; {end}. {ADVICE}\n")
            sys.stderr.flush()
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(1)
