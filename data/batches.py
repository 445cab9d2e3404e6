"""What every kind of data shares: right-padded batches, and a loader that resumes exactly."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader

IGNORED = -100  # label of a token without loss


def length_at(data: Any, step: int) -> int:
    """Tokens of a training example at an optimizer step, by data.length_schedule and data.train_length."""
    return [
        length
        for start, length in data.length_schedule or [[0, data.train_length]]
        if start <= step
    ][-1]


def say(line: str) -> None:
    """Prints a line about the data, on the first rank only; Lightning knows the ranks, if loaded."""
    if not getattr(rank_zero_only, "rank", 0):
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
