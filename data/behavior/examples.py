"""Questions about the users of a split, as prompts and answers in tokens.

    before | 2010-12-01                                    | question | after | answer, stop token
           | 14:41 purchase 25 x RED MUG (21495) at 0.42   |
           | 15:02 cancel -1 x RED MUG (21495) at 0.42     |
           | 2010-12-03                                    |
           | ...                                           |
           |                                               |

That is data.layout=days. With lines each line names the day. With items each line begins with what
a question asks about, `21495 2010-12-01 14:41 purchase 25 x RED MUG at 0.42`, and questions name
the item's number alone.

before and after are the tokenizer's chat template, a blank line is between history and question,
and the loss is on the answer and its stop token. Each line is tokenised on its own, so that an
event's place in tokens is exact and a window of a history is a slice.

An example is a pure function of (seed, split, index, length): kind of question, user and end of the
window are drawn, the window holds as many events before that end as fit, and the question is about
the window alone (data/behavior/questions.py). A user is drawn by number of events; the end so that
a full window lies before it, or half of the user's events if they are fewer.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from comet_pl.errors import UserError, nearest
from data.batches import IGNORED, Pair
from data.behavior.answers import Query, oracle
from data.behavior.augmentation import shifted, spread, thinned
from data.behavior.event_text import Encoded, encode_history, lines
from data.behavior.events import Log, split_users
from data.behavior.questions import KINDS, Question, ask, wording
from data.chat_template import answer_start, frame, separator
from data.encoding import begins_after, encode, inside
from data.tokenizer import stop_token

SPLITS = {"train": 0, "validation": 1, "test": 2}
CACHED_USERS = 256  # histories that are kept in tokens
LONGER = 1.5  # events of an augmented history, in windows
WINDOWS = 8  # tries before another kind of question is asked


class Behavior:
    """Examples of one split, by number.

    Args:
        seed: 0 <= seed < 2**32. split: train, validation or test; each has its own users
        (split_users) and random numbers. max_length: tokens of an example, question and answer
        included. count: number of examples. kinds: of questions; None: all that the log has the
        columns for. action: the one that questions are about. layout: see `lines`. together:
        questions that a row asks about its window, one after the other, as a chat's turns.

    Raises:
        UserError: an unknown kind or action; total without prices; fewer than three users; a
            max_length without room for a single event.
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
        self.log, self.tokenizer, self.split = log, tokenizer, split
        self.stream = seed + (SPLITS[split] << 32)
        self.max_length, self.count, self.together = max_length, count, together
        self.action, self.layout = action, layout
        self.kinds = _kinds(kinds, log)
        if action not in log.actions:
            raise UserError(
                f"data.action: {action!r} given{nearest(action, log.actions)}, "
                f"the log has: {', '.join(sorted(log.actions))}"
            )
        chosen = set(split_users([history.user for history in log.histories])[split])
        self.users = [n for n, history in enumerate(log.histories) if history.user in chosen]
        self.events_until = np.cumsum([len(log.histories[user]) for user in self.users])
        self.stop = stop_token(tokenizer)
        self.before, self.after = (np.array(ids, dtype=np.int32) for ids in frame(tokenizer))
        between = separator(tokenizer)
        # the answer's stop token may be the separator's first
        self.between = between[between[:1] == [self.stop] :]
        self.begins = begins_after(tokenizer, self.between or [self.stop])
        self.answer_begins, self.start = (
            begins_after(tokenizer, self.after),
            answer_start(tokenizer),
        )
        turn = len(self.after) + self._longest()  # tokens of a question with its answer
        self.reserved = len(self.before) + turn
        self.turns = (together - 1) * (turn + len(self.between))
        self.cache: dict[int, Encoded] = {}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Pair:
        """(ids, labels), n <= max_length."""
        return self.sample(self.question(index))

    def encoded(self, user: int) -> Encoded:
        """A user's history in tokens."""
        if user not in self.cache:
            if len(self.cache) >= CACHED_USERS:
                del self.cache[next(iter(self.cache))]
            history = self.log.histories[user]
            self.cache[user] = encode_history(history, self.log, self.tokenizer, self.layout)
        return self.cache[user]

    def question(self, index: int, length: int | None = None) -> Question:
        """Question `index` at `length` tokens (None: max_length).

        Raises:
            UserError: no window of that length allows a question.
        """
        length = length or self.max_length
        room = length - self.reserved
        room -= min(self.turns, room // 2)  # further questions get half of it at most
        random = self._random(index, 0, length)
        for kind in random.permutation(self.kinds).tolist():
            for _ in range(WINDOWS):
                user, start, end = self._window(kind, room, random)
                question = self._ask(kind, user, start, end, random) if start < end else None
                if question and len(self.prompt(question)) + len(self._answer(question)) <= length:
                    return question
        raise UserError(
            f"data.train_length: {length} given, too short for any question about the "
            f"{self.split} users' histories "
            f"({self.reserved} tokens are kept for question, answer and template)"
        )

    def prompt(self, question: Question, events: np.ndarray | None = None) -> np.ndarray:
        """(n,) int32 ids up to the answer.

        Args:
            events: that are shown of the history; None: the question's window.
        """
        shown = question.events() if events is None else events
        history = self.encoded(question.user).tokens(shown)
        words = encode(self.tokenizer, f"\n{self.wording(question.query)}")
        parts: list[Any] = [self.before, history, words, self.after]
        return np.concatenate(parts, dtype=np.int32, casting="same_kind")

    def sample(self, question: Question) -> Pair:
        prompt = self.prompt(question)
        ids = np.concatenate([prompt, self._answer(question)]).astype(np.int64)
        return ids, np.where(np.arange(len(ids)) < len(prompt), IGNORED, ids)

    def row_of(self, index: int, length: int | None = None) -> Pair:
        """Row `index` with up to `together` different questions, as many as fit into `length`."""
        length = length or self.max_length
        first = self.question(index, length)
        ids, labels = self.sample(first)
        random = self._random(index, 1, length)
        # an answer that stands above needs no lookup in the history
        asked = {first.query}
        for kind in random.choice(self.kinds, self.together - 1).tolist():
            question = self._ask(kind, first.user, first.start, first.end, random)
            if question is None or question.query in asked:
                continue
            asked.add(question.query)
            words = encode(self.tokenizer, self.wording(question.query), self.begins)
            words, answer = [*self.between, *words, *self.after.tolist()], self._answer(question)
            if len(ids) + len(words) + len(answer) > length:
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
        """Examples about a history made of a real one for row `index`; see augmentation.

        Args:
            length: of the row, in tokens (None: max_length); the history is a little longer.
            keep, shift_days, new_days: 1, 0 and None change nothing. With new_days events get days
                of their own, otherwise all days are shifted alike.
        """
        if keep == 1 and not shift_days and not new_days:
            return self
        length = length or self.max_length
        random = self._random(index, 2, length)
        user = self._user(random)
        history, tokens = self.log.histories[user], len(self.encoded(user).ids)
        count = int(LONGER * length * len(history) / tokens) + 1
        history = thinned(history, count, keep, random)
        if new_days:
            history = spread(history, self.log, new_days, shift_days, random)
        else:
            history = shifted(history, shift_days, random)
        varied = copy(self)
        varied.log = replace(self.log, histories=[history])
        varied.users, varied.events_until, varied.cache = [0], np.array([len(history)]), {}
        return varied

    def wording(self, query: Query) -> str:
        return wording(query, self.log, self.action, numbers=self.layout == "items")

    def text(self, question: Question, events: np.ndarray | None = None) -> str:
        """What the user says; in tokens it is `prompt` without the template."""
        history = self.log.histories[question.user]
        events = question.events() if events is None else events
        parts, before = [], ""
        for day, line in lines(history.select(events), self.log, self.layout):
            parts += [day * (day != before), line]
            before = day
        return f"{''.join(parts)}\n{self.wording(question.query)}"

    def row(self, index: int) -> dict[str, Any]:
        """Example `index` as messages, with the facts about it."""
        question = self.question(index)
        said = {"user": self.text(question), "assistant": question.answer}
        return {
            "uniq_id": f"{self.split}-{index}",
            "messages": [{"role": role, "content": text} for role, text in said.items()],
            "kind": question.query.kind,
            "user": self.log.histories[question.user].user,
            "answer": question.answer,
            "evidence": list(question.evidence),
            "age": question.age,
            "window": [question.start, question.end],
        }

    def oracle(self, question: Question, events: np.ndarray) -> str:
        """The answer of a reader who sees only these events and makes no mistake."""
        history = self.log.histories[question.user]
        seen = events[history.action[events] == self.log.actions.index(self.action)]
        return oracle(question.query, history, self.log, seen)

    def _random(self, index: int, purpose: int, length: int) -> np.random.Generator:
        key, counter = [self.stream, index], [purpose, 0, 0, length]
        return np.random.Generator(np.random.Philox(key=key, counter=counter))

    def _user(self, random: np.random.Generator) -> int:
        """A user of the split, drawn by the number of events."""
        event = random.integers(self.events_until[-1])
        return self.users[int(np.searchsorted(self.events_until, event, side="right"))]

    def _ask(
        self, kind: str, user: int, start: int, end: int, random: np.random.Generator
    ) -> Question | None:
        encoded = self.encoded(user)
        ages = encoded.ends[end - 1] - encoded.starts[start:end]
        action = self.log.actions.index(self.action)
        return ask(kind, self.log, user, start, end, ages, action, random)

    def _answer(self, question: Question) -> list[int]:
        answer = self.start + question.answer
        return [*encode(self.tokenizer, answer, self.answer_begins), self.stop]

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
        """Tokens that question and answer may take, nearly: tokens merge with their neighbours."""
        log, options = self.log, {"add_special_tokens": False, "split_special_tokens": True}
        labels = [log.label(item) for item in range(len(log.items))]
        ids = inside(self.tokenizer)(labels, verbose=False, **options)["input_ids"]
        item, day = int(np.argmax([len(label) for label in ids])), np.datetime64("2000-12-31")
        asked = [self.wording(Query(kind, item, item, day, day, "first")) for kind in self.kinds]
        answers = [*sorted(log.items, key=len)[-1:], str(day), "1000000.00"]
        question = max(len(encode(self.tokenizer, f"\n{text}")) for text in asked)
        return question + max(len(encode(self.tokenizer, text)) for text in answers) + 1


def _kinds(kinds: Sequence[str] | None, log: Log) -> list[str]:
    for kind in kinds or []:
        if kind not in KINDS:
            allowed = ", ".join(KINDS)
            raise UserError(f"data.kinds: {kind!r} given{nearest(kind, KINDS)}, allowed: {allowed}")
        if kind == "total" and not log.has_price:
            raise UserError(
                "data.kinds: total given, but data.price_column is null: the log has no prices"
            )
    return [kind for kind in kinds or KINDS if kind != "total" or log.has_price]
