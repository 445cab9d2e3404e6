"""Each rank's random states go into a checkpoint and come back when training resumes."""

import random
from typing import Any

import lightning
import numpy as np
import torch

from comet_pl.errors import UserError, first_line


class RandomState(lightning.Callback):
    """Python's, NumPy's and torch's (CPU and CUDA) random states, as plain types and tensors.

    Args:
        seed: of the run. A fresh run's rank r draws from seed + r after the weights, which are the
            same on all ranks.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self.restored: list[dict[str, Any]] | None = None

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        mine = random_state()
        ranks = range(trainer.world_size)
        checkpoint["random_states"] = [trainer.strategy.broadcast(mine, src=r) for r in ranks]

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        self.restored = checkpoint["random_states"]

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Restores the states right before the first step: making the loaders may draw numbers."""
        if self.restored is not None and trainer.global_rank < len(self.restored):
            try:
                set_random_state(self.restored[trainer.global_rank])
            except Exception as error:  # of what a damaged one holds: anything
                line = f"{trainer.ckpt_path}: cannot be resumed: damaged random_states"
                raise UserError(f"{line}: {first_line(error)}") from None
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
