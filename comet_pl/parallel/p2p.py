"""Differentiable, asynchronous messages between neighbouring ranks, over gloo or NCCL: a layer's
memory, of a shape that both sides know from the plan, received one message ahead.

Legend: B rows, n memory slots (m global slots, then temporary ones), d width.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Channel:
    """One direction between this rank and a neighbour.

    It has a process group of its own: NCCL serves a group's messages in order, so that two
    directions in one group would wait for each other.
    """

    group: dist.ProcessGroup
    peer: int  # the neighbour's rank in the world
    sent: deque[tuple[Any, Tensor]] = field(default_factory=deque)
    waited: float = 0.0  # seconds spent waiting for messages, without those of `marks`
    marks: deque[tuple[Any, Any]] = field(default_factory=deque)  # a GPU's events around its waits

    def send(self, message: Tensor) -> None:
        """Starts to send; nothing may write to the tensor afterwards."""
        while self.sent and self.sent[0][0].is_completed():
            self.sent.popleft()
        self.sent.append((dist.isend(message, self.peer, self.group), message))

    def post(self, message: Tensor) -> tuple[Any, Tensor]:
        """Starts to receive: (what to wait for, the tensor that the message will fill)."""
        return dist.irecv(message, self.peer, self.group), message

    def flush(self) -> None:
        while self.sent:
            self.sent.popleft()[0].wait()

    @property
    def seconds(self) -> float:
        """Spent waiting for messages so far. On a GPU the stream waits, not the host."""
        if self.marks:
            self.marks[-1][1].synchronize()
        self._count()
        return self.waited

    def wait(self, posted: Sequence[tuple[Any, Tensor]]) -> None:
        """Until these messages are there."""
        cuda, begun = bool(posted) and posted[0][1].is_cuda, time.perf_counter()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2 if cuda else 0)]
        for mark in marks[:1]:
            mark.record()
        for work, _ in posted:
            work.wait()
        if not marks:
            self.waited += time.perf_counter() - begun
            return
        marks[1].record()
        self._count()
        self.marks.append((marks[0], marks[1]))

    def _count(self) -> None:
        """Adds the waits that are over."""
        while self.marks and self.marks[0][1].query():
            start, end = self.marks.popleft()
            self.waited += start.elapsed_time(end) / 1e3


@dataclass
class Ring:
    """A rank's four channels: rank p sends memory to rank p + 1 (mod P) and gets its gradient."""

    to_next: Channel
    from_previous: Channel
    gradient_to_previous: Channel
    gradient_from_next: Channel

    @classmethod
    def build(cls, pipelines: Sequence[Sequence[int]], timeout: timedelta | None = None) -> Ring:
        """Makes the groups of all rings.

        Every rank of the world calls this with the same pipelines, each a list of two or more
        ranks. NCCL ends a rank whose message takes longer than `timeout` (None: torch's default).
        """
        me, ends = dist.get_rank(), dict[str, Channel]()
        for ranks in pipelines:
            for source, target in zip(ranks, [*ranks[1:], ranks[0]], strict=True):
                memory: Any = dist.new_group([source, target], timeout=timeout)
                gradient: Any = dist.new_group([source, target], timeout=timeout)
                if me == source:
                    ends["to_next"] = Channel(memory, target)
                    ends["gradient_from_next"] = Channel(gradient, target)
                if me == target:
                    ends["from_previous"] = Channel(memory, source)
                    ends["gradient_to_previous"] = Channel(gradient, source)
        return cls(**ends)

    @property
    def seconds(self) -> float:
        """Spent waiting for messages so far."""
        return self.from_previous.seconds + self.gradient_from_next.seconds

    def flush(self) -> None:
        """Waits until all that was sent has arrived."""
        self.to_next.flush()
        self.gradient_to_previous.flush()


class Inbox:
    """The messages that will come through a channel, in order.

    Args:
        like: a tensor of the messages' dtype and device.
        shapes: of the messages.
        together: so many messages are waited for at once.
    """

    def __init__(
        self, channel: Channel, like: Tensor, shapes: Sequence[Sequence[int]], together: int = 1
    ):
        self.channel, self.like, self.shapes, self.together = channel, like, deque(shapes), together
        self.posted: deque[tuple[Any, Tensor]] = deque()
        self.arrived: deque[Tensor] = deque()

    def open(self) -> None:
        """Starts to receive, so that the first message may come during other work."""
        if not self.posted:
            self._post()

    def take(self) -> Tensor:
        """The next message, once it is there."""
        if not self.arrived:
            self.open()
            now = [self.posted.popleft() for _ in range(min(self.together, len(self.posted)))]
            self._post()  # the next ones travel while these are used
            self.channel.wait(now)
            self.arrived += [message for _, message in now]
        return self.arrived.popleft()

    def _post(self) -> None:
        for _ in range(min(self.together, len(self.shapes))):
            self.posted.append(self.channel.post(self.like.new_empty(self.shapes.popleft())))


def receive(inbox: Inbox, back: Channel) -> Tensor:
    """The next memory (B, n, d) of an inbox; its gradient, or zeros, will be sent `back`."""
    return _Receive.apply(_anchor(inbox.like), inbox, back)


def send(memory: Tensor, channel: Channel, gradients: Inbox) -> Tensor:
    """Sends a memory (B, n, d) and returns what to `tie` to the loss: in its backward pass the
    memory takes its gradient from `gradients`."""
    return _Send.apply(_anchor(memory), memory, channel, gradients)


def tie(loss: Tensor, others: Sequence[Tensor], gradients: Inbox | None) -> Tensor:
    """Adds sent and received memories to the graph of `loss` with zero gradient, so that their
    backward runs even if this rank's loss does not depend on them. It first opens the inbox."""
    return _Tie.apply(loss, gradients, *others)


def _anchor(like: Tensor) -> Tensor:
    """An empty tensor that makes a function part of the graph."""
    return torch.empty(0, device=like.device, requires_grad=True)


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, inbox: Inbox, back: Channel) -> Tensor:
        ctx.set_materialize_grads(False)
        message = inbox.take()
        ctx.back, ctx.shape, ctx.like = back, message.shape, inbox.like
        return message

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[None, None, None]:
        ctx.back.send(ctx.like.new_zeros(ctx.shape) if gradient is None else gradient.contiguous())
        return None, None, None


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, memory: Tensor, channel: Channel, gradients: Inbox
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.gradients = gradients
        channel.send(memory)
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, nothing: Tensor | None) -> tuple[None, Tensor | None, None, None]:
        gradient = ctx.gradients.take()
        return None, gradient if ctx.needs_input_grad[1] else None, None, None


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Inbox | None, *others: Tensor) -> Tensor:
        ctx.gradients, ctx.others = gradients, len(others)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # Not before: on NCCL, a receive whose message depends on our own later work could block us.
        if ctx.gradients is not None:
            ctx.gradients.open()
        return gradient, None, *[None] * ctx.others
