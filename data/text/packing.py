"""Documents into packed rows of at most max_length tokens, with little padding.

Best fit: a document joins the row where it leaves the least room, or opens a new one. Longest first
wastes least, but gives every epoch the same rows; random order wastes up to 5 % on documents of a
few tenths of max_length. So documents are taken in the order of their length times a random factor
from .8 to 1: within half a percent of the waste of longest first, with new companions each epoch.
Rows, and the documents of each row, are then put into random order.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from comet_pl.model.chunk_layout import ChunkPlan
from data.batches import IGNORED, Pair

BLUR = 0.2


def pack(
    lengths: Sequence[int] | np.ndarray, max_length: int, random: np.random.Generator
) -> list[list[int]]:
    """Rows as lists of document numbers; each document is in one row.

    Takes O(n log n) for n documents, plus moves in a list of at most max_length amounts of room; a
    million documents take seconds.

    Args:
        lengths: tokens of each document.
        random: made from (seed, epoch), so that all ranks have the same rows.

    Raises:
        ValueError: a document has no tokens, or more than max_length.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(wrong := np.flatnonzero((sizes < 1) | (sizes > max_length))):
        raise ValueError(
            f"lengths: document {wrong[0]} has {sizes[wrong[0]]} tokens, "
            f"allowed: 1 to max_length = {max_length}"
        )
    order = np.argsort(-sizes * random.uniform(1 - BLUR, 1, len(sizes)), kind="stable")
    rows: list[list[int]] = []
    rooms: list[int] = []  # that some row has left, ascending
    with_room: dict[int, list[list[int]]] = {}
    for number, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        place = bisect_left(rooms, size)
        if place == len(rooms):
            rows.append(row := [])
            room = max_length
        else:
            room = rooms[place]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        row.append(number)
        room -= size
        if room not in with_room:
            with_room[room] = []
            insort(rooms, room)
        with_room[room].append(row)
    return [random.permutation(rows[place]).tolist() for place in random.permutation(len(rows))]


def padding_share(
    rows: Sequence[Sequence[int]], lengths: Sequence[int] | np.ndarray, max_length: int
) -> float:
    """Share of padding, 0 to 1, if each row is filled up to max_length; 0 without rows."""
    tokens = sum(int(lengths[number]) for row in rows for number in row)
    return 1 - tokens / (len(rows) * max_length) if rows else 0.0


def join(
    documents: Sequence[Pair], plans: Sequence[Sequence[int]], shared: bool = False
) -> tuple[np.ndarray, np.ndarray, ChunkPlan]:
    """A packed row: (ids, labels, plan).

    Every document starts a chunk with empty memory, and its first label is -100, because the token
    before it is another document's. If `shared`, documents see the memory of those before, as in
    the authors' training: there are no resets, and the labels stay.

    Args:
        documents: at least one.
        plans: the chunk sizes of each document.

    Raises:
        ValueError: a plan that does not sum to its document's tokens, or has a size < 1.
    """
    lengths = [len(ids) for ids, _ in documents]
    for number, (length, plan) in enumerate(zip(lengths, plans, strict=True)):
        if sum(plan) != length or min(plan, default=0) < 1:
            raise ValueError(
                f"plans: document {number} has {length} tokens; sizes >= 1 with that sum are "
                f"needed, {list(plan)} given"
            )
    sizes = tuple(size for plan in plans for size in plan)
    resets = tuple(not shared and place == 0 for plan in plans for place in range(len(plan)))
    ids, labels = (np.concatenate(parts) for parts in zip(*documents, strict=True))
    if not shared:
        labels[np.cumsum([0, *lengths[:-1]])] = IGNORED
    return ids, labels, ChunkPlan(sizes, resets)
