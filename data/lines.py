"""The lines of a jsonl file, plain or compressed, one at a time."""

from __future__ import annotations

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
    """Unpacks a .zst file of one or more frames; unlike zstandard.open it notices a file that was cut off."""

    def __init__(self, path: Path):
        self.file, self.ready = path.open("rb"), memoryview(b"")
        self.frame: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.ready:
            ended = self.frame is None or self.frame.eof
            data = (self.frame.unused_data if self.frame and ended else b"") or self.file.read(
                1 << 14
            )
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


Open = Callable[[Path], IO[bytes]]
OPEN: dict[str, Open] = {
    "": lambda path: path.open("rb"),
    ".xz": lambda path: io.BufferedReader(lzma.LZMAFile(path)),
    ".gz": lambda path: io.BufferedReader(gzip.GzipFile(path)),  # type: ignore[arg-type]
    ".zst": lambda path: io.BufferedReader(_Zstd(path)),
}
Row = dict[str, Any]


def rows(path: Path) -> Iterator[tuple[str, Row | str]]:
    """('path:line', row) of every line that is not blank; instead of a row, what is wrong with the line.

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
    except (OSError, EOFError, lzma.LZMAError, zstandard.ZstdError) as error:
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
    return (
        row
        if isinstance(row, dict)
        else f"a JSON object is needed, but this is a {type(row).__name__}"
    )
