"""Users' mistakes: one clear line on stderr, exit code 2, no traceback."""

import argparse
import difflib
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn


class UserError(ValueError):
    """A user's mistake, in one line: the key, file or option, what was given, what is allowed."""


class OnAllRanks(Exception):
    """An end that all ranks of a run come to at the same step: none of them is lost."""


class UserErrorOnAllRanks(UserError, OnAllRanks):
    """A mistake that every rank meets at the same place; rank 0 reports it."""


class TrainingStopped(OnAllRanks):
    """Ctrl-C or SIGTERM ended the training between two steps; last.ckpt holds the state."""

    def __init__(self, number: int, step: int):
        self.number, self.step = number, step
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}")


class Parser(argparse.ArgumentParser):
    """A parser that raises UserError, takes no abbreviated options and shows descriptions as is."""

    def __init__(self, **options: Any):
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(**{"allow_abbrev": False, "formatter_class": layout, **options})

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the options")


def nearest(name: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' for the known name closest to `name`, or ''."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {match[0]}?)" if match else ""


def first_line(error: BaseException) -> str:
    """The first line of a library's error that has text, or the error's type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


# Longest error line: more of it is some input.
LINE = 2000


def one_line(text: str, most: int = LINE) -> str:
    """A text on one line, without what a terminal would obey, and without the middle of a long
    one."""
    line = printable(" ".join(text.split()))
    if len(line) <= most:
        return line
    head, tail = 2 * most // 3, most // 4
    return f"{line[:head]} [... {len(line) - head - tail:,} characters ...] {line[-tail:]}"


def printable(text: str, keep: str = "") -> str:
    r"""A text whose control and format characters are written as \x1b."""
    signs = (c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)
    return text if text.isprintable() else "".join(signs)


@contextmanager
def os_errors(line: str) -> Iterator[None]:
    """Turns an OSError of the block into the UserError `line`: reason."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{line}: {error.strerror or error}") from None


def run_cli(main: Callable[[list[str]], None]) -> None:
    """Runs `main(sys.argv[1:])`: mistakes become a line on stderr and exit code 2, Ctrl-C 130."""
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (UserError, MemoryError) as error:
        print(f"error: {one_line(str(error)) or 'out of memory'}", file=sys.stderr)
        raise SystemExit(2) from None
