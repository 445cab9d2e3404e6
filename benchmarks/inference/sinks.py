"""Sliding window with attention sinks: the other way to process any length in constant memory.

The cache is comet_pl/model/plain_decoder.py's. Here its attention needs no mask.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface

from comet_pl.model.plain_decoder import SINKS, sink_cache

NAME = "lower_right"  # the attention implementation below

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def lower_right(
    module, q: Tensor, k: Tensor, v: Tensor, attention_mask, scaling, **_
) -> tuple[Tensor, None]:
    """Lower-right causal attention without a mask, as CoMeT's cells have it.
    (B, H, W, h) -> (B, W, H, h). Without gradients on a CPU."""
    past = k.shape[2] - q.shape[2]
    if past and q.device.type == "cpu":
        (before, lse), (own, own_lse) = (
            _flash(q, k[:, :, part], v[:, :, part], 0.0, causal, scale=scaling)
            for part, causal in ((slice(past), False), (slice(past, None), True))
        )
        weight = (lse - torch.logaddexp(lse, own_lse)).exp().to(own.dtype)
        out = torch.lerp(own, before, weight[..., None])
    else:
        bias = causal_lower_right(q.shape[2], k.shape[2]) if past else None
        causal = {"attn_mask": bias, "is_causal": not past}
        out = F.scaled_dot_product_attention(q, k, v, scale=scaling, enable_gqa=True, **causal)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, lower_right)


class SinkReader:
    """Processes a text of one row with a plain decoder, call by call.

    Args:
        model: its attention implementation becomes `lower_right`.
        window: tokens besides the sinks that a call sees of those before it.
        full: start as after a long text, with noise in the cache.
    """

    def __init__(self, model, window, sinks=SINKS, full=False):
        model.set_attn_implementation(NAME)
        self.model, self.columns = model, sinks + window
        self.cache = sink_cache(model, window, sinks)
        if full:
            fill_with_noise(self.cache, model, self.columns)

    def __call__(self, ids: Tensor, logits_to_keep=1) -> Tensor:
        """(1, N) -> logits (1, logits_to_keep, V); 0: all N."""
        rest = {"past_key_values": self.cache, "logits_to_keep": logits_to_keep}
        return self.model(ids, **rest).logits


def fill_with_noise(cache, decoder, length):
    """As after `length` tokens: what a cache holds does not change what a step costs."""
    config = decoder.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (1, config.num_key_value_heads, length, width)
    for i in range(config.num_hidden_layers):
        kind = {"dtype": decoder.dtype, "device": decoder.device}
        cache.update(torch.randn(shape, **kind), torch.randn(shape, **kind), i)
