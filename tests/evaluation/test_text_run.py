"""The books conf: a run from train.py to its table, and eval.py on it."""

import json
import math
import re

import pytest

import eval as eval_command
import train
from tests.support.tiny_data import write_texts
from tests.support.tiny_runs import TINY, scalars


def test_a_run_trains_validates_and_measures_the_loss_by_chunk(tmp_path, capsys):
    keys = ["conf=books", f"data.root={write_texts(tmp_path / 'texts')}", *TINY]
    keys += [f"data.cache={tmp_path / 'cache'}", "data.max_length=120", "data.val_share=0.2"]
    steps = ["trainer.max_steps=3", "trainer.val_check_interval=3"]
    steps += ["eval.baselines=[full,blocks,window]"]
    train.main([*keys, *steps, f"run.root={tmp_path}", "run.name=x"])
    run, out = tmp_path / "books" / "x", capsys.readouterr().out
    assert re.search(r"train: [\d,]+ tokens in rows of up to 120: \d+, shorter than a chunk", out)
    scores = json.loads((run / "eval" / "text.json").read_text())
    whole, chunks = scores["all"], scores["by_chunk"]
    assert 0 < whole["rows"] <= 64
    assert whole["perplexity"] == pytest.approx(math.exp(whole["loss"]))
    assert [(each["from"], each["to"]) for each in chunks] == [(0, 0), (1, 1), (2, 3), (4, 7)]
    assert sum(each["labels"] for each in chunks) == whole["labels"]
    total = sum(each["loss"] * each["labels"] for each in chunks)
    assert total / whole["labels"] == pytest.approx(whole["loss"])
    ((_, logged),) = scalars(run)[0]["val/loss"]
    assert logged == pytest.approx(whole["loss"], rel=1e-5)
    assert (run / "eval" / "text.png").stat().st_size > 1000 and not (run / "predictions").exists()
    assert re.search(rf"all +{whole['labels']:,} +{whole['loss']:.3f}", out)
    assert f"written: {run}/eval/text.json\n" in out

    whole_of = {name: each["all"] for name, each in scores["baselines"].items()}
    assert list(whole_of) == ["full", "blocks", "window"]
    assert whole_of["window"]["labels"] == whole_of["blocks"]["labels"] == whole["labels"]
    apart = whole["loss"] - whole_of["blocks"]["loss"]
    assert whole_of["blocks"]["difference"] == pytest.approx(apart, abs=1e-6)
    assert 0 < whole_of["blocks"]["standard_error"] < 0.1
    # Of 30 positions the first chunk of 16 fits, which is the same to all.
    first = [each["by_chunk"][0]["loss"] for each in scores["baselines"].values()]
    assert first == pytest.approx([first[0]] * 3, rel=1e-5)
    assert whole_of["full"]["labels"] == chunks[0]["labels"] < whole["labels"]
    assert scores["closed"] == {"all": None, "by_chunk": [None] * 4}
    assert 0 < scores["long_rows"] <= whole["rows"] and "LoRA merged" in scores["decoder"]
    assert re.search(r"full: \d+ of \d+ rows are longer than the decoder's 30 positions", out)

    other = tmp_path / "other.txt"
    other.write_text("The rain in the north falls on the town. " * 20)
    more = [f"data.root={other}", "data.val_examples=null", f"out={tmp_path / 'out'}"]
    eval_command.main([f"ckpt={run}", *more])
    scores = json.loads((tmp_path / "out" / "eval" / "text.json").read_text())
    assert scores["all"]["rows"] == 1
    assert scores["baselines"]["blocks"]["all"]["standard_error"] is None
    eval_command.main([f"ckpt={run}", *more, "eval.baselines=null"])
    scores = json.loads((tmp_path / "out" / "eval" / "text.json").read_text())
    assert scores.keys() == {"all", "by_chunk"}
