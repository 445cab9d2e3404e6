"""One training at a time writes a run's folder."""

import fcntl
import json
import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from comet_pl.errors import UserError

NAME = ".lock"  # in the folder; what it says is for people, the system's lock counts
_held: dict[Path, TextIO] = {}


def lock_folder(folder: Path) -> None:
    """Holds the folder until `release`, or until this process ends, however it ends.

    Raises:
        UserError: another process holds it, here or on another machine; it cannot be written.
    """
    path = folder / NAME
    if folder in _held:
        return
    while True:
        try:
            file = path.open("a+", encoding="utf-8")
        except OSError as error:
            why = error.strerror or error
            raise UserError(f"run.root: {folder} cannot be written: {why}") from None
        _lock(file, folder)
        # Not that of a holder who has removed it meanwhile.
        with suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                break
        file.close()
    file.truncate(0)
    facts = {"process": os.getpid(), "host": socket.gethostname()}
    file.write(json.dumps(facts | {"since": time.strftime("%Y-%m-%d %H:%M:%S")}))
    file.flush()
    _held[folder] = file


def release(folder: Path) -> None:
    """Gives the folder back, if it is held."""
    if file := _held.pop(folder, None):
        with suppress(OSError):
            (folder / NAME).unlink()
        file.close()


def _lock(file: TextIO, folder: Path) -> None:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        who = _holder(file)
        file.close()
        raise UserError(
            f"run.name: {folder} is being trained by {who}; wait for it or stop it, or give "
            "another run.name"
        ) from None
    except OSError as error:
        line = f"warning: {folder}: no lock can be had ({error.strerror}); nobody else may train it"
        print(line, file=sys.stderr, flush=True)


def _holder(file: TextIO) -> str:
    file.seek(0)
    try:
        facts = json.loads(file.read())
        return f"process {facts['process']} on {facts['host']} since {facts['since']}"
    except (OSError, ValueError, TypeError, LookupError):
        return "another process"
