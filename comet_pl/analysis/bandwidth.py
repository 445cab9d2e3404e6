"""How many bytes decoding must at least move, from the configuration alone: the weights once a step, and the keys and values that it sees.

One row; elements are counted and multiplied by `itemsize`, the bytes of one. What is small beside these (activations, norms, gates,
adapters, rows of the embedding) is left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from comet_pl.analysis.flops import full_attention, heads, plan_sizes, start
from comet_pl.model.chunk_layout import Segment, plan_row

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from comet_pl.model.configuration_comet import CometConfig


def decoding_bytes(config: CometConfig, itemsize: int = 2, with_head: bool = True) -> float:
    """Bytes a token that decoding one row must at least move with full memory, the mean over a cycle of C tokens.

    A step reads all weights once, and the keys and values of every column that it sees; it writes those of its own tokens. A compression
    token goes along with the text token after it. A chunk's closing (readout tokens, memory update) is one more step; the next token then
    reads the slots and writes their keys and values.
    """
    backbone, m = config.backbone_config, config.global_size
    _, keys = heads(backbone)
    clock, elements = start(config, full=True), 0
    segments: list[Segment] = []
    for _ in range(config.chunk_size):
        new, clock = plan_row(clock, 1, **plan_sizes(config))
        segments += new
    for segment in [*segments, Segment(clock, 0, 0, closes=True)]:
        first, last = segment.span(m)
        columns = segment.before.memory + last
        elements += _weights(
            backbone, with_head and not segment.closes
        ) + backbone.num_hidden_layers * 2 * keys * (columns + last - first)
        if segment.before.fill == 0:
            elements += (
                backbone.num_hidden_layers
                * segment.before.memory
                * (backbone.hidden_size + 2 * keys)
            )
    return elements * itemsize / config.chunk_size


def full_attention_bytes(
    backbone: PretrainedConfig, context: int, itemsize: int = 2, with_head: bool = True
) -> int:
    """Bytes that decoding a token after `context` others must at least move in a plain decoder: weights once, keys and values of all."""
    _, keys = heads(backbone)
    return (
        _weights(backbone, with_head) + backbone.num_hidden_layers * 2 * keys * (context + 1)
    ) * itemsize


def decoding_floor(config: CometConfig, context: int = 1024, with_head: bool = False) -> float:
    """The least that the time of a decoded token can be, as a multiple of a plain decoder's after `context` tokens, if bytes decide."""
    return decoding_bytes(config, 1, with_head) / full_attention_bytes(
        config.backbone_config, context, 1, with_head
    )


def _weights(backbone: PretrainedConfig, with_head: bool) -> int:
    """Elements of the matrices that a step reads; of the embedding it reads rows, which is nothing."""
    once = full_attention(backbone, 1, logits=int(with_head))
    return (once.linear + once.head) // 2
