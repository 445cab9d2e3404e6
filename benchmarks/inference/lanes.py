"""Decoding step by step, CoMeT and full attention in turn.

A lane is a side after a context, a step one greedy token by one call of the model with its head.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from benchmarks.inference.sinks import fill_with_noise
from benchmarks.inference.ways import noise_cache
from benchmarks.shared.processes import mib
from benchmarks.shared.rates import timed
from comet_pl import CometCache, CometForCausalLM
from comet_pl.analysis.flops import plan_sizes
from comet_pl.model.chunk_layout import plan_row

WARM_UP = 3  # steps of each lane before the clock starts
SHARE = 0.8  # of the free memory that the caches may take


class InPlaceLayer(DynamicLayer):
    """Keys and values in buffers with room for more; DynamicLayer copies all at each token."""

    def __init__(self, room):
        super().__init__()
        self.room = room
        self.buffers = []

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        if not self.buffers:
            self.lazy_initialization(key_states, value_states)
            shape = list(key_states.shape)
            shape[2] = end + self.room
            self.buffers = [key_states.new_empty(shape) for _ in range(2)]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values


def empty_cache(decoder, in_place, room):
    cache = DynamicCache(config=decoder.config)
    if in_place:
        cache.layers = [InPlaceLayer(room) for _ in range(decoder.config.num_hidden_layers)]
    return cache


def clock_after(model, length):
    return plan_row(model.config.clock(), length, **plan_sizes(model.config))[1]


def cache_bytes(cache):
    if isinstance(cache, CometCache):
        return cache.nbytes
    return sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))


def token_bytes(decoder):
    cache = DynamicCache(config=decoder.config)
    fill_with_noise(cache, decoder, 1)
    return cache_bytes(cache)


def free_bytes(device):
    """Memory that is free now; infinite if the system does not tell."""
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    return 2**20 * mib("/proc/meminfo", "MemAvailable", float("inf"))


def affordable(wanted, a_token, free):
    """Splits (side, length) into those whose caches fit into SHARE of the free memory together, and
    the others with the reason."""
    kept, skipped, left = [], [], free * SHARE
    for what, length in wanted:
        need = a_token * length
        if need <= left:
            kept.append((what, length))
            left -= need
        else:
            need, room = (f"{size / 2**30:.2f} GiB" for size in (need, left))
            reason = f"its cache takes {need}, {room} of memory are left for it"
            skipped.append({"what": what, "length": length, "reason": reason})
    return kept, skipped


@dataclass
class Lane:
    what: str
    length: int
    model: PreTrainedModel
    cache: Any
    filled: bool  # with noise, not by a prefill
    next_id: Tensor  # (1, 1)
    bytes: int = 0
    steps: list[tuple[str, float, float]] = field(default_factory=list)  # kind, wall, processor

    def kind(self):
        """A text token; a compression token too; or the closing of a chunk and a text token."""
        if not isinstance(self.cache, CometCache):
            return "text"
        clock = self.cache.rows[0]
        if clock.fill == self.model.config.chunk_size:
            return "closing"
        enters = clock.fill and clock.fill % clock.stride == 0 and not clock.trailing
        return "compression" if enters else "text"

    def feed(self, ids: Tensor):
        """Processes ids (1, n) and chooses the next token among the decoder's own rows."""
        options = {"past_key_values": self.cache, "use_cache": True, "logits_to_keep": 1}
        logits = self.model(ids, **options).logits
        self.next_id = logits[:, -1, : text_vocabulary(self.model)].argmax(-1, keepdim=True)

    def step(self):
        self.feed(self.next_id)

    def run(self, steps, device):
        for _ in range(steps):
            self.steps.append((self.kind(), *timed(self.step, device)))


def text_vocabulary(model):
    return getattr(model.config, "first_new_id", model.config.vocab_size)


def open_lane(what, model, length, limit, room):
    """A side after `length` tokens: of random text up to `limit` tokens, else of noise.

    room: tokens that an in-place cache can take after that.
    """
    filled, cache = length > limit, CometCache()
    if not isinstance(model, CometForCausalLM):
        cache = empty_cache(model, what == "in_place", room)
        if filled:
            fill_with_noise(cache, model, length)
    elif filled:
        cache = noise_cache(model, clock_after(model, length), length)
    ids = torch.randint(0, text_vocabulary(model), (1, length), device=model.device)
    lane = Lane(what, length, model, cache, filled, ids[:, :1])
    if not filled:
        lane.feed(ids)
    lane.bytes = cache_bytes(cache)
    return lane


def decode(lanes, tokens, slices, device):
    """Decodes each side's `tokens` in every lane, a slice of each in turn, so that other load meets
    all of them. Yields numbers of decoded tokens."""
    for lane in lanes:
        for _ in range(WARM_UP):
            lane.step()
    for k in range(slices):
        for lane in lanes[:: -1 if k % 2 else 1]:
            n = tokens[lane.what]
            count = n * (k + 1) // slices - n * k // slices
            lane.run(count, device)
            yield count
