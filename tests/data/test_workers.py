"""Workers that die, stop, fail or are sent a signal: real processes."""

import os
import signal
import subprocess
import sys
import time

import pytest
from torch.utils.data import get_worker_info

from comet_pl.errors import UserError, fault_of
from data import workers
from data.batches import ResumableLoader, loader
from data.workers import received

COUNT = 40


class Rows:
    """Row n is (n, the worker that made it); a row waits, or fails."""

    def __init__(self, waits=(), fails=()):
        self.waits, self.fails = waits, fails

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        if index in self.waits:
            time.sleep(self.waits[index])
        if index in self.fails:
            raise UserError("row 7: UserError: cannot be read")
        return index, os.getpid() if get_worker_info() else 0


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, seconds in {"POLL": 0.2, "STOPPED": 1.0, "IDLE": 2.0}.items():
        monkeypatch.setattr(workers, name, seconds)


def batches(rows, count=2):
    numbers = [[start, start + 1] for start in range(0, COUNT, 2)]
    return received(loader(rows, numbers, list, count))


def living(pids):
    """Those that are left after a while."""
    end = time.monotonic() + 10
    while left := [pid for pid in pids if workers._state(pid)[0] not in ("", "Z")]:
        if time.monotonic() > end:
            break
        time.sleep(0.05)
    return left


def until_trouble(rows, send, number=signal.SIGSTOP):
    """What is raised after a worker was sent a signal, the workers, and seconds it took."""
    stream = batches(rows)
    pids = {pid for _ in range(2) for _, pid in next(stream)}
    started = time.monotonic()

    def rest():
        for pid in sorted(pids)[:send]:
            os.kill(pid, number)
        list(stream)

    with pytest.raises((UserError, RuntimeError)) as error:
        rest()
    stream.close()
    return error.value, pids, time.monotonic() - started


@pytest.mark.parametrize("count", [0, 2])
def test_all_batches_come_in_order_and_no_worker_is_left(count):
    found = list(batches(Rows(), count))
    assert [[number for number, _ in batch] for batch in found] == [
        [start, start + 1] for start in range(0, COUNT, 2)
    ]
    pids = {pid for batch in found for _, pid in batch} - {0}
    assert len(pids) == count and not living(pids)


def test_a_slow_worker_is_waited_for():
    """Longer than a look, and longer than another may be stopped; it sleeps, others work."""
    assert len(list(batches(Rows(waits={5: 1.5})))) == COUNT // 2


@pytest.mark.parametrize("waits", [{}, {4: 20}, {5: 20}, {4: 20, 6: 20}])
def test_a_killed_worker_is_a_line(waits):
    error, pids, seconds = until_trouble(Rows(waits=waits), 1, signal.SIGKILL)
    line = fault_of(error)
    assert line.startswith("data.num_workers: DataLoader worker (pid"), repr(error)
    assert line.endswith("resume=true goes on from the last checkpoint") and "\n" not in line
    assert seconds < 10 and not living(pids)


def test_the_handler_that_a_trainer_takes_away_is_set_again():
    """As lightning's signal connector does at the end of each training."""
    list(batches(Rows()))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    error, _, _ = until_trouble(Rows(waits={4: 20, 6: 20}), 1, signal.SIGKILL)
    assert "is killed by signal" in str(error)


class Unsendable:
    def __reduce__(self):
        raise OSError(28, "No space left on device")


def test_a_batch_that_cannot_be_sent_is_a_line():
    """As without room in shared memory."""

    class Large(Rows):
        def __getitem__(self, index):
            return Unsendable() if index == 7 else super().__getitem__(index)

    with pytest.raises(UserError, match="a worker process cannot send its batch"):
        list(batches(Large()))


def test_a_stopped_worker_is_named():
    error, pids, seconds = until_trouble(Rows(), 1)
    assert isinstance(error, UserError)
    assert str(error).startswith(f"data.num_workers: worker process {min(pids)} has been stopped")
    assert "resume=true" in str(error)
    assert 1.0 < seconds < 10 and not living(pids)


def test_a_worker_that_goes_on_in_time_is_forgiven():
    stream = batches(Rows())
    (_, pid), _ = next(stream)
    os.kill(pid, signal.SIGSTOP)
    subprocess.Popen(["sh", "-c", f"sleep 0.7; kill -CONT {pid}"])
    assert len(list(stream)) == COUNT // 2 - 1


def test_workers_that_hang_are_told_of():
    error, pids, seconds = until_trouble(Rows(waits={6: 60, 8: 60}), 0)
    assert "no worker process has done anything for" in str(error)
    assert 2.0 < seconds < 30 and pids


def test_an_error_in_a_worker_is_the_same_line():
    messages = []
    for count in (0, 2):
        with pytest.raises(UserError) as error:
            list(batches(Rows(fails=[7]), count))
        messages.append(str(error.value))
    assert messages == ["row 7: UserError: cannot be read"] * 2


def test_a_worker_that_is_killed_with_a_lock_holds_nobody_up():
    """Workers look at an event of the main process's, which it sets when it ends them."""

    class Locked(Rows):
        def __getitem__(self, index):
            if index == 6:
                frame = sys._getframe()
                while "done_event" not in frame.f_locals:
                    frame = frame.f_back
                frame.f_locals["done_event"]._cond.acquire()
                time.sleep(60)
            return super().__getitem__(index)

    with pytest.raises(UserError, match="cannot be read"):
        list(batches(Locked(waits={5: 0.5}, fails=[5])))


@pytest.mark.parametrize("number", [*workers.IGNORED, signal.SIGTERM])
def test_signals_to_the_whole_group_leave_the_workers_alone(number):
    """Schedulers send them to each process; the main one needs the rest of the step."""
    stream = batches(Rows())
    pids = {pid for _ in range(2) for _, pid in next(stream)}
    send = f"import os\nfor pid in {sorted(pids)}: os.kill(pid, {int(number)})"
    subprocess.run([sys.executable, "-c", send], check=True)
    assert len(list(stream)) == COUNT // 2 - 2
    assert not living(pids)


def test_a_parents_sigterm_ends_a_worker():
    """As torch's and Python's own ends do."""
    stream = batches(Rows())
    (_, pid), _ = next(stream)
    os.kill(pid, signal.SIGTERM)
    assert not living([pid])
    stream.close()


def test_a_loader_that_is_left_early_leaves_no_worker():
    stream = iter(ResumableLoader(Rows(), 2, list, num_workers=2))
    pids = {pid for _ in range(2) for _, pid in next(stream)}
    stream.close()
    assert not living(pids)
