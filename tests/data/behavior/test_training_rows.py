"""Training rows of user behaviour: several questions a window, and histories made of real ones."""

import re
from pathlib import Path

import numpy as np

from comet_pl.config.schema import UserBehaviorData
from data.behavior.event_text import texts
from data.behavior.events import DAY, Log, days_of
from data.behavior.examples import Behavior
from data.behavior.questions import wording
from data.user_behavior import UserBehaviorBatches
from tests.data.behavior.logs import NAMES, ROWS, behavior, derive, frames, tokenizer, write

TOKENIZER = tokenizer()


def test_a_row_may_ask_several_questions_about_its_window(log: Log):
    """The first is the example's own; loss on answers and stop tokens alone."""
    examples, alone = behavior(log, length=1500, together=6), behavior(log, length=1500)
    users, several = frames(ROWS), 0
    for number in range(30):
        ids, labels = examples.row_of(number)
        first = examples.question(number)
        prompt, text = examples.prompt(first), TOKENIZER.decode(ids)
        turns = [part.split("<|assistant|>") for part in text.split("<|user|>")[1:]]
        asked = [turns[0][0].rsplit("\n", 1)[1], *(turn[0] for turn in turns[1:])]
        user = users[log.histories[first.user].user]
        assert len(ids) <= 1500
        assert len(set(asked)) == len(asked), "an answer that stands above needs no lookup"
        for question, (_, answer) in zip(asked, turns, strict=True):
            derived, _ = derive(question, user, first.start, first.end)
            assert answer == f"{derived}<|end|>"
        assert (ids[: len(prompt)] == prompt).all()
        assert TOKENIZER.decode(ids[labels != -100]) == "".join(answer for _, answer in turns)
        assert (examples.row_of(number)[0] == ids).all()
        assert (alone.row_of(number)[0] == alone.sample(alone.question(number))[0]).all()
        several += len(turns) > 3
    assert several > 20


def test_training_rows_may_be_about_a_history_with_fewer_events_on_other_days(log: Log):
    """Some of the user's events, in order, all moved alike; nothing is drawn twice."""
    examples, shares, moves = behavior(log, length=500), [], set()
    plain = {history.user: history for history in log.histories}
    names = ("action", "item", "quantity", "price")

    def facts(history):
        return list(zip(*(getattr(history, name).tolist() for name in names), strict=True))

    for number in range(60):
        varied = examples.varied(number, None, 0.1, 40)
        (history,) = varied.log.histories
        whole, moved, places = plain[history.user], set(), [-1]
        known = facts(whole)
        for event, fact in enumerate(facts(history)):  # nearly every price is unique
            places.append(known.index(fact, places[-1] + 1))
            moved.add(history.time[event] - whole.time[places[-1]])
        (by,) = moved
        assert by % DAY == 0 * DAY and abs(by) <= 40 * DAY
        moves.add(by)
        shares.append(len(history) / (places[-1] - places[1] + 1))
        rows = [
            [history.user, str(time), log.actions[action], log.items[item], quantity, price / 1e4]
            for time, (action, item, quantity, price) in zip(
                history.time, facts(history), strict=True
            )
        ]
        (user,) = frames([dict(zip(NAMES, row, strict=True)) for row in rows]).values()
        question = varied.question(number)
        asked = wording(question.query, log, "purchase")
        derived = derive(asked, user, question.start, question.end)
        assert (question.answer, list(question.evidence)) == derived
        again = examples.varied(number, None, 0.1, 40).row_of(number)
        assert all(map(np.array_equal, again, varied.row_of(number)))
    assert len(moves) > 30 and max(shares) == 1 and min(shares) < 0.3
    assert examples.varied(0, None, 1.0, 0) is examples


def test_training_rows_may_have_their_events_on_new_days(log: Log):
    """In their order, at their time of day, and not far from the log's own days."""
    examples = behavior(log, length=500, kinds=["last_time"], layout="items")
    first, last = map(days_of, log.ends)
    spans, purchase = [], log.actions.index("purchase")
    for number in range(60):
        varied = examples.varied(number, None, 0.3, 10, [5, 60])
        (history,) = varied.log.histories
        (before,) = examples.varied(number, None, 0.3, 0).log.histories
        assert (history.item == before.item).all() and (history.price == before.price).all()
        assert (np.diff(history.time.astype(int)) >= 0).all()
        day = days_of(history.time)
        assert first - 10 <= day.min() and day.max() <= last + 10
        assert sorted(history.time - day) == sorted(before.time - days_of(before.time))
        spans.append(int((day.max() - day.min()).astype(int)))
        question = varied.question(number)
        bought = (history.item == question.query.item) & (history.action == purchase)
        assert question.answer == str(day[: question.end][bought[: question.end]][-1])
        again = examples.varied(number, None, 0.3, 10, [5, 60])
        assert (varied.row_of(number)[0] == again.row_of(number)[0]).all()
    assert max(spans) <= 60 and min(spans) < 15 and len(set(spans)) > 20


def test_batches_hand_their_keys_on(tmp_path: Path):
    """Training rows are varied, in the layout of the tokenizer's texts; validation is plain."""
    keys = {"layout": "items", "kinds": ["last_time"], "questions": 4, "train_length": 400}
    variety = {"keep_events": 0.5, "shift_days": 20, "new_days": [5, 60]}
    root = str(write(tmp_path / "events.jsonl", ROWS))
    data = UserBehaviorData(root=root, batch_size=3, val_examples=2, **keys, **variety)
    batches = UserBehaviorBatches(data, TOKENIZER, seed=3, max_steps=2)
    batch = next(iter(batches.train_loader()))
    choices = ["last_time"], "purchase", "items"
    plain = Behavior(batches.log, TOKENIZER, 3, "train", 400, 6, *choices, 4)
    for row in range(3):
        pair = plain.varied(row, 400, 0.5, 20, [5, 60]).row_of(row, 400)
        for name, values in zip(("input_ids", "labels"), pair, strict=True):
            assert (batch[name][row, : len(values)].numpy() == values).all()
        assert re.match(r"<\|user\|>\d+ 201\d-\d\d-\d\d ", TOKENIZER.decode(pair[0]))
    ids, _ = Behavior(batches.log, TOKENIZER, 3, "validation", 400, 2, *choices, 1)[0]
    seen = next(iter(batches.validation_loader()))["input_ids"]
    assert (seen[0, -len(ids) :].numpy() == ids).all()
    assert all(re.match(r"\d+ 201\d-\d\d-\d\d ", text) for text in batches.texts(data))


def test_a_tokenizer_knows_the_months_that_moved_days_have(log: Log):
    moved, plain = ({text[:7] for text in texts(log, shift_days=by)} for by in (200, 0))
    assert {"2010-08", "2011-10"} <= moved and "2010-08" not in plain
