"""What the processes of the pipeline benchmark do: the same step in every arrangement in turn, and
the memory of a step (forward and backward pass of one text, all gradients, no optimizer).
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
import torch.distributed as dist
from rich.progress import track
from torch import Tensor

from benchmarks.pipeline.clock import Event
from benchmarks.shared.live_bytes import LiveBytes
from benchmarks.shared.shapes import Shape
from benchmarks.training.measure_step import text, zero_gradients
from comet_pl import CometForCausalLM
from comet_pl.parallel.p2p import Channel, Ring
from comet_pl.parallel.pipeline import Pipeline
from comet_pl.parallel.schedule import SCHEDULES
from comet_pl.training.optimization import sum_gradients
from comet_pl.training.text_reader import read_windows

ALONE, BOTH = "alone", "at_the_same_time"  # one process; two that know nothing of each other
ARRANGEMENTS = (ALONE, BOTH, *reversed(SCHEDULES))
PINGS = 50
LINKS = {
    "to_next": "memory",
    "from_previous": "memory",
    "gradient_to_previous": "gradient",
    "gradient_from_next": "gradient",
}


@dataclass(frozen=True)
class Job:
    """A text of `chunks` chunks for a model of this shape; both are the same in every process."""

    shape: Shape
    chunks: int
    rounds: int = 1

    def model(self):
        torch.manual_seed(0)
        return CometForCausalLM(self.shape.comet()).train()

    def text(self):
        return text(self.chunks * self.shape.chunk, self.shape.chunk)

    @property
    def message(self):
        """The shape of a layer's memory when it is full."""
        return 1, self.shape.slots, self.shape.hidden


def now():
    """(wall, processor time of this process) in seconds; all processes share the wall clock."""
    return time.perf_counter(), time.process_time()


def machine_busy():
    """Seconds that all processors of the machine have worked so far; nan without /proc."""
    try:
        line = Path("/proc/stat").read_text().split("\n", 1)[0]
    except OSError:
        return float("nan")
    user, nice, system, _, _, *rest = map(int, line.split()[1:])
    return (user + nice + system + sum(rest[:3])) / os.sysconf("SC_CLK_TCK")


class Log:
    """The events since `begin`, which returns those before."""

    events = ()

    def begin(self):
        before, self.events, self.start = self.events, [], now()[1]
        return before

    def timed(self, kind, link, work):
        wall, processor = now()
        work()
        wall_end, processor_end = now()
        own = (processor - self.start, processor_end - self.start)
        self.events.append(Event(kind, link, (wall, wall_end), own))


class LoggedChannel(Channel):
    def __init__(self, channel, link, log):
        super().__init__(channel.group, channel.peer)
        self.link, self.log = link, log

    def send(self, message: Tensor):
        self.log.timed("send", self.link, partial(super().send, message))

    def post(self, *args):
        work, message = super().post(*args)
        wait = partial(self.log.timed, "receive", self.link, work.wait)
        return SimpleNamespace(wait=wait), message

    def flush(self):
        self.log.timed("flush", self.link, super().flush)


def measure(job):
    """An entry for each round and arrangement on one of two ranks: times, events, how far loss and
    gradients lie from those of one process."""
    me, log, ring = dist.get_rank(), Log(), Ring.build([[0, 1]])
    log.begin()
    ring = Ring(**{k: LoggedChannel(getattr(ring, k), link, log) for k, link in LINKS.items()})
    model, (windows, targets) = job.model(), job.text()
    parameters = list(model.parameters())

    def losses(what) -> Iterator[Tensor | None]:
        if what in SCHEDULES:
            return Pipeline(ring, me, 2, what).read(model, windows, targets)
        return read_windows(model, windows, targets)

    def step(what):
        model.zero_grad(set_to_none=True)
        waited, loss, ahead = ring.seconds, torch.zeros(()), 0
        log.begin()
        clock = [now()]
        for part in losses(what):
            clock.append(now())
            ahead = len(log.events)
            if part is not None:
                part.backward()
                loss += part.detach()
        clock.append(now())
        wall, processor = map(list, zip(*clock, strict=True))
        entry = {"wall": wall, "processor": processor, "events": log.begin(), "loss": loss}
        return entry | {"forward_events": ahead, "waited": ring.seconds - waited}

    first = step(BOTH)["loss"]  # a warm-up too
    expected = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
    plan = [(k, what) for k in range(job.rounds) for what in ARRANGEMENTS]
    entries = []
    for k, what in track(plan, description="measuring", transient=True) if me == 0 else plan:
        pings = [ping(job, ring)] if what == ALONE else []
        dist.barrier()
        (_, processor), busy = now(), machine_busy()
        entry = {"round": k, "what": what, "pings": pings}
        if what != ALONE or me == 0:
            entry |= step(what)
        dist.barrier()
        entry |= {"own": now()[1] - processor, "busy": machine_busy() - busy}
        if what in SCHEDULES:
            sum_gradients(parameters, _sum)
            pairs = zip(parameters, expected, strict=True)
            apart = [_apart(p.grad, gradient) for p, gradient in pairs if p.grad is not None]
            entry["loss_differs"] = _apart(_sum(entry["loss"]), first)
            entry["gradients_differ"] = max(apart)
        entries.append(entry)
    return entries


def _sum(tensor: Tensor) -> Tensor:
    dist.all_reduce(tensor)
    return tensor


def _apart(value: Tensor, expected: Tensor):
    """The largest difference, relative to the largest expected entry."""
    largest = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    return float((value - expected).abs().max() / largest)


def ping(job, ring):
    """Seconds of a layer's memory to the other rank: the median half of PINGS round trips."""
    message, seconds, first = torch.zeros(job.message), [], dist.get_rank() == 0
    inbound, outbound = ring.from_previous, ring.gradient_to_previous
    if first:
        inbound, outbound = ring.gradient_from_next, ring.to_next
    for _ in range(PINGS):
        start = time.perf_counter()
        work, _ = inbound.post(message)
        if first:
            outbound.send(message)
        work.wait()
        if not first:
            outbound.send(message)
        seconds.append((time.perf_counter() - start) / 2)
    ring.flush()
    return median(seconds)


def peak_memory(job, recompute):
    """Peak bytes of this rank of a layer_level pipeline, without weights and their gradients."""
    me, ranks = dist.get_rank(), dist.get_world_size()
    ring = Ring.build([list(range(ranks))]) if ranks > 1 else None
    model, (windows, targets) = job.model(), job.text()
    model.gradient_checkpointing = recompute
    known = [*zero_gradients(model), windows[0].input_ids, windows[0].shift_labels]
    with LiveBytes(known) as live:
        for loss in Pipeline(ring, me, ranks).read(model, windows, targets):
            if loss is not None:
                loss.backward()
    return live.peak
