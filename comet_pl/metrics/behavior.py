"""Accuracy on questions about a user's behaviour, by kind of question and by age of the evidence; table and picture of several methods.

The age is counted in tokens back, from the end of the history to the beginning of the oldest event that the answer needs. For a count, a
most frequent item or a total these are all the events that it is made of.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor
from torchmetrics import Metric

from comet_pl.metrics.passkey import short
from data.behavior.questions import KINDS, age_class, class_bounds

Values = dict[str, Any]
"""What BehaviorAccuracy.compute gives."""


def normalise(answer: str) -> str:
    """Lower case, without surplus spaces and a full stop at the end: answers have one canonical form beyond that."""
    return " ".join(answer.lower().split()).rstrip(".").rstrip()


def exact_match(prediction: str, reference: str) -> bool:
    return normalise(prediction) == normalise(reference)


class BehaviorAccuracy(Metric):
    """Share of right answers; see `compute`."""

    full_state_update = False
    rows: list[Tensor]

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(
        self,
        predictions: Sequence[str],
        references: Sequence[str],
        kinds: Sequence[str],
        ages: Sequence[int | None],
    ) -> None:
        """One of each for every question; the age is None where no event is evidence (next_item).

        Raises:
            KeyError: a kind that is none of KINDS.
        """
        numbers = {kind: number for number, kind in enumerate(KINDS)}
        found = [
            [
                numbers[kind],
                -1 if age is None else int(age_class(age)),
                exact_match(prediction, reference),
            ]
            for prediction, reference, kind, age in zip(
                predictions, references, kinds, ages, strict=True
            )
        ]
        if found:
            self.rows.append(torch.tensor(found, dtype=torch.int64, device=self.device))

    def compute(self) -> Values:
        """{"accuracy", "n", "kinds": {kind: {"accuracy", "n"}}, "ages": [{"from", "to", "accuracy", "n"}], "cells": [{"kind", "from", "to",
        "accuracy", "n"}]}: accuracies from 0 to 1, from <= age < to in tokens. Only what was seen is listed, ages and cells leave out
        questions without evidence, and without any question the accuracy is None."""
        rows = (
            self.rows
            if isinstance(self.rows, Tensor)
            else torch.cat([torch.zeros(0, 3, dtype=torch.int64), *map(Tensor.cpu, self.rows)])
        )
        table = rows.cpu().numpy()
        names = list(KINDS)
        aged = table[table[:, 1] >= 0]
        cells = []
        for kind, age in np.unique(aged[:, :2], axis=0).tolist():
            cells.append(
                {
                    "kind": names[kind],
                    **_bounds(age),
                    **_share(aged[(aged[:, :2] == [kind, age]).all(1)]),
                }
            )
        return {
            **_share(table),
            "kinds": {
                names[kind]: _share(table[table[:, 0] == kind])
                for kind in np.unique(table[:, 0]).tolist()
            },
            "ages": [
                {**_bounds(age), **_share(aged[aged[:, 1] == age])}
                for age in np.unique(aged[:, 1]).tolist()
            ],
            "cells": cells,
        }


def _share(rows: np.ndarray) -> dict[str, Any]:
    return {"accuracy": float(rows[:, 2].mean()) if len(rows) else None, "n": len(rows)}


def _bounds(number: int) -> dict[str, int]:
    return dict(zip(("from", "to"), class_bounds(number), strict=True))


def older_than(values: Values, age: int) -> dict[str, Any]:
    """{"accuracy", "n"} over all questions whose evidence is at least `age` tokens old; `age` has to be a class's first, such as 4,096."""
    here = [cell for cell in values["ages"] if cell["from"] >= age]
    total = sum(cell["n"] for cell in here)
    return {
        "accuracy": sum(cell["accuracy"] * cell["n"] for cell in here) / total if total else None,
        "n": total,
    }


def table(methods: Mapping[str, Values]) -> Table:
    """A row each kind, then each age, then all; a column each method and, last, how many questions there are (of the first method).

    Args:
        methods: name -> compute()'s values, at least one.
    """
    found = Table("")
    for name in methods:
        found.add_column(name, justify="right")
    found.add_column("questions", justify="right")
    first, *_ = methods.values()
    for kind in _seen(methods, "kinds", KINDS):
        found.add_row(
            KINDS[kind],
            *_cells(
                [values["kinds"].get(kind) for values in methods.values()], first["kinds"].get(kind)
            ),
        )
    found.add_section()
    for age in _seen(methods, "ages"):
        cells = [_at(values, age) for values in methods.values()]
        found.add_row(f"evidence {_label(age)} tokens back", *_cells(cells, cells[0]))
    found.add_section()
    found.add_row("all", *_cells(list(methods.values()), first))
    return found


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
    return sorted(
        {(cell["from"], cell["to"]) for values in methods.values() for cell in values[part]}
    )


def _at(values: Values, age: tuple[int, int]) -> dict[str, Any] | None:
    return next((cell for cell in values["ages"] if cell["from"] == age[0]), None)


def _label(age: tuple[int, int]) -> str:
    return f"{short(age[0])}-{short(age[1])}"


def _cells(shares: Sequence[dict[str, Any] | None], counted: dict[str, Any] | None) -> list[str]:
    shown = [
        "" if share is None or share["accuracy"] is None else f"{share['accuracy']:.1%}"
        for share in shares
    ]
    return [*shown, f"{counted['n'] if counted else 0:,}"]
