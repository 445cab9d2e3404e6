"""Measurements in fresh processes, and the memory of processes as the kernel counts it, in MiB."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.shared.options import ROOT
from comet_pl.errors import UserError

EVERY = 0.25  # seconds between two looks at the processes


def measure(function, job, name, watched=False, **env):
    """function(job) of a fresh process, so that nothing from before counts.

    Args:
        function: of a module; job and result are JSON. The job also gets "started", the time.
        name: of the measurement in the error.
        watched: add what `watch` sees of the process and its workers.
        env: more of its environment.

    Raises UserError if it fails.
    """
    command = [sys.executable, "-m", "benchmarks.shared.child", function.__module__]
    command += [function.__name__, json.dumps(job | {"started": time.time()})]
    if "threads" in job:
        env["OMP_NUM_THREADS"] = env["MKL_NUM_THREADS"] = str(job["threads"])
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment() | env)
        try:
            seen = watch(process) if watched else {}
            process.wait()
        finally:
            if process.poll() is None:  # interrupted: workers may ignore that
                for pid in family(process.pid):
                    os.kill(pid, signal.SIGKILL)
        out.seek(0)
        err.seek(0)
        if process.returncode:
            lines = err.read().strip().splitlines() or ["killed, most likely for want of memory"]
            why = lines[-1].removeprefix("error: ")
            raise UserError(f"measuring {name} ended with status {process.returncode}: {why}")
        return json.loads(out.read().splitlines()[-1]) | seen


def environment():
    """This process's, in which children find the project."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": paths}


def watch(process):
    """Memory of a process and its descendants until it ends: the peak, their number, the curve."""
    start, processes, curve = time.perf_counter(), 0, []
    while process.poll() is None:
        pids = family(process.pid)
        curve.append((time.perf_counter() - start, sum(map(proportional, pids))))
        processes = max(processes, len(pids))
        time.sleep(EVERY)
    peak = max((mib for _, mib in curve), default=0.0)
    return {"all_mib": peak, "processes": processes, "curve": curve[:: 1 + len(curve) // 300]}


def family(pid):
    pids = [pid]
    for parent in pids:
        try:
            for task in Path(f"/proc/{parent}/task").iterdir():
                pids += map(int, (task / "children").read_text().split())
        except OSError:  # it has ended
            continue
    return pids


def proportional(pid):
    """A process's memory, where a page that n processes share counts 1/n; 0: it has ended."""
    return mib(f"/proc/{pid}/smaps_rollup", "Pss", 0.0)


def resident(field):
    """This process's VmRSS (now) or VmHWM (highest so far); nan without /proc.

    The maximum of getrusage would not do: a process inherits it from its parent.
    """
    return mib("/proc/self/status", field, float("nan"))


def mib(file, field, default):
    """A line of a file of /proc; default: there is none."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return default
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), 0) / 1024
