"""The progress bar of whatever reads tokens."""

from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from comet_pl.threads import ThreadShare

PLAIN: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}


class Bar(Progress):
    """Tokens read, tokens/s and time left; without a terminal, only the noted lines.

    Args:
        total: tokens to read; None: not known yet.
    """

    def __init__(self, total: int | None):
        console = Console()
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:.0f}%"),
            _Speed(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            speed_estimate_period=120,
        )
        self.only = self.add_task("", total=total)
        self.threads = ThreadShare()

    def name(self, description: str) -> None:
        self.update(self.only, description=description)

    def add(self, tokens: int) -> None:
        self.advance(self.only, tokens)
        self.threads.adjust()

    def stop(self) -> None:
        super().stop()
        self.threads.restore()

    def note(self, line: str) -> None:
        """Prints a line above the bar."""
        self.console.print(line, **PLAIN)


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} tokens/s", style="progress.data.speed")
