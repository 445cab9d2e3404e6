"""SCROLLS: tasks without a split, files that vanish, weights, line ends, one huge document."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from comet_pl.config.schema import ScrollsData
from comet_pl.errors import UserError
from data.scrolls import Corpus, ScrollsBatches, texts
from data.scrolls_rows import split_input
from data.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer(["Who ran home? the dog. It rained all day."] * 3, 320)


def write(root: Path, task: str, split: str, count: int = 3, blank: str = "\n\n") -> Path:
    path = root / task / f"{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"id": f"{split}{n}", "input": f"Who?{blank}dog", "output": "dog"} for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def batches(root: Path, **options) -> ScrollsBatches:
    data = ScrollsData(root=str(root), max_length=90, cache=str(root / "cache"), **options)
    return ScrollsBatches(data, TOKENIZER, seed=0, chunk_size=64, stride=8, max_steps=40)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_task_that_is_named_has_training_rows(tmp_path, streaming, capsys):
    write(tmp_path, "narrative_qa", "train")
    write(tmp_path, "qmsum", "validation")
    (tmp_path / "qmsum" / "train.json").touch()
    named = {"tasks": ["qmsum", "narrative_qa"], "streaming": streaming}
    line = r"data.tasks: qmsum given, but .*qmsum has no train.jsonl.*; it holds train.json, valid"
    with pytest.raises(UserError, match=line):
        batches(tmp_path, **named)
    with pytest.raises(UserError, match=line):
        list(texts(ScrollsData(root=str(tmp_path), tasks=named["tasks"])))
    batches(tmp_path, streaming=streaming)
    assert "qmsum: no train rows" in capsys.readouterr().out


@pytest.mark.parametrize("also", [[], ["qmsum"]])
def test_a_file_that_vanishes_while_streaming_is_missed(tmp_path, also):
    paths = [write(tmp_path, task, "train") for task in ["narrative_qa", *also]]
    feed = iter(batches(tmp_path, streaming=True, batch_size=1).train_loader())
    next(feed)
    paths[0].unlink()
    with pytest.raises(UserError, match=r"narrative_qa/train.jsonl: cannot be read: No such file"):
        list(feed)


def test_no_validation_rows_end_the_training_before_it_begins(tmp_path):
    write(tmp_path, "qmsum", "train")
    with pytest.raises(UserError, match=r"has no validation rows for qmsum, and training needs"):
        batches(tmp_path).validation_loader()


@pytest.mark.parametrize("weight", [1e18, 1e308, float("inf")])
def test_a_weight_that_no_memory_holds_is_refused(tmp_path, weight):
    write(tmp_path, "qmsum", "train")
    with pytest.raises(UserError, match=r"data.weights: (1e\+\d+|inf) given, allowed"):
        batches(tmp_path, weights=[weight])
    with pytest.raises(
        UserError, match=r"data.weights: 5e\+07 given, an epoch would have 1.5e\+08"
    ):
        next(iter(batches(tmp_path, weights=[5e7]).train_loader()))


BLANKS = ["\n\n", "\r\n\r\n", "\n \n", "\r\n \t\r\n"]


@pytest.mark.parametrize("blank", BLANKS)
def test_a_blank_line_may_hold_spaces_and_end_as_on_windows(blank):
    row = {"input": f"What is it?{blank}first\r\nsecond\n\nthird"}
    assert split_input("qasper", row) == ("What is it?\n\n", "first\r\nsecond\n\nthird")
    options = f" (A) x{blank} (B) y\n (C) z"
    row = {"input": f"Why?{blank}{options}{blank}It is (D) that.{blank}End."}
    assert split_input("quality", row) == (
        f"Why?{blank}{options}\n\n",
        f"It is (D) that.{blank}End.",
    )


def test_rows_without_a_document_are_counted(tmp_path, capsys):
    write(tmp_path, "qmsum", "train", blank=" ")
    batches(tmp_path)
    line = "no blank line behind the question, so no document: 3 rows"
    assert f"train: {line}" in capsys.readouterr().out
    Corpus(ScrollsData(root=str(tmp_path)), TOKENIZER, "train")
    assert f"train: {line}" in capsys.readouterr().out


HUGE = """
import resource, sys
from data.jsonl import Complaints
from data.scrolls import ScrollsSource
from tests.data.test_scrolls_files import TOKENIZER, ScrollsData
source = ScrollsSource(ScrollsData(root=sys.argv[1], max_length=512), TOKENIZER, "train")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
((_, row),) = source.rows(Complaints("raise"))
sample = source.encode(row)
assert len(sample) == 512 and sample.notes["cut"]
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1000)
"""


@pytest.mark.slow
def test_one_huge_document_is_tokenised_in_little_memory(tmp_path):
    path = write(tmp_path, "qmsum", "train", 1)
    document = "It rained all day, and nobody saw the dog. " * 250_000
    path.write_text(json.dumps({"id": "a", "input": f"Who?\n\n{document}", "output": "it"}) + "\n")
    command = [sys.executable, "-c", HUGE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # 11 MB; at once they took 2,000 MB
    assert int(done.stdout) < 250
