"""What every data.kind shares: padded batches, loaders that resume exactly, and shards."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from data.workers import received, start_worker

IGNORED = -100
"""The label of a token without loss."""
Pair = tuple[np.ndarray, np.ndarray]
"""(ids, labels) of a row, each (n,) int64; labels unshifted."""


Place = Mapping[str, int]
"""What a loader saves of its place in the data, the same on all ranks."""


class Shard(NamedTuple):
    """The rows of one rank: every world-th one, from row `rank` on."""

    rank: int = 0
    world: int = 1


ALL = Shard()


class Batches(ABC):
    """The batches of a data.kind; data/datamodule.py hands them to Lightning."""

    tokenizer: PreTrainedTokenizerBase
    max_steps: int

    @staticmethod
    def files(data: Any) -> dict[str, list[Path]]:
        """The files that a data section names, in the order in which they are read, by role.

        A role begins with `train` if the training's numbers depend on its files, and otherwise with
        `validation`.

        Raises:
            UserError: there are none.
        """
        return {}

    @abstractmethod
    def train_loader(self, shard: Shard = ALL) -> Any:
        """Batches of the whole training, with state_dict and load_state_dict."""

    @abstractmethod
    def validation_loader(self, shard: Shard = ALL) -> DataLoader[Any]:
        """The same batches whenever it is iterated."""

    def count(self, shard: Shard = ALL, place: Place | None = None) -> int:
        """Batches of the whole training on each rank, at most max_steps.

        Args:
            place: of the loader, in a training that resumes; its batches so far may have been
                those of another number of ranks.
        """
        return self.max_steps

    def finish(self) -> None:  # noqa: B027  most kinds have nothing to say
        """Says what is known only after the training."""


def length_at(data: Any, step: int) -> int:
    """Tokens of a training example at a step, by data.length_schedule and data.train_length."""
    schedule = data.length_schedule or [[0, data.train_length]]
    return [length for start, length in schedule if start <= step][-1]


def say(line: str) -> None:
    """Prints a line about the data, on the first rank only, as far as Lightning is loaded."""
    if not getattr(rank_zero_only, "rank", 0):
        print(line, flush=True)


def pad_rows(rows: Sequence[Pair], pad_token: int, left: bool = False) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels, each (B, longest) int64, padded on the right (or left).

    No rows make the batch of `nothing`.
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
    """One token without a label, (1, 1): a batch for the model that does not count."""
    token = torch.zeros(1, 1, dtype=torch.int64)
    mask, labels = torch.ones_like(token), torch.full_like(token, IGNORED)
    return {"input_ids": token, "attention_mask": mask, "labels": labels}


class Rows(Protocol):
    """A dataset with an index over its rows."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class ResumableLoader:
    """Full training batches in an order that is a pure function of (seed, epoch).

    Stopped anywhere and resumed, it yields the batches that an uninterrupted loader yields. The
    first rows of an epoch fill its last batch. Lightning saves and restores the state, which is the
    same on all ranks: the epoch, and the number of its rows that all ranks have received. Rows that
    worker processes have prefetched do not count, and the number of ranks may change on resuming.
    An epoch ends when the first batch of the next one is asked for, so a dataset that has grown
    continues the epoch. Iterating draws no number from torch's global random state.

    Args:
        dataset: rows by index.
        batch_size: rows of a batch on each rank.
        collate: list of rows -> batch.
        seed: of the order; None: the rows' own order, in every epoch.
        shard: each batch's rows are dealt to the ranks in turn.
    """

    def __init__(
        self,
        dataset: Rows,
        batch_size: int,
        collate: Callable[[list[Any]], Any],
        seed: int | None = None,
        num_workers: int = 0,
        shard: Shard = ALL,
    ):
        self.dataset, self.batch_size, self.collate, self.seed = dataset, batch_size, collate, seed
        self.num_workers, self.shard = num_workers, shard
        self.epoch = self.position = 0

    @property
    def step(self) -> int:
        """Rows of a batch on all ranks together."""
        return self.batch_size * self.shard.world

    def __len__(self) -> int:
        """Batches of a whole epoch on each rank."""
        return -(-len(self.dataset) // self.step)

    def __iter__(self) -> Iterator[Any]:
        """The rest of the current epoch; the next epoch if nothing is left."""
        if self.position >= len(self.dataset):
            self.epoch, self.position = self.epoch + 1, 0
        batches = loader(self.dataset, self._numbers(), self.collate, self.num_workers)
        for batch in received(batches):
            self.position += self.step
            yield batch

    def _numbers(self) -> Iterator[list[int]]:
        """This rank's row numbers of each batch that is left of the epoch."""
        count, (rank, world) = len(self.dataset), self.shard
        order: Sequence[int] = range(count)
        if self.seed is not None:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(count).tolist()
        for start in range(self.position, count, self.step):
            places = range(start + rank, start + self.step, world)
            yield [order[place % count] for place in places]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: Place) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


class SteppedRows:
    """Rows that are made by number, as many as the training needs; a subclass makes them.

    Attributes:
        start: (row, step) from which on a step has rows_a_step rows. Before it, other numbers of
            ranks may have read.
    """

    def __init__(self, rows_a_step: int, max_steps: int):
        self.rows_a_step, self.max_steps = rows_a_step, max_steps
        self.start = 0, 0

    def __len__(self) -> int:
        row, step = self.start
        return row + (self.max_steps - step) * self.rows_a_step

    def step_of(self, index: int) -> int:
        """The optimizer step that reads a row from `start` on."""
        row, step = self.start
        return step + (index - row) // self.rows_a_step

    def __getitem__(self, index: int) -> Any:
        raise NotImplementedError


class SteppedLoader(ResumableLoader):
    """The batches of a whole training on SteppedRows, one an optimizer step.

    Its place counts steps as well as rows: a resumed training on another number of ranks reads the
    next row in the next step.
    """

    dataset: SteppedRows

    def __init__(self, dataset: SteppedRows, *arguments: Any, **options: Any):
        super().__init__(dataset, *arguments, **options)
        self.given = 0

    def __len__(self) -> int:
        return self.dataset.max_steps

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            self.given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {**super().state_dict(), "given": self.given, "rows": self.step}

    def load_state_dict(self, state: Place) -> None:
        super().load_state_dict(state)
        # checkpoints of before this key were resumed on as many ranks
        self.given = state.get("given", self.position // self.step)
        self.dataset.start = self.position, self.given


def validation_loader(
    dataset: Rows,
    batch_size: int,
    collate: Callable[[list[Any]], Any],
    shard: Shard = ALL,
) -> DataLoader[Any]:
    """Each row once, in the rows' own order, whenever it is iterated.

    All ranks get the same number of batches, so no rank waits for another's collective. The last
    batches may be short or empty: `collate` gets no rows and makes a batch that does not count.
    """
    count, step = len(dataset), batch_size * shard.world
    starts = range(0, count, step)
    batches = [range(start + shard.rank, min(start + step, count), shard.world) for start in starts]
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
        # without a generator each epoch draws a number from the global one
        generator=torch.Generator().manual_seed(0),
    )
