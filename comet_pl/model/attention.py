"""Attention of own tokens over [memory | own tokens], lower-right causal: a token sees all of the past and its own tokens up to itself.

Legend: B rows, H query heads, H' key/value heads, h head width, W own tokens, L key columns (if rows are uniform, the last W are the own
tokens).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from comet_pl.model.chunk_batch import Step

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


MANY_KEYS = (
    2**18
)  # numbers in a row's keys, from which on one query is cheaper by two plain products than by a kernel on a CPU
FEW_SCORES = (
    2**18
)  # so few are computed by the plain formula on a CPU: less overhead than a kernel, and it rounds least


class _SplitAttention(torch.autograd.Function):
    """CPU: the past without a mask and the own tokens causally, merged by their log-sum-exps; no mask exists and nothing is masked away.

    The kernel's log-sum-exp carries no gradient of its own, but the kernel's backward is exact for each part if it is given the *merged*
    output and log-sum-exp: dS = P * (dO V^T - rowsum(dO * O)) holds column by column.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, past: int, scale: float) -> Tensor:
        parts = ((k[:, :, :past], v[:, :, :past], False), (k[:, :, past:], v[:, :, past:], True))
        (o1, l1), (o2, l2) = (
            _flash(q, pk, pv, 0.0, causal, scale=scale) for pk, pv, causal in parts
        )
        lse = torch.logaddexp(l1, l2)
        o = torch.lerp(o2, o1, (l1 - lse).exp().to(o1.dtype)[..., None])
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.past, ctx.scale = past, scale
        return o

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:  # type: ignore[override]
        q, k, v, o, lse = ctx.saved_tensors
        past, scale = ctx.past, ctx.scale
        parts = ((k[:, :, :past], v[:, :, :past], False), (k[:, :, past:], v[:, :, past:], True))
        (q1, k1, v1), (q2, k2, v2) = (
            _flash_backward(grad, q, pk, pv, o, lse, 0.0, causal, scale=scale)
            for pk, pv, causal in parts
        )
        return q1 + q2, torch.cat([k1, k2], 2), torch.cat([v1, v2], 2), None, None


def attend(
    implementation: str, q: Tensor, k: Tensor, v: Tensor, step: Step, scale: float
) -> Tensor:
    """(B, H, W, h), (B, H', L, h) twice -> (B, H, W, h)."""
    if not q.shape[2]:
        return q  # a full chunk closes and there is no memory: nothing of it is read
    k, v = k.to(q.dtype), v.to(q.dtype)  # a cache in float32 under autocast
    wide = q.dtype in (torch.float32, torch.float64) and q.device.type == "cpu"
    few = wide and q.shape[2] > 1 and q.shape[:3].numel() * k.shape[2] <= FEW_SCORES
    if implementation == "eager" or few:
        return _eager(q, k, v, step.mask, scale)
    grouped = q.shape[1] != k.shape[1]
    if not step.uniform:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=step.mask, scale=scale, enable_gqa=grouped
        )
    if q.shape[2] == 1 and wide and k.shape[1:].numel() >= MANY_KEYS:
        return _one_query(q, k, v, scale)
    if q.shape[2] == 1:
        return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)
    if step.past == 0:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=grouped
        )
    if q.device.type == "cpu":
        if grouped and torch.is_grad_enabled():  # the kernel's backward knows no groups
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        return _SplitAttention.apply(q, k, v, step.past, scale)
    bias = causal_lower_right(q.shape[2], k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, enable_gqa=grouped)  # type: ignore[arg-type]


def _one_query(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """CPU: the plain formula as two products a key head, its columns first; the kernel reads keys and values at half their speed."""
    grouped = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)
    scores = (k @ grouped.transpose(2, 3) * scale).transpose(2, 3)
    return (scores.softmax(-1) @ v).flatten(1, 2).unsqueeze(2)


def _eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    grouped = q.unflatten(
        1, (k.shape[1], -1)
    )  # the queries of a key head as rows of one product: no key is copied
    scores = (grouped.flatten(2, 3) @ k.transpose(2, 3) * scale).unflatten(2, grouped.shape[2:4])
    scores = scores.masked_fill(~mask.unsqueeze(-3), torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return (weights.flatten(2, 3) @ v).unflatten(2, grouped.shape[2:4]).flatten(1, 2)
