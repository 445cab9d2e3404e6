"""Mistakes in the keys of training are one line that names the key."""

import pytest

from comet_pl.config.load import load
from comet_pl.errors import UserError

MISTAKES = {
    "train.gate_pull=-1": "-1 given, allowed: number >= 0",
    "train.gate_target=2 train.gate_pull=1": "2 given, allowed: number >= 0 and <= 1",
    "train.gate_target=0.5": "0.5 given, but train.gate_pull is 0; it needs a weight > 0",
    "train.gate_pull=1 model.gate=none": (
        "1.0 given, but model.gate=none leaves no gates, allowed: 0, or another model.gate"
    ),
    "train.gate_entropy=1 model.global_size=0": (
        "1.0 given, but model.global_size=0 leaves no gates"
    ),
    "train.gate_entropy=1 train.bptt_chunks=1": (
        "1.0 given, but with train.bptt_chunks=1 no gradient reaches a gate"
    ),
    "train.recompute=true": ("'true' given, allowed: none (once false), cell (once true), chunk"),
    "train.recompute=chunks": (
        "'chunks' given, allowed: none (once false), cell (once true), chunk (did you mean chunk?)"
    ),
    "train.recompute=null": "null given, allowed: none (once false)",
    "train.offload=true": "true given, but train.recompute is none; it needs chunk",
    "train.recompute=chunk trainer.strategy=layer_pipeline": (
        "chunk given, but trainer.strategy is layer_pipeline"
    ),
    "train.parameters=adapter": "'adapter' given, allowed: all, memory, lora, memory+lora",
    "train.lora_rank=4": "given, but train.parameters is all; it needs lora or memory+lora",
    "train.lora_dropout=0.1 train.parameters=memory": "given, but train.parameters is memory",
    "train.lora_rank=0 train.parameters=lora": "0 given, allowed: integer >= 1",
    "train.lora_dropout=1 train.parameters=lora": "1 given, allowed: number >= 0 and < 1",
    "train.parameters=memory model.global_size=0 model.compression_stride=null": (
        "memory given, but model.global_size=0 and model.compression_stride=null leave no "
    ),
}


@pytest.mark.parametrize("keys", MISTAKES)
def test_mistakes_are_one_line(keys):
    with pytest.raises(UserError) as caught:
        load(keys.split())
    assert str(caught.value).startswith(f"{keys.partition('=')[0]}: {MISTAKES[keys]}")
    assert "\n" not in str(caught.value)
