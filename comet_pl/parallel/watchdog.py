"""Ends all processes of a distributed run when one dies, hangs, fails or never comes; one line
names it.

The others of a lost rank wait in collectives that may never return. A thread of each rank therefore
keeps a connection to rank 0 and sends its name with every beat; rank 0 tells all who is lost. (A
store's calls have no time limit, and a store does not see that a process dies.) A stranger who
finds rank 0's port is not listened to: the ranks know a word from their store.
"""

import math
import os
import secrets
import socket
import struct
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait

from comet_pl.parallel.rendezvous import Meeting, await_key

ADVICE = "Go on from the last checkpoint with resume=true."
LONGEST = 1000  # bytes of a message


class Watch:
    """Ends this process (exit code 2) when another rank is lost.

    A rank is lost when its connection breaks, when its heartbeat stops for timeout / 2 (so none may
    hold the interpreter's lock for that long), or when it does not start within `timeout`. Silence
    counts only while this process runs: a run that is suspended as a whole continues.

    Args:
        timeout: seconds from a rank's end to everyone's.
        speakers: the ranks of this node; the lowest that is left prints the line, and a lost rank
            that wakes prints it too.
    """

    def __init__(self, timeout: float, meeting: Meeting, speakers: Sequence[int]):
        self.timeout, self.meeting, self.speakers = timeout, meeting, speakers
        self.beat = min(1.0, timeout / 10)
        self.rank = meeting.rank
        self.name = f"rank {self.rank} (pid {os.getpid()} on {socket.gethostname()})"
        # Seconds listened so far; those at which a rank was last heard and at which explain() came.
        self.now, self.asked = 0.0, -math.inf
        watched = [0] if self.rank else range(1, meeting.world)
        self.heard = dict.fromkeys(watched, 0.0)
        self.names: dict[int, str] = {}
        self.server: list[socket.socket] = []  # rank 0's
        self.connections: dict[Connection, int | None] = {}  # the rank at the other end, once heard
        self.strangers: dict[Connection, float] = {}  # have not said the word; since when
        self.word = ""
        self.over = threading.Lock()  # the first to take it ends the watch

    def start(self) -> None:
        """Finds rank 0 and starts the heartbeat."""
        # A store may serve several watches, one after the other.
        store = self.meeting.store
        key = f"watch/{store.add(f'watch/starts/{self.rank}', 1)}"
        if self.rank == 0:
            dual = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if dual else socket.AF_INET
            self.server.append(socket.create_server(("", 0), family=family, dualstack_ipv6=dual))
            self.server[0].setblocking(False)
            self.word = secrets.token_hex(16)
            store.set(f"{key}/word", self.word)
            store.set(key, str(self.server[0].getsockname()[1]))
        else:
            limit = self.timeout + self.meeting.patience
            port = await_key(store, key, limit)
            if port is None:
                self._end(0, f"rank 0 has not started for {limit:.1f} s")
                return
            with suppress(OSError):
                address = self.meeting.host, int(port)
                connection = _connection(
                    socket.create_connection(address, self.timeout / 2), self.beat
                )
                self.connections[connection] = None
                connection.send_bytes(store.get(f"{key}/word"))
        threading.Thread(target=self._guard, daemon=True).start()

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

    def _guard(self) -> None:
        try:
            self._watch()
        except Exception as error:
            # A rank that is not watched could wait for ever.
            self._end(self.rank, f"{self.name} cannot watch: {type(error).__name__}: {error}")

    def _watch(self) -> None:
        last, spoken = time.monotonic(), -math.inf
        while not self.over.locked():
            if last >= spoken + self.beat:
                spoken = last
                self._say(self.name)
            for ready in wait([*self.server, *self.connections, *self.strangers], self.beat / 2):
                if not isinstance(ready, Connection):
                    self._accept()
                elif ready in self.strangers:
                    self._meet(ready)
                else:
                    self._hear(ready)
            elapsed, last = time.monotonic() - last, time.monotonic()
            self.now += min(elapsed, 2 * self.beat)
            self._count()

    def _count(self) -> None:
        """Ends the watch over a rank that has been silent for too long, or was never there."""
        # A few beats suffice where a communication error says that some rank is gone.
        hurry = self.now < self.asked + 10 * self.beat
        for rank, heard in sorted(self.heard.items(), key=lambda item: item[1]):
            word, limit = "answered", self.timeout / 2
            if rank not in self.names:
                word, limit = "started", self.timeout + self.meeting.patience
                process = self.meeting.launched.get(rank)
                if process is not None and process.poll() is not None:
                    self._end_unstarted(rank, process.pid, process.returncode)
            silence = self.now - heard
            if silence > (4 * self.beat if hurry else limit):
                gone = hurry or silence == math.inf
                what = "is gone" if gone else f"has not {word} for {silence:.1f} s"
                self._end(rank, f"{self.names.get(rank, f'rank {rank}')} {what}")
        for connection, since in list(self.strangers.items()):
            if self.now > since + self.timeout / 2:
                self._drop(connection)

    def _accept(self) -> None:
        try:
            end = self.server[0].accept()[0]
            self.strangers[_connection(end, self.beat)] = self.now
        except OSError:
            time.sleep(self.beat / 4)  # it has gone again, or this process has no file left

    def _meet(self, connection: Connection) -> None:
        """Listens to who knows the word from now on, and to nobody else."""
        said = b""
        with suppress(EOFError, OSError):
            said = connection.recv_bytes(LONGEST)
        if not secrets.compare_digest(said, self.word.encode()):
            self._drop(connection)
            return
        del self.strangers[connection]
        self.connections[connection] = None
        with suppress(OSError):
            connection.send_bytes(self.name.encode())

    def _drop(self, connection: Connection) -> None:
        del self.strangers[connection]
        with suppress(OSError):
            connection.close()

    def _hear(self, connection: Connection) -> None:
        try:
            message = connection.recv_bytes(LONGEST).decode(errors="replace")
        except (EOFError, OSError):
            rank = self.connections.pop(connection)
            if rank in self.heard:
                self.heard[rank] = -math.inf
            return
        word, _, text = message.partition(" ")
        number, _, sentence = text.partition(" ")
        if word == "ask":
            self.asked = self.now
        elif word == "left":
            self.heard.pop(self.connections[connection] or 0, None)
        elif not number.isdecimal():
            return
        elif word == "rank":
            rank = self.connections[connection] = int(number)
            self.names[rank] = message
            if rank in self.heard:
                self.heard[rank] = self.now
        elif word == "lost":
            self._end(int(number), sentence)

    def _say(self, message: str) -> None:
        for connection in list(self.connections):
            with suppress(OSError):
                connection.send_bytes(message.encode())

    # ---- the end

    def _leave(self, message: str) -> None:
        if self.over.acquire(blocking=False):
            self._say(message)

    def _end_unstarted(self, rank: int, pid: int, code: int) -> None:
        """Ends the watch over a launched process; whatever was not killed has said why itself."""
        how = f"by signal {-code} " * (code < 0)
        self._end(rank, f"rank {rank} (pid {pid}) has ended {how}before it started", told=code > 0)

    def _end(self, culprit: int, sentence: str, told: bool = False) -> None:
        """Tells all, prints the line if this rank speaks and it is not told, ends the process."""
        if not self.over.acquire(blocking=False):
            return
        # The process ends even if a full pipe blocks what follows.
        threading.Timer(3 * self.beat, os._exit, [1]).start()
        self._say(f"lost {culprit} {sentence}")
        speaks = self.rank in (culprit, min(set(self.speakers) - {culprit}, default=None))
        if speaks and not told:
            own = "the others have ended, and so does this process"
            end = own if culprit == self.rank else "this run ends"
            # One write: lines of several ranks do not mix.
            sys.stderr.write(f"error: {sentence}; {end}. {ADVICE}\n")
            sys.stderr.flush()
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(2)


def _connection(end: socket.socket, beat: float) -> Connection:
    """A connection on which half a message, or a full pipe, holds the thread for a beat at most."""
    end.settimeout(None)
    limit = struct.pack("ll", int(beat), int(beat % 1 * 1e6))
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        end.setsockopt(socket.SOL_SOCKET, option, limit)
    return Connection(end.detach())
