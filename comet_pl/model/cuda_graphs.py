"""CUDA graphs: chunks that repeat start with one launch instead of one a kernel.

Two kinds of chunks repeat in calls without gradients: one more token of every row (with the
compression token before it, or without), and any chunk that finds the same memory, such as full
ones in a long text. A kind is read as usual the first time and recorded the second. A recording
holds addresses: of the weights, and of one cache's buffers.

Legend: B rows, N columns of input_ids, W own tokens of a chunk, d width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import is_not
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from comet_pl.model.cache import CometCache, LayerMemory
from comet_pl.model.cell import BY_LENGTH
from comet_pl.model.chunk_batch import Chunk, StepChunk, Tokens
from comet_pl.model.chunk_builder import CallFacts, all_alike, build_chunk
from comet_pl.model.chunk_layout import TEXT, RowClock, Segment, own_layout
from comet_pl.model.forward_plan import ForwardPlan
from comet_pl.model.transfer import to_device
from comet_pl.model.traversal import LocalTransport

DEVICES = ["cuda"]
MOST = 16  # recordings of a cache; each kind of chunk makes one


class Kind(NamedTuple):
    """What a recording is for. clock: as the chunk starts; None: a step, wherever it is."""

    rows: int
    tokens: int  # text tokens that enter
    width: int  # W
    closes: bool = False
    clock: RowClock | None = None


@dataclass
class Recording:
    """A kind of chunk, ready to run."""

    run: Callable[[], Any]
    body: Callable[[], Tensor]  # was recorded; what it reads has to live as long as its addresses
    ids: Tensor  # (B, text tokens) goes in
    numbers: Tensor | None  # of a step: its first key column, and pending outputs held before
    hidden: Tensor  # (B, W, d) comes out
    text: np.ndarray  # where the text tokens stand in W


class Watch:
    """Whether a model still is what its recordings hold: its modules, their weights' places, no
    hooks, the adapters' state."""

    def __init__(self, model: Any):
        self.model, self.seen = model, registrations[0]
        self.modules = list(model.modules())
        self.weights = list(model.parameters())
        self.addresses = [weight.data_ptr() for weight in self.weights]
        self.adapters = [m for m in self.modules if hasattr(m, "merged_adapters")]
        self.state = self._adapter_state()

    def holds(self, model: Any) -> bool:
        if self.seen != registrations[0]:
            # Some module somewhere has got something new.
            now = list(model.modules()), list(model.parameters())
            for before, found in zip((self.modules, self.weights), now, strict=True):
                if len(before) != len(found) or any(map(is_not, before, found)):
                    return False
            self.seen = registrations[0]
        return (
            self.model is model
            and self.addresses == [weight.data_ptr() for weight in self.weights]
            and not self.hooked()
            and self.state == self._adapter_state()
        )

    def hooked(self) -> bool:
        """Whether something waits for a module to be called, which a recording never does."""
        return any(m._forward_hooks or m._forward_pre_hooks for m in self.modules)

    def _adapter_state(self) -> list[Any]:
        """peft's."""
        return [
            (tuple(m.active_adapters), tuple(m.merged_adapters), m.disable_adapters)
            for m in self.adapters
        ]


registrations = [0]  # of parameters and modules, anywhere in the process


def _count(*_: Any) -> None:
    registrations[0] += 1


register_module_module_registration_hook(_count)
register_module_parameter_registration_hook(_count)


class ChunkGraphs:
    """The recordings of one cache under one model."""

    def __init__(self, model: Any, memories: Sequence[LayerMemory]):
        self.model, self.memories, self.watch = model, list(memories), Watch(model)
        self.seen: Counter[Kind] = Counter()
        self.recordings: dict[Kind, Recording] = {}
        self.pool: Any = None  # of the recordings' memory

    def fit(self, model: Any, memories: Sequence[LayerMemory]) -> bool:
        """Whether model and buffers are still those of the recordings."""
        same = all(
            a is b
            for old, new in zip(self.memories, memories, strict=True)
            for a, b in zip(old, new, strict=True)
        )
        return same and self.watch.holds(model)

    def read(self, plan: ForwardPlan, t: int, ids: Tensor) -> tuple[Tensor, np.ndarray] | None:
        """Reads the call's t-th chunk by its recording: (k, d) wanted outputs and their flat places
        in (B, N); None: it has none and is to be read as usual.

        Args:
            ids: (B, N) on the device.
        """
        segments = alike(plan, t)
        if segments is None:
            return None
        head, m = segments[0], plan.config.global_size
        kind = self.kind_of(head, len(segments), m)
        if kind is None:
            return None
        start = int(plan.columns[0][head.start]) if head.count else 0
        given = ids[:, start : start + head.count]
        if kind not in self.recordings:
            self.seen[kind] += 1
            if self.seen[kind] == 1 or len(self.recordings) == MOST:
                return None
            self.recordings[kind] = self.record(kind, head, plan, given)
        recording = self.recordings[kind]
        recording.ids.copy_(given)
        if recording.numbers is not None:
            recording.numbers.copy_(step_numbers(head, m, ids.device))
        recording.run()
        return wanted_outputs(recording, plan.wanted, start, head.count)

    def kind_of(self, segment: Segment, rows: int, m: int) -> Kind | None:
        """None: the open chunk outgrows its buffers, and gets other ones."""
        first, last = segment.span(m)
        clock, memory = segment.before, self.memories[0]
        kind = Kind(rows, segment.count, last - first)
        if not segment.closes:
            after = replace(clock, fill=segment.text)
            pairs = (
                (memory.keys, 2, clock.memory + last),
                (memory.pending, 1, after.pending_tokens),
            )
            for buffer, axis, size in pairs:
                if buffer is not None and size > buffer.shape[axis]:
                    return None
            if segment.count == 1 and clock.fill and self.steps:
                return kind
        return kind._replace(closes=segment.closes, clock=replace(clock, num_tokens=0))

    @property
    def steps(self) -> bool:
        """Whether RoPE leaves positions on the device."""
        rope = self.model.config.backbone_config.rope_parameters
        return rope["rope_type"] not in BY_LENGTH

    def record(self, kind: Kind, segment: Segment, plan: ForwardPlan, given: Tensor) -> Recording:
        """The kind's recording; the segment is one of it, with these ids (B, its text tokens)."""
        model, m = self.model, plan.config.global_size
        kinds, _ = own_layout(segment, m)
        # Written to by every later run, under whatever mode.
        with torch.inference_mode(False):
            ids, numbers = torch.cat([given, model.own_ids(given)], 1).clone(), None
            if kind.clock is None:
                numbers = step_numbers(segment, m, ids.device)
        if numbers is not None:
            step = StepInputs(kind, numbers, self.memories[0].keys, model)
            body = partial(visit, model, self.memories, step.chunk, ids)
            # Kernels load; what this writes, the recording's first run writes again.
            body()
        else:
            chunk = fixed_chunk(kind, segment, plan, ids.device, model.rope)
            body = partial(visit, model, self.memories, lambda: chunk, ids)
        run, hidden = self.capture(body)
        text = np.flatnonzero(kinds == TEXT)
        return Recording(run, body, ids[:, : kind.tokens], numbers, hidden, text)

    def capture(self, body: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        """What runs the body again, and the tensor that its result is then in."""
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as those of data loaders, may use the device meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            hidden = body()
        return graph.replay, hidden


def visit(
    model: Any, memories: Sequence[LayerMemory], chunk: Callable[[], Chunk], ids: Tensor
) -> Tensor:
    """(B, W, d) outputs of the last layer on a chunk; memory changes in its buffers."""
    now = chunk()
    hidden = model.model.embed_tokens(ids.gather(1, now.tokens.source))
    for cell, memory in zip(model.model.layers, memories, strict=True):
        hidden, _ = cell(hidden, memory, now)
    return hidden


class StepInputs:
    """Makes a step's chunk from numbers that lie on the device."""

    def __init__(self, kind: Kind, numbers: Tensor, keys: Tensor | None, model: Any):
        assert keys is not None
        self.numbers, self.columns, self.rope = numbers, keys.shape[2], model.rope
        device, compression = numbers.device, kind.width == 2
        # Its ids are [text token | compression token | ...].
        source = torch.tensor([[1, 0] if compression else [0]], device=device)
        self.source, self.compression = source.expand(kind.rows, -1), compression
        self.offsets = torch.arange(kind.width, device=device)
        whole = [0, kind.width], [0, self.columns]
        self.limits = [torch.tensor(n, dtype=torch.int32, device=device) for n in whole]

    def chunk(self) -> StepChunk:
        places = self.numbers[:1] + self.offsets
        positions = places[None]
        rope = self.rope(positions, self.columns)
        return StepChunk(
            tokens=Tokens(self.source, positions, rope, None, np.empty(0, dtype=np.int64)),
            slots=None,
            positions=positions,
            rope=rope,
            columns=self.columns,
            in_place=True,
            capacity=0,
            stores=True,
            closes=False,
            has_state=False,
            gated=[],
            read=[],
            pending=0,
            pending_after=0,
            temporary_before=0,
            places=places,
            pending_place=self.numbers[1:] if self.compression else None,
            used=(places[-1:] + 1).int(),
            limits=(self.limits[0], self.limits[1]),
        )


def step_numbers(segment: Segment, m: int, device: torch.device) -> Tensor:
    """A step's first key column, and the pending outputs held before it."""
    first, _ = segment.span(m)
    numbers = segment.before.memory + first, segment.before.pending_tokens
    (there,) = to_device(device, np.array(numbers))
    assert there is not None
    return there


def graphs_of(model: Any, cache: CometCache, in_place: bool) -> ChunkGraphs | None:
    """The recordings of a call of the model; None: its chunks are read as usual."""
    device = model.lm_head.weight.device.type
    if not (model.cuda_graphs and in_place and device in DEVICES):
        return None
    # Autocast keeps copies of the weights that are not the recordings'.
    watched = model.observer is not None or torch.is_autocast_enabled(device)
    if watched or model.transport is not LocalTransport or model.traversal != "chunk_major":
        return None
    if cache.graphs is None or not cache.graphs.fit(model, cache.memories):
        cache.graphs = ChunkGraphs(model, cache.memories)
    return None if cache.graphs.watch.hooked() else cache.graphs


def alike(plan: ForwardPlan, t: int) -> list[Segment] | None:
    """The rows' segments of the t-th chunk, if all do the same with the same columns."""
    segments = [row[t] for row in plan.segments if t < len(row)]
    if len(segments) < len(plan.segments) or not all_alike(segments):
        return None
    count = segments[0].count
    if count:
        pairs = zip(plan.columns, segments, strict=True)
        ends = {(int(own[s.start]), int(own[s.start + count - 1])) for own, s in pairs}
        (first, last), *others = ends
        if others or last - first != count - 1:
            return None
    return segments


def fixed_chunk(
    kind: Kind, segment: Segment, plan: ForwardPlan, device: torch.device, rope: Any
) -> Chunk:
    """The chunk of rows that all do what the segment does, with ids of its text tokens only."""
    facts = CallFacts(
        width=kind.tokens,
        columns=[np.arange(kind.tokens)] * kind.rows,
        wanted=np.zeros((kind.rows, kind.tokens), dtype=bool),
        global_size=plan.config.global_size,
        capacity=plan.config.temporary_capacity,
        trailing=plan.config.layout == "trailing",
        in_place=True,
        keeps=True,
        device=device,
        rope=rope,
    )
    return build_chunk(facts, [replace(segment, start=0)] * kind.rows, [])


def wanted_outputs(
    recording: Recording, wanted: np.ndarray, start: int, count: int
) -> tuple[Tensor, np.ndarray]:
    """Copies of the wanted outputs (k, d), which the next run overwrites, and their flat places."""
    rows, columns = np.nonzero(wanted[:, start : start + count])
    hidden = recording.hidden
    places = rows * hidden.shape[1] + recording.text[columns]
    targets = rows * wanted.shape[1] + start + columns
    if len(places) == hidden.shape[:2].numel():
        return hidden.flatten(0, 1).clone(), targets
    (places_there,) = to_device(hidden.device, places)
    return hidden.flatten(0, 1)[places_there], targets
