"""Which checkpoint a path names."""

import pytest

from comet_pl.errors import UserError
from comet_pl.experiment.checkpoint import find_checkpoint


def test_which_checkpoint(tmp_path):
    run = tmp_path / "x"
    best, last = (run / "checkpoints" / f"{name}.ckpt" for name in ("best", "last"))
    best.parent.mkdir(parents=True)
    best.touch()
    last.touch()
    assert find_checkpoint(run) == (last, run)
    assert find_checkpoint(run / "checkpoints") == (last, run)
    assert find_checkpoint(best) == (best, run)
    last.unlink()
    assert find_checkpoint(run) == (best, run)
    best.unlink()
    lacks = "holds neither checkpoints/last.ckpt, checkpoints/best.ckpt nor"
    with pytest.raises(UserError, match=rf"^ckpt: .*/x {lacks}"):
        find_checkpoint(run)
    (run / "config.json").write_text("{}")
    assert find_checkpoint(run) == (run, run)
    with pytest.raises(UserError, match=r"^ckpt: .*/none does not exist$"):
        find_checkpoint(run / "none")
