"""Users' mistakes: one clear line on stderr, exit code 2, no traceback."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn


class UserError(ValueError):
    """A mistake of the user: the message is one line that names the key, file or option, what was given and what is allowed."""


class OnAllRanks(Exception):
    """An end that all ranks of a run come to at the same step: none of them is lost."""


class UserErrorOnAllRanks(UserError, OnAllRanks):
    """A mistake that every rank meets at the same place; rank 0 reports it."""


class TrainingStopped(OnAllRanks):
    """Ctrl-C or SIGTERM ended the training between two steps; last.ckpt holds the state."""

    def __init__(self, number: int, step: int):
        self.number, self.step = number, step
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}")


class TooLittleMemory(UserError, MemoryError):
    """What was asked for does not fit into the device's memory; said before anything is computed."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are UserErrors; options must be written out."""

    def __init__(self, *args: Any, allow_abbrev: bool = False, **kwargs: Any):
        super().__init__(*args, allow_abbrev=allow_abbrev, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the options")


def first_line(error: BaseException) -> str:
    """Of a library's error: its first line with text, or its kind."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def run_cli(main: Callable[[list[str]], None]) -> None:
    """Runs `main(sys.argv[1:])`; a UserError becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
