"""Users' mistakes: one clear line on stderr, exit code 2, no traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(ValueError):
    """A mistake of the user: the message is one line that names the key, file or option, what was given and what is allowed."""


class UserErrorOnAllRanks(UserError):
    """One that every process of a distributed run meets at the same place; the first process tells."""

    on_all_ranks = True


def run_cli(main: Callable[[list[str]], None]) -> None:
    """Runs `main(sys.argv[1:])`; a UserError becomes one line on stderr and exit code 2."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
