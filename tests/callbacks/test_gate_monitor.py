"""gate/...: the gates of real tokens only, chunk by chunk; figures; collapsed gates are named."""

import math
import warnings

import lightning
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks.gate_monitor import PATIENCE, GateMonitor, half_life
from comet_pl import build
from comet_pl.config.load import load
from comet_pl.config.schema import TrainConfig
from comet_pl.experiment.run_folder import plan_run
from comet_pl.model.chunk_layout import ChunkPlan, fixed_chunks
from comet_pl.training.lit_module import CometModule
from tests.support.models import tiny
from tests.support.training import fit, loader, ragged

EVERY_STEP = {"log_every_n_steps": 1}


@pytest.fixture
def recorded(monkeypatch):
    """What is logged, the last value of each tag."""
    values = {}
    monkeypatch.setattr(CometModule, "record", lambda module, new: values.update(new))
    return values


def row_by_row(model, batch):
    """{(layer, chunk): g of all rows, flat}, of each row alone."""
    found, caught = {}, []
    handles = [
        memory.gate.register_forward_hook(
            lambda module, inputs, g: caught.append(g.detach().flatten())
        )
        for memory in model.gates
    ]
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        caught.clear()
        sizes = fixed_chunks(int(mask.sum()), model.config.chunk_size)
        with torch.no_grad():
            model(ids[mask.bool()][None], chunk_sizes=sizes, use_cache=False)
        for number, g in enumerate(caught):  # chunk by chunk, from the second on
            chunk, layer = divmod(number, len(model.gates))
            found.setdefault((layer, 1 + chunk), []).append(g)
    for handle in handles:
        handle.remove()
    return {place: torch.cat(parts) for place, parts in found.items()}


@pytest.mark.parametrize("gate", ["scalar", "elementwise"])
@pytest.mark.parametrize("left", [False, True])
def test_a_ragged_batch_has_the_gates_of_its_rows(gate, left, recorded):
    """Neither rows that have ended nor first chunks are counted."""
    model, batch = (
        tiny(chunk_size=4, gate=gate, gate_bias=0.5),
        ragged([23, 5, 17, 3], 1.0, left=left),
    )
    expected = row_by_row(model, batch)
    monitor = GateMonitor()
    fit(model, [batch], [monitor], EVERY_STEP, accumulate=2)
    count, total, squares = monitor.step
    assert {(i, t) for i, t in torch.nonzero(count).tolist()} == set(expected)
    for (i, t), g in expected.items():
        assert count[i, t] == len(g)
        assert float(total[i, t]) == pytest.approx(float(g.sum()), rel=1e-10)
        assert float(squares[i, t]) == pytest.approx(float(g.square().sum()), rel=1e-10)
    for i in range(2):
        g = torch.cat([g for (layer, _), g in expected.items() if layer == i])
        assert recorded[f"gate/mean/layer_{i}"] == pytest.approx(float(g.mean()))
        assert recorded[f"gate/variance/layer_{i}"] == pytest.approx(float(g.var(correction=0)))
        assert recorded[f"gate/half_life/layer_{i}"] == pytest.approx(
            math.log(0.5) / math.log(float(g.mean()))
        )
    assert recorded["gate/mean"] == pytest.approx(float(torch.cat(list(expected.values())).mean()))


def sums(**options):
    """The monitor's sums of a step on chunks of 5 tokens."""
    monitor = GateMonitor()
    fit(tiny(), [ragged([23, 23], 1.0)], [monitor], EVERY_STEP, **options)
    return monitor.step


@pytest.fixture(scope="module")
def plain_sums():
    return sums()


@pytest.mark.parametrize(
    ("chunks", "recompute"),
    [
        (1, "none"),
        (2, "cell"),
        (2, "chunk"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((2, "none"), (1, "cell"), (None, "cell"), (1, "chunk"), (None, "chunk"))
        ),
    ],
)
def test_windows_do_not_move_chunks(chunks, recompute, plain_sums):
    step = sums(bptt_chunks=chunks, recompute=recompute)
    torch.testing.assert_close(step, plain_sums)
    assert step[0].any(0).tolist() == [False, True, True, True, False][: step.shape[2]]


def test_a_packed_document_starts_without_a_gate():
    batch = {
        **ragged([12], 1.0),
        "plans": [ChunkPlan((3, 3, 3, 3), (True, False, True, False))],
    }
    monitor = GateMonitor()
    fit(tiny(chunk_size=3), [batch], [monitor], EVERY_STEP, bptt_chunks=2)
    # Nothing follows the last chunk.
    assert monitor.step[0].any(0).nonzero().flatten().tolist() == [1]


def test_without_gates_there_is_nothing(recorded):
    for options in ({"gate": "none"}, {"global_size": 0}):
        fit(tiny(**options), [ragged([23], 1.0)], [GateMonitor()], EVERY_STEP)
    fit(tiny(), [ragged([4], 1.0)], [GateMonitor()], EVERY_STEP)  # a single chunk
    assert not [tag for tag in recorded if tag.startswith("gate")]


@given(st.floats(0.01, 0.9999))
def test_half_of_a_slot_is_left_after_its_half_life(mean):
    assert mean ** half_life(mean) == pytest.approx(0.5)
    assert (half_life(0.0), half_life(1.0)) == (0.0, math.inf)


# ---- collapse


def collapse(bias, steps, monitor=None):
    """The warnings of a training whose gates start at sigmoid(bias)."""
    model = tiny(dtype=torch.float32, gate_bias=bias)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model, [ragged([23, 17], 1.0)] * steps, [monitor or GateMonitor()], EVERY_STEP, lr=1e-5)
    return [str(one.message) for one in caught if "collapsed" in str(one.message)]


@pytest.mark.parametrize(
    ("bias", "side", "advice"),
    [(20.0, "1", "smaller model.gate_bias"), (-20.0, "0", "model.gate_bias=3")],
)
def test_a_planted_collapse_is_reported_once(bias, side, advice):
    lines = collapse(bias, PATIENCE + 3)
    assert len(lines) == 2  # layers
    for layer, line in enumerate(lines):
        start = f"step {PATIENCE}: the gates of layer {layer} have collapsed to {side} (mean "
        assert line.startswith(f"{start}{float(side):.3f}")
        assert advice in line and "train.gate_pull" in line and "\n" not in line


@pytest.mark.parametrize("bias", [None, 5.0, pytest.param(3.0, marks=pytest.mark.slow)])
def test_healthy_gates_are_not_reported(bias):
    """5 is what conf=passkey starts with."""
    assert collapse(bias, PATIENCE + 3) == []


def test_a_few_steps_are_no_collapse():
    assert collapse(20.0, PATIENCE - 1) == []


def test_a_resumed_run_goes_on_counting_and_does_not_repeat_itself():
    first = GateMonitor()
    assert collapse(20.0, PATIENCE - 2, first) == []
    second = GateMonitor()
    second.load_state_dict(first.state_dict())
    assert len(collapse(20.0, 2, second)) == 2
    third = GateMonitor()
    third.load_state_dict(second.state_dict())
    assert collapse(20.0, PATIENCE + 1, third) == []


def test_one_collapsed_layer_is_named():
    model = tiny(layers=3, dtype=torch.float32, gate_bias=1.0)
    with torch.no_grad():
        model.gates[1].gate.proj.bias.fill_(20.0)
    with pytest.warns(UserWarning, match="the gates of layer 1 have collapsed to 1") as caught:
        fit(model, [ragged([23], 1.0)] * PATIENCE, [GateMonitor()], EVERY_STEP, lr=1e-5)
    assert len([one for one in caught if "collapsed" in str(one.message)]) == 1


# ---- what TensorBoard and the run's folder get


def test_histograms_heat_map_and_text(tmp_path):
    model, batch = tiny(dtype=torch.float32, gate_bias=20.0), ragged([23, 17], 1.0)
    module = CometModule(model.train(), TrainConfig(lr=1e-5), max_steps=PATIENCE + 1)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=PATIENCE + 1,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        logger=TensorBoardLogger(tmp_path, name="", version=""),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[GateMonitor(tmp_path, every=3)],
    )
    with pytest.warns(UserWarning, match="collapsed"):
        trainer.fit(module, loader([batch] * (PATIENCE + 1)), loader([batch]))
    events = EventAccumulator(
        str(tmp_path), size_guidance={"images": 0, "histograms": 0, "tensors": 0}
    ).Reload()
    for layer in (0, 1):
        shown = events.Histograms(f"gate/layer_{layer}")
        assert [one.step for one in shown] == [3, 6]
        # Slots times chunks of 5 with a state before and a chunk after.
        assert shown[0].histogram_value.num == 2 * (3 + 2)
        assert sum(shown[0].histogram_value.bucket) == 2 * (3 + 2)
    assert [one.step for one in events.Images("gate/by_chunk")] == [2, 4, 6]
    (text, *_) = events.Tensors("gate/collapsed/text_summary")
    assert b"layer 0 have collapsed to 1" in text.tensor_proto.string_val[0]
    assert (tmp_path / "gates.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*"))


def test_the_conf_switches_it(tmp_path):
    keys = [f"run.root={tmp_path}", "run.name=x", "trainer.accelerator=cpu"]
    folder = tmp_path / "passkey" / "x" / "monitor"
    for value, expected in (("true", [(7, folder)]), ("false", [])):
        config = load([*keys, f"monitor.gates={value}", "monitor.gates_every=7"])
        callbacks = build.build_trainer(config, plan_run(config), {}).callbacks
        monitors = [callback for callback in callbacks if isinstance(callback, GateMonitor)]
        assert [(monitor.every, monitor.folder) for monitor in monitors] == expected
