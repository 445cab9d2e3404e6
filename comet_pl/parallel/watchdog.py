"""Ends the processes of a distributed run when one of them dies, hangs or fails, with one line that names it.

A rank that is gone leaves the others inside a collective or a receive that may last for ever. Their main threads cannot look up from there;
other threads can. Each rank counts its beats in the run's store and reads everyone's. Who stays silent for too long is named there, once
for all, and every rank ends itself.
"""

from __future__ import annotations

import os
import socket
import sys
import textwrap
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from torch.distributed import PrefixStore, Store, TCPStore
from torch.distributed.distributed_c10d import _get_default_store

SHORT_SILENCE = 4  # beats; enough where a communication error says that some rank is gone
NOBODY = "-"  # is lost; an empty value is never answered by torch's older store backend
LEFT = -1  # in place of a rank's count of beats: it has ended, its silence means nothing


class Watch:
    """Ends this process (exit code 1) when another rank of the run is gone. All ranks make theirs equally often.

    A rank is gone when its beats stop for timeout / 2, or when it has not started within `timeout`; a few beats are enough during
    explain(). So no rank may hold the interpreter's lock for timeout / 2 at a stretch. Silence counts only while we listen: this process
    may be stopped, the whole run suspended and continued, the store held up.

    Args:
        store: all ranks' store, by a connection of our own: default_store().
        rank, world: this rank of how many, over all nodes.
        timeout: seconds from a rank's end to everyone's.
        speakers: the ranks of this node; the lowest that is left prints. A rank that was given up by mistake prints a line of its own.
        advice: the line's last words: what the user can do.
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
        self.store, self.rank, self.timeout, self.speakers, self.advice = (
            store,
            rank,
            timeout,
            speakers,
            advice,
        )
        self.beat = min(1.0, timeout / 10)
        self.host = (
            None if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else 0
        )  # the rank whose process holds the store
        self.keys = [f"beats/{number}" for number in range(world)]
        self.names: dict[int, str] = {}
        self.clock = self.answered = (
            0.0  # seconds that this process has run since start(); when the store last answered
        )
        self.listened = (
            0.0  # seconds that we have listened to the others, at most two beats an answer
        )
        self.beats, self.heard = (
            [0] * world,
            [0.0] * world,
        )  # each rank's count, and `listened` when it last moved
        self.slept = self.woke = (
            0.0  # for how long this process was last stopped; `listened` when it went on
        )
        self.asked: float | None = None  # `listened` at explain()
        self.line: socket.socket | None = None
        self.leaving = self.ending = False
        self.reason = ""
        self.next_beat, self.lock = threading.Event(), threading.Lock()
        self.talker, self.ticker = (
            threading.Thread(target=run, daemon=True) for run in (self._talk, self._tick)
        )

    def start(self) -> None:
        """Publishes host and pid, begins to beat and to look. Returns at once."""
        self.talker.start()
        self.ticker.start()

    def stop(self) -> None:
        """The regular end, after a barrier and before the process group's: our silence means nothing from now on.

        The store ends with its host, so the host waits until the others have stopped too, for timeout / 2 at most.
        """
        self._depart("")

    def fail(self, reason: str) -> None:
        """This rank ends by an error of its own, which it prints itself: tells the others. The watch no longer ends this process."""
        self._depart(f"failed: {textwrap.shorten(reason, 300, placeholder=' ...')}")

    def explain(self) -> None:
        """After a communication error: finds out which rank is gone and ends this process.

        Returns after ten beats (a beat: timeout / 10, at most 1 s) if all others go on answering or have ended regularly.
        """
        began = self.asked = self.listened
        while self.talker.is_alive() and (
            self.listened - began < (2 * SHORT_SILENCE + 2) * self.beat
            or self._silent(2 * self.beat)
        ):
            time.sleep(self.beat / 4)
        self.asked = None

    # ---- two threads: one talks to the store, the other never waits for it

    def _talk(self) -> None:
        try:
            self._introduce()
            while self._turn():
                self._exchange()
                self._judge()
            if self.reason:
                self._tell(self.rank, f"{self._who(self.rank)} {self.reason}")
            self._leave(self.rank, SHORT_SILENCE * self.beat if self.reason else self.timeout / 2)
        except RuntimeError:  # torch.distributed's: the connection is closed
            self._end(*self._verdict(self.host, "is gone"))

    def _turn(self) -> bool:
        """Waits for the next beat, before which the ticker has looked whether the store is there; False: it is time to leave."""
        self.next_beat.wait()
        self.next_beat.clear()
        return not self.leaving

    def _tick(self) -> None:
        """Keeps the clock, and an eye on the store's host: no call to the store returns while that is stopped."""
        last = time.monotonic()
        while self.talker.is_alive():
            hung_up = self._hung_up()
            elapsed, last = time.monotonic() - last, time.monotonic()
            self.clock += min(elapsed, 2 * self.beat)
            if elapsed > self.timeout / 2:
                self.slept, self.woke = elapsed, self.listened
            if hung_up:
                self.line = None
                self._end(*self._verdict(self.host, "is gone"))
            elif self.clock - self.answered > (self._limit() if all(self.beats) else self.timeout):
                # At first it is longer: the store looks up who connects, for 5 s each where no name server answers.
                self._end(*self._verdict(self.host, self._silence(self.clock - self.answered)))
            self.next_beat.set()

    def _hung_up(self) -> bool:
        """Waits for a beat, less until all have started, or until the connection to the store's host is closed."""
        pause = self.beat if all(self.beats) else self.beat / 10
        if self.line is None:
            time.sleep(pause)
            return False
        try:
            self.line.settimeout(pause)
            return not self.line.recv(1)
        except TimeoutError:
            return False
        except OSError:
            return True

    # ---- what is said to the store

    def _introduce(self) -> None:
        time_of_run = self.store.add(
            f"watch/starts/{self.rank}", 1
        )  # one store may see several watches, one after the other
        self.store = PrefixStore(f"watch/{time_of_run}", self.store)
        self.store.set(f"names/{self.rank}", f"pid {os.getpid()} on {socket.gethostname()}")
        for number, key in enumerate(self.keys):
            self.store.add(
                key, int(number == self.rank)
            )  # all keys: reading one that nobody has written would block
        self.store.compare_set("lost", "", NOBODY)
        if self.rank != self.host:
            self.line = _connect(self.store, self.beat)

    def _exchange(self) -> None:
        """One beat, and everyone's."""
        self.store.add(self.keys[self.rank], 1)
        *beats, lost = self.store.multi_get([*self.keys, "lost"])
        self.listened += min(self.clock - self.answered, 2 * self.beat)
        self.answered = self.clock
        for number, beat in enumerate(map(int, beats)):
            if beat != self.beats[number]:
                self.beats[number], self.heard[number] = beat, self.listened
        if new := [
            number for number, beat in enumerate(self.beats) if beat and number not in self.names
        ]:
            names = self.store.multi_get([f"names/{number}" for number in new])
            self.names.update(zip(new, (name.decode() for name in names), strict=True))
        if lost.decode() != NOBODY:
            self._end_together(lost.decode())

    def _judge(self) -> None:
        """Names the rank that has been silent for longest, if that is too long; if none has, one that has never been heard."""
        gone = self._silent(self._limit())
        never = [number for number, beat in enumerate(self.beats) if not beat]
        if gone:
            culprit = min(gone, key=lambda number: self.heard[number])
            what = self._silence(self.listened - self.heard[culprit])
        elif never and self.listened > self.timeout:
            culprit, what = never[0], f"has not started within {_seconds(self.timeout)}"
        elif (
            never
            and self.asked is not None
            and self.listened - self.asked > 2 * SHORT_SILENCE * self.beat
        ):
            culprit, what = never[0], "is gone"
        else:
            return
        self._end_together(self._tell(*self._verdict(culprit, what)))

    def _tell(self, culprit: int | None, sentence: str) -> str:
        """Says who is lost. Returns what was said first, which holds for all."""
        return self.store.compare_set("lost", NOBODY, f"{culprit} {sentence}").decode()

    def _leave(self, culprit: int, longest: float) -> None:
        """The last word. The store's host stays until all but the culprit have said theirs, `longest` seconds at most."""
        self.store.set(self.keys[self.rank], str(LEFT))
        begin = self.clock
        while self.rank == self.host and self.clock - begin < longest:
            beats = map(int, self.store.multi_get(self.keys))
            if all(beat == LEFT for number, beat in enumerate(beats) if number != culprit):
                break
            time.sleep(self.beat / 10)

    # ---- what we know

    def _silent(self, limit: float) -> list[int]:
        """The others that have started and been silent for more than `limit` seconds."""
        others = (number for number in range(len(self.keys)) if number != self.rank)
        return [
            number
            for number in others
            if self.beats[number] > 0 and self.listened - self.heard[number] > limit
        ]

    def _limit(self) -> float:
        """Seconds of silence after which a rank is gone."""
        return self.timeout / 2 if self.asked is None else SHORT_SILENCE * self.beat

    def _silence(self, seconds: float) -> str:
        return f"has not answered for {_seconds(seconds)}" if self.asked is None else "is gone"

    def _verdict(self, culprit: int | None, what: str) -> tuple[int | None, str]:
        """Whom to name, and the sentence: ourselves if we were stopped and have heard nobody since, for the others have given us up."""
        last = max(
            (heard for number, heard in enumerate(self.heard) if number != self.rank), default=0.0
        )
        if (
            self.slept and last <= self.woke + 2 * self.beat
        ):  # what they said before they ended may come in late
            culprit, what = self.rank, f"did not run for {_seconds(self.slept)}"
        return culprit, f"{self._who(culprit)} {what}"

    def _who(self, number: int | None) -> str:
        if number is None:
            return "the launcher, which holds the run's store,"
        return f"rank {number} ({self.names[number]})" if number in self.names else f"rank {number}"

    # ---- the end

    def _depart(self, reason: str) -> None:
        with self.lock:
            if not self.leaving:
                self.reason, self.leaving = reason, True
        self.next_beat.set()
        if self.talker.ident is not None:
            self.talker.join(
                self.timeout / 2 + 2 * self.beat
            )  # it takes longer only if the store does not answer

    def _end_together(self, lost: str) -> None:
        culprit, sentence = lost.split(" ", 1)
        self._end(int(culprit), sentence, together=True)

    def _end(self, culprit: int | None, sentence: str, together: bool = False) -> None:
        """Prints the line if that is up to us, and ends the process. Does nothing where that has begun or stop() or fail() was called."""
        with self.lock:
            if self.ending or self.leaving:
                return
            self.ending = True
        # Whatever blocks below, a pipe that nobody reads or the store, the process ends.
        threading.Timer(3 * self.beat, os._exit, [1]).start()
        left = [
            number
            for number in self.speakers
            if number != culprit and number not in self._silent(self._limit() - self.beat)
        ]
        if self.rank in (culprit, min(left, default=None)):
            end = (
                "the others have ended, and so does this process"
                if culprit == self.rank
                else "this run ends"
            )
            sys.stderr.write(
                f"error: {sentence}; {end}. {self.advice}".rstrip() + "\n"
            )  # one write: lines of ranks don't mix
            sys.stderr.flush()
        if together and culprit is not None:
            with suppress(RuntimeError):
                self._leave(culprit, 2 * self.beat)
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(1)


def default_store() -> Store:
    """The default process group's store by a connection of its own, which never waits behind the main thread's calls.

    Raises:
        ValueError: there is no process group.
    """
    return _get_default_store().clone()  # type: ignore[attr-defined]


def _connect(store: Store, patience: float) -> socket.socket | None:
    """A silent connection to the store's host. It tells of the host's death at once, and without the C++ stack that the store prints."""
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    if not isinstance(store, TCPStore):
        return None
    try:
        return socket.create_connection((store.host, store.port), timeout=patience)
    except OSError:
        return None


def _seconds(value: float) -> str:
    return f"{value:.0f} s" if value >= 10 else f"{value:.1f} s"
