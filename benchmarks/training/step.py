"""What a training step costs when it recomputes: time and memory of train.recompute=none, cell and chunk, by length.

    python benchmarks/training.py            half an hour on one core: 2k to 32k tokens, 4 to 64 chunks
    python benchmarks/training.py --full     the ratio at the paper's shape too: half an hour more, 20 GB
    python benchmarks/training.py --small    some seconds: a look, no measurement

Full backpropagation through one text, every token a target, no optimizer; a small model from scratch with the paper's proportions of chunk
and memories. Each cell of the table is a process of its own. Memory is what the step takes above weights, their gradients and the text:
bytes of all tensors at the worst moment, and beside it what the kernel counts. The memory between chunks ("boundaries") has to grow with
the text; what is beyond it should not. "Of product" is the step's operations a second (comet_pl/analysis/flops.py, without what is computed again)
as a share of a plain matrix product's in the same process.

The ratio is that of a step to the same step with memory slots computed in full (comet_pl/model/naive.py), 16 chunks from empty memory, in
one process, in turn, the median of --pairs; it stands beside its floor from operation counts.
Results: benchmarks/results/training*.json and .png.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import report
from matplotlib.figure import Figure
from prefill import run_job
from rich.console import Console
from rich.progress import track
from shapes import SHAPES as PREFILL_SHAPES
from shapes import Shape

from comet_pl.analysis import flops
from comet_pl.config.schema import RECOMPUTE
from comet_pl.errors import Parser, UserError, run_cli
from comet_pl.model.chunk_layout import ChunkPlan

HERE = Path(__file__).resolve().parent
SHAPES = {
    None: Shape("training", 128, 4, 2, 32, 384, chunk=512, global_size=128, capacity=512, layers=6),
    "small": Shape("training-small", 32, 2, 1, 16, 96, chunk=64, global_size=16, capacity=64),
}
SHAPES["full"] = SHAPES[None]
LENGTHS = {None: [2048, 4096, 8192, 16384, 32768], "small": [256, 1024, 4096]}
LENGTHS["full"] = LENGTHS[None]
RATIO_SHAPES = {None: "quarter", "small": "sixteenth", "full": "paper"}
PAIRS = {None: 5, "small": 1, "full": 1}
RATIO_CHUNKS = 16  # 32k tokens of the paper's
MARGIN = 1.10  # ours may take this much more than the floor
FLAT_FROM = {
    None: 8192,
    "full": 8192,
    "small": 1024,
}  # tokens: 16 chunks, as 32k tokens of the paper's
LESS = 0.6  # memory of chunk against cell, from FLAT_FROM on
GROWS = 0.15  # memory of chunk beyond the boundaries may grow by this share, from FLAT_FROM on
SAME = 1e-5  # loss and gradient norm, relative


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--small",
        dest="size",
        action="store_const",
        const="small",
        help="a smaller model, shorter texts",
    )
    size.add_argument(
        "--full",
        dest="size",
        action="store_const",
        const="full",
        help="the ratio at the paper's shape",
    )
    parser.add_argument("--lengths", type=int, nargs="+", metavar="N", help="tokens of the text")
    parser.add_argument(
        "--pairs",
        type=int,
        metavar="N",
        help="steps of the ratio, both ways in turn (default: 5; with --full, 1)",
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument(
        "--out",
        type=Path,
        default=HERE / "results",
        metavar="DIR",
        help="default: benchmarks/results",
    )
    options = parser.parse_args(argv)
    options.lengths = sorted(set(options.lengths or LENGTHS[options.size]))
    options.pairs = PAIRS[options.size] if options.pairs is None else options.pairs
    for name, value in (
        ("lengths", min(options.lengths)),
        ("pairs", options.pairs),
        ("threads", options.threads),
    ):
        if value < 1:
            raise UserError(f"--{name}: {value} given, a whole number >= 1 is needed")
    report.make_folder(options.out)
    return options


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Runs measure_training.py on one job in a fresh process."""
    return run_job("measure_training.py", job, f"{job['recompute']} of {job['length']} tokens")


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """All measurements, with what they depend on, and the verdicts."""
    shape, machine = SHAPES[options.size], report.machine("cpu")
    clock = report.clock_of("cpu", options.threads)
    common = {"threads": options.threads, "clock": clock, "shape": dataclasses.asdict(shape)}
    jobs = [
        {"recompute": what, "length": length, **common}
        for length in options.lengths
        for what in RECOMPUTE
    ]
    ratio_shape = PREFILL_SHAPES[RATIO_SHAPES[options.size]]
    ratio = {
        "recompute": "ratio",
        "length": RATIO_CHUNKS * ratio_shape.chunk,
        "pairs": options.pairs,
    }
    ratio = common | ratio | {"shape": dataclasses.asdict(ratio_shape)}
    against, *found = [
        measure(job) for job in track([ratio, *jobs], description="measuring", transient=True)
    ]
    value, least = against[f"{clock}_ratio"], floor(ratio_shape)
    against |= {
        "shape": ratio_shape.name,
        "value": value,
        "floor": least,
        "bound": MARGIN * least,
        "met": value <= MARGIN * least,
    }
    for one in found:
        one["seconds"] = one[clock]
        one["share"] = one["operations"] / one["seconds"] / one["product_rate"]
    return {
        **common,
        "machine": machine,
        "ratio": against,
        "verdict": verdict(found, FLAT_FROM[options.size]),
        "lengths": found,
    }


def floor(shape: Shape) -> float:
    """The least that a step of RATIO_CHUNKS chunks can take of the same with slots in full, if both run at the same speed."""
    config = shape.comet()
    plan = ChunkPlan((shape.chunk,) * RATIO_CHUNKS)
    ours, in_full = (
        flops.training_step(config, [plan], plan.tokens - 1, slots=slots).total
        for slots in flops.SLOTS
    )
    return ours / in_full


def verdict(found: list[dict[str, Any]], flat_from: int) -> dict[str, Any]:
    """What each way costs against the others at each length, and whether the aims are met."""
    cells = {(one["what"], one["length"]): one for one in found}
    lengths = sorted({length for _, length in cells})
    ratios = []
    for n in lengths:
        none, cell, chunk = (cells[what, n] for what in RECOMPUTE)
        apart = max(
            abs(one[key] / none[key] - 1) for one in (cell, chunk) for key in ("loss", "grad_norm")
        )
        memory = {key: chunk[key] / cell[key] for key in ("tensors_mib", "process_mib")}
        time = {
            f"seconds_to_{what}": chunk["seconds"] / cells[what, n]["seconds"]
            for what in ("none", "cell")
        }
        ratios.append({"length": n, **memory, **time, "differs": apart})
    long = [one for one in ratios if one["length"] >= flat_from]
    beyond = [
        cells["chunk", one["length"]]["tensors_mib"]
        - cells["chunk", one["length"]]["boundaries_mib"]
        for one in long
    ]
    growth = max(beyond) / min(beyond) - 1 if len(beyond) > 1 else None
    return {
        "flat_from": flat_from,
        "ratios": ratios,
        "less": {
            "allowed": LESS,
            "met": all(one["tensors_mib"] <= LESS for one in long) if long else None,
        },
        "growth": {
            "beyond_boundaries": growth,
            "allowed": GROWS,
            "met": None if growth is None else growth < GROWS,
        },
        "same": {"allowed": SAME, "met": all(one["differs"] <= SAME for one in ratios)},
    }


def plot(result: dict[str, Any]) -> Figure:
    """Memory and time of a step against length, all axes logarithmic."""
    figure = Figure(figsize=(10, 4), layout="constrained", dpi=100)
    left, right = figure.subplots(1, 2)
    names = {what: f"recompute={what}" for what in RECOMPUTE}
    between = [
        one | {"what": "boundaries", "tensors_mib": one["boundaries_mib"]}
        for one in result["lengths"]
        if one["boundaries_mib"]
    ]
    memory, both = (
        "peak memory above the model, MiB",
        names | {"boundaries": "of chunk: the memory between chunks"},
    )
    report.curves(left, [*result["lengths"], *between], both, "tensors_mib", memory, "tokens")
    report.curves(
        right,
        result["lengths"],
        names,
        "seconds",
        f"a step, seconds ({result['clock']} time)",
        "tokens",
    )
    left.legend(frameon=False, fontsize=8)
    shape = result["shape"]
    figure.suptitle(
        f"Backpropagation through one text: {shape['layers']} layers x {shape['hidden']}, C={shape['chunk']}, m={shape['global_size']}, "
        f"s={shape['stride']}, K={shape['capacity']}, float32, {result['threads']} thread(s)",
        fontsize=10,
    )
    return figure


def show(result: dict[str, Any]) -> None:
    """The table and the verdicts."""
    console, found = Console(), result["verdict"]
    heads = (
        "recompute",
        "tokens",
        "seconds",
        "MiB: tensors",
        "process",
        "boundaries",
        "of product",
    )
    table = report.new_table(f"a step, {result['clock']} time", *heads)
    for one in result["lengths"]:
        memory = (
            f"{one[key]:,.1f}" if one[key] else "-"
            for key in ("tensors_mib", "process_mib", "boundaries_mib")
        )
        table.add_row(
            one["what"],
            f"{one['length']:,}",
            f"{one['seconds']:.2f}",
            *memory,
            f"{one['share']:.0%}",
        )
    console.print(table)
    for one in found["ratios"]:
        console.print(
            f"{one['length']:,} tokens, chunk / cell: tensors {one['tensors_mib']:.2f}, process {one['process_mib']:.2f}, "
            f"time {one['seconds_to_cell']:.2f} (/ none {one['seconds_to_none']:.2f}); loss, gradient norm differ by {one['differs']:.0e}"
        )
    said = {True: "met", False: "MISSED", None: "not measured"}
    ratio = result["ratio"]
    console.print(
        f"a step / the same with slots in full, {ratio['shape']} shape, {ratio['length']:,} tokens: {ratio['value']:.3f} "
        f"(floor {ratio['floor']:.3f}, allowed {ratio['bound']:.3f}): {said[ratio['met']]}"
    )
    start = f"from {found['flat_from']:,} tokens on"
    console.print(f"tensors of chunk / cell {start}: at most {LESS}: {said[found['less']['met']]}")
    if found["growth"]["beyond_boundaries"] is not None:
        grown = found["growth"]["beyond_boundaries"]
        console.print(
            f"tensors of chunk beyond boundaries, {start}: grows by {grown:.1%}, allowed {GROWS:.0%}: {said[found['growth']['met']]}"
        )
    console.print(f"loss and gradient norm within {SAME}: {said[found['same']['met']]}")


def main(argv: list[str]) -> None:
    options = parse(argv)
    result = {"command": " ".join(["python benchmarks/training.py", *argv]), **benchmark(options)}
    name = "-".join(["training", *filter(None, [options.size])])
    report.write_json(options.out / f"{name}.json", result)
    report.write_plot(options.out / f"{name}.png", result, plot)
    show(result)


if __name__ == "__main__":
    run_cli(main)
