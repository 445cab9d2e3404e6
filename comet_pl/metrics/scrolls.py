"""The official scores of the SCROLLS tasks, all in percent, and ZeroSCROLLS' squality.

    gov_report, summ_screen_fd, qmsum, squality   geometric mean of ROUGE-1, ROUGE-2 and ROUGE-L,
                                                  each averaged over the examples first
    qasper, narrative_qa                          F1 over the answer's words, as SQuAD counts it
    quality, contract_nli                         exact match, as SQuAD normalises answers

Of several references the best counts, for each metric on its own.

    python -m comet_pl.metrics.scrolls TASK predictions.json references.jsonl [--allow-missing]

prints the scores as JSON. The predictions are {id: text}; the references are SCROLLS rows with id
and output, plain or compressed (.xz, .gz, .zst); rows that share an id are references of one
question. As with the official scorer, the ids of both must be the same. --allow-missing scores
questions without a prediction as answered with nothing, and counts them.
"""

import argparse
import csv
import functools
import io
import json
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torchmetrics import Metric

from comet_pl.errors import Parser, UserError, nearest, os_errors, run_cli
from comet_pl.files import replacing
from data import jsonl
from data.scrolls_rows import SCROLLS

ROUGES = ["rouge1", "rouge2", "rougeL"]
METRICS = {
    "gov_report": ROUGES,
    "summ_screen_fd": ROUGES,
    "qmsum": ROUGES,
    "qasper": ["f1"],
    "narrative_qa": ["f1"],
    "quality": ["exact_match"],
    "contract_nli": ["exact_match"],
    "squality": ROUGES,
}
PAPER = {
    "gov_report": ("rouge1", 62.5, 61.0),
    "summ_screen_fd": ("rouge1", 33.4, 32.5),
    "qasper": ("f1", 35.5, 40.3),
    "narrative_qa": ("f1", 22.6, 22.1),
    "quality": ("exact_match", 56.0, 64.2),
}
"""Task -> (metric, the paper's CoMeT, its full attention), in percent.

Qwen3-4B-Instruct-2507 with memories of about 3k slots (arXiv 2602.01766). For QuALITY the paper
names no metric: ours is the task's official one.
"""
PAPER_AVERAGES = {
    "full attention": 42.23,
    "CoMeT": 40.10,
    "sliding window (5,120)": 38.24,
    "LongLLMLingua": 37.36,
    "Transformer-XL": 31.83,
    "Activation Beacon": 30.71,
    "HMT": 30.31,
}
"""Method -> the average that the paper reports, over its own tasks and metrics."""


def normalise(answer: str) -> str:
    """SQuAD's: lower case, without punctuation, articles and surplus spaces."""
    answer = "".join(letter for letter in answer.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", answer).split())


def f1(prediction: str, reference: str) -> float:
    """Harmonic mean of precision and recall over the words that both share."""
    words, wanted = normalise(prediction).split(), normalise(reference).split()
    shared = sum((Counter(words) & Counter(wanted)).values())
    return 2 * shared / (len(words) + len(wanted)) if shared else 0.0


def exact_match(prediction: str, reference: str) -> float:
    return float(normalise(prediction) == normalise(reference))


@functools.cache
def rouge_scorer() -> Any:
    """The official scorer; its package brings nltk along, which only these tasks need."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(ROUGES, use_stemmer=False)


def _rouge(prediction: str, references: Sequence[str]) -> list[float]:
    scores = [rouge_scorer().score(reference, prediction) for reference in references]
    return [max(score[name].fmeasure for score in scores) for name in ROUGES]


def _best(metric: Callable[[str, str], float]) -> Callable[[str, Sequence[str]], list[float]]:
    return lambda prediction, references: [max(metric(prediction, ref) for ref in references)]


_SCORE = {"rouge1": _rouge, "f1": _best(f1), "exact_match": _best(exact_match)}


def scores(task: str, prediction: str, references: Sequence[str]) -> dict[str, float]:
    """One example's metrics in percent, its own scrolls_score included."""
    values = _SCORE[METRICS[task][0]](prediction, references)
    return _summary(task, [100 * value for value in values])


def _summary(task: str, values: Sequence[float]) -> dict[str, float]:
    product = 1.0
    for value in values:
        product *= value
    named = dict(zip(METRICS[task], values, strict=True))
    return {"scrolls_score": product ** (1 / len(values)), **named}


class ScrollsScore(Metric):
    """Scores of one task over all its predictions: {"scrolls_score", the task's metrics, "n"}.

    Args:
        task: a key of METRICS.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, task: str, **kwargs: Any):
        super().__init__(**kwargs)
        self.task = task
        zeros = torch.zeros(len(METRICS[task]), dtype=torch.float64)
        self.add_state("total", zeros, dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Adds examples: each has one prediction and one or more references."""
        for prediction, answers in zip(predictions, references, strict=True):
            example = scores(self.task, prediction, answers)
            values = [example[name] for name in METRICS[self.task]]
            self.total += torch.tensor(values, dtype=torch.float64, device=self.total.device)
            self.count += 1

    def compute(self) -> dict[str, float]:
        values = (self.total / self.count).tolist()
        return {**_summary(self.task, values), "n": int(self.count)}


def average(tasks: dict[str, dict[str, float]]) -> float:
    """Mean scrolls_score over tasks."""
    return sum(values["scrolls_score"] for values in tasks.values()) / len(tasks)


def beside_paper(values: Mapping[str, Any]) -> Table:
    """A row each task, in percent: our scores and the paper's, with its metric; then the averages.

    Args:
        values: the content of eval/scrolls.json; {}: no task was scored.
    """
    averages = ", ".join(f"{name} {value:.2f}" for name, value in PAPER_AVERAGES.items())
    caption = f"The paper's averages, over its own tasks and metrics: {averages}"
    columns = ("task", "SCROLLS score", "questions", "in detail")
    table = Table(*columns, "the paper's CoMeT", "its full attention", caption=caption)
    for task, own in values.items():
        if task != "average":
            names = [name for name in own if name not in ("scrolls_score", "n")]
            detail = ", ".join(f"{name} {own[name]:.2f}" for name in names)
            metric, *theirs = PAPER.get(task, ("",))
            paper = [f"{metric} {value:.1f}" for value in theirs]
            table.add_row(task, f"{own['scrolls_score']:.2f}", str(own["n"]), detail, *paper)
    table.add_section()
    average = f"{values['average']:.2f}" if "average" in values else ""
    paper = [f"{PAPER_AVERAGES[name]:.2f}" for name in ("CoMeT", "full attention")]
    table.add_row("average", average, "", "", *paper)
    return table


# -- files


def score_files(
    task: str, predictions: Path, references: Path, allow_missing: bool = False
) -> dict[str, float]:
    """ScrollsScore's values of files; with allow_missing also "missing".

    missing: the number of questions without a prediction.

    Raises:
        UserError: no such task; a file that cannot be read or is not what the module says; ids that
            are in one file only.
    """
    if task not in METRICS:
        hint = nearest(task, METRICS)
        raise UserError(f"TASK: {task!r} given{hint}, allowed: {', '.join(METRICS)}")
    answers, texts = read_references(references), read_predictions(predictions)
    missing = [name for name in answers if name not in texts]
    unknown = [name for name in texts if name not in answers]
    if unknown:
        ids = f"{len(unknown)} of {len(texts)} ids are not in {references}"
        first = f"{unknown[0]!r}{nearest(unknown[0], missing)}"
        raise UserError(f"{predictions}: {ids}; the first: {first}")
    if missing and not allow_missing:
        ids = f"{len(missing)} of {len(answers)} ids of {references} are missing"
        remedy = "(--allow-missing scores them as answered with nothing)"
        raise UserError(f"{predictions}: {ids}; the first: {missing[0]!r} {remedy}")
    metric = ScrollsScore(task, sync_on_compute=False)
    metric.update([texts.get(name, "") for name in answers], list(answers.values()))
    return metric.compute() | ({"missing": len(missing)} if allow_missing else {})


def read_predictions(path: Path) -> dict[str, str]:
    """{id: text} of a JSON file.

    Raises:
        UserError: it cannot be read, or holds something else, or an id twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for name, count in Counter(name for name, _ in pairs).items():
            if count > 1:
                needed = "one prediction for each id is needed"
                raise UserError(f"{path}: {name!r} is there twice; {needed}")
        return dict(pairs)

    needed = "predictions {id: text} are needed"
    try:
        with os_errors(f"{path}: cannot be read"):
            texts = json.loads(path.read_bytes(), object_pairs_hook=once)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}; {needed}") from None
    if not isinstance(texts, dict):
        raise UserError(f"{path}: a {type(texts).__name__} given, {needed}")
    for name, text in texts.items():
        if not isinstance(text, str):
            raise UserError(f"{path}: {name!r}: {text!r:.40} given, {needed}")
    return texts


def read_references(path: Path) -> dict[str, list[str]]:
    """{id: references} of a file of SCROLLS rows, in the order of the ids' first rows.

    Raises:
        UserError: it cannot be read, has no rows, or one without id or output.
    """
    answers: dict[str, list[str]] = {}
    for place, row in jsonl.rows(path):
        if isinstance(row, str):
            raise UserError(f"{place}: malformed row: {row}")
        for name in ("id", "output"):
            if not isinstance(row.get(name), str):
                shown = f"{row[name]!r:.40} given" if name in row else "missing"
                raise UserError(f"{place}: malformed row: {name}: {shown}, text is needed")
        answers.setdefault(row["id"], []).append(row["output"])
    if not answers:
        raise UserError(f"{path}: no rows; references {{id, output}} are needed")
    return answers


def submission_csv(predictions: Mapping[str, Mapping[str, str]], path: Path) -> None:
    """Writes the benchmark site's file: Task, ID and Prediction for each answer to a test question.

    Args:
        predictions: {task: {id: text}}, for each task of SCROLLS.

    Raises:
        UserError: a task too many, or without predictions; the file cannot be written.
    """
    for task in predictions:
        if task not in SCROLLS:
            reason = f"{task!r} is no task of a submission{nearest(task, SCROLLS)}"
            raise UserError(f"{path}: {reason}, allowed: {', '.join(SCROLLS)}")
    if lacking := ", ".join(task for task in SCROLLS if not predictions.get(task)):
        needed = f"a submission needs all of {', '.join(SCROLLS)}"
        raise UserError(f"{path}: no predictions for {lacking}; {needed}")
    text = io.StringIO()
    # it ends lines with \r\n, and so quotes an answer with either of them
    lines = csv.writer(text)
    lines.writerow(["Task", "ID", "Prediction"])
    lines.writerows(
        [task, name, answer] for task in SCROLLS for name, answer in predictions[task].items()
    )
    with os_errors(f"{path}: cannot be written"), replacing(path) as beside:
        # half a surrogate pair becomes "?"
        beside.write_bytes(text.getvalue().encode("utf-8", "replace"))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m comet_pl.metrics.scrolls", description=__doc__)
    parser.add_argument("task", metavar="TASK", help=", ".join(METRICS))
    parser.add_argument("predictions", type=Path, help="JSON file {id: text}")
    parser.add_argument("references", type=Path, help="SCROLLS rows, .jsonl[.xz|.gz|.zst]")
    missing = "questions without a prediction count as answered with nothing"
    parser.add_argument("--allow-missing", action="store_true", help=missing)
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    values = score_files(**vars(parse(argv)))
    print(json.dumps({name: round(value, 4) for name, value in values.items()}, indent=4))


if __name__ == "__main__":
    run_cli(main)
