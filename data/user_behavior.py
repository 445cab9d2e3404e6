"""Questions about users' behaviour: a history of events as text, a question, a computed answer.

    before | 2010-12-01                                    | question | after | answer, stop token
           | 14:41 purchase 25 x RED MUG (21495) at 0.42   |
           | 15:02 cancel -1 x RED MUG (21495) at 0.42     |
           | 2010-12-03                                    |
           | ...                                           |
           |                                               |

That is data.layout=days. With lines the day stands in each line; with items each line begins with what a question asks about,
`21495 2010-12-01 14:41 purchase 25 x RED MUG at 0.42`, and questions name the item's number alone.

before and after are the tokenizer's chat template, a blank line stands between history and question, and the loss is on the answer and its
stop token. Each line is tokenised on its own, so that an event's place in tokens is exact and a window of a history is a slice.

An example is a pure function of (seed, split, index, length): kind of question, user and end of the window are drawn, the window holds as
many events before that end as fit, and the question is about the window alone (data/behavior/questions.py). A user is drawn by number of
events; the end so that before it lies a full window, or, where that is less, half of the user's events.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import fields, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from comet_pl.config.schema import UserBehaviorData
from comet_pl.errors import UserError, nearest
from data.batches import IGNORED, ResumableLoader, length_at, pad_rows, validation_loader
from data.behavior.event_text import DAY, Encoded, encode_history, lines, part, texts
from data.behavior.events import Columns, History, Log, event_files, read_log, split_users
from data.behavior.questions import KINDS, Query, Question, ask, oracle, wording
from data.chat_template import encode, frame, separator
from data.datamodule import ShardedDataModule
from data.text.tokenized import file_facts
from data.tokenizer import pad_token, stop_token

SPLITS = {"train": 0, "validation": 1, "test": 2}
CACHED_USERS = 256  # histories that are kept in tokens
LONGER = 1.5  # events of a varied history, in windows
WINDOWS = 8  # tries before another kind of question is asked


class Behavior:
    """Questions about the users of one split; row i is example i.

    Args:
        seed: 0 <= seed < 2**32. split: train, validation or test; each has its own users (data.events.split_users) and random numbers.
        max_length: tokens of an example, question and answer included. count: number of examples.
        kinds: of questions; None: all that the log has the columns for. action: the one that questions are about.
        layout: see `lines`. together: questions that a row asks about its window, one after the other, as the turns of a chat.

    Raises:
        UserError: an unknown kind or action; total without prices; fewer than three users; a max_length without room for a single event.
    """

    def __init__(
        self,
        log: Log,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        split: str,
        max_length: int,
        count: int,
        kinds: Sequence[str] | None = None,
        action: str = "purchase",
        layout: str = "days",
        together: int = 1,
    ):
        self.together = together
        self.log, self.tokenizer, self.split, self.stream = (
            log,
            tokenizer,
            split,
            seed + (SPLITS[split] << 32),
        )
        self.max_length, self.count, self.action, self.layout = max_length, count, action, layout
        self.kinds = _kinds(kinds, log)
        if action not in log.actions:
            raise UserError(
                f"data.action: {action!r} given{nearest(action, log.actions)}, the log has: {', '.join(sorted(log.actions))}"
            )
        chosen = set(split_users([history.user for history in log.histories])[split])
        self.users = [
            number for number, history in enumerate(log.histories) if history.user in chosen
        ]
        self.events_until = np.cumsum([len(log.histories[user]) for user in self.users])
        self.stop = stop_token(tokenizer)
        self.before, self.after = (np.array(ids, dtype=np.int32) for ids in frame(tokenizer))
        self.between = separator(tokenizer)
        self.between = self.between[
            self.between[:1] == [self.stop] :
        ]  # the answer ends in the stop token already
        turn = len(self.after) + self._longest()  # tokens of a question with its answer
        self.reserved, self.turns = (
            len(self.before) + turn,
            (together - 1) * (turn + len(self.between)),
        )
        self.cache: dict[int, Encoded] = {}

    def __len__(self) -> int:
        return self.count

    def encoded(self, user: int) -> Encoded:
        """A user's history in tokens; kept, of so many users at once."""
        if user not in self.cache:
            if len(self.cache) >= CACHED_USERS:
                del self.cache[next(iter(self.cache))]
            self.cache[user] = encode_history(
                self.log.histories[user], self.log, self.tokenizer, self.layout
            )
        return self.cache[user]

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, labels), each (n,) int64, n <= max_length."""
        return self.sample(self.question(index))

    def sample(self, question: Question) -> tuple[np.ndarray, np.ndarray]:
        prompt = self.prompt(question)
        ids = np.concatenate([prompt, encode(self.tokenizer, question.answer), [self.stop]]).astype(
            np.int64
        )
        return ids, np.where(np.arange(len(ids)) < len(prompt), IGNORED, ids)

    def row_of(self, index: int, length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(ids, labels), each (n,) int64, n <= length: row `index` with different questions, up to `together`, as many as fit."""
        first = self.question(index, length)
        ids, labels = self.sample(first)
        random = np.random.Generator(
            np.random.Philox(key=[self.stream, index], counter=[1, 0, 0, length or self.max_length])
        )
        asked = {first.query}  # an answer that stands above needs no lookup in the history
        for kind in random.choice(self.kinds, self.together - 1).tolist():
            found = self._ask(kind, first.user, first.start, first.end, random)
            if found is None or found.query in asked:
                continue
            asked.add(found.query)
            words = [
                *self.between,
                *encode(self.tokenizer, self._wording(found.query)),
                *self.after.tolist(),
            ]
            answer = [*encode(self.tokenizer, found.answer), self.stop]
            if len(ids) + len(words) + len(answer) > (length or self.max_length):
                break
            ids = np.concatenate([ids, words, answer]).astype(np.int64)
            labels = np.concatenate([labels, [IGNORED] * len(words), answer]).astype(np.int64)
        return ids, labels

    def varied(
        self,
        index: int,
        length: int | None,
        keep: float,
        shift_days: int,
        new_days: Sequence[int] | None = None,
    ) -> Behavior:
        """Questions about a history made for row `index` out of a stretch of a real one, for training: a share of its events, drawn
        between `keep` and 1 (each order of magnitude alike), the others left out, and all days moved alike, by up to shift_days, so
        that they cannot be learnt by heart; or new days for all events.

        Args:
            keep: 0 < keep <= 1. length: of the row, in tokens (None: max_length); the history is a little longer.
            new_days: [least, most]: the events, in their order, are spread anew over a span of so many days, drawn between the two (each
                order of magnitude alike), anywhere from shift_days before the log's first day to shift_days after its last. Where each
                event has a day of its own, a question about a day has to be looked up and cannot be guessed.
        """
        if keep == 1 and not shift_days and not new_days:
            return self
        random = np.random.Generator(
            np.random.Philox(key=[self.stream, index], counter=[2, 0, 0, length or self.max_length])
        )
        user = self._user(random)
        history, encoded = self.log.histories[user], self.encoded(user)
        wanted = int(LONGER * (length or self.max_length) * len(history) / len(encoded.ids)) + 1
        stretch = min(len(history), int(wanted / np.exp(random.uniform(np.log(keep), 0))))
        start = random.integers(len(history) - stretch + 1)
        kept = start + np.sort(random.choice(stretch, min(wanted, stretch), replace=False))
        time = history.time[kept]
        if new_days:
            time = self._spread(time, new_days, shift_days, random)
        else:
            time = time + random.integers(-shift_days, shift_days + 1) * DAY
        columns = {field.name: getattr(history, field.name)[kept] for field in fields(History)[1:]}
        one = copy(self)
        one.log = replace(self.log, histories=[History(history.user, **{**columns, "time": time})])
        one.users, one.events_until, one.cache = [0], np.array([len(kept)]), {}
        return one

    def _spread(
        self,
        time: np.ndarray,
        new_days: Sequence[int],
        shift_days: int,
        random: np.random.Generator,
    ) -> np.ndarray:
        """Times of events on new days, in order; see `varied`."""
        first, last = (
            day.astype("datetime64[D]") + sign * shift_days * DAY
            for day, sign in zip(self.log.ends, (-1, 1), strict=True)
        )
        room = int((last - first).astype(int))
        days = min(room, int(np.exp(random.uniform(*np.log(new_days)))))
        begin = first + random.integers(room - days + 1) * DAY
        clock = time - time.astype("datetime64[D]")
        return np.sort(begin + random.integers(days + 1, size=len(time)) * DAY + clock).astype(
            time.dtype
        )

    def _user(self, random: np.random.Generator) -> int:
        """A user of the split, drawn by the number of events."""
        return self.users[
            int(
                np.searchsorted(
                    self.events_until, random.integers(self.events_until[-1]), side="right"
                )
            )
        ]

    def _wording(self, query: Query) -> str:
        return wording(query, self.log, self.action, numbers=self.layout == "items")

    def _ask(
        self, kind: str, user: int, start: int, end: int, random: np.random.Generator
    ) -> Question | None:
        encoded = self.encoded(user)
        ages = encoded.ends[end - 1] - encoded.starts[start:end]
        return ask(
            kind, self.log, user, start, end, ages, self.log.actions.index(self.action), random
        )

    def question(self, index: int, length: int | None = None) -> Question:
        """Question `index` at `length` tokens (None: max_length).

        Raises:
            UserError: no window of that length allows a question.
        """
        length = length or self.max_length
        room = length - self.reserved
        room -= min(self.turns, room // 2)  # further questions get half of it at most
        random = np.random.Generator(
            np.random.Philox(key=[self.stream, index], counter=[0, 0, 0, length])
        )
        for kind in random.permutation(self.kinds).tolist():
            for _ in range(WINDOWS):
                user, start, end = self._window(kind, room, random)
                found = self._ask(kind, user, start, end, random) if start < end else None
                if (
                    found
                    and len(self.prompt(found)) + len(encode(self.tokenizer, found.answer)) + 1
                    <= length
                ):
                    return found
        raise UserError(
            f"data.train_length: {length} given, too short for any question about the {self.split} users' histories "
            f"({self.reserved} tokens are kept for question, answer and template)"
        )

    def prompt(self, question: Question, events: np.ndarray | None = None) -> np.ndarray:
        """(n,) int32 ids up to the answer; of the history only `events` are shown (None: the question's window)."""
        history = self.encoded(question.user).tokens(
            self.window(question) if events is None else events
        )
        words = encode(self.tokenizer, f"\n{self._wording(question.query)}")
        return np.concatenate(
            [self.before, history, words, self.after], dtype=np.int32, casting="same_kind"
        )

    def text(self, question: Question, events: np.ndarray | None = None) -> str:
        """What the user says: history, blank line, question; as tokens it is `prompt` without the template."""
        events = self.window(question) if events is None else events
        shown = lines(
            part(self.log.histories[question.user], question.start, question.end),
            self.log,
            self.layout,
        )
        parts, before = [], ""
        for day, line in (shown[event - question.start] for event in events):
            parts += [day * (day != before), line]
            before = day
        return f"{''.join(parts)}\n{self._wording(question.query)}"

    def row(self, index: int) -> dict[str, Any]:
        """Example `index` as messages, with what is known about it."""
        question = self.question(index)
        messages = [
            {"role": "user", "content": self.text(question)},
            {"role": "assistant", "content": question.answer},
        ]
        more = {
            "kind": question.query.kind,
            "user": self.log.histories[question.user].user,
            "answer": question.answer,
        }
        found = {
            "evidence": list(question.evidence),
            "age": question.age,
            "window": [question.start, question.end],
        }
        return {"uniq_id": f"{self.split}-{index}", "messages": messages, **more, **found}

    # -- what other methods see of a window -----------------------------------------------------------------------------------------

    def window(self, question: Question) -> np.ndarray:
        """Numbers of the events of a question's window."""
        return np.arange(question.start, question.end)

    def truncate(self, question: Question, budget: int) -> np.ndarray:
        """The window's last events, as many as fit into `budget` tokens."""
        return np.arange(
            max(question.start, self.encoded(question.user).fitting(question.end, budget)),
            question.end,
        )

    def retrieve(self, question: Question, budget: int) -> np.ndarray:
        """The window's events that BM25 ranks highest for the question, as many as fit into `budget` tokens, in order of time. Of equal
        scores the latest events come first, so that what is left of the budget shows the recent past."""
        import bm25s

        logging.getLogger("bm25s").setLevel(logging.WARNING)
        history, encoded, events = (
            self.log.histories[question.user],
            self.encoded(question.user),
            self.window(question),
        )
        layout = "lines" if self.layout == "days" else self.layout
        documents = [
            line for _, line in lines(part(history, question.start, question.end), self.log, layout)
        ]
        split = {
            "token_pattern": r"\w+",
            "stopwords": [],
            "show_progress": False,
            "return_ids": False,
        }
        index = bm25s.BM25()
        index.index(bm25s.tokenize(documents, **split), show_progress=False)
        scores = index.get_scores(bm25s.tokenize(self._wording(question.query), **split)[0])
        chosen, days = [], set()
        for event in events[np.lexsort([-events, -scores])].tolist():
            day = encoded.heads[event]
            size = (
                encoded.ends[event]
                - encoded.starts[event]
                + (0 if day in days else encoded.bodies[event] - day)
            )
            if size > budget:
                break
            budget -= size
            days.add(day)
            chosen.append(event)
        return np.array(sorted(chosen), dtype=np.int64)

    def oracle(self, question: Question, events: np.ndarray) -> str:
        """The answer of a reader who makes no mistake and sees only these events."""
        history = self.log.histories[question.user]
        seen = events[history.action[events] == self.log.actions.index(self.action)]
        return oracle(question.query, history, self.log, seen)

    # -------------------------------------------------------------------------------------------------------------------------------

    def _window(self, kind: str, room: int, random: np.random.Generator) -> tuple[int, int, int]:
        """(user, start, end)."""
        user = self._user(random)
        history, encoded = self.log.histories[user], self.encoded(user)
        count = len(history)
        full = int(np.searchsorted(encoded.ends, room)) + 1  # events that fill a window
        end = int(random.integers(max(1, min(full, count // 2)), count + 1))
        if kind == "next_item":  # the window ends right before an event of the action
            later = np.flatnonzero(history.action[end:] == self.log.actions.index(self.action))
            end += int(later[0]) if len(later) else 0
        return user, encoded.fitting(end, room), end

    def _longest(self) -> int:
        """Tokens that question and answer may take; about, as tokens merge differently in different places."""
        labels = [self.log.label(item) for item in range(len(self.log.items))]
        ids = self.tokenizer(
            labels, add_special_tokens=False, split_special_tokens=True, verbose=False
        )["input_ids"]
        item = int(np.argmax([len(label) for label in ids]))
        day = np.datetime64("2000-12-31")
        asked = [self._wording(Query(kind, item, item, day, day, "first")) for kind in self.kinds]
        answers = [*sorted(self.log.items, key=len)[-1:], str(day), "1000000.00"]
        return (
            max(len(encode(self.tokenizer, f"\n{text}")) for text in asked)
            + max(len(encode(self.tokenizer, a)) for a in answers)
            + 1
        )


class UserBehaviorDataModule(ShardedDataModule):
    """Training batches of data.batch_size * accumulate new questions, max_steps of them in one epoch; validation on data.val_examples.

    Raises:
        UserError: the log cannot be read or does not allow what is asked for; lengths that are too short.
    """

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
        super().__init__()
        self.data, self.tokenizer, self.seed, self.max_steps = data, tokenizer, seed, max_steps
        self.rows = data.batch_size * accumulate
        self.log = log_of(data)
        self.pad = pad_token(tokenizer)
        for step in {start for start, _ in data.length_schedule or [] if start < max_steps} | {0}:
            self.questions("train", 1).question(
                0, length_at(data, step)
            )  # too short a length shows now

    def questions(self, split: str, count: int) -> Behavior:
        data, together = self.data, self.data.questions if split == "train" else 1
        choices = (data.train_length, count, data.kinds, data.action, data.layout, together)
        return Behavior(self.log, self.tokenizer, self.seed, split, *choices)

    def train_dataloader(self) -> ResumableLoader:
        step = self.rows * self.world
        rows = _Scheduled(self.questions("train", step * self.max_steps), self.data, step)
        collate = partial(pad_rows, pad_token=self.pad)
        return ResumableLoader(
            rows,
            self.rows,
            collate,
            num_workers=self.data.num_workers,
            rank=self.rank,
            world=self.world,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        questions = self.questions("validation", self.data.val_examples)
        rows = [
            (questions.sample(one), one) for one in map(questions.question, range(len(questions)))
        ]
        return validation_loader(
            rows, self.data.batch_size, self._asked, self.val_rank, self.val_world
        )

    def _asked(
        self, rows: Sequence[tuple[tuple[np.ndarray, np.ndarray], Question]]
    ) -> dict[str, Any]:
        """Left-padded, so that the answers end in the last column."""
        batch: dict[str, Any] = dict(pad_rows([pair for pair, _ in rows], self.pad, left=True))
        longest = max((int((labels != IGNORED).sum()) for (_, labels), _ in rows), default=0)
        return {
            **batch,
            "logits_to_keep": longest + 1,
            "kinds": [one.query.kind for _, one in rows],
            "ages": [one.age for _, one in rows],
        }


class _Scheduled:
    """Row i belongs to optimizer step i // rows_a_step and has its length."""

    def __init__(self, questions: Behavior, data: UserBehaviorData, rows_a_step: int):
        self.questions, self.data, self.rows_a_step = questions, data, rows_a_step
        self.variation = data.keep_events, data.shift_days, data.new_days

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        length = length_at(self.data, index // self.rows_a_step)
        try:
            return self.questions.varied(index, length, *self.variation).row_of(index, length)
        except (
            UserError
        ):  # a stretch that allows no question, such as one of cancels; the whole log does
            return self.questions.row_of(index, length)


def log_of(data: UserBehaviorData) -> Log:
    """The log that the data section names.

    Raises:
        UserError: data.root is missing, or see read_log.
    """
    if data.root is None:
        raise UserError(
            "data.root: missing, give the event log: data.root=PATH (a jsonl, csv or parquet file, or a folder)"
        )
    names = {
        name: getattr(data, f"{name}_column")
        for name in ("user", "time", "action", "item", "quantity", "price")
    }
    columns = Columns(**names, item_description=data.description_column)
    options = (columns, data.on_error, data.duplicates, data.action, data.descriptions)
    return _log(
        json.dumps(file_facts(event_files(data.root, data.items))), data.root, data.items, *options
    )


@lru_cache(maxsize=1)
def _log(facts: str, *options: Any) -> Log:
    """The tokenizer, the training and the evaluation of a run need the same log; `facts` say whether its files have changed."""
    return read_log(*options)


def _kinds(kinds: Sequence[str] | None, log: Log) -> list[str]:
    for kind in kinds or []:
        if kind not in KINDS:
            raise UserError(
                f"data.kinds: {kind!r} given{nearest(kind, KINDS)}, allowed: {', '.join(KINDS)}"
            )
        if kind == "total" and not log.has_price:
            raise UserError(
                "data.kinds: total given, but data.price_column is null: the log has no prices"
            )
    return [kind for kind in kinds or KINDS if kind != "total" or log.has_price]
