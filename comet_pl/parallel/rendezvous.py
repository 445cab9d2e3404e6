"""How the ranks of a run find each other: a store on rank 0's machine, within a time limit.

torch's own clients wait for hours for a rank that never comes, print pages about a name that does
not resolve, and wait for ever for a server that accepts and is no store.
"""

import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import Store, TCPStore

from comet_pl.errors import UserError, first_line

PAUSE = 0.2  # seconds between two tries
# What launched processes may need before they meet, in units of what this one has needed: they
# build the same, and share the machine's cores.
PATIENCE = 4
AGENT = "TORCHELASTIC_USE_AGENT_STORE"  # torchrun's: its agent has the store, and not rank 0


@dataclass(frozen=True)
class Meeting:
    """A rank's place among all, and the store that it shares with them.

    Args:
        host: rank 0's address.
        launched: ranks that this process has started.
        patience: seconds to start beyond the timeout, where ranks start others.
    """

    store: Store
    rank: int
    world: int
    host: str
    launched: Mapping[int, "subprocess.Popen[bytes]"] = field(default_factory=dict)
    patience: float = 0.0


def find_store(host: str, port: int, rank: int, world: int, timeout: float) -> Store:
    """The store at host:port; rank 0 makes it, unless torchrun has.

    Raises:
        UserError: within about `timeout` seconds, if there is none.
    """
    until = time.monotonic() + timeout
    where = f"MASTER_ADDR and MASTER_PORT: {host}:{port}"
    if os.environ.get(AGENT) == "True" or rank > 0:
        _try(until, lambda: _listens(host, port), f"rank {rank}: {where} cannot be reached")
        return _made(until, where, host, port, world, False)
    if world > 1:
        _try(until, lambda: _resolves(host, port), f"MASTER_ADDR: {host} cannot be resolved")
    try:
        # By whatever name the others call it, it is on this machine.
        return _made(until, where, "127.0.0.1", port, world, True)
    except dist.DistNetworkError as error:
        taken = "EADDRINUSE" in str(error)
        why = "another program has this port here" if taken else first_line(error)
        raise UserError(f"MASTER_PORT: {port}: {why}; give another") from None


def await_key(store: Store, key: str, seconds: float) -> str | None:
    """A value, once another rank has set it; None if none does in time."""
    until = time.monotonic() + seconds
    while not store.check([key]):
        if time.monotonic() > until:
            return None
        time.sleep(PAUSE / 4)
    return store.get(key).decode()


def patience() -> float:
    """Seconds that processes of this command may need to come as far as this one."""
    try:
        with open("/proc/self/stat") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        started = ticks / os.sysconf("SC_CLK_TCK")
        return PATIENCE * (time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, ValueError, AttributeError):
        return 600.0


def _listens(host: str, port: int) -> None:
    socket.create_connection((host, port), 5.0).close()


def _resolves(host: str, port: int) -> None:
    socket.getaddrinfo(host, port)


def _try(until: float, action: Callable[[], None], line: str) -> None:
    """Repeats what raises an OSError: names and servers of a cluster come up in any order."""
    started = time.monotonic()
    while True:
        try:
            return action()
        except (OSError, UnicodeError) as error:
            if time.monotonic() + PAUSE > until:
                seconds = time.monotonic() - started
                reason = getattr(error, "strerror", None) or error
                raise UserError(f"{line} for {seconds:.0f} s: {reason}") from None
        time.sleep(PAUSE)


def _made(until: float, where: str, host: str, port: int, world: int, server: bool) -> TCPStore:
    """A store, or a connection to it. Raises UserError if nothing answers; what torch raises."""
    seconds = max(until - time.monotonic(), 1.0)
    limit = timedelta(seconds=seconds)
    options = {"wait_for_workers": False, "multi_tenant": server}
    stores: list[TCPStore] = []
    errors: list[Exception] = []

    def make() -> None:
        try:
            stores.append(TCPStore(host, port, world, server, limit, **options))
        except Exception as error:
            errors.append(error)

    # Its constructor may wait for ever.
    thread = threading.Thread(target=make, name="store", daemon=True)
    thread.start()
    thread.join(seconds)
    if stores:
        return stores[0]
    if errors and server:
        raise errors[0]
    why = first_line(errors[0]) if errors else f"nothing that answers for {seconds:.0f} s"
    raise UserError(f"{where} is no store of a training: {why}; give a free port to all ranks")


def launched_by(launcher: object, first: int) -> dict[int, "subprocess.Popen[bytes]"]:
    """The processes of Lightning's launcher by rank, this one's being `first`; none if others have
    started them."""
    with suppress(AttributeError):
        return dict(enumerate(launcher.procs, first + 1))  # type: ignore[attr-defined]
    return {}
