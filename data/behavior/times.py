"""Times of events, out of text, numbers and dates."""

import re
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Any

EPOCH = datetime(1970, 1, 1)
NUMBER = re.compile(r"\d+(\.\d*)?")
UNITS = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}
EARLIEST, LATEST = 1e8, 1.9e9
"""Unix seconds that are read, 1973 to 2030: before, they have too few digits to tell the unit, and
beyond, ten digits may be a year, month, day and hour."""
SMALLEST = {"milliseconds": 10**12, "microseconds": 10**15, "nanoseconds": 10**18}
YEARS = (1900, 2199)
"""Of eight digits that are a date."""


@dataclass
class Times:
    """Reads a log's times; the first decides whether they have a time zone, and their unit.

    Attributes:
        offsets: from UTC, of the times with a time zone.
        unit: of UNITS; None: ISO 8601.
        odd: times before 1900 or after 2199, which often stand for none.
    """

    aware: bool | None = None
    unit: str | None = None
    offsets: set[timedelta | None] = field(default_factory=set)
    odd: int = 0

    def seconds(self, value: Any) -> int:
        """Seconds since 1970; in UTC, for a time with a time zone.

        Raises:
            ValueError: what is wrong, without the column's name.
        """
        time, unit = _read(value)
        aware = time.tzinfo is not None
        if self.aware is None:
            self.aware, self.unit = aware, unit
        if unit != self.unit:
            needed = f"Unix {self.unit} are needed" if self.unit else "a time in ISO 8601 is needed"
            raise ValueError(f"{value!s:.40} given, {needed}, as in the log's first event")
        if aware != self.aware:
            own, first = ("with", "without") if aware else ("without", "with")
            raise ValueError(
                f"{value!s:.40} given {own} a time zone, but the log's first event is {first} one"
            )
        if aware:
            offset = time.utcoffset()
            try:
                time = time.astimezone(UTC).replace(tzinfo=None)
            except OverflowError:
                raise ValueError(
                    f"{value!s:.40} given, which is outside the years 1 to 9999 in UTC"
                ) from None
            self.offsets.add(offset)
        self.odd += not YEARS[0] <= time.year <= YEARS[1]
        return int((time - EPOCH).total_seconds() // 1)


def _read(value: Any) -> tuple[datetime, str | None]:
    """(time, the unit of a Unix time)."""
    text = value.strip() if isinstance(value, str) else value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number or (isinstance(text, str) and NUMBER.fullmatch(text)):
        if isinstance(text, str) and len(text) == 8 and text.isdecimal():
            return _date(text), None
        return _unix(value)
    if isinstance(text, str):
        # as REES46 writes
        text = re.sub(r"\s*(UTC|GMT|Z)$", "+00:00", text)
        try:
            text = datetime.fromisoformat(text)
        except ValueError:
            text = None
    if type(text) is date:
        text = datetime(text.year, text.month, text.day)
    if not isinstance(text, datetime):
        raise _needed(value)
    return text, None


def _date(text: str) -> datetime:
    """YYYYMMDD."""
    try:
        time = datetime.strptime(text, "%Y%m%d")
    except ValueError:
        raise _needed(text) from None
    if not YEARS[0] <= time.year <= YEARS[1]:
        raise _needed(text)
    return time


def _unix(value: Any) -> tuple[datetime, str]:
    """A Unix time; its size tells its unit."""
    try:
        whole = int(value if isinstance(value, int) else str(value).strip().partition(".")[0])
    except ValueError:
        raise _needed(value) from None
    for unit, factor in UNITS.items():
        if max(EARLIEST * factor, SMALLEST.get(unit, 0)) <= whole < LATEST * factor:
            return EPOCH.replace(tzinfo=UTC) + timedelta(seconds=whole // factor), unit
    raise _needed(value)


def _needed(value: Any) -> ValueError:
    return ValueError(
        f"{value!r:.40} given, a time in ISO 8601 is needed, such as 2011-05-31T14:05:00, "
        "or in Unix seconds or milliseconds, of the years 1973 (milliseconds: 2001) to 2030"
    )
