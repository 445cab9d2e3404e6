"""Several seeds of conf=user_behavior: mean, least and greatest accuracy by age and by kind."""

import json

from benchmarks.shared import report
from benchmarks.shared.options import Options
from benchmarks.shared.report import short
from comet_pl.errors import UserError, run_cli
from comet_pl.metrics.behavior import older_than
from data.behavior.questions import KINDS

FILE = "eval/user_behavior.json"


def load(run):
    """{method: its values, "ceilings": those of readers without mistakes}. Raises UserError."""
    file = run / FILE
    try:
        values = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; python eval.py ckpt={run} writes it") from None
    except ValueError as error:
        raise UserError(f"{file}: not JSON: {error}") from None
    if not isinstance(values, dict) or not isinstance(values.get("ceilings"), dict):
        raise UserError(f"{file}: no results of an evaluation of user_behavior")
    return values


def spread(values):
    """{"mean", "least", "most", "n"} of several runs' {"accuracy", "n"}; "n" is the sum."""
    known = [one for one in values if one and one["accuracy"] is not None]
    shares = [one["accuracy"] for one in known]
    if not shares:
        return {"mean": None, "least": None, "most": None, "n": 0}
    limits = {"mean": sum(shares) / len(shares), "least": min(shares), "most": max(shares)}
    return limits | {"n": sum(one["n"] for one in known)}


def combine(runs, older):
    """{method: {"all", "old", "kinds": {kind: ...}, "ages": {"from": ...}}}, each a `spread`; a
    ceiling is a method of its own."""
    names = [name for name in runs[0] if name != "ceilings"]
    methods = {name: [run[name] for run in runs] for name in names}
    for name in names:
        if name != "CoMeT":
            methods[f"{name}, no mistakes"] = [run["ceilings"][name] for run in runs]
    combined = {}
    for name, values in methods.items():
        kinds = [kind for kind in KINDS if any(kind in one["kinds"] for one in values)]
        cells = [cell for one in values for cell in one["ages"]]
        ages = sorted({cell["from"] for cell in cells})
        combined[name] = {
            "all": spread(values),
            "old": spread([older_than(one, older) for one in values]),
            "kinds": {kind: spread([one["kinds"].get(kind) for one in values]) for kind in kinds},
            "ages": {age: spread([c for c in cells if c["from"] == age]) for age in ages},
        }
    return combined


def plot(result):
    """Accuracy against the age of the evidence: the runs' mean as a line, their range as a band."""
    methods, (figure, axes) = result["methods"], report.panels(1, (7, 4))
    ages = sorted({age for one in methods.values() for age in one["ages"]})
    for name, one in methods.items():
        cells = [(x, one["ages"].get(age)) for x, age in enumerate(ages)]
        known = [(x, cell) for x, cell in cells if cell and cell["mean"] is not None]
        places, (mean, least, most) = (
            [x for x, _ in known],
            ([cell[key] for _, cell in known] for key in ("mean", "least", "most")),
        )
        style = "--" if name.endswith("no mistakes") else "-"
        (line,) = axes.plot(places, mean, style, marker="o", label=name)
        axes.fill_between(places, least, most, color=line.get_color(), alpha=0.15, linewidth=0)
    labels = [f"{short(age)}-{short(max(1024, 2 * age))}" for age in ages]
    axes.set_xticks(range(len(ages)), labels)
    label = "age of the evidence: tokens back from the history's end"
    axes.set(xlabel=label, ylabel="exact match", ylim=(-0.03, 1.03))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.legend(frameon=False, fontsize=8)
    return figure


def section(result):
    methods = result["methods"]
    first = next(iter(methods.values()))
    lines = {KINDS[kind]: lambda one, kind=kind: one["kinds"].get(kind) for kind in first["kinds"]}
    for age in first["ages"]:
        label = f"evidence {short(age)} tokens back or more"
        lines[label] = lambda one, age=age: one["ages"].get(age)
    lines[f"all with evidence older than {short(result['older'])}"] = lambda one: one["old"]
    lines["all"] = lambda one: one["all"]
    rows = []
    for label, cell in lines.items():
        cells = [cell(one) or {"mean": None, "n": 0} for one in methods.values()]
        texts = [
            "" if c["mean"] is None else f"{c['mean']:.1%} ({c['least']:.0%} to {c['most']:.0%})"
            for c in cells
        ]
        rows.append((label, *texts, f"{cells[0]['n']:,}"))
    yield from report.table(("", *methods, "questions"), rows)


def main(argv):
    options = Options("behavior", __doc__).settle(argv)
    runs = [load(run) for run in options.runs]
    if len({tuple(run) for run in runs}) > 1:
        other = f"those of {options.runs[0]}; the runs need the same eval.budget"
        raise UserError(f"{options.runs[-1]}: its methods are not {other}")
    result = {
        "runs": [run.name for run in options.runs],
        "older": options.older,
        "methods": combine(runs, options.older),
    }
    report.publish(options, ["behavior"], result, section, plot=plot)


if __name__ == "__main__":
    run_cli(main)
