"""Sliding window with attention sinks: the other way to process any length in constant memory.

StreamingLLM (arXiv 2309.17453) keeps the first few tokens in the cache and the last ones before the
call. A call of C tokens sees [sinks | window | its own, causally]: the window moves from call to
call, which needs no mask. Keys keep the positions at which they were computed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import DynamicLayer

SINKS = 4  # tokens, as in the paper
NAME = "lower_right"  # the attention implementation below

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class SinkLayer(DynamicLayer):
    """Keys and values (B, H', L, h) of the first `sinks` and the last `window` tokens."""

    def __init__(self, sinks, window):
        super().__init__()
        self.sinks, self.window = sinks, window

    def update(self, key_states: Tensor, value_states: Tensor, *_, **__):
        """What the call sees; what stays for the next call may be less."""
        keys, values = super().update(key_states, value_states)
        forgotten = keys.shape[2] - self.sinks - self.window
        if forgotten > 0:
            self.keys, self.values = (
                torch.cat([x[:, :, : self.sinks], x[:, :, self.sinks + forgotten :]], 2)
                for x in (keys, values)
            )
        return keys, values


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
        self.cache, layers = DynamicCache(config=model.config), model.config.num_hidden_layers
        self.cache.layers = [SinkLayer(sinks, window) for _ in range(layers)]
        self.tokens = self.columns if full else 0
        if full:
            fill_with_noise(self.cache, model, self.columns)

    def __call__(self, ids: Tensor, logits_to_keep=1) -> Tensor:
        """(1, N) -> logits (1, logits_to_keep, V); 0: all N."""
        positions = torch.arange(self.tokens, self.tokens + ids.shape[1], device=ids.device)
        self.tokens += ids.shape[1]
        rest = {"past_key_values": self.cache, "logits_to_keep": logits_to_keep}
        return self.model(ids, position_ids=positions[None], **rest).logits


def fill_with_noise(cache, decoder, length):
    """As after `length` tokens: what a cache holds does not change what a step costs."""
    config = decoder.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (1, config.num_key_value_heads, length, width)
    for i in range(config.num_hidden_layers):
        kind = {"dtype": decoder.dtype, "device": decoder.device}
        cache.update(torch.randn(shape, **kind), torch.randn(shape, **kind), i)
