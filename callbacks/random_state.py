"""All random states go into a checkpoint, each rank's own, and come back when training goes on."""

from __future__ import annotations

import random
from typing import Any

import lightning
import numpy as np
import torch


class RandomState(lightning.Callback):
    """Python's, NumPy's and torch's (CPU and CUDA) random states, as plain types and tensors.

    Args:
        seed: of the run; a fresh run's rank r draws from seed + r once the weights, which are alike on all ranks, are made.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self.restored: list[dict[str, Any]] | None = None

    def on_save_checkpoint(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        mine = random_state()
        checkpoint["random_states"] = [
            trainer.strategy.broadcast(mine, src=rank) for rank in range(trainer.world_size)
        ]

    def on_load_checkpoint(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        self.restored = checkpoint["random_states"]

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """The last moment before the first step: making the loaders may have drawn numbers."""
        if self.restored is not None and trainer.global_rank < len(self.restored):
            set_random_state(self.restored[trainer.global_rank])
        elif trainer.global_rank > 0:
            seed = (self.seed + trainer.global_rank) % 2**32
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """This process's random states."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """What `random_state` returned."""
    name, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
