"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import socket
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comet_pl.errors import UserError, os_errors

if TYPE_CHECKING:
    from matplotlib.figure import Figure


HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path beside `path`, this process's own, for a file or folder; it becomes `path` if
    the block succeeds.

    If the block fails, what it wrote is removed; so is what killed processes of this machine left,
    before it. Both paths lie in one folder, so the renaming is atomic.

    Raises:
        OSError
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    beside = path.with_name(f".{path.name}.{HOST}-{os.getpid()}.part")
    _remove(beside)
    try:
        yield beside
        os.replace(beside, path)
    except BaseException:
        _remove(beside)
        raise


def remove_leftovers(path: Path) -> None:
    """Removes the parts of `path` whose process is gone; those of other machines stay."""
    name = re.escape(path.name)
    # Without HOST: of former versions.
    part = re.compile(rf"\.?{name}(?:\.(?:{HOST}-)?(\d+))?\.part")
    for entry in os.listdir(path.parent):
        if (match := part.fullmatch(entry)) and not (match[1] and is_alive(int(match[1]))):
            _remove(path.with_name(entry))


def is_alive(process: int) -> bool:
    """Whether a process of this machine runs."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def _remove(path: Path) -> None:
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """The digest of a whole file, in hexadecimal.

    Raises:
        UserError: it cannot be read.
    """
    with os_errors(f"{path}: cannot be read"), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_file(path: Path, content: bytes, key: str) -> None:
    """Writes a file atomically, its folder too.

    Args:
        key: the option that decides where the file is.

    Raises:
        UserError: it cannot be written.
    """
    with os_errors(f"{key}: {path} cannot be written"), replacing(path) as beside:
        beside.write_bytes(content)


def try_file(path: Path, content: bytes) -> None:
    """As replace_file, but a training does not end for want of a picture: stderr says why."""
    try:
        replace_file(path, content, "run.root")
    except UserError as error:
        print(f"warning: {error}; goes on", file=sys.stderr, flush=True)


def check_new(folder: Path) -> None:
    """Raises UserError if the folder exists."""
    if folder.exists() or folder.is_symlink():
        raise UserError(f"{folder}: is there already; remove it first, or give another folder")


def save_folder(folder: Path, *parts: Any) -> None:
    """Writes what the parts' save_pretrained write, as one new folder that appears whole.

    Raises:
        UserError: the folder exists or cannot be written.
    """
    check_new(folder)
    with os_errors(f"{folder}: cannot be written"), replacing(folder) as beside:
        for part in parts:
            part.save_pretrained(beside)


def as_png(figure: Figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.image import imsave

    canvas, picture = FigureCanvasAgg(figure), io.BytesIO()
    canvas.draw()  # savefig draws a figure with a layout engine twice
    imsave(picture, canvas.buffer_rgba(), format="png")
    return picture.getvalue()


def show_png(writer: Any, tag: str, picture: bytes, step: int) -> None:
    """Adds what as_png made to TensorBoard's events."""
    from matplotlib.image import imread

    pixels = imread(io.BytesIO(picture))[..., :3]
    writer.add_image(tag, pixels, global_step=step, dataformats="HWC")


def as_json(value: Any, indent: int | None = None) -> bytes:
    return (json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode("utf-8", "replace")


def numbers(values: Mapping[str, Any], kind: str) -> dict[str, float]:
    """{"<kind>/<names on the way>": number} of an evaluation's values; counts and lists are left
    out, and of an evaluation that has a "mean" only that is taken."""
    return dict(_numbers(values.get("mean", values), kind))


def _numbers(values: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(values, Mapping):
        for key, inner in values.items():
            if key != "n":
                yield from _numbers(inner, f"{name}/{key}")
    elif isinstance(values, int | float) and not isinstance(values, bool):
        yield name, float(values)


def check_built(path: str, key: str) -> None:
    """Raises UserError for a folder that is not there, before anyone looks for it on the hub."""
    if path.rstrip("/") == "models/smollm2_135m" and not Path(path).is_dir():
        raise UserError(f"{key}: {path} is not there yet; `make smollm2` builds it")
    if path.startswith((".", "/", "~")) and not Path(path).expanduser().is_dir():
        raise UserError(f"{key}: no such folder: {path}")
