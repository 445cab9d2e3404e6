"""Reads text files into a memory file: python -m comet_pl.read MODEL FILE... --save MEMORY.

The memory has the same size for a page and for a million tokens; python -m comet_pl.ask answers
questions from it. --help lists the options.
"""

import codecs
import contextlib
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from comet_pl.errors import Parser, UserError, importing, os_errors, run_cli

with importing():
    from transformers import PreTrainedTokenizerBase

    from comet_pl.chat.open_model import add_options, check_target, open_conversation
    from comet_pl.chat.signals import ending
    from comet_pl.progress import Bar
    from data.chat_template import BLANK
    from data.encoding import encode, stream

PIECE = 100_000  # bytes of a file decoded and tokenised at once


def main(argv: list[str]) -> None:
    options = parser().parse_intermixed_args(argv)
    check_target(options.save, options.force)
    sizes = [check_text(file) for file in options.files]
    try:
        with ending():
            read(options, sizes)
    except SystemExit:
        with contextlib.suppress(OSError):
            print(f"stopped; {options.save} is not written", file=sys.stderr, flush=True)
        raise


def read(options: Namespace, sizes: list[int | None]) -> None:
    """Reads the files, of which `sizes` bytes were checked, and writes the memory."""
    conversation, notes = open_conversation(options, options.onto)
    start, before = time.monotonic(), conversation.cache.get_seq_length()
    with Bar(None) as bar:
        pieces = id_pieces(options.files, conversation.tokenizer, sizes, bar, conversation.begins)
        conversation.read(pieces, bar.add)
    conversation.save(options.save, **notes)
    cache, chunk = conversation.cache, conversation.model.config.chunk_size
    total, seconds = cache.get_seq_length(), time.monotonic() - start
    tokens, constant = total - before, "as many as for a page or for a million tokens"
    print(f"read    {tokens:,} tokens in {seconds:,.1f} s ({tokens / seconds:,.0f} tokens/s)")
    chunks = f"{-(-total // chunk):,} chunks of {chunk:,}"
    print(f"memory  {cache.nbytes:,} bytes after {chunks}: {constant}")
    print(f"wrote   {options.save}", flush=True)


def parser() -> Parser:
    description = "Reads text files once into a memory file of constant size."
    parser = Parser(prog="python -m comet_pl.read", description=description)
    add_options(parser)
    add = parser.add_argument
    files = "text in UTF-8, read one after the other; - is the standard input"
    add("files", metavar="FILE", nargs="+", help=files)
    add("--save", metavar="MEMORY", required=True, help="the memory file to write")
    add("--onto", metavar="MEMORY", help="go on from this memory, which stays as it is")
    add("--force", action="store_true", help="replace a memory file that is there")
    return parser


def id_pieces(
    files: list[str],
    tokenizer: PreTrainedTokenizerBase,
    sizes: list[int | None],
    bar: Bar,
    begins: bool = False,
) -> Iterator[list[int]]:
    """The files' ids, a blank line between files.

    Args:
        sizes: bytes of each file, from which the bar's total is estimated; None: not known.
        begins: see Conversation.begins.
    """
    done = tokens = 0
    total = None if None in sizes else sum(filter(None, sizes))

    def texts(file: str, size: int | None) -> Iterator[str]:
        nonlocal done
        for text, part in text_pieces(file, size):
            done += part
            yield text

    for number, (file, size) in enumerate(zip(files, sizes, strict=True)):
        bar.name(Path(file).name)
        if number:
            yield encode(tokenizer, BLANK)
        for ids in stream(tokenizer, texts(file, size), begins and not number):
            tokens += len(ids)
            if total is not None:
                bar.update(bar.only, total=tokens * total // done)
            yield ids


def check_text(file: str) -> int | None:
    """Bytes of a text file; None for - and pipes.

    A file is read through once, so that a wrong byte shows now and not after an hour.

    Raises:
        UserError: no such file, a folder, not UTF-8, no text in it.
    """
    path = Path(file)
    if file == "-" or (path.exists() and not path.is_dir() and not path.is_file()):
        return None
    return sum(size for _, size in text_pieces(file))


def text_pieces(file: str, size: int | None = None) -> Iterator[tuple[str, int]]:
    """(text, its bytes) in order, cut between lines or else words, without a byte order mark.

    Args:
        size: bytes that check_text has seen: no more are read of a file that grows; None: all.

    Raises:
        UserError: as check_text; or the file has become shorter.
    """
    with os_errors(f"{file}: cannot be read"):
        if file == "-":
            yield from _pieces(sys.stdin.buffer, "standard input")
        else:
            with Path(file).open("rb") as stream:
                yield from _pieces(stream, file, size)


def _pieces(stream: BinaryIO, name: str, size: int | None = None) -> Iterator[tuple[str, int]]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    left, position, seen, mark = "", 0, False, 0
    content = b"\n"
    while content:
        content = stream.read(PIECE if size is None else min(PIECE, size - position))
        if not content and size is not None and position < size:
            was = f"it had {size:,} bytes and has {position:,}"
            raise UserError(f"{name}: became shorter while it was read: {was}")
        try:
            left += decoder.decode(content, not content)
        except UnicodeDecodeError as error:
            at = position + len(content) - len(error.object) + error.start
            raise UserError(f"{name}: is not text in UTF-8 ({error.reason} at byte {at})") from None
        if not position and left.startswith("\ufeff"):
            left, mark = left[1:], len(codecs.BOM_UTF8)
        position += len(content)
        end = len(left)
        if content:
            end = left.rfind("\n") + 1 or max(0, left.rfind(" ")) or end
        if end:
            piece, left = left[:end], left[end:]
            seen = seen or bool(piece.strip())
            yield piece, len(piece.encode()) + mark
            mark = 0
    if not seen:
        raise UserError(f"{name}: holds no text")


if __name__ == "__main__":
    run_cli(main)
