"""Flipped bits and cuts of a file, the same ones every time."""

import random
from collections.abc import Iterator
from pathlib import Path


def damages(file: Path, times: int) -> Iterator[int]:
    """Damages a file, three bits flipped to one cut, again and again from its whole content, which
    it has back at the end; yields the number of the damage."""
    whole, draw = file.read_bytes(), random.Random(0)
    try:
        for number in range(times):
            content = bytearray(whole)
            if number % 4 == 3:
                del content[draw.randrange(len(content)) :]
            else:
                content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            file.write_bytes(content)
            yield number
    finally:
        file.write_bytes(whole)
