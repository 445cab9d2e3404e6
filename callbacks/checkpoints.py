"""checkpoints/last.ckpt and best.ckpt, from which a killed run resumes as if never killed.

Lightning's ModelCheckpoint does not do: under manual optimization it never saves by time, it saves
between a step and its validation (a resumed run then leaves that validation out), and on Ctrl-C it
may save half a step.
"""

import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.plugins.io import TorchCheckpointIO

from comet_pl.config.schema import CheckpointConfig
from comet_pl.errors import TrainingStopped, UserErrorOnAllRanks, fault_of, is_disk_fault
from comet_pl.experiment.checkpoint import check_resumable, read_checkpoint
from comet_pl.files import replacing

STOPS = (signal.SIGINT, signal.SIGTERM)
# Of terminals and schedulers. Who has told the process to ignore one, as nohup does, is obeyed.
SIGNALS = (*STOPS, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
# Seconds: a scheduler, or a parent that passes it on, may send the same one twice at once.
ONE_SIGNAL = 0.5


class RunCheckpoints(Checkpoint):
    """Writes last.ckpt by steps and by minutes, at the end of fit and on a signal (SIGNALS).

    best.ckpt is that of the best validation so far. Both are written between two steps, after the
    validation that belongs to the last one, and after the logged values.

    Args:
        folder: where they go.
        content: each checkpoint's key "comet", plain types.

    Raises:
        TrainingStopped: out of fit, after a signal.
        UserError: checkpoint.monitor is not among the logged values.
    """

    def __init__(self, folder: Path, settings: CheckpointConfig, content: dict[str, Any]):
        self.folder, self.settings, self.content = folder, settings, content
        self.best: float | None = None
        self.saved_step = -1
        self.saved_at = time.monotonic()
        self.signal: int | None = None
        self.stopped_by: int | None = None  # the signal that all ranks have heard of
        self.signalled_at = 0.0
        self.tells = True
        self.handlers: dict[int, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["comet"] = self.content

    def setup(self, trainer: lightning.Trainer, *_: Any, stage: str = "") -> None:
        """Lightning's own answer to a SLURM signal would save within a step, to another file."""
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment):
            environment.auto_requeue = False

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self.saved_step, self.saved_at = trainer.global_step, time.monotonic()
        self.tells = trainer.is_global_zero
        try:
            self.handlers = {
                number: signal.signal(number, self._on_signal)
                for number in SIGNALS
                if number in STOPS or signal.getsignal(number) != signal.SIG_IGN
            }
        # outside the main thread, signals are left to the program that runs it
        except ValueError:
            self.handlers = {}

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if not validation_follows(trainer):
            self._step_done(trainer)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._keep_best(trainer)
            self._step_done(trainer)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        # the data may end before max_steps
        if trainer.global_step > self.saved_step:
            self._save(trainer, "last.ckpt", must=True)
        if self.stopped_by:
            raise TrainingStopped(self.stopped_by, trainer.global_step)

    def on_exception(self, *_: Any) -> None:
        """Saves nothing: a step may be half done, or its batch read and lost."""
        self._restore_handlers()

    def teardown(self, *_: Any, stage: str = "") -> None:
        self._restore_handlers()

    def _step_done(self, trainer: lightning.Trainer) -> None:
        """Saves or stops after a step and its validation: only then the state is whole."""
        step, settings = trainer.global_step, self.settings
        due = step >= trainer.max_steps
        if settings.every_steps is not None:
            due |= step % settings.every_steps == 0
        if settings.every_minutes is not None:
            due |= time.monotonic() - self.saved_at >= 60 * settings.every_minutes
        number = self.signal
        # clocks and signals differ: if any rank wants to save or stop, all do
        if trainer.world_size > 1:
            due = trainer.strategy.reduce_boolean_decision(due, all=False)
            numbers = torch.tensor(number or 0, device=trainer.strategy.root_device)
            number = int(trainer.strategy.reduce(numbers, reduce_op="max")) or None
        ends = number is not None or step >= trainer.max_steps
        if (due or number) and step > self.saved_step:
            self._save(trainer, "last.ckpt", must=ends)
        self.stopped_by = number
        # After the last step what the other callbacks do at the end is still to come.
        if number and step < trainer.max_steps:
            raise TrainingStopped(number, step)

    def _keep_best(self, trainer: lightning.Trainer) -> None:
        monitor, metrics = self.settings.monitor, trainer.callback_metrics
        if monitor not in metrics:
            allowed = f"allowed: a logged value, {', '.join(sorted(metrics))}"
            raise UserErrorOnAllRanks(f"checkpoint.monitor: {monitor!r} given, {allowed}")
        value, sign = float(metrics[monitor]), 1 if self.settings.mode == "min" else -1
        if value == value and (self.best is None or sign * value < sign * self.best):
            before, self.best = self.best, value
            if not self._save(trainer, "best.ckpt", must=False):
                self.best = before

    def _save(self, trainer: lightning.Trainer, name: str, must: bool) -> bool:
        """Whether it is written. If not, as on a full disk, the training goes on and tries again
        when the next checkpoint is due; the former file stays.

        Args:
            must: it is the last chance.

        Raises:
            UserError: it must, and cannot; on all ranks.
        """
        # logged values must not be younger than the checkpoint
        for logger in trainer.loggers:
            logger.save()
        io = trainer.strategy.checkpoint_io
        assert isinstance(io, AtomicCheckpointIO)
        own = "-".join((*self.folder.parent.parts[-2:], name))
        io.spare = Path(tempfile.gettempdir(), own) if must else None
        trainer.save_checkpoint(self.folder / name)
        failed = io.failure is not None
        if trainer.world_size > 1:
            failed = trainer.strategy.reduce_boolean_decision(failed, all=False)
        step = trainer.global_step
        if failed or name == "last.ckpt":
            self.saved_at = time.monotonic()
        if failed:
            line = f"{self.folder / name}: step {step} cannot be saved: {io.failure}"
            if must:
                raise UserErrorOnAllRanks(f"{line}; {self._remedy(io, name)}")
            if self.tells:
                print(f"warning: {line}; goes on, and tries again", file=sys.stderr, flush=True)
            return False
        for logger in trainer.loggers:
            logger.after_save_checkpoint(self)  # type: ignore[arg-type]
        if name == "last.ckpt":
            self.saved_step = step
        return True

    def _remedy(self, io: "AtomicCheckpointIO", name: str) -> str:
        goes_on = "then resume=true goes on"
        if io.saved_in_spare:
            return f"it is in {io.spare}; make room and move it to {self.folder / name}, {goes_on}"
        stays = (
            f"that of step {self.saved_step} stays" if self.saved_step > 0 else "there is no other"
        )
        return f"{stays}; make room, {goes_on}"

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            if time.monotonic() - self.signalled_at > ONE_SIGNAL:
                raise KeyboardInterrupt
            return
        self.signal, self.signalled_at = number, time.monotonic()
        if self.tells:
            line = "stopping after this step, with a checkpoint (once more: at once, without)"
            print(f"\n{line}", flush=True)

    def _restore_handlers(self) -> None:
        for number, handler in self.handlers.items():
            # unless Lightning has put back what was there before its own
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self.handlers = {}


def validation_follows(trainer: lightning.Trainer) -> bool:
    """At the end of a training batch: whether a validation comes before the next one."""
    loop = trainer.fit_loop
    fetcher = loop._data_fetcher
    assert fetcher is not None
    return sum(trainer.num_val_batches) > 0 and loop.epoch_loop._should_check_val_fx(fetcher)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all; reads tensors and plain types only."""

    failure: str | None = None  # why the last one could not be written
    spare: Path | None = None  # where else it may go
    saved_in_spare = False

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Notes in `failure` what the file system refuses: only one rank meets it, and the others
        wait for it after this."""
        self.failure = self._write(checkpoint, Path(path))
        self.saved_in_spare = False
        if self.failure and self.spare:
            self.saved_in_spare = self._write(checkpoint, self.spare) is None

    def _write(self, checkpoint: dict[str, Any], path: Path) -> str | None:
        try:
            with replacing(path) as beside, open(beside, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except Exception as error:
            if not is_disk_fault(error):
                raise
            return fault_of(error)
        return None

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        checkpoint = read_checkpoint(Path(path))
        check_resumable(checkpoint, Path(path))
        return checkpoint
