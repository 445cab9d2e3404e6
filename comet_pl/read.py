"""Reads text files once into a memory file: python -m comet_pl.read MODEL FILE... --save memory.safetensors; --help lists the options.

The memory has the same size for a page and for a million tokens. python -m comet_pl.ask answers questions from it.
"""

from __future__ import annotations

import codecs
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from transformers import PreTrainedTokenizerBase

from comet_pl.chat.conversation import BLANK, encode
from comet_pl.chat.open_model import add_options, check_target, open_conversation
from comet_pl.errors import Parser, UserError, run_cli
from comet_pl.progress import Bar

PIECE = 100_000  # bytes of a file decoded and tokenised at once


def main(argv: list[str]) -> None:
    options = parser().parse_intermixed_args(argv)
    check_target(options.save, options.force)
    sizes = [check_text(file) for file in options.files]
    conversation, notes = open_conversation(options, options.onto)

    start, before = time.monotonic(), conversation.cache.get_seq_length()
    size = None if None in sizes else sum(filter(None, sizes))
    with Bar(None) as bar:
        conversation.read(id_pieces(options.files, conversation.tokenizer, size, bar), bar.add)
    conversation.save(options.save, **notes)
    cache, chunk = conversation.cache, conversation.model.config.chunk_size
    tokens, seconds = cache.get_seq_length() - before, time.monotonic() - start
    chunks = -(-cache.get_seq_length() // chunk)
    print(f"read    {tokens:,} tokens in {seconds:,.1f} s ({tokens / seconds:,.0f} tokens/s)")
    print(
        f"memory  {cache.nbytes:,} bytes after {chunks:,} chunks of {chunk:,}: as many as for a page or for a million tokens"
    )
    print(f"wrote   {options.save}", flush=True)


def parser() -> Parser:
    made = Parser(
        prog="python -m comet_pl.read",
        description="Reads text files once into a memory file of constant size.",
    )
    add_options(made)
    made.add_argument(
        "files",
        metavar="FILE",
        nargs="+",
        help="text in UTF-8, read one after the other; - is the standard input",
    )
    made.add_argument("--save", metavar="MEMORY", required=True, help="the memory file to write")
    made.add_argument(
        "--onto", metavar="MEMORY", help="go on from this memory, which stays as it is"
    )
    made.add_argument("--force", action="store_true", help="replace a memory file that is there")
    return made


def id_pieces(
    files: list[str], tokenizer: PreTrainedTokenizerBase, size: int | None, bar: Bar
) -> Iterator[list[int]]:
    """The files' ids, a blank line between them. The bar learns how many there will be, as far as `size` (bytes of all files) tells."""
    done = tokens = 0
    for number, file in enumerate(files):
        bar.name(Path(file).name)
        if number:
            yield encode(tokenizer, BLANK)
        for text, part in text_pieces(file):
            ids = encode(tokenizer, text)
            done, tokens = done + part, tokens + len(ids)
            if size is not None:
                bar.update(bar.only, total=tokens * size // done)
            yield ids


def check_text(file: str) -> int | None:
    """Bytes of a text file, read through once: a wrong byte shall show now, not after an hour. None for - and pipes.

    Raises:
        UserError: no such file, a folder, not UTF-8, no text in it.
    """
    if file == "-" or (
        Path(file).exists() and not Path(file).is_dir() and not Path(file).is_file()
    ):
        return None
    return sum(size for _, size in text_pieces(file))


def text_pieces(file: str) -> Iterator[tuple[str, int]]:
    """(text, its bytes in the file) in order, cut between lines or else between words; a byte order mark is left out.

    Raises:
        UserError: as check_text.
    """
    try:
        if file == "-":
            yield from _pieces(sys.stdin.buffer, "standard input")
        else:
            with Path(file).open("rb") as stream:
                yield from _pieces(stream, file)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from None


def _pieces(stream: BinaryIO, name: str) -> Iterator[tuple[str, int]]:
    decode: Callable[[bytes, bool], str] = codecs.getincrementaldecoder("utf-8")().decode
    left, place, seen = "", 0, False
    while True:
        content = stream.read(PIECE)
        try:
            left += decode(content, not content)
        except UnicodeDecodeError as error:
            at = place + len(content) - len(error.object) + error.start
            raise UserError(f"{name}: is not text in UTF-8 ({error.reason} at byte {at})") from None
        if not place:
            left = left.removeprefix("\ufeff")
        place += len(content)
        end = (
            (left.rfind("\n") + 1 or max(0, left.rfind(" ")) or len(left)) if content else len(left)
        )
        if end:
            piece, left = left[:end], left[end:]
            seen = seen or bool(piece.strip())
            yield piece, len(piece.encode())
        if not content:
            break
    if not seen:
        raise UserError(f"{name}: holds no text")


if __name__ == "__main__":
    run_cli(main)
