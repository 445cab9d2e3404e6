"""Trains and evaluates over a grid: python -m comet_pl.sweep [conf=NAME] [key=value ...]
'key=[value, ...]' ... [--dry-run]

    python -m comet_pl.sweep conf=ablation/memory_sizes 'model.global_size=[0,4,8,16]'
    'seed=[0,1,2]'

A list is swept over, unless the key takes that list as its one value: 'model.global_size=[0,4]' are
two runs, 'eval.lengths=[64,128]' is one, 'eval.lengths=[[64],[128]]' are two again. A section takes
sets of its keys: 'model=[{}, {gate: none}]'. Several lists: every combination, the last one
changing fastest. All other arguments are train.py's, the same in all runs, and

  sweep.name=NAME       name of the table; default: sweep
  sweep.jobs=N          runs at a time; default: 1
  sweep.metrics=[...]   columns of the table, * stands for any text; default: all
  --dry-run             prints the grid, and which runs are finished, and ends

Each run is train.py in a process of its own, in the folder <run.root>/<conf>/<values>-<digest of
its configuration>, with its output in a .log file beside it. The same command continues a sweep
that was stopped or killed: finished runs stay, the others continue from their checkpoints. Beside
the folders: <name>.md and <name>.png (mean over seeds ± standard deviation), <name>.csv (a line a
run).
"""

import ctypes
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from comet_pl.errors import UserError, handled, importing, nearest, run_cli

with importing():
    import yaml
    from rich.console import Console

    from comet_pl.config.key import key
    from comet_pl.config.load import filled, load, to_dict
    from comet_pl.config.rules import fits
    from comet_pl.config.sources import hints_of, read_arguments, read_yaml
    from comet_pl.experiment import sweep_table
    from comet_pl.files import as_json, replace_file
    from comet_pl.progress import PLAIN

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
DONE = "sweep.json"  # in a run's folder, once it is finished
OWN = {"run.name": "a sweep names its runs itself", "resume": "a sweep resumes by itself"}
SINGLE = ("conf", "run.root")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PARENT_ENDS = 1  # Linux's prctl option


@dataclass(frozen=True)
class SweepConfig:
    """The keys of the sweep itself."""

    name: str = key(
        "sweep",
        "name of the table",
        check=lambda name: re.fullmatch(r"[\w.+-]+", name),
        needs="letters, digits, - . _ +",
    )
    jobs: int = key(1, "runs at a time", min=1)
    metrics: list[str] | None = key(None, "columns of the table, * stands for any text; null: all")


@dataclass(frozen=True)
class SweptRun:
    """One point of the grid. point: swept key -> its value, as the command line takes it;
    arguments: train.py's."""

    point: dict[str, str]
    arguments: list[str]
    folder: Path

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def values(self) -> dict[str, float] | None:
        """What it found; None: not finished."""
        try:
            values = json.loads((self.folder / DONE).read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        numbers: list[Any] = list(values.values()) if isinstance(values, dict) else [None]
        whole = all(type(number) in (int, float) and isfinite(number) for number in numbers)
        return values if whole else None


def plan(argv: list[str]) -> tuple[SweepConfig, list[SweptRun]]:
    """The sweep's own keys, and every run of the grid, each with a configuration that was checked.
    Nothing is written.

    Raises:
        UserError: what `load` says to a run's arguments; an empty list; two points that are the
            same run; a key that is the sweep's own.
    """
    given = read_arguments(argv)
    settings = _settings(
        {name: given.pop(name) for name in list(given) if name.startswith("sweep.")}
    )
    for name, reason in OWN.items():
        if name in given:
            raise UserError(f"{name}: {given[name]} given, but {reason}; leave it out")
    axes = {
        name: items for name, text in given.items() if (items := list_items(name, text)) is not None
    }
    for name in SINGLE:
        if name in axes:
            raise UserError(
                f"{name}: {given[name]} given, but a sweep has one; sweep each on its own"
            )
    runs: dict[str, SweptRun] = {}
    for values in itertools.product(*axes.values()):
        point = dict(zip(axes, values, strict=True))
        arguments = [f"{name}={text}" for name, text in {**given, **point}.items()]
        config = to_dict(load(arguments))
        root = Path(config["run"]["root"]).expanduser() / str(config["conf"])
        facts = {name: value for name, value in config.items() if name not in ("run", "resume")}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
        if digest in runs:
            raise UserError(
                f"{_label(point)}: the same configuration as {_label(runs[digest].point)}; leave "
                "one of them out"
            )
        known = sorted(
            path for path in root.glob(f"*-{digest}") if path.is_dir()
        )  # perhaps another sweep's, with other lists
        runs[digest] = SweptRun(
            point, arguments, known[0] if known else root / f"{_label(point)}-{digest}"
        )
    return settings, list(runs.values())


def list_items(name: str, text: str) -> list[str] | None:
    """The values over which `name=text` sweeps, each as the command line takes it; None: it is one
    value.

    Raises:
        UserError: an empty list, or malformed yaml.
    """
    if not (text.startswith("[") and text.rstrip().endswith("]")):
        return None
    values = read_yaml(name, text)
    if any(fits(values, hint) for hint in hints_of(name)):
        return None
    if not values:
        raise UserError(
            f"{name}: [] given, which makes a sweep of no runs; give at least one value"
        )
    return [
        yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
        .removesuffix("...\n")
        .strip()
        for value in values
    ]


def _settings(texts: dict[str, str]) -> SweepConfig:
    fields = {f"sweep.{one.name}": one for one in dataclasses.fields(SweepConfig)}
    values = {}
    for name, text in texts.items():
        if name not in fields:
            hint = nearest(name, fields) or "; --help lists the keys of a sweep"
            raise UserError(f"{name}: no such key{hint}")
        one = fields[name]
        values[one.name] = text if one.type == "str" else read_yaml(name, text)
    return filled(SweepConfig, values, "sweep.")


def _label(point: dict[str, str]) -> str:
    """global_size=4,seed=0: fit for a folder's name."""
    short = [
        f"{name.split('.')[-1]}={text.strip('{}[]') or 'default'}" for name, text in point.items()
    ]
    return re.sub(r"[^\w.,=+-]+", "_", ",".join(short))[:100] or "run"


class Busy(Exception):
    """Another process is at this run."""


def start(run: SweptRun) -> subprocess.Popen[bytes]:
    """train.py, its output going to the run's log. The log stays locked for as long as the process,
    or a worker of it, lives.

    Raises:
        Busy: a process is at it already. UserError: the log cannot be written.
    """
    try:
        run.log.parent.mkdir(parents=True, exist_ok=True)
        log = run.log.open("ab")
    except OSError as error:
        raise UserError(
            f"run.root: {run.log} cannot be written: {error.strerror or error}"
        ) from None
    with log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy from None
        command = [
            sys.executable,
            str(TRAIN),
            *run.arguments,
            f"run.name={run.folder.name}",
            "resume=true",
        ]
        log.write(f"$ {shlex.join(command)}\n".encode())
        log.flush()
        environment = {
            name: value for name, value in os.environ.items() if name != "COMET_RUN_NAME"
        }
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            preexec_fn=_end_with_parent(),
        )


def _end_with_parent() -> Callable[[], None] | None:
    """What a new process does first so that it saves and ends if this one is killed; None: the
    system cannot."""
    parent, libc = os.getpid(), ctypes.CDLL(None)
    if not hasattr(libc, "prctl"):
        return None

    def ask() -> None:
        libc.prctl(PARENT_ENDS, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(128 + signal.SIGTERM)

    return ask


def run_all(runs: list[SweptRun], jobs: int, console: Console) -> list[SweptRun]:
    """Runs what is not finished, `jobs` at a time; returns what failed.

    Passes on what is to stop it (SIGNALS), and waits until the runs have saved.

    Raises:
        KeyboardInterrupt: after Ctrl-C. SystemExit: after another signal, with 128 + its number.
    """
    waiting, running, failed = (
        [run for run in runs if run.values is None],
        dict[subprocess.Popen[bytes], SweptRun](),
        list[SweptRun](),
    )
    total = len(runs)
    console.print(f"{total} runs, {total - len(waiting)} of them finished already", **PLAIN)
    stopped_by, sent = 0, list[int]()
    with handled(lambda number, _: sent.append(number), *SIGNALS):
        while running or (waiting and not stopped_by):
            if sent:
                if not stopped_by:
                    line = "stopping: the runs save a checkpoint; the same command continues"
                    console.print(line, **PLAIN)
                stopped_by, jobs = sent.pop(0), 0
                for process in running:
                    process.send_signal(stopped_by)
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                try:
                    running[start(run)] = run
                except Busy:
                    failed.append(run)
                    console.print(f"left out: {run.folder.name}: another process is at it", **PLAIN)
            for process in [one for one in running if one.poll() is not None]:
                run = running.pop(process)
                if process.returncode == 0:
                    found = sweep_table.read_values(run.folder)
                    replace_file(run.folder / DONE, as_json(found, indent=2), "run.root")
                    done = total - len(waiting) - len(running) - len(failed)
                    console.print(
                        f"{done}/{total} {run.folder.name}: {sweep_table.in_a_line(found)}", **PLAIN
                    )
                elif not stopped_by:
                    failed.append(run)
                    console.print(
                        f"failed: {run.folder.name}, exit code {process.returncode}: "
                        f"{_last_line(run.log)}",
                        **PLAIN,
                    )
                    console.print(f"  all it said: {run.log}", **PLAIN)
            time.sleep(0.05)
    if stopped_by == signal.SIGINT:
        raise KeyboardInterrupt
    if stopped_by:
        raise SystemExit(128 + stopped_by)
    return failed


def _last_line(log: Path) -> str:
    lines = [
        line.strip() for line in log.read_text("utf-8", "replace").splitlines() if line.strip()
    ]
    return lines[-1][:300]  # at least the command


def main(argv: list[str]) -> None:
    if {"-h", "--help"} & set(argv):
        print(__doc__.strip())
        return
    settings, runs = plan([argument for argument in argv if argument != "--dry-run"])
    console = Console()
    if "--dry-run" in argv:
        for run in runs:
            state = (
                "finished" if run.values is not None else "begun" if run.folder.exists() else "new"
            )
            console.print(f"{state:8}  {run.folder}", **PLAIN)
        console.print(f"{len(runs)} runs", **PLAIN)
        return
    failed = run_all(runs, settings.jobs, console)
    found = [(run.point, values) for run in runs if (values := run.values) is not None]
    if found:
        sweep_table.write(runs[0].folder.parent / settings.name, found, settings.metrics, console)
    if failed:
        console.print(
            f"{len(failed)} of {len(runs)} runs are not finished; the same command continues them",
            **PLAIN,
        )
        raise SystemExit(1)


if __name__ == "__main__":
    run_cli(main)
