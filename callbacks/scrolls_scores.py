"""val/<task>: SCROLLS' official score of a few questions, answered at each validation."""

from typing import Any

import lightning

from callbacks.predictions import Predictions
from comet_pl.config.schema import EvalConfig
from comet_pl.evaluation.generation import Engine
from comet_pl.metrics.scrolls import ScrollsScore, scores
from data.scrolls import ScrollsBatches
from data.scrolls_rows import MAX_NEW_TOKENS, tasks


class ScrollsScores(lightning.Callback):
    """Scores greedy answers to the first validation questions, which are dealt to the ranks.

    Args:
        settings: val_questions a task, max_new_tokens, batch_size.
        predictions: gets each answer.
    """

    def __init__(self, settings: EvalConfig, predictions: Predictions | None = None):
        self.settings, self.predictions = settings, predictions

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        source = trainer.datamodule.source  # type: ignore[attr-defined]
        assert isinstance(source, ScrollsBatches)
        for task in tasks(source.data):
            questions = source.validation.questions(task, self.settings.val_questions)
            if not questions:
                continue
            mine = questions[trainer.global_rank :: trainer.world_size]
            longest = self.settings.max_new_tokens or MAX_NEW_TOKENS[task]
            metric = ScrollsScore(task).to(pl_module.device)
            prompts = [source.validation.prompt(question) for question in mine]
            engine = Engine(pl_module.model, source.tokenizer)
            with trainer.precision_plugin.forward_context():
                texts = engine.answers(prompts, self.settings, longest)
            metric.update(texts, [question.references for question in mine])
            if self.predictions:
                for question, prompt, text in zip(mine, prompts, texts, strict=True):
                    references = question.references
                    score = scores(task, text, references)["scrolls_score"]
                    answer = (question.id, prompt, text, references, score, {"task": task})
                    self.predictions.add(trainer, *answer)
            score = metric.compute()["scrolls_score"]
            pl_module.log(f"val/{task}", score, logger=False)
            pl_module.record({f"val/{task}": score})
