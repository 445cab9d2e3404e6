"""What is the user's or the machine's: one clear line on stderr, exit code 2, no traceback.

COMET_DEBUG=1 shows the traceback before the line.
"""

import argparse
import difflib
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn, TextIO

COMMANDS = ("train.py", "eval.py", "comet_pl.")
LONGEST = 590  # characters of a line; more is cut in its middle
# In errors of libraries that no class tells apart.
NO_ROOM = (
    "no space left",
    "unexpected pos",
    "inline_container",
    "quota exceeded",
    "read-only file",
)
GOES_ON = "resume=true goes on from the last checkpoint"
OTHER_RANK = ("gloo/", "connection closed by peer", "nccl")
NO_MEMORY = ("out of memory", "allocate memory", "unable to allocate", "bad_alloc")


class UserError(ValueError):
    """A user's mistake, in one line: the key, file or option, what was given, what is allowed."""


class OnAllRanks(Exception):
    """An end that all ranks of a run come to at the same step: none of them is lost."""


class UserErrorOnAllRanks(UserError, OnAllRanks):
    """A mistake that every rank meets at the same place; rank 0 reports it."""


class TrainingStopped(OnAllRanks):
    """A signal ended the training between two steps; last.ckpt holds the state."""

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


def one_line(text: str, most: int = LONGEST) -> str:
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
    """Turns what is wrong with a file in the block into the UserError `line`: reason."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not is_disk_fault(error):
            raise
        reason = error.strerror if isinstance(error, OSError) else None
        raise UserError(f"{line}: {reason or first_line(error)}") from None


def is_disk_fault(error: BaseException) -> bool:
    """Whether a file could not be written: an OSError, or torch's and safetensors' words for it."""
    return isinstance(error, OSError) or any(words in str(error).lower() for words in NO_ROOM)


def fault_of(error: Exception) -> str | None:
    """What the user or the machine did, in words; None: the program's own error."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    if text.startswith("DataLoader worker"):
        return f"data.num_workers: {text.rstrip('. ')} (its memory may have run out); {GOES_ON}"
    if isinstance(error, RuntimeError) and any(words in text.lower() for words in OTHER_RANK):
        return f"another process of this training has ended or cannot be reached: {text}; {GOES_ON}"
    if isinstance(error, MemoryError) or any(words in text.lower() for words in NO_MEMORY):
        return f"out of memory{': ' * bool(text)}{text}; docs/how-to.md says how to need less"
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    return f"a file cannot be written: {first_line(error)}" if is_disk_fault(error) else None


class Stream:
    """A standard stream that may go away, as pipes and full disks do: the work goes on without it.

    Raises:
        nothing, where the stream below raises an OSError.
    """

    gone = False

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError:
            self._leave()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._leave()

    def close(self) -> None:
        """It stays open for those who wrote to it before, whatever a logger's end does."""
        self.flush()

    def _leave(self) -> None:
        """What is still to come, and what waits in buffers, goes nowhere."""
        self.gone = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


@contextmanager
def standard_streams() -> Iterator[None]:
    """Within the block all three are there, also if the process was started without them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    before = sys.stdin, sys.stdout, sys.stderr
    sys.stdin = sys.stdin or open(os.devnull)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")
        setattr(sys, name, Stream(stream))
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdin, sys.stdout, sys.stderr = before


@contextmanager
def handled(handler: Callable[[int, FrameType | None], Any], *numbers: int) -> Iterator[None]:
    """Signals of the block go to the handler, but those that the parent has ignored (nohup);
    outside the main thread they go on as before."""
    before: dict[int, Any] = {}
    try:
        for number in numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:
                with suppress(ValueError):
                    before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


@contextmanager
def importing() -> Iterator[None]:
    """Within the block, in which libraries are imported, Ctrl-C ends a command of ours at once;
    some libraries swallow a KeyboardInterrupt. Other programs keep their own answer."""
    before = signal.getsignal(signal.SIGINT)
    ours = any(os.path.basename(word).startswith(COMMANDS) for word in sys.orig_argv[1:6])
    if not ours or before is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def quiet_thread(args: threading.ExceptHookArgs) -> None:
    """The hook of a thread's end: what writes to disk tells of it in its own way."""
    if not (args.exc_value and is_disk_fault(args.exc_value)):
        threading.__excepthook__(args)


def run_cli(main: Callable[[list[str]], None]) -> None:
    """Runs `main(sys.argv[1:])`: what is the user's or the machine's becomes a line on stderr and
    exit code 2, Ctrl-C exit code 130."""
    threading.excepthook = quiet_thread
    if os.environ.get("COMET_DEBUG") != "1":
        sys.unraisablehook = lambda _: None  # of objects that libraries have built by half
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # a home that cannot be written to
    with standard_streams():
        try:
            check_docstrings()
            main([decodable(argument) for argument in sys.argv[1:]])
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        except Exception as error:
            line = fault_of(error)
            if line is None:
                raise
            if os.environ.get("COMET_DEBUG") == "1":
                error.__suppress_context__ = False
                traceback.print_exception(error)
            print(f"error: {one_line(line)}", file=sys.stderr, flush=True)
            raise SystemExit(2) from None


def check_docstrings() -> None:
    """Raises UserError where Python has left them out, which Hugging Face's models are made of."""
    if sys.flags.optimize > 1:
        raise UserError(
            f"PYTHONOPTIMIZE: {sys.flags.optimize} given (or python -OO), which leaves out the "
            "docstrings that transformers needs; allowed: 0 or 1"
        )


def decodable(argument: str) -> str:
    """An argument of the command. Raises UserError if it is not text in UTF-8."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        raise UserError(f"{argument!a}: is not text in UTF-8") from None
    return argument
