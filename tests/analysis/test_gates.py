"""Mean gates of one text, by layer and chunk, against the gates caught as they are made."""

import numpy as np
import pytest
import torch

from comet_pl.analysis.gates import read_gates
from tests.callbacks.test_gate_monitor import row_by_row
from tests.support.models import tiny


def ids(tokens: int) -> torch.Tensor:
    return torch.randint(0, 40, (1, tokens), generator=torch.Generator().manual_seed(tokens))


@pytest.mark.parametrize("gate", ["scalar", "elementwise"])
@pytest.mark.parametrize("tokens", [9, 12, 23, 24])
def test_each_chunk_has_its_mean(gate, tokens):
    """Chunk 0 has no gate, and a last one that is still open, even if it is full, has none yet."""
    model, text = tiny(chunk_size=4, gate=gate, gate_bias=0.5), ids(tokens)
    expected = np.full((2, -(-tokens // 4)), np.nan)
    for (layer, chunk), g in row_by_row(
        model, {"input_ids": text, "attention_mask": torch.ones_like(text)}
    ).items():
        expected[layer, chunk] = float(g.mean())
    expected[:, -1] = np.nan
    np.testing.assert_allclose(read_gates(model, text), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("comet", "tokens"), [({"global_size": 0}, 20), ({"gate": "none"}, 20), ({}, 8)]
)
def test_none_where_no_gate_was_asked(comet, tokens):
    assert read_gates(tiny(chunk_size=4, **comet), ids(tokens)) is None


def test_nothing_is_left_behind():
    model = tiny(chunk_size=4)
    read_gates(model, ids(20))
    assert model.observer is None
    with pytest.raises(ValueError, match="input_ids"):
        read_gates(model, ids(20) + 1000)
    assert model.observer is None
