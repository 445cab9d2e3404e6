"""Runs a function in several processes of one thread each, joined by gloo."""

import tempfile
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

PATIENCE = timedelta(minutes=10)  # of a rank with another


def in_ranks(ranks, function, *args):
    """[function(*args) of rank 0, of rank 1, ...], each in a forked process.

    Raises:
        ProcessRaisedException: with a rank's traceback; the others are ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = (folder, ranks, function, args)
        start_processes(_rank, work, nprocs=ranks, start_method="fork")
        return [torch.load(f"{folder}/{rank}", weights_only=False) for rank in range(ranks)]


def _rank(rank, folder, ranks, function, args):
    torch.set_num_threads(1)
    store = {"init_method": f"file://{folder}/store", "rank": rank, "world_size": ranks}
    dist.init_process_group("gloo", timeout=PATIENCE, **store)
    torch.save(function(*args), f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()
