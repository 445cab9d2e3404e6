"""A row's messages as tokens, with the loss on what the assistant says and on nothing else.

    header | text | stop token   header | text | stop token   ...

Headers and stop tokens are the tokenizer's chat template, rendered once with a mark for each
message's text: the frames are what stands between the marks. The tokens are those of the template's
own rendering, with two exceptions. No special token is read out of a text. An assistant's text
never merges with its header, as when a model generates the text after the header. A template that
cannot be taken apart like this is refused.

A tool call is text, whoever makes it: see data/tool_calls.py. Further keys of messages are ignored.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from comet_pl.errors import UserError, first_line, nearest
from data.jsonl import Row, UnusableRow
from data.tool_calls import Call, action_text, as_arguments

ROLES = ("system", "user", "assistant", "tool")
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ '\n\n' * (not loop.first) + message['role'].capitalize()"
    " + ':\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
"""For a tokenizer without a template."""


@dataclass(frozen=True)
class Message:
    role: str  # of ROLES
    content: str
    calls: tuple[Call, ...] = ()

    @property
    def text(self) -> str:
        """The content, then the calls, one after another."""
        content = [self.content] if self.content else []
        return "\n".join([*content, *(action_text(*call) for call in self.calls)])


def check_messages(row: Row) -> list[Message]:
    """The messages of {"messages": a list, or its JSON text}.

    A message: role; content, which is text, null or a list of {"type": "text", "text"}; tool_calls,
    each {"function": {"name", "arguments"}} or {"name", "arguments"}, with or without id, arguments
    an object or its JSON text; in a tool's result, tool_call_id or tool_call_ids, if there are ids.

    Raises:
        UnusableRow: what is wrong, with its key: no messages; an unknown role; a message without
            text and calls; a malformed call; a result without a call before it, or with an id that
            no call has.
    """
    listed = row.get("messages")
    if isinstance(listed, str):
        try:
            listed = json.loads(listed)
        except (ValueError, RecursionError) as error:
            raise UnusableRow(f"messages: text that is not JSON: {error}") from None
    if not isinstance(listed, list) or not listed:
        shown = "empty" if listed in ([], "") else f"{listed!r:.40} given"
        shown = shown if "messages" in row else "missing"
        raise UnusableRow(f"messages: {shown}, a list of messages is needed")
    messages: list[Message] = []
    ids: set[str] = set()
    for number, message in enumerate(listed):
        key = f"messages[{number}]"
        if not isinstance(message, dict):
            kind = type(message).__name__
            raise UnusableRow(f"{key}: an object is needed, but this is a {kind}")
        if message.get("role") == "tool":
            _check_result(message, ids, any(earlier.calls for earlier in messages), key)
        messages.append(_message(message, key))
        calls = message.get("tool_calls") or []
        ids |= {str(call["id"]) for call in calls if call.get("id") is not None}
    return messages


def _message(message: dict[str, Any], key: str) -> Message:
    role, calls = message.get("role"), message.get("tool_calls") or []
    if role not in ROLES:
        shown = f"{role!r:.40} given{nearest(role, ROLES)}" if isinstance(role, str) else "missing"
        raise UnusableRow(f"{key}.role: {shown}, allowed: {', '.join(ROLES)}")
    if not isinstance(calls, list):
        raise UnusableRow(f"{key}.tool_calls: {calls!r:.40} given, a list is needed")
    if calls and role not in ("user", "assistant"):
        raise UnusableRow(
            f"{key}.tool_calls: given with role {role}, allowed: with user and assistant"
        )
    checked = tuple(_call(call, f"{key}.tool_calls[{n}]") for n, call in enumerate(calls))
    made = Message(role, _content(message.get("content"), f"{key}.content"), checked)
    if not made.text.strip() and role != "tool":
        shown = "null" if message.get("content") is None else "empty"
        raise UnusableRow(f"{key}.content: {shown}, and no tool_calls")
    try:
        made.text.encode()
    except UnicodeEncodeError as error:
        reason = f"{error.reason} at character {error.start}"
        raise UnusableRow(f"{key}.content: not Unicode text ({reason})") from None
    return made


def _content(content: Any, key: str) -> str:
    parts = content if isinstance(content, list) else [] if content is None else [content]
    texts: list[Any] = []
    for number, part in enumerate(parts):
        if isinstance(part, dict) and part.get("type", "text") != "text":
            raise UnusableRow(f"{key}[{number}]: type {part['type']!r:.40} given, allowed: text")
        texts.append(part.get("text") if isinstance(part, dict) else part)
    wrong = [text for text in texts if not isinstance(text, str)]
    if wrong:
        allowed = "text, null, or a list of text parts"
        raise UnusableRow(f"{key}: {wrong[0]!r:.40} given, allowed: {allowed}")
    return "".join(texts)


def _call(call: Any, key: str) -> Call:
    function: Any = call.get("function") or call if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        raise UnusableRow(f"{key}: {call!r:.60} given, a name is needed, in it or in its function")
    return Call(name, as_arguments(function.get("arguments")))


def _check_result(message: dict[str, Any], ids: set[str], called: bool, key: str) -> None:
    if not called:
        raise UnusableRow(f"{key}: a tool's result, but no message before it calls a tool")
    single, several = message.get("tool_call_id"), message.get("tool_call_ids") or []
    several = several if isinstance(several, list) else [several]
    named = [(".tool_call_id", single)] if single is not None else []
    named += [(f".tool_call_ids[{number}]", name) for number, name in enumerate(several)]
    for part, name in named:
        if str(name) not in ids:
            raise UnusableRow(
                f"{key}{part}: {name!r:.60} given, no call before it has this id"
                f"{nearest(str(name), ids)}"
            )


class Turn(NamedTuple):
    """A message's place in the ids: header from start, text from content; end is behind its stop
    token, or behind its text.

    Each turn starts at the end of the one before; a template's last newline belongs to none. A
    token that holds the end of a header and the beginning of a text counts as header; the
    assistant's turns have none.
    """

    role: str
    start: int
    content: int
    end: int


@dataclass(frozen=True)
class Rendering:
    ids: np.ndarray  # (n,) int32
    mask: np.ndarray  # (n,) bool: the tokens with loss
    turns: list[Turn]  # of the messages, in order


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    supervise: str | int = "assistant",
) -> Rendering:
    """Messages in tokens, in the tokenizer's chat template; without one, each under its role.

    Args:
        supervise: the turns with loss, stop token included: "assistant", all of the assistant's;
            k >= 1, the last k of them.

    Raises:
        UnusableRow: the template refuses the messages, or changes their text.
        UserError: the template ends the assistant's turns with no special token.
    """
    frames, texts = _rendered(tokenizer, messages)
    special = [entry.content for entry in tokenizer.added_tokens_decoder.values() if entry.special]
    stops = _stops(frames, messages, special)
    # A piece begins with each assistant's text. A text with a special token's name is one of the
    # plain pieces, tokenised as plain text.
    pieces, plain, bounds = [""], set[int](), list[tuple[int, int, int]]()
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
        bounds.append((start, content, end))
    pieces[-1] += frames[-1]
    ids, offsets = _tokens(tokenizer, pieces, plain)
    turns = [
        Turn(message.role, *np.searchsorted(offsets, characters).tolist())
        for message, characters in zip(messages, bounds, strict=True)
    ]
    spoken = [turn for turn in turns if turn.role == "assistant"]
    mask = np.zeros(len(ids), dtype=bool)
    for turn in spoken if supervise == "assistant" else spoken[-int(supervise) :]:
        mask[turn.content : turn.end] = True
    return Rendering(ids, mask, turns)


def _tokens(
    tokenizer: PreTrainedTokenizerBase, pieces: Sequence[str], plain: set[int]
) -> tuple[np.ndarray, np.ndarray]:
    """(ids, the character of the joined pieces where each begins)."""
    options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
    ids, offsets, before = list[int](), list[int](), 0
    for number, piece in enumerate(pieces):
        tokens = tokenizer(piece, split_special_tokens=number in plain, **options)
        ids += tokens["input_ids"]
        # some tokenizers let white space begin where it ends
        starts = (min(start, len(piece) - 1) for start, _ in tokens["offset_mapping"])
        offsets += [before + start for start in starts]
        before += len(piece)
    return np.array(ids, dtype=np.int32), np.maximum.accumulate(np.array(offsets, dtype=np.int64))


def _stops(frames: Sequence[str], messages: Sequence[Message], special: Sequence[str]) -> set[str]:
    """The first special token behind each of the assistant's texts; it may end other turns too."""
    stops = set[str]()
    for message, after in zip(messages, frames[1:], strict=True):
        if message.role == "assistant":
            behind = [(after.find(name), -len(name), name) for name in special if name in after]
            if not behind:
                raise UserError(
                    "backbone.path: its tokenizer's chat template ends the assistant's turns with "
                    "no special token"
                )
            stops.add(min(behind)[-1])
    return stops


def _closing(frame: str, stops: set[str]) -> int:
    """Characters up to the end of the first stop token; 0 if there is none."""
    return min((frame.find(name) + len(name) for name in stops if name in frame), default=0)


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]
) -> tuple[list[str], list[str]]:
    """(frames, texts): the rendering is frames[0] + texts[0] + frames[1] + ... + frames[n]."""
    chat = [{"role": message.role, "content": message.text} for message in messages]
    without_tools = [
        _as_user(message) if message["role"] == "tool" else message for message in chat
    ]
    reason = ""
    for version in [chat, without_tools] if without_tools != chat else [chat]:
        split = _split(tokenizer, version)
        if not isinstance(split, str):
            return split
        reason = reason or split
    raise UnusableRow(f"messages: the tokenizer's chat template {reason}")


def _split(
    tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, str]]
) -> tuple[list[str], list[str]] | str:
    """(frames, texts) of a chat; a text says why the template does not allow it."""
    marks = [f"\u2063{number}\u2063" for number in range(len(chat))]
    marked = [message | {"content": mark} for message, mark in zip(chat, marks, strict=True)]
    try:
        rest, whole = _template(tokenizer, marked), _template(tokenizer, chat)
    # a template is a program: it fails with any exception
    except Exception as error:
        return f"refuses them: {first_line(error)}"
    frames = []
    for number, mark in enumerate(marks):
        frame, separator, rest = rest.partition(mark)
        if not separator:
            return f"leaves out messages[{number}], of role {chat[number]['role']}"
        frames.append(frame)
    frames.append(rest)
    texts = _aligned(whole, frames, [message["content"] for message in chat])
    return (frames, texts) if isinstance(texts, list) else f"changes the text of messages[{texts}]"


def _template(tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, str]]) -> str:
    options: dict[str, Any] = {"tokenize": False, "enable_thinking": False}
    if tokenizer.chat_template is None:
        options["chat_template"] = PLAIN_TEMPLATE
    return str(tokenizer.apply_chat_template(chat, **options))


def _as_user(message: dict[str, str]) -> dict[str, str]:
    """A tool's result for a template without the role tool."""
    return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}


def _aligned(whole: str, frames: list[str], texts: list[str]) -> list[str] | int:
    """The texts as they stand between the frames in `whole`; the number of the first that does
    not."""
    end, aligned = len(frames[0]), list[str]()
    for number, (text, after) in enumerate(zip(texts, frames[1:], strict=True)):
        for version in _versions(text):
            if whole.startswith(version + after, end):
                aligned.append(version)
                end += len(version) + len(after)
                break
        else:
            return number
    return aligned if whole.startswith(frames[0]) and end == len(whole) else len(texts) - 1


def _versions(text: str) -> Iterator[str]:
    """What templates make of a text: nothing; without spaces around it; without earlier thoughts;
    a result in JSON."""
    yield text
    yield text.strip()
    yield text.split("</think>")[-1].lstrip("\n")
    yield json.dumps(text, ensure_ascii=False)[1:-1]
