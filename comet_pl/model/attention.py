"""Attention of own tokens over [memory | own tokens], lower-right causal.

A token sees all of the past and its own tokens up to itself.

Legend: B rows, H query heads, H' key/value heads, h head width, W own tokens, L key columns. In a
uniform chunk the last W columns are the own tokens.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from comet_pl.model.chunk_batch import Chunk, StepChunk, UniformChunk

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_flash_cuda = torch.ops.aten._scaled_dot_product_flash_attention
_flash_packed = torch.ops.aten._flash_attention_forward
_efficient_cuda = torch.ops.aten._efficient_attention_forward
FUSED = (torch.float16, torch.bfloat16, torch.float32)  # what its kernels take
LOWER_RIGHT = 2  # its number for this causality

# Numbers in a row's keys from which on, on a CPU, two plain products answer one query faster than a
# kernel does.
MANY_KEYS = 2**18
# Up to so many scores, on a CPU, the plain formula is quicker than a kernel and rounds least.
FEW_SCORES = 2**18


class _SplitAttention(torch.autograd.Function):
    """CPU: the past without a mask and the own tokens causally, merged by their log-sum-exps.

    No mask exists and nothing is masked away. The kernel's log-sum-exp carries no gradient, but its
    backward is exact for each part if it gets the *merged* output and log-sum-exp:
    dS = P * (dO V^T - rowsum(dO * O)) holds column by column.
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
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, o, lse = ctx.saved_tensors
        past, scale = ctx.past, ctx.scale
        parts = ((k[:, :, :past], v[:, :, :past], False), (k[:, :, past:], v[:, :, past:], True))
        (q1, k1, v1), (q2, k2, v2) = (
            _flash_backward(grad, q, pk, pv, o, lse, 0.0, causal, scale=scale)
            for pk, pv, causal in parts
        )
        return q1 + q2, torch.cat([k1, k2], 2), torch.cat([v1, v2], 2), None, None


def attend(
    implementation: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk: Chunk,
    scale: float,
    causal: bool | None = None,
) -> Tensor:
    """(B, H, W, h), (B, H', L, h) twice -> (B, H, W, h).

    Args:
        causal: of a uniform chunk with internal tokens that do not see all before them: True: the
            queries are those before such tokens, and the keys as many as they see; False: these
            tokens. None: all queries.
    """
    if isinstance(chunk, UniformChunk) and chunk.behind and causal is None:
        text, rest = q.split([q.shape[2] - chunk.behind, chunk.behind], 2)
        seen = k[:, :, : -chunk.behind], v[:, :, : -chunk.behind]
        parts = (
            attend(implementation, text, *seen, chunk, scale, True),
            attend(implementation, rest, k, v, chunk, scale, False),
        )
        return torch.cat(parts, 2)
    if not q.shape[2]:
        # A full chunk closes and there is no memory: nothing of it is used.
        return q
    # A cache may be in float32 under autocast.
    k, v = k.to(q.dtype), v.to(q.dtype)
    past = chunk.past if isinstance(chunk, UniformChunk) and causal is not False else None
    own, columns, grouped = q.shape[2], k.shape[2], q.shape[1] != k.shape[1]
    rows = slice(0, own) if causal else slice(-own, None)
    if implementation == "eager":
        return _eager(q, k, v, chunk.mask[:, :, rows, :columns], scale)
    if q.is_cuda and q.dtype in FUSED and q.shape[3] % 8 == 0:
        return _on_cuda(q, k, v, chunk, past, scale)
    cpu = q.device.type == "cpu"
    wide = cpu and q.dtype in (torch.float32, torch.float64)
    if wide and own > 1 and q.shape[:3].numel() * k.shape[2] <= FEW_SCORES:
        return _eager(q, k, v, chunk.mask[:, :, rows, :columns], scale)
    if wide and own == 1 and past is not None and k.shape[1:].numel() >= MANY_KEYS:
        return _one_query(q, k, v, scale)
    if cpu and own > 1 and past:
        # The kernel's backward knows no groups.
        if grouped and torch.is_grad_enabled():
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        return _SplitAttention.apply(q, k, v, past, scale)
    if past == 0 and own > 1:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=grouped
        )
    mask = None if own == 1 and past is not None else chunk.mask[:, :, rows, :columns]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)


def _on_cuda(
    q: Tensor, k: Tensor, v: Tensor, chunk: Chunk, past: int | None, scale: float
) -> Tensor:
    """Fused kernels, called by name.

    Left to torch, grouped keys in float32 or under a mask go to a kernel that writes every score to
    memory, and a Hopper card plans a kernel anew for each length of the keys.
    """
    own, uniform = q.shape[2], past is not None
    if uniform and _flash_runs(q):
        # Its causality is lower-right, and it knows groups.
        return _flash_cuda(q, k, v, 0.0, own > 1, scale=scale)[0]
    if isinstance(chunk, StepChunk) and _flash_runs(q):
        return _flash_step(q, k, v, chunk, scale)
    bias = None if uniform else _bias(chunk.mask[:, :, -own:], q.dtype)
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and own == 1:
        # The queries of a key head are the rows of one: no key is copied.
        q = q.unflatten(1, (k.shape[1], groups)).squeeze(3)
        bias = None if bias is None else bias.expand(-1, -1, groups, -1)
    elif groups > 1:
        k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    if bias is not None:
        bias = bias.expand(*q.shape[:2], -1, -1)
    causal = LOWER_RIGHT if uniform and own > 1 else 0
    learns = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    rows, columns, values = (t.transpose(1, 2) for t in (q, k, v))
    limits = (None,) * 4  # of packed texts
    out = _efficient_cuda(rows, columns, values, bias, *limits, 0.0, causal, learns, scale=scale)[
        0
    ].transpose(1, 2)
    return out.flatten(1, 2).unsqueeze(2) if groups > 1 and own == 1 else out


def _flash_step(q: Tensor, k: Tensor, v: Tensor, chunk: StepChunk, scale: float) -> Tensor:
    """The kernel for packed texts of lengths that the device knows: the rows' heads are heads of
    one text, since all rows have the same length."""
    packed = (t.flatten(0, 1).transpose(0, 1) for t in (q, k, v))
    sizes = *chunk.limits, q.shape[2], chunk.columns
    out = _flash_packed(*packed, *sizes, 0.0, True, False, scale=scale, seqused_k=chunk.used)[0]
    return out.transpose(0, 1).unflatten(0, q.shape[:2])


@torch._dynamo.assume_constant_result
def _flash_runs(q: Tensor) -> bool:
    """Whether the flash kernel takes these queries: half precision, from compute capability 8."""
    half = q.dtype != torch.float32 and q.shape[3] <= 256
    return half and torch.cuda.get_device_capability(q.device) >= (8, 0)


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask (B or 1, 1, W, L) as numbers to add; the kernel wants rows of 16 n."""
    room = mask.new_zeros(*mask.shape[:3], -(-mask.shape[3] // 16) * 16, dtype=dtype)
    bias = room[..., : mask.shape[3]]
    return bias.masked_fill_(~mask, -torch.inf)


def _one_query(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """CPU: two products a key head, key columns first; a kernel reads keys at half the speed."""
    grouped = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)
    scores = (k @ grouped.transpose(2, 3) * scale).transpose(2, 3)
    return (scores.softmax(-1) @ v).flatten(1, 2).unsqueeze(2)


def _eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    # The queries of a key head are the rows of one product: no key is copied.
    grouped = q.unflatten(1, (k.shape[1], -1))
    scores = (grouped.flatten(2, 3) @ k.transpose(2, 3) * scale).unflatten(2, grouped.shape[2:4])
    scores = scores.masked_fill(~mask.unsqueeze(-3), torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return (weights.flatten(2, 3) @ v).unflatten(2, grouped.shape[2:4]).flatten(1, 2)
