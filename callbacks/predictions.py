"""val/predictions and monitor/predictions-<step>.jsonl: the answers to a validation's examples."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np
from torch import Tensor

from comet_pl.evaluation.results import Answer, answer_of
from comet_pl.files import as_json, try_file
from data.batches import IGNORED

SHOWN = 16  # examples in TensorBoard; the file has all


class Predictions(lightning.Callback):
    """Writes the answers that the callbacks which score a validation add; it comes after them.

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
        """Adds an answer; prompt: (n,) ids, facts: further keys in the file."""
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
        """Adds the first len(right) rows of a batch, teacher-forced.

        Each labelled token is predicted after the right ones before it. Up to the first mistake
        this is what would be generated.

        Args:
            batch: input_ids, attention_mask and labels (B, N).
            logits: (B, n, V) of the last n columns; labels are among the last n - 1.
        """
        tokenizer = trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        first = batch["labels"].shape[1] - logits.shape[1] + 1
        likeliest = logits[:, :-1].argmax(-1)
        for row, (correct, keys) in enumerate(zip(right, facts, strict=True)):
            labelled = batch["labels"][row, first:] != IGNORED
            reference, answer = (
                str(tokenizer.decode(ids[labelled], skip_special_tokens=True)).strip()
                for ids in (batch["labels"][row, first:], likeliest[row])
            )
            before = batch["attention_mask"][row].bool()
            before[first + int(labelled.int().argmax()) :] = False
            prompt, number = batch["input_ids"][row][before].tolist(), str(len(self.answers))
            self.add(trainer, number, prompt, answer, [reference], float(correct), keys)

    def on_validation_epoch_start(self, *_: Any) -> None:
        self.answers = []

    def on_validation_epoch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        answers = self.answers
        if trainer.world_size > 1:
            ranks = range(trainer.world_size)
            parts = [trainer.strategy.broadcast(self.answers, src=rank) for rank in ranks]
            answers = [answer for part in parts for answer in part]
        if not answers or not trainer.is_global_zero:
            return
        step = trainer.global_step
        file = self.folder / f"predictions-{step}.jsonl"
        try_file(file, b"".join(map(as_json, answers)))
        if pl_module.logger is not None:
            writer = pl_module.logger.experiment  # type: ignore[attr-defined]
            writer.add_text("val/predictions", as_table(answers[:SHOWN]), global_step=step)


def as_table(answers: Sequence[Answer]) -> str:
    """Markdown, a line each answer; signs that mean something in Markdown are escaped."""
    signs = {ord(sign): f"&#{ord(sign)};" for sign in "|*_`[]\\~#"}

    def cell(text: str) -> str:
        return html.escape(" ".join(text.split())).translate(signs)

    lines = ["| prompt's end | reference | prediction | score |", "|---|---|---|---|"]
    for answer in answers:
        cells = [answer["prompt_end"], " / ".join(answer["references"]), answer["prediction"]]
        cells.append(f"{answer['score']:.4g}")
        lines.append(f"| {' | '.join(map(cell, cells))} |")
    return "\n".join(lines)
