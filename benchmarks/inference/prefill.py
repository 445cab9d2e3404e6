"""What reading costs: ms a token and peak memory against length, each length in a process of its own.

    python benchmarks/prefill.py            some minutes: the ratio at the paper's shape, lengths to 256k at a quarter of it
    python benchmarks/prefill.py --full     lengths at the paper's shape too (an hour on one core; on a GPU that is the default)
    python benchmarks/prefill.py --small    everything at a sixteenth, some seconds: a look, no measurement
    python benchmarks/prefill.py --only-4b  the ratio at Qwen3-4B's layer, which the first two measure last; some minutes

Four ways to read the same text with the same random two layers and a tiny vocabulary: CoMeT; the same walk with the memory slots computed
in full (comet_pl/model/naive.py); full attention through Hugging Face; the same over a sliding window with attention sinks (sinks.py), which
sees as many key columns as CoMeT. All but full attention start with full memory. The ratio of the first two is taken in one process, chunk
by chunk in turn, and stands beside its floor from operation counts (shapes.py). Each process also measures a plain matrix product; the
operations of a reading (comet_pl/analysis/flops.py) a second are told as a share of that. Where lengths go beyond what full attention reads
(--full-attention-to), its cost at the longest of them is extrapolated and called so.
Results: benchmarks/results/prefill*.json and .png; Qwen3-4B's layer in prefill-4b*.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import report
import torch
from report import crossover
from rich.progress import track
from shapes import FORMULA, SHAPES, Shape, floor

from comet_pl.errors import Parser, UserError, run_cli

HERE = Path(__file__).resolve().parent
MARGIN = 1.10  # ours may take this much more than the floor
LEAST_RATE = 0.60  # of a plain matrix product, in the linear layers
WAYS = ("comet", "slots_in_full", "sliding_window", "full_attention")
STEADY_TO = 65536  # tokens: the second and the third cost the same at any length and are measured up to here
FULL_ATTENTION_TO = {"cpu": 65536, "cuda": 262144}  # tokens: it costs ever more
MEASURED = ("ms_per_token", "processor_ms_per_token", "peak_mib", "reading_mib")  # of a reading
DTYPES = ("float32", "bfloat16", "float16")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--small",
        dest="size",
        action="store_const",
        const="small",
        help="everything at a sixteenth of the paper's shape",
    )
    size.add_argument(
        "--full",
        dest="size",
        action="store_const",
        const="full",
        help="lengths at the paper's shape",
    )
    size.add_argument(
        "--only-4b",
        dest="size",
        action="store_const",
        const="4b",
        help="nothing but the ratio at Qwen3-4B's layer",
    )
    parser.add_argument("--lengths", type=int, nargs="+", metavar="N", help="tokens to read")
    parser.add_argument(
        "--rounds",
        type=int,
        default=3,
        metavar="N",
        help="chunks of each that make the ratio (default: 3)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        metavar="N",
        help="default here: %(default)s",
    )
    parser.add_argument(
        "--full-attention-to",
        type=int,
        metavar="N",
        help="the longest text it reads (default: 65536; cuda: 262144)",
    )
    add_device(parser)
    parser.add_argument(
        "--out",
        type=Path,
        default=HERE / "results",
        metavar="DIR",
        help="default: benchmarks/results",
    )
    options = parser.parse_args(argv)
    if options.size == "4b" and (options.lengths or options.full_attention_to):
        raise UserError(
            "--only-4b: given with --lengths or --full-attention-to, but it reads no lengths"
        )
    if options.lengths is None:
        options.lengths = [1024, 4096] if options.size == "small" else [16384, 32768, 262144]
    settle_device(options)
    if options.full_attention_to is None:
        options.full_attention_to = FULL_ATTENTION_TO[options.device]
    for name in ("lengths", "rounds", "threads", "full_attention_to"):
        value = getattr(options, name)
        value = min(value) if isinstance(value, list) else value
        if value < 1:
            raise UserError(
                f"--{name.replace('_', '-')}: {value} given, a whole number >= 1 is needed"
            )
    report.make_folder(options.out)
    return options


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device and --dtype."""
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda", "auto"),
        default="cpu",
        help="auto: cuda where there is one (default: cpu)",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on cpu, bfloat16 on cuda")


def settle_device(options: argparse.Namespace) -> None:
    """Puts what `add_device` left open into the options.

    Raises:
        UserError: cuda is wanted, and there is none.
    """
    found = torch.cuda.is_available()
    if options.device == "cuda" and not found:
        raise UserError("--device: cuda given, but torch sees no GPU here; use --device cpu")
    if options.device == "auto":
        options.device = "cuda" if found else "cpu"
    options.dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Runs measure.py on one job in a fresh process."""
    length = f" of {job['length']} tokens" if "length" in job else ""
    return run_job("measure.py", job, f"{job['what']}{length}")


def run_job(script: str, job: dict[str, Any], named: str) -> dict[str, Any]:
    """The JSON line that a script of this folder prints about a job; in a fresh process, so that nothing an earlier one left behind counts.

    Raises:
        UserError: it fails; the line says of which measurement (`named`).
    """
    threads = {name: str(job["threads"]) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    command = [sys.executable, str(HERE / script), json.dumps(job)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | threads, check=False
    )
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["killed, most likely for want of memory"])[-1]
        raise UserError(f"measuring {named} ended with status {done.returncode}: {why}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """All measurements, with what they depend on."""
    ratio_shape = SHAPES["sixteenth" if options.size == "small" else "paper"]
    usual = "paper" if options.device == "cuda" else "quarter"
    lengths_shape = SHAPES[{"small": "sixteenth", "full": "paper"}.get(options.size, usual)]
    common, machine = conditions(options), report.machine(options.device)

    lengths = sorted(set(options.lengths))
    limits = {
        "slots_in_full": STEADY_TO,
        "sliding_window": STEADY_TO,
        "full_attention": options.full_attention_to,
    }
    jobs: list[dict[str, Any]] = [
        {"what": "ratio", "shape": ratio_shape.name, "rounds": options.rounds}
    ]
    for what in WAYS:
        jobs += [
            {"what": what, "shape": lengths_shape.name, "length": n}
            for n in lengths
            if n <= limits.get(what, n)
        ]
    ratio, *found = [
        measure(job | common) for job in track(jobs, description="measuring", transient=True)
    ]

    return {
        **common,
        "machine": machine,
        **verdicts(ratio, ratio_shape, common["clock"]),
        "lengths_shape": lengths_shape.name,
        "shapes": {shape.name: vars(shape) for shape in {ratio_shape, lengths_shape}},
        "flatness": report.flatness(found),
        "against_full_attention": against_full_attention(found, lengths[-1], common["clock"]),
        "lengths": found,
    }


def ratio_alone(options: argparse.Namespace, shape: Shape) -> dict[str, Any]:
    """The ratio at one shape, with what it depends on."""
    common, machine = conditions(options), report.machine(options.device)
    ratio = measure({"what": "ratio", "shape": shape.name, "rounds": options.rounds} | common)
    return {
        **common,
        "machine": machine,
        **verdicts(ratio, shape, common["clock"]),
        "shapes": {shape.name: vars(shape)},
    }


def conditions(options: argparse.Namespace) -> dict[str, Any]:
    """What all jobs of a run have in common."""
    clock = report.clock_of(options.device, options.threads)
    return {
        "threads": options.threads,
        "device": options.device,
        "dtype": options.dtype,
        "clock": clock,
    }


def verdicts(ratio: dict[str, Any], shape: Shape, clock: str) -> dict[str, Any]:
    """{"ratio", "linear_rate"}: what measure.py found about the ratio, and whether both bounds are met."""
    value, least = ratio[f"{clock}_ratio"], floor(shape)
    verdict = {
        "value": value,
        "floor": least,
        "bound": MARGIN * least,
        "met": value <= MARGIN * least,
    }
    rate = ratio["achieved"]["comet"]["linear"]["share"]
    return {
        "ratio": {"shape": shape.name, **verdict, "formula": FORMULA, **ratio},
        "linear_rate": {"value": rate, "bound": LEAST_RATE, "met": rate >= LEAST_RATE},
    }


def against_full_attention(
    found: list[dict[str, Any]], furthest: int, clock: str
) -> dict[str, Any]:
    """Where CoMeT becomes cheaper than full attention, and by how much: at the longest text that full attention read, and at `furthest`
    tokens, if that is more.

    A token of full attention costs a + b n after n others, so ms a token and memory are straight lines; they go through the two longest
    texts that were read. Memory is what reading adds to the process.
    """
    key = report.time_key(clock)
    ours, full = (
        {one["length"]: one for one in found if one["what"] == what}
        for what in ("comet", "full_attention")
    )
    verdict: dict[str, Any] = {"cheaper_from": None, "longest": None, "extrapolated": None}
    if full:
        verdict["cheaper_from"] = crossover(
            *([(n, one[key]) for n, one in side.items()] for side in (ours, full))
        )
        verdict["longest"] = ratios(max(full.items())[1], ours[max(full)], key)
    if len(full) > 1 and furthest > max(full):
        (n, low), (n2, high) = sorted(full.items())[-2:]
        step = (furthest - n2) / (n2 - n)
        line = {name: high[name] + step * (high[name] - low[name]) for name in MEASURED}
        how = f"a straight line through {n:,} and {n2:,} tokens"
        verdict["extrapolated"] = {
            **line,
            **ratios(line | {"length": furthest}, ours[furthest], key),
            "how": how,
        }
    return verdict


def ratios(full: dict[str, Any], ours: dict[str, Any], key: str) -> dict[str, Any]:
    """How many times what ours takes."""
    return {
        "length": full["length"],
        "time": full[key] / ours[key],
        "memory": full["reading_mib"] / ours["reading_mib"],
    }


def main(argv: list[str]) -> None:
    options = parse(argv)
    command = " ".join(["python benchmarks/prefill.py", *argv])

    def file(name: str | None) -> str:
        return "-".join(
            ["prefill", *filter(None, [name, "cuda" if options.device == "cuda" else None])]
        )

    if options.size != "4b":
        result = {"command": command, **benchmark(options)}
        report.write_json(options.out / f"{file(options.size)}.json", result)
        report.write_plot(options.out / f"{file(options.size)}.png", result)
        report.show(result)
    if options.size != "small":
        result = {"command": command, **ratio_alone(options, SHAPES["paper-4b"])}
        report.write_json(options.out / f"{file('4b')}.json", result)
        report.show_ratio(result)


if __name__ == "__main__":
    run_cli(main)
