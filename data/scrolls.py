"""SCROLLS: questions over long documents, and summaries of them, as prompt and answer.

Rows {"id", "pid", "input", "output"} from <root>/<task>/<split>.jsonl[.xz|.gz|.zst], or from the hub. The input is the question, a blank
line and the document (gov_report and summ_screen_fd: the document alone). An example is

    before | question, blank line | document | after | answer, stop token

where before and after are the tokenizer's chat template. The loss is on the answer and its stop token. Over data.max_length the document
loses its left part, never the question or the answer. Several rows of one id are further references of one question: each is a row in
training, and all of them count as right in evaluation.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from comet_pl.config.schema import ScrollsData
from comet_pl.errors import UserError, nearest
from data.batches import IGNORED, say
from data.chat_template import encode, frame
from data.jsonl import Complaints, Row, UnusableRow, find, is_unicode, read
from data.text.datamodule import TextDataModule
from data.text.tokenized import Sample, file_facts
from data.tokenizer import stop_token

MAX_NEW_TOKENS = {
    "gov_report": 1024,
    "summ_screen_fd": 512,
    "qmsum": 512,
    "qasper": 128,
    "narrative_qa": 64,
    "quality": 128,
    "contract_nli": 16,
    "squality": 512,
}
TASKS = list(MAX_NEW_TOKENS)
SCROLLS = [task for task in TASKS if task != "squality"]
"""The tasks of the benchmark and of its submission; squality is ZeroSCROLLS'."""
HUB = "hf://datasets/tau/scrolls/{task}.zip"
WITHOUT_QUESTION = ("gov_report", "summ_screen_fd")
TOKENIZER_CHARACTERS = (
    20_000_000  # a from-scratch tokenizer learns no more from more text, but takes longer
)


def tasks(data: ScrollsData) -> list[str]:
    """The tasks to read: data.tasks, or all that data.root (the hub: SCROLLS) has.

    Raises:
        UserError: root is no folder or holds no task; a task that SCROLLS or root lacks.
    """
    if data.root is None:
        there = list(SCROLLS)
    else:
        root = Path(data.root).expanduser()
        if not root.is_dir():
            raise UserError(f"data.root: {data.root} is no folder")
        there = [
            task
            for task in TASKS
            if any(find(root / task, split) for split in ("train", "validation", "test"))
        ]
        if not there:
            raise UserError(
                f"data.root: {data.root} holds no <task>/<split>.jsonl[.xz|.gz|.zst] with a task of {', '.join(TASKS)}"
            )
    for number, task in enumerate(data.tasks or []):
        if task in data.tasks[:number]:
            raise UserError(
                f"data.tasks: {task} given twice; data.weights says how often a task is read"
            )
        if task not in there:
            reason = (
                "no task of SCROLLS"
                if task not in TASKS
                else f"{data.root} has no {task}/<split>.jsonl[.xz|.gz|.zst]"
            )
            raise UserError(
                f"data.tasks: {task!r} given, {reason}{nearest(task, there)}; there are: {', '.join(there)}"
            )
    return data.tasks or there


def rows(
    data: ScrollsData, task: str, split: str, complaints: Complaints
) -> Iterator[tuple[str, Row]]:
    """(place, row) of a task's split, with id, input and output checked; nothing if there is no such split. The test split as the
    benchmark gives it has no outputs: there they may be missing."""
    needed = ("id", "input") if split == "test" else ("id", "input", "output")
    if data.root is None:
        found = hub_rows(task, split)
    else:
        path = find(Path(data.root).expanduser() / task, split)
        found = read(path, complaints) if path else iter(())
        if path and not path.stat().st_size:
            complaints.add(str(path), "an empty file")
    pids: dict[str, str] = {}
    for place, row in found:
        pid = row.get("pid")
        if isinstance(pid, str) and pids.setdefault(pid, place) != place:
            complaints.add(place, f"pid: {pid!r:.40} again, first at {pids[pid]}")
            continue
        wrong = [key for key in needed if not isinstance(row.get(key), str) or not row[key].strip()]
        halves = [
            key
            for key in ("id", "input", "output")
            if isinstance(row.get(key), str) and not is_unicode(row[key])
        ]
        if wrong:
            given = "missing" if wrong[0] not in row else f"{row[wrong[0]]!r:.40} given"
            complaints.add(place, f"{wrong[0]}: {given}, text is needed")
        elif halves:
            complaints.add(place, f"{halves[0]}: not Unicode text (half of a surrogate pair)")
        else:
            yield place, row


def hub_rows(task: str, split: str, archive: str = HUB) -> Iterator[tuple[str, Row]]:
    """('place:number', row) of a task of tau/scrolls, streamed out of its zip.

    Args:
        archive: address of the zip, {task} to be filled in.

    Raises:
        UserError: the hub, or the split, cannot be read.
    """
    import datasets

    place = archive.format(task=task)
    try:
        files = {split: f"zip://**/{split}.jsonl::{place}"}
        stream = datasets.load_dataset("json", data_files=files, split=split, streaming=True)
        for number, row in enumerate(stream, 1):
            yield f"{place}/{split}.jsonl:{number}", dict(row)
    except UserError:
        raise
    except Exception as error:  # of a dozen libraries: no network, no such file, a malformed row
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"data.root: null given, but {split} rows of {place} cannot be read: {reason}"
        ) from None


def split_input(task: str, row: Row) -> tuple[str, str]:
    """(question with the blank line after it, document) of a row's input; without a blank line all of it is question.

    ZeroSCROLLS' rows say where the document is, between instructions and question: both come before it.
    """
    text, start, end = row["input"], row.get("document_start_index"), row.get("document_end_index")
    if isinstance(start, int) and isinstance(end, int) and 0 <= start <= end <= len(text):
        return f"{text[:start].strip()}\n{text[end:].strip()}".strip() + "\n\n", text[start:end]
    if task in WITHOUT_QUESTION:
        return "", text
    options = (
        max(0, text.find("(D)")) if task == "quality" else 0
    )  # its options follow the question, blank lines between them
    end = text.find("\n\n", options)
    return (text[: end + 2], text[end + 2 :]) if end >= 0 else (text + "\n\n", "")


def options(task: str, question: str) -> list[str]:
    """What the answer may be, for the tasks that say so."""
    if task == "contract_nli":
        return ["Entailment", "Contradiction", "Not mentioned"]
    return (
        [text.strip() for text in re.findall(r"\([A-D]\)(.*?)(?=\([A-D]\)|$)", question, re.DOTALL)]
        if task == "quality"
        else []
    )


def texts(data: ScrollsData) -> Iterator[str]:
    """What a from-scratch tokenizer is trained on: questions, answers, and each document once, of all tasks' training rows."""
    complaints = Complaints("skip")  # reading the rows reports them
    for task in (names := tasks(data)):
        seen: set[bytes] = set()
        left = TOKENIZER_CHARACTERS // len(names)
        for _, row in rows(data, task, "train", complaints):
            question, document = split_input(task, row)
            new = _digest(document) not in seen
            seen.add(_digest(document))
            text = f"{question}{document if new else ''}\n{row['output']}"
            yield text
            left -= len(text)
            if left < 0:
                break


class Frame:
    """What stands around a document: before | question, blank line | document | after | answer, stop token; all in tokens.

    Raises:
        UserError: the tokenizer has no end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int):
        self.tokenizer, self.max_length, self.stop = tokenizer, max_length, stop_token(tokenizer)
        self.before, self.after = (np.array(ids, dtype=np.int32) for ids in frame(tokenizer))

    def question(self, text: str) -> np.ndarray:
        return np.array(encode(self.tokenizer, text), dtype=np.int32)

    def answer(self, text: str) -> np.ndarray:
        return np.array([*encode(self.tokenizer, text.strip()), self.stop], dtype=np.int32)

    def room(self, question: np.ndarray, answer: Sequence[int] | np.ndarray = ()) -> int:
        """Tokens that a document may have."""
        return self.max_length - len(self.before) - len(question) - len(self.after) - len(answer)

    def too_long(self, room: int) -> tuple[str, str]:
        """(why a row is of no use, what helps), where there is less than no room for a document."""
        needed = self.max_length - room
        reason = (
            f"question and answer alone have {needed} tokens, data.max_length is {self.max_length}"
        )
        return reason, f"data.max_length={needed} makes room for those of this row"


@dataclass(frozen=True)
class Example:
    """A row in tokens; the document is one of Corpus.documents."""

    task: str
    id: str
    document: int
    question: np.ndarray
    answer: np.ndarray  # with the stop token
    references: list[str]  # none: the test split keeps them secret
    options: list[str]  # that the answer is one of; none: it is free text


@dataclass
class Corpus:
    """The questions of a split in tokens, for evaluation. Each distinct document is kept once, and of it only what can ever be read.

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
        self.frame = Frame(self.tokenizer, self.data.max_length)
        self._places: dict[bytes, tuple[int, int]] = {}  # digest -> number, tokens before the cut
        self._inputs: dict[
            tuple[str, str], tuple[bytes, str]
        ] = {}  # (task, id) -> digest, place: rows of one id have one input
        data, complaints = self.data, Complaints(self.data.on_error)
        for task in tasks(data):
            count = len(self.examples)
            for place, row in rows(data, task, self.split, complaints):
                self._add(task, place, row, complaints)
            if len(self.examples) == count:
                say(f"{task}: no {self.split} rows")
        if self.cut:
            limit = f"data.max_length = {data.max_length} tokens"
            say(
                f"{self.split}: {self.cut} of {len(self.examples)} documents cut on the left, over {limit}"
            )
        if line := complaints.summary():
            say(f"{self.split}: {line}")

    def _add(self, task: str, place: str, row: Row, complaints: Complaints) -> None:
        question, document = split_input(task, row)
        whole = _digest(row["input"])
        first, at = self._inputs.setdefault((task, row["id"]), (whole, place))
        if first != whole:
            return complaints.add(
                place, f"id: {row['id']!r:.40} again with another input, first at {at}"
            )
        output = row.get("output") or ""
        ids, answer = self.frame.question(question), self.frame.answer(output)
        room = self.frame.room(ids, answer)
        if room < 0:
            return complaints.add(place, *self.frame.too_long(room))
        digest = _digest(document)
        if digest not in self._places:
            tokens = np.array(encode(self.tokenizer, document), dtype=np.int32)
            self._places[digest] = len(self.documents), len(tokens)
            self.documents.append(tokens[-self.data.max_length :].copy())
        number, size = self._places[digest]
        self.cut += size > room
        self.examples.append(
            Example(
                task,
                row["id"],
                number,
                ids,
                answer,
                [output] * bool(output),
                options(task, question),
            )
        )

    def prompt(self, example: Example, room: int | None = None) -> np.ndarray:
        """(n,) ids up to the answer; the document has at most `room` tokens (None: as data.max_length allows without an answer)."""
        document = self.documents[example.document]
        room = self.frame.room(example.question) if room is None else room
        return np.concatenate(
            [
                self.frame.before,
                example.question,
                document[max(0, len(document) - room) :],
                self.frame.after,
            ]
        )

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.row(self.examples[index])

    def row(self, example: Example) -> tuple[np.ndarray, np.ndarray]:
        """(ids, labels), each (n,) int64, n <= data.max_length."""
        prompt = self.prompt(example, self.frame.room(example.question, example.answer))
        ids = np.concatenate([prompt, example.answer]).astype(np.int64)
        labels = ids.copy()
        labels[: len(prompt)] = IGNORED
        return ids, labels

    def questions(self, task: str, count: int | None = None) -> list[Example]:
        """Each question once with all its references; at most `count`, evenly spaced over the task (None: all)."""
        merged: dict[str, list[Example]] = {}
        for example in self.examples:
            if example.task == task:
                merged.setdefault(example.id, []).append(example)
        found = [
            replace(same[0], references=[text for one in same for text in one.references])
            for same in merged.values()
        ]
        count = len(found) if count is None else min(count, len(found))
        return [found[place] for place in np.linspace(0, len(found) - 1, count).round().astype(int)]


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


@dataclass
class ScrollsSource:
    """The rows of a split, the tasks in turn, as training samples: loss on the answer and its stop token."""

    data: ScrollsData
    tokenizer: PreTrainedTokenizerBase
    split: str

    def __post_init__(self) -> None:
        self.on_error = self.data.on_error
        self.frame = Frame(self.tokenizer, self.data.max_length)

    def rows(self, complaints: Complaints) -> Iterator[tuple[str, Row]]:
        streams = [
            (task, rows(self.data, task, self.split, complaints)) for task in tasks(self.data)
        ]
        while streams:
            going = []
            for task, stream in streams:
                if found := next(stream, None):
                    going.append((task, stream))
                    yield found[0], {**found[1], "task": task}
            streams = going

    def encode(self, row: Row) -> Sample:
        question, document = split_input(row["task"], row)
        asked, answer = self.frame.question(question), self.frame.answer(row["output"])
        room = self.frame.room(asked, answer)
        if room < 0:
            raise UnusableRow(*self.frame.too_long(room))
        text = np.array(encode(self.tokenizer, document), dtype=np.int32)
        ids = np.concatenate(
            [self.frame.before, asked, text[max(0, len(text) - room) :], self.frame.after, answer]
        )
        learned = np.arange(len(ids)) >= len(ids) - len(answer)
        return Sample(ids, learned, {"id": row["id"], "cut": len(text) > room}, group=row["task"])

    def key(self) -> dict[str, Any]:
        root = self.data.root and Path(self.data.root).expanduser()
        files = root and [
            found for task in tasks(self.data) if (found := find(root / task, self.split))
        ]
        return {"kind": "scrolls", "tasks": tasks(self.data), "split": self.split, "max_length": self.data.max_length,
                "files": file_facts(files) if files else "hub"}  # fmt: skip


class ScrollsDataModule(TextDataModule):
    """Validation with data.val_examples questions a task (their first reference)."""

    data: ScrollsData
    texts = staticmethod(texts)

    def source(self, split: str) -> ScrollsSource:
        return ScrollsSource(self.data, self.tokenizer, split)

    def weights(self) -> dict[str, float] | None:
        if self.data.weights is None:
            return None
        names = tasks(self.data)
        if not any(self.data.weights):
            raise UserError(
                "data.weights: all 0 given, nothing would be trained on; allowed: numbers >= 0, one of them above 0"
            )
        if len(self.data.weights) != len(names):
            raise UserError(
                f"data.weights: {len(self.data.weights)} given, one for each of {', '.join(names)} is needed"
            )
        return dict(zip(names, self.data.weights, strict=True))

    def asked(self) -> str:
        return f" for {', '.join(tasks(self.data))}"

    @cached_property
    def validation(self) -> Corpus:
        return Corpus(self.data, self.tokenizer, "validation")

    def validation_rows(self) -> list[tuple[np.ndarray, np.ndarray]]:
        chosen = [
            one
            for task in tasks(self.data)
            for one in self.validation.questions(task, self.data.val_examples)
        ]
        return [self.validation.row(one) for one in chosen]
