"""What the pipeline benchmark found: as pictures, as tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import report
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

COLOURS = {
    "layer_level": "tab:blue",
    "interleaved": "tab:green",
    "chunk_level": "tab:red",
    "layer_stages": "tab:purple",
}
CLOCKS = {"wall": "wall time", "processor": "processor time along the longest chain"}
NAMES = {"alone": "one process", "at_the_same_time": "two, each its own"}
PARTS = {
    "computing": "tab:blue",
    "waiting for a neighbour that computes": "lightgrey",
    "communication": "tab:orange",
}


def parts(rank: dict[str, float]) -> dict[str, float]:
    """Where a rank's time went, in seconds; their sum is the step as the rank saw it."""
    idle, communication = (
        rank["neighbour"],
        sum(rank[name] for name in ("transfer", "sending", "flushing")),
    )
    return dict(
        zip(PARTS, (rank["seconds"] - idle - communication, idle, communication), strict=True)
    )


def piped(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The arrangements that are pipelines."""
    return [row for row in result["arrangements"] if "ranks" in row]


# ---- pictures


def write_plots(folder: Path, name: str, result: dict[str, Any]) -> None:
    with matplotlib.rc_context({"font.size": 10}):
        charts = {name: plot(result), f"{name}-simulated": plot_simulated(result)}
    for file, chart in charts.items():
        report.write(
            folder / f"{file}.png", lambda path, chart=chart: chart.savefig(path, format="png")
        )


def plot(result: dict[str, Any]) -> Figure:
    """Speed-ups, where each rank's time went, memory against P."""
    figure = Figure(figsize=(13, 4), layout="constrained", dpi=100)
    speed, time, memory = figure.subplots(1, 3)
    clock, rows = result["clock"], piped(result)
    verdict = result["verdict"][clock]
    for x, row in enumerate(rows):
        speed.bar(x, row[clock]["step_speedup"], color=COLOURS[row["what"]], width=0.6)
        speed.plot(
            [x - 0.4, x + 0.4],
            [row["predicted"]] * 2,
            color="black",
            label="simulated, ideal machine" if not x else None,
        )
    speed.axhline(
        verdict["ceiling"], color="grey", linestyle=":", label="ceiling: two independent processes"
    )
    at = [row["what"] for row in rows].index("layer_level")
    speed.plot(
        [at - 0.4, at + 0.4],
        [verdict["bound"]] * 2,
        color="black",
        linestyle="--",
        label="what layer_level has to reach",
    )
    speed.set_xticks(range(len(rows)), [row["what"] for row in rows])
    speed.set(ylabel=f"speed-up ({clock} time)", ylim=(0, 2.9))
    speed.legend(frameon=False, fontsize=8, loc="upper left")

    bars = [
        (f"{row['what']}, rank {rank}", parts(one))
        for row in rows
        for rank, one in enumerate(row["ranks"])
    ]
    for y, (_, spent) in enumerate(bars):
        left = 0.0
        for part, colour in PARTS.items():
            time.barh(y, spent[part], left=left, color=colour, label=part if not y else None)
            left += spent[part]
    time.set_yticks(range(len(bars)), [label for label, _ in bars])
    time.invert_yaxis()
    time.set(xlabel="seconds")
    time.legend(
        frameon=False,
        fontsize=8,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.15),
        ncols=3,
        columnspacing=1,
    )

    for recompute, label in ((False, "all kept"), (True, "recomputed")):
        points = [
            (one["ranks"], max(one["mib"]))
            for one in result["memory"]
            if one["recompute"] == recompute
        ]
        memory.plot(*zip(*points, strict=True), marker="o", label=f"activations {label}")
        memory.plot(
            [p for p, _ in points],
            [points[0][1] / p for p, _ in points],
            color="grey",
            linestyle=":",
        )
    counts = sorted({one["ranks"] for one in result["memory"]})
    memory.set(
        xscale="log", yscale="log", xlabel="ranks P", ylabel="peak of a rank, MiB (dotted: 1 / P)"
    )
    memory.set_xticks(counts, [str(n) for n in counts])
    memory.minorticks_off()
    memory.legend(frameon=False, fontsize=8)
    for axes in (speed, memory):
        axes.grid(alpha=0.3)
    figure.suptitle(
        f"{result['chunks']} chunks x {result['shape']['layers']} layers, 2 processes of 1 thread, gloo.   layer_level: "
        f"{verdict['speedup']:.2f} (simulated {verdict['predicted']:.2f}, ceiling {verdict['ceiling']:.2f}, bound {verdict['bound']:.2f})",
        fontsize=10,
    )
    return figure


def plot_simulated(result: dict[str, Any]) -> Figure:
    """Efficiency against P: a row a length of text, a column a transfer time."""
    rows = result["simulated"]["rows"]
    lengths, transfers = (
        sorted({row["chunks"] for row in rows}),
        sorted({row["transfer_cells"] for row in rows}),
    )
    figure = Figure(
        figsize=(3 * len(transfers), 0.8 + 2.8 * len(lengths)), layout="constrained", dpi=100
    )
    panels = figure.subplots(len(lengths), len(transfers), sharex=True, sharey=True, squeeze=False)
    for line, chunks in zip(panels, lengths, strict=True):
        for axes, transfer in zip(line, transfers, strict=True):
            seen = [
                row for row in rows if (row["chunks"], row["transfer_cells"]) == (chunks, transfer)
            ]
            for name, colour in COLOURS.items():
                points = [
                    (row["ranks"], row["efficiency"][name])
                    for row in seen
                    if name in row["efficiency"]
                ]
                axes.plot(*zip(*points, strict=True), marker=".", color=colour, label=name)
            measured = " (measured here)" if transfer == result["times"]["transfer_cells"] else ""
            axes.set_title(f"{chunks} chunks, transfer {transfer:.2g} cells{measured}", fontsize=8)
            axes.set(xscale="log", ylim=(0, 1.03))
            axes.set_xticks([row["ranks"] for row in seen], [str(row["ranks"]) for row in seen])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
    for axes in panels[-1]:
        axes.set_xlabel("ranks P")
    for axes in panels[:, 0]:
        axes.set_ylabel("speed-up / P")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return figure


# ---- tables


def show(result: dict[str, Any]) -> None:
    """The tables and the verdicts."""
    console = Console()
    for table in (
        time_table(result),
        speed_table(result),
        wait_table(result),
        memory_table(result),
        *winner_tables(result),
    ):
        console.print(table)
    for clock, verdict in result["verdict"].items():
        least, ceiling, predicted = verdict["least"], verdict["ceiling"], verdict["predicted"]
        console.print(
            f"layer_level, {CLOCKS[clock]}: speed-up {verdict['speedup']:.3f}; bound = {least} * (ceiling / 2) * predicted = "
            f"{least} * ({ceiling:.3f} / 2) * {predicted:.3f} = {verdict['bound']:.3f}: {'met' if verdict['met'] else 'MISSED'}"
        )
    disturbed = (
        "; other programs took more than 5 % of the processors even in the best rounds"
        if result["clock"] != "wall"
        else ""
    )
    console.print(f"  ({CLOCKS[result['clock']]} decides{disturbed})")
    agreement = result["agreement"]
    console.print(
        f"loss and gradients of all pipelines against one process: {agreement['loss_differs']:.1e} and {agreement['gradients_differ']:.1e} "
        f"apart (relative), allowed {agreement['tolerance']:.0e}: {'met' if agreement['met'] else 'MISSED'}"
    )


def time_table(result: dict[str, Any]) -> Table:
    title = f"a step of {result['chunks']} chunks x {result['shape']['layers']} layers, seconds, best of {result['rounds']}"
    table = report.new_table(
        title, "", "step", "forward", "sum of gradients", "processor time", "taken by others"
    )
    for row in result["arrangements"]:
        wall = row["wall"]
        cells = (
            wall["step"],
            wall["forward"],
            wall["reduced"] - wall["step"],
            row["processor"]["step"],
        )
        table.add_row(
            NAMES.get(row["what"], row["what"]),
            *(f"{x:.3f}" for x in cells),
            f"{row['others']:.0%}",
        )
    return table


def speed_table(result: dict[str, Any]) -> Table:
    heads = (
        "step",
        "processor time",
        "simulated",
        "with sum of gradients",
        "forward only",
        "simulated",
    )
    table = report.new_table("speed-up over one process", "", *heads)
    for row in piped(result):
        wall, by_processor = row["wall"], row["processor"]["step_speedup"]
        found = (
            wall["step_speedup"],
            by_processor,
            row["predicted"],
            wall["reduced_speedup"],
            wall["forward_speedup"],
        )
        table.add_row(row["what"], *(f"{x:.2f}" for x in (*found, row["predicted_forward"])))
    return table


def wait_table(result: dict[str, Any]) -> Table:
    """Shares of each rank's time in the best round. Waiting and communication: by the messages' times, not by the simulator."""
    heads = (
        "rank",
        "computing",
        "waits for neighbour",
        "simulated",
        "communi- cation",
        "Ring. seconds",
    )
    table = report.new_table(
        "where a rank's time goes; communication: transfers, sending", "", *heads
    )
    for row in piped(result):
        for rank, (one, idle) in enumerate(zip(row["ranks"], row["predicted_wait"], strict=True)):
            computing, neighbour, communication = (
                seconds / one["seconds"] for seconds in parts(one).values()
            )
            cells = (computing, neighbour, idle, communication, one["waited"] / one["seconds"])
            table.add_row(row["what"], str(rank), *(f"{x:.1%}" for x in cells))
    return table


def memory_table(result: dict[str, Any]) -> Table:
    title = "peak memory of the fullest rank beyond weights and gradients, MiB (layer_level)"
    table = report.new_table(title, "P", "all kept", "of P = 1", "recomputed", "of P = 1")
    peaks = {(one["ranks"], one["recompute"]): max(one["mib"]) for one in result["memory"]}
    for ranks in sorted({ranks for ranks, _ in peaks}):
        cells = [(peaks[ranks, how], peaks[ranks, how] / peaks[1, how]) for how in (False, True)]
        table.add_row(
            str(ranks), *(text for peak, share in cells for text in (f"{peak:.1f}", f"{share:.2f}"))
        )
    return table


def winner_tables(result: dict[str, Any]) -> list[Table]:
    """For each length of text: the best schedule and its efficiency, by P and transfer time."""
    rows, tables = result["simulated"]["rows"], []
    transfers = sorted({row["transfer_cells"] for row in rows})
    for chunks in sorted({row["chunks"] for row in rows}):
        title = f"simulated: {result['simulated']['layers']} layers, {chunks} chunks; best schedule, speed-up / P, by transfer time"
        table = Table(title=title, padding=0)
        table.add_column("P", justify="right")
        for transfer in transfers:
            table.add_column(f"{transfer:.2g} cells")
        for ranks in sorted({row["ranks"] for row in rows}):
            seen = [row for row in rows if (row["chunks"], row["ranks"]) == (chunks, ranks)]
            seen.sort(key=lambda row: row["transfer_cells"])
            table.add_row(
                str(ranks), *(f"{row['best']} {row['efficiency'][row['best']]:.2f}" for row in seen)
            )
        tables.append(table)
    return tables
