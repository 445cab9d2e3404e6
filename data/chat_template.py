"""The frame of a tokenizer's chat template, in ids: what surrounds the texts of a conversation.

before | the user's words | after | the model's answer | between | the user's words | after ...
"""

import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from comet_pl.errors import UserError, first_line
from data.encoding import encode, windows

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""The template of a tokenizer trained from scratch."""
BLANK = "\n\n"
MARKS = [f"\u2063{name}\u2063" for name in ("fIRST", "aNSWER", "nEXT")]


def frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """(before, after): ids around the user's words.

    Raises:
        UserError: the template cannot be rendered, or has no place for the user's words.
    """
    if tokenizer.chat_template is None:
        return text_start(tokenizer), encode(tokenizer, "\n\nAnswer:\n")
    before, after = _parts(tokenizer, 1, add_generation_prompt=True)
    return _with_special(tokenizer, before, begins=True), _with_special(tokenizer, after)


def text_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that the tokenizer begins every text with, if it has one."""
    first = tokenizer("")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def separator(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids between an answer and the user's next words; the stop token is the first of them.

    Raises:
        UserError: the template cannot be rendered, or has no place for an answer.
    """
    if tokenizer.chat_template is None:
        return encode(tokenizer, BLANK)
    return _with_special(tokenizer, _parts(tokenizer, 3)[2])


def answer_start(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template writes behind `after` and before an answer, such as Llama 2's space.

    Raises:
        UserError: the template cannot be rendered.
    """
    if tokenizer.chat_template is None:
        return ""
    _, prompt = _parts(tokenizer, 1, add_generation_prompt=True)
    between = _parts(tokenizer, 2)[1]
    start = between.removeprefix(prompt) if between.startswith(prompt) else ""
    return "" if start.strip() else start


def _parts(tokenizer: PreTrainedTokenizerBase, turns: int, **options: Any) -> list[str]:
    """What the template writes before, between and behind the texts of so many turns."""
    options |= {"tokenize": False, "enable_thinking": False}
    roles = ("user", "assistant", "user")[:turns]
    chat = [{"role": role, "content": mark} for role, mark in zip(roles, MARKS, strict=False)]
    try:
        rendered = str(tokenizer.apply_chat_template(chat, **options))
    except Exception as error:  # of the template, which is a program of its own
        reason = first_line(error)
        raise UserError(f"the tokenizer's chat template cannot be used: {reason}") from None
    if re.findall("|".join(MARKS), rendered) != MARKS[:turns]:
        raise UserError(
            "the tokenizer's chat template cannot be used: it leaves out, changes or repeats the "
            "text of a message; one that takes each message's content as text is needed"
        )
    return re.split("|".join(MARKS), rendered)


def _with_special(tokenizer: PreTrainedTokenizerBase, text: str, begins: bool = False) -> list[int]:
    parts = windows(tokenizer, [text], begins, special=True)
    return [token for part in parts for token in part.ids]
