"""val/loss_by_chunk/<chunks>, its figure, and monitor/length_report.{json,png}.

They show the loss by position in the document, at each validation.
"""

from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor

from callbacks.figures import show_figure
from comet_pl.files import as_json, try_file
from comet_pl.metrics.loss_by_position import LossByPosition, chunk_of_columns, curve, name
from comet_pl.model.observer import Observer


class LengthReport(lightning.Callback):
    """Sorts the losses of validation_step by the position of their tokens.

    Args:
        folder: where the files go.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.metric = LossByPosition()
        # places and losses of the last batch
        self.losses = torch.zeros(0), torch.zeros(0)

    def _keep(self, places: Tensor, losses: Tensor) -> None:
        self.losses = places, losses

    def on_validation_epoch_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self.metric = LossByPosition().to(pl_module.device)
        pl_module.model.observer = Observer(losses=self._keep)

    def on_validation_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any
    ) -> None:
        size = pl_module.model.config.chunk_size
        chunks = chunk_of_columns(batch["attention_mask"], size, batch.get("plans"))
        self.metric.update(*self.losses, chunks)

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        pl_module.model.observer = None
        buckets = self.metric.compute()
        if not buckets or not trainer.is_global_zero:
            return
        losses = {name(bucket): bucket["loss"] for bucket in buckets}
        known = {label: loss for label, loss in losses.items() if loss is not None}
        pl_module.record({f"val/loss_by_chunk/{label}": loss for label, loss in known.items()})
        report = as_json({"step": trainer.global_step, "buckets": buckets}, indent=2)
        try_file(self.folder / "length_report.json", report)
        file = self.folder / "length_report.png"
        show_figure(pl_module, "val/loss_by_chunk", curve(buckets), file)
