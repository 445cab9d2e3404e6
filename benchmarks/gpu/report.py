"""What becomes of the script's lines: a word each for the terminal, pictures, and the page."""

from benchmarks.shared.report import curves, panels, short, table
from comet_pl.files import as_png

CARD = 80 * 1e9 / 2**30  # GiB of the card that the peaks are held against

PICTURES = ("prefill", "training")


def shown(line):
    """A line's result in a few words."""
    for key in ("skipped", "error"):
        if key in line:
            return f"{key}: {line[key]}"
    parts = [] if "right" not in line else ["right" if line["right"] else "WRONG"]
    words = {
        "worst": "worst {:.1e}", "seconds": "{} s", "ms": "{} ms", "tokens": "{:,} tokens",
        "tokens_s": "{:,} tokens/s", "way": "{}", "dtype": "{}", "recompute": "{}",
        "learns": "learns {}", "shape": "{}", "checks": "{} checks", "cudnn": "cuDNN {}",
        "launches": "{} launches", "tflops_bfloat16": "{} TFLOP/s bf16", "copy_tb_s": "{} TB/s",
        "status": "status {}", "gate_values": "{} gate values",
    }  # fmt: skip
    parts += [style.format(line[key]) for key, style in words.items() if key in line]
    return ", ".join(parts)


def prefills(lines):
    """{shape: {way: {tokens: seconds}}}"""
    found = {}
    for line in lines:
        if line["what"].endswith(" prefill") and "seconds" in line:
            of_shape = found.setdefault(line["what"].split()[0], {})
            of_shape.setdefault(line["way"], {})[line["tokens"]] = line["seconds"]
    return found


def steps(lines):
    return [line for line in lines if line["what"] == "step" and "seconds" in line]


def draw(lines):
    """{name: PNG} of what there are lines for."""
    pictures, shapes = {}, prefills(lines)
    if shapes:
        figure, axes = panels(len(shapes))
        for one, (shape, ways) in zip(figure.axes, shapes.items(), strict=True):
            rows = [
                {"what": way, "length": n, "seconds": seconds}
                for way, points in ways.items()
                for n, seconds in points.items()
            ]
            labels = {"title": shape, "xlabel": "tokens", "ylabel": "seconds to read"}
            curves(one, rows, {way: way for way in ways}, "seconds", **labels)
            one.legend()
        pictures["prefill"] = as_png(figure)
    peaks = [line for line in steps(lines) if "peak_gib" in line]
    if peaks:
        figure, axes = panels(1)
        names = [
            f"{s['shape']} {short(s['tokens'])}\n{s['recompute']}, {s['learns']}" for s in peaks
        ]
        axes.bar(names, [step["peak_gib"] for step in peaks])
        axes.axhline(CARD, color="black", linestyle="--")
        axes.set(ylabel="peak of a training step, GiB", title="dashed: a card of 80 GB")
        axes.tick_params(axis="x", labelsize=7)
        pictures["training"] = as_png(figure)
    return pictures


def section(result):
    """The page's lines."""
    lines = result["lines"]
    laws = [line for line in lines if line["group"] == "law" and "right" in line]
    rows = [
        [f"{line['what']} {line.get('dtype', '')}".strip(), "yes" if line["right"] else "NO",
         f"{line['worst']:.1e}" if "worst" in line else ""]
        for line in laws
    ]  # fmt: skip
    page = table(("law", "holds", "worst"), rows) if rows else []
    rows = []
    for shape, ways in prefills(lines).items():
        ours, full = ways.get("comet", {}), ways.get("full attention", {})
        for n in sorted({*ours, *full}):
            both = [f"{way[n]:.2f}" if n in way else "" for way in (ours, full)]
            ratio = f"{full[n] / ours[n]:.2f}" if n in ours and n in full else ""
            rows.append([shape, f"{n:,}", *both, ratio])
    if rows:
        heads = ("model", "tokens", "seconds to read", "full attention", "times as fast")
        page += table(heads, rows)
    decoded = [line for line in lines if line["what"].endswith(" decode") and "ms" in line]
    rows = [
        [
            line["what"].split()[0],
            line["way"],
            "on" if line["cudnn"] else "off",
            f"{line['ms']:.2f}",
        ]
        for line in decoded
    ]
    if rows:
        page += table(("decoding", "way", "cuDNN", "ms a token"), rows)
    rows = [
        [line["shape"], f"{line['tokens']:,}", line["recompute"], line["learns"],
         f"{line['seconds'][-1]:.2f}", f"{line['tokens_s']:,}", str(line.get("peak_gib", ""))]
        for line in steps(lines)
    ]  # fmt: skip
    if rows:
        heads = ("training", "tokens", "recompute", "learns", "seconds", "tokens/s", "peak GiB")
        page += table(heads, rows)
    kernels = [
        [line["dtype"], f"{row['past']} + {row['own']}", f"{row['heads']}/{row['groups']}",
         "yes" if row["ragged"] else "no", f"`{row['kernel']}`"]
        for line in lines
        if line["what"] == "attention" and "rows" in line
        for row in line["rows"]
        if row["kernel"]
    ]  # fmt: skip
    if kernels:
        page += table(("attention", "columns", "heads", "ragged", "kernel"), kernels)
    return page
