"""Loss by position in the document: against a loop over tokens, with any padding and packing."""

import json
import math
from collections import defaultdict
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from callbacks.length_report import LengthReport
from comet_pl.config.schema import TrainConfig
from comet_pl.metrics.loss_by_position import BUCKETS, LossByPosition, chunk_of_columns, curve, name
from comet_pl.model.chunk_layout import ChunkPlan, fixed_chunks
from comet_pl.model.loss import cross_entropies, cross_entropy, summed
from comet_pl.model.observer import Observer, observing
from comet_pl.training.lit_module import CometModule
from comet_pl.training.windows import count_targets
from tests.support.models import FEW, text, tiny
from tests.support.training import ragged

MODEL = tiny()


@st.composite
def batches(draw):
    """Ragged rows, padded on either side; half of the batches packed: any chunks and resets."""
    lengths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=2))
    share = draw(st.sampled_from([0.0, 0.1, 1.0]))
    batch = ragged(lengths, share, draw(st.integers(0, 99)), draw(st.booleans()))
    if draw(st.booleans()):
        batch["plans"] = []
        for n in lengths:
            sizes = []
            while sum(sizes) < n:
                sizes.append(min(n - sum(sizes), draw(st.integers(1, 7))))
            resets = tuple(draw(st.integers(0, 3)) == 0 for _ in sizes)
            batch["plans"].append(ChunkPlan(tuple(sizes), resets))
    return batch


def by_a_loop(model, batch):
    """{bucket: [losses]}: each row without its padding, each document alone, token by token."""
    losses = defaultdict(list)
    for row in range(len(batch["input_ids"])):
        real = batch["attention_mask"][row].bool()
        ids, labels = batch["input_ids"][row][real], batch["labels"][row][real]
        fixed = fixed_chunks(len(ids), model.config.chunk_size)
        sizes, resets, _ = batch["plans"][row] if "plans" in batch else (fixed, None, None)
        resets = resets or [False] * len(sizes)
        begins = [0, *[k for k, reset in enumerate(resets) if reset and k], len(sizes)]
        for first, last in pairwise(begins):
            start, chunks = sum(sizes[:first]), list(sizes[first:last])
            document = ids[start : start + sum(chunks)]
            with torch.no_grad():
                logits = model(document[None], chunk_sizes=chunks, use_cache=False).logits[0]
            number = [chunk for chunk, n in enumerate(chunks) for _ in range(n)]
            for token, target in enumerate(labels[start + 1 : start + 1 + len(document)].tolist()):
                if target != -100:
                    loss = -float(logits[token].double().log_softmax(-1)[target])
                    losses[int(number[token]).bit_length()].append(loss)
    return losses


def validated(batches, tmp_path, model=MODEL):
    """(buckets, recorded values, outputs) of the callback around validation_step."""
    module, recorded = CometModule(model, TrainConfig(), max_steps=1), {}
    module.record = recorded.update
    trainer = SimpleNamespace(global_step=7, is_global_zero=True)
    report = LengthReport(tmp_path / "monitor")
    with torch.no_grad():
        report.on_validation_epoch_start(trainer, module)
        outputs = []
        for number, batch in enumerate(batches):
            outputs.append(module.validation_step(batch, number))
            report.on_validation_batch_end(trainer, module, outputs[-1], batch, number)
        buckets = report.metric.compute()
        report.on_validation_epoch_end(trainer, module)
    return buckets, recorded, outputs


@FEW
@given(st.lists(batches(), min_size=1, max_size=2))
def test_it_equals_a_loop_over_tokens(tmp_path_factory, given):
    buckets, recorded, _ = validated(given, tmp_path_factory.mktemp("run"))
    wanted = defaultdict(list)
    for batch in given:
        for bucket, losses in by_a_loop(MODEL, batch).items():
            wanted[bucket] += losses
    assert sum(one["labels"] for one in buckets) == sum(map(count_targets, given))
    assert len(buckets) == max(wanted, default=-1) + 1
    for number, one in enumerate(buckets):
        losses = wanted[number]
        assert one["labels"] == len(losses)
        assert (one["loss"] is None) == (not losses)
        if losses:
            assert one["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-9)
            assert recorded[f"val/loss_by_chunk/{name(one)}"] == one["loss"]
    assert len(recorded) == len([one for one in buckets if one["labels"]])


def test_files_and_picture(tmp_path):
    labels = torch.full((1, 24), -100)
    labels[0, 1:4], labels[0, 22:] = 3, 4  # chunks 0 and 4 of 5 tokens
    batch = {
        "input_ids": text(1, 24),
        "attention_mask": torch.ones(1, 24, dtype=torch.long),
        "labels": labels,
    }
    buckets, _, _ = validated([batch], tmp_path)
    written = json.loads((tmp_path / "monitor" / "length_report.json").read_text())
    assert written == {"step": 7, "buckets": buckets}
    assert [(one["from"], one["to"], one["labels"]) for one in written["buckets"]] == [
        (0, 0, 3),
        (1, 1, 0),
        (2, 3, 0),
        (4, 7, 2),
    ]
    assert [one["loss"] is None for one in written["buckets"]] == [False, True, True, False]
    assert (tmp_path / "monitor" / "length_report.png").read_bytes().startswith(b"\x89PNG")
    (line,) = curve(written["buckets"]).axes[0].lines
    assert list(line.get_xdata()) == [0, 3], "empty buckets are not drawn"


def test_without_labels_nothing_is_written(tmp_path):
    batch = {
        "input_ids": text(2, 9),
        "attention_mask": torch.ones(2, 9, dtype=torch.long),
        "labels": torch.full((2, 9), -100),
    }
    assert validated([batch], tmp_path)[:2] == ([], {})
    assert not (tmp_path / "monitor").exists()


def test_a_loss_that_is_not_finite_is_counted_and_not_drawn():
    metric = LossByPosition()
    metric.update(
        torch.tensor([0, 1, 2]),
        torch.tensor([1.0, math.nan, 3.0]),
        chunk_of_columns(torch.ones(1, 3), 1),
    )
    assert [(one["loss"], one["labels"]) for one in metric.compute()] == [
        (1.0, 1),
        (None, 1),
        (3.0, 1),
    ]


@pytest.mark.parametrize("chunk", [0, 1, 2, 3, 4, 7, 8, 1023, 1024, 2**45, 2**46, 2**60])
def test_buckets_are_powers_of_two(chunk):
    metric = LossByPosition()
    metric.update(torch.tensor([0]), torch.tensor([1.0]), torch.tensor([[chunk]]).numpy())
    found = metric.compute()[-1]
    assert found["labels"] == 1
    assert found["from"] <= chunk
    assert chunk <= found["to"] or len(metric.compute()) == BUCKETS


def test_showing_losses_leaves_the_loss():
    batch, shown = {"input_ids": text(2, 24), "labels": text(2, 24)}, []
    observer = Observer(losses=lambda *values: shown.append(values))
    with torch.no_grad():
        plain = MODEL(**batch).loss
        with observing(MODEL, observer):
            observed = MODEL(**batch).loss
    ((places, losses),) = shown
    assert sorted(places.tolist()) == [place for place in range(48) if place % 24 != 23]
    torch.testing.assert_close(losses.mean(), plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(observed, plain, rtol=1e-12, atol=0)
    with observing(MODEL, observer):
        assert MODEL(**batch).loss.requires_grad, "a training step's loss keeps its graph"
    assert MODEL.observer is None and len(shown) == 1


def test_single_losses_sum_to_the_loss_in_any_blocks():
    hidden, head, targets = torch.randn(7, 5), torch.nn.Linear(5, 9), torch.arange(7)
    for block in (1, 3, 7, 8):
        losses = cross_entropies(hidden, targets, head, block)
        torch.testing.assert_close(
            losses.sum(), summed(partial(cross_entropy, head, "sum"), hidden, targets).detach()
        )
    assert cross_entropies(hidden[:0], targets[:0], head).shape == (0,)
