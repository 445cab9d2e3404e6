"""Differentiable, asynchronous hand-over of a layer's memory between neighbouring ranks: tensors of shapes that both sides know from the
plan, received one message ahead, never pickled. gloo and NCCL.

Legend: B rows, n memory slots (m global slots, then temporary ones), d width.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Channel:
    """One direction between this rank and a neighbour.

    It has a process group of its own: NCCL serves the messages of a group in order, and two directions in one would wait for each other.
    """

    group: dist.ProcessGroup
    peer: int  # the neighbour's rank in the world
    sent: deque[tuple[dist.Work, Tensor]] = field(default_factory=deque)
    seconds: float = 0.0  # spent waiting for messages

    def send(self, message: Tensor) -> None:
        """Starts to send; the tensor must not be written to afterwards."""
        while self.sent and self.sent[0][0].is_completed():
            self.sent.popleft()
        work = dist.isend(message, self.peer, self.group)
        assert work is not None
        self.sent.append((work, message))

    def post(self, like: Tensor, shape: Sequence[int]) -> tuple[dist.Work, Tensor]:
        """Makes a place for the next message: (what to wait for, the tensor that it will fill)."""
        message = like.new_empty(shape)
        work = dist.irecv(message, self.peer, self.group)
        assert work is not None
        return work, message

    def flush(self) -> None:
        """Waits until all that was sent has arrived."""
        while self.sent:
            self.sent.popleft()[0].wait()


@dataclass
class Ring:
    """A rank's four channels; rank p's memory goes to rank p + 1 (mod P), the gradient of it comes back."""

    to_next: Channel
    from_previous: Channel
    gradient_to_previous: Channel
    gradient_from_next: Channel

    @classmethod
    def build(cls, pipelines: Sequence[Sequence[int]]) -> Ring:
        """Makes the groups of all rings: every rank of the world calls this with the same pipelines, each a list of two or more ranks."""
        me, ends = dist.get_rank(), dict[str, Channel]()
        for ranks in pipelines:
            for source, target in zip(ranks, [*ranks[1:], ranks[0]], strict=True):
                memory, gradient = (
                    dist.new_group([source, target]),
                    dist.new_group([source, target]),
                )
                if me == source:
                    ends |= {
                        "to_next": Channel(memory, target),
                        "gradient_from_next": Channel(gradient, target),
                    }  # type: ignore[arg-type]
                if me == target:
                    ends |= {
                        "from_previous": Channel(memory, source),
                        "gradient_to_previous": Channel(gradient, source),
                    }  # type: ignore[arg-type]
        return cls(**ends)

    @property
    def seconds(self) -> float:
        """Time spent waiting for messages so far."""
        return self.from_previous.seconds + self.gradient_from_next.seconds

    def flush(self) -> None:
        """Waits until all that was sent has arrived."""
        self.to_next.flush()
        self.gradient_to_previous.flush()


class Inbox:
    """The messages that are known to come through a channel, in order.

    Args:
        like: a tensor of the messages' dtype and device. shapes: of the messages. together: messages that are handed over as one: the first
            of so many waits for them all.
    """

    def __init__(
        self, channel: Channel, like: Tensor, shapes: Sequence[Sequence[int]], together: int = 1
    ):
        self.channel, self.like, self.shapes, self.together = channel, like, deque(shapes), together
        self.posted: deque[tuple[dist.Work, Tensor]] = deque()
        self.arrived: deque[Tensor] = deque()

    def open(self) -> None:
        """Begins to receive: the first message may come while something else is worked on."""
        if not self.posted:
            self._post()

    def take(self) -> Tensor:
        """The next message, once it is there."""
        if not self.arrived:
            self.open()
            now = [self.posted.popleft() for _ in range(min(self.together, len(self.posted)))]
            self._post()  # the next ones travel while these are worked on
            start = time.perf_counter()
            for work, message in now:
                work.wait()
                self.arrived.append(message)
            self.channel.seconds += time.perf_counter() - start
        return self.arrived.popleft()

    def _post(self) -> None:
        for _ in range(min(self.together, len(self.shapes))):
            self.posted.append(self.channel.post(self.like, self.shapes.popleft()))


def receive(inbox: Inbox, back: Channel) -> Tensor:
    """The next memory (B, n, d) of an inbox; its gradient, zeros if there is none, will be sent `back`."""
    return _Receive.apply(_anchor(inbox.like), inbox, back)  # type: ignore[no-any-return]


def send(memory: Tensor, channel: Channel, gradients: Inbox) -> Tensor:
    """Sends a memory (B, n, d). Its gradient will be taken from `gradients` in the backward pass of what this returns (see `tie`)."""
    return _Send.apply(_anchor(memory), memory, channel, gradients)  # type: ignore[no-any-return]


def tie(loss: Tensor, others: Sequence[Tensor], gradients: Inbox | None) -> Tensor:
    """The loss; its backward pass opens the inbox of gradients, and reaches the others too without giving them a gradient: what was sent
    has to fetch one, and what was received has to send one back, whether or not it touches this rank's loss."""
    return _Tie.apply(loss, gradients, *others)  # type: ignore[no-any-return]


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
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[None, None, None]:  # type: ignore[override]
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
    def backward(ctx: Any, nothing: Tensor | None) -> tuple[None, Tensor | None, None, None]:  # type: ignore[override]
        gradient = ctx.gradients.take()
        return None, gradient if ctx.needs_input_grad[1] else None, None, None


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Inbox | None, *others: Tensor) -> Tensor:
        ctx.gradients, ctx.others = gradients, len(others)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if (
            ctx.gradients is not None
        ):  # not before: on NCCL, what waits for something that we have yet to cause could block us
            ctx.gradients.open()
        return gradient, None, *[None] * ctx.others
