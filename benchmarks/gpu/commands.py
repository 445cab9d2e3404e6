"""The commands that a user types, each in a process of its own: train.py, eval.py, the tests."""

import json
import re
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.measure import within
from benchmarks.shared.options import ROOT
from benchmarks.shared.processes import environment

LOSS = re.compile(r"^step (\d+)/\d+ loss (\S+)", re.MULTILINE)
LAST_LINES = 3  # of a command that failed
# NCCL takes two processes on one GPU only if they seem to be on two machines.
TWO_MACHINES = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_SOCKET_IFNAME": "lo"}


class CommandFailed(RuntimeError):
    """A command ended with another status than 0; the message has its last lines."""


@dataclass
class Command:
    """A started process whose output goes to a file."""

    process: subprocess.Popen
    output: Path

    def finish(self, limit):
        """Its output, after at most `limit` seconds. Raises CommandFailed."""
        try:
            status = self.process.wait(limit)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            status = f"none after {limit} s"
        text = self.output.read_text(errors="replace")
        if status:
            end = " / ".join(text.strip().splitlines()[-LAST_LINES:])
            raise CommandFailed(f"status {status}: {end}")
        return text


def start(place, name, *argv, **env):
    """`python argv` from the project's root, with more of an environment."""
    output = place.scratch / f"{name}.txt"
    command, env = [sys.executable, *argv], environment() | env
    with output.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )
    return Command(process, output)


def watched(place, name, *argv, limit=150):
    """A script's output, seconds and peak of GPU memory."""
    text = start(place, name, "-m", "benchmarks.gpu.watched", *argv).finish(limit)
    return text, json.loads(text.splitlines()[-1])


def losses(text):
    """{step: loss} of the lines that train.py prints."""
    return {int(step): float(loss) for step, loss in LOSS.findall(text)}


def run_keys(place, name, precision, steps):
    """train.py's keys: conf=passkey, all in the scratch folder."""
    keys = {
        "run.root": place.scratch / "runs",
        "run.name": name,
        "trainer.accelerator": "gpu" if place.on_gpu else "cpu",
        "trainer.precision": precision,
        "trainer.max_steps": steps,
        "trainer.val_check_interval": steps,
        "trainer.log_every_n_steps": 1,
        "data.length_schedule": "null",
        "eval.lengths": "[1024]",
        "eval.examples": 1,
    }
    if place.tiny:
        keys |= {"data.train_length": 64, "data.batch_size": 2, "backbone.hidden_size": 32}
        keys |= {"eval.lengths": "[64]", "eval.depths": 2, "monitor.memory": "false"}
    return [f"{key}={value}" for key, value in keys.items()]


def steps_of(place, steps):
    """So many steps; of a trial four at most."""
    return min(steps, 4) if place.tiny else steps


def run_folder(place, name):
    return place.scratch / "runs" / "passkey" / name


# ---- measurements


def train(place, name, steps=20, precision="bf16-mixed", more=()):
    """train.py with its evaluation."""
    keys = [*run_keys(place, name, precision, steps_of(place, steps)), *more]
    text, facts = watched(place, name, "train.py", *keys)
    curve = losses(text)
    return {"precision": precision, "steps": max(curve), "losses": curve} | facts


def evaluation(place, name, lengths, examples):
    """eval.py on the checkpoint of a training in bf16-mixed, which is made if it is not there."""
    if not (run_folder(place, name) / "checkpoints" / "last.ckpt").exists():
        train(place, name, more=["eval.after_fit=false"])
    lengths = [64] if place.tiny else lengths
    keys = [f"eval.lengths={lengths}".replace(" ", ""), f"eval.examples={examples}"]
    folder = run_folder(place, name)
    _, facts = watched(place, "evaluation", "eval.py", f"ckpt={folder}", *keys)
    results = json.loads((folder / "eval" / "passkey.json").read_text("utf-8"))
    tokens = sum(cell["length"] * cell["n"] for cell in results["cells"])
    return {"tokens": tokens} | facts


def resume(place, steps=10):
    """Half of a training, then the rest by resume=true."""
    half, whole = steps_of(place, steps), 2 * steps_of(place, steps)
    fit_only = ["eval.after_fit=false", f"checkpoint.every_steps={half}"]
    text, _ = watched(
        place, "half", "train.py", *run_keys(place, "r", "bf16-mixed", half), *fit_only
    )
    keys = [*run_keys(place, "r", "bf16-mixed", whole), *fit_only, "resume=true"]
    rest, facts = watched(place, "rest", "train.py", *keys)
    continued = f"continues from step {half}" in rest
    curve = losses(text) | losses(rest)
    met = continued and sorted(losses(rest)) == list(range(half + 1, whole + 1))
    return {"steps": [half, whole], "met": met, "losses": curve} | facts


def two_ranks(place, steps=6, limit=75):
    """Two processes of a pipeline share one device; their losses beside those of one process."""
    steps = steps_of(place, steps)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    pipeline = ["trainer.devices=1", "trainer.num_nodes=2", "trainer.strategy=layer_pipeline"]
    pipeline += ["strategy.timeout=40", "eval.after_fit=false"]
    keys = ["train.py", *run_keys(place, "two", "32-true", steps), *pipeline]
    env = TWO_MACHINES | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        start(place, f"two-{r}", *keys, **env, NODE_RANK=str(r), NCCL_HOSTID=f"host{r}")
        for r in range(2)
    ]
    try:
        texts = [rank.finish(limit) for rank in ranks]
    finally:
        for rank in ranks:
            rank.process.kill()
    alone, _ = watched(
        place,
        "one",
        "train.py",
        *run_keys(place, "one", "32-true", steps),
        "eval.after_fit=false",
    )
    two, one = losses("\n".join(texts)), losses(alone)
    differences = {f"step {n}": abs(two[n] - loss) / abs(loss) for n, loss in one.items()}
    # Three digits are printed.
    return {"two": two, "one": one, **within(differences, 5e-3)}


def gpu_tests(place, limit=120):
    """The tests that are marked gpu, of the files that have one: other files may import packages
    that are not here."""
    tests = sorted((ROOT / "tests").rglob("test_*.py"))
    files = [str(file) for file in tests if "pytest.mark.gpu" in file.read_text("utf-8")]
    pytest = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files]
    # Another program's plugins are none of ours.
    text = start(place, "tests", *pytest, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1").finish(limit)
    return {"files": len(files), "summary": text.strip().splitlines()[-1]}
