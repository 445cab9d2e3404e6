"""The shapes that are measured, and how many operations a chunk costs by each way of computing it.

Legend: C chunk size, s stride, m readout tokens = global slots, K temporary slots, d width, H query heads, H' key/value heads,
h head width, f width of the MLP; W own tokens of a chunk, M memory slots.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import Qwen3Config

from comet_pl import CometConfig
from comet_pl.analysis import flops

TEXT_VOCABULARY = 256  # the head is no part of the measurement


@dataclass(frozen=True)
class Shape:
    name: str
    hidden: int  # d
    heads: int  # H
    kv_heads: int  # H'
    head_dim: int  # h
    intermediate: int  # f
    chunk: int  # C
    global_size: int  # m
    capacity: int  # K
    stride: int = 8  # s
    layers: int = 2

    @property
    def own(self) -> int:
        """W: text, a compression token for each group of s, the readout tokens."""
        return self.chunk + -(-self.chunk // self.stride) + self.global_size

    @property
    def slots(self) -> int:
        """M, memory full."""
        return self.global_size + self.capacity

    def backbone(self) -> Qwen3Config:
        return Qwen3Config(
            vocab_size=TEXT_VOCABULARY,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.intermediate,
            tie_word_embeddings=True,
            max_position_embeddings=1 << 18,
        )

    def comet(self) -> CometConfig:
        return CometConfig(
            backbone_config=self.backbone(),
            chunk_size=self.chunk,
            global_size=self.global_size,
            compression_stride=self.stride,
            temporary_capacity=self.capacity,
        )


# Two layers of Qwen3-0.6B with the paper's chunk and memories; every length and width a quarter and a sixteenth of that, which leaves the
# share of each operation, and so the floor, as it is. And one layer of Qwen3-4B: two would give the same ratio and take twice as long.
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("paper", 1024, 16, 8, 128, 3072, chunk=2048, global_size=512, capacity=2048),
        Shape("quarter", 256, 8, 4, 64, 768, chunk=512, global_size=128, capacity=512),
        Shape("sixteenth", 64, 4, 2, 32, 192, chunk=128, global_size=32, capacity=128),
        Shape(
            "paper-4b", 2560, 32, 8, 128, 9728, chunk=2048, global_size=512, capacity=2048, layers=1
        ),
    )
}

FORMULA = (
    "token = 2 d H h (q, o) + 2 d H' h (k, v) + 3 d f (MLP); slot = 2 d H' h (k, v); pair = 2 H h (q.k, p.v); "
    "ours = W token + M slot + (W M + W (W + 1) / 2) pair; slots in full = (M + W) token + (M + W) (M + W + 1) / 2 pair; "
    "floor = ours / slots in full"
)


def operations(shape: Shape) -> tuple[int, int]:
    """(ours, slots in full): multiply-adds of one layer on one chunk with full memory, by FORMULA; comet_pl/analysis/flops.py counts them.

    Head, norms, gates and adapters are left out: the last two are below 0.02 % of the paper's shape.
    """
    config = shape.comet()
    ours, in_full = (
        flops.cell(config, flops.whole_chunk(config), slots) for slots in ("recomputed", "in_full")
    )
    return (ours.total - ours.memory) // 2, (in_full.total - in_full.memory) // 2


def floor(shape: Shape) -> float:
    """The least that ours / slots in full can be, if both run at the same speed."""
    ours, in_full = operations(shape)
    return ours / in_full
