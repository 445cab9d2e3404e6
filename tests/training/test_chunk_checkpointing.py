"""train.recompute=chunk: full backpropagation's gradients in the memory of a chunk and
boundaries."""

import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.shared.live_bytes import LiveBytes
from callbacks.gate_monitor import GateMonitor
from comet_pl.config.load import from_dict, load, to_dict
from comet_pl.config.schema import TrainConfig
from comet_pl.errors import UserError
from comet_pl.training.chunk_checkpointing import Boundaries, read_chunks
from comet_pl.training.lit_module import CometModule
from comet_pl.training.text_reader import read_windows
from comet_pl.training.trainable import add_adapters
from comet_pl.training.windows import count_targets, cut_windows
from tests.support.models import memories, tiny
from tests.support.training import close, cuts, fit, gradients_of, norm_apart, ragged, scaler


def gradients(model, read, batch, bptt=None, seed=0, **options):
    """(loss, gradients) of a batch whose windows are read in some way."""
    torch.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    windows, loss = cut_windows(batch, model.config.chunk_size, bptt), 0.0
    for part in read(model, windows, max(1, count_targets(batch)), **options):
        if part is not None:
            part.backward()
            loss += float(part.detach())
    return loss, gradients_of(model)


# ---- gradients


@given(
    comet=memories(),
    cut=cuts(labelled=(0.1, 0.5, 1.0), strides=True),
    cells=st.booleans(),
    offload=st.booleans(),
)
def test_gradients_are_those_of_full_backpropagation(comet, cut, cells, offload):
    """Any backbone, memory, gate, raggedness, plan, reset, stride and window."""
    batch, _, bptt = cut
    if comet["compression_stride"] is None and "plans" in batch:
        batch["plans"] = [plan._replace(stride=None) for plan in batch["plans"]]
    model = tiny(**comet).train()
    loss, expected = gradients(model, read_windows, batch, bptt)
    model.gradient_checkpointing = cells
    found_loss, found = gradients(model, read_chunks, batch, bptt, offload=offload)
    assert found_loss == pytest.approx(loss, rel=1e-10)
    close(found, expected)


@given(comet=memories(), cut=cuts(labelled=(0.1, 0.5, 1.0), strides=True))
def test_cells_that_are_computed_again_have_the_same_gradients(comet, cut):
    """T is put together from the entries of single chunks, in ragged rows kept whole."""
    batch, _, bptt = cut
    if comet["compression_stride"] is None and "plans" in batch:
        batch["plans"] = [plan._replace(stride=None) for plan in batch["plans"]]
    model = tiny(**comet).train()
    loss, expected = gradients(model, read_windows, batch, bptt)
    model.gradient_checkpointing = True
    found_loss, found = gradients(model, read_windows, batch, bptt)
    assert found_loss == pytest.approx(loss, rel=1e-10)
    close(found, expected)


def test_recomputed_cells_keep_each_entry_once():
    """What a chunk more keeps is less than T alone would take: inputs of cells, S, four new entries
    of T's 200, indices and RoPE."""
    sizes = {"chunk_size": 16, "global_size": 2, "compression_stride": 4}
    model, live = tiny(**sizes, temporary_capacity=200).train(), {}
    model.gradient_checkpointing = True
    for chunks in (70, 80):  # T is full after 50
        (window,) = cut_windows(ragged([16 * chunks], 1.0), 16, None)
        gc.collect()
        with LiveBytes([*model.parameters(), *model.buffers()]) as counted:
            output = model(**window.inputs())
            gc.collect()
            live[chunks] = counted.now
        del output
    layers, width = 2, 16
    assert 0 < (live[80] - live[70]) / 10 < 0.6 * layers * 200 * width * 8


@pytest.mark.parametrize("bptt", [None, 3])
def test_gradients_in_float32(bptt):
    batch, model = ragged([60, 47, 60]), tiny(dtype=torch.float32).train()
    (loss, expected), (other, found) = (
        gradients(model, read, batch, bptt) for read in (read_windows, read_chunks)
    )
    assert other == pytest.approx(loss, rel=1e-6)
    assert norm_apart(found, expected) < 1e-5


@pytest.mark.parametrize("cells", [False, True])
def test_gradients_under_autocast_are_as_good(cells):
    """Against float64: bf16 rounds both ways alike. Weights that autocast casts in the first
    reading must still get gradients."""
    batch = ragged([60, 47, 60], 1.0)
    exact, model = tiny().train(), tiny(dtype=torch.float32).train()
    model.gradient_checkpointing = cells
    for bptt in (None, 3):
        expected, errors = gradients(exact, read_windows, batch, bptt)[1], []
        for read in (read_windows, read_chunks):
            with torch.autocast("cpu", torch.bfloat16):
                errors.append(norm_apart(gradients(model, read, batch, bptt)[1], expected))
        assert errors[1] < min(0.05, 1.2 * errors[0])


@pytest.mark.parametrize(
    ("parameters", "bptt"), [("memory", None), ("lora", None), ("lora", 2), ("memory+lora", 2)]
)
def test_dropout_drops_the_same_both_times(parameters, bptt):
    """With LoRA's dropout, gradients and the next random numbers are those of a single reading."""
    model, lora = tiny().train(), "lora" in parameters
    dropout = {"lora_dropout": 0.3} if lora else {}
    add_adapters(model, TrainConfig(parameters=parameters, **dropout))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # starts at zero, where nothing would show
            torch.nn.init.normal_(parameter, std=0.3)
    batch, results = ragged([23, 17], 1.0), []
    for read, cells in ((read_windows, False), (read_chunks, False), (read_chunks, True)):
        model.gradient_checkpointing = cells
        results.append((*gradients(model, read, batch, bptt), torch.rand(())))
    (loss, expected, next_number), *rest = results
    for other, found, after in rest:
        assert other == pytest.approx(loss, rel=1e-10)
        close(found, expected)
        assert torch.equal(after, next_number)
    if lora:
        other = gradients(model, read_chunks, batch, bptt, seed=1)[0]
        assert other != pytest.approx(loss, rel=1e-3)


# ---- in training


@pytest.mark.parametrize("bptt", [None, 2])
def test_a_scaled_loss_gives_scaled_gradients(bptt):
    """16-mixed: the optimizer gets the gradients unscaled, and none is scaled twice on its way
    back through the chunks."""
    batch, found = ragged([23, 17], 1.0), []
    for recompute in ("none", "chunk"):
        model, options = tiny(dtype=torch.float32), {"bptt_chunks": bptt, "recompute": recompute}
        found.append(fit(model, [batch], trainer=scaler(), **options)[1].gradients[0])
    # float16 arithmetic; a scale of 1,024 too many or too few would be off by 1,000.
    assert norm_apart(*found) < 1e-2


@pytest.mark.parametrize("bptt", [None, 2])
def test_each_gate_is_seen_once(bptt, monkeypatch):
    """gate/mean of a logged step is that of a single reading."""
    batch, found = ragged([23, 23], 1.0), []
    for recompute in ("none", "cell", "chunk"):
        gates, values = GateMonitor(), {}
        monkeypatch.setattr(CometModule, "record", lambda module, new, v=values: v.update(new))
        module, _ = fit(tiny(), [batch], [gates], bptt_chunks=bptt, recompute=recompute)
        assert module.model.observer is None
        found.append((float(gates.step[0].sum()), values["gate/mean"]))
    assert found[0][0] > 0
    assert found[2][0] == found[0][0]
    assert found[2][1] == pytest.approx(found[0][1], rel=1e-10)


# ---- memory


def peak(chunks, recompute):
    """Of a text's step: (the most bytes of all tensors but weights and gradients, bytes at the
    boundaries, formula of those)."""
    sizes = {"chunk_size": 16, "global_size": 4, "compression_stride": 4, "temporary_capacity": 16}
    model, tokens, kept = tiny(**sizes, layers=3).train(), 16 * chunks, [0]
    model.gradient_checkpointing = recompute != "none"
    windows = cut_windows(ragged([tokens], 1.0), 16, None)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    known = [tensor for p in model.parameters() for tensor in (p, p.grad)]
    read, add = read_chunks if recompute == "chunk" else read_windows, Boundaries.add

    def count(self, cache):
        add(self, cache)
        kept.append(self.nbytes)

    with LiveBytes([*known, *model.buffers()]) as live, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Boundaries, "add", count)
        for part in read(model, windows, tokens):
            part.backward()
    # Layers, boundaries, slots and new entries, width, bytes of a float64.
    return live.peak, max(kept), 3 * (chunks - 1) * (4 + 4) * 16 * 8


@pytest.mark.slow
def test_memory_is_that_of_one_chunk_and_the_boundaries():
    """Each entry of the temporary memory is kept once, though it is in the memory at four
    boundaries."""
    found = {n: peak(n, "chunk") for n in (8, 16)}
    assert all(kept == formula for _, kept, formula in found.values())
    beyond = {n: at_most - kept for n, (at_most, kept, _) in found.items()}
    assert beyond[16] - beyond[8] <= 24 * 8 * 16  # ids, mask and targets of eight chunks
    assert found[16][0] < 0.6 * peak(16, "cell")[0] < 0.6 * peak(16, "none")[0]


# ---- configuration


def test_old_values_in_a_conf_file_are_named_with_their_place(tmp_path):
    (tmp_path / "base.yaml").write_text("")
    (tmp_path / "old.yaml").write_text("train:\n  recompute: true\n")
    line = r"train\.recompute: true given \(.*old\.yaml:2\), allowed: none \(once false\), cell"
    with pytest.raises(UserError, match=line):
        load(["conf=old"], conf_dir=tmp_path)


@pytest.mark.parametrize(("old", "new"), [(False, "none"), (True, "cell"), ("chunk", "chunk")])
def test_checkpoints_from_before_are_understood(old, new):
    values = to_dict(load([]))
    values["train"]["recompute"] = old
    assert from_dict(values).train.recompute == new
    assert load([], "eval", base=values).train.recompute == new
