"""Sliding window with attention sinks through Hugging Face's model: the other way to read a text of any length at constant memory.

StreamingLLM (arXiv 2309.17453): the first few tokens stay in the cache for ever, behind them the last ones. transformers had a SinkCache
for it until 4.52; the copy of it on the hub does not start on 5.x, so here is a plain DynamicCache whose layers forget. A call of C tokens
sees [sinks | window | its own, causally]: the window moves from call to call, not from token to token, which needs no mask. Keys keep the
positions at which they were read; to number them anew in each call would cost a rotation of all of them, which is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from comet_pl.model.attention import attend

SINKS = 4  # tokens, as in the paper
NAME = "lower_right"  # of the attention implementation below


class SinkLayer(DynamicLayer):
    """Keys and values (B, H', L, h) of the first `sinks` and the last `window` tokens that came before a call."""

    def __init__(self, sinks: int, window: int):
        super().__init__()
        self.sinks, self.window = sinks, window

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """What the call sees; what it leaves behind is less."""
        keys, values = super().update(key_states, value_states)
        forgotten = keys.shape[2] - self.sinks - self.window
        if forgotten > 0:
            behind = self.sinks + forgotten
            self.keys, self.values = (
                torch.cat([x[:, :, : self.sinks], x[:, :, behind:]], 2) for x in (keys, values)
            )
        return keys, values


@dataclass
class Call:
    """What `attend` wants to know of a call: W own tokens after `past` columns."""

    past: int
    own: int
    uniform = True

    @property
    def mask(self) -> Tensor:
        return torch.ones(self.own, self.past + self.own, dtype=torch.bool).tril(self.past)


def lower_right(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """The kernels that CoMeT's cells use: transformers' own sdpa would take a mask here. (B, H, W, h) -> (B, W, H, h)."""
    assert attention_mask is None
    own = query.shape[2]
    out = attend(NAME, query, key, value, Call(key.shape[2] - own, own), scaling)  # type: ignore[arg-type]
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, lower_right)


class SinkReader:
    """Reads texts of one row with a plain decoder, call by call.

    Args:
        model: its attention implementation is set to `lower_right`. window: tokens besides the sinks that a call sees of those before it.
        full: start as after a long text, with noise in the cache.
    """

    def __init__(self, model: PreTrainedModel, window: int, sinks: int = SINKS, full: bool = False):
        model.set_attn_implementation(NAME)
        config = model.config
        self.model, self.columns = model, sinks + window
        self.cache = DynamicCache(config=config)
        self.cache.layers = [SinkLayer(sinks, window) for _ in range(config.num_hidden_layers)]
        self.read = 0  # tokens
        if full:
            shape = (1, config.num_key_value_heads, self.columns, config.head_dim)
            for i in range(config.num_hidden_layers):
                self.cache.update(
                    *(torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2)),
                    i,
                )
            self.read = self.columns

    def __call__(self, ids: Tensor, logits_to_keep: int = 1) -> Tensor:
        """(1, N) -> logits (1, logits_to_keep, V); 0: all N."""
        positions = torch.arange(self.read, self.read + ids.shape[1], device=ids.device)[None]
        self.read += ids.shape[1]
        return self.model(
            ids, position_ids=positions, past_key_values=self.cache, logits_to_keep=logits_to_keep
        ).logits
