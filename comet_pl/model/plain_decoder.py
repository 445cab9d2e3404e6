"""The decoder without memory: Hugging Face's own around the modules of the cells.

Legend: B rows, H' key/value heads, L key columns, h head width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from comet_pl.model.configuration_comet import wide

SINKS = 4  # tokens, as in the paper of `sink_cache`


def plain_decoder(model: Any) -> PreTrainedModel:
    """Hugging Face's decoder with the modules of a CometForCausalLM, without memory. Rows of new
    tokens stay in its embedding and its head."""
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(model.config.backbone_config)
    for layer, cell in zip(plain.model.layers, model.model.layers, strict=True):
        for name, _ in list(layer.named_children()):
            setattr(layer, name, getattr(cell, name))
    for name, _ in list(plain.model.named_children()):
        if name != "layers":
            setattr(plain.model, name, getattr(model.model, name))
    plain.lm_head = model.lm_head
    return plain.train(model.training)


def sink_cache(plain: PreTrainedModel, window: int, sinks: int = SINKS) -> DynamicCache:
    """The cache of a sliding window with attention sinks (StreamingLLM, arXiv 2309.17453).

    A call sees [sinks | window | its own tokens, causally]: the first tokens of the text and the
    last ones before the call. Positions are places in the cache, as in the paper, so that they do
    not grow with the text.
    """
    cache, decoder = DynamicCache(config=plain.config), plain.model
    cache.layers = [
        SinkLayer(
            sinks,
            window,
            decoder.rotary_emb if getattr(layer.self_attn, "use_rope", True) else None,
        )
        for layer in decoder.layers
    ]
    return cache


class SinkLayer(DynamicLayer):
    """Keys and values (B, H', L, h) of the first `sinks` and the last `window` tokens.

    Args:
        rope: the decoder's rotary embedding; None: the layer has none.
    """

    def __init__(self, sinks: int, window: int, rope: nn.Module | None):
        super().__init__()
        self.sinks, self.window, self.rope = sinks, window, rope

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """What the call sees; what stays for the next call may be less."""
        keys, values = super().update(key_states, value_states)
        forgotten = keys.shape[2] - self.sinks - self.window
        if forgotten > 0:
            first, last = slice(self.sinks), slice(self.sinks + forgotten, None)
            moved = keys[:, :, last]
            if self.rope is not None:
                moved = rotated(moved, self.rope, -forgotten)
            self.keys = torch.cat([keys[:, :, first], moved], 2)
            self.values = torch.cat([values[:, :, first], values[:, :, last]], 2)
        return keys, values


def rotated(keys: Tensor, rope: nn.Module, by: int) -> Tensor:
    """Keys (B, H', n, h) as they are `by` positions later; their length stays."""
    like = keys.new_empty(0, dtype=wide(keys.dtype))
    cos, sin = rope(like, torch.tensor([[by]], device=keys.device))
    a, b = keys.to(like.dtype).chunk(2, -1)
    turned = torch.cat([a, b], -1) * cos + torch.cat([-b, a], -1) * sin
    return (turned / rope.attention_scaling).to(keys.dtype)
