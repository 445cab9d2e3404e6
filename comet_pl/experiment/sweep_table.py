"""What the runs of a sweep found, side by side: a table on the screen, in Markdown and as CSV, and
a plot."""

import csv
import fnmatch
import io
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from comet_pl.errors import UserError, nearest
from comet_pl.files import as_png, numbers, replace_file
from comet_pl.progress import PLAIN

Found = tuple[dict[str, str], dict[str, float]]
"""(swept key -> value, metric -> number) of one run"""
Spread = tuple[float, float | None, int]
"""(mean, sample standard deviation or None for a single one, number of seeds)"""
SEED = "seed"
LINES = 12  # more are not told apart in a plot


def read_values(folder: Path) -> dict[str, float]:
    """What a finished run's folder says: the last of each val/ value in its TensorBoard events, and
    the numbers of each eval/<kind>.json."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    found = {
        tag: events.Scalars(tag)[-1].value
        for tag in sorted(events.Tags()["scalars"])
        if tag.startswith("val/")
    }
    for file in sorted(folder.glob("eval/*.json")):
        values = json.loads(file.read_text("utf-8"))
        found |= numbers(values, file.stem)
    return found


def group(found: Sequence[Found]) -> dict[tuple[tuple[str, str], ...], dict[str, Spread]]:
    """Runs that differ in the seed alone, together: {((key, value), ...): {metric: its spread}}, in
    the order in which they come."""
    groups: dict[tuple[tuple[str, str], ...], list[dict[str, float]]] = {}
    for point, values in found:
        groups.setdefault(
            tuple((name, text) for name, text in point.items() if name != SEED), []
        ).append(values)
    return {
        place: {
            metric: _spread([one[metric] for one in runs if metric in one])
            for metric in dict.fromkeys(m for one in runs for m in one)
        }
        for place, runs in groups.items()
    }


def _spread(values: list[float]) -> Spread:
    return (
        statistics.fmean(values),
        statistics.stdev(values) if len(values) > 1 else None,
        len(values),
    )


def choose(found: Sequence[Found], patterns: Sequence[str] | None) -> list[str]:
    """The metrics that the table shows, in the order of the patterns.

    Raises:
        UserError: a pattern that no metric matches.
    """
    known = list(dict.fromkeys(metric for _, values in found for metric in values))
    if patterns is None:
        return known
    chosen: dict[str, None] = {}
    for pattern in patterns:
        if not (matches := fnmatch.filter(known, pattern)):
            raise UserError(
                f"sweep.metrics: {pattern!r} given, but no metric is called "
                f"so{nearest(pattern, known)}: {', '.join(known)}"
            )
        chosen |= dict.fromkeys(matches)
    return list(chosen)


def write(
    path: Path, found: Sequence[Found], patterns: Sequence[str] | None, console: Console
) -> None:
    """Writes <path>.md, .csv and .png, each atomically, and prints the table.

    Args:
        found: at least one run. patterns: of the metrics to show; None: all. The csv always has
            all.

    Raises:
        UserError: a pattern that no metric matches; files that cannot be written.
    """
    replace_file(path.with_name(f"{path.name}.csv"), as_csv(found).encode(), "run.root")
    metrics, groups = choose(found, patterns), group(found)
    axes = [name for name in found[0][0] if name != SEED]
    rows = [
        [text for _, text in place] + [shown(values.get(metric)) for metric in metrics]
        for place, values in groups.items()
    ]
    counts = sorted({count for values in groups.values() for _, _, count in values.values()})
    seeds = (
        f"{counts[0]} seed{'s' * (counts[0] != 1)}"
        if len(counts) == 1
        else f"{counts[0]} to {counts[-1]} seeds"
        if counts
        else "no values"
    )
    caption = f"{seeds}; mean ± standard deviation" if counts and counts[-1] > 1 else seeds
    replace_file(
        path.with_name(f"{path.name}.md"),
        as_markdown([*axes, *metrics], rows, len(axes), caption).encode(),
        "run.root",
    )
    if metrics:
        replace_file(
            path.with_name(f"{path.name}.png"), as_png(plot(groups, metrics, caption)), "run.root"
        )
    table = Table(*axes)
    for metric in metrics:
        table.add_column(metric, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(f"\n{caption}", **PLAIN)
    console.print(table)
    console.print(f"written: {path}.md, .csv, .png", **PLAIN)


def shown(spread: Spread | None) -> str:
    """mean ± standard deviation, with as many digits as tell something."""
    if spread is None:
        return ""
    mean, deviation, _ = spread
    digits = 3 if abs(mean) < 10 else 1
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def in_a_line(values: dict[str, float]) -> str:
    return (
        ", ".join(f"{name} {shown((value, None, 1))}" for name, value in list(values.items())[:8])
        or "no values"
    )


def as_csv(found: Sequence[Found]) -> str:
    """One line a run: the swept keys, then every metric."""
    page, metrics = io.StringIO(), choose(found, None)
    lines = csv.writer(page, lineterminator="\n")
    lines.writerow([*found[0][0], *metrics])
    for point, values in found:
        lines.writerow([*point.values(), *(values.get(metric, "") for metric in metrics)])
    return page.getvalue()


def as_markdown(
    heads: Sequence[str], rows: Sequence[Sequence[str]], left: int, caption: str
) -> str:
    """A table whose first `left` columns are texts, and the line below it."""
    lines = [heads, [":--" if column < left else "--:" for column in range(len(heads))], *rows]
    return (
        "".join(
            f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n"
            for line in lines
        )
        + f"\n{caption}\n"
    )


def plot(
    groups: dict[tuple[tuple[str, str], ...], dict[str, Spread]],
    metrics: Sequence[str],
    caption: str,
) -> Figure:
    """Metrics that end in a number (passkey/512) as lines over it, the others as points, a panel
    each; bars are standard deviations."""
    curves: dict[str, list[str]] = {}
    singles = []
    for metric in metrics:
        name, _, end = metric.rpartition("/")
        curves.setdefault(name, []).append(metric) if end.isdigit() else singles.append(metric)
    labels = [
        ", ".join(f"{name.split('.')[-1]}={text}" for name, text in place) or "all"
        for place in groups
    ]
    count = len(curves) + len(singles)
    columns = min(count, 3)
    lines = math.ceil(count / columns)
    height = max(3.2, 1.4 + 0.24 * len(labels))
    legend = 0.25 * math.ceil(len(labels) / columns) if curves else 0
    figure = Figure(
        figsize=(5 * columns + 1, height * lines + legend), layout="constrained", dpi=100
    )
    panels: Iterator[Any] = iter(figure.subplots(lines, columns, squeeze=False).flat)
    for name, here in curves.items():
        axes = next(panels)
        for number, (label, values) in enumerate(zip(labels, groups.values(), strict=True)):
            marked = "o-" if number < LINES else "x:"
            cells = sorted(
                (int(metric.rpartition("/")[2]), values[metric])
                for metric in here
                if metric in values
            )
            axes.errorbar(
                [x for x, _ in cells],
                [y for _, (y, _, _) in cells],
                [s or 0 for _, (_, s, _) in cells],
                fmt=marked,
                label=label,
                capsize=3,
            )
        axes.set(title=name, xlabel="length in tokens" if name == "passkey" else "")
        ticks = sorted({int(metric.rpartition("/")[2]) for metric in here})
        if ticks[0] > 0:
            axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
    if curves:
        figure.legend(
            *figure.axes[0].get_legend_handles_labels(),
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            fontsize=8,
        )
    for metric in singles:
        axes = next(panels)
        places = [place for place, values in enumerate(groups.values()) if metric in values]
        spreads = [values[metric] for values in groups.values() if metric in values]
        errors = [deviation or 0 for _, deviation, _ in spreads]
        axes.errorbar([y for y, _, _ in spreads], places, xerr=errors, fmt="o", capsize=3)
        axes.set(title=metric, ylim=(len(labels) - 0.5, -0.5))
        axes.set_yticks(range(len(labels)), labels, fontsize=7)
    for axes in panels:
        axes.set_visible(False)
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    figure.suptitle(caption, fontsize=9)
    return figure
