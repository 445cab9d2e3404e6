"""The data module of all corpora of texts: sources of samples in, packed and chunk-planned batches out."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from comet_pl.config.schema import TextData
from comet_pl.errors import UserError
from data.batches import Rows, pad_rows, say, validation_loader
from data.datamodule import ShardedDataModule
from data.text.chunk_plans import sentence_ends
from data.text.loader import Cached, Feed, Layout, Streamed, Windows
from data.text.packing import padding_share
from data.text.tokenized import Source, cached
from data.tokenizer import pad_token


class TextDataModule(ShardedDataModule):
    """Training batches of data.batch_size * accumulate rows; the whole training is one pass of the loader. A subclass gives the sources.

    Args:
        chunk_size, stride: of the model (stride None: no temporary memory). max_steps, max_epochs: how long the training is; None: only the
            other decides.

    Raises:
        UserError: nothing to train on; a file cannot be read; a malformed row, with on_error=raise; keys that exclude each other.
    """

    def __init__(
        self,
        data: TextData,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        chunk_size: int,
        stride: int | None,
        max_steps: int,
        max_epochs: int | None = None,
        accumulate: int = 1,
    ):
        super().__init__()
        self.data, self.tokenizer, self.seed, self.rows = (
            data,
            tokenizer,
            seed,
            data.batch_size * accumulate,
        )
        self.max_steps, self.max_epochs = max_steps, max_epochs
        self.pad = pad_token(tokenizer)
        ends = sentence_ends(tokenizer) if data.chunk_plan in ("sentence", "mixture") else None
        self.layout = Layout(
            data.max_length,
            chunk_size,
            stride,
            data.packing,
            data.chunk_plan,
            data.dynamic_stride,
            ends,
            self.weights(),
        )
        if data.dynamic_stride and stride is None:
            raise UserError(
                "data.dynamic_stride: true given, but model.compression_stride=null: there is no stride to draw"
            )
        self.windows = self._windows(self.source("train"))

    def weights(self) -> dict[str, float] | None:
        """How often an epoch has the samples of each group; None: once."""
        return None

    def source(self, split: str) -> Source:
        """The rows of a split."""
        raise NotImplementedError

    def validation_rows(self) -> Rows:
        """(ids, labels) pairs, each (n,), by number."""
        raise NotImplementedError

    def _windows(self, source: Source) -> Windows:
        data = self.data
        if data.streaming:
            if self.max_epochs is not None:
                raise UserError(
                    "trainer.max_epochs: given with data.streaming=true, which does not know how long an epoch is; max_steps does"
                )
            streamed, number = Streamed(source, data.shuffle_window, data.num_workers), 0
            while (first := streamed.window(0, number)) == []:  # none of its rows can be used
                number += 1
            self._refuse_nothing(bool(first), streamed.complaints.summary())
            return streamed
        samples = cached(source, Path(data.cache).expanduser(), "train", data.num_workers)
        self._refuse_nothing(len(samples) > 0)
        if data.packing != "none":
            rows = self.layout.rows(samples, np.random.default_rng((self.seed, 0, 0)))
            padding = padding_share(rows, samples.lengths, data.max_length)
            say(
                f"train: {len(samples)} texts packed into {len(rows)} rows of {data.max_length} tokens, {padding:.1%} of them padding"
            )
        return Cached(samples)

    def _refuse_nothing(self, some: bool, skipped: str | None = None) -> None:
        if not some:
            why = f"; {skipped}" if skipped else ""
            raise UserError(
                f"data.root: {getattr(self.data, 'root', None)} has no training rows{self.asked()}{why}"
            )

    def teardown(self, stage: str) -> None:
        """Says at the end what was skipped; where all rows are read before, that has been said before."""
        if (
            stage == "fit"
            and isinstance(self.windows, Streamed)
            and (line := self.windows.complaints.summary())
        ):
            say(f"train: {line} (of the rows that were read)")

    def asked(self) -> str:
        """' for ...', what of data.root was asked for."""
        return ""

    def train_dataloader(self) -> Feed:
        shard: dict[str, Any] = {"rank": self.rank, "world": self.world}
        return Feed(
            self.windows,
            self.layout,
            self.pad,
            self.batches(),
            self.rows,
            self.seed,
            num_workers=self.data.num_workers,
            **shard,
        )

    def batches(self) -> int:
        """Of the whole training, on each rank: its steps."""
        if self.max_epochs is None:
            return self.max_steps
        assert isinstance(self.windows, Cached)
        samples, step = self.windows.samples, self.rows * self.world
        rows = [
            len(self.layout.rows(samples, np.random.default_rng((self.seed, epoch, 0))))
            for epoch in range(self.max_epochs)
        ]
        return min(self.max_steps, sum(-(-count // step) for count in rows))

    def val_dataloader(self) -> DataLoader[Any]:
        collate = partial(pad_rows, pad_token=self.pad)
        return validation_loader(
            self.validation_rows(), self.data.batch_size, collate, self.val_rank, self.val_world
        )
