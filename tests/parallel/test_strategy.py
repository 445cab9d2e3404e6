"""LayerPipelineStrategy in a Trainer: all meshes and shardings train alike; checkpoints fit all."""

import warnings
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any
from unittest.mock import Mock

import lightning
import numpy as np
import peft  # noqa: F401  once, before processes are forked
import pytest
import torch

from comet_pl.config.schema import TrainConfig
from comet_pl.errors import UserError
from comet_pl.parallel.strategy import LayerPipelineStrategy
from comet_pl.training.lit_module import CometModule
from comet_pl.training.trainable import add_adapters
from data.batches import IGNORED, Batches, ResumableLoader, pad_rows, validation_loader
from data.datamodule import DataModule
from tests.support.models import text, tiny
from tests.support.ranks import in_shared_processes
from tests.support.training import QUIET

STEPS = 3
collate = partial(pad_rows, pad_token=0)


class Rows:
    """Ragged rows with some labels; a pure function of the index."""

    def __init__(self, count, short=0):
        self.count, self.short = count, short  # the first rows have one chunk only

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        length = 4 if index < self.short else [33, 40, 11, 26, 38, 7][index % 6]
        ids = text(1, length, seed=index)[0].numpy()
        return ids, np.where(np.arange(length) >= length // 2, ids, IGNORED)


class Data(Batches):
    """`total` rows a step over all data-parallel ranks."""

    max_steps = 10

    def __init__(self, total, short):
        self.total, self.short = total, short

    def train_loader(self, shard):
        rows, size = Rows(self.total * STEPS * 2, self.short), self.total // shard.world
        return ResumableLoader(rows, size, collate, shard=shard)

    def validation_loader(self, shard):
        return validation_loader(Rows(5), 1, collate, shard)


class Save(lightning.Callback):
    """What the run left behind."""

    def __init__(self, folder):
        self.folder, self.losses, self.generated = folder, [], []

    def on_train_start(self, trainer, module):
        module.reader.sum_gradients = self.sums = Mock(side_effect=module.reader.sum_gradients)

    def on_train_batch_end(self, trainer, *_):
        self.losses.append(float(trainer.callback_metrics["train/loss"]))

    def on_validation_epoch_end(self, trainer, module):
        prompt = text(1, 13)
        mask, options = torch.ones_like(prompt), {"do_sample": False, "pad_token_id": 0}
        ids = module.model.generate(prompt, attention_mask=mask, max_new_tokens=4, **options)
        self.generated.append(ids[0].tolist())

    def on_train_end(self, trainer, module):
        trainer.save_checkpoint(self.folder / "last.ckpt")
        if trainer.is_global_zero:
            values = {
                "losses": self.losses,
                "norm": module.grad_norm,
                "skipped": module.skipped,
                "generated": self.generated,
                "reductions": self.sums.call_count,
                "val": float(trainer.callback_metrics["val/loss"]),
            }
            torch.save(values, self.folder / "values.pt")


class Poison(lightning.Callback):
    """An infinite gradient on one rank at the second step."""

    def __init__(self, rank):
        self.rank, self.handles = rank, []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        for handle in self.handles:
            handle.remove()
        if batch_idx == 1 and trainer.global_rank == self.rank:
            hook = module.model.model.layers[0].mlp.down_proj.register_full_backward_hook
            self.handles = [hook(lambda module, inputs, outputs: (inputs[0] * float("inf"),))]


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
            in_shared_processes(self.devices, self.train_here, folder, ckpt, group=False)
        return torch.load(folder / "values.pt"), torch.load(folder / "last.ckpt", weights_only=True)

    def train_here(self, folder, ckpt):
        model = tiny(layers=3)
        settings = TrainConfig(lr=1e-2, clip=0.05, warmup_steps=1, **self.train)
        add_adapters(model, settings)
        module = CometModule(model.train(), settings, max_steps=10)
        strategy: Any = "auto"
        if self.strategy is not None:
            strategy = LayerPipelineStrategy(timeout=20, **self.strategy)
        trainer = lightning.Trainer(
            **QUIET,
            accelerator="cpu",
            devices=self.devices,
            strategy=strategy,
            precision="64-true",
            max_steps=self.steps,
            val_check_interval=1,
            check_val_every_n_epoch=None,
            callbacks=[Save(folder)] + ([] if self.poison is None else [Poison(self.poison)]),
            num_sanity_val_steps=0,
            default_root_dir=folder,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(module, datamodule=DataModule(Data(self.total, self.short)), ckpt_path=ckpt)


def same(found, expected):
    """Values and whole checkpoints agree."""
    values, checkpoints = zip(found, expected, strict=True)
    # Lightning keeps logged values in float32.
    for name, rel in (("losses", 1e-6), ("val", 1e-6), ("norm", 1e-9), ("skipped", 0)):
        assert values[0][name] == pytest.approx(values[1][name], rel=rel), name
    assert values[0]["generated"] == values[1]["generated"]
    weights = [checkpoint["state_dict"] for checkpoint in checkpoints]
    torch.testing.assert_close(*weights, rtol=1e-7, atol=1e-9)
    (one,), (two,) = (checkpoint["optimizer_states"] for checkpoint in checkpoints)
    ids = [[group["params"] for group in state["param_groups"]] for state in (one, two)]
    assert ids[0] == ids[1]
    torch.testing.assert_close(one["state"], two["state"], rtol=1e-6, atol=1e-12)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One device, by the name of its training options."""

    @cache
    def get(options):
        return Run(train=OPTIONS[options]).fit(tmp_path_factory.mktemp("alone") / "run")

    return get


TWO = {
    "pipeline": (2, {}),
    "layer_level": (2, {"schedule": "layer_level"}),
    "data": (2, {"pipeline_size": 1}),
    "zero2 along the pipeline": (2, {"sharding": "zero2"}),
    "zero2": (2, {"sharding": "zero2", "pipeline_size": 1}),
    "zero3": (2, {"sharding": "zero3", "pipeline_size": 1}),
}
PAIRS = {"pipeline_size": 2}
FOUR = {
    "2 x 2": (4, PAIRS),
    "2 x 2 zero2": (4, PAIRS | {"sharding": "zero2"}),
    "2 x 2 zero3": (4, PAIRS | {"sharding": "zero3"}),
    "2 x 2 zero3 interleaved": (4, PAIRS | {"sharding": "zero3", "schedule": "interleaved"}),
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
# Of each mesh what it has to itself; `make test-full` runs the rest.
CORE = [
    ("pipeline", "penalised"),
    ("pipeline", "memory+lora"),
    ("zero2 along the pipeline", "accumulated"),
    ("zero3", "recomputed"),
]


def quick(cases, chosen):
    """Parameters of a test of which all but the chosen are slow."""
    marks = [[] if case in chosen else [pytest.mark.slow] for case in cases]
    return [pytest.param(*case, marks=m) for case, m in zip(cases, marks, strict=True)]


@pytest.mark.parametrize(
    ("mesh", "options"),
    quick([(mesh, options) for mesh in TWO | FOUR for options in OPTIONS], CORE),
)
def test_ranks_train_as_one_device(mesh, options, alone, tmp_path):
    devices, strategy = (TWO | FOUR)[mesh]
    found = Run(devices, strategy, OPTIONS[options]).fit(tmp_path / "run")
    same(found, alone(options))
    # Once a step, however many micro-batches and windows it has.
    assert found[0]["reductions"] == STEPS


@pytest.mark.parametrize("mesh", quick([("pipeline",), ("zero2",), ("zero3",)], [("zero2",)]))
def test_weights_without_a_gradient_stay_as_they_are(mesh, tmp_path):
    """In a first step of texts of one chunk no memory is read: its weights do not move, nor do
    AdamW's averages and counts."""
    options = {"train": {"weight_decay": 0.1}, "short": 6}
    same(Run(*TWO[mesh], **options).fit(tmp_path / "run"), Run(**options).fit(tmp_path / "alone"))


CHANGES = [
    ("zero2 along the pipeline", None),
    (None, "zero2"),
    ("4", "pipeline"),
    ("2 x 2 zero3", None),
    ("zero2", "2 x 2 zero3"),
]


@pytest.mark.parametrize(("mesh", "again"), quick(CHANGES, CHANGES[:1]))
def test_a_checkpoint_fits_any_number_of_ranks(mesh, again, alone, tmp_path):
    """Some steps on one mesh, the rest on another (None: one device)."""
    meshes: Any = {None: (1, None), **TWO, **FOUR}
    Run(*meshes[mesh], steps=STEPS - 1).fit(tmp_path / "first")
    last = tmp_path / "first" / "last.ckpt"
    values, checkpoint = Run(*meshes[again]).fit(tmp_path / "second", ckpt=last)
    expected_values, expected = alone("plain")
    of_last_step = {name: values[name] for name in ("val", "norm")}
    same(({**expected_values, **of_last_step}, checkpoint), (expected_values, expected))
    assert values["losses"] == pytest.approx(expected_values["losses"][-1:], rel=1e-6)


@pytest.mark.parametrize("rank", quick([(0,), (1,)], [(1,)]))
def test_a_value_that_is_not_finite_on_one_rank_skips_the_step_on_all(rank, tmp_path):
    values, _ = Run(2, {}, poison=rank).fit(tmp_path / "run")
    assert values["skipped"] == 1
    assert np.isfinite(values["losses"]).all()
    assert np.isfinite(values["norm"])


# ---- what is refused before any process group exists


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"pipeline_size": 4}, "pipeline_size: 4 given, .* is 2; allowed: 1, 2"),
        ({"schedule": "layer_leve"}, "schedule: 'layer_leve' given, allowed: layer_level, .*"),
        (
            {"sharding": "zero3", "pipeline_size": 1, "schedule": "chunk_level"},
            "schedule: chunk_level given, but zero3.*",
        ),
        ({"sharding": "zero2", "start_method": "fork"}, "start_method: fork given.*"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(keys, match):
    """More of it in test_pipeline_cli."""
    strategy = LayerPipelineStrategy(**keys)
    lightning.Trainer(**QUIET, accelerator="cpu", devices=2, strategy=strategy)
    with pytest.raises(UserError, match=rf"^(strategy\.)?{match}$"):
        strategy.check()


@pytest.mark.parametrize("name", ["CUDA_LAUNCH_BLOCKING", "CUDA_DEVICE_MAX_CONNECTIONS"])
def test_an_environment_in_which_nccl_would_hang_is_refused(name, monkeypatch):
    strategy = LayerPipelineStrategy(process_group_backend="nccl")
    lightning.Trainer(**QUIET, accelerator="cpu", devices=2, strategy=strategy)
    monkeypatch.setattr(LayerPipelineStrategy, "root_device", torch.device("cuda", 0))
    monkeypatch.setenv(name, "8")
    strategy.check()
    monkeypatch.setenv(name, "1")
    with pytest.raises(UserError, match=f"^{name}: 1 given in the environment, .*; unset it$"):
        strategy.check()
