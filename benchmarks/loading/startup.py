"""What a start costs in seconds: `python benchmarks/startup.py`, half a minute a round.

Each case is a process of its own; the cases take turns, after a round that only warms the disk's cache. "beyond" is what `import comet_pl`
takes on top of torch and transformers; the first step is the end of the first optimizer step of `python train.py conf=passkey`. Of several
rounds the quickest counts: what other programs took can only have been added. Results: benchmarks/results/startup.json.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import report
from rich.progress import track

from comet_pl.errors import Parser, UserError, run_cli

HERE = Path(__file__).resolve().parent
FIRST_STEP = """
import os, runpy, sys
from torch.optim.optimizer import register_optimizer_step_post_hook
register_optimizer_step_post_hook(lambda *_: os._exit(0))
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""
CASES: dict[str, tuple[list[str], int]] = {  # arguments of Python, exit status
    "torch and transformers": (["-c", "import torch, transformers"], 0),
    "comet_pl": (["-c", "import comet_pl"], 0),
    "help": (["train.py", "--help"], 0),
    "typo": (["train.py", "train.lrr=1"], 2),
    "first step": (["-c", FIRST_STEP, "conf=passkey", "run.name=startup"], 0),
}
BOUNDS = {"beyond": 1.5, "first step": 15.0}  # seconds


def start(case: str) -> tuple[float, float]:
    """(wall, processor time) in seconds of one process, from its start to its end.

    Raises:
        UserError: it ended with another status than it should.
    """
    arguments, status = CASES[case]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as said:
        root = [f"run.root={folder}"] if case == "first step" else []
        begin = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *arguments, *root],
            cwd=HERE.parent,
            stdout=subprocess.DEVNULL,
            stderr=said,
        )
        _, ended, used = os.wait4(process.pid, 0)  # of this process alone
        wall = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(ended)
        if process.returncode != status:
            said.seek(0)
            raise UserError(
                f"{case}: ended with status {process.returncode}: {(said.read().strip().splitlines() or [''])[-1]}"
            )
    return wall, used.ru_utime + used.ru_stime


def benchmark(rounds: int) -> dict[str, Any]:
    """Seconds of each case, quickest round, and whether the bounds are met (by wall time)."""
    machine = report.machine("cpu")
    found: dict[str, list[tuple[float, float]]] = {case: [] for case in CASES}
    for i in track(range(rounds + 1), description="starting", transient=True):
        for case, times in found.items():
            seconds = start(case)
            if i:
                times.append(seconds)
    best = {
        case: {"wall": min(w for w, _ in times), "processor": min(p for _, p in times)}
        for case, times in found.items()
    }
    bare, ours = best["torch and transformers"], best["comet_pl"]
    best["beyond"] = {clock: ours[clock] - bare[clock] for clock in bare}
    verdicts = {
        case: {"bound": bound, "met": best[case]["wall"] <= bound} for case, bound in BOUNDS.items()
    }
    return {"machine": machine, "rounds": rounds, "seconds": best, "verdicts": verdicts}


def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument(
        "--out",
        type=Path,
        default=HERE / "results",
        metavar="DIR",
        help="default: benchmarks/results",
    )
    options = parser.parse_args(argv)
    if options.rounds < 1:
        raise UserError(f"--rounds: {options.rounds} given, a whole number >= 1 is needed")
    report.make_folder(options.out)
    result = {
        "command": " ".join(["python benchmarks/startup.py", *argv]),
        **benchmark(options.rounds),
    }
    report.write_json(options.out / "startup.json", result)
    for case, seconds in result["seconds"].items():
        bound = f", at most {BOUNDS[case]:g} s wanted" if case in BOUNDS else ""
        print(
            f"{case:24s}{seconds['wall']:6.2f} s ({seconds['processor']:.2f} s of processor time){bound}"
        )
    print(f"written: {options.out / 'startup.json'}")


if __name__ == "__main__":
    run_cli(main)
