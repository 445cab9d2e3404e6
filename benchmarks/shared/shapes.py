"""The shapes of sizes.yaml."""

from dataclasses import dataclass

from transformers import Qwen3Config

from benchmarks.shared.options import SIZES
from comet_pl import CometConfig

TEXT_VOCABULARY = 256  # the head is no part of the measurement


@dataclass(frozen=True)
class Shape:
    name: str
    hidden: int  # d
    heads: int  # H
    kv_heads: int  # H'
    head_dim: int  # h
    intermediate: int  # f, width of the MLP
    chunk: int  # C
    global_size: int  # m
    capacity: int  # K
    stride: int = 8  # s
    layers: int = 2

    @property
    def own(self):
        """Own tokens of a chunk: text, a compression token for s of them, readout tokens."""
        return self.chunk + -(-self.chunk // self.stride) + self.global_size

    @property
    def slots(self):
        return self.global_size + self.capacity

    def backbone(self):
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

    def comet(self, layout="interleaved"):
        return CometConfig(
            backbone_config=self.backbone(),
            chunk_size=self.chunk,
            global_size=self.global_size,
            compression_stride=self.stride,
            temporary_capacity=self.capacity,
            layout=layout,
        )


SHAPES = {name: Shape(name, **sizes) for name, sizes in SIZES["shapes"].items()}
