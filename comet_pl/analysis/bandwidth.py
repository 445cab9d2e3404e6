"""How many bytes decoding one row must at least move, from the configuration alone.

A step reads all weights once, and the keys and values that its tokens see. Activations, norms,
gates, adapters and rows of the embedding are small beside these and left out. Elements are counted
and multiplied by `itemsize`, the bytes of one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from comet_pl.analysis.flops import heads, layer_weights, plan_sizes, start
from comet_pl.model.chunk_layout import Segment, plan_row

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from comet_pl.model.configuration_comet import CometConfig


def decoding_bytes(config: CometConfig, itemsize: int = 2, with_head: bool = True) -> float:
    """Bytes a decoded token with full memory, the mean over a cycle of C tokens.

    A step also writes the keys and values of its own tokens. A compression token enters with the
    text token after it. The end of a chunk (readout tokens, memory update) is one more step; the
    next token then reads the slots and writes their keys and values.
    """
    backbone, layers = config.backbone_config, config.backbone_config.num_hidden_layers
    _, keys = heads(backbone)
    clock, elements = start(config, full=True), 0
    segments: list[Segment] = []
    for _ in range(config.chunk_size):
        new, clock = plan_row(clock, 1, **plan_sizes(config))
        segments += new
    for segment in [*segments, Segment(clock, 0, 0, closes=True)]:
        memory = segment.before.memory
        first, last = segment.span(config.global_size)
        elements += _weights(backbone, with_head and not segment.closes)
        elements += layers * 2 * keys * (memory + last + last - first)
        if segment.before.fill == 0:
            elements += layers * memory * (backbone.hidden_size + 2 * keys)
    return elements * itemsize / config.chunk_size


def full_attention_bytes(
    backbone: PretrainedConfig, context: int, itemsize: int = 2, with_head: bool = True
) -> int:
    """Bytes of decoding a token after `context` others in a plain decoder."""
    columns = backbone.num_hidden_layers * 2 * heads(backbone)[1] * (context + 1)
    return (_weights(backbone, with_head) + columns) * itemsize


def decoding_floor(config: CometConfig, context: int = 1024, with_head: bool = False) -> float:
    """The least time of a decoded token, as a multiple of a plain decoder's after `context` tokens,
    if bytes decide."""
    plain = full_attention_bytes(config.backbone_config, context, 1, with_head)
    return decoding_bytes(config, 1, with_head) / plain


def _weights(backbone: PretrainedConfig, with_head: bool) -> int:
    """Elements of the matrices that a step reads."""
    head = backbone.hidden_size * backbone.vocab_size if with_head else 0
    return backbone.num_hidden_layers * layer_weights(backbone)[0] + head
