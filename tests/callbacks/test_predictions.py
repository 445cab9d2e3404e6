"""A validation's answers as files and text; nothing is predicted twice."""

import json
import runpy
from types import SimpleNamespace

import pytest
import torch

from callbacks import scrolls_scores
from callbacks.behavior_scores import BehaviorScores
from callbacks.predictions import Predictions, as_table
from comet_pl.errors import UserError
from comet_pl.evaluation.results import worst_first
from comet_pl.files import as_json
from tests.support.tiny_runs import ROOT, TINY

main = runpy.run_path(str(ROOT / "train.py"))["main"]
WORDS = list("_abcdefghi")


class Tokenizer:
    def decode(self, ids, skip_special_tokens=False):
        return "".join(WORDS[int(i)] for i in ids if not (skip_special_tokens and int(i) == 0))


class Module:
    device = "cpu"
    logger = None

    class model:
        class config:
            first_new_id = 10


def test_a_prediction_is_the_likeliest_token_at_each_label(tmp_path):
    """Left-padded; the last row's answer is one token shorter; a new token never counts."""
    ids = torch.tensor([[9, 9, 1, 2, 3, 4, 0], [9, 1, 2, 3, 5, 6, 0], [7, 7, 8, 8, 7, 5, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1], [1] * 7])
    labels = ids.clone()
    labels[:2, :4], labels[2, :5] = -100, -100
    logits = torch.zeros(3, 4, 12)
    for row in range(3):
        for column in range(4, 7):
            logits[row, column - 4, ids[row, column]] = 1
    logits[..., 11] = 5
    logits[1, 1, 8] = 2
    predictions = Predictions(tmp_path)
    scores = BehaviorScores(predictions)
    trainer = SimpleNamespace(
        datamodule=SimpleNamespace(tokenizer=Tokenizer()),
        world_size=1,
        is_global_zero=True,
        global_step=3,
    )
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "logits_to_keep": 4,
        "kinds": ["count"] * 3,
        "ages": [1, 2, 3],
    }
    for callback in (scores, predictions):
        callback.on_validation_epoch_start(trainer, Module)
    scores.on_validation_batch_end(trainer, Module, {"logits": logits}, batch, 0)
    predictions.on_validation_epoch_end(trainer, Module)
    keys = ("id", "prompt_end", "prediction", "references", "score", "kind", "age")
    answers = [
        ("0", "ab", "cd", ["cd"], 1.0, "count", 1),
        ("1", "abc", "eh", ["ef"], 0.0, "count", 2),
        ("2", "gghhg", "e", ["e"], 1.0, "count", 3),
    ]
    lines = (tmp_path / "predictions-3.jsonl").read_text().splitlines()
    expected = [dict(zip(keys, answer, strict=True)) for answer in answers]
    assert [json.loads(line) for line in lines] == expected
    predictions.on_validation_epoch_start(trainer, Module)
    assert predictions.answers == []


def test_answers_of_all_ranks_come_together(tmp_path):
    parts = [[{"id": "a"}], [], [{"id": "b"}, {"id": "c"}]]
    for rank in (1, 0):
        predictions = Predictions(tmp_path)
        predictions.answers = parts[rank]
        strategy = SimpleNamespace(broadcast=lambda mine, src: parts[src])
        trainer = SimpleNamespace(
            world_size=3, strategy=strategy, is_global_zero=rank == 0, global_step=1
        )
        predictions.on_validation_epoch_end(trainer, Module)
        assert (tmp_path / "predictions-1.jsonl").exists() == (rank == 0)
    lines = (tmp_path / "predictions-1.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["a", "b", "c"]


def test_a_table_shows_texts_as_they_are():
    one = {
        "prompt_end": "x | y\n\n<|user|> # *b*",
        "references": ["a", "b"],
        "prediction": "<script>",
        "score": 100 / 3,
    }
    head, _, line = as_table([one]).splitlines()
    assert head.count("|") == line.count("|") == 5
    assert "&lt;script&gt;" in line and "*" not in line and "<" not in line
    assert "33.33" in line and "a / b" in line


def test_scrolls_answers_are_generated_once(tmp_path, monkeypatch):
    for split in ("train", "validation"):
        folder = tmp_path / "data" / "narrative_qa"
        folder.mkdir(parents=True, exist_ok=True)
        rows = [
            {
                "id": f"{split}{n}",
                "pid": f"{split}{n}",
                "input": f"What is it?\n\n{n} {'a house by the sea ' * 9}",
                "output": "a lamp",
            }
            for n in range(3)
        ]
        (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    generated = []

    def answers(engine, prompts, *rest):
        generated.append(len(prompts))
        return ["a lamp", "what a lamp"]

    monkeypatch.setattr(scrolls_scores.Engine, "answers", answers)
    keys = [
        "conf=scrolls",
        f"data.root={tmp_path / 'data'}",
        f"data.cache={tmp_path / 'cache'}",
        "data.max_length=128",
        "data.batch_size=2",
    ]
    keys += [
        "eval.val_questions=2",
        "trainer.max_steps=2",
        "trainer.val_check_interval=1",
        "eval.after_fit=false",
    ]
    main([*TINY, f"run.root={tmp_path}", "run.name=x", *keys])
    assert generated == [2, 2]
    folder = tmp_path / "scrolls" / "x" / "monitor"
    assert sorted(path.name for path in folder.glob("predictions*")) == [
        "predictions-1.jsonl",
        "predictions-2.jsonl",
    ]
    found = [json.loads(line) for line in (folder / "predictions-2.jsonl").read_text().splitlines()]
    assert [(one["id"], one["prediction"], one["task"]) for one in found] == [
        ("validation0", "a lamp", "narrative_qa"),
        ("validation2", "what a lamp", "narrative_qa"),
    ]
    assert [one["score"] for one in found] == pytest.approx([100, 200 / 3])
    assert all(
        one["references"] == ["a lamp"] and one["prompt_end"].endswith("<|assistant|>")
        for one in found
    )


def test_the_worst_come_first(tmp_path):
    """Equal scores in the file's order, secret answers last; texts may hold line separators."""
    scores = [1.0, None, 0.0, 0.5, 0.0]
    answers = [
        {"id": str(n), "prediction": "a\u2028b\x85", "references": [], "score": score}
        for n, score in enumerate(scores)
    ]
    file = tmp_path / "x.jsonl"
    file.write_bytes(b"".join(map(as_json, answers)))
    assert worst_first(file) == [answers[n] for n in (2, 4, 3, 0, 1)]
    file.write_text("")
    assert worst_first(file) == []


@pytest.mark.parametrize("content", ["{", "3\n", '{"score": "a"}\n{"score": 1}\n', b"\xff\n", None])
def test_what_is_no_predictions_file_is_named(tmp_path, content):
    file = tmp_path / "x.jsonl"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"x\.jsonl: (not a file of predictions|cannot be read)"):
        worst_first(file)
