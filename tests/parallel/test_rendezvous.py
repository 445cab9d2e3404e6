"""Ranks find each other within a time limit, or a line says why not. On real sockets."""

import re
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch.distributed as dist

from comet_pl.errors import UserError
from comet_pl.parallel import rendezvous
from comet_pl.parallel.rendezvous import AGENT, await_key, find_store, launched_by, patience

SECONDS = 1.0
HERE = "127.0.0.1"
NOWHERE = "no.such.host.invalid"


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    monkeypatch.delenv(AGENT, raising=False)


@pytest.fixture
def port():
    """One on which nobody listens."""
    with socket.create_server((HERE, 0)) as server:
        number = server.getsockname()[1]
    return number


@pytest.fixture
def other():
    """The port of a program that accepts and says nothing."""
    with socket.create_server((HERE, 0)) as server:
        yield server.getsockname()[1]
    for thread in threading.enumerate():
        if thread.name == "store":
            thread.join(20)  # or torch's words would come in another test


def refused(capfd, line, *place):
    """Ends in time, in one line and without a word of torch's."""
    started = time.monotonic()
    with pytest.raises(UserError, match=line) as error:
        find_store(*place, 2, SECONDS)
    assert time.monotonic() - started < SECONDS + 6  # a name server may take its time
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_nobody_listens(capfd, port):
    line = rf"^rank 1: MASTER_ADDR and MASTER_PORT: {HERE}:{port} cannot be reached for 1 s: Conn"
    refused(capfd, line, HERE, port, 1)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_name_that_does_not_resolve(capfd, port, rank):
    where = f"{NOWHERE} cannot be resolved" if rank == 0 else f"{NOWHERE}:{port} cannot be reached"
    refused(capfd, re.escape(where), NOWHERE, port, rank)


def test_a_name_that_is_no_name(capfd, port):
    refused(capfd, "cannot be resolved", "a..b", port, 0)


def test_a_port_that_is_taken(capfd, other):
    line = f"^MASTER_PORT: {other}: another program has this port here; give another$"
    refused(capfd, line, HERE, other, 0)


def test_a_program_that_is_no_store(capfd, other):
    refused(capfd, "is no store of a training: nothing that answers for 1 s", HERE, other, 1)


def test_torchruns_agent_is_gone(capfd, port, monkeypatch):
    monkeypatch.setenv(AGENT, "True")
    refused(capfd, "^rank 0: .* cannot be reached", HERE, port, 0)


def test_ranks_meet_in_any_order(port):
    stores = {}

    def meet(rank):
        stores[rank] = find_store(HERE, port, rank, 2, 20.0)

    early = threading.Thread(target=meet, args=[1])
    early.start()
    time.sleep(0.5)
    meet(0)
    early.join(20)
    stores[0].set("word", "found")
    assert await_key(stores[1], "word", 1.0) == "found"
    assert await_key(stores[1], "another", 0.1) is None


def test_a_second_training_in_one_process_has_the_same_port(port):
    first = find_store(HERE, port, 0, 1, SECONDS)
    second = find_store(HERE, port, 0, 1, SECONDS)
    first.set("word", "found")
    assert second.get("word") == b"found"


def test_other_errors_of_a_store_are_a_line(monkeypatch):
    def broken(*_, **__):
        raise dist.DistNetworkError("permission denied\nframe 0")

    monkeypatch.setattr(rendezvous, "TCPStore", broken)
    with pytest.raises(UserError, match=r"^MASTER_PORT: 80: permission denied; give another$"):
        find_store(HERE, 80, 0, 1, SECONDS)


def test_what_a_process_allows_those_that_it_starts():
    code = "import time; time.sleep(1)\nfrom comet_pl.parallel.rendezvous import *; import time\n"
    code += "print(patience() / PATIENCE)"
    begun = time.monotonic()
    shown = subprocess.run(
        [sys.executable, "-c", code.replace("import *", "import PATIENCE, patience")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert 1.0 <= float(shown.stdout) <= time.monotonic() - begun + 0.5
    assert patience() > 0


def test_whom_a_launcher_has_started():
    class Launcher:
        procs = ("a", "b")

    assert launched_by(Launcher(), 4) == {5: "a", 6: "b"}
    assert launched_by(None, 0) == {}
