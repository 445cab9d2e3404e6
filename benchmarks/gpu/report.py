"""What the lines say: a table for the terminal, the section of the page, the pictures."""

import re

from benchmarks.shared import report
from benchmarks.shared.report import met, table, texts

CARD_GIB = 80  # of the picture, if the card's own is unknown
TOP = 6  # kernels on the page
ROOM = 100  # columns of a result on the terminal
# The values that the terminal shows of each kind of measurement.
SHOWN = {
    "ceilings": ("tflops_bfloat16", "tflops_float32", "copy_tb_s", "launch_us"),
    "golden": ("worst", "bound", "greedy_equal"),
    "laws": ("checks", "worst", "bound"),
    "attention": ("checks", "worst", "bound"),
    "mixed_precision": ("worst", "bound", "gate_values", "gates_at_1"),
    "train": ("steps", "seconds"),
    "gpu_tests": ("summary",),
    "attention_kernels": ("kernels",),
    "chunk": ("ms", "host_ms", "tokens_s"),
    "chunk_attention": ("flash", "cudnn", "flash_with_backward", "cudnn_with_backward"),
    "chunk_kernels": ("gpu_ms", "launches", "top"),
    "prefill": ("tokens", "seconds", "tokens_s"),
    "decode": ("ms", "worst_ms"),
    "train_step": ("tokens", "seconds", "optimizer_seconds", "tokens_s"),
    "evaluation": ("tokens", "seconds"),
    "two_ranks": ("worst", "bound"),
    "resume": ("steps", "met", "seconds"),
}


# ---- terminal


def terminal(result):
    """The lines of a table: what, took, peak GiB, result."""
    lines = result["lines"]
    width = max([len(line["what"]) for line in lines], default=4)
    yield f"{'what':<{width}}  took, s  peak, GiB  result"
    for line in lines:
        took, peak = line.get("took", ""), line.get("peak_gib", "")
        yield f"{line['what']:<{width}}  {took:>7}  {peak:>9}  {outcome(line)[:ROOM]}"
    done = sum(measured(line) for line in lines)
    yield f"{done} of {len(lines)} measured in {result['seconds']:.0f} s"


def outcome(line):
    """A measurement's values, or why there are none."""
    for why in ("error", "skipped"):
        if why in line:
            return f"{why}: {line[why]}"
    keys = [key for key in SHOWN.get(line["kind"], line) if line.get(key) is not None]
    missed = ["MISSED"] if line.get("met") is False else []
    return ", ".join(missed + [f"{key} {brief(line[key])}" for key in keys])


def short(kernel):
    """A kernel's name without namespaces, arguments and the template's."""
    kernel = kernel.replace("(anonymous namespace)::", "").removeprefix("void ")
    return re.split(r"[<(]", kernel)[0].rpartition("::")[2]


def brief(value):
    return f"{value:.3g}" if isinstance(value, float) and value < 1000 else str(value)


def measured(line):
    return "error" not in line and "skipped" not in line


# ---- the page


def section(result):
    if result["tiny"]:
        yield "A trial at a tiny size, no measurement."
        yield ""
    good = [line for line in result["lines"] if measured(line)]
    for part in (verdicts, mixed_gradients, attentions, chunks, prefills, decodes):
        yield from part(good)
    yield from steps(result["lines"])
    yield from commands(good)
    missing = [line for line in result["lines"] if not measured(line)]
    if missing:
        yield f"Measured: {len(good)} of {len(result['lines'])}. Without a result:"
        yield ""
        yield from (f"- {line['what']}: {outcome(line)}." for line in missing)
        yield ""


def of_kind(lines, kind):
    return [line for line in lines if line["kind"] == kind]


def table_of(heads, rows):
    """A table, or nothing without rows."""
    return table(heads, rows) if rows else []


def verdicts(lines):
    rows = []
    for line in lines:
        if "bound" in line:
            numbers = texts(line, "checks:,", "worst:.1e", "bound:.0e")
            rows.append((line["what"], *numbers, met(line)))
    yield from table_of(("right?", "checks", "worst error", "allowed", ""), rows)


def mixed_gradients(lines):
    """Errors of the decoder's gradients under autocast, and how many values a gate takes."""
    rows = []
    for line in of_kind(lines, "mixed_precision"):
        rows += [(what, f"{error:.2%}") for what, error in line["errors"].items()]
        gates = f"{line['gate_values']:,} ({line['gate_dtype']})"
        rows.append(("values of the last gates", gates))
    yield from table_of(
        ("bf16-mixed: `train.recompute`, autocast's cache", "gradients off by"), rows
    )


def attentions(lines):
    """The worst error of each shape by dtype, and the kernel where it is known."""
    cells, named = {}, {}
    for line in of_kind(lines, "attention_kernels"):
        named = line["kernels"]
    for line in of_kind(lines, "attention"):
        for what, error in line["errors"].items():
            by = cells.setdefault(what.rpartition(": ")[0], {})
            by[line["dtype"]] = max(error, by.get(line["dtype"], 0))
    dtypes = sorted({dtype for by in cells.values() for dtype in by})
    rows = []
    for shape, by in cells.items():
        errors = [f"{by[dtype]:.0e}" if dtype in by else "" for dtype in dtypes]
        kernels = [f"`{short(named[shape][dtype])}`" if shape in named else "" for dtype in dtypes]
        rows.append(
            (shape, *(" ".join(pair).strip() for pair in zip(errors, kernels, strict=True)))
        )
    yield from table_of(("attention: worst error, kernel", *dtypes), rows)


def chunks(lines):
    fields = ("layers:,", "ms:,.1f", "ms_per_cell:.2f", "host_ms:,.1f", "tokens_s:,")
    rows = [
        (f"{line['model']}, {line['dtype']}", *texts(line, *fields, "peak_gib:.1f"))
        for line in of_kind(lines, "chunk")
    ]
    heads = ("a closing chunk, memory full", "layers", "ms", "ms a cell", "ms of the host")
    yield from table_of((*heads, "tokens/s", "peak GiB"), rows)
    rows = []
    for line in of_kind(lines, "chunk_kernels"):
        rows.append((f"{line['model']}, all", *texts(line, "launches:,", "gpu_ms:,.2f")))
        for name, count, milliseconds in line["top"][:TOP]:
            rows.append((f"{line['model']}, `{short(name)}`", f"{count:,}", f"{milliseconds:,.2f}"))
    yield from table_of(("kernels of such a chunk", "launches", "ms"), rows)


def prefills(lines):
    rows, compared = [], comparison(of_kind(lines, "prefill"))
    for row in compared:
        ours = texts(row, "plain.seconds:,.2f", "graphs.seconds:,.2f", "ours.tokens_s:,")
        theirs = texts(row, "full.seconds:,.2f")[0] + (" *" if row["extrapolated"] else "")
        ratio, *peaks = texts(row, "ratio:.1f", "ours.peak_gib:.1f", "full.peak_gib:.1f")
        rows.append((row["model"], f"{row['tokens']:,}", *ours, theirs, ratio, *peaks))
    heads = ("prefill", "tokens", "CoMeT, s", "by CUDA graphs, s", "tokens/s", "full attention, s")
    yield from table_of((*heads, "full / CoMeT", "CoMeT, peak GiB", "full, peak GiB"), rows)
    if any(row["extrapolated"] for row in compared):
        how = "a token after n others costs a + b n, through the two longest texts"
        yield f"\\* extrapolated: {how}."
        yield ""


def comparison(lines):
    """All sides of each text, model by model and by length, "ours" the quicker of CoMeT's; full
    attention beyond its longest text on a straight line of its time a token."""
    sides = {}
    for line in lines:
        sides.setdefault((line["model"], line["tokens"]), {})[side(line)] = line
    rows = []
    for (model, tokens), by in sorted(sides.items(), key=lambda item: item[0]):
        plain, graphs, full = by.get("plain"), by.get("graphs"), by.get("full")
        ours = min(filter(None, (plain, graphs)), key=lambda line: line["seconds"], default=None)
        guess = None if full else beyond(lines, model, tokens)
        full = full or guess
        ratio = full["seconds"] / ours["seconds"] if ours and full else None
        row = {"model": model, "tokens": tokens, "plain": plain, "graphs": graphs, "ours": ours}
        rows.append(row | {"full": full, "ratio": ratio, "extrapolated": guess is not None})
    return rows


def side(line):
    """full, graphs (CoMeT's) or plain."""
    return "full" if line["attention"] == "full" else "graphs" if line["graphs"] else "plain"


def beyond(lines, model, tokens):
    """Full attention's seconds of a text that is longer than its two longest ones, or None."""
    known = sorted(
        (line["tokens"], line["seconds"] / line["tokens"])
        for line in lines
        if line["model"] == model and line["attention"] == "full"
    )[-2:]
    if len(known) < 2 or tokens <= known[1][0]:
        return None
    (n, low), (n2, high) = known
    return {"seconds": tokens * (high + (high - low) * (tokens - n2) / (n2 - n))}


def decodes(lines):
    pairs = {}
    for line in of_kind(lines, "decode"):
        pairs.setdefault((line["model"], line["attention"]), {})[line["graphs"]] = line
    rows = []
    for (model, attention), pair in pairs.items():
        times = [
            t for graphs in (False, True) for t in texts(pair.get(graphs), "ms:.2f", "worst_ms:.1f")
        ]
        name = "CoMeT" if attention == "CoMeT" else "full attention after 4,096 tokens"
        rows.append((f"{model}, {name}", *times))
    heads = ("decoding, ms/token", "without graphs", "its slowest token", "by CUDA graphs")
    yield from table_of((*heads, "its slowest token"), rows)
    for line in of_kind(lines, "chunk_attention"):
        rows = [
            (name, *texts(line, f"{key}:.3f", f"{key}_with_backward:.3f"))
            for name, key in (("flash, as it is", "flash"), ("cuDNN, two parts", "cudnn"))
        ]
        yield from table_of(("attention of 4B's closing chunk", "ms", "with backward"), rows)


def steps(lines):
    """Training steps, those that ran out of memory too."""
    fields = ("seconds:,.2f", "optimizer_seconds:.3f", "tokens_s:,", "peak_gib:.1f")
    rows = []
    for line in of_kind(lines, "train_step"):
        if measured(line):
            rows.append((line["what"], *texts(line, *fields)))
        elif out_of_memory(line):
            rows.append((line["what"], "out of memory", "", "", *texts(line, "peak_gib:.1f")))
    heads = ("a training step, bf16-mixed", "seconds", "of the optimizer", "tokens/s", "peak GiB")
    yield from table_of(heads, rows)


def out_of_memory(line):
    return "out of memory" in line.get("error", "")


def commands(lines):
    kinds = ("train", "evaluation", "resume", "gpu_tests")
    rows = [
        (line["what"], *texts(line, "took:.1f", "peak_gib:.2f"), outcome(line))
        for line in lines
        if line["kind"] in kinds
    ]
    yield from table_of(("command", "seconds", "peak GiB", "result"), rows)


# ---- pictures


def plot_prefill(result):
    """Seconds against tokens, a panel for each model; None without a prefill."""
    lines = [line for line in of_kind(result["lines"], "prefill") if measured(line)]
    models = sorted({line["model"] for line in lines})
    if not models:
        return None
    figure, _ = report.panels(len(models), (5 * len(models), 4))
    for axes, model in zip(figure.axes, models, strict=True):
        rows = [
            {"what": side(line), "length": line["tokens"], "seconds": line["seconds"]}
            for line in lines
            if line["model"] == model
        ]
        names = {"plain": "CoMeT", "graphs": "CoMeT by CUDA graphs", "full": "full attention"}
        labels = {"xlabel": "tokens", "ylabel": "prefill, seconds", "title": model}
        report.curves(axes, rows, names, "seconds", **labels)
        axes.legend(frameon=False, fontsize=8)
    return figure


def plot_training(result):
    """Peak memory of the steps beside the card's; None without a GPU's step."""
    lines = [line for line in of_kind(result["lines"], "train_step") if "peak_gib" in line]
    if not lines:
        return None
    card = next((line["gib"] for line in result["lines"] if "gib" in line), CARD_GIB)
    figure, axes = report.panels(1, (9, 1.5 + 0.4 * len(lines)))
    peaks = [line["peak_gib"] for line in lines]
    colors = ["tab:red" if out_of_memory(line) else "tab:blue" for line in lines]
    names = [line["what"].removeprefix("step: ") for line in lines]
    bars = axes.barh(names, peaks, color=colors)
    notes = ["out of memory" if out_of_memory(line) else "" for line in lines]
    seconds = [f"{line['seconds']:.1f} s" if measured(line) else "" for line in lines]
    axes.bar_label(bars, [a or b for a, b in zip(notes, seconds, strict=True)], padding=3)
    axes.axvline(card, color="black", linestyle="--", label=f"the card's {card:.0f} GiB")
    axes.invert_yaxis()
    axes.set(xlabel="peak of a training step, GiB", xlim=(0, 1.35 * max(card, *peaks)))
    axes.legend(frameon=False, fontsize=8)
    return figure


PICTURES = {"prefill": plot_prefill, "training": plot_training}
