"""What decode.py found: as a picture, as tables."""

from __future__ import annotations

from typing import Any

import report
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from comet_pl.progress import PLAIN

NAMES = {
    "comet": "CoMeT",
    "full_attention": "full attention",
    "in_place": "full attention, cache in place",
}
FULL_ATTENTION = ("full_attention", "in_place")
MARGIN = 1.15  # CoMeT with full memory may take this much more than the floor by bytes
KINDS = {"text": "text token", "compression": "+ compression token", "closing": "closing a chunk"}


def plot(result: dict[str, Any]) -> Figure:
    """ms/token (our closing step apart) and cache against the context, all axes logarithmic."""
    figure = Figure(figsize=(10, 4.4), layout="constrained", dpi=100)
    time = report.time_key(result["clock"])
    found = [one | {"cache_mib": one["cache_bytes"] / 2**20} for one in result["lengths"]]
    left, right = figure.subplots(1, 2)
    report.curves(
        left, found, NAMES, time, f"ms a token ({result['clock']} time)", "tokens of context"
    )
    report.curves(
        right,
        found,
        {name: NAMES[name] for name in ("comet", "full_attention")},
        "cache_mib",
        "cache, MiB",
        "tokens of context",
    )
    spikes = sorted(
        (one["length"], one["closing_ms"]) for one in found if one["closing_ms"] is not None
    )
    if spikes:
        label = f"CoMeT's closing step, one in {result['comet']['chunk_size']}"
        left.plot(
            *zip(*spikes, strict=True),
            marker="^",
            linestyle="none",
            fillstyle="none",
            color=report.COLOURS["comet"],
            label=label,
        )
    filled = [one["length"] for one in found if one["filled"]]
    if filled:
        for axes in (left, right):
            axes.axvspan(
                min(filled) / 1.3,
                axes.get_xlim()[1],
                color="grey",
                alpha=0.08,
                zorder=0,
                label="caches filled with noise",
            )
    left.legend(frameon=False, fontsize=8)
    figure.suptitle(
        f"Decoding, {result['model']}, {sizes(result)}; {result['device']}, {result['dtype']}, {result['threads']} thread(s)",
        fontsize=10,
    )
    return figure


def sizes(result: dict[str, Any]) -> str:
    comet = result["comet"]
    keys = {
        "C": "chunk_size",
        "m": "global_size",
        "s": "compression_stride",
        "K": "temporary_capacity",
    }
    return ", ".join(f"{letter}={comet[key]}" for letter, key in keys.items())


def show(result: dict[str, Any]) -> None:
    """The tables and the verdicts."""
    console = Console()
    console.print(
        f"\n{result['model']}, {sizes(result)}; {result['device']}, {result['dtype']}, {result['threads']} thread(s)",
        **PLAIN,
    )
    console.print(time_table(result))
    console.print(kind_table(result))
    if any(one["filled"] for one in result["lengths"]):
        console.print(
            "*: caches filled with noise instead of reading so much, which changes no cost", **PLAIN
        )
    for one in result["skipped"]:
        console.print(
            f"skipped: {NAMES[one['what']]} after {one['length']:,} tokens: {one['reason']}",
            **PLAIN,
        )
    found = result["verdict"]
    if found["flatness"] is not None:
        spread = ", ".join(
            f"{name} {value:.1%}"
            for name, value in zip(("ms/token", "cache"), found["flatness"].values(), strict=True)
        )
        allowed = f"allowed {found['flat_within']:.0%}: {'met' if found['flat'] else 'MISSED'}"
        console.print(
            f"CoMeT from {found['flat_from']:,} tokens on differs by: {spread}; {allowed}", **PLAIN
        )
    bound = against_floor(result)
    for what, one in (bound or {"ratios": {}})["ratios"].items():
        sides = f"CoMeT after {bound['after']:,} tokens / {NAMES[what]} after {bound['context']:,}"
        if one["met"] is not None:
            told = f"floor {bound['floor']:.2f}, allowed {bound['bound']:.2f}: {'met' if one['met'] else 'MISSED'}"
            console.print(f"{sides}: {one['value']:.2f}; {told}", **PLAIN)
    for what, where in found["cheaper_from"].items():
        told = "not found" if where is None else f"{where['tokens']:,} tokens ({where['how']})"
        console.print(f"CoMeT is cheaper than {NAMES[what]} from: {told}", **PLAIN)


def against_floor(result: dict[str, Any]) -> dict[str, Any] | None:
    """CoMeT after the longest context, memory full, against each kind of full attention after the context that the floor is about.

    Returns:
        {"after", "context", "floor", "bound", "ratios": {"full_attention", "in_place"}}, each ratio with "value" and "met"; None where
        something was not measured. None instead of all: no context fills the memory.
    """
    floor, comet = result.get("floor") or {"context": 1024, "ratio": None}, result["comet"]
    key = report.time_key(result["clock"])
    found = {(one["what"], one["length"]): one[key] for one in result["lengths"]}
    after = max((n for what, n in found if what == "comet"), default=0)
    groups = -(-comet["chunk_size"] // comet["compression_stride"])  # compression tokens of a chunk
    if after < comet["chunk_size"] * -(-comet["temporary_capacity"] // groups):
        return None
    bound, ratios = floor["ratio"] and MARGIN * floor["ratio"], {}
    for what in FULL_ATTENTION:
        theirs = found.get((what, floor["context"]))
        value = theirs and found["comet", after] / theirs
        ratios[what] = {
            "value": value,
            "met": None if value is None or bound is None else value <= bound,
        }
    return {
        "after": after,
        "context": floor["context"],
        "floor": floor["ratio"],
        "bound": bound,
        "ratios": ratios,
    }


def time_table(result: dict[str, Any]) -> Table:
    """A context a row: ms a token of each side, single steps of ours, both caches."""
    heads = (
        "context",
        "CoMeT",
        "median",
        "p99",
        "closing",
        "full",
        "in place",
        "MiB: CoMeT",
        "full",
    )
    table = report.new_table(f"{result['clock']} time, ms", *heads)
    found = {(one["what"], one["length"]): one for one in result["lengths"]}
    key = report.time_key(result["clock"])
    for n in sorted({length for _, length in found}):
        ours, full, in_place = (found.get((what, n)) for what in NAMES)
        single = (
            f"{ours[name]:.1f}" if ours and ours[name] is not None else ""
            for name in (key, "median_ms", "p99_ms", "closing_ms")
        )
        others = (f"{one[key]:.1f}" if one else "-" for one in (full, in_place))
        caches = (f"{one['cache_bytes'] / 2**20:,.1f}" if one else "-" for one in (ours, full))
        table.add_row(f"{n:,}{'*' if ours and ours['filled'] else ''}", *single, *others, *caches)
    return table


def kind_table(result: dict[str, Any]) -> Table:
    """CoMeT's steps by what they process."""
    table = report.new_table(
        "CoMeT's steps: median ms and share of the time", "context", *KINDS.values()
    )
    for one in result["lengths"]:
        if one["what"] == "comet":
            kinds = [one["kinds"].get(kind) for kind in KINDS]
            cells = (
                "" if k is None else f"{k['steps']} x {k['median_ms']:.1f} ms, {k['share']:.1%}"
                for k in kinds
            )
            table.add_row(f"{one['length']:,}", *cells)
    return table
