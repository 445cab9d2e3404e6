"""What the memories hold and what attends to them, on one text.

Legend: m global slots, n temporary slots, d width. S is a layer's state, G = S + W_up W_down S its
global memory and T its temporary memory (comet_pl/model/memory.py).
"""

from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from comet_pl.model.modeling_comet import CometForCausalLM
from comet_pl.model.probe import MemoryView, probe_memory

# Chunks of the text, text tokens of a chunk and global slots that are looked at, at most.
CHUNKS, QUERIES, SLOTS = 64, 8, 32
PARTS = ("global", "temporary", "own")


@dataclass
class MemoryReport:
    """layers: {name: value} of each, see read_memory.

    similarity: (t, t), or None without a global memory.
    """

    layers: list[dict[str, float]]
    similarity: np.ndarray | None


def read_memory(model: CometForCausalLM, ids: Tensor) -> MemoryReport | None:
    """What each layer's memory holds in the first CHUNKS chunks of a text; None: there is but one.

    The values of a layer:

    - norm_state, norm_global, norm_temporary: mean Euclidean norm of a slot of S, G, T before the
      last chunk.
    - rank_state, rank_temporary: effective rank of S (m, d) and T (n, d) before the last chunk.
    - attention_global, attention_temporary, attention_own: shares of a text token's attention, mean
      over heads and over QUERIES tokens of each chunk but the first. They sum to 1; own is the
      chunk itself.

    similarity: cosine of a slot of S after chunk t with the same slot after chunk u, mean over
    SLOTS slots and over layers.

    Args:
        ids: (1, N) without padding.
    """
    ids = ids[:, : CHUNKS * model.config.chunk_size]
    if ids.shape[1] <= model.config.chunk_size:
        return None
    layers = [_Layer() for _ in model.model.layers]
    probe_memory(model, ids, lambda layer, view: layers[layer].add(view), QUERIES)
    likeness = [
        slot_similarity(torch.stack(layer.states)).numpy() for layer in layers if layer.states
    ]
    return MemoryReport(
        [layer.values for layer in layers], np.mean(likeness, 0) if likeness else None
    )


class _Layer:
    """What is seen before each chunk of a layer."""

    def __init__(self) -> None:
        self.states: list[Tensor] = []
        self.shares: list[Tensor] = []
        self.slots: dict[str, Tensor] = {}

    def add(self, view: MemoryView) -> None:
        slots = {"state": view.state, "global": view.global_slots, "temporary": view.temporary}
        # The last chunk's stay.
        self.slots = {name: tensor for name, tensor in slots.items() if tensor is not None}
        self.shares.append(view.attention)
        if view.state is not None:
            m = len(view.state)
            followed = np.linspace(0, m - 1, min(SLOTS, m)).round().astype(int)
            self.states.append(view.state[followed].float().cpu())

    @property
    def values(self) -> dict[str, float]:
        values = {}
        for name, slots in self.slots.items():
            values[f"norm_{name}"] = float(slots.float().norm(dim=-1).mean())
            if name != "global":
                values[f"rank_{name}"] = effective_rank(slots)
        shares = torch.stack(self.shares).mean(0).tolist() if self.shares else []
        for name, share in zip(PARTS, shares, strict=False):
            if name == "own" or name in self.slots:
                values[f"attention_{name}"] = share
        return values


def effective_rank(slots: Tensor) -> float:
    """exp of the entropy of the normalised singular values of (n, d) (Roy and Vetterli, 2007).

    1 if all slots are multiples of one vector, min(n, d) if they are orthogonal and equally long; 0
    of zeros; NaN where a number is not finite.
    """
    slots = slots.double()
    if not slots.isfinite().all():
        return float("nan")
    slots = slots if len(slots) <= slots.shape[1] else slots.T
    try:
        # By the Gram matrix, whose eigenvalues a GPU finds many times faster.
        squares = torch.linalg.eigvalsh(slots @ slots.T)
    except torch.linalg.LinAlgError:  # did not converge
        return float("nan")
    rounding = len(squares) * torch.finfo(squares.dtype).eps * squares[-1]  # of the largest
    values = squares.where(squares > rounding, 0.0).sqrt()
    if not values.sum():
        return 0.0
    return float(torch.special.entr(values / values.sum()).sum().exp())


def slot_similarity(states: Tensor) -> Tensor:
    """(t, m, d) states over time -> (t, t) cosine of a slot with itself, mean over slots."""
    directions = torch.nn.functional.normalize(states, dim=-1).flatten(1)
    with torch.autocast(states.device.type, enabled=False):
        return directions @ directions.T / states.shape[1]


def picture(report: MemoryReport) -> Figure:
    """Left: the global memory's likeness to itself over chunks; right: attention by layer."""
    figure = Figure(figsize=(10, 4.2), layout="constrained", dpi=100)
    likeness, attention = figure.subplots(1, 2)
    if report.similarity is not None:
        image = likeness.imshow(report.similarity, vmin=-1, vmax=1, cmap="RdBu_r", origin="lower")
        figure.colorbar(image, ax=likeness, label="cosine, mean of layers and slots")
        likeness.set_xlabel("state after chunk")
        likeness.set_ylabel("state after chunk")
        for axis in (likeness.xaxis, likeness.yaxis):
            axis.set_major_locator(MaxNLocator("auto", integer=True))
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
    attention.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    attention.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, fontsize=9, frameon=False
    )
    attention.set_title("Where a text token's attention goes", fontsize=11)
    return figure
