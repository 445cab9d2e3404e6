"""What data.py found: as a picture, as a table."""

from __future__ import annotations

from typing import Any

import report
from matplotlib.figure import Figure
from rich.console import Console

from comet_pl.progress import PLAIN

NAMES = {"ours": "ours: tokenised, cut, packed", "plain": "plain load_dataset + map"}
COLOURS = {"given": "tab:blue", "generated": "tab:orange"}


def plot(result: dict[str, Any]) -> Figure:
    """Throughput, memory of all processes while streaming, time to the first batch."""
    figure = Figure(figsize=(12, 3.8), layout="constrained", dpi=100)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 2, 1))
    speeds = [result["throughput"][f"{what}_mb_per_s"] for what in ("ours", "plain")]
    left.bar_label(
        left.bar(["ours", "plain map"], speeds, color=["tab:blue", "tab:gray"]), fmt="%.2f"
    )
    left.set(ylabel="MB of text a second")
    for one in result["memory"]:
        label = f"{one['corpus']}: {one['bytes'] / 1e6:,.0f} MB"
        middle.plot(*zip(*one["curve"], strict=True), label=label, color=COLOURS[one["corpus"]])
    limit = (
        max(one["baseline_shared_mib"] for one in result["memory"]) + result["verdict"]["limit_mib"]
    )
    middle.axhline(limit, color="black", linestyle=":", label="the limit, 1 GiB above the baseline")
    middle.set(
        xlabel="seconds, from the first import on",
        ylabel="MiB of all processes, streaming",
        ylim=(0, None),
    )
    middle.legend(frameon=False, fontsize=8)
    waits = [result["first_batch"][name] for name in ("streamed", "cached")]
    right.bar_label(
        right.bar(["streamed", "warm cache"], waits, color=["tab:orange", "tab:blue"]), fmt="%.2g s"
    )
    right.set(ylabel="seconds to the first batch")
    figure.suptitle(
        f"{result['workers']} workers, {result['max_length']:,} tokens a row, tokenizer: {result['tokenizer']}",
        fontsize=10,
    )
    return figure


def show(result: dict[str, Any]) -> None:
    """The tables and the verdict."""
    console = Console()
    speed = result["throughput"]
    table = report.new_table(f"{result['workers']} workers, cold cache", "", "tokens/s", "MB/s")
    for what, name in NAMES.items():
        table.add_row(
            name, f"{speed[f'{what}_tokens_per_s']:,.0f}", f"{speed[f'{what}_mb_per_s']:.2f}"
        )
    console.print(table)
    console.print(
        f"ours / plain: {speed['ratio']:.2f} (processor time {speed['processor_ratio']:.2f})",
        **PLAIN,
    )
    table = report.new_table(
        "streaming, MiB", "", "MB", "baseline", "main peak", "above", "all, above", "processes"
    )
    for one in result["memory"]:
        cells = [one[key] for key in ("baseline_mib", "peak_mib", "above_mib", "all_above_mib")]
        table.add_row(
            one["corpus"],
            f"{one['bytes'] / 1e6:,.0f}",
            *(f"{mib:,.0f}" for mib in cells),
            str(one["processes"]),
        )
    console.print(table)
    verdict = result["verdict"]
    console.print(
        f"less than {verdict['limit_mib']} MiB above the baseline: {'met' if verdict['met'] else 'MISSED'}",
        **PLAIN,
    )
    first = result["first_batch"]
    waits = f"{first['streamed']:.1f} s streamed (window of {result['window']} rows), {first['cached']:.2f} s out of the cache"
    console.print(
        f"first batch after {waits}; before that, imports and tokenizer: {first['imports_and_tokenizer']:.1f} s",
        **PLAIN,
    )
