"""Questions about a window of a user's history, with computed answers.

The world of a question is the window: "the first purchase of X" is the first that the window shows, a month at its edge is what the window
shows of it. X and Y are items, and all questions are about one action, such as purchase; other actions are distractors.

    kind           question                                            answer      evidence: the events that it needs
    last_time      day of the last X                                   2011-05-31  that X
    first_time     day of the first X                                  2011-05-31  that X
    count          how many events are X, from one day to another      3           all of them; at least one
    most_frequent  the item of the most events from one day to another  21495      all events of that item; at least two, and no tie
    bought_after   any Y after the last X; as often yes as no          yes         the last X and the last Y, at different times
    followed       the item right after the last or first X            21495       that X and the event after it, which is no X
    total          quantity times price of all events in a month       1234.50     all of them
    next_item      the item of the next event; the window ends there   21495       none: it is a prediction

A question without such evidence in the window is never asked. To have near and far evidence in balance, the age class of the oldest needed
event is drawn first, each class that has a candidate alike, and then one of its candidates. Before it only
the answer is drawn where that can be balanced: yes and no are equally likely, and so are all counts up to 9 that the window allows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import numpy as np

from data.behavior.events import PRICE_UNITS, History, Log

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
MOST_DAYS = 30  # between a counted event and the window's first or last day, so that windows do not grow with the gaps
TRIES = 16


def age_class(ages: Any) -> Any:
    """0 for ages under 1,024 tokens, 1 under 2,048, 2 under 4,096, ...; of an int, or of an array of them."""
    return np.ceil(np.log2(np.asarray(ages) // UNIT + 1)).astype(int)


def class_bounds(number: int) -> tuple[int, int]:
    """The first age of a class, and the first of the next one."""
    return (UNIT << number >> 1) if number else 0, UNIT << number


@dataclass(frozen=True)
class Query:
    """What is asked; items are numbers in the Log, days are datetime64[D], a month is its first day."""

    kind: str
    item: int = -1
    other: int = -1
    first_day: np.datetime64 | None = None
    last_day: np.datetime64 | None = None
    which: str = ""  # followed: last | first


@dataclass(frozen=True)
class Question:
    """A query about the events start to end (not included) of history number `user` in the Log."""

    query: Query
    user: int
    start: int
    end: int
    answer: str
    evidence: tuple[int, ...]  # events, in the history's numbering
    age: (
        int | None
    )  # tokens from the oldest evidence's line to the history's end; None without evidence


def wording(query: Query, log: Log, action: str, numbers: bool = False) -> str:
    """The question as text. numbers: items are named by their numbers alone."""
    name = log.items.__getitem__ if numbers else log.label
    item = name(query.item) if query.item >= 0 else ""
    days = f"from {query.first_day} to {query.last_day}"
    return {
        "last_time": f"On which day is the last {action} of {item}?",
        "first_time": f"On which day is the first {action} of {item}?",
        "count": f"How many times is there a {action} of {item} {days}?",
        "most_frequent": f"Which item has the most {action} lines {days}?",
        "bought_after": f"Is there a {action} of {name(query.other)} after the last {action} of {item}?",
        "followed": f"Which item is in the next {action} after the {query.which} {action} of {item}?",
        "total": f"What is the {action} total of {str(query.first_day)[:7]}?",
        "next_item": f"Which item is in the next {action}?",
    }[query.kind]


# -- answers ----------------------------------------------------------------------------------------------------------------------------


def solve(
    query: Query, history: History, log: Log, events: np.ndarray
) -> tuple[str, tuple[int, ...]] | None:
    """(answer, evidence) from some events of the action asked about, as they stand; None if they do not say.

    Args:
        events: (n,) their numbers in the history, ascending.
    """
    items = history.item[events]
    if query.kind in ("count", "most_frequent"):
        days = history.time[events].astype("datetime64[D]")
        events = events[(query.first_day <= days) & (days <= query.last_day)]
        if query.kind == "count":
            found = events[history.item[events] == query.item]
            return str(len(found)), tuple(found.tolist())
        kinds, counts = np.unique(history.item[events], return_counts=True)
        best = kinds[counts == counts.max(initial=0)]
        return (
            (log.items[best[0]], tuple(events[history.item[events] == best[0]].tolist()))
            if len(best) == 1
            else None
        )
    if query.kind == "total":
        events = events[
            history.time[events].astype("datetime64[M]") == np.datetime64(str(query.first_day), "M")
        ]
        units = sum(
            quantity * price
            for quantity, price in zip(
                history.quantity[events].tolist(), history.price[events].tolist(), strict=True
            )
        )
        return (amount(units), tuple(events.tolist())) if len(events) else None
    places = np.flatnonzero(items == query.item)
    if not len(places):
        return None
    place = places[0] if query.kind == "first_time" or query.which == "first" else places[-1]
    at = int(events[place])
    if query.kind in ("last_time", "first_time"):
        return str(history.time[at].astype("datetime64[D]")), (at,)
    if query.kind == "followed":
        return (
            (log.items[items[place + 1]], (at, int(events[place + 1])))
            if place + 1 < len(events)
            else None
        )
    others = events[items == query.other]
    if not len(others) or history.time[others[-1]] == history.time[at]:
        return None
    return ("yes" if others[-1] > at else "no"), tuple(sorted((at, int(others[-1]))))


def oracle(query: Query, history: History, log: Log, events: np.ndarray) -> str:
    """The best answer from the visible events: what a reader who makes no mistake can reach with them. Not an upper bound for next_item,
    where it is the most frequent visible item (the latest of several), and not for what has to be guessed: '' otherwise.

    Args:
        events: as in `solve`; any selection of them.
    """
    items = history.item[events]
    if query.kind == "next_item":
        counts = np.bincount(items) if len(items) else np.zeros(1)
        best = items[counts[items] == counts.max()] if len(items) else items
        return log.items[best[-1]] if len(best) else ""
    if query.kind == "bought_after" and query.item not in items:
        return (
            "yes" if query.other in items else "no"
        )  # what is not in sight lies most likely further back
    if query.kind == "bought_after" and query.other not in items:
        return "no"
    found = solve(query, history, log, events)
    return found[0] if found else ""


def amount(units: int) -> str:
    """Money with two decimals, halves rounded away from zero."""
    return str((Decimal(units) / PRICE_UNITS).quantize(Decimal("0.01"), ROUND_HALF_UP))


# -- questions --------------------------------------------------------------------------------------------------------------------------


@dataclass
class _Window:
    """The events of the action asked about, in order: their numbers, and for each its item, day, time and age in tokens."""

    events: np.ndarray
    item: np.ndarray
    day: np.ndarray
    time: np.ndarray
    age: np.ndarray
    random: np.random.Generator

    def pick(self, places: np.ndarray, preferred: np.ndarray | None = None) -> int:
        """An index into `places` (places in the window): first an age class, then one of its places, a preferred one if it has any."""
        classes = age_class(self.age[places])
        here = np.flatnonzero(classes == self.random.choice(np.unique(classes)))
        if preferred is not None and preferred[here].any():
            here = here[preferred[here]]
        return int(self.random.choice(here))

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
    item, day = window.item[order], window.day[order]
    begins = np.append(
        True, (item[1:] != item[:-1]) | (day[1:] != day[:-1])
    )  # no earlier event of this item on this day
    n, possible = len(order), np.zeros((MOST_COUNTED, len(order)), dtype=bool)
    for more in range(min(MOST_COUNTED, n)):  # events j to j + more are the counted ones
        ends = np.append(begins[1:], True)[more:]
        possible[more, : n - more] = begins[: n - more] & ends & (item[: n - more] == item[more:])
    more = int(window.random.choice(np.flatnonzero(possible.any(1))))  # all counts alike
    able = np.flatnonzero(possible[more])
    j = int(able[window.pick(order[able])])
    one = np.timedelta64(1, "D")
    before = day[j - 1] + one if j and item[j - 1] == item[j] else window.day[0]
    after = (
        day[j + more + 1] - one
        if j + more + 1 < n and item[j + more + 1] == item[j]
        else window.day[-1]
    )
    first = _day(window.random, max(before, day[j] - MOST_DAYS), day[j])
    return Query(
        kind,
        int(item[j]),
        first_day=first,
        last_day=_day(window.random, day[j + more], min(after, day[j + more] + MOST_DAYS)),
    )


def _most_frequent(kind: str, window: _Window) -> Query | None:
    days = np.unique(window.day)
    wanted = window.random.choice(np.unique(age_class(window.age)))
    here = np.flatnonzero(age_class(window.age) == wanted)
    for _ in range(TRIES):
        first = window.day[window.random.choice(here)]
        last = window.random.choice(days[days >= first][:MOST_DAYS])
        found = np.flatnonzero((first <= window.day) & (window.day <= last))
        items, counts = np.unique(window.item[found], return_counts=True)
        best = items[counts == counts.max()]
        oldest = found[window.item[found] == best[0]][0]
        if len(best) == 1 and counts.max() > 1 and age_class(window.age[oldest]) == wanted:
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
    new = window.random.choice(
        later[classes == classes.max()]
    )  # as old as can be: or the recent past alone would tell
    x, y = (
        (old, new) if window.random.random() < 0.5 else (new, old)
    )  # the pair says nothing about the answer
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
    return Query(kind, first_day=months[window.pick(first)].astype("datetime64[D]"))


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
    """A question of this kind about events start to end of a history; None if there is none, or if the draw found none.

    Args:
        ages: (end - start,) of the window's events, in tokens. action: number of the action asked about. random: decides everything.
    """
    history = log.histories[user]
    if kind == "next_item":
        known = end < len(history) and history.action[end] == action
        return (
            Question(Query(kind), user, start, end, log.items[history.item[end]], (), None)
            if known
            else None
        )
    shown = np.flatnonzero(history.action[start:end] == action)
    if not len(shown):
        return None
    events = start + shown
    time = history.time[events]
    window = _Window(
        events, history.item[events], time.astype("datetime64[D]"), time, ages[shown], random
    )
    query = PROPOSE[kind](kind, window)
    found = solve(query, history, log, events) if query else None
    if query is None or found is None or not found[1]:
        return None
    return Question(query, user, start, end, *found, age=int(ages[found[1][0] - start]))
