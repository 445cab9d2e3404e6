"""Decoding step by step, ours and full attention in turn: models, caches of any length, lanes. decode.py is the program.

A lane is one side after one context; a step is one greedy token by one call of the model, head included, on every side the same way.
Lengths are in tokens, times in seconds.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from measure import noise_cache, timed
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.utils import logging

from comet_pl import CometCache, CometForCausalLM
from comet_pl.errors import UserError
from comet_pl.model.chunk_layout import NO_STRIDE, RowClock, plan_row

ROOT = Path(__file__).resolve().parents[1]
USUAL_MODEL = ROOT / "models" / "smollm2_135m"
KINDS = (
    "text",
    "compression",
    "closing",
)  # what a step processes: 1 token; 2; the end of a chunk, the memory update and 1 token
WARM_UP = 3  # steps of each lane before the clock starts
SHARE = 0.8  # of the free memory that the caches may take
TINY = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
BACKBONES: dict[str, dict[str, Any]] = {  # the shapes of conf/backbone
    "smollm2_135m": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "qwen3_0_6b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "qwen3_4b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}


# ---- models


def random_decoder(shape: dict[str, Any]) -> PreTrainedModel:
    """A decoder of this shape with random weights: what decoding costs does not depend on them."""
    config = AutoConfig.for_model(
        **shape, tie_word_embeddings=True, max_position_embeddings=1 << 18
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def load_decoder(path: Path | str) -> PreTrainedModel:
    """A plain decoder from a folder or the hub, float32, with sdpa.

    Raises:
        UserError: --model names nothing that can be loaded, or a model with memory.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        decoder = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="sdpa"
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"--model: {path} cannot be loaded: {(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from None
    if isinstance(decoder, CometForCausalLM):
        raise UserError(
            f"--model: {path} is a CoMeT folder; a plain decoder is needed, memory is plugged in here"
        )
    return decoder.eval()


def plug_in(decoder: PreTrainedModel, comet: dict[str, Any]) -> CometForCausalLM:
    """Fresh memory on a copy of the decoder, which shares the decoder's weights but for embedding and head: they get rows.

    Raises:
        UserError: a decoder that is not supported, impossible sizes.
    """
    logging.set_verbosity_error()  # resizing the embedding warns of what is wanted
    own = {
        id(part.weight)
        for part in (decoder.get_input_embeddings(), decoder.get_output_embeddings())
    }
    shared = {id(weight): weight for weight in decoder.parameters() if id(weight) not in own}
    try:
        return CometForCausalLM.from_decoder(copy.deepcopy(decoder, shared), comet).eval()
    except ValueError as error:
        raise UserError(str(error)) from None


# ---- caches


class InPlaceLayer(DynamicLayer):
    """Keys and values in buffers with room for `room` more tokens; DynamicLayer copies all of them at every token."""

    def __init__(self, room: int):
        super().__init__()
        self.room = room
        self.buffers: list[Tensor] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        if not self.buffers:
            self.lazy_initialization(key_states, value_states)
            rows, heads, _, width = key_states.shape
            self.buffers = [
                key_states.new_empty(rows, heads, end + self.room, width) for _ in range(2)
            ]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values


def empty_cache(decoder: PreTrainedModel, in_place: bool, room: int) -> DynamicCache:
    """Full attention's cache before the first token."""
    cache = DynamicCache(config=decoder.config)
    if in_place:
        cache.layers = [InPlaceLayer(room) for _ in range(decoder.config.num_hidden_layers)]
    return cache


def filled_attention_cache(
    decoder: PreTrainedModel, length: int, in_place: bool, room: int
) -> DynamicCache:
    """As after `length` tokens, noise in it: what stands in a cache does not change what a step costs."""
    cache, config = empty_cache(decoder, in_place, room), decoder.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (1, config.num_key_value_heads, length, head)
    for i in range(config.num_hidden_layers):
        cache.update(
            *(torch.randn(shape, dtype=decoder.dtype, device=decoder.device) for _ in range(2)), i
        )
    return cache


def clock_after(model: CometForCausalLM, length: int) -> RowClock:
    """The clock that reading `length` tokens in one go would leave."""
    config = model.config
    sizes = {
        "chunk_size": config.chunk_size,
        "global_size": config.global_size,
        "capacity": config.temporary_capacity,
    }
    return plan_row(RowClock(stride=config.compression_stride or NO_STRIDE), length, **sizes)[1]


def cache_bytes(cache: Cache) -> int:
    """Bytes of what a cache holds; room for later tokens does not count."""
    if isinstance(cache, CometCache):
        return cache.nbytes
    return sum(
        t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values)
    )


def token_bytes(decoder: PreTrainedModel) -> int:
    """Bytes of full attention's cache a token."""
    return cache_bytes(filled_attention_cache(decoder, 1, in_place=False, room=0))


def free_bytes(device: str) -> float:
    """Memory that can be taken now; infinite where the system does not tell."""
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return float(next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))) * 1024


def affordable(
    wanted: Sequence[tuple[str, int]], a_token: int, free: float
) -> tuple[list[tuple[str, int]], list[dict[str, Any]]]:
    """Splits (side, length) of full attention into those whose caches fit into the free memory together, first come first served, and the
    others with the reason."""
    kept, skipped, left = [], [], free * SHARE
    for what, length in wanted:
        need = a_token * length
        if need <= left:
            kept.append((what, length))
            left -= need
        else:
            reason = f"its cache takes {need / 2**30:.2f} GiB, {left / 2**30:.2f} GiB of memory are left for it"
            skipped.append({"what": what, "length": length, "reason": reason})
    return kept, skipped


# ---- lanes


@dataclass
class Lane:
    what: str
    length: int
    model: PreTrainedModel
    cache: Any
    filled: bool  # with noise, not by reading
    next_id: Tensor  # (1, 1)
    bytes: int = 0
    steps: list[tuple[str, float, float]] = field(default_factory=list)  # kind, wall, processor

    def kind(self) -> str:
        """Of the step to come."""
        if not isinstance(self.cache, CometCache):
            return "text"
        clock = self.cache.rows[0]
        if clock.fill == self.model.config.chunk_size:
            return "closing"
        return "compression" if clock.fill and clock.fill % clock.stride == 0 else "text"

    def feed(self, ids: Tensor) -> None:
        """Reads ids (1, n) and chooses the next token; the new rows are no answer."""
        logits = self.model(
            ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        ).logits
        self.next_id = logits[:, -1, : text_vocabulary(self.model)].argmax(-1, keepdim=True)

    def step(self) -> None:
        self.feed(self.next_id)

    def run(self, steps: int, device: str) -> None:
        for _ in range(steps):
            kind = self.kind()
            self.steps.append((kind, *timed(self.step, device)))


def text_vocabulary(model: PreTrainedModel) -> int:
    return (
        model.config.first_new_id
        if isinstance(model, CometForCausalLM)
        else model.config.vocab_size
    )


def open_lane(what: str, model: PreTrainedModel, length: int, read: int, room: int) -> Lane:
    """A side after `length` tokens: random text that is read, if it is no more than `read`, else a cache filled with noise.

    room: tokens that an in-place cache can take after that.
    """
    filled = length > read
    if isinstance(model, CometForCausalLM):
        cache: Cache = (
            noise_cache(model, clock_after(model, length), length) if filled else CometCache()
        )
    elif filled:
        cache = filled_attention_cache(model, length, what == "in_place", room)
    else:
        cache = empty_cache(model, what == "in_place", room)
    ids = torch.randint(0, text_vocabulary(model), (1, length), device=model.device)
    lane = Lane(what, length, model, cache, filled, ids[:, :1])
    if not filled:
        lane.feed(ids)
    lane.bytes = cache_bytes(cache)
    return lane


def measure(
    lanes: Sequence[Lane], tokens: dict[str, int], slices: int, device: str
) -> Iterator[int]:
    """Runs every lane for its side's `tokens`, a slice of each in turn and in alternating order, so that what else happens on the machine
    meets all of them. Yields the number of tokens just done."""
    for lane in lanes:
        for _ in range(WARM_UP):
            lane.step()
    for k in range(slices):
        for lane in lanes[:: -1 if k % 2 else 1]:
            n = tokens[lane.what]
            count = n * (k + 1) // slices - n * k // slices
            lane.run(count, device)
            yield count
