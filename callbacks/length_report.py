"""val/loss_by_chunk/<chunks>, its figure, and monitor/length_report.{json,png}: loss by position in the document, at each validation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor

from comet_pl.files import as_json, as_png, replace_file
from comet_pl.metrics.loss_by_position import LossByPosition, chunk_of_columns, curve, name
from comet_pl.model.observer import Observer
from comet_pl.training.lit_module import CometModule


class LengthReport(lightning.Callback):
    """From the losses that validation_step computes anyway.

    Args:
        folder: where the files go.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.metric = LossByPosition()
        self.losses = torch.zeros(0), torch.zeros(0)  # places and losses of the last batch

    def _keep(self, places: Tensor, losses: Tensor) -> None:
        self.losses = places, losses

    def on_validation_epoch_start(self, trainer: lightning.Trainer, pl_module: CometModule) -> None:  # type: ignore[override]
        self.metric = LossByPosition().to(pl_module.device)
        pl_module.model.observer = Observer(losses=self._keep)

    def on_validation_batch_end(  # type: ignore[override]
        self,
        trainer: lightning.Trainer,
        pl_module: CometModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        size = pl_module.model.config.chunk_size
        chunks = chunk_of_columns(
            batch["attention_mask"], size, batch.get("chunk_sizes"), batch.get("resets")
        )
        self.metric.update(*self.losses, chunks)

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: CometModule) -> None:  # type: ignore[override]
        pl_module.model.observer = None
        buckets = self.metric.compute()
        if not buckets or not trainer.is_global_zero:
            return
        pl_module.record(
            {
                f"val/loss_by_chunk/{name(one)}": one["loss"]
                for one in buckets
                if one["loss"] is not None
            }
        )
        figure, step = curve(buckets), trainer.global_step
        replace_file(
            self.folder / "length_report.json",
            as_json({"step": step, "buckets": buckets}, indent=2),
            "run.root",
        )
        replace_file(self.folder / "length_report.png", as_png(figure), "run.root")
        if pl_module.logger is not None:
            pl_module.logger.experiment.add_figure("val/loss_by_chunk", figure, global_step=step)  # type: ignore[attr-defined]
