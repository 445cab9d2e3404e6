"""One training at a time writes a run's folder."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from comet_pl.errors import UserError
from comet_pl.experiment import lock

ROOT = Path(__file__).resolve().parents[2]
HOLDER = """
import sys, time
from pathlib import Path
from comet_pl.experiment.lock import lock_folder
lock_folder(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_told_who_is_first(holder, tmp_path):
    with pytest.raises(UserError, match=rf"is being trained by process {holder.pid} on \S+ since"):
        lock.lock_folder(tmp_path)
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    lock.lock_folder(tmp_path)  # what a killed process leaves behind holds nobody back
    lock.lock_folder(tmp_path)  # it is this process's already
    lock.release(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^run\.root: .* cannot be written: No such file"):
        lock.lock_folder(tmp_path / "none")
