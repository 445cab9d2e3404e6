"""Accuracy on questions about a user's behaviour, by kind of question and by age of the evidence.

The age is counted in tokens back, from the end of the history to the beginning of the oldest event
that the answer needs. A count, a most frequent item or a total needs all the events that it is
made of.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.table import Table

from comet_pl.metrics.passkey import mean, short
from comet_pl.metrics.rows import RowMetric
from data.behavior.questions import KINDS, age_class, class_bounds

Values = dict[str, Any]
"""What BehaviorAccuracy.compute gives."""


def normalise(answer: str) -> str:
    """Lower case, without surplus spaces and a full stop at the end."""
    return " ".join(answer.lower().split()).rstrip(".").rstrip()


def exact_match(prediction: str, reference: str) -> bool:
    return normalise(prediction) == normalise(reference)


class BehaviorAccuracy(RowMetric):
    """Share of right answers; see `compute`."""

    def update(
        self,
        predictions: Sequence[str],
        references: Sequence[str],
        kinds: Sequence[str],
        ages: Sequence[int | None],
    ) -> None:
        """Adds questions; an age is None where no event is evidence (next_item).

        Raises:
            KeyError: a kind that is none of KINDS.
        """
        numbers = {kind: number for number, kind in enumerate(KINDS)}
        questions = zip(predictions, references, kinds, ages, strict=True)
        rows = [
            [
                numbers[kind],
                -1 if age is None else int(age_class(age)),
                exact_match(prediction, reference),
            ]
            for prediction, reference, kind, age in questions
        ]
        if rows:
            self.rows.append(torch.tensor(rows, dtype=torch.int64, device=self.device))

    def compute(self) -> Values:
        """Accuracies from 0 to 1; ages with from <= age < to, in tokens.

        {"accuracy", "n", "kinds": {kind: {"accuracy", "n"}}, "ages": [{"from", "to", "accuracy",
        "n"}], "cells": [{"kind", "from", "to", "accuracy", "n"}]}. Only what was seen is listed;
        ages and cells leave out questions without evidence. Without any question the accuracy is
        None.
        """
        rows = self.gathered(3).numpy()
        aged = rows[rows[:, 1] >= 0]
        names = list(KINDS)
        cells = [
            {"kind": names[kind]} | _bounds(age) | _share(aged[(aged[:, :2] == [kind, age]).all(1)])
            for kind, age in np.unique(aged[:, :2], axis=0).tolist()
        ]
        kinds, ages = (np.unique(part).tolist() for part in (rows[:, 0], aged[:, 1]))
        return {
            **_share(rows),
            "kinds": {names[kind]: _share(rows[rows[:, 0] == kind]) for kind in kinds},
            "ages": [_bounds(age) | _share(aged[aged[:, 1] == age]) for age in ages],
            "cells": cells,
        }


def _share(rows: np.ndarray) -> dict[str, Any]:
    return {"accuracy": float(rows[:, 2].mean()) if len(rows) else None, "n": len(rows)}


def _bounds(number: int) -> dict[str, int]:
    return dict(zip(("from", "to"), class_bounds(number), strict=True))


def older_than(values: Values, age: int) -> dict[str, Any]:
    """{"accuracy", "n"} over the questions whose evidence is at least `age` tokens old.

    age: the first of a class, such as 4,096.
    """
    cells = [cell for cell in values["ages"] if cell["from"] >= age]
    count = sum(cell["n"] for cell in cells)
    return {"accuracy": mean(cells) if count else None, "n": count}


def table(methods: Mapping[str, Values]) -> Table:
    """A row each kind, then each age, then all; a column each method and one with the questions.

    Args:
        methods: name -> compute()'s values, at least one.
    """
    result = Table("")
    for name in (*methods, "questions"):
        result.add_column(name, justify="right")
    for kind in _seen(methods, "kinds", KINDS):
        shares = [values["kinds"].get(kind) for values in methods.values()]
        result.add_row(KINDS[kind], *_cells(shares))
    result.add_section()
    for age in _seen(methods, "ages"):
        shares = [_at(values, age) for values in methods.values()]
        result.add_row(f"evidence {_label(age)} tokens back", *_cells(shares))
    result.add_section()
    result.add_row("all", *_cells(list(methods.values())))
    return result


def curves(methods: Mapping[str, Values]) -> Figure:
    """Accuracy (y) against the age of the evidence (x, in classes), a line each method."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    ages = _seen(methods, "ages")
    for name, values in methods.items():
        points = [
            (place, cell["accuracy"])
            for place, age in enumerate(ages)
            if (cell := _at(values, age))
        ]
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=name)
    axes.set_xticks(range(len(ages)), [_label(age) for age in ages])
    axes.set_xlabel("age of the evidence: tokens back from the history's end")
    axes.set_ylabel("exact match")
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.set_title("Questions about a user's behaviour", fontsize=11, pad=10)
    return figure


def _seen(methods: Mapping[str, Values], part: str, order: Iterable[str] = ()) -> list[Any]:
    """Kinds in their order, or (from, to) of ages in ascending order, of all methods together."""
    if part == "kinds":
        return [kind for kind in order if any(kind in values[part] for values in methods.values())]
    cells = (cell for values in methods.values() for cell in values[part])
    return sorted({(cell["from"], cell["to"]) for cell in cells})


def _at(values: Values, age: tuple[int, int]) -> dict[str, Any] | None:
    return next((cell for cell in values["ages"] if cell["from"] == age[0]), None)


def _label(age: tuple[int, int]) -> str:
    return f"{short(age[0])}-{short(age[1])}"


def _cells(shares: Sequence[dict[str, Any] | None]) -> list[str]:
    """Accuracies, then the number of questions, which is the first method's."""
    shown = [
        "" if share is None or share["accuracy"] is None else f"{share['accuracy']:.1%}"
        for share in shares
    ]
    return [*shown, f"{shares[0]['n'] if shares[0] else 0:,}"]
