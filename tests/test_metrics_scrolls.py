"""SCROLLS' official scores against known values, an independent computation, and batching."""

from __future__ import annotations

import re
import string
from collections import Counter
from statistics import mean

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from comet_pl.metrics.scrolls import METRICS, ScrollsScore, average, exact_match, f1, normalise, scores

PREDICTIONS = ["exact match example", "hello there", "general kenobi"]
REFERENCES = [["exact match example"], ["hello", "hi there"], ["commander kenobi"]]


def score(task: str, predictions=PREDICTIONS, references=REFERENCES) -> dict[str, float]:
    metric = ScrollsScore(task)
    metric.update(predictions, references)
    return metric.compute()


@pytest.mark.parametrize("task", ["gov_report", "summ_screen_fd", "qmsum"])
def test_the_official_example_rouge(task: str):
    found = score(task)
    assert {name: round(value, 4) for name, value in found.items()} == {
        "scrolls_score": 55.8136,
        "rouge1": 72.2222,
        "rouge2": 33.3333,
        "rougeL": 72.2222,
        "n": 3,
    }


@pytest.mark.parametrize(
    ("task", "name", "value"),
    [
        ("qasper", "f1", 72.2222),
        ("narrative_qa", "f1", 72.2222),
        ("quality", "exact_match", 33.3333),
        ("contract_nli", "exact_match", 33.3333),
    ],
)
def test_the_official_example_answers(task: str, name: str, value: float):
    assert {key: round(number, 4) for key, number in score(task).items()} == {"scrolls_score": value, name: value, "n": 3}


def test_squads_normalisation():
    assert normalise(" The  Cat's a  hat, An-d theatre!\n") == "cats hat and theatre"
    assert exact_match("The answer.", "answer")
    assert not exact_match("answers", "answer")
    assert f1("a dog runs", "the dog ran") == pytest.approx(2 * 1 / (2 + 2))
    assert f1("", "") == 0.0
    assert f1("dog dog", "dog") == pytest.approx(2 / 3)


WORDS = st.lists(st.sampled_from("the a dog Dog cat, runs. home 7 it's".split()), max_size=6).map(" ".join)  # noqa: SIM905
EXAMPLES = st.lists(st.tuples(WORDS, st.lists(WORDS, min_size=1, max_size=3)), min_size=1, max_size=5)


def independent(task: str, examples: list[tuple[str, list[str]]]) -> float:
    """Written otherwise than the metric: the score of a task, in percent."""

    def words(text: str) -> list[str]:
        return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(str.maketrans("", "", string.punctuation))).split()

    def overlap(one: list[str], other: list[str]) -> float:
        common = (Counter(one) & Counter(other)).total()
        if not common:
            return 0.0
        precision, recall = common / len(one), common / len(other)
        return 2 * precision * recall / (precision + recall)

    if METRICS[task] == ["f1"]:
        return 100 * mean(max(overlap(words(text), words(reference)) for reference in references) for text, references in examples)
    if METRICS[task] == ["exact_match"]:
        return 100 * mean(any(words(text) == words(reference) for reference in references) for text, references in examples)
    product = 1.0
    for name in ("rouge1", "rouge2", "rougeL"):
        scorer = RougeScorer([name], use_stemmer=False)
        product *= 100 * mean(max(scorer.score(one, text)[name].fmeasure for one in references) for text, references in examples)
    return product ** (1 / 3)


@given(task=st.sampled_from(sorted(METRICS)), examples=EXAMPLES)
def test_equals_an_independent_computation(task: str, examples: list[tuple[str, list[str]]]):
    whole = ScrollsScore(task)
    whole.update(*map(list, zip(*examples, strict=True)))
    pieces = ScrollsScore(task)
    for text, references in examples:
        pieces.update([text], [references])
    assert whole.compute() == pytest.approx(pieces.compute())
    assert whole.compute()["scrolls_score"] == pytest.approx(independent(task, examples))
    assert whole.compute()["n"] == len(examples)
    if len(examples) == 1:
        assert scores(task, *examples[0])["scrolls_score"] == pytest.approx(whole.compute()["scrolls_score"])


def test_average_and_states():
    assert average({"qmsum": {"scrolls_score": 10.0}, "qasper": {"scrolls_score": 40.0}}) == 25.0
    metric = ScrollsScore("qmsum")
    metric.update(["a dog"], [["a dog"]])
    metric.reset()
    metric.update(["a dog"], [["no cat"]])
    assert metric.compute()["rouge1"] == 0
    assert isinstance(metric.total, torch.Tensor)
