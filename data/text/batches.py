"""The batches of all corpora of texts: sources of samples in, packed and chunk-planned rows out."""

from abc import abstractmethod
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from comet_pl.config.schema import TextData
from comet_pl.errors import UserError
from data.batches import ALL, Batches, Place, Rows, Shard, pad_rows, say, validation_loader
from data.text.chunk_plans import sentence_ends
from data.text.loader import Cached, Feed, Layout, Streamed, Windows
from data.text.packing import padding_share
from data.text.tokenized import Source, cached
from data.tokenizer import pad_token


class TextBatches(Batches):
    """Training batches of data.batch_size * accumulate rows; a subclass gives the sources.

    Args:
        chunk_size, stride: of the model (stride None: no temporary memory).
        max_steps, max_epochs: the training ends with the first of them; max_epochs may be None.

    Raises:
        UserError: nothing to train on; a file cannot be read; a malformed row, with
            on_error=raise; keys that exclude each other.
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
        self.data, self.tokenizer, self.seed = data, tokenizer, seed
        self.rows = data.batch_size * accumulate
        self.max_steps, self.max_epochs = max_steps, max_epochs
        self.pad = pad_token(tokenizer)
        ends = sentence_ends(tokenizer) if data.chunk_plan in ("sentence", "mixture") else None
        choices = data.packing, data.chunk_plan, data.dynamic_stride, ends, self.weights()
        self.layout = Layout(data.max_length, chunk_size, stride, *choices)
        if data.dynamic_stride and stride is None:
            raise UserError(
                "data.dynamic_stride: true given, but model.compression_stride=null: "
                "there is no stride to draw"
            )
        self.windows = self._windows(self.source("train"))

    def weights(self) -> dict[str, float] | None:
        """How often an epoch has the samples of each group; None: once."""
        return None

    @abstractmethod
    def source(self, split: str) -> Source:
        """The rows of a split."""

    @abstractmethod
    def validation_rows(self) -> Rows:
        """Pairs (ids, labels), by number."""

    def asked(self) -> str:
        """' for ...', the part of data.root that is read."""
        return ""

    def _windows(self, source: Source) -> Windows:
        data = self.data
        if data.streaming:
            if self.max_epochs is not None:
                raise UserError(
                    "trainer.max_epochs: given with data.streaming=true, which does not know how "
                    "long an epoch is; max_steps does"
                )
            streamed, number = Streamed(source, data.shuffle_window, data.num_workers), 0
            while (first := streamed.window(0, number)) == []:  # none of its rows can be used
                number += 1
            self._refuse_nothing(bool(first), streamed.complaints.summary())
            for line in streamed.complaints.remark_lines():
                say(f"train: {line} (of the first {len(first or [])}; the others at the end)")
            return streamed
        samples = cached(source, Path(data.cache).expanduser(), "train", data.num_workers)
        self._refuse_nothing(len(samples) > 0)
        if data.packing != "none":
            rows = self._epoch(samples, 0)
            padding = padding_share(rows, samples.lengths, data.max_length)
            say(
                f"train: {len(samples)} texts packed into {len(rows)} rows of {data.max_length} "
                f"tokens, {padding:.1%} of them padding"
            )
        return Cached(samples)

    def _epoch(self, samples: Any, epoch: int) -> list[list[int]]:
        return self.layout.rows(samples, np.random.default_rng((self.seed, epoch, 0)))

    def _refuse_nothing(self, some: bool, skipped: str | None = None) -> None:
        if not some:
            root, why = getattr(self.data, "root", None), f"; {skipped}" if skipped else ""
            raise UserError(f"data.root: {root} has no training rows{self.asked()}{why}")

    def finish(self) -> None:
        """Says which rows were skipped, if they were streamed; a cache says it before."""
        if isinstance(self.windows, Streamed):
            for line in self.windows.complaints.lines():
                say(f"train: {line} (of the rows that were read)")

    def train_loader(self, shard: Shard = ALL) -> Feed:
        sizes = self.max_steps, self.rows, self.seed, self.data.num_workers
        return Feed(self.windows, self.layout, self.pad, *sizes, shard, self.max_epochs)

    def count(self, shard: Shard = ALL, place: Place | None = None) -> int:
        feed = self.train_loader(shard)
        if place is not None:
            feed.load_state_dict(place)
        return len(feed)

    def validation_loader(self, shard: Shard = ALL) -> DataLoader[Any]:
        collate = partial(pad_rows, pad_token=self.pad)
        return validation_loader(self.validation_rows(), self.data.batch_size, collate, shard)
