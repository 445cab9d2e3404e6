"""train.gate_pull and train.gate_entropy: gates are kept away from where they would stay for ever.

Legend: B rows, m global slots. A gate is one layer's g on one chunk of one row: m values, or m d.

    penalty = mean over all gates of a step of [ gate_pull (mean g - gate_target)^2 - gate_entropy mean H(g) ],
    H(g) = -g ln g - (1 - g) ln(1 - g) nats

Counted are the gates that learn: a target of their row, in their window of chunks, reads the state that they made. The backward pass comes
by at each of them, and there the penalty's gradient is added to what it brings. So it is in nobody's loss, and every way to read a text
(windows, recomputed cells or chunks, pipelines) has it without knowing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from comet_pl.config.schema import TrainConfig


@dataclass
class GatePenalty:
    """The penalty of a model's gates. share: of one gate in the mean, times the loss's scale; set before each step, as a tensor () where
    cells are compiled (of a number they would make a graph each time)."""

    pull: float
    target: float
    entropy: float
    share: float | Tensor = 0.0

    @classmethod
    def of(cls, train: TrainConfig) -> GatePenalty | None:
        """What the configuration asks for, if it does."""
        return (
            cls(train.gate_pull, train.gate_target, train.gate_entropy)
            if train.gate_pull or train.gate_entropy
            else None
        )

    def slope(self, g: Tensor) -> Tensor:
        """The gradient of each row's penalty. g: (B, m, 1) or (B, m, d)."""
        # By hand: torch.compile knows no autograd inside a backward pass.
        mean = g.flatten(1).mean(1)[:, None, None]
        # d/dg of -H(g) is ln g - ln(1 - g), which at 0 and 1 themselves has no end.
        undecided = torch.logit(g, torch.finfo(g.dtype).eps)
        return (2 * self.pull * (mean - self.target) + self.entropy * undecided) / g[0].numel()

    def __call__(self, g: Tensor) -> Tensor:
        """g itself; its backward pass adds the penalty's gradient."""
        return _Penalised.apply(g, self) if g.requires_grad else g  # type: ignore[no-any-return]


class _Penalised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, penalty: GatePenalty) -> Tensor:
        ctx.save_for_backward(g)
        ctx.penalty = penalty
        return g.view_as(g)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (g,) = ctx.saved_tensors
        slope = ctx.penalty.slope(g.to(torch.promote_types(g.dtype, torch.float32)))
        # Of rows that rest, start afresh, or have no target any more, nothing comes back: exactly zero.
        learns = gradient.flatten(1).ne(0).any(1)[:, None, None]
        return gradient + torch.where(learns, ctx.penalty.share * slope, 0.0).to(
            gradient.dtype
        ), None
