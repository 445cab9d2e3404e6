"""How many operations a cell, a forward pass and a training step take, from the configuration.

Counted are matrix products, a multiply-add as two operations: projections, LoRA, MLP, scores and
values of attention, the memories' gates and adapters, the head. A row counts as if it were alone:
padding is no work. bandwidth.py counts the bytes of decoding.

Attention counts the pairs (token, key column) that a token sees, as kernels that skip masked blocks
do. `dense=True` counts all W x L pairs, as eager attention and torch's FlopCounterMode do.

How the memory slots [G | T] enter a cell, `slots`:
    "recomputed"  their keys and values are computed in each chunk: what the model does
    "in_full"     as ordinary tokens with queries and MLP: comet_pl/model/naive.py

Legend: C chunk size, m readout tokens = global slots, d width, H query heads, H' key/value heads,
h head width, f width of the MLP, r adapter rank, W own tokens that enter, M memory slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from typing import TYPE_CHECKING, Any

from comet_pl.model.chunk_layout import (
    NO_STRIDE,
    ChunkPlan,
    RowClock,
    Segment,
    compression_tokens,
    plan_row,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from comet_pl.model.configuration_comet import CometConfig

SLOTS = ("recomputed", "in_full")


@dataclass(frozen=True)
class Operations:
    """Operations by kind."""

    linear: int = 0  # projections and MLP of own tokens
    slots: int = 0  # keys and values of memory slots
    attention: int = 0  # scores and values
    memory: int = 0  # gates and adapters
    head: int = 0

    @property
    def total(self) -> int:
        return sum(astuple(self))

    def __add__(self, other: Operations) -> Operations:
        return Operations(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: int) -> Operations:
        return Operations(*(a * times for a in astuple(self)))


def heads(backbone: PretrainedConfig) -> tuple[int, int]:
    """(H h, H' h): widths of all queries and of all keys of a token."""
    default = backbone.hidden_size // backbone.num_attention_heads
    width = getattr(backbone, "head_dim", None) or default
    return backbone.num_attention_heads * width, backbone.num_key_value_heads * width


def layer_weights(backbone: PretrainedConfig, lora_rank: int = 0) -> tuple[int, int]:
    """Elements of the matrices that a layer applies to (an own token, a memory slot)."""
    d, f = backbone.hidden_size, backbone.intermediate_size
    queries, keys = heads(backbone)

    def elements(*sizes: tuple[int, int]) -> int:
        return sum(a * b + lora_rank * (a + b) for a, b in sizes)

    slot = elements((d, keys), (d, keys))
    return slot + elements((d, queries), (queries, d), (d, f), (d, f), (f, d)), slot


def cell(
    config: CometConfig,
    segment: Segment,
    slots: str = "recomputed",
    dense: bool = False,
    lora_rank: int = 0,
) -> Operations:
    """Forward operations of one layer on one row's share of a chunk.

    Args:
        segment: the tokens that enter, and the row's clock before them (model/chunk_layout.py).
    """
    d, r, m = config.backbone_config.hidden_size, config.adapter_rank, config.global_size
    before, adapter = segment.before, 2 * d * r
    first, last = segment.span(m)
    opens, tokens = before.fill == 0, last - first
    entering = before.memory if opens else 0
    memory = m * adapter if opens and before.global_slots else 0
    if segment.closes and before.stride != NO_STRIDE:
        memory += compression_tokens(segment.text, before.stride) * adapter
    if segment.closes and before.global_slots:
        gates = {"scalar": 2 * d, "elementwise": 2 * d * r + r * d}
        memory += m * gates.get(config.gate, 0)
    past, internal = before.memory + first, tokens - segment.count
    if slots == "in_full":
        tokens, past, entering = tokens + entering, past - entering, 0
    pairs = _pairs(tokens, past, dense)
    if before.trailing and segment.closes:
        # Dense, the text is apart; else compression tokens see less than all before them.
        n, s, text = segment.text, before.stride, tokens - internal
        c = compression_tokens(n, s)
        unseen = c * n - n + c * (c - 1) // 2 * (1 - s) if c else 0
        pairs -= text * internal if dense else unseen
    token, slot = layer_weights(config.backbone_config, lora_rank)
    return Operations(
        linear=2 * tokens * token,
        slots=2 * entering * slot,
        attention=4 * pairs * heads(config.backbone_config)[0],
        memory=2 * memory,
    )


def _pairs(tokens: int, past: int, dense: bool) -> int:
    return tokens * (past + tokens) if dense else tokens * past + tokens * (tokens + 1) // 2


def start(config: CometConfig, full: bool = False, stride: int | None = None) -> RowClock:
    """A row before its first token, or after a chunk that left the memory full."""
    clock = config.clock(config.compression_stride and stride)
    if not full:
        return clock
    t = config.temporary_capacity if config.compression_stride else 0
    return replace(clock, global_slots=config.global_size, temporary_slots=t)


def whole_chunk(config: CometConfig) -> Segment:
    """A chunk of C tokens that closes, the memory full before it."""
    return Segment(start(config, full=True), 0, config.chunk_size, closes=True)


def floor(config: CometConfig) -> float:
    """The least time of a chunk as a share of slots in full, if both run at the same rate.

    The memory is full; the head is left out.
    """
    ours, in_full = (cell(config, whole_chunk(config), slots).total for slots in SLOTS)
    return ours / in_full


def head(backbone: PretrainedConfig, rows: int) -> Operations:
    """Logits of `rows` positions."""
    return Operations(head=2 * rows * backbone.hidden_size * backbone.vocab_size)


def plan_sizes(config: CometConfig) -> dict[str, Any]:
    """The sizes that plan_row takes."""
    return {
        "chunk_size": config.chunk_size,
        "global_size": config.global_size,
        "capacity": config.temporary_capacity,
    }


def reading(
    config: CometConfig,
    tokens: int,
    chunk_sizes: Sequence[int] | None = None,
    clock: RowClock | None = None,
    logits: int = 1,
    keep: bool = True,
    resets: Sequence[bool] | None = None,
    **counting: Any,
) -> Operations:
    """Operations of one forward call of the model, a row.

    Args:
        tokens, chunk_sizes, resets: as the model takes them.
        clock: the row's state before the call.
        logits: number of positions that get some.
        keep: the cache is used afterwards; else a last chunk of chunk_sizes does not close.
        counting: slots, dense and lora_rank of `cell`.
    """
    segments, _ = plan_row(
        clock or start(config),
        tokens,
        rollover=config.rollover,
        chunk_sizes=chunk_sizes,
        resets=resets,
        **plan_sizes(config),
    )
    if segments and not keep:
        segments[-1] = replace(segments[-1], closes=False)
    cells = sum((cell(config, part, **counting) for part in segments), Operations())
    return cells * config.backbone_config.num_hidden_layers + head(config.backbone_config, logits)


def full_attention(
    backbone: PretrainedConfig, tokens: int, past: int = 0, logits: int = 1, dense: bool = False
) -> Operations:
    """Operations of a plain decoder on `tokens` tokens of a row after `past` cached ones."""
    layer = Operations(
        linear=2 * tokens * layer_weights(backbone)[0],
        attention=4 * _pairs(tokens, past, dense) * heads(backbone)[0],
    )
    return layer * backbone.num_hidden_layers + head(backbone, logits)


def training_step(
    config: CometConfig, plans: Sequence[ChunkPlan], targets: int, **counting: Any
) -> Operations:
    """Three times the forward operations: backward counts as two forward passes.

    As usual, all weights count as trained, truncated backpropagation as whole, and what activation
    checkpointing computes again does not count. It is exact where all weights learn and every
    chunk has targets.

    Args:
        plans: of each row. targets: labelled tokens of all rows.
        counting: slots, dense and lora_rank of `cell`.
    """
    total = head(config.backbone_config, targets)
    for plan in plans:
        clock = start(config, stride=plan.stride)
        total += reading(config, plan.tokens, plan.sizes, clock, 0, False, plan.resets, **counting)
    return total * 3
