"""What a training step costs when it recomputes: time and memory of train.recompute by length."""

from rich.progress import track

from benchmarks.shared import processes, report
from benchmarks.shared.options import Options
from benchmarks.shared.rates import clock_of
from benchmarks.shared.report import at_most, met, texts
from benchmarks.shared.shapes import SHAPES
from benchmarks.training.measure_step import measure, measure_ratio
from comet_pl.analysis import flops
from comet_pl.config.schema import RECOMPUTE
from comet_pl.errors import run_cli
from comet_pl.model.chunk_layout import ChunkPlan

RATIO_SHAPES = {None: "quarter", "small": "sixteenth", "full": "paper"}
RATIO_CHUNKS = 16  # 32k tokens of the paper's
MARGIN = 1.10  # ours may take this much more than the floor
FLAT_CHUNKS = 16  # from where on the two limits below count
LESS = 0.6  # memory of chunk against cell
GROWS = 0.15  # memory of chunk beyond the boundaries may grow by this share
SAME = 1e-5  # loss and gradient norm, relative


def parse(argv):
    options = Options("training.step", __doc__).settle(argv)
    options.lengths = sorted(set(options.lengths))
    return options


def benchmark(options):
    shape = SHAPES["training-small" if options.size == "small" else "training"]
    clock, other = clock_of("cpu", options.threads), SHAPES[RATIO_SHAPES[options.size]]
    common = {"threads": options.threads, "clock": clock, "shape": vars(shape)}
    length = RATIO_CHUNKS * other.chunk
    job = {**common, "shape": vars(other), "length": length, "pairs": options.pairs}
    ratio = processes.measure(measure_ratio, job, f"the ratio of {length} tokens")
    least = floor(other)
    judged = at_most(ratio[f"{clock}_ratio"], MARGIN * least)
    ratio |= {"shape": other.name, "floor": least, **judged}
    rows, plan = [], [(n, what) for n in options.lengths for what in RECOMPUTE]
    for n, what in track(plan, description="measuring", transient=True):
        job = {**common, "recompute": what, "length": n}
        row = processes.measure(measure, job, f"{what} of {n} tokens")
        rate = row["operations"] / row[clock] / row["product_rate"]
        rows.append(row | {"seconds": row[clock], "share": rate})
    aims = verdict(rows, FLAT_CHUNKS * shape.chunk)
    return {**common, "ratio": ratio, "verdict": aims, "lengths": rows}


def floor(shape):
    """The least share of a step with slots in full that RATIO_CHUNKS chunks take at one speed."""
    config = shape.comet()
    plan = ChunkPlan((shape.chunk,) * RATIO_CHUNKS)
    ours, in_full = (
        flops.training_step(config, [plan], plan.tokens - 1, slots=slots).total
        for slots in flops.SLOTS
    )
    return ours / in_full


def verdict(rows, flat_from):
    """What each way costs against the others at each length, and whether the aims are met."""
    cells = {(row["what"], row["length"]): row for row in rows}
    ratios, beyond = [], []
    for n in sorted({length for _, length in cells}):
        none, cell, chunk = (cells[what, n] for what in RECOMPUTE)
        apart = [abs(row[k] / none[k] - 1) for row in (cell, chunk) for k in ("loss", "grad_norm")]
        ratios.append(
            {
                "length": n,
                **{key: chunk[key] / cell[key] for key in ("tensors_mib", "process_mib")},
                "seconds_to_none": chunk["seconds"] / none["seconds"],
                "seconds_to_cell": chunk["seconds"] / cell["seconds"],
                "differs": max(apart),
            }
        )
        if n >= flat_from:
            beyond.append(chunk["tensors_mib"] - chunk["boundaries_mib"])
    less = [ratio["tensors_mib"] <= LESS for ratio in ratios if ratio["length"] >= flat_from]
    growth = max(beyond) / min(beyond) - 1 if len(beyond) > 1 else None
    flat = None if growth is None else growth < GROWS
    return {
        "flat_from": flat_from,
        "ratios": ratios,
        "less": {"allowed": LESS, "met": all(less) if less else None},
        "growth": {"beyond_boundaries": growth, "allowed": GROWS, "met": flat},
        "same": {"allowed": SAME, "met": all(one["differs"] <= SAME for one in ratios)},
    }


def section(result):
    shape = report.memory_shape(result["shape"])
    yield f"Full backpropagation through one text: {shape}; {result['clock']} time."
    yield ""
    fields, rows = ["length:,", "seconds:,.2f", "speed:,.0f", "share:.0%"], []
    fields += ["tensors_mib:,.1f", "process_mib:,.1f", "boundaries_mib:,.1f"]
    for row in result["lengths"]:
        speed = {"speed": row["length"] / row["seconds"]}
        rows.append((row["what"], *texts(row | speed, *fields)))
    heads = ["`train.recompute`", "tokens", "seconds a step", "tokens/s"]
    heads += ["share of a plain product", "MiB of tensors", "MiB of the process"]
    yield from report.table((*heads, "boundaries between chunks"), rows)
    passes = "Forward passes, with one backward pass that counts as two: none 1, cell 2, chunk 3."
    yield f"The share counts the operations of `none`. {passes}"
    yield ""
    if ratio := result.get("ratio"):
        value, floor, bound = texts(ratio, "value:,.3f", "floor:,.3f", "bound:,.3f")
        pairs = len(ratio["seconds"]["comet"]["wall"])
        count = f"median of {pairs} pairs" if pairs > 1 else "one pair"
        told = f"{value}, floor {floor}, allowed {bound} ({met(ratio)}); {count}"
        same = f"the same with slots in full, {ratio['shape']} shape"
        yield f"- A step of {ratio['length']:,} tokens / {same}: {told}."
        yield ""
    verdict = result["verdict"]
    heads = ["tokens", "memory, chunk / cell", "of the process"]
    heads += ["time, chunk / cell (floor: 1.25)", "chunk / none (floor: 1.67)"]
    fields = ["length:,", "tensors_mib:,.2f", "process_mib:,.2f", "seconds_to_cell:,.2f"]
    fields += ["seconds_to_none:,.2f", "differs:.0e"]
    rows = [texts(ratio, *fields) for ratio in verdict["ratios"]]
    yield from report.table((*heads, "loss, gradient norm differ by"), rows)
    start, less, growth = (verdict[key] for key in ("flat_from", "less", "growth"))
    start = f"from {start:,} tokens on"
    wanted = f"at most {less['allowed']} wanted ({met(less)})"
    yield f"- Memory of chunk against cell {start}: {wanted}."
    grown, allowed = texts(growth, "beyond_boundaries:.1%", "allowed:.0%")
    limit = f"grows by {grown}, allowed {allowed} ({met(growth)})"
    yield f"- Memory of chunk beyond the boundaries {start} {limit}."
    same = verdict["same"]
    yield f"- Loss and gradient norm within {same['allowed']:g} ({met(same)})."


def plot(result):
    figure, (left, right) = report.panels(2)
    rows, lines = result["lengths"], {what: f"recompute={what}" for what in RECOMPUTE}
    above, label = "peak memory above the model, MiB", f"a step, seconds ({result['clock']} time)"
    report.curves(left, rows, lines, "tensors_mib", ylabel=above, xlabel="tokens")
    report.curves(right, rows, lines, "seconds", ylabel=label, xlabel="tokens")
    left.legend(frameon=False, fontsize=8)
    return figure


def main(argv):
    options = parse(argv)
    name = ("training", options.size)
    report.publish(options, name, benchmark(options), section, plot=plot)


if __name__ == "__main__":
    run_cli(main)
