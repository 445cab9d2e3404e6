"""What a start costs in seconds, `import comet_pl` and the first training step among others."""

import os
import subprocess
import sys
import tempfile
import time

from rich.progress import track

from benchmarks.shared import report
from benchmarks.shared.options import ROOT, Options
from benchmarks.shared.rates import CLOCKS
from comet_pl.errors import UserError, run_cli

FIRST_STEP = """
import os, runpy, sys
from torch.optim.optimizer import register_optimizer_step_post_hook
register_optimizer_step_post_hook(lambda *_: os._exit(0))
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""
CASES = {  # arguments of Python, exit status
    "torch and transformers": (["-c", "import torch, transformers"], 0),
    "comet_pl": (["-c", "import comet_pl"], 0),
    "help": (["train.py", "--help"], 0),
    "typo": (["train.py", "train.lrr=1"], 2),
    "first step": (["-c", FIRST_STEP, "conf=passkey", "run.name=startup"], 0),
}
NAMES = {
    "beyond": "`import comet_pl` beyond torch and transformers",
    "first step": "first step of `python train.py conf=passkey`",
}
BOUNDS = {"beyond": 1.5, "first step": 15.0}  # seconds


def start(case):
    """(wall, processor time) in seconds of a process. Raises UserError for another exit status."""
    arguments, status = CASES[case]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        root = [f"run.root={folder}"] if case == "first step" else []
        streams = {"stdout": subprocess.DEVNULL, "stderr": errors}
        begin = time.perf_counter()
        process = subprocess.Popen([sys.executable, *arguments, *root], cwd=ROOT, **streams)
        _, ended, used = os.wait4(process.pid, 0)  # of this process alone
        wall = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(ended)
        if process.returncode != status:
            errors.seek(0)
            why = (errors.read().strip().splitlines() or [""])[-1]
            raise UserError(f"{case}: ended with status {process.returncode}: {why}")
    return wall, used.ru_utime + used.ru_stime


def benchmark(rounds):
    times = {case: [] for case in CASES}
    for k in track(range(rounds + 1), description="starting", transient=True):
        for case in CASES:
            seconds = start(case)
            if k:
                times[case].append(seconds)
    best = {
        case: dict(zip(CLOCKS, map(min, zip(*own, strict=True)), strict=True))
        for case, own in times.items()
    }
    bare, ours = best["torch and transformers"], best["comet_pl"]
    best["beyond"] = {clock: ours[clock] - bare[clock] for clock in bare}
    verdicts = {
        case: {"bound": bound, "met": best[case]["wall"] <= bound} for case, bound in BOUNDS.items()
    }
    return {"rounds": rounds, "seconds": best, "verdicts": verdicts}


def section(result):
    yield f"Seconds, the quickest of {result['rounds']} rounds on a warm disk."
    yield ""
    rows = []
    for case, seconds in result["seconds"].items():
        verdict = result["verdicts"].get(case)
        bound = f"{verdict['bound']:g} ({report.met(verdict)})" if verdict else ""
        clocks = report.texts(seconds, "wall:,.2f", "processor:,.2f")
        rows.append((NAMES.get(case, case), *clocks, bound))
    yield from report.table(("", "wall", "processor", "at most"), rows)


def main(argv):
    options = Options("loading.startup", __doc__).settle(argv)
    report.publish(options, ["startup"], benchmark(options.rounds), section)


if __name__ == "__main__":
    run_cli(main)
