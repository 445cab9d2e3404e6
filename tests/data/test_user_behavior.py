"""Event logs, histories as text, and questions whose answers pandas derives again from the question's words."""

from __future__ import annotations

import csv
import dataclasses
import functools
import gzip
import io
import json
import lzma
import pickle
import re
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from comet_pl.config.schema import UserBehaviorData
from comet_pl.errors import UserError
from data.behavior.answers import Query, solve
from data.behavior.baselines import bm25_events, last_events
from data.behavior.event_text import encode_history, lines, texts
from data.behavior.events import Log, split_users
from data.behavior.examples import SPLITS, Behavior
from data.behavior.questions import KINDS, age_class, wording
from data.behavior.read_log import Columns, read_log
from data.tokenizer import train_tokenizer
from data.user_behavior import UserBehaviorBatches

PACK = {"": bytes, ".xz": lzma.compress, ".gz": gzip.compress, ".zst": zstandard.compress}
LAYOUTS = ["days", "lines", "items"]
NAMES = ["user_id", "timestamp", "action", "item", "quantity", "price"]


def events(users: int = 9, count: int = 150, items: int = 12, seed: int = 0) -> list[dict]:
    """A random log: several events at the same time, cancels between purchases, items that come back."""
    random = np.random.default_rng(seed)
    found = []
    for user in range(users):
        minutes = np.sort(random.integers(0, 90 * 24 * 6, count)) * 10
        for time in np.datetime64("2011-01-20T00:00:00") + minutes.astype("timedelta64[m]"):
            action, quantity = (
                ("cancel", -1)
                if random.random() < 0.1
                else ("purchase", int(random.integers(1, 30)))
            )
            row = [
                f"u{user}",
                str(time),
                action,
                f"{1000 + int(random.zipf(1.3)) % items}",
                quantity,
                round(float(random.random() * 9), 2),
            ]
            found.append(dict(zip(NAMES, row, strict=True)))
    return found


ROWS = events()
ITEMS = [
    {"item": str(1000 + number), "description": f"THING {number} ,  RED"} for number in range(12)
]
TOKENIZER = train_tokenizer(
    [json.dumps(ROWS), "On which day is the last purchase of? from to"], 400
)


def write(path: Path, rows: list, pack: str = "") -> Path:
    """Rows as the file's ending says; a row that is bytes is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
        return path
    if ".csv" in path.name:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]) if rows else NAMES)
        writer.writeheader()
        writer.writerows(rows)
        content = text.getvalue().encode()
    else:
        content = b"".join(
            (row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows
        )
    path.write_bytes(PACK[pack](content))
    return path


def behavior(
    log: Log,
    split: str = "train",
    length: int = 3000,
    count: int = 100,
    tokenizer=TOKENIZER,
    **options,
) -> Behavior:
    return Behavior(log, tokenizer, 7, split, length, count, **options)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    root = tmp_path_factory.mktemp("log")
    write(root / "events.jsonl", ROWS)
    write(root / "items.jsonl", ITEMS)
    return read_log(root)


# -- reading ----------------------------------------------------------------------------------------------------------------------------


def same(log: Log, other: Log) -> bool:
    assert (log.items, log.descriptions, log.actions) == (
        other.items,
        other.descriptions,
        other.actions,
    )
    for one, two in zip(log.histories, other.histories, strict=True):
        assert one.user == two.user
        assert all(
            np.array_equal(getattr(one, name), getattr(two, name))
            for name in ("time", "action", "item", "quantity", "price")
        )
    return True


@pytest.mark.parametrize(
    "name",
    ["jsonl", "jsonl.xz", "jsonl.gz", "jsonl.zst", "csv", "csv.gz", "csv.xz", "csv.zst", "parquet"],
)
def test_every_format_gives_the_same_log(tmp_path: Path, log: Log, name: str):
    pack = Path(name).suffix if Path(name).suffix in PACK else ""
    write(tmp_path / f"events.{name}", ROWS, pack)
    write(tmp_path / f"items.{name}", ITEMS, pack)
    assert same(read_log(tmp_path), log)
    assert same(read_log(tmp_path / f"events.{name}", tmp_path / f"items.{name}"), log)


def test_files_with_other_names_and_columns(tmp_path: Path, log: Log):
    names = dict(zip(NAMES, ["who", "when", "what", "thing", "how many", "each"], strict=True))
    renamed = [{names[name]: value for name, value in row.items()} for row in ROWS]
    for part in range(3):
        write(tmp_path / f"part-{part}.jsonl", renamed[part * 450 : (part + 1) * 450])
    write(
        tmp_path / "items.csv",
        [{"thing": row["item"], "name": row["description"]} for row in ITEMS],
    )
    assert same(
        read_log(
            tmp_path, columns=Columns("who", "when", "what", "thing", "how many", "each", "name")
        ),
        log,
    )
    plain = read_log(
        tmp_path / "part-0.jsonl",
        columns=Columns("who", "when", None, "thing", None, None),
        action="view",
    )
    assert (
        lines(plain.histories[0], plain)[0][1]
        == f"{ROWS[0]['timestamp'][11:16]} view {ROWS[0]['item']}\n"
    )
    assert {
        behavior(plain, length=600, action="view").question(number).query.kind
        for number in range(80)
    } == set(KINDS) - {"total"}


GOOD = {
    "user_id": "a",
    "timestamp": "2011-01-01T10:00:00",
    "action": "purchase",
    "item": "7",
    "quantity": 1,
    "price": 1.5,
}
BAD = {
    "null field": (GOOD | {"item": None}, "item: null given"),
    "missing field": (
        {key: GOOD[key] for key in NAMES if key != "timestamp"} | {"timestmp": 1},
        r"timestamp: missing \(did you mean timestmp",
    ),
    "empty text": (GOOD | {"user_id": "  "}, "user_id: '  ' given"),
    "list": (GOOD | {"user_id": ["a"]}, "user_id: .* given, text"),
    "half a character": (
        b'{"user_id": "\\ud800", "timestamp": "2011-01-01", "action": "b", "item": "7", "quantity": 1, "price": 1}',
        "user_id",
    ),
    "NaN price": (GOOD | {"price": float("nan")}, "price: nan given, a number"),
    "infinite price": (GOOD | {"price": float("inf")}, "price: inf given, a number"),
    "words for a price": (GOOD | {"price": "cheap"}, "price: 'cheap' given, a number"),
    "half an item": (GOOD | {"quantity": 0.5}, "quantity: 0.5 given, a whole number"),
    "no time": (
        GOOD | {"timestamp": "1st of May"},
        "timestamp: '1st of May' given, a time in ISO 8601",
    ),
    "seconds": (
        GOOD | {"timestamp": 1293876000},
        "timestamp: 1293876000 given, a time in ISO 8601",
    ),
    "time zone": (
        GOOD | {"timestamp": "2011-01-01T10:00:00+01:00"},
        "timestamp: .* with a time zone, but the log's first",
    ),
    "unknown item": (GOOD | {"item": "8"}, "item: '8' given, the item table has no such item"),
    "no JSON": (b'{"user_id": ', "not JSON"),
    "no object": (b"[1]", "a JSON object is needed"),
    "not UTF-8": (b'{"user_id": "\xff"}', "not UTF-8"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_unusable_row_is_named_by_file_and_line(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
):
    row, reason = BAD[case]
    write(tmp_path / "events.jsonl", [GOOD, b"", row, GOOD | {"quantity": 2}])
    write(tmp_path / "items.jsonl", [{"item": "7", "description": "MUG"}])
    with pytest.raises(UserError, match=rf"events.jsonl:3: malformed row: {reason}"):
        read_log(tmp_path)
    assert len(read_log(tmp_path, on_error="skip").histories[0]) == 2
    assert re.search(
        rf"1 unusable row skipped; the first: .*events.jsonl:3: {reason}", capsys.readouterr().out
    )


def test_unusable_rows_of_other_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "events.csv"
    good = b"user_id,timestamp,action,item,quantity,price\na,2011-01-01,purchase,7,1,2\n"
    for number, (row, reason) in enumerate(
        [(b"a,2011-01-01,purchase,7,1", "price: null given"), (b"a,2011-01-01,purchase,7,1,2,3", "7 fields, but the header has 6"),
         (b"a,2011-01-01,purchase,\xff,1,2", "not UTF-8"), (b"a,2011-01-01,purchase,7,1,nan", "price: 'nan' given")]
    ):  # fmt: skip
        path.write_bytes(good + row + b"\na,2011-01-02,purchase,7,1,2\n")
        with pytest.raises(UserError, match=rf"events.csv:3: malformed row: {reason}"):
            read_log(path)
        assert len(read_log(path, on_error="skip").histories[0]) == 2, number
        assert "1 unusable row skipped; the first:" in capsys.readouterr().out
    table = write(tmp_path / "other.parquet", [GOOD, GOOD | {"price": None}])
    with pytest.raises(UserError, match=r"other.parquet:2: malformed row: price: (nan|null) given"):
        read_log(table)
    path.write_bytes(good.replace(b"item", b"thing"))
    with pytest.raises(
        UserError,
        match=r"events.csv:2: malformed row: item: missing; the columns are user_id, timestamp, action, thing, q",
    ):
        read_log(path)


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_quote_that_is_never_closed_is_named_where_it_opens(tmp_path: Path, on_error: str):
    """However unusable rows are treated: what it swallows are many."""
    path = tmp_path / "events.csv"
    row = "a,2011-01-01,purchase,7,1,2\n"
    path.write_text(
        "user_id,timestamp,action,item,quantity,price\n" + row + row.replace("7", '"7') + row * 20
    )
    with pytest.raises(
        UserError,
        match=r"events.csv:3: a quote is never closed, the 21 lines from here on are one field$",
    ):
        read_log(path, on_error=on_error)
    path.write_text(
        "user_id,timestamp,action,item,quantity,price\n" + row + row.replace("7", '"7"7') + row
    )
    if on_error == "skip":
        assert len(read_log(path, on_error=on_error).histories[0]) == 2
    else:
        with pytest.raises(UserError, match=r"events.csv:3: malformed row: .*expected after"):
            read_log(path)


def test_files_that_cannot_be_read(tmp_path: Path):
    whole = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
    for pack in (".xz", ".gz", ".zst"):
        for kind in ("jsonl", "csv"):
            path = tmp_path / f"cut.{kind}{pack}"
            content = (
                whole if kind == "jsonl" else b"user_id,timestamp\n" + b"a,2011-01-01\n" * 20_000
            )
            packed = PACK[pack](content)
            path.write_bytes(packed[: len(packed) // 2])
            with pytest.raises(
                UserError, match=rf"cut.{kind}{pack}: cannot be read after line \d+: "
            ):
                read_log(path, on_error="skip")
    (tmp_path / "cut.parquet").write_bytes(
        write(tmp_path / "whole.parquet", ROWS).read_bytes()[:-100]
    )
    with pytest.raises(UserError, match=r"cut.parquet: cannot be read"):
        read_log(tmp_path / "cut.parquet")
    for kind in ("jsonl", "csv", "jsonl.gz"):
        empty = write(tmp_path / f"empty.{kind}", [], ".gz" if kind.endswith("gz") else "")
        with pytest.raises(UserError, match=rf"empty.{kind}: no rows"):
            read_log(empty)
        with pytest.raises(
            UserError, match=rf"empty.{kind} has no usable event; 1 unusable row skipped"
        ):
            read_log(empty, on_error="skip")
    (tmp_path / "notes.txt").write_text("none")
    (tmp_path / "nothing").mkdir()
    for root, items, reason in [
        ("absent", None, "data.root: .*absent is no file or folder"),
        ("notes.txt", None, r"data.root: .*notes.txt is no file of the kinds \*.jsonl"),
        ("nothing", None, "data.root: .*nothing holds no event file"),
        ("whole.parquet", "absent.csv", "data.items: .*absent.csv is no file"),
        ("whole.parquet", "empty.jsonl", "data.items: .*empty.jsonl has no usable row"),
    ]:
        with pytest.raises(UserError, match=reason):
            read_log(tmp_path / root, items and tmp_path / items)


def test_events_out_of_order_are_refused_or_sorted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    days = [3, 1, 2, 2, 5]
    rows = [
        GOOD | {"timestamp": f"2011-01-0{day}T10:00:00", "quantity": number}
        for number, day in enumerate(days)
    ]
    path = write(tmp_path / "events.jsonl", rows)
    with pytest.raises(
        UserError, match=r"events.jsonl:2: earlier than an event of the same user before it"
    ):
        read_log(path)
    history = read_log(path, on_error="skip").histories[0]
    assert history.quantity.tolist() == [1, 2, 3, 0, 4], "stable"
    assert "3 events were out of order and are sorted; the first:" in capsys.readouterr().out
    others = write(
        tmp_path / "two.jsonl", [GOOD | {"timestamp": "2011-02-01"}, GOOD | {"user_id": "b"}]
    )
    assert [history.user for history in read_log(others).histories] == ["a", "b"], (
        "the order is each user's own"
    )


def test_equal_rows_are_kept_or_dropped_and_always_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = write(
        tmp_path / "events.jsonl", [GOOD, GOOD | {"item": "8"}, GOOD, GOOD | {"user_id": "b"}, GOOD]
    )
    assert sum(map(len, read_log(path).histories)) == 5
    assert re.search(
        r"^2 events equal an earlier one in every column, the first: .*events.jsonl:3; kept",
        capsys.readouterr().out,
    )
    dropped = read_log(path, duplicates="drop")
    assert [dropped.items[item] for item in dropped.histories[0].item] == ["7", "8"]
    assert "left out" in capsys.readouterr().out


def test_times_with_offsets_become_utc(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    times = ["2011-01-01T00:30:00+01:00", "2010-12-31T20:00:00-05:00", "2011-01-01T02:00:00Z"]
    log = read_log(write(tmp_path / "events.jsonl", [GOOD | {"timestamp": time} for time in times]))
    assert log.histories[0].time.astype(str).tolist() == [
        "2010-12-31T23:30:00",
        "2011-01-01T01:00:00",
        "2011-01-01T02:00:00",
    ]
    assert "times with 3 offsets from UTC are shown in UTC" in capsys.readouterr().out
    naive = write(tmp_path / "events.jsonl", [GOOD | {"timestamp": times[0]}, GOOD])
    with pytest.raises(
        UserError,
        match=r"events.jsonl:2: .*without a time zone, but the log's first event is with one",
    ):
        read_log(naive)


# -- splits -----------------------------------------------------------------------------------------------------------------------------


@given(st.sets(st.text(min_size=1, max_size=5), min_size=3, max_size=60), st.randoms())
def test_users_are_split_once_for_all(users: set[str], random):
    shuffled = sorted(users)
    random.shuffle(shuffled)
    found = split_users(shuffled)
    assert found == split_users(sorted(users))
    assert sorted(user for part in found.values() for user in part) == sorted(users), (
        "each user in one split"
    )
    least = 3 if len(users) >= 9 else 1
    assert all(len(part) >= least for part in found.values())
    grown = split_users([*users, "a new user"])
    if len(grown["test"]) == len(found["test"]):
        moved = sum(user not in grown[split] for split, part in found.items() for user in part)
        assert moved <= 2


def test_too_few_users():
    with pytest.raises(UserError, match="2 users found, three are needed"):
        split_users(["a", "b"])


def test_no_split_sees_another_ones_users(log: Log):
    seen = {
        split: {log.histories[behavior(log, split).question(i).user].user for i in range(40)}
        for split in SPLITS
    }
    assert all(len(users) == 3 for users in seen.values())
    assert len(set.union(*seen.values())) == 9
    shown = "\n".join(texts(log))
    for user in seen["validation"] | seen["test"]:
        history = log.histories[[history.user for history in log.histories].index(user)]
        assert sum(f"{day}{line}" in shown for day, line in lines(history, log)) <= 1, (
            "unseen by the tokenizer too"
        )


# -- text -------------------------------------------------------------------------------------------------------------------------------


def test_lines(tmp_path: Path):
    rows = [
        GOOD | {"timestamp": "2010-12-01T14:41:00", "item": "21495", "quantity": 25, "price": 0.42},
        GOOD
        | {
            "timestamp": "2010-12-01T14:41:07",
            "item": "21495",
            "action": "cancel",
            "quantity": -1,
            "price": 1234.5678,
        },
        GOOD | {"timestamp": "2010-12-03", "price": -2},
    ]
    write(tmp_path / "events.jsonl", rows)
    write(
        tmp_path / "items.jsonl",
        [{"item": "21495", "description": " RED\n MUG "}, {"item": 7, "description": "CUP"}],
    )
    log = read_log(tmp_path)
    assert lines(log.histories[0], log) == [
        ("2010-12-01\n", "14:41 purchase 25 x RED MUG (21495) at 0.42\n"),
        ("2010-12-01\n", "14:41:07 cancel -1 x RED MUG (21495) at 1234.5678\n"),
        ("2010-12-03\n", "00:00 purchase 1 x CUP (7) at -2.00\n"),
    ]
    bare = read_log(tmp_path, descriptions=False)
    assert lines(bare.histories[0], bare)[0][1] == "14:41 purchase 25 x 21495 at 0.42\n"
    assert lines(log.histories[0], log, "lines")[2] == (
        "",
        "2010-12-03 00:00 purchase 1 x CUP (7) at -2.00\n",
    )
    assert lines(log.histories[0], log, "items")[0] == (
        "",
        "21495 2010-12-01 14:41 purchase 25 x RED MUG at 0.42\n",
    )
    assert lines(bare.histories[0], bare, "items")[2] == (
        "",
        "7 2010-12-03 00:00 purchase 1 x at -2.00\n",
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_event_knows_its_tokens(log: Log, layout: str):
    history = log.histories[2]
    shown, encoded = lines(history, log, layout), encode_history(history, log, TOKENIZER, layout)
    for number, (day, line) in enumerate(shown):
        assert TOKENIZER.decode(encoded.ids[encoded.starts[number] : encoded.ends[number]]) == line
        assert TOKENIZER.decode(encoded.ids[encoded.heads[number] : encoded.bodies[number]]) == day
    for chosen in ([], [3], [4, 5, 6], [0, 7, 8, 20, 21, 149], list(range(30, 90))):
        text, before = "", ""
        for event in chosen:
            text, before = (
                text + shown[event][0] * (shown[event][0] != before) + shown[event][1],
                shown[event][0],
            )
        assert TOKENIZER.decode(encoded.tokens(np.array(chosen, dtype=int))) == text
    for end in (0, 1, 5, 80, 150):
        for room in (0, 20, 60, 500, 10**6):
            sizes = [len(encoded.tokens(np.arange(start, end))) for start in range(end)]
            assert encoded.fitting(end, room) == next(
                (start for start in range(end) if sizes[start] <= room), end
            )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("length", [400, 3000])
def test_an_example_is_history_question_answer(log: Log, layout: str, length: int):
    found = behavior(log, length=length, layout=layout)
    for number in range(60):
        question = found.question(number)
        ids, labels = found[number]
        assert len(ids) <= length
        assert (
            TOKENIZER.decode(ids)
            == f"<|user|>{found.text(question)}<|assistant|>{question.answer}<|end|>"
        )
        assert TOKENIZER.decode(labels[labels != -100]) == f"{question.answer}<|end|>"
        _, asked = found.text(question).split("\n\n")
        assert asked == wording(question.query, log, "purchase", numbers=layout == "items")
        encoded = found.encoded(question.user)
        assert (
            len(encoded.tokens(np.arange(max(0, question.start - 1), question.end)))
            + found.reserved
            > length
            or not question.start
        )
        if question.age:
            tail = encoded.tokens(question.events())[-question.age :]
            oldest = lines(log.histories[question.user], log, layout)[question.evidence[0]][1]
            assert TOKENIZER.decode(tail).startswith(oldest)
    row = found.row(5)
    assert row["messages"][0] == {"role": "user", "content": found.text(found.question(5))}
    assert row["messages"][1] == {"role": "assistant", "content": row["answer"]}
    assert json.loads(json.dumps(row)) == row


def test_examples_are_pure_functions_of_seed_split_index_and_length(log: Log):
    found, again = behavior(log), pickle.loads(pickle.dumps(behavior(log)))
    backwards = [again.question(number) for number in reversed(range(30))][::-1]
    assert [found.question(number) for number in range(30)] == backwards
    assert [found.question(number, 500) for number in range(30)] != backwards
    assert Behavior(log, TOKENIZER, 8, "train", 3000, 9).question(0) != found.question(0)
    state = np.random.get_state()[1].copy()
    found.question(31)
    assert np.array_equal(np.random.get_state()[1], state)


def test_options_that_cannot_be(log: Log):
    for options, reason in [
        (
            {"kinds": ["cuont"]},
            r"data.kinds: 'cuont' given \(did you mean count\?\), allowed: last_time",
        ),
        (
            {"action": "purchas"},
            r"data.action: 'purchas' given \(did you mean purchase\?\), the log has: cancel, purchase",
        ),
    ]:
        with pytest.raises(UserError, match=reason):
            behavior(log, **options)
    with pytest.raises(UserError, match=r"data.train_length: 60 given, too short for any question"):
        behavior(log, length=60)[0]
    with pytest.raises(UserError, match=r"total given, but data.price_column is null"):
        behavior(dataclasses.replace(log, has_price=False), kinds=["total"])


# -- answers ----------------------------------------------------------------------------------------------------------------------------

DATES = r"from (?P<first>\S+) to (?P<last>\S+)\?"
QUESTIONS = {
    "time": r"On which day is the (?P<which>last|first) purchase of (?P<x>.*)\?",
    "count": rf"How many times is there a purchase of (?P<x>.*) {DATES}",
    "most": rf"Which item has the most purchase lines {DATES}",
    "after": r"Is there a purchase of (?P<y>.*) after the last purchase of (?P<x>.*)\?",
    "followed": r"Which item is in the next purchase after the (?P<which>last|first) purchase of (?P<x>.*)\?",
    "total": r"What is the purchase total of (?P<month>\S+)\?",
    "next": r"Which item is in the next purchase\?",
}


def derive(asked: str, whole: pd.DataFrame, start: int, end: int) -> tuple[str, list[int]]:
    """(answer, events that count), from the question's words and a user's rows alone."""
    kind, said = next(
        (kind, found.groupdict())
        for kind, form in QUESTIONS.items()
        if (found := re.fullmatch(form, asked))
    )
    if kind == "next":
        return whole.loc[end:].query("action == 'purchase'").iloc[0]["item"], []
    shown = whole.iloc[start:end].query("action == 'purchase'")
    x, y = (
        shown[shown["item"] == re.sub(r".*\((.*)\)$", r"\1", said.get(name) or "")] for name in "xy"
    )
    if "first" in said:
        shown = shown[(shown["day"] >= said["first"]) & (shown["day"] <= said["last"])]
    if kind == "time":
        row = x.iloc[-1 if said["which"] == "last" else 0]
        return row["day"], [row.name]
    if kind == "count":
        x = x[x.index.isin(shown.index)]
        return str(len(x)), x.index.tolist()
    if kind == "most":
        counts = shown["item"].value_counts()
        assert len(counts) == 1 or counts.iloc[0] > counts.iloc[1], "a tie"
        assert counts.iloc[0] > 1
        return counts.index[0], shown.index[shown["item"] == counts.index[0]].tolist()
    if kind == "after":
        assert y["timestamp"].max() != x["timestamp"].max(), "neither before nor after"
        return "yes" if (y["timestamp"] > x["timestamp"].max()).any() else "no", sorted(
            [x.index[-1], y.index[-1]]
        )
    if kind == "followed":
        at = x.index[-1 if said["which"] == "last" else 0]
        after = shown.loc[at + 1 :].iloc[0]
        assert after["item"] != shown.loc[at, "item"]
        return after["item"], [at, after.name]
    month = shown[shown["day"].str[:7] == said["month"]]
    total = sum(
        (
            Decimal(str(price)) * int(quantity)
            for price, quantity in zip(month["price"], month["quantity"], strict=True)
        ),
        Decimal(0),
    )
    return str(total.quantize(Decimal("0.01"), ROUND_HALF_UP)), month.index.tolist()


def frames(rows: list[dict] | Path) -> dict[str, pd.DataFrame]:
    table = pd.DataFrame(
        [json.loads(line) for line in rows.open()] if isinstance(rows, Path) else rows
    )
    table["day"] = table["timestamp"].str[:10]
    table = table.sort_values("timestamp", kind="stable")
    return {user: part.reset_index(drop=True) for user, part in table.groupby("user_id")}


def check(
    found: Behavior, users: dict[str, pd.DataFrame], count: int, length: int | None = None
) -> set[str]:
    kinds = set()
    for number in range(count):
        question = found.question(number, length)
        asked = wording(question.query, found.log, found.action)
        answer, evidence = derive(
            asked, users[found.log.histories[question.user].user], question.start, question.end
        )
        assert question.answer == answer, asked
        assert list(question.evidence) == evidence, asked
        assert all(question.start <= event < question.end for event in evidence)
        encoded = found.encoded(question.user)
        assert question.age == (
            int(encoded.ends[question.end - 1] - encoded.starts[evidence[0]]) if evidence else None
        )
        assert question.query.kind == "next_item" or evidence
        if evidence:
            assert found.oracle(question, question.events()) == answer
        kinds.add(question.query.kind)
    return kinds


def test_answers_on_a_generated_log(log: Log):
    users = frames(ROWS)
    for split in SPLITS:
        assert check(behavior(log, split), users, 120) == set(KINDS)
        check(behavior(log, split), users, 60, length=400)


def test_answers_on_real_data(shared_data: Path):
    root = shared_data / "user_behavior"
    log, users = read_log(root), frames(root / "events.jsonl")
    tokenizer = train_tokenizer(list(texts(log))[:3000], 512)
    assert {split: len(part) for split, part in split_users(list(users)).items()} == {
        "train": 11,
        "validation": 3,
        "test": 3,
    }
    for split in SPLITS:
        assert check(behavior(log, split, tokenizer=tokenizer), users, 60, length=16384) == set(
            KINDS
        )


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60))
def test_whole_words_lose_nothing(text: str):
    tokenizer = whole_words()
    assert (
        tokenizer.decode(
            tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        )
        == text
    )


@functools.cache
def whole_words() -> PreTrainedTokenizerFast:
    return train_tokenizer(
        [
            "2011-05-31 14:05 purchase 6 x 85123A at 2.55\n\nOn which day is the last purchase of 85123A?"
        ]
        * 5,
        400,
        (),
        True,
    )


def test_a_number_is_one_token_with_and_without_a_space_before_it():
    tokens = [
        whole_words().tokenize(text)
        for text in ("2011-05-31 at 2.55\n", "85123A", "purchase of 85123A?", "14:05")
    ]
    assert [len(found) for found in tokens] == [6, 1, 6, 1]  # a day is one token, and so is a space
    assert tokens[1][0] == tokens[2][4]


def test_a_row_may_ask_several_questions_about_its_window(log: Log):
    """The first is the example's own; every answer is derived again from the text; loss on answers and stop tokens alone."""
    found, one = behavior(log, length=1500, together=6), behavior(log, length=1500)
    users, several = frames(ROWS), 0
    for number in range(30):
        ids, labels = found.row_of(number)
        assert len(ids) <= 1500
        first = found.question(number)
        prompt = found.prompt(first)
        text = TOKENIZER.decode(ids)
        turns = [
            part.split("<|end|>")[0].split("<|assistant|>") for part in text.split("<|user|>")[1:]
        ]
        asked = [turns[0][0].rsplit("\n", 1)[1], *(turn[0] for turn in turns[1:])]
        user = users[log.histories[first.user].user]
        assert len(set(asked)) == len(asked)  # what is asked twice needs no lookup
        for question, (_, answer) in zip(asked, turns, strict=True):
            assert derive(question, user, first.start, first.end)[0] == answer
        assert (ids[: len(prompt)] == prompt).all()
        learned = TOKENIZER.decode(ids[labels != -100])
        assert learned == "".join(f"{answer}<|end|>" for _, answer in turns)
        several += len(turns) > 3
        again = found.row_of(number)
        assert (again[0] == ids).all()
        alone = one.row_of(number)
        assert (alone[0] == one.sample(one.question(number))[0]).all()
    assert several > 20


def test_training_rows_may_be_about_a_history_with_fewer_events_on_other_days(log: Log):
    """Its events are some of the user's, in order, all moved alike; answers are derived again from what is left; nothing is drawn twice."""
    found, shares, moves = behavior(log, length=500), [], set()
    plain = {history.user: history for history in log.histories}
    for number in range(60):
        one = found.varied(number, None, 0.1, 40)
        (history,) = one.log.histories
        whole, moved, places = plain[history.user], set(), []
        key = ("action", "item", "quantity", "price")
        rows = [tuple(int(getattr(whole, name)[n]) for name in key) for n in range(len(whole))]
        for n in range(
            len(history)
        ):  # prices are all but unique, so that an event is found again by what it says
            places.append(
                rows.index(
                    tuple(int(getattr(history, name)[n]) for name in key),
                    places[-1] + 1 if places else 0,
                )
            )
            moved.add(int((history.time[n] - whole.time[places[-1]]) // np.timedelta64(1, "s")))
        assert len(moved) == 1
        (by,) = moved
        assert by % 86400 == 0 and abs(by) <= 40 * 86400
        moves.add(by)
        shares.append(len(places) / (places[-1] - places[0] + 1))
        question = one.question(number)
        rows = [
            dict(
                zip(
                    NAMES,
                    (
                        history.user,
                        str(time),
                        log.actions[action],
                        log.items[item],
                        int(quantity),
                        price / 1e4,
                    ),
                    strict=True,
                )
            )
            for time, action, item, quantity, price in zip(
                *(getattr(history, name) for name in ("time", *key)), strict=True
            )
        ]
        (user,) = frames(rows).values()
        answer, evidence = derive(
            wording(question.query, log, "purchase"), user, question.start, question.end
        )
        assert (question.answer, list(question.evidence)) == (answer, evidence)
        again = found.varied(number, None, 0.1, 40)
        assert all(
            (one == other).all()
            for one, other in zip(again.row_of(number), one.row_of(number), strict=True)
        )
    assert len(moves) > 30 and max(shares) == 1 and min(shares) < 0.3
    assert found.varied(0, None, 1.0, 0) is found


def test_training_rows_may_have_their_events_on_new_days(log: Log):
    """In their order, at their time of day, and not far from the log's own days; the answer is derived again from the new days."""
    found, spans = behavior(log, length=500, kinds=["last_time"], layout="items"), []
    first, last = (day.astype("datetime64[D]") for day in log.ends)
    for number in range(60):
        one, plain = (
            found.varied(number, None, 0.3, 10, [5, 60]),
            found.varied(number, None, 0.3, 0),
        )
        (history,), (before,) = one.log.histories, plain.log.histories
        assert (history.item == before.item).all() and (history.price == before.price).all()
        assert (np.diff(history.time.astype(int)) >= 0).all()
        day = history.time.astype("datetime64[D]")
        assert first - 10 <= day.min() and day.max() <= last + 10
        assert sorted(history.time - day) == sorted(
            before.time - before.time.astype("datetime64[D]")
        )
        spans.append(int((day.max() - day.min()).astype(int)))
        question = one.question(number)
        at = np.flatnonzero(
            (history.item == question.query.item)
            & (history.action == log.actions.index("purchase"))
        )
        assert question.answer == str(day[at[at < question.end][-1]])
        assert (
            one.row_of(number)[0] == found.varied(number, None, 0.3, 10, [5, 60]).row_of(number)[0]
        ).all()
    assert max(spans) <= 60 and min(spans) < 15 and len(set(spans)) > 20


def test_a_data_module_hands_its_keys_on(tmp_path: Path):
    """Training rows are those of `varied` in the layout that is asked for, and so are the texts for a tokenizer; validation is as it is."""
    root = write(tmp_path / "events.jsonl", ROWS)
    keys = {
        "layout": "items",
        "keep_events": 0.5,
        "shift_days": 20,
        "new_days": [5, 60],
        "questions": 4,
        "train_length": 400,
    }
    data = UserBehaviorData(
        root=str(root), kinds=["last_time"], batch_size=3, val_examples=2, **keys
    )
    module = UserBehaviorBatches(data, TOKENIZER, seed=3, max_steps=2)
    batch = next(iter(module.train_loader()))
    plain = Behavior(
        module.log, TOKENIZER, 3, "train", 400, 6, ["last_time"], "purchase", "items", 4
    )
    for row in range(3):
        ids, labels = plain.varied(row, 400, 0.5, 20, [5, 60]).row_of(row, 400)
        assert (batch["input_ids"][row, : len(ids)].numpy() == ids).all() and (
            batch["labels"][row, : len(ids)].numpy() == labels
        ).all()
        assert re.match(r"<\|user\|>\d+ 201\d-\d\d-\d\d ", TOKENIZER.decode(ids))
    unchanged = Behavior(
        module.log, TOKENIZER, 3, "validation", 400, 2, ["last_time"], "purchase", "items", 1
    )
    seen = next(iter(module.validation_loader()))["input_ids"]
    assert (seen[0, -len(unchanged[0][0]) :].numpy() == unchanged[0][0]).all()
    assert all(re.match(r"\d+ 201\d-\d\d-\d\d ", text) for text in UserBehaviorBatches.texts(data))


def test_a_tokenizer_knows_the_months_that_moved_days_have(log: Log):
    months = {text[:7] for text in texts(log, shift_days=200) if text[:2] == "20"}
    assert {"2010-08", "2011-10"} <= months and not months & {
        text[:7] for text in texts(log) if text[:7] == "2010-08"
    }


@given(st.data())
def test_answers_on_any_small_log(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    """Few items, few days, many equal times: where ties, repeats and empty windows are common."""
    row = st.tuples(
        st.integers(0, 40),
        st.sampled_from(["purchase", "purchase", "cancel"]),
        st.sampled_from("ABC"),
        st.integers(-3, 9),
    )
    size = data.draw(st.integers(1, 25))
    rows = []
    for user in "abc":
        for hours, action, item, quantity in sorted(
            data.draw(st.lists(row, min_size=size, max_size=size)), key=lambda found: found[0]
        ):
            time = str(np.datetime64("2011-01-30T20:00:00") + np.timedelta64(3 * hours, "h"))
            rows.append(
                dict(
                    zip(
                        NAMES,
                        [
                            "u" + user,
                            time,
                            action,
                            item,
                            quantity,
                            data.draw(st.sampled_from([0.125, 2.5, 0.3333])),
                        ],
                        strict=True,
                    )
                )
            )
    log = read_log(write(tmp_path_factory.mktemp("small") / "events.jsonl", rows))
    if "purchase" not in log.actions:
        return
    users = frames(rows)
    for split in SPLITS:
        try:
            check(behavior(log, split, length=data.draw(st.integers(150, 600))), users, 12)
        except UserError as error:
            if "too short for any question" not in str(error):
                raise


# -- balance ----------------------------------------------------------------------------------------------------------------------------


def test_kinds_answers_and_ages_are_balanced(tmp_path: Path):
    log = read_log(write(tmp_path / "events.jsonl", events(users=9, count=700, items=150, seed=3)))
    found = behavior(log, length=16384)
    asked = [found.question(number) for number in range(1600)]
    by_kind = {
        kind: [question for question in asked if question.query.kind == kind] for kind in KINDS
    }
    assert all(150 <= len(questions) <= 250 for questions in by_kind.values()), "200 expected"
    yes = [question.answer == "yes" for question in by_kind["bought_after"]]
    assert 0.38 < np.mean(yes) < 0.62
    ages = {
        answer: np.mean(
            [question.age for question in by_kind["bought_after"] if question.answer == answer]
        )
        for answer in ("yes", "no")
    }
    assert 0.7 < ages["yes"] / ages["no"] < 1.4, "the age says nothing about the answer"
    counts = np.bincount([int(question.answer) for question in by_kind["count"]], minlength=10)
    assert counts[0] == 0
    assert counts[1:].max() < 0.25 * counts.sum()
    for kind in ("last_time", "first_time", "followed"):
        classes = np.bincount(age_class([question.age for question in by_kind[kind]]))[
            :-1
        ]  # the last one is cut by the window
        assert len(classes) >= 4
        assert classes.min() > 0.1 * classes.sum(), kind


# -- what other methods see -------------------------------------------------------------------------------------------------------------


def test_truncation_and_retrieval_keep_to_their_budget(log: Log):
    pytest.importorskip("bm25s")
    found = behavior(log)
    right = {"last": [], "bm25": []}
    for number in range(80):
        question = found.question(number)
        encoded, last, best = (
            found.encoded(question.user),
            last_events(found, question, 500),
            bm25_events(found, question, 500),
        )
        for events in (last, best):
            assert 400 < len(encoded.tokens(events)) <= 500
            assert (
                (np.diff(events) > 0).all()
                and question.start <= events[0]
                and events[-1] < question.end
            )
            assert found.text(question, events) == TOKENIZER.decode(
                found.prompt(question, events)[1:-1]
            )
        assert last[-1] == question.end - 1 and len(last) == last[-1] - last[0] + 1
        if question.query.kind in ("last_time", "first_time"):
            right["last"].append(found.oracle(question, last) == question.answer)
            right["bm25"].append(found.oracle(question, best) == question.answer)
            if question.age <= 400:
                assert question.query.kind == "first_time" or right["last"][-1]
    assert np.mean(right["bm25"]) > np.mean(right["last"]) + 0.2, (
        "events that name the item come first"
    )


def test_the_oracle_guesses_where_it_sees_too_little(log: Log):
    found = behavior(log, kinds=["bought_after", "last_time"])
    nothing = np.zeros(0, dtype=int)
    for number in range(30):
        question = found.question(number)
        x, y = ([event for event in question.evidence if log.histories[question.user].item[event] == item]
                for item in (question.query.item, question.query.other))  # fmt: skip
        if question.query.kind == "last_time":
            assert found.oracle(question, nothing) == ""
            assert found.oracle(question, np.array(x)) == question.answer
        else:
            assert [
                found.oracle(question, np.array(events, dtype=int)) for events in ([], x, y)
            ] == ["no", "no", "yes"]


def test_a_tie_has_no_answer(tmp_path: Path):
    rows = [
        GOOD | {"timestamp": f"2011-01-0{number // 2 + 1}T10:00:00", "item": item}
        for number, item in enumerate("ABBA")
    ]
    log = read_log(write(tmp_path / "events.jsonl", rows))
    history, day = log.histories[0], np.datetime64("2011-01-01")
    most = Query("most_frequent", first_day=day, last_day=day + 1)
    assert solve(most, history, log, np.arange(4)) is None
    assert solve(most, history, log, np.array([0, 1, 2])) == ("B", (1, 2))
    assert solve(Query("bought_after", 0, 1), history, log, np.arange(4)) is None, (
        "A and B were last bought at the same time"
    )
    assert solve(Query("bought_after", 0, 1), history, log, np.array([0, 2])) == ("yes", (0, 2))
    assert solve(Query("last_time", 1), history, log, np.array([0, 3])) is None
