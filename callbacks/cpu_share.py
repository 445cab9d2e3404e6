"""Training on a CPU that others use: as many threads as there are free cores."""

from typing import Any

import lightning

from comet_pl.threads import ThreadShare


class CpuShare(lightning.Callback):
    """Adjusts torch's number of threads between steps (comet_pl/threads.py)."""

    def __init__(self) -> None:
        self.share: ThreadShare | None = None

    def on_train_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        if trainer.strategy.root_device.type == "cpu":
            self.share = ThreadShare()

    def on_train_batch_end(self, *_: Any) -> None:
        if self.share is not None:
            self.share.adjust()

    def teardown(self, *_: Any, **stage: Any) -> None:
        if self.share is not None:
            self.share.restore()
