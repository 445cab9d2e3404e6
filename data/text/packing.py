"""Documents into samples of at most max_length tokens, with as little padding as can be, and in new company each epoch.

Best fit: a document goes where it leaves the least room, or opens a sample. Longest first, that wastes least, but it is always the same; in
random order, it wastes up to 5 % on documents of a few tenths of max_length. So documents come in order of their length times a random
factor from .8 to 1: as little waste as longest first (within half a percent), other companions each time. Samples then stand in random
order, and so do the documents in each.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from data.batches import IGNORED

BLUR = 0.2


def pack(
    lengths: Sequence[int] | np.ndarray, max_length: int, random: np.random.Generator
) -> list[list[int]]:
    """Samples as lists of document numbers; each document is in one.

    Time: O(n log n) for n documents, plus moves in a list of the different amounts of room, at most max_length of them; a million documents
    take seconds.

    Args:
        lengths: tokens of each document. random: made from (seed, epoch), so that each epoch has its own samples, the same on all ranks.

    Raises:
        ValueError: a document has no tokens, or more than max_length.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(wrong := np.flatnonzero((sizes < 1) | (sizes > max_length))):
        raise ValueError(
            f"lengths: document {wrong[0]} has {sizes[wrong[0]]} tokens, allowed: 1 to max_length = {max_length}"
        )
    order = np.argsort(-sizes * random.uniform(1 - BLUR, 1, len(sizes)), kind="stable")
    samples: list[list[int]] = []
    rooms: list[int] = []  # that some sample has left, ascending
    with_room: dict[int, list[list[int]]] = {}
    for number, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        place = bisect_left(rooms, size)
        if place == len(rooms):
            samples.append(sample := [])
            room = max_length
        else:
            room = rooms[place]
            sample = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        sample.append(number)
        room -= size
        if room not in with_room:
            with_room[room] = []
            insort(rooms, room)
        with_room[room].append(sample)
    return [
        random.permutation(samples[place]).tolist() for place in random.permutation(len(samples))
    ]


def padding_share(
    samples: Sequence[Sequence[int]], lengths: Sequence[int] | np.ndarray, max_length: int
) -> float:
    """Share of padding, 0 to 1, where each sample is filled up to max_length; 0 if there are no samples."""
    tokens = sum(int(lengths[number]) for sample in samples for number in sample)
    return 1 - tokens / (len(samples) * max_length) if samples else 0.0


def sample_plan(
    lengths: Sequence[int], plans: Sequence[Sequence[int]], shared: bool = False
) -> tuple[list[int], list[bool]]:
    """(chunk_sizes, resets) of a sample, as CometForCausalLM.forward takes them: every document starts a chunk with empty memory.

    Args:
        lengths: tokens of each document. plans: the chunk sizes of each. shared: documents see the memory of those before, as the authors
            trained; resets are then False.

    Raises:
        ValueError: a plan that does not sum to its document's tokens, or has a size < 1.
    """
    for number, (length, plan) in enumerate(zip(lengths, plans, strict=True)):
        if sum(plan) != length or min(plan, default=0) < 1:
            raise ValueError(
                f"plans: document {number} has {length} tokens; sizes >= 1 with that sum are needed, {list(plan)} given"
            )
    chunk_sizes = [size for plan in plans for size in plan]
    resets = [not shared and place == 0 for plan in plans for place in range(len(plan))]
    return chunk_sizes, resets


def join(
    documents: Sequence[tuple[np.ndarray, np.ndarray]],
    plans: Sequence[Sequence[int]],
    shared: bool = False,
) -> tuple[np.ndarray, np.ndarray, list[int], list[bool]]:
    """A sample of some documents: (ids, labels, chunk_sizes, resets).

    The first label of each document is -100, because the token before it is another document's; not if `shared`.

    Args:
        documents: (ids, labels) of each, (n,) int64, labels unshifted; one at least. plans, shared: see sample_plan.

    Raises:
        ValueError: see sample_plan.
    """
    lengths = [len(ids) for ids, _ in documents]
    chunk_sizes, resets = sample_plan(lengths, plans, shared)
    ids, labels = (np.concatenate(parts) for parts in zip(*documents, strict=True))
    if not shared:
        labels[np.cumsum([0, *lengths[:-1]])] = IGNORED
    return ids, labels, chunk_sizes, resets
