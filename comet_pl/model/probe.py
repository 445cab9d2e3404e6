"""What each cell finds in its memory before a chunk of one text, and where its attention goes.

Legend: m global slots, n temporary slots, W own tokens of a chunk, L key columns, H query heads,
H' key/value heads, h head width, d width, Q queries.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from comet_pl.model.cache import LayerMemory
from comet_pl.model.cell import Cell
from comet_pl.model.chunk_batch import Chunk
from comet_pl.model.configuration_comet import wide
from comet_pl.model.modeling_comet import CometForCausalLM


class MemoryView(NamedTuple):
    """A layer's memory before a chunk; None: the model has no such memory."""

    state: Tensor | None  # S (m, d)
    global_slots: Tensor | None  # G (m, d), what S is to attention
    temporary: Tensor | None  # T (n, d)
    attention: Tensor  # (3,) shares of a text token's attention: G, T, the chunk itself


@torch.no_grad()
def probe_memory(
    model: CometForCausalLM, ids: Tensor, show: Callable[[int, MemoryView], None], queries: int
) -> None:
    """Calls show(layer, view) for each cell of each chunk that sees memory.

    Args:
        ids: (1, N) without padding.
        queries: text tokens of a chunk whose attention is computed, apart from the model's own.
    """

    def look(layer: int, cell: Cell, inputs: tuple[Tensor, LayerMemory, Chunk]) -> None:
        hidden, memory, chunk = inputs
        if chunk.slots is None:
            return
        text = torch.nonzero(chunk.tokens.source[0] < ids.shape[1])[:, 0]
        chosen = np.linspace(0, len(text) - 1, min(queries, len(text))).round().astype(int)
        places = text[torch.from_numpy(chosen).to(text.device)]
        state = slots = temporary = None
        if chunk.slots.global_slots and memory.state is not None and cell.global_memory is not None:
            state, slots = memory.state[0], cell.adapt(cell.global_memory, memory.state)[0]
        if chunk.slots.temporary_slots and memory.temporary is not None:
            temporary = memory.temporary[0, : chunk.slots.temporary_slots]
        shares = attention_shares(cell, hidden, memory, chunk, places)
        show(layer, MemoryView(state, slots, temporary, shares))

    cells: Any = enumerate(model.model.layers)
    hooks = [cell.register_forward_pre_hook(partial(look, i)) for i, cell in cells]
    try:
        # The hooks would become a part of compiled cells.
        with torch.compiler.set_stance("force_eager"):
            model(ids, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()


def attention_shares(
    cell: Cell, hidden: Tensor, memory: LayerMemory, chunk: Chunk, places: Tensor
) -> Tensor:
    """(3,) attention mass of own tokens on [global slots, temporary slots, own chunk]; the rest is
    on a sink.

    It is the mean over heads and tokens of an explicit softmax.

    Args:
        hidden: (1, W, d); memory, chunk: what the cell is called with as a chunk begins.
        places: (Q,) the own tokens.
    """
    assert chunk.slots is not None
    normed = cell.input_layernorm(cell.inputs(hidden, memory, chunk))
    if cell.scales:
        normed = cell.scaled(normed, chunk.slots)
    keys = cell.rotate(cell.project("k", normed), chunk.rope)  # (1, H', L, h)
    own = normed[:, normed.shape[1] - hidden.shape[1] :]
    cos, sin = (t[:, places] for t in chunk.tokens.rope)
    queries = cell.rotate(cell.project("q", own[:, places]), (cos, sin))  # (1, H, Q, h)
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1)
    dtype = wide(keys.dtype)
    with torch.autocast(places.device.type, enabled=False):
        scores = queries.to(dtype) @ keys.to(dtype).transpose(2, 3) * cell.scaling
    seen = chunk.mask[0, 0, places]
    mass = scores.masked_fill(~seen, -torch.inf).softmax(-1).mean((0, 1, 2))  # (L,)
    parts = mass.split([*chunk.slots, len(mass) - sum(chunk.slots)])
    return torch.stack([part.sum() for part in parts[1:]]).cpu()
