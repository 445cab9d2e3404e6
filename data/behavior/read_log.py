"""Event logs out of jsonl, csv or parquet files.

A row names a user, a time, an action and an item, and if there are such columns a quantity and a
price. An item table (item, description) is optional.

    time      ISO 8601, without fractions of a second, or Unix time (data/behavior/times.py). The
              first usable event decides whether the log's times have a time zone; events that
              differ are unusable rows. Times with a time zone are turned into UTC.
    order     Each user's events in order of time. If the log is not, on_error=raise refuses it, and
              on_error=skip sorts: events of one time stay in the log's order.
    repeats   Equal rows may be several events (one order, two lines), so they are kept and counted;
              duplicates=drop keeps the first.
    numbers   Quantities are whole numbers; prices are kept exactly to four decimals.
"""

import math
import re
from array import array
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from comet_pl.errors import UserError, nearest
from data.batches import say
from data.behavior.events import PRICE_UNITS, History, Log
from data.behavior.tables import ENDINGS, kind_of, rows
from data.behavior.times import Times
from data.jsonl import Complaints, Row, UnusableRow, check_distinct, is_unicode

LARGEST = 10**9  # of a quantity or a price, so that it fits into 64 bits
COLUMNS = ("user", "time", "action", "item", "quantity", "price")


@dataclass(frozen=True)
class Columns:
    """Names of the columns.

    Without an action column all events are of the action asked about; without quantities they are
    1.
    """

    user: str = "user_id"
    time: str = "timestamp"
    action: str | None = "action"
    item: str = "item"
    quantity: str | None = "quantity"
    price: str | None = "price"
    item_description: str = "description"  # of the item table, next to its column `item`


def read_log(
    root: str | Path,
    items: str | Path | None = None,
    columns: Columns | None = None,
    on_error: str = "raise",
    duplicates: str = "keep",
    action: str = "purchase",
    descriptions: bool = True,
) -> Log:
    """The log in a file or folder; says what is unusual about it.

    Args:
        root: a file; or a folder, of which all events.* are read, or if there are none, all its
            event files, in the order of their names (2 before 10).
        items: the item table; None: items.* of the folder, if there is one.
        on_error: raise | skip, for unusable rows.
        duplicates: keep | drop.
        action: of all events if there is no such column.
        descriptions: False: items are shown by their numbers alone, without an item table.

    Raises:
        UserError: a file cannot be read, or is cut short; files that differ in their endings alone;
            several item tables; no usable event.
        UnusableRow: a row is unusable, and on_error is raise.
    """
    columns = columns or Columns()
    complaints = Complaints(on_error)
    paths, table = _files(root, items)
    if len(paths) > 1:
        say(f"{root}: reads {', '.join(path.name for path in paths)}"[:400])
    if left := _left_out(root, items):
        say(f"{root}: not read: {', '.join(left)}"[:400])
    known = _descriptions(table, columns, complaints) if table and descriptions else None
    reader = _Reader(columns, complaints, action, known)
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
    """(files of events, item table)."""
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
    tables = [path for path in root.iterdir() if path.is_file() and kind_of(path)]
    tables.sort(key=_natural)
    named = [path for path in tables if path.name.startswith("items.")]
    if not items and len(named) > 1:
        names = ", ".join(path.name for path in named)
        raise UserError(f"data.items: missing, {root} holds several item tables: {names}")
    items = items or next(iter(named), None)
    others = [path for path in tables if path != items and path not in named]
    events = [path for path in others if path.name.startswith("events.")] or others
    if not events:
        raise UserError(f"data.root: {root} holds no event file ({ENDINGS})")
    check_distinct(events)
    return events, items


def _natural(path: Path) -> list[tuple[int, str]]:
    """events.2 before events.10."""
    parts = re.findall(r"\d+|\D+", path.name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _left_out(root: str | Path, items: str | Path | None) -> list[str]:
    """Names of a folder's tables that are not read."""
    folder, read = Path(root).expanduser(), {path.resolve() for path in event_files(root, items)}
    if not folder.is_dir():
        return []
    tables = (path for path in folder.iterdir() if path.is_file() and kind_of(path))
    return sorted(path.name for path in tables if path.resolve() not in read)


def _descriptions(path: Path, columns: Columns, complaints: Complaints) -> dict[str, str]:
    """{item: description}; the first of several rows of an item counts."""
    descriptions: dict[str, str] = {}
    for place, row in rows(path, complaints):
        try:
            item, description = _text(row, columns.item), _text(row, columns.item_description)
        except ValueError as error:
            complaints.add(place, str(error))
        else:
            descriptions.setdefault(item, description)
    if not descriptions:
        raise UserError(f"data.items: {path} has no usable row")
    return descriptions


class _Reader:
    """Collects the rows of the files, column by column."""

    def __init__(
        self,
        columns: Columns,
        complaints: Complaints,
        action: str,
        descriptions: dict[str, str] | None,
    ):
        self.columns, self.complaints = columns, complaints
        self.action, self.descriptions = action, descriptions
        self.numbers: dict[str, dict[str, int]] = {"user": {}, "action": {}, "item": {}}
        self.table = {name: array("q") for name in (*COLUMNS, "row")}
        self.paths: list[tuple[int, Path]] = []  # (events before it, file)
        self.latest: dict[int, int] = {}
        self.times = Times()
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
        event = {"time": self._time(row), "quantity": round(quantity)}
        event["price"] = round(price * PRICE_UNITS)
        for name, word in (("user", user), ("action", action), ("item", item)):
            event[name] = self.numbers[name].setdefault(word, len(self.numbers[name]))
        return event

    def _time(self, row: Row) -> int:
        """Seconds since 1970."""
        name = self.columns.time
        value = _value(row, name)
        try:
            return self.times.seconds(value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    def _in_order(self, place: str, event: dict[str, int]) -> None:
        user, time = event["user"], event["time"]
        if time < self.latest.setdefault(user, time):
            reason = f"{place}: earlier than an event of the same user before it"
            if self.complaints.on_error == "raise":
                raise UnusableRow(
                    f"{reason} (sort the log by time; data.on_error=skip sorts each user's events)"
                )
            self.unordered += 1
            self.first_unordered = self.first_unordered or reason
        self.latest[user] = max(time, self.latest[user])

    def log(self, duplicates: str) -> Log:
        users, items = list(self.numbers["user"]), list(self.numbers["item"])
        table = {name: np.frombuffer(column, dtype=np.int64) for name, column in self.table.items()}
        rank = np.argsort(np.argsort(users))  # of a user's number among the names
        order = np.lexsort([table["time"], rank[table["user"]]])  # stable
        order = self._without_repeats(table, order, duplicates)
        kinds: dict[str, Any] = {"time": "datetime64[s]", "action": np.int32, "item": np.int32}
        table = {
            name: column[order].astype(kinds.get(name, np.int64)) for name, column in table.items()
        }
        names = [field.name for field in fields(History)[1:]]
        ends = np.flatnonzero(np.diff(table["user"], append=-1)) + 1
        histories = [
            History(users[table["user"][start]], *(table[name][start:end] for name in names))
            for start, end in zip([0, *ends[:-1]], ends, strict=True)
        ]
        if self.unordered:
            first = self.first_unordered
            say(f"{self.unordered} events were out of order and are sorted; the first: {first}")
        times = self.times
        if times.unit:
            say(f"times are Unix {times.unit} and are shown in UTC")
        elif times.aware:
            plural = "s" * (len(times.offsets) > 1)
            say(f"times with {len(times.offsets)} offset{plural} from UTC are shown in UTC")
        if times.odd:
            are = "time is" if times.odd == 1 else "times are"
            say(f"{times.odd} {are} before 1900 or after 2199: do they stand for no time?")
        known, columns = self.descriptions, self.columns
        return Log(
            histories,
            items,
            None if known is None else [known[item] for item in items],
            list(self.numbers["action"]),
            bool(columns.quantity),
            bool(columns.price),
        )

    def _without_repeats(
        self, table: dict[str, np.ndarray], order: np.ndarray, duplicates: str
    ) -> np.ndarray:
        """`order`, without the events that equal an earlier one in every column, if they are to be
        dropped; counts them in both cases."""
        # stable: of equal events the first in the log comes first
        together = np.lexsort([table[name] for name in COLUMNS])
        same = np.all([np.diff(table[name][together]) == 0 for name in COLUMNS], axis=0)
        repeats, drop = together[1:][same], duplicates == "drop"
        if len(repeats):
            first = int(repeats.min())
            path = [path for before, path in self.paths if before <= first][-1]
            done = "kept (data.duplicates=drop leaves them out)"
            done = "left out, as data.duplicates=drop says" if drop else done
            say(
                f"{len(repeats)} events equal an earlier one in every column, "
                f"the first: {path}:{table['row'][first]}; {done}"
            )
        return order[~np.isin(order, repeats)] if drop else order


def _value(row: Row, name: str) -> Any:
    value = row.get(name)
    if value is None or value == "":
        names = map(str, row)
        shown = f"missing{nearest(name, map(str, row))}; the columns are {', '.join(names)}"
        raise ValueError(f"{name}: {'null given' if name in row else shown:.300}")
    return value


def _text(row: Row, name: str) -> str:
    """A name or number as one line of text."""
    value, text = _value(row, name), ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # files write whole numbers so, if some are missing
    if isinstance(value, (str, int)) and not isinstance(value, bool):
        text = " ".join(str(value).split())
    if not text or not is_unicode(text):
        raise ValueError(f"{name}: {value!r:.40} given, text is needed")
    return text


def _number(row: Row, name: str, whole: bool = False) -> float:
    value = _value(row, name)
    try:
        # float() takes 1_000 and digits of every script
        strange = isinstance(value, str) and ("_" in value or not value.isascii())
        number = math.nan if strange or isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= LARGEST or (whole and not number.is_integer()):
        kind = "whole number" if whole else "number"
        raise ValueError(f"{name}: {value!r:.40} given, a {kind} is needed, of at most {LARGEST:,}")
    return number
