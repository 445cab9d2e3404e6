"""Rows of jsonl files, plain or compressed, one at a time; a malformed row is named by file and line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from comet_pl.errors import UserError
from data.lines import OPEN, Row, rows

HUB = "hf://datasets/tau/scrolls/{task}.zip"


class UnusableRow(UserError):
    """A row that is malformed or too long."""


class Complaints:
    """What happens to rows that cannot be used: the first one raises, or they are skipped, counted and shown.

    Args:
        on_error: raise | skip.
    """

    def __init__(self, on_error: str):
        self.on_error, self.count, self.first = on_error, 0, ""

    def add(self, place: str, reason: str, remedy: str = "") -> None:
        """A row is left out.

        Args:
            remedy: what else would help, for a row that is not malformed.

        Raises:
            UnusableRow: on_error is raise.
        """
        if self.on_error == "raise":
            fault, ways = ("", f"{remedy}; ") if remedy else ("malformed row: ", "")
            raise UnusableRow(
                f"{place}: {fault}{reason} ({ways}data.on_error=skip leaves such rows out)"
            )
        self.first = self.first or f"{place}: {reason}"
        self.count += 1

    def summary(self) -> str | None:
        """One line about what was skipped, or None."""
        return (
            f"{self.count} unusable row{'s' * (self.count > 1)} skipped; the first: {self.first}"
            if self.count
            else None
        )


def is_unicode(text: str) -> bool:
    """JSON can spell halves of characters, which can neither be tokenised nor written."""
    return text.isascii() or text == text.encode(errors="ignore").decode()


def find(folder: Path, split: str) -> Path | None:
    """<folder>/<split>.jsonl, plain or compressed; None if there is none."""
    paths = (folder / f"{split}.jsonl{suffix}" for suffix in OPEN)
    return next((path for path in paths if path.is_file()), None)


def read(path: Path, complaints: Complaints) -> Iterator[tuple[str, Row]]:
    """('path:line', row) of every line that is not blank.

    Raises:
        UserError: the file cannot be read or unpacked. UnusableRow: a line is no JSON object, and complaints raise.
    """
    for place, row in rows(path):
        if isinstance(row, dict):
            yield place, row
        else:
            complaints.add(place, row)


def hub_rows(task: str, split: str, archive: str = HUB) -> Iterator[tuple[str, Row]]:
    """('place:number', row) of a task of tau/scrolls, streamed out of its zip.

    Args:
        archive: address of the zip, {task} to be filled in.

    Raises:
        UserError: the hub, or the split, cannot be read.
    """
    import datasets

    place = archive.format(task=task)
    try:
        files = {split: f"zip://**/{split}.jsonl::{place}"}
        stream = datasets.load_dataset("json", data_files=files, split=split, streaming=True)
        for number, row in enumerate(stream, 1):
            yield f"{place}/{split}.jsonl:{number}", dict(row)
    except UserError:
        raise
    except Exception as error:  # of a dozen libraries: no network, no such file, a malformed row
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"data.root: null given, but {split} rows of {place} cannot be read: {reason}"
        ) from None
