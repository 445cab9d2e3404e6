"""The commands themselves, each a process: training, evaluation, resumption, tests, two ranks."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu.measure import Bench, Measurement
from benchmarks.shared.options import ROOT


def plan(bench: Bench) -> list[Measurement]:
    return [
        Measurement("train.py, bf16-mixed", 30, train, ("bf16-mixed",)),
        Measurement("eval.py of it", 20, evaluate),
        Measurement("gpu-marked tests", 40, tests, (), True),
        Measurement("two ranks on one GPU", 60, two_ranks, (), True),
        Measurement("resume", 45, resume),
        Measurement("train.py, 32-true", 30, train, ("32-true",)),
        Measurement(
            "train.py, train.compile", 90, train, ("bf16-mixed", "train.compile=true"), True
        ),
    ]


def folder(bench) -> Path:
    """Of this script's runs; not in --out, where only results come back from."""
    return Path(tempfile.gettempdir()) / f"comet_gpu_{os.getppid()}"


def keys(bench, name, precision="bf16-mixed", steps=20):
    kind = "gpu" if bench.cuda else "cpu"
    found = [f"run.root={folder(bench)}", f"run.name={name}", f"trainer.accelerator={kind}"]
    found += [f"trainer.precision={precision}", f"trainer.max_steps={steps}"]
    found += "trainer.val_check_interval=10 data.length_schedule=null eval.lengths=[1024]".split()
    found += "eval.examples=1 trainer.log_every_n_steps=5".split()
    tiny = "data.train_length=128 data.batch_size=2 eval.lengths=[128] eval.depths=1".split()
    return found + (tiny if bench.tiny else [])


def start(*argv, env=None):
    paths = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | (env or {})
    said = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *argv], cwd=ROOT, env=env, **said)


def finish(process, limit):
    """Its status and last lines; killed at its limit."""
    try:
        said, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()
        said = process.communicate()[0] + f"\nkilled after {limit} s"
    lines = said.strip().splitlines()
    return {"status": process.returncode, "end": lines[-4:], "right": process.returncode == 0}


def train(bench, precision, *more):
    name = "-".join([precision, *more]).replace("=", "-")
    return finish(start("train.py", *keys(bench, name, precision), *more), 150)


def evaluate(bench):
    """With the weights of the first training, in its precision."""
    run = folder(bench) / "passkey" / "bf16-mixed"
    return finish(start("eval.py", f"ckpt={run}", f"out={folder(bench) / 'eval'}"), 60)


def resume(bench):
    first = keys(bench, "resumed", steps=10), "checkpoint.every_steps=10"
    finish(start("train.py", *first[0], "eval.after_fit=false", first[1]), 60)
    more = "eval.after_fit=false", "resume=true"
    return finish(start("train.py", *keys(bench, "resumed"), *more), 60)


def tests(bench):
    return finish(start("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"), 60)


def two_ranks(bench):
    """NCCL between two processes of one GPU, as two nodes: it refuses two ranks of one host on one
    device. Whether it works is not known; the losses are to be those of one rank."""
    more = {
        "NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_SOCKET_IFNAME": "lo",
        "NCCL_DEBUG": "WARN", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577",
    }  # fmt: skip
    argv = [*keys(bench, "two", "32-true", 6), "trainer.devices=1", "trainer.num_nodes=2"]
    argv += ["trainer.strategy=layer_pipeline", "strategy.timeout=40", "eval.after_fit=false"]
    nodes = [{"NODE_RANK": str(r), "NCCL_HOSTID": f"host{r}"} for r in range(2)]
    ranks = [start("train.py", *argv, env=more | node) for node in nodes]
    both = [finish(rank, 75) for rank in ranks]
    return {"ranks": both, "right": all(rank["right"] for rank in both)}
