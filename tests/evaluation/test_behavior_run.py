"""conf=user_behavior from train.py to its table."""

import json
import re

import train
from tests.support.tiny_data import write_events
from tests.support.tiny_runs import TINY


def test_a_run_trains_validates_and_compares_with_truncation_and_retrieval(tmp_path, capsys):
    keys = [
        *TINY,
        f"data.root={write_events(tmp_path / 'log')}",
        f"run.root={tmp_path}",
        "backbone.num_key_value_heads=2",
        "model.chunk_size=64",
        "data.train_length=1600",
        "data.kinds=null",
        "data.length_schedule=[[0,200],[1,400]]",
        "data.batch_size=2",
        "data.questions=3",
        "data.val_examples=4",
        "trainer.max_steps=2",
        "trainer.val_check_interval=2",
        "eval.examples=12",
        "eval.budget=1024",
        "eval.batch_size=12",
    ]
    train.main(["conf=user_behavior", "run.name=x", *keys])
    out = capsys.readouterr().out
    assert "with evidence older than 1k" in out and "evidence 0-1k tokens back" in out
    folder = tmp_path / "user_behavior" / "x"
    scores = json.loads((folder / "eval" / "user_behavior.json").read_text())
    assert set(scores) == {"CoMeT", "last 1k", "BM25 1k", "ceilings"}
    assert all(scores[name]["n"] == 12 for name in ("CoMeT", "last 1k", "BM25 1k"))
    whole, last = scores["ceilings"]["CoMeT"], scores["ceilings"]["last 1k"]
    assert whole["accuracy"] >= last["accuracy"]
    # the whole window holds the evidence
    assert whole["ages"] and all(cell["accuracy"] == 1 for cell in whole["ages"])
    texts = [
        (folder / "predictions" / f"{name}.jsonl").read_text() for name in ("last_1k", "CoMeT")
    ]
    last, whole = ([json.loads(line) for line in text.splitlines()] for text in texts)
    assert len(last) == 12 and {"kind", "age", "prediction", "references"} <= set(last[0])
    for one, other in zip(last, whole, strict=True):
        # the same question's end, after events in data.layout=items
        assert "?" in one["prompt_end"] and one["prompt_end"][-40:] == other["prompt_end"][-40:]
        assert re.search(r"\d x at \d", other["prompt_end"])
    assert (folder / "eval" / "user_behavior.png").stat().st_size > 1000
