"""Event logs: who did what with which item, when. Read from jsonl, csv or parquet files; kept as one small table for each user.

A row names a user, a time, an action and an item, and where there are such columns a quantity and a price. An item table (item,
description) is optional. 40 bytes an event, so that a million events are nothing.

    time      ISO 8601. All times of a log are without a time zone, or all have one: then they are turned into UTC, several offsets or one.
              Which of the two it is the first usable event says; the others are unusable rows. Fractions of a second are dropped.
    order     Each user's events in order of time. Where the log is not, on_error=raise refuses it, and on_error=skip sorts: events of the
              same time stay in the log's order.
    twice     Two equal rows may be two events (one order, two lines), so they are kept; duplicates=drop keeps the first. Counted.
    numbers   Quantities are whole numbers; prices are kept to four decimals, exactly: in ten-thousandths.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import UTC, date, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from comet_pl.errors import UserError, nearest
from data.batches import say
from data.behavior.tables import ENDINGS, kind_of, rows
from data.jsonl import Complaints, Row, UnusableRow, is_unicode

PRICE_UNITS = 10_000
LARGEST = 10**9  # of a quantity or a price, so that it fits into 64 bits
EPOCH = datetime(1970, 1, 1)


@dataclass(frozen=True)
class Columns:
    """Names of the columns. Without an action column all events are of the action asked about; without quantities they are 1."""

    user: str = "user_id"
    time: str = "timestamp"
    action: str | None = "action"
    item: str = "item"
    quantity: str | None = "quantity"
    price: str | None = "price"
    item_description: str = "description"  # of the item table, beside its column `item`


@dataclass(frozen=True)
class History:
    """A user's n events in order of time; an action or item is its number in the Log."""

    user: str
    time: np.ndarray  # (n,) datetime64[s]
    action: np.ndarray  # (n,) int32
    item: np.ndarray  # (n,) int32
    quantity: np.ndarray  # (n,) int64
    price: np.ndarray  # (n,) int64, in 1 / PRICE_UNITS

    def __len__(self) -> int:
        return len(self.time)


@dataclass(frozen=True)
class Log:
    """All users' histories, in order of the users' names."""

    histories: list[History]
    items: list[str]
    descriptions: list[str] | None  # of the items
    actions: list[str]
    has_quantity: bool
    has_price: bool

    def label(self, item: int) -> str:
        """An item as a text shows it: DESCRIPTION (ITEM), or ITEM."""
        return (
            f"{self.descriptions[item]} ({self.items[item]})"
            if self.descriptions
            else self.items[item]
        )

    @cached_property
    def ends(self) -> tuple[np.datetime64, np.datetime64]:
        """Time of the first and of the last event."""
        return min(history.time[0] for history in self.histories), max(
            history.time[-1] for history in self.histories
        )


def read_log(
    root: str | Path,
    items: str | Path | None = None,
    columns: Columns | None = None,
    on_error: str = "raise",
    duplicates: str = "keep",
    action: str = "purchase",
    descriptions: bool = True,
) -> Log:
    """The log in a file or folder, and what there is to be said about it on the first rank's output.

    Args:
        root: a file; or a folder, of which events.* is read, or, if there is none, all its event files in order of their names.
        items: the item table; None: items.* of the folder, if there is one.
        on_error: raise | skip, for unusable rows. duplicates: keep | drop. action: of all events if there is no such column.
        descriptions: false: items are shown by their numbers alone, and there is no item table.

    Raises:
        UserError: a file cannot be read, or is cut short; no usable event. UnusableRow: a row is unusable, and on_error is raise.
    """
    columns = columns or Columns()
    complaints = Complaints(on_error)
    paths, table = _files(root, items)
    reader = _Reader(
        columns,
        complaints,
        action,
        _descriptions(table, columns, complaints) if table and descriptions else None,
    )
    for path in paths:
        reader.read(path)
    line = complaints.summary()
    if not reader.table["row"]:
        raise UserError(f"data.root: {root} has no usable event{f'; {line}' if line else ''}")
    if line:
        say(f"{root}: {line}")
    return reader.log(duplicates)


def event_files(root: str | Path, items: str | Path | None = None) -> list[Path]:
    """All files of a log, its item table included.

    Raises:
        UserError: there are none.
    """
    paths, table = _files(root, items)
    return [*paths, *([table] if table else [])]


def _files(root: str | Path, items: str | Path | None) -> tuple[list[Path], Path | None]:
    """The files of events, and the item table."""
    root, items = Path(root).expanduser(), Path(items).expanduser() if items else None
    if items and not (items.is_file() and kind_of(items)):
        reason = f"is no file of the kinds {ENDINGS}" if items.is_file() else "is no file"
        raise UserError(f"data.items: {items} {reason}")
    if root.is_file():
        if not kind_of(root):
            raise UserError(f"data.root: {root} is no file of the kinds {ENDINGS}")
        return [root], items
    if not root.is_dir():
        raise UserError(f"data.root: {root} is no file or folder")
    there = sorted(path for path in root.iterdir() if path.is_file() and kind_of(path))
    items = items or next((path for path in there if path.name.startswith("items.")), None)
    events = [path for path in there if path.name.startswith("events.")][:1] or [
        path for path in there if path != items
    ]
    if not events:
        raise UserError(f"data.root: {root} holds no event file ({ENDINGS})")
    return events, items


def _descriptions(path: Path, columns: Columns, complaints: Complaints) -> dict[str, str]:
    """{item: description}; the first of several rows of an item counts."""
    found: dict[str, str] = {}
    for place, row in rows(path, complaints):
        try:
            found.setdefault(_text(row, columns.item), _text(row, columns.item_description))
        except ValueError as error:
            complaints.add(place, str(error))
    if not found:
        raise UserError(f"data.items: {path} has no usable row")
    return found


class _Reader:
    """Collects the rows of one or more files, column by column."""

    def __init__(
        self,
        columns: Columns,
        complaints: Complaints,
        action: str,
        descriptions: dict[str, str] | None,
    ):
        self.columns, self.complaints, self.action, self.descriptions = (
            columns,
            complaints,
            action,
            descriptions,
        )
        self.numbers: dict[str, dict[str, int]] = {"user": {}, "action": {}, "item": {}}
        self.table = {
            name: array("q")
            for name in ("user", "time", "action", "item", "quantity", "price", "row")
        }
        self.paths: list[tuple[int, Path]] = []  # (events before it, file)
        self.latest: dict[int, int] = {}
        self.aware: bool | None = None
        self.offsets: set[Any] = set()
        self.unordered, self.first_unordered = 0, ""

    def read(self, path: Path) -> None:
        self.paths.append((len(self.table["user"]), path))
        before, empty = self.complaints.count, True
        for place, row in rows(path, self.complaints):
            empty = False
            try:
                event = self._event(row)
            except ValueError as error:
                self.complaints.add(place, str(error))
                continue
            self._in_order(place, event)
            for name, value in event.items():
                self.table[name].append(value)
            self.table["row"].append(int(place.rpartition(":")[2]))
        if empty and self.complaints.count == before:
            self.complaints.add(str(path), "no rows", "a file of events is needed")

    def _event(self, row: Row) -> dict[str, int]:
        """A row in numbers.

        Raises:
            ValueError: a field is missing or not what is needed.
        """
        columns = self.columns
        user, item = _text(row, columns.user), _text(row, columns.item)
        action = _text(row, columns.action) if columns.action else self.action
        quantity = _number(row, columns.quantity, whole=True) if columns.quantity else 1
        price = _number(row, columns.price) if columns.price else 0
        if self.descriptions is not None and item not in self.descriptions:
            raise ValueError(f"{columns.item}: {item!r:.60} given, the item table has no such item")
        time = self._time(row)
        words = {"user": user, "action": action, "item": item}
        numbers = {
            name: self.numbers[name].setdefault(word, len(self.numbers[name]))
            for name, word in words.items()
        }
        return {
            **numbers,
            "time": time,
            "quantity": round(quantity),
            "price": round(price * PRICE_UNITS),
        }

    def _time(self, row: Row) -> int:
        """Seconds since 1970."""
        name = self.columns.time
        value = _given(row, name)
        try:
            time = datetime.fromisoformat(value.strip()) if isinstance(value, str) else value
            if type(time) is date:
                time = datetime(time.year, time.month, time.day)
            if not isinstance(time, datetime):
                raise ValueError
        except ValueError:
            raise ValueError(
                f"{name}: {value!r:.40} given, a time in ISO 8601 is needed, such as 2011-05-31T14:05:00"
            ) from None
        aware = time.tzinfo is not None
        if self.aware is None:
            self.aware = aware
        if aware != self.aware:
            here, before = ("with", "without") if aware else ("without", "with")
            raise ValueError(
                f"{name}: {value!s:.40} given {here} a time zone, but the log's first event is {before} one"
            )
        if aware:
            self.offsets.add(time.utcoffset())
            time = time.astimezone(UTC).replace(tzinfo=None)
        return int((time - EPOCH).total_seconds() // 1)

    def _in_order(self, place: str, event: dict[str, int]) -> None:
        user, time = event["user"], event["time"]
        if time < self.latest.setdefault(user, time):
            reason = f"{place}: earlier than an event of the same user before it"
            if self.complaints.on_error == "raise":
                raise UnusableRow(
                    f"{reason} (sort the log by time; data.on_error=skip sorts each user's events)"
                )
            self.unordered, self.first_unordered = (
                self.unordered + 1,
                self.first_unordered or reason,
            )
        self.latest[user] = max(time, self.latest[user])

    def log(self, duplicates: str) -> Log:
        users, items = list(self.numbers["user"]), list(self.numbers["item"])
        table = {name: np.frombuffer(column, dtype=np.int64) for name, column in self.table.items()}
        rank = np.argsort(np.argsort(users))  # of a user's number among the names
        order = np.lexsort([table["time"], rank[table["user"]]])  # stable
        order = self._without_repeats(table, order, duplicates)
        kinds: dict[str, Any] = {"time": "datetime64[s]", "action": np.int32, "item": np.int32}
        sorted_table = {
            name: column[order].astype(kinds.get(name, np.int64)) for name, column in table.items()
        }
        ends = np.flatnonzero(np.diff(sorted_table["user"], append=-1)) + 1
        histories = [
            History(
                users[sorted_table["user"][start]],
                *(sorted_table[field.name][start:end] for field in fields(History)[1:]),
            )
            for start, end in zip([0, *ends[:-1]], ends, strict=True)
        ]
        if self.unordered:
            say(
                f"{self.unordered} events were out of order and are sorted; the first: {self.first_unordered}"
            )
        if self.aware:
            say(
                f"times with {len(self.offsets)} offset{'s' * (len(self.offsets) > 1)} from UTC are shown in UTC"
            )
        descriptions = (
            [self.descriptions[item] for item in items] if self.descriptions is not None else None
        )
        return Log(
            histories,
            items,
            descriptions,
            list(self.numbers["action"]),
            bool(self.columns.quantity),
            bool(self.columns.price),
        )

    def _without_repeats(
        self, table: dict[str, np.ndarray], order: np.ndarray, duplicates: str
    ) -> np.ndarray:
        """Counts events that equal an earlier one in every column, and drops them if that is wanted."""
        names = ("user", "time", "action", "item", "quantity", "price")
        together = np.lexsort(
            [table[name] for name in names]
        )  # stable: of equal events the first in the log comes first
        same = np.all([np.diff(table[name][together]) == 0 for name in names], axis=0)
        repeats = together[1:][same]
        if len(repeats):
            first = int(repeats.min())
            path = [path for before, path in self.paths if before <= first][-1]
            done = (
                "left out, as data.duplicates=drop says"
                if duplicates == "drop"
                else "kept (data.duplicates=drop leaves them out)"
            )
            say(
                f"{len(repeats)} events equal an earlier one in every column, the first: {path}:{table['row'][first]}; {done}"
            )
        return order[~np.isin(order, repeats)] if duplicates == "drop" else order


def _given(row: Row, name: str) -> Any:
    value = row.get(name)
    if value is None or value == "":
        there = f"missing{nearest(name, map(str, row))}; the columns are {', '.join(map(str, row))}"
        raise ValueError(f"{name}: {'null given' if name in row else there:.300}")
    return value


def _text(row: Row, name: str) -> str:
    """A name or number as one line of text."""
    value = _given(row, name)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # as files write whole numbers beside missing ones
    text = (
        " ".join(str(value).split())
        if isinstance(value, (str, int)) and not isinstance(value, bool)
        else ""
    )
    if not text or not is_unicode(text):
        raise ValueError(f"{name}: {value!r:.40} given, text is needed")
    return text


def _number(row: Row, name: str, whole: bool = False) -> float:
    value = _given(row, name)
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not abs(number) <= LARGEST or (whole and not number.is_integer()):
        kind = "whole number" if whole else "number"
        raise ValueError(f"{name}: {value!r:.40} given, a {kind} is needed, of at most {LARGEST:,}")
    return number


def split_users(users: Sequence[str]) -> dict[str, list[str]]:
    """{"train", "validation", "test"}: users, each in one of them, by a hash of their names alone.

    In order of the hash the first tenth validates and the second tests; at least three users each, or a third of them if there are fewer
    than nine. A user who joins moves at most one other over each border.

    Raises:
        UserError: fewer than three users.
    """
    if len(users) < 3:
        raise UserError(
            f"data.root: {len(users)} user{'s' * (len(users) != 1)} found, three are needed, to train, validate and test"
        )
    ranked = sorted(
        users,
        key=lambda user: (
            hashlib.blake2b(user.encode("utf-8", "surrogatepass"), digest_size=8).digest(),
            user,
        ),
    )
    size = min(max(3, round(len(users) / 10)), len(users) // 3)
    return {
        "train": ranked[2 * size :],
        "validation": ranked[:size],
        "test": ranked[size : 2 * size],
    }
