"""How fast is it? A closing chunk, decoding, and reading against full attention."""

import time

import torch

from benchmarks.gpu.measure import Bench, Measurement
from benchmarks.inference.ways import noise_cache
from comet_pl.model.chunk_layout import RowClock

K = 1024


def plan(bench: Bench) -> list[Measurement]:
    found = []
    for shape, full_to, slow in (("0.6B", 256, 1.0), ("4B", 128, 4.0)):
        lengths = (1 / 16, 1 / 8) if bench.tiny else (4, 64, 256)
        full = (1 / 16, 1 / 8) if bench.tiny else (4, 64, full_to)
        most = 1 / 4 if bench.tiny else 1024
        found += [Measurement(f"{shape} chunk", 5 * slow, chunk, (shape,))]
        for cudnn in (False, True):
            found.append(Measurement(f"{shape} decode", 8, decode, (shape, True, cudnn)))
        for n in lengths:
            seconds = 3 + 0.015 * n * slow
            found.append(Measurement(f"{shape} prefill", seconds, prefill, (shape, True, n)))
        for n in full:
            seconds = 3 + 0.03 * n * slow
            found.append(Measurement(f"{shape} prefill", seconds, prefill, (shape, False, n)))
        for cudnn in (False, True):
            found.append(Measurement(f"{shape} decode", 8, decode, (shape, False, cudnn)))
        found.append(
            Measurement(f"{shape} prefill", 5 + 0.014 * most * slow, prefill, (shape, True, most))
        )
    return found


def full_cache(model):
    """Of one text whose memory is full."""
    c = model.config
    return noise_cache(
        model, RowClock(0, c.compression_stride, c.global_size, c.temporary_capacity)
    )


@torch.no_grad()
def chunk(bench, shape):
    """A closing chunk with full memory, and the kernels that take its time."""
    model = bench.model(shape, torch.bfloat16).eval()
    cache, ids = full_cache(model), bench.ids(bench.chunk)
    layers = len(model.model.layers)

    def read():
        model(ids, chunk_sizes=[bench.chunk], past_key_values=cache, logits_to_keep=1)

    wall, host = bench.clock(read, 7)
    out = {"ms": wall, "host_ms": host, "tokens_s": round(bench.chunk / wall * 1e3)}
    out["cell_ms"] = round(wall / layers, 3)
    out["cache_gb"] = model.config.cache_bytes(1, torch.bfloat16) / 1e9
    if bench.cuda:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            read()
            bench.synchronize()
        events = sorted(seen.key_averages(), key=lambda event: -event.self_device_time_total)
        out["gpu_ms"] = round(sum(event.self_device_time_total for event in events) / 1e3, 2)
        out["launches"] = sum(event.count for event in events)
        out["kernels"] = [
            [event.key[:70], event.count, round(event.self_device_time_total / 1e3, 2)]
            for event in events[:14]
        ]
    return out


@torch.no_grad()
def prefill(bench, shape, comet, thousands):
    """Reads a text of so many thousand tokens."""
    model, n = bench.model(shape, torch.bfloat16, comet).eval(), int(thousands * K)
    size = bench.chunk
    if comet:
        model(bench.ids(2 * size), chunk_sizes=[size, size], use_cache=True, logits_to_keep=1)
    else:
        model(bench.ids(size), use_cache=True, logits_to_keep=1)
    ids, cache = bench.ids(n), None
    bench.synchronize()
    start = time.perf_counter()
    if comet:
        for piece in ids.split(16 * size, 1):
            sizes = [size] * (piece.shape[1] // size)
            options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
            cache = model(piece, chunk_sizes=sizes, **options).past_key_values
    else:
        model(ids, use_cache=True, logits_to_keep=1)
    bench.synchronize()
    seconds = time.perf_counter() - start
    way = "comet" if comet else "full attention"
    return {"way": way, "tokens": n, "seconds": round(seconds, 4), "us_token": seconds / n * 1e6}


@torch.no_grad()
def decode(bench, shape, comet, cudnn):
    """Milliseconds a token; the first apart, where kernels made anew for each length would show."""
    model, size = bench.model(shape, torch.bfloat16, comet).eval(), bench.chunk
    if bench.cuda:
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
    try:
        if comet:
            cache = full_cache(model)
            model(bench.ids(size // 2 + 1), past_key_values=cache, logits_to_keep=1)
        else:
            from transformers import DynamicCache

            cache = DynamicCache(config=model.config)
            model(bench.ids(2 * size), past_key_values=cache, use_cache=True, logits_to_keep=1)
        one, times = bench.ids(1), []
        for _ in range(12 if bench.tiny else 64):
            bench.synchronize()
            start = time.perf_counter()
            out = model(one, past_key_values=cache, use_cache=True, logits_to_keep=1)
            out.logits.argmax().item()
            times.append((time.perf_counter() - start) * 1e3)
    finally:
        if bench.cuda:
            torch.backends.cuda.enable_cudnn_sdp(True)
    rest, way = sorted(times[8:]), "comet" if comet else "full attention"
    ms, first = rest[len(rest) // 2], [round(t, 1) for t in times[:8]]
    return {"way": way, "cudnn": cudnn, "ms": round(ms, 2), "worst_ms": rest[-1], "first_ms": first}
