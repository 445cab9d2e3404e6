"""A conversation about a text, in one CometCache of constant size.

    before | document, blank line | question | after | answer | between | question | after ...

before, after and between are the frame of the tokenizer's chat template (data/chat_template.py).
The document is the beginning of the user's first message.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from comet_pl import CometCache, CometForCausalLM
from comet_pl.chat.signals import Deferred
from comet_pl.errors import UserError, os_errors
from comet_pl.files import remove_leftovers
from data.chat_template import BLANK, frame, separator
from data.encoding import begins_after, encode

# Tokens a forward call prefills, at least one chunk: it holds the activations of one chunk and the
# logits of one column.
PREFILL = 1024


@dataclass
class Conversation:
    """What was read and said so far.

    Args:
        cache: holds every id so far except those in `opening`.
        opening: ids that precede the next text. After an answer they begin with the answer's last
            token if generate() was cut off before feeding it. None: the template's beginning.
        name: of the memory file, for error messages.
    """

    model: CometForCausalLM
    tokenizer: PreTrainedTokenizerBase
    cache: CometCache
    opening: list[int] | None = None
    name: str = "the cache"

    def __post_init__(self) -> None:
        before, self.after = frame(self.tokenizer)
        self.between = separator(self.tokenizer)
        self.opening = before if self.opening is None else self.opening
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        ends = [self.tokenizer.eos_token_id]
        ends += configured if isinstance(configured, list) else [configured]
        ends += [i for i in self.between[:1] if i in self.tokenizer.all_special_ids]
        self.whole = True  # False while the model reads or answers: then it can't be saved
        self.stops: list[int] = list(dict.fromkeys(i for i in ends if i is not None))

    @property
    def begins(self) -> bool:
        """Whether the next text begins the whole, or follows a special token."""
        if not self.opening and self.cache.get_seq_length():
            return False
        return begins_after(self.tokenizer, self.opening or [])

    @torch.no_grad()
    def read(
        self, pieces: Iterable[list[int]], count: Callable[[int], None] = lambda tokens: None
    ) -> None:
        """Prefills the cache with a document, a few chunks a call.

        Args:
            pieces: the document's ids, in pieces of any length; `begins` says how the first begins.
            count: called with the number of tokens of each forward call.

        Raises:
            UserError: the cache is of another model, or there is no memory for it.
        """
        size = self.model.config.chunk_size
        most = max(1, PREFILL // size) * size
        ids, self.whole = list(self.opening or []), False
        for piece in pieces:
            ids += piece
            while len(ids) > most:
                self._prefill(ids[:most])
                count(most)
                del ids[:most]
        if ids:
            self._prefill(ids)
            count(len(ids))
        self.opening, self.whole = encode(self.tokenizer, BLANK), True

    def ask(
        self, question: str, max_new_tokens: int, temperature: float = 0.0, **options: Any
    ) -> list[int]:
        """Ids of the answer, without a stop token.

        Args:
            temperature: 0: greedy, whatever the model's folder says of sampling.
            options: further arguments of generate(), such as a streamer.

        Raises:
            UserError: the cache is of another model, or there is no memory for it.
        """
        asked = encode(self.tokenizer, question, self.begins)
        ids = [*(self.opening or []), *asked, *self.after]
        columns = self.cache.columns + len(ids)
        if temperature:
            options |= {"do_sample": True, "temperature": temperature}
        else:
            options |= {"do_sample": False, **dict.fromkeys(("temperature", "top_p", "top_k"))}
        pad = self.tokenizer.pad_token_id
        prompt = self._tensor(ids)
        self.whole = False
        with self._naming_the_memory(), self._counting_from_here():
            output: Any = self.model.generate(  # type: ignore[misc]
                prompt,
                attention_mask=torch.ones_like(prompt),
                past_key_values=self.cache,
                num_beams=1,
                num_return_sequences=1,
                eos_token_id=self.stops or None,
                pad_token_id=next(iter(self.stops), 0) if pad is None else pad,
                max_new_tokens=max_new_tokens,
                **options,
            )
        answer: list[int] = output[0, len(ids) :].tolist()
        if answer[-1] in self.stops:
            answer.pop()
        # generate() does not feed its last token
        self.opening = answer[self.cache.columns - columns :] + self.between
        self.whole = True
        return answer

    def save(self, path: str | os.PathLike[str], **notes: Any) -> None:
        """Writes the cache with `opening` and the notes, whole or not at all; signals wait.

        Raises:
            UserError: it cannot be written.
        """
        with Deferred(), os_errors(f"--save: {path} cannot be written"):
            remove_leftovers(Path(path))
            self.cache.save(path, notes={"opening": self.opening, **notes})

    def _prefill(self, ids: list[int]) -> None:
        with self._naming_the_memory():
            self.model(
                self._tensor(ids), past_key_values=self.cache, use_cache=True, logits_to_keep=1
            )

    def _tensor(self, ids: list[int]) -> Tensor:
        return torch.tensor([ids], device=self.model.device)

    @contextmanager
    def _counting_from_here(self) -> Iterator[None]:
        """generate() needs no mask of all columns so far, which would grow with them."""
        self.cache.behind = self.cache.columns
        try:
            yield
        finally:
            self.cache.behind = 0

    @contextmanager
    def _naming_the_memory(self) -> Iterator[None]:
        """Turns the model's refusals into a UserError that names the memory."""
        try:
            yield
        except (ValueError, MemoryError) as error:
            reason = str(error).removeprefix("past_key_values: ")
            raise UserError(f"{self.name}: {reason}") from None
