"""Rows of jsonl files, plain or compressed, one at a time; complaints name file and line."""

import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import zstandard

from comet_pl.errors import UserError


class _Zstd(io.RawIOBase):
    """Unpacks a .zst file of one or more frames; unlike zstandard.open it notices a cut file."""

    def __init__(self, path: Path):
        self.file, self.ready = path.open("rb"), memoryview(b"")
        self.frame: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.ready:
            ended = self.frame is None or self.frame.eof
            data = self.frame.unused_data if self.frame and ended else b""
            data = data or self.file.read(1 << 14)
            if not data:
                if ended:
                    return 0
                raise EOFError("Compressed file ended within a frame")
            self.frame = zstandard.ZstdDecompressor().decompressobj() if ended else self.frame
            self.ready = memoryview(self.frame.decompress(data))
        size = min(len(buffer), len(self.ready))
        buffer[:size], self.ready = self.ready[:size], self.ready[size:]
        return size

    def close(self) -> None:
        self.file.close()
        super().close()


OPEN: dict[str, Callable[[Path], IO[bytes]]] = {
    "": lambda path: path.open("rb"),
    ".xz": lambda path: io.BufferedReader(lzma.LZMAFile(path)),
    ".gz": lambda path: io.BufferedReader(gzip.GzipFile(path)),
    ".zst": lambda path: io.BufferedReader(_Zstd(path)),
}
UNREADABLE = (OSError, EOFError, lzma.LZMAError, zstandard.ZstdError)
Row = dict[str, Any]


def rows(path: Path) -> Iterator[tuple[str, Row | str]]:
    """('path:line', row) of every line that is not blank; a text instead of a row says what is
    wrong with the line.

    Args:
        path: its ending says how it is compressed, one of OPEN; any other: not at all.

    Raises:
        UserError: the file cannot be read or unpacked.
    """
    number = 0
    try:
        with OPEN.get(path.suffix, OPEN[""])(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", _parse(line)
    except UNREADABLE as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: cannot be read after line {number}: {reason}") from None


def _parse(line: bytes) -> Row | str:
    """The object, or what is wrong."""
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        return f"not UTF-8 ({error.reason} at byte {error.start})"
    except ValueError as error:
        return f"not JSON: {error}"
    except RecursionError:
        return "not JSON: nested too deep"
    if isinstance(row, dict):
        return row
    return f"a JSON object is needed, but this is a {type(row).__name__}"


class UnusableRow(UserError):
    """A row that is malformed or too long."""


class Complaints:
    """Handles unusable rows: the first one raises, or they are skipped, counted and shown.

    Args:
        on_error: raise | skip.
    """

    def __init__(self, on_error: str):
        self.on_error, self.count, self.first = on_error, 0, ""

    def add(self, place: str, reason: str, remedy: str = "") -> None:
        """Leaves a row out.

        Args:
            remedy: what else helps, for a row that is not malformed.

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
        """One line about the skipped rows, or None."""
        if not self.count:
            return None
        plural = "s" * (self.count > 1)
        return f"{self.count} unusable row{plural} skipped; the first: {self.first}"


def is_unicode(text: str) -> bool:
    """JSON can spell halves of characters, which can be neither tokenised nor written."""
    return text.isascii() or text == text.encode(errors="ignore").decode()


def find(folder: Path, split: str) -> Path | None:
    """<folder>/<split>.jsonl, plain or compressed; None if there is none."""
    paths = (folder / f"{split}.jsonl{suffix}" for suffix in OPEN)
    return next((path for path in paths if path.is_file()), None)


def read(path: Path, complaints: Complaints) -> Iterator[tuple[str, Row]]:
    """('path:line', row) of every line that is not blank.

    Raises:
        UserError: the file cannot be read or unpacked.
        UnusableRow: a line is no JSON object, and complaints raise.
    """
    for place, row in rows(path):
        if isinstance(row, dict):
            yield place, row
        else:
            complaints.add(place, row)
