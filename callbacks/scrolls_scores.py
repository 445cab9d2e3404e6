"""val/<task>: SCROLLS' official score of a few questions, answered at each validation."""

from __future__ import annotations

from typing import Any

import lightning

from callbacks.predictions import Predictions
from comet_pl.config.schema import EvalConfig
from comet_pl.evaluation.generation import Engine
from comet_pl.metrics.scrolls import ScrollsScore, scores
from comet_pl.training.lit_module import CometModule
from data.scrolls import MAX_NEW_TOKENS, ScrollsDataModule, tasks


class ScrollsScores(lightning.Callback):
    """Greedy answers to the first questions that are validated on, with all their references; dealt to the ranks.

    Args:
        settings: val_questions a task, max_new_tokens, batch_size. predictions: is told of each answer.
    """

    def __init__(self, settings: EvalConfig, predictions: Predictions | None = None):
        self.settings, self.predictions = settings, predictions

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: CometModule) -> None:  # type: ignore[override]
        module: Any = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(module, ScrollsDataModule)
        for task in tasks(module.data):
            questions = module.validation.questions(task, self.settings.val_questions)
            if not questions:
                continue
            mine = questions[trainer.global_rank :: trainer.world_size]
            longest = self.settings.max_new_tokens or MAX_NEW_TOKENS[task]
            metric = ScrollsScore(task).to(pl_module.device)
            prompts = [module.validation.prompt(one) for one in mine]
            engine = Engine(pl_module.model, module.tokenizer)
            texts = engine.answers(prompts, self.settings, longest)
            metric.update(texts, [one.references for one in mine])
            if self.predictions:
                for one, prompt, text in zip(mine, prompts, texts, strict=True):
                    score = scores(task, text, one.references)["scrolls_score"]
                    self.predictions.add(
                        trainer, one.id, prompt, text, one.references, score, {"task": task}
                    )
            score = metric.compute()["scrolls_score"]
            pl_module.log(f"val/{task}", score, logger=False)
            pl_module.record({f"val/{task}": score})
