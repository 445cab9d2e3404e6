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
from comet_pl.training.windows import IGNORED, Window, cut_windows, split_rows


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
        self.operations += step_operations(pl_module, batch)
        copies = pl_module.data_parallel[1] / max(self.seconds, 1e-9)
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


def step_operations(module: CometModule, batch: dict[str, Any]) -> int:
    """Operations of an optimizer step on a loader batch (see CometModule.training_step)."""
    settings, config = module.settings, module.model.config
    learning = Learning(settings.parameters, settings.lora_rank)
    total = 0
    for micro in split_rows(batch, settings.accumulate):
        for window in cut_windows(
            micro, config.chunk_size, None
        ):  # one; training_step cuts it itself
            total += training_step(
                config, training_rows(window), settings.bptt_chunks, learning
            ).total
    return total


def training_rows(window: Window) -> list[Row]:
    """The rows of a window in numbers."""
    before = torch.nn.functional.pad(
        (window.shift_labels != IGNORED).cumsum(1), (1, 0)
    ).tolist()  # targets before each column
    rows = []
    for b, sizes in enumerate(window.chunk_sizes):
        ends = list(accumulate(sizes, initial=0))
        targets = [before[b][end] - before[b][begin] for begin, end in pairwise(ends)]
        rows.append(
            Row(
                sizes,
                targets,
                window.resets and window.resets[b],
                window.strides and window.strides[b],
            )
        )
    return rows


def peak_bytes(device: torch.device) -> int:
    """Most memory in use so far: GPU memory allocated by torch, or the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts kibibytes
