"""Cross-entropy on labelled positions only, in blocks: logits of a whole long text never exist at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

BLOCK = 1024  # labelled positions whose logits exist at the same time


def summed_cross_entropy(
    hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], block: int = BLOCK
) -> Tensor:
    """Sum of cross-entropies, float32 (or wider).

    Args:
        hidden: (n, d) outputs at labelled positions. targets: (n,) ids. head: (k, d) -> (k, V) logits.
    """

    def one(h: Tensor, t: Tensor) -> Tensor:
        logits = head(h)
        return F.cross_entropy(
            logits.to(torch.promote_types(logits.dtype, torch.float32)), t, reduction="sum"
        )

    if len(targets) <= block:
        return one(hidden, targets)
    blocks = zip(hidden.split(block), targets.split(block), strict=True)
    return torch.stack([checkpoint(one, h, t, use_reentrant=False) for h, t in blocks]).sum()


@torch.no_grad()
def cross_entropies(
    hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], block: int = BLOCK
) -> Tensor:
    """(n,) each position's cross-entropy, float32 (or wider), without gradients. Arguments: as above."""
    logits = (head(h) for h in hidden.split(block))
    parts = zip(logits, targets.split(block), strict=True)
    return torch.cat(
        [
            F.cross_entropy(
                one.to(torch.promote_types(one.dtype, torch.float32)), t, reduction="none"
            )
            for one, t in parts
        ]
    )
