"""train.recompute=chunk: the gradients of full backpropagation, the memory of one chunk and of the boundaries."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.models import memories, tiny
from tests.support.training import close, fit, norm_apart, ragged, scaler

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from live_bytes import LiveBytes

from callbacks.gate_monitor import GateMonitor
from comet_pl.config.load import from_dict, load, to_dict
from comet_pl.config.schema import TrainConfig
from comet_pl.errors import UserError
from comet_pl.training.chunk_checkpointing import Boundaries, read_chunks
from comet_pl.training.lit_module import CometModule
from comet_pl.training.text_reader import read_windows
from comet_pl.training.trainable import add_adapters
from comet_pl.training.windows import count_targets, cut_windows


def gradients(model, read, batch, bptt=None, seed=0, **options):
    """(loss, gradient of each parameter) of a batch, by a way to read its windows. The model's own gradients are cleared."""
    torch.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    windows, loss = cut_windows(batch, model.config.chunk_size, bptt), 0.0
    for part in read(model, windows, max(1, count_targets(batch)), **options):
        if part is not None:
            part.backward()
            loss += float(part.detach())
    return loss, {
        name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
    }


# ---- gradients


@st.composite
def batches(draw):
    lengths = draw(st.lists(st.integers(0, 23), min_size=1, max_size=3).filter(any))
    batch = ragged(
        lengths,
        draw(st.sampled_from([0.1, 0.5, 1.0])),
        draw(st.integers(0, 9)),
        draw(st.booleans()),
    )
    if draw(st.booleans()):
        plans = []
        for left in lengths:
            plans.append([])
            while left:
                plans[-1].append(draw(st.integers(1, min(left, 12))))
                left -= plans[-1][-1]
        batch |= {
            "chunk_sizes": plans,
            "resets": [[draw(st.booleans()) for _ in plan] for plan in plans],
        }
    if draw(st.booleans()):
        batch["strides"] = [draw(st.integers(1, 7)) for _ in lengths]
    return batch


@given(
    comet=memories(),
    batch=batches(),
    bptt=st.sampled_from([None, 1, 2, 3]),
    cells=st.booleans(),
    offload=st.booleans(),
)
def test_gradients_are_those_of_full_backpropagation(comet, batch, bptt, cells, offload):
    """Any backbone, memory, gate, raggedness, plan, reset, stride and window."""
    if comet["compression_stride"] is None:
        batch.pop("strides", None)
    model = tiny(**comet).train()
    loss, expected = gradients(model, read_windows, batch, bptt)
    model.gradient_checkpointing = cells
    found_loss, found = gradients(model, read_chunks, batch, bptt, offload=offload)
    assert found_loss == pytest.approx(loss, rel=1e-10)
    close(found, expected)


@pytest.mark.parametrize("bptt", [None, 3])
def test_gradients_in_float32(bptt):
    batch = ragged([60, 47, 60])
    model = tiny(dtype=torch.float32).train()
    loss, expected = gradients(model, read_windows, batch, bptt)
    found_loss, found = gradients(model, read_chunks, batch, bptt)
    assert found_loss == pytest.approx(loss, rel=1e-6)
    assert norm_apart(found, expected) < 1e-5


@pytest.mark.parametrize("cells", [False, True])
def test_gradients_under_autocast_are_as_good(cells):
    """Against float64: bf16 rounds both ways alike. What autocast keeps of weights from the reading ahead would have no gradient."""
    batch = ragged([60, 47, 60], 1.0)
    exact, model = tiny().train(), tiny(dtype=torch.float32).train()
    batch["labels"][:, :12] = -100  # windows without targets come first
    for bptt in (None, 2):
        expected = gradients(exact, read_windows, batch, bptt)[1]
        errors = []
        for read in (read_windows, read_chunks):
            model.gradient_checkpointing = cells
            with torch.autocast("cpu", torch.bfloat16):
                errors.append(norm_apart(gradients(model, read, batch, bptt)[1], expected))
        assert errors[1] < min(0.05, 1.2 * errors[0])


@pytest.mark.parametrize("parameters", ["memory", "lora", "memory+lora"])
@pytest.mark.parametrize("bptt", [None, 2])
def test_dropout_drops_the_same_both_times(parameters, bptt):
    """LoRA with dropout: gradients and the random numbers that come next are those of a single reading."""
    model = tiny().train()
    add_adapters(
        model,
        TrainConfig(
            parameters=parameters, **({"lora_dropout": 0.3} if "lora" in parameters else {})
        ),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # starts at zero, where nothing would show
            torch.nn.init.normal_(parameter, std=0.3)
    batch = ragged([23, 17], 1.0)
    runs = []
    for read, cells in ((read_windows, False), (read_chunks, False), (read_chunks, True)):
        model.gradient_checkpointing = cells
        runs.append((*gradients(model, read, batch, bptt), torch.rand(())))
    for loss, found, after in runs[1:]:
        assert loss == pytest.approx(runs[0][0], rel=1e-10)
        close(found, runs[0][1])
        assert torch.equal(after, runs[0][2])
    if "lora" in parameters:
        assert gradients(model, read_chunks, batch, bptt, seed=1)[0] != pytest.approx(
            runs[0][0], rel=1e-3
        )


# ---- in training


@pytest.mark.parametrize("bptt", [None, 2])
def test_a_scaled_loss_gives_scaled_gradients(bptt):
    """16-mixed: the optimizer gets the gradients unscaled, and none is scaled twice on its way back through the chunks."""
    batch, found = ragged([23, 17], 1.0), []
    for recompute in ("none", "chunk"):
        _, watch = fit(
            tiny(dtype=torch.float32),
            [batch],
            trainer=scaler(),
            bptt_chunks=bptt,
            recompute=recompute,
        )
        found.append(watch.gradients[0])
    assert (
        norm_apart(*found) < 1e-2
    )  # float16 arithmetic; a scale of 1,024 too many or too few would be off by 1,000


@pytest.mark.parametrize("bptt", [None, 2])
def test_each_gate_is_seen_once(bptt, monkeypatch):
    """gate/mean of a logged step is that of a single reading."""
    batch, found = ragged([23, 23], 1.0), []
    for recompute in ("none", "cell", "chunk"):
        gates, values = GateMonitor(), {}
        monkeypatch.setattr(
            CometModule, "record", lambda module, new, values=values: values.update(new)
        )
        module, _ = fit(tiny(), [batch], [gates], bptt_chunks=bptt, recompute=recompute)
        assert module.model.observer is None
        found.append((float(gates.step[0].sum()), values["gate/mean"]))
    assert found[0][0] > 0
    assert found[2][0] == found[0][0]
    assert found[2][1] == pytest.approx(found[0][1], rel=1e-10)


def test_weights_learn_as_without():
    """Some steps with clipping and accumulation, against recompute=none."""
    batches = [ragged([23, 9, 17], 0.5, seed) for seed in range(3)]
    options = {"clip": 0.5, "accumulate": 2, "bptt_chunks": 3}
    runs = [
        fit(tiny(), batches, recompute=recompute, **options)[1] for recompute in ("none", "chunk")
    ]
    for one, two in zip(*(run.weights for run in runs), strict=True):
        close(
            two, one, 1e-7
        )  # AdamW divides by the root of squared gradients: where those are tiny, rounding is not


# ---- memory


def peak(tokens, recompute):
    """(bytes of all tensors but weights and gradients at the worst moment, bytes at the boundaries, formula of those) of a text's step."""
    model = tiny(
        chunk_size=16, global_size=4, compression_stride=4, temporary_capacity=16, layers=3
    ).train()
    model.gradient_checkpointing = recompute != "none"
    windows = cut_windows(ragged([tokens], 1.0), 16, None)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    known = [tensor for p in model.parameters() for tensor in (p, p.grad)]
    kept = []
    with LiveBytes([*known, *model.buffers()]) as live, pytest.MonkeyPatch.context() as patch:
        add = Boundaries.add
        patch.setattr(
            Boundaries, "add", lambda self, cache: (add(self, cache), kept.append(self.nbytes))
        )
        for part in (
            read_chunks(model, windows, tokens)
            if recompute == "chunk"
            else read_windows(model, windows, tokens)
        ):
            part.backward()
    chunks = tokens // 16
    formula = (
        3 * (chunks - 1) * (4 + 4) * 16 * 8
    )  # layers, boundaries, slots and new entries, width, bytes of a float64
    return live.peak, max(kept, default=0), formula


def test_memory_is_that_of_one_chunk_and_the_boundaries():
    """Each entry of the temporary memory is kept once, though every one of them is in the memory at four boundaries."""
    found = {n: peak(16 * n, "chunk") for n in (8, 16)}
    assert all(kept == formula for _, kept, formula in found.values())
    beyond = {n: at_most - kept for n, (at_most, kept, _) in found.items()}
    assert beyond[16] - beyond[8] <= 24 * 8 * 16  # ids, mask and targets of eight chunks
    assert found[16][0] < 0.6 * peak(16 * 16, "cell")[0] < 0.6 * peak(16 * 16, "none")[0]


# ---- configuration


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (
            ["train.recompute=true"],
            "train.recompute: 'true' given, allowed: none (once false), cell (once true), chunk",
        ),
        (
            ["train.recompute=chunks"],
            "allowed: none (once false), cell (once true), chunk (did you mean chunk?)",
        ),
        (["train.recompute=null"], "train.recompute: null given, allowed: none (once false)"),
        (
            ["train.offload=true"],
            "train.offload: true given, but train.recompute is none; it needs chunk",
        ),
        (
            ["train.recompute=chunk", "trainer.strategy=layer_pipeline"],
            "train.recompute: chunk given, but trainer.strategy is layer_pipeline",
        ),
    ],
)
def test_mistakes_are_one_line(keys, line):
    with pytest.raises(UserError) as caught:
        load(keys)
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_old_values_in_a_conf_file_are_named_with_their_place(tmp_path):
    for name, content in {"base.yaml": "", "old.yaml": "train:\n  recompute: true\n"}.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(
        UserError,
        match=r"train\.recompute: true given \(.*old\.yaml:2\), allowed: none \(once false\), cell \(once true\)",
    ):
        load(["conf=old"], conf_dir=tmp_path)


@pytest.mark.parametrize(("old", "new"), [(False, "none"), (True, "cell"), ("chunk", "chunk")])
def test_checkpoints_from_before_are_understood(old, new):
    values = to_dict(load([]))
    values["train"]["recompute"] = old
    assert from_dict(values).train.recompute == new
    assert load([], "eval", base=values).train.recompute == new
