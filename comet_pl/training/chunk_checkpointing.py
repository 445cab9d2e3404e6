"""train.recompute=chunk: backpropagation that keeps only the memory between chunks.

A chunk depends on earlier chunks by its memory alone. So a window is read without gradients
first, which gives the memory at each chunk's start; then its chunks are read again, the last one
first. If G is the gradient of the memory M' that a chunk leaves behind, the backward pass of its
loss + <M', G> gives the weights' share and the gradient of the memory at its start: the G of the
chunk before.

Legend: B rows, m global slots, E entries of a temporary memory, d width.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from comet_pl.model.cache import CometCache, LayerMemory
from comet_pl.model.chunk_layout import NO_STRIDE, RowClock, compression_tokens
from comet_pl.model.modeling_comet import CometForCausalLM
from comet_pl.model.observer import observing
from comet_pl.training.windows import IGNORED, Window

PAGE = 2**28  # bytes
ALIGNED = 512
RandomStates = tuple[Tensor, tuple[list[int], list[Tensor]]]  # CPU; device numbers and theirs


def read_chunks(
    model: CometForCausalLM, windows: Sequence[Window], num_items: int, offload: bool = False
) -> Iterator[Tensor]:
    """Yields the losses of single chunks, each window's last chunk first.

    Together they have the gradients, and take the random numbers, of read_windows. The caller
    backpropagates a loss before it asks for the next.

    Args:
        num_items: divides the summed loss.
        offload: keep the memory between chunks on the CPU.
    """
    cache = None
    for number, window in enumerate(windows, start=1):
        last = number == len(windows)
        chunks = [window.part(t, t + 1) for t in range(window.chunks)]
        learning = max((t for t, chunk in enumerate(chunks, start=1) if chunk.targets), default=0)
        if last:
            chunks = chunks[:learning]
        # No later chunk needs the memory of a window's last chunk: it is read once, with gradients.
        once = len(chunks) - 1 if learning == len(chunks) else None
        kept = Boundaries(model, chunks[:learning], cache, offload)
        for t, chunk in enumerate(chunks):
            if t < learning:
                kept.add(cache)
            if t == once:
                cache = None
                break
            inputs = chunk.inputs() | {"shift_labels": torch.full_like(chunk.shift_labels, IGNORED)}
            with torch.no_grad():
                cache = model(**inputs, past_key_values=cache, use_cache=True).past_key_values
        gradients: list[Tensor | None] = []  # of the memory that chunk t leaves behind
        for t in reversed(range(learning)):
            past, memory = kept.start_of(t)
            inputs = chunks[t].inputs() | {"past_key_values": past, "num_items_in_batch": num_items}
            if t == once:
                output = model(**inputs, use_cache=not last)
                cache = None if last else output.past_key_values.detach()
            else:
                cpu, (devices, states) = kept.random[t]
                # As the first reading, which the observer has seen.
                with torch.random.fork_rng(devices), observing(model, None):
                    torch.set_rng_state(cpu)
                    set_device_states(devices, states)
                    output = model(**inputs, use_cache=True)
            loss = _join(output.loss, output.past_key_values, gradients)
            # False without targets and without a memory that later chunks learn from.
            if loss.requires_grad:
                yield loss
            gradients = [None if tensor is None else tensor.grad for tensor in memory]


class Boundaries:
    """The memory at the start of each chunk.

    Temporary memories overlap from chunk to chunk; each entry is kept once.

    Args:
        chunks: those that gradients flow through.
        cache: the memory before the first.
        offload: keep all of it on the CPU.
    """

    def __init__(
        self,
        model: CometForCausalLM,
        chunks: Sequence[Window],
        cache: CometCache | None,
        offload: bool,
    ):
        self.model, self.store = model, Store(offload)
        self.random: list[RandomStates] = []
        self.clocks: list[list[RowClock]] = []
        self.states: list[list[Tensor | None]] = []  # of each chunk and layer: (B, m, d)
        # of each layer: (B, E, d), in order, in blocks
        self.entries: list[list[Tensor]] = []
        self.ends: list[list[int]] = []  # of each chunk and row: entries up to its start
        ends = [] if cache is None else [clock.temporary_slots for clock in cache.rows]
        default = model.config.compression_stride or NO_STRIDE
        for chunk in chunks:
            ends = ends or [0] * len(chunk.plans)
            self.ends.append(ends)
            ends = [
                end + compression_tokens(plan.tokens, plan.stride or default)
                for end, plan in zip(ends, chunk.plans, strict=True)
            ]

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        tensors = chain(*self.entries, *self.states)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def add(self, cache: CometCache | None) -> None:
        """Copies the memory at the next chunk's start."""
        t, cache = len(self.clocks), CometCache() if cache is None else cache
        self.random.append((torch.get_rng_state(), get_device_states(self.model.lm_head.weight)))
        self.clocks.append(list(cache.rows))
        self.states.append([])
        started = any(clock.global_slots for clock in cache.rows)
        for i, memory in enumerate(cache.memories):
            state = memory.state if started else None
            if state is not None:
                room = self.store.room(state, state.shape[1])
                state = room.copy_(state.detach(), non_blocking=True)
            self.states[t].append(state)
            if memory.temporary is None or not max(self.ends[-1]):
                continue
            if i == len(self.entries):
                self.entries.append(self.store.blocks(memory.temporary, max(self.ends[-1])))
            for b, clock in enumerate(cache.rows):
                end, slots = self.ends[t][b], clock.temporary_slots
                new = min(slots, end - self.ends[t - 1][b] if t else end)
                given = memory.temporary[b, slots - new : slots]
                for part in cut(self.entries[i], b, end - new, end):
                    part.copy_(given[: len(part)], non_blocking=True)
                    given = given[len(part) :]

    def start_of(self, t: int) -> tuple[CometCache | None, list[Tensor | None]]:
        """The memory at the start of chunk t, as a cache, and its tensors: each layer's state and
        temporary memory. They gather gradients unless t is 0."""
        clocks, device = self.clocks[t], self.model.lm_head.weight.device
        if not clocks:
            return None, []
        past = CometCache.at(clocks, len(self.states[t]), self.model.fingerprint)
        longest = max(clock.temporary_slots for clock in clocks)
        for i, state in enumerate(self.states[t]):
            if state is not None:
                state = state.to(device, non_blocking=True).detach().requires_grad_(t > 0)
            temporary = None
            if longest:
                kept = self.entries[i]
                like = kept[0]
                temporary = like.new_zeros(len(clocks), longest, like.shape[2], device=device)
                for b, (clock, end) in enumerate(zip(clocks, self.ends[t], strict=True)):
                    place = temporary[b]
                    for part in cut(kept, b, end - clock.temporary_slots, end):
                        place[: len(part)].copy_(part, non_blocking=True)
                        place = place[len(part) :]
                temporary.requires_grad_(t > 0)
            past.memories[i] = LayerMemory(state, temporary)
        return past, _tensors(past)


class Store:
    """Room for what is kept: where it was made, or on the CPU.

    There it is page-locked, so that a GPU does not wait for copies, and cut from pages: torch
    rounds each allocation of such memory up to a power of two.
    """

    def __init__(self, offload: bool):
        self.offload = offload
        self.page, self.used = torch.empty(0, dtype=torch.uint8), 0

    def room(self, like: Tensor, entries: int) -> Tensor:
        """Uninitialized (B, entries, d)."""
        shape = len(like), entries, like.shape[2]
        if not self._pages(like):
            device = torch.device("cpu") if self.offload else like.device
            return torch.empty(shape, dtype=like.dtype, device=device)
        size = math.prod(shape) * like.element_size()
        if self.used + size > len(self.page):
            self.page = torch.empty(max(PAGE, size), dtype=torch.uint8, pin_memory=True)
            self.used = 0
        part = self.page[self.used : self.used + size]
        self.used += -(-size // ALIGNED) * ALIGNED
        return part.view(like.dtype).view(shape)

    def blocks(self, like: Tensor, entries: int) -> list[Tensor]:
        """Uninitialized (B, entries, d), cut along the entries so that pages hold the parts."""
        most = entries
        if self._pages(like):
            most = max(1, PAGE // 16 // (len(like) * like.shape[2] * like.element_size()))
        return [self.room(like, min(most, entries - k)) for k in range(0, entries, most)]

    def _pages(self, like: Tensor) -> bool:
        """Whether a tensor leaves a GPU."""
        return self.offload and like.is_cuda


def cut(blocks: Sequence[Tensor], row: int, start: int, end: int) -> Iterator[Tensor]:
    """Entries start to end (not included) of a row, in the parts (n, d) that lie in one block.

    Args:
        blocks: (B, n, d) each, all but the last of the same n.
    """
    size = blocks[0].shape[1]
    while start < end:
        block, first = divmod(start, size)
        n = min(size - first, end - start)
        yield blocks[block][row, first : first + n]
        start += n


def _tensors(cache: CometCache) -> list[Tensor | None]:
    return [tensor for memory in cache.memories for tensor in (memory.state, memory.temporary)]


def _join(loss: Tensor, cache: CometCache | None, gradients: Sequence[Tensor | None]) -> Tensor:
    """The loss; its backward pass gives the memory in the cache these gradients too."""
    if not gradients:
        return loss
    assert cache is not None
    pairs = zip(_tensors(cache), gradients, strict=True)
    wanted = [(m, g) for m, g in pairs if m is not None and g is not None and m.requires_grad]
    return _Join.apply(loss, [g for _, g in wanted], *(m for m, _ in wanted))


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *memory: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, None, *ctx.gradients
