"""Passkey retrieval: a 5-digit key at some depth of a haystack, and the question for it at the end.

    ... filler ... The pass key is 48213 . Remember it . ... filler ... What is the pass key ?
    The pass key is 48213<|end|>

An example is a pure function of (seed, split, index, length). A training example's length is a
function of the step, so training resumes exactly. The loss is on the five digits and the stop
token. Each digit is one token, whatever the tokenizer.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from comet_pl.config.schema import PasskeyData
from comet_pl.errors import UserError, os_errors
from data.batches import (
    ALL,
    IGNORED,
    Batches,
    Shard,
    SteppedLoader,
    SteppedRows,
    length_at,
    nothing,
    validation_loader,
)
from data.encoding import encode, stream
from data.haystack import sentences
from data.tokenizer import stop_token

KEY_BEGIN, KEY_END = " The pass key is ", " . Remember it ."
QUESTION = " What is the pass key ? The pass key is "
DIGITS = 5
ANSWER = DIGITS + 1
"""Labelled tokens of an example: the digits and the stop token."""
SPLITS = {"train": 0, "validation": 1, "evaluation": 2}
KEY_TEXTS = 4096
PIECE = 100_000
"""Characters of a haystack file that are tokenised at once."""


def texts(data: PasskeyData) -> Iterator[str]:
    """What a tokenizer from scratch is trained on: the haystack, and keys with their questions."""
    yield from _haystack(data)
    for number in range(KEY_TEXTS):
        yield f"{KEY_BEGIN}{number * 7919 % 10**DIGITS:0{DIGITS}}{KEY_END}{QUESTION}"


def even_depths(count: int) -> list[float]:
    """Evenly spaced from 0 (the haystack's begin) to 1 (its end); a single one is the middle."""
    return np.linspace(0, 1, count).tolist() if count > 1 else [0.5]


class PasskeyExamples:
    """Examples of one split.

    Args:
        seed: 0 <= seed < 2**32.
        split: train, validation or evaluation; their random numbers are disjoint.

    Raises:
        UserError: the haystack cannot be read; the tokenizer lacks digits or a stop token.
    """

    def __init__(
        self, data: PasskeyData, tokenizer: PreTrainedTokenizerBase, seed: int, split: str
    ):
        self.data, self.stream = data, seed + (SPLITS[split] << 32)
        self.stop = stop_token(tokenizer)
        self.digits = np.array([_digit(tokenizer, digit) for digit in "0123456789"])
        self.key_begin, self.key_end, self.question = (
            np.array(encode(tokenizer, text)) for text in (KEY_BEGIN, KEY_END, QUESTION)
        )
        texts = _haystack(data)
        if data.haystack is None:
            pieces = [encode(tokenizer, text) for text in texts]
        else:
            pieces = list(stream(tokenizer, texts))
        self.filler = np.fromiter((token for piece in pieces for token in piece), dtype=np.int32)
        self.ends = np.cumsum([len(piece) for piece in pieces])  # of each sentence, in filler
        self.key_length = len(self.key_begin) + DIGITS + len(self.key_end)
        self.min_length = self.key_length + len(self.question) + ANSWER

    def check(self, lengths: Sequence[int], key: str, wrap: bool = False) -> None:
        """Refuses lengths without room for key and question, and unless `wrap`, lengths that the
        haystack file cannot fill.

        Args:
            key: of the configuration, for the message.

        Raises:
            UserError
        """
        if min(lengths) < self.min_length:
            raise UserError(
                f"{key}: {min(lengths)} given, allowed: >= {self.min_length} tokens "
                "(key, question and answer)"
            )
        needed, size = max(lengths) - self.min_length, len(self.filler)
        if self.data.haystack is None or needed <= size or (wrap and size):
            return
        raise UserError(
            f"data.haystack: {self.data.haystack} has {size} tokens, but {key} = {max(lengths)} "
            f"needs {needed} tokens of filler; give a longer file or a smaller length"
        )

    def repeats(self, length: int) -> bool:
        """Whether an example is longer than the haystack file, which then starts over."""
        return self.data.haystack is not None and length - self.min_length > len(self.filler)

    def row(self, index: int, length: int, depth: float | None = None) -> np.ndarray:
        """(length,) int64 ids of example `index`.

        Args:
            depth: of the key, from 0 (begin) to 1 (just before the question); None: uniformly
                random. In generated filler the key moves to the nearest end of a sentence.
        """
        key, counter = [self.stream, index], [0, 0, 0, length]
        random = np.random.Generator(np.random.Philox(key=key, counter=counter))
        digits = self.digits[random.integers(0, 10, DIGITS)]
        depth = random.random() if depth is None else depth
        fill = self._text if self.data.haystack else self._sentences
        filler, place = fill(random, length - self.min_length, depth)
        parts: list[Any] = [filler[:place], self.key_begin, digits, self.key_end, filler[place:]]
        parts += [self.question, digits, [self.stop]]
        return np.concatenate(parts, dtype=np.int64, casting="same_kind")

    def batch(self, indices: Sequence[int], length: int, depths: Sequence[float]) -> dict[str, Any]:
        """Examples of one length at given depths, for validation and evaluation."""
        pairs = zip(indices, depths, strict=True)
        rows = [self.row(index, length, depth) for index, depth in pairs]
        facts = {"length": length, "depth": list(depths), "logits_to_keep": ANSWER + 1}
        return {**collate(rows), **facts}

    def _sentences(
        self, random: np.random.Generator, size: int, depth: float
    ) -> tuple[np.ndarray, int]:
        """(size,) filler of random sentences, the last one cut, and the key's place."""
        sizes = np.diff(self.ends, prepend=0)
        chosen = random.integers(0, len(sizes), size // int(sizes.min()) + 1)
        ends = np.cumsum(sizes[chosen])
        count = int(np.searchsorted(ends, size)) + 1
        chosen, ends = chosen[:count], ends[:count]
        offsets = np.repeat(self.ends[chosen] - ends, sizes[chosen])
        filler = self.filler[(np.arange(ends[-1]) + offsets)[:size]]
        places = np.concatenate([[0], ends[:-1], [size]])
        return filler, int(places[np.abs(places - depth * size).argmin()])

    def _text(self, random: np.random.Generator, size: int, depth: float) -> tuple[np.ndarray, int]:
        """(size,) filler from a random place of the file, and the key's place.

        A file with fewer tokens starts over at its end.
        """
        start = int(random.integers(0, max(1, len(self.filler) - size + 1)))
        return self.filler.take(np.arange(start, start + size), mode="wrap"), round(depth * size)


class TrainingRows(SteppedRows):
    """Rows by index; each has the length of the step that reads it."""

    def __init__(self, examples: PasskeyExamples, rows_a_step: int, max_steps: int):
        super().__init__(rows_a_step, max_steps)
        self.examples = examples

    def __getitem__(self, index: int) -> np.ndarray:
        return self.examples.row(index, length_at(self.examples.data, self.step_of(index)))


class ValidationBatches:
    """Every (length, depth, example) once; a batch holds one length."""

    def __init__(self, examples: PasskeyExamples):
        data = examples.data
        self.examples, depths, size = examples, even_depths(data.val_depths), data.batch_size
        cells = [
            (example * len(depths) + number, depth)
            for example in range(data.val_examples)
            for number, depth in enumerate(depths)
        ]
        parts = [cells[start : start + size] for start in range(0, len(cells), size)]
        self.batches = [(length, part) for length in validation_lengths(data) for part in parts]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> dict[str, Any]:
        length, cells = self.batches[number]
        indices, depths = zip(*cells, strict=True)
        return self.examples.batch(indices, length, depths)

    def only(self, batches: list[dict[str, Any]]) -> dict[str, Any]:
        """The one batch; one without depths for a rank that has none left."""
        if batches:
            return batches[0]
        length = self.examples.data.train_length
        return {**nothing(), "length": length, "depth": [], "logits_to_keep": 1}


def validation_lengths(data: PasskeyData) -> list[int]:
    return data.val_lengths or [data.train_length]


def collate(rows: Sequence[np.ndarray]) -> dict[str, Tensor]:
    """Rows of one length -> input_ids, attention_mask, labels, each (B, length) int64."""
    input_ids = torch.from_numpy(np.stack(rows))
    labels = torch.full_like(input_ids, IGNORED)
    labels[:, -ANSWER:] = input_ids[:, -ANSWER:]
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}


class PasskeyBatches(Batches):
    """Training batches of data.batch_size * accumulate rows; validation on lengths x depths.

    Raises:
        UserError: lengths that are too short; a haystack that cannot be read or is too short.
    """

    texts = staticmethod(texts)

    @staticmethod
    def files(data: PasskeyData) -> dict[str, list[Path]]:
        return {} if data.haystack is None else {"train": [Path(data.haystack).expanduser()]}

    def __init__(
        self,
        data: PasskeyData,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        max_steps: int,
        accumulate: int = 1,
    ):
        self.data, self.tokenizer, self.max_steps = data, tokenizer, max_steps
        self.rows = data.batch_size * accumulate
        self.training = PasskeyExamples(data, tokenizer, seed, "train")
        self.validation = PasskeyExamples(data, tokenizer, seed, "validation")
        lengths = [length for start, length in data.length_schedule or [] if start < max_steps]
        key = "data.length_schedule" if lengths else "data.train_length"
        self.training.check(lengths or [data.train_length], key)
        key = "data.val_lengths" if data.val_lengths else "data.train_length"
        self.validation.check(validation_lengths(data), key)

    def train_loader(self, shard: Shard = ALL) -> SteppedLoader:
        rows = TrainingRows(self.training, self.rows * shard.world, self.max_steps)
        workers = self.data.num_workers
        return SteppedLoader(rows, self.rows, collate, num_workers=workers, shard=shard)

    def validation_loader(self, shard: Shard = ALL) -> DataLoader[Any]:
        batches = ValidationBatches(self.validation)
        return validation_loader(batches, 1, batches.only, shard)


def _digit(tokenizer: PreTrainedTokenizerBase, digit: str) -> int:
    token = tokenizer.convert_tokens_to_ids(digit)
    if not isinstance(token, int) or token == tokenizer.unk_token_id:
        raise UserError(
            f"backbone.path: its tokenizer has no token for the digit {digit}, "
            "which passkeys are written with"
        )
    return token


def _haystack(data: PasskeyData) -> list[str] | Iterator[str]:
    return sentences() if data.haystack is None else _pieces(Path(data.haystack))


def _pieces(path: Path) -> Iterator[str]:
    """A file's text in pieces of whole lines, small enough for a tokenizer's memory."""
    try:
        kind = path.expanduser()
        if kind.is_char_device() or kind.is_fifo():  # neither has an end
            raise UserError(f"data.haystack: {path} is no file; a text file is needed")
        with os_errors(f"data.haystack: {path} cannot be read"):
            text = path.expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        reason = f"{error.reason} at byte {error.start}"
        raise UserError(f"data.haystack: {path} is not a text file in UTF-8 ({reason})") from None
    start = 0
    while start < len(text):
        end = text.find("\n", start + PIECE) + 1 or len(text)
        yield text[start:end]
        start = end
