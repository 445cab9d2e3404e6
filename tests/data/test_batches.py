"""ResumableLoader: every row once an epoch, a new order in each, and exact resumption."""

import os
import signal
from itertools import chain
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from data.batches import ResumableLoader, Shard, validation_loader

ROWS = 23
pytestmark = pytest.mark.filterwarnings(
    "ignore:Using ModelCheckpoint with manual", "ignore:Checkpoint directory"
)


class Numbers:
    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> int:
        return index


def loader(num_workers: int = 0, **options) -> ResumableLoader:
    return ResumableLoader(
        Numbers(), 4, torch.tensor, **{"seed": 7, "num_workers": num_workers, **options}
    )


def epochs(one: ResumableLoader, count: int) -> list[list[list[int]]]:
    return [[batch.tolist() for batch in one] for _ in range(count)]


def flat(lists: list[list]) -> list:
    return list(chain.from_iterable(lists))


def test_every_epoch_has_every_row_in_an_order_of_its_own():
    first, second = epochs(loader(), 2)
    assert len(first) == len(loader()) == 6
    for epoch in (first, second):
        rows = flat(epoch)
        assert sorted(rows[:ROWS]) == list(range(ROWS))
        assert rows[ROWS:] == rows[: len(rows) - ROWS], (
            "the last batch is filled up with the epoch's first rows"
        )
    assert first != second
    assert epochs(loader(), 2) == [first, second]
    assert epochs(loader(seed=8), 1) != [first]


def test_without_seed_rows_come_in_their_own_order():
    (epoch,) = epochs(loader(seed=None), 1)
    assert flat(epoch) == [*range(ROWS), 0]


def test_ranks_share_out_the_rows_of_each_batch():
    parts = [epochs(loader(shard=Shard(rank, 2)), 1)[0] for rank in (0, 1)]
    assert sorted(flat(parts[0]) + flat(parts[1])) == sorted([*range(ROWS), flat(parts[1])[-1]])
    assert len(parts[0]) == len(parts[1]) == len(loader(shard=Shard(0, 2))) == 3


def test_validation_begins_at_the_first_row_each_time():
    one = validation_loader(Numbers(), 4, torch.tensor)
    for _ in range(2):
        assert next(iter(one)).tolist() == [0, 1, 2, 3], "left after a batch"
    whole = [batch.tolist() for batch in one]
    assert flat(whole) == list(range(ROWS))
    assert [len(batch) for batch in whole] == [4, 4, 4, 4, 4, 3]
    assert not hasattr(one, "state_dict")


@pytest.mark.parametrize("world", [2, 3, 8, 24])
def test_validation_gives_every_rank_equally_many_batches_and_each_row_once(world: int):
    parts = [
        [
            batch.tolist()
            for batch in validation_loader(Numbers(), 4, torch.tensor, Shard(rank, world))
        ]
        for rank in range(world)
    ]
    assert {len(part) for part in parts} == {-(-ROWS // (4 * world))}
    assert sorted(flat(flat(parts))) == list(range(ROWS))
    assert world <= ROWS or [] in parts[-1], "nothing is left for the last rank"


def test_fewer_rows_than_a_batch_repeat():
    one = ResumableLoader(Numbers(), 50, torch.tensor, seed=1)
    (batch,) = one
    assert len(batch) == 50
    assert sorted(batch.tolist()[:ROWS]) == list(range(ROWS))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 5, 6, 8])
def test_resumes_after_any_batch(num_workers: int, stop: int):
    whole = flat(epochs(loader(), 3))
    one = loader(num_workers)
    seen = []
    while len(seen) < stop:
        for batch in one:
            seen.append(batch.tolist())
            if len(seen) == stop:
                break
    state = one.state_dict()
    assert state == {"epoch": (stop - 1) // 6, "position": ((stop - 1) % 6 + 1) * 4}
    other = loader(num_workers)
    other.load_state_dict(state)
    rest = flat(epochs(other, 3))
    assert (seen + rest)[: len(whole)] == whole


@pytest.mark.parametrize(("before", "after", "size"), [(1, 2, 2), (2, 1, 4), (2, 4, 3)])
def test_resumed_on_another_number_of_ranks_the_order_goes_on(before: int, after: int, size: int):
    """After two batches, whether or not all ranks together still have four rows a batch."""
    order = flat(epochs(loader(), 1)[0])[:ROWS]
    one = loader(shard=Shard(0, before))
    one.batch_size = 4 // before
    next(batches := iter(one))
    next(batches)
    parts = []
    for rank in range(after):
        other = loader(shard=Shard(rank, after))
        other.batch_size = size
        other.load_state_dict(one.state_dict())
        parts.append([batch.tolist() for batch in other])
    rest = [
        row
        for batch in zip(*parts, strict=True)
        for rows in zip(*batch, strict=True)
        for row in rows
    ]
    assert rest[: ROWS - 8] == order[8:]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_finished_epoch_goes_on_if_rows_have_come_in_the_meantime(num_workers: int):
    short = ResumableLoader(range(8), 4, torch.tensor)
    assert [batch.tolist() for batch in short] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    grown = ResumableLoader(range(13), 4, torch.tensor, num_workers=num_workers)
    grown.load_state_dict(short.state_dict())
    assert [batch.tolist() for batch in grown] == [[8, 9, 10, 11], [12, 0, 1, 2]]


class Interrupted(Numbers):
    """A worker that makes a row gets a Ctrl-C, as all processes of a terminal do."""

    def __getitem__(self, index: int) -> int:
        os.kill(os.getpid(), signal.SIGINT)
        return index


def test_workers_outlive_ctrl_c():
    one = ResumableLoader(Interrupted(), 4, torch.tensor, num_workers=2)
    assert flat([batch.tolist() for batch in one]) == [*range(ROWS), 0]


def test_torchs_random_state_is_left_alone():
    before = torch.get_rng_state()
    epochs(loader(num_workers=2), 1)
    list(validation_loader(Numbers(), 4, torch.tensor))
    assert torch.equal(torch.get_rng_state(), before)


class Toy(lightning.LightningModule):
    """Remembers the rows it was given; its weight depends on their order."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []
        self.automatic_optimization = False

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.seen.append(batch.tolist())
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward((self.weight - batch.float().mean()) ** 2)
        optimizer.step()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def fit(folder: Path, max_steps: int, num_workers: int, ckpt: Path | None = None) -> Toy:
    lightning.seed_everything(0, verbose=False)
    toy = Toy()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        max_epochs=-1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        val_check_interval=2,
        callbacks=[
            ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        ],
    )
    trainer.fit(
        toy,
        loader(num_workers),
        validation_loader(Numbers(), 4, torch.tensor),
        ckpt_path=ckpt,
        weights_only=False,
    )
    return toy


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return fit(tmp_path_factory.mktemp("whole"), 15, 0)


@pytest.mark.parametrize(("stop", "num_workers"), [(3, 0), (3, 2), (6, 0), (9, 0), (9, 2), (12, 0)])
def test_lightning_resumes_exactly(tmp_path: Path, uninterrupted: Toy, stop: int, num_workers: int):
    """Within an epoch, at its end, and in later ones (an epoch has 6 batches)."""
    begun = fit(tmp_path, stop, num_workers)
    assert begun.seen == uninterrupted.seen[:stop]
    rest = fit(tmp_path, 15, num_workers, ckpt=tmp_path / f"step={stop}.ckpt")
    assert rest.seen == uninterrupted.seen[stop:]
    assert torch.equal(rest.weight, uninterrupted.weight)
