"""Answers to questions about events, computed from all or some of the events."""

from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal

import numpy as np

from data.behavior.events import PRICE_UNITS, History, Log, days_of


@dataclass(frozen=True)
class Query:
    """What is asked; items are numbers in the Log, days are datetime64[D], a month is its first."""

    kind: str
    item: int = -1
    other: int = -1
    first_day: np.datetime64 | None = None
    last_day: np.datetime64 | None = None
    which: str = ""  # followed: last | first


Solution = tuple[str, tuple[int, ...]]
"""(answer, evidence)."""


def solve(query: Query, history: History, log: Log, events: np.ndarray) -> Solution | None:
    """The solution by some events of the action asked about; None if they do not give one.

    Args:
        events: (n,) their numbers in the history, ascending.
    """
    if query.kind in ("count", "most_frequent"):
        return _between(query, history, log, events)
    if query.kind == "total":
        return _total(query, history, events)
    items = history.item[events]
    places = np.flatnonzero(items == query.item)
    if not len(places):
        return None
    place = places[0] if query.kind == "first_time" or query.which == "first" else places[-1]
    event = int(events[place])
    if query.kind in ("last_time", "first_time"):
        return str(days_of(history.time[event])), (event,)
    if query.kind == "followed":
        if place + 1 == len(events):
            return None
        return log.items[items[place + 1]], (event, int(events[place + 1]))
    others = events[items == query.other]
    if not len(others) or history.time[others[-1]] == history.time[event]:
        return None
    last = int(others[-1])
    return ("yes" if last > event else "no"), tuple(sorted((event, last)))


def _between(query: Query, history: History, log: Log, events: np.ndarray) -> Solution | None:
    days = days_of(history.time[events])
    events = events[(query.first_day <= days) & (days <= query.last_day)]
    items = history.item[events]
    if query.kind == "count":
        counted = events[items == query.item]
        return str(len(counted)), tuple(counted.tolist())
    kinds, counts = np.unique(items, return_counts=True)
    best = kinds[counts == counts.max(initial=0)]
    if len(best) != 1:
        return None
    return log.items[best[0]], tuple(events[items == best[0]].tolist())


def _total(query: Query, history: History, events: np.ndarray) -> Solution | None:
    months = history.time[events].astype("datetime64[M]")
    events = events[months == np.datetime64(str(query.first_day), "M")]
    if not len(events):
        return None
    lines = zip(history.quantity[events].tolist(), history.price[events].tolist(), strict=True)
    return amount(sum(quantity * price for quantity, price in lines)), tuple(events.tolist())


def oracle(query: Query, history: History, log: Log, events: np.ndarray) -> str:
    """The answer of a reader who sees only these events and makes no mistake.

    It is no upper bound for next_item, where the answer is the most frequent visible item (the
    latest of several), and for questions that have to be guessed, where it is ''.

    Args:
        events: as in `solve`; any selection of them.
    """
    items = history.item[events]
    if query.kind == "next_item":
        counts = np.bincount(items) if len(items) else np.zeros(1)
        best = items[counts[items] == counts.max()] if len(items) else items
        return log.items[best[-1]] if len(best) else ""
    if query.kind == "bought_after" and query.item not in items:
        # an item that is not in sight lies most likely further back
        return "yes" if query.other in items else "no"
    if query.kind == "bought_after" and query.other not in items:
        return "no"
    solution = solve(query, history, log, events)
    return solution[0] if solution else ""


def amount(units: int) -> str:
    """Money with two decimals, halves rounded away from zero."""
    return str((Decimal(units) / PRICE_UNITS).quantize(Decimal("0.01"), ROUND_HALF_UP))
