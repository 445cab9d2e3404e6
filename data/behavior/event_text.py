"""A user's history as text and as tokens; each line is tokenised on its own, so that an event's place in tokens is exact."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from data.behavior.events import PRICE_UNITS, History, Log, split_users
from data.behavior.questions import KINDS, Query, wording

DAY = np.timedelta64(1, "D")
TEXT_EVENTS = 200_000  # a from-scratch tokenizer learns no more from more, but takes longer


def lines(history: History, log: Log, layout: str = "days") -> list[tuple[str, str]]:
    """(day, line) of each event, both ending in a newline. Layout days: the day stands above the first line of a day; lines: in each line;
    items: each line begins with item and day, so that what belongs together stands together."""
    days = [f"{day}\n" for day in history.time.astype("datetime64[D]").astype(str).tolist()]
    found = []
    for number, time in enumerate(history.time.astype(str).tolist()):
        item, day = history.item[number], time[:10]
        clock = time[11:16] if time.endswith(":00") else time[11:]
        amount = f" {history.quantity[number]} x" if log.has_quantity else ""
        price = f" at {_price(int(history.price[number]))}" if log.has_price else ""
        if layout == "items":
            begin, name = (
                f"{log.items[item]} {day} ",
                f" {log.descriptions[item]}" if log.descriptions else "",
            )
        else:
            begin, name = "" if layout == "days" else f"{day} ", f" {log.label(item)}"
        found.append(f"{begin}{clock} {log.actions[history.action[number]]}{amount}{name}{price}\n")
    return list(zip(days if layout == "days" else [""] * len(found), found, strict=True))


def _price(units: int) -> str:
    """Two decimals, or as many more as there are."""
    whole, rest = divmod(abs(units), PRICE_UNITS)
    decimals = f"{rest:04}"
    return f"{'-' * (units < 0)}{whole}.{decimals[:2]}{decimals[2:].rstrip('0')}"


@dataclass(frozen=True)
class Encoded:
    """A user's lines in tokens, all in one row: event i is ids[starts[i] : ends[i]], its day's header ids[heads[i] : bodies[i]]."""

    ids: np.ndarray  # (tokens,) int32
    starts: np.ndarray  # (n,), and so are all below
    ends: np.ndarray
    heads: np.ndarray
    bodies: np.ndarray

    def runs(self, events: np.ndarray) -> Iterator[tuple[int, int, bool]]:
        """(first, last, whether the first one's day has to be named) of each run of successive events."""
        day = -1
        for run in np.split(events, np.flatnonzero(np.diff(events) != 1) + 1):
            if len(run):
                yield int(run[0]), int(run[-1]), bool(self.heads[run[0]] != day)
                day = self.heads[run[-1]]

    def tokens(self, events: np.ndarray) -> np.ndarray:
        """Ids of the lines of some events, in ascending order, each day named above its first line."""
        parts = [np.zeros(0, dtype=np.int32)]
        for first, last, named in self.runs(events):
            parts += [self.ids[self.heads[first] : self.bodies[first]]] * named + [
                self.ids[self.starts[first] : self.ends[last]]
            ]
        return np.concatenate(parts)

    def fitting(self, end: int, room: int) -> int:
        """The earliest event from which on all before `end` fit into `room` tokens; `end` if none does."""
        if not end:
            return 0
        sizes = (
            self.ends[end - 1] - self.starts[:end] + (self.bodies - self.heads)[:end]
        )  # falls from event to event
        return int(np.searchsorted(-sizes, -room))


def encode_history(
    history: History, log: Log, tokenizer: PreTrainedTokenizerBase, layout: str = "days"
) -> Encoded:
    found = lines(history, log, layout)
    numbers = np.arange(len(found))
    new = np.array([not number or found[number][0] != found[number - 1][0] for number in numbers])
    pieces = [
        piece
        for (day, line), first in zip(found, new, strict=True)
        for piece in ([day, line] if first else [line])
    ]
    ids = tokenizer(pieces, add_special_tokens=False, split_special_tokens=True, verbose=False)[
        "input_ids"
    ]
    bounds = np.cumsum([0, *map(len, ids)])
    place = numbers + np.cumsum(new)  # of each line among the pieces
    first = np.maximum.accumulate(np.where(new, numbers, 0))  # of the event's day
    stream = np.fromiter(
        (token for piece in ids for token in piece), dtype=np.int32, count=bounds[-1]
    )
    return Encoded(
        stream, bounds[place], bounds[place + 1], bounds[place[first] - 1], bounds[place[first]]
    )


def texts(
    log: Log, action: str = "purchase", layout: str = "days", shift_days: int = 0
) -> Iterator[str]:
    """What a from-scratch tokenizer is trained on: lines of the training users, and questions with their words of an answer. Days are
    moved by up to shift_days, so that it knows the days that `Behavior.varied` makes."""
    training = set(split_users([history.user for history in log.histories])["train"])
    chosen = [history for history in log.histories if history.user in training]
    most = TEXT_EVENTS // len(chosen) + 1  # of a user
    kinds = list(KINDS)
    for whole in chosen:
        history = part(whole, 0, most)
        history = replace(
            history,
            time=history.time
            + (np.arange(len(history)) * 37 % (2 * shift_days + 1) - shift_days) * DAY,
        )
        for number, (day, line) in enumerate(lines(history, log, layout)):
            item, date = int(history.item[number]), history.time[number].astype("datetime64[D]")
            which, answer = ("last", "yes") if number % 2 else ("first", "no")
            query = Query(kinds[number // 2 % len(kinds)], item, item, date, date, which)
            yield f"{day}{line}\n{wording(query, log, action, layout == 'items')}{answer}"


def part(history: History, start: int, end: int) -> History:
    """Events start to end of a history, end not included."""
    return History(
        history.user, *(getattr(history, field.name)[start:end] for field in fields(History)[1:])
    )
