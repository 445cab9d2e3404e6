"""The tiny run that several tests make by train.py's arguments; a key given again after these takes the place of the first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "trainer.accelerator=cpu",
    "backbone.hidden_size=16",
    "backbone.num_attention_heads=2",
    "backbone.num_key_value_heads=1",
    "backbone.head_dim=8",
    "backbone.intermediate_size=24",
    "backbone.vocab_size=300",
    "model.chunk_size=16",
    "model.global_size=2",
    "model.compression_stride=4",
    "model.temporary_capacity=6",
]


def command(root: Path, name: str, *keys: str) -> list[str]:
    """train.py in a process of its own; keys: TINY and others."""
    return [sys.executable, "train.py", f"run.root={root}", f"run.name={name}", *keys]


def train(root: Path, name: str, *keys: str, timeout: int = 120) -> str:
    """Runs the command to its end; returns what it printed on both streams."""
    done = subprocess.run(
        command(root, name, *keys), cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr
