"""Parameter groups, the learning rate's schedule, gradients summed over ranks."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from comet_pl.config.schema import TrainConfig

BUCKET = 1 << 24  # elements of gradients that are summed together


def parameter_groups(
    model: nn.Module, memory: Iterable[tuple[str, nn.Parameter]], train: TrainConfig
) -> list[dict[str, Any]]:
    """AdamW's groups: memory modules at train.memory_lr_factor times the learning rate; no decay on
    norms, biases and whatever else has one dimension.

    Args:
        model: its frozen parameters are in no group.
        memory: (name, parameter) of the memory modules. LoRA and the new tokens' rows learn at the
            backbone's rate.
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
        group = {"name": name, "params": [], "lr": lr, "weight_decay": decay}
        groups.setdefault(name, group)["params"].append(parameter)
    return list(groups.values())


def learning_rate_factor(step: int, warmup_steps: int, max_steps: int, final_lr: float) -> float:
    """Factor of the learning rate at a step, counted from 0: a linear warm-up, then a cosine from 1
    to final_lr at max_steps."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return final_lr + (1 - final_lr) * (1 + math.cos(math.pi * done)) / 2


def sum_gradients(
    parameters: Sequence[nn.Parameter], sum_over_ranks: Callable[[Tensor], Tensor]
) -> None:
    """Sums gradients over ranks in buckets. A gradient that some ranks miss counts as zero there;
    one that all ranks miss stays None, because zeros would move the optimizer's averages.

    Args:
        parameters: on one device, the same on all ranks.
        sum_over_ranks: a tensor -> its sum over all ranks.
    """
    if not parameters:
        return
    has = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    used = [p for p, n in zip(parameters, sum_over_ranks(has).tolist(), strict=True) if n]
    buckets: list[list[nn.Parameter]] = []  # each of one dtype
    size = 0
    for p in used:
        size += p.numel()
        if not buckets or size > BUCKET or p.dtype != buckets[-1][0].dtype:
            buckets.append([])
            size = p.numel()
        buckets[-1].append(p)
    for bucket in buckets:
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = sum_over_ranks(torch.cat([gradient.flatten() for gradient in gradients]))
        for p, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            p.grad = part.view_as(p)
