"""val/predictions and monitor/predictions-<step>.jsonl: what a validation's examples were answered with."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np
from torch import Tensor

from comet_pl.evaluation.results import Answer, answer_of
from comet_pl.files import as_json, replace_file
from data.batches import IGNORED

SHOWN = 16  # examples in TensorBoard; the file has all


class Predictions(lightning.Callback):
    """Writes what the callbacks that score a validation tell it; it predicts nothing itself, so it has to stand behind them.

    Args:
        folder: where the files go.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.answers: list[Answer] = []

    def add(
        self,
        trainer: lightning.Trainer,
        name: str,
        prompt: Sequence[int] | np.ndarray,
        prediction: str,
        references: list[str],
        score: float,
        facts: dict[str, Any],
    ) -> None:
        """One answer; prompt: its tokens, facts: what else the file says of it."""
        tokenizer = trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        answer = answer_of(tokenizer, name, prompt, prediction, references, score, **facts)
        self.answers.append(answer)

    def add_likeliest(
        self,
        trainer: lightning.Trainer,
        batch: dict[str, Any],
        logits: Tensor,
        right: Sequence[bool],
        facts: Sequence[dict[str, Any]],
    ) -> None:
        """The first len(right) rows of a batch, teacher-forced: at each labelled token the likeliest after the right ones before it. Up to
        the first mistake this is what would be generated.

        Args:
            batch: input_ids, attention_mask and labels (B, N). logits: (B, n, V) of the last n columns; labels are among the last n - 1.
        """
        tokenizer = trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        first = batch["labels"].shape[1] - logits.shape[1] + 1
        likeliest = logits[:, :-1].argmax(-1)
        for row, (correct, more) in enumerate(zip(right, facts, strict=True)):
            labelled = batch["labels"][row, first:] != IGNORED
            wanted, given = batch["labels"][row, first:][labelled], likeliest[row][labelled]
            before = batch["attention_mask"][row].bool()
            before[first + int(labelled.int().argmax()) :] = False
            texts = [
                str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
                for ids in (given, wanted)
            ]
            self.add(
                trainer,
                str(len(self.answers)),
                batch["input_ids"][row][before].tolist(),
                texts[0],
                texts[1:],
                float(correct),
                more,
            )

    def on_validation_epoch_start(self, *_: Any) -> None:
        self.answers = []

    def on_validation_epoch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        answers = self.answers
        if trainer.world_size > 1:
            answers = [
                one
                for rank in range(trainer.world_size)
                for one in trainer.strategy.broadcast(self.answers, src=rank)
            ]
        if not answers or not trainer.is_global_zero:
            return
        replace_file(
            self.folder / f"predictions-{trainer.global_step}.jsonl",
            b"".join(map(as_json, answers)),
            "run.root",
        )
        if pl_module.logger is not None:
            writer = pl_module.logger.experiment  # type: ignore[attr-defined]
            writer.add_text(
                "val/predictions", as_table(answers[:SHOWN]), global_step=trainer.global_step
            )


def as_table(answers: Sequence[Answer]) -> str:
    """Markdown, a line each answer; the texts show as they are, whatever signs they hold."""

    def cell(text: str) -> str:
        return html.escape(" ".join(text.split())).translate(
            {ord(sign): f"&#{ord(sign)};" for sign in "|*_`[]\\~#"}
        )

    lines = ["| prompt's end | reference | prediction | score |", "|---|---|---|---|"]
    for one in answers:
        cells = [
            one["prompt_end"],
            " / ".join(one["references"]),
            one["prediction"],
            f"{one['score']:.4g}",
        ]
        lines.append(f"| {' | '.join(map(cell, cells))} |")
    return "\n".join(lines)
