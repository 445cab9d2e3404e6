"""Tool calls as text, and back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.tool_calls import action_text, as_arguments, parse_action
from tests.support.json_values import JSON


@given(st.text(min_size=1), st.dictionaries(st.text(max_size=4), JSON, max_size=3))
def test_a_call_survives_its_text(name, arguments):
    text = action_text(name, arguments)
    assert parse_action(text) == (name, arguments)
    assert parse_action(f"I look it up.\n{text}\n{action_text('another', {})}") == (name, arguments)
    assert parse_action(text.removesuffix("\n</tool_call>")) == (name, arguments)


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("Which order?", None),
        ("", None),
        ("<tool_call>", None),
        ('<tool_call>{"name": "find", "arguments": {"a"', None),  # cut off
        ("<tool_call>[1]</tool_call>", None),
        ('<tool_call>{"arguments": {}}</tool_call>', None),
        ('<tool_call>{"name": 5}</tool_call>', None),
        ('<tool_call>{"name": "find"}</tool_call>', ("find", {})),
        ('<tool_call>{"name": "find", "arguments": "{\\"a\\": 1}"}', ("find", {"a": 1})),
        ('<tool_call>{"name": "find", "arguments": "a = 1"}', ("find", "a = 1")),
        (' {"name": "find", "arguments": {"a": 1}} ', ("find", {"a": 1})),
        ('{"name": "find"} it is', None),
        ("{" * 100_000, None),
    ],
)
def test_parse_action(text, action):
    assert parse_action(text) == action


@pytest.mark.parametrize(
    ("given", "arguments"),
    [
        (None, {}),
        ("", {}),
        (" ", {}),
        ("null", {}),
        ({}, {}),
        ('{"a": 1}', {"a": 1}),
        ("[1]", "[1]"),
        ([1], "[1]"),
        ("{a", "{a"),
        ("5", "5"),
    ],
)
def test_arguments(given, arguments):
    assert as_arguments(given) == arguments
