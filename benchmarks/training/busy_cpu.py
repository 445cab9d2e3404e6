"""What other programs on the same CPU cost a training: python -m benchmarks.training.busy_cpu

Tokens/s of optimizer steps on rows of conf=passkey's size, alone and beside one or more busy
processes, with a fixed number of threads and with as many as there are free cores (what train.py
does). Share: of the cores, that an even division between all threads and busy processes leaves.
"""

import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack

import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen3Config

from comet_pl import CometConfig, CometForCausalLM
from comet_pl.errors import Parser, run_cli
from comet_pl.threads import ThreadShare
from comet_pl.training.text_reader import read_windows
from comet_pl.training.windows import cut_windows

SHAPE = {
    "vocab_size": 2048, "hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 32, "intermediate_size": 512,
}  # fmt: skip
MEMORY = {"chunk_size": 64, "global_size": 8, "compression_stride": 8, "temporary_capacity": 16}


def training(seconds, adapts):
    """Tokens/s of the steps within so many seconds, after two that warm up."""
    torch.manual_seed(0)
    model = CometForCausalLM(CometConfig(backbone_config=Qwen3Config(**SHAPE), **MEMORY)).train()
    optimizer, share = torch.optim.AdamW(model.parameters(), 1e-4), ThreadShare()
    ids = torch.randint(0, 2048, (8, 1024))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    windows, steps, start = cut_windows(batch, MEMORY["chunk_size"], None), 0, 0.0
    while steps < 3 or time.perf_counter() - start < seconds:
        if steps == 2:
            start = time.perf_counter()
        for loss in read_windows(model, windows, ids.numel()):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if adapts:
            share.adjust()
        steps += 1
    share.restore()
    return (steps - 2) * ids.numel() / (time.perf_counter() - start)


def beside(busy, work):
    """The work's result while other processes compute without a pause."""
    with ExitStack() as stack:
        for _ in range(busy):
            other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            stack.callback(other.wait)
            stack.callback(other.kill)
        return work()


def main(argv):
    parser = Parser(prog="python -m benchmarks.training.busy_cpu", description=__doc__)
    parser.add_argument("--seconds", type=float, default=10, help="a measurement (default: 10)")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    options = parser.parse_args(argv)
    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    table = Table(title=f"{cores} cores, {threads} threads; tokens/s, median (least to most)")
    for head in ("busy processes", "share of the cores", "fixed threads", "free cores"):
        table.add_column(head, justify="right")
    for busy in options.busy:
        found = {False: [], True: []}
        for _ in range(options.rounds):
            for adapts, speeds in found.items():
                speeds.append(beside(busy, lambda a=adapts: training(options.seconds, a)))
        spread = [
            f"{statistics.median(v):,.0f} ({min(v):,.0f} to {max(v):,.0f})" for v in found.values()
        ]
        share = min(1.0, threads / (threads + busy) * cores / min(cores, threads))
        table.add_row(str(busy), f"{share:.2f}", *spread)
    Console().print(table)


if __name__ == "__main__":
    run_cli(main)
