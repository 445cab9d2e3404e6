"""A real text read as far as the time goes: what a token costs and what the process holds, from the first chunk to the last.

    python benchmarks/reading.py conf=passkey FILE... --name small
    python benchmarks/reading.py models/smollm2_135m FILE... --name smollm2 --minutes 60

Reads as `python -m comet_pl.read` does, from files (again and again, if they end first), one text that never ends for the model. MODEL is
what it is there, or conf=NAME: the model of a conf, untrained, for weights change no cost. About 50 marks on the way: tokens, seconds,
memory of the process. Beside them stands what full attention would hold: its keys and values, by arithmetic. Ctrl-C ends the reading and
keeps what was measured. Results: benchmarks/results/reading-NAME.json and .png.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import report
import torch
from matplotlib.figure import Figure
from process_memory import resident
from report import FLAT_WITHIN
from rich.console import Console

from comet_pl import CometCache
from comet_pl.analysis import flops
from comet_pl.build import build_model, build_tokenizer, device_of
from comet_pl.chat.conversation import Conversation, encode
from comet_pl.chat.open_model import add_options, open_conversation
from comet_pl.config.load import load
from comet_pl.errors import Parser, UserError, run_cli
from comet_pl.progress import Bar
from comet_pl.read import check_text, text_pieces

HERE = Path(__file__).resolve().parent
MARKS = 50


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("files", metavar="FILE", nargs="+", help="text in UTF-8")
    parser.add_argument("--name", required=True, help="of the result: letters, digits, _ and -")
    parser.add_argument(
        "--tokens", type=int, default=1_000_000, metavar="N", help="at most (default: %(default)s)"
    )
    parser.add_argument(
        "--minutes", type=float, default=60, metavar="M", help="at most (default: %(default)s)"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        metavar="N",
        help="default here: %(default)s",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=HERE / "results",
        metavar="DIR",
        help="default: benchmarks/results",
    )
    options = parser.parse_intermixed_args(argv)
    if not re.fullmatch(r"[\w-]+", options.name):
        raise UserError(f"--name: {options.name!r} given, letters, digits, _ and - are allowed")
    for name in ("tokens", "minutes", "threads"):
        if getattr(options, name) <= 0:
            raise UserError(f"--{name}: {getattr(options, name)} given, more than 0 is needed")
    for file in options.files:
        if check_text(file) is None:
            raise UserError(f"{file}: a file on disk is needed, it may have to be read again")
    report.make_folder(options.out)
    return options


class Enough(Exception):
    """As many tokens, or minutes, as were asked for."""


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    conversation = (
        untrained(options)
        if options.model.startswith("conf=")
        else open_conversation(options, None)[0]
    )
    model, config = conversation.model, conversation.model.config
    machine = report.machine(model.device.type)
    marks: list[dict[str, float]] = []
    wall, processor, last = time.monotonic(), time.process_time(), 0

    def pieces() -> Iterator[list[int]]:
        for file in itertools.cycle(options.files):
            for text, _ in text_pieces(file):
                yield encode(conversation.tokenizer, text)

    def count(tokens: int) -> None:
        nonlocal last
        bar.add(tokens)
        read, now = conversation.cache.get_seq_length(), time.monotonic() - wall
        over = read >= options.tokens or now >= options.minutes * 60
        if (
            over
            or (read - last) * MARKS >= options.tokens
            or now * MARKS >= options.minutes * 60 * (len(marks) + 1)
        ):
            last = read
            seconds = {"seconds": now, "processor_seconds": time.process_time() - processor}
            marks.append({"tokens": read, **seconds, "process_mib": resident("VmRSS")})
        if over:
            raise Enough

    with Bar(options.tokens) as bar, torch.no_grad(), suppress(Enough, KeyboardInterrupt):
        conversation.read(pieces(), count)
    if len(marks) < 2:
        raise UserError(
            "--minutes or --tokens: over before there was anything to compare; give more"
        )
    clock = report.clock_of(model.device.type, options.threads)
    backbone, (_, keys) = config.backbone_config, flops.heads(config.backbone_config)
    return {
        "machine": machine,
        "threads": options.threads,
        "dtype": str(model.dtype).removeprefix("torch."),
        "clock": clock,
        "shape": {
            "layers": backbone.num_hidden_layers,
            "hidden": backbone.hidden_size,
            "chunk": config.chunk_size,
            "global_size": config.global_size,
            "stride": config.compression_stride,
            "capacity": config.temporary_capacity,
        },
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "cache_bytes": conversation.cache.nbytes,
        "full_attention_bytes": marks[-1]["tokens"]
        * backbone.num_hidden_layers
        * 2
        * keys
        * model.dtype.itemsize,
        "marks": marks,
        "verdict": verdict(marks, "seconds" if clock == "wall" else "processor_seconds"),
    }


def untrained(options: argparse.Namespace) -> Conversation:
    """The conf's model with the options that `open_conversation` would heed."""
    config = load(
        [
            options.model,
            f"trainer.accelerator={options.device}",
            *(f"model.{one}" for one in options.set),
        ]
    )
    tokenizer = build_tokenizer(config)
    model = (
        build_model(config, tokenizer)
        .eval()
        .to(device_of(config), getattr(torch, options.dtype or "float32"))
    )
    model.config.rollover = True  # or an open chunk would grow for ever
    return Conversation(model, tokenizer, CometCache())


def verdict(marks: list[dict[str, float]], key: str) -> dict[str, Any]:
    """ms a token in the first and the last quarter of the reading, and how far the process's memory rose after the first quarter."""
    last = marks[-1]["tokens"]
    quarter = next(mark for mark in marks if mark["tokens"] >= last / 4)
    third = next(
        (mark for mark in reversed(marks[:-1]) if mark["tokens"] <= last * 3 / 4), marks[-2]
    )
    steady = [mark["process_mib"] for mark in marks if mark["tokens"] >= quarter["tokens"]]
    grown = max(steady) / quarter["process_mib"] - 1
    return {
        "first_ms": 1e3 * quarter[key] / quarter["tokens"],
        "last_ms": 1e3 * (marks[-1][key] - third[key]) / (last - third["tokens"]),
        "memory": {"grown": grown, "allowed": FLAT_WITHIN, "met": grown <= FLAT_WITHIN},
    }


def draw(result: dict[str, Any]) -> Figure:
    """ms a token between marks, and memory of the process, against tokens read."""
    figure = Figure(figsize=(10, 3.6), layout="constrained", dpi=100)
    time_axes, memory_axes = figure.subplots(1, 2)
    marks, key = result["marks"], "seconds" if result["clock"] == "wall" else "processor_seconds"
    steps = list(zip([{"tokens": 0, key: 0.0}, *marks], marks, strict=False))
    time_axes.step(
        [new["tokens"] for _, new in steps],
        [1e3 * (new[key] - old[key]) / (new["tokens"] - old["tokens"]) for old, new in steps],
    )
    time_axes.set(ylabel=f"ms a token ({result['clock']} time)")
    memory_axes.plot(
        [mark["tokens"] for mark in marks],
        [mark["process_mib"] for mark in marks],
        label="the process",
    )
    held = result["full_attention_bytes"] / 2**20
    memory_axes.plot(
        [0, marks[-1]["tokens"]],
        [0, held],
        "--",
        color="tab:red",
        label="full attention's keys and values (computed)",
    )
    memory_axes.set(ylabel="MiB")
    memory_axes.legend(frameon=False)
    for axes in (time_axes, memory_axes):
        axes.set(xlabel="tokens read", ylim=(0, None))
        axes.xaxis.set_major_formatter(lambda n, _: f"{n:,.0f}")
        axes.grid(alpha=0.3)
    return figure


def show(result: dict[str, Any]) -> None:
    found, last = result["verdict"], result["marks"][-1]
    console = Console()
    console.print(
        f"{last['tokens']:,} tokens in {last['seconds'] / 60:.1f} minutes ({last['tokens'] / last['seconds']:,.0f} tokens/s)"
    )
    console.print(
        f"ms a token, first quarter {found['first_ms']:.3f}, last quarter {found['last_ms']:.3f} ({result['clock']} time)"
    )
    met = "met" if found["memory"]["met"] else "MISSED"
    console.print(
        f"memory of the process {last['process_mib']:,.0f} MiB; after the first quarter it grew by {found['memory']['grown']:.1%}: {met}"
    )
    cache, full = result["cache_bytes"] / 2**20, result["full_attention_bytes"] / 2**20
    console.print(
        f"memory of the text {cache:,.1f} MiB; full attention's keys and values would be {full:,.0f} MiB"
    )


def main(argv: list[str]) -> None:
    options = parse(argv)
    files = " ".join(f"PATH/{Path(file).name}" for file in options.files)
    rest = [
        f"--tokens {options.tokens}",
        f"--minutes {options.minutes:g}",
        f"--threads {options.threads}",
    ]
    sets = [f"--set {one}" for one in options.set]
    sets += [f"--dtype {options.dtype}"] if options.dtype else []
    command = [
        "python benchmarks/reading.py",
        options.model,
        files,
        f"--name {options.name}",
        *rest,
        *sets,
    ]
    result = {"command": " ".join(command), **benchmark(options)}
    report.write_json(options.out / f"reading-{options.name}.json", result)
    report.write_plot(options.out / f"reading-{options.name}.png", result, draw)
    show(result)


if __name__ == "__main__":
    run_cli(main)
