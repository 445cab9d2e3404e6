"""Parameter groups and the learning rate's course."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import nn

from comet_pl.schema import TrainConfig


def parameter_groups(model: nn.Module, memory: Iterable[tuple[str, nn.Parameter]], train: TrainConfig) -> list[dict[str, Any]]:
    """AdamW's groups: the memory modules at a multiple of the learning rate; no decay on norms, biases and whatever else has one dimension.

    Args:
        memory: (name, parameter) of the memory modules. The new tokens' rows are part of the embedding and learn at the backbone's rate.
    """
    ids = {id(parameter) for _, parameter in memory}
    groups: dict[str, dict[str, Any]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        part, decayed = "memory" if id(parameter) in ids else "backbone", parameter.ndim > 1
        name = f"{part}, decayed" if decayed else part
        lr = train.lr * (train.memory_lr_factor if part == "memory" else 1.0)
        decay = train.weight_decay if decayed else 0.0
        groups.setdefault(name, {"name": name, "params": [], "lr": lr, "weight_decay": decay})["params"].append(parameter)
    return list(groups.values())


def learning_rate_factor(step: int, warmup_steps: int, max_steps: int, final_lr: float) -> float:
    """Factor of the learning rate at a step, counted from 0: linear warm-up, then a cosine from 1 to final_lr at max_steps."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return final_lr + (1 - final_lr) * (1 + math.cos(math.pi * done)) / 2
