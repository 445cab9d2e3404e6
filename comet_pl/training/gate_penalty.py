"""train.gate_pull and train.gate_entropy keep gates away from where their gradient vanishes.

Legend: B rows, m global slots. A gate is one layer's g on one chunk of one row: m values, or m d.

    penalty = mean over all gates of a step of
              [ gate_pull (mean g - gate_target)^2 - gate_entropy mean H(g) ],
    H(g)    = -g ln g - (1 - g) ln(1 - g) nats

Only gates that learn count: a later target of their row, in their window, depends on the state that
they made. The penalty's gradient is added where the backward pass reaches such a gate. So no loss
contains it, and windows, recomputation and pipelines need no code for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from comet_pl.config.schema import TrainConfig
from comet_pl.model.configuration_comet import wide
from comet_pl.training.windows import IGNORED, Window


@dataclass
class GatePenalty:
    """The penalty of a model's gates.

    share: of one gate in the mean, times the loss's scale; set before each step. A tensor () where
    cells are compiled: each number would make a new graph.
    """

    pull: float
    target: float
    entropy: float
    share: float | Tensor = 0.0

    @classmethod
    def of(cls, train: TrainConfig) -> GatePenalty | None:
        """The penalty that the configuration asks for."""
        if not train.gate_pull and not train.gate_entropy:
            return None
        return cls(train.gate_pull, train.gate_target, train.gate_entropy)

    def slope(self, g: Tensor) -> Tensor:
        """The gradient of each row's penalty. g: (B, m, 1) or (B, m, d)."""
        # By hand: torch.compile supports no autograd inside a backward pass.
        mean = g.flatten(1).mean(1)[:, None, None]
        # d/dg of -H(g) is ln g - ln(1 - g), which is infinite at 0 and 1.
        undecided = torch.logit(g, torch.finfo(g.dtype).eps)
        return (2 * self.pull * (mean - self.target) + self.entropy * undecided) / g[0].numel()

    def __call__(self, g: Tensor) -> Tensor:
        """g itself; its backward pass adds the penalty's gradient."""
        return _Penalised.apply(g, self) if g.requires_grad else g


class _Penalised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, penalty: GatePenalty) -> Tensor:
        ctx.save_for_backward(g)
        ctx.penalty = penalty
        return g.view_as(g)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (g,) = ctx.saved_tensors
        slope = ctx.penalty.slope(g.to(wide(g.dtype)))
        # The gradient of rows that rest, start afresh, or have no further target is exactly zero.
        learns = gradient.flatten(1).ne(0).any(1)[:, None, None]
        added = torch.where(learns, ctx.penalty.share * slope, 0.0)
        return gradient + added.to(gradient.dtype), None


def count_gates(windows: Sequence[Window]) -> int:
    """Gates of one layer that learn, over all rows: of chunks that start with a state and have, in
    their window, a later target of their row before its memory is emptied."""
    count = 0
    started = [False] * (len(windows[0].plans) if windows else 0)
    for window in windows:
        labelled = (window.shift_labels != IGNORED).tolist()
        for b, plan in enumerate(window.plans):
            resets = plan.resets or [False] * len(plan.sizes)
            ends = list(accumulate(plan.sizes, initial=0))
            state, had = started[b], []
            for size, reset in zip(plan.sizes, resets, strict=True):
                had.append(state and not reset and size > 0)
                state = (state and not reset) or size > 0
            started[b], wanted = state, False
            for t in reversed(range(len(plan.sizes))):
                count += had[t] and wanted
                wanted = (wanted or any(labelled[b][ends[t] : ends[t + 1]])) and not resets[t]
    return count
