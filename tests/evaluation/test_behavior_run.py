"""conf=user_behavior from train.py to its table, and the accuracy that validation shows."""

from __future__ import annotations

import json
import re

import pytest
import torch

from callbacks.behavior_scores import BehaviorScores
from tests.support.tiny_data import write_events

SMALL = [
    "hidden_size=32",
    "head_dim=16",
    "num_attention_heads=2",
    "num_key_value_heads=2",
    "intermediate_size=48",
    "vocab_size=300",
]


def test_a_run_trains_validates_and_compares_with_truncation_and_retrieval(tmp_path, capsys):
    import train

    keys = [
        f"data.root={write_events(tmp_path / 'log')}",
        f"run.root={tmp_path}",
        *(f"backbone.{key}" for key in SMALL),
    ]
    keys += [
        "model.chunk_size=16",
        "model.global_size=2",
        "model.temporary_capacity=8",
        "data.train_length=1600",
        "data.kinds=null",
    ]
    keys += [
        "data.length_schedule=[[0,200],[1,400]]",
        "data.batch_size=2",
        "data.questions=3",
        "data.val_examples=4",
    ]
    keys += [
        "trainer.max_steps=2",
        "trainer.val_check_interval=2",
        "eval.examples=12",
        "eval.budget=1024",
        "eval.batch_size=4",
    ]
    train.main(["conf=user_behavior", "run.name=x", *keys])
    out = capsys.readouterr().out
    assert "with evidence older than 1k" in out and "evidence 0-1k tokens back" in out
    folder = tmp_path / "user_behavior" / "x"
    found = json.loads((folder / "eval" / "user_behavior.json").read_text())
    assert set(found) == {"CoMeT", "last 1k", "BM25 1k", "ceilings"}
    assert all(found[name]["n"] == 12 for name in ("CoMeT", "last 1k", "BM25 1k"))
    assert found["ceilings"]["CoMeT"]["accuracy"] >= found["ceilings"]["last 1k"]["accuracy"]
    aged = found["ceilings"]["CoMeT"]["ages"]
    assert aged and all(
        cell["accuracy"] == 1 for cell in aged
    )  # the whole window holds the evidence
    lines = [
        json.loads(line)
        for line in (folder / "predictions" / "last_1k.jsonl").read_text().splitlines()
    ]
    assert len(lines) == 12 and {"kind", "age", "prediction", "references"} <= set(lines[0])
    whole = [
        json.loads(line)
        for line in (folder / "predictions" / "CoMeT.jsonl").read_text().splitlines()
    ]
    assert all("?" in line["prompt_end"] for line in lines)
    assert [line["prompt_end"][-40:] for line in lines] == [
        line["prompt_end"][-40:] for line in whole
    ]  # the same question's end
    assert all(re.search(r"\d x at \d", line["prompt_end"]) for line in whole)  # data.layout=items
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
    batch = {
        "labels": labels,
        "logits_to_keep": 4,
        "kinds": ["count", "last_time"],
        "ages": [5, 2000],
    }
    scores.on_validation_batch_end(None, Module, {"logits": logits}, batch, 0)
    found = scores.metric.compute()
    assert found["kinds"]["count"]["accuracy"] == 1
    assert found["kinds"]["last_time"]["accuracy"] == (wrong is None)
