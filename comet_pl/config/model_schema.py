"""The model and backbone sections; schema.py has the others."""

from dataclasses import asdict, dataclass
from typing import Any

from comet_pl.config.key import key


@dataclass(frozen=True)
class ModelConfig:
    """Keys of CometConfig; the paper's notation in brackets."""

    chunk_size: int = key(64, "text tokens a chunk (C)", min=1)
    global_size: int = key(
        8, "readout tokens = global memory slots (m); 0: no global memory", min=0
    )
    compression_stride: int | None = key(
        8, "a compression token after every s text tokens (s); null: no temporary memory", min=1
    )
    temporary_capacity: int = key(64, "temporary memory slots, oldest leave first (K)", min=1)
    adapter_rank: int = key(8, "rank of the residual adapters (r)", min=1)
    shared_adapter: bool = key(
        False,
        "one adapter for both memories, as the paper says (false: one each, as the authors' code)",
    )
    gate: str = key(
        "scalar",
        "scalar: one gate value a slot; elementwise: low-rank, one a channel; none",
        choices=("scalar", "elementwise", "none"),
    )
    gate_bias: float | None = key(
        None,
        "start value of a gate bias, > 0 keeps the old state at first; null: no bias, as the "
        "authors",
    )
    rollover: bool = key(
        True,
        "a full chunk closes and a new one opens while generating; false: the last chunk grows",
    )
    layout: str = key(
        "interleaved",
        "interleaved: a compression token after every s text tokens, as the authors; trailing: all "
        "behind the chunk's text, which stays what it is to a plain decoder",
        choices=("interleaved", "trailing"),
    )
    sink: str = key(
        "none",
        "learned: a slot in front of the memory that begins as the decoder's first token, for "
        "attention to rest on",
        choices=("none", "learned"),
    )
    slot_scale: float | None = key(
        None,
        "start value of a factor that each layer learns for the input of each memory's slots; "
        "null: no factor, as the authors",
    )
    start: str = key(
        "mean",
        "what the rows of new tokens begin as: mean of all rows, a text that is one token, or a "
        "token's number",
    )


def comet_keys(model: ModelConfig) -> dict[str, Any]:
    """Those of CometConfig: all but `start`, which is over once a model is there."""
    values = asdict(model)
    del values["start"]
    return values


@dataclass(frozen=True)
class BackboneConfig:
    path: str | None = key(
        None,
        "folder or hub id of a pre-trained decoder or a CoMeT; null: from scratch, with the keys "
        "below",
    )
    model_type: str = key(
        "qwen3",
        "from scratch: decoder family",
        choices=("qwen3", "qwen2", "llama", "mistral", "smollm3"),
    )
    hidden_size: int = key(128, "from scratch: width (d)", min=1)
    num_hidden_layers: int = key(2, "from scratch: layers (L)", min=1)
    num_attention_heads: int = key(4, "from scratch: query heads", min=1)
    num_key_value_heads: int = key(
        4, "from scratch: key/value heads; they divide the query heads", min=1
    )
    head_dim: int = key(32, "from scratch: width of a head; even, for the rotary embedding", min=2)
    intermediate_size: int = key(384, "from scratch: width of the MLP", min=1)
    rope_theta: float = key(10000.0, "from scratch: base of the rotary embedding", above=0)
    initializer_range: float = key(0.02, "from scratch: standard deviation of new weights", above=0)
    tie_word_embeddings: bool = key(True, "from scratch: the head shares the embedding's weights")
    vocab_size: int = key(
        512,
        "from scratch: size of the tokenizer that is trained on the data (256 are bytes)",
        min=260,
    )
    lookback: list[int] | None = key(
        None,
        "from scratch, with qwen2: a start that looks things up; how far back each head of layer 1 "
        "looks; null: all drawn",
        min=0,
        max=65536,
    )
    attn_implementation: str = key("sdpa", "attention kernel", choices=("sdpa", "eager"))
