"""A tool call as text, as Hermes and Qwen write it:

<tool_call>
{"name": "get_order", "arguments": {"order_id": "W12"}}
</tool_call>
"""

import json
from typing import Any, NamedTuple

BEGIN, END = "<tool_call>", "</tool_call>"
Arguments = dict[str, Any] | str
"""Text where they are no JSON object."""


class Call(NamedTuple):
    """A tool call."""

    name: str
    arguments: Arguments


def as_arguments(given: Any) -> Arguments:
    """A call's arguments out of an object or JSON text; {} for nothing; other values stay text."""
    if isinstance(given, str) and not given.strip():
        return {}
    try:
        value = json.loads(given) if isinstance(given, str) else given
    except (ValueError, RecursionError):
        return given
    if value is None or isinstance(value, dict):
        return value or {}
    return given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)


def action_text(name: str, arguments: Arguments) -> str:
    """A call as a turn's text holds it; keys keep their order."""
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"{BEGIN}\n{call}\n{END}"


def parse_action(text: str) -> Call | None:
    """The first call in a turn's text; None if there is none, or it is malformed.

    A call that was cut off after its JSON counts, and so does text that is a call's JSON alone.
    """
    _, tag, rest = text.partition(BEGIN)
    if not tag and not text.lstrip().startswith("{"):
        return None
    try:
        call, end = json.JSONDecoder().raw_decode(body := (rest if tag else text).lstrip())
    except (ValueError, RecursionError):
        return None
    if not tag and body[end:].strip():
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"]:
        return None
    return Call(call["name"], as_arguments(call.get("arguments")))
