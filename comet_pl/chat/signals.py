"""How a signal ends a program that holds a memory: at a place where the memory is whole.

SIGTERM and SIGHUP end a program with status 128 + number, as they would without a handler, but by
way of SystemExit: files in the making are removed. A signal that the parent has ignored (nohup)
stays ignored.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from types import FrameType
from typing import Any, NoReturn, Self

from torch import Tensor

from comet_pl.errors import handled

ENDS = (signal.SIGTERM, signal.SIGHUP)


def end(number: int, frame: FrameType | None = None) -> NoReturn:
    """Raises SystemExit, once: a second signal would end what the first one makes tidy."""
    for further in ENDS:
        signal.signal(further, signal.SIG_IGN)
    sys.exit(128 + number)


def ending() -> contextlib.AbstractContextManager[None]:
    """SIGTERM and SIGHUP raise SystemExit in the block."""
    return handled(end, *ENDS)


class Deferred(contextlib.AbstractContextManager["Deferred"]):
    """Signals of the block take effect behind it."""

    numbers = (signal.SIGINT, *ENDS)

    def __enter__(self) -> Self:
        self.number: int | None = None
        self.handlers = handled(self.note, *self.numbers)
        self.handlers.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.handlers.__exit__(*error)
        if self.number is not None:
            self.act(self.number)

    def note(self, number: int, frame: FrameType | None = None) -> None:
        if self.number in (None, signal.SIGINT):
            self.number = number

    def act(self, number: int) -> None:
        signal.raise_signal(number)


class Interruptible(Deferred):
    """A stopping criterion: a signal, or that nobody reads the output any more, ends the answer
    after the current token. Ctrl-C ends no more than that, a second one all at once; SIGTERM and
    SIGHUP then end the program.

    An exception inside a forward pass would leave layers that have read different texts.
    """

    def note(self, number: int, frame: FrameType | None = None) -> None:
        if number == signal.SIGINT == self.number:
            raise KeyboardInterrupt
        super().note(number)

    def act(self, number: int) -> None:
        if number != signal.SIGINT:
            super().act(number)

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        stop = self.number is not None or output_gone()
        return input_ids.new_full((len(input_ids),), stop).bool()


def output_gone() -> bool:
    """Whether what standard output led to has ended, as `head` does."""
    return getattr(sys.stdout, "gone", False)
