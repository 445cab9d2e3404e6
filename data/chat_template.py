"""The frame of a tokenizer's chat template, in ids: what surrounds the texts of a conversation.

before | the user's words | after | the model's answer | between | the user's words | after ...
"""

import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from comet_pl.errors import UserError, first_line

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""The template of a tokenizer trained from scratch."""
BLANK = "\n\n"
MARKS = [f"\u2063{name}\u2063" for name in ("fIRST", "aNSWER", "nEXT")]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of plain text: no special token is added to it or read out of it."""
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    return tokenizer(text, **options)["input_ids"]


def frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """(before, after): ids around the user's words.

    Raises:
        UserError: the template cannot be rendered, or leaves out the user's words.
    """
    if tokenizer.chat_template is None:
        # the token that begins every text, if the decoder was trained with one
        first = tokenizer("")["input_ids"][:1]
        before = first if first == [tokenizer.bos_token_id] else []
        return before, encode(tokenizer, "\n\nAnswer:\n")
    chat = [{"role": "user", "content": MARKS[0]}]
    before, after = _around(MARKS[:1], _render(tokenizer, chat, add_generation_prompt=True))
    return _with_special(tokenizer, before), _with_special(tokenizer, after)


def separator(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids between an answer and the user's next words; the stop token is the first of them.

    Raises:
        UserError: the template cannot be rendered, or leaves out a message's text.
    """
    if tokenizer.chat_template is None:
        return encode(tokenizer, BLANK)
    roles = zip(("user", "assistant", "user"), MARKS, strict=True)
    chat = [{"role": role, "content": mark} for role, mark in roles]
    return _with_special(tokenizer, _around(MARKS, _render(tokenizer, chat))[2])


def _around(marks: list[str], rendered: str) -> list[str]:
    """What a rendering has before, between and after the marks.

    Raises:
        UserError: a mark is not in it, or not once, or not in its place.
    """
    if re.findall("|".join(MARKS), rendered) != marks:
        raise UserError(
            "the tokenizer's chat template cannot be used: it leaves out, changes or repeats the "
            "text of a message; one that takes each message's content as text is needed"
        )
    return re.split("|".join(marks), rendered)


def _render(tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, str]], **options: Any) -> str:
    options |= {"tokenize": False, "enable_thinking": False}
    try:
        return str(tokenizer.apply_chat_template(chat, **options))
    # a template is a program: it fails with any exception
    except Exception as error:
        reason = first_line(error)
        raise UserError(f"the tokenizer's chat template cannot be used: {reason}") from None


def _with_special(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
