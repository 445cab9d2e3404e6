"""benchmarks/behavior.py: seeds side by side."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import behavior

from comet_pl.errors import UserError
from comet_pl.metrics.behavior import BehaviorAccuracy


def values(answers: list[str]) -> dict:
    """Of four questions about days, all with the answer "b": one young, one 2-4k, two 4-8k tokens old."""
    metric = BehaviorAccuracy(sync_on_compute=False)
    metric.update(
        answers,
        ["b"] * 4,
        ["last_time", "last_time", "first_time", "first_time"],
        [10, 3000, 5000, 8000],
    )
    return metric.compute()


def run(folder: Path, comet: list[str], last: list[str]) -> Path:
    found = {
        "CoMeT": values(comet),
        "last 4k": values(last),
        "ceilings": {"CoMeT": values(["b"] * 4), "last 4k": values(list("bbaa"))},
    }
    (folder / "eval").mkdir(parents=True)
    (folder / "eval" / "user_behavior.json").write_text(json.dumps(found))
    return folder


def test_mean_and_range_over_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    runs = [
        run(tmp_path / "x", list("bbab"), list("bbaa")),
        run(tmp_path / "y", list("abbb"), list("aaaa")),
    ]
    behavior.main([*map(str, runs), "--out", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / "behavior.json").read_text())["methods"]
    assert set(found) == {"CoMeT", "last 4k", "last 4k, no mistakes"}
    assert found["CoMeT"]["old"] == {"mean": 0.75, "least": 0.5, "most": 1.0, "n": 4}
    assert found["CoMeT"]["all"] == {"mean": 0.75, "least": 0.75, "most": 0.75, "n": 8}
    assert found["last 4k"]["ages"] == {
        "0": {"mean": 0.5, "least": 0.0, "most": 1.0, "n": 2},
        "2048": {"mean": 0.5, "least": 0.0, "most": 1.0, "n": 2},
        "4096": {"mean": 0.0, "least": 0.0, "most": 0.0, "n": 4},
    }
    assert found["last 4k, no mistakes"]["kinds"]["last_time"]["mean"] == 1.0
    assert (tmp_path / "out" / "behavior.png").stat().st_size > 1000
    assert "75.0% (50% to 100%)" in " ".join(capsys.readouterr().out.split())


def test_a_run_without_results_is_named(tmp_path):
    with pytest.raises(
        UserError,
        match=r"x/eval/user_behavior.json: No such file or directory; python eval.py ckpt=.*x writes it",
    ):
        behavior.main([str(tmp_path / "x")])
    folder = run(tmp_path / "y", list("bbab"), list("bbaa"))
    (folder / "eval" / "user_behavior.json").write_text("[1]")
    with pytest.raises(UserError, match="no results of an evaluation of user_behavior"):
        behavior.main([str(folder)])
