"""conf=user_behavior from train.py to its table, and the accuracy that validation shows."""

from __future__ import annotations

import json
import re

import pytest
import torch

import train
from callbacks.behavior_scores import BehaviorScores
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


class Module:
    device = torch.device("cpu")

    class model:
        class config:
            first_new_id = 9


@pytest.mark.parametrize("wrong", [None, 0, 1, 2])
def test_an_answer_is_right_if_all_its_tokens_are(wrong):
    """Left-padded answers of two and of three tokens; new tokens never count, however likely."""
    labels = torch.tensor([[-100, -100, -100, 5, 6], [-100, -100, 3, 4, 7]])
    logits = torch.zeros(2, 4, 11)
    for row in range(2):
        for column in range(2, 5):
            if labels[row, column] != -100:
                logits[row, column - 2, labels[row, column]] = 1.0
    logits[:, :, 10] = 5.0
    if wrong is not None:
        logits[1, wrong, 8] = 2.0
    scores = BehaviorScores()
    scores.on_validation_epoch_start(None, Module)
    batch = {"labels": labels, "logits_to_keep": 4}
    batch |= {"kinds": ["count", "last_time"], "ages": [5, 2000]}
    scores.on_validation_batch_end(None, Module, {"logits": logits}, batch, 0)
    kinds = scores.metric.compute()["kinds"]
    assert kinds["count"]["accuracy"] == 1
    assert kinds["last_time"]["accuracy"] == (wrong is None)
