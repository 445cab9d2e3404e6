"""val/accuracy and the figure val/heatmap: how often a validation's passkeys are found, by depth and length."""

from __future__ import annotations

from typing import Any

import lightning
from torch import Tensor

from callbacks.predictions import Predictions
from comet_pl.metrics.passkey import PasskeyAccuracy, heatmap
from comet_pl.training.lit_module import CometModule
from data.batches import IGNORED
from data.passkey import DIGITS


class PasskeyHeatmap(lightning.Callback):
    """From the logits of validation_step, teacher-forced: with all digits before it right, a digit is right if it is also when generated.

    Args:
        train_length: tokens of a training example, for the figure's title. predictions: is told of each example.
    """

    def __init__(self, train_length: int, predictions: Predictions | None = None):
        self.train_length, self.predictions = train_length, predictions
        self.metric = PasskeyAccuracy()

    def on_validation_epoch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        self.metric = PasskeyAccuracy().to(pl_module.device)

    def on_validation_batch_end(  # type: ignore[override]
        self,
        trainer: lightning.Trainer,
        pl_module: CometModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if "length" in batch:
            text = outputs["logits"][
                ..., : pl_module.model.config.first_new_id
            ]  # generation suppresses the new tokens
            correct = exact_match(text, batch["labels"])[
                : len(batch["depth"])
            ]  # a rank that has no more to read has a row without a depth
            self.metric.update(batch["length"], batch["depth"], correct)
            if self.predictions:
                facts = [{"length": batch["length"], "depth": depth} for depth in batch["depth"]]
                self.predictions.add_likeliest(trainer, batch, text, correct.tolist(), facts)

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: CometModule) -> None:  # type: ignore[override]
        if not self.metric.update_called:
            return
        cells = self.metric.compute()
        accuracy = sum(cell["accuracy"] * cell["n"] for cell in cells) / sum(
            cell["n"] for cell in cells
        )
        pl_module.log("val/accuracy", accuracy, prog_bar=True, logger=False)
        pl_module.record({"val/accuracy": accuracy})
        if trainer.is_global_zero and pl_module.logger is not None:
            writer = pl_module.logger.experiment  # type: ignore[attr-defined]
            writer.add_figure(
                "val/heatmap", heatmap(cells, self.train_length), global_step=trainer.global_step
            )


def exact_match(logits: Tensor, labels: Tensor, digits: int = DIGITS) -> Tensor:
    """(B,) bool: are the first `digits` labelled tokens of each row the likeliest ones?

    Args:
        logits: (B, n, V) of the last n columns. labels: (B, N) unshifted; every labelled token is among the last n - 1.
    """
    targets = labels[:, labels.shape[1] - logits.shape[1] + 1 :]
    labelled = targets != IGNORED
    asked = labelled & (labelled.cumsum(1) <= digits)
    right = logits[:, :-1].argmax(-1) == targets
    return (right | ~asked).all(1) & (asked.sum(1) == digits)
