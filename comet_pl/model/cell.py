"""The cell, a layer on a chunk: the one file that knows how a Hugging Face layer is built.

Legend: B rows, W own tokens of a chunk, M memory slots, L key columns, d width, H query heads,
H' key/value heads, h head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from comet_pl.model.attention import attend
from comet_pl.model.cache import LayerMemory
from comet_pl.model.chunk_batch import Chunk, Rope, Slots
from comet_pl.model.configuration_comet import CometConfig
from comet_pl.model.memory import GlobalMemory, ResidualAdapter, TemporaryMemory
from comet_pl.model.norm import fuse_norms

# model_type -> who uses it. These layers share the cell: norm, q/k/v/o projections, RoPE, norm,
# MLP. The modules taken over, or Cell.__init__, know where they differ (biases, norms of queries
# and keys, layers without RoPE).
SUPPORTED = {
    "llama": "Llama 2 and 3, SmolLM2",
    "mistral": "Mistral without sliding window",
    "qwen2": "Qwen2, Qwen2.5: biases in q, k, v",
    "qwen3": "Qwen3: norms of queries and keys",
    "smollm3": "SmolLM3: layers without RoPE",
}
BY_LENGTH = ("dynamic", "longrope")  # RoPE kinds whose frequencies depend on the text's length


def check_backbone(config: PretrainedConfig) -> None:
    """Raises ValueError for a decoder that the cell cannot run exactly."""
    if config.model_type not in SUPPORTED:
        known = "; ".join(f"{name} ({users})" for name, users in SUPPORTED.items())
        raise ValueError(
            f"backbone model_type {config.model_type!r} is not supported; supported: {known}. A "
            "decoder with the same kind of layer needs a line in SUPPORTED, any other its own "
            "Cell.project and Cell.forward: both are in comet_pl/model/cell.py"
        )
    window = getattr(config, "sliding_window", None)
    sliding = window is not None and getattr(config, "use_sliding_window", True)
    if sliding or "sliding_attention" in (getattr(config, "layer_types", None) or []):
        switch = hasattr(config, "use_sliding_window")
        key = "use_sliding_window=False" if switch else "sliding_window=None"
        raise ValueError(
            f"backbone: its sliding window of {window} tokens would cut the memory slots off; set "
            f"{key}"
        )
    if getattr(config, "attention_dropout", 0):
        raise ValueError(
            f"backbone attention_dropout: {config.attention_dropout} given, but the cell's "
            "attention has none; set it to 0"
        )


def check_positions(config: PretrainedConfig, columns: int) -> None:
    """Raises ValueError where a chunk's positions reach lengths at which RoPE changes frequencies.

    Keys that are kept from earlier calls would no longer fit.
    """
    rope = config.rope_parameters
    if rope["rope_type"] not in BY_LENGTH:
        return
    limit = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    if columns > limit:
        raise ValueError(
            f"backbone rope_type {rope['rope_type']!r} changes beyond {limit} positions, but a "
            f"chunk (memory slots, text, compression and readout tokens) takes {columns}; choose a "
            "smaller chunk_size, global_size or temporary_capacity"
        )


class Decoder(nn.Module):
    """The Hugging Face model's modules under their own names, each layer a cell."""

    def __init__(self, model: nn.Module, config: CometConfig):
        super().__init__()
        fuse_norms(model)
        for name, module in model.named_children():
            self.add_module(name, module)
        self.layers = nn.ModuleList(Cell(layer, config) for layer in self.layers)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Decoder:
        """Moves and casts as every module, but RoPE's frequencies keep their precision: half of it
        would bend the positions."""
        exact = dict(self.rotary_emb.named_buffers())
        super()._apply(fn, recurse)
        for name, now in self.rotary_emb.named_buffers():
            if now.dtype.itemsize < exact[name].dtype.itemsize:
                frequencies = exact[name].to(now.device)
                self.rotary_emb.register_buffer(name, frequencies, persistent=False)
        return self


class Cell(nn.Module):
    """A decoder layer with its memories.

    It takes over the layer's submodules, so that parameters keep their Hugging Face names.
    """

    def __init__(self, layer: nn.Module, config: CometConfig):
        super().__init__()
        for name, module in layer.named_children():
            self.add_module(name, module)
        self.config = config.backbone_config
        self.scaling = float(layer.self_attn.scaling)  # type: ignore[arg-type]
        self.use_rope = bool(getattr(layer.self_attn, "use_rope", True))
        self.scales = config.slot_scale is not None
        self.holds_pending = config.layout == "interleaved"
        has_global, has_temporary = config.global_size > 0, config.compression_stride is not None
        self.global_memory = GlobalMemory(config) if has_global else None
        self.temporary_memory = TemporaryMemory(config) if has_temporary else None
        self.sink = None
        if config.sink == "learned":
            self.sink = nn.Parameter(torch.empty(self.config.hidden_size))
        self.adapter = None
        if config.shared_adapter and (has_global or has_temporary):
            self.adapter = ResidualAdapter(self.config.hidden_size, config.adapter_rank)

    def forward(
        self, hidden: Tensor, memory: LayerMemory, chunk: Chunk
    ) -> tuple[Tensor, LayerMemory]:
        """(B, W, d) and the memory before -> the output (B, W, d) and the memory after.

        Writes to no argument unless chunk.in_place.
        """
        normed = self.input_layernorm(self.inputs(hidden, memory, chunk))
        if self.scales and chunk.slots is not None:
            normed = self.scaled(normed, chunk.slots)
        own = normed[:, normed.shape[1] - hidden.shape[1] :].contiguous()
        queries, values = self.project("q", own), self.project("v", normed)
        # RoPE in the residual's dtype, attention in the projections'.
        queries = self.rotate(queries, chunk.tokens.rope).to(values.dtype)
        keys = self.rotate(self.project("k", normed), chunk.rope).to(values.dtype)
        keys, values, memory = chunk.append_keys_values(memory, keys, values)
        out = attend(self.config._attn_implementation, queries, keys, values, chunk, self.scaling)
        hidden = hidden + self.self_attn.o_proj(out.transpose(1, 2).flatten(2))
        hidden = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return hidden, self.remember(hidden, memory, chunk)

    def project(self, which: str, normed: Tensor) -> Tensor:
        """(B, W, d) -> (B, heads, W, h), normalised where the decoder normalises them."""
        heads = getattr(self.self_attn, f"{which}_proj")(normed)
        heads = heads.unflatten(-1, (-1, self.self_attn.head_dim))
        norm = getattr(self.self_attn, f"{which}_norm", None)
        return (heads if norm is None else norm(heads)).transpose(1, 2)

    def rotate(self, x: Tensor, rope: Rope) -> Tensor:
        """RoPE on (B, heads, W, h), in layers that have it."""
        if not self.use_rope:
            return x
        cos, sin = rope
        a, b = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat([b, a], -1) * sin[:, None]

    def inputs(self, hidden: Tensor, memory: LayerMemory, chunk: Chunk) -> Tensor:
        """[sink | G | T | hidden] (B, M + W, d): what keys and values come from.

        A slot's output is never used: it has no query and no MLP.
        """
        if chunk.slots is None:
            return hidden
        parts = []
        if chunk.slots.sink and self.sink is not None:
            parts.append(self.sink.expand(len(hidden), 1, -1))
        if chunk.slots.global_slots and self.global_memory is not None:
            assert memory.state is not None
            parts.append(self.adapt(self.global_memory, memory.state))
        if chunk.slots.temporary_slots:
            assert memory.temporary is not None
            parts.append(memory.temporary[:, : chunk.slots.temporary_slots])
        return torch.cat([*parts, hidden], 1)

    def scaled(self, normed: Tensor, slots: Slots) -> Tensor:
        """(B, M + W, d) with each slot but the sink times its memory's factor."""
        sizes = slots.sink, slots.global_slots, slots.temporary_slots
        sink, state, temporary, own = normed.split([*sizes, normed.shape[1] - sum(sizes)], 1)
        if state.shape[1] and self.global_memory is not None:
            state = state * self.global_memory.factor.to(state.dtype)
        if temporary.shape[1] and self.temporary_memory is not None:
            temporary = temporary * self.temporary_memory.factor.to(state.dtype)
        return torch.cat([sink, state, temporary, own], 1)

    def remember(self, hidden: Tensor, memory: LayerMemory, chunk: Chunk) -> LayerMemory:
        """Keeps the outputs at compression tokens; where chunks close, writes both memories."""
        state, temporary, pending = memory.state, memory.temporary, memory.pending
        if self.temporary_memory is not None:
            outputs = chunk.append_outputs(pending, hidden)
            if chunk.closes and chunk.pending_after:
                assert outputs is not None
                outputs_now = outputs[:, : chunk.pending_after]
                new = self.adapt(self.temporary_memory, self.temporary_memory.norm(outputs_now))
                temporary = chunk.push(temporary, new)
            # In the trailing layout an open chunk has none.
            outputs = outputs if self.holds_pending else None
            pending = outputs if chunk.stores else pending if chunk.in_place else None
        if self.global_memory is not None and chunk.closes:
            previous = state if chunk.has_state else None
            new = self.global_memory.write(chunk.readout(hidden), previous, chunk.first)
            state = chunk.settle(state, new)
        return LayerMemory(state, temporary, memory.keys, memory.values, pending)

    def adapt(self, owner: GlobalMemory | TemporaryMemory, x: Tensor) -> Tensor:
        """Through the owner's residual adapter, or the layer's shared one, in its dtype."""
        adapter = self.adapter if owner.adapter is None else owner.adapter
        assert adapter is not None
        return adapter(x.to(adapter.down_proj.weight.dtype))
