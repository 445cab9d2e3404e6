"""Packing: every document once, little padding, and documents that see only themselves."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from comet_pl.model.chunk_layout import ChunkPlan
from data import jsonl
from data.text.packing import join, pack, padding_share
from tests.support.models import text, tiny

MOST = 32768
QMSUM = np.minimum(np.random.default_rng(5).lognormal(np.log(13000), 0.5, 1257).astype(int), MOST)


def generator(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@given(lengths=st.lists(st.integers(1, 50), max_size=60), seed=st.integers(0, 99))
def test_every_document_is_in_one_sample_and_fits(lengths: list[int], seed: int):
    samples = pack(lengths, 50, generator(seed))
    assert sorted(number for sample in samples for number in sample) == list(range(len(lengths)))
    rooms = [50 - sum(lengths[number] for number in sample) for sample in samples]
    assert all(room >= 0 for room in rooms) and all(samples)
    assert sum(50 - room <= 25 for room in rooms) <= 1  # two half-empty samples would have been one
    assert samples == pack(np.array(lengths, dtype=int), 50, generator(seed))
    assert padding_share(samples, lengths, 50) == pytest.approx(
        sum(rooms) / (50 * len(samples)) if samples else 0
    )


def test_it_is_best_fit():
    """Against the rule written out, over the same order of documents."""
    lengths = generator(3).integers(1, 400, 300)
    order = np.argsort(-lengths * generator(7).uniform(0.8, 1, 300), kind="stable")
    bins: list[list[int]] = []
    for number in order.tolist():
        rooms = [400 - sum(lengths[one] for one in sample) - lengths[number] for sample in bins]
        fitting = [room for room in rooms if room >= 0]
        if fitting:
            bins[max(place for place, room in enumerate(rooms) if room == min(fitting))].append(
                number
            )
        else:
            bins.append([number])
    wanted = sorted(sum(lengths[one] for one in sample) for sample in bins)
    assert (
        sorted(sum(lengths[one] for one in sample) for sample in pack(lengths, 400, generator(7)))
        == wanted
    )


@pytest.mark.parametrize("max_length", [MOST, 2 * MOST])
def test_little_padding_and_new_company_each_epoch(max_length: int):
    epochs = [pack(QMSUM, max_length, generator(0, epoch)) for epoch in range(4)]
    assert all(padding_share(samples, QMSUM, max_length) < 0.03 for samples in epochs)
    pairs = [
        {frozenset((a, b)) for sample in samples for a in sample for b in sample if a < b}
        for samples in epochs
    ]
    kept = [
        len(one & other) / len(one) for place, one in enumerate(pairs) for other in pairs[:place]
    ]
    assert max(kept) < 0.1
    for samples in epochs:  # neither samples nor the documents in them stand by length
        documents = [len(sample) for sample in samples]
        assert np.mean(documents[:100]) == pytest.approx(np.mean(documents), rel=0.1)
        ends = np.array(
            [(QMSUM[sample[0]], QMSUM[sample[-1]]) for sample in samples if len(sample) > 1]
        ).mean(0)
        assert ends[0] == pytest.approx(ends[1], rel=0.1)


def test_little_padding_on_qmsum(shared_data):
    rows = (
        row
        for split in ("train", "validation")
        for _, row in jsonl.rows(shared_data / f"scrolls/qmsum/{split}.jsonl.xz")
    )
    lengths = [
        min(MOST, round(1.3 * len(f"{row['input']} {row['output']}".split()))) for row in rows
    ]
    assert len(lengths) == 1257 + 272
    assert padding_share(pack(lengths, MOST, generator(0)), lengths, MOST) < 0.02


def test_many_documents_take_time_in_proportion():
    lengths = np.minimum(generator(0).lognormal(8, 1.2, 100_000).astype(int) + 1, MOST)
    start = time.process_time()
    samples = pack(lengths, MOST, generator(1))
    assert time.process_time() - start < 5  # .2 s on an idle core
    assert padding_share(samples, lengths, MOST) < 0.01


def test_lengths_that_do_not_fit():
    with pytest.raises(ValueError, match="document 2 has 11 tokens, allowed: 1 to max_length = 10"):
        pack([3, 10, 11, 0], 10, generator(0))
    with pytest.raises(ValueError, match="document 0 has 0 tokens"):
        pack([0], 10, generator(0))


def test_join_hides_the_first_token_of_each_document():
    documents = [(np.arange(3), np.arange(3)), (np.arange(7, 9), np.array([-100, 8]))]
    ids, labels, plan = join(documents, [[2, 1], [2]])
    assert ids.tolist() == [0, 1, 2, 7, 8] and labels.tolist() == [-100, 1, 2, -100, 8]
    assert plan == ChunkPlan((2, 1, 2), (True, False, True))
    assert documents[0][1].tolist() == [0, 1, 2]  # the document itself stays
    _, labels, plan = join(documents, [[2, 1], [2]], shared=True)
    assert labels.tolist() == [0, 1, 2, -100, 8] and plan.resets == (False,) * 3
    for plans in ([[4], [2]], [[3, 0], [2]], [[], [2]]):
        with pytest.raises(ValueError, match="plans: document 0 has 3 tokens"):
            join(documents, plans)


def test_a_document_in_a_pack_equals_it_alone():
    model = tiny()
    lengths, plans = [11, 4, 9], [[5, 5, 1], [4], [3, 5, 1]]
    documents = [(text(1, n, seed=n)[0].numpy(),) * 2 for n in lengths]
    ids, labels, plan = join(documents, plans)
    shared = join(documents, plans, shared=True)[2]
    resets, sizes = list(plan.resets), list(plan.sizes)
    rows = torch.from_numpy(ids)[None]
    with torch.no_grad():
        packed, leaking = (
            model(rows, chunk_sizes=sizes, resets=flags).logits[0]
            for flags in (resets, list(shared.resets))
        )
        alone = [
            model(torch.from_numpy(one)[None], chunk_sizes=plan).logits[0]
            for (one, _), plan in zip(documents, plans, strict=True)
        ]
        losses = [
            model(
                torch.from_numpy(one)[None], labels=torch.from_numpy(one)[None], chunk_sizes=plan
            ).loss
            for (one, _), plan in zip(documents, plans, strict=True)
        ]
        loss = model(
            rows, labels=torch.from_numpy(labels)[None], chunk_sizes=sizes, resets=resets
        ).loss
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-10, atol=1e-10)
    assert (leaking - torch.cat(alone))[lengths[0] :].abs().max() > 1e-3
    targets = [n - 1 for n in lengths]
    torch.testing.assert_close(
        loss, sum(one * count for one, count in zip(losses, targets, strict=True)) / sum(targets)
    )
