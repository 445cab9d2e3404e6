"""Law 7: a run that is killed anywhere and resumed ends bit for bit as if it had never been
killed."""

import os
import random
import shutil
import signal

import lightning
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from comet_pl import build
from comet_pl.config.load import load
from comet_pl.errors import TrainingStopped
from comet_pl.experiment.checkpoint import checkpoint_content
from comet_pl.experiment.run_folder import plan_run
from data.batches import ResumableLoader, pad_rows, validation_loader
from tests.support.tiny_runs import TINY, same_run

SHORT = [*TINY, "trainer.log_every_n_steps=1", "eval.after_fit=false", "train.warmup_steps=3"]
slow = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def undrawn():
    """Figures are made and written, but blank: drawing takes most of a tiny run's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "draw", lambda self, renderer: None)
        yield


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


class At(lightning.Callback):
    """Calls a function with the trainer in a hook at a step."""

    def __init__(self, step, hook, function):
        self.step, self.function = step, function
        setattr(self, hook, self.call)

    def call(self, trainer, *_):
        if trainer.global_step == self.step:
            self.function(trainer)


def kill(step, hook="on_train_batch_start"):
    def fall(trainer):
        raise SystemExit

    return At(step, hook, fall)


def copy(step, hook, target):
    """Copies the run's folder as SIGKILL would leave it."""
    path = target / f"{step}{hook}"
    return At(step, hook, lambda trainer: shutil.copytree(trainer.default_root_dir, path))


class Noise(lightning.Callback):
    """Disturbs the weights by all random numbers there are, as dropout would."""

    def on_train_batch_start(self, trainer, module, *_):
        weight = module.model.lm_head.weight
        with torch.no_grad():
            weight.add_(1e-3 * (torch.rand(weight.shape) + random.random() + np.random.random()))


class Seen(lightning.Callback):
    """The rows of each training or validation batch."""

    def __init__(self, hook="on_train_batch_start"):
        self.rows = []
        setattr(self, hook, self.add)

    def add(self, trainer, module, batch, *_):
        self.rows.append(batch["input_ids"].tolist())


@pytest.fixture(scope="module")
def tokenizer():
    return build.build_tokenizer(load(["data.kind=passkey", "backbone.vocab_size=300"]))


@pytest.fixture(scope="module")
def fit(tokenizer):
    """Trains in this process; returns the run's folder."""

    def fit(root, name, *keys, resume=False, first=(), passkeys=False):
        where = [f"run.root={root}", f"run.name={name}", f"resume={str(resume).lower()}"]
        config = load([*where, *SHORT, "trainer.max_steps=10", *keys])
        run = plan_run(config)
        lightning.seed_everything(config.seed, verbose=False)
        model = build.build_model(config, tokenizer)
        content = checkpoint_content(run.config, tokenizer, model)
        trainer = build.build_trainer(config, run, content)
        trainer.callbacks[:] = [*first, *trainer.callbacks, Noise()]
        run.create()
        data = build.build_data(config, tokenizer) if passkeys else Sentences()
        module = build.build_module(config, model)
        try:
            trainer.fit(module, datamodule=data, ckpt_path=run.checkpoint)
        except SystemExit:
            for logger in trainer.loggers:
                logger.experiment.close()  # a thread; the events so far are on disk anyway
        return run.path

    return fit


COMMON = ["checkpoint.every_steps=1", "data.train_length=64", "data.length_schedule=null"]
BY_STEPS = [*COMMON, "trainer.val_check_interval=3"]
BY_EPOCHS = [*COMMON, "trainer.val_check_interval=1.0"]  # after steps 4 and 8
STEP_MOMENTS = [(step, "on_train_batch_start") for step in range(1, 10)]
STEP_MOMENTS += [(3, "on_validation_start"), (6, "on_validation_end"), (8, "on_train_batch_end")]
EPOCH_MOMENTS = [(step, "on_train_batch_start") for step in (4, 5)]
EPOCH_MOMENTS += [(4, "on_validation_start")]


def straight(fit, factory, keys, moments):
    """(a run's folder, the folder of its copies at these moments)."""
    root = factory.mktemp("straight")
    copies = [copy(*moment, root / "copies") for moment in moments]
    return fit(root, "run", *keys, first=copies), root / "copies"


@pytest.fixture(scope="module")
def steps(fit, tmp_path_factory):
    return straight(fit, tmp_path_factory, BY_STEPS, STEP_MOMENTS)


@pytest.fixture(scope="module")
def epochs(fit, tmp_path_factory):
    return straight(fit, tmp_path_factory, BY_EPOCHS, EPOCH_MOMENTS)


@pytest.fixture(scope="module")
def by_steps(steps):
    return steps[0]


def resumed(fit, copies, root, keys, step, hook):
    shutil.copytree(copies / f"{step}{hook}", root / "passkey" / "run")
    return fit(root, "run", *keys, resume=True)


@pytest.mark.parametrize(
    ("step", "hook"),
    [pytest.param(*one, marks=[slow] * (one[0] in (2, 3, 5, 6, 7))) for one in STEP_MOMENTS],
)
def test_killed_at_any_moment(steps, fit, tmp_path, step, hook):
    same_run(steps[0], resumed(fit, steps[1], tmp_path, BY_STEPS, step, hook))


@pytest.mark.parametrize(("step", "hook"), EPOCH_MOMENTS)
def test_killed_where_epoch_and_validation_meet(epochs, fit, tmp_path, step, hook):
    same_run(epochs[0], resumed(fit, epochs[1], tmp_path, BY_EPOCHS, step, hook))


def test_killed_between_checkpoints_and_twice(by_steps, fit, tmp_path):
    keys = [*BY_STEPS, "checkpoint.every_steps=4"]
    fit(tmp_path, "run", *keys, first=[kill(7)])
    fit(tmp_path, "run", *keys, first=[kill(6)], resume=True)
    same_run(by_steps, fit(tmp_path, "run", *keys, resume=True))


def test_the_best_so_far_is_remembered(fit, tmp_path):
    # The loss falls: the first validation stays the best.
    keys = [*BY_STEPS, "checkpoint.mode=max", "trainer.max_steps=7"]
    whole = fit(tmp_path, "straight", *keys, first=[copy(5, "on_train_batch_start", tmp_path)])
    assert torch.load(whole / "checkpoints" / "best.ckpt", weights_only=True)["global_step"] == 3
    same_run(whole, resumed(fit, tmp_path, tmp_path, keys, 5, "on_train_batch_start"))


@pytest.mark.parametrize(
    ("parameters", "recompute"),
    [
        pytest.param("memory", "none", marks=slow),
        pytest.param("lora", "none", marks=slow),
        ("memory+lora", "none"),
        ("lora", "chunk"),
    ],
)
def test_killed_while_a_part_learns(fit, tmp_path, parameters, recompute):
    keys = [f"train.parameters={parameters}", f"train.recompute={recompute}"]
    keys += ["train.lora_dropout=0.2"] * ("lora" in parameters)
    keys = [*BY_STEPS, "trainer.max_steps=4", *keys]
    whole = fit(tmp_path, "straight", *keys, first=[copy(2, "on_train_batch_start", tmp_path)])
    same_run(whole, resumed(fit, tmp_path, tmp_path, keys, 2, "on_train_batch_start"))


def test_killed_before_the_first_checkpoint(by_steps, fit, tmp_path):
    keys = [*BY_STEPS, "checkpoint.every_steps=null"]
    fit(tmp_path, "run", *keys, first=[kill(2)])
    same_run(by_steps, fit(tmp_path, "run", *keys, resume=True))


def test_resuming_a_finished_run_changes_nothing(by_steps, fit, tmp_path):
    path = shutil.copytree(by_steps, tmp_path / "passkey" / "run")
    before = (path / "checkpoints" / "last.ckpt").read_bytes()
    fit(tmp_path, "run", *BY_STEPS, resume=True)
    assert (path / "checkpoints" / "last.ckpt").read_bytes() == before
    same_run(by_steps, path)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=slow)])
def test_a_finished_run_that_grows_reads_on_where_it_stopped(fit, tmp_path, workers):
    keys = [*COMMON, "data.batch_size=2", "data.length_schedule=[[0,32],[4,40],[8,64]]"]
    keys += [f"data.num_workers={workers}"]
    whole, begun, grown = Seen(), Seen(), Seen()
    fit(tmp_path, "straight", *keys, first=[whole], passkeys=True)
    fit(tmp_path, "run", *keys, "trainer.max_steps=6", first=[begun], passkeys=True)
    fit(tmp_path, "run", *keys, first=[grown], resume=True, passkeys=True)
    assert begun.rows == whole.rows[:6]
    assert grown.rows == whole.rows[6:]
    assert [len(rows[0]) for rows in grown.rows] == [40, 40, 64, 64]


def test_a_limited_validation_reads_the_same_batches_each_time(fit, tmp_path):
    seen = Seen("on_validation_batch_start")
    fit(tmp_path, "run", *BY_STEPS, "trainer.limit_val_batches=1", first=[seen])
    assert seen.rows == [Sentences().batch([7, 8])["input_ids"].tolist()] * 3


# ---- signals


@pytest.mark.parametrize(
    ("number", "step", "hook", "saved"),
    [
        (signal.SIGINT, 4, "on_before_optimizer_step", 5),
        (signal.SIGTERM, 6, "on_validation_start", 6),
        (signal.SIGTERM, 7, "on_train_batch_start", 8),  # the last batch of an epoch
        (signal.SIGTERM, 9, "on_before_optimizer_step", 10),  # the last step
    ],
)
def test_signals_stop_between_two_steps_with_a_checkpoint(
    by_steps, fit, tmp_path, number, step, hook, saved
):
    keys = [*BY_STEPS, "checkpoint.every_steps=null"]
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    press = At(step, hook, lambda trainer: os.kill(os.getpid(), number))
    with pytest.raises(TrainingStopped) as stopped:
        fit(tmp_path, "run", *keys, first=[press])
    assert (stopped.value.number, stopped.value.step) == (number, saved)
    last = tmp_path / "passkey" / "run" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == saved
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers
    same_run(by_steps, fit(tmp_path, "run", *keys, resume=True))
