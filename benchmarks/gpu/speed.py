"""How fast it reads and decodes, beside full attention with the same decoder."""

import time
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, StaticCache

from benchmarks.gpu.law import bare_chunk
from benchmarks.gpu.measure import clock, kernels, median
from benchmarks.gpu.models import full_cache, held_model, text
from comet_pl.model.attention import attend

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


def chunk_attention(place):
    """Milliseconds of attention in a 4B decoder's closing chunk, as the model computes it and as
    two calls of cuDNN's (memory; own tokens) without the sums that would merge them."""
    own, past, heads, key_heads, width = 2816, 2560, 32, 8, 128
    options = {"device": place.device, "dtype": torch.bfloat16, "requires_grad": True}
    q = torch.randn(1, heads, own, width, **options)
    k, v = (torch.randn(1, key_heads, past + own, width, **options) for _ in range(2))
    plain = bare_chunk(place.device, past, own, ragged=False)
    slope = torch.randn_like(q)

    def ours():
        return attend("sdpa", q, k, v, plain, width**-0.5)

    def cudnn():
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            memory = F.scaled_dot_product_attention(
                q, k[:, :, :past], v[:, :, :past], enable_gqa=True
            )
            text = F.scaled_dot_product_attention(
                q, k[:, :, past:], v[:, :, past:], is_causal=True, enable_gqa=True
            )
        return memory + text

    times = {}
    for name, way in (("flash", ours), ("cudnn", cudnn)):
        with torch.no_grad():
            times[name] = clock(place, way)[0]
        step = partial(learned, way, (q, k, v), slope)
        times[f"{name}_with_backward"] = clock(place, step)[0]
    return times


def learned(way, inputs, slope):
    return torch.autograd.grad(way(), inputs, slope)


def closing_chunk(place, comet):
    """A function that reads a chunk after full memory, and its cache."""
    size, cache = comet.config.chunk_size, full_cache(comet)
    ids = text(place, size)
    options = {"chunk_sizes": [size], "past_key_values": cache, "logits_to_keep": 1}
    return lambda: comet(ids, **options), cache


@torch.no_grad()
def prefill(place, model, thousands, full=False, graphs=False):
    """Seconds of a whole text, weights and kernels warm; graphs: CoMeT's chunks as CUDA graphs."""
    decoder, tokens = held_model(place, model, comet=not full), place.tokens(thousands)
    decoder.cuda_graphs = graphs
    read = read_at_once if full else read_in_pieces
    read(decoder, text(place, place.tokens(4)))
    ids = text(place, tokens)
    place.synchronize()
    start = time.perf_counter()
    read(decoder, ids)
    place.synchronize()
    seconds = time.perf_counter() - start
    facts = {"model": model, "attention": "full" if full else "CoMeT", "tokens": tokens}
    return facts | {
        "graphs": graphs,
        "seconds": round(seconds, 4),
        "tokens_s": round(tokens / seconds),
    }


def read_at_once(decoder, ids):
    decoder(ids, use_cache=True, logits_to_keep=1)


def read_in_pieces(comet, ids):
    cache, size = None, comet.config.chunk_size
    for piece in ids.split(PIECE * size, 1):
        options = {"chunk_sizes": [size] * (piece.shape[1] // size), "use_cache": True}
        output = comet(piece, past_key_values=cache, logits_to_keep=1, **options)
        cache = output.past_key_values


@torch.no_grad()
def decode(place, model, tokens, graphs, full_after=None):
    """Milliseconds a token, by CUDA graphs or without: CoMeT in the middle of a chunk with full
    memory, or full attention after so many thousand tokens.

    Full attention has no cuDNN, which on a Hopper card plans a kernel anew for each length.
    """
    decoder = held_model(place, model, comet=full_after is None)
    count, times = 2 * FIRST if place.tiny else tokens, []
    if place.on_gpu:
        torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        if full_after is None:
            decoder.cuda_graphs = graphs
            step = comet_step(place, decoder)
        else:
            step = full_step(place, decoder, place.tokens(full_after), count, graphs)
        for _ in range(count):
            place.synchronize()
            start = time.perf_counter()
            step().argmax().item()
            times.append((time.perf_counter() - start) * 1e3)
    finally:
        if place.on_gpu:
            torch.backends.cuda.enable_cudnn_sdp(True)
    attention = "CoMeT" if full_after is None else "full"
    facts = {"model": model, "attention": attention, "graphs": graphs, "tokens": count}
    first, rest = times[:FIRST], times[FIRST:]
    facts |= {"ms": median(rest), "worst_ms": round(max(rest), 2)}
    return facts | {"first_ms": [round(milliseconds, 1) for milliseconds in first]}


def comet_step(place, comet):
    """A function that reads a token and returns its logits."""
    options = {"past_key_values": full_cache(comet), "use_cache": True, "logits_to_keep": 1}
    comet(text(place, comet.config.chunk_size // 2 + 1), **options)
    one = text(place, 1)
    return lambda: comet(one, **options).logits


def full_step(place, decoder, before, tokens, graphs):
    """The same with full attention after `before` tokens, for so many tokens; graphs: Hugging
    Face's static cache in a CUDA graph of its whole step."""
    graphs = graphs and place.on_gpu
    cache = DynamicCache(config=decoder.config)
    if graphs:
        cache = StaticCache(config=decoder.config, max_cache_len=before + 2 * tokens)
    options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    decoder(text(place, before), **options)
    step = partial(decoder, text(place, 1), **options)
    if not graphs:
        return lambda: step().logits
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step().logits

    def replay():
        graph.replay()
        return logits

    return replay
