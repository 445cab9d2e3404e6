"""The ways to process a text that prefill.py compares, and what a process measures of them.

Memory is full before the clock starts, and a chunk warms up. Rates come last, as they take memory.
"""

import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3ForCausalLM

from benchmarks.inference.sinks import SinkReader
from benchmarks.shared.processes import resident
from benchmarks.shared.rates import CLOCKS, linear_layers, product_rate, side_by_side, timed
from benchmarks.shared.shapes import SHAPES, TEXT_VOCABULARY
from comet_pl import CometCache, CometForCausalLM
from comet_pl.analysis import flops
from comet_pl.model.chunk_layout import fixed_chunks
from comet_pl.model.naive import SlotsInFull
from comet_pl.model.plain_decoder import SINKS

PIECE = 4  # chunks of a call


class Reader(NamedTuple):
    """A way to process a text; a call continues the one before, if the way keeps anything."""

    model: PreTrainedModel
    read: Callable[[Tensor], Tensor]  # (1, N) -> logits (1, 1, V)
    operations: Callable[[int], flops.Operations]  # of so many tokens without the head

    def __call__(self, ids: Tensor) -> Tensor:
        return self.read(ids)


def noise_cache(model, clock, columns=0):
    """The cache of one text up to `clock`, filled with noise, which does not change later costs."""
    cache = CometCache().begin(model.config, 1, model.fingerprint)
    cache.rows, cache.columns = [clock], columns
    cache.reserve(model.config, model.dtype, model.device)
    for memory in cache.memories:
        for buffer in memory:
            if buffer is not None:
                buffer.normal_()
    return cache


def comet(shape, device, dtype, layout="interleaved"):
    """CoMeT with full memory, and its cache."""
    model = CometForCausalLM(shape.comet(layout)).to(device, dtype).eval()
    clock = replace(model.config.clock(), global_slots=shape.global_size)
    cache = noise_cache(model, replace(clock, temporary_slots=shape.capacity))
    keep = {"past_key_values": cache, "logits_to_keep": 1}

    def read(ids: Tensor):
        return model(ids, chunk_sizes=fixed_chunks(ids.shape[1], shape.chunk), **keep).logits

    return Reader(model, read, partial(operations, model.config, shape, "recomputed")), cache


def operations(config, shape, slots, tokens):
    chunks, clock = fixed_chunks(tokens, shape.chunk), flops.start(config, full=True)
    return flops.reading(config, tokens, chunks, clock, logits=0, slots=slots)


def readers(shape, device, dtype):
    """CoMeT and slots in full with the same weights and the same full memory."""
    ours, cache = comet(shape, device, dtype)
    reference = SlotsInFull(ours.model)
    for i, memory in enumerate(cache.memories):
        assert memory.state is not None and memory.temporary is not None
        reference.states[i] = memory.state.clone()
        reference.temporary[i] = memory.temporary.clone()
    in_full = Reader(
        ours.model,
        lambda ids: reference.read(ids, fixed_chunks(ids.shape[1], shape.chunk), logits_to_keep=1),
        partial(operations, ours.model.config, shape, "in_full"),
    )
    return {"comet": ours, "slots_in_full": in_full}


def sliding_window(shape, device, dtype):
    """The same layers over sinks and a window, C tokens a call: as many key columns as CoMeT."""
    model = Qwen3ForCausalLM(shape.backbone()).to(device, dtype).eval()
    reader = SinkReader(model, shape.slots + shape.own - shape.chunk - SINKS, full=True)

    def operations(tokens):
        calls = fixed_chunks(tokens, shape.chunk)
        counts = (flops.full_attention(model.config, n, reader.columns, logits=0) for n in calls)
        return sum(counts, flops.Operations())

    read = lambda ids: [reader(chunk) for chunk in ids.split(shape.chunk, 1)][-1]  # noqa: E731
    return Reader(model, read, operations)


def full_attention(shape, device, dtype):
    """The same layers without memory: one causal flash call, keys and values kept."""
    model = Qwen3ForCausalLM(shape.backbone()).to(device, dtype).eval()
    model.set_attn_implementation("sdpa")
    return Reader(
        model,
        lambda ids: model(ids, use_cache=True, logits_to_keep=1).logits,
        lambda tokens: flops.full_attention(model.config, tokens, logits=0),
    )


def make_reader(what, shape, device, dtype):
    plain = {"sliding_window": sliding_window, "full_attention": full_attention}
    if what in plain:
        return plain[what](shape, device, dtype)
    if what == "trailing":
        return comet(shape, device, dtype, what)[0]
    return readers(shape, device, dtype)[what]


def achieved(reader, tokens, seconds, chunk, job):
    """Operations a second of a prefill, and of its linear layers on one more chunk, as shares of a
    plain matrix product's. seconds: of `tokens`, by the job's clock."""
    device, clock, operations = job["device"], job["clock"], reader.operations(tokens)
    linear = linear_layers(reader.model, partial(reader, text(chunk, device)), device, clock)
    product = product_rate(device, getattr(torch, job["dtype"]), clock)
    rate = operations.total / seconds
    return {
        "product_rate": product,
        "operations": vars(operations) | {"total": operations.total},
        "rate": rate,
        "share": rate / product,
        "linear": linear | {"share": linear["rate"] / product},
    }


@torch.no_grad()
def measure_length(job):
    """Time and peak memory: full attention in one call, the others PIECE chunks a call."""
    shape, length, device = SHAPES[job["shape"]], job["length"], job["device"]
    reader = make_reader(job["what"], shape, device, getattr(torch, job["dtype"]))
    piece = length if job["what"] == "full_attention" else PIECE * shape.chunk

    def read_all():
        for start in range(0, length, piece):
            reader(text(min(piece, length - start), device))

    before = memory(device, "VmRSS")
    reader(text(shape.chunk, device))
    times = timed(read_all, device)
    peak, seconds = memory(device, "VmHWM"), times[CLOCKS.index(job["clock"])]
    return {
        "what": job["what"],
        "length": length,
        "ms_per_token": times[0] / length * 1e3,
        "processor_ms_per_token": times[1] / length * 1e3,
        "peak_mib": peak,
        "reading_mib": peak - before,
        "achieved": achieved(reader, length, seconds, shape.chunk, job),
    }


def memory(device, field):
    """MiB: VmRSS is now, VmHWM the highest so far."""
    if device == "cpu":
        return resident(field)
    now = field == "VmRSS"
    return (torch.cuda.memory_allocated() if now else torch.cuda.max_memory_allocated()) / 2**20


@torch.no_grad()
def measure_ratio(job):
    shape, device = SHAPES[job["shape"]], job["device"]
    both, chunk = readers(shape, device, getattr(torch, job["dtype"])), shape.chunk
    ids = text(chunk, device)
    # The warm-up: the same weights, memory and text have to give the same logits.
    ours, theirs = (reader(ids) for reader in both.values())
    ways = {name: lambda one=one: one(text(chunk, device)) for name, one in both.items()}
    times, rates = side_by_side(ways, job["rounds"], device), {}
    for name, reader in both.items():
        seconds = statistics.median(times["seconds"][name][job["clock"]])
        rates[name] = achieved(reader, chunk, seconds, chunk, job)
    differ = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    return {"rounds": job["rounds"], "logits_differ": differ, **times, "achieved": rates}


def text(tokens, device) -> Tensor:
    return torch.randint(0, TEXT_VOCABULARY, (1, tokens), device=device)
