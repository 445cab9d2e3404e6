"""Where evaluation leaves its results and how it shows them: files, each written atomically, lines and bars.

<out>/eval/<kind>.json, <out>/eval/<kind>.png, <out>/predictions/<task>.json ({id: text}) and .jsonl (one answer a line)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from comet_pl.errors import UserError
from comet_pl.files import as_json, as_png, replace_file
from comet_pl.progress import PLAIN

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase

TAIL = 64  # tokens of a prompt's end that are shown
Answer = dict[str, Any]
"""{"id", "prompt_end", "prediction", "references", "score", ...} of one example; score None: the right answer is secret"""


class Results:
    """Files of one evaluation, under the folder `out`; kind: passkey | scrolls."""

    def __init__(self, out: Path, kind: str):
        self.out, self.kind = out, kind
        try:  # now, not after an hour of reading
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"out: {out} cannot be written to: {error.strerror or error}") from None

    def write(self, values: dict[str, Any], predictions: dict[str, list[Answer]]) -> None:
        """Replaces <kind>.json and the answers by task."""
        for task, answers in predictions.items():
            self._replace(
                f"predictions/{task}.json",
                as_json({answer["id"]: answer["prediction"] for answer in answers}, indent=2),
            )
            self._replace(
                f"predictions/{task}.jsonl", b"".join(as_json(answer) for answer in answers)
            )
        self._replace(f"eval/{self.kind}.json", as_json(values, indent=2))

    def read(self) -> dict[str, Any]:
        """What <kind>.json holds; {} if there is none, or not a whole one."""
        try:
            return dict(json.loads((self.out / f"eval/{self.kind}.json").read_text("utf-8")))
        except (OSError, ValueError):
            return {}

    def answers(self, task: str) -> list[Answer]:
        """What <task>.jsonl holds; [] if there is none, or not a whole one."""
        try:
            return [
                json.loads(line)
                for line in (self.out / f"predictions/{task}.jsonl").read_text("utf-8").splitlines()
            ]
        except (OSError, ValueError):
            return []

    def draw(self, figure: Figure) -> None:
        """Replaces <kind>.png."""
        self._replace(f"eval/{self.kind}.png", as_png(figure))

    def show(self, title: str, table: Table) -> None:
        """Prints the table under its title, and where the files are."""
        console = Console()
        console.print(f"\n{title}", **PLAIN)
        console.print(table)
        console.print(
            f"written: {self.out / 'eval' / self.kind}.json, {self.out / 'predictions'}", **PLAIN
        )

    def _replace(self, name: str, content: bytes) -> None:
        replace_file(self.out / name, content, "out")


def prompt_end(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int] | np.ndarray) -> str:
    """The text of a prompt's last TAIL tokens, (n,) ids."""
    return str(tokenizer.decode([int(i) for i in prompt[-TAIL:]]))


def worst_first(file: Path) -> list[Answer]:
    """The answers of a predictions .jsonl, the lowest score first; equal ones in the file's order, those without a score last.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    try:
        answers = [json.loads(line) for line in file.read_text("utf-8").split("\n") if line]
        return sorted(
            answers, key=lambda answer: (answer.get("score") is None, answer.get("score") or 0)
        )
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from None
    except (ValueError, AttributeError, TypeError):
        raise UserError(
            f"{file}: not a file of predictions, a JSON object {{id, prediction, references, score}} a line"
        ) from None
