"""Histories as text, and examples whose answers pandas derives again from the question's words."""

import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from comet_pl.errors import UserError
from data.behavior.answers import Query, solve
from data.behavior.baselines import bm25_events, last_events
from data.behavior.event_text import encode_history, lines, texts
from data.behavior.events import Log, split_users
from data.behavior.examples import SPLITS, Behavior
from data.behavior.questions import KINDS, age_class, wording
from data.behavior.read_log import read_log
from data.tokenizer import train_tokenizer
from tests.data.behavior.logs import (
    GOOD,
    NAMES,
    ROWS,
    behavior,
    check,
    events,
    frames,
    tokenizer,
    write,
)

LAYOUTS = ["days", "lines", "items"]
TOKENIZER = tokenizer()


# -- text


def test_no_split_sees_another_ones_users(log: Log):
    seen = {}
    for split in SPLITS:
        examples = behavior(log, split)
        seen[split] = {log.histories[examples.question(i).user].user for i in range(40)}
    assert all(len(users) == 3 for users in seen.values())
    assert len(set.union(*seen.values())) == 9
    shown = "\n".join(texts(log))
    for history in log.histories:
        if history.user in seen["validation"] | seen["test"]:
            known = sum(f"{day}{line}" in shown for day, line in lines(history, log))
            assert known <= 1, "unseen by the tokenizer too"


def test_lines(tmp_path: Path):
    mug = {"item": "21495"}
    second = {"action": "cancel", "quantity": -1, "price": 1234.5678}
    rows = [
        GOOD | mug | {"timestamp": "2010-12-01T14:41:00", "quantity": 25, "price": 0.42},
        GOOD | mug | {"timestamp": "2010-12-01T14:41:07"} | second,
        GOOD | {"timestamp": "2010-12-03", "price": -2},
    ]
    write(tmp_path / "events.jsonl", rows)
    items = [{"item": "21495", "description": " RED\n MUG "}, {"item": 7, "description": "CUP"}]
    write(tmp_path / "items.jsonl", items)
    log, bare = read_log(tmp_path), read_log(tmp_path, descriptions=False)
    assert lines(log.histories[0], log) == [
        ("2010-12-01\n", "14:41 purchase 25 x RED MUG (21495) at 0.42\n"),
        ("2010-12-01\n", "14:41:07 cancel -1 x RED MUG (21495) at 1234.5678\n"),
        ("2010-12-03\n", "00:00 purchase 1 x CUP (7) at -2.00\n"),
    ]
    for shown, layout, number, line in [
        (bare, "days", 0, "14:41 purchase 25 x 21495 at 0.42\n"),
        (log, "lines", 2, "2010-12-03 00:00 purchase 1 x CUP (7) at -2.00\n"),
        (log, "items", 0, "21495 2010-12-01 14:41 purchase 25 x RED MUG at 0.42\n"),
        (bare, "items", 2, "7 2010-12-03 00:00 purchase 1 x at -2.00\n"),
    ]:
        assert lines(shown.histories[0], shown, layout)[number][1] == line


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_event_knows_its_tokens(log: Log, layout: str):
    history, decode = log.histories[2], TOKENIZER.decode
    shown, encoded = lines(history, log, layout), encode_history(history, log, TOKENIZER, layout)
    for number, (day, line) in enumerate(shown):
        assert decode(encoded.ids[encoded.starts[number] : encoded.ends[number]]) == line
        assert decode(encoded.ids[encoded.heads[number] : encoded.bodies[number]]) == day
    for chosen in ([], [3], [4, 5, 6], [0, 7, 8, 20, 21, 149], list(range(30, 90))):
        text, before = "", ""
        for day, line in (shown[event] for event in chosen):
            text, before = text + day * (day != before) + line, day
        assert decode(encoded.tokens(np.array(chosen, dtype=int))) == text
    for end in (0, 1, 5, 80, 150):
        sizes = [len(encoded.tokens(np.arange(start, end))) for start in range(end)]
        for room in (0, 20, 60, 500, 10**6):
            fitting = (start for start in range(end) if sizes[start] <= room)
            assert encoded.fitting(end, room) == next(fitting, end)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("length", [400, 3000])
def test_an_example_is_history_question_answer(log: Log, layout: str, length: int):
    examples, decode = behavior(log, length=length, layout=layout), TOKENIZER.decode
    for number in range(60 if length == 400 else 20):
        question = examples.question(number)
        text, answer = examples.text(question), question.answer
        ids, labels = examples[number]
        assert len(ids) <= length
        assert decode(ids) == f"<|user|>{text}<|assistant|>{answer}<|end|>"
        assert decode(labels[labels != -100]) == f"{answer}<|end|>"
        asked = wording(question.query, log, "purchase", numbers=layout == "items")
        assert text.split("\n\n")[1] == asked
        encoded = examples.encoded(question.user)
        if question.start:  # an event more would be too long
            longer = encoded.tokens(np.arange(question.start - 1, question.end))
            assert len(longer) + examples.reserved > length
        if question.age:
            tail = encoded.tokens(question.events())[-question.age :]
            oldest = lines(log.histories[question.user], log, layout)[question.evidence[0]][1]
            assert decode(tail).startswith(oldest)
    row = examples.row(5)
    said = [examples.text(examples.question(5)), row["answer"]]
    assert [message["content"] for message in row["messages"]] == said
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
    assert json.loads(json.dumps(row)) == row


def test_examples_are_pure_functions_of_seed_split_index_and_length(log: Log):
    examples, again = behavior(log), pickle.loads(pickle.dumps(behavior(log)))
    backwards = [again.question(number) for number in reversed(range(30))][::-1]
    state = np.random.get_state()[1].copy()
    assert [examples.question(number) for number in range(30)] == backwards
    assert np.array_equal(np.random.get_state()[1], state)
    assert [examples.question(number, 500) for number in range(30)] != backwards
    assert Behavior(log, TOKENIZER, 8, "train", 3000, 9).question(0) != backwards[0]


def test_options_that_cannot_be(log: Log):
    priceless = dataclasses.replace(log, has_price=False)
    for options, reason in [
        (
            {"kinds": ["cuont"]},
            r"data.kinds: 'cuont' given \(did you mean count\?\), allowed: last_time",
        ),
        (
            {"action": "purchas"},
            r"data.action: 'purchas' given \(did you mean purchase\?\), the log has: cancel, purch",
        ),
        ({"log": priceless, "kinds": ["total"]}, "total given, but data.price_column is null"),
    ]:
        with pytest.raises(UserError, match=reason):
            behavior(**{"log": log} | options)
    with pytest.raises(UserError, match=r"data.train_length: 60 given, too short for any question"):
        behavior(log, length=60)[0]


# -- answers


def test_answers_on_a_generated_log(log: Log):
    users = frames(ROWS)
    for split in SPLITS:
        examples = behavior(log, split)
        assert check(examples, users, 60) == set(KINDS)
        check(examples, users, 30, length=400)


@pytest.fixture(scope="module")
def real(shared_data: Path):
    root = shared_data / "user_behavior"
    log = read_log(root)
    return log, frames(root / "events.jsonl"), train_tokenizer(list(texts(log))[:3000], 512)


@pytest.mark.parametrize(
    "split",
    [
        "test",
        pytest.param("train", marks=pytest.mark.slow),
        pytest.param("validation", marks=pytest.mark.slow),
    ],
)
def test_answers_on_real_data(real, split: str):
    log, users, tokens = real
    sizes = {name: len(part) for name, part in split_users(list(users)).items()}
    assert sizes == {"train": 11, "validation": 3, "test": 3}
    assert check(behavior(log, split, tokens=tokens), users, 60, length=16384) == set(KINDS)


@given(st.data())
def test_answers_on_any_small_log(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    """Few items, few days, many equal times: with ties, repeats and empty windows."""
    kinds = st.sampled_from(["purchase", "purchase", "cancel"])
    prices = st.sampled_from([0.125, 2.5, 0.3333])
    row = st.tuples(st.integers(0, 40), kinds, st.sampled_from("ABC"), st.integers(-3, 9), prices)
    size = data.draw(st.integers(1, 25))
    rows = []
    for user in "abc":
        drawn = data.draw(st.lists(row, min_size=size, max_size=size))
        for hours, *rest in sorted(drawn, key=lambda event: event[0]):
            time = np.datetime64("2011-01-30T20:00:00") + np.timedelta64(3 * hours, "h")
            rows.append(dict(zip(NAMES, [f"u{user}", str(time), *rest], strict=True)))
    log = read_log(write(tmp_path_factory.mktemp("small") / "events.jsonl", rows))
    if "purchase" not in log.actions:
        return
    users = frames(rows)
    for split in SPLITS:
        try:
            check(behavior(log, split, length=data.draw(st.integers(150, 600))), users, 6)
        except UserError as error:
            if "too short for any question" not in str(error):
                raise


@pytest.mark.slow
def test_kinds_answers_and_ages_are_balanced(tmp_path: Path):
    log = read_log(write(tmp_path / "events.jsonl", events(users=9, count=700, items=150, seed=3)))
    examples = behavior(log, length=16384)
    asked = {kind: [] for kind in KINDS}
    for number in range(1600):
        question = examples.question(number)
        asked[question.query.kind].append(question)
    assert all(150 <= len(questions) <= 250 for questions in asked.values()), "200 expected"
    ages = {"yes": [], "no": []}
    for question in asked["bought_after"]:
        ages[question.answer].append(question.age)
    assert 0.38 < len(ages["yes"]) / len(asked["bought_after"]) < 0.62
    ratio = np.mean(ages["yes"]) / np.mean(ages["no"])
    assert 0.7 < ratio < 1.4, "the age says nothing about the answer"
    counts = np.bincount([int(question.answer) for question in asked["count"]], minlength=10)
    assert counts[0] == 0
    assert counts[1:].max() < 0.25 * counts.sum()
    for kind in ("last_time", "first_time", "followed"):
        # the window cuts the last class
        classes = np.bincount(age_class([question.age for question in asked[kind]]))[:-1]
        assert len(classes) >= 4
        assert classes.min() > 0.1 * classes.sum(), kind


def test_the_oracle_guesses_where_it_sees_too_little(log: Log):
    examples = behavior(log, kinds=["bought_after", "last_time"])
    for number in range(30):
        question = examples.question(number)
        item, query = log.histories[question.user].item, question.query
        x, y = (
            [event for event in question.evidence if item[event] == asked]
            for asked in (query.item, query.other)
        )
        answers = [examples.oracle(question, np.array(seen, dtype=int)) for seen in ([], x, y)]
        if query.kind == "last_time":
            assert answers[:2] == ["", question.answer]
        else:
            assert answers == ["no", "no", "yes"]


def test_a_tie_has_no_answer(tmp_path: Path):
    times = [f"2011-01-0{number // 2 + 1}T10:00:00" for number in range(4)]
    rows = [GOOD | {"timestamp": t, "item": item} for t, item in zip(times, "ABBA", strict=True)]
    log = read_log(write(tmp_path / "events.jsonl", rows))
    day = np.datetime64("2011-01-01")
    most = Query("most_frequent", first_day=day, last_day=day + 1)
    for query, seen, solution in [
        (most, [0, 1, 2, 3], None),
        (most, [0, 1, 2], ("B", (1, 2))),
        (Query("bought_after", 0, 1), [0, 1, 2, 3], None),  # last bought at the same time
        (Query("bought_after", 0, 1), [0, 2], ("yes", (0, 2))),
        (Query("last_time", 1), [0, 3], None),
    ]:
        assert solve(query, log.histories[0], log, np.array(seen)) == solution


# -- what other methods see


def test_truncation_and_retrieval_keep_to_their_budget(log: Log):
    pytest.importorskip("bm25s")
    examples = behavior(log)
    right = {last_events: [], bm25_events: []}
    for number in range(80):
        question = examples.question(number)
        for method in right:
            seen = method(examples, question, 500)
            assert 400 < len(examples.encoded(question.user).tokens(seen)) <= 500
            assert (np.diff(seen) > 0).all() and question.start <= seen[0]
            assert seen[-1] < question.end
            shown = TOKENIZER.decode(examples.prompt(question, seen)[1:-1])
            assert examples.text(question, seen) == shown
            if method is last_events:
                assert seen[-1] == question.end - 1 and len(seen) == seen[-1] - seen[0] + 1
            if question.query.kind in ("last_time", "first_time"):
                right[method].append(examples.oracle(question, seen) == question.answer)
        if question.query.kind == "last_time" and question.age <= 400:
            assert right[last_events][-1]
    gain = np.mean(right[bm25_events]) - np.mean(right[last_events])
    assert gain > 0.2, "events that name the item come first"
