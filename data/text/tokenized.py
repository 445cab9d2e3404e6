"""Samples in tokens: cached in a memory-mapped Arrow file, or streamed when they are needed.

A source gives rows and turns a row into a sample. Both ways hold a few rows in memory, for a corpus
of any size. Worker processes encode; the rows keep their order.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from comet_pl.errors import UserError, os_errors
from comet_pl.files import replacing
from comet_pl.progress import Bar
from data.batches import IGNORED, Pair, say
from data.jsonl import Complaints, Row, UnusableRow
from data.workers import received, start_worker

VERSION = 4  # of the written format; caches of another version are not found
FLUSH = 64  # samples held before they are written


@dataclass(frozen=True)
class Sample:
    """A document, or a conversation, in tokens."""

    ids: np.ndarray  # (n,) int32
    learned: np.ndarray  # (n,) bool: the tokens with loss
    # JSON-able facts for evaluation; cut: True if the text lost a part; remarks: see Complaints
    notes: dict[str, Any]
    group: str = ""  # of a mixture, such as the task

    def __len__(self) -> int:
        return len(self.ids)

    def pair(self) -> Pair:
        labels = np.where(self.learned, self.ids, IGNORED).astype(np.int64)
        return self.ids.astype(np.int64), labels


class Source(Protocol):
    """Where rows come from, and how they become samples; it is sent to worker processes."""

    tokenizer: PreTrainedTokenizerBase
    on_error: str

    def rows(self, complaints: Complaints) -> Iterator[tuple[str, Row]]:
        """(place, row) in order; place names file and line."""
        ...

    def encode(self, row: Row) -> Sample:
        """Raises UnusableRow(reason), or UnusableRow(reason, remedy)."""
        ...

    def cut(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """What is learnt from: the samples of consecutive rows, or pieces of them."""
        yield from samples

    def key(self) -> dict[str, Any]:
        """JSON-able: what the samples depend on, apart from the tokenizer."""
        ...


class _Encoded(IterableDataset[Any]):
    """Samples of a source in the order of its rows.

    Worker k of W encodes rows k, k + W, ...; the loader takes from them in turn. An unusable row
    comes out as (place, reason[, remedy]), so that the main process raises or counts it.
    """

    def __init__(self, source: Source, start: int):
        self.source, self.start = source, start

    def __iter__(self) -> Iterator[Sample | tuple[str, ...]]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        complaints = _Listed()
        rows = complaints.merged(self.source.rows(complaints))
        for place, row in islice(rows, self.start + first, None, step):
            if isinstance(row, str):
                yield place, row
                continue
            try:
                yield self.source.encode(row)
            except UnusableRow as error:
                yield place, *error.args


class _Listed(Complaints):
    """Complaints that take their turn among the rows, so that every worker counts rows alike."""

    def __init__(self) -> None:
        super().__init__("skip")
        self.waiting: list[tuple[str, str]] = []

    def add(self, place: str, reason: str, remedy: str = "") -> None:
        self.waiting.append((place, reason))

    def merged(self, rows: Iterator[tuple[str, Row]]) -> Iterator[tuple[str, Row | str]]:
        for place, row in rows:
            yield from self._take()
            yield place, row
        yield from self._take()

    def _take(self) -> list[tuple[str, str]]:
        taken, self.waiting = self.waiting, []
        return taken


def encoded(
    source: Source, complaints: Complaints, workers: int = 0, start: int = 0
) -> Iterator[Sample | None]:
    """A sample for each row, in order, from row `start` on; None for an unusable one.

    Raises:
        UserError: a file cannot be read; an unusable row, if complaints raise.
    """
    loader = DataLoader(
        _Encoded(source, start),
        batch_size=None,  # otherwise the default conversion turns samples into tensors
        num_workers=workers,
        worker_init_fn=start_worker,
        generator=torch.Generator().manual_seed(0),
    )
    for sample in received(loader):
        if isinstance(sample, Sample):
            complaints.remarks.update(sample.notes.get("remarks", ()))
            yield sample
        else:
            complaints.add(*sample)
            yield None


def usable(samples: Iterable[Sample | None]) -> Iterator[Sample]:
    return (sample for sample in samples if sample is not None)


class CachedSamples:
    """Samples by number, out of an Arrow file that stays on disk."""

    def __init__(self, file: Path):
        import datasets
        import pyarrow.compute

        self.file, self.size = file, file.stat().st_size
        self.table = datasets.Dataset.from_file(str(file)).with_format("numpy")
        # (rows,) tokens of each sample, and the names of their groups
        self.lengths = pyarrow.compute.list_value_length(self.table.data["ids"]).to_numpy()
        self.groups = self.table.data["group"].to_numpy()

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, number: int) -> Sample:
        with suppress(FileNotFoundError):  # the mapping keeps what is removed, not what is cut off
            if self.file.stat().st_size < self.size:
                raise UserError(f"data.cache: {self.file} has been cut; resume=true makes it anew")
        row = self.table[int(number)]
        notes = json.loads(str(row["notes"]))
        return Sample(row["ids"].astype(np.int32), row["learned"], notes, str(row["group"]))


def cached(source: Source, folder: Path, name: str, workers: int = 0) -> CachedSamples:
    """The samples of a source, tokenised now or earlier with equal tokenizer, files and options.

    A cache that is damaged is made anew.

    Args:
        folder: of all caches.
        name: for the progress bar and the messages, such as "train".

    Raises:
        UserError: a file cannot be read; an unusable row, with on_error=raise; the cache cannot be
            written.
    """
    place = folder / _digest(source)
    file, report = place / f"{name}.arrow", place / f"{name}.json"
    made = _report(file, report)
    if isinstance(made, str):
        if made:
            say(f"data.cache: {file} is damaged and made anew: {made}")
        _write(source, file, report, name, workers)
        made = _report(file, report)
    if isinstance(made, str):
        raise UserError(f"data.cache: {file} cannot be read back: {made or 'it is gone'}")
    for line in made:
        say(f"{name}: {line}")
    return CachedSamples(file)


def _report(file: Path, report: Path) -> list[str] | str:
    """A cache's lines about its rows; a text says what is damaged, or '': there is no cache."""
    with os_errors(f"data.cache: {file} cannot be read"):
        if not (file.exists() and report.exists()):
            return ""
    try:
        content = json.loads(report.read_text())
        lines, checksum = content["lines"], content["crc32"]
        if not all(isinstance(line, str) for line in lines):
            raise TypeError
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return f"{report.name} is not what was written"
    with os_errors(f"data.cache: {file} cannot be read"):
        return lines if _checksum(file, lines) == checksum else "its content has changed"


def _checksum(file: Path, lines: list[str]) -> int:
    value = zlib.crc32(json.dumps(lines).encode())
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def _sync(path: Path) -> None:
    """Waits until a file is on the disk."""
    with path.open("rb") as content:
        os.fsync(content.fileno())


def _write(source: Source, file: Path, report: Path, name: str, workers: int) -> None:
    from datasets import Features, Sequence, Value
    from datasets.arrow_writer import ArrowWriter

    complaints, cut, count = Complaints(source.on_error), 0, 0
    kinds = {
        "ids": Sequence(Value("int32")),
        "learned": Sequence(Value("bool")),
        "notes": Value("string"),
        "group": Value("string"),
    }
    with os_errors(f"data.cache: {file.parent} cannot be written"):
        with replacing(file) as beside:
            options = {"features": Features(kinds), "writer_batch_size": FLUSH}
            with ArrowWriter(path=str(beside), **options) as writer, Bar(None) as bar:
                bar.name(f"tokenises {name}")
                samples = usable(encoded(source, complaints, workers))
                for sample in source.cut(samples):
                    writer.write({**vars(sample), "notes": json.dumps(sample.notes)})
                    bar.add(len(sample))
                    count, cut = count + 1, cut + bool(sample.notes.get("cut"))
                writer.finalize()
            _sync(beside)
            lines = [f"{cut} of {count} texts cut, over data.max_length"] if cut else []
            lines += complaints.lines()
            content = {"lines": lines, "crc32": _checksum(beside, lines)}
        with replacing(report) as beside:
            beside.write_text(json.dumps(content))
            _sync(beside)


def _digest(source: Source) -> str:
    tokenizer: Any = source.tokenizer
    words = tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template
    facts = [VERSION, source.on_error, *words, source.key()]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def file_facts(paths: Sequence[Path]) -> list[list[Any]]:
    """For `Source.key`: a file that changes has other samples."""
    return [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
