"""train.py in this process, on a model of a few weights."""

import runpy
from pathlib import Path

from tests.support.tiny_runs import ROOT, TINY

main = runpy.run_path(str(ROOT / "train.py"))["main"]
SMALL = [*TINY]
SMALL += """
trainer.max_steps=4 trainer.val_check_interval=2 trainer.log_every_n_steps=2
checkpoint.every_steps=2 data.train_length=64 data.length_schedule=null data.batch_size=2
data.val_depths=2 data.val_examples=1 eval.lengths=[64,128] eval.depths=2 eval.examples=1
train.lr=1e-3 train.memory_lr_factor=3
""".split()


def run(root, name, *keys):
    """In this process; returns the run's folder."""
    main([f"run.root={root}", f"run.name={name}", *SMALL, *keys])
    return Path(root) / "passkey" / name
