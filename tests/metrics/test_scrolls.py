"""SCROLLS' official scores against known values, an independent computation, and batching."""

import io
import json
import lzma
import re
import string
import subprocess
import sys
from collections import Counter
from statistics import mean

import pandas
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rouge_score.rouge_scorer import RougeScorer

from comet_pl.errors import UserError
from comet_pl.metrics.scrolls import (
    METRICS,
    PAPER,
    PAPER_AVERAGES,
    ScrollsScore,
    average,
    beside_paper,
    exact_match,
    f1,
    main,
    normalise,
    score_files,
    scores,
    submission_csv,
)
from data.scrolls_rows import SCROLLS

PREDICTIONS = ["exact match example", "hello there", "general kenobi"]
REFERENCES = [["exact match example"], ["hello", "hi there"], ["commander kenobi"]]


def score(task, predictions=PREDICTIONS, references=REFERENCES):
    metric = ScrollsScore(task)
    metric.update(predictions, references)
    return metric.compute()


@pytest.mark.parametrize("task", ["gov_report", "summ_screen_fd", "qmsum", "squality"])
def test_the_official_example_rouge(task):
    rouge = {"rouge1": 72.2222, "rouge2": 33.3333, "rougeL": 72.2222}
    found = {name: round(value, 4) for name, value in score(task).items()}
    assert found == {"scrolls_score": 55.8136, **rouge, "n": 3}


@pytest.mark.parametrize(
    ("task", "name", "value"),
    [
        ("qasper", "f1", 72.2222),
        ("narrative_qa", "f1", 72.2222),
        ("quality", "exact_match", 33.3333),
        ("contract_nli", "exact_match", 33.3333),
    ],
)
def test_the_official_example_answers(task, name, value):
    assert {key: round(number, 4) for key, number in score(task).items()} == {
        "scrolls_score": value,
        name: value,
        "n": 3,
    }


def test_squads_normalisation():
    assert normalise(" The  Cat's a  hat, An-d theatre!\n") == "cats hat and theatre"
    assert exact_match("The answer.", "answer")
    assert not exact_match("answers", "answer")
    assert f1("a dog runs", "the dog ran") == pytest.approx(2 * 1 / (2 + 2))
    assert f1("", "") == 0.0
    assert f1("dog dog", "dog") == pytest.approx(2 / 3)


WORDS = st.lists(
    st.sampled_from(["the", "a", "dog", "Dog", "cat,", "runs.", "home", "7", "it's"]), max_size=6
).map(" ".join)
EXAMPLES = st.lists(
    st.tuples(WORDS, st.lists(WORDS, min_size=1, max_size=3)), min_size=1, max_size=5
)


def independent(task, examples):
    """Written otherwise than the metric: the score of a task, in percent."""

    def words(text):
        return re.sub(
            r"\b(a|an|the)\b",
            " ",
            text.lower().translate(str.maketrans("", "", string.punctuation)),
        ).split()

    def overlap(one, other):
        common = (Counter(one) & Counter(other)).total()
        if not common:
            return 0.0
        precision, recall = common / len(one), common / len(other)
        return 2 * precision * recall / (precision + recall)

    if METRICS[task] == ["f1"]:
        return 100 * mean(
            max(overlap(words(text), words(reference)) for reference in references)
            for text, references in examples
        )
    if METRICS[task] == ["exact_match"]:
        return 100 * mean(
            any(words(text) == words(reference) for reference in references)
            for text, references in examples
        )
    product = 1.0
    for name in ("rouge1", "rouge2", "rougeL"):
        scorer = RougeScorer([name], use_stemmer=False)
        product *= 100 * mean(
            max(scorer.score(one, text)[name].fmeasure for one in references)
            for text, references in examples
        )
    return product ** (1 / 3)


@given(task=st.sampled_from(sorted(METRICS)), examples=EXAMPLES)
def test_equals_an_independent_computation(task, examples):
    whole = ScrollsScore(task)
    whole.update(*map(list, zip(*examples, strict=True)))
    pieces = ScrollsScore(task)
    for text, references in examples:
        pieces.update([text], [references])
    assert whole.compute() == pytest.approx(pieces.compute())
    assert whole.compute()["scrolls_score"] == pytest.approx(independent(task, examples))
    assert whole.compute()["n"] == len(examples)
    if len(examples) == 1:
        assert scores(task, *examples[0])["scrolls_score"] == pytest.approx(
            whole.compute()["scrolls_score"]
        )


def test_average_and_states():
    assert average({"qmsum": {"scrolls_score": 10.0}, "qasper": {"scrolls_score": 40.0}}) == 25.0
    metric = ScrollsScore("qmsum")
    metric.update(["a dog"], [["a dog"]])
    metric.reset()
    metric.update(["a dog"], [["no cat"]])
    assert metric.compute()["rouge1"] == 0
    assert isinstance(metric.total, torch.Tensor)


# ---- files

IDS = ["a", "b", "c"]


def write(folder, predictions=None, lines=None):
    """The official example as files, or what is given instead."""
    given, wanted = folder / "predictions.json", folder / "references.jsonl"
    predictions = dict(zip(IDS, PREDICTIONS, strict=True)) if predictions is None else predictions
    given.write_text(predictions if isinstance(predictions, str) else json.dumps(predictions))
    rows = [
        {"id": one, "pid": f"{one}_{n}", "output": text}
        for one, texts in zip(IDS, REFERENCES, strict=True)
        for n, text in enumerate(texts)
    ]
    wanted.write_text("\n".join([json.dumps(row) for row in rows] if lines is None else lines))
    return given, wanted


@pytest.mark.parametrize("task", sorted(METRICS))
def test_the_official_example_in_files(task, tmp_path, capsys):
    given, wanted = write(
        tmp_path, dict(reversed(list(zip(IDS, PREDICTIONS, strict=True))))
    )  # in any order
    packed = tmp_path / "references.jsonl.xz"
    packed.write_bytes(lzma.compress(wanted.read_bytes()))
    rouge = {"scrolls_score": 55.8136, "rouge1": 72.2222, "rouge2": 33.3333, "rougeL": 72.2222}
    value = {"f1": 72.2222, "exact_match": 33.3333}
    name = METRICS[task][0]
    expected = rouge if name == "rouge1" else {"scrolls_score": value[name], name: value[name]}
    for path in (wanted, packed):
        main([task, str(given), str(path)])
        assert json.loads(capsys.readouterr().out) == {**expected, "n": 3}


@pytest.mark.slow
def test_the_command_prints_json_alone(tmp_path):
    given, wanted = write(tmp_path)
    command = [sys.executable, "-m", "comet_pl.metrics.scrolls", "quality", given, wanted]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {"scrolls_score": 33.3333, "exact_match": 33.3333, "n": 3}


def test_a_task_that_there_is_not(tmp_path):
    with pytest.raises(
        UserError,
        match=r"TASK: 'qualty' given \(did you mean quality\?\), allowed: gov_report, .*, "
        r"squality$",
    ):
        main(["qualty", *map(str, write(tmp_path))])


def test_missing_predictions_are_refused_or_count_as_nothing(tmp_path):
    files = write(tmp_path, {"a": "exact match example"})
    with pytest.raises(
        UserError,
        match=r"predictions.json: 2 of 3 ids of .*references.jsonl are missing; the first: 'b' "
        r"\(--allow-missing",
    ):
        score_files("qasper", *files)
    found = score_files("qasper", *files, allow_missing=True)
    assert found == pytest.approx({"scrolls_score": 100 / 3, "f1": 100 / 3, "n": 3, "missing": 2})
    assert score_files("qmsum", *files, allow_missing=True)["rouge1"] == pytest.approx(100 / 3)
    files = write(tmp_path, {"a": "x", "bb": "y", "B": "z"})
    for allowed in (False, True):
        with pytest.raises(
            UserError, match=r"2 of 3 ids are not in .*; the first: 'bb' \(did you mean b\?\)"
        ):
            score_files("qasper", *files, allow_missing=allowed)


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        ("{", "predictions.json: not JSON: .*predictions {id: text} are needed"),
        (
            "\ud800".encode("utf-16", "surrogatepass").decode("latin-1"),
            "predictions.json: not JSON",
        ),
        ("[" * 100_000, "predictions.json: not JSON"),
        (["a"], "predictions.json: a list given, predictions {id: text} are needed"),
        ({"a": "x", "b": ["y"]}, r"predictions.json: 'b': \['y'\] given, predictions"),
        ({"a": None}, "predictions.json: 'a': None given"),
        ('{"a": "x", "a": "y"}', "predictions.json: 'a' is there twice"),
    ],
)
def test_predictions_that_are_none(predictions, message, tmp_path):
    with pytest.raises(UserError, match=message):
        score_files("qmsum", *write(tmp_path, predictions))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "references.jsonl: no rows; references"),
        (['{"id": "a", "output": "x"}', "{"], "references.jsonl:2: malformed row: not JSON"),
        (['{"output": "x"}'], "references.jsonl:1: malformed row: id: missing"),
        (
            ['{"id": "a", "output": null}'],
            "references.jsonl:1: malformed row: output: None given, text is needed",
        ),
        (["3"], "references.jsonl:1: malformed row: a JSON object is needed"),
    ],
)
def test_references_that_are_none(lines, message, tmp_path):
    with pytest.raises(UserError, match=message):
        score_files("qmsum", *write(tmp_path, lines=lines))


def test_files_that_cannot_be_read(tmp_path):
    given, wanted = write(tmp_path)
    with pytest.raises(UserError, match=r"nowhere.json: cannot be read: No such file"):
        score_files("qmsum", tmp_path / "nowhere.json", wanted)
    with pytest.raises(
        UserError, match=r"nowhere.jsonl: cannot be read after line 0: No such file"
    ):
        score_files("qmsum", given, tmp_path / "nowhere.jsonl")
    cut = tmp_path / "cut.jsonl.xz"
    cut.write_bytes(lzma.compress(wanted.read_bytes())[:-30])
    with pytest.raises(UserError, match=r"cut.jsonl.xz: cannot be read after line"):
        score_files("qmsum", given, cut)
    with pytest.raises(UserError, match="the following arguments are required: predictions"):
        main(["qmsum"])


@pytest.mark.parametrize("task", ["qmsum", "contract_nli", "narrative_qa"])
def test_real_rows(task, shared_data, tmp_path):
    """Predictions are the question's own references, or another's."""
    path = shared_data / f"scrolls_small/{task}/validation.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    wanted = {}
    for row in rows:
        wanted.setdefault(row["id"], []).append(row["output"])
    given = {
        one: texts[-1] if number % 2 else rows[number]["output"]
        for number, (one, texts) in enumerate(wanted.items())
    }
    (tmp_path / "predictions.json").write_text(json.dumps(given))
    found = score_files(task, tmp_path / "predictions.json", path)
    assert found["n"] == len(wanted) and 0 < found["scrolls_score"] <= 100
    assert found["scrolls_score"] == pytest.approx(
        independent(task, [(given[one], texts) for one, texts in wanted.items()])
    )


def test_the_submission_reads_back_as_the_site_reads_it(tmp_path):
    answers = {
        "1": 'He said "no", twice.',
        "2": "",
        "3": "two\nlines",
        "4": "a\rb\r\nc",
        "5": "NA",
        "6": "，。é",
        "007": " 1,5 ",
    }
    predictions = {
        task: {one: f"{text}{task}" if text else "" for one, text in answers.items()}
        for task in reversed(SCROLLS)
    }
    path = tmp_path / "new" / "submission.csv"
    submission_csv(predictions, path)
    table = pandas.read_csv(path, dtype=object, keep_default_na=False, na_values=["!@#$%^&*()"])
    assert list(table.columns) == ["Task", "ID", "Prediction"]
    assert list(table["Task"].unique()) == SCROLLS
    for task, wanted in predictions.items():
        rows = table[table["Task"] == task]
        assert dict(zip(rows["ID"], rows["Prediction"], strict=True)) == wanted
    assert [one.name for one in path.parent.iterdir()] == ["submission.csv"]


def test_submissions_that_are_refused(tmp_path):
    path, whole = tmp_path / "submission.csv", {task: {"1": "x"} for task in SCROLLS}
    with pytest.raises(UserError, match="'squality' is no task of a submission"):
        submission_csv({**whole, "squality": {"1": "x"}}, path)
    with pytest.raises(
        UserError, match="no predictions for qmsum, quality; a submission needs all of gov_report"
    ):
        submission_csv({**whole, "quality": {}, "qmsum": {}}, path)
    assert not path.exists()
    submission_csv(whole, path)
    before = path.read_bytes()
    with pytest.raises(UserError, match="cannot be written"):
        submission_csv(whole, path / "below.csv")
    assert path.read_bytes() == before


# ---- beside the paper's


def test_the_papers_numbers_name_our_tasks_and_metrics():
    assert all(metric in METRICS[task] and task in SCROLLS for task, (metric, *_) in PAPER.items())
    assert PAPER["gov_report"] == ("rouge1", 62.5, 61.0)
    assert PAPER_AVERAGES["CoMeT"] == 40.10 and PAPER_AVERAGES["full attention"] == 42.23


def lines(values):
    console = Console(width=160, file=io.StringIO())
    console.print(beside_paper(values))
    return [
        " ".join(line.replace("│", " ").split()) for line in console.file.getvalue().splitlines()
    ]


def test_the_table_puts_like_beside_like():
    """A row shows the task's own ROUGE-1 beside the paper's; qmsum is not in the paper."""
    values = {"gov_report": score("gov_report"), "qmsum": score("qmsum")}
    shown = lines({**values, "average": average(values)})
    assert (
        "gov_report 55.81 3 rouge1 72.22, rouge2 33.33, rougeL 72.22 rouge1 62.5 rouge1 61.0"
        in shown
    )
    assert "qmsum 55.81 3 rouge1 72.22, rouge2 33.33, rougeL 72.22" in shown
    assert "average 55.81 40.10 42.23" in shown
    assert "average 40.10 42.23" in lines({})  # a test split: nothing was scored
