"""SCROLLS: questions over long documents, and summaries of them, as prompt and answer.

An example (data/scrolls_rows.py has the rows) is

    before | question, blank line | document | after | answer, stop token

where before and after are the tokenizer's chat template. The loss is on the answer and its stop
token. Over data.max_length the document loses its left part, never the question or the answer.
Several rows of one id are further references of one question: each is a row in training, and
evaluation accepts all of them.
"""

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from comet_pl.config.schema import ScrollsData
from comet_pl.errors import UserError
from data.batches import IGNORED, Pair, say
from data.chat_template import answer_start, frame
from data.encoding import begins_after, encode, stream
from data.jsonl import Complaints, Row, UnusableRow, find
from data.scrolls_rows import files, options, rows, split_input, tasks
from data.text.batches import TextBatches
from data.text.loader import MOST_ROWS
from data.text.tokenized import Sample, Source, file_facts
from data.tokenizer import TOKENIZER_CHARACTERS, stop_token

WITHOUT_DOCUMENT = "no blank line behind the question, so no document"


def texts(data: ScrollsData) -> Iterator[str]:
    """What a tokenizer from scratch is trained on: all training rows, each document once."""
    complaints = Complaints("skip")  # reading the rows for training reports them
    for task, path in (found := files(data, "train")).items():
        seen: set[bytes] = set()
        left = TOKENIZER_CHARACTERS // len(found)
        for _, row in rows(task, "train", path, complaints):
            question, document = split_input(task, row)
            new = _digest(document) not in seen
            seen.add(_digest(document))
            text = f"{question}{document if new else ''}\n{row['output']}"
            yield text[:TOKENIZER_CHARACTERS]
            left -= len(text)
            if left < 0:
                break


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


class Frame:
    """Around a document: before | question, blank line | document | after | answer, stop token.

    Raises:
        UserError: the tokenizer has no stop token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int):
        self.tokenizer, self.max_length, self.stop = tokenizer, max_length, stop_token(tokenizer)
        self.before, self.after = (np.array(ids, dtype=np.int32) for ids in frame(tokenizer))
        self.begins = begins_after(tokenizer, self.before)
        self.answer_begins, self.start = (
            begins_after(tokenizer, self.after),
            answer_start(tokenizer),
        )

    def question(self, text: str) -> np.ndarray:
        return np.array(encode(self.tokenizer, text, self.begins), dtype=np.int32)

    def document(self, text: str, question: np.ndarray) -> tuple[np.ndarray, int]:
        """(its last max_length tokens, its number of tokens) behind a question."""
        parts, count, held = deque[np.ndarray](), 0, 0
        for ids in stream(self.tokenizer, [text], self.begins and not len(question)):
            parts.append(np.array(ids, dtype=np.int32))
            count, held = count + len(ids), held + len(ids)
            while held - len(parts[0]) >= self.max_length:
                held -= len(parts.popleft())
        whole = np.concatenate([np.zeros(0, dtype=np.int32), *parts])
        return whole[-self.max_length :].copy(), count

    def answer(self, text: str) -> np.ndarray:
        ids = encode(self.tokenizer, self.start + text.strip(), self.answer_begins)
        return np.array([*ids, self.stop], dtype=np.int32)

    def room(self, question: np.ndarray, answer: Sequence[int] | np.ndarray = ()) -> int:
        """Tokens that a document may have."""
        return self.max_length - len(self.before) - len(question) - len(self.after) - len(answer)

    def prompt(self, question: np.ndarray, document: np.ndarray, room: int) -> np.ndarray:
        """The ids before the answer, with the document's last `room` tokens."""
        shown = document[max(0, len(document) - room) :]
        return np.concatenate([self.before, question, shown, self.after])

    def too_long(self, room: int) -> tuple[str, str]:
        """(fault, remedy) of a row that leaves a document less than no room."""
        needed, limit = self.max_length - room, f"data.max_length is {self.max_length}"
        reason = f"question and answer alone have {needed} tokens, {limit}"
        return reason, f"data.max_length={needed} makes room for those of this row"


@dataclass(frozen=True)
class Example:
    """A row in tokens."""

    task: str
    id: str
    document: int  # number of its document in Corpus.documents
    question: np.ndarray
    answer: np.ndarray  # with the stop token
    references: list[str]  # none in the test split, which keeps them secret
    options: list[str]  # that the answer is one of; none: it is free text


@dataclass
class Corpus:
    """The questions of a split in tokens, for evaluation.

    Each distinct document is kept once, without the part that no example can show.

    Raises:
        UserError: a file cannot be read; a malformed row, with on_error=raise.
    """

    data: ScrollsData
    tokenizer: PreTrainedTokenizerBase
    split: str
    examples: list[Example] = field(default_factory=list)
    documents: list[np.ndarray] = field(default_factory=list)
    cut: int = 0  # examples whose document loses its left part

    def __post_init__(self) -> None:
        data, complaints = self.data, Complaints(self.data.on_error)
        self.frame = Frame(self.tokenizer, data.max_length)
        # digest of a document -> its number, its tokens before the cut
        self._places: dict[bytes, tuple[int, int]] = {}
        # (task, id) -> digest of the input, place: rows of one id have one input
        self._inputs: dict[tuple[str, str], tuple[bytes, str]] = {}
        found = files(data, self.split)
        for task in tasks(data):
            count = len(self.examples)
            unread = rows(task, self.split, found[task], complaints) if task in found else ()
            for place, row in unread:
                self._add(task, place, row, complaints)
            if len(self.examples) == count:
                say(f"{task}: no {self.split} rows")
        if self.cut:
            say(
                f"{self.split}: {self.cut} of {len(self.examples)} documents cut on the left, "
                f"over data.max_length = {data.max_length} tokens"
            )
        for line in complaints.lines():
            say(f"{self.split}: {line}")

    def _add(self, task: str, place: str, row: Row, complaints: Complaints) -> None:
        (question, document), whole = split_input(task, row), _digest(row["input"])
        first, at = self._inputs.setdefault((task, row["id"]), (whole, place))
        if first != whole:
            reason = f"id: {row['id']!r:.40} again with another input, first at {at}"
            return complaints.add(place, reason)
        output = row.get("output") or ""
        ids, answer = self.frame.question(question), self.frame.answer(output)
        room = self.frame.room(ids, answer)
        if room < 0:
            return complaints.add(place, *self.frame.too_long(room))
        complaints.remarks.update([WITHOUT_DOCUMENT] * (not document.strip()))
        digest = _digest(document)
        if digest not in self._places:
            tokens, count = self.frame.document(document, ids)
            self._places[digest] = len(self.documents), count
            self.documents.append(tokens)
        number, size = self._places[digest]
        self.cut += size > room
        texts = [output] * bool(output), options(task, question)
        self.examples.append(Example(task, row["id"], number, ids, answer, *texts))

    def prompt(self, example: Example, room: int | None = None) -> np.ndarray:
        """(n,) ids up to the answer.

        Args:
            room: most tokens of the document; None: as data.max_length allows without an answer.
        """
        room = self.frame.room(example.question) if room is None else room
        return self.frame.prompt(example.question, self.documents[example.document], room)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Pair:
        return self.row(self.examples[index])

    def row(self, example: Example) -> Pair:
        """(ids, labels), n <= data.max_length."""
        prompt = self.prompt(example, self.frame.room(example.question, example.answer))
        ids = np.concatenate([prompt, example.answer]).astype(np.int64)
        labels = ids.copy()
        labels[: len(prompt)] = IGNORED
        return ids, labels

    def questions(self, task: str, count: int | None = None) -> list[Example]:
        """Each question once, with all its references.

        Args:
            count: at most so many, evenly spaced over the task; None: all.
        """
        merged: dict[str, list[Example]] = {}
        for example in self.examples:
            if example.task == task:
                merged.setdefault(example.id, []).append(example)
        asked = [
            replace(same[0], references=[text for example in same for text in example.references])
            for same in merged.values()
        ]
        count = len(asked) if count is None else min(count, len(asked))
        return [asked[place] for place in np.linspace(0, len(asked) - 1, count).round().astype(int)]


@dataclass
class ScrollsSource(Source):
    """Training samples of a split, the tasks in turn: loss on the answer and its stop token."""

    data: ScrollsData
    tokenizer: PreTrainedTokenizerBase
    split: str

    def __post_init__(self) -> None:
        self.on_error = self.data.on_error
        # of now: a file that vanishes later is missed
        self.files = files(self.data, self.split)
        self.frame = Frame(self.tokenizer, self.data.max_length)

    def rows(self, complaints: Complaints) -> Iterator[tuple[str, Row]]:
        streams = {
            task: rows(task, self.split, path, complaints) for task, path in self.files.items()
        }
        while streams:
            for task, unread in list(streams.items()):
                if (item := next(unread, None)) is None:
                    del streams[task]
                else:
                    yield item[0], {**item[1], "task": task}

    def encode(self, row: Row) -> Sample:
        question, document = split_input(row["task"], row)
        asked, answer = self.frame.question(question), self.frame.answer(row["output"])
        room = self.frame.room(asked, answer)
        if room < 0:
            raise UnusableRow(*self.frame.too_long(room))
        text, count = self.frame.document(document, asked)
        ids = np.concatenate([self.frame.prompt(asked, text, room), answer])
        learned = np.arange(len(ids)) >= len(ids) - len(answer)
        notes = {"id": row["id"], "cut": count > room}
        notes |= {} if document.strip() else {"remarks": [WITHOUT_DOCUMENT]}
        return Sample(ids, learned, notes, group=row["task"])

    def key(self) -> dict[str, Any]:
        paths = [path for path in self.files.values() if path]
        facts = {"kind": "scrolls", "tasks": list(self.files), "split": self.split}
        limit = {"max_length": self.data.max_length, "files": file_facts(paths) or "hub"}
        return facts | limit


class ScrollsBatches(TextBatches):
    """Validates on data.val_examples questions a task, with the first reference of each."""

    data: ScrollsData
    texts = staticmethod(texts)

    @staticmethod
    def files(data: ScrollsData) -> dict[str, list[Path]]:
        if data.root is None:  # the hub's, which do not change
            return {}
        root = Path(data.root).expanduser()
        return {
            f"{split} {task}": [path] if (path := find(root / task, split)) else []
            for task in tasks(data)
            for split in ("train", "validation")
        }

    def source(self, split: str) -> ScrollsSource:
        source = ScrollsSource(self.data, self.tokenizer, split)
        for task in set(tasks(self.data)) - {*source.files}:
            say(f"{task}: no {split} rows")
        return source

    def weights(self) -> dict[str, float] | None:
        weights = self.data.weights
        if weights is None:
            return None
        names = tasks(self.data)
        if not any(weights):
            raise UserError(
                "data.weights: all 0 given, nothing would be trained on; "
                "allowed: numbers >= 0, one of them above 0"
            )
        if not max(weights) <= MOST_ROWS:
            raise UserError(
                f"data.weights: {max(weights):g} given, allowed: numbers from 0 to {MOST_ROWS:,}"
            )
        if len(weights) != len(names):
            raise UserError(
                f"data.weights: {len(weights)} given, one for each of {', '.join(names)} is needed"
            )
        return dict(zip(names, weights, strict=True))

    def asked(self) -> str:
        return f" for {', '.join(tasks(self.data))}"

    @cached_property
    def validation(self) -> Corpus:
        return Corpus(self.data, self.tokenizer, "validation")

    def validation_rows(self) -> list[Pair]:
        count, corpus = self.data.val_examples, self.validation
        if not len(corpus):
            raise UserError(
                f"data.root: {self.data.root} has no validation rows{self.asked()}, "
                "and training needs some"
            )
        names = tasks(self.data)
        return [corpus.row(asked) for task in names for asked in corpus.questions(task, count)]
