"""Answers from a memory file: python -m comet_pl.ask MODEL memory.safetensors "question".

--interactive is a conversation at constant memory, with a memory file or without. The file itself
never changes. --help lists the options.
"""

from __future__ import annotations

import contextlib
import math
import signal
import sys
from argparse import ArgumentTypeError
from collections.abc import Iterator
from typing import Any

from comet_pl.errors import Parser, UserError, importing, printable, run_cli

with importing():
    from transformers import TextStreamer

    from comet_pl.chat.conversation import Conversation
    from comet_pl.chat.open_model import add_options, check_target, open_conversation
    from comet_pl.chat.signals import Interruptible, ending, output_gone

# Further out, float32 has no such scores: below, the likeliest token is all there is; above, all
# tokens are alike.
TEMPERATURES = (1e-6, 1e6)


def main(argv: list[str]) -> None:
    options = parser().parse_intermixed_args(argv)
    if options.question is None and not options.interactive:
        raise UserError("QUESTION: missing; give MODEL MEMORY QUESTION, or --interactive")
    if options.question is not None:
        check_question(options.question)
    if options.save is not None:
        check_target(options.save)
    settings = {"max_new_tokens": options.max_new_tokens, "temperature": options.temperature}
    with ending():
        conversation, notes = open_conversation(options, options.memory)
        try:
            number = None
            if options.question is not None:
                number = answer(conversation, options.question, settings)
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            if options.interactive:
                converse(conversation, settings)
        # whatever ended it: a wrong line, a signal, an output that is gone
        finally:
            if options.save is not None:
                save(conversation, options.save, notes)


def save(conversation: Conversation, path: str, notes: dict[str, Any]) -> None:
    """Writes the memory and says so, unless there is none, or it was left inside a token."""
    if conversation.whole and not conversation.cache.columns:
        return
    if conversation.whole:
        conversation.save(path, **notes)
    done = f"wrote {path}" if conversation.whole else f"{path} is not written: an answer broke off"
    with contextlib.suppress(OSError):
        print(done, file=sys.stderr, flush=True)


def parser() -> Parser:
    description = "Answers from what python -m comet_pl.read has read."
    parser = Parser(prog="python -m comet_pl.ask", description=description)
    add_options(parser)
    add = parser.add_argument
    memory = "a memory file; only --interactive can do without"
    add("memory", metavar="MEMORY", nargs="?", help=memory)
    add("question", metavar="QUESTION", nargs="?", help="in quotes")
    lines = "a conversation, a line at a time; Ctrl-C ends an answer, Ctrl-D all"
    add("--interactive", action="store_true", help=lines)
    longest = "longest answer (default: 256)"
    add("--max-new-tokens", metavar="N", type=_count, default=256, help=longest)
    greedy = "0: always the likeliest token (default)"
    add("--temperature", metavar="T", type=_temperature, default=0.0, help=greedy)
    add("--save", metavar="MEMORY", help="the memory after the last answer, to go on from")
    return parser


def converse(conversation: Conversation, settings: dict[str, Any]) -> None:
    """Answers line by line until the input or the output ends; Ctrl-C ends one answer.

    Raises:
        UserError: a line that is not text; those before it have their answers.
    """
    terminal = sys.stdin.isatty()
    if terminal:
        # gives input() a history and line editing
        import readline  # noqa: F401

        print("Ctrl-C ends an answer, Ctrl-D the conversation.", file=sys.stderr, flush=True)
    for line in _typed() if terminal else _piped():
        if line.strip():
            check_question(line)
            answer(conversation, line.strip(), settings)
        if output_gone():
            break
    if terminal:
        print()


def _typed() -> Iterator[str]:
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            try:
                line = input("> ")
            except UnicodeDecodeError:
                raise UserError("standard input: is not text in UTF-8") from None
            yield line


def _piped() -> Iterator[str]:
    """Lines as they come. Nothing is decoded ahead, or one wrong byte would take the lines before
    it along."""
    with contextlib.suppress(KeyboardInterrupt):
        for number, line in enumerate(sys.stdin.buffer, start=1):
            try:
                text = line.decode()
            except UnicodeDecodeError:
                raise UserError(f"standard input: line {number} is not text in UTF-8") from None
            yield text


def answer(conversation: Conversation, question: str, settings: dict[str, Any]) -> int | None:
    """Prints the answer while it is generated; the signal that has ended it."""
    with Interruptible() as interruptible:
        streamer = Printer(conversation.tokenizer, skip_prompt=True, skip_special_tokens=True)
        criteria = [interruptible]
        conversation.ask(question, streamer=streamer, stopping_criteria=criteria, **settings)
    return interruptible.number


class Printer(TextStreamer):
    """Prints an answer, on a terminal without control characters."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if sys.stdout.isatty():
            text = printable(text, keep="\n\t")
        super().on_finalized_text(text, stream_end)


def check_question(text: str) -> None:
    """Raises UserError for a question without text, or not in UTF-8."""
    if not text.strip():
        raise UserError("QUESTION: is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"QUESTION: is not text in UTF-8 (character {error.start + 1})") from None


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} given, a whole number >= 1 is needed")
    return int(text)


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    least, most = TEMPERATURES
    if not value >= 0:
        raise ArgumentTypeError(f"{text!r} given, a number >= 0 is needed")
    return min(value, most) if value >= least else 0.0


if __name__ == "__main__":
    run_cli(main)
