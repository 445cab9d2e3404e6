"""Where evaluation leaves its results and how it shows them: files, each written atomically, lines and bars.

<out>/eval/<kind>.json, <out>/eval/<kind>.png, <out>/predictions/<task>.json ({id: text}) and .jsonl (one answer a line)
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from comet_pl.errors import UserError

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
            self._replace(f"predictions/{task}.json", as_json({answer["id"]: answer["prediction"] for answer in answers}, indent=2))
            self._replace(f"predictions/{task}.jsonl", b"".join(as_json(answer) for answer in answers))
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
            return [json.loads(line) for line in (self.out / f"predictions/{task}.jsonl").read_text("utf-8").splitlines()]
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
        console.print(f"written: {self.out / 'eval' / self.kind}.json, {self.out / 'predictions'}", **PLAIN)

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
        return sorted(answers, key=lambda answer: (answer.get("score") is None, answer.get("score") or 0))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from None
    except (ValueError, AttributeError, TypeError):
        raise UserError(f"{file}: not a file of predictions, a JSON object {{id, prediction, references, score}} a line") from None


def replace_file(path: Path, content: bytes, key: str) -> None:
    """Writes a file atomically, its folder too.

    Raises:
        UserError: it cannot be written; key: what decides where it is.
    """
    beside = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(content)
        os.replace(beside, path)
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be written: {error.strerror or error}") from None


def as_png(figure: Figure) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def as_json(value: Any, indent: int | None = None) -> bytes:
    return (json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode("utf-8", "replace")


PLAIN: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}


class Bar(Progress):
    """Tokens read, tokens/s and time left, of one evaluation; where there is no terminal, only the lines that are noted.

    Args:
        total: tokens to read; None: not known yet.
    """

    def __init__(self, total: int | None):
        columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"), _Speed()]
        times = [TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()]
        console = Console()
        super().__init__(*columns, *times, console=console, disable=not console.is_terminal, speed_estimate_period=120)
        self.only = self.add_task("", total=total)

    def name(self, description: str) -> None:
        self.update(self.only, description=description)

    def add(self, tokens: int) -> None:
        self.advance(self.only, tokens)

    def note(self, line: str) -> None:
        """Prints a line above the bar."""
        self.console.print(line, **PLAIN)


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} tokens/s", style="progress.data.speed")
