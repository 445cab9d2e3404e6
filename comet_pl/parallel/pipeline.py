"""A batch that several ranks read: each its own spans of chunks.

A layer's memory goes to the next rank as soon as it is written. Every rank has the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from comet_pl.model.cache import CometCache, LayerMemory
from comet_pl.model.configuration_comet import wide
from comet_pl.model.modeling_comet import CometForCausalLM
from comet_pl.model.traversal import LocalTransport
from comet_pl.parallel import p2p
from comet_pl.parallel.chunk_plan import Slots, Span, plan_text
from comet_pl.parallel.sharding import Shards
from comet_pl.training.windows import Window

TRAVERSAL = {
    "layer_level": "layer_major",
    "interleaved": "layer_major",
    "chunk_level": "chunk_major",
}


class Pipeline:
    """This rank's place in a pipeline.

    Args:
        ring: to the neighbours; None: a pipeline of one.
        index: of this rank in it.
        schedule: one of comet_pl.parallel.schedule.SCHEDULES.
    """

    def __init__(
        self, ring: p2p.Ring | None, index: int, ranks: int, schedule: str = "layer_level"
    ):
        self.ring, self.index, self.ranks = ring, index, ranks
        self.schedule = schedule if ranks > 1 else "layer_level"
        self.shards: Shards | None = None
        self.cache: CometCache | None = None  # after the last span that this rank has read
        self.holds_last = False  # whether that was the text's last span

    def read(
        self,
        model: CometForCausalLM,
        windows: Sequence[Window],
        num_items: int,
        keep_cache: bool = False,
    ) -> Iterator[Tensor | None]:
        """Reads this rank's spans; yields for each window its part of the loss, or None if there is
        nothing to backpropagate.

        The caller backpropagates a loss before it asks for the next: gradients of the memory travel
        in the backward pass.

        Args:
            num_items: divides the summed loss.
            keep_cache: leave the memory after the text in `cache`, on the rank of the last span.
        """
        self.cache, self.holds_last = None, False
        zero3 = self.shards if self.shards is not None and self.shards.layerwise else None
        plan = plan_text(model.config, windows, self.schedule, self.ranks, zero3 is not None)
        own: list[list[Span]] = [[] for _ in windows]
        for span in plan[self.index :: self.ranks]:
            own[span.window].append(span)
        # zero3: data-parallel ranks gather every layer together, also those that have less to read.
        # They have the same index in their pipelines and windows. What a shorter text lacks are a
        # window's last spans, whose backward passes come first: no rank waits for itself.
        ahead = [sum(span.part is not None for span in mine) for mine in own]
        back = [sum(span.learns for span in mine) for mine in own]
        spare = [(0, 0)] * len(own) if zero3 is None else zero3.spare(ahead, back)
        own += [[] for _ in spare[len(own) :]]  # other texts may have more windows
        for mine, (visits_ahead, visits_back) in zip(own, spare, strict=True):
            loss = self._window(model, mine, num_items, keep_cache) if mine else None
            if zero3 is not None:
                zero3.visit(visits_ahead, backward=False)
                zero3.visit(visits_back, backward=True)
            yield loss
        if self.ring is not None:
            self.ring.flush()

    def _window(
        self, model: CometForCausalLM, mine: list[Span], num_items: int, keep_cache: bool
    ) -> Tensor | None:
        layers, losses = len(model.model.layers), []
        desk = None if self.ring is None else self._desk(self.ring, model, mine)
        transport, traversal = model.transport, model.traversal
        try:
            model.traversal = TRAVERSAL[self.schedule]
            for span in mine:
                if span.part is None:
                    assert desk is not None
                    for _ in range(layers if any(span.sends) else 0):
                        desk.ring.to_next.send(desk.inbox.take())
                    continue
                past = CometCache.at(span.clocks, layers, model.fingerprint)
                if desk is not None:
                    model.transport = partial(SpanTransport, desk, span)
                elif self.cache is not None:
                    past = self.cache.detach()
                with torch.set_grad_enabled(span.learns):
                    output = model(
                        **span.part.inputs(),
                        past_key_values=past,
                        use_cache=keep_cache or not span.last,
                        num_items_in_batch=num_items,
                    )
                self.cache, self.holds_last = output.past_key_values, span.last
                losses.append(output.loss)
        finally:
            model.transport, model.traversal = transport, traversal
        if not any(span.learns for span in mine):
            return None
        loss = torch.stack(losses).sum()
        if desk is not None and desk.ties:
            return p2p.tie(loss, desk.ties, desk.gradients)
        return loss if loss.requires_grad else None

    def _desk(self, ring: p2p.Ring, model: CometForCausalLM, mine: list[Span]) -> Desk:
        layers, weight = len(model.model.layers), model.model.embed_tokens.weight
        rows, width = len(mine[0].clocks), weight.shape[1]
        like = weight.new_empty(0, dtype=wide(model.memory_dtype))
        together = layers if self.schedule == "chunk_level" else 1

        def shapes(memories: Iterable[Slots]) -> list[tuple[int, int, int]]:
            filled = [sum(slots) for slots in memories if any(slots)]
            return [(rows, n, width) for n in filled for _ in range(layers)]

        received = shapes(span.receives for span in mine)
        back = shapes(span.sends for span in reversed(mine) if span.live_out)
        inbox = p2p.Inbox(ring.from_previous, like, received, together)
        inbox.open()
        gradients = p2p.Inbox(ring.gradient_from_next, like, back, together)
        return Desk(ring, inbox, gradients, model.memory_dtype)


@dataclass
class Desk:
    """Receives and sends the memories of a window's spans."""

    ring: p2p.Ring
    inbox: p2p.Inbox  # messages have S's precision
    gradients: p2p.Inbox
    dtype: torch.dtype  # of temporary memories
    ties: list[Tensor] = field(default_factory=list)  # what the loss has to be tied to


class SpanTransport(LocalTransport):
    """Memory comes from the span before and goes to the span after."""

    def __init__(self, desk: Desk, span: Span, memories: list[LayerMemory]):
        super().__init__(memories)
        self.desk, self.span = desk, span

    def receive(self, layer: int) -> LayerMemory:
        desk, held, (m, t) = self.desk, self.memories[layer], self.span.receives
        if not m + t:
            return held
        if self.span.live_in:
            message = p2p.receive(desk.inbox, desk.ring.gradient_to_previous)
            desk.ties.append(message)
        else:
            message = desk.inbox.take()
        temporary = message[:, m:].to(desk.dtype) if t else None
        new = LayerMemory(message[:, :m] if m else None, temporary)
        if held.state is None and held.temporary is None:
            return new
        # A call without gradients has buffers and writes to them.
        for buffer, value in zip(held, new, strict=True):
            if buffer is not None and value is not None:
                buffer[:, : value.shape[1]] = value
        return held

    def send(self, layer: int, memory: LayerMemory) -> None:
        desk = self.desk
        super().send(layer, memory)
        if not any(self.span.sends):
            return
        like = desk.inbox.like
        sizes = zip((memory.state, memory.temporary), self.span.sends, strict=True)
        parts = [part[:, :n].to(like.dtype) for part, n in sizes if n and part is not None]
        # cat copies: a message in flight must not change.
        message = torch.cat(parts, 1)
        if self.span.live_out:
            desk.ties.append(p2p.send(message, desk.ring.to_next, desk.gradients))
        else:
            desk.ring.to_next.send(message.detach())
