"""val/accuracy and the figure val/by_age: right answers about behaviour, by age of the evidence."""

from typing import Any

import lightning

from callbacks.figures import show_figure
from callbacks.predictions import Predictions
from comet_pl.metrics.behavior import BehaviorAccuracy, curves
from data.batches import IGNORED


class BehaviorScores(lightning.Callback):
    """Scores the teacher-forced logits of validation_step.

    An answer is right if each of its tokens is the likeliest one after those before it.

    Args:
        predictions: gets each answer.
    """

    def __init__(self, predictions: Predictions | None = None):
        self.metric, self.predictions = BehaviorAccuracy(), predictions

    def on_validation_epoch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        self.metric = BehaviorAccuracy().to(pl_module.device)

    def on_validation_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any
    ) -> None:
        count = batch["logits_to_keep"] - 1
        targets = batch["labels"][:, -count:] if count else batch["labels"][:, :0]
        # generation suppresses the new tokens
        logits = outputs["logits"][..., : pl_module.model.config.first_new_id]
        likeliest = logits[:, -count - 1 : -1].argmax(-1)
        right = ((likeliest == targets) | (targets == IGNORED)).all(1)
        kinds, ages = batch["kinds"], batch["ages"]
        correct = right.tolist()[: len(kinds)]
        self.metric.update(list(map(str, correct)), ["True"] * len(correct), kinds, ages)
        if self.predictions:
            pairs = zip(kinds, ages, strict=True)
            facts = [{"kind": kind, "age": age} for kind, age in pairs]
            self.predictions.add_likeliest(trainer, batch, logits, correct, facts)

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        values = self.metric.compute()
        if not values["n"]:
            return
        pl_module.log("val/accuracy", values["accuracy"], prog_bar=True, logger=False)
        pl_module.record({"val/accuracy": values["accuracy"]})
        if trainer.is_global_zero and values["ages"]:
            show_figure(pl_module, "val/by_age", curves({"CoMeT": values}))
