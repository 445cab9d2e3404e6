"""What a step's messages tell: where each rank's time went, and how long the step would take on processors that nobody else uses.

Legend: P ranks in a ring; memory goes from rank p to p + 1, gradients from p + 1 to p (mod P). Times in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Event(NamedTuple):
    """What a rank did with a message: start and end on the clock that all ranks share, and in processor time since its step began."""

    kind: (
        str  # send, receive (the wait for it), flush (the wait until all that was sent has arrived)
    )
    link: str  # memory, gradient
    wall: tuple[float, float]
    processor: tuple[float, float]


def sender(rank: int, link: str, ranks: int) -> int:
    """Who sends what `rank` receives."""
    return (rank + (-1 if link == "memory" else 1)) % ranks


def shares(events: Sequence[Sequence[Event]]) -> list[dict[str, float]]:
    """Of each rank, given its events in order: the time in which it did not compute.

    Returns:
        neighbour: waiting for a message that its sender had yet to compute. transfer: waiting for one under way. sending: starting to send.
        flushing: at the end, until all that was sent has arrived.
    """
    sent: dict[tuple[int, str], list[float]] = {}
    for rank, own in enumerate(events):
        for event in own:
            if event.kind == "send":
                sent.setdefault((rank, event.link), []).append(event.wall[0])
    found = []
    for rank, own in enumerate(events):
        share, received = (
            dict.fromkeys(("neighbour", "transfer", "sending", "flushing"), 0.0),
            {"memory": 0, "gradient": 0},
        )
        for event in own:
            start, end = event.wall
            if event.kind == "send":
                share["sending"] += end - start
            elif event.kind == "flush":
                share["flushing"] += end - start
            else:
                at = sent[sender(rank, event.link, len(events)), event.link][received[event.link]]
                received[event.link] += 1
                there = min(max(at, start), end)
                share["neighbour"] += there - start
                share["transfer"] += end - there
        found.append(share)
    return found


def longest_chain(
    events: Sequence[Sequence[Event]], totals: Sequence[float], transfer: float
) -> float:
    """The longest chain of what waits for what, in processor time: the step's wall time if no other program took a processor.

    Args:
        events: of each rank, in order. totals: processor time of each rank. transfer: time of a message.
    """
    clocks, spent, position = [0.0] * len(events), [0.0] * len(events), [0] * len(events)
    sent: dict[tuple[int, str], list[float]] = {}
    received: dict[tuple[int, str], int] = {}

    def advance(rank: int) -> bool:
        """Plays one event of a rank, if what it waits for has been sent."""
        event = events[rank][position[rank]]
        clock = clocks[rank] + event.processor[1] - spent[rank]
        if event.kind == "send":
            sent.setdefault((rank, event.link), []).append(
                clocks[rank] + event.processor[0] - spent[rank]
            )
        elif event.kind == "receive":
            messages, k = (
                sent.get((sender(rank, event.link, len(events)), event.link), []),
                received.get((rank, event.link), 0),
            )
            if k == len(messages):
                return False
            received[rank, event.link] = k + 1
            clock = max(clock, messages[k] + transfer)
        clocks[rank], spent[rank], position[rank] = clock, event.processor[1], position[rank] + 1
        return True

    moved = True
    while moved:
        moved = False
        for rank, own in enumerate(events):
            while position[rank] < len(own) and advance(rank):
                moved = True
    assert position == [len(own) for own in events], "a message is received that nobody sent"
    return max(
        clock + total - before for clock, total, before in zip(clocks, totals, spent, strict=True)
    )
