"""The gates on one text, by layer and chunk. Legend: L layers, T chunks of the text."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from comet_pl.model.modeling_comet import CometForCausalLM


@torch.no_grad()
def read_gates(model: CometForCausalLM, ids: Tensor) -> np.ndarray | None:
    """Reads a text once: mean g over slots, (L, T), of each layer and chunk.

    NaN where no gate was asked: the first chunk, which has no old state, and a last one that stays open. None: nowhere, as the model has no
    gates or the text is too short.

    Args:
        ids: (1, N) without padding.
    """
    model.record_gates()
    try:
        model(ids, use_cache=False, logits_to_keep=1)
        found = model.gate_values()
    finally:
        model.record_gates(False)
    size = model.config.chunk_size
    means = np.full((len(model.gates), -(-ids.shape[1] // size)), np.nan)
    for read, layers in found:
        if read:
            means[:, read[0] // size] = [float(g.double().mean()) for g in layers]
    return None if np.isnan(means).all() else means
