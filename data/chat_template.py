"""The frame of a tokenizer's chat template, in ids: what surrounds the texts of a conversation.

before | the user's words | after | the model's answer | between | the user's words | after ...
"""

from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from comet_pl.errors import UserError, first_line

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""The template of a tokenizer trained from scratch."""
BLANK = "\n\n"
MARKS = [f"\u2063{name}\u2063" for name in ("FIRST", "ANSWER", "NEXT")]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of plain text: no special token is added to it or read out of it."""
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    return tokenizer(text, **options)["input_ids"]


def frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """(before, after): ids around the user's words.

    Raises:
        UserError: the template cannot be rendered.
    """
    if tokenizer.chat_template is None:
        # the token that begins every text, if the decoder was trained with one
        first = tokenizer("")["input_ids"][:1]
        before = first if first == [tokenizer.bos_token_id] else []
        return before, encode(tokenizer, "\n\nAnswer:\n")
    chat = [{"role": "user", "content": MARKS[0]}]
    before, _, after = _render(tokenizer, chat, add_generation_prompt=True).partition(MARKS[0])
    return _with_special(tokenizer, before), _with_special(tokenizer, after)


def separator(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids between an answer and the user's next words; the stop token is the first of them.

    Raises:
        UserError: the template cannot be rendered.
    """
    if tokenizer.chat_template is None:
        return encode(tokenizer, BLANK)
    roles = zip(("user", "assistant", "user"), MARKS, strict=True)
    chat = [{"role": role, "content": mark} for role, mark in roles]
    _, _, rest = _render(tokenizer, chat).partition(MARKS[1])
    return _with_special(tokenizer, rest.partition(MARKS[2])[0])


def _render(tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, str]], **options: Any) -> str:
    options |= {"tokenize": False, "enable_thinking": False}
    try:
        return str(tokenizer.apply_chat_template(chat, **options))
    except jinja2.TemplateError as error:
        reason = first_line(error)
        raise UserError(f"the tokenizer's chat template cannot be used: {reason}") from None


def _with_special(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
