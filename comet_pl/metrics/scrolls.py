"""The official scores of the SCROLLS tasks, all in percent.

    gov_report, summ_screen_fd, qmsum   geometric mean of ROUGE-1, ROUGE-2 and ROUGE-L, each averaged over the examples first
    qasper, narrative_qa                F1 over the answer's words, as SQuAD counts it
    quality, contract_nli               exact match, as SQuAD normalises answers

Of several references the best counts, for each metric on its own.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rouge_score.rouge_scorer import RougeScorer
from torch import Tensor
from torchmetrics import Metric

ROUGES = ["rouge1", "rouge2", "rougeL"]
METRICS = {
    "gov_report": ROUGES,
    "summ_screen_fd": ROUGES,
    "qmsum": ROUGES,
    "qasper": ["f1"],
    "narrative_qa": ["f1"],
    "quality": ["exact_match"],
    "contract_nli": ["exact_match"],
}


def normalise(answer: str) -> str:
    """SQuAD's: lower case, without punctuation, articles and surplus spaces."""
    answer = "".join(character for character in answer.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", answer).split())


def f1(prediction: str, reference: str) -> float:
    """Harmonic mean of precision and recall over the words that both share."""
    words, wanted = normalise(prediction).split(), normalise(reference).split()
    shared = sum((Counter(words) & Counter(wanted)).values())
    return 2 * shared / (len(words) + len(wanted)) if shared else 0.0


def exact_match(prediction: str, reference: str) -> float:
    return float(normalise(prediction) == normalise(reference))


_SCORER = RougeScorer(ROUGES, use_stemmer=False)


def _rouge(prediction: str, references: Sequence[str]) -> list[float]:
    scores = [_SCORER.score(reference, prediction) for reference in references]
    return [max(score[name].fmeasure for score in scores) for name in ROUGES]


def _best(metric: Callable[[str, str], float]) -> Callable[[str, Sequence[str]], list[float]]:
    return lambda prediction, references: [max(metric(prediction, reference) for reference in references)]


_SCORE = {"rouge1": _rouge, "f1": _best(f1), "exact_match": _best(exact_match)}


def scores(task: str, prediction: str, references: Sequence[str]) -> dict[str, float]:
    """One example's metrics in percent, its own scrolls_score included."""
    values = _SCORE[METRICS[task][0]](prediction, references)
    return _summary(task, [100 * value for value in values])


def _summary(task: str, values: Sequence[float]) -> dict[str, float]:
    product = 1.0
    for value in values:
        product *= value
    return {"scrolls_score": product ** (1 / len(values)), **dict(zip(METRICS[task], values, strict=True))}


class ScrollsScore(Metric):
    """Scores of one task: {"scrolls_score", the task's metrics, "n"}, over all predictions that it was given.

    Args:
        task: a key of METRICS.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, task: str, **kwargs: Any):
        super().__init__(**kwargs)
        self.task = task
        self.add_state("total", torch.zeros(len(METRICS[task]), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """One prediction, and one or more references for it, an example."""
        for prediction, answers in zip(predictions, references, strict=True):
            values = scores(self.task, prediction, answers)
            self.total += torch.tensor([values[name] for name in METRICS[self.task]], dtype=torch.float64, device=self.total.device)
            self.count += 1

    def compute(self) -> dict[str, float]:
        values = (self.total / self.count).tolist()
        return {**_summary(self.task, values), "n": int(self.count)}


def average(tasks: dict[str, dict[str, float]]) -> float:
    """Mean scrolls_score over tasks."""
    return sum(values["scrolls_score"] for values in tasks.values()) / len(tasks)
