"""How fast it reads and decodes, beside full attention with the same decoder."""

import time

import torch
from transformers import DynamicCache

from benchmarks.gpu.measure import clock, kernels, median
from benchmarks.gpu.models import full_cache, held_model, text

PIECE = 16  # chunks of a call
FIRST = 8  # decoded tokens that are told apart: there kernels are chosen and built
TOP = 14  # kernels that are named


@torch.no_grad()
def chunk(place, model, dtype="bfloat16", layers=None):
    """A chunk that closes, with full memory: milliseconds, and those of the host."""
    comet = held_model(place, model, getattr(torch, dtype), layers=layers)
    size, cells = comet.config.chunk_size, len(comet.model.layers)
    run, cache = closing_chunk(place, comet)
    wall, host = clock(place, run, times=7)
    facts = {"model": model, "dtype": dtype, "layers": cells, "ms": wall, "host_ms": host}
    facts |= {"ms_per_cell": round(wall / cells, 3), "tokens_s": round(size / wall * 1e3)}
    return facts | {"cache_gb": round(cache.nbytes / 1e9, 3)}


@torch.no_grad()
def chunk_kernels(place, model):
    """Time of the GPU and launches in such a chunk, and its dearest kernels."""
    run, _ = closing_chunk(place, held_model(place, model))
    run()
    found = kernels(run)
    facts = {"model": model, "gpu_ms": round(sum(ms for *_, ms in found), 2)}
    facts["launches"] = sum(count for _, count, _ in found)
    return facts | {"top": [(name[:70], count, round(ms, 2)) for name, count, ms in found[:TOP]]}


def closing_chunk(place, comet):
    """A function that reads a chunk after full memory, and its cache."""
    size, cache = comet.config.chunk_size, full_cache(comet)
    ids = text(place, size)
    options = {"chunk_sizes": [size], "past_key_values": cache, "logits_to_keep": 1}
    return lambda: comet(ids, **options), cache


@torch.no_grad()
def prefill(place, model, thousands, full=False):
    """Seconds of a whole text, weights and kernels warm."""
    decoder, tokens = held_model(place, model, comet=not full), place.tokens(thousands)
    read = read_at_once if full else read_in_pieces
    read(decoder, text(place, place.tokens(4)))
    ids = text(place, tokens)
    place.synchronize()
    start = time.perf_counter()
    read(decoder, ids)
    place.synchronize()
    seconds = time.perf_counter() - start
    facts = {"model": model, "attention": "full" if full else "CoMeT", "tokens": tokens}
    return facts | {"seconds": round(seconds, 4), "tokens_s": round(tokens / seconds)}


def read_at_once(decoder, ids):
    decoder(ids, use_cache=True, logits_to_keep=1)


def read_in_pieces(comet, ids):
    cache, size = None, comet.config.chunk_size
    for piece in ids.split(PIECE * size, 1):
        options = {"chunk_sizes": [size] * (piece.shape[1] // size), "use_cache": True}
        output = comet(piece, past_key_values=cache, logits_to_keep=1, **options)
        cache = output.past_key_values


@torch.no_grad()
def decode(place, model, tokens, cudnn, full_after=None):
    """Milliseconds a token, with cuDNN's attention allowed or not; CoMeT in the middle of a chunk
    with full memory, or full attention after so many thousand tokens."""
    decoder = held_model(place, model, comet=full_after is None)
    if place.on_gpu:
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
    try:
        times = decoding_times(place, decoder, 2 * FIRST if place.tiny else tokens, full_after)
    finally:
        if place.on_gpu:
            torch.backends.cuda.enable_cudnn_sdp(True)
    attention = "CoMeT" if full_after is None else "full"
    facts = {"model": model, "attention": attention, "cudnn": cudnn, "tokens": len(times)}
    first, rest = times[:FIRST], times[FIRST:]
    facts |= {"ms": median(rest), "worst_ms": round(max(rest), 2)}
    return facts | {"first_ms": [round(milliseconds, 1) for milliseconds in first]}


def decoding_times(place, decoder, tokens, full_after):
    if full_after is None:
        cache, before = full_cache(decoder), decoder.config.chunk_size // 2 + 1
    else:
        cache, before = DynamicCache(config=decoder.config), place.tokens(full_after)
    options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    decoder(text(place, before), **options)
    one, times = text(place, 1), []
    for _ in range(tokens):
        place.synchronize()
        start = time.perf_counter()
        decoder(one, **options).logits.argmax().item()
        times.append((time.perf_counter() - start) * 1e3)
    return times
