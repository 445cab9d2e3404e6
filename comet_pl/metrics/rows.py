"""A metric that keeps a row of numbers for each example."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class RowMetric(Metric):
    """rows: (n, columns) tensors, which torchmetrics joins over the ranks."""

    full_state_update = False
    rows: list[Tensor]

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.add_state("rows", [], dist_reduce_fx="cat")

    def gathered(self, columns: int) -> Tensor:
        """All rows, (n, columns), on the CPU."""
        # over several ranks it is one tensor
        parts = [self.rows] if isinstance(self.rows, Tensor) else self.rows
        return torch.cat([part.cpu() for part in parts]) if parts else torch.zeros(0, columns)
