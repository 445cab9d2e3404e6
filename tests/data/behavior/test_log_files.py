"""Which files of a folder are a log, headers, numbers and times at the edges."""

import re
from pathlib import Path

import pytest

from comet_pl.errors import UserError
from data.behavior.read_log import Columns, read_log
from tests.data.behavior.logs import GOOD, write

PLAIN = Columns(quantity=None, price=None)


def of(user: str, **changed) -> dict:
    return GOOD | {"user_id": user} | changed


def users(log) -> list[str]:
    return [history.user for history in log.histories]


def test_all_shards_are_read_and_what_is_not_is_said(tmp_path: Path, capsys):
    for shard in (0, 2, 10):
        write(tmp_path / f"events.{shard}.jsonl", [of(f"u{shard}")])
    write(tmp_path / "old.jsonl", [of("old")])
    assert users(read_log(tmp_path)) == ["u0", "u10", "u2"]
    said = capsys.readouterr().out
    assert "reads events.0.jsonl, events.2.jsonl, events.10.jsonl" in said
    assert "not read: old.jsonl" in said


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (["events.csv", "events.jsonl"], "holds events.csv and events.jsonl, of which one"),
        (["a.csv", "b.csv", "b.csv.gz"], "holds b.csv and b.csv.gz, of which one"),
        (["events.csv", "items.csv", "items.jsonl"], "several item tables: items.csv, items.jsonl"),
    ],
)
def test_several_files_for_one_part_are_refused(tmp_path: Path, names, line):
    for name in names:
        (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=line):
        read_log(tmp_path)


def test_another_item_table_in_the_folder_is_no_event_file(tmp_path: Path, capsys):
    write(tmp_path / "log.jsonl", [of("u")])
    write(tmp_path / "items.jsonl", [{"item": "9", "description": "CUP"}])
    (tmp_path / "own").mkdir()
    table = write(tmp_path / "own" / "table.jsonl", [{"item": "7", "description": "MUG"}])
    assert read_log(tmp_path, table).descriptions == ["MUG"]
    assert "not read: items.jsonl" in capsys.readouterr().out


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_header_with_one_name_twice_is_refused(tmp_path: Path, on_error):
    path = tmp_path / "events.csv"
    path.write_text("user_id,item,timestamp,item,action\nu,1,2020-01-01,2,view\n")
    with pytest.raises(UserError, match="header has two columns 'item'; rename one"):
        read_log(path, columns=PLAIN, on_error=on_error)


EDGES = {
    "price": (int("9" * 400), "price: 9+ given, a number"),
    "quantity": (-int("9" * 400), "quantity: -9+ given, a whole number"),
    "timestamp": ("9999-12-31T23:59:59-05:00", "timestamp: 9999.* outside the years 1 to 9999"),
}


@pytest.mark.parametrize("name", EDGES)
def test_a_value_too_large_is_an_unusable_row(tmp_path: Path, name):
    value, reason = EDGES[name]
    zone = {"timestamp": "2020-01-01T10:00:00+01:00"} if name == "timestamp" else {}
    path = write(tmp_path / "e.jsonl", [of("a", **zone), of("b", **{name: value}), of("c", **zone)])
    with pytest.raises(UserError, match=f":2: malformed row: {reason}"):
        read_log(path)
    assert users(read_log(path, on_error="skip")) == ["a", "c"]


def test_a_time_that_stands_for_none_is_said(tmp_path: Path, capsys):
    times = ["2020-01-01T10:00:00", "9999-12-31T23:59:59", "0001-01-01"]
    rows = [of(f"u{n}", timestamp=time) for n, time in enumerate(times)]
    assert len(users(read_log(write(tmp_path / "e.jsonl", rows)))) == 3
    assert "2 times are before 1900 or after 2199" in capsys.readouterr().out


def read_times(tmp_path: Path, times: list, name: str = "events.jsonl", **options) -> list[str]:
    rows = [of(f"u{n}", timestamp=time) for n, time in enumerate(times)]
    log = read_log(write(tmp_path / name, rows), **options)
    return [str(history.time[0]) for history in log.histories]


@pytest.mark.parametrize("name", ["events.jsonl", "events.csv"])
@pytest.mark.parametrize("factor", [1, 10**3, 10**6, 10**9])
def test_unix_times_are_read_in_their_unit(tmp_path: Path, name, factor, capsys):
    # 1431010112345 is also 1431-01-01, 12:34 in compact ISO 8601
    seconds = [1431010112, 1433221332, 1300000000]
    given = [second * factor + factor // 3 for second in seconds]
    read = read_times(tmp_path, given, name)
    assert read == ["2015-05-07T14:48:32", "2015-06-02T05:02:12", "2011-03-13T07:06:40"]
    assert "times are Unix" in capsys.readouterr().out


def test_other_spellings_of_times(tmp_path: Path):
    assert (
        read_times(tmp_path, ["2019-10-01 00:00:00 UTC", "2019-10-01T02:00:00+02:00"])
        == ["2019-10-01T00:00:00"] * 2
    )
    assert read_times(tmp_path, ["20191001", "2019-10-01"]) == ["2019-10-01T00:00:00"] * 2
    assert read_times(tmp_path, [1433221332.9, 1433221332]) == ["2015-06-02T05:02:12"] * 2


BAD = ["202001311230", "20200131123045", "2020013112", "14101112", 5, True, 20200131]


@pytest.mark.parametrize("time", BAD)
def test_digits_that_could_mean_something_else_are_no_time(tmp_path: Path, time):
    with pytest.raises(UserError, match=re.escape(f"timestamp: {time!r} given, a time in ISO")):
        read_times(tmp_path, [time])


@pytest.mark.parametrize(
    ("times", "line"),
    [
        ([1431010112, 1431010112345], "given, Unix seconds are needed, as in the log's first"),
        ([1431010112, "2020-01-01T00:00:00Z"], "given, Unix seconds are needed"),
        (["2020-01-01T00:00:00Z", 1431010112], "given, a time in ISO 8601 is needed, as in"),
    ],
)
def test_the_first_event_decides_the_unit(tmp_path: Path, times, line):
    with pytest.raises(UserError, match=line):
        read_times(tmp_path, times)
