"""The rows that train.py reads, step by step, on one or several data-parallel devices.

    python -m tests.support.rows_read FILE [key=value ...]

trains as train.py does; each rank writes its rows to FILE followed by its number.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import lightning

import train
from comet_pl import build
from tests.support.tiny_runs import ROOT

Row = list[int]


class Seen(lightning.Callback):
    """The rows of each training batch, without padding."""

    def __init__(self) -> None:
        self.steps: list[list[Row]] = []

    def on_train_batch_start(self, trainer, module, batch, *_):
        rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
        self.steps.append([ids[mask.bool()].tolist() for ids, mask in rows])


def rows_of_run(argv: list[str]) -> list[list[Row]]:
    """Runs train.py's main; the rows of each step, on this rank."""
    seen, make = Seen(), build.build_trainer

    def watched(*arguments):
        trainer = make(*arguments)
        trainer.callbacks.append(seen)
        return trainer

    with patch.object(build, "build_trainer", watched):
        train.main(argv)
    return seen.steps


def rows_of_ranks(folder: Path, argv: list[str], devices: int) -> tuple[list[list[Row]], str]:
    """(the rows of each step in the order in which the ranks are dealt them, what rank 0 printed)
    of processes that Lightning starts."""
    file = folder / "rows"
    keys = [*argv, f"trainer.devices={devices}", "trainer.strategy=ddp"]
    command = [sys.executable, "-m", "tests.support.rows_read", str(file), *keys]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    ranks = [json.loads(Path(f"{file}{rank}").read_text()) for rank in range(devices)]
    dealt = [zip(*step, strict=True) for step in zip(*ranks, strict=True)]
    return [[row for rows in step for row in rows] for step in dealt], done.stdout


if __name__ == "__main__":
    rows = rows_of_run(sys.argv[2:])
    Path(f"{sys.argv[1]}{os.environ.get('LOCAL_RANK', 0)}").write_text(json.dumps(rows))
