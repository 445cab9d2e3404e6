"""Histories made of real ones for training, so that no day or history can be learnt by heart.

All functions are pure: the generator decides everything.
"""

from collections.abc import Sequence

import numpy as np

from data.behavior.events import DAY, History, Log, days_of


def thinned(history: History, count: int, keep: float, random: np.random.Generator) -> History:
    """At most `count` events of a stretch of a history, some events in between left out.

    Args:
        keep: 0 < keep <= 1: the share of the stretch's events that stay is drawn between `keep` and
            1, each order of magnitude alike.
    """
    stretch = min(len(history), int(count / np.exp(random.uniform(np.log(keep), 0))))
    start = random.integers(len(history) - stretch + 1)
    kept = np.sort(random.choice(stretch, min(count, stretch), replace=False))
    return history.select(start + kept)


def shifted(history: History, shift_days: int, random: np.random.Generator) -> History:
    """All days moved alike, by up to shift_days."""
    shift = random.integers(-shift_days, shift_days + 1) * DAY
    return history.select(slice(None), time=history.time + shift)


def spread(
    history: History,
    log: Log,
    new_days: Sequence[int],
    shift_days: int,
    random: np.random.Generator,
) -> History:
    """The events, in their order, on new days.

    Each event has a day of its own, so a question about a day has to be looked up.

    Args:
        new_days: [least, most]: the days of the new span are drawn between the two, each order of
            magnitude alike.
        shift_days: the span lies anywhere from so many days before the log's first day to so many
            after its last.
    """
    first, last = (
        days_of(time) + sign * shift_days * DAY
        for time, sign in zip(log.ends, (-1, 1), strict=True)
    )
    room = int((last - first).astype(int))
    days = min(room, int(np.exp(random.uniform(*np.log(new_days)))))
    begin = first + random.integers(room - days + 1) * DAY
    clock = history.time - days_of(history.time)
    drawn = random.integers(days + 1, size=len(history)) * DAY
    time = np.sort(begin + drawn + clock).astype(history.time.dtype)
    return history.select(slice(None), time=time)
