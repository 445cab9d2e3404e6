"""A user's history as text and as tokens.

Each line is tokenised on its own, so that an event's place in tokens is exact.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from data.behavior.answers import Query
from data.behavior.events import DAY, PRICE_UNITS, History, Log, days_of, split_users
from data.behavior.questions import KINDS, wording
from data.encoding import PLAIN, inside

TEXT_EVENTS = 200_000
"""A tokenizer from scratch takes longer with more events, but learns no more from them."""


def lines(history: History, log: Log, layout: str = "days") -> list[tuple[str, str]]:
    """(day, line) of each event, both ending in a newline.

    Args:
        layout: days: the day is a line above the first event of a day. lines: each line names the
            day. items: each line begins with item and day, so that what belongs together is close.
    """
    days = [f"{day}\n" for day in days_of(history.time).astype(str).tolist()]
    found = []
    for number, time in enumerate(history.time.astype(str).tolist()):
        item, day = history.item[number], time[:10]
        clock = time[11:16] if time.endswith(":00") else time[11:]
        amount = f" {history.quantity[number]} x" if log.has_quantity else ""
        price = f" at {_price(int(history.price[number]))}" if log.has_price else ""
        if layout == "items":
            begin = f"{log.items[item]} {day} "
            name = f" {log.descriptions[item]}" if log.descriptions else ""
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
    """A user's lines in tokens, one after another.

    Event i is ids[starts[i] : ends[i]], the line of its day ids[heads[i] : bodies[i]].
    """

    ids: np.ndarray  # (tokens,) int32
    starts: np.ndarray  # (n,), and so are all below
    ends: np.ndarray
    heads: np.ndarray
    bodies: np.ndarray

    def tokens(self, events: np.ndarray) -> np.ndarray:
        """Ids of the lines of some events, in ascending order, each day above its first line."""
        parts, day = [np.zeros(0, dtype=np.int32)], -1
        for stretch in np.split(events, np.flatnonzero(np.diff(events) != 1) + 1):
            if len(stretch):
                first, last = stretch[0], stretch[-1]
                if self.heads[first] != day:
                    parts.append(self.ids[self.heads[first] : self.bodies[first]])
                parts.append(self.ids[self.starts[first] : self.ends[last]])
                day = self.heads[last]
        return np.concatenate(parts)

    def fitting(self, end: int, room: int) -> int:
        """The earliest event from which on all before `end` fit into `room` tokens; or `end`."""
        if not end:
            return 0
        # falls from event to event
        sizes = self.ends[end - 1] - self.starts[:end] + (self.bodies - self.heads)[:end]
        return int(np.searchsorted(-sizes, -room))


def encode_history(
    history: History, log: Log, tokenizer: PreTrainedTokenizerBase, layout: str = "days"
) -> Encoded:
    found = lines(history, log, layout)
    numbers = np.arange(len(found))
    new = np.array([not number or found[number][0] != found[number - 1][0] for number in numbers])
    pieces: list[str] = []
    for (day, line), first in zip(found, new, strict=True):
        pieces += [day, line] if first else [line]
    ids = inside(tokenizer)(pieces, add_special_tokens=False, **PLAIN)["input_ids"]
    bounds = np.cumsum([0, *map(len, ids)])
    place = numbers + np.cumsum(new)  # of each line among the pieces
    head = place[np.maximum.accumulate(np.where(new, numbers, 0))]  # of the day's first line
    tokens = (token for piece in ids for token in piece)
    stream = np.fromiter(tokens, dtype=np.int32, count=bounds[-1])
    return Encoded(stream, bounds[place], bounds[place + 1], bounds[head - 1], bounds[head])


def texts(
    log: Log, action: str = "purchase", layout: str = "days", shift_days: int = 0
) -> Iterator[str]:
    """What a tokenizer from scratch is trained on: lines of training users, with questions.

    Args:
        shift_days: days are moved by up to so many, as in augmented histories.
    """
    training = set(split_users([history.user for history in log.histories])["train"])
    chosen = [history for history in log.histories if history.user in training]
    most = TEXT_EVENTS // len(chosen) + 1  # of a user
    kinds = list(KINDS)
    for whole in chosen:
        time = whole.time[:most]
        shift = np.arange(len(time)) * 37 % (2 * shift_days + 1) - shift_days
        history = whole.select(slice(most), time=time + shift * DAY)
        for number, (day, line) in enumerate(lines(history, log, layout)):
            item, date = int(history.item[number]), days_of(history.time[number])
            which, answer = ("last", "yes") if number % 2 else ("first", "no")
            query = Query(kinds[number // 2 % len(kinds)], item, item, date, date, which)
            yield f"{day}{line}\n{wording(query, log, action, layout == 'items')}{answer}"
