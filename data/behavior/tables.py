"""Rows of a table in a jsonl, csv or parquet file, one at a time."""

import csv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from comet_pl.errors import UserError, first_line, nearest
from data.jsonl import OPEN, TOO_LONG, UNREADABLE, Complaints, Row, read
from data.jsonl import lines as file_lines

PACKED = (".jsonl", ".csv")  # may be compressed; parquet files are inside
ENDINGS = ", ".join([f"*{kind}[.xz|.gz|.zst]" for kind in PACKED] + ["*.parquet"])


def kind_of(path: Path) -> str:
    """.jsonl, .csv or .parquet; '' for other files."""
    suffix = Path(path.stem).suffix if path.suffix in OPEN else path.suffix
    return suffix if suffix in PACKED or path.suffix == ".parquet" else ""


def rows(path: Path, complaints: Complaints) -> Iterator[tuple[str, Row]]:
    """('path:number', row); the number of the row's first line, or of the row in a parquet file.

    Raises:
        UserError: the file cannot be read or unpacked; a quote in a csv file is never closed; two
            columns have one name.
        UnusableRow: a line is no row, and complaints raise.
    """
    kind = kind_of(path)
    if kind == ".jsonl":
        return read(path, complaints)
    return _csv(path, complaints) if kind == ".csv" else parquet(path)


def _csv(path: Path, complaints: Complaints) -> Iterator[tuple[str, Row]]:
    number = 0

    def lines() -> Iterator[str]:
        nonlocal number
        with OPEN[path.suffix if path.suffix in OPEN else ""](path) as file:
            for number, line in enumerate(file_lines(file), 1):
                if line is None:
                    complaints.add(f"{path}:{number}", TOO_LONG)
                    continue
                try:
                    yield line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    reason = f"not UTF-8 ({error.reason} at byte {error.start})"
                    complaints.add(f"{path}:{number}", reason)

    with _readable(path, lambda: number):
        reader = csv.DictReader(lines(), strict=True)
        _check_header(path, reader.fieldnames or [])
        while True:
            place, before = f"{path}:{number + 1}", number
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if "end of data" in str(error):  # raised whatever on_error says: this is no row
                    raise UserError(
                        f"{place}: a quote is never closed, "
                        f"the {number - before} lines from here on are one field"
                    ) from None
                complaints.add(place, str(error))
                continue
            if None in row:
                columns = len(row) - 1
                count = columns + len(row[None])
                complaints.add(place, f"{count} fields, but the header has {columns}")
            else:
                yield place, row


def parquet(path: Path, column: str | None = None) -> Iterator[tuple[str, Row]]:
    """As rows.

    Args:
        column: the only one to read, of long texts; None: all.

    Raises:
        UserError: there is no such column.
    """
    import pyarrow
    import pyarrow.parquet

    number = 0
    broken: tuple[Any, ...] = (pyarrow.ArrowException, ArithmeticError, LookupError, TypeError)
    with _readable(path, lambda: number, broken), pyarrow.parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        _check_header(path, names)
        if column not in (None, *names):
            there = f"{nearest(str(column), names)}; it has: {', '.join(names):.200}"
            raise UserError(f"{path}: no column {column!r}{there}")
        columns = None if column is None else [column]
        for batch in file.iter_batches(batch_size=64 if columns else 4096, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", row


def _check_header(path: Path, names: Sequence[str]) -> None:
    """Raises UserError for a column's name that is there twice, whatever on_error says."""
    for number, name in enumerate(names):
        if name and name in names[:number]:
            raise UserError(f"{path}: the header has two columns {name!r:.60}; rename one of them")


@contextmanager
def _readable(
    path: Path, number: Callable[[], int], broken: tuple[Any, ...] = ()
) -> Iterator[None]:
    """Errors of the kinds `broken`, and of those that any file may have, become a UserError."""
    try:
        yield
    except UserError:
        raise
    except (*UNREADABLE, *broken, csv.Error, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path}: cannot be read after line {number()}: {reason}") from None
