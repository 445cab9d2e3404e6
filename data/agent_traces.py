"""Agent traces: conversations with tool calls, rows {"uniq_id", "messages", "reward"?} of jsonl.

Several attempts at one task are near copies, so tasks, not rows, are split into training and
validation.

The **turn distance** says how far back an assistant's call has to look. A needed value is an
argument (a text or number of three characters or more, at any depth of the arguments) that an
earlier message contains as a word of its own, upper or lower case. Its distance is the number of
messages since the latest one that does: 1 is the message just before. A turn's distance is that of
its farthest needed value, as the call needs all of them; None without one, and for a turn without a
call.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from comet_pl.config.schema import AgentData
from comet_pl.errors import UserError
from data.batches import Pair, say
from data.jsonl import OPEN, Complaints, Row, UnusableRow, check_content, check_distinct, find, read
from data.message_keys import tools_of, unread
from data.messages import Message, check_messages, render
from data.text.batches import TextBatches
from data.text.tokenized import Sample, Source, file_facts

SPLITS = ("train", "validation")
LARGEST = 1e300  # of a reward
SHORTEST = 3  # characters of a needed value: shorter ones are everywhere
TRIAL = re.compile(
    r"(?:^|[-_./:])(trial|attempt|rollout|run|seed)[-_=]?\d+(?=$|[-_./:@])", re.IGNORECASE
)
VERSION = re.compile(r"@[0-9a-f]{6,}$")


def files(root: str, split: str) -> tuple[list[Path], bool]:
    """(jsonl files that hold a split, whether they hold the other one too and have to be split).

    Args:
        root: a file; a folder with train and validation files; or a folder with others, all of
            which are read in the order of their names. Plain or compressed.

    Raises:
        UserError: there is no such file or folder, or nothing in it; files that differ in their
            endings alone; one split by name beside other files.
    """
    path, endings = Path(root).expanduser(), [f".jsonl{suffix}" for suffix in OPEN]
    if path.is_file():
        if not path.name.endswith(tuple(endings)):
            allowed = "a folder, or a .jsonl[.xz|.gz|.zst] file"
            raise UserError(f"data.root: {root} given, allowed: {allowed}")
        return [path], True
    if not path.is_dir():
        raise UserError(f"data.root: {root} is no file or folder")
    named = {name: file for name in SPLITS if (file := find(path, name))}
    if len(named) == len(SPLITS):
        return [named[split]], False
    paths = (file for ending in endings for file in path.glob(f"*{ending}"))
    traces = sorted(file for file in paths if file.is_file())
    check_distinct(traces)
    splits = [file.name for file in traces if file.name.partition(".")[0] in (*SPLITS, "test")]
    if splits and len(traces) > 1:
        raise UserError(
            f"data.root: {root} holds {', '.join(file.name for file in traces)[:200]}; with "
            f"{splits[0]} among them, train.jsonl and validation.jsonl are both needed, or one "
            "file as data.root, which data.val_share splits"
        )
    if not traces:
        raise UserError(f"data.root: {root} holds no .jsonl[.xz|.gz|.zst] file")
    return traces, True


def task_of(row: Row) -> str:
    """The task that a row is an attempt at.

    That is its task_id, or else its uniq_id without a trial's number (-trial3, /run_2); of a
    uniq_id with a version at its end (@7c6fa329) only the last part of the path before the version.
    """
    if row.get("task_id") is not None:
        return str(row["task_id"])
    name = str(row["uniq_id"])
    path, versions = VERSION.subn("", name)
    name = path.rpartition("/")[2] if versions else name
    return TRIAL.sub("", name) or name


def split_of(task: str, share: float, seed: int = 0) -> str:
    """validation for about `share` of all tasks, else train; a function of seed and task alone."""
    text = f"{seed} {task}".encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return SPLITS[int.from_bytes(digest, "big") < share * 2**64]


@dataclass
class Traces:
    """The rows of a split.

    Args:
        root: see `files`.
        split: train | validation.
        val_share, seed: see `split_of`, for files that hold both splits.
        min_reward: traces with less, or without a reward, are left out; None: all are used.
    """

    root: str
    split: str
    on_error: str = "raise"
    val_share: float = 0.1
    seed: int = 0
    min_reward: float | None = None

    @cached_property
    def files(self) -> tuple[list[Path], bool]:
        """See `files`; those of the first call, so that one that vanishes is missed."""
        return files(self.root, self.split)

    def rows(self, complaints: Complaints) -> Iterator[tuple[str, Row]]:
        """(place, row) of the traces with enough reward."""
        return ((place, row) for place, row, reason in self._judged(complaints) if not reason)

    def left_out(self) -> dict[str, int]:
        """Numbers of usable traces that the filters leave out, by reason; reads all rows once."""
        return dict(Counter(reason for *_, reason in self._judged(Complaints("skip")) if reason))

    def not_read(self) -> list[str]:
        """Names of a folder's jsonl files that hold no split, where others do."""
        root, (_, mixed) = Path(self.root).expanduser(), self.files
        if mixed or not root.is_dir():
            return []
        known = {f"{split}.jsonl{suffix}" for split in (*SPLITS, "test") for suffix in OPEN}
        names = {path.name for suffix in OPEN for path in root.glob(f"*.jsonl{suffix}")}
        return sorted(names - known)

    def _judged(self, complaints: Complaints) -> Iterator[tuple[str, Row, str]]:
        """(place, row, reason to leave it out, or '') of the split's rows."""
        paths, mixed = self.files
        places: dict[str, str] = {}
        for path in paths:
            check_content(path, complaints)
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

    def texts(self) -> Iterator[str]:
        """The messages' texts, each distinct one once (a system's policy is in every trace)."""
        seen: set[bytes] = set()
        for _, row in self.rows(Complaints("skip")):  # encoding the rows reports them
            try:
                messages = check_messages(row)
            except UnusableRow:
                continue
            for message in messages:
                digest = hashlib.blake2b(message.text.encode(), digest_size=16).digest()
                if digest not in seen:
                    seen.add(digest)
                    yield message.text


def _fault(row: Row, places: dict[str, str]) -> str:
    """What is wrong with a row apart from its messages, or ''."""
    name, reward = row.get("uniq_id"), row.get("reward")
    if isinstance(name, bool) or not isinstance(name, str | int) or not str(name).strip():
        shown = f"{name!r:.40} given, text is needed" if "uniq_id" in row else "missing"
        return f"uniq_id: {shown}"
    if str(name) in places:
        return f"uniq_id: {name!r:.80} given again, first in {places[str(name)]}"
    number = isinstance(reward, int | float) and abs(reward) <= LARGEST
    if reward is not None and not number:
        return f"reward: {reward!r:.40} given, a number or null is needed"
    return ""


@dataclass
class AgentSource(Source):
    """The traces of a split as samples.

    A sample's notes: id, task, reward, and turns, a list of [role, start, content, end, turn
    distance] as in data/messages.py.

    Args:
        max_length: a trace of more tokens is unusable; None: no limit.
        supervise: see `render`.
    """

    tokenizer: PreTrainedTokenizerBase
    traces: Traces
    max_length: int | None = None
    supervise: str | int = "assistant"

    def __post_init__(self) -> None:
        self.on_error = self.traces.on_error

    def rows(self, complaints: Complaints) -> Iterator[tuple[str, Row]]:
        return self.traces.rows(complaints)

    def encode(self, row: Row) -> Sample:
        """Raises UnusableRow: malformed messages, or too many tokens."""
        messages = self.check(row)
        tools = tools_of(row)
        rendering = render(self.tokenizer, messages, self.supervise, tools)
        if not rendering.mask.any():
            reason = "weight, train or loss exclude all of the assistant's that have loss"
            raise UnusableRow(f"messages: {reason}, so there is nothing to learn")
        if self.max_length is not None and len(rendering.ids) > self.max_length:
            raise UnusableRow(f"{len(rendering.ids)} tokens, data.max_length is {self.max_length}")
        turns = [[*turn, turn_distance(messages, n)] for n, turn in enumerate(rendering.turns)]
        facts = {"id": str(row["uniq_id"]), "task": task_of(row), "reward": row.get("reward")}
        remarks = unread(row, messages)
        if tools and not rendering.shows_tools:
            remarks.append("tools are not shown to the model: the chat template has no place")
        if remarks:
            facts["remarks"] = remarks
        # of the assistant's turns: evaluation does not ask for them
        if unlearned := [number for number, message in enumerate(messages) if not message.learned]:
            facts["unlearned"] = unlearned
        return Sample(rendering.ids, rendering.mask, {**facts, "turns": turns})

    def check(self, row: Row) -> list[Message]:
        """Raises UnusableRow: malformed messages, or none of the assistant's."""
        messages = check_messages(row)
        if not any(message.role == "assistant" for message in messages):
            raise UnusableRow("messages: none of the assistant's, so there is nothing to learn")
        return messages

    def key(self) -> dict[str, Any]:
        traces = self.traces
        paths, mixed = traces.files
        split = [traces.split, traces.val_share, traces.seed] if mixed else [traces.split]
        filters = [traces.min_reward, self.max_length]
        facts = {"agent": file_facts(paths), "split": split, "filters": filters}
        return {**facts, "supervise": self.supervise}


def turn_distance(messages: Sequence[Message], number: int) -> int | None:
    """The turn distance of message `number`, from 0; see the top of this file."""
    message = messages[number]
    if message.role != "assistant":
        return None
    values = {value for call in message.calls for value in _values(call.arguments)}
    needed = (value for value in values if len(value) >= SHORTEST)
    distances = (_distance(messages, number, value) for value in needed)
    return max((distance for distance in distances if distance), default=None)


def _distance(messages: Sequence[Message], number: int, value: str) -> int | None:
    word = re.compile(rf"(?<!\w){re.escape(value)}(?!\w)", re.IGNORECASE)
    earlier = range(number - 1, -1, -1)
    distances = (number - at for at in earlier if any(map(word.search, _said(messages[at]))))
    return next(distances, None)


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
        whole = isinstance(arguments, float) and arguments.is_integer()
        yield json.dumps(int(arguments) if whole else arguments)


def traces_of(data: AgentData, split: str, seed: int = 0, on_error: str | None = None) -> Traces:
    """The traces of a split that the data section names.

    Raises:
        UserError: data.root is missing.
    """
    if data.root is None:
        raise UserError(
            "data.root: missing, give the traces: "
            "data.root=PATH (a jsonl file, or a folder of them)"
        )
    choices = on_error or data.on_error, data.val_share, seed, data.min_reward
    return Traces(data.root, split, *choices)


def source_of(data: AgentData, tokenizer: PreTrainedTokenizerBase, split: str) -> AgentSource:
    """Raises UserError: data.root is missing. The split does not depend on the seed of the run."""
    supervise = "assistant" if data.last_turns is None else data.last_turns
    return AgentSource(tokenizer, traces_of(data, split), data.max_length, supervise)


class AgentBatches(TextBatches):
    """Validates on the first data.val_examples traces of other tasks."""

    data: AgentData

    @staticmethod
    def files(data: AgentData) -> dict[str, list[Path]]:
        if data.root is None:
            return {}
        paths, mixed = files(data.root, "train")
        return {"train": paths, "validation": [] if mixed else files(data.root, "validation")[0]}

    @staticmethod
    def texts(data: AgentData) -> Iterator[str]:
        return traces_of(data, "train", on_error="skip").texts()

    def source(self, split: str) -> AgentSource:
        source = source_of(self.data, self.tokenizer, split)
        if left := source.traces.not_read():
            say(f"{self.data.root}: not read: {', '.join(left)}"[:400])
        for reason, count in source.traces.left_out().items():
            say(f"{split}: {count} traces left out: {reason}")
        return source

    def validation_rows(self) -> list[Pair]:
        source = self.source("validation")
        return [sample.pair() for sample in validation_samples(source, self.data.val_examples)]


def validation_samples(source: AgentSource, count: int | None) -> list[Sample]:
    """The first `count` usable traces; says how many are unusable among all.

    Malformed ones are found behind the first `count` too, too long ones are not.

    Raises:
        UserError: there are none.
    """
    complaints, traces, samples = Complaints(source.on_error), source.traces, list[Sample]()
    for place, row in source.rows(complaints):
        try:
            if count is None or len(samples) < count:
                samples.append(source.encode(row))
                complaints.remarks.update(samples[-1].notes.get("remarks", ()))
            else:
                source.check(row)
        except UnusableRow as error:
            complaints.add(place, *error.args)
    for line in complaints.lines():
        say(f"{traces.split}: {line}")
    if not samples:
        raise UserError(
            f"data.root: {traces.root} has no usable {traces.split} traces; "
            "data.val_share, data.max_length or min_reward decide"
        )
    return samples
