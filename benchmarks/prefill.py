"""What reading costs: ms a token and peak memory against length, each length in a process of its own.

    python benchmarks/prefill.py            about two minutes: the ratio at the paper's shape, lengths to 256k at a quarter of it
    python benchmarks/prefill.py --full     lengths at the paper's shape too (an hour on one core)
    python benchmarks/prefill.py --small    everything at a sixteenth, some seconds: a look, no measurement

Three ways to read the same text with the same random two layers and a tiny vocabulary: CoMeT; the same walk with the memory slots computed
in full (tests/slots_in_full.py); full attention through Hugging Face. Both of the first start with full memory. The ratio of the first two
is taken in one process, chunk by chunk in turn, and stands beside its floor from operation counts (shapes.py).
Results: benchmarks/results/prefill*.json and .png.
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
from rich.progress import track
from shapes import FORMULA, SHAPES, floor

from comet_pl.errors import Parser, UserError, run_cli

HERE = Path(__file__).resolve().parent
MARGIN = 1.15  # ours may take this much more than the floor
LIMITS = {"comet": 1 << 40, "slots_in_full": 65536, "full_attention": 32768}  # the second costs the same at any length, the third ever more
DTYPES = ("float32", "bfloat16", "float16")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--small", dest="size", action="store_const", const="small", help="everything at a sixteenth of the paper's shape")
    size.add_argument("--full", dest="size", action="store_const", const="full", help="lengths at the paper's shape")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="N", help="tokens to read")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="chunks of each that make the ratio (default: 3)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N", help="default here: %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on cpu, bfloat16 on cuda")
    parser.add_argument("--out", type=Path, default=HERE / "results", metavar="DIR", help="default: benchmarks/results")
    options = parser.parse_args(argv)
    if options.lengths is None:
        options.lengths = [1024, 4096] if options.size == "small" else [16384, 32768, 262144]
    for name, values in (("lengths", options.lengths), ("rounds", [options.rounds]), ("threads", [options.threads])):
        if min(values) < 1:
            raise UserError(f"--{name}: {min(values)} given, a whole number >= 1 is needed")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: cuda given, but torch sees no GPU here; use --device cpu")
    options.dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    return options


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Runs measure.py on one job in a fresh process, so that nothing an earlier one left behind counts."""
    threads = {name: str(job["threads"]) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    command = [sys.executable, str(HERE / "measure.py"), json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads, check=False)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["killed, most likely for want of memory"])[-1]
        length = f" of {job['length']} tokens" if "length" in job else ""
        raise UserError(f"measuring {job['what']}{length} ended with status {done.returncode}: {why}")
    return json.loads(done.stdout.splitlines()[-1])


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """All measurements, with what they depend on."""
    ratio_shape = SHAPES["sixteenth" if options.size == "small" else "paper"]
    lengths_shape = SHAPES[{"small": "sixteenth", "full": "paper"}.get(options.size, "quarter")]
    common = {"threads": options.threads, "device": options.device, "dtype": options.dtype}
    machine = report.machine(options.device)

    lengths = sorted(set(options.lengths))
    jobs: list[dict[str, Any]] = [{"what": "ratio", "shape": ratio_shape.name, "rounds": options.rounds}]
    for what, limit in LIMITS.items():
        jobs += [{"what": what, "shape": lengths_shape.name, "length": n} for n in lengths if n <= limit]
    ratio, *found = [measure(job | common) for job in track(jobs, description="measuring", transient=True)]

    # With one thread, processor time is the wall time of an idle machine; with more, waiting for each other is part of the cost.
    clock = "processor" if (options.device, options.threads) == ("cpu", 1) else "wall"
    value, least = ratio[f"{clock}_ratio"], floor(ratio_shape)
    verdict = {"value": value, "floor": least, "bound": MARGIN * least, "met": value <= MARGIN * least}
    return {
        **common,
        "clock": clock,
        "machine": machine,
        "ratio": {"shape": ratio_shape.name, **verdict, "formula": FORMULA, **ratio},
        "lengths_shape": lengths_shape.name,
        "shapes": {shape.name: vars(shape) for shape in {ratio_shape, lengths_shape}},
        "flatness": report.flatness(found),
        "lengths": found,
    }


def main(argv: list[str]) -> None:
    options = parse(argv)
    result = {"command": " ".join(["python benchmarks/prefill.py", *argv]), **benchmark(options)}
    name = "-".join(["prefill", *filter(None, [options.size, "cuda" if options.device == "cuda" else None])])
    report.write_json(options.out / f"{name}.json", result)
    report.write_plot(options.out / f"{name}.png", result)
    report.show(result)


if __name__ == "__main__":
    run_cli(main)
