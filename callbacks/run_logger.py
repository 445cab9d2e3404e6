"""TensorBoard events straight in the run's folder, and the configuration in them."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import yaml
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.tensorboard.summary import hparams

from comet_pl.config.load import to_dict
from comet_pl.config.schema import Config
from comet_pl.errors import fault_of, is_disk_fault
from comet_pl.experiment.run_folder import Run


class RunLogger(TensorBoardLogger):
    """Lightning's TensorBoard logger, writing to `folder` itself.

    Args:
        purge_step: earlier sessions' events from this step on are dropped; they come again, and no
            curve has them twice.
    """

    full = False  # the disk; until the next checkpoint events are dropped, and the training goes on

    def __init__(self, folder: Path, purge_step: int):
        age_events(folder)
        super().__init__(
            folder, name="", version="", default_hp_metric=False, purge_step=purge_step
        )

    @property
    def log_dir(self) -> str:
        return str(self._root_dir)

    @property
    def experiment(self) -> Any:
        """The writer of events."""
        if self.full:
            return Guarded(None, self._note)
        try:
            return Guarded(super().experiment, self._note)
        except OSError as error:
            self._note(error)
            return Guarded(None, self._note)

    @rank_zero_only
    def save(self) -> None:
        """Flushes; config.yaml makes Lightning's hparams.yaml superfluous."""
        self.experiment.flush()
        if not self.full:
            # It is written; a writer after this one drops nothing.
            self._kwargs["purge_step"] = None

    def after_save_checkpoint(self, checkpoint_callback: Checkpoint) -> None:
        """There is room again."""
        self.full = False

    def _note(self, error: Exception) -> None:
        self.full, self._experiment = True, None  # its thread has ended
        line = f"warning: {self.log_dir}: events cannot be written: {fault_of(error)}; goes on"
        print(line, file=sys.stderr, flush=True)


@rank_zero_only
def age_events(folder: Path) -> None:
    """Gives event files of this second, or of a clock that was ahead, earlier times in their names:
    TensorBoard reads files in the order of their names."""
    files = sorted(folder.glob("events.out.tfevents.*"))
    now = int(time.time())
    for number, file in enumerate(files):
        *head, stamp, host = file.name.split(".", 4)
        last = now - len(files) + number
        if stamp.isdecimal() and int(stamp) > last:
            file.rename(folder / ".".join([*head, f"{last:010}", host]))


class Guarded:
    """A writer that notes what a full disk refuses and goes on.

    Args:
        writer: None: everything is dropped.
    """

    def __init__(self, writer: Any, note: Callable[[Exception], None]):
        self._writer, self._note = writer, note

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._writer, name, None)
        if name == "file_writer":
            return Guarded(found, self._note)

        def call(*arguments: Any, **more: Any) -> Any:
            if found is None:
                return None
            try:
                return found(*arguments, **more)
            except Exception as error:
                if not is_disk_fault(error):
                    raise
                return self._note(error)

        return call


class LogConfig(lightning.Callback):
    """The resolved configuration as hyper-parameters and as text, when a run starts."""

    def __init__(self, config: Config, run: Run):
        self.config, self.run = config, run

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero or trainer.logger is None or self.run.checkpoint is not None:
            return
        writer = trainer.logger.experiment  # type: ignore[attr-defined]
        values = to_dict(self.config)
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        writer.add_text("config", f"```yaml\n{text}```", global_step=0)
        for summary in hparams(flatten(values), {self.config.checkpoint.monitor: 0}):
            writer.file_writer.add_summary(summary)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Nested dicts -> {"section.key": value}; what TensorBoard's table cannot hold, as text."""
    flat: dict[str, bool | int | float | str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            plain = isinstance(value, (bool, int, float, str))
            flat[prefix + name] = value if plain else str(value)
    return flat
