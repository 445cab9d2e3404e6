"""TensorBoard events straight in the run's folder, and the configuration in them."""

from pathlib import Path
from typing import Any

import lightning
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.tensorboard.summary import hparams

from comet_pl.config.load import to_dict
from comet_pl.config.schema import Config
from comet_pl.experiment.run_folder import Run


class RunLogger(TensorBoardLogger):
    """Lightning's TensorBoard logger, writing to `folder` itself.

    Args:
        purge_step: earlier sessions' events from this step on are dropped; they come again, and no
            curve has them twice.
    """

    def __init__(self, folder: Path, purge_step: int):
        super().__init__(
            folder, name="", version="", default_hp_metric=False, purge_step=purge_step
        )

    @property
    def log_dir(self) -> str:
        return str(self._root_dir)

    @rank_zero_only
    def save(self) -> None:
        """Flushes; config.yaml makes Lightning's hparams.yaml superfluous."""
        self.experiment.flush()


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
