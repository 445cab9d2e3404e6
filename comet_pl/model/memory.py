"""The two memories of a layer: what is written. The cell decides when, the cache keeps it.

Legend: B rows, m global slots, n compression tokens, d width, r adapter rank.

    c = RMSNorm(R)          g = sigmoid(W_g [c ; S_prev] + bias)
    S = g * S_prev + (1 - g) * c                    G = S + W_up W_down S
    new = RMSNorm(X) + W_up' W_down' RMSNorm(X)

With slot_scale a slot's input to keys and values is multiplied by the memory's factor.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comet_pl.model.configuration_comet import CometConfig, wide
from comet_pl.model.norm import RMSNorm


class ResidualAdapter(nn.Module):
    """x + W_up (W_down x), low rank, no biases."""

    def __init__(self, width: int, rank: int):
        super().__init__()
        self.down_proj = nn.Linear(width, rank, bias=False)
        self.up_proj = nn.Linear(rank, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up_proj(self.down_proj(x))


class GateProjection(nn.Linear):
    """The gate's last linear map; CometForCausalLM._init_weights sets its bias to `start_bias`."""

    def __init__(self, inputs: int, outputs: int, start_bias: float | None):
        super().__init__(inputs, outputs, bias=start_bias is not None)
        self.start_bias = start_bias


class Gate(nn.Module):
    """g in (0, 1), the share of the old state that stays: twice (B, m, d) -> (B, m, 1 or d)."""

    def __init__(self, config: CometConfig):
        super().__init__()
        width, rank = config.backbone_config.hidden_size, config.adapter_rank
        if config.gate == "scalar":
            self.proj = GateProjection(2 * width, 1, config.gate_bias)
        else:
            # A full 2d -> d matrix would outweigh all other new weights.
            self.down_proj = nn.Linear(2 * width, rank, bias=False)
            self.proj = GateProjection(rank, width, config.gate_bias)
        self.scalar = config.gate == "scalar"

    def forward(self, candidate: Tensor, previous: Tensor) -> Tensor:
        both = torch.cat([candidate, previous], dim=-1)
        if not self.scalar:
            both = F.linear(both, self.down_proj.weight.to(both.dtype))
        bias = None if self.proj.bias is None else self.proj.bias.to(both.dtype)
        return torch.sigmoid(F.linear(both, self.proj.weight.to(both.dtype), bias))


class Memory(nn.Module):
    """What both have: with config.slot_scale a factor (1,), which
    CometForCausalLM._init_weights sets to `start_factor`."""

    def __init__(self, config: CometConfig):
        super().__init__()
        self.start_factor = 1.0 if config.slot_scale is None else config.slot_scale
        self.factor = None if config.slot_scale is None else nn.Parameter(torch.empty(1))


class GlobalMemory(Memory):
    """m slots, each rewritten once a chunk from its readout token's output."""

    def __init__(self, config: CometConfig):
        super().__init__(config)
        width = config.backbone_config.hidden_size
        self.norm = RMSNorm(width, eps=None)
        self.gate = None if config.gate == "none" else Gate(config)
        self.adapter = (
            None if config.shared_adapter else ResidualAdapter(width, config.adapter_rank)
        )
        # g of the last write that had a gate, detached: always kept, and never in a growing list,
        # because torch.compile would make another graph for either.
        self.last_gate: Tensor | None = None
        # g -> g with a gradient of its own (comet_pl/training/gate_penalty.py).
        self.penalty: Callable[[Tensor], Tensor] | None = None

    def write(
        self, readout: Tensor, previous: Tensor | None, first: Tensor | None = None
    ) -> Tensor:
        """The new state S (B, m, d), in float32 at least, autocast or not.

        Args:
            previous: S after the chunk before; None in a first chunk.
            first: (B,) rows in their first chunk, if others are not.
        """
        candidate = self.norm(readout).to(wide(readout.dtype))
        if previous is None or self.gate is None:
            return candidate
        with torch.autocast(readout.device.type, enabled=False):
            g = self.gate(candidate, previous)
            self.last_gate = g.detach()
            if self.penalty is not None:
                g = self.penalty(g)
            state = torch.lerp(candidate, previous, g)
        return state if first is None else torch.where(first[:, None, None], candidate, state)


class TemporaryMemory(Memory):
    """A first-in first-out list of at most K entries, one a compression token."""

    def __init__(self, config: CometConfig):
        super().__init__(config)
        width = config.backbone_config.hidden_size
        self.norm = RMSNorm(width, eps=1e-12)
        self.adapter = (
            None if config.shared_adapter else ResidualAdapter(width, config.adapter_rank)
        )


def is_memory(name: str) -> bool:
    """Whether a parameter of this name belongs to the memory modules."""
    parts = name.split(".")
    shared = len(parts) > 3 and parts[3] in ("adapter", "sink")
    return shared or "global_memory" in parts or "temporary_memory" in parts
