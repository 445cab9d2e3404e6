"""What libraries around Hugging Face's models look up beside the forward pass."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LogitsProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def register(config: type[Any], model: type[Any]) -> None:
    """Makes a class known as the causal language model of a configuration.

    Trainer's label smoothing shifts the labels of models in the list of names only: any other would
    learn to repeat its input.
    """
    AutoModelForCausalLM.register(config, model)
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type] = model.__name__


class TextOnly(LogitsProcessor):
    """Suppresses all ids from `first` on, which takes no list of them to the device."""

    def __init__(self, first: int):
        self.first = first

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        text, new = scores[:, : self.first], scores.shape[1] - self.first
        return nn.functional.pad(text, (0, new), value=-torch.inf)
