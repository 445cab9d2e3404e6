"""A training step in this process; step.py starts it.

A step is forward and backward pass of one text, every token a target, all gradients, no optimizer.
"""

import gc

import torch
from torch import Tensor

from benchmarks.shared.live_bytes import LiveBytes
from benchmarks.shared.processes import resident
from benchmarks.shared.rates import product_rate, side_by_side, timed
from benchmarks.shared.shapes import TEXT_VOCABULARY, Shape
from comet_pl import CometForCausalLM
from comet_pl.analysis import flops
from comet_pl.model.naive import SlotsInFull
from comet_pl.training import chunk_checkpointing
from comet_pl.training.text_reader import read_windows
from comet_pl.training.windows import IGNORED, count_targets, cut_windows

MIB = 2**20


class Watched(chunk_checkpointing.Boundaries):
    """Remembers how many bytes it held at most."""

    most = 0

    def add(self, *args):
        super().add(*args)
        Watched.most = max(Watched.most, self.nbytes)


def text(length, chunk):
    """A random text as its one window, and the number of its targets."""
    ids = torch.randint(0, TEXT_VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    return cut_windows(batch, chunk, None), count_targets(batch)


def zero_gradients(model) -> list[Tensor]:
    """Makes every gradient zero. Returns the tensors that a step does not make."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [*model.parameters(), *gradients, *model.buffers()]


def gradient_norm(model):
    norms = [p.grad.double().norm() for p in model.parameters() if p.grad is not None]
    return float(torch.stack(norms).norm())


def measure(job):
    """A step by one way to recompute: seconds, memory above weights, gradients and text, loss and
    gradient norm."""
    shape = Shape(**job["shape"])
    model = CometForCausalLM(shape.comet()).train()
    model.gradient_checkpointing = job["recompute"] != "none"
    chunk_checkpointing.Boundaries = Watched
    by_chunk = job["recompute"] == "chunk"
    read = chunk_checkpointing.read_chunks if by_chunk else read_windows
    losses = []

    def step(windows, targets):
        loss = 0.0
        for part in read(model, windows, targets):
            if part is not None:
                part.backward()
                loss += float(part.detach())
        losses.append(loss)

    zero_gradients(model)
    step(*text(shape.chunk, shape.chunk))  # warm-up
    windows, targets = text(job["length"], shape.chunk)
    zero_gradients(model)
    before = resident("VmRSS")
    wall, processor = timed(lambda: step(windows, targets), "cpu")
    process_mib = resident("VmHWM") - before  # LiveBytes takes memory of its own
    norm, known = gradient_norm(model), zero_gradients(model)
    window = windows[0]
    with LiveBytes([*known, window.input_ids, window.attention_mask, window.shift_labels]) as live:
        step(windows, targets)
    plan = windows[0].plans[0]
    return {
        "what": job["recompute"],
        "length": job["length"],
        "wall": wall,
        "processor": processor,
        "process_mib": process_mib,
        "tensors_mib": live.peak / MIB,
        "boundaries_mib": Watched.most / MIB,
        "loss": losses[1],
        "grad_norm": norm,
        "operations": flops.training_step(
            model.config, [plan], targets
        ).total,  # without recomputation
        "product_rate": product_rate("cpu", torch.float32, job["clock"]),
    }


def measure_ratio(job):
    """Seconds of a step of CoMeT and of slots in full in turn, from empty memory."""
    shape = Shape(**job["shape"])
    model = CometForCausalLM(shape.comet()).train()
    windows, targets = text(2 * shape.chunk, shape.chunk)  # warm-up
    norms = {}

    def comet():
        for part in read_windows(model, windows, targets):
            assert part is not None
            part.backward()

    def slots_in_full():
        (window,) = windows
        logits = SlotsInFull(model).read(window.input_ids, list(window.plans[0].sizes))
        loss = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), window.shift_labels, ignore_index=IGNORED, reduction="sum"
        )
        (loss / targets).backward()

    def clean():
        model.zero_grad()
        gc.collect()

    both = {"comet": comet, "slots_in_full": slots_in_full}
    for name, step in both.items():
        clean()
        step()
        norms[name] = gradient_norm(model)
    windows, targets = text(job["length"], shape.chunk)
    times = side_by_side(both, job["pairs"], before=clean)
    differ = abs(norms["comet"] / norms["slots_in_full"] - 1)
    return {"length": job["length"], **times, "grad_norms_differ": differ}
