"""Law 7: a run that is killed anywhere and resumed ends as if it had never been killed, bit for bit."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import threading
import time

import lightning
import numpy as np
import pytest
import torch

from comet_pl import build
from comet_pl.config.load import load
from comet_pl.errors import TrainingStopped
from comet_pl.experiment.checkpoint import checkpoint_content
from comet_pl.experiment.run_folder import plan_run
from data.batches import ResumableLoader, pad_rows, validation_loader
from tests.support.tiny_data import write_events, write_scrolls, write_traces
from tests.support.tiny_runs import ROOT, TINY, command, same_run, train

SHORT = [*TINY, "trainer.log_every_n_steps=1", "eval.after_fit=false", "train.warmup_steps=3"]


# ---- every step of a run with several epochs, in this process


class Sentences(lightning.LightningDataModule):
    """7 ragged rows, 2 a batch: 4 batches an epoch."""

    def train_dataloader(self):
        return ResumableLoader(range(7), 2, self.batch, seed=5)

    def val_dataloader(self):
        return validation_loader(range(7, 10), 2, self.batch)

    def batch(self, numbers):
        rows = [torch.arange(number, number * 9 % 41 + 20) % 250 + 4 for number in numbers]
        return pad_rows([(row.tolist(), row.tolist()) for row in rows], 0)


class Kill(lightning.Callback):
    """Ends the training as SIGKILL would: whatever was in flight is lost."""

    def __init__(self, step, hook):
        self.step, self.hook = step, hook
        setattr(self, hook, self.fall)

    def fall(self, trainer, *_):
        if trainer.global_step == self.step:
            raise SystemExit


class Noise(lightning.Callback):
    """Disturbs the weights by all random numbers there are, as dropout would."""

    def on_train_batch_start(self, trainer, module, *_):
        weight = module.model.lm_head.weight
        with torch.no_grad():
            weight.add_(1e-3 * (torch.rand(weight.shape) + random.random() + np.random.random()))


class Seen(lightning.Callback):
    """The rows of each training step."""

    def __init__(self):
        self.rows = []

    def on_train_batch_start(self, trainer, module, batch, number):
        self.rows.append(batch["input_ids"].tolist())


def fit(root, name, *keys, kill=None, resume=False, more=(), passkeys=False):
    config = load(
        [
            f"run.root={root}",
            f"run.name={name}",
            f"resume={str(resume).lower()}",
            *SHORT,
            "trainer.max_steps=10",
            *keys,
        ]
    )
    run = plan_run(config)
    for events in (
        run.path.glob("events.*") if resume else ()
    ):  # TensorBoard reads files by the second in their names
        time.sleep(max(0, int(events.name.split(".")[3]) + 1.01 - time.time()))
    lightning.seed_everything(config.seed, verbose=False)
    tokenizer = build.build_tokenizer(load(["data.kind=passkey", "backbone.vocab_size=300"]))
    model = build.build_model(config, tokenizer)
    trainer = build.build_trainer(config, run, checkpoint_content(run.config, tokenizer, model))
    trainer.callbacks.append(Noise())
    if kill:
        trainer.callbacks.insert(0, Kill(*kill))
    trainer.callbacks[:0] = more
    run.create()
    data = build.build_data(config, tokenizer) if passkeys else Sentences()
    try:
        trainer.fit(build.build_module(config, model), datamodule=data, ckpt_path=run.checkpoint)
    except SystemExit:
        for logger in trainer.loggers:
            logger.experiment.close()  # a thread; the events so far are on disk anyway
    return run.path


COMMON = ["checkpoint.every_steps=1", "data.train_length=64", "data.length_schedule=null"]
BY_STEPS = [*COMMON, "trainer.val_check_interval=3"]
BY_EPOCHS = [*COMMON, "trainer.val_check_interval=1.0"]  # after steps 4 and 8


@pytest.fixture(scope="module")
def by_steps(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("straight"), "run", *BY_STEPS)


@pytest.fixture(scope="module")
def by_epochs(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("straight"), "run", *BY_EPOCHS)


@pytest.mark.parametrize("step", range(1, 10))
def test_killed_after_any_step(by_steps, tmp_path, step):
    fit(tmp_path, "run", *BY_STEPS, kill=(step, "on_train_batch_start"))
    same_run(by_steps, fit(tmp_path, "run", *BY_STEPS, resume=True))


@pytest.mark.parametrize(
    ("step", "hook"),
    [(3, "on_validation_start"), (6, "on_validation_end"), (8, "on_train_batch_end")],
)
def test_killed_before_the_step_is_saved(by_steps, tmp_path, step, hook):
    fit(tmp_path, "run", *BY_STEPS, kill=(step, hook))
    same_run(by_steps, fit(tmp_path, "run", *BY_STEPS, resume=True))


@pytest.mark.parametrize(
    ("step", "hook"),
    [(4, "on_train_batch_start"), (4, "on_validation_start"), (5, "on_train_batch_start")],
)
def test_killed_where_epoch_and_validation_meet(by_epochs, tmp_path, step, hook):
    fit(tmp_path, "run", *BY_EPOCHS, kill=(step, hook))
    same_run(by_epochs, fit(tmp_path, "run", *BY_EPOCHS, resume=True))


def test_killed_between_checkpoints_and_twice(by_steps, tmp_path):
    keys = [*BY_STEPS, "checkpoint.every_steps=4"]
    fit(tmp_path, "run", *keys, kill=(7, "on_train_batch_start"))
    fit(tmp_path, "run", *keys, kill=(6, "on_train_batch_start"), resume=True)
    same_run(by_steps, fit(tmp_path, "run", *keys, resume=True))


def test_the_best_so_far_is_remembered(tmp_path):
    keys = [*BY_STEPS, "checkpoint.mode=max"]  # the loss falls: the first validation stays the best
    straight = fit(tmp_path, "straight", *keys)
    assert torch.load(straight / "checkpoints" / "best.ckpt", weights_only=True)["global_step"] == 3
    fit(tmp_path, "run", *keys, kill=(5, "on_train_batch_start"))
    same_run(straight, fit(tmp_path, "run", *keys, resume=True))


@pytest.mark.parametrize(
    ("parameters", "recompute"),
    [("memory", "none"), ("lora", "none"), ("memory+lora", "none"), ("lora", "chunk")],
)
def test_killed_while_a_part_learns(tmp_path, parameters, recompute):
    keys = [
        *BY_STEPS,
        "trainer.max_steps=4",
        f"train.parameters={parameters}",
        f"train.recompute={recompute}",
    ]
    keys += ["train.lora_dropout=0.2"] * ("lora" in parameters)
    straight = fit(tmp_path, "straight", *keys)
    fit(tmp_path, "run", *keys, kill=(2, "on_train_batch_start"))
    same_run(straight, fit(tmp_path, "run", *keys, resume=True))


def test_killed_before_the_first_checkpoint(by_steps, tmp_path):
    keys = [*BY_STEPS, "checkpoint.every_steps=null"]
    fit(tmp_path, "run", *keys, kill=(2, "on_train_batch_start"))
    same_run(by_steps, fit(tmp_path, "run", *keys, resume=True))


def test_resuming_a_finished_run_changes_nothing(by_steps, tmp_path):
    path = fit(tmp_path, "run", *BY_STEPS)
    before = (path / "checkpoints" / "last.ckpt").read_bytes()
    fit(tmp_path, "run", *BY_STEPS, resume=True)
    assert (path / "checkpoints" / "last.ckpt").read_bytes() == before
    same_run(by_steps, path)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_finished_run_that_grows_reads_on_where_it_stopped(tmp_path, workers):
    keys = [
        *COMMON,
        "data.batch_size=2",
        "data.length_schedule=[[0,32],[4,40],[8,64]]",
        f"data.num_workers={workers}",
    ]
    straight, begun, grown = Seen(), Seen(), Seen()
    fit(tmp_path, "straight", *keys, more=[straight], passkeys=True)
    fit(tmp_path, "run", *keys, "trainer.max_steps=6", more=[begun], passkeys=True)
    fit(tmp_path, "run", *keys, more=[grown], resume=True, passkeys=True)
    assert begun.rows == straight.rows[:6]
    assert grown.rows == straight.rows[6:]
    assert [len(rows[0]) for rows in grown.rows] == [40, 40, 64, 64]


def test_a_limited_validation_reads_the_same_batches_each_time(tmp_path):
    class SeenInValidation(lightning.Callback):
        rows: list = []

        def on_validation_batch_start(self, trainer, module, batch, *_):
            self.rows.append(batch["input_ids"].tolist())

    seen = SeenInValidation()
    fit(tmp_path, "run", *BY_STEPS, "trainer.limit_val_batches=1", more=[seen])
    assert seen.rows == [Sentences().batch([7, 8])["input_ids"].tolist()] * 3


# ---- signals


class Press(lightning.Callback):
    """Sends this process a signal in the middle of a step or of a validation."""

    def __init__(self, number, step, hook):
        self.number, self.step = number, step
        setattr(self, hook, self.send)

    def send(self, trainer, *_):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(
    ("number", "step", "hook", "saved"),
    [
        (signal.SIGINT, 4, "on_before_optimizer_step", 5),
        (signal.SIGTERM, 6, "on_validation_start", 6),
        (signal.SIGTERM, 7, "on_train_batch_start", 8),  # the last batch of an epoch
    ],
)
def test_signals_stop_between_two_steps_with_a_checkpoint(
    by_steps, tmp_path, capsys, number, step, hook, saved
):
    keys = [*BY_STEPS, "checkpoint.every_steps=null"]
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(TrainingStopped) as stopped:
        fit(tmp_path, "run", *keys, more=[Press(number, step, hook)])
    assert (stopped.value.number, stopped.value.step) == (number, saved)
    assert (
        torch.load(tmp_path / "passkey" / "run" / "checkpoints" / "last.ckpt", weights_only=True)[
            "global_step"
        ]
        == saved
    )
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers
    same_run(by_steps, fit(tmp_path, "run", *keys, resume=True))


# ---- SIGKILL, in processes of their own


def train_and_kill(root, name, step, delay, *keys):
    """Starts train.py and kills it `delay` seconds after it has shown a step; returns whether it was still running."""
    process = subprocess.Popen(
        command(root, name, *keys),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    try:
        for line in process.stdout:
            shown = re.match(r"step (\d+)/", line)
            if shown and int(shown[1]) >= step:
                time.sleep(delay)
                break
        killed = process.poll() is None
        process.kill()
    finally:
        watchdog.cancel()
        process.wait()
        process.stdout.close()
    return killed


PASSKEY = [
    *SHORT,
    "data.train_length=96",
    "data.length_schedule=[[0,48],[8,96]]",
    "data.batch_size=2",
    "data.val_depths=2",
    "data.val_examples=1",
    "train.accumulate=2",
    "train.bptt_chunks=2",
    "trainer.max_steps=24",
    "trainer.val_check_interval=5",
    "checkpoint.every_steps=2",
]
SCROLLS = [
    *SHORT,
    "conf=scrolls",
    "data.max_length=120",
    "data.batch_size=2",
    "data.val_examples=3",
    "trainer.max_steps=24",
    "trainer.val_check_interval=5",
    "checkpoint.every_steps=2",
]


def killed_equals_straight(tmp_path, straight, conf, *keys, kills=1):
    """Kills a run at random moments, resumes it after each, and compares it with one that was left alone."""
    draw = random.Random()
    while kills:
        kills -= train_and_kill(
            tmp_path, "killed", draw.randint(1, 21), draw.uniform(0, 0.05), "resume=true", *keys
        )
        if not kills or not (tmp_path / conf / "killed" / "checkpoints" / "last.ckpt").exists():
            continue
        if draw.random() < 0.5:  # begin anew now and then: a resumed run has fewer moments left
            os.rename(tmp_path / conf / "killed", tmp_path / conf / f"old{kills}")
    train(tmp_path, "killed", "resume=true", *keys)
    same_run(straight, tmp_path / conf / "killed")


def test_sigkill_passkey(tmp_path):
    train(tmp_path, "straight", *PASSKEY)
    killed_equals_straight(tmp_path, tmp_path / "passkey" / "straight", "passkey", *PASSKEY)


LAYOUTS = {
    "cached": [
        "data.packing=documents",
        "data.max_length=240",
        "data.chunk_plan=mixture",
        "data.dynamic_stride=true",
    ],
    "streamed": ["data.streaming=true", "data.shuffle_window=5"],
}


def scrolls(folder, layout, *more):
    return [
        *SCROLLS,
        f"data.root={write_scrolls(folder / 'rows')}",
        f"data.cache={folder / 'cache'}",
        *LAYOUTS[layout],
        *more,
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sigkill_scrolls(tmp_path, layout):
    keys = scrolls(tmp_path, layout)
    train(tmp_path, "straight", *keys)
    killed_equals_straight(tmp_path, tmp_path / "scrolls" / "straight", "scrolls", *keys)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_sigkill_passkey_five_times(tmp_path, workers):
    keys = [*PASSKEY, f"data.num_workers={workers}"]
    train(tmp_path, "straight", *PASSKEY)
    killed_equals_straight(tmp_path, tmp_path / "passkey" / "straight", "passkey", *keys, kills=5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("workers", [0, 2])
def test_sigkill_scrolls_five_times(tmp_path, workers, layout):
    keys = scrolls(tmp_path, layout)
    train(tmp_path, "straight", *keys)
    killed_equals_straight(
        tmp_path,
        tmp_path / "scrolls" / "straight",
        "scrolls",
        *keys,
        f"data.num_workers={workers}",
        kills=5,
    )


OTHERS = {
    "agent": (
        write_traces,
        [
            "data.val_share=0.3",
            "data.max_length=400",
            "data.packing=documents",
            "data.batch_size=2",
        ],
    ),
    "user_behavior": (
        write_events,
        [
            "data.train_length=200",
            "data.length_schedule=[[0,120],[6,200]]",
            "data.batch_size=3",
            "backbone.num_key_value_heads=2",
        ],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("conf", OTHERS)
def test_sigkill_others_five_times(tmp_path, conf, workers):
    write, more = OTHERS[conf]
    keys = [
        *SHORT,
        f"conf={conf}",
        f"data.root={write(tmp_path / 'rows')}",
        "trainer.max_steps=24",
        "trainer.val_check_interval=5",
    ]
    keys += ["data.val_examples=3", "checkpoint.every_steps=2", *more]
    keys += [f"data.cache={tmp_path / 'cache'}"] if conf == "agent" else []
    train(tmp_path, "straight", *keys)
    killed_equals_straight(
        tmp_path, tmp_path / conf / "straight", conf, *keys, f"data.num_workers={workers}", kills=5
    )


@pytest.mark.slow
def test_sigkill_scrolls_on_real_rows(tmp_path, shared_data):
    keys = [
        *SCROLLS,
        f"data.root={shared_data / 'scrolls_small'}",
        "data.max_length=1024",
        f"data.cache={tmp_path / 'cache'}",
    ]
    train(tmp_path, "straight", *keys)
    killed_equals_straight(tmp_path, tmp_path / "scrolls" / "straight", "scrolls", *keys)
