"""What the memories hold and who attends to them, on one text.

Legend: m global slots, n temporary slots, W own tokens of a chunk, L key columns, H query heads, h head width, d width, Q queries.
S is a layer's state, G = S + W_up W_down S its global memory and T its temporary memory (comet_pl/model/memory.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from comet_pl.model.cache import LayerMemory
from comet_pl.model.cell import Cell
from comet_pl.model.chunk_batch import UniformChunk
from comet_pl.model.modeling_comet import CometForCausalLM

CHUNKS = 64  # of the text are read at most
QUERIES = 8  # text tokens of a chunk whose attention is computed again
SLOTS = 32  # global slots whose course is followed
PARTS = ("global", "temporary", "own")


@dataclass
class MemoryReport:
    """layers: for each {tag: value}, see read_memory. similarity: (t, t), or None without a global memory."""

    layers: list[dict[str, float]]
    similarity: np.ndarray | None


@torch.no_grad()
def read_memory(model: CometForCausalLM, ids: Tensor) -> MemoryReport | None:
    """Reads the first CHUNKS chunks of a text and looks at every cell's memory; None: the text has one chunk only.

    The values of a layer:

    - norm_state, norm_global, norm_temporary: mean Euclidean norm of a slot of S, G, T, as the last chunk finds them.
    - rank_state, rank_temporary: effective rank of S (m, d) and T (n, d), as the last chunk finds them.
    - attention_global, attention_temporary, attention_own: where a text token's attention goes, mean over heads and over QUERIES tokens of
      each chunk but the first; they sum to 1, and own is the chunk itself. Computed apart from the model's own attention.

    similarity: cosine of a slot of S after chunk t with the same slot after chunk u, mean over slots (SLOTS of them) and layers.

    Args:
        ids: (1, N) without padding.
    """
    ids = ids[:, : CHUNKS * model.config.chunk_size]
    chunks = -(-ids.shape[1] // model.config.chunk_size)
    if chunks < 2:
        return None
    looks = [_Look(chunks - 1, ids.shape[1]) for _ in model.model.layers]
    hooks = [
        cell.register_forward_pre_hook(look.at)
        for cell, look in zip(model.model.layers, looks, strict=True)
    ]
    try:
        with torch.compiler.set_stance(
            "force_eager"
        ):  # of compiled cells the hooks would become a part
            model(ids, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    likeness = [slot_similarity(torch.stack(look.states)).numpy() for look in looks if look.states]
    return MemoryReport(
        [look.values() for look in looks], np.mean(likeness, 0) if likeness else None
    )


class _Look:
    """What is seen before each chunk of a layer but the first.

    Args:
        last: chunks that will be looked at. columns: N of the text.
    """

    def __init__(self, last: int, columns: int):
        self.last, self.columns, self.seen = last, columns, 0
        self.states: list[Tensor] = []
        self.shares: list[Tensor] = []
        self.slots: dict[str, Tensor] = {}

    def at(self, cell: Cell, inputs: Any) -> None:
        hidden, memory, chunk = inputs
        if not chunk.past or chunk.slots is None:
            return
        self.seen += 1
        text = torch.nonzero(chunk.tokens.source[0] < self.columns)[:, 0]
        chosen = np.linspace(0, len(text) - 1, min(QUERIES, len(text))).round().astype(int)
        self.shares.append(
            attention_shares(
                cell, hidden, memory, chunk, text[torch.from_numpy(chosen).to(text.device)]
            )
        )
        state = memory.state if chunk.slots.global_slots else None
        if state is not None:
            followed = (
                np.linspace(0, state.shape[1] - 1, min(SLOTS, state.shape[1])).round().astype(int)
            )
            self.states.append(state[0, followed].float().cpu())
        if self.seen == self.last:  # here, as the weights of shards are whole in a forward
            if state is not None and cell.global_memory is not None:
                self.slots |= {
                    "state": state[0],
                    "global": cell.adapt(cell.global_memory, state)[0],
                }
            if chunk.slots.temporary_slots:
                self.slots["temporary"] = memory.temporary[0, : chunk.slots.temporary_slots]

    def values(self) -> dict[str, float]:
        found = {
            f"norm_{name}": float(slots.float().norm(dim=-1).mean())
            for name, slots in self.slots.items()
        }
        found |= {
            f"rank_{name}": effective_rank(slots)
            for name, slots in self.slots.items()
            if name != "global"
        }
        shares = (
            torch.stack(self.shares).mean(0).tolist() if self.shares else []
        )  # none: no memory at all
        return found | {
            f"attention_{name}": share
            for name, share in zip(PARTS, shares, strict=False)
            if name == "own" or name in self.slots
        }


def attention_shares(
    cell: Cell, hidden: Tensor, memory: LayerMemory, chunk: UniformChunk, places: Tensor
) -> Tensor:
    """(3,) attention mass of own tokens on [global slots, temporary slots, own chunk], mean over heads and tokens; by explicit softmax.

    Args:
        hidden: (1, W, d), memory, chunk: what the cell is called with, at a chunk's begin. places: (Q,) of the own tokens to look at.
    """
    normed = cell.input_layernorm(hidden)
    assert chunk.slots is not None
    slots = cell.slot_keys_values(memory, chunk)
    keys = cell.rotate(cell.project("k", normed), chunk.tokens.rope)
    keys = keys if slots is None else torch.cat([slots[0].to(keys.dtype), keys], 2)  # (1, H', L, h)
    cos, sin = (t[:, places] for t in chunk.tokens.rope)
    queries = cell.rotate(cell.project("q", normed[:, places]), (cos, sin))  # (1, H, Q, h)
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1)
    wide = torch.promote_types(keys.dtype, torch.float32)
    scores = queries.to(wide) @ keys.to(wide).transpose(2, 3) * cell.scaling
    seen = (
        torch.arange(chunk.columns, device=places.device)
        <= chunk.tokens.positions[0, places][:, None]
    )
    mass = scores.masked_fill(~seen, -torch.inf).softmax(-1).mean((0, 1, 2))  # (L,)
    return torch.stack(
        [part.sum() for part in mass.split([*chunk.slots[:2], chunk.columns - chunk.past])]
    ).cpu()


def effective_rank(slots: Tensor) -> float:
    """exp of the entropy of the normalised singular values (Roy and Vetterli, 2007), of (n, d): 1 if all slots are multiples of one vector,
    min(n, d) if they have nothing in common; 0 of zeros, NaN where a number is not finite."""
    slots = slots.to(torch.promote_types(slots.dtype, torch.float32))
    if not slots.isfinite().all():
        return float("nan")
    try:
        values = torch.linalg.svdvals(slots).double()
    except torch.linalg.LinAlgError:  # did not converge
        return float("nan")
    if not values.sum():
        return 0.0
    return float(torch.special.entr(values / values.sum()).sum().exp())


def slot_similarity(states: Tensor) -> Tensor:
    """(t, m, d) states over time -> (t, t) cosine of each slot with itself at other times, mean over slots."""
    directions = torch.nn.functional.normalize(states, dim=-1).flatten(1)
    return directions @ directions.T / states.shape[1]


def picture(report: MemoryReport) -> Figure:
    """Left: how alike the global memory is to itself over chunks; right: where attention goes, by layer."""
    figure = Figure(figsize=(10, 4.2), layout="constrained", dpi=100)
    likeness, attention = figure.subplots(1, 2)
    if report.similarity is not None:
        image = likeness.imshow(report.similarity, vmin=-1, vmax=1, cmap="RdBu_r", origin="lower")
        figure.colorbar(image, ax=likeness, label="cosine, mean of layers and slots")
        likeness.set_xlabel("state after chunk")
        likeness.set_ylabel("state after chunk")
        for axis in (likeness.xaxis, likeness.yaxis):
            axis.get_major_locator().set_params(integer=True)
    else:
        likeness.set_axis_off()
    likeness.set_title(
        "Global memory over chunks" if report.similarity is not None else "no global memory",
        fontsize=11,
    )
    bottom = np.zeros(len(report.layers))
    for part in PARTS:
        shares = np.array([layer.get(f"attention_{part}", 0.0) for layer in report.layers])
        attention.bar(
            range(len(shares)),
            shares,
            bottom=bottom,
            label={"own": "own chunk"}.get(part, f"{part} memory"),
        )
        bottom += shares
    attention.set_xlabel("layer")
    attention.set_ylim(0, 1)
    attention.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    attention.xaxis.get_major_locator().set_params(integer=True)
    attention.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, fontsize=9, frameon=False
    )
    attention.set_title("Where a text token's attention goes", fontsize=11)
    return figure
