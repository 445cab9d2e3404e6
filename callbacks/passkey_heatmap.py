"""val/accuracy and the figure val/heatmap: how often passkeys are found, by depth and length."""

from typing import Any

import lightning
from torch import Tensor

from callbacks.figures import show_figure
from callbacks.predictions import Predictions
from comet_pl.metrics.passkey import PasskeyAccuracy, heatmap, mean
from data.batches import IGNORED
from data.passkey import DIGITS


class PasskeyHeatmap(lightning.Callback):
    """Scores the teacher-forced logits of validation_step.

    A digit that is right after the right digits is also right when generated.

    Args:
        train_length: tokens of a training example, for the figure's title.
        predictions: gets each example.
    """

    def __init__(self, train_length: int, predictions: Predictions | None = None):
        self.train_length, self.predictions = train_length, predictions
        self.metric = PasskeyAccuracy()

    def on_validation_epoch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        self.metric = PasskeyAccuracy().to(pl_module.device)

    def on_validation_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any
    ) -> None:
        if "length" in batch:
            # generation suppresses the new tokens
            logits = outputs["logits"][..., : pl_module.model.config.first_new_id]
            # a rank that has nothing left to read has a row without a depth
            correct = exact_match(logits, batch["labels"])[: len(batch["depth"])]
            self.metric.update(batch["length"], batch["depth"], correct)
            if self.predictions:
                facts = [{"length": batch["length"], "depth": depth} for depth in batch["depth"]]
                self.predictions.add_likeliest(trainer, batch, logits, correct.tolist(), facts)

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if not self.metric.update_called:
            return
        cells = self.metric.compute()
        accuracy = mean(cells)
        pl_module.log("val/accuracy", accuracy, prog_bar=True, logger=False)
        pl_module.record({"val/accuracy": accuracy})
        if trainer.is_global_zero:
            show_figure(pl_module, "val/heatmap", heatmap(cells, self.train_length))


def exact_match(logits: Tensor, labels: Tensor, digits: int = DIGITS) -> Tensor:
    """(B,) bool: are the first `digits` labelled tokens of each row the likeliest ones?

    Args:
        logits: (B, n, V) of the last n columns.
        labels: (B, N) unshifted; every labelled token is among the last n - 1.
    """
    targets = labels[:, labels.shape[1] - logits.shape[1] + 1 :]
    labelled = targets != IGNORED
    asked = labelled & (labelled.cumsum(1) <= digits)
    right = logits[:, :-1].argmax(-1) == targets
    return (right | ~asked).all(1) & (asked.sum(1) == digits)
