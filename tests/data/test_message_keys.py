"""Keys of a conversation beside its words: obeyed, or said not to be read."""

import json

import pytest

from comet_pl.errors import UserError
from data.agent_traces import AgentSource, Traces, validation_samples
from data.jsonl import Complaints, UnusableRow
from data.messages import Message, check_messages, render
from data.text.tokenized import cached
from data.tokenizer import AGENT_TOKENS, CHAT_TEMPLATE, train_tokenizer

TOKENIZER = train_tokenizer(["hello world plant valve open number one"] * 3, 300, AGENT_TOKENS)
WITH_TOOLS = train_tokenizer(["hello world plant valve open number one"] * 3, 300, AGENT_TOKENS)
WITH_TOOLS.chat_template = (
    "{% if tools %}{{ '<|system|>' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    "{{ eos_token }}{% endif %}" + CHAT_TEMPLATE
)
TOOLS = [{"type": "function", "function": {"name": "open_valve", "parameters": {}}}]


def user(text: str, **keys) -> dict:
    return {"role": "user", "content": text, **keys}


def assistant(text: str | None, **keys) -> dict:
    return {"role": "assistant", "content": text, **keys}


def sample(messages: list, tokenizer=TOKENIZER, **row):
    source = AgentSource(tokenizer, Traces("", "train"))
    return source.encode({"uniq_id": "a", "messages": messages, **row})


def learned(made, tokenizer=TOKENIZER) -> str:
    return tokenizer.decode(made.ids[made.learned])


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ({"weight": 0}, {"weight": 1}),
        ({"weight": 0.0}, {}),
        ({"train": False}, {"train": True}),
        ({"training": False}, {"weight": None}),
        ({"loss": 0}, {"loss": 1.0}),
    ],
)
def test_a_turn_without_weight_is_shown_and_not_learned(wrong, right):
    chat = [user("q"), assistant("wrong", **wrong), user("no"), assistant("right", **right)]
    for messages in (chat, json.dumps(chat)):
        made = sample(messages)
        assert "wrong<|end|>" in TOKENIZER.decode(made.ids)
        assert learned(made) == "right<|end|>"
        assert made.notes["unlearned"] == [1]
        assert "remarks" not in made.notes


@pytest.mark.parametrize("value", [0.5, "0", 2, [], -1])
def test_a_weight_between_is_no_row(value):
    line = r"messages\[1\].weight: .* given, allowed: 0, 1, true, false"
    with pytest.raises(UnusableRow, match=line):
        sample([user("q"), assistant("a", weight=value)])


def test_a_row_whose_turns_all_have_no_weight_is_no_row():
    with pytest.raises(UnusableRow, match="weight, train or loss exclude all"):
        sample([user("q"), assistant("a", weight=0)])


@pytest.mark.parametrize("row", [{"tools": TOOLS}, {"tools": json.dumps(TOOLS)}])
def test_tools_are_shown_where_the_template_has_a_place(row):
    chat = [user("open valve"), assistant("yes")]
    made = sample(chat, WITH_TOOLS, **row)
    text = WITH_TOOLS.decode(made.ids)
    assert text == WITH_TOOLS.apply_chat_template(chat, tools=TOOLS, tokenize=False)
    assert learned(made, WITH_TOOLS) == "yes<|end|>"
    assert "remarks" not in made.notes
    made = sample(chat, **row)
    assert "open_valve" not in TOKENIZER.decode(made.ids)
    assert made.notes["remarks"] == [
        "tools are not shown to the model: the chat template has no place"
    ]


def test_older_functions_are_tools_and_their_calls_calls():
    call = {"name": "open_valve", "arguments": '{"number": 2}'}
    chat = [
        user("open valve 2"),
        assistant(None, function_call=call),
        {"role": "function", "name": "open_valve", "content": "done"},
        assistant("It is open.", function_call=None),
    ]
    made = sample(chat, WITH_TOOLS, functions=[TOOLS[0]["function"]])
    assert "remarks" not in made.notes
    new = [dict(message) for message in chat]
    new[1] = assistant(None, tool_calls=[{"function": call}])
    new[2]["role"] = "tool"
    assert check_messages({"messages": chat}) == check_messages({"messages": new})
    assert (made.ids == sample(new, WITH_TOOLS, tools=TOOLS).ids).all()


@pytest.mark.parametrize("tools", ["{", 5, [1], {"a": 1}])
def test_malformed_tools_are_no_row(tools):
    with pytest.raises(UnusableRow, match=r"^tools: "):
        sample([user("q"), assistant("a")], tools=tools)


def test_what_is_not_read_is_counted_and_said(tmp_path, capsys):
    chat = [user("q", name="Ann", train=True), assistant("a", reasoning_content="I see", id="1")]
    rows = [{"uniq_id": f"{n}", "messages": chat, "tools": TOOLS} for n in range(3)]
    rows[2]["system"], rows[2]["weight"] = "Be kind.", 0
    path = tmp_path / "traces.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = AgentSource(TOKENIZER, Traces(str(path), "train", val_share=0.0))
    expected = [
        "train: messages[].reasoning_content is not read: 3 rows",
        "train: messages[].train has no effect on role user, which has no loss: 3 rows",
        "train: system of the row is not read: 1 row",
        "train: tools are not shown to the model: the chat template has no place: 3 rows",
        "train: weight of the row is not read: 1 row",
    ]
    cached(source, tmp_path / "cache", "train")
    assert sorted(capsys.readouterr().out.splitlines()) == expected
    validation_samples(source, None)
    assert sorted(capsys.readouterr().out.splitlines()) == expected


def test_a_template_that_fails_is_a_line():
    broken = train_tokenizer(["a b"], 300)
    broken.chat_template = "{{ messages[0]['content'] + 3 }}"
    with pytest.raises(UnusableRow, match="chat template refuses them: can only concatenate"):
        render(broken, [Message("user", "u"), Message("assistant", "a")])


def test_malformed_rows_behind_the_first_validation_examples_are_found(tmp_path, capsys):
    rows = [{"uniq_id": f"{n}", "messages": [user("q"), assistant("a")]} for n in range(6)]
    rows[5]["messages"] = [{"role": "nobody", "content": "x"}]
    path = tmp_path / "traces.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = AgentSource(TOKENIZER, Traces(str(path), "validation", val_share=1.0))
    with pytest.raises(UserError, match=r"traces.jsonl:6: malformed row: messages\[0\].role"):
        validation_samples(source, 2)
    source = AgentSource(TOKENIZER, Traces(str(path), "validation", "skip", val_share=1.0))
    assert len(validation_samples(source, 2)) == 2
    assert "validation: 1 unusable row skipped" in capsys.readouterr().out


def test_files_beside_the_splits_are_said_not_to_be_read(tmp_path):
    for name in ("train", "validation", "test", "more"):
        (tmp_path / f"{name}.jsonl").touch()
    assert Traces(str(tmp_path), "train").not_read() == ["more.jsonl"]


def test_a_file_that_vanishes_between_two_epochs_is_missed(tmp_path):
    for name in "ab":
        row = {"uniq_id": name, "messages": [user("q"), assistant("a")]}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    traces = Traces(str(tmp_path), "train", val_share=0.0)
    assert len(list(traces.rows(Complaints("skip")))) == 2
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(UserError, match=r"a.jsonl: cannot be read: No such file"):
        list(traces.rows(Complaints("skip")))


@pytest.mark.parametrize("reward", [int("9" * 400), float("inf"), 1e305])
def test_a_reward_too_large_is_no_row(tmp_path, reward):
    row = {"uniq_id": "a", "reward": reward, "messages": [user("q"), assistant("a")]}
    path = tmp_path / "traces.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=r":1: malformed row: reward: "):
        list(Traces(str(path), "train", val_share=0.0).rows(Complaints("raise")))
