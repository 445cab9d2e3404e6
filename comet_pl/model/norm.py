"""RMSNorm in one kernel instead of Hugging Face's eight: y = x / sqrt(mean(x^2) + eps) * w."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """In the wider of the input's and the weight's precisions: a half precision decoder may have
    float32 memories."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        return F.rms_norm(x.to(dtype), self.weight.shape, self.weight.to(dtype), self.eps)


class DecoderNorm(nn.RMSNorm):
    """A Hugging Face norm, which is used up; doubles are normalised in float32, as there."""

    def __init__(self, norm: Any):
        super().__init__(norm.weight.shape, eps=norm.variance_epsilon, device="meta")
        self.weight = norm.weight

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if x.dtype == torch.float64:
            return weight * F.rms_norm(x.float(), weight.shape, eps=self.eps).to(x.dtype)
        dtype = torch.promote_types(x.dtype, weight.dtype)
        return F.rms_norm(x.to(dtype), weight.shape, weight.to(dtype), self.eps)


def fuse_norms(module: nn.Module) -> None:
    """Puts a DecoderNorm in the place of each norm in a Hugging Face decoder; weights keep their
    names."""
    for name, child in list(module.named_children()):
        if type(child).__name__.endswith("RMSNorm") and hasattr(child, "variance_epsilon"):
            module.add_module(name, DecoderNorm(child))
        else:
            fuse_norms(child)
