"""What every kind of data shares: the tokenizer trained from scratch, right-padded batches, and a loader that resumes exactly."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from comet_pl.errors import UserError

PAD, END, USER, ASSISTANT = SPECIAL_TOKENS = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
AGENT_TOKENS = ["<|system|>", "<|tool|>"]  # more roles of CHAT_TEMPLATE, for data that has them
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
IGNORED = -100  # label of a token without loss
# 14:05, 0.42, 85123A and 2011-05-31 are words; a space is never part of one.
WORDS = r"\w(?:[\w.:/-]*\w)?|\s|[^\w\s]+"


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    more_special: Sequence[str] = (),
    whole_words: bool = False,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts`; the same texts give the same tokenizer.

    Every digit is a token of its own; with whole_words numbers, times and dates are merged like words, and a word is the same token with
    and without a space before it. Special tokens:
    <|pad|>, <|end|> (end of sequence, the stop token), <|user|> and <|assistant|>; the chat template writes
    '<|user|>QUESTION<|assistant|>ANSWER<|end|>'.

    Args:
        texts: an iterator is read once, piece by piece. vocab_size: rows at most, >= 260 (256 bytes and the special tokens); few texts
            give fewer. more_special: further special tokens, such as AGENT_TOKENS; they follow the others.
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
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, chat_template=CHAT_TEMPLATE
    )


def stop_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends an answer.

    Raises:
        UserError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            "backbone.path: its tokenizer has no end-of-sequence token, which has to end an answer"
        )
    return tokenizer.eos_token_id


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills up rows; masked, so that any will do where the tokenizer has none."""
    return stop_token(tokenizer) if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def length_at(data: Any, step: int) -> int:
    """Tokens of a training example at an optimizer step, by data.length_schedule and data.train_length."""
    return [
        length
        for start, length in data.length_schedule or [[0, data.train_length]]
        if start <= step
    ][-1]


@rank_zero_only
def say(line: str) -> None:
    """Something that the user should know about the data, on the first rank only."""
    print(line, flush=True)


def pad_rows(
    rows: Sequence[tuple[np.ndarray, np.ndarray]], pad_token: int, left: bool = False
) -> dict[str, Tensor]:
    """(ids, labels) pairs, each (n,) -> input_ids, attention_mask, labels, each (B, longest) int64, padded on the right (or left).

    No pairs make the batch of `nothing`.
    """
    if not rows:
        return nothing()
    width = max(len(ids) for ids, _ in rows)
    input_ids = torch.full((len(rows), width), pad_token)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for row, (ids, targets) in enumerate(rows):
        columns = slice(width - len(ids), None) if left else slice(len(ids))
        input_ids[row, columns] = torch.as_tensor(ids)
        attention_mask[row, columns] = 1
        labels[row, columns] = torch.as_tensor(targets)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def nothing() -> dict[str, Tensor]:
    """One token without a label, (1, 1): a batch that can be read, but does not count."""
    token = torch.zeros(1, 1, dtype=torch.int64)
    return {
        "input_ids": token,
        "attention_mask": torch.ones_like(token),
        "labels": torch.full_like(token, IGNORED),
    }


class Rows(Protocol):
    """A dataset with an index over its rows."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class ResumableLoader:
    """Training batches, all full, in an order that is a pure function of (seed, epoch); stopped anywhere and resumed, the rest comes as if
    never stopped. The last batch of an epoch is filled up with the epoch's first rows.

    Its state is (epoch, position): how many rows of the epoch all ranks together have been given, whatever worker processes have prepared
    beyond; so the order goes on where it was even if the number of ranks changes. The next epoch begins when its first batch is asked for:
    until then more rows, as a larger max_steps brings them, go on with this one. The state is the same on all ranks. Lightning saves and
    restores it with its checkpoints. Torch's global random state is left alone, so that resuming within an epoch draws no number more.

    Args:
        dataset: rows by index. batch_size: rows a batch on each rank. collate: list of rows -> batch.
        seed: of the order; None: the rows' own order, in every epoch.
        rank, world: this data-parallel rank, of how many; each batch of rows is dealt to them in turn.
    """

    def __init__(
        self,
        dataset: Rows,
        batch_size: int,
        collate: Callable[[list[Any]], Any],
        seed: int | None = None,
        num_workers: int = 0,
        rank: int = 0,
        world: int = 1,
    ):
        self.dataset, self.batch_size, self.collate, self.seed = dataset, batch_size, collate, seed
        self.num_workers, self.rank, self.world = num_workers, rank, world
        self.epoch = self.position = 0

    def __len__(self) -> int:
        """Batches of a whole epoch, on each rank."""
        return -(-len(self.dataset) // (self.batch_size * self.world))

    def __iter__(self) -> Iterator[Any]:
        """The rest of the current epoch; if nothing is left of it, the next one."""
        if self.position >= len(self.dataset):
            self.epoch, self.position = self.epoch + 1, 0
        for batch in loader(self.dataset, self._batches(), self.collate, self.num_workers):
            self.position += self.batch_size * self.world
            yield batch

    def _batches(self) -> Iterator[list[int]]:
        """This rank's row numbers of each batch that is left of the epoch."""
        count, step = len(self.dataset), self.batch_size * self.world
        order = (
            range(count)
            if self.seed is None
            else np.random.default_rng([self.seed, self.epoch]).permutation(count).tolist()
        )
        for start in range(self.position, count, step):
            yield [
                order[place % count] for place in range(start + self.rank, start + step, self.world)
            ]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


def validation_loader(
    dataset: Rows,
    batch_size: int,
    collate: Callable[[list[Any]], Any],
    rank: int = 0,
    world: int = 1,
) -> DataLoader[Any]:
    """Each row once, in the rows' own order, from the first one on whenever it is iterated.

    All ranks get equally many batches, so that none waits for another for ever. The last ones may be shorter, or empty: `collate` then
    gets no rows and has to make something that does not count.
    """
    count, step = len(dataset), batch_size * world
    batches = [
        range(start + rank, min(start + step, count), world) for start in range(0, count, step)
    ]
    return loader(dataset, batches, collate)


def loader(
    dataset: Rows,
    batches: Iterable[Sequence[int]],
    collate: Callable[[list[Any]], Any],
    num_workers: int = 0,
) -> DataLoader[Any]:
    return DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=batches,  # type: ignore[arg-type]
        collate_fn=collate,
        num_workers=num_workers,
        worker_init_fn=start_worker,
        generator=torch.Generator().manual_seed(
            0
        ),  # or each epoch would draw a number from the global one
    )


def start_worker(worker: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = (
        "false"  # or tokenizers, forked, warns and switches it off itself
    )
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches all processes: the main one saves, and needs the rows of this step
