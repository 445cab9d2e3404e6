"""Agent traces: which files and rows, split by task, filters that count, turn distance."""

import gzip
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comet_pl.errors import UserError
from data.agent_traces import AgentSource, Traces, files, split_of, task_of, turn_distance
from data.jsonl import Complaints, UnusableRow
from data.messages import Message, check_messages
from data.tokenizer import AGENT_TOKENS, train_tokenizer
from data.tool_calls import Call

TOKENIZER = train_tokenizer(["find the order W123 of Ann Lee, please"] * 3, 300, AGENT_TOKENS)


def row(name: str, reward: float | None = 1.0, words: str = "Hi") -> dict:
    return {
        "uniq_id": name,
        "reward": reward,
        "messages": [{"role": "user", "content": words}, {"role": "assistant", "content": "Yes."}],
    }


def written(folder: Path, rows: list, name: str = "traces.jsonl") -> Path:
    (folder / name).write_text(
        "".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in rows)
    )
    return folder / name


def source(
    path: Path | str, split: str = "train", max_length=None, supervise="assistant", **choices
) -> AgentSource:
    return AgentSource(TOKENIZER, Traces(str(path), split, **choices), max_length, supervise)


def ids(source: AgentSource, complaints: Complaints | None = None) -> list[str]:
    return [one["uniq_id"] for _, one in source.rows(complaints or Complaints("raise"))]


def test_files(tmp_path):
    one = written(tmp_path, [row("a")], "b.jsonl")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(json.dumps(row("b")) + "\n")
    assert files(str(one), "train") == ([one], True)
    assert files(str(tmp_path), "train") == ([tmp_path / "a.jsonl.gz", one], True)
    both = [written(tmp_path, [row("c")], f"{split}.jsonl") for split in ("train", "validation")]
    assert files(str(tmp_path), "train") == ([both[0]], False)
    assert files(str(tmp_path), "validation") == ([both[1]], False)
    assert ids(source(tmp_path, "validation")) == ["c"]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("nowhere", "data.root: .*nowhere is no file or folder"),
        ("", "data.root: .* holds no .jsonl"),
        ("notes.txt", r"data.root: .*notes.txt given, allowed: a folder, or a .jsonl"),
    ],
)
def test_no_such_files(tmp_path, name, line):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=line):
        files(str(tmp_path / name), "train")


@pytest.mark.parametrize("names", [["train", "test"], ["validation", "a"], ["test", "a"]])
def test_one_split_beside_other_files_is_ambiguous(tmp_path, names):
    """Test rows must not be learnt because a file of another name is missing."""
    for name in names:
        written(tmp_path, [row(name)], f"{name}.jsonl")
    with pytest.raises(UserError, match=r"train\.jsonl and validation\.jsonl are both needed"):
        files(str(tmp_path), "train")


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("taubench-airline-gpt4o-task0-trial1", "taubench-airline-gpt4o-task0"),
        ("taubench-airline-gpt4o-task0-trial12", "taubench-airline-gpt4o-task0"),
        ("retail/7/run_3", "retail/7"),
        ("trial3/retail/7", "/retail/7"),
        ("prun7-a", "prun7-a"),
        ("trial4", "trial4"),
        ("swe-agent/replay__x__default__install-1/marshmallow-1867@1a916fdb", "marshmallow-1867"),
        ("swe-agent/replay__x__xml/marshmallow-1867@2bc6a95e", "marshmallow-1867"),
    ],
)
def test_attempts_at_one_task(name, task):
    assert task_of({"uniq_id": name}) == task
    assert task_of({"uniq_id": name, "task_id": 5}) == "5"


@given(st.text(), st.integers(0, 3), st.floats(0, 1))
def test_a_tasks_split_is_a_function_of_seed_and_task(task, seed, share):
    assert split_of(task, share, seed) == split_of(task, share, seed)
    assert split_of(task, 0.0, seed) == "train"
    assert split_of(task, 1.0, seed) == "validation"
    if split_of(task, share, seed) == "validation":
        assert split_of(task, min(1.0, share + 0.1), seed) == "validation"


def test_the_share_of_tasks():
    chosen = Counter(split_of(f"task{number}", 0.2) for number in range(5000))
    assert 0.18 < chosen["validation"] / 5000 < 0.22
    assert [split_of(f"{number}", 0.5, 0) for number in range(50)] != [
        split_of(f"{number}", 0.5, 1) for number in range(50)
    ]


def test_no_task_is_in_both_splits(tmp_path):
    path = str(
        written(
            tmp_path,
            [row(f"x-task{task}-trial{trial}") for trial in range(4) for task in range(40)],
        )
    )
    parts = [ids(source(path, split, val_share=0.3)) for split in ("train", "validation")]
    assert sorted([*parts[0], *parts[1]]) == sorted(
        f"x-task{task}-trial{trial}" for trial in range(4) for task in range(40)
    )
    tasks = [{name.rpartition("-")[0] for name in part} for part in parts]
    assert all(tasks) and not tasks[0] & tasks[1]
    assert all(len(part) == 4 * len(there) for part, there in zip(parts, tasks, strict=True))


def test_filters_count_what_they_leave_out(tmp_path):
    rows = [
        row("a", 1.0),
        row("b", 0.5),
        row("c", None),
        row("d", 0),
        row("e", True),
        {**row("f"), "reward": 2},
    ]
    del rows[2]["reward"]
    path = str(written(tmp_path, rows))
    traces = source(path, "train", val_share=0.0, min_reward=1)
    assert ids(traces) == ["a", "e", "f"]
    assert traces.traces.left_out() == {"reward below 1": 2, "without a reward": 1}
    assert source(path, "train", val_share=0.0).traces.left_out() == {}


def test_a_sample(tmp_path):
    messages = [
        {"role": "user", "content": "Find order W123"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "1", "name": "find", "arguments": {"order": "w123"}}],
        },
        {"role": "tool", "content": "gone", "tool_call_id": "1"},
        {"role": "assistant", "content": "It is gone."},
    ]
    whole = {"uniq_id": "t-trial0", "messages": json.dumps(messages), "reward": 1}
    path = written(tmp_path, [whole])
    traces = source(path)
    sample = traces.encode(whole)
    assert json.loads(json.dumps(sample.notes)) == sample.notes
    assert (sample.notes["id"], sample.notes["task"], sample.notes["reward"]) == (
        "t-trial0",
        "t",
        1,
    )
    assert [(turn[0], turn[4]) for turn in sample.notes["turns"]] == [
        ("user", None),
        ("assistant", 1),
        ("tool", None),
        ("assistant", None),
    ]
    parts = [
        TOKENIZER.decode(sample.ids[start:end]) for _, start, _, end, _ in sample.notes["turns"]
    ]
    assert parts[0] == "<|user|>Find order W123" and parts[3] == "<|assistant|>It is gone.<|end|>"
    assert TOKENIZER.decode(sample.ids[sample.learned]).count("<|end|>") == 2
    last = source(path, "train", supervise=1).encode(whole)
    assert TOKENIZER.decode(last.ids[last.learned]) == "It is gone.<|end|>"


def test_what_samples_depend_on_is_in_the_key(tmp_path):
    path = str(written(tmp_path, [row("a")]))
    keys = [
        source(path, split, **choice).key()
        for split in ("train", "validation")
        for choice in (
            {},
            {"min_reward": 0},
            {"max_length": 9},
            {"supervise": 2},
            {"val_share": 0.5},
            {"seed": 1},
        )
    ]
    assert len({json.dumps(key) for key in keys}) == len(keys)


@pytest.mark.parametrize(
    ("bad", "line"),
    [
        ({"messages": []}, "uniq_id: missing"),
        ({**row("x"), "uniq_id": None}, "uniq_id: None given, text is needed"),
        (row("good"), "uniq_id: 'good' given again, first in .*traces.jsonl:1"),
        (row("x", "high"), "reward: 'high' given, a number or null is needed"),
        ('{"uniq_id": "x", "reward": NaN}', "reward: nan given"),
        ('{"uniq_id": "x"', "not JSON"),
    ],
)
def test_malformed_rows_are_named_and_counted(tmp_path, bad, line):
    traces = source(written(tmp_path, [row("good"), bad, row("better")]), "train", val_share=0.0)
    with pytest.raises(UnusableRow, match=f"traces.jsonl:2: malformed row: {line}"):
        ids(traces)
    complaints = Complaints("skip")
    assert ids(traces, complaints) == ["good", "better"]
    assert complaints.count == 1


def test_an_empty_file_is_named(tmp_path):
    traces = source(written(tmp_path, []), "train")
    with pytest.raises(UnusableRow, match=r"traces\.jsonl: malformed row: an empty file"):
        ids(traces)


def test_rows_that_cannot_be_encoded():
    traces = source("", "train", max_length=12)
    assert len(traces.encode(row("a"))) <= 12
    with pytest.raises(UnusableRow, match=r"^\d+ tokens, data.max_length is 12$"):
        traces.encode(row("a", words="twenty words " * 10))
    with pytest.raises(UnusableRow, match="none of the assistant's"):
        traces.encode({"uniq_id": "a", "messages": [{"role": "user", "content": "u"}]})


def test_texts_come_once(tmp_path):
    path = str(
        written(
            tmp_path, [row("a"), row("b", words="Ho"), row("c", words=""), row("d", 0.0, "Never")]
        )
    )
    assert list(Traces(path, "train", "skip", val_share=0.0, min_reward=1).texts()) == [
        "Hi",
        "Yes.",
        "Ho",
    ]


# -- turn distance


def distance(*said: Message | str, **arguments) -> int | None:
    messages = [one if isinstance(one, Message) else Message("user", one) for one in said]
    return turn_distance(
        [*messages, Message("assistant", "W123", (Call("f", arguments),))], len(messages)
    )


@pytest.mark.parametrize(
    ("expected", "said", "arguments"),
    [
        (1, ["it is W123."], {"order": "W123"}),
        (3, ["it is (w123)", "what?", "no"], {"order": "W123"}),
        (1, ["W123", "W123"], {"order": "W123"}),  # the latest counts
        (2, ["W123", "Ann Lee"], {"order": "W123", "name": "Ann Lee"}),  # the farthest value
        (1, ["W123"], {"order": "W123", "reason": "nowhere to be found"}),
        (None, ["W1234, aW123, W123_b"], {"order": "W123"}),  # not words of their own
        (None, ["on by"], {"a": "on", "b": 12, "c": True, "d": None}),  # too short
        (None, ["true 12"], {}),
        (2, ['{"price": 250}', "ok"], {"nested": {"list": [{"price": 250.0}]}}),
        (2, ["c++ (new)", "ok"], {"language": "c++ (new)"}),
        (
            1,
            [Message("assistant", "", (Call("g", {"id": "W123"}),))],
            {"order": "W123"},
        ),  # an earlier call's argument
        (None, ["x"], {"order": "W123"}),  # its own text does not count
    ],
)
def test_turn_distance(expected, said, arguments):
    assert distance(*said, **arguments) == expected


def test_only_the_assistants_calls_have_a_distance():
    messages = [
        Message("user", "W123"),
        Message("user", "", (Call("f", {"a": "W123"}),)),
        Message("assistant", "W123"),
    ]
    assert [turn_distance(messages, number) for number in range(3)] == [None] * 3
    broken = [
        Message("user", "{order: W123"),
        Message("assistant", "", (Call("f", "{order: W123"),)),
    ]
    assert turn_distance(broken, 1) == 1


# -- real rows


def test_real_traces(shared_data):
    root = str(shared_data / "agent")
    parts = {split: source(root, split) for split in ("train", "validation")}
    rows = {
        split: [one for _, one in source.rows(Complaints("raise"))]
        for split, source in parts.items()
    }
    assert sum(map(len, rows.values())) == sum(
        path.read_text().count("\n") for path in (shared_data / "agent").glob("*.jsonl")
    )
    tasks = {split: {task_of(one) for one in found} for split, found in rows.items()}
    assert tasks["validation"] and not tasks["train"] & tasks["validation"]
    found = Counter[int | None]()
    for one in rows["validation"]:
        messages = check_messages(one)
        for number, message in enumerate(messages):
            found[distance := turn_distance(messages, number)] += bool(message.calls)
            if distance:  # the message so far back has some value of the call
                values = json.dumps([call.arguments for call in message.calls])
                both = (values, messages[number - distance].text)
                words, there = (set(re.findall(r"\w{3,}", text.lower())) for text in both)
                assert words & there
    assert sum(count for distance, count in found.items() if distance and distance >= 8) >= 3
