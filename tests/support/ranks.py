"""Runs functions in several processes with a gloo group: fresh ones, or ones shared by many
tests."""

import ctypes
import io
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

FORK = multiprocessing.get_context("fork")


class Ranks:
    """Forked processes, each with a rank of its own, that run one function after another.

    Args:
        group: with the default process group; else with the environment that torchrun gives, from
            which Lightning makes one.
    """

    def __init__(self, world: int, group: bool = True):
        port = _free_port()
        self.folder = tempfile.TemporaryDirectory()
        self.ends: list[Connection] = []
        self.processes = []
        for rank in range(world):
            ours, theirs = FORK.Pipe()
            args = (theirs, Path(self.folder.name), rank, world, port, group)
            self.ends.append(ours)
            self.processes.append(FORK.Process(target=_serve, args=args, daemon=True))
            self.processes[-1].start()

    def __call__(self, function: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
        """[function(*args) of rank 0, of rank 1, ...].

        Raises:
            AssertionError: a rank failed (its traceback), or they hung; the processes are then
                gone.
        """
        job, end = pickle.dumps((function, args)), time.monotonic() + timeout
        results: dict[int, Any] = {}
        for pipe in self.ends:
            pipe.send_bytes(job)
        while len(results) < len(self.ends):
            problems = [text for failed, text in results.values() if failed]
            if problems:
                # The others may wait for this rank; what they say within a second is shown too.
                end = min(end, time.monotonic() + 1)
            left = [rank for rank in range(len(self.ends)) if rank not in results]
            ready = [rank for rank in left if self.ends[rank].poll(0.005)]
            for rank in ready:
                try:
                    results[rank] = pickle.loads(self.ends[rank].recv_bytes())
                except EOFError:
                    results[rank] = True, f"rank {rank} died"
            if not ready and time.monotonic() > end:
                break
        problems = [text for failed, text in results.values() if failed]
        hung = [rank for rank in range(len(self.ends)) if rank not in results]
        if problems or hung:
            self.close()
        assert not problems, "\n".join(problems)
        assert not hung, f"ranks {hung} hung for {timeout} s"
        loaded = [io.BytesIO(results[rank][1]) for rank in range(len(self.ends))]
        return [torch.load(content, weights_only=False) for content in loaded]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self.folder.cleanup()


def _serve(pipe: Connection, folder: Path, rank: int, world: int, port: int, group: bool) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: ends with its parent
    torch.set_num_threads(1)
    if group:
        store, timeout = f"file://{folder}/store", timedelta(seconds=30)
        dist.init_process_group("gloo", store, timeout, world, rank)
    else:
        values = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": world}
        values |= {"LOCAL_WORLD_SIZE": world, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
        values |= {"TORCHELASTIC_RUN_ID": "test"}
        os.environ |= {name: str(value) for name, value in values.items()}
    while True:
        try:
            function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            result = io.BytesIO()
            torch.save(function(*args), result)
            answer: tuple[bool, Any] = False, result.getvalue()
        except BaseException:
            answer = True, f"rank {rank}: {traceback.format_exc()}"
        pipe.send_bytes(pickle.dumps(answer))


_SHARED: dict[tuple[int, bool], Ranks] = {}


def in_shared_processes(
    world: int, function: Callable[..., Any], *args: Any, group: bool = True
) -> list[Any]:
    """As Ranks does, in processes that stay for the next call."""
    ranks = _SHARED.pop((world, group), None) or Ranks(world, group)
    results = ranks(function, *args)
    _SHARED[world, group] = ranks  # not after a failure
    return results


def in_processes(
    world: int, function: Callable[..., Any], *args: Any, timeout: float = 60, group: bool = True
) -> list[Any]:
    """As Ranks does, in processes of their own."""
    ranks = Ranks(world, group)
    try:
        return ranks(function, *args, timeout=timeout)
    finally:
        ranks.close()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
