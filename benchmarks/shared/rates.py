"""How fast matrix products run here: a plain one, and those of a model's linear layers. Rates are in operations a second, a multiply-add
being two."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

SIZE = {"cpu": 2048, "cuda": 8192}  # rows and columns of the plain product
ROUNDS = 4
CLOCKS = ("wall", "processor")  # as `timed` gives them
LAYERS = (".self_attn.", ".mlp.")  # whose linear layers count: neither head nor gates nor adapters


def timed(read: Callable[[], Any], device: str) -> tuple[float, float]:
    """(wall, processor time of this process) in seconds. The second leaves out what other programs took; it adds up over threads."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    wall, processor = time.perf_counter(), time.process_time()
    read()
    synchronize()
    return time.perf_counter() - wall, time.process_time() - processor


def product_rate(device: str, dtype: torch.dtype, clock: str) -> float:
    """Of one large square matrix product, the best of ROUNDS after one that warms up."""
    n = SIZE[device]
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    seconds = [timed(lambda: a @ b, device)[CLOCKS.index(clock)] for _ in range(ROUNDS + 1)]
    return 2 * n**3 / min(seconds[1:])


def linear_layers(
    model: nn.Module, run: Callable[[], Any], device: str, clock: str
) -> dict[str, float]:
    """What the linear layers of the decoder do while `run` runs: {"operations", "seconds", "rate"}."""
    operations, marks = 0, []

    def mark() -> Any:
        if device == "cuda":  # what the GPU takes, without waiting for it
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        return time.process_time() if clock == "processor" else time.perf_counter()

    def before(*_: Any) -> None:
        marks.append(mark())

    def after(module: nn.Linear, arguments: tuple[Tensor], out: Tensor) -> None:
        nonlocal operations
        marks.append(mark())
        operations += 2 * out.numel() * module.in_features

    layers = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(part in name for part in LAYERS)
    ]
    hooks = [layer.register_forward_pre_hook(before) for layer in layers] + [
        layer.register_forward_hook(after) for layer in layers
    ]
    try:
        timed(run, device)
    finally:
        for hook in hooks:
            hook.remove()
    pairs = list(zip(marks[::2], marks[1::2], strict=True))
    seconds = sum(
        start.elapsed_time(end) / 1e3 if device == "cuda" else end - start for start, end in pairs
    )
    return {"operations": operations, "seconds": seconds, "rate": operations / seconds}
