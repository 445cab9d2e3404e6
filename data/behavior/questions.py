"""Questions about a window of a user's history, with computed answers.

The world of a question is the window: "the first purchase of X" is the first that the window shows,
a month at its edge has the events that the window shows. X and Y are items. All questions are about
one action, such as purchase; other actions are distractors.

    kind           question                                answer      evidence: the needed events
    last_time      day of the last X                       2011-05-31  that X
    first_time     day of the first X                      2011-05-31  that X
    count          number of X, from one day to another    3           all of them; at least one
    most_frequent  item of most events, in some days       21495       all of that item; at least
                                                                       two, and no tie
    bought_after   any Y after the last X; as often yes    yes         the last X and the last Y, at
                   as no                                               different times
    followed       item right after the last or first X    21495       that X, and the event after
                                                                       it, which is no X
    total          quantity times price, over a month      1234.50     all events of the month
    next_item      item of the next event, before which    21495       none: it is a prediction
                   the window ends

A question without such evidence in the window is never asked. To balance near and far evidence, the
age class of the oldest needed event is drawn first, each class with a candidate alike, and then one
of the class's candidates. Before that only the answer is drawn, if it can be balanced: yes and no
are equally likely, and so are all counts up to 9 that the window allows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.behavior.answers import Query, solve
from data.behavior.events import DAY, Log, days_of

KINDS = {
    "last_time": "day of the last X",
    "first_time": "day of the first X",
    "count": "how many X from one day to another",
    "most_frequent": "item most often from one day to another",
    "bought_after": "any Y after the last X",
    "followed": "item right after the last or first X",
    "total": "money in a month",
    "next_item": "item of the next event, which the history does not show",
}
"""Kinds of questions; X and Y are an action on an item."""
UNIT = 1024  # tokens; the age classes are 0-1k, 1-2k, 2-4k, 4-8k, ...
MOST_COUNTED = 9
MOST_DAYS = 30
"""Between a counted event and the first or last day asked about; longer gaps widen them no more."""
TRIES = 16


def age_class(ages: Any) -> Any:
    """0 for ages under 1,024 tokens, 1 under 2,048, 2 under 4,096, ...; of an int or an array."""
    return np.ceil(np.log2(np.asarray(ages) // UNIT + 1)).astype(int)


def class_bounds(number: int) -> tuple[int, int]:
    """The first age of a class, and the first of the next one."""
    return (UNIT << number >> 1) if number else 0, UNIT << number


@dataclass(frozen=True)
class Question:
    """A query about the events start to end (not included) of history number `user` in the Log."""

    query: Query
    user: int
    start: int
    end: int
    answer: str
    evidence: tuple[int, ...]  # events, in the history's numbering
    age: int | None
    """Tokens from the oldest evidence's line to the history's end; None without evidence."""

    def events(self) -> np.ndarray:
        """Numbers of the window's events."""
        return np.arange(self.start, self.end)


def wording(query: Query, log: Log, action: str, numbers: bool = False) -> str:
    """The question as text.

    Args:
        numbers: items are named by their numbers alone.
    """
    name = log.items.__getitem__ if numbers else log.label
    item = name(query.item) if query.item >= 0 else ""
    other = name(query.other)
    days, which = f"from {query.first_day} to {query.last_day}", query.which
    return {
        "last_time": f"On which day is the last {action} of {item}?",
        "first_time": f"On which day is the first {action} of {item}?",
        "count": f"How many times is there a {action} of {item} {days}?",
        "most_frequent": f"Which item has the most {action} lines {days}?",
        "bought_after": f"Is there a {action} of {other} after the last {action} of {item}?",
        "followed": f"Which item is in the next {action} after the {which} {action} of {item}?",
        "total": f"What is the {action} total of {str(query.first_day)[:7]}?",
        "next_item": f"Which item is in the next {action}?",
    }[query.kind]


@dataclass
class _Window:
    """The events of the action asked about, in order."""

    item: np.ndarray  # (n,), and so are all below
    day: np.ndarray
    time: np.ndarray
    age: np.ndarray  # in tokens
    random: np.random.Generator

    def pick(self, places: np.ndarray, preferred: np.ndarray | None = None) -> int:
        """An index into `places` (places in the window).

        An age class is drawn first, then one of its places, a preferred one if there is any.
        """
        classes = age_class(self.age[places])
        able = np.flatnonzero(classes == self.random.choice(np.unique(classes)))
        if preferred is not None and preferred[able].any():
            able = able[preferred[able]]
        return int(self.random.choice(able))

    def ends(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Each item once: (items, place of its first event, of its last one, number of events)."""
        items, first, counts = np.unique(self.item, return_index=True, return_counts=True)
        last = len(self.item) - 1 - np.unique(self.item[::-1], return_index=True)[1]
        return items, first, last, counts


def _time(kind: str, window: _Window) -> Query:
    items, first, last, counts = window.ends()
    return Query(kind, int(items[window.pick(last if kind == "last_time" else first, counts > 1)]))


def _count(kind: str, window: _Window) -> Query:
    order = np.argsort(window.item, kind="stable")  # each item's events together, in order of time
    item, day, n = window.item[order], window.day[order], len(order)
    # no earlier event of this item on this day
    begins = np.append(True, (item[1:] != item[:-1]) | (day[1:] != day[:-1]))
    possible = np.zeros((MOST_COUNTED, n), dtype=bool)
    for further in range(min(MOST_COUNTED, n)):  # events j to j + further are the counted ones
        ends = np.append(begins[1:], True)[further:]
        same = item[: n - further] == item[further:]
        possible[further, : n - further] = begins[: n - further] & ends & same
    further = int(window.random.choice(np.flatnonzero(possible.any(1))))  # all counts alike
    able = np.flatnonzero(possible[further])
    j = int(able[window.pick(order[able])])
    k = j + further
    before, after = window.day[0], window.day[-1]
    if j and item[j - 1] == item[j]:
        before = day[j - 1] + DAY
    if k + 1 < n and item[k + 1] == item[j]:
        after = day[k + 1] - DAY
    first = _day(window.random, max(before, day[j] - MOST_DAYS), day[j])
    last = _day(window.random, day[k], min(after, day[k] + MOST_DAYS))
    return Query(kind, int(item[j]), first_day=first, last_day=last)


def _most_frequent(kind: str, window: _Window) -> Query | None:
    days, classes = np.unique(window.day), age_class(window.age)
    wanted = window.random.choice(np.unique(classes))
    starts = np.flatnonzero(classes == wanted)
    for _ in range(TRIES):
        first = window.day[window.random.choice(starts)]
        last = window.random.choice(days[days >= first][:MOST_DAYS])
        asked = np.flatnonzero((first <= window.day) & (window.day <= last))
        items, counts = np.unique(window.item[asked], return_counts=True)
        best = items[counts == counts.max()]
        oldest = asked[window.item[asked] == best[0]][0]
        if len(best) == 1 and counts.max() > 1 and classes[oldest] == wanted:
            return Query(kind, first_day=first, last_day=last)
    return None


def _bought_after(kind: str, window: _Window) -> Query | None:
    items, _, last, _ = window.ends()
    earlier = np.flatnonzero(window.time[last] < window.time[last].max())
    if not len(earlier):
        return None
    old = earlier[window.pick(last[earlier])]
    later = np.flatnonzero(window.time[last] > window.time[last[old]])
    classes = age_class(window.age[last[later]])
    # as old as possible: otherwise the recent past alone would tell
    new = window.random.choice(later[classes == classes.max()])
    # either order, so that the pair says nothing about the answer
    x, y = (old, new) if window.random.random() < 0.5 else (new, old)
    return Query(kind, int(items[x]), int(items[y]))


def _followed(kind: str, window: _Window) -> Query | None:
    items, first, last, counts = window.ends()
    which = str(window.random.choice(["last", "first"]))
    place = last if which == "last" else first
    able = np.flatnonzero(place + 1 < len(window.item))
    able = able[window.item[place[able] + 1] != items[able]]
    if not len(able):
        return None
    return Query(kind, int(items[able[window.pick(place[able], counts[able] > 1)]]), which=which)


def _total(kind: str, window: _Window) -> Query:
    months, first = np.unique(window.day.astype("datetime64[M]"), return_index=True)
    return Query(kind, first_day=days_of(months[window.pick(first)]))


def _day(random: np.random.Generator, first: np.datetime64, last: np.datetime64) -> np.datetime64:
    return first + random.integers(0, int((last - first).astype(int)) + 1)


PROPOSE: dict[str, Callable[[str, _Window], Query | None]] = {
    "last_time": _time,
    "first_time": _time,
    "count": _count,
    "most_frequent": _most_frequent,
    "bought_after": _bought_after,
    "followed": _followed,
    "total": _total,
}


def ask(
    kind: str,
    log: Log,
    user: int,
    start: int,
    end: int,
    ages: np.ndarray,
    action: int,
    random: np.random.Generator,
) -> Question | None:
    """A question of this kind about events start to end of a history; None if the draw has none.

    Args:
        ages: (end - start,) of the window's events, in tokens.
        action: number of the action asked about.
        random: decides everything.
    """
    history = log.histories[user]
    if kind == "next_item":
        if end == len(history) or history.action[end] != action:
            return None
        return Question(Query(kind), user, start, end, log.items[history.item[end]], (), None)
    shown = np.flatnonzero(history.action[start:end] == action)
    if not len(shown):
        return None
    events = start + shown
    time = history.time[events]
    window = _Window(history.item[events], days_of(time), time, ages[shown], random)
    query = PROPOSE[kind](kind, window)
    solution = solve(query, history, log, events) if query else None
    if query is None or solution is None or not solution[1]:
        return None
    answer, evidence = solution
    return Question(query, user, start, end, answer, evidence, int(ages[evidence[0] - start]))
