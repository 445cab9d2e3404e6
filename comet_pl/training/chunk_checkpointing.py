"""train.recompute=chunk: backpropagation through all chunks of a window, keeping nothing of them but the memory in between.

A chunk needs nothing of those before it but their memory. So a window is read ahead without gradients, which leaves the memory at each
chunk's start; then its chunks are read again, the last one first. If G is the gradient of the memory M' that a chunk leaves behind, the
backward pass of its loss + <M', G> gives the weights' share, and the gradient of the memory that it started from: G of the chunk before.

Legend: B rows, m global slots, E entries of a temporary memory, d width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from comet_pl.model.cache import CometCache, LayerMemory
from comet_pl.model.chunk_layout import NO_STRIDE, RowClock, compression_tokens
from comet_pl.model.modeling_comet import CometForCausalLM
from comet_pl.training.windows import IGNORED, Window

RandomStates = tuple[Tensor, tuple[list[int], list[Tensor]]]
"""torch's on the CPU; device numbers and theirs."""


def read_chunks(
    model: CometForCausalLM, windows: Sequence[Window], num_items: int, offload: bool = False
) -> Iterator[Tensor]:
    """Does what comet_pl.training.lit_module.read_windows does, in less memory; yields the losses of single chunks, each window's last one first.

    The caller backpropagates a loss before it asks for the next. Random numbers are those of a single reading.

    Args:
        num_items: divides the summed loss. offload: the memory between chunks waits on the CPU.
    """
    cache = None
    for number, window in enumerate(windows, start=1):
        more = number < len(windows)
        chunks = [window.part(t, t + 1) for t in range(max(map(len, window.chunk_sizes)))]
        learning = max((t for t, chunk in enumerate(chunks, start=1) if chunk.targets), default=0)
        if not more:
            chunks = chunks[:learning]
        once = (
            len(chunks) - 1 if learning == len(chunks) else None
        )  # no chunk waits for its memory: gradients from the start
        kept = Boundaries(model, chunks[:learning], cache, offload)
        for t, chunk in enumerate(chunks):
            if t < learning:
                kept.add(cache)
            cache = None if t == once else _read_ahead(model, chunk, cache)
        gradients: list[Tensor | None] = []  # of the memory that chunk t leaves behind
        for t in reversed(range(learning)):
            past, memory = kept.start_of(t)
            inputs = {
                **chunks[t].inputs(),
                "past_key_values": past,
                "num_items_in_batch": num_items,
            }
            if t == once:
                output = model(**inputs, use_cache=more)
                cache = output.past_key_values.detach() if more else None
            else:
                with _second_time(model, kept.random[t]):
                    output = model(**inputs, use_cache=True)
            loss = _join(output.loss, output.past_key_values, gradients)
            if (
                loss.requires_grad
            ):  # not without targets and without a memory that later chunks learn from
                yield loss
            gradients = [None if tensor is None else tensor.grad for tensor in memory]


class Boundaries:
    """The memory at the start of each chunk. Temporary memories overlap from chunk to chunk, and an entry of them is kept once.

    Args:
        chunks: those that gradients flow through. cache: the memory before the first; None: there is none. offload: keep it all on the CPU.
    """

    def __init__(
        self,
        model: CometForCausalLM,
        chunks: Sequence[Window],
        cache: CometCache | None,
        offload: bool,
    ):
        self.model, self.offload = model, offload
        self.random: list[RandomStates] = []
        self.clocks: list[list[RowClock]] = []
        self.states: list[list[Tensor | None]] = []  # of each chunk and layer: (B, m, d)
        self.entries: list[
            Tensor
        ] = []  # of each layer: (B, E, d), a row's entries one behind the other
        self.ends: list[list[int]] = []  # of each chunk and row: entries up to its start
        for t, chunk in enumerate(chunks):
            if t == 0:
                rows = len(chunk.chunk_sizes)
                strides = chunk.strides or [model.config.compression_stride or NO_STRIDE] * rows
                ends = (
                    [0] * rows if cache is None else [clock.temporary_slots for clock in cache.rows]
                )
            self.ends.append(ends)
            ends = [
                end + compression_tokens(sum(row), s)
                for end, row, s in zip(ends, chunk.chunk_sizes, strides, strict=True)
            ]

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        tensors = [
            *self.entries,
            *(state for states in self.states for state in states if state is not None),
        ]
        return sum(t.numel() * t.element_size() for t in tensors)

    def add(self, cache: CometCache | None) -> None:
        """Copies the memory at the next chunk's start."""
        t = len(self.clocks)
        self.random.append((torch.get_rng_state(), get_device_states(self.model.lm_head.weight)))
        self.clocks.append([] if cache is None else list(cache.rows))
        self.states.append([])
        started = any(clock.global_slots for clock in self.clocks[t])
        for i, memory in enumerate(cache.memories if cache is not None else ()):
            self.states[t].append(
                self._copy(memory.state) if started and memory.state is not None else None
            )
            if memory.temporary is not None and max(self.ends[-1]):
                if i == len(self.entries):
                    self.entries.append(self._room(memory.temporary, max(self.ends[-1])))
                for b, clock in enumerate(self.clocks[t]):
                    end, slots = self.ends[t][b], clock.temporary_slots
                    new = min(slots, end - self.ends[t - 1][b] if t else end)
                    self.entries[i][b, end - new : end].copy_(
                        memory.temporary[b, slots - new : slots], non_blocking=True
                    )

    def start_of(self, t: int) -> tuple[CometCache | None, list[Tensor | None]]:
        """The memory at the start of chunk t, as a cache, and its tensors: each layer's state and temporary memory. Those of all chunks
        but the first gather gradients."""
        clocks, device = self.clocks[t], self.model.lm_head.weight.device
        if not clocks:
            return None, []
        past = CometCache.at(clocks, len(self.states[t]), self.model.fingerprint)
        longest = max(clock.temporary_slots for clock in clocks)
        for i, state in enumerate(self.states[t]):
            state = (
                None
                if state is None
                else state.to(device, non_blocking=True).detach().requires_grad_(t > 0)
            )
            temporary = None
            if longest:
                temporary = self.entries[i].new_zeros(
                    len(clocks), longest, self.entries[i].shape[2], device=device
                )
                for b, (clock, end) in enumerate(zip(clocks, self.ends[t], strict=True)):
                    slots = clock.temporary_slots
                    temporary[b, :slots].copy_(
                        self.entries[i][b, end - slots : end], non_blocking=True
                    )
                temporary.requires_grad_(t > 0)
            past.memories[i] = LayerMemory(state, temporary)
        return past, _tensors(past)

    def _room(self, like: Tensor, entries: int) -> Tensor:
        """For so many entries a row. Page-locked on the CPU: a GPU then does not wait for the copies."""
        device = torch.device("cpu") if self.offload else like.device
        return torch.empty(
            len(like),
            entries,
            like.shape[2],
            dtype=like.dtype,
            device=device,
            pin_memory=self.offload and like.is_cuda,
        )

    def _copy(self, state: Tensor) -> Tensor:
        return self._room(state, state.shape[1]).copy_(state.detach(), non_blocking=True)


def _read_ahead(model: CometForCausalLM, chunk: Window, cache: CometCache | None) -> CometCache:
    """The memory after a chunk; its loss is left to the second time."""
    inputs = chunk.inputs() | {"shift_labels": torch.full_like(chunk.shift_labels, IGNORED)}
    with torch.no_grad():
        return model(**inputs, past_key_values=cache, use_cache=True).past_key_values  # type: ignore[return-value]


@contextmanager
def _second_time(model: CometForCausalLM, random: RandomStates) -> Iterator[None]:
    """The random numbers of the first time, after which nobody sees that there was a second; gate values have been recorded."""
    processor, (devices, states) = random
    recording = model.records_gates
    with torch.random.fork_rng(devices):
        torch.set_rng_state(processor)
        set_device_states(devices, states)
        model.record_gates(False)
        try:
            yield
        finally:
            model.record_gates(recording)


def _tensors(cache: CometCache) -> list[Tensor | None]:
    return [tensor for memory in cache.memories for tensor in (memory.state, memory.temporary)]


def _join(loss: Tensor, cache: CometCache | None, gradients: Sequence[Tensor | None]) -> Tensor:
    """The loss; its backward pass gives the memory in the cache these gradients too."""
    if not gradients:
        return loss
    assert cache is not None
    pairs = [
        (m, g)
        for m, g in zip(_tensors(cache), gradients, strict=True)
        if m is not None and g is not None and m.requires_grad
    ]
    return _Join.apply(loss, [g for _, g in pairs], *(m for m, _ in pairs))  # type: ignore[no-any-return]


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *memory: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return gradient, None, *ctx.gradients
