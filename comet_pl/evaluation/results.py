"""Where evaluation leaves its results: files, each written atomically, and a printed table.

<out>/eval/<kind>.json           the scores
<out>/eval/<kind>.png            their picture
<out>/eval/events.*              both for TensorBoard, under eval/<kind>
<out>/predictions/<task>.json    {id: prediction}
<out>/predictions/<task>.jsonl   an Answer a line
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from comet_pl.errors import UserError, os_errors
from comet_pl.files import as_json, as_png, numbers, replace_file, show_png
from comet_pl.progress import PLAIN

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase

TAIL = 64  # tokens of a prompt's end that are shown
Answer = dict[str, Any]
"""{"id", "prompt_end", "prediction", "references", "score", ...} of one example.

score: None where the right answer is secret.
"""


class Results:
    """The files of one evaluation, under the folder `out`; kind: data.kind.

    Raises:
        UserError: the folder cannot be made; before anything is evaluated.
    """

    def __init__(self, out: Path, kind: str):
        self.out, self.kind = out, kind
        self.predictions = out / "predictions"
        self.scores = out / "eval" / f"{kind}.json"
        self.picture: bytes | None = None
        with os_errors(f"out: {out} cannot be written to"):
            out.mkdir(parents=True, exist_ok=True)

    def write(self, values: dict[str, Any], predictions: dict[str, list[Answer]]) -> None:
        """Replaces the scores, and the answers of each task."""
        for task, answers in predictions.items():
            texts = as_json({answer["id"]: answer["prediction"] for answer in answers}, indent=2)
            replace_file(self.predictions / f"{task}.json", texts, "out")
            lines = b"".join(as_json(answer) for answer in answers)
            replace_file(self.predictions / f"{task}.jsonl", lines, "out")
        replace_file(self.scores, as_json(values, indent=2), "out")

    def read(self) -> dict[str, Any]:
        """The scores in the file; {} if it is missing or damaged."""
        try:
            found = json.loads(self.scores.read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def answers(self, task: str) -> list[Answer]:
        """The answers of <task>.jsonl; [] if it is missing or damaged."""
        try:
            found = _lines(self.predictions / f"{task}.jsonl")
        except (OSError, ValueError, RecursionError):
            return []
        return found if all(isinstance(answer, dict) for answer in found) else []

    def draw(self, figure: Figure) -> None:
        """Replaces the picture."""
        self.picture = as_png(figure)
        replace_file(self.scores.with_suffix(".png"), self.picture, "out")

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Shows their numbers and the picture in TensorBoard, at a step."""
        from torch.utils.tensorboard import SummaryWriter

        folder, name = self.scores.parent, f"eval/{self.kind}"
        with os_errors(f"out: {folder} cannot be written to"), SummaryWriter(folder) as writer:
            for tag, value in numbers(values, name).items():
                writer.add_scalar(tag, value, step)
            if self.picture is not None:
                show_png(writer, name, self.picture, step)

    def show(self, title: str, table: Table) -> None:
        """Prints the table under its title, and where the files are."""
        console = Console()
        console.print(f"\n{title}", **PLAIN)
        console.print(table)
        written = [self.scores, *[self.predictions] * self.predictions.exists()]
        console.print(f"written: {', '.join(map(str, written))}", **PLAIN)


def answer_of(
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    prompt: Sequence[int] | np.ndarray,
    prediction: str,
    references: list[str],
    score: float | None,
    **facts: Any,
) -> Answer:
    """An Answer to a prompt, (n,) ids; facts: further keys."""
    end = str(tokenizer.decode([int(i) for i in prompt[-TAIL:]]))
    answer = {"id": name, "prompt_end": end, "prediction": prediction, "references": references}
    return {**answer, "score": score, **facts}


def worst_first(file: Path) -> list[Answer]:
    """The answers of a predictions .jsonl, the lowest score first.

    Equal scores keep the file's order; answers without a score come last.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    with os_errors(f"{file}: cannot be read"):
        try:
            scored = [(line.get("score"), line) for line in _lines(file)]
            return [line for _, line in sorted(scored, key=lambda pair: (pair[0] is None, pair[0]))]
        except (ValueError, AttributeError, TypeError):
            content = "a JSON object {id, prediction, references, score} a line"
            raise UserError(f"{file}: not a file of predictions, {content}") from None


def _lines(file: Path) -> list[Answer]:
    return [json.loads(line) for line in file.read_text("utf-8").split("\n") if line]
