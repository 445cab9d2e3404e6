"""Agent traces: conversations with tool calls and rewards, as rows {"uniq_id", "messages", "reward"?} of jsonl files.

Several attempts at one task are near copies of each other, so that tasks, not rows, are split into training and validation.

**Turn distance** says how far back an assistant's call has to look. A needed value is an argument (a text or number of three characters or
more, at any depth of the arguments) that an earlier message contains as a word of its own, upper or lower case. Its distance is the number
of messages since the latest one that does: 1 is the message just before. A turn's distance is that of its farthest needed value, as all
are needed to make the call; None if there is none, and for a turn without a call.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from comet_pl.config.schema import AgentData
from comet_pl.errors import UserError
from data.batches import IGNORED, say
from data.jsonl import OPEN, Complaints, Row, UnusableRow, find, read
from data.messages import Message, check_messages, render
from data.text.datamodule import TextDataModule
from data.text.tokenized import Sample, encoded, file_facts

SPLITS = ("train", "validation")
SHORTEST = 3  # characters of a needed value: shorter ones are everywhere
TRIAL = re.compile(
    r"(?:^|[-_./:])(trial|attempt|rollout|run|seed)[-_=]?\d+(?=$|[-_./:@])", re.IGNORECASE
)
VERSION = re.compile(r"@[0-9a-f]{6,}$")


def files(root: str, split: str) -> tuple[list[Path], bool]:
    """(jsonl files, plain or compressed, that hold a split; whether they hold the other one too, so that their tasks have to be split).

    Args:
        root: a file; a folder with train and validation files; or a folder with others, all of which are read, in order of their names.

    Raises:
        UserError: there is no such file or folder, or nothing in it.
    """
    path = Path(root).expanduser()
    if path.is_file():
        if not any(path.name.endswith(f".jsonl{suffix}") for suffix in OPEN):
            raise UserError(
                f"data.root: {root} given, allowed: a folder, or a .jsonl[.xz|.gz|.zst] file"
            )
        return [path], True
    if not path.is_dir():
        raise UserError(f"data.root: {root} is no file or folder")
    named = {name: find(path, name) for name in SPLITS}
    if all(named.values()):
        return [named[split]], False  # type: ignore[list-item]
    found = sorted(
        file for suffix in OPEN for file in path.glob(f"*.jsonl{suffix}") if file.is_file()
    )
    if not found:
        raise UserError(f"data.root: {root} holds no .jsonl[.xz|.gz|.zst] file")
    return found, True


def task_of(row: Row) -> str:
    """The task that a row is an attempt at: its task_id, if it has one, else its uniq_id without a trial's number (-trial3, /run_2), and if
    it ends in a version (@7c6fa329), only the last part of the path before that."""
    if row.get("task_id") is not None:
        return str(row["task_id"])
    name = str(row["uniq_id"])
    path, versions = VERSION.subn("", name)
    name = path.rpartition("/")[2] if versions else name
    return TRIAL.sub("", name) or name


def split_of(task: str, share: float, seed: int = 0) -> str:
    """train | validation, for about `share` of all tasks; the same for a task in whatever files it is."""
    digest = hashlib.blake2b(
        f"{seed} {task}".encode("utf-8", "surrogatepass"), digest_size=8
    ).digest()
    return SPLITS[int.from_bytes(digest, "big") < share * 2**64]


@dataclass
class AgentSource:
    """The traces of a split, and how they become samples (data/text/tokenized.py).

    A sample's notes: id, task, reward, and turns, a list of [role, start, content, end, turn distance] as in data/messages.py.

    Args:
        root: see `files`. split: train | validation. val_share, seed: see `split_of`, where the files hold both splits.
        min_reward: traces with less, or without a reward, are left out; None: all are used. max_length: tokens; a longer trace is unusable;
            None: no limit. supervise: see `render`.
    """

    tokenizer: PreTrainedTokenizerBase
    root: str
    split: str
    on_error: str = "raise"
    val_share: float = 0.1
    seed: int = 0
    min_reward: float | None = None
    max_length: int | None = None
    supervise: str | int = "assistant"

    def rows(self, complaints: Complaints) -> Iterator[tuple[str, Row]]:
        """(place, row) of this split's traces with enough reward."""
        return ((place, row) for place, row, reason in self._judged(complaints) if not reason)

    def left_out(self) -> dict[str, int]:
        """How many traces of this split the filters leave out, by reason; reads all rows once. Unusable rows are for `rows` to report."""
        return dict(Counter(reason for *_, reason in self._judged(Complaints("skip")) if reason))

    def _judged(self, complaints: Complaints) -> Iterator[tuple[str, Row, str]]:
        """(place, row, reason to leave it out, or '') of the split's rows."""
        paths, mixed = files(self.root, self.split)
        places: dict[str, str] = {}
        for path in paths:
            if not path.stat().st_size:
                complaints.add(str(path), "an empty file")
            for place, row in read(path, complaints):
                if reason := _fault(row, places):
                    complaints.add(place, reason)
                    continue
                places[str(row["uniq_id"])] = place
                if mixed and split_of(task_of(row), self.val_share, self.seed) != self.split:
                    continue
                yield place, row, self._filter(row.get("reward"))

    def _filter(self, reward: float | None) -> str:
        if self.min_reward is None or (reward is not None and reward >= self.min_reward):
            return ""
        return "without a reward" if reward is None else f"reward below {self.min_reward:g}"

    def encode(self, row: Row) -> Sample:
        """Raises UnusableRow: malformed messages, or too many tokens."""
        messages = check_messages(row)
        if not any(message.role == "assistant" for message in messages):
            raise UnusableRow("messages: none of the assistant's, so there is nothing to learn")
        found = render(self.tokenizer, messages, self.supervise)
        if self.max_length is not None and len(found.ids) > self.max_length:
            raise UnusableRow(f"{len(found.ids)} tokens, data.max_length is {self.max_length}")
        turns = [
            [*turn, turn_distance(messages, number)] for number, turn in enumerate(found.turns)
        ]
        notes = {
            "id": str(row["uniq_id"]),
            "task": task_of(row),
            "reward": row.get("reward"),
            "turns": turns,
        }
        return Sample(found.ids, found.mask, notes)

    def key(self) -> dict[str, Any]:
        paths, mixed = files(self.root, self.split)
        chosen = [self.split, self.val_share, self.seed] if mixed else [self.split]
        return {
            "agent": file_facts(paths),
            "split": chosen,
            "filters": [self.min_reward, self.max_length],
            "supervise": self.supervise,
        }


def _fault(row: Row, places: dict[str, str]) -> str:
    """What is wrong with a row apart from its messages, or ''."""
    name, reward = row.get("uniq_id"), row.get("reward")
    if isinstance(name, bool) or not isinstance(name, str | int) or not str(name).strip():
        return (
            "uniq_id: missing"
            if "uniq_id" not in row
            else f"uniq_id: {name!r:.40} given, text is needed"
        )
    if str(name) in places:
        return f"uniq_id: {name!r:.80} given again, first in {places[str(name)]}"
    if reward is not None and (not isinstance(reward, int | float) or not math.isfinite(reward)):
        return f"reward: {reward!r:.40} given, a number or null is needed"
    return ""


def texts(root: str, split: str, on_error: str, **choices: Any) -> Iterator[str]:
    """What a from-scratch tokenizer is trained on: the messages' texts, each distinct one once (a system's policy is in every trace).

    Args:
        choices: val_share, seed and min_reward of AgentSource.
    """
    source = AgentSource(None, root, split, on_error, **choices)  # type: ignore[arg-type]
    seen: set[bytes] = set()
    for _, row in source.rows(Complaints("skip")):  # encoding the rows reports them
        try:
            messages = check_messages(row)
        except UnusableRow:
            continue
        for message in messages:
            digest = hashlib.blake2b(message.text.encode(), digest_size=16).digest()
            if digest not in seen:
                seen.add(digest)
                yield message.text


def turn_distance(messages: Sequence[Message], number: int) -> int | None:
    """See the top of this file; number: of the message, from 0."""
    message = messages[number]
    if message.role != "assistant":
        return None
    needed = {
        value
        for call in message.calls
        for value in _values(call.arguments)
        if len(value) >= SHORTEST
    }
    distances = (_distance(messages, number, value) for value in needed)
    return max((distance for distance in distances if distance), default=None)


def _distance(messages: Sequence[Message], number: int, value: str) -> int | None:
    word = re.compile(rf"(?<!\w){re.escape(value)}(?!\w)", re.IGNORECASE)
    return next(
        (
            number - at
            for at in range(number - 1, -1, -1)
            if any(map(word.search, _said(messages[at])))
        ),
        None,
    )


def _said(message: Message) -> Iterator[str]:
    yield message.content
    for call in message.calls:
        yield from _values(call.arguments)


def _values(arguments: Any) -> Iterator[str]:
    """Texts and numbers at any depth, as text; 12.0 is 12."""
    if isinstance(arguments, dict | list):
        for value in arguments.values() if isinstance(arguments, dict) else arguments:
            yield from _values(value)
    elif isinstance(arguments, str):
        yield arguments.strip()
    elif isinstance(arguments, int | float) and not isinstance(arguments, bool):
        yield json.dumps(
            int(arguments) if isinstance(arguments, float) and arguments.is_integer() else arguments
        )


def source_of(
    data: AgentData, tokenizer: PreTrainedTokenizerBase, split: str, seed: int
) -> AgentSource:
    """The traces of a split that the data section names.

    Raises:
        UserError: data.root is missing.
    """
    if data.root is None:
        raise UserError(
            "data.root: missing, give the traces: data.root=PATH (a jsonl file, or a folder of them)"
        )
    supervise = "assistant" if data.last_turns is None else data.last_turns
    choices = {
        "val_share": data.val_share,
        "min_reward": data.min_reward,
        "max_length": data.max_length,
    }
    return AgentSource(
        tokenizer, data.root, split, data.on_error, seed=seed, supervise=supervise, **choices
    )


class AgentDataModule(TextDataModule):
    """Validation on the first data.val_examples traces of other tasks."""

    data: AgentData

    @staticmethod
    def texts(data: AgentData) -> Iterator[str]:
        if data.root is None:
            raise UserError(
                "data.root: missing, give the traces: data.root=PATH (a jsonl file, or a folder of them)"
            )
        return texts(
            data.root, "train", "skip", val_share=data.val_share, min_reward=data.min_reward
        )

    def source(self, split: str) -> AgentSource:
        found = source_of(
            self.data, self.tokenizer, split, 0
        )  # the split is the data's, not the run's
        for reason, count in found.left_out().items():
            say(f"{split}: {count} traces left out: {reason}")
        return found

    def validation_rows(self) -> list[tuple[np.ndarray, np.ndarray]]:
        found = validation_samples(self.source("validation"), self.data.val_examples)
        return [
            (one.ids.astype(np.int64), np.where(one.learned, one.ids, IGNORED).astype(np.int64))
            for one in found
        ]


def validation_samples(source: AgentSource, count: int | None) -> list[Sample]:
    """The first `count` usable traces; what is unusable among them is counted.

    Raises:
        UserError: there are none.
    """
    complaints = Complaints(source.on_error)
    found = list(islice(filter(None, encoded(source, complaints)), count))
    if line := complaints.summary():
        say(f"{source.split}: {line}")
    if not found:
        raise UserError(
            f"data.root: {source.root} has no usable {source.split} traces; data.val_share, data.max_length or min_reward decide"
        )
    return found
