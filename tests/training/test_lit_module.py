"""The training step: gradients that add up, clipping, skipped steps, precisions, groups,
validation."""

import copy
import math

import lightning
import pytest
import torch

from comet_pl.config.schema import TrainConfig
from comet_pl.errors import UserError
from comet_pl.model.chunk_layout import ChunkPlan, fixed_chunks
from comet_pl.training.lit_module import CometModule
from comet_pl.training.optimization import learning_rate_factor, parameter_groups
from comet_pl.training.trainable import add_adapters
from comet_pl.training.windows import count_targets
from tests.support.models import tiny
from tests.support.training import (
    TRAIN,
    close,
    direct,
    fit,
    gradients_of,
    loader,
    norm_apart,
    ragged,
    scaler,
)

EMBEDDING = "model.embed_tokens.weight"


def logged(module, name="train/loss"):
    return float(module.trainer.callback_metrics[name])


# ---- steps


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("recompute", ["none", "cell", "chunk"])
def test_full_backpropagation_is_the_models_own(accumulate, recompute):
    model, batch = tiny(chunk_size=4), ragged([23, 9, 17])
    loss, gradients = direct(model, batch)
    rounded = copy.deepcopy(model).float().double()
    module, watch = fit(rounded, [batch], accumulate=accumulate, recompute=recompute)
    close(watch.gradients[0], gradients)
    assert logged(module) == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("labelled", [1.0, 0.1])
def test_windows_detach_the_memory_only(chunks, labelled):
    """Against a reference that calls the model by hand, window after window and row by row."""
    model, batch = tiny(chunk_size=4), ragged([23, 9, 17], labelled, seed=2)
    reference = copy.deepcopy(model).train()
    count, total = count_targets(batch), 0.0
    for row, size in enumerate([23, 9, 17]):
        ids, labels = (batch[key][row : row + 1, :size] for key in ("input_ids", "labels"))
        targets, cache = torch.cat([labels[:, 1:], torch.tensor([[-100]])], 1), None
        for start in range(0, size, 4 * chunks):
            part = slice(start, start + 4 * chunks)
            output = reference(
                ids[:, part],
                shift_labels=targets[:, part],
                chunk_sizes=fixed_chunks(ids[:, part].shape[1], 4),
                past_key_values=cache,
                use_cache=True,
                num_items_in_batch=count,
            )
            if output.loss.requires_grad:
                output.loss.backward()
            total += float(output.loss.detach())
            cache = output.past_key_values.detach()
    module, watch = fit(copy.deepcopy(model), [batch], bptt_chunks=chunks, accumulate=2)
    close(watch.gradients[0], gradients_of(reference))
    assert logged(module) == pytest.approx(total, rel=1e-6)
    # The loss is that of full backpropagation, the gradients are not.
    loss, full = direct(model, batch)
    assert total == pytest.approx(loss)
    if labelled == 1:
        with pytest.raises(AssertionError):
            close(watch.gradients[0], full)


def test_a_batch_brings_its_own_chunks():
    model, batch = tiny(chunk_size=4), ragged([11, 8])
    plans = [ChunkPlan((3, 7, 1)), ChunkPlan((8,))]
    reference = copy.deepcopy(model).train()
    reference(**batch, chunk_sizes=[[3, 7, 1], [8]], use_cache=False).loss.backward()
    _, watch = fit(copy.deepcopy(model), [{**batch, "plans": plans}])
    close(watch.gradients[0], gradients_of(reference))


def test_clipping_keeps_the_direction():
    batch = ragged([12, 20])
    module, watch = fit(tiny(), [batch, batch], clip=0.01)
    assert module.grad_norm > 0.01
    optimizer = torch.optim.AdamW(module.model.parameters())
    for name, p in module.model.named_parameters():
        p.grad = None if watch.gradients[0][name] is None else watch.gradients[0][name].clone()
    module.on_before_optimizer_step(optimizer)
    before = torch.cat([g.flatten() for g in watch.gradients[0].values() if g is not None])
    after = torch.cat([p.grad.flatten() for p in module.model.parameters() if p.grad is not None])
    assert float(after.norm()) == pytest.approx(0.01, rel=1e-3)
    assert float(torch.cosine_similarity(before, after, 0)) == pytest.approx(1)


class Spoil(lightning.Callback):
    """Makes a gradient infinite or NaN in some steps, in the backward pass."""

    def __init__(self, steps, value):
        self.steps, self.value = steps, value

    def on_train_start(self, trainer, module):
        def spoil(g):
            return torch.full_like(g, self.value) if trainer.global_step + 1 in self.steps else g

        module.model.model.embed_tokens.weight.register_hook(spoil)


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("options", [dict, scaler])
def test_a_step_without_finite_norm_is_skipped_and_counted(value, options):
    model, batch = tiny(dtype=torch.float32), ragged([12, 20])
    skips = r"step 2: the gradient norm is (inf|nan); step skipped \(1 so far\)"
    with pytest.warns(UserWarning, match=skips):
        module, watch = fit(model, [batch] * 4, [Spoil({2, 3}, value)], options())
    assert (module.trainer.global_step, module.skipped, module.skipped_in_a_row) == (4, 2, 0)
    close(watch.weights[0], watch.weights[1], 0)
    close(watch.weights[0], watch.weights[2], 0)
    assert not torch.equal(watch.weights[3][EMBEDDING], watch.weights[2][EMBEDDING])
    expected = [1e-2 * learning_rate_factor(step, 0, 4, 0.0) for step in range(4)]
    assert [rates[0] for rates in watch.rates] == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore")
def test_too_many_skipped_steps_stop_the_training():
    line = r"^train\.max_skipped: the gradient norm was not finite in 3 steps in a row, up to ste"
    with pytest.raises(UserError, match=line + "p 4;"):
        fit(tiny(), [ragged([12])] * 9, [Spoil({2, 3, 4, 5}, math.nan)], max_skipped=3)


@pytest.mark.parametrize("options", [dict, scaler])
def test_a_batch_without_targets_is_a_step_that_changes_nothing(options):
    model, batch = tiny(dtype=torch.float32), ragged([12, 20])
    empty = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    module, watch = fit(model, [empty, batch, empty], trainer=options())
    assert (module.trainer.global_step, module.skipped) == (3, 0)
    assert logged(module) == 0
    close(watch.weights[1], watch.weights[2], 0)
    assert not torch.equal(watch.weights[0][EMBEDDING], watch.weights[1][EMBEDDING])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "16-mixed"])
def test_every_precision_learns(precision):
    batch, model = ragged([30, 25], 1.0), tiny(dtype=torch.float32, chunk_size=8)
    before = direct(model, batch)[0]
    module, _ = fit(model, [batch] * 8, trainer={"precision": precision}, bptt_chunks=2, clip=1.0)
    assert (module.trainer.global_step, module.skipped) == (8, 0)
    assert logged(module) < 0.9 * before
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert model.lm_head.weight.dtype == dtype


@pytest.mark.parametrize("recompute", ["none", "cell"])
def test_weights_gradients_of_many_chunks_are_summed_in_float32(recompute):
    """With autocast's copies of the weights they would be added up in bfloat16: 1 % off."""
    batch, sizes = ragged([256, 256], 1.0), {"dtype": torch.float32, "chunk_size": 4}
    _, watch = fit(tiny(**sizes), [batch], trainer={"precision": "bf16-mixed"}, recompute=recompute)
    model, errors = tiny(**sizes).train(), []
    for kept in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=kept):
            model(**batch, chunk_sizes=[4] * 64, use_cache=False).loss.backward()
        errors.append(norm_apart(watch.gradients[0], gradients_of(model)))
    assert errors[0] < 1e-5 and errors[1] > 2e-3


def test_the_losses_of_many_windows_are_summed_in_float32(monkeypatch):
    losses, backward = [], CometModule.manual_backward

    def manual_backward(self, loss):
        losses.append(float(loss.detach()))
        backward(self, loss)

    monkeypatch.setattr(CometModule, "manual_backward", manual_backward)
    model, options = tiny(dtype=torch.float32).bfloat16(), {"precision": "bf16-true"}
    module, _ = fit(model, [ragged([300], 1.0)], trainer=options, bptt_chunks=1)
    assert len(losses) == 60
    assert logged(module) == pytest.approx(sum(losses), rel=1e-5)


def test_a_loss_scale_that_is_too_large_is_found_out():
    with pytest.warns(UserWarning, match="step skipped"):
        module, _ = fit(tiny(dtype=torch.float32), [ragged([12, 20])] * 3, trainer=scaler(2.0**40))
    assert module.trainer.precision_plugin.scaler.get_scale() < 2.0**40
    assert all(torch.isfinite(p).all() for p in module.model.parameters())


# ---- parameter groups and the learning rate


@pytest.mark.parametrize("gate", ["scalar", "elementwise"])
def test_parameter_groups(gate):
    model = tiny(gate=gate, gate_bias=1.0)
    memory = list(model.memory_parameters())
    train = TrainConfig(lr=2.0, memory_lr_factor=5.0, weight_decay=0.1)
    groups = {group["name"]: group for group in parameter_groups(model, memory, train)}
    names = {id(p): name for name, p in model.named_parameters()}
    found = {key: {names[id(p)] for p in group["params"]} for key, group in groups.items()}
    assert sum(map(len, found.values())) == len(names)
    assert found["memory"] | found["memory, decayed"] == {name for name, _ in memory}
    assert {EMBEDDING, "model.layers.0.self_attn.q_proj.weight"} <= found["backbone, decayed"]
    assert {"model.norm.weight", "model.layers.0.input_layernorm.weight"} <= found["backbone"]
    assert any("gate" in name and "bias" in name for name in found["memory"])
    assert {key: (group["lr"], group["weight_decay"]) for key, group in groups.items()} == {
        "backbone": (2.0, 0.0),
        "backbone, decayed": (2.0, 0.1),
        "memory": (10.0, 0.0),
        "memory, decayed": (10.0, 0.1),
    }


def test_learning_rate_warms_up_and_ends_at_its_final_value():
    curve = [learning_rate_factor(step, 4, 24, 0.1) for step in range(25)]
    assert curve[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert curve[4:] == sorted(curve[4:], reverse=True)
    assert curve[14] == pytest.approx(0.55)  # half-way down
    assert curve[24] == pytest.approx(0.1)
    assert learning_rate_factor(3, 10, 5, 0.0) == 0.4  # all warm-up


# ---- validation


def test_validation_loss_is_a_mean_over_tokens():
    model = tiny(chunk_size=4)
    batches = [ragged([23, 9], 0.9), ragged([6], 0.3, seed=1), {**ragged([9], 0, seed=2)}]
    module = CometModule(model, TrainConfig(**TRAIN), max_steps=1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = lightning.Trainer(accelerator="cpu", **quiet)
    trainer.validate(module, loader(batches), verbose=False)
    total = sum(direct(model, batch)[0] * count_targets(batch) for batch in batches[:2])
    expected = total / sum(map(count_targets, batches))
    assert logged(module, "val/loss") == pytest.approx(expected, rel=1e-6)


def test_validation_returns_logits_only_where_they_are_asked_for():
    module, batch = CometModule(tiny(), TrainConfig(**TRAIN), 1), ragged([9, 9], 1.0)
    with torch.no_grad():
        assert module.validation_step(batch, 0)["logits"] is None
        kept = module.validation_step({**batch, "logits_to_keep": 4}, 0)["logits"]
        whole = module.model(batch["input_ids"], batch["attention_mask"]).logits
    torch.testing.assert_close(kept, whole[:, -4:])


# ---- several ranks


class Rank(lightning.Callback):
    """Each rank takes its own batch; rank 0 writes down the gradients that the optimizer gets."""

    def __init__(self, path):
        self.path = path

    def setup(self, trainer, module, stage):
        step = module.training_step
        module.training_step = lambda batch, batch_idx=0: step(batch[trainer.global_rank], 0)

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.is_global_zero:
            torch.save(gradients_of(module.model), self.path)


@pytest.mark.parametrize(
    ("parameters", "recompute", "distill"),
    [("all", "none", 0), ("all", "chunk", 0), ("memory+lora", "none", 0), ("memory", "none", 0.5)],
)
def test_two_ranks_are_one_with_both_batches(tmp_path, parameters, recompute, distill):
    """The ranks have different numbers of windows, and one a micro-batch without targets."""
    model = tiny(chunk_size=4)
    add_adapters(model, TrainConfig(parameters=parameters))
    batches = [ragged([23, 9], 1.0), ragged([7, 3], 1.0, seed=1)]
    batches[1]["labels"][1] = -100
    path, trainer = str(tmp_path / "gradients.pt"), {"strategy": "ddp_fork", "devices": 2}
    options = {"bptt_chunks": 2, "distill": distill, "parameters": parameters}
    more = {"accumulate": 2, "recompute": recompute}
    fit(copy.deepcopy(model), [batches], [Rank(path)], trainer, **options | more)
    pad = torch.nn.functional.pad
    both = {
        key: torch.cat([pad(b[key], (0, 23 - b[key].shape[1])) for b in batches])
        for key in batches[0]
    }
    _, alone = fit(copy.deepcopy(model), [both], **options)
    expected = alone.gradients[0]
    for name, p in model.named_parameters():
        if p.requires_grad and expected[name] is None:
            expected[name] = torch.zeros(())
    close(torch.load(path), expected)
