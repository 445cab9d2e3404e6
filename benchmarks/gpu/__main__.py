"""Is CoMeT right on a GPU, and how fast? At most so many minutes, whatever happens in them.

Four groups of measurements (law, speed, training, commands), each in a process of its own. A
measurement for which too little time is left is skipped.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib import import_module

import torch

from benchmarks.gpu.plan import SHARES
from benchmarks.gpu.report import PICTURES, measured, terminal
from benchmarks.shared.options import RESULTS, ROOT, Options
from benchmarks.shared.processes import environment
from benchmarks.shared.report import machine
from comet_pl.errors import UserError, os_errors, run_cli
from comet_pl.files import as_json, as_png, replace_file

PLAN = "benchmarks.gpu.plan"
RESERVE = 8  # seconds for the start and the pictures, a fifth of the time at most


def parse(argv):
    options = Options("gpu", __doc__, out=RESULTS / "gpu").settle(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        trial = "--tiny --device cpu tries the program without one"
        raise UserError(f"--device: torch sees no GPU here; {trial}")
    if options.device == "cpu" and options.size != "tiny":
        raise UserError("--device: cpu given, but its models are for a GPU; --tiny is needed too")
    options.earlier = earlier(options) if options.rest else []
    options.done = {line["what"]: line for line in options.earlier if measured(line)}
    return options


def earlier(options):
    """The lines of the results in --out. Raises UserError if they are of another machine."""
    file = options.out / "gpu.json"
    try:
        found = json.loads(file.read_text("utf-8"))
        lines = [
            line | {} for line in found["lines"] if line["what"] and line["kind"] and line["group"]
        ]
        theirs, tiny = dict(found["machine"]).get("gpu"), found["tiny"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"--rest: no results of a run before in {file} ({error})") from None
    here = torch.cuda.get_device_name() if options.device == "cuda" else None
    if theirs not in (None, here) or tiny != (options.size == "tiny"):
        kind = f"{theirs or 'no GPU'}{', tiny' if tiny else ''}"
        raise UserError(f"--rest: the results in {file} are of another kind: {kind}")
    return lines


def deadlines(groups, start, minutes):
    """{group: the time at which it has to have ended}, in the plan's order."""
    seconds, total, ends, share = 60 * minutes, sum(SHARES[group] for group in groups), {}, 0.0
    for group in (group for group in SHARES if group in groups):
        share += SHARES[group] / total
        ends[group] = start + share * (seconds - min(RESERVE, seconds / 5))
    return ends


def run_group(options, group, deadline, scratch):
    """Its lines, one for each measurement of the plan, after its process has ended or was killed
    at its deadline with all processes that it started."""
    lines, log = options.out / "gpu-lines.jsonl", options.out / "gpu-log.txt"
    job = {"plan": PLAN, "group": group, "device": options.device, "tiny": options.size == "tiny"}
    job |= {"scratch": str(scratch), "lines": str(lines), "deadline": deadline}
    failed = [line["what"] for line in options.earlier if "error" in line]
    job |= {"done": list(options.done), "last": failed}
    command = [sys.executable, "-m", "benchmarks.gpu.group", json.dumps(job)]
    # A trial is many small products, which several threads only make wait for each other.
    one_thread = {"OMP_NUM_THREADS": "1"} if options.device == "cpu" else {}
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment() | {"PYTHONUNBUFFERED": "1"} | one_thread,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            status = process.wait(max(0, deadline - time.time()))
            why = f"its process ended with status {status}"
        except subprocess.TimeoutExpired:
            why = "its group's time was over"
        finally:
            kill_all(process)
    return complete(group, lines_of(lines, group), why, options.done)


def kill_all(process):
    """Ends a process and all of its session."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def lines_of(file, group):
    """The whole lines of a group; a process that is killed may leave half a line."""
    lines = []
    for text in file.read_text("utf-8").splitlines() if file.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if line["group"] == group:
            lines.append(line)
    return lines


def complete(group, lines, why, done):
    """A line for each measurement of the plan: the first without one was being measured when the
    process ended, those after it were not begun."""
    found, whole = done | {line["what"]: line for line in lines if "what" in line}, []
    verdict = {"error": why}
    for planned in import_module(PLAN).PLAN[group]:
        line = found.get(planned.what)
        if line is None:
            line = {"group": group, "what": planned.what, "kind": planned.function.__name__}
            line, verdict = line | verdict, {"skipped": "its group had ended"}
        whole.append(line)
    return whole


def measure(options, start):
    """Measures the groups; gpu.json is whole after each of them, with all that was there before."""
    with os_errors(f"--out: {options.out} cannot be written"):
        for name in ("gpu-lines.jsonl", "gpu-log.txt"):
            (options.out / name).unlink(missing_ok=True)
    result = {"command": options.command, "machine": machine("cpu", options.load)}
    result |= {"device": options.device, "dtype": "bfloat16", "tiny": options.size == "tiny"}
    by_group = {group: [] for group in SHARES}
    for line in options.earlier:
        by_group[line["group"]].append(line)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        for group, deadline in deadlines(options.groups, start, options.minutes).items():
            print(f"{group}: at most {max(0, deadline - time.time()):.0f} s", flush=True)
            by_group[group] = run_group(options, group, deadline, scratch)
            result["lines"] = [line for lines in by_group.values() for line in lines]
            for line in result["lines"]:
                if "gpu" in line:
                    result["machine"]["gpu"] = line["gpu"]
            result |= {"minutes": options.minutes, "seconds": round(time.time() - start, 1)}
            replace_file(options.out / "gpu.json", as_json(result, 1), "--out")
    return result


def main(argv):
    start = time.time()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends its processes
    options = parse(argv)
    result = measure(options, start)
    print("\n".join(terminal(result)), flush=True)
    for name, draw in PICTURES.items():
        if (figure := draw(result)) is not None:
            replace_file(options.out / f"gpu-{name}.png", as_png(figure), "--out")
    print(f"written: {options.out / 'gpu.json'}")


if __name__ == "__main__":
    run_cli(main)
