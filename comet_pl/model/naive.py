"""The readable reference: memory slots as ordinary tokens of every layer.

The model must equal it (tests/benchmarks) and beat it (benchmarks/inference). Each layer overwrites
the slots at its input and then runs Hugging Face's own decoder layer over the whole list [G | T |
text and compression tokens | readout tokens]: queries, attention output and MLP for the slots too,
although their output is never used. Slots have queries here, so that lower-right causal is plain
causal. The layout of a chunk is written out token by token, apart from chunk_layout's arithmetic.

Legend: B rows of equal length, N text tokens, W own tokens of a chunk, d width, m global slots,
s stride, K temporary capacity.
"""

import torch
from torch import Tensor

from comet_pl.model.cell import Cell
from comet_pl.model.chunk_layout import COMPRESSION, READOUT, TEXT
from comet_pl.model.modeling_comet import CometForCausalLM


class SlotsInFull:
    """Reads texts with a CometForCausalLM's weights and holds what the model keeps in its cache.

    Needs attention "sdpa".
    """

    def __init__(self, model: CometForCausalLM):
        # Eager attention would need a mask.
        assert model.config.backbone_config._attn_implementation == "sdpa"
        assert model.config.layout == "interleaved" and model.config.sink == "none"
        assert model.config.slot_scale is None
        self.model, self.config = model, model.config
        layers = len(model.model.layers)
        # S (B, m, d) of each layer; None before the first chunk.
        self.states: list[Tensor | None] = [None] * layers
        self.temporary: list[Tensor | None] = [None] * layers  # T (B, <= K, d), oldest first

    def read(self, ids: Tensor, chunk_sizes: list[int], logits_to_keep: int = 0) -> Tensor:
        """(B, N) text tokens, all chunks closing -> logits (B, N, V).

        Args:
            logits_to_keep: n > 0: of the last n columns only.
        """
        # [:, -0:] is all of it.
        outputs = [self.chunk(chunk)[:, -logits_to_keep:] for chunk in ids.split(chunk_sizes, 1)]
        hidden = torch.cat(outputs, 1)[:, -logits_to_keep:]
        return self.model.lm_head(self.model.model.norm(hidden))

    def chunk(self, text: Tensor) -> Tensor:
        """One closed chunk (B, n) -> the last layer's outputs at its text tokens (B, n, d)."""
        decoder = self.model.model
        kinds, ids = self.own_tokens(text)
        own = decoder.embed_tokens(ids)
        for i, cell in enumerate(decoder.layers):
            slots = self.slots(i, cell)
            x = torch.cat([*slots, own], 1)
            positions = torch.arange(x.shape[1], device=x.device)[None]
            rope, normed = decoder.rotary_emb(x, positions), cell.input_layernorm(x)
            x = x + cell.self_attn(normed, rope, attention_mask=None)[0]
            x = x + cell.mlp(cell.post_attention_layernorm(x))
            own = x[:, -len(kinds) :]
            self.remember(i, cell, own[:, kinds == COMPRESSION], own[:, kinds == READOUT])
        return own[:, kinds == TEXT]

    def own_tokens(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """(B, n) -> kind (W,) and id (B, W) of each own token."""
        stride, compression = self.config.compression_stride, self.config.compression_token_id
        groups = text.split(stride or text.shape[1], 1)
        parts: list[tuple[int, Tensor]] = []
        for group in groups:
            parts.append((TEXT, group))
            if stride is not None:
                parts.append((COMPRESSION, group.new_full((len(text), 1), compression)))
        readout = text.new_tensor(self.config.readout_token_ids)
        parts.append((READOUT, readout.expand(len(text), -1)))
        kinds = torch.cat([torch.full_like(ids[0], kind) for kind, ids in parts])
        return kinds, torch.cat([ids for _, ids in parts], 1)

    def slots(self, i: int, cell: Cell) -> list[Tensor]:
        """[G, T] of layer i, as far as they exist."""
        slots, state, temporary = [], self.states[i], self.temporary[i]
        if state is not None and cell.global_memory is not None:
            slots.append(cell.adapt(cell.global_memory, state))
        return slots if temporary is None else [*slots, temporary]

    def remember(self, i: int, cell: Cell, compressed: Tensor, readout: Tensor) -> None:
        """Layer i's memories after a chunk, from its outputs at the chunk's internal tokens.

        Args:
            compressed: (B, c, d) at the compression tokens. readout: (B, m, d).
        """
        if cell.global_memory is not None:
            self.states[i] = cell.global_memory.write(readout, self.states[i])
        if cell.temporary_memory is not None:
            new = cell.adapt(cell.temporary_memory, cell.temporary_memory.norm(compressed))
            old = self.temporary[i]
            entries = new if old is None else torch.cat([old, new], 1)
            self.temporary[i] = entries[:, -self.config.temporary_capacity :]
