"""LayerPipelineStrategy in a Trainer: any mesh and any sharding train alike; checkpoints do not know how many ranks there were."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import lightning
import numpy as np
import pytest
import torch

from comet_pl.config.schema import TrainConfig
from comet_pl.errors import UserError
from comet_pl.parallel.strategy import LayerPipelineStrategy
from comet_pl.training.lit_module import CometModule
from comet_pl.training.trainable import add_adapters
from data.batches import IGNORED, ResumableLoader, pad_rows, validation_loader
from data.datamodule import ShardedDataModule
from tests.support.models import text, tiny
from tests.support.ranks import in_processes

STEPS = 3


class Rows:
    """Ragged rows with some labels; a pure function of the index."""

    def __init__(self, count, short=0):
        self.count, self.short = count, short  # the first rows have one chunk only

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        length = 4 if index < self.short else [33, 40, 11, 26, 38, 7][index % 6]
        ids = text(1, length, seed=index)[0].numpy()
        labels = np.where(np.arange(length) >= length // 2, ids, IGNORED)
        return ids, labels


class Data(ShardedDataModule):
    """`total` rows a step over all data-parallel ranks."""

    def __init__(self, total, short):
        super().__init__()
        self.total, self.short = total, short

    def train_dataloader(self):
        rows = Rows(self.total * STEPS * 2, self.short)
        return ResumableLoader(
            rows,
            self.total // self.world,
            partial(pad_rows, pad_token=0),
            rank=self.rank,
            world=self.world,
        )

    def val_dataloader(self):
        return validation_loader(
            Rows(5), 1, partial(pad_rows, pad_token=0), self.val_rank, self.val_world
        )


class Save(lightning.Callback):
    """What the run left behind."""

    def __init__(self, folder):
        self.folder, self.losses, self.generated = folder, [], []

    def on_train_start(self, trainer, module):
        strategy = trainer.strategy
        self.reductions, sum_gradients = 0, getattr(strategy, "sum_gradients", None)

        def count(parameters):
            self.reductions += 1
            sum_gradients(parameters)

        if sum_gradients is not None:
            strategy.sum_gradients = count

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(float(trainer.callback_metrics["train/loss"]))

    def on_validation_epoch_end(self, trainer, module):
        prompt = text(1, 13)
        ids = module.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=4,
            do_sample=False,
            pad_token_id=0,
        )
        self.generated.append(ids[0].tolist())

    def on_train_end(self, trainer, module):
        trainer.save_checkpoint(self.folder / "last.ckpt")
        if trainer.is_global_zero:
            values = {
                "losses": self.losses,
                "norm": module.grad_norm,
                "skipped": module.skipped,
                "generated": self.generated,
            }
            values["reductions"] = self.reductions
            values["val"] = float(trainer.callback_metrics["val/loss"])
            torch.save(values, self.folder / "values.pt")


class Poison(lightning.Callback):
    """An infinite gradient on one rank at the second step."""

    def __init__(self, rank):
        self.rank = rank

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        handles = getattr(self, "handles", [])
        for handle in handles:
            handle.remove()
        self.handles = []
        if batch_idx == 1 and trainer.global_rank == self.rank:
            weight = module.model.model.layers[0].mlp.down_proj
            self.handles = [
                weight.register_full_backward_hook(
                    lambda m, inputs, outputs: (inputs[0] * float("inf"),)
                )
            ]


@dataclass(frozen=True)
class Run:
    devices: int = 1
    strategy: dict[str, Any] | None = None
    train: dict[str, Any] = field(default_factory=dict)
    poison: int | None = None
    steps: int = STEPS
    total: int = 6
    short: int = 0

    def fit(self, folder, ckpt=None):
        """(values, checkpoint) of the run, made by as many processes as it needs."""
        folder.mkdir()
        if self.strategy is None:
            self.train_here(folder, ckpt)
        else:
            in_processes(self.devices, self.train_here, folder, ckpt, group=False)
        return torch.load(folder / "values.pt"), torch.load(folder / "last.ckpt", weights_only=True)

    def train_here(self, folder, ckpt):
        strategy = (
            "auto" if self.strategy is None else LayerPipelineStrategy(timeout=20, **self.strategy)
        )
        model, settings = (
            tiny(layers=3),
            TrainConfig(lr=1e-2, clip=0.05, warmup_steps=1, **self.train),
        )
        add_adapters(model, settings)
        module = CometModule(model.train(), settings, max_steps=10)
        callbacks = [Save(folder)] + ([] if self.poison is None else [Poison(self.poison)])
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=self.devices,
            strategy=strategy,
            precision="64-true",
            max_steps=self.steps,
            val_check_interval=1,
            check_val_every_n_epoch=None,
            logger=False,
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            default_root_dir=folder,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(module, datamodule=Data(self.total, self.short), ckpt_path=ckpt)


def same(found, expected):
    """Values and whole checkpoints agree."""
    (values, checkpoint), (values2, checkpoint2) = found, expected
    for name, tolerance in (
        ("losses", 1e-6),
        ("val", 1e-6),
        ("norm", 1e-9),
    ):  # Lightning keeps logged values in float32
        assert values[name] == pytest.approx(values2[name], rel=tolerance), name
    assert (values["skipped"], values["generated"]) == (values2["skipped"], values2["generated"])
    torch.testing.assert_close(
        checkpoint["state_dict"], checkpoint2["state_dict"], rtol=1e-7, atol=1e-9
    )
    (state,), (state2,) = checkpoint["optimizer_states"], checkpoint2["optimizer_states"]
    assert [group["params"] for group in state["param_groups"]] == [
        group["params"] for group in state2["param_groups"]
    ]
    assert set(state["state"]) == set(state2["state"])
    for number in state2["state"]:
        torch.testing.assert_close(
            state["state"][number], state2["state"][number], rtol=1e-6, atol=1e-12
        )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One device, by training options."""
    made: dict[str, Any] = {}

    def get(**train):
        key = str(train)
        if key not in made:
            made[key] = Run(train=train).fit(tmp_path_factory.mktemp("alone") / "run")
        return made[key]

    return get


TWO = {
    "pipeline": (2, {}),
    "layer_level": (2, {"schedule": "layer_level"}),
    "data": (2, {"pipeline_size": 1}),
    "zero2 along the pipeline": (2, {"sharding": "zero2"}),
    "zero2": (2, {"sharding": "zero2", "pipeline_size": 1}),
    "zero3": (2, {"sharding": "zero3", "pipeline_size": 1}),
}
FOUR = {
    "2 x 2": (4, {"pipeline_size": 2}),
    "2 x 2 zero2": (4, {"pipeline_size": 2, "sharding": "zero2"}),
    "2 x 2 zero3": (4, {"pipeline_size": 2, "sharding": "zero3"}),
    "2 x 2 zero3 interleaved": (
        4,
        {"pipeline_size": 2, "sharding": "zero3", "schedule": "interleaved"},
    ),
    "4": (4, {}),
    "4 zero2": (4, {"sharding": "zero2"}),
}
OPTIONS = {
    "plain": {},
    "windows": {"bptt_chunks": 3},
    "accumulated": {"accumulate": 3},
    "recomputed": {"recompute": "cell"},
    "memory+lora": {"parameters": "memory+lora"},
    "penalised": {"gate_pull": 30.0, "gate_target": 0.8, "accumulate": 3, "bptt_chunks": 3},
}


# What each mesh has to itself runs in CI; `make test-full` runs the rest.
CORE = [
    ("pipeline", "windows"),
    ("pipeline", "accumulated"),
    ("zero2 along the pipeline", "accumulated"),
    ("zero3", "recomputed"),
    ("pipeline", "memory+lora"),
    ("pipeline", "penalised"),
]


def cases():
    for mesh in TWO | FOUR:
        for options in OPTIONS:
            yield pytest.param(
                mesh,
                options,
                marks=[] if (mesh, options) in CORE else pytest.mark.slow,
                id=f"{mesh}, {options}",
            )


@pytest.mark.parametrize(("mesh", "options"), list(cases()))
def test_ranks_train_as_one_device(mesh, options, alone, tmp_path):
    devices, strategy = (TWO | FOUR)[mesh]
    found = Run(devices, strategy, OPTIONS[options]).fit(tmp_path / "run")
    same(found, alone(**OPTIONS[options]))
    assert (
        found[0]["reductions"] == STEPS
    )  # once a step, however many micro-batches and windows it has


@pytest.mark.parametrize(
    "mesh", ["pipeline", "zero2", pytest.param("zero3", marks=pytest.mark.slow)]
)
def test_weights_without_a_gradient_stay_as_they_are(mesh, tmp_path):
    """A first step of texts of one chunk: no memory is read, so that its weights, and AdamW's averages and counts, do not move."""
    options = {"train": {"weight_decay": 0.1}, "short": 6}
    same(Run(*TWO[mesh], **options).fit(tmp_path / "run"), Run(**options).fit(tmp_path / "alone"))


@pytest.mark.parametrize(
    ("mesh", "again"),
    [
        pytest.param("zero2 along the pipeline", None),
        pytest.param(None, "zero2", marks=pytest.mark.slow),
        pytest.param("4", "pipeline", marks=pytest.mark.slow),
        pytest.param("2 x 2 zero3", None, marks=pytest.mark.slow),
        pytest.param("zero2", "2 x 2 zero3", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_does_not_know_how_many_ranks_there_were(mesh, again, alone, tmp_path):
    """Some steps on one mesh, the rest on another (None: one device)."""
    meshes: dict[str | None, tuple[int, dict[str, Any] | None]] = {None: (1, None), **TWO, **FOUR}
    Run(*meshes[mesh], steps=STEPS - 1).fit(tmp_path / "first")
    values, checkpoint = Run(*meshes[again]).fit(
        tmp_path / "second", ckpt=tmp_path / "first" / "last.ckpt"
    )
    expected_values, expected = alone()
    same(
        ({**expected_values, **{name: values[name] for name in ("val", "norm")}}, checkpoint),
        (expected_values, expected),
    )
    assert values["losses"] == pytest.approx(expected_values["losses"][-1:], rel=1e-6)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_value_that_is_not_finite_on_one_rank_skips_the_step_on_all(rank, tmp_path):
    values, _ = Run(2, {}, poison=rank).fit(tmp_path / "run")
    assert values["skipped"] == 1
    assert np.isfinite(values["losses"]).all()
    assert np.isfinite(values["norm"])


# ---- what is refused before any process group exists


@pytest.mark.parametrize(
    ("devices", "keys", "match"),
    [
        (
            4,
            {"pipeline_size": 3},
            r"^strategy\.pipeline_size: 3 given, but trainer\.devices x trainer\.num_nodes is 4; allowed: 1, 2, 4$",
        ),
        (2, {"pipeline_size": 4}, r"^strategy\.pipeline_size: 4 given, .* is 2; allowed: 1, 2$"),
        (
            2,
            {"sharding": "zero3"},
            r"^strategy\.sharding: zero3 shards over data-parallel ranks.*allowed: zero2",
        ),
        (
            2,
            {"process_group_backend": "nccl"},
            r"^strategy\.backend: nccl cannot send tensors of a cpu device; allowed: gloo$",
        ),
        (
            2,
            {"schedule": "layer_leve"},
            r"^strategy\.schedule: 'layer_leve' given, allowed: layer_level, interleaved, chunk_level$",
        ),
        (
            2,
            {"sharding": "zero3", "pipeline_size": 1, "schedule": "chunk_level"},
            r"^strategy\.schedule: chunk_level given, but zero3",
        ),
        (2, {"sharding": "zero2", "start_method": "fork"}, r"^start_method: fork given"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(devices, keys, match):
    strategy = LayerPipelineStrategy(**keys)
    lightning.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        logger=False,
        enable_checkpointing=False,
    )
    with pytest.raises(UserError, match=match):
        strategy.check()
