"""Questions about users' behaviour: a history of events as text, a question, a computed answer."""

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from comet_pl.config.schema import UserBehaviorData
from comet_pl.errors import UserError
from data.batches import (
    ALL,
    IGNORED,
    Batches,
    Pair,
    Shard,
    SteppedLoader,
    SteppedRows,
    length_at,
    pad_rows,
    validation_loader,
)
from data.behavior.event_text import texts
from data.behavior.events import Log
from data.behavior.examples import Behavior
from data.behavior.questions import Question
from data.behavior.read_log import COLUMNS, Columns, event_files, read_log
from data.text.tokenized import file_facts
from data.tokenizer import pad_token


class UserBehaviorBatches(Batches):
    """Training batches of data.batch_size * accumulate new questions; data.val_examples validate.

    Raises:
        UserError: the log cannot be read or does not allow the questions; lengths that are too
            short.
    """

    @staticmethod
    def files(data: UserBehaviorData) -> dict[str, list[Path]]:
        return {} if data.root is None else {"train": event_files(data.root, data.items)}

    @staticmethod
    def texts(data: UserBehaviorData) -> Iterator[str]:
        return texts(log_of(data), data.action, data.layout, data.shift_days)

    def __init__(
        self,
        data: UserBehaviorData,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        max_steps: int,
        accumulate: int = 1,
    ):
        self.data, self.tokenizer, self.seed, self.max_steps = data, tokenizer, seed, max_steps
        self.rows = data.batch_size * accumulate
        self.log = log_of(data)
        self.pad = pad_token(tokenizer)
        starts = {start for start, _ in data.length_schedule or [] if start < max_steps}
        for step in starts | {0}:  # a length that is too short shows now
            self.questions("train", 1).question(0, length_at(data, step))

    def questions(self, split: str, count: int) -> Behavior:
        return behavior_of(self.data, self.tokenizer, self.seed, split, count)

    def train_loader(self, shard: Shard = ALL) -> SteppedLoader:
        step, workers = self.rows * shard.world, self.data.num_workers
        examples = self.questions("train", step * self.max_steps)
        rows = TrainingRows(examples, self.data, step, self.max_steps)
        collate = partial(pad_rows, pad_token=self.pad)
        return SteppedLoader(rows, self.rows, collate, num_workers=workers, shard=shard)

    def validation_loader(self, shard: Shard = ALL) -> DataLoader[Any]:
        examples = self.questions("validation", self.data.val_examples)
        asked = [examples.question(number) for number in range(len(examples))]
        rows = [(examples.sample(question), question) for question in asked]
        return validation_loader(rows, self.data.batch_size, self._collate, shard)

    def _collate(self, rows: Sequence[tuple[Pair, Question]]) -> dict[str, Any]:
        """Left-padded, so that the answers end in the last column."""
        batch: dict[str, Any] = dict(pad_rows([pair for pair, _ in rows], self.pad, left=True))
        longest = max((int((labels != IGNORED).sum()) for (_, labels), _ in rows), default=0)
        kinds = [question.query.kind for _, question in rows]
        ages = [question.age for _, question in rows]
        return {**batch, "logits_to_keep": longest + 1, "kinds": kinds, "ages": ages}


class TrainingRows(SteppedRows):
    """Rows by index; each has the length of the step that reads it."""

    def __init__(
        self, examples: Behavior, data: UserBehaviorData, rows_a_step: int, max_steps: int
    ):
        super().__init__(rows_a_step, max_steps)
        self.examples, self.data = examples, data

    def __getitem__(self, index: int) -> Pair:
        data, length = self.data, length_at(self.data, self.step_of(index))
        choices = data.keep_events, data.shift_days, data.new_days
        try:
            return self.examples.varied(index, length, *choices).row_of(index, length)
        except UserError:
            # a stretch may allow no question, such as one of cancels; the whole log does
            return self.examples.row_of(index, length)


def behavior_of(
    data: UserBehaviorData, tokenizer: PreTrainedTokenizerBase, seed: int, split: str, count: int
) -> Behavior:
    """`count` examples of a split of the log that the data section names.

    Raises:
        UserError: see log_of and Behavior.
    """
    together = data.questions if split == "train" else 1
    choices = data.train_length, count, data.kinds, data.action, data.layout, together
    return Behavior(log_of(data), tokenizer, seed, split, *choices)


def log_of(data: UserBehaviorData) -> Log:
    """The log that the data section names.

    Raises:
        UserError: data.root is missing, or see read_log.
    """
    if data.root is None:
        raise UserError(
            "data.root: missing, give the event log: "
            "data.root=PATH (a jsonl, csv or parquet file, or a folder)"
        )
    names = {name: getattr(data, f"{name}_column") for name in COLUMNS}
    columns = Columns(**names, item_description=data.description_column)
    options = (columns, data.on_error, data.duplicates, data.action, data.descriptions)
    facts = json.dumps(file_facts(event_files(data.root, data.items)))
    return _log(facts, data.root, data.items, *options)


@lru_cache(maxsize=1)
def _log(facts: str, *options: Any) -> Log:
    """The log, shared by the tokenizer, training and evaluation; `facts` change with its files."""
    return read_log(*options)
