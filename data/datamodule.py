"""The data module that all kinds of data share: it takes its ranks from its trainer."""

from __future__ import annotations

import lightning
from lightning.pytorch.strategies import ParallelStrategy


class ShardedDataModule(lightning.LightningDataModule):
    """Knows which rows are this process's as soon as a trainer sets it up; before, all of them."""

    rank, world = 0, 1  # this data-parallel rank, of how many; the ranks of a pipeline share theirs
    val_rank, val_world = 0, 1  # in validation every rank reads rows of its own

    def setup(self, stage: str) -> None:
        assert self.trainer is not None
        strategy = self.trainer.strategy
        if isinstance(strategy, ParallelStrategy):
            layout = strategy.distributed_sampler_kwargs
            self.rank, self.world = layout["rank"], layout["num_replicas"]
        self.val_rank, self.val_world = self.trainer.global_rank, self.trainer.world_size
