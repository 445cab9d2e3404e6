"""A training step in this process: `python measure_training.py '{"recompute": ..., "length": ..., ...}'` prints one JSON line. training.py
starts it.

A step is forward and backward pass of one text, every token a target, all gradients, no optimizer. With recompute "ratio", ours
(recompute=none) and slots in full (comet_pl/model/naive.py) take the same step in turn.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from live_bytes import LiveBytes
from measure import timed
from process_memory import resident
from rates import product_rate
from shapes import TEXT_VOCABULARY, Shape
from slots_in_full import SlotsInFull

from comet_pl import CometForCausalLM
from comet_pl.analysis import flops
from comet_pl.model.chunk_layout import ChunkPlan, fixed_chunks
from comet_pl.training import chunk_checkpointing as recompute
from comet_pl.training.text_reader import read_windows
from comet_pl.training.windows import IGNORED, Window, count_targets, cut_windows

MIB = 2**20


class Watched(recompute.Boundaries):
    """Remembers how many bytes it held at most."""

    most = 0

    def add(self, *args: Any) -> None:
        super().add(*args)
        Watched.most = max(Watched.most, self.nbytes)


def text(length: int, chunk: int) -> tuple[list[Window], int]:
    """(its one window, the number of targets)"""
    ids = torch.randint(0, TEXT_VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    return cut_windows(batch, chunk, None), count_targets(batch)


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """One way to recompute at one length: seconds of each step, memory above weights, gradients and text, loss and gradient norm."""
    torch.manual_seed(0)
    torch.set_num_threads(job["threads"])
    shape = Shape(**job["shape"])
    model = CometForCausalLM(shape.comet()).train()
    model.gradient_checkpointing = job["recompute"] != "none"
    recompute.Boundaries = Watched  # type: ignore[misc]
    parameters = list(model.parameters())

    def step(windows: list[Window], targets: int) -> float:
        for parameter in parameters:
            parameter.grad = (
                torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.zero_()
            )
        read = recompute.read_chunks if job["recompute"] == "chunk" else read_windows
        loss = 0.0
        for part in read(model, windows, targets):
            if part is not None:
                part.backward()
                loss += float(part.detach())
        return loss

    step(*text(shape.chunk, shape.chunk))  # warm-up
    windows, targets = text(job["length"], shape.chunk)
    model_mib = resident("VmRSS")
    losses: list[float] = []
    wall, processor = timed(lambda: losses.append(step(windows, targets)), "cpu")
    process_mib = (
        resident("VmHWM") - model_mib
    )  # before the count of tensors, which keeps books of its own
    norm = torch.linalg.vector_norm(
        torch.stack(
            [torch.linalg.vector_norm(p.grad.double()) for p in parameters if p.grad is not None]
        )
    )
    known = [tensor for p in parameters for tensor in (p, p.grad) if tensor is not None]
    with LiveBytes(
        [
            *known,
            *model.buffers(),
            windows[0].input_ids,
            windows[0].attention_mask,
            windows[0].shift_labels,
        ]
    ) as live:
        step(windows, targets)
    return {
        "what": job["recompute"],
        "length": job["length"],
        "wall": wall,
        "processor": processor,
        "process_mib": process_mib,
        "tensors_mib": live.peak / MIB,
        "boundaries_mib": Watched.most / MIB,
        "loss": losses[-1],
        "grad_norm": float(norm),
        "operations": flops.training_step(
            model.config,
            [ChunkPlan(tuple(fixed_chunks(job["length"], model.config.chunk_size)))],
            job["length"] - 1,
        ).total,  # nothing counts twice
        "product_rate": product_rate("cpu", torch.float32, job["clock"]),
    }


def measure_ratio(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a step by each way, from empty memory; the order swaps each round. The same weights and text give the same gradients."""
    torch.manual_seed(0)
    torch.set_num_threads(job["threads"])
    shape = Shape(**job["shape"])
    model = CometForCausalLM(shape.comet()).train()

    def comet(windows: list[Window], targets: int) -> None:
        for part in read_windows(model, windows, targets):
            assert part is not None
            part.backward()

    def slots_in_full(windows: list[Window], targets: int) -> None:
        (window,) = windows
        logits = SlotsInFull(model).read(window.input_ids, list(window.plans[0].sizes))
        loss = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), window.shift_labels, ignore_index=IGNORED, reduction="sum"
        )
        (loss / targets).backward()

    both: dict[str, Callable[..., None]] = {"comet": comet, "slots_in_full": slots_in_full}
    warm, step = text(2 * shape.chunk, shape.chunk), text(job["length"], shape.chunk)
    norms, found = {}, {name: list[tuple[float, float]]() for name in both}
    for k in range(-1, job["pairs"]):  # the first round warms up, and shows that both do the same
        for name in list(both)[:: -1 if k % 2 else 1]:
            model.zero_grad()
            seconds = timed(
                lambda one=both[name], given=step if k >= 0 else warm: one(*given), "cpu"
            )
            if k >= 0:
                found[name].append(seconds)
            norms[name] = float(
                torch.linalg.vector_norm(
                    torch.stack(
                        [p.grad.double().norm() for p in model.parameters() if p.grad is not None]
                    )
                )
            )
            gc.collect()
    pairs = list(zip(found["comet"], found["slots_in_full"], strict=True))
    return {
        "length": job["length"],
        "wall_ratio": statistics.median(ours[0] / other[0] for ours, other in pairs),
        "processor_ratio": statistics.median(ours[1] / other[1] for ours, other in pairs),
        "seconds": {
            name: {"wall": [w for w, _ in times], "processor": [p for _, p in times]}
            for name, times in found.items()
        },
        "grad_norms_differ": abs(norms["comet"] / norms["slots_in_full"] - 1),
    }


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps(measure_ratio(given) if given["recompute"] == "ratio" else measure(given)))
