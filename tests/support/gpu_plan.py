"""A plan of benchmarks.gpu whose measurements end badly."""

import os
import signal
import subprocess
import sys
import time

import torch

from benchmarks.gpu.measure import planned


def add(place, a, b):
    return {"sum": a + b}


def fail(place):
    return torch.nn.Linear(2, 2)(torch.zeros(1, 3))


def break_cuda(place):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def die(place):
    os.kill(os.getpid(), signal.SIGKILL)


def hang(place, note):
    """Starts a process that would outlive this one, writes its id down, and never returns."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with open(note, "w") as file:
        file.write(str(child.pid))
    time.sleep(600)


def one(number, seconds=0.0):
    return planned(f"sum {number}", seconds, add, tiny_seconds=seconds, a=number, b=1)


PLAN = {
    "law": [one(1), one(2, 1e6), planned("dies", 0, die, tiny_seconds=0), one(3), one(4)],
    "speed": [planned("fails", 0, fail, tiny_seconds=0), one(5)],
    "training": [planned("breaks CUDA", 0, break_cuda, tiny_seconds=0), one(6)],
    "commands": [
        one(7),
        planned("hangs", 0, hang, tiny_seconds=0, note=os.environ.get("GPU_PLAN_NOTE")),
        one(8),
    ],
}
