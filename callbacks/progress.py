"""The progress bar: steps of max_steps, loss, tokens/s, time left."""

import sys
from typing import Any

import lightning
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm


class StepProgress(TQDMProgressBar):
    """Lightning's bar over optimizer steps; without a terminal, a line at each logged step."""

    BAR_FORMAT = (
        "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
    )

    def __init__(self) -> None:
        super().__init__()
        self.terminal = sys.stdout.isatty()

    def init_train_tqdm(self) -> Tqdm:
        trainer, done = self.trainer, self.trainer.global_step
        return Tqdm(
            desc="step",
            initial=done,
            total=trainer.max_steps,
            disable=self.is_disabled or not self.terminal,
            dynamic_ncols=True,
            file=sys.stdout,
            bar_format=self.BAR_FORMAT,
        )

    def init_validation_tqdm(self) -> Tqdm:
        if self.terminal:
            return super().init_validation_tqdm()
        return Tqdm(desc="validation", disable=True)

    def on_train_epoch_start(self, *_: Any) -> None:
        """The bar spans all epochs."""

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self.terminal and self.is_enabled:
            self.train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
            self.train_progress_bar.update(step - self.train_progress_bar.n)
        elif self.is_enabled and pl_module.logs_at(step):
            values = (f"{k} {v}" for k, v in self.get_metrics(trainer, pl_module).items())
            print(f"step {step}/{trainer.max_steps}", *values, flush=True)

    def get_metrics(self, trainer: lightning.Trainer, pl_module: Any) -> dict[str, Any]:
        values = {name: float(value) for name, value in trainer.progress_bar_metrics.items()}
        shown = {
            "loss": "train/loss",
            "tokens/s": "train/tokens_per_s",
            "val_loss": "val/loss",
            "val_accuracy": "val/accuracy",
        }
        return {label: _short(values[name]) for label, name in shown.items() if name in values}


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
