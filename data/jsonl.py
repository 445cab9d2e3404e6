"""Rows of jsonl files, plain or compressed, one at a time; complaints name file and line."""

import gzip
import io
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import zstandard

from comet_pl.errors import UserError, first_line, os_errors


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
            # a little at a time: a few bytes may unpack to a hundred thousand
            data = data or self.file.read(1 << 11)
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
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)
LONGEST_LINE = 1 << 28
"""Bytes; a row is held in memory."""
TOO_LONG = f"a line of more than {LONGEST_LINE:,} bytes"
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
            for number, line in enumerate(lines(file), 1):
                if line is None:
                    yield f"{path}:{number}", TOO_LONG
                elif line.strip():
                    yield f"{path}:{number}", _parse(line)
    except UNREADABLE as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: cannot be read after line {number}: {reason}") from None


def lines(file: IO[bytes]) -> Iterator[bytes | None]:
    """Lines with their ends; None for one of more than LONGEST_LINE bytes, which is passed over."""
    while line := file.readline(LONGEST_LINE + 1):
        if len(line) <= LONGEST_LINE:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(1 << 20)
        yield None


class DoubleKey(ValueError):
    """An object that has a key twice: which value is meant?"""


def loads(text: str | bytes) -> Any:
    """json.loads.

    Raises:
        DoubleKey, ValueError, RecursionError
    """
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        name = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise DoubleKey(f"the key {name!r:.60} twice in one object")
    return made


def _parse(line: bytes) -> Row | str:
    """The object, or what is wrong."""
    try:
        row = loads(line)
    except UnicodeDecodeError as error:
        return f"not UTF-8 ({error.reason} at byte {error.start})"
    except DoubleKey as error:
        return str(error)
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
        # what was left out of usable rows: the number of rows
        self.remarks = Counter[str]()

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

    def lines(self) -> list[str]:
        """The summary, and a line for each remark."""
        return [*filter(None, [self.summary()]), *self.remark_lines()]

    def remark_lines(self) -> list[str]:
        return [
            f"{remark}: {count} row{'s' * (count > 1)}" for remark, count in self.remarks.items()
        ]


def is_unicode(text: str) -> bool:
    """JSON can spell halves of characters, which can be neither tokenised nor written."""
    return text.isascii() or text == text.encode(errors="ignore").decode()


def find(folder: Path, split: str) -> Path | None:
    """<folder>/<split>.jsonl, plain or compressed; None if there is none.

    Raises:
        UserError: there are several.
    """
    paths = [folder / f"{split}.jsonl{suffix}" for suffix in OPEN]
    found = [path for path in paths if path.is_file()]
    check_distinct(found)
    return found[0] if found else None


def check_distinct(paths: Sequence[Path]) -> None:
    """Raises UserError if two files differ in their endings alone, as a.csv and a.jsonl.gz do."""
    known: dict[Path, Path] = {}
    for path in paths:
        unpacked = path.with_suffix("") if path.suffix in OPEN else path
        first = known.setdefault(unpacked.with_suffix(""), path)
        if first is not path:
            raise UserError(
                f"{path.parent}: holds {first.name} and {path.name}, of which one can be meant; "
                "take the other away"
            )


def check_content(path: Path, complaints: Complaints) -> None:
    """Adds a complaint about an empty file.

    Raises:
        UserError: the file cannot be read.
        UnusableRow: it is empty, and complaints raise.
    """
    with os_errors(f"{path}: cannot be read"):
        size = path.stat().st_size
    if not size:
        complaints.add(str(path), "an empty file")


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


@contextmanager
def hub_errors(line: str) -> Iterator[None]:
    """Turns whatever goes wrong in reading from the hub into the UserError `line`: reason."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of a dozen libraries: no network, no such file, a malformed row
        raise UserError(f"{line}: {first_line(error)}") from None
