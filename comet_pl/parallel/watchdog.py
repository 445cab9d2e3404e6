"""Ends all processes of a distributed run when one dies, hangs or fails; one line names it.

The others of a lost rank wait in collectives that may never return. A thread of each rank therefore
keeps a connection to rank 0 and sends a heartbeat over it; rank 0 tells all who is lost. A store's
calls would have no time limit. Rank 0 listens on a port of its own, as gloo and NCCL do.
"""

import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from torch.distributed import PrefixStore, Store


class Watch:
    """Ends this process (exit code 1) when another rank of the run is lost.

    A rank is lost when its connection breaks, when its heartbeat stops for timeout / 2 (so none may
    hold the interpreter's lock for that long), or when it does not start within `timeout`. Silence
    counts only while this process runs: a run that is suspended as a whole continues.

    Args:
        store: of the process group; only start() uses it.
        timeout: seconds from a rank's end to everyone's.
        speakers: the ranks of this node; the lowest that is left prints the line, and a lost rank
            that wakes prints it too.
        advice: the line's last words.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world: int,
        timeout: float,
        speakers: Sequence[int],
        advice: str = "",
    ):
        self.store, self.rank, self.timeout = store, rank, timeout
        self.speakers, self.advice = speakers, advice
        self.beat = min(1.0, timeout / 10)
        self.name = f"rank {rank} (pid {os.getpid()} on {socket.gethostname()})"
        # Seconds listened so far; those at which a rank was last heard and at which explain() came.
        self.now, self.asked = 0.0, -1e9
        self.heard = dict.fromkeys(range(1, world) if rank == 0 else [0], 0.0)
        self.names: dict[int, str] = {}
        self.connections: dict[socket.socket, bytes] = {}
        self.ranks: dict[socket.socket, int] = {}
        self.leaving = self.ending = False
        self.lock, self.selector = threading.Lock(), selectors.DefaultSelector()

    def start(self) -> None:
        """Finds rank 0 and starts the heartbeat."""
        # A store may serve several watches, one after the other.
        key = f"watch/{self.store.add(f'watch/starts/{self.rank}', 1)}"
        store = self.store
        while isinstance(store, PrefixStore):
            store = store.underlying_store
        if self.rank == 0:
            dual = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if dual else socket.AF_INET
            self.server = socket.create_server(("", 0), family=family, dualstack_ipv6=dual)
            self.selector.register(self.server, selectors.EVENT_READ, self.server)
            self.store.set(key, str(self.server.getsockname()[1]))
        else:
            # The store, a launcher's too, lies on rank 0's node.
            address = getattr(store, "host", "localhost"), int(self.store.get(key))
            with suppress(OSError):
                self._add(socket.create_connection(address, self.timeout / 2))
        threading.Thread(target=self._run, daemon=True).start()

    def stop(self) -> None:
        """Ends the watch regularly: after a barrier, before the process group is destroyed."""
        self._leave("left")

    def fail(self, reason: str) -> None:
        """Tells the others why this rank ends; its own process is left alone from then on."""
        self._leave(f"lost {self.rank} {self.name} failed: {' '.join(reason.split())[:300]}")

    def explain(self) -> None:
        """Finds the lost rank after a communication error and ends this process.

        Returns after ten beats (a beat: timeout / 10, at most 1 s) if no rank is lost.
        """
        self.asked = self.now
        self._say("ask")
        for _ in range(0 if self.leaving else 10):
            time.sleep(self.beat)

    # ---- the thread

    def _run(self) -> None:
        last = spoken = time.monotonic()
        while not self.leaving:
            for key, _ in self.selector.select(self.beat / 2):
                self._hear(key.data)
            elapsed, last = time.monotonic() - last, time.monotonic()
            self.now += min(elapsed, 2 * self.beat)
            if last >= spoken + self.beat:
                spoken = last
                self._say("beat")
            # A few beats suffice where a communication error says that some rank is gone.
            hurry = self.now < self.asked + 10 * self.beat
            for rank, heard in sorted(self.heard.items(), key=lambda item: item[1]):
                word, limit = ("answered", 2) if rank in self.names else ("started", 1)
                silence = self.now - heard
                if silence > (4 * self.beat if hurry else self.timeout / limit):
                    self._lose(rank, "is gone" if hurry else f"has not {word} for {silence:.1f} s")

    def _hear(self, connection: socket.socket) -> None:
        if connection not in self.connections:
            with suppress(OSError):
                self._add(self.server.accept()[0])
            return
        try:
            data = connection.recv(65536)
        except OSError:
            data = b""
        *lines, self.connections[connection] = (self.connections[connection] + data).split(b"\n")
        for line in lines:
            word, _, text = line.decode(errors="replace").partition(" ")
            if word == "hello":
                rank = self.ranks[connection] = int(text.split()[1])
                self.names[rank] = text
            elif word == "lost":
                culprit, _, text = text.partition(" ")
                self._end(int(culprit), text)
            elif word == "ask":
                self.asked = self.now
            elif word == "left":
                self.heard.pop(self.ranks.get(connection, self.rank), None)
        rank = self.ranks.get(connection, self.rank)
        if rank in self.heard:
            self.heard[rank] = self.now
        if not data:
            self.selector.unregister(connection)
            del self.connections[connection]
            if rank in self.heard:
                self._lose(rank, "is gone")

    def _add(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.connections[connection] = b""
        self.selector.register(connection, selectors.EVENT_READ, connection)
        with suppress(OSError):
            connection.send(f"hello {self.name}\n".encode())

    def _say(self, line: str) -> None:
        for connection in list(self.connections):
            with suppress(OSError):
                connection.send(f"{line}\n".encode())

    # ---- the end

    def _leave(self, line: str) -> None:
        with self.lock:
            if not (self.leaving or self.ending):
                self.leaving = True
                self._say(line)

    def _lose(self, rank: int, what: str) -> None:
        self._end(rank, f"{self.names.get(rank, f'rank {rank}')} {what}")

    def _end(self, culprit: int, sentence: str) -> None:
        """Tells all, prints the line if this rank speaks, ends the process."""
        with self.lock:
            if self.ending or self.leaving:
                return
            self.ending = True
        # The process ends even if a full pipe blocks what follows.
        threading.Timer(3 * self.beat, os._exit, [1]).start()
        self._say(f"lost {culprit} {sentence}")
        if self.rank in (culprit, min(set(self.speakers) - {culprit}, default=None)):
            own = "the others have ended, and so does this process"
            end = own if culprit == self.rank else "this run ends"
            # One write: lines of several ranks do not mix.
            sys.stderr.write(f"error: {sentence}; {end}. {self.advice}".rstrip() + "\n")
            sys.stderr.flush()
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(1)
