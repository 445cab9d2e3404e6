"""Rows of a table in a jsonl, csv or parquet file, one at a time."""

from __future__ import annotations

import csv
import lzma
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import zstandard

from comet_pl.errors import UserError
from data.jsonl import OPEN, Complaints, Row, read

PACKED = (".jsonl", ".csv")  # may be compressed; parquet files are inside
ENDINGS = ", ".join([f"*{kind}[.xz|.gz|.zst]" for kind in PACKED] + ["*.parquet"])


def kind_of(path: Path) -> str:
    """.jsonl, .csv or .parquet; '' for other files."""
    suffix = Path(path.stem).suffix if path.suffix in OPEN else path.suffix
    return suffix if suffix in PACKED or path.suffix == ".parquet" else ""


def rows(path: Path, complaints: Complaints) -> Iterator[tuple[str, Row]]:
    """('path:number', row); the number is that of the row's first line, or of the row in a parquet file.

    Raises:
        UserError: the file cannot be read or unpacked; a quote in a csv file is never closed.
        UnusableRow: a line is no row, and complaints raise.
    """
    kind = kind_of(path)
    return (
        read(path, complaints)
        if kind == ".jsonl"
        else _csv(path, complaints)
        if kind == ".csv"
        else _parquet(path)
    )


def _csv(path: Path, complaints: Complaints) -> Iterator[tuple[str, Row]]:
    line_number = 0

    def lines() -> Iterator[str]:
        nonlocal line_number
        with OPEN[path.suffix if path.suffix in OPEN else ""](path) as file:
            for line_number, line in enumerate(file, 1):
                try:
                    yield line.decode("utf-8-sig" if line_number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    complaints.add(
                        f"{path}:{line_number}", f"not UTF-8 ({error.reason} at byte {error.start})"
                    )

    with _readable(path, lambda: line_number):
        reader = csv.DictReader(lines(), strict=True)
        _ = reader.fieldnames  # reads the header
        while True:
            place, before = f"{path}:{line_number + 1}", line_number
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if "end of data" in str(
                    error
                ):  # however bad rows are treated: these are not one row
                    raise UserError(
                        f"{place}: a quote is never closed, the {line_number - before} lines from here on are one field"
                    ) from None
                complaints.add(place, str(error))
                continue
            if None in row:
                complaints.add(
                    place,
                    f"{len(row) - 1 + len(row[None])} fields, but the header has {len(row) - 1}",
                )
            else:
                yield place, row


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow.parquet

    number = 0
    with _readable(path, lambda: number), pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=4096):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", row


@contextmanager
def _readable(path: Path, number: Callable[[], int]) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (
        OSError,
        EOFError,
        lzma.LZMAError,
        zstandard.ZstdError,
        csv.Error,
        ValueError,
    ) as error:  # Arrow's are ValueErrors
        reason = (
            getattr(error, "strerror", None)
            or (str(error).splitlines() or [type(error).__name__])[0]
        )
        raise UserError(f"{path}: cannot be read after line {number()}: {reason}") from None
