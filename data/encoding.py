"""Pieces of a text in ids, as they stand in the whole.

Some tokenizers put a space before every string that they are given (SentencePiece's and its like:
a Prepend normalizer, Metaspace, ByteLevel's add_prefix_space), or strip it. A piece that stands
inside a longer text is tokenised without that, so that the ids of all pieces decode to the whole. A
piece that begins the whole, or follows a special token, gets what the tokenizer itself puts there.

A long text is tokenised window by window, in memory that does not depend on its length. A window
ends between a word and the space behind it, far enough from its end that the rest cannot change
the ids.
"""

import copy
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

WINDOW = 100_000
"""Characters that are tokenised at once."""
MARGIN = 1_000
"""Characters before the end of a window whose ids may depend on what follows."""
LARGEST_WINDOW = 8 * WINDOW
"""A window grows up to here while it has no end that is safe to cut at."""
PLAIN: dict[str, Any] = {"split_special_tokens": True, "verbose": False}
BEFORE_SPACE = re.compile(r"(?<=\S)(?= )")


class Tokens(NamedTuple):
    """Ids, and the characters of the text where each begins and ends."""

    ids: list[int]
    starts: list[int]
    ends: list[int]


def encode(tokenizer: PreTrainedTokenizerBase, text: str, begins: bool = False) -> list[int]:
    """Ids of plain text: no special token is added to it or read out of it.

    Args:
        begins: the text begins the whole, or follows a special token; see `begins_after`.
    """
    if len(text) <= WINDOW:
        part = tokenizer if begins else inside(tokenizer)
        return part(text, add_special_tokens=False, **PLAIN)["input_ids"]
    return [token for part in stream(tokenizer, [text], begins) for token in part]


def stream(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], begins: bool = False
) -> Iterator[list[int]]:
    """Ids of one plain text that comes in pieces of any length; they are those of the whole."""
    return (tokens.ids for tokens in windows(tokenizer, texts, begins))


def windows(
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    begins: bool = False,
    special: bool = False,
) -> Iterator[Tokens]:
    """Tokens of one text that comes in pieces of any length, window by window.

    Args:
        begins: see `encode`.
        special: names of special tokens in the text are those tokens.
    """
    place, left = 0, ""
    for text, last in marked(piece for whole in texts for piece in _cut(whole)):
        left += text
        if not last and len(left) < WINDOW:
            continue
        tokens = _tokens(tokenizer, left, begins, special)
        count = len(tokens.ids) if last else _settled(left, tokens)
        whole = last or (not count and len(left) >= LARGEST_WINDOW)
        if whole:
            count = len(tokens.ids)
        if not count:
            continue
        ids, starts, ends = (values[:count] for values in tokens)
        yield Tokens(ids, [place + start for start in starts], [place + end for end in ends])
        cut = len(left) if whole else ends[-1]
        place, left, begins = place + cut, left[cut:], False


def pieces(texts: Iterable[str], size: int) -> Iterator[str]:
    """One text that comes in parts of any length, in pieces of `size` characters, up to twice as
    many; cut between a word and a space, if there is one: the words stay."""
    left = ""
    for text, last in marked(part for whole in texts for part in _cut(whole)):
        left += text
        while len(left) > size and (last or len(left) >= 2 * size):
            cut = BEFORE_SPACE.search(left, size, 2 * size)
            end = cut.start() if cut else 2 * size
            yield left[:end]
            left = left[end:]
    yield left


def inside(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer of pieces inside a text: it adds and strips nothing at their ends."""
    return _manner(tokenizer).inside or tokenizer


def begins_after(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int] | np.ndarray) -> bool:
    """Whether a text behind these ids is tokenised like one that begins the whole."""
    if not len(ids):
        return True
    if int(ids[-1]) not in tokenizer.added_tokens_decoder:
        return False
    # without a template the special token is the tokenizer's own beginning of every text
    return tokenizer.chat_template is None or _manner(tokenizer).repeats


@dataclass(frozen=True)
class _Manner:
    """What a tokenizer does at the beginning of a text.

    Args:
        size: of the tokenizer; more tokens make another manner.
        inside: see above; None: the tokenizer itself.
        repeats: it does the same behind each special token.
    """

    size: int
    inside: PreTrainedTokenizerBase | None
    repeats: bool


_MANNERS: WeakKeyDictionary[PreTrainedTokenizerBase, _Manner] = WeakKeyDictionary()


def _manner(tokenizer: PreTrainedTokenizerBase) -> _Manner:
    manner = _MANNERS.get(tokenizer)
    if manner is None or manner.size != len(tokenizer):
        manner = _MANNERS[tokenizer] = _find_manner(tokenizer)
    return manner


def _find_manner(tokenizer: Any) -> _Manner:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return _Manner(len(tokenizer), None, True)
    content = json.loads(backend.to_str())
    parts = {name: content[name] for name in ("normalizer", "pre_tokenizer")}
    changed = {name: _without_ends(part) for name, part in parts.items()}
    if changed == parts:
        return _Manner(len(tokenizer), None, True)
    part = copy.deepcopy(tokenizer)
    part._tokenizer = Tokenizer.from_str(json.dumps(content | changed))
    alone, repeats = tokenizer("x", add_special_tokens=False)["input_ids"], True
    for token, entry in tokenizer.added_tokens_decoder.items():
        ids = tokenizer(f"{entry.content}x", add_special_tokens=False)["input_ids"]
        if ids[:1] == [token]:
            repeats = ids[1:] == alone
            break
    return _Manner(len(tokenizer), part, repeats)


def _without_ends(part: Any) -> Any:
    """A normalizer or pre-tokenizer, as JSON, that neither adds nor strips at a text's ends."""
    if not isinstance(part, dict):
        return part
    kind = part.get("type")
    if kind in ("Prepend", "Strip"):
        return None
    if kind == "Metaspace":
        return part | {"prepend_scheme": "never"}
    if kind == "ByteLevel":
        return part | {"add_prefix_space": False}
    for name in ("normalizers", "pretokenizers"):
        if name in part:
            kept = [changed for inner in part[name] if (changed := _without_ends(inner))]
            return part | {name: kept}
    return part


def _tokens(tokenizer: Any, text: str, begins: bool, special: bool) -> Tokens:
    """Tokens of a window."""
    part, cut = tokenizer if begins else inside(tokenizer), len(text)
    if special and part is not tokenizer and _manner(tokenizer).repeats:
        # behind a special token the tokenizer does as it does at a beginning
        cut = _first_special(tokenizer, text)
    options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
    ids, spans = list[int](), list[tuple[int, int]]()
    for piece, encoder, before in ((text[:cut], part, 0), (text[cut:], tokenizer, cut)):
        if piece:
            found = encoder(piece, split_special_tokens=not special, **options)
            ids += found["input_ids"]
            spans += [(before + start, before + end) for start, end in found["offset_mapping"]]
    return Tokens(ids, [start for start, _ in spans], [end for _, end in spans])


def _first_special(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Where the first special token begins, with the spaces that it takes; the end without one."""
    first = len(text)
    for entry in tokenizer.added_tokens_decoder.values():
        place = text.find(entry.content, 0, first + len(entry.content))
        if 0 <= place < first:
            first = len(text[:place].rstrip()) if entry.lstrip else place
    return first


def _settled(text: str, tokens: Tokens) -> int:
    """How many of a window's tokens do not depend on what follows; 0: more text is needed."""
    words = characters = 0
    limit = len(text) - MARGIN
    for number in range(len(tokens.ids) - 1, 0, -1):
        end = tokens.ends[number - 1]
        # a token of spaces may give a place inside it as its end
        if not 0 < end <= limit or tokens.starts[number] < end or text[end - 1].isspace():
            continue
        characters = characters or number
        if text[end].isspace():
            words = number
            break
    return words or characters


def _cut(text: str) -> Iterator[str]:
    yield from (text[start : start + WINDOW] for start in range(0, len(text), WINDOW))


def marked(pieces: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """(piece, whether it is the last); at least one."""
    before: str | None = None
    for piece in pieces:
        if before is not None:
            yield before, False
        before = piece
    yield before or "", True
