"""One measurement in this process: `python measure.py '{"what": ..., "shape": ..., ...}'` prints one JSON line. prefill.py starts it.

`what` is a reader (comet, slots_in_full, full_attention: ms/token and peak memory of reading `length` tokens) or "ratio" (comet and
slots_in_full alternate chunk by chunk). Memory is full before the clock starts, and one chunk is read to warm up.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # the reference lives there: it is for tests

import torch
from process_memory import resident
from shapes import SHAPES, TEXT_VOCABULARY, Shape
from slots_in_full import SlotsInFull
from torch import Tensor
from transformers import Qwen3ForCausalLM

from comet_pl import CometCache, CometForCausalLM
from comet_pl.model.chunking import RowClock, fixed_chunks

Read = Callable[[Tensor], Tensor]
PIECE = 4  # chunks


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


def readers(shape: Shape, device: str, dtype: torch.dtype) -> dict[str, Read]:
    """Ours and the reference, with the same weights and the same full memory; each call reads chunks of C tokens and goes on from there."""
    model = CometForCausalLM(shape.comet()).to(device, dtype).eval()
    full = RowClock(stride=shape.stride, global_slots=shape.global_size, temporary_slots=shape.capacity)
    cache, reference = noise_cache(model, full), SlotsInFull(model)
    for i, memory in enumerate(cache.memories):
        reference.states[i], reference.temporary[i] = memory.state.clone(), memory.temporary.clone()  # type: ignore[union-attr]

    def comet(ids: Tensor) -> Tensor:
        sizes = fixed_chunks(ids.shape[1], shape.chunk)
        return model(ids, chunk_sizes=sizes, past_key_values=cache, logits_to_keep=1).logits

    def slots_in_full(ids: Tensor) -> Tensor:
        return reference.read(ids, fixed_chunks(ids.shape[1], shape.chunk), logits_to_keep=1)

    return {"comet": comet, "slots_in_full": slots_in_full}


def full_attention(shape: Shape, device: str, dtype: torch.dtype) -> Read:
    """Hugging Face's model of the same layers without memory: one causal flash call over everything, keys and values kept."""
    model = Qwen3ForCausalLM(shape.backbone()).to(device, dtype).eval()
    model.set_attn_implementation("sdpa")
    return lambda ids: model(ids, use_cache=True, logits_to_keep=1).logits


def timed(read: Callable[[], Any], device: str) -> tuple[float, float]:
    """(wall, processor time of this process) in seconds. The second leaves out what other programs took; it adds up over threads."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    wall, processor = time.perf_counter(), time.process_time()
    read()
    synchronize()
    return time.perf_counter() - wall, time.process_time() - processor


def memory_now(device: str) -> float:
    return torch.cuda.memory_allocated() / 2**20 if device == "cuda" else resident("VmRSS")


def memory_peak(device: str) -> float:
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else resident("VmHWM")


def measure_length(what: str, shape: Shape, length: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Time and peak memory of reading `length` tokens: full attention in one call, the others PIECE chunks a call, as from a stream."""
    read = full_attention(shape, device, dtype) if what == "full_attention" else readers(shape, device, dtype)[what]
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
    }


def measure_ratio(shape: Shape, rounds: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Seconds a chunk of both, side by side; the order swaps each round. Ratios are medians over the rounds."""
    both = readers(shape, device, dtype)
    ids = text(shape.chunk, device)
    logits = [read(ids) for read in both.values()]  # warm-up; same weights, memory and text: the same logits
    difference = ((logits[0] - logits[1]).abs().max() / logits[1].abs().max()).item()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in both}
    for k in range(rounds):
        ids = text(shape.chunk, device)
        for name in list(both)[:: -1 if k % 2 else 1]:
            found[name].append(timed(partial(both[name], ids), device))
    pairs = list(zip(found["comet"], found["slots_in_full"], strict=True))
    return {
        "rounds": rounds,
        "logits_differ": difference,
        "wall_ratio": statistics.median(ours[0] / other[0] for ours, other in pairs),
        "processor_ratio": statistics.median(ours[1] / other[1] for ours, other in pairs),
        "seconds": {name: {"wall": [w for w, _ in times], "processor": [p for _, p in times]} for name, times in found.items()},
    }


def text(tokens: int, device: str) -> Tensor:
    return torch.randint(0, TEXT_VOCABULARY, (1, tokens), device=device)


@torch.no_grad()
def main(job: dict[str, Any]) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(job["threads"])
    shape, dtype = SHAPES[job["shape"]], getattr(torch, job["dtype"])
    if job["what"] == "ratio":
        result = measure_ratio(shape, job["rounds"], job["device"], dtype)
    else:
        result = measure_length(job["what"], shape, job["length"], job["device"], dtype)
    print(json.dumps(result))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
