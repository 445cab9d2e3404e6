"""Generated text has no compression and readout tokens."""

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor


class TextOnly(LogitsProcessor):
    """Suppresses all ids from `first` on, which takes no list of them to the device."""

    def __init__(self, first: int):
        self.first = first

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        text, new = scores[:, : self.first], scores.shape[1] - self.first
        return nn.functional.pad(text, (0, new), value=-torch.inf)
