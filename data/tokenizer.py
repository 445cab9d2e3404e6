"""The tokenizer of a decoder from scratch, and what data ask of any tokenizer."""

from collections.abc import Iterable, Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from comet_pl.errors import UserError
from data.chat_template import CHAT_TEMPLATE
from data.encoding import pieces

PAD, END, *_ = SPECIAL_TOKENS = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
AGENT_TOKENS = ["<|system|>", "<|tool|>"]
"""Headers of further roles of CHAT_TEMPLATE, for data that have them."""
WORDS = r"\w(?:[\w.:/-]*\w)?|\s|[^\w\s]+"
"""14:05, 0.42, 85123A and 2011-05-31 are words; a space is never part of one."""
PIECE = 1_000_000
"""Characters that a tokenizer from scratch takes at once."""
TOKENIZER_CHARACTERS = 20_000_000
"""A tokenizer from scratch takes longer with more text, but learns no more from it."""


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    more_special: Sequence[str] = (),
    whole_words: bool = False,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts`; equal texts give equal tokenizers.

    Special tokens are <|pad|>, <|end|> (end of sequence and stop token), <|user|> and
    <|assistant|>; the chat template writes '<|user|>QUESTION<|assistant|>ANSWER<|end|>'.

    Args:
        texts: an iterator is read once, piece by piece.
        vocab_size: at most; >= 260 (256 bytes and the special tokens). Few texts give fewer.
        more_special: special tokens that follow the others, such as AGENT_TOKENS.
        whole_words: False: each digit is a token of its own. True: numbers, times and dates are
            merged like words, and a word is the same token with and without a space before it.
    """
    split = (
        pre_tokenizers.Split(Regex(WORDS), "isolated")
        if whole_words
        else pre_tokenizers.Digits(individual_digits=True)
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not whole_words)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL_TOKENS, *more_special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    parts = (piece for text in texts for piece in pieces([text], PIECE))
    tokenizer.train_from_iterator(parts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, chat_template=CHAT_TEMPLATE
    )


def stop_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends an answer.

    Raises:
        UserError: the tokenizer has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            "backbone.path: its tokenizer has no end-of-sequence token, which has to end an answer"
        )
    return tokenizer.eos_token_id


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills rows; it is masked, so the stop token stands in for a missing one."""
    return stop_token(tokenizer) if tokenizer.pad_token_id is None else tokenizer.pad_token_id
