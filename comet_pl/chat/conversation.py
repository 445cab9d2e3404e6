"""A text that a model reads, and a conversation about it, in one CometCache: as many bytes after a page as after a million tokens.

    before | document, blank line | question | after | answer | between | question | after | answer | between ...

before, after and between are the tokenizer's chat template: what stands before a user's words, between them and the answer, and between
the answer and the user's next words. The document is the beginning of the user's first words.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jinja2
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from comet_pl.errors import UserError, first_line
from comet_pl.model.cache import CometCache
from comet_pl.model.modeling_comet import CometForCausalLM

READ_AT_ONCE = 1024  # tokens a call, at least one chunk: the logits of one column, and the activations of one chunk, are all that it needs
BLANK = "\n\n"
MARKS = [f"\u2063{name}\u2063" for name in ("FIRST", "ANSWER", "NEXT")]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of plain text: no special token is added, and none is read out of the text."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)[
        "input_ids"
    ]


def frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids before and after what a user says and the model answers."""
    if tokenizer.chat_template is None:
        first = tokenizer("")["input_ids"][
            :1
        ]  # a token that begins every text, where the decoder was trained with one
        return first if first == [tokenizer.bos_token_id] else [], encode(
            tokenizer, "\n\nAnswer:\n"
        )
    chat = [{"role": "user", "content": MARKS[0]}]
    before, _, after = _render(tokenizer, chat, add_generation_prompt=True).partition(MARKS[0])
    return _with_special(tokenizer, before), _with_special(tokenizer, after)


def separator(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids between an answer and what the user says next; the stop token is the first of them."""
    if tokenizer.chat_template is None:
        return encode(tokenizer, BLANK)
    chat = [
        {"role": role, "content": mark}
        for role, mark in zip(("user", "assistant", "user"), MARKS, strict=True)
    ]
    return _with_special(
        tokenizer, _render(tokenizer, chat).partition(MARKS[1])[2].partition(MARKS[2])[0]
    )


def _render(tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, str]], **more: Any) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(chat, tokenize=False, enable_thinking=False, **more)
        )
    except jinja2.TemplateError as error:
        raise UserError(
            f"the tokenizer's chat template cannot be used: {first_line(error)}"
        ) from None


def _with_special(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@dataclass
class Conversation:
    """What was read and said so far.

    Args:
        cache: holds every id so far, except those in `opening`; without one the conversation starts empty.
        opening: ids that come before whatever text is next. After an answer they begin with what generate() has not fed of it: its last
            token, if it was cut off. None: the template's beginning.
        name: of the memory file, for complaints.
    """

    model: CometForCausalLM
    tokenizer: PreTrainedTokenizerBase
    cache: CometCache
    opening: list[int] | None = None
    name: str = "the cache"
    stops: list[int] = field(init=False)

    def __post_init__(self) -> None:
        before, self.after = frame(self.tokenizer)
        self.between = separator(self.tokenizer)
        self.opening = before if self.opening is None else self.opening
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        ends = [
            self.tokenizer.eos_token_id,
            *(configured if isinstance(configured, list) else [configured]),
        ]
        ends += [i for i in self.between[:1] if i in self.tokenizer.all_special_ids]
        self.stops = list(dict.fromkeys(i for i in ends if i is not None))

    @torch.no_grad()
    def read(
        self, pieces: Iterable[list[int]], count: Callable[[int], None] = lambda tokens: None
    ) -> None:
        """Reads a document, a few chunks at a time.

        Args:
            pieces: its ids, in pieces of any length. count: is told how many more tokens have been read.

        Raises:
            UserError: the cache is of another model, or there is no memory for it.
        """
        size = self.model.config.chunk_size
        most = max(1, READ_AT_ONCE // size) * size
        ids = list(self.opening or [])
        for piece in pieces:
            ids += piece
            while len(ids) > most:
                self._feed(ids[:most])
                count(most)
                del ids[:most]
        if ids:
            self._feed(ids)
            count(len(ids))
        self.opening = encode(self.tokenizer, BLANK)

    def ask(
        self, question: str, max_new_tokens: int, temperature: float = 0.0, **more: Any
    ) -> list[int]:
        """Ids of the answer, without a stop token.

        Args:
            temperature: 0: greedy; whatever the model's folder says of sampling is then set aside. more: goes to generate(), such as a
                streamer.

        Raises:
            UserError: the cache is of another model, or there is no memory for it.
        """
        ids = [*(self.opening or []), *encode(self.tokenizer, question), *self.after]
        columns = self.cache.get_seq_length() + len(ids)
        greedy: dict[str, Any] = {
            "do_sample": False,
            "temperature": None,
            "top_p": None,
            "top_k": None,
        }
        choice = {"do_sample": True, "temperature": temperature} if temperature else greedy
        pad = (
            self.tokenizer.pad_token_id
            if self.tokenizer.pad_token_id is not None
            else next(iter(self.stops), 0)
        )
        ends: dict[str, Any] = {
            "eos_token_id": self.stops or None,
            "pad_token_id": pad,
            "max_new_tokens": max_new_tokens,
        }
        mask = torch.ones(
            1, columns, dtype=torch.long, device=self.model.device
        )  # of all columns: or generate() would count anew
        with self._plainly():
            out: Any = self.model.generate(  # type: ignore[misc]
                self._tensor(ids),
                attention_mask=mask,
                past_key_values=self.cache,
                num_beams=1,
                num_return_sequences=1,
                **choice,
                **ends,
                **more,
            )
        answer: list[int] = out[0, len(ids) :].tolist()
        if answer[-1] in self.stops:
            answer.pop()
        self.opening = (
            answer[self.cache.get_seq_length() - columns :] + self.between
        )  # generate() does not feed its last token
        return answer

    def save(self, path: str | os.PathLike[str], **notes: Any) -> None:
        """Writes the cache, with `opening` and the notes, at once, whole.

        Raises:
            UserError: it cannot be written.
        """
        try:
            self.cache.save(path, notes={"opening": self.opening, **notes})
        except OSError as error:
            raise UserError(
                f"--save: {path} cannot be written: {error.strerror or error}"
            ) from None

    def _feed(self, ids: list[int]) -> None:
        with self._plainly():
            self.model(
                self._tensor(ids), past_key_values=self.cache, use_cache=True, logits_to_keep=1
            )

    def _tensor(self, ids: list[int]) -> Tensor:
        return torch.tensor([ids], device=self.model.device)

    @contextmanager
    def _plainly(self) -> Iterator[None]:
        """What the model refuses, as one line that names the memory."""
        try:
            yield
        except (ValueError, MemoryError) as error:
            raise UserError(
                f"{self.name}: {str(error).removeprefix('past_key_values: ')}"
            ) from None
