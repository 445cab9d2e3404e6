"""Windows are the rows cut at chunks; micro-batches keep what belongs to a row."""

import pytest
from hypothesis import given

from comet_pl.model.chunk_layout import ChunkPlan, fixed_chunks
from comet_pl.training.windows import count_targets, cut_windows, split_rows
from tests.support.training import cuts, ragged


@given(cuts())
def test_windows_are_the_rows_cut_at_chunks(cut):
    batch, chunk_size, chunks = cut
    windows = cut_windows(batch, chunk_size, chunks)
    assert sum(window.targets for window in windows) == count_targets(batch)
    assert not windows or windows[-1].targets
    for row in range(len(batch["input_ids"])):
        real = batch["attention_mask"][row].bool()
        ids, labels = batch["input_ids"][row][real].tolist(), batch["labels"][row][real].tolist()
        fixed = ChunkPlan(tuple(fixed_chunks(len(ids), chunk_size)))
        plan = batch["plans"][row] if "plans" in batch else fixed
        read, targets, start = [], [], 0
        for window in windows:
            real = window.attention_mask[row].bool()
            assert real.tolist() == sorted(real.tolist(), reverse=True)  # right-padded
            assert int(real.sum()) == window.plans[row].tokens
            assert (window.shift_labels[row][~real] == -100).all()
            read += window.input_ids[row][real].tolist()
            targets += window.shift_labels[row][real].tolist()
            assert window.plans[row] == plan.part(start, start + window.chunks)
            assert chunks is None or window.chunks <= chunks
            start += window.chunks
        assert read == ids[: len(read)]
        assert targets == [*labels[1:], -100][: len(read)]
        assert set(labels[len(read) + 1 :]) <= {-100}  # what was left out had no target


def test_windows_refuse_a_plan_that_does_not_fit():
    plans = [ChunkPlan((6,)), ChunkPlan((7,))]
    with pytest.raises(ValueError, match="plans: row 1 sums to 7, but it has 6 real tokens"):
        cut_windows({**ragged([6, 6]), "plans": plans}, 4, None)


def test_split_rows_keeps_what_belongs_to_a_row():
    batch = {**ragged([3, 4, 5, 6, 7]), "depth": [0, 1, 2, 3, 4], "length": 7}
    parts = split_rows(batch, 2)
    assert [part["depth"] for part in parts] == [[0, 1, 2], [3, 4]]
    assert [len(part["input_ids"]) for part in parts] == [3, 2]
    assert all(part["length"] == 7 for part in parts)
