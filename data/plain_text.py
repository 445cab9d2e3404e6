"""Plain long texts, as books: language modelling, with loss on every token.

A document is tokenised as a whole, between the token that the tokenizer begins every text with and
its end-of-sequence token, and cut into consecutive rows of data.max_length tokens. Nothing is lost:
a row of one token would have nothing to predict, so it takes one of the row before.

A long document is tokenised in pieces, by several worker processes at once; cut joins them again.
Streamed rows of a document that goes on in the next window end at the window's end.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from comet_pl.config.schema import PlainTextData
from comet_pl.errors import UserError
from data.batches import Pair, say
from data.chat_template import text_start
from data.documents import Texts, not_read
from data.encoding import encode
from data.jsonl import Complaints, Row
from data.text.batches import TextBatches
from data.text.loader import Cached, Windows
from data.text.tokenized import Sample, Source, encoded, file_facts, usable
from data.tokenizer import TOKENIZER_CHARACTERS

PIECE = 1 << 18
"""Characters, some thirty rows of 2,048 tokens; pieces of longer rows are longer."""
TOO_SHORT = "no text, or a single token: left out"


def texts_of(data: PlainTextData, split: str) -> Texts:
    """Raises UserError: data.root is missing, or no file of texts, folder or dataset."""
    if data.root is None:
        raise UserError(
            "data.root: missing, give the texts: data.root=PATH (a .txt, .jsonl or .parquet file, "
            "or a folder of them), or a dataset of the hub"
        )
    return Texts(data.root, split, data.text_key, data.val_share)


def _sample(ids: np.ndarray, **notes: Any) -> Sample:
    return Sample(ids, np.ones(len(ids), dtype=bool), notes)


END = _sample(np.zeros(0, dtype=np.int32), last=True)


@dataclass
class PlainTextSource(Source):
    """Pieces of documents in tokens, and the rows that they are cut into."""

    data: PlainTextData
    tokenizer: PreTrainedTokenizerBase
    split: str

    def __post_init__(self) -> None:
        self.on_error, self.max_length = self.data.on_error, self.data.max_length
        self.texts, stop = texts_of(self.data, self.split), self.tokenizer.eos_token_id
        self.before, self.after = text_start(self.tokenizer), [] if stop is None else [stop]

    def rows(self, complaints: Complaints) -> Iterator[tuple[str, Row]]:
        return self.texts.rows(complaints, max(PIECE, 64 * self.max_length))

    def encode(self, row: Row) -> Sample:
        begins, ends = row["begins"], row["ends"]
        ids = encode(self.tokenizer, row["text"], begins)
        if ids or not begins:
            ids = self.before * begins + ids + self.after * ends
        remarks = [TOO_SHORT] * (begins and row["last"] and len(ids) < 2)
        return _sample(np.array(ids, dtype=np.int32), last=row["last"], remarks=remarks)

    def cut(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """Rows of data.max_length tokens; the last one of a document may be shorter."""
        size, left = self.max_length, END.ids
        for sample in chain(samples, [END]):
            left, last = np.concatenate([left, sample.ids]), sample.notes["last"]
            while len(left) >= size + 2 or (last and len(left) > 1):
                count = size - (len(left) == size + 1)
                yield _sample(left[:count])
                left = left[count:]
            left = left[: 0 if last else None]

    def key(self) -> dict[str, Any]:
        texts = self.texts
        split = [texts.split, texts.val_share] if texts.mixed else [texts.split]
        facts = {"text": texts.key, "split": split, "max_length": self.max_length}
        return {**facts, "files": file_facts(texts.paths) or texts.root}


class PlainTextBatches(TextBatches):
    """Validates on the first data.val_examples rows."""

    data: PlainTextData

    @staticmethod
    def files(data: PlainTextData) -> dict[str, list[Path]]:
        train, validation = (texts_of(data, split) for split in ("train", "validation"))
        return {"train": train.paths, "validation": [] if train.mixed else validation.paths}

    @staticmethod
    def texts(data: PlainTextData) -> Iterator[str]:
        """What a tokenizer from scratch is trained on: the first training documents."""
        left = TOKENIZER_CHARACTERS
        # reading the rows for training reports them
        for _, row in texts_of(data, "train").rows(Complaints("skip"), PIECE):
            yield row["text"]
            left -= len(row["text"])
            if left < 0:
                break

    def source(self, split: str) -> PlainTextSource:
        source = PlainTextSource(self.data, self.tokenizer, split)
        texts = source.texts
        if split == "train" and texts.hub is None and (left := not_read(texts.root)):
            say(f"{texts.root}: not read: {', '.join(left)}"[:400])
        if split == "train" and texts.mixed and texts.bound is None:
            share = f"the last {texts.val_share:.0%} of its characters are for validation"
            say(f"{texts.root}: a single document: {share}")
        return source

    def _windows(self, source: Source) -> Windows:
        windows = super()._windows(source)
        if isinstance(windows, Cached):
            lengths, size = windows.samples.lengths, self.layout.chunk_size
            short = f"shorter than a chunk: {(lengths < size).sum():,}"
            most = f"rows of up to {self.data.max_length:,}: {len(lengths):,}, {short}"
            say(f"train: {lengths.sum():,} tokens in {most}")
        return windows

    def asked(self) -> str:
        return " of two tokens or more"

    @cached_property
    def validation(self) -> list[Pair]:
        return validation_rows(self.source("validation"), self.data.val_examples)

    def validation_rows(self) -> list[Pair]:
        return self.validation


def validation_rows(source: PlainTextSource, count: int | None) -> list[Pair]:
    """The first `count` rows. Raises UserError: there are none."""
    complaints = Complaints(source.on_error)
    samples = source.cut(usable(encoded(source, complaints)))
    rows = [sample.pair() for sample in islice(samples, count)]
    for line in complaints.lines():
        say(f"{source.split}: {line}")
    if not rows:
        raise UserError(
            f"data.root: {source.texts.root} has no {source.split} rows of two tokens or more; "
            f"data.val_share is {source.texts.val_share:g}"
        )
    return rows
