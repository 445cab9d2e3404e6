"""Events on a disk that is full for a while."""

import resource
import time
from contextlib import contextmanager

import pytest

from callbacks.run_logger import RunLogger
from tests.support.tiny_runs import scalars


@contextmanager
def full_disk():
    """No file may grow beyond 64 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def log(logger, *steps):
    for step in steps:
        logger.log_metrics({"loss": float(step)}, step)


def test_a_clock_that_was_ahead_does_not_mix_the_curves(tmp_path):
    """A year ahead, two seconds ahead, the same second, and a file of long ago."""
    before = RunLogger(tmp_path, purge_step=0)
    log(before, 1)
    before.save()
    now = int(time.time())
    (first,) = tmp_path.glob("events.*")
    first.rename(tmp_path / f"events.out.tfevents.{now - 10**6:010}.there.1.0")
    for number, stamp in enumerate([now + 2, now + 2, now + 31_536_000], start=2):
        logger = RunLogger(tmp_path, purge_step=number)
        log(logger, number, number + 1)
        logger.save()
        (new,) = (file for file in tmp_path.glob("events.*") if ".there." not in file.name)
        new.rename(tmp_path / f"events.out.tfevents.{stamp:010}.there.{number}.0")
    after = RunLogger(tmp_path, purge_step=5)
    log(after, 5)
    after.save()
    assert scalars(tmp_path)[0]["loss"] == [(step, float(step)) for step in (1, 2, 3, 4, 5)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("room", [[2], []])
def test_events_of_before_and_after_are_kept(tmp_path, capsys, room):
    """room: the steps that are written before the disk is full."""
    before = RunLogger(tmp_path, purge_step=0)
    log(before, 1, 2, 3)
    before.save()
    resumed = RunLogger(tmp_path, purge_step=2)
    log(resumed, *room)
    if room:
        resumed.save()
    with full_disk():
        for step in (3, 4, 5):
            log(resumed, step)
            resumed.save()
    resumed.after_save_checkpoint(None)
    log(resumed, 6)
    resumed.save()
    assert scalars(tmp_path)[0]["loss"] == [(step, float(step)) for step in [1, *room, 6]]
    warnings = capsys.readouterr().err.strip().splitlines()
    assert len(warnings) == 1 and "events cannot be written: " in warnings[0]
    assert len(list(tmp_path.glob("events.*"))) <= 3
