"""What becomes of a measurement: JSON, pictures, and Markdown for the terminal and the page."""

import os
import platform
from pathlib import Path

import torch
import transformers
from matplotlib.figure import Figure
from rich.console import Console
from rich.markdown import Markdown

from comet_pl.files import as_json, as_png, replace_file

ABSENT = "not measured"
FLAT_FROM, FLAT_WITHIN = 16384, 0.05  # peak memory from here on may differ by this share


def publish(
    options,
    name,
    result,
    section,
    **plots,
):
    """Writes the JSON and the pictures to --out, each whole or not at all; prints the section.

    name: the parts of the file's name. plots: `plot` becomes NAME.png, `plot_x` NAME-x.png.
    Raises UserError.
    """
    file = options.out / "-".join(filter(None, name))
    facts = {"command": options.command, "machine": machine(result.get("device"), options.load)}
    replace_file(Path(f"{file}.json"), as_json(facts | result, 1), "--out")
    for plot, draw in plots.items():
        picture = f"{file}{plot.removeprefix('plot').replace('_', '-')}.png"
        replace_file(Path(picture), as_png(draw(result)), "--out")
    Console().print(Markdown("\n".join(section(result))))


def machine(device, load):
    """What the numbers depend on, without the machine's name."""
    processor, file = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if file.exists():
        lines = [line for line in file.read_text().splitlines() if line.startswith("model name")]
        processor = lines[0].split(":", 1)[1].strip() if lines else processor
    facts = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": processor,
        "cores": os.cpu_count(),
        "load_before": load,
        "cpu_kernels": torch.backends.cpu.get_cpu_capability(),
    }
    return facts | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {})


def at_most(value, bound):
    return {"value": value, "bound": bound, "met": value <= bound}


def flatness(lengths, keys=("peak_mib", "reading_mib")):
    """(highest - lowest) / lowest of CoMeT's figures from FLAT_FROM tokens on; None for fewer than
    two lengths."""
    long = [row for row in lengths if row["what"] == "comet" and row["length"] >= FLAT_FROM]
    if len({row["length"] for row in long}) < 2:
        return None
    series = {key: [row[key] for row in long] for key in keys}
    return {key: (max(values) - min(values)) / min(values) for key, values in series.items()}


def crossover(rows, key, rival):
    """The length from which on CoMeT's `key` stays below the rival's.

    Returns:
        {"tokens", "how"}: interpolated between measured lengths, extrapolated beyond the longest,
        or at most the shortest. None: no length in common, or the lines do not meet.
    """
    ours, full = (
        {row["length"]: row[key] for row in rows if row["what"] == what}
        for what in ("comet", rival)
    )
    gaps = sorted((n, full[n] - ms) for n, ms in ours.items() if n in full)  # > 0: ours is cheaper
    dearer = [i for i, (_, gap) in enumerate(gaps) if gap <= 0]
    if not gaps:
        return None
    if not dearer:
        how = "at most: ours is cheaper at the shortest context already"
        return {"tokens": gaps[0][0], "how": how}
    i, how = dearer[-1], "interpolated linearly"
    if i == len(gaps) - 1:
        i, how = i - 1, "extrapolated linearly"
    if i < 0 or gaps[i + 1][1] <= gaps[i][1]:
        return None
    (n, gap), (n2, gap2) = gaps[i : i + 2]
    return {"tokens": round(n - gap * (n2 - n) / (gap2 - gap)), "how": f"{how} from {n} and {n2}"}


# ---- Markdown


def table(heads, rows):
    """The lines of a table with its first column left and the others right."""
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (heads, rule, *rows)] + [""]


def texts(row, *fields):
    """Fields such as "seconds:.2f", "bytes/1e6:,.0f", "linear.share:.0%" of a row as texts."""
    cells = []
    for field in fields:
        path, style = field.split(":")
        path, _, unit = path.partition("/")
        value = row
        for key in path.split("."):
            value = value and value.get(key)
        cells.append(
            ABSENT if value is None else format(value / float(unit) if unit else value, style)
        )
    return cells


def met(verdict):
    if verdict is None or verdict["met"] is None:
        return ABSENT
    return "met" if verdict["met"] else "missed"


def start_of(where):
    return f"{where['tokens']:,} tokens ({where['how']})" if where else "not found"


def sizes(shape):
    """C, m, s and K of a shape, or of a configuration."""
    keys = ("chunk", "global_size", "stride", "capacity")
    if "chunk_size" in shape:
        keys = ("chunk_size", "global_size", "compression_stride", "temporary_capacity")
    return ", ".join(f"{letter}={shape[key]}" for letter, key in zip("CmsK", keys, strict=True))


def memory_shape(shape):
    return f"{shape['layers']} layers x {shape['hidden']}, {sizes(shape)}"


# ---- pictures


def panels(columns, size=(10, 4)):
    figure = Figure(figsize=size, layout="constrained", dpi=100)
    axes = figure.subplots(1, columns)
    for one in figure.axes:
        one.grid(alpha=0.3)
    return figure, axes


def curves(
    axes,
    rows,
    lines,
    key,
    **labels,
):
    """Draws `key` against "length", both axes logarithmic with plain numbers.

    lines: {"what" of the rows: label}; "extrapolated" is drawn dashed.
    """
    for what, label in lines.items():
        points = sorted((row["length"], row[key]) for row in rows if row["what"] == what)
        style = {"linestyle": "--", "fillstyle": "none"} if what == "extrapolated" else {}
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=label, **style)
    axes.set(xscale="log", yscale="log", **labels)
    lengths = sorted({row["length"] for row in rows})
    axes.set_xticks(lengths, [short(n) for n in lengths])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")


def short(tokens):
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)
