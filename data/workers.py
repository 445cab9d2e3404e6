"""Worker processes of the loaders: what they ignore, and what is said when one dies or stops."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import wait
from multiprocessing.queues import Queue
from typing import Any

from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from comet_pl.errors import UserError

# Of terminals and schedulers, which send them to every process of a training: the main one still
# needs this step's rows to save.
IGNORED = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
POLL = 5.0  # seconds between two looks at workers that a batch is awaited from
STOPPED = 30.0  # seconds that a worker may be stopped, as by Ctrl-Z or a debugger
IDLE = 600.0  # seconds in which no worker computes anything
UNSENT = 74  # exit code of a worker that cannot send a batch
RESUME = "end it and go on from the last checkpoint with resume=true"


def start_worker(worker: int) -> None:
    """The worker_init_fn of every loader."""
    # otherwise tokenizers warns of the fork and switches its threads off
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    # A batch that cannot be sent would be waited for in vain.
    queue: Any = Queue
    queue._on_queue_feeder_error = staticmethod(lambda *_: os._exit(UNSENT))
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    """Ends this process on a SIGTERM of the main one's, and of nobody else's."""
    while True:
        sent = signal.sigwaitinfo({signal.SIGTERM})
        if sent.si_pid == os.getppid():
            os._exit(0)


def received(loader: DataLoader[Any]) -> Iterator[Any]:
    """The loader's batches, in order, for as long as its workers live and work.

    Raises:
        UserError: what a worker raises; a worker is stopped, or all are idle.
        RuntimeError: a worker was killed (comet_pl/errors.py::fault_of tells of it); torch raises
            it wherever the main process is just then.
    """
    if not loader.num_workers:
        yield from loader
        return
    if not callable(signal.getsignal(signal.SIGCHLD)):
        # torch sets its handler once a process, and a Lightning trainer that ends takes it away
        signal_handling._SIGCHLD_handler_set = False
    batches: Any = iter(loader)
    attendance = Attendance(batches._workers)
    attendance.start()
    end, failed = object(), False
    try:
        while True:
            attendance.awaited = True
            batch = next(batches, end)
            attendance.awaited = False
            if batch is end:
                return
            attendance.given += 1
            yield batch
    except Exception as error:
        failed = True
        if attendance.reason:
            reason = f"data.num_workers: {attendance.reason}; {RESUME}"
            raise UserError(reason) from None
        if isinstance(error, UserError):
            raise _own(error) from None
        # Half a message of its own may be what the main process has met, before its end is known.
        wait([worker.sentinel for worker in batches._workers], timeout=1.0)
        if any(worker.exitcode == UNSENT for worker in batches._workers):
            raise UserError(
                "data.num_workers: a worker process cannot send its batch, most likely for want of "
                "shared memory (/dev/shm); data.num_workers=0 needs none"
            ) from None
        if killed := [worker for worker in batches._workers if (worker.exitcode or 0) < 0]:
            how = f"DataLoader worker (pid {killed[0].pid}) is killed by signal"
            raise RuntimeError(f"{how}: {-killed[0].exitcode}") from error
        raise
    finally:
        attendance.leave()
        _end(batches, kill=failed)


def _end(batches: Any, kill: bool) -> None:
    """Ends the workers; a stopped one would not end by itself, and this process would wait."""
    # From here on torch raises no error at the end of one.
    if batches._worker_pids_set:
        signal_handling._remove_worker_pids(id(batches))
        batches._worker_pids_set = False
    if kill or any(worker.exitcode or _state(worker.pid)[0] == "T" for worker in batches._workers):
        for worker in batches._workers:
            worker.kill()
        # One that is killed while it looks at this event keeps its lock: set() would wait for ever.
        batches._workers_done_event = threading.Event()
    batches._shutdown_workers()


def _own(error: UserError) -> UserError:
    """The error as the worker raised it, without the traceback that torch puts before it."""
    kind = type(error)
    return kind(str(error).rpartition(f"\n{kind.__module__}.{kind.__qualname__}: ")[2].strip())


class Attendance(threading.Thread):
    """Looks at workers while a batch of theirs is awaited, and kills one when one is stopped or all
    are idle for too long: the main process, which may wait in a read that has no time limit, gets
    torch's error for it.

    Attributes:
        awaited, given: whether a batch is awaited, and how many have come; set by the main thread.
        reason: why a worker was killed.
    """

    def __init__(self, workers: list[Any]):
        super().__init__(name="attendance", daemon=True)
        self.workers = workers
        self.awaited, self.given = False, 0
        self.reason: str | None = None
        self.left = threading.Event()
        self.stopped = self.idle = 0.0  # seconds; this process's own pauses do not count
        self.before: tuple[int, list[int]] = 0, []

    def run(self) -> None:
        while self.reason is None and not self.left.wait(POLL):
            self._look()

    def leave(self) -> None:
        self.left.set()
        self.join()

    def _look(self) -> None:
        states = {worker.pid: _state(worker.pid) for worker in self.workers}
        stopped = [pid for pid, (letter, _) in states.items() if letter == "T"]
        now = self.given, [ticks for _, ticks in states.values()]
        idle = self.awaited and now == self.before and -1 not in now[1]
        self.stopped = self.stopped + POLL if stopped and self.awaited else 0.0
        self.idle = self.idle + POLL if idle else 0.0
        self.before = now
        if self.stopped > STOPPED:
            self.reason = f"worker process {stopped[0]} has been stopped for {self.stopped:.0f} s"
        elif self.idle > IDLE:
            self.reason = f"no worker process has done anything for {self.idle:.0f} s"
        if self.reason:
            os.kill(next(iter(stopped or states)), signal.SIGKILL)


def _state(pid: int) -> tuple[str, int]:
    """A process's state as ps shows it (T: stopped), and ticks it has computed; ('', -1) where
    there is no /proc."""
    with suppress(OSError, ValueError, IndexError), open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
        return fields[0], int(fields[11]) + int(fields[12])
    return "", -1
