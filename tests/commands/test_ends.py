"""How a training ends that something else ends: it saves, says so, and goes on later."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from tests.support.tiny_runs import ROOT, at_step, command, wait_for_step
from tests.support.trained import SMALL

LONG = [*SMALL, "trainer.max_steps=100000", "checkpoint.every_steps=null", "eval.after_fit=false"]
SLURM = {
    "SLURM_JOB_ID": "78",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "1",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NNODES": "1",
}


def started(root, *keys, **options):
    """A training that has done four steps."""
    return at_step(command(root, "x", *LONG, *keys), 4, **options)


@pytest.mark.parametrize(
    ("number", "env"),
    [
        pytest.param(signal.SIGHUP, {}, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, SLURM, marks=pytest.mark.slow),
        pytest.param(signal.SIGXCPU, {}, marks=pytest.mark.slow),
    ],
)
def test_signals_of_terminals_and_schedulers_save(number, env, tmp_path):
    with started(tmp_path, **env) as process:
        process.send_signal(number)
        out, errors = process.communicate()
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors and "stopped after step" in out
    folder = tmp_path / "passkey" / "x"
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] >= 4
    # Lightning's own answer to a scheduler is another file, of half a step.
    assert not list(folder.rglob("hpc_ckpt*"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked up in /proc")
def test_a_data_parallel_rank_is_killed(tmp_path):
    """Lightning's own strategy: the others end in a line, and one device goes on."""
    keys = ["trainer.devices=2", "checkpoint.every_steps=1"]
    with started(tmp_path, *keys) as process:
        (other,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(other), signal.SIGKILL)
        _, errors = process.communicate()
    assert process.returncode == 2 and "Traceback" not in errors
    assert errors.strip().splitlines()[-1].startswith("error: another process of this training")
    resumed = [*command(tmp_path, "x", *SMALL), "resume=true"]
    subprocess.run(resumed, cwd=ROOT, check=True, capture_output=True)


@pytest.mark.slow
def test_what_nohup_ignores_is_ignored(tmp_path):
    with started(tmp_path, ignored=[signal.SIGHUP]) as process:
        process.send_signal(signal.SIGHUP)
        wait_for_step(process, 8)
        process.send_signal(signal.SIGTERM)
        process.communicate()
    assert process.returncode == 128 + signal.SIGTERM


@pytest.mark.slow
def test_the_same_job_twice(tmp_path):
    """The second is refused at once, the first trains on; what is killed holds nobody back."""
    with started(tmp_path, "resume=true") as first:
        again = [*command(tmp_path, "x", *SMALL), "resume=true", "trainer.max_steps=100000"]
        second = subprocess.run(again, cwd=ROOT, capture_output=True, text=True, check=False)
        assert second.returncode == 2
        assert f"is being trained by process {first.pid} on" in second.stderr
        first.send_signal(signal.SIGTERM)
        first.communicate()
        assert first.returncode == 128 + signal.SIGTERM
    for _ in range(2):
        with started(tmp_path, "resume=true") as killed:
            assert killed.poll() is None


@pytest.mark.slow
def test_a_full_disk_costs_no_step(tmp_path):
    """Files may not grow beyond 8 kB, as on a disk that is full: the training goes to its end, says
    what is not written, and what was saved before goes on when there is room."""
    keys = ["checkpoint.every_steps=1", "eval.after_fit=false"]
    whole = command(tmp_path, "x", *SMALL, *keys)
    limited = ["bash", "-c", 'ulimit -f 8; exec "$@"', "bash", *whole]
    env = os.environ | {"TMPDIR": str(tmp_path)}
    ended = subprocess.run(limited, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    *warnings, last = ended.stderr.strip().splitlines()
    assert sum("last.ckpt: step" in line and "goes on, and tries" in line for line in warnings) == 3
    assert last.startswith("error: ") and "step 4 cannot be saved: " in last
    assert last.endswith("make room, then resume=true goes on")
    assert "step 4/4 loss" in ended.stdout
    assert not list(tmp_path.rglob("*.part"))
    resumed = subprocess.run(
        [*whole, "resume=true"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert resumed.returncode == 0, resumed.stderr
