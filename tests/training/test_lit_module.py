"""The training step: windows, gradients that add up, clipping, skipped steps, precisions, parameter groups, validation."""

from __future__ import annotations

import copy
import math

import lightning
import pytest
import torch
from hypothesis import given
from lightning.pytorch.plugins.precision import MixedPrecision

from callbacks.passkey_heatmap import exact_match
from comet_pl.config.schema import TrainConfig
from comet_pl.errors import UserError
from comet_pl.model.chunk_layout import fixed_chunks
from comet_pl.training.lit_module import CometModule
from comet_pl.training.optimization import learning_rate_factor, parameter_groups
from comet_pl.training.trainable import add_adapters
from comet_pl.training.windows import count_targets, cut_windows, split_rows
from tests.support.models import tiny
from tests.support.training import TRAIN, close, cuts, direct, fit, loader, ragged, scaler

# ---- windows


@given(cuts())
def test_windows_are_the_rows_cut_at_chunks(cut):
    batch, chunk_size, chunks, plans = cut
    windows = cut_windows(batch, chunk_size, chunks)
    assert sum(window.targets for window in windows) == count_targets(batch)
    assert not windows or windows[-1].targets
    for row in range(len(batch["input_ids"])):
        real = batch["attention_mask"][row].bool()
        ids, labels = batch["input_ids"][row][real].tolist(), batch["labels"][row][real].tolist()
        plan = fixed_chunks(len(ids), chunk_size) if plans is None else plans[row]
        read, targets, sizes, resets = [], [], [], []
        for window in windows:
            here = window.attention_mask[row].bool()
            assert here.tolist() == sorted(here.tolist(), reverse=True)  # right-padded
            assert int(here.sum()) == sum(window.plans[row].sizes)
            assert (window.shift_labels[row][~here] == -100).all()
            read += window.input_ids[row][here].tolist()
            targets += window.shift_labels[row][here].tolist()
            sizes += window.plans[row].sizes
            resets += [] if plans is None else window.plans[row].resets
        assert read == ids[: len(read)]
        assert targets == [*labels[1:], -100][: len(read)]
        assert all(
            label == -100 for label in labels[len(read) + 1 :]
        )  # what was left out had no target
        assert sizes == list(plan)[: len(sizes)]
        assert resets == ([] if plans is None else batch["resets"][row][: len(sizes)])
        assert chunks is None or all(len(window.plans[row].sizes) <= chunks for window in windows)


def test_windows_refuse_a_plan_that_does_not_fit():
    with pytest.raises(ValueError, match="plans: row 1 sums to 7, but it has 6 real tokens"):
        cut_windows({**ragged([6, 6]), "chunk_sizes": [[6], [7]]}, 4, None)


def test_split_rows_keeps_what_belongs_to_a_row():
    batch = {**ragged([3, 4, 5, 6, 7]), "depth": [0, 1, 2, 3, 4], "length": 7}
    parts = split_rows(batch, 2)
    assert [part["depth"] for part in parts] == [[0, 1, 2], [3, 4]]
    assert [len(part["input_ids"]) for part in parts] == [3, 2]
    assert all(part["length"] == 7 for part in parts)


# ---- steps


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("recompute", ["none", "cell", "chunk"])
def test_full_backpropagation_is_the_models_own(accumulate, recompute):
    model, batch = tiny(chunk_size=4), ragged([23, 9, 17])
    loss, gradients = direct(model, batch)
    module, watch = fit(
        copy.deepcopy(model).float().double(), [batch], accumulate=accumulate, recompute=recompute
    )
    close(watch.gradients[0], gradients)
    assert float(module.trainer.callback_metrics["train/loss"]) == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("labelled", [1.0, 0.1])
def test_windows_detach_the_memory_only(chunks, labelled):
    """Against a reference that calls the model by hand, window after window and row by row."""
    model, batch = tiny(chunk_size=4), ragged([23, 9, 17], labelled, seed=2)
    reference = copy.deepcopy(model).train()
    count, total = count_targets(batch), 0.0
    for row in range(3):
        size = int(batch["attention_mask"][row].sum())
        ids, labels, cache = (
            batch["input_ids"][row : row + 1, :size],
            batch["labels"][row : row + 1, :size],
            None,
        )
        targets = torch.cat([labels[:, 1:], torch.tensor([[-100]])], 1)
        for start in range(0, size, 4 * chunks):
            part = slice(start, start + 4 * chunks)
            plan = fixed_chunks(ids[:, part].shape[1], 4)
            output = reference(
                ids[:, part],
                shift_labels=targets[:, part],
                chunk_sizes=plan,
                past_key_values=cache,
                use_cache=True,
                num_items_in_batch=count,
            )
            if output.loss.requires_grad:
                output.loss.backward()
            total += float(output.loss.detach())
            cache = output.past_key_values.detach()
    module, watch = fit(copy.deepcopy(model), [batch], bptt_chunks=chunks, accumulate=2)
    close(watch.gradients[0], {name: p.grad for name, p in reference.named_parameters()})
    assert float(module.trainer.callback_metrics["train/loss"]) == pytest.approx(total, rel=1e-6)
    assert total == pytest.approx(
        direct(model, batch)[0]
    )  # the loss is that of full backpropagation, the gradients are not
    if labelled == 1:
        with pytest.raises(AssertionError):
            close(watch.gradients[0], direct(model, batch)[1])


def test_a_batch_brings_its_own_chunks():
    model, batch = tiny(chunk_size=4), ragged([11, 8])
    own = {**batch, "chunk_sizes": [[3, 7, 1], [8]]}
    reference = copy.deepcopy(model).train()
    reference(**own, use_cache=False).loss.backward()
    _, watch = fit(copy.deepcopy(model), [own])
    close(watch.gradients[0], {name: p.grad for name, p in reference.named_parameters()})


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
        weight = module.model.model.embed_tokens.weight
        weight.register_hook(
            lambda g: torch.full_like(g, self.value) if trainer.global_step + 1 in self.steps else g
        )


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("options", [dict, scaler])
def test_a_step_without_finite_norm_is_skipped_and_counted(value, options):
    model, batch = tiny(dtype=torch.float32), ragged([12, 20])
    with pytest.warns(
        UserWarning, match=r"step 2: the gradient norm is (inf|nan); step skipped \(1 so far\)"
    ):
        module, watch = fit(model, [batch] * 4, [Spoil({2, 3}, value)], options())
    assert (module.trainer.global_step, module.skipped, module.skipped_in_a_row) == (4, 2, 0)
    close(watch.weights[0], watch.weights[1], 0)
    close(watch.weights[0], watch.weights[2], 0)
    assert not torch.equal(
        watch.weights[3]["model.embed_tokens.weight"], watch.weights[2]["model.embed_tokens.weight"]
    )
    assert [rates[0] for rates in watch.rates] == pytest.approx(
        [1e-2 * learning_rate_factor(step, 0, 4, 0.0) for step in range(4)]
    )


@pytest.mark.filterwarnings("ignore")
def test_too_many_skipped_steps_stop_the_training():
    with pytest.raises(
        UserError,
        match=r"^train\.max_skipped: the gradient norm was not finite in 3 steps in a row, up to step 4;",
    ):
        fit(tiny(), [ragged([12])] * 9, [Spoil({2, 3, 4, 5}, math.nan)], max_skipped=3)


@pytest.mark.parametrize("options", [dict, scaler])
def test_a_batch_without_targets_is_a_step_that_changes_nothing(options):
    model, batch = tiny(dtype=torch.float32), ragged([12, 20])
    empty = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    module, watch = fit(model, [empty, batch, empty], trainer=options())
    assert (module.trainer.global_step, module.skipped) == (3, 0)
    assert float(module.trainer.callback_metrics["train/loss"]) == 0
    close(watch.weights[1], watch.weights[2], 0)
    assert not torch.equal(
        watch.weights[0]["model.embed_tokens.weight"], watch.weights[1]["model.embed_tokens.weight"]
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "16-mixed"])
def test_every_precision_learns(precision):
    batch = ragged([30, 25], 1.0)
    model = tiny(dtype=torch.float32, chunk_size=8)
    before = direct(model, batch)[0]
    module, _ = fit(model, [batch] * 8, trainer={"precision": precision}, bptt_chunks=2, clip=1.0)
    assert module.trainer.global_step == 8
    assert module.skipped == 0
    assert float(module.trainer.callback_metrics["train/loss"]) < 0.9 * before
    assert model.lm_head.weight.dtype == (
        torch.bfloat16 if precision == "bf16-true" else torch.float32
    )


def test_a_loss_scale_that_is_too_large_is_found_out():
    options = {
        "precision": None,
        "plugins": [
            MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**40))
        ],
    }
    with pytest.warns(UserWarning, match="step skipped"):
        module, _ = fit(tiny(dtype=torch.float32), [ragged([12, 20])] * 3, trainer=options)
    assert module.trainer.precision_plugin.scaler.get_scale() < 2.0**40
    assert all(torch.isfinite(p).all() for p in module.model.parameters())


# ---- parameter groups and the learning rate


@pytest.mark.parametrize("gate", ["scalar", "elementwise"])
def test_parameter_groups(gate):
    model = tiny(gate=gate, gate_bias=1.0)
    memory = list(model.memory_parameters())
    groups = {
        g["name"]: g
        for g in parameter_groups(
            model, memory, TrainConfig(lr=2.0, memory_lr_factor=5.0, weight_decay=0.1)
        )
    }
    names = {id(p): name for name, p in model.named_parameters()}
    found = {key: {names[id(p)] for p in group["params"]} for key, group in groups.items()}
    assert sum(map(len, found.values())) == len(names)
    assert found["memory"] | found["memory, decayed"] == {name for name, _ in memory}
    assert {"model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"} <= found[
        "backbone, decayed"
    ]
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
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False
    )
    trainer.validate(module, loader(batches), verbose=False)
    sums = [direct(model, batch)[0] * count_targets(batch) for batch in batches[:2]]
    expected = sum(sums) / sum(map(count_targets, batches))
    assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(expected, rel=1e-6)


def test_validation_returns_logits_only_where_they_are_asked_for():
    module, batch = CometModule(tiny(), TrainConfig(**TRAIN), 1), ragged([9, 9], 1.0)
    with torch.no_grad():
        assert module.validation_step(batch, 0)["logits"] is None
        kept = module.validation_step({**batch, "logits_to_keep": 4}, 0)["logits"]
        whole = module.model(batch["input_ids"], batch["attention_mask"]).logits
    torch.testing.assert_close(kept, whole[:, -4:])


def test_exact_match_asks_for_the_digits_alone():
    labels = torch.full((4, 9), -100)
    labels[:, -4:] = torch.tensor([5, 6, 7, 1])  # three digits and the stop token
    labels[3, -4:] = -100
    logits = torch.zeros(4, 5, 10)  # the last five columns
    for column, token in enumerate([5, 6, 7, 9]):  # a wrong stop token
        logits[:, column, token] = 1
    logits[1, 1, 8] = 2  # a wrong digit
    assert exact_match(logits, labels, digits=3).tolist() == [True, False, True, False]


# ---- several ranks


@pytest.mark.parametrize(
    ("parameters", "recompute"), [("all", "none"), ("all", "chunk"), ("memory+lora", "none")]
)
def test_two_ranks_are_one_with_both_batches(tmp_path, parameters, recompute):
    """The ranks have different numbers of windows, and one of them a micro-batch without targets."""
    model = tiny(chunk_size=4)
    add_adapters(model, TrainConfig(parameters=parameters))
    batches = [ragged([23, 9], 1.0), {**ragged([7, 3], 1.0, seed=1)}]
    batches[1]["labels"][1] = -100
    path = str(tmp_path / "gradients.pt")
    trainer = {"strategy": "ddp_fork", "devices": 2}
    fit(
        copy.deepcopy(model),
        [batches],
        [Rank(path)],
        trainer,
        bptt_chunks=2,
        accumulate=2,
        recompute=recompute,
    )
    width = batches[0]["input_ids"].shape[1]
    both = {
        key: torch.cat(
            [torch.nn.functional.pad(b[key], (0, width - b[key].shape[1])) for b in batches]
        )
        for key in batches[0]
    }
    _, alone = fit(copy.deepcopy(model), [both], bptt_chunks=2)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    close(
        torch.load(path),
        {
            name: torch.zeros(()) if g is None and name in learning else g
            for name, g in alone.gradients[0].items()
        },
    )


class Rank(lightning.Callback):
    """Each rank takes its own batch; rank 0 writes down the gradients that the optimizer is given."""

    def __init__(self, path):
        self.path = path

    def setup(self, trainer, module, stage):
        step = module.training_step
        module.training_step = lambda batch, batch_idx=0: step(
            batch[trainer.global_rank], batch_idx
        )

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.is_global_zero:
            torch.save({name: p.grad for name, p in module.model.named_parameters()}, self.path)
