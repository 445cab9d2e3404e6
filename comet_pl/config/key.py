"""A key of the schema: a dataclass field with its meaning and its rules."""

from dataclasses import field
from typing import Any


def key(default: Any, meaning: str, **rules: Any) -> Any:
    """A dataclass field with its one-line meaning and the rules of its values."""
    metadata = {"help": meaning, **rules}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)
