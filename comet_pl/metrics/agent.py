"""How well a model takes an agent's next turn, judged by the trace and without an environment.

A turn is scored by perplexity (teacher-forced), by F1 over its words, and, where the trace calls a
tool, by the call (data/tool_calls.py): the tool's name, and name and arguments together. All scores
are given by turn distance (data/agent_traces.py) and by the turn's number. Shares are from 0 to 1.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.figure import Figure

from comet_pl.metrics.rows import RowMetric
from comet_pl.metrics.scrolls import f1
from data.tool_calls import parse_action

BUCKETS = {"0-1": 0, "2-3": 2, "4-7": 4, "8-15": 8, "16+": 16}
"""Name -> least value; a bucket ends where the next begins."""
NOWHERE = "none"  # the bucket of turns that need no argument from before


def same_json(one: Any, other: Any) -> bool:
    """Equal as JSON: the order of keys, and 1 or 1.0, make no difference; true is not 1."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_json(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_json, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def judge(prediction: str, reference: str) -> tuple[float, bool, bool, bool]:
    """(F1 of the words, the reference calls a tool, it is the right tool, with its arguments)."""
    wanted, given = parse_action(reference), parse_action(prediction)
    if wanted is None or given is None or wanted[0] != given[0]:
        return f1(prediction, reference), wanted is not None, False, False
    return f1(prediction, reference), True, True, same_json(wanted[1], given[1])


def bucket(value: float) -> str:
    """The name of a value's bucket; NaN: NOWHERE."""
    if math.isnan(value):
        return NOWHERE
    return [name for name, least in BUCKETS.items() if least <= value][-1]


class AgentScore(RowMetric):
    """Scores of assistant turns, by turn distance and by turn.

    compute() gives {"all": scores, "by_distance": {bucket: scores}, "by_turn": {bucket: scores}},
    JSON-able, without empty buckets. scores: {"turns", "tokens", "perplexity", "answered", "f1",
    "calls", "name", "action"}. turns were read, answered of them were predicted, and calls of these
    call a tool in the trace. f1 is over answered, name and action over calls; None where there is
    nothing to divide by, or a loss is not finite.

    A row: distance (NaN: none), turn, loss, tokens, answered, f1, calls, name, action.
    """

    def update(
        self,
        distance: int | None,
        turn: int,
        loss: float,
        tokens: int,
        reference: str = "",
        prediction: str | None = None,
    ) -> None:
        """One assistant turn.

        Args:
            distance: see data/agent_traces.py; None: it needs nothing from before.
            turn: its number among the assistant's, from 1.
            loss: summed over its tokens, the stop token included, in nats.
            tokens: how many.
            reference: its text.
            prediction: what was generated instead; None: only the loss counts.
        """
        known = torch.nan if distance is None else distance
        judged = (0.0, False, False, False) if prediction is None else judge(prediction, reference)
        row = [known, turn, loss, tokens, prediction is not None, *judged]
        self.rows.append(torch.tensor([row], dtype=torch.float64, device=self.device))

    def compute(self) -> dict[str, Any]:
        rows = self.gathered(9).tolist()
        grouped = {"by_distance": _grouped(rows, 0), "by_turn": _grouped(rows, 1)}
        return {"all": _scores(rows), **grouped}


def _grouped(rows: Sequence[Sequence[float]], column: int) -> dict[str, Any]:
    names = [bucket(row[column]) for row in rows]
    return {
        name: _scores([row for row, its in zip(rows, names, strict=True) if its == name])
        for name in [*BUCKETS, NOWHERE]
        if name in names
    }


def _scores(rows: Sequence[Sequence[float]]) -> dict[str, float | int | None]:
    sums = map(_sum, zip(*rows, strict=True)) if rows else [0.0] * 9
    _, _, loss, tokens, answered, score, calls, name, action = sums
    return {
        "turns": len(rows),
        "tokens": int(tokens),
        "perplexity": _perplexity(loss, tokens),
        "answered": int(answered),
        "f1": score / answered if answered else None,
        "calls": int(calls),
        "name": name / calls if calls else None,
        "action": action / calls if calls else None,
    }


def _sum(values: Sequence[float]) -> float:
    """A sum that does not depend on the order of the ranks' rows."""
    return math.fsum(values) if all(map(math.isfinite, values)) else math.nan


def _perplexity(loss: float, tokens: float) -> float | None:
    try:
        value = math.exp(loss / tokens)
    except (OverflowError, ZeroDivisionError):
        return None
    return value if math.isfinite(value) else None


LINES = {"name": "tool", "action": "tool and arguments", "f1": "F1 of the words"}


def by_distance(values: dict[str, Any]) -> Figure:
    """Shares on the left, perplexity on the right, by turn distance.

    Args:
        values: AgentScore's, of at least one turn.
    """
    buckets = values["by_distance"]
    figure = Figure(figsize=(9, 3.6), layout="constrained", dpi=120)
    shares, perplexity = figure.subplots(1, 2)
    places = range(len(buckets))

    def heights_of(key: str) -> list[float]:
        return [torch.nan if scores[key] is None else scores[key] for scores in buckets.values()]

    for key, name in LINES.items():
        shares.plot(places, heights_of(key), marker="o", label=name)
    shares.set_ylim(-0.03, 1.03)
    shares.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    shares.legend(frameon=False, fontsize=9)
    heights = heights_of("perplexity")
    perplexity.plot(places, heights, marker="o", color="black")
    highest = max((height for height in heights if not math.isnan(height)), default=0)
    if highest > 10 * min(heights, default=1):
        perplexity.set_yscale("log")
    panels = ((shares, "next action", "calls"), (perplexity, "perplexity", "turns"))
    for axes, title, count in panels:
        axes.set_xticks(places, [f"{name}\n{scores[count]}" for name, scores in buckets.items()])
        axes.set_xlabel(f"turns since the needed argument, {count} below")
        axes.set_title(title, fontsize=11)
        axes.grid(axis="y", alpha=0.3)
    return figure
