"""Slots in full, the readable reference, compute what the model computes."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comet_pl.model.naive import SlotsInFull
from tests.support.models import authors_memories, chunk_plans, text, tiny

EXACT = {"atol": 1e-10, "rtol": 1e-10}  # float64


@settings(max_examples=120)
@given(comet=authors_memories(), n=st.integers(1, 40), data=st.data())
def test_slots_in_full_equals_the_model(comet, n, data):
    """From no memory to full memory, chunks of any size, gates away from one half; in two calls."""
    model, ids = tiny(layers=3, **comet), text(2, n)
    with torch.no_grad():
        for _, parameter in model.memory_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    sizes = data.draw(chunk_plans(n))
    k = data.draw(st.integers(0, len(sizes) - 1))
    cut = sum(sizes[:k])
    reference = SlotsInFull(model)
    with torch.no_grad():
        ours = model(ids, chunk_sizes=sizes).logits
        before = [reference.read(ids[:, :cut], sizes[:k])] if k else []
        after = reference.read(ids[:, cut:], sizes[k:])
    torch.testing.assert_close(torch.cat([*before, after], 1), ours, **EXACT)


def test_the_reference_depends_on_its_memory():
    """A reference without its slots would differ: the test above can fail."""
    model, ids = tiny(), text(1, 15)
    with torch.no_grad():
        ours = model(ids, chunk_sizes=[5, 5, 5]).logits[:, 10:]
        reference = SlotsInFull(model)
        reference.read(ids[:, :10], [5, 5])
        last = reference.read(ids[:, 10:], [5], logits_to_keep=2)
        torch.testing.assert_close(last, ours[:, -2:], **EXACT)
        for name in ("states", "temporary"):
            forgetful = SlotsInFull(model)
            forgetful.read(ids[:, :10], [5, 5])
            setattr(forgetful, name, [None] * 2)
            assert not torch.allclose(forgetful.read(ids[:, 10:], [5]), ours, atol=1e-4)
