"""A row's messages as tokens, with the loss on what the assistant says and on nothing else.

    header | text | stop token   header | text | stop token   ...

Headers and stop tokens are the tokenizer's chat template: it is rendered once with a mark for each message's text, and what stands between
the marks is the frame. The tokens are those of the template's own rendering, with two exceptions: no special token is read out of a text,
and an assistant's text never merges with its header, as when a model, given the header, generates the text. A template that cannot be taken
apart so is refused.

A tool call is text, whoever makes it, as in Hermes and Qwen: see data/tool_calls.py. Messages may have more keys than are read here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from comet_pl.errors import UserError, nearest
from data.jsonl import Row, UnusableRow
from data.tool_calls import Call, action_text, as_arguments

ROLES = ("system", "user", "assistant", "tool")
PLAIN_TEMPLATE = (  # for a tokenizer without a template
    "{% for message in messages %}{{ '\n\n' * (not loop.first) + message['role'].capitalize() + ':\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Message:
    role: str  # of ROLES
    content: str
    calls: tuple[Call, ...] = ()

    @property
    def text(self) -> str:
        """The content, then the calls, one after another."""
        return "\n".join(
            [
                *([self.content] if self.content else []),
                *(action_text(*call) for call in self.calls),
            ]
        )


def check_messages(row: Row) -> list[Message]:
    """The messages of {"messages": a list, or its JSON text}.

    A message: role; content, which is text, null or a list of {"type": "text", "text"}; tool_calls, each {"function": {"name",
    "arguments"}} or {"name", "arguments"}, with or without id, arguments an object or its JSON text; in a tool's result, tool_call_id or
    tool_call_ids, if there are ids.

    Raises:
        UnusableRow: what is wrong, with its key: no messages; an unknown role; nothing said and nothing called; a malformed call; a result
            without a call before it, or with an id that no call has.
    """
    given = row.get("messages")
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise UnusableRow(f"messages: text that is not JSON: {error}") from None
    if not isinstance(given, list) or not given:
        shown = (
            "missing"
            if "messages" not in row
            else "empty"
            if given in ([], "")
            else f"{given!r:.40} given"
        )
        raise UnusableRow(f"messages: {shown}, a list of messages is needed")
    messages: list[Message] = []
    ids: set[str] = set()
    for number, message in enumerate(given):
        place = f"messages[{number}]"
        if not isinstance(message, dict):
            raise UnusableRow(
                f"{place}: an object is needed, but this is a {type(message).__name__}"
            )
        if message.get("role") == "tool":
            _check_result(message, ids, any(one.calls for one in messages), place)
        messages.append(_message(message, place))
        ids |= {
            str(call["id"])
            for call in message.get("tool_calls") or []
            if call.get("id") is not None
        }
    return messages


def _message(given: dict[str, Any], place: str) -> Message:
    role = given.get("role")
    if role not in ROLES:
        shown = f"{role!r:.40} given{nearest(role, ROLES)}" if isinstance(role, str) else "missing"
        raise UnusableRow(f"{place}.role: {shown}, allowed: {', '.join(ROLES)}")
    calls = given.get("tool_calls") or []
    if not isinstance(calls, list):
        raise UnusableRow(f"{place}.tool_calls: {calls!r:.40} given, a list is needed")
    if calls and role not in ("user", "assistant"):
        raise UnusableRow(
            f"{place}.tool_calls: given with role {role}, allowed: with user and assistant"
        )
    made = tuple(_call(call, f"{place}.tool_calls[{number}]") for number, call in enumerate(calls))
    message = Message(role, _content(given.get("content"), f"{place}.content"), made)
    if not message.text.strip() and role != "tool":
        raise UnusableRow(
            f"{place}.content: {'null' if given.get('content') is None else 'empty'}, and no tool_calls"
        )
    try:
        message.text.encode()
    except UnicodeEncodeError as error:
        raise UnusableRow(
            f"{place}.content: not Unicode text ({error.reason} at character {error.start})"
        ) from None
    return message


def _content(given: Any, key: str) -> str:
    parts = given if isinstance(given, list) else [] if given is None else [given]
    for number, part in enumerate(parts):
        if isinstance(part, dict) and part.get("type", "text") == "text":
            parts = [*parts[:number], part.get("text"), *parts[number + 1 :]]
        elif isinstance(part, dict):
            raise UnusableRow(f"{key}[{number}]: type {part['type']!r:.40} given, allowed: text")
    wrong = [part for part in parts if not isinstance(part, str)]
    if wrong:
        raise UnusableRow(
            f"{key}: {wrong[0]!r:.40} given, allowed: text, null, or a list of text parts"
        )
    return "".join(parts)


def _call(given: Any, key: str) -> Call:
    function = given.get("function") or given if isinstance(given, dict) else None
    if (
        not isinstance(function, dict)
        or not isinstance(function.get("name"), str)
        or not function["name"]
    ):
        raise UnusableRow(f"{key}: {given!r:.60} given, a name is needed, in it or in its function")
    return Call(function["name"], as_arguments(function.get("arguments")))


def _check_result(given: dict[str, Any], ids: set[str], called: bool, place: str) -> None:
    if not called:
        raise UnusableRow(f"{place}: a tool's result, but no message before it calls a tool")
    one, several = given.get("tool_call_id"), given.get("tool_call_ids") or []
    named = [(".tool_call_id", one)] if one is not None else []
    named += [
        (f".tool_call_ids[{number}]", name)
        for number, name in enumerate(several if isinstance(several, list) else [several])
    ]
    for key, name in named:
        if str(name) not in ids:
            raise UnusableRow(
                f"{place}{key}: {name!r:.60} given, no call before it has this id{nearest(str(name), ids)}"
            )


class Turn(NamedTuple):
    """Where a message stands in the ids: its header from start, its text from content, and end is behind its stop token or text.

    Each turn starts where the one before ends; a template's last new line belongs to none. A token that holds the end of a header and the
    beginning of a text, which the assistant's never does, counts as header.
    """

    role: str
    start: int
    content: int
    end: int


@dataclass(frozen=True)
class Rendering:
    """ids: (n,) int32. mask: (n,) bool, the tokens with loss. turns: one a message, in order."""

    ids: np.ndarray
    mask: np.ndarray
    turns: list[Turn]


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    supervise: str | int = "assistant",
) -> Rendering:
    """Messages in tokens, in the tokenizer's chat template; without one, with each role as a line above.

    Args:
        supervise: which turns have loss, stop token included: "assistant", all of the assistant's; k >= 1, the last k of them.

    Raises:
        UnusableRow: the template refuses the messages, or changes their text.
        UserError: the template ends the assistant's turns with no special token.
    """
    frames, texts = _rendered(tokenizer, messages)
    special = [entry.content for entry in tokenizer.added_tokens_decoder.values() if entry.special]
    stops = _stops(frames, messages, special)
    pieces = [
        ""
    ]  # a new one begins with each assistant's text; one that is to be read as plain text stands alone
    plain, places = set[int](), list[tuple[int, int, int]]()
    end = 0
    for message, before, text, after in zip(messages, frames, texts, frames[1:], strict=False):
        start, content = end, sum(map(len, pieces)) + len(before)
        pieces[-1] += before
        if any(name in text for name in special):
            plain.add(len(pieces))
            pieces += [text, ""]
        elif message.role == "assistant":
            pieces.append(text)
        else:
            pieces[-1] += text
        end = content + len(text) + _closing(after, stops)
        places.append((start, content, end))
    pieces[-1] += frames[-1]
    ids, offsets = _tokens(tokenizer, pieces, plain)
    turns = [
        Turn(message.role, *np.searchsorted(offsets, place).tolist())
        for message, place in zip(messages, places, strict=True)
    ]
    spoken = [turn for turn in turns if turn.role == "assistant"]
    mask = np.zeros(len(ids), dtype=bool)
    for turn in spoken if supervise == "assistant" else spoken[-int(supervise) :]:
        mask[turn.content : turn.end] = True
    return Rendering(ids, mask, turns)


def _tokens(
    tokenizer: PreTrainedTokenizerBase, pieces: Sequence[str], plain: set[int]
) -> tuple[np.ndarray, np.ndarray]:
    """(ids, where each begins in the joined pieces); special tokens are read out of all pieces but the plain ones."""
    ids, offsets, before = list[int](), list[int](), 0
    for number, piece in enumerate(pieces):
        found = tokenizer(
            piece,
            add_special_tokens=False,
            split_special_tokens=number in plain,
            return_offsets_mapping=True,
            verbose=False,
        )
        ids += found["input_ids"]
        # some tokenizers say of white space that it begins where it ends
        offsets += [before + min(start, len(piece) - 1) for start, _ in found["offset_mapping"]]
        before += len(piece)
    return np.array(ids, dtype=np.int32), np.maximum.accumulate(np.array(offsets, dtype=np.int64))


def _stops(frames: Sequence[str], messages: Sequence[Message], special: Sequence[str]) -> set[str]:
    """The first special token behind each of the assistant's texts; other turns may end with it too."""
    found = set[str]()
    for message, after in zip(messages, frames[1:], strict=True):
        if message.role == "assistant":
            here = [(after.find(name), -len(name), name) for name in special if name in after]
            if not here:
                raise UserError(
                    "backbone.path: its tokenizer's chat template ends the assistant's turns with no special token"
                )
            found.add(min(here)[-1])
    return found


def _closing(frame: str, stops: set[str]) -> int:
    """Characters up to the end of the first stop token; 0 if there is none."""
    return min((frame.find(name) + len(name) for name in stops if name in frame), default=0)


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]
) -> tuple[list[str], list[str]]:
    """(frames, texts): the rendering is frames[0] + texts[0] + frames[1] + ... + frames[n]."""
    plain = [{"role": message.role, "content": message.text} for message in messages]
    without_tools = [
        _as_user(message) if message["role"] == "tool" else message for message in plain
    ]
    reason = ""
    for chat in [plain, without_tools] if without_tools != plain else [plain]:
        marks = [f"\u2063{number}\u2063" for number in range(len(chat))]
        marked = [
            {"role": message["role"], "content": mark}
            for message, mark in zip(chat, marks, strict=True)
        ]
        try:
            frames, rest = [], _template(tokenizer, marked)
            whole = _template(tokenizer, chat)
        except jinja2.TemplateError as error:
            reason = reason or f"refuses them: {error}"
            continue
        for mark in marks:
            frame, found, rest = rest.partition(mark)
            if not found:
                break
            frames.append(frame)
        else:
            texts = _aligned(whole, [*frames, rest], [message["content"] for message in chat])
            if isinstance(texts, list):
                return [*frames, rest], texts
            reason = reason or f"changes the text of messages[{texts}]"
            continue
        reason = (
            reason or f"leaves out messages[{len(frames)}], of role {chat[len(frames)]['role']}"
        )
    raise UnusableRow(f"messages: the tokenizer's chat template {reason}")


def _template(tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, str]]) -> str:
    template = PLAIN_TEMPLATE if tokenizer.chat_template is None else None
    return str(
        tokenizer.apply_chat_template(
            chat, tokenize=False, enable_thinking=False, chat_template=template
        )
    )


def _as_user(message: dict[str, str]) -> dict[str, str]:
    """A tool's result for a template that knows no tools."""
    return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}


def _aligned(whole: str, frames: list[str], texts: list[str]) -> list[str] | int:
    """The texts as they stand between the frames in `whole`; the number of the first that does not."""
    end, found = len(frames[0]), list[str]()
    for number, (text, after) in enumerate(zip(texts, frames[1:], strict=True)):
        for version in _versions(text):
            if whole.startswith(version + after, end):
                found.append(version)
                end += len(version) + len(after)
                break
        else:
            return number
    return found if whole.startswith(frames[0]) and end == len(whole) else len(texts) - 1


def _versions(text: str) -> Iterator[str]:
    """What templates are known to make of a text: nothing; without spaces around; earlier thoughts left out; a result in JSON."""
    yield text
    yield text.strip()
    yield text.split("</think>")[-1].lstrip("\n")
    yield json.dumps(text, ensure_ascii=False)[1:-1]
