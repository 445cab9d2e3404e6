"""Optimizer steps on one text: seconds and peak memory by model, length and way to recompute."""

import time

import torch
from torch.optim import AdamW

from benchmarks.gpu.measure import name_of
from benchmarks.gpu.models import as_batch, new_model, text
from comet_pl.config.schema import TrainConfig
from comet_pl.training.chunk_checkpointing import read_chunks
from comet_pl.training.text_reader import read_windows
from comet_pl.training.trainable import add_adapters, halve_frozen
from comet_pl.training.windows import count_targets, cut_windows


def train_step(
    place,
    model,
    thousands,
    recompute,
    learns="all",
    offload=True,
    steps=2,
):
    """Steps as train.py makes them in trainer.precision=bf16-mixed: what learns in float32, what is
    frozen in bfloat16, autocast without a cache, fused AdamW, boundaries of chunks on the CPU."""
    tokens = place.tokens(thousands)
    comet = new_model(place, model, torch.float32).train()
    add_adapters(comet, TrainConfig(parameters=learns))
    halve_frozen(comet)
    comet.to(place.device).gradient_checkpointing = recompute != "none"
    learning = [p for p in comet.parameters() if p.requires_grad]
    optimizer = AdamW(learning, 1e-5, fused=True)
    batch = as_batch(text(place, tokens))
    windows = cut_windows(batch, comet.config.chunk_size, None)
    targets, seconds, optimizer_seconds, losses = count_targets(batch), [], [], []
    for _ in range(steps):
        place.synchronize()
        start = time.perf_counter()
        with torch.autocast(place.device, torch.bfloat16, cache_enabled=False):
            if recompute == "chunk":
                parts = read_chunks(comet, windows, targets, offload)
            else:
                parts = read_windows(comet, windows, targets)
            losses.append(backward(parts))
            place.synchronize()
            computed = time.perf_counter()
            torch.nn.utils.clip_grad_norm_(learning, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        place.synchronize()
        seconds.append(round(time.perf_counter() - start, 3))
        optimizer_seconds.append(round(time.perf_counter() - computed, 3))
    return {
        "model": model,
        "tokens": tokens,
        "recompute": recompute,
        "learns": learns,
        "weights": name_of(next(comet.parameters()).dtype),
        "offload": offload,
        "seconds": seconds[-1],
        "first_seconds": seconds[0],
        "optimizer_seconds": optimizer_seconds[-1],
        "tokens_s": round(tokens / seconds[-1]),
        "losses": losses,
    }


def backward(parts):
    """Backpropagates each loss before the next is asked for; their sum."""
    total = 0.0
    for loss in parts:
        if loss is not None:
            loss.backward()
            total += float(loss.detach())
    return total
