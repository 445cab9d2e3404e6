"""val/accuracy and the figure val/by_age: right answers about users' behaviour, by age of the evidence."""

from __future__ import annotations

from typing import Any

import lightning

from callbacks.predictions import Predictions
from comet_pl.metrics.behavior import BehaviorAccuracy, curves
from comet_pl.training.lit_module import CometModule
from data.batches import IGNORED


class BehaviorScores(lightning.Callback):
    """From the logits of validation_step, teacher-forced: an answer is right if each of its tokens is the likeliest after those before.

    Args:
        predictions: is told of each answer.
    """

    def __init__(self, predictions: Predictions | None = None):
        self.metric, self.predictions = BehaviorAccuracy(), predictions

    def on_validation_epoch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        self.metric = BehaviorAccuracy().to(pl_module.device)

    def on_validation_batch_end(  # type: ignore[override]
        self,
        trainer: lightning.Trainer,
        pl_module: CometModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        count = batch["logits_to_keep"] - 1
        targets = batch["labels"][:, -count:] if count else batch["labels"][:, :0]
        text = outputs["logits"][
            :, -count - 1 : -1, : pl_module.model.config.first_new_id
        ]  # generation suppresses the new tokens
        right = (
            ((text.argmax(-1) == targets) | (targets == IGNORED))
            .all(1)
            .tolist()[: len(batch["kinds"])]
        )
        self.metric.update(
            [str(one) for one in right], ["True"] * len(right), batch["kinds"], batch["ages"]
        )
        if self.predictions:
            facts = [
                {"kind": kind, "age": age}
                for kind, age in zip(batch["kinds"], batch["ages"], strict=True)
            ]
            self.predictions.add_likeliest(
                trainer,
                batch,
                outputs["logits"][..., : pl_module.model.config.first_new_id],
                right,
                facts,
            )

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: CometModule) -> None:  # type: ignore[override]
        values = self.metric.compute()
        if not values["n"]:
            return
        pl_module.log("val/accuracy", values["accuracy"], prog_bar=True, logger=False)
        pl_module.record({"val/accuracy": values["accuracy"]})
        if trainer.is_global_zero and pl_module.logger is not None and values["ages"]:
            writer = pl_module.logger.experiment  # type: ignore[attr-defined]
            writer.add_figure(
                "val/by_age", curves({"CoMeT": values}), global_step=trainer.global_step
            )
