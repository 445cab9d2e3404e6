"""train/tokens_per_s and memory/peak_gb."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import lightning
import torch

from comet_pl.lit_module import CometModule


class Throughput(lightning.Callback):
    """Real tokens (no padding) read a second since the last logged step, of all ranks; validations do not count as time.

    memory/peak_gb: 10^9 bytes, at most so far: of GPU memory that torch has handed out, or else of the process.
    """

    def __init__(self) -> None:
        self.tokens, self.seconds, self.since = 0, 0.0, 0.0

    def on_train_start(self, *_: Any) -> None:
        self.since = time.monotonic()

    def on_validation_start(self, *_: Any) -> None:
        self.seconds += time.monotonic() - self.since

    def on_validation_end(self, *_: Any) -> None:
        self.since = time.monotonic()

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: CometModule, outputs: Any, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        now = time.monotonic()
        self.seconds, self.since = self.seconds + now - self.since, now
        self.tokens += int(batch["attention_mask"].sum())
        rate = self.tokens * pl_module.data_parallel[1] / max(self.seconds, 1e-9)
        pl_module.log("train/tokens_per_s", rate, prog_bar=True, logger=False, batch_size=1)
        if pl_module.logs_at(trainer.global_step):
            pl_module.record({"train/tokens_per_s": rate, "memory/peak_gb": peak_bytes(pl_module.device) / 1e9})
            self.tokens, self.seconds = 0, 0.0


def peak_bytes(device: torch.device) -> int:
    """Most memory in use so far: GPU memory allocated by torch, or the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts kibibytes
