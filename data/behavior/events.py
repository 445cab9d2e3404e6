"""Event logs in memory: who did what with which item, when; 40 bytes an event."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from comet_pl.errors import UserError

PRICE_UNITS = 10_000
DAY = np.timedelta64(1, "D")


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

    def select(self, events: slice | np.ndarray, **changed: np.ndarray) -> History:
        """Some events; `changed` replaces columns of the result."""
        columns = {field.name: getattr(self, field.name)[events] for field in fields(self)[1:]}
        return History(self.user, **columns | changed)


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
        name = self.items[item]
        return f"{self.descriptions[item]} ({name})" if self.descriptions else name

    @cached_property
    def ends(self) -> tuple[np.datetime64, np.datetime64]:
        """Time of the first and of the last event."""
        first = min(history.time[0] for history in self.histories)
        return first, max(history.time[-1] for history in self.histories)


def days_of(time: Any) -> Any:
    """datetime64[D] of a time, or of an array of them."""
    return time.astype("datetime64[D]")


def split_users(users: Sequence[str]) -> dict[str, list[str]]:
    """{"train", "validation", "test"}: users, each in one of them, by a hash of their names alone.

    In the order of the hash the first tenth validates and the second tests; at least three users
    each, or a third of them if there are fewer than nine. A user who joins moves at most one other
    over each border.

    Raises:
        UserError: fewer than three users.
    """
    if len(users) < 3:
        plural = "s" * (len(users) != 1)
        raise UserError(
            f"data.root: {len(users)} user{plural} found, three are needed, "
            "to train, validate and test"
        )

    def hashed(user: str) -> tuple[bytes, str]:
        name = user.encode("utf-8", "surrogatepass")
        return hashlib.blake2b(name, digest_size=8).digest(), user

    ranked = sorted(users, key=hashed)
    size = min(max(3, round(len(users) / 10)), len(users) // 3)
    validation, test = ranked[:size], ranked[size : 2 * size]
    return {"train": ranked[2 * size :], "validation": validation, "test": test}
