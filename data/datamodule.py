"""The LightningDataModule of every data.kind."""

from typing import Any

import lightning
from lightning.pytorch.strategies import ParallelStrategy
from transformers import PreTrainedTokenizerBase

from data.batches import ALL, Batches, Place, Shard, say


class DataModule(lightning.LightningDataModule):
    """Gives a trainer the batches of its ranks; before a trainer sets it up, of all ranks.

    The ranks of one pipeline share a training shard. In validation each rank has its own.
    """

    shard = validation_shard = ALL
    place: Place | None = None  # of the training loader, in a training that resumes

    def __init__(self, source: Batches, max_epochs: int | None = None):
        super().__init__()
        self.source, self.max_epochs = source, max_epochs

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

    def resume(self, place: Place) -> None:
        """Takes the place that the training loader of a checkpoint had."""
        self.place = place
        before = place.get("rows")
        now = self.source.train_loader(self.shard).state_dict().get("rows")
        if None not in (before, now) and before != now:
            say(
                f"a step reads {now} rows from here on, {before} before: data.batch_size rows on "
                f"each of {self.shard.world} data-parallel device(s)"
            )

    def train_dataloader(self) -> Any:
        loader = self.source.train_loader(self.shard)
        if self.place is not None:
            loader.load_state_dict(self.place)
        return loader

    def val_dataloader(self) -> Any:
        return self.source.validation_loader(self.validation_shard)

    def batches(self) -> int:
        """Batches of the whole training on each rank, those before the place included."""
        assert self.trainer is not None
        count = self.source.count(self.shard, self.place)
        limit: int | float = self.trainer.limit_train_batches or 0
        if self.max_epochs is None:
            return count
        if isinstance(limit, float):
            return int(count * limit)
        return min(count, self.max_epochs * limit)

    def teardown(self, stage: str) -> None:
        if stage == "fit":
            self.source.finish()
