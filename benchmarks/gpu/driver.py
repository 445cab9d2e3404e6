"""One GPU, a few minutes: is CoMeT right there, how fast, and in how much memory?

    python -m benchmarks.gpu                      eight minutes of a GPU
    python -m benchmarks.gpu --tiny --device cpu  a trial of the script itself, anywhere

Four groups in processes of their own, so that an illegal address ends one group: law, speed,
training, commands. Measurements are ordered by what they decide; each has an estimate and is left
out if less time is left. A JSON line is written after each, so that nothing measured is lost.
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.gpu.report import draw, shown
from benchmarks.shared.options import RESULTS
from benchmarks.shared.report import machine
from comet_pl.errors import Parser, UserError, os_errors
from comet_pl.files import as_json, replace_file

GROUPS = {"law": 0.2, "speed": 0.55, "training": 0.85, "commands": 1.0}  # ends, of the time


def main(argv):
    parser = Parser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu", metavar="DIR")
    parser.add_argument("--minutes", type=float, default=8, help="default: 8")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that run anywhere")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    # the process of one group, and until when it may run
    parser.add_argument("--group", choices=GROUPS)
    parser.add_argument("--deadline", type=float)
    options = parser.parse_args(argv)
    if options.group:
        return measure(options)
    if not 0 < options.minutes < float("inf"):
        raise UserError(f"--minutes: {options.minutes} given, a number > 0 is needed")
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UserError("--device: cuda given, but torch sees no GPU here; use --device cpu")
    with os_errors(f"--out: {options.out} cannot be made"):
        options.out.mkdir(parents=True, exist_ok=True)
    command, load = " ".join(["python -m benchmarks.gpu", *argv]), os.getloadavg()[0]
    lines = drive(options)
    facts = {"command": command, "machine": machine(options.device, load)}
    result = facts | {"lines": lines, "tiny": options.tiny, "device": options.device}
    replace_file(options.out / "gpu.json", as_json(result, 1), "--out")
    for name, picture in draw(lines).items():
        replace_file(options.out / f"{name}.png", picture, "--out")
    table = Table("group", "what", "result", "s", "peak GiB", title=f"results in {options.out}")
    for line in lines:
        peak = line.get("peak_gib", "")
        table.add_row(
            line["group"], line["what"], shown(line), str(line.get("took", "")), str(peak)
        )
    Console().print(table)


def drive(options):
    """Runs the groups one after the other; the lines of all, with their group."""
    start, lines = time.time(), []
    shares = {group: GROUPS[group] for group in options.groups}
    most = max(shares.values())
    for group, share in shares.items():
        file = options.out / f"{group}.jsonl"
        file.unlink(missing_ok=True)
        end = start + 60 * options.minutes * share / most
        argv = ["--out", options.out, "--device", options.device, "--group", group]
        argv += ["--deadline", end, *["--tiny"] * options.tiny]
        command = [sys.executable, "-m", "benchmarks.gpu", *map(str, argv)]
        with open(options.out / f"{group}.log", "w") as log:
            said = {"stdout": log, "stderr": subprocess.STDOUT}
            process = subprocess.Popen(command, **said, start_new_session=True)
            try:
                process.wait(max(1.0, end - time.time()))
            except subprocess.TimeoutExpired:
                pass
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # what it has left running, too
                process.wait()
        found = file.read_text().splitlines() if file.exists() else []
        lines += [{"group": group} | json.loads(line) for line in found]
        if process.returncode:
            status, log = process.returncode, f"{group}.log"
            lines.append({"group": group, "what": "ended early", "error": f"{status}, see {log}"})
    return lines


def measure(options):
    from benchmarks.gpu.measure import Bench

    bench = Bench(options.group, options.out, options.device, options.deadline, options.tiny)
    group = importlib.import_module(f"benchmarks.gpu.{options.group}")
    bench.run(group.plan(bench))
