"""Scores of an agent's next turn: equality as JSON, perplexity, the buckets of turn distance."""

import json
import math

import pytest
import torch
from hypothesis import given
from matplotlib.figure import Figure
from torchmetrics.text import SQuAD

from comet_pl.metrics.agent import (
    BUCKETS,
    NOWHERE,
    AgentScore,
    bucket,
    by_distance,
    judge,
    same_json,
)
from comet_pl.metrics.scrolls import f1
from data.tool_calls import action_text
from tests.support.json_values import JSON


@given(JSON)
def test_json_is_equal_to_itself_in_any_order_and_notation(value):
    def turned(value):
        if isinstance(value, dict):
            return {key: turned(value[key]) for key in reversed(value)}
        if isinstance(value, list):
            return [turned(one) for one in value]
        return float(value) if type(value) is int else value

    assert same_json(value, json.loads(json.dumps(turned(value))))
    assert not same_json(value, [value])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (True, 1),
        (0, False),
        ([1, 2], [2, 1]),
        ({"a": 1}, {"a": 1, "b": None}),
        ("1", 1),
        (None, False),
        ({}, []),
    ],
)
def test_json_that_differs(one, other):
    assert not same_json(one, other)
    assert not same_json(other, one)
    assert not same_json({"x": [one]}, {"x": [other]})


def test_buckets():
    names = [bucket(value) for value in (0, 1, 2, 3, 4, 7, 8, 15, 16, 1000, math.nan)]
    assert names == [*(name for name in BUCKETS for _ in range(2)), NOWHERE]


CALL = action_text("find", {"order": "W123", "count": 2})


@pytest.mark.parametrize(
    ("prediction", "reference", "judged"),
    [
        (action_text("find", {"count": 2.0, "order": "W123"}), CALL, (True, True, True)),
        (action_text("find", {"order": "W124", "count": 2}), CALL, (True, True, False)),
        (action_text("seek", {"order": "W123", "count": 2}), CALL, (True, False, False)),
        ("The order, please?", CALL, (True, False, False)),
        (CALL, "It was sent.", (False, False, False)),
        ("It was sent.", "It was sent.", (False, False, False)),
    ],
)
def test_a_turn_is_judged(prediction, reference, judged):
    assert judge(prediction, reference) == (f1(prediction, reference), *judged)


UPDATES = [
    # distance, turn, loss, tokens, reference, prediction
    (1, 1, 2.0, 4, CALL, action_text("find", {"count": 2.0, "order": "W123"})),
    (1, 2, 4.0, 4, CALL, action_text("find", {"order": "W124", "count": 2})),
    (9, 3, 3.0, 2, CALL, "The order, please?"),
    (20, 17, 1.0, 1, CALL, action_text("seek", {"order": "W123", "count": 2})),
    (None, 4, 6.0, 12, "It was sent on Monday.", "it was sent!"),
    (None, 5, 6.0, 3, "Good bye.", None),
]


def scored(updates=UPDATES):
    metric = AgentScore()
    for update in updates:
        metric.update(*update)
    return metric.compute()


def test_scores_by_hand():
    found = scored()
    near = found["by_distance"]["0-1"]
    expected = {"turns": 2, "tokens": 8, "answered": 2, "calls": 2, "name": 1.0, "action": 0.5}
    assert near == {**expected, "perplexity": pytest.approx(math.exp(6 / 8)), "f1": near["f1"]}
    assert list(found["by_distance"]) == ["0-1", "8-15", "16+", NOWHERE]
    names = [found["by_distance"][name]["name"] for name in ("8-15", "16+", NOWHERE)]
    assert names == [0.0, 0.0, None]
    assert found["by_distance"][NOWHERE]["f1"] == pytest.approx(2 * 3 / (3 + 5))
    assert found["by_distance"][NOWHERE]["perplexity"] == pytest.approx(math.exp(12 / 15))
    turns = {name: scores["turns"] for name, scores in found["by_turn"].items()}
    assert turns == {"0-1": 1, "2-3": 2, "4-7": 2, "16+": 1}
    total = found["all"]
    assert (total["turns"], total["answered"], total["calls"], total["tokens"]) == (6, 5, 4, 26)
    assert (total["name"], total["action"]) == (0.5, 0.25)
    assert total["perplexity"] == pytest.approx(math.exp(22 / 26))
    assert json.loads(json.dumps(found)) == found


def test_f1_is_squads():
    squad = SQuAD()
    for number, (*_, reference, prediction) in enumerate(
        update for update in UPDATES if update[-1] is not None
    ):
        squad.update(
            [{"prediction_text": prediction, "id": str(number)}],
            [{"answers": {"answer_start": [0], "text": [reference]}, "id": str(number)}],
        )
    assert 100 * scored()["all"]["f1"] == pytest.approx(float(squad.compute()["f1"]))


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric AgentScore was called before")
def test_nothing_and_nothing_finite():
    assert AgentScore().compute() == {
        "all": {
            **dict.fromkeys(("turns", "tokens", "answered", "calls"), 0),
            **dict.fromkeys(("perplexity", "f1", "name", "action")),
        },
        "by_distance": {},
        "by_turn": {},
    }
    for loss in (math.nan, math.inf, 1e9):
        assert scored([(1, 1, loss, 1)])["all"]["perplexity"] is None


def test_parts_add_up():
    whole, parts = AgentScore(), [AgentScore(), AgentScore()]
    for number, update in enumerate(UPDATES):
        whole.update(*update)
        parts[number % 2].update(*update)
    parts[0].rows = torch.cat(
        [row for part in parts for row in part.rows]
    )  # as gathered from two ranks
    assert parts[0].compute() == whole.compute()


def test_the_figure():
    figure = by_distance(scored())
    assert isinstance(figure, Figure)
    shares, perplexity = figure.axes
    labels = [text.get_text() for text in shares.get_xticklabels()]
    assert labels == ["0-1\n2", "8-15\n1", "16+\n1", "none\n0"]
    action = next(line for line in shares.lines if line.get_label() == "tool and arguments")
    assert action.get_ydata() == pytest.approx([0.5, 0, 0, math.nan], nan_ok=True)
    assert perplexity.lines[0].get_ydata() == pytest.approx(
        [math.exp(6 / 8), math.exp(1.5), math.e, math.exp(12 / 15)]
    )
    figure.canvas.draw()


def test_the_figure_of_turns_that_were_not_predicted():
    by_distance(scored([(1, 1, math.nan, 1), (3, 1, 1.0, 1)])).canvas.draw()


def test_real_calls(shared_data):
    from data.messages import check_messages

    metric, calls = AgentScore(), 0
    for path in sorted((shared_data / "agent").glob("*.jsonl")):
        for line in path.read_text().splitlines()[:10]:
            for number, message in enumerate(check_messages(json.loads(line))):
                if message.role == "assistant":
                    calls += bool(message.calls)
                    metric.update(number, number, 1.0, 1, message.text, message.text)
    scores = metric.compute()
    assert scores["all"]["calls"] == calls > 50
    assert (scores["all"]["name"], scores["all"]["action"], scores["all"]["f1"]) == (1, 1, 1)
    assert list(scores["by_distance"]) == list(BUCKETS)
