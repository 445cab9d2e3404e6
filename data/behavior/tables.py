"""Rows of a table in a jsonl, csv or parquet file, one at a time."""

import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from comet_pl.errors import UserError, first_line
from data.jsonl import OPEN, UNREADABLE, Complaints, Row, read

PACKED = (".jsonl", ".csv")  # may be compressed; parquet files are inside
ENDINGS = ", ".join([f"*{kind}[.xz|.gz|.zst]" for kind in PACKED] + ["*.parquet"])


def kind_of(path: Path) -> str:
    """.jsonl, .csv or .parquet; '' for other files."""
    suffix = Path(path.stem).suffix if path.suffix in OPEN else path.suffix
    return suffix if suffix in PACKED or path.suffix == ".parquet" else ""


def rows(path: Path, complaints: Complaints) -> Iterator[tuple[str, Row]]:
    """('path:number', row); the number of the row's first line, or of the row in a parquet file.

    Raises:
        UserError: the file cannot be read or unpacked; a quote in a csv file is never closed.
        UnusableRow: a line is no row, and complaints raise.
    """
    kind = kind_of(path)
    if kind == ".jsonl":
        return read(path, complaints)
    return _csv(path, complaints) if kind == ".csv" else _parquet(path)


def _csv(path: Path, complaints: Complaints) -> Iterator[tuple[str, Row]]:
    number = 0

    def lines() -> Iterator[str]:
        nonlocal number
        with OPEN[path.suffix if path.suffix in OPEN else ""](path) as file:
            for number, line in enumerate(file, 1):
                try:
                    yield line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    reason = f"not UTF-8 ({error.reason} at byte {error.start})"
                    complaints.add(f"{path}:{number}", reason)

    with _readable(path, lambda: number):
        reader = csv.DictReader(lines(), strict=True)
        _ = reader.fieldnames  # reads the header
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
    except (*UNREADABLE, csv.Error, ValueError) as error:  # Arrow's are ValueErrors
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path}: cannot be read after line {number()}: {reason}") from None
