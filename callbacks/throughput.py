"""train/tokens_per_s, train/padding, train/tflops, train/mfu and memory/peak_gb."""

from __future__ import annotations

import resource
import sys
import time
from itertools import accumulate, pairwise
from typing import Any

import lightning
import torch

from comet_pl.analysis.flops import Learning, Row, training_step
from comet_pl.training.lit_module import CometModule
from comet_pl.training.windows import IGNORED, Window


class Throughput(lightning.Callback):
    """Real tokens (no padding) read a second since the last logged step, of all ranks; validations do not count as time.

    train/padding: share of the step's columns that hold no token, on the first rank.

    train/tflops: 10^12 operations a second of all ranks together, those of the matrix products that the model needs (comet_pl/analysis/flops.py):
    nothing is counted for padding, masked pairs or recomputation. train/mfu: its share of what the devices could do, if train.peak_tflops
    says how much that is.

    memory/peak_gb: 10^9 bytes, at most so far: of GPU memory that torch has handed out, or else of the process.
    """

    def __init__(self) -> None:
        self.tokens, self.operations, self.seconds, self.since = 0, 0, 0.0, 0.0

    def on_train_start(self, *_: Any) -> None:
        self.since = time.monotonic()

    def on_validation_start(self, *_: Any) -> None:
        self.seconds += time.monotonic() - self.since

    def on_validation_end(self, *_: Any) -> None:
        self.since = time.monotonic()

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: CometModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:  # type: ignore[override]
        now = time.monotonic()
        self.seconds, self.since = self.seconds + now - self.since, now
        self.tokens += int(batch["attention_mask"].sum())
        self.operations += step_operations(pl_module)
        copies = pl_module.reader.shard[1] / max(self.seconds, 1e-9)
        rate, tflops = self.tokens * copies, self.operations * copies / 1e12
        pl_module.log("train/tokens_per_s", rate, prog_bar=True, logger=False, batch_size=1)
        if pl_module.logs_at(trainer.global_step):
            values = {
                "train/tokens_per_s": rate,
                "train/tflops": tflops,
                "memory/peak_gb": peak_bytes(pl_module.device) / 1e9,
            }
            values["train/padding"] = 1 - float(batch["attention_mask"].float().mean())
            if pl_module.settings.peak_tflops is not None:
                values["train/mfu"] = tflops / (pl_module.settings.peak_tflops * trainer.world_size)
            pl_module.record(values)
            self.tokens, self.operations, self.seconds = 0, 0, 0.0


def step_operations(module: CometModule) -> int:
    """Operations of the optimizer step that the module has just made."""
    settings, config = module.settings, module.model.config
    learning = Learning(settings.parameters, settings.lora_rank)
    return sum(
        training_step(config, training_rows(windows), settings.bptt_chunks, learning).total
        for windows in module.windows
    )


def training_rows(windows: list[Window]) -> list[Row]:
    """The rows of a micro-batch in numbers."""
    labelled = [(window.shift_labels != IGNORED).tolist() for window in windows]
    rows = []
    for b in range(len(windows[0].plans) if windows else 0):
        sizes: list[int] = []
        targets: list[int] = []
        resets: list[bool] = []
        for window, marks in zip(windows, labelled, strict=True):
            plan = window.plans[b]
            ends = accumulate(plan.sizes, initial=0)
            targets += [sum(marks[b][begin:end]) for begin, end in pairwise(ends)]
            sizes += plan.sizes
            resets += plan.resets or [False] * len(plan.sizes)
        rows.append(Row(sizes, targets, resets, windows[0].plans[b].stride))
    return rows


def peak_bytes(device: torch.device) -> int:
    """Most memory in use so far: GPU memory allocated by torch, or the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts kibibytes
