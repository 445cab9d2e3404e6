"""How many Python functions of the package a decoded token and a training step call."""

import statistics
import sys
from pathlib import Path

import torch

import comet_pl
from comet_pl.training.lit_module import CometModule
from tests.support.models import text, tiny
from tests.support.training import fit, ragged

PACKAGE = str(Path(comet_pl.__file__).parent)
SIZES = {"chunk_size": 16, "compression_stride": 4, "temporary_capacity": 6}


class Counter:
    """Counts calls of the package's functions while it is the profiler."""

    calls = 0

    def __call__(self, frame, event, argument):
        self.calls += event == "call" and frame.f_code.co_filename.startswith(PACKAGE)


def own_calls(work):
    counter = Counter()
    sys.setprofile(counter)
    try:
        work()
    finally:
        sys.setprofile(None)
    return counter.calls


@torch.no_grad()
def test_a_decoded_token():
    model, ids = tiny(**SIZES).eval(), text(1, 40)
    cache = model(ids).past_key_values
    # A chunk of tokens: every fourth also brings a compression token, one closes the chunk.
    calls = [
        own_calls(lambda: model(ids[:, :1], past_key_values=cache, logits_to_keep=1))
        for _ in range(16)
    ]
    assert statistics.median(calls) <= 110


def test_a_training_step(monkeypatch):
    step, counts = CometModule.training_step, []

    def counted(*arguments):
        counts.append(own_calls(lambda: step(*arguments)))

    monkeypatch.setattr(CometModule, "training_step", counted)
    fit(tiny(**SIZES), 3 * [ragged([128, 128], labelled=1.0)])
    assert counts[-1] <= 900
