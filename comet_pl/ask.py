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
from typing import Any

from comet_pl.errors import Parser, UserError, importing, run_cli

with importing():
    from torch import Tensor
    from transformers import TextStreamer

    from comet_pl.chat.conversation import Conversation
    from comet_pl.chat.open_model import add_options, check_target, open_conversation


def main(argv: list[str]) -> None:
    options = parser().parse_intermixed_args(argv)
    if options.question is None and not options.interactive:
        raise UserError("QUESTION: missing; give MODEL MEMORY QUESTION, or --interactive")
    if options.question is not None:
        check_question(options.question)
    if options.save is not None:
        check_target(options.save)
    conversation, notes = open_conversation(options, options.memory)
    settings = {"max_new_tokens": options.max_new_tokens, "temperature": options.temperature}
    if options.question is not None:
        answer(conversation, options.question, settings)
    if options.interactive:
        converse(conversation, settings)
    if options.save is not None and conversation.cache.get_seq_length():
        conversation.save(options.save, **notes)
        print(f"wrote {options.save}", file=sys.stderr, flush=True)


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
    """Answers line by line until the input ends; Ctrl-C ends one answer."""
    terminal = sys.stdin.isatty()
    if terminal:
        # gives input() a history and line editing
        import readline  # noqa: F401

        print("Ctrl-C ends an answer, Ctrl-D the conversation.", file=sys.stderr, flush=True)
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except UnicodeDecodeError:
            raise UserError("standard input: is not text in UTF-8") from None
        except (EOFError, KeyboardInterrupt):
            break
        if line:
            check_question(line)
            with Interruptible() as interruptible:
                answer(conversation, line, settings | {"stopping_criteria": [interruptible]})
    if terminal:
        print()


def answer(conversation: Conversation, question: str, settings: dict[str, Any]) -> None:
    """Prints the answer while it is generated."""
    streamer = TextStreamer(conversation.tokenizer, skip_prompt=True, skip_special_tokens=True)
    conversation.ask(question, streamer=streamer, **settings)


class Interruptible(contextlib.AbstractContextManager["Interruptible"]):
    """A stopping criterion: Ctrl-C ends the answer after the current token, a second one all.

    An exception inside a forward pass would leave layers that have read different texts.
    """

    asked = False

    def __enter__(self) -> Interruptible:
        self.before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self.before)

    def _note(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return input_ids.new_full((len(input_ids),), self.asked).bool()


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
    if not 0 <= value < math.inf:
        raise ArgumentTypeError(f"{text!r} given, a number >= 0 is needed")
    return value


if __name__ == "__main__":
    run_cli(main)
