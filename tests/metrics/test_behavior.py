"""Accuracy by kind and age of the evidence, its table and its picture."""

import io
import json

import pytest
import torch
from rich.console import Console

from comet_pl.metrics.behavior import BehaviorAccuracy, curves, exact_match, older_than, table
from data.behavior.questions import KINDS, age_class, class_bounds

ASKED = [  # prediction, reference, kind, age, right
    (" 21495. ", "21495", "followed", 10, True),
    ("21496", "21495", "followed", 1023, False),
    ("YES", "yes", "bought_after", 1024, True),
    ("2011-01-02", "2011-01-02", "last_time", 5000, True),
    ("2011-01-03", "2011-01-02", "last_time", 8191, False),
    ("2011-01-03", "2011-01-02", "last_time", 8192, False),
    ("85123A", "85123a", "next_item", None, True),
]


def metric(asked: list = ASKED) -> BehaviorAccuracy:
    found = BehaviorAccuracy()
    columns = [list(column) for column in zip(*asked, strict=True)] or [[]] * 5
    found.update(*columns[:4])
    return found


def test_age_classes_double_from_1k():
    ages = [0, 1, 1023, 1024, 2047, 2048, 4095, 4096, 8191, 8192, 10**6]
    assert age_class(ages).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 10]
    for age in ages:
        low, high = class_bounds(int(age_class(age)))
        assert low <= age < high
    assert [class_bounds(number) for number in range(4)] == [
        (0, 1024),
        (1024, 2048),
        (2048, 4096),
        (4096, 8192),
    ]


def test_exact_match_forgives_spelling_and_nothing_else():
    assert exact_match("Yes.\n", "yes")
    assert exact_match("  85123A", "85123a")
    assert not exact_match("3.5", "3.50")
    assert not exact_match("the 3", "3")
    assert not exact_match("", "no")


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_accuracy_by_kind_and_age():
    values = metric().compute()
    assert json.loads(json.dumps(values)) == values
    assert (values["accuracy"], values["n"]) == (pytest.approx(4 / 7), 7)
    assert values["kinds"] == {
        "last_time": {"accuracy": pytest.approx(1 / 3), "n": 3},
        "bought_after": {"accuracy": 1.0, "n": 1},
        "followed": {"accuracy": 0.5, "n": 2},
        "next_item": {"accuracy": 1.0, "n": 1},
    }
    assert values["ages"] == [
        {"from": 0, "to": 1024, "accuracy": 0.5, "n": 2},
        {"from": 1024, "to": 2048, "accuracy": 1.0, "n": 1},
        {"from": 4096, "to": 8192, "accuracy": 0.5, "n": 2},
        {"from": 8192, "to": 16384, "accuracy": 0.0, "n": 1},
    ]
    assert {"kind": "last_time", "from": 4096, "to": 8192, "accuracy": 0.5, "n": 2} in values[
        "cells"
    ]
    assert sum(cell["n"] for cell in values["cells"]) == 6, "a prediction has no age"
    assert older_than(values, 4096) == {"accuracy": pytest.approx(1 / 3), "n": 3}
    assert older_than(values, 2**20) == {"accuracy": None, "n": 0}
    assert BehaviorAccuracy().compute() == {
        "accuracy": None,
        "n": 0,
        "kinds": {},
        "ages": [],
        "cells": [],
    }
    in_parts = metric(ASKED[:3])
    in_parts.update(*[list(column) for column in zip(*ASKED[3:], strict=True)][:4])
    assert in_parts.compute() == values
    in_parts.rows = torch.cat(in_parts.rows)  # as it stands after gathering from several ranks
    in_parts._computed = None
    assert in_parts.compute() == values


def test_table_and_picture_compare_methods():
    methods = {"CoMeT": metric().compute(), "last 4k": metric(ASKED[:3]).compute()}
    console = Console(width=120, file=io.StringIO())
    console.print(table(methods))
    lines = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in console.file.getvalue().splitlines()
        if "│" in line
    ]
    rows = {line[0]: line[1:] for line in lines}
    assert rows[KINDS["last_time"]] == ["33.3%", "", "3"]
    assert rows["evidence 0-1k tokens back"] == ["50.0%", "50.0%", "2"]
    assert rows["evidence 4k-8k tokens back"] == ["50.0%", "", "2"]
    assert rows["all"] == ["57.1%", "66.7%", "7"]
    axes = curves(methods).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        "0-1k",
        "1k-2k",
        "4k-8k",
        "8k-16k",
    ]
    drawn = {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines
    }
    assert drawn == {"CoMeT": ([0, 1, 2, 3], [0.5, 1.0, 0.5, 0.0]), "last 4k": ([0, 1], [0.5, 1.0])}
