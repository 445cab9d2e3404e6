"""train/tokens_per_s, train/padding, train/tflops, train/mfu and memory/peak_gb."""

import resource
import sys
import time
from typing import Any

import lightning
import torch

from comet_pl.analysis.flops import training_step
from comet_pl.model.chunk_layout import ChunkPlan
from comet_pl.training.lit_module import CometModule


class Throughput(lightning.Callback):
    """Speed since the last logged step, of all ranks; validations do not count as time.

    train/tokens_per_s: real tokens, without padding.
    train/padding: share of the step's columns that hold no token, on rank 0.
    train/tflops: 10^12 operations a second of the matrix products that the model needs, as
        comet_pl/analysis/flops.py counts a training step: no padding, masked pairs, recomputation,
        teacher of train.distill.
    train/mfu: tflops as a share of train.peak_tflops times the devices, if that is set.
    memory/peak_gb: 10^9 bytes, at most so far: of GPU memory that torch has handed out, or of the
        process.
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
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
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
                "train/padding": 1 - float(batch["attention_mask"].float().mean()),
            }
            if pl_module.settings.peak_tflops is not None:
                values["train/mfu"] = tflops / (pl_module.settings.peak_tflops * trainer.world_size)
            pl_module.record(values)
            self.tokens, self.operations, self.seconds = 0, 0, 0.0


def step_operations(module: CometModule) -> int:
    """Operations of the optimizer step that the module has just made."""
    settings, total = module.settings, 0
    rank = settings.lora_rank if "lora" in settings.parameters else 0
    for windows in module.windows:
        plans = [_whole(parts) for parts in zip(*(w.plans for w in windows), strict=True)]
        targets = sum(window.targets for window in windows)
        total += training_step(module.model.config, plans, targets, lora_rank=rank).total
    return total


def _whole(parts: tuple[ChunkPlan, ...]) -> ChunkPlan:
    """A row's plan from its windows'."""
    sizes = sum((part.sizes for part in parts), ())
    resets = sum((part.resets or () for part in parts), ())
    return ChunkPlan(sizes, resets or None, parts[0].stride)


def peak_bytes(device: torch.device) -> int:
    """Most memory in use so far: GPU memory allocated by torch, or the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts kibibytes
