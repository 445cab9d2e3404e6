"""The gates on one text, by layer and chunk. Legend: L layers, T chunks of the text."""

import numpy as np
import torch
from torch import Tensor

from comet_pl.model.modeling_comet import CometForCausalLM
from comet_pl.model.observer import Observer, observing


@torch.no_grad()
def read_gates(model: CometForCausalLM, ids: Tensor) -> np.ndarray | None:
    """Mean g over slots, (L, T), of each layer and chunk of a text.

    NaN where there is no gate: the first chunk has no old state, and a last one may stay open.
    None: the model has no gates or the text is too short.

    Args:
        ids: (1, N) without padding.
    """
    size = model.config.chunk_size
    means = np.full((len(model.gates), -(-ids.shape[1] // size)), np.nan)

    def add(layer: int, read: list[int], gate: Tensor) -> None:
        means[layer, read[0] // size] = float(gate.double().mean())

    with observing(model, Observer(gate=add)):
        model(ids, use_cache=False, logits_to_keep=1)
    return None if np.isnan(means).all() else means
