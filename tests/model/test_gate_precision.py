"""S and its gate are float32 at least: in bfloat16 a gate near 1 would be 1 for good."""

import pytest
import torch

from comet_pl import CometCache, CometConfig
from comet_pl.model.memory import GlobalMemory
from tests.support.models import backbone, text, tiny
from tests.support.training import fit, ragged

BIASES = [3.0, 5.0, 6.0, 7.0]
WRITES, SLOTS = 600, 16


def memory(bias):
    torch.manual_seed(0)
    config = CometConfig(backbone(), global_size=SLOTS, gate_bias=bias)
    made = GlobalMemory(config)
    torch.nn.init.normal_(made.gate.proj.weight, std=0.02)
    torch.nn.init.constant_(made.gate.proj.bias, bias)
    return made


def outputs():
    draw = torch.Generator().manual_seed(1)
    return [
        torch.randn(1, SLOTS, 16, generator=draw) + 0.5 * torch.randn(1, SLOTS, 1, generator=draw)
        for _ in range(WRITES)
    ]


def written(bias, dtype, autocast=False):
    """S after 600 writes."""
    own, state = memory(bias).to(dtype), None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for readout in outputs():
            state = own.write(readout.to(dtype), state)
    return state


def apart(one, exact):
    return ((one.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.parametrize("bias", BIASES)
def test_600_writes_are_those_in_float64(bias):
    exact = written(bias, torch.float64)
    for state in (written(bias, torch.float32, autocast=True), written(bias, torch.bfloat16)):
        assert state.dtype == torch.float32 and apart(state, exact) < 0.01


@pytest.mark.parametrize("bias", BIASES)
def test_the_gates_gradient_is_that_in_float64(bias):
    gradients = []
    first, second, weight = outputs()[:3]
    for dtype, autocast in ((torch.float64, False), (torch.float32, True)):
        own = memory(bias).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            state = own.write(first.to(dtype), None).detach()
            (own.write(second.to(dtype), state) * weight).sum().backward()
        gradients.append(own.gate.proj.weight.grad)
    assert apart(gradients[1], gradients[0]) < 0.01


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_a_gate_near_one_learns(precision):
    model = tiny(dtype=torch.float32, gate_bias=6.5)
    if precision == "bf16-true":
        model = model.bfloat16()
    fit(model, 3 * [ragged([30, 25], labelled=1.0)], trainer={"precision": precision}, lr=0.1)
    for cell in model.model.layers:
        assert (cell.global_memory.gate.proj.bias.float() - 6.5).abs().min() > 1e-3


def test_a_half_precision_cache_keeps_s_in_float32(tmp_path):
    """Known beforehand in bytes, saved, loaded, and read on with."""
    model = tiny(dtype=torch.bfloat16)
    with torch.no_grad():
        cache = model(text(1, 23), use_cache=True).past_key_values
    assert {name: t.dtype for name, t in cache.memories[0]._asdict().items()} == {
        "state": torch.float32,
        **dict.fromkeys(("temporary", "keys", "values", "pending"), torch.bfloat16),
    }
    assert cache.nbytes == model.config.cache_bytes(1, torch.bfloat16)
    cache.save(tmp_path / "cache")
    loaded = CometCache.load(tmp_path / "cache")
    with torch.no_grad():
        one, two = (model(text(1, 9), past_key_values=c).logits for c in (cache, loaded))
    assert torch.equal(one, two)
    refused = r"of torch\.bfloat16 given, the model is of torch\.float32"
    with torch.no_grad(), pytest.raises(ValueError, match=refused):
        tiny(dtype=torch.float32)(text(1, 3), past_key_values=loaded)
    moved = loaded.to(dtype=torch.float64)
    assert {t.dtype for memory in moved.memories for t in memory} == {torch.float64}


def test_a_cache_of_a_former_version_has_s_widened(tmp_path):
    model = tiny(dtype=torch.bfloat16)
    with torch.no_grad():
        cache = model(text(1, 23), use_cache=True).past_key_values
    former = cache.clone()
    former.memories = [m._replace(state=m.state.bfloat16()) for m in former.memories]
    former.save(tmp_path / "cache")
    loaded = CometCache.load(tmp_path / "cache")
    assert {memory.state.dtype for memory in loaded.memories} == {torch.float32}
    with torch.no_grad():
        model(text(1, 9), past_key_values=loaded)
