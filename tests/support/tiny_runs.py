"""The tiny run that several tests make by train.py's arguments; a key given again after these takes
the place of the first."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
TINY = """
trainer.accelerator=cpu backbone.hidden_size=16 backbone.num_attention_heads=2
backbone.num_key_value_heads=1 backbone.head_dim=8 backbone.intermediate_size=24
backbone.vocab_size=300 model.chunk_size=16 model.global_size=2 model.compression_stride=4
model.temporary_capacity=6
""".split()


def python(code: str, *arguments: str) -> str:
    """The last line that code prints in a process of its own."""
    argv = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def command(root: Path, name: str, *keys: str) -> list[str]:
    """train.py in a process of its own; keys: TINY and others."""
    return [sys.executable, "train.py", f"run.root={root}", f"run.name={name}", *keys]


SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@contextmanager
def at_step(
    argv: list[str],
    step: int,
    stderr: int = subprocess.PIPE,
    ignored: Sequence[int] = (),
    **env: str,
) -> Iterator["subprocess.Popen[str]"]:
    """A process of train.py that has shown a step, or has ended; what is left of it after the
    block, or after five minutes, is killed."""

    def listens() -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)

    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": stderr, "text": True}
    environment = os.environ | env
    with subprocess.Popen(
        argv, cwd=ROOT, env=environment, preexec_fn=listens, start_new_session=True, **streams
    ) as process:

        def end() -> None:
            with suppress(ProcessLookupError):  # its children too: they hold its streams open
                os.killpg(process.pid, signal.SIGKILL)

        watchdog = threading.Timer(300, end)
        watchdog.start()
        try:
            wait_for_step(process, step)
            yield process
        finally:
            watchdog.cancel()
            end()


def wait_for_step(process: "subprocess.Popen[str]", step: int) -> None:
    """Reads the process's lines until it shows this step or a later one, or ends."""
    assert process.stdout is not None
    for line in process.stdout:
        shown = re.match(r"step (\d+)/", line)
        if shown and int(shown[1]) >= step:
            return


COMPARED = "state_dict optimizer_states lr_schedulers random_states callbacks".split()
COMPARED += ["global_step", "skipped"]
TIMES = ("train/tokens_per_s", "train/tflops", "train/mfu", "memory/peak_gb")


def scalars(folder):
    """{tag: [(step, value)]} as TensorBoard shows them, and what it shows pictures of."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()
    curves = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if tag not in TIMES
    }
    pictures = {
        tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]
    }
    return curves, pictures


def differences(one, two, where=""):
    """The places at which two nested structures of tensors and plain values differ."""
    if isinstance(one, Tensor):
        return [] if torch.equal(one, two) else [where]
    if isinstance(one, list | tuple) and len(one) == len(two):
        one, two = dict(enumerate(one)), dict(enumerate(two))
    if isinstance(one, dict):
        keys = sorted({*one, *two}, key=str)
        return [d for k in keys for d in differences(one.get(k), two.get(k), f"{where}.{k}")]
    return [] if one == two else [where]


def same_run(straight, other, best=True):
    """Weights, optimizer, random states, data position and logged values of two run folders are
    equal."""
    for name in ("last", "best") if best else ("last",):
        paths = (run / "checkpoints" / f"{name}.ckpt" for run in (straight, other))
        a, b = (torch.load(path, weights_only=True) for path in paths)
        for key in COMPARED:
            assert differences(a[key], b[key]) == [], (name, key)
        loaders = [c["loops"]["fit_loop"]["state_dict"]["combined_loader"] for c in (a, b)]
        assert loaders[0] == loaders[1]
    assert scalars(straight) == scalars(other)
    assert not list((other / "checkpoints").glob(".*"))
