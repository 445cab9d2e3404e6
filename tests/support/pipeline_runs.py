"""train.py on one device in this process, and on several ranks in processes of their own."""

import os
import runpy
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from tests.support.tiny_runs import ROOT, TINY, scalars

main = runpy.run_path(str(ROOT / "train.py"))["main"]
TIMEOUT = 20  # seconds: strategy.timeout of every run here
STEPS = 12
KEYS = [*TINY, f"trainer.max_steps={STEPS}"]
# 104 tokens are 7 chunks: 2 ranks do not divide them.
KEYS += """
trainer.val_check_interval=6 trainer.log_every_n_steps=1 checkpoint.every_steps=2
data.train_length=104 data.length_schedule=null data.batch_size=2 data.val_depths=3
data.val_examples=1 eval.after_fit=false eval.lengths=[64,128] eval.depths=2 eval.examples=1
train.lr=1e-3 train.warmup_steps=3
""".split()
# Still on its way when a test has seen its tenth step.
LONG = ["trainer.max_steps=40", "trainer.val_check_interval=20"]
ENDLESS = ["trainer.max_steps=100000", "checkpoint.every_steps=null"]
STRATEGY = ["trainer.strategy=layer_pipeline", f"strategy.timeout={TIMEOUT}"]
ONE = ["trainer.devices=1", "trainer.strategy=auto"]
TWO = ["trainer.devices=2", *STRATEGY]


def folder_of(root, name):
    return Path(root) / "passkey" / name


def on_one(root, name, *keys):
    """On one device, in this process; returns the run's folder."""
    main([f"run.root={root}", f"run.name={name}", *KEYS, *keys, *ONE])
    return folder_of(root, name)


class Training:
    """train.py as rank 0 and what Lightning's launcher starts, in a session of their own. A context
    that leaves no process."""

    def __init__(self, root, name, *keys, on=TWO, script="train.py"):
        root.mkdir(exist_ok=True)
        self.path = folder_of(root, name)
        self.out, self.err = root / f"{name}.out", root / f"{name}.err"
        where = [f"run.root={root}", f"run.name={name}"]
        argv = [sys.executable, str(script), *where, *KEYS, *on, *keys]
        options = {"cwd": ROOT, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
        with self.out.open("w") as out, self.err.open("w") as err:
            self.main = subprocess.Popen(
                argv, stdout=out, stderr=err, start_new_session=True, **options
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        while left := processes(self.main.pid):
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)  # ends a stopped one, too
        self.main.wait()

    def at_step(self, step):
        """Waits until a step is shown; returns the ranks' processes."""
        until(lambda: f"step {step}/" in self.out.read_text() or self.main.poll() is not None, 120)
        assert self.main.poll() is None, self.err.read_text()
        return [self.main.pid, *(set(processes(self.main.pid)) - {self.main.pid})]

    def ended(self, within, but=()):
        """Waits until no process is left but those named; returns rank 0's exit code."""
        until(lambda: set(processes(self.main.pid)) <= set(but), within, self.err)
        return None if self.main.pid in but else self.main.wait(10)

    def finished(self):
        """The folder of a run that came to its regular end."""
        assert self.ended(150) == 0, self.err.read_text()
        return self.path

    def errors(self):
        """Lines on stderr, Lightning's greeting left out."""
        lines = self.err.read_text().splitlines()
        return [line for line in lines if not line.startswith("Initializing distributed")]


def processes(session):
    """The living processes of a session, without zombies."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = file.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has just ended
            continue
        if int(its_session) == session and state != "Z":
            found.append(int(file.parent.name))
    return found


def until(condition, seconds, log=None):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited for {seconds} s: {log and log.read_text()}"
        time.sleep(0.02)


def same_run(folder, straight):
    """All logged losses and the checkpoints are those of one device, up to float32's order of
    summation; no step is logged twice."""
    found, expected = (
        {t: dict(c) for t, c in scalars(run)[0].items()} for run in (folder, straight)
    )
    assert all(len(found[tag]) == len(curve) for tag, curve in scalars(folder)[0].items())
    assert {tag: list(c) for tag, c in found.items()} == {t: list(c) for t, c in expected.items()}
    for tag in ("train/loss", "val/loss"):
        assert found[tag] == pytest.approx(expected[tag], rel=1e-5), tag
    for tag in ("train/lr", "train/skipped"):
        assert found[tag] == expected[tag], tag
    for name in ("last.ckpt", "best.ckpt"):
        paths = straight / "checkpoints" / name, folder / "checkpoints" / name
        one, two = (torch.load(path, weights_only=True) for path in paths)
        assert one["global_step"] == two["global_step"]
        assert list(one["state_dict"]) == list(two["state_dict"])
        for weight, value in one["state_dict"].items():
            apart = (two["state_dict"][weight] - value).abs().max()
            assert apart <= 1e-5 * value.abs().max(), (name, weight)
