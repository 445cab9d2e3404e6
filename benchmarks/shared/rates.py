"""Clocks, and the speed of matrix products in operations a second; a multiply-add is two."""

import statistics
import time

import torch
from torch import Tensor, nn

SIZE = {"cpu": 2048, "cuda": 8192}  # rows and columns of the plain product
ROUNDS = 4
CLOCKS = ("wall", "processor")
LAYERS = (".self_attn.", ".mlp.")  # the linear layers that count: not head, gates, adapters


def clock_of(device, threads):
    """The clock that decides: processor time for one thread, as it leaves out other programs."""
    return "processor" if (device, threads) == ("cpu", 1) else "wall"


def time_key(clock):
    """The key of a result's time a token by this clock."""
    return "ms_per_token" if clock == "wall" else "processor_ms_per_token"


def timed(work, device="cpu"):
    """(wall, processor time of this process, added up over threads) in seconds."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    wall, processor = time.perf_counter(), time.process_time()
    work()
    synchronize()
    return time.perf_counter() - wall, time.process_time() - processor


def turns(names, k):
    """The names in the order of round k: every other round is backwards."""
    return list(names)[:: -1 if k % 2 else 1]


def side_by_side(
    ways,
    rounds,
    device="cpu",
    before=lambda: None,
):
    """Seconds of both ways in each round, and the medians over the rounds of comet / the other.

    before: called before each, off the clock.
    """
    times = {name: [] for name in ways}
    for k in range(rounds):
        for name in turns(ways, k):
            before()
            times[name].append(timed(ways[name], device))
    (other,) = ways.keys() - {"comet"}
    pairs = list(zip(times["comet"], times[other], strict=True))
    result = {"seconds": {name: {} for name in ways}}
    for k, clock in enumerate(CLOCKS):
        result[f"{clock}_ratio"] = statistics.median(ours[k] / full[k] for ours, full in pairs)
        for name, seconds in result["seconds"].items():
            seconds[clock] = [both[k] for both in times[name]]
    return result


def product_rate(device, dtype, clock):
    """The best of ROUNDS large square matrix products, after one to warm up."""
    n = SIZE[device]
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    seconds = [timed(lambda: a @ b, device)[CLOCKS.index(clock)] for _ in range(ROUNDS + 1)]
    return 2 * n**3 / min(seconds[1:])


def linear_layers(model, work, device, clock):
    """{"operations", "seconds", "rate"} of the decoder's linear layers during `work`."""
    operations, marks, hooks = 0, [], []

    def mark(*_):
        if device == "cuda":
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(time.process_time() if clock == "processor" else time.perf_counter())

    def after(module, arguments: tuple[Tensor], out: Tensor):
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
