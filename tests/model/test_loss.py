"""The loss from outputs: sums in blocks, with or without a graph of the head."""

from functools import partial

import pytest
import torch
from torch import nn

from comet_pl.model import loss as module
from comet_pl.model.loss import (
    SummedWithGradient,
    Teacher,
    cross_entropy,
    summed,
    sums,
    text_logits,
)

WIDTH, VOCABULARY, TEXT = 6, 11, 9  # rows of the head; those of text come first


class Counted(nn.Linear):
    calls = 0

    def forward(self, hidden):
        self.calls += 1
        return super().forward(hidden)


def case(count, frozen=True):
    torch.manual_seed(0)
    head = Counted(WIDTH, VOCABULARY, bias=False).double().requires_grad_(not frozen)
    hidden = torch.randn(count, WIDTH, dtype=torch.float64, requires_grad=True)
    taught = torch.randn(count, WIDTH, dtype=torch.float64)
    return head, hidden, torch.randint(TEXT, (count,)), taught


def losses(head, taught):
    of = partial(text_logits, head, TEXT)
    teacher = Teacher(taught, 0.3, torch.zeros(()))
    return {
        "entropy": (partial(cross_entropy, of, "sum"), ()),
        "teacher": (partial(teacher.losses, of, TEXT), (taught,)),
    }


@pytest.mark.parametrize("name", ["entropy", "teacher"])
@pytest.mark.parametrize("count", [1, 5, 7, 64])
def test_a_frozen_heads_sum_has_the_gradient_of_the_sum_in_full(name, count, monkeypatch):
    monkeypatch.setattr(module, "CPU_BLOCK", 5)
    head, hidden, targets, taught = case(count)
    of, more = losses(head, taught)[name]
    expected = of(hidden, targets, *more)
    (gradient,) = torch.autograd.grad(expected.flatten()[0] / 3, hidden)
    head.calls = 0
    found = sums(head)(of, hidden, targets, *more)
    (found.flatten()[0] / 3).backward()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(hidden.grad, gradient, rtol=1e-10, atol=1e-14)
    blocks = -(-count // 5)
    assert head.calls == blocks * (2 if more else 1), "the logits of a block are made once"


def test_only_a_frozen_head_without_rows_that_learn_has_its_gradient_made_at_once():
    head, *_ = case(1)
    assert sums(head) == SummedWithGradient.apply
    with torch.no_grad():
        assert sums(head) is summed, "no gradient is made that nobody wants"
    assert sums(case(1, frozen=False)[0]) is summed
    rows = nn.Module()
    rows.base_layer = head  # as peft wraps it: a row of a new token may learn
    assert sums(rows) is summed
