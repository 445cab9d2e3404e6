"""A real text as far as the time allows: the cost of a token and the memory of the process."""

import itertools
import re
import time
from contextlib import suppress
from pathlib import Path

import torch

from benchmarks.shared import report
from benchmarks.shared.options import Options
from benchmarks.shared.processes import resident
from benchmarks.shared.rates import clock_of
from benchmarks.shared.report import FLAT_WITHIN, met, texts
from comet_pl import CometCache
from comet_pl.analysis import flops
from comet_pl.build import build_model, build_tokenizer, device_of
from comet_pl.chat.conversation import Conversation, encode
from comet_pl.chat.open_model import add_options, open_conversation
from comet_pl.config.load import load
from comet_pl.errors import UserError, run_cli
from comet_pl.progress import Bar
from comet_pl.read import check_text, text_pieces

MARKS = 50


def parse(argv):
    parser = Options("inference.reading", __doc__)
    add_options(parser)
    parser.add_argument("files", metavar="FILE", nargs="+", help="text in UTF-8")
    options = parser.settle(argv)
    if not re.fullmatch(r"[\w-]+", options.name):
        raise UserError(f"--name: {options.name!r} given, letters, digits, _ and - are allowed")
    for file in options.files:
        if check_text(file) is None:
            raise UserError(f"{file}: a file on disk is needed, it may have to be read again")
    return options


class Enough(Exception):
    """As many tokens, or minutes, as were asked for."""


def benchmark(options):
    torch.set_num_threads(options.threads)
    conf = options.model.startswith("conf=")
    conversation = untrained(options) if conf else open_conversation(options, None)[0]
    model, config = conversation.model, conversation.model.config
    clock = clock_of(model.device.type, options.threads)
    marks = []
    wall, processor, last, limit = time.monotonic(), time.process_time(), 0, options.minutes * 60

    def pieces():
        for file in itertools.cycle(options.files):
            for text, _ in text_pieces(file):
                yield encode(conversation.tokenizer, text)

    def count(tokens):
        nonlocal last
        bar.add(tokens)
        total, now = conversation.cache.get_seq_length(), time.monotonic() - wall
        over = total >= options.tokens or now >= limit
        due = (total - last) * MARKS >= options.tokens or now * MARKS >= limit * (len(marks) + 1)
        if over or due:
            last = total
            seconds = {"seconds": now, "processor_seconds": time.process_time() - processor}
            marks.append({"tokens": total, **seconds, "process_mib": resident("VmRSS")})
        if over:
            raise Enough

    with Bar(options.tokens) as bar, torch.no_grad(), suppress(Enough, KeyboardInterrupt):
        conversation.read(pieces(), count)
    if len(marks) < 2:
        few = "over before there was anything to compare; give more"
        raise UserError(f"--minutes or --tokens: {few}")
    backbone, (_, keys) = config.backbone_config, flops.heads(config.backbone_config)
    token_bytes = backbone.num_hidden_layers * 2 * keys * model.dtype.itemsize
    keys = ("chunk_size", "global_size", "compression_stride", "temporary_capacity")
    layers = {"layers": backbone.num_hidden_layers, "hidden": backbone.hidden_size}
    return {
        "threads": options.threads,
        "device": model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "clock": clock,
        "shape": layers | {key: getattr(config, key) for key in keys},
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "cache_bytes": conversation.cache.nbytes,
        "full_attention_bytes": marks[-1]["tokens"] * token_bytes,
        "marks": marks,
        "verdict": verdict(marks, seconds_key(clock)),
    }


def untrained(options):
    """The conf's model with the options that `open_conversation` heeds."""
    keys = [f"trainer.accelerator={options.device}", *(f"model.{one}" for one in options.set)]
    config = load([options.model, *keys])
    tokenizer = build_tokenizer(config)
    model = build_model(config, tokenizer).eval()
    model = model.to(device_of(config), getattr(torch, options.dtype or "float32"))
    model.config.rollover = True  # or an open chunk would grow without end
    return Conversation(model, tokenizer, CometCache())


def seconds_key(clock):
    return "seconds" if clock == "wall" else "processor_seconds"


def verdict(marks, key):
    """ms a token in the first and the last quarter, and how far the process grew after the
    first."""
    last = marks[-1]["tokens"]
    quarter = next(mark for mark in marks if mark["tokens"] >= last / 4)
    early = [mark for mark in marks[:-1] if mark["tokens"] <= last * 3 / 4]
    third = early[-1] if early else marks[-2]
    steady = [mark["process_mib"] for mark in marks if mark["tokens"] >= quarter["tokens"]]
    grown = max(steady) / quarter["process_mib"] - 1
    return {
        "first_ms": 1e3 * quarter[key] / quarter["tokens"],
        "last_ms": 1e3 * (marks[-1][key] - third[key]) / (last - third["tokens"]),
        "memory": {"grown": grown, "allowed": FLAT_WITHIN, "met": grown <= FLAT_WITHIN},
    }


def section(result):
    (weights,) = texts(result, "parameters/1e6:,.1f")
    shape = report.memory_shape(result["shape"])
    yield f"{weights} million weights, {shape}; {result['clock']} time for ms a token."
    yield ""
    fields = {
        "tokens read": "last.tokens:,",
        "minutes": "last.seconds/60:,.1f",
        "ms/token, first quarter": "verdict.first_ms:,.3f",
        "last quarter": "verdict.last_ms:,.3f",
        "process, MiB": "last.process_mib:,.0f",
        "memory of the text, MiB": "cache_bytes/1048576:,.1f",
        "full attention's keys and values (computed), MiB": "full_attention_bytes/1048576:,.0f",
    }
    row = texts(result | {"last": result["marks"][-1]}, *fields.values())
    yield from report.table([*fields], [row])
    memory = result["verdict"]["memory"]
    grown, allowed = texts(memory, "grown:.1%", "allowed:.0%")
    limit = f"allowed {allowed} ({met(memory)})"
    yield f"- After the first quarter the process grew by {grown}, {limit}."


def plot(result):
    figure, (times, memory) = report.panels(2)
    marks, key = result["marks"], seconds_key(result["clock"])
    pairs = zip([{"tokens": 0, key: 0.0}, *marks], marks, strict=False)
    ms = [1e3 * (new[key] - old[key]) / (new["tokens"] - old["tokens"]) for old, new in pairs]
    tokens = [mark["tokens"] for mark in marks]
    times.step(tokens, ms)
    times.set(ylabel=f"ms a token ({result['clock']} time)")
    memory.plot(tokens, [mark["process_mib"] for mark in marks], label="the process")
    full, label = result["full_attention_bytes"] / 2**20, "full attention's keys and values"
    memory.plot([0, tokens[-1]], [0, full], "--", color="tab:red", label=f"{label} (computed)")
    memory.set(ylabel="MiB")
    memory.legend(frameon=False)
    for axes in (times, memory):
        axes.set(xlabel="tokens read", ylim=(0, None))
        axes.xaxis.set_major_formatter(lambda n, _: f"{n:,.0f}")
    return figure


def main(argv):
    options = parse(argv)
    # Without the folders of the user.
    files = " ".join(f"PATH/{Path(file).name}" for file in options.files)
    command = ["python -m benchmarks.inference.reading", options.model, files]
    command += [f"--name {options.name} --tokens {options.tokens} --minutes {options.minutes:g}"]
    command += [f"--threads {options.threads}", *(f"--set {one}" for one in options.set)]
    command += [f"--dtype {options.dtype}"] if options.dtype else []
    options.command = " ".join(command)
    report.publish(options, ("reading", options.name), benchmark(options), section, plot=plot)


if __name__ == "__main__":
    run_cli(main)
