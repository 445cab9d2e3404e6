"""What the processes of the pipeline benchmark do: the same step in every arrangement, in turn; and the memory that a step takes.

A step is forward and backward pass of one text, all gradients, no optimizer. Two processes, one thread each, gloo.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1] / "tests")
)  # processes under a watchdog: they are for tests

import torch
import torch.distributed as dist
from live_bytes import LiveBytes
from pipeline_clock import Event
from ranks import in_processes
from rich.progress import track
from shapes import TEXT_VOCABULARY, Shape
from torch import Tensor

from comet_pl import CometForCausalLM
from comet_pl.parallel.p2p import Channel, Ring
from comet_pl.parallel.pipeline import Pipeline
from comet_pl.parallel.schedule import SCHEDULES
from comet_pl.parallel.strategy import LayerPipelineStrategy
from comet_pl.training.text_reader import read_windows
from comet_pl.training.windows import Window, count_targets, cut_windows

ALONE, BOTH = "alone", "at_the_same_time"  # one process; two that know nothing of each other
ARRANGEMENTS = (ALONE, BOTH, *reversed(SCHEDULES))
PINGS = 50
PATIENCE = timedelta(minutes=10)  # of a rank with another
LONGEST = 3600.0  # seconds, all in all


@dataclass(frozen=True)
class Job:
    """A text of `chunks` chunks for a model of this shape."""

    shape: Shape
    chunks: int
    rounds: int = 1

    def model(self) -> CometForCausalLM:
        """The same weights in every process."""
        torch.manual_seed(0)
        return CometForCausalLM(self.shape.comet()).train()

    def text(self) -> tuple[list[Window], int]:
        """(its one window, the number of targets)"""
        ids = torch.randint(
            0,
            TEXT_VOCABULARY,
            (1, self.chunks * self.shape.chunk),
            generator=torch.Generator().manual_seed(0),
        )
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        return cut_windows(batch, self.shape.chunk, None), count_targets(batch)


def measure(job: Job) -> list[list[dict[str, Any]]]:
    """Of each of two ranks: what `_measure` found."""
    return in_processes(2, _measure, job, timeout=LONGEST, group=False)


def peak_memory(job: Job, ranks: int, recompute: bool) -> list[int]:
    """Bytes that each rank of a layer_level pipeline had at its worst moment, weights and their gradients left out."""
    return in_processes(ranks, _peak_memory, job, recompute, timeout=LONGEST, group=False)


# ---- the clocks


def now() -> tuple[float, float]:
    """(wall, processor time of this process) in seconds; the wall clock is one for all processes."""
    return time.perf_counter(), time.process_time()


def machine_busy() -> float:
    """Seconds that all processors of the machine have worked so far, for whomever."""
    try:
        user, nice, system, _, _, *rest = map(
            int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        )
    except OSError:
        return float("nan")  # no /proc on this system: no number rather than a wrong one
    return (user + nice + system + sum(rest[:3])) / os.sysconf("SC_CLK_TCK")


@dataclass
class Log:
    """The events of a step, from `begin` to `end`."""

    events: list[Event] = field(default_factory=list)
    start: float = 0.0  # processor time at the step's beginning

    def begin(self) -> None:
        self.events, self.start = [], now()[1]

    def end(self) -> list[Event]:
        events, self.events = (
            self.events,
            [],
        )  # what comes later, as a ping-pong, is no part of the step
        return events

    def add(self, kind: str, link: str, before: tuple[float, float]) -> None:
        after = now()
        self.events.append(
            Event(
                kind, link, (before[0], after[0]), (before[1] - self.start, after[1] - self.start)
            )
        )


class LoggedChannel(Channel):
    """A channel that writes down when it sent, and when and how long it was waited for."""

    def __init__(self, channel: Channel, link: str, log: Log):
        super().__init__(channel.group, channel.peer)
        self.link, self.log = link, log

    def send(self, message: Tensor) -> None:
        before = now()
        super().send(message)
        self.log.add("send", self.link, before)

    def post(self, *args: Any) -> Any:
        work, message = super().post(*args)
        return LoggedWork(work, partial(self.log.add, "receive", self.link)), message

    def flush(self) -> None:
        before = now()
        super().flush()
        self.log.add("flush", self.link, before)


@dataclass
class LoggedWork:
    work: dist.Work
    add: Any

    def wait(self) -> None:
        before = now()
        self.work.wait()
        self.add(before)


# ---- the arrangements


def _measure(job: Job) -> list[dict[str, Any]]:
    """One entry a round and arrangement: times, events, how far loss and gradients lie from those of one process."""
    dist.init_process_group("gloo", timeout=PATIENCE)
    me, log = dist.get_rank(), Log()
    ends = {
        "to_next": "memory",
        "from_previous": "memory",
        "gradient_to_previous": "gradient",
        "gradient_from_next": "gradient",
    }
    ring = Ring.build([[0, 1]])
    ring = Ring(**{end: LoggedChannel(getattr(ring, end), link, log) for end, link in ends.items()})
    model, (windows, targets) = job.model(), job.text()
    parameters, strategy = list(model.parameters()), LayerPipelineStrategy()

    def read(what: str) -> Iterator[Tensor | None]:
        return (
            read_windows(model, windows, targets)
            if what in (ALONE, BOTH)
            else Pipeline(ring, me, 2, what).read(model, windows, targets)
        )

    def step(what: str) -> dict[str, Any]:
        model.zero_grad(set_to_none=True)
        waited = ring.seconds
        log.begin()
        clock, loss = [now()], torch.zeros(())
        for part in read(what):
            clock.append(now())
            forward_events = len(log.events)
            if part is not None:
                part.backward()
                loss += part.detach()
        clock.append(now())
        found: dict[str, Any] = {
            "waited": ring.seconds - waited,
            "events": log.end(),
            "forward_events": forward_events,
            "loss": loss,
        }
        if what not in (ALONE, BOTH):
            strategy.sum_gradients(parameters)
        clock.append(now())
        return found | {
            "wall": [wall for wall, _ in clock],
            "processor": [processor for _, processor in clock],
        }

    first = step(BOTH)["loss"]  # nobody's first time counts
    expected = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
    plan = [(k, what) for k in range(job.rounds) for what in ARRANGEMENTS]
    found = []
    for k, what in track(plan, description="measuring", transient=True) if me == 0 else plan:
        pings = _ping_pong(job, ring, PINGS) if what == ALONE else []
        dist.barrier()
        (_, processor), busy = now(), machine_busy()
        entry: dict[str, Any] = {"round": k, "what": what, "pings": pings}
        if what != ALONE or me == 0:
            entry |= step(what)
        dist.barrier()
        entry |= {"own": now()[1] - processor, "busy": machine_busy() - busy}
        if what not in (ALONE, BOTH):
            dist.all_reduce(entry["loss"])
            apart = [
                _apart(p.grad, gradient)
                for p, gradient in zip(parameters, expected, strict=True)
                if p.grad is not None
            ]
            entry |= {"loss_differs": _apart(entry["loss"], first), "gradients_differ": max(apart)}
        found.append(entry)
    return found


def _apart(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected entry."""
    return float(
        (found - expected).abs().max()
        / expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    )


def message_shape(job: Job) -> tuple[int, int, int]:
    """Of a layer's memory when it is full."""
    return 1, job.shape.slots, job.shape.hidden


def _ping_pong(job: Job, ring: Ring, times: int) -> list[float]:
    """Seconds that a layer's memory takes to the other rank: half of the way there and back, the median of so many, on rank 0."""
    message, found = torch.zeros(message_shape(job)), []
    for _ in range(times):
        start = time.perf_counter()
        if dist.get_rank() == 0:
            work, _ = ring.gradient_from_next.post(message, message.shape)
            ring.to_next.send(message)
            work.wait()
        else:
            work, _ = ring.from_previous.post(message, message.shape)
            work.wait()
            ring.gradient_to_previous.send(message)
        found.append((time.perf_counter() - start) / 2)
    ring.flush()
    return [median(found)] if dist.get_rank() == 0 else []


# ---- memory


def _peak_memory(job: Job, recompute: bool) -> int:
    dist.init_process_group("gloo", timeout=PATIENCE)
    me, ranks = dist.get_rank(), dist.get_world_size()
    ring = Ring.build([list(range(ranks))]) if ranks > 1 else None
    model, (windows, targets) = job.model(), job.text()
    model.gradient_checkpointing = recompute
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    known = [tensor for p in model.parameters() for tensor in (p, p.grad) if tensor is not None]
    with LiveBytes(
        [*known, *model.buffers(), windows[0].input_ids, windows[0].shift_labels]
    ) as live:
        for loss in Pipeline(ring, me, ranks).read(model, windows, targets):
            if loss is not None:
                loss.backward()
    return live.peak
