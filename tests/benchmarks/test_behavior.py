"""Several seeds of conf=user_behavior."""

import json
from pathlib import Path

import pytest

from benchmarks import behavior
from comet_pl.errors import UserError
from comet_pl.metrics.behavior import BehaviorAccuracy


def values(answers: str) -> dict:
    """Four questions about days with the answer "b": one new, one 2-4k, two 4-8k tokens old."""
    metric = BehaviorAccuracy(sync_on_compute=False)
    kinds = ["last_time", "last_time", "first_time", "first_time"]
    metric.update(list(answers), ["b"] * 4, kinds, [10, 3000, 5000, 8000])
    return metric.compute()


def run(folder: Path, comet: str, last: str) -> str:
    results = {
        "CoMeT": values(comet),
        "last 4k": values(last),
        "ceilings": {"CoMeT": values("bbbb"), "last 4k": values("bbaa")},
    }
    (folder / "eval").mkdir(parents=True)
    (folder / "eval" / "user_behavior.json").write_text(json.dumps(results))
    return str(folder)


def test_mean_and_range_over_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    runs = [run(tmp_path / "x", "bbab", "bbaa"), run(tmp_path / "y", "abbb", "aaaa")]
    out = tmp_path / "out"
    behavior.main([*runs, "--out", str(out)])
    methods = json.loads((out / "behavior.json").read_text())["methods"]
    spreads = {
        "CoMeT old": methods["CoMeT"]["old"],
        "CoMeT all": methods["CoMeT"]["all"],
        **methods["last 4k"]["ages"],
        "ceiling": methods["last 4k, no mistakes"]["kinds"]["last_time"],
    }
    assert {name: tuple(spread.values()) for name, spread in spreads.items()} == {
        "CoMeT old": (0.75, 0.5, 1.0, 4),
        "CoMeT all": (0.75, 0.75, 0.75, 8),
        "0": (0.5, 0.0, 1.0, 2),
        "2048": (0.5, 0.0, 1.0, 2),
        "4096": (0.0, 0.0, 0.0, 4),
        "ceiling": (1.0, 1.0, 1.0, 4),
    }
    assert (out / "behavior.png").stat().st_size > 1000
    assert "75.0% (50% to 100%)" in " ".join(capsys.readouterr().out.split())


def test_a_run_without_results_is_named(tmp_path):
    out = ["--out", str(tmp_path)]
    missing = r"x/eval/user_behavior.json: No such file or directory; "
    missing += r"python eval.py ckpt=.*x writes it"
    with pytest.raises(UserError, match=missing):
        behavior.main([str(tmp_path / "x"), *out])
    folder = run(tmp_path / "y", "bbab", "bbaa")
    Path(folder, "eval", "user_behavior.json").write_text("[1]")
    with pytest.raises(UserError, match="no results of an evaluation of user_behavior"):
        behavior.main([folder, *out])
