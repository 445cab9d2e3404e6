"""The memories' report: against the model's own attention, planted states and the cache."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.plugins import Precision

from callbacks.memory_monitor import MemoryMonitor
from comet_pl.analysis import memory
from comet_pl.analysis.memory import effective_rank, picture, read_memory, slot_similarity
from comet_pl.model import cell as backbone
from comet_pl.model.probe import attention_shares
from tests.support.models import FEW, memories, text, tiny


def seen_by_the_kernel(model, ids, monkeypatch):
    """For each cell: every own token's shares of attention on [global, temporary, own].

    The model's attention computes them: values that mark a column's part come out as shares."""
    found, attend = [], backbone.attend

    def spy(implementation, q, k, v, chunk, scale, *part):
        if chunk.past:
            planted = torch.zeros_like(v[..., :3])
            sink, g, t = chunk.slots
            first, own = sink + g, sink + g + t
            planted[:, :, sink:first, 0] = planted[:, :, first:own, 1] = planted[:, :, own:, 2] = 1
            found.append((chunk, attend("eager", q, k, planted, chunk, scale).mean(1)[0]))
        return attend(implementation, q, k, v, chunk, scale, *part)

    monkeypatch.setattr(backbone, "attend", spy)
    with torch.no_grad():
        model(ids, use_cache=False, logits_to_keep=1)
    monkeypatch.undo()
    return found


@FEW
@given(memories(), st.integers(2, 30))
def test_shares_are_those_of_the_models_own_attention(configuration, columns):
    model, ids = tiny(**configuration), text(1, columns)
    calls = []
    hooks = [
        cell.register_forward_pre_hook(lambda cell, inputs: calls.append((cell, *inputs)))
        for cell in model.model.layers
    ]
    with pytest.MonkeyPatch.context() as patch:
        kernel = seen_by_the_kernel(model, ids, patch)
    for hook in hooks:
        hook.remove()
    calls = [call for call in calls if call[3].past]
    assert len(calls) == len(kernel)
    for (cell, *inputs), (_, wanted) in zip(calls, kernel, strict=True):
        places = torch.arange(inputs[0].shape[1])
        for chosen in (places, places[-1:], places[::3]):
            with torch.no_grad():
                shares = attention_shares(cell, *inputs, chosen)
            torch.testing.assert_close(shares, wanted[chosen].mean(0), rtol=1e-10, atol=1e-10)
            total = float(shares.sum())
            assert total == pytest.approx(1, abs=1e-12) or (cell.sink is not None and total < 1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_text_is_reported_by_layer(monkeypatch, attention):
    """The chosen text tokens of each chunk but the first; with few of them, all."""
    model, ids = tiny(layers=3, attention=attention), text(1, 23)
    kernel = seen_by_the_kernel(model, ids, monkeypatch)
    report = read_memory(model, ids)
    assert len(report.layers) == 3
    for layer, values in enumerate(report.layers):
        # A chunk has 5 text tokens: fewer than QUERIES.
        shares = [share[chunk.tokens.source[0] < 23].mean(0) for chunk, share in kernel[layer::3]]
        wanted = torch.stack(shares).mean(0).tolist()
        found = [values[f"attention_{part}"] for part in memory.PARTS]
        assert found == pytest.approx(wanted, abs=1e-10)
    assert not any(cell._forward_pre_hooks for cell in model.model.layers)


def test_norms_ranks_and_similarity_are_those_of_the_cache():
    # 5 chunks of at most 5; the last one finds what 20 tokens left.
    model, ids = tiny(), text(1, 23)
    report = read_memory(model, ids)
    with torch.no_grad():
        caches = [
            model(ids[:, :n], chunk_sizes=[5] * (n // 5), use_cache=True).past_key_values
            for n in (5, 10, 15, 20)
        ]
    for layer, values in enumerate(report.layers):
        last, cell = caches[-1].memories[layer], model.model.layers[layer]
        state, temporary = last.state[0], last.temporary[0]
        slots = cell.adapt(cell.global_memory, state).detach()
        expected = {
            "norm_state": float(state.norm(dim=1).mean()),
            "norm_global": float(slots.norm(dim=1).mean()),
            "norm_temporary": float(temporary.norm(dim=1).mean()),
            "rank_state": effective_rank(state),
            "rank_temporary": effective_rank(temporary),
        }
        assert {name: values[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    wanted = np.zeros((4, 4))
    for t, one in enumerate(caches):
        for u, other in enumerate(caches):
            pairs = [
                (x.state[0, slot], y.state[0, slot])
                for x, y in zip(one.memories, other.memories, strict=True)
                for slot in range(2)
            ]
            wanted[t, u] = np.mean([float(torch.dot(a, b) / a.norm() / b.norm()) for a, b in pairs])
    np.testing.assert_allclose(report.similarity, wanted, atol=1e-6)
    np.testing.assert_allclose(np.diag(report.similarity), 1, atol=1e-6)


def test_effective_rank():
    row, column = (
        torch.randn(1, 12, generator=torch.Generator().manual_seed(0)),
        torch.arange(1.0, 6)[:, None],
    )
    assert effective_rank(column * row) == pytest.approx(1, abs=1e-4)
    assert effective_rank(column.double() * row.double()) == pytest.approx(1, abs=1e-10)
    assert effective_rank(torch.eye(6)[:4]) == pytest.approx(4)
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(
        math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    )
    assert effective_rank((column * row).bfloat16()) < 1.1
    assert effective_rank(torch.zeros(3, 4)) == 0
    assert math.isnan(effective_rank(torch.tensor([[1.0, float("nan")]])))


def test_a_planted_state_of_one_direction_has_rank_one():
    """A norm weight of zero but for one channel leaves one direction."""
    model = tiny(gate="none")
    for cell in model.model.layers:
        cell.global_memory.norm.weight.data[1:] = 0
    report = read_memory(model, text(1, 18))
    for values in report.layers:
        assert values["rank_state"] == pytest.approx(1, abs=1e-9)
        assert values["rank_temporary"] > 1.5


def test_similarity_of_planted_states():
    states = torch.eye(3)[:, None]  # one slot, in another direction each time
    assert torch.equal(slot_similarity(states), torch.eye(3))
    states = torch.stack([torch.eye(2), torch.eye(2) * 5, -torch.eye(2)])
    torch.testing.assert_close(
        slot_similarity(states), torch.tensor([[1.0, 1, -1], [1, 1, -1], [-1, -1, 1]])
    )


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ({"global_size": 0}, {"temporary", "own"}),
        ({"compression_stride": None}, {"state", "global", "own"}),
        ({"global_size": 0, "compression_stride": None}, set()),
    ],
)
def test_what_is_off_is_not_reported(sizes, parts):
    report = read_memory(tiny(**sizes), text(1, 18))
    for values in report.layers:
        assert {name.split("_", 1)[1] for name in values} == parts
        shares = [value for name, value in values.items() if name.startswith("attention")]
        assert not parts or sum(shares) == pytest.approx(1)
    assert (report.similarity is None) == ("global" not in parts)
    picture(report).canvas.draw()


def test_one_chunk_has_no_memory_to_look_at():
    assert read_memory(tiny(), text(1, 5)) is None


def test_a_long_text_is_read_in_part(monkeypatch):
    monkeypatch.setattr(memory, "CHUNKS", 4)
    model, ids = tiny(), text(1, 40)
    assert read_memory(model, ids).similarity.shape == (3, 3)
    assert read_memory(model, ids).layers == read_memory(model, ids[:, :20]).layers


def test_looking_changes_nothing():
    model, ids = tiny(), text(1, 23)
    with torch.no_grad():
        before = model(ids).logits
        state = torch.get_rng_state()
        read_memory(model, ids)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize(
    ("padding", "step", "looks"), [("left", 6, True), ("right", 6, True), ("right", 4, False)]
)
def test_the_first_row_of_a_validation_is_read_without_its_padding(tmp_path, padding, step, looks):
    model, ids, filler = tiny(), text(2, 23), torch.zeros(2, 4, dtype=torch.long)
    columns = [filler, ids] if padding == "left" else [ids, filler]
    batch = {
        "input_ids": torch.cat(columns, 1),
        "attention_mask": torch.cat([(one is ids) * torch.ones_like(one) for one in columns], 1),
    }
    recorded = {}
    module = SimpleNamespace(model=model, device="cpu", logger=None, record=recorded.update)
    trainer = SimpleNamespace(global_step=step, world_size=1, is_global_zero=True)
    trainer.precision_plugin = Precision()
    monitor = MemoryMonitor(tmp_path / "monitor", every=3)
    monitor.on_validation_batch_start(trainer, module, batch, 0)
    monitor.on_validation_batch_start(trainer, module, {}, 1)
    monitor.on_validation_epoch_end(trainer, module)
    if not looks:
        assert not recorded and not (tmp_path / "monitor").exists()
        return
    wanted = read_memory(model, ids[:1])
    assert recorded == {
        f"memory/{tag}/layer_{i}": value
        for i, layer in enumerate(wanted.layers)
        for tag, value in layer.items()
    }
    assert (tmp_path / "monitor" / "memory.png").read_bytes().startswith(b"\x89PNG")
