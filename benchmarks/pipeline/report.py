"""What the pipeline benchmark measured, as lines of Markdown and as pictures."""

from matplotlib.figure import Figure

from benchmarks.shared.report import memory_shape, met, panels, table, texts
from comet_pl.parallel.schedule import SCHEDULES


def section(result):
    step = f"{result['chunks']} chunks, a training step, best of {result['rounds']}"
    shape = memory_shape(result["shape"])
    yield f"Two processes, gloo: {shape}; {step}; {result['clock']} time decides."
    yield ""
    rows, names = [], {"alone": "one process", "at_the_same_time": "two, each its own text"}
    fields = ("wall.step:,.2f", "wall.step_speedup:,.2f", "processor.step_speedup:,.2f")
    for row in result["arrangements"]:
        simulated = texts(row, "predicted:,.2f") if "predicted" in row else [""]
        name = names.get(row["what"], f"`{row['what']}`")
        rows.append((name, *texts(row, *fields), *simulated, *texts(row, "others:.0%")))
    heads = ("", "seconds", "speed-up", "by processor time", "simulated")
    yield from table((*heads, "taken by other programs"), rows)
    verdict, agreement = result["verdict"][result["clock"]], result["agreement"]
    speedup, ceiling, bound = texts(verdict, "speedup:.2f", "ceiling:.2f", "bound:.2f")
    ceiling = f"two independent processes give {ceiling}"
    yield f"- `layer_level`: {speedup}; {ceiling}, at least {bound} wanted ({met(verdict)})."
    ranks = next(row["ranks"] for row in result["arrangements"] if row["what"] == "layer_level")
    parts = ("transfer", "sending", "flushing")
    talk = max(sum(rank[part] for part in parts) / rank["seconds"] for rank in ranks)
    yield f"- A rank's time in communication, `layer_level`: at most {talk:.1%}."
    fields = ("loss_differs:.0e", "gradients_differ:.0e", "tolerance:.0e")
    loss, gradients, allowed = texts(agreement, *fields)
    apart = f"{loss} and {gradients} apart, allowed {allowed} ({met(agreement)})"
    yield f"- Loss and gradients against one process: {apart}."
    yield ""
    peaks = {(row["ranks"], row["recompute"]): max(row["mib"]) for row in result["memory"]}
    rows = []
    for p in sorted({p for p, _ in peaks}):
        both = {"kept": peaks.get((p, False)), "recomputed": peaks.get((p, True))}
        rows.append((str(p), *texts(both, "kept:,.0f", "recomputed:,.0f")))
    yield from table(("ranks", "peak activations of the fullest, MiB", "recomputed"), rows)


def plot(result):
    clock, verdict = result["clock"], result["verdict"][result["clock"]]
    figure, (speed, memory) = panels(2)
    piped = [row for row in result["arrangements"] if "ranks" in row]
    for x, row in enumerate(piped):
        speed.bar(x, row[clock]["step_speedup"], width=0.6)
        span, label = [x - 0.4, x + 0.4], None if x else "simulated, ideal machine"
        speed.plot(span, [row["predicted"]] * 2, color="black", label=label)
        if row["what"] == "layer_level":
            label = "what layer_level has to reach"
            speed.plot(span, [verdict["bound"]] * 2, "--", color="black", label=label)
    label = "ceiling: two independent processes"
    speed.axhline(verdict["ceiling"], color="grey", linestyle=":", label=label)
    speed.set_xticks(range(len(piped)), [row["what"] for row in piped])
    speed.set(ylabel=f"speed-up ({clock} time)", ylim=(0, 2.9))
    speed.legend(frameon=False, fontsize=8, loc="upper left")
    for recompute, label in ((False, "all kept"), (True, "recomputed")):
        rows = [row for row in result["memory"] if row["recompute"] == recompute]
        ranks, peaks = [row["ranks"] for row in rows], [max(row["mib"]) for row in rows]
        memory.plot(ranks, peaks, marker="o", label=f"activations {label}")
        memory.plot(ranks, [peaks[0] / p for p in ranks], color="grey", linestyle=":")
    memory.set(yscale="log", ylabel="peak of a rank, MiB (dotted: 1 / P)")
    label_ranks(memory, ranks)
    memory.legend(frameon=False, fontsize=8)
    return figure


def plot_simulated(result):
    """Efficiency against P: a row a length of text, a column a transfer time."""
    rows = result["simulated"]["rows"]
    lengths = sorted({row["chunks"] for row in rows})
    transfers = sorted({row["transfer_cells"] for row in rows})
    size = (3 * len(transfers), 0.8 + 2.8 * len(lengths))
    figure, share = Figure(figsize=size, layout="constrained"), {"sharex": True, "sharey": True}
    grid = figure.subplots(len(lengths), len(transfers), squeeze=False, **share)
    for line, chunks in zip(grid, lengths, strict=True):
        for axes, transfer in zip(line, transfers, strict=True):
            at = (chunks, transfer)
            same = [row for row in rows if (row["chunks"], row["transfer_cells"]) == at]
            for name in SCHEDULES:
                known = [row for row in same if name in row["efficiency"]]
                points = [(row["ranks"], row["efficiency"][name]) for row in known]
                axes.plot(*zip(*points, strict=True), marker=".", label=name)
            here = " (measured here)" if transfer == result["times"]["transfer_cells"] else ""
            axes.set_title(f"{chunks} chunks, transfer {transfer:.2g} cells{here}", fontsize=8)
            axes.set(ylim=(0, 1.03), ylabel="speed-up / P")
            axes.grid(alpha=0.3)
            label_ranks(axes, [row["ranks"] for row in same])
            axes.label_outer()
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return figure


def label_ranks(axes, ranks):
    axes.set(xscale="log", xlabel="ranks P")
    axes.set_xticks(ranks, [str(p) for p in ranks])
    axes.minorticks_off()
