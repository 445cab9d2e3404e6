"""CometConfig: a backbone's configuration plus the memory's."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from comet_pl.model.chunk_layout import NO_STRIDE, RowClock, compression_tokens

LAYOUTS = ("interleaved", "trailing")
SINKS = ("none", "learned")
GATES = ("scalar", "elementwise", "none")
# These shape the weights: a loaded checkpoint's cannot be overridden.
WEIGHT_KEYS = ("adapter_rank", "shared_adapter", "gate", "sink", "slot_scale")
KEYS = (
    "chunk_size",
    "global_size",
    "compression_stride",
    "temporary_capacity",
    "gate_bias",
    "rollover",
    "layout",
    *WEIGHT_KEYS,
)


_on_first_use: Callable[[], Any] = lambda: None  # noqa: E731


def on_first_use(load: Callable[[], Any]) -> None:
    """Calls `load` whenever a configuration is made: AutoModelForCausalLM then knows CoMeT, while
    `import comet_pl` alone stays quick."""
    global _on_first_use
    _on_first_use = load


def check_keys(comet: dict[str, Any]) -> None:
    """Raises ValueError for what is no key of the memory."""
    for key in comet:
        if key not in KEYS:
            raise ValueError(f"comet[{key!r}]: no such key; known: {', '.join(sorted(KEYS))}")


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32, or a wider dtype as it is: for what half precision would spoil.

    Such are S and its gate. S is written once a chunk with a gate near 1; in bfloat16 gates above
    0.998 are 1, and small changes of S are lost.
    """
    return torch.promote_types(dtype, torch.float32)


def buffer_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a cache's tensor (a key of `cache_shapes`) in a model of this dtype."""
    return wide(dtype) if name == "state" else dtype


class CometConfig(PretrainedConfig):
    """What a CoMeT is (paper's notation in brackets).

    Args:
        backbone_config: configuration of the decoder (object or dict). Its `vocab_size` is the text
            vocabulary; the new rows (one compression token, m readout tokens) follow it, unless
            their ids are given.
        chunk_size: text tokens a chunk (C).
        global_size: readout tokens = global memory slots (m); 0: no global memory.
        compression_stride: a compression token after every s text tokens (s); None: no temporary
            memory.
        temporary_capacity: temporary memory slots (K).
        adapter_rank: rank of the residual adapters (r).
        shared_adapter: one adapter a layer for both memories (the paper's text) instead of one each
            (the authors' code).
        gate: "scalar" (one value a slot), "elementwise" (one a channel, low rank 2d -> r -> d) or
            "none" (S = candidate).
        gate_bias: start value of a bias inside the gate's sigmoid; None: no bias (the authors).
            Positive: retain first.
        layout: "interleaved" (the authors: a compression token after every s text tokens) or
            "trailing" (a chunk's text, then its compression tokens, then its readout tokens: text
            is as in the plain decoder, and internal tokens have no logits).
        sink: "learned": in front of the memory a slot more, of which each layer learns the hidden
            state; attention rests on it as on a text's first token. "none": no such slot.
        slot_scale: start value of a factor that each layer learns for each memory: what a slot's
            normalised input, and so its value and key, is multiplied by. None: no factor (the
            authors).
        rollover: False: a call that continues a cache never closes the open chunk.
        compression_token_id, readout_token_ids: rows of the new tokens; None: after the text's.
        first_new_id: ids from here on are not text and are suppressed in generation.

    Raises:
        ValueError: a key with an impossible value.
    """

    model_type = "comet"
    sub_configs = {"backbone_config": AutoConfig}
    has_no_defaults_at_init = True
    keys_to_ignore_at_inference = ["past_key_values"]  # by Trainer, which would gather them

    def __init__(
        self,
        backbone_config: PretrainedConfig | dict[str, Any] | None = None,
        chunk_size: int = 2048,
        global_size: int = 512,
        compression_stride: int | None = 8,
        temporary_capacity: int = 2048,
        adapter_rank: int = 8,
        shared_adapter: bool = False,
        gate: str = "scalar",
        gate_bias: float | None = None,
        rollover: bool = True,
        layout: str = "interleaved",
        sink: str = "none",
        slot_scale: float | None = None,
        compression_token_id: int | None = None,
        readout_token_ids: list[int] | None = None,
        first_new_id: int | None = None,
        **kwargs: Any,
    ):
        if backbone_config is None:
            raise ValueError(
                "backbone_config: missing; give a decoder's configuration, such as Qwen3Config(...)"
            )
        _on_first_use()
        if isinstance(backbone_config, dict):
            backbone_config = AutoConfig.for_model(**backbone_config)
        # A copy of ours: the attention implementation and the vocabulary are set on it.
        backbone_config = copy.deepcopy(backbone_config)
        self.chunk_size, self.global_size = chunk_size, global_size
        self.compression_stride, self.temporary_capacity = compression_stride, temporary_capacity
        self.adapter_rank, self.shared_adapter = adapter_rank, shared_adapter
        self.gate, self.gate_bias, self.rollover = gate, gate_bias, rollover
        self.layout, self.sink, self.slot_scale = layout, sink, slot_scale
        self.check()
        next_id = backbone_config.vocab_size
        self.first_new_id = next_id if first_new_id is None else first_new_id
        if compression_token_id is None and compression_stride is not None:
            compression_token_id, next_id = next_id, next_id + 1
        if readout_token_ids is None:
            readout_token_ids = list(range(next_id, next_id + global_size))
            next_id += global_size
        if len(readout_token_ids) != global_size:
            raise ValueError(
                f"readout_token_ids: {len(readout_token_ids)} ids given, but global_size is "
                f"{global_size}"
            )
        backbone_config.vocab_size = next_id
        self.compression_token_id = compression_token_id
        self.readout_token_ids = list(readout_token_ids)
        self.backbone_config = backbone_config
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"):
            kwargs.setdefault(name, getattr(backbone_config, name, None))
        super().__init__(**kwargs)

    def check(self) -> None:
        """Raises ValueError for the first impossible value."""
        for key, least in (
            ("chunk_size", 1),
            ("global_size", 0),
            ("temporary_capacity", 1),
            ("adapter_rank", 1),
        ):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{key}: {value!r} given, a whole number >= {least} is needed")
        s = self.compression_stride
        if s is not None and (not isinstance(s, int) or isinstance(s, bool) or s < 1):
            raise ValueError(
                f"compression_stride: {s!r} given, a whole number >= 1 or None (no temporary "
                "memory) is needed"
            )
        for key in ("rollover", "shared_adapter"):
            if not isinstance(getattr(self, key), bool):
                raise ValueError(f"{key}: {getattr(self, key)!r} given, True or False is needed")
        for key, allowed in (("gate", GATES), ("layout", LAYOUTS), ("sink", SINKS)):
            if getattr(self, key) not in allowed:
                given = getattr(self, key)
                raise ValueError(f"{key}: {given!r} given, one of {', '.join(allowed)} is needed")
        if self.sink != "none" and not self.global_size and s is None:
            raise ValueError(
                f"sink: {self.sink!r} given, but a model without memory has no slots before which "
                "it could stand"
            )
        for key, none in (("gate_bias", "no bias"), ("slot_scale", "no factor")):
            value = getattr(self, key)
            if value is not None and not isinstance(value, (int, float)):
                raise ValueError(f"{key}: {value!r} given, a number or None ({none}) is needed")

    def override(self, changes: dict[str, Any]) -> None:
        """Changes memory keys of a loaded checkpoint's configuration in place.

        Raises:
            ValueError: an unknown key, a key that shapes the weights, or more readout tokens than
                the checkpoint has.
        """
        check_keys(changes)
        for key, value in changes.items():
            if key in WEIGHT_KEYS and value != getattr(self, key):
                raise ValueError(
                    f"comet[{key!r}]: {value!r} given, but this checkpoint's weights were made "
                    f"with {getattr(self, key)!r}"
                )
            setattr(self, key, value)
        self.check()
        if self.global_size > len(self.readout_token_ids):
            has = len(self.readout_token_ids)
            raise ValueError(
                f"comet['global_size']: {self.global_size} given, the checkpoint has {has} readout "
                "tokens"
            )
        if self.compression_stride is not None and self.compression_token_id is None:
            raise ValueError(
                "comet['compression_stride']: this checkpoint was made without a compression token"
            )
        self.readout_token_ids = self.readout_token_ids[: self.global_size]

    def clock(self, stride: int | None = None) -> RowClock:
        """A row before its first token. stride: instead of s."""
        stride = stride or self.compression_stride or NO_STRIDE
        return RowClock(stride=stride, trailing=self.layout == "trailing", sink=self.sink != "none")

    def positions(self, stride: int | None = None) -> int:
        """The most positions of a chunk of C tokens: slots, text, compression and readout tokens.

        Args:
            stride: instead of s.
        """
        stride = stride or self.compression_stride or NO_STRIDE
        slots = self.global_size + (self.temporary_capacity if self.compression_stride else 0)
        slots += self.sink != "none"
        own = self.chunk_size + compression_tokens(self.chunk_size, stride) + self.global_size
        return slots + own

    def cache_shapes(self, batch: int, stride: int | None = None) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor that one layer of a preallocated CometCache holds.

        Args:
            stride: the least of its rows', instead of s.
        """
        backbone, s = self.backbone_config, stride or self.compression_stride or NO_STRIDE
        width, heads = backbone.hidden_size, backbone.num_key_value_heads
        head = getattr(backbone, "head_dim", None) or width // backbone.num_attention_heads
        # One column more, where ragged batches put what is never read.
        keys = (batch, heads, self.positions(s) + 1, head)
        shapes: dict[str, tuple[int, ...]] = {"keys": keys, "values": keys}
        if self.global_size:
            shapes["state"] = (batch, self.global_size, width)
        if self.compression_stride:
            shapes["temporary"] = (batch, self.temporary_capacity, width)
        if self.compression_stride and self.layout == "interleaved":
            shapes["pending"] = (batch, compression_tokens(self.chunk_size, s) + 1, width)
        return shapes

    def cache_bytes(
        self, batch: int = 1, dtype: torch.dtype = torch.float32, stride: int | None = None
    ) -> int:
        """Bytes of a CometCache for `batch` texts of any length, known beforehand.

        Args:
            dtype: the model's; S is float32 at least.
            stride: the least of its rows', if they have their own.
        """
        shapes = self.cache_shapes(batch, stride)
        layer = sum(
            math.prod(shape) * buffer_dtype(name, dtype).itemsize for name, shape in shapes.items()
        )
        return layer * self.backbone_config.num_hidden_layers

    def get_text_config(
        self, decoder: bool | None = None, encoder: bool | None = None
    ) -> PretrainedConfig:
        return self.backbone_config

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding, new ones included."""
        return self.backbone_config.vocab_size

    @property
    def new_token_ids(self) -> list[int]:
        """Ids that mean nothing as text; generation suppresses them."""
        return list(range(self.first_new_id, self.vocab_size))


AutoConfig.register("comet", CometConfig)
