"""Every attention path against the plain formula: mask, softmax, weighted sum."""

import pytest
import torch

from benchmarks.gpu.law import bare_chunk
from comet_pl.model import attention
from comet_pl.model.attention import _SplitAttention, attend
from tests.support.models import text, tiny

SCALE = 0.3


def inputs(past, own, heads=4, groups=2, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = [
        (2, heads, own, 8),
        (2, heads // groups, past + own, 8),
        (2, heads // groups, past + own, 8),
    ]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def formula(q, k, v, past):
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(past)
    return (q @ k.mT * SCALE).masked_fill(~seen, -torch.inf).softmax(-1) @ v


WAYS = {
    "kernels": (0, attention.MANY_KEYS),
    "few scores": (attention.FEW_SCORES, attention.MANY_KEYS),
    "many keys": (0, 0),
}


@pytest.fixture(params=WAYS.values(), ids=WAYS.keys(), autouse=True)
def way(request, monkeypatch):
    for name, limit in zip(("FEW_SCORES", "MANY_KEYS"), request.param, strict=True):
        monkeypatch.setattr(attention, name, limit)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("past", "own"), [(0, 7), (5, 1), (5, 7), (40, 33)])
def test_uniform_rows(past, own, implementation, grad):
    q, k, v = inputs(past, own)
    chunk = bare_chunk("cpu", past, own, ragged=False)
    with torch.set_grad_enabled(grad):
        ours, reference = attend(implementation, q, k, v, chunk, SCALE), formula(q, k, v, past)
    torch.testing.assert_close(ours, reference, atol=1e-12, rtol=1e-12)
    if grad:
        weights = torch.randn_like(reference)
        for x, y in zip(
            torch.autograd.grad((ours * weights).sum(), (q, k, v)),
            torch.autograd.grad((reference * weights).sum(), (q, k, v)),
            strict=True,
        ):
            torch.testing.assert_close(x, y, atol=1e-12, rtol=1e-12)


def test_the_split_kernel_has_the_right_gradient():
    q, k, v = inputs(3, 4, groups=1)
    assert torch.autograd.gradcheck(lambda *t: _SplitAttention.apply(*t, 3, SCALE), (q, k, v))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_reads_and_decodes(dtype):
    """Half precision follows double within its own rounding: 8 (bf16) or 11 (fp16) bits, some ten
    operations deep."""
    model, ids = tiny(dtype=dtype), text(2, 23)
    with torch.no_grad():
        reference = tiny()(ids).logits
        out = model(ids[:, :11], use_cache=True)
        rest = model(ids[:, 11:], past_key_values=out.past_key_values)
    ours = torch.cat([out.logits, rest.logits], 1)
    assert ours.dtype == dtype
    assert (ours.double() - reference).abs().max() < (
        0.1 if dtype == torch.bfloat16 else 0.02
    ) * reference.abs().max()
    assert model.generate(ids, max_new_tokens=9, do_sample=False).shape == (2, 32)


def test_autocast_trains_and_decodes():
    model, ids = tiny(dtype=torch.float32), text(2, 23)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.train()(ids, labels=ids, chunk_sizes=[10, 13]).loss
        loss.backward()
        with torch.no_grad():
            cache = model.eval()(ids[:, :9], use_cache=True).past_key_values
            ragged = torch.tensor([[1, 1, 1], [1, 0, 0]])
            model(ids[:, 9:12], attention_mask=ragged, past_key_values=cache)
            model(ids[:, 12:13], past_key_values=cache)
    reference = tiny(dtype=torch.float32).train()(ids, labels=ids, chunk_sizes=[10, 13]).loss
    torch.testing.assert_close(loss, reference, atol=0.05, rtol=0.02)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
def test_cuda_equals_cpu(dtype, tolerance):
    """float32 with TF32 off differs by the order of additions; bfloat16 by its 8 bits."""
    ids = text(2, 40)
    mask = torch.ones_like(ids)
    mask[1, 29:] = 0
    for given in (None, mask):
        model = tiny(dtype=torch.float32, chunk_size=8).train()
        reference = model(ids, attention_mask=given, labels=ids, logits_to_keep=0)
        model = tiny(dtype=dtype, chunk_size=8).train().cuda()
        moved = None if given is None else given.cuda()
        out = model(ids.cuda(), attention_mask=moved, labels=ids.cuda(), logits_to_keep=0)
        out.loss.backward()
        seen = slice(None) if given is None else given.bool()
        difference = (out.logits.cpu().float() - reference.logits)[seen].abs().max()
        assert difference < tolerance * reference.logits.abs().max()
        with torch.no_grad():
            cache = model.eval()(ids[:, :13].cuda(), use_cache=True).past_key_values
            rest = model(ids[:, 13:].cuda(), past_key_values=cache, attention_mask=None).logits
        if given is None:
            assert (
                rest.cpu().float() - reference.logits[:, 13:]
            ).abs().max() < tolerance * reference.logits.abs().max()
