"""What a step's messages tell: where each rank's time went, and the step's time on processors that
nobody else uses. Rank p sends memory to p + 1 and gradients to p - 1 (mod P). Times in seconds.
"""

from collections import defaultdict
from typing import NamedTuple

PARTS = ("neighbour", "transfer", "sending", "flushing")


class Event(NamedTuple):
    """What a rank did with a message: start and end in wall time and in processor time of its step.

    kind: send, receive (the wait for it), or flush (the wait until all that was sent has arrived).
    """

    kind: str
    link: str  # memory, gradient
    wall: tuple[float, float]
    processor: tuple[float, float]


def sender(rank, link, ranks):
    return (rank + (-1 if link == "memory" else 1)) % ranks


def shares(events):
    """The time in which each rank did not compute, from its events in order.

    Returns:
        neighbour, transfer: waiting for a message that its sender had yet to compute, or that was
        under way. sending: starting to send. flushing: at the end, until all has arrived.
    """
    sent = defaultdict(list)
    for rank, own in enumerate(events):
        for event in own:
            if event.kind == "send":
                sent[rank, event.link].append(event.wall[0])
    result = []
    for rank, own in enumerate(events):
        share, received = dict.fromkeys(PARTS, 0.0), {"memory": 0, "gradient": 0}
        for event in own:
            start, end = event.wall
            if event.kind == "receive":
                source = sender(rank, event.link, len(events))
                at = sent[source, event.link][received[event.link]]
                received[event.link] += 1
                ready = min(max(at, start), end)
                share["neighbour"] += ready - start
                share["transfer"] += end - ready
            else:
                share["sending" if event.kind == "send" else "flushing"] += end - start
        result.append(share)
    return result


def longest_chain(events, totals, transfer):
    """The longest chain of dependencies in processor time: the step's wall time on idle processors.

    events: of each rank, in order. totals: its processor time. transfer: time of a message.
    """
    clocks, spent, position = [0.0] * len(events), [0.0] * len(events), [0] * len(events)
    sent = defaultdict(list)
    received = defaultdict(int)

    def advance(rank):
        """Plays one event of a rank, if what it waits for has been sent."""
        event = events[rank][position[rank]]
        clock = clocks[rank] + event.processor[1] - spent[rank]
        if event.kind == "send":
            sent[rank, event.link].append(clocks[rank] + event.processor[0] - spent[rank])
        elif event.kind == "receive":
            messages = sent[sender(rank, event.link, len(events)), event.link]
            k = received[rank, event.link]
            if k == len(messages):
                return False
            received[rank, event.link] += 1
            clock = max(clock, messages[k] + transfer)
        clocks[rank], spent[rank] = clock, event.processor[1]
        position[rank] += 1
        return True

    moved = True
    while moved:
        moved = False
        for rank, own in enumerate(events):
            while position[rank] < len(own) and advance(rank):
                moved = True
    assert position == [len(own) for own in events], "a message is received that nobody sent"
    ends = zip(clocks, totals, spent, strict=True)
    return max(clock + total - before for clock, total, before in ends)
