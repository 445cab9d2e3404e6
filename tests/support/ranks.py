"""Runs a function in several gloo processes, under a watchdog."""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def in_processes(
    world: int, function: Callable[..., Any], *args: Any, timeout: float = 60, group: bool = True
) -> list[Any]:
    """[function(*args) of rank 0, of rank 1, ...]; each rank is a forked process.

    Args:
        group: with the default process group; else with the environment that torchrun gives, from which Lightning makes one.

    Raises:
        AssertionError: a rank failed (its traceback), or they hung.
    """
    context = multiprocessing.get_context("fork")
    start = _with_group if group else partial(_as_torchrun, port=_free_port())
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(
                target=_rank, args=(Path(folder), rank, world, start, function, args), daemon=True
            )
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        end = time.monotonic() + timeout
        try:
            for process in ranks:
                process.join(max(0.0, end - time.monotonic()))
            problems = [path.read_text() for path in sorted(Path(folder).glob("error*"))]
            assert not problems, "\n".join(problems)
            hung = [rank for rank, process in enumerate(ranks) if process.exitcode is None]
            assert not hung, f"ranks {hung} hung for {timeout} s"
            assert not any(process.exitcode for process in ranks), [
                process.exitcode for process in ranks
            ]
            return [
                torch.load(Path(folder, f"result{rank}"), weights_only=False)
                for rank in range(world)
            ]
        finally:
            for process in ranks:
                process.kill()


def _rank(
    folder: Path,
    rank: int,
    world: int,
    start: Callable[..., Any],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    try:
        torch.set_num_threads(1)
        start(folder, rank, world)
        torch.save(function(*args), folder / f"result{rank}")
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        Path(folder, f"error{rank}").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise


def _with_group(folder: Path, rank: int, world: int) -> None:
    store = f"file://{folder}/store"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=30)
    )


def _as_torchrun(folder: Path, rank: int, world: int, port: int) -> None:
    values = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "GROUP_RANK": 0,
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
        "MASTER_PORT": port,
    }
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "TORCHELASTIC_RUN_ID": "test",
        **{name: str(value) for name, value in values.items()},
    }


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
