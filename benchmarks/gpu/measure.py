"""What the measurements share: where they run, the line that each one leaves, clocks, distances.

A measurement is a function of a Place and plain arguments; it returns a dict that JSON can hold.
"""

import gc
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.shared.options import ROOT
from comet_pl.errors import first_line

GIB = 2**30
TINY_LEAST = 64  # tokens of the shortest text of a trial


@dataclass(frozen=True)
class Place:
    """Where a measurement runs: the device, the size, and a folder for what it leaves behind."""

    device: str  # cuda or cpu
    tiny: bool  # a trial: every shape is tiny
    scratch: Path

    @property
    def on_gpu(self):
        return self.device == "cuda"

    def tokens(self, thousands):
        """The length of a text of so many times 1024 tokens; a trial's is 256 times shorter."""
        return max(4 * thousands, TINY_LEAST) if self.tiny else 1024 * thousands

    def synchronize(self):
        if self.on_gpu:
            torch.cuda.synchronize()


@dataclass(frozen=True)
class Planned:
    """A measurement of the plan."""

    what: str
    seconds: float  # it takes about; with less time left it is skipped
    tiny_seconds: float  # as a trial
    gpu_only: bool
    function: Callable[..., dict[str, Any]]
    arguments: dict[str, Any]

    def estimate(self, tiny):
        return self.tiny_seconds if tiny else self.seconds


def planned(what, seconds, function, tiny_seconds=3, gpu_only=False, **arguments) -> Planned:
    """function(place, **arguments), which takes about so many seconds."""
    return Planned(what, seconds, tiny_seconds, gpu_only, function, arguments)


def line_of(one: Planned, place: Place, deadline: float) -> dict[str, Any]:
    """Measures if the time suffices: the values with "took" and "peak_gib", or "skipped" or
    "error" with the reason.

    Args:
        deadline: a time as time.time() gives it.

    Raises:
        Exception: an error after which CUDA answers nothing more in this process; `line` of it is
            the line.
    """
    line = {"what": one.what, "kind": one.function.__name__}
    left, needed = deadline - time.time(), one.estimate(place.tiny)
    if one.gpu_only and not place.on_gpu:
        return line | {"skipped": "it needs a GPU"}
    if left < needed:
        return line | {"skipped": f"{max(0, left):.0f} s left, {needed:.0f} s needed"}
    start = time.perf_counter()
    if place.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        values = one.function(place, **one.arguments)
        place.synchronize()
    except Exception as error:
        line |= {"error": f"{type(error).__name__}: {first_line(error)}"[:300]}
        line["where"] = place_of(error)
        if "CUDA error" in str(error):
            error.line = line
            raise
    else:
        line |= values
    line["took"] = round(time.perf_counter() - start, 1)
    if place.on_gpu:
        line["peak_gib"] = line.get("peak_gib", gib(torch.cuda.max_memory_allocated()))
    gc.collect()
    return line


def place_of(error):
    """The project's last line in the error's traceback, as file:line."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [
        f
        for f in frames
        if Path(f.filename).is_relative_to(ROOT) and "site-packages" not in f.filename
    ]
    last = (ours or frames)[-1]
    return f"{last.filename.removeprefix(f'{ROOT}/')}:{last.lineno}"


def append_line(file: Path, line: dict[str, Any]) -> None:
    """The line is in the file when this returns, whatever becomes of the process."""
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(line) + "\n")


def gib(number_of_bytes):
    return round(number_of_bytes / GIB, 2)


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


# ---- clocks


def clock(place, work, times=5, warm_up=2):
    """Median milliseconds of `work`, and of it until the host is free again."""
    for _ in range(warm_up):
        work()
    walls, hosts = [], []
    for _ in range(times):
        place.synchronize()
        start = time.perf_counter()
        work()
        hosts.append((time.perf_counter() - start) * 1e3)
        place.synchronize()
        walls.append((time.perf_counter() - start) * 1e3)
    return median(walls), median(hosts)


def median(values):
    return round(sorted(values)[len(values) // 2], 3)


def kernels(work):
    """The kernels that `work` starts on the GPU, the dearest first: (name, launches, ms).

    Raises:
        RuntimeError: the profiler sees none, as on machines that hide them.
    """
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    events = [e for e in seen.key_averages() if e.device_type == DeviceType.CUDA]  # no API calls
    found = [(e.key, e.count, e.self_device_time_total / 1e3) for e in events]
    if not found:
        raise RuntimeError("the profiler sees no kernel here")
    return sorted(found, key=lambda kernel: -kernel[2])


# ---- distances


def relative(ours: Tensor, reference: Tensor) -> float:
    """|ours - reference| / |reference| of all entries together; nan if one is not finite."""
    a, b = (t.detach().double().cpu() for t in (ours, reference))
    if not torch.isfinite(a).all():
        return float("nan")
    return float((a - b).norm() / b.norm().clamp_min(1e-300))


def within(errors, bound):
    """The worst of {what: error} and its verdict; nan is the worst of all."""
    bad = {what: error for what, error in errors.items() if not error <= bound}
    worst = max(errors.values(), key=lambda error: float("inf") if error != error else error)
    return {"checks": len(errors), "worst": worst, "bound": bound, "met": not bad, "bad": bad}
