"""The one file that knows how a Hugging Face decoder layer is built, and the cell: one layer on one chunk.

Legend: B rows, W own tokens of a step, M memory slots, L key columns, d width, H query heads, H' key/value heads, h head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from comet_pl.model.attention import attend
from comet_pl.model.cache import LayerMemory
from comet_pl.model.chunk_batch import Rope, Step
from comet_pl.model.configuration_comet import CometConfig
from comet_pl.model.memory import GlobalMemory, ResidualAdapter, TemporaryMemory

# model_type -> who uses it. What these layers have in common is the cell: norm, q/k/v/o projections, RoPE, norm, MLP. Where they differ
# (biases, norms of queries and keys, layers without RoPE) the modules taken over, or Cell.__init__, already know.
SUPPORTED = {
    "llama": "Llama 2 and 3, SmolLM2",
    "mistral": "Mistral without sliding window",
    "qwen2": "Qwen2, Qwen2.5: biases in q, k, v",
    "qwen3": "Qwen3: norms of queries and keys",
    "smollm3": "SmolLM3: layers without RoPE",
}
BY_LENGTH = ("dynamic", "longrope")  # RoPE kinds whose frequencies depend on how long the text is


def check_backbone(config: PretrainedConfig) -> None:
    """Raises ValueError for a decoder that the cell cannot run exactly."""
    if config.model_type not in SUPPORTED:
        known = "; ".join(f"{name} ({users})" for name, users in SUPPORTED.items())
        raise ValueError(
            f"backbone model_type {config.model_type!r} is not supported; supported: {known}. A decoder with the same kind of layer needs "
            "a line in SUPPORTED, any other its own Cell.project and Cell.forward: both are in comet_pl/model/cell.py"
        )
    window = getattr(config, "sliding_window", None)
    sliding = window is not None and getattr(config, "use_sliding_window", True)
    if sliding or "sliding_attention" in (getattr(config, "layer_types", None) or []):
        key = (
            "use_sliding_window=False"
            if hasattr(config, "use_sliding_window")
            else "sliding_window=None"
        )
        raise ValueError(
            f"backbone: its sliding window of {window} tokens would cut the memory slots off; set {key}"
        )
    if getattr(config, "attention_dropout", 0):
        raise ValueError(
            f"backbone attention_dropout: {config.attention_dropout} given, but the cell's attention has none; set it to 0"
        )


def check_positions(config: PretrainedConfig, columns: int) -> None:
    """Raises ValueError where a chunk's positions reach lengths at which this RoPE changes its frequencies: keys that are kept from earlier
    calls would no longer fit."""
    rope = config.rope_parameters
    if rope["rope_type"] not in BY_LENGTH:
        return
    limit = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    if columns > limit:
        raise ValueError(
            f"backbone rope_type {rope['rope_type']!r} changes beyond {limit} positions, but a chunk (memory slots, text, compression and "
            f"readout tokens) takes {columns}; choose a smaller chunk_size, global_size or temporary_capacity"
        )


class Decoder(nn.Module):
    """The Hugging Face model's modules under their own names (embed_tokens, layers, norm, rotary_emb), each layer a cell."""

    def __init__(self, model: nn.Module, config: CometConfig):
        super().__init__()
        for name, module in model.named_children():
            self.add_module(name, module)
        self.layers = nn.ModuleList(Cell(layer, config) for layer in self.layers)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Decoder:
        """Moves and casts as every module, but RoPE's frequencies never lose precision: half of it would bend the positions."""
        exact = dict(self.rotary_emb.named_buffers())
        super()._apply(fn, recurse)
        for name, now in self.rotary_emb.named_buffers():
            if now.dtype.itemsize < exact[name].dtype.itemsize:
                self.rotary_emb.register_buffer(name, exact[name].to(now.device), persistent=False)
        return self


class Cell(nn.Module):
    """A decoder layer with its memories. Takes over the layer's submodules, so their parameters keep their Hugging Face names."""

    def __init__(self, layer: nn.Module, config: CometConfig):
        super().__init__()
        for name, module in layer.named_children():
            self.add_module(name, module)
        self.config = config.backbone_config
        self.scaling = float(layer.self_attn.scaling)  # type: ignore[arg-type]
        self.use_rope = bool(getattr(layer.self_attn, "use_rope", True))
        has_global, has_temporary = config.global_size > 0, config.compression_stride is not None
        self.global_memory = GlobalMemory(config) if has_global else None
        self.temporary_memory = TemporaryMemory(config) if has_temporary else None
        shared = config.shared_adapter and (has_global or has_temporary)
        self.adapter = (
            ResidualAdapter(self.config.hidden_size, config.adapter_rank) if shared else None
        )

    def forward(
        self, hidden: Tensor, memory: LayerMemory, step: Step
    ) -> tuple[Tensor, LayerMemory]:
        """(B, W, d) and the memory before -> the layer's output (B, W, d) and the memory after. Writes nothing unless step.in_place."""
        normed = self.input_layernorm(hidden)
        queries = self.rotate(self.project("q", normed), step.rope)
        keys, values = self.rotate(self.project("k", normed), step.rope), self.project("v", normed)
        queries, keys = (
            queries.to(values.dtype),
            keys.to(values.dtype),
        )  # RoPE in the residual's dtype, attention in the projections'
        slots = self.slot_keys_values(memory, step)
        keys, values, memory = extend(memory, slots, keys, values, step)
        out = attend(self.config._attn_implementation, queries, keys, values, step, self.scaling)
        hidden = hidden + self.self_attn.o_proj(out.transpose(1, 2).flatten(2))
        hidden = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return hidden, self.remember(hidden, memory, step)

    def project(self, which: str, normed: Tensor) -> Tensor:
        """(B, W, d) -> (B, heads, W, h), normalised where the decoder normalises queries and keys."""
        heads = getattr(self.self_attn, f"{which}_proj")(normed).unflatten(
            -1, (-1, self.self_attn.head_dim)
        )
        norm = getattr(self.self_attn, f"{which}_norm", None)
        return (heads if norm is None else norm(heads)).transpose(1, 2)

    def rotate(self, x: Tensor, rope: Rope) -> Tensor:
        """RoPE on (B, heads, W, h), in layers that have it."""
        if not self.use_rope:
            return x
        cos, sin = (t[:, None] for t in rope)
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    def slot_keys_values(self, memory: LayerMemory, step: Step) -> tuple[Tensor, Tensor] | None:
        """Keys and values of the memory slots [G | T], (B, H', M, h) each. A slot's output is read by nobody: no query, no MLP."""
        if not step.opens:
            return None
        slots = []
        if step.global_slots and self.global_memory is not None and memory.state is not None:
            slots.append(self.adapt(self.global_memory, memory.state))
        if step.temporary_slots and memory.temporary is not None:
            slots.append(memory.temporary[:, : step.temporary_slots])
        normed = self.input_layernorm(torch.cat(slots, 1))
        assert step.slot_rope is not None
        keys, values = (
            self.rotate(self.project("k", normed), step.slot_rope),
            self.project("v", normed),
        )
        return keys.to(values.dtype), values

    def remember(self, hidden: Tensor, memory: LayerMemory, step: Step) -> LayerMemory:
        """Collects the outputs at compression tokens; where chunks close, writes both memories."""
        pending, temporary, state = memory.pending, memory.temporary, memory.state
        if self.temporary_memory is not None:
            outputs = pending
            if step.compression is not None and (step.closes or step.stores):
                outputs = append_pending(pending, take(hidden, step.compression), step)
            if step.closes and outputs is not None and step.pending_after:
                outputs_now = outputs[:, : step.pending_after]
                new = self.adapt(self.temporary_memory, self.temporary_memory.norm(outputs_now))
                temporary = push(temporary, new, step)
            pending = outputs if step.stores else pending if step.in_place else None
        if self.global_memory is not None and step.closes:
            assert step.readout is not None
            previous = state if step.has_state else None
            new_state = self.global_memory.write(take(hidden, step.readout), previous, step.first)
            if step.closing is not None:
                kept = torch.zeros_like(new_state) if state is None else state
                new_state = torch.where(
                    step.closing[:, None, None], new_state, kept.to(new_state.dtype)
                )
            state = put(state, new_state, step.in_place)
        return memory._replace(state=state, temporary=temporary, pending=pending)

    def adapt(self, owner: GlobalMemory | TemporaryMemory, x: Tensor) -> Tensor:
        """Through the owner's residual adapter, or the layer's shared one."""
        adapter = self.adapter if owner.adapter is None else owner.adapter
        assert adapter is not None
        return adapter(x)


def take(x: Tensor, where: Tensor | slice) -> Tensor:
    """Entries of (B, W, d): the same places of every row (slice), or (B, n) places."""
    return (
        x[:, where]
        if isinstance(where, slice)
        else x.gather(1, where[..., None].expand(-1, -1, x.shape[-1]))
    )


def put(buffer: Tensor | None, new: Tensor, in_place: bool) -> Tensor:
    """`new`, written to the front of the buffer if there is one to write to."""
    if not in_place or buffer is None:
        return new
    buffer[:, : new.shape[1]] = new
    return buffer


def widen(x: Tensor, size: int, dim: int) -> Tensor:
    """x with at least `size` entries along dim, zeros behind."""
    if x.shape[dim] >= size:
        return x
    shape = list(x.shape)
    shape[dim] = size - x.shape[dim]
    return torch.cat([x, x.new_zeros(shape)], dim)


def append_pending(pending: Tensor | None, new: Tensor, step: Step) -> Tensor:
    """Outputs X of the open chunk, new ones behind those already held."""
    write = step.in_place and step.stores
    if step.pending_slot is not None:
        size = step.pending_after + 1
        old = (
            new.new_zeros(new.shape[0], size, new.shape[2])
            if pending is None
            else widen(pending, size, 1)
        )
        slot = step.pending_slot[..., None].expand_as(new)
        return (
            old.scatter_(1, slot, new.to(old.dtype))
            if write
            else old.scatter(1, slot, new.to(old.dtype))
        )
    if write:
        assert pending is not None
        pending = widen(pending, step.pending_after, 1)
        pending[:, step.pending : step.pending_after] = new
        return pending
    return (
        new
        if pending is None or not step.pending
        else torch.cat([pending[:, : step.pending], new], 1)
    )


def push(temporary: Tensor | None, new: Tensor, step: Step) -> Tensor:
    """T after a chunk: the last K of [T ; new]."""
    t = step.temporary_before
    entries = (
        new
        if temporary is None or t == 0
        else torch.cat([temporary[:, :t], new.to(temporary.dtype)], 1)
    )
    if step.temporary_index is not None:
        entries = take(entries, step.temporary_index)
    return put(temporary, entries[:, -step.capacity :], step.in_place)


def extend(
    memory: LayerMemory,
    slots: tuple[Tensor, Tensor] | None,
    keys: Tensor,
    values: Tensor,
    step: Step,
) -> tuple[Tensor, Tensor, LayerMemory]:
    """Key columns of the step: what the open chunk holds, the memory slots of chunks that open, the own tokens. (B, H', L, h) twice."""
    pairs = zip((memory.keys, memory.values), slots or (None, None), (keys, values), strict=True)
    extended = [_extend(*pair, step) for pair in pairs]
    full = [t[:, :, : step.columns] for t in extended]
    if step.in_place:
        if step.stores:
            memory = memory._replace(keys=extended[0], values=extended[1])
    else:
        kept = extended if step.stores else (None, None)
        memory = memory._replace(keys=kept[0], values=kept[1])
    return full[0], full[1], memory


def _extend(held: Tensor | None, slots: Tensor | None, own: Tensor, step: Step) -> Tensor:
    write = step.in_place and step.stores
    if step.uniform:
        if write:
            held = widen(held, step.columns, 2)  # type: ignore[arg-type]
            if slots is not None:
                held[:, :, : slots.shape[2]] = slots
            held[:, :, step.past : step.columns] = own
            return held
        before = (
            [held[:, :, : step.past].to(own.dtype)]
            if step.continues and held is not None
            else [slots]
            if slots is not None
            else []
        )
        return torch.cat([*before, own], 2) if before else own
    size = step.columns + 1  # the last column takes what nobody reads
    if held is None or not (write or step.continues):
        held = own.new_zeros(*own.shape[:2], size, own.shape[3])
    held = widen(held, size, 2)
    for new, positions in ((slots, step.slot_positions), (own, step.positions)):
        if new is not None:
            index = positions[:, None, :, None].expand_as(new)  # type: ignore[index]
            held = (
                held.scatter_(2, index, new.to(held.dtype))
                if write
                else held.scatter(2, index, new.to(held.dtype))
            )
    return held
