"""Does it train, how fast, and in how much memory? Optimizer steps through CometModule."""

import time
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader

from benchmarks.gpu.measure import Bench, Measurement
from comet_pl.config.schema import TrainConfig
from comet_pl.training.lit_module import CometModule
from comet_pl.training.trainable import add_adapters, halve_frozen

K = 1024


def plan(bench: Bench) -> list[Measurement]:
    short, long = (256, 512) if bench.tiny else (32 * K, 128 * K)
    return [
        Measurement("step", 14, step, ("0.6B", short, "cell", "all")),
        Measurement("step", 16, step, ("0.6B", short, "chunk", "all")),
        Measurement("step", 24, step, ("4B", short, "cell", "memory")),
        Measurement("step", 36, step, ("4B", short, "chunk", "all")),
        Measurement("step", 30, step, ("0.6B", long, "chunk", "all")),
        Measurement("step", 26, step, ("0.6B", long, "cell", "all")),
        Measurement("step", 50, step, ("4B", long, "cell", "memory", 1)),
        Measurement("step", 60, step, ("4B", long, "chunk", "all", 1)),
    ]


class Clock(lightning.Callback):
    """Seconds of each step, and the time at which the first began."""

    def __init__(self, bench):
        self.bench, self.seconds, self.start = bench, [], 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self.bench.synchronize()
        self.start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.bench.synchronize()
        self.seconds.append(round(time.perf_counter() - self.start, 3))


def step(bench, shape, tokens, recompute, parameters, steps=2):
    """Steps on one text in bf16-mixed, as train.py makes them; the last one counts."""
    bench.models.clear()
    train = TrainConfig(recompute=recompute, parameters=parameters, warmup_steps=0, lr=1e-5)
    model = bench.make(shape, torch.float32, True)
    add_adapters(model, train)
    halve_frozen(model)
    module, clock = CometModule(model.to(bench.device).train(), train, steps), Clock(bench)
    trainer = lightning.Trainer(
        accelerator=bench.device, devices=1, precision="bf16-mixed", max_steps=steps,
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[clock],
    )  # fmt: skip
    ids = bench.ids(tokens).cpu()
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    trainer.fit(module, DataLoader([batch] * steps, batch_size=None))
    loss = float(trainer.callback_metrics["train/loss"])
    out = {"shape": shape, "tokens": tokens, "recompute": recompute, "learns": parameters}
    speed = {"seconds": clock.seconds, "tokens_s": round(tokens / clock.seconds[-1])}
    return out | speed | {"loss": loss, "right": loss == loss}
