"""gate/mean: how much of the global memory's old state is kept."""

from __future__ import annotations

from typing import Any

import lightning
from torch import nn
from torch.utils.hooks import RemovableHandle

from comet_pl.lit_module import CometModule


class GateMean(lightning.Callback):
    """Mean gate value of a logged step, over layers, chunks after the first, rows and slots; absent where no gate was computed."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0
        self.hook: RemovableHandle | None = None

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: CometModule, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        if pl_module.logs_at(trainer.global_step + 1):
            self.total, self.count = 0.0, 0
            pl_module.model.record_gates(True)
            self.hook = pl_module.model.register_forward_hook(self._add)  # a step has a forward for each window

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: CometModule, outputs: Any, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        if self.hook is None:
            return
        self.hook.remove()
        self.hook = None
        pl_module.model.record_gates(False)
        total, count = pl_module.sum_over_ranks(self.total), pl_module.sum_over_ranks(self.count)
        if count:
            pl_module.record({"gate/mean": total / count})

    def _add(self, model: nn.Module, inputs: Any, output: Any) -> None:
        for values in model.gate_values():  # type: ignore[operator]
            for value in values:
                self.total += float(value.double().sum())
                self.count += value.numel()
