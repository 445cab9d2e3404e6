"""train.gate_pull and train.gate_entropy: the formula's gradient, however a batch is read."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given

from comet_pl.training.gate_penalty import GatePenalty, count_gates
from comet_pl.training.windows import count_targets, cut_windows
from tests.support.models import tiny
from tests.support.pipelines import Case, alone, together
from tests.support.ranks import in_shared_processes
from tests.support.training import (
    close,
    cuts,
    direct,
    fit,
    gradients_of,
    norm_apart,
    ragged,
    scaler,
)

WEIGHTS = {"gate_pull": 3.0, "gate_target": 0.8, "gate_entropy": 0.7}


def explicit(g):
    """The penalty of gates (n, ...), word for word."""
    pull = 3.0 * (g.flatten(1).mean(1) - 0.8) ** 2
    entropy = -(g * g.log() + (1 - g) * (1 - g).log()).flatten(1).mean(1)
    return pull - 0.7 * entropy


def by_hand(model, batch, chunks):
    """Gradients of loss + penalty: every row alone, window after window, from the gates as they are
    made. Every chunk has a target, so that a gate learns unless it is its window's last."""
    model, made = copy.deepcopy(model).train(), []
    for memory in model.gates:
        memory.gate.register_forward_hook(lambda module, inputs, g: made.append(g))
    count, losses, penalties, layers = count_targets(batch), [], [], len(model.gates)
    for row in range(len(batch["input_ids"])):
        alone, cache = {name: value[row : row + 1] for name, value in batch.items()}, None
        for window in cut_windows(alone, model.config.chunk_size, chunks):
            made.clear()
            options = {"use_cache": True, "num_items_in_batch": count}
            output = model(**window.inputs(), past_key_values=cache, **options)
            losses.append(output.loss)
            penalties += made[: max(0, len(made) - layers)]
            cache = output.past_key_values.detach()
    (sum(losses) + explicit(torch.cat(penalties)).mean()).backward()
    return gradients_of(model)


@pytest.mark.parametrize("chunks", [None, 3])
@pytest.mark.parametrize("recompute", ["none", "cell", "chunk"])
@pytest.mark.parametrize("gate", ["scalar", "elementwise"])
def test_gradients_are_those_of_loss_and_penalty(chunks, recompute, gate):
    """Ragged rows and two micro-batches, with and without windows."""
    model, batch = tiny(chunk_size=4, gate=gate, gate_bias=0.5), ragged([23, 10, 31], 1.0)
    expected = by_hand(model, batch, chunks)
    options = {"bptt_chunks": chunks, "accumulate": 2, "recompute": recompute}
    module, watch = fit(copy.deepcopy(model), [batch], **options, **WEIGHTS)
    close(watch.gradients[0], expected)
    # The loss's alone.
    loss = float(module.trainer.callback_metrics["train/loss"])
    assert loss == pytest.approx(direct(model, batch)[0], rel=1e-6)
    _, without = fit(copy.deepcopy(model), [batch], **options)
    assert norm_apart(without.gradients[0], expected) > 0.01


def test_a_scaled_loss_has_a_scaled_penalty():
    batch = ragged([23, 17], 1.0)
    expected = by_hand(tiny(), batch, None)
    _, watch = fit(tiny(dtype=torch.float32), [batch], trainer=scaler(), **WEIGHTS)
    assert norm_apart(watch.gradients[0], expected) < 1e-2  # float16 arithmetic


@pytest.mark.parametrize("g", [0.0, 1.0])
def test_saturated_gates_have_finite_gradients(g):
    gates = torch.full((2, 3, 1), g, requires_grad=True)
    GatePenalty(3.0, 0.8, 0.7, share=1.0)(gates).sum().backward()
    assert torch.isfinite(gates.grad).all()


def test_off_is_nothing():
    module, _ = fit(tiny(), [ragged([23])])
    assert module.gate_penalty is None
    assert all(memory.penalty is None for memory in module.model.gates)


# ---- which gates count


def learning(batch, chunk_size, chunks):
    """Gates of one layer of a model to which the backward pass brings something."""
    model, seen = tiny(chunk_size=chunk_size, layers=1).train(), []

    def watch(module, inputs, g):
        if g.requires_grad:
            g.register_hook(lambda gradient: seen.append(int(gradient.flatten(1).any(1).sum())))

    (memory,) = model.gates
    memory.gate.register_forward_hook(watch)
    cache = None
    for window in cut_windows(batch, chunk_size, chunks):
        with torch.set_grad_enabled(window.targets > 0):
            output = model(**window.inputs(), past_key_values=cache, use_cache=True)
        if window.targets:
            output.loss.backward()
        cache = output.past_key_values.detach()
    return sum(seen)


@given(cuts())
def test_as_many_gates_learn_as_are_counted(cut):
    """Rows of any length, plan, reset and window."""
    assert count_gates(cut_windows(*cut)) == learning(*cut)


def test_no_windows_no_gates():
    assert count_gates([]) == 0


# ---- over several processes


CASES = {
    "interleaved": Case(schedule="interleaved", lengths=(40, 23)),
    "windows": Case(lengths=(40, 33), window=3, labelled=((0, 12), (20, 1000))),
    "zero3": Case(data=2, ranks=1, sharding="zero3", lengths=(40, 23, 33, 12)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_pipeline_has_the_same_gradients(name):
    case = replace(CASES[name], penalised=True)
    expected = alone(case)[1]
    assert norm_apart(alone(CASES[name])[1], expected) > 1e-3
    for _, found, *_ in in_shared_processes(case.ranks * case.data, together, case):
        close(found, expected)
