"""Clocks, and the speed of matrix products: a plain one, and those of a decoder's linear layers.

Rates are in operations a second; a multiply-add is two operations.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Result = dict[str, Any]

SIZE = {"cpu": 2048, "cuda": 8192}  # rows and columns of the plain product
ROUNDS = 4
CLOCKS = ("wall", "processor")
LAYERS = (".self_attn.", ".mlp.")  # the linear layers that count: not head, gates, adapters


def clock_of(device: str, threads: int) -> str:
    """The clock that decides: processor time for one thread, which leaves out other programs; wall
    time for several, as waiting for each other is part of their cost."""
    return "processor" if (device, threads) == ("cpu", 1) else "wall"


def time_key(clock: str) -> str:
    """The key of a result's time a token by this clock."""
    return "ms_per_token" if clock == "wall" else "processor_ms_per_token"


def timed(work: Callable[[], Any], device: str = "cpu") -> tuple[float, float]:
    """(wall, processor time of this process, added up over threads) in seconds."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    wall, processor = time.perf_counter(), time.process_time()
    work()
    synchronize()
    return time.perf_counter() - wall, time.process_time() - processor


def turns(names: Iterable[str], k: int) -> list[str]:
    """The names in the order of round k: every other round is backwards."""
    return list(names)[:: -1 if k % 2 else 1]


def side_by_side(
    ways: Mapping[str, Callable[[], Any]],
    rounds: int,
    device: str = "cpu",
    before: Callable[[], Any] = lambda: None,
) -> Result:
    """Seconds of both ways in each round, and the medians over the rounds of comet / the other.

    before: called before each, off the clock.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for k in range(rounds):
        for name in turns(ways, k):
            before()
            times[name].append(timed(ways[name], device))
    (other,) = ways.keys() - {"comet"}
    pairs = list(zip(times["comet"], times[other], strict=True))
    result: dict[str, Any] = {"seconds": {name: {} for name in ways}}
    for k, clock in enumerate(CLOCKS):
        result[f"{clock}_ratio"] = statistics.median(ours[k] / full[k] for ours, full in pairs)
        for name, seconds in result["seconds"].items():
            seconds[clock] = [both[k] for both in times[name]]
    return result


def product_rate(device: str, dtype: torch.dtype, clock: str) -> float:
    """The best of ROUNDS large square matrix products, after one to warm up."""
    n = SIZE[device]
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    seconds = [timed(lambda: a @ b, device)[CLOCKS.index(clock)] for _ in range(ROUNDS + 1)]
    return 2 * n**3 / min(seconds[1:])


def linear_layers(
    model: nn.Module, work: Callable[[], Any], device: str, clock: str
) -> dict[str, float]:
    """{"operations", "seconds", "rate"} of the decoder's linear layers during `work`."""
    operations, marks, hooks = 0, [], []

    def mark(*_: Any) -> None:
        if device == "cuda":
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(time.process_time() if clock == "processor" else time.perf_counter())

    def after(module: nn.Linear, arguments: tuple[Tensor], out: Tensor) -> None:
        nonlocal operations
        mark()
        operations += 2 * out.numel() * module.in_features

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and any(part in name for part in LAYERS):
            hooks += [module.register_forward_pre_hook(mark), module.register_forward_hook(after)]
    try:
        timed(work, device)
    finally:
        for hook in hooks:
            hook.remove()
    pairs = zip(marks[::2], marks[1::2], strict=True)
    seconds = sum(a.elapsed_time(b) / 1e3 if device == "cuda" else b - a for a, b in pairs)
    return {"operations": operations, "seconds": seconds, "rate": operations / seconds}
