"""The readable reference: memory slots as ordinary tokens of every layer.

The comparison that the model must equal (tests/benchmarks/test_benchmark.py) and beat (benchmarks/prefill.py). Each layer overwrites the slots at its
input and then runs Hugging Face's own decoder layer over the whole list [G | T | text and compression tokens | readout tokens]: queries,
attention output and MLP for the slots too, although nobody reads their output. Slots have queries here, so lower-right causal is plain
causal and one call of the best kernel does it. The layout of a chunk is written out token by token, independent of comet_pl's arithmetic.

Legend: B rows of equal length, N text tokens, W own tokens of a chunk, d width, m global slots, s stride, K temporary capacity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from comet_pl import CometForCausalLM

TEXT, COMPRESSION, READOUT = range(3)


class SlotsInFull:
    """Reads texts with a CometForCausalLM's weights; holds what the model keeps in a CometCache. Needs attention "sdpa"."""

    def __init__(self, model: CometForCausalLM):
        assert model.config.backbone_config._attn_implementation == "sdpa", (
            "eager attention would need a mask"
        )
        self.model, self.config = model, model.config
        layers = len(model.model.layers)
        self.states: list[Tensor | None] = [
            None
        ] * layers  # S (B, m, d) of each layer; None before the first chunk
        self.temporary: list[Tensor | None] = [None] * layers  # T (B, <= K, d), oldest first

    def read(self, ids: Tensor, chunk_sizes: list[int], logits_to_keep: int = 0) -> Tensor:
        """(B, N) text tokens, all chunks closing -> logits (B, N, V); of the last n columns only, if logits_to_keep = n > 0."""
        outputs = [
            self.chunk(chunk)[:, -logits_to_keep:] for chunk in ids.split(chunk_sizes, 1)
        ]  # [:, -0:] is all of it
        hidden = torch.cat(outputs, 1)[:, -logits_to_keep:]
        return self.model.lm_head(self.model.model.norm(hidden))

    def chunk(self, text: Tensor) -> Tensor:
        """One closed chunk (B, n) through all layers -> the last layer's outputs at its text tokens (B, n, d)."""
        decoder = self.model.model
        kinds, ids = self.own_tokens(text)
        own = decoder.embed_tokens(ids)
        for i, cell in enumerate(decoder.layers):
            slots = self.slots(i, cell)
            x = torch.cat([*slots, own], 1)
            positions = torch.arange(x.shape[1], device=x.device)[None]
            x = (
                x
                + cell.self_attn(
                    cell.input_layernorm(x), decoder.rotary_emb(x, positions), attention_mask=None
                )[0]
            )
            x = x + cell.mlp(cell.post_attention_layernorm(x))
            own = x[:, -len(kinds) :]  # the slots' outputs go unread
            self.remember(i, cell, own[:, kinds == COMPRESSION], own[:, kinds == READOUT])
        return own[:, kinds == TEXT]

    def own_tokens(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """(B, n) -> kind (W,) and id (B, W) of each own token: s text tokens, their compression token, ...; the readout tokens last."""
        stride, compression = self.config.compression_stride, self.config.compression_token_id
        groups = text.split(stride or text.shape[1], 1)
        parts: list[tuple[int, Tensor]] = []
        for group in groups:
            parts.append((TEXT, group))
            if stride is not None:
                parts.append((COMPRESSION, group.new_full((len(text), 1), compression)))
        parts.append(
            (READOUT, text.new_tensor(self.config.readout_token_ids).expand(len(text), -1))
        )
        kinds = torch.cat(
            [torch.full((ids.shape[1],), kind, device=text.device) for kind, ids in parts]
        )
        return kinds, torch.cat([ids for _, ids in parts], 1)

    def slots(self, i: int, cell: torch.nn.Module) -> list[Tensor]:
        """[G, T] of layer i, as far as they exist."""
        state, temporary = self.states[i], self.temporary[i]
        found = [None if state is None else cell.adapt(cell.global_memory, state), temporary]
        return [slots for slots in found if slots is not None]

    def remember(self, i: int, cell: torch.nn.Module, compressed: Tensor, readout: Tensor) -> None:
        """Layer i's memories after a chunk, from its outputs at the compression tokens (B, c, d) and the readout tokens (B, m, d)."""
        if cell.global_memory is not None:
            self.states[i] = cell.global_memory.write(readout, self.states[i])
        if cell.temporary_memory is not None:
            new = cell.adapt(cell.temporary_memory, cell.temporary_memory.norm(compressed))
            old = [] if self.temporary[i] is None else [self.temporary[i]]
            self.temporary[i] = torch.cat([*old, new], 1)[:, -self.config.temporary_capacity :]
