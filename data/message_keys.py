"""Keys of a conversation beside its words: what is learnt, its tools, what is not read."""

from collections.abc import Sequence
from typing import Any

from data.jsonl import Row, UnusableRow, loads

LOSS_KEYS = ("weight", "train", "training", "loss")
"""0 or false: a message that is shown, but not learnt. Without one of them: learnt."""
READ = {"role", "content", "tool_calls", "tool_call_id", "tool_call_ids", "function_call"}
NEUTRAL = {"id", "name", "type", "index", "created_at", "timestamp"}
"""They say nothing that the model would see or learn."""
UNREAD_OF_ROWS = ("system", "system_prompt")
ALIASES = {"function": "tool", "developer": "system"}
"""OpenAI's older and newer names of roles."""


def is_learned(message: dict[str, Any], key: str) -> bool:
    """Whether a message is learnt, if it is the assistant's.

    Raises:
        UnusableRow: a value that is not 0, 1, true, false or null.
    """
    values = {name: message[name] for name in LOSS_KEYS if message.get(name) is not None}
    for name, value in values.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            raise UnusableRow(f"{key}.{name}: {value!r:.40} given, allowed: 0, 1, true, false")
    return all(values.values())


def calls_of(message: dict[str, Any]) -> Any:
    """A message's tool calls, unchecked; OpenAI's older function_call is one."""
    call = message.get("function_call")
    return message.get("tool_calls") or ([call] if call else [])


def tools_of(row: Row) -> list[dict[str, Any]]:
    """The tools that a row describes, as chat templates take them; [] without any.

    They are a list, or its JSON text, under tools, or without their types under functions.

    Raises:
        UnusableRow: no list of objects.
    """
    for name in ("tools", "functions"):
        tools = row.get(name)
        if isinstance(tools, str) and tools.strip():
            try:
                tools = loads(tools)
            except (ValueError, RecursionError) as error:
                raise UnusableRow(f"{name}: text that is not JSON: {error}") from None
        if not tools:
            continue
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise UnusableRow(f"{name}: {tools!r:.40} given, a list of objects is needed")
        if name == "functions":
            tools = [{"type": "function", "function": tool} for tool in tools]
        return tools
    return []


def unread(row: Row, messages: Sequence[Any]) -> list[str]:
    """Remarks about what a usable row says that is neither shown nor learnt.

    Args:
        messages: as check_messages gives them.
    """
    listed = row["messages"]
    listed = loads(listed) if isinstance(listed, str) else listed
    known = READ | NEUTRAL | {*LOSS_KEYS}
    found = {
        name for given in listed for name, value in given.items() if value and name not in known
    }
    remarks = [f"messages[].{name} is not read" for name in sorted(found)]
    if any(given.get("tool_calls") and given.get("function_call") for given in listed):
        remarks.append("messages[].function_call is not read where tool_calls are")
    for given, message in zip(listed, messages, strict=True):
        asked = [name for name in LOSS_KEYS if given.get(name)]
        if asked and message.role != "assistant":
            role = message.role
            remarks.append(f"messages[].{asked[0]} has no effect on role {role}, which has no loss")
    of_row = [name for name in UNREAD_OF_ROWS if row.get(name)]
    of_row += [name for name in LOSS_KEYS if row.get(name) not in (None, 1)]
    remarks += [f"{name} of the row is not read" for name in of_row]
    return list(dict.fromkeys(remarks))
