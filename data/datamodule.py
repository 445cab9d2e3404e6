"""The LightningDataModule of every data.kind."""

from typing import Any

import lightning
from lightning.pytorch.strategies import ParallelStrategy
from transformers import PreTrainedTokenizerBase

from data.batches import ALL, Batches, Shard


class DataModule(lightning.LightningDataModule):
    """Gives a trainer the batches of its ranks; before a trainer sets it up, of all ranks.

    The ranks of one pipeline share a training shard. In validation each rank has its own.
    """

    shard = validation_shard = ALL

    def __init__(self, source: Batches):
        super().__init__()
        self.source = source

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.source.tokenizer

    def setup(self, stage: str) -> None:
        assert self.trainer is not None
        strategy = self.trainer.strategy
        if isinstance(strategy, ParallelStrategy):
            layout = strategy.distributed_sampler_kwargs
            self.shard = Shard(layout["rank"], layout["num_replicas"])
        self.validation_shard = Shard(self.trainer.global_rank, self.trainer.world_size)

    def train_dataloader(self) -> Any:
        return self.source.train_loader(self.shard)

    def val_dataloader(self) -> Any:
        return self.source.validation_loader(self.validation_shard)

    def batches(self) -> int:
        """Batches of the whole training on each rank."""
        return self.source.count(self.shard)

    def teardown(self, stage: str) -> None:
        if stage == "fit":
            self.source.finish()
