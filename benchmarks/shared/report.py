"""What the benchmark found: as JSON, as a picture, as a table."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
import transformers
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from comet_pl.errors import UserError

NAMES = {"comet": "CoMeT", "slots_in_full": "slots in full", "full_attention": "full attention"}
NAMES |= {"sliding_window": "sliding window, sinks"}
EXTRAPOLATED = "extrapolated"  # drawn as one line more
COLOURS = {
    "comet": "tab:blue",
    "slots_in_full": "tab:orange",
    "full_attention": "tab:red",
    "in_place": "tab:pink",
}
COLOURS |= {"sliding_window": "tab:green", EXTRAPOLATED: "tab:red"}
COLOURS |= {
    "chunk": "tab:blue",
    "cell": "tab:orange",
    "none": "tab:red",
    "boundaries": "tab:gray",
}  # of training.py
FLAT_FROM, FLAT_WITHIN = (
    16384,
    0.05,
)  # peak memory of the lengths from here on may differ by this share


def clock_of(device: str, threads: int) -> str:
    """Which clock decides. With one thread, processor time is the wall time of an idle machine; with more, waiting for each other is part
    of the cost."""
    return "processor" if (device, threads) == ("cpu", 1) else "wall"


def time_key(clock: str) -> str:
    """Where a result has its time a token by this clock."""
    return "ms_per_token" if clock == "wall" else "processor_ms_per_token"


def machine(device: str) -> dict[str, Any]:
    """What the numbers depend on, without the machine's name."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        models = [
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        processor = models[0] if models else processor
    facts |= {
        "system": platform.system(),
        "processor": processor,
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
    }
    facts |= {"cpu_kernels": torch.backends.cpu.get_cpu_capability()}
    return facts | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {})


def flatness(
    lengths: list[dict[str, Any]], keys: Sequence[str] = ("peak_mib", "reading_mib")
) -> dict[str, float] | None:
    """How far CoMeT's figures at FLAT_FROM tokens and more lie apart: (highest - lowest) / lowest; None with fewer than two of them."""
    found = [one for one in lengths if one["what"] == "comet" and one["length"] >= FLAT_FROM]
    if len({one["length"] for one in found}) < 2:
        return None
    spread = {}
    for key in keys:
        values = [one[key] for one in found]
        spread[key] = (max(values) - min(values)) / min(values)
    return spread


def crossover(
    ours: Sequence[tuple[int, float]], full: Sequence[tuple[int, float]]
) -> dict[str, Any] | None:
    """The context from which on ours stays cheaper.

    Args:
        ours, full: (length, ms a token) each.

    Returns:
        {"tokens", "how"}: interpolated between measured lengths; extrapolated beyond the longest; "at most" the shortest, if ours is
        cheaper everywhere. None: no length in common, or the lines do not meet.
    """
    costs = dict(full)
    gaps = sorted((n, costs[n] - ms) for n, ms in ours if n in costs)  # > 0: ours is cheaper
    dearer = [i for i, (_, gap) in enumerate(gaps) if gap <= 0]
    if not gaps:
        return None
    if not dearer:
        return {
            "tokens": gaps[0][0],
            "how": "at most: ours is cheaper at the shortest context already",
        }
    i, how = dearer[-1], "interpolated linearly"
    if i == len(gaps) - 1:
        i, how = i - 1, "extrapolated linearly"
    if i < 0 or gaps[i + 1][1] <= gaps[i][1]:
        return None
    (n, gap), (n2, gap2) = gaps[i : i + 2]
    return {"tokens": round(n - gap * (n2 - n) / (gap2 - gap)), "how": f"{how} from {n} and {n2}"}


def make_folder(out: Path) -> None:
    """Makes the folder of the results: before the measurement, not after it.

    Raises:
        UserError: it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {out} cannot be made: {error.strerror}") from None


def write(path: Path, save: Callable[[Path], Any]) -> None:
    """`save` writes beside, then the file appears at once, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, result: dict[str, Any]) -> None:
    write(path, lambda file: file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8"))


def write_plot(
    path: Path, result: dict[str, Any], draw: Callable[[dict[str, Any]], Figure] | None = None
) -> None:
    """What `draw` makes of the result (None: `plot`), as a PNG."""
    with matplotlib.rc_context({"font.size": 10}):
        chart = (draw or plot)(result)
    write(path, lambda file: chart.savefig(file, format="png"))


def plot(result: dict[str, Any]) -> Figure:
    """ms/token and peak memory against length, both axes logarithmic."""
    figure = Figure(figsize=(10, 4), layout="constrained", dpi=100)
    time = time_key(result["clock"])
    panels = ((time, f"ms a token ({result['clock']} time)"), ("peak_mib", "peak memory, MiB"))
    for axes, (key, label) in zip(figure.subplots(1, 2), panels, strict=True):
        curves(
            axes,
            [*result["lengths"], *beyond(result)],
            NAMES | {EXTRAPOLATED: "full attention, extrapolated"},
            key,
            label,
            "tokens read",
        )
    figure.axes[0].legend(frameon=False)
    ratio = result["ratio"]
    figure.suptitle(
        f"Reading with full memory, {result['lengths_shape']} shape, {result['device']}, {result['threads']} thread(s).   "
        f"CoMeT / slots in full at the {ratio['shape']} shape: {ratio['value']:.2f} (floor {ratio['floor']:.2f})",
        fontsize=10,
    )
    return figure


def beyond(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Full attention's last measured point and the extrapolated one, as a curve of their own."""
    one = result["against_full_attention"]["extrapolated"]
    measured = [found for found in result["lengths"] if found["what"] == "full_attention"]
    return (
        [
            point | {"what": EXTRAPOLATED}
            for point in (max(measured, key=lambda found: found["length"]), one)
        ]
        if one
        else []
    )


def curves(
    axes: Axes,
    found: Sequence[Mapping[str, Any]],
    names: Mapping[str, str],
    key: str,
    label: str,
    xlabel: str,
) -> None:
    """A line for each of `names` that was found: `key` against "length", both axes logarithmic with plain numbers."""
    for what, name in names.items():
        points = sorted((one["length"], one[key]) for one in found if one["what"] == what)
        if points:
            style = {"linestyle": "--", "fillstyle": "none"} if what == EXTRAPOLATED else {}
            axes.plot(
                *zip(*points, strict=True), marker="o", label=name, color=COLOURS[what], **style
            )
    ticks = sorted({one["length"] for one in found})
    axes.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=label)
    axes.set_xticks(ticks, [short(n) for n in ticks])
    axes.minorticks_off()
    values = [one[key] for one in found]
    steps = [s * 10.0**e for e in range(-4, 8) for s in (1, 2, 5)]
    shown = [v for v in steps if min(values) / 2.5 <= v <= max(values) * 2.5]
    axes.set_yticks(shown, [f"{v:g}" for v in shown])
    axes.grid(alpha=0.3)


def short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def show(result: dict[str, Any]) -> None:
    """The table and the verdicts."""
    console = Console()
    title = f"{result['lengths_shape']} shape, {result['device']}, {result['dtype']}, {result['threads']} thread(s)"
    table = new_table(
        title,
        "",
        "tokens",
        "ms/token",
        "cpu ms/token",
        "peak MiB",
        "by reading",
        "of product",
        "linear",
    )
    for one in result["lengths"]:
        numbers = (one["ms_per_token"], one["processor_ms_per_token"])
        memory, rate = (one["peak_mib"], one["reading_mib"]), one["achieved"]
        shares = (f"{rate['share']:.0%}", f"{rate['linear']['share']:.0%}")
        table.add_row(
            NAMES[one["what"]],
            f"{one['length']:,}",
            *(f"{x:.4f}" for x in numbers),
            *(f"{x:.0f}" for x in memory),
            *shares,
        )
    console.print(table)
    console.print(
        "  (of product: operations a second as a share of a plain matrix product's; linear: in the linear layers alone)"
    )
    show_ratio(result)
    flat = result["flatness"]
    if flat is not None:
        met = "met" if flat["peak_mib"] <= FLAT_WITHIN else "MISSED"
        console.print(
            f"peak memory from {FLAT_FROM:,} tokens on differs by {flat['peak_mib']:.1%}, allowed {FLAT_WITHIN:.0%}: {met}"
        )
        console.print(f"  (what reading adds to the process differs by {flat['reading_mib']:.1%})")
    for line in against_full_attention(result):
        console.print(line)


def show_ratio(result: dict[str, Any]) -> None:
    """The verdicts about CoMeT and slots in full."""
    console, ratio, linear = Console(), result["ratio"], result["linear_rate"]
    console.print(
        f"CoMeT / slots in full, {ratio['shape']} shape: {ratio['value']:.3f} ({result['clock']} time; wall {ratio['wall_ratio']:.3f}); "
        f"floor {ratio['floor']:.3f}, allowed {ratio['bound']:.3f}: {'met' if ratio['met'] else 'MISSED'}"
    )
    console.print(
        f"CoMeT's linear layers, {ratio['shape']} shape: {linear['value']:.0%} of the rate of a plain matrix product, "
        f"wanted {linear['bound']:.0%}: {'met' if linear['met'] else 'MISSED'}"
    )
    if not ratio["shape"].startswith("paper"):
        console.print(
            "  (at this size what does not grow with the shape, Python above all, counts for more than the operations)"
        )
    console.print(f"floor: {ratio['formula']}", style="dim")


def against_full_attention(result: dict[str, Any]) -> list[str]:
    """What reading says about CoMeT and full attention, a sentence each."""
    found, lines = result["against_full_attention"], []
    start = found["cheaper_from"]
    told = f"{start['tokens']:,} tokens ({start['how']})" if start else "not found"
    lines.append(f"CoMeT is cheaper than full attention from: {told}")
    for key in ("longest", EXTRAPOLATED):
        one = found[key]
        if one:
            how = f"{EXTRAPOLATED}: {one['how']}" if key == EXTRAPOLATED else "the longest it read"
            times = f"{one['time']:.1f} x the time and {one['memory']:.1f} x the memory"
            lines.append(f"at {one['length']:,} tokens ({how}) full attention takes {times}")
    return lines


def new_table(title: str, *heads: str) -> Table:
    table = Table(title=title, padding=0)  # so that it fits 80 columns
    for head in heads:
        table.add_column(head, justify="right" if head else "left", min_width=0 if head else 11)
    return table
