"""Where a text is cut into chunks, and its stride: the mixture of the authors' training.

    fixed           C, C, ..., rest
    right_aligned   rest, C, ..., C
    random          a random number of chunks, ceil(n / C) to M / C, of random sizes, 4 to C
    uniform         M / C chunks of nearly equal size
    sentence        the longest chunk that ends with a sentence, again and again
    mixture         one of these, drawn by the text's length

Legend: n tokens of the text, C chunk size, M max_length of a text, s compression stride. A plan is
a list of sizes from 1 to C that sum to n. The caller makes the generator from (seed, epoch, index).
"""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from comet_pl.model.chunk_layout import fixed_chunks

KINDS = ("fixed", "right_aligned", "random", "uniform", "sentence")
LEAST = 4  # tokens of a random chunk
SENTENCE_ENDS = ("\n", ".", ",", "。")  # a blank line ends on a newline too
STOP_TOKENS = ("<|im_end|>", "<|end|>")
LONGEST_STRIDE = 128


def chunk_plan(
    kind: str,
    n: int,
    chunk_size: int,
    max_length: int,
    random: np.random.Generator,
    ends: Sequence[bool] | np.ndarray | None = None,
) -> list[int]:
    """Sizes of the chunks of a text; [] if it has no tokens.

    Where a kind does not fit the text: a text longer than M counts as one of M = n; a text of fewer
    than M / C tokens has uniform chunks of one token; random chunks are shorter than 4 tokens if n
    is too small for ceil(n / C) of that size; a chunk without a sentence's end within C tokens has
    C tokens, and a rest of at most C is one chunk.

    Args:
        kind: one of KINDS, or mixture.
        ends: for sentence and mixture: (n,) whether a chunk may end after this token
            (sentence_ends(tokenizer)[ids]).

    Raises:
        ValueError: an unknown kind; n < 0; chunk_size or max_length < 1; not n ends.
    """
    if kind not in (*KINDS, "mixture"):
        raise ValueError(f"kind: {kind!r} given, allowed: {', '.join(KINDS)}, mixture")
    if n < 0 or chunk_size < 1 or max_length < 1:
        raise ValueError(
            "n >= 0, chunk_size >= 1 and max_length >= 1 are needed; "
            f"{n}, {chunk_size} and {max_length} given"
        )
    if kind in ("sentence", "mixture") and (ends is None or len(ends) != n):
        count = "none" if ends is None else len(ends)
        raise ValueError(f"ends: {count} given, {kind} needs one for each of {n} tokens")
    if kind == "mixture":
        kind = draw_kind(n, chunk_size, max_length, random)
    if n == 0:
        return []
    least, most = -(-n // chunk_size), -(-max(n, max_length) // chunk_size)
    if kind == "fixed":
        return fixed_chunks(n, chunk_size)
    if kind == "right_aligned":
        return fixed_chunks(n, chunk_size)[::-1]
    if kind == "random":
        count = int(random.integers(least, max(least, min(most, n // LEAST)), endpoint=True))
        return _random_sizes(n, count, chunk_size, random)
    if kind == "uniform":
        size, larger = divmod(n, count := min(most, n))
        return [size + 1] * larger + [size] * (count - larger)
    return _to_ends(n, chunk_size, np.flatnonzero(np.asarray(ends)) + 1)


def draw_kind(n: int, chunk_size: int, max_length: int, random: np.random.Generator) -> str:
    """One of KINDS, with the authors' weights for a text of n tokens.

    n              fixed   right_aligned   random   uniform   sentence
    n < C             .8              .1       .1
    C <= n < .75 M    .6              .1       .2       .05        .05
    n >= .75 M        .6              .1       .1       .2

    A text that fits into a chunk has the first row's weights, however short M is.
    """
    if n < chunk_size:
        weights = (0.8, 0.1, 0.1, 0.0, 0.0)
    elif n < 0.75 * max_length:
        weights = (0.6, 0.1, 0.2, 0.05, 0.05)
    else:
        weights = (0.6, 0.1, 0.1, 0.2, 0.0)
    return KINDS[random.choice(len(KINDS), p=weights)]


def draw_stride(stride: int, random: np.random.Generator, longest: int = LONGEST_STRIDE) -> int:
    """A stride for dynamic compression: one of s, 2s, 4s, ... up to `longest`.

    The k strides have the weights k^2, (k - 1)^2, ..., 1. An s above `longest` is the only one.

    Raises:
        ValueError: stride < 1.
    """
    if stride < 1:
        raise ValueError(f"stride: {stride} given, allowed: >= 1")
    strides = [stride]
    while 2 * strides[-1] <= longest:
        strides.append(2 * strides[-1])
    weights = np.arange(len(strides), 0, -1.0) ** 2
    return strides[random.choice(len(strides), p=weights / weights.sum())]


def sentence_ends(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """(V,) bool: ids after which a sentence may end; V is the largest id + 1.

    These are the stop token, and text that ends on a newline, '.', ',' or the Chinese full stop. A
    full stop that a tokenizer spells in several byte tokens is not among them.
    """
    size = max(tokenizer.get_vocab().values()) + 1
    ids = [[token] for token in range(size)]
    texts = tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)
    ends = np.array([text.endswith(SENTENCE_ENDS) or text in STOP_TOKENS for text in texts])
    if tokenizer.eos_token_id is not None:
        ends[tokenizer.eos_token_id] = True
    return ends


def _random_sizes(n: int, count: int, most: int, random: np.random.Generator) -> list[int]:
    """`count` sizes of 4 to `most` tokens that sum to n; smaller ones if n is too small."""
    least = min(LEAST, n // count)
    sizes, left = [], n
    for later in reversed(range(count)):
        low, high = max(least, left - later * most), min(most, left - later * least)
        size = int(random.integers(low, high, endpoint=True))
        sizes.append(size)
        left -= size
    # the first draws have the most room: the permutation spreads them
    return random.permutation(sizes).tolist()


def _to_ends(n: int, most: int, ends: np.ndarray) -> list[int]:
    """Sizes of chunks that end at `ends`, the ascending numbers of tokens before a cut."""
    cuts = [0]
    while n - cuts[-1] > most:
        before = int(np.searchsorted(ends, cuts[-1] + most, side="right"))
        end = int(ends[before - 1]) if before else 0
        cuts.append(end if end > cuts[-1] else cuts[-1] + most)
    return np.diff([*cuts, n]).tolist()
