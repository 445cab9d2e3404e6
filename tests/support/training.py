"""Batches, the training of a tiny model on them, and gradients to compare with."""

import copy

import lightning
import torch
from hypothesis import strategies as st
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils.data import DataLoader

from comet_pl.config.schema import TrainConfig
from comet_pl.model.chunk_layout import ChunkPlan, fixed_chunks
from comet_pl.training.lit_module import CometModule
from tests.support.models import text

TRAIN = {"lr": 1e-2, "warmup_steps": 0, "clip": None, "memory_lr_factor": 2.0}
QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
QUIET |= {"enable_model_summary": False, "use_distributed_sampler": False}


def ragged(lengths, labelled=0.5, seed=0, left=False):
    """Rows of some lengths; each token is labelled with a probability."""
    width = max(lengths)
    ids, labels = text(len(lengths), width, seed), text(len(lengths), width, seed)
    draw = torch.rand(labels.shape, generator=torch.Generator().manual_seed(seed))
    columns, size = torch.arange(width), torch.tensor(lengths)[:, None]
    mask = (columns >= width - size if left else columns < size).long()
    labels = labels.masked_fill((draw >= labelled) | (mask == 0), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@st.composite
def cuts(draw, labelled=(0.0, 0.2, 1.0), strides=False):
    """(batch, chunk size, chunks a window): any raggedness, plan and reset."""
    lengths = draw(st.lists(st.integers(0, 23), min_size=1, max_size=4).filter(any))
    options = draw(st.sampled_from(labelled)), draw(st.integers(0, 9)), draw(st.booleans())
    batch, planned = ragged(lengths, *options), draw(st.booleans())
    if planned or (strides and draw(st.booleans())):
        batch["plans"] = [draw(chunk_plans(n, planned, strides)) for n in lengths]
    return batch, draw(st.integers(1, 7)), draw(st.sampled_from([None, 1, 2, 3]))


@st.composite
def chunk_plans(draw, tokens, planned, strides):
    """A row's plan: any sizes and resets, or chunks of 5; any stride."""
    sizes = [] if planned else fixed_chunks(tokens, 5)
    while sum(sizes) < tokens:
        sizes.append(draw(st.integers(1, tokens - sum(sizes))))
    resets = tuple(draw(st.booleans()) for _ in sizes) if planned else None
    return ChunkPlan(tuple(sizes), resets, draw(st.integers(1, 7)) if strides else None)


class Watch(lightning.Callback):
    """Gradients before clipping and learning rates of each step, and the weights after it."""

    def __init__(self):
        self.gradients, self.weights, self.rates = [], [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.optimizer = optimizer
        self.gradients.append(gradients_of(module.model))
        self.rates.append([group["lr"] for group in optimizer.param_groups])

    def on_train_batch_end(self, trainer, module, *_):
        named = module.model.named_parameters()
        self.weights.append({name: p.detach().clone() for name, p in named})


def gradients_of(model):
    """{name of a parameter: a copy of its gradient, or None}."""
    named = model.named_parameters()
    return {name: None if p.grad is None else p.grad.clone() for name, p in named}


def loader(batches):
    return DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)


def fit(model, batches, callbacks=(), trainer=None, **train):
    """Trains on the batches, one step each; returns the module and what was watched."""
    watch = Watch()
    module = CometModule(model.train(), TrainConfig(**TRAIN | train), max_steps=len(batches))
    options = {"accelerator": "cpu", "devices": 1, "precision": None, **QUIET, **(trainer or {})}
    options |= {"max_steps": len(batches), "callbacks": [watch, *callbacks]}
    lightning.Trainer(**options).fit(module, loader(batches))
    return module, watch


def scaler(scale=1024.0):
    """Trainer options of 16-mixed with a loss scaler, on the CPU."""
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))
    return {"precision": None, "plugins": [plugin]}


def direct(model, batch):
    """Loss and gradients of one call of the model itself."""
    model = copy.deepcopy(model).train()
    lengths = batch["attention_mask"].sum(1).tolist()
    plan = [fixed_chunks(n, model.config.chunk_size) for n in lengths]
    loss = model(**batch, chunk_sizes=plan, use_cache=False).loss
    loss.backward()
    return float(loss.detach()), gradients_of(model)


def close(one, two, tolerance=1e-10):
    """Two sets of tensors agree; None agrees with None alone."""
    torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)


def norm_apart(found, expected):
    """Distance of two sets of gradients, relative to the norm of the second. None is zero."""
    apart = size = 0.0
    for name, right in expected.items():
        left = found[name]
        if left is not None or right is not None:
            left = torch.zeros_like(right) if left is None else left
            right = torch.zeros_like(left) if right is None else right
            apart += float((left.double() - right.double()).square().sum())
            size += float(right.double().square().sum())
    return (apart / size) ** 0.5
