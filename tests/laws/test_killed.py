"""Law 7 in processes of their own: whatever ends a training at a random moment, it goes on bit for
bit as if nothing had ended it."""

import random
import resource
import runpy
import signal
import subprocess
import time

import pytest

from tests.support.tiny_data import write_events, write_scrolls, write_texts, write_traces
from tests.support.tiny_runs import ROOT, SIGNALS, TINY, at_step, command, same_run

slow = pytest.mark.slow
FULL_DISK = "full disk"

RUN = [*TINY, "trainer.log_every_n_steps=1", "eval.after_fit=false", "train.warmup_steps=3"]
RUN += ["trainer.max_steps=24", "trainer.val_check_interval=5", "checkpoint.every_steps=2"]
PASSKEY = [*RUN, "train.accumulate=2", "train.bptt_chunks=2"]
PASSKEY += """
data.train_length=96 data.length_schedule=[[0,48],[8,96]] data.batch_size=2 data.val_depths=2
data.val_examples=1
""".split()
SCROLLS = [*RUN, "conf=scrolls", "data.max_length=120", "data.batch_size=2", "data.val_examples=3"]
PACKED = ["data.packing=documents", "data.chunk_plan=mixture", "data.dynamic_stride=true"]
LAYOUTS = {
    "cached": ["data.max_length=240", *PACKED],
    "streamed": ["data.streaming=true", "data.shuffle_window=5"],
}
BEHAVIOR = ["data.train_length=200", "data.length_schedule=[[0,120],[6,200]]", "data.batch_size=3"]
AGENT = ["data.val_share=0.3", "data.max_length=400", "data.packing=documents", "data.batch_size=2"]
BOOKS = ["data.val_share=0.2", "data.max_length=120", "data.batch_size=2"]
# conf -> the rows that it reads, and its keys
OTHERS = {
    "agent": (write_traces, AGENT),
    "books": (write_texts, BOOKS),
    "user_behavior": (write_events, [*BEHAVIOR, "backbone.num_key_value_heads=2"]),
}
CONFS = ["passkey", "scrolls", *OTHERS]


def keys_of(conf, folder, layout="cached"):
    if conf == "passkey":
        return PASSKEY
    cache = [f"data.cache={folder / 'cache'}"]
    if conf == "scrolls":
        rows = write_scrolls(folder / "rows")
        return [*SCROLLS, f"data.root={rows}", *cache, *LAYOUTS[layout]]
    write, more = OTHERS[conf]
    keys = [*RUN, f"conf={conf}", f"data.root={write(folder / 'rows')}", *more]
    keys += cache * (conf in ("agent", "books")) + LAYOUTS[layout] * (conf == "books")
    return [*keys, "data.val_examples=3"]


def fill_disk(process):
    """No file may grow beyond a kB, as on a disk that is full from now on."""
    _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1024, hard))


def train_and_end(root, name, step, delay, fault, *keys):
    """Starts train.py and ends it `delay` seconds after it has shown a step; returns whether it
    was still running."""
    argv = command(root, name, *keys)
    with at_step(argv, step, stderr=subprocess.STDOUT) as process:
        time.sleep(delay)
        running = process.poll() is None
        if running and fault == FULL_DISK:
            fill_disk(process)
        elif running:
            process.send_signal(fault)
        said = process.communicate()[0]
    assert "Traceback" not in said, said
    if fault == signal.SIGKILL:
        allowed = -fault
    elif fault == FULL_DISK:
        allowed = 2
        assert process.returncode == 0 or "make room" in said.splitlines()[-1], said
    else:
        allowed = 128 + fault
    assert process.returncode in (0, allowed), said  # 0: it was at its end already
    return running


def ended_equals_straight(tmp_path, conf, keys, *more, fault=signal.SIGKILL, times=1):
    """Ends a run at random moments, resumes it after each, and compares it with one that was left
    alone."""
    draw, ended = random.Random(), tmp_path / conf / "ended"
    train_here = runpy.run_path(str(ROOT / "train.py"))["main"]
    train_here([f"run.root={tmp_path}", "run.name=straight", *keys])
    keys = [*keys, *more, "resume=true"]
    while times:
        moment = draw.randint(1, 21), draw.uniform(0, 0.05)
        times -= train_and_end(tmp_path, "ended", *moment, fault, *keys)
        if not times or not (ended / "checkpoints" / "last.ckpt").exists():
            continue
        if draw.random() < 0.5:  # start anew now and then: a resumed run has fewer moments left
            ended.rename(ended.with_name(f"old{times}"))
    train_here([f"run.root={tmp_path}", "run.name=ended", *keys])
    same_run(tmp_path / conf / "straight", ended)


def test_sigkill_passkey(tmp_path):
    ended_equals_straight(tmp_path, "passkey", PASSKEY)


@slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("conf", CONFS)
def test_sigkill_five_times(tmp_path, conf, workers):
    keys = keys_of(conf, tmp_path)
    ended_equals_straight(tmp_path, conf, keys, f"data.num_workers={workers}", times=5)


@slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("conf", ["scrolls", "books"])
def test_sigkill_streamed_five_times(tmp_path, conf, workers):
    keys = keys_of(conf, tmp_path, "streamed")
    ended_equals_straight(tmp_path, conf, keys, f"data.num_workers={workers}", times=5)


@slow
@pytest.mark.parametrize("fault", [*SIGNALS, FULL_DISK])
@pytest.mark.parametrize("conf", CONFS)
def test_other_ends_five_times(tmp_path, conf, fault):
    # A full disk leaves room in shared memory, which this one would not.
    workers = 2 * (conf in ("passkey", "agent") and fault != FULL_DISK)
    keys = keys_of(conf, tmp_path)
    more = f"data.num_workers={workers}"
    ended_equals_straight(tmp_path, conf, keys, more, fault=fault, times=5)


@slow
def test_sigkill_scrolls_on_real_rows(tmp_path, shared_data):
    rows = [f"data.root={shared_data / 'scrolls_small'}", f"data.cache={tmp_path / 'cache'}"]
    ended_equals_straight(tmp_path, "scrolls", [*SCROLLS, *rows, "data.max_length=1024"])
