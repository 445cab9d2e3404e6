"""memory/<value>/layer_<i>, the figure memory/report and monitor/memory.png.

They show what the memories hold and who attends to them.
"""

from pathlib import Path
from typing import Any

import lightning
from torch import Tensor

from callbacks.figures import show_figure
from comet_pl.analysis.memory import picture, read_memory


class MemoryMonitor(lightning.Callback):
    """Reads the first text of a validation once more, with hooks on the cells for that time alone.

    Args:
        folder: where the picture goes.
        every: only validations after a multiple of so many steps count.
    """

    def __init__(self, folder: Path, every: int):
        self.folder, self.every = folder, every
        self.ids: Tensor | None = None

    def on_validation_batch_start(
        self, trainer: lightning.Trainer, pl_module: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if batch_idx == 0 and trainer.global_step % self.every == 0:
            self.ids = batch["input_ids"][:1, batch["attention_mask"][0].bool()]

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        ids, self.ids = self.ids, None
        if ids is None:
            return
        if trainer.world_size > 1:
            # if the weights are in shards, all ranks have to do the same
            ids = trainer.strategy.broadcast(ids.cpu()).to(pl_module.device)
        with trainer.precision_plugin.forward_context():
            report = read_memory(pl_module.model, ids)
        if report is None or not trainer.is_global_zero:
            return
        for i, layer in enumerate(report.layers):
            pl_module.record({f"memory/{tag}/layer_{i}": value for tag, value in layer.items()})
        show_figure(pl_module, "memory/report", picture(report), self.folder / "memory.png")
