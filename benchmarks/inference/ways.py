"""One measurement in this process: `python measure.py '{"what": ..., "shape": ..., ...}'` prints one JSON line. prefill.py starts it.

`what` is a reader (comet, slots_in_full, sliding_window, full_attention: ms/token and peak memory of reading `length` tokens) or "ratio"
(comet and slots_in_full alternate chunk by chunk). Memory is full before the clock starts, and one chunk is read to warm up. The rates of a
plain matrix product and of the linear layers on one chunk more are measured last: they would count as memory of the reading.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1] / "tests")
)  # the reference lives there: it is for tests

import torch
from process_memory import resident
from rates import CLOCKS, linear_layers, product_rate, timed
from shapes import SHAPES, TEXT_VOCABULARY, Shape
from sinks import SINKS, SinkReader
from slots_in_full import SlotsInFull
from torch import Tensor
from transformers import PreTrainedModel, Qwen3ForCausalLM

from comet_pl import CometCache, CometForCausalLM
from comet_pl.analysis import flops
from comet_pl.model.chunk_layout import RowClock, fixed_chunks

PIECE = 4  # chunks


class Reader(NamedTuple):
    """A way to read a text; each call goes on from the one before, if it keeps anything."""

    model: PreTrainedModel
    read: Callable[[Tensor], Tensor]  # (1, N) -> logits (1, 1, V)
    operations: Callable[[int], flops.Operations]  # of so many tokens, head left out

    def __call__(self, ids: Tensor) -> Tensor:
        return self.read(ids)


def noise_cache(model: CometForCausalLM, clock: RowClock, columns: int = 0) -> CometCache:
    """A cache of one text that was read up to `clock`, filled with noise: what stands in it does not change what going on costs."""
    cache = CometCache().begin(model.config, 1, model.fingerprint)
    cache.rows, cache.columns = [clock], columns
    cache.reserve(model.config, model.dtype, model.device)
    for memory in cache.memories:
        for buffer in memory:
            if buffer is not None:
                buffer.normal_()
    return cache


def readers(shape: Shape, device: str, dtype: torch.dtype) -> dict[str, Reader]:
    """Ours and the reference, with the same weights and the same full memory; each call reads chunks of C tokens and goes on from there."""
    model = CometForCausalLM(shape.comet()).to(device, dtype).eval()
    full = RowClock(
        stride=shape.stride, global_slots=shape.global_size, temporary_slots=shape.capacity
    )
    cache, reference = noise_cache(model, full), SlotsInFull(model)
    for i, memory in enumerate(cache.memories):
        reference.states[i], reference.temporary[i] = memory.state.clone(), memory.temporary.clone()  # type: ignore[union-attr]

    def comet(ids: Tensor) -> Tensor:
        sizes = fixed_chunks(ids.shape[1], shape.chunk)
        return model(ids, chunk_sizes=sizes, past_key_values=cache, logits_to_keep=1).logits

    def slots_in_full(ids: Tensor) -> Tensor:
        return reference.read(ids, fixed_chunks(ids.shape[1], shape.chunk), logits_to_keep=1)

    def operations(slots: str, tokens: int) -> flops.Operations:
        sizes = fixed_chunks(tokens, shape.chunk)
        return flops.reading(
            model.config, tokens, sizes, flops.start(model.config, full=True), logits=0, slots=slots
        )

    return {
        "comet": Reader(model, comet, partial(operations, "recomputed")),
        "slots_in_full": Reader(model, slots_in_full, partial(operations, "in_full")),
    }


def sliding_window(shape: Shape, device: str, dtype: torch.dtype) -> Reader:
    """The same layers over sinks and a window, C tokens a call: it sees as many key columns as a cell of CoMeT, M + W."""
    model = Qwen3ForCausalLM(shape.backbone()).to(device, dtype).eval()
    reader = SinkReader(model, shape.slots + shape.own - shape.chunk - SINKS, full=True)

    def read(ids: Tensor) -> Tensor:
        return [reader(chunk) for chunk in ids.split(shape.chunk, 1)][-1]

    def operations(tokens: int) -> flops.Operations:
        sizes = fixed_chunks(tokens, shape.chunk)
        return sum(
            (flops.full_attention(model.config, n, reader.columns, logits=0) for n in sizes),
            flops.Operations(),
        )

    return Reader(model, read, operations)


def full_attention(shape: Shape, device: str, dtype: torch.dtype) -> Reader:
    """Hugging Face's model of the same layers without memory: one causal flash call over everything, keys and values kept."""
    model = Qwen3ForCausalLM(shape.backbone()).to(device, dtype).eval()
    model.set_attn_implementation("sdpa")
    return Reader(
        model,
        lambda ids: model(ids, use_cache=True, logits_to_keep=1).logits,
        lambda tokens: flops.full_attention(model.config, tokens, logits=0),
    )


def make_reader(what: str, shape: Shape, device: str, dtype: torch.dtype) -> Reader:
    plain = {"sliding_window": sliding_window, "full_attention": full_attention}
    return (
        plain[what](shape, device, dtype) if what in plain else readers(shape, device, dtype)[what]
    )


def memory_now(device: str) -> float:
    return torch.cuda.memory_allocated() / 2**20 if device == "cuda" else resident("VmRSS")


def memory_peak(device: str) -> float:
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else resident("VmHWM")


def achieved(
    reader: Reader,
    tokens: int,
    seconds: float,
    chunk: int,
    device: str,
    dtype: torch.dtype,
    clock: str,
) -> dict[str, Any]:
    """Operations a second of a reading, and of its linear layers alone on one chunk more, as shares of a plain matrix product's.

    tokens, seconds: what was read, and how long it took by `clock`. Rates are in operations a second, a multiply-add being two.
    """
    operations = reader.operations(tokens)
    linear = linear_layers(reader.model, partial(reader, text(chunk, device)), device, clock)
    product = product_rate(device, dtype, clock)
    return {
        "product_rate": product,
        "operations": vars(operations) | {"total": operations.total},
        "rate": operations.total / seconds,
        "share": operations.total / seconds / product,
        "linear": linear | {"share": linear["rate"] / product},
    }


def measure_length(
    what: str, shape: Shape, length: int, device: str, dtype: torch.dtype, clock: str
) -> dict[str, Any]:
    """Time and peak memory of reading `length` tokens: full attention in one call, the others PIECE chunks a call, as from a stream."""
    read = make_reader(what, shape, device, dtype)
    piece = length if what == "full_attention" else PIECE * shape.chunk

    def read_all() -> None:
        for start in range(0, length, piece):
            read(text(min(piece, length - start), device))

    before = memory_now(device)
    read(text(shape.chunk, device))
    wall, processor = timed(read_all, device)
    peak = memory_peak(device)
    return {
        "what": what,
        "length": length,
        "ms_per_token": wall / length * 1e3,
        "processor_ms_per_token": processor / length * 1e3,
        "peak_mib": peak,
        "reading_mib": peak - before,
        "achieved": achieved(
            read, length, (wall, processor)[CLOCKS.index(clock)], shape.chunk, device, dtype, clock
        ),
    }


def measure_ratio(
    shape: Shape, rounds: int, device: str, dtype: torch.dtype, clock: str
) -> dict[str, Any]:
    """Seconds a chunk of both, side by side; the order swaps each round. Ratios are medians over the rounds."""
    both = readers(shape, device, dtype)
    ids = text(shape.chunk, device)
    logits = [
        read(ids) for read in both.values()
    ]  # warm-up; same weights, memory and text: the same logits
    difference = ((logits[0] - logits[1]).abs().max() / logits[1].abs().max()).item()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in both}
    for k in range(rounds):
        ids = text(shape.chunk, device)
        for name in list(both)[:: -1 if k % 2 else 1]:
            found[name].append(timed(partial(both[name], ids), device))
    pairs = list(zip(found["comet"], found["slots_in_full"], strict=True))
    seconds = {
        name: statistics.median(times[CLOCKS.index(clock)] for times in found[name])
        for name in both
    }
    return {
        "rounds": rounds,
        "logits_differ": difference,
        "wall_ratio": statistics.median(ours[0] / other[0] for ours, other in pairs),
        "processor_ratio": statistics.median(ours[1] / other[1] for ours, other in pairs),
        "seconds": {
            name: {"wall": [w for w, _ in times], "processor": [p for _, p in times]}
            for name, times in found.items()
        },
        "achieved": {
            name: achieved(
                both[name], shape.chunk, seconds[name], shape.chunk, device, dtype, clock
            )
            for name in both
        },
    }


def text(tokens: int, device: str) -> Tensor:
    return torch.randint(0, TEXT_VOCABULARY, (1, tokens), device=device)


@torch.no_grad()
def main(job: dict[str, Any]) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(job["threads"])
    shape, dtype = SHAPES[job["shape"]], getattr(torch, job["dtype"])
    if job["what"] == "ratio":
        result = measure_ratio(shape, job["rounds"], job["device"], dtype, job["clock"])
    else:
        result = measure_length(
            job["what"], shape, job["length"], job["device"], dtype, job["clock"]
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
