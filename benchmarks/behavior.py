"""Runs of conf=user_behavior with several seeds side by side: mean, least and greatest accuracy by age of the evidence and by kind.

    for seed in 0 1 2; do python train.py conf=user_behavior data.root=LOG seed=$seed run.name=seed-$seed; done
    python benchmarks/behavior.py runs/user_behavior/seed-*

Reads what the runs' evaluations have written (eval/user_behavior.json). Results: benchmarks/results/behavior.json and .png.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import report
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from comet_pl.errors import Parser, UserError, run_cli
from comet_pl.metrics.behavior import older_than
from data.behavior.questions import KINDS

HERE = Path(__file__).resolve().parent
FILE = "eval/user_behavior.json"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="folders of runs that have been evaluated"
    )
    parser.add_argument(
        "--older",
        type=int,
        default=4096,
        metavar="TOKENS",
        help="old evidence: 1024, 2048, 4096, ... (default: 4096)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=HERE / "results",
        metavar="DIR",
        help="default: benchmarks/results",
    )
    return parser.parse_args(argv)


def read(run: Path) -> dict[str, Any]:
    """What a run's evaluation found: {method: BehaviorAccuracy's values, "ceilings": the same of readers without mistakes}.

    Raises:
        UserError: there is no such file, or it is not one.
    """
    try:
        found = json.loads((run / FILE).read_text("utf-8"))
    except OSError as error:
        raise UserError(
            f"{run / FILE}: {error.strerror}; python eval.py ckpt={run} writes it"
        ) from None
    except ValueError as error:
        raise UserError(f"{run / FILE}: not JSON: {error}") from None
    if not isinstance(found, dict) or not isinstance(found.get("ceilings"), dict):
        raise UserError(f"{run / FILE}: no results of an evaluation of user_behavior")
    return found


def spread(values: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    """{"mean", "least", "most", "n"} of {"accuracy", "n"} of several runs, each run alike; "n" is the sum."""
    known = [one for one in values if one and one["accuracy"] is not None]
    shares = [one["accuracy"] for one in known]
    if not shares:
        return {"mean": None, "least": None, "most": None, "n": 0}
    return {
        "mean": sum(shares) / len(shares),
        "least": min(shares),
        "most": max(shares),
        "n": sum(one["n"] for one in known),
    }


def combine(runs: Sequence[dict[str, Any]], older: int) -> dict[str, Any]:
    """{method: {"all", "old", "kinds": {kind: ...}, "ages": {"from": ...}}} with a `spread` each, ceilings as methods of their own."""
    methods: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {}
    for name in runs[0]:
        if name != "ceilings":
            methods[name] = lambda run, name=name: run[name]
    for name in [name for name in methods if name != "CoMeT"]:
        methods[f"{name}, no mistakes"] = lambda run, name=name: run["ceilings"][name]
    combined = {}
    for name, of in methods.items():
        values = [of(run) for run in runs]
        kinds = [kind for kind in KINDS if any(kind in one["kinds"] for one in values)]
        ages = sorted({cell["from"] for one in values for cell in one["ages"]})
        combined[name] = {
            "all": spread(values),
            "old": spread([older_than(one, older) for one in values]),
            "kinds": {kind: spread([one["kinds"].get(kind) for one in values]) for kind in kinds},
            "ages": {
                age: spread([cell for one in values for cell in one["ages"] if cell["from"] == age])
                for age in ages
            },
        }
    return combined


def plot(found: dict[str, Any], runs: int) -> Figure:
    """Accuracy against the age of the evidence: the mean of the runs as a line, from the least to the greatest as a band."""
    figure = Figure(figsize=(7, 4), layout="constrained", dpi=100)
    axes = figure.subplots()
    ages = sorted({age for one in found.values() for age in one["ages"]})
    for name, one in found.items():
        cells = [
            (place, one["ages"][age])
            for place, age in enumerate(ages)
            if one["ages"].get(age, {"mean": None})["mean"] is not None
        ]
        x = [place for place, _ in cells]
        style = "--" if name.endswith("no mistakes") else "-"
        (line,) = axes.plot(x, [cell["mean"] for _, cell in cells], style, marker="o", label=name)
        axes.fill_between(
            x,
            [cell["least"] for _, cell in cells],
            [cell["most"] for _, cell in cells],
            color=line.get_color(),
            alpha=0.15,
            linewidth=0,
        )
    axes.set_xticks(
        range(len(ages)),
        [f"{report.short(age)}-{report.short(max(1024, 2 * age))}" for age in ages],
    )
    axes.set(
        xlabel="age of the evidence: tokens back from the history's end",
        ylabel="exact match",
        ylim=(-0.03, 1.03),
    )
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    axes.set_title(
        f"Questions about users' behaviour, {runs} seed{'s' * (runs != 1)}: mean and range",
        fontsize=11,
    )
    return figure


def table(found: dict[str, Any], older: int) -> Table:
    shown = Table("")
    for name in found:
        shown.add_column(name, justify="right")
    shown.add_column("questions", justify="right")
    first = next(iter(found.values()))
    lines: list[tuple[str, Callable[[dict[str, Any]], dict[str, Any] | None]]] = [
        *[(KINDS[kind], lambda one, kind=kind: one["kinds"].get(kind)) for kind in first["kinds"]],
        *[
            (
                f"evidence {report.short(age)} tokens back or more",
                lambda one, age=age: one["ages"].get(age),
            )
            for age in first["ages"]
        ],
        (f"all with evidence older than {report.short(older)}", lambda one: one["old"]),
        ("all", lambda one: one["all"]),
    ]
    for label, of in lines:
        cells = [of(one) or {"mean": None, "n": 0} for one in found.values()]
        texts = [
            "" if c["mean"] is None else f"{c['mean']:.1%} ({c['least']:.0%} to {c['most']:.0%})"
            for c in cells
        ]
        shown.add_row(label, *texts, f"{cells[0]['n']:,}")
    return shown


def main(argv: list[str]) -> None:
    options = parse(argv)
    runs = [read(run) for run in options.runs]
    if len({tuple(run) for run in runs}) > 1:
        raise UserError(
            f"{options.runs[-1]}: its methods are not those of {options.runs[0]}; the runs need the same eval.budget"
        )
    found = combine(runs, options.older)
    report.make_folder(options.out)
    result = {
        "runs": [run.name for run in options.runs],
        "older": options.older,
        "methods": found,
        "machine": report.machine("cpu"),
    }
    report.write_json(options.out / "behavior.json", result)
    report.write(
        options.out / "behavior.png",
        lambda file: plot(found, len(runs)).savefig(file, format="png"),
    )
    Console().print(table(found, options.older))


if __name__ == "__main__":
    run_cli(main)
