"""Event logs out of files: every format, and every row and file that cannot be used."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from comet_pl.errors import UserError
from data.behavior.event_text import lines
from data.behavior.events import Log, split_users
from data.behavior.questions import KINDS
from data.behavior.read_log import COLUMNS, Columns, read_log
from tests.data.behavior.logs import GOOD, ITEMS, NAMES, PACK, ROWS, behavior, write


def same(log: Log, other: Log) -> bool:
    facts = ("items", "descriptions", "actions")
    assert [getattr(log, name) for name in facts] == [getattr(other, name) for name in facts]
    for one, two in zip(log.histories, other.histories, strict=True):
        columns = COLUMNS[1:]
        assert one.user == two.user
        assert all(np.array_equal(getattr(one, name), getattr(two, name)) for name in columns)
    return True


FORMATS = "jsonl jsonl.xz jsonl.gz jsonl.zst csv csv.gz csv.xz csv.zst parquet"


@pytest.mark.parametrize("name", FORMATS.split())
def test_every_format_gives_the_same_log(tmp_path: Path, log: Log, name: str):
    pack = Path(name).suffix if Path(name).suffix in PACK else ""
    write(tmp_path / f"events.{name}", ROWS, pack)
    write(tmp_path / f"items.{name}", ITEMS, pack)
    assert same(read_log(tmp_path), log)
    assert same(read_log(tmp_path / f"events.{name}", tmp_path / f"items.{name}"), log)


def test_files_with_other_names_and_columns(tmp_path: Path, log: Log):
    columns = ["who", "when", "what", "thing", "how many", "each"]
    renamed = [dict(zip(columns, row.values(), strict=True)) for row in ROWS]
    for part in range(3):
        write(tmp_path / f"part-{part}.jsonl", renamed[part * 450 : (part + 1) * 450])
    items = [{"thing": row["item"], "name": row["description"]} for row in ITEMS]
    write(tmp_path / "items.csv", items)
    assert same(read_log(tmp_path, columns=Columns(*columns, "name")), log)
    few = Columns("who", "when", None, "thing", None, None)
    plain = read_log(tmp_path / "part-0.jsonl", columns=few, action="view")
    clock, item = ROWS[0]["timestamp"][11:16], ROWS[0]["item"]
    assert lines(plain.histories[0], plain)[0][1] == f"{clock} view {item}\n"
    examples = behavior(plain, length=600, action="view")
    kinds = {examples.question(number).query.kind for number in range(80)}
    assert kinds == set(KINDS) - {"total"}


def without(name: str) -> dict:
    return {key: value for key, value in GOOD.items() if key != name}


TIME = "a time in ISO 8601"
BAD = {
    "null field": (GOOD | {"item": None}, "item: null given"),
    "missing field": (
        without("timestamp") | {"timestmp": 1},
        r"timestamp: missing \(did you mean timestmp",
    ),
    "empty text": (GOOD | {"user_id": "  "}, "user_id: '  ' given"),
    "list": (GOOD | {"user_id": ["a"]}, "user_id: .* given, text"),
    "half a character": (json.dumps(GOOD | {"user_id": "\ud800"}).encode(), "user_id"),
    "NaN price": (GOOD | {"price": float("nan")}, "price: nan given, a number"),
    "infinite price": (GOOD | {"price": float("inf")}, "price: inf given, a number"),
    "words for a price": (GOOD | {"price": "cheap"}, "price: 'cheap' given, a number"),
    "a price as in programs": (GOOD | {"price": "1_000"}, "price: '1_000' given, a number"),
    "digits of another script": (GOOD | {"quantity": "١٢"}, "quantity: '١٢' given, a whole number"),
    "half an item": (GOOD | {"quantity": 0.5}, "quantity: 0.5 given, a whole number"),
    "no time": (GOOD | {"timestamp": "1st of May"}, f"timestamp: '1st of May' given, {TIME}"),
    "seconds": (GOOD | {"timestamp": 1293876000}, f"timestamp: 1293876000 given, {TIME}"),
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
def test_an_unusable_row_is_named_by_file_and_line(tmp_path: Path, case: str, capsys):
    row, reason = BAD[case]
    write(tmp_path / "events.jsonl", [GOOD, b"", row, GOOD | {"quantity": 2}])
    write(tmp_path / "items.jsonl", [{"item": "7", "description": "MUG"}])
    with pytest.raises(UserError, match=rf"events.jsonl:3: malformed row: {reason}"):
        read_log(tmp_path)
    assert len(read_log(tmp_path, on_error="skip").histories[0]) == 2
    line = rf"1 unusable row skipped; the first: .*events.jsonl:3: {reason}"
    assert re.search(line, capsys.readouterr().out)


HEADER, ROW = ",".join(NAMES), "a,2011-01-01,purchase,7,1,2"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"a,2011-01-01,purchase,7,1", "price: null given"),
        (b"a,2011-01-01,purchase,7,1,2,3", "7 fields, but the header has 6"),
        (b"a,2011-01-01,purchase,\xff,1,2", "not UTF-8"),
        (b"a,2011-01-01,purchase,7,1,nan", "price: 'nan' given"),
        (ROW.replace("7", '"7"7').encode(), ".*expected after"),
    ],
)
def test_unusable_rows_of_csv_files(tmp_path: Path, capsys, row, reason):
    path = tmp_path / "events.csv"
    good = ROW.encode()
    path.write_bytes(b"\n".join([HEADER.encode(), good, row, good.replace(b"1,2", b"2,2"), b""]))
    with pytest.raises(UserError, match=rf"events.csv:3: malformed row: {reason}"):
        read_log(path)
    assert len(read_log(path, on_error="skip").histories[0]) == 2
    assert "1 unusable row skipped; the first:" in capsys.readouterr().out


def test_unusable_rows_of_parquet_files_and_columns(tmp_path: Path):
    table = write(tmp_path / "other.parquet", [GOOD, GOOD | {"price": None}])
    with pytest.raises(UserError, match=r"other.parquet:2: malformed row: price: (nan|null) given"):
        read_log(table)
    path = tmp_path / "events.csv"
    path.write_text(f"{HEADER.replace('item', 'thing')}\n{ROW}\n")
    line = "events.csv:2: malformed row: item: missing; the columns are user_id, timestamp, action"
    with pytest.raises(UserError, match=line):
        read_log(path)


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_quote_that_is_never_closed_is_named_where_it_opens(tmp_path: Path, on_error: str):
    path = tmp_path / "events.csv"
    path.write_text("\n".join([HEADER, ROW, ROW.replace("7", '"7'), *[ROW] * 20, ""]))
    line = r"events.csv:3: a quote is never closed, the 21 lines from here on are one field$"
    with pytest.raises(UserError, match=line):
        read_log(path, on_error=on_error)


@pytest.mark.parametrize("pack", [".xz", ".gz", ".zst"])
def test_files_that_are_cut_off(tmp_path: Path, pack: str):
    rows = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
    csv = b"user_id,timestamp\n" + b"a,2011-01-01\n" * 20_000
    for kind, content in (("jsonl", rows), ("csv", csv)):
        path, packed = tmp_path / f"cut.{kind}{pack}", PACK[pack](content)
        path.write_bytes(packed[: len(packed) // 2])
        with pytest.raises(UserError, match=rf"{path.name}: cannot be read after line \d+: "):
            read_log(path, on_error="skip")


def test_files_that_cannot_be_read(tmp_path: Path):
    whole = write(tmp_path / "whole.parquet", ROWS).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:-100])
    for kind in ("jsonl", "csv", "jsonl.gz"):
        empty = write(tmp_path / f"empty.{kind}", [], ".gz" if kind.endswith("gz") else "")
        with pytest.raises(UserError, match=rf"empty.{kind}: no rows"):
            read_log(empty)
        line = rf"empty.{kind} has no usable event; 1 unusable row skipped"
        with pytest.raises(UserError, match=line):
            read_log(empty, on_error="skip")
    (tmp_path / "notes.txt").write_text("none")
    (tmp_path / "nothing").mkdir()
    for root, items, reason in [
        ("cut.parquet", None, "cut.parquet: cannot be read"),
        ("absent", None, "data.root: .*absent is no file or folder"),
        ("notes.txt", None, r"data.root: .*notes.txt is no file of the kinds \*.jsonl"),
        ("nothing", None, "data.root: .*nothing holds no event file"),
        ("whole.parquet", "absent.csv", "data.items: .*absent.csv is no file"),
        ("whole.parquet", "empty.jsonl", "data.items: .*empty.jsonl has no usable row"),
    ]:
        with pytest.raises(UserError, match=reason):
            read_log(tmp_path / root, items and tmp_path / items)


def test_events_out_of_order_are_refused_or_sorted(tmp_path: Path, capsys):
    times = [f"2011-01-0{day}T10:00:00" for day in (3, 1, 2, 2, 5)]
    rows = [GOOD | {"timestamp": time, "quantity": number} for number, time in enumerate(times)]
    path = write(tmp_path / "events.jsonl", rows)
    line = "events.jsonl:2: earlier than an event of the same user before it"
    with pytest.raises(UserError, match=line):
        read_log(path)
    history = read_log(path, on_error="skip").histories[0]
    assert history.quantity.tolist() == [1, 2, 3, 0, 4], "stable"
    assert "3 events were out of order and are sorted; the first:" in capsys.readouterr().out
    rows = [GOOD | {"timestamp": "2011-02-01"}, GOOD | {"user_id": "b"}]
    others = read_log(write(tmp_path / "two.jsonl", rows))
    assert [history.user for history in others.histories] == ["a", "b"], "each user's own order"


def test_equal_rows_are_kept_or_dropped_and_always_counted(tmp_path: Path, capsys):
    rows = [GOOD, GOOD | {"item": "8"}, GOOD, GOOD | {"user_id": "b"}, GOOD]
    path = write(tmp_path / "events.jsonl", rows)
    assert sum(map(len, read_log(path).histories)) == 5
    line = r"^2 events equal an earlier one in every column, the first: .*events.jsonl:3; kept"
    assert re.search(line, capsys.readouterr().out)
    dropped = read_log(path, duplicates="drop")
    assert [dropped.items[item] for item in dropped.histories[0].item] == ["7", "8"]
    assert "left out" in capsys.readouterr().out


def test_times_with_offsets_become_utc(tmp_path: Path, capsys):
    times = ["2011-01-01T00:30:00+01:00", "2010-12-31T20:00:00-05:00", "2011-01-01T02:00:00Z"]
    log = read_log(write(tmp_path / "events.jsonl", [GOOD | {"timestamp": time} for time in times]))
    utc = ["2010-12-31T23:30:00", "2011-01-01T01:00:00", "2011-01-01T02:00:00"]
    assert log.histories[0].time.astype(str).tolist() == utc
    assert "times with 3 offsets from UTC are shown in UTC" in capsys.readouterr().out
    naive = write(tmp_path / "events.jsonl", [GOOD | {"timestamp": times[0]}, GOOD])
    line = r"jsonl:2: .*without a time zone, but the log's first event is with one"
    with pytest.raises(UserError, match=line):
        read_log(naive)


@given(st.sets(st.text(min_size=1, max_size=5), min_size=3, max_size=60), st.randoms())
def test_users_are_split_once_for_all(users: set[str], random):
    shuffled = sorted(users)
    random.shuffle(shuffled)
    parts = split_users(shuffled)
    assert parts == split_users(sorted(users))
    assert sorted(user for part in parts.values() for user in part) == sorted(users)
    least = 3 if len(users) >= 9 else 1
    assert all(len(part) >= least for part in parts.values())
    grown = split_users([*users, "a new user"])
    if len(grown["test"]) == len(parts["test"]):
        moved = sum(user not in grown[split] for split, part in parts.items() for user in part)
        assert moved <= 2


def test_too_few_users():
    with pytest.raises(UserError, match="2 users found, three are needed"):
        split_users(["a", "b"])
