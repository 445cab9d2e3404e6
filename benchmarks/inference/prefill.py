"""What a prefill costs: ms a token and peak memory by length, against slots in full, full attention
and a sliding window."""

from rich.progress import track

from benchmarks.inference.ways import measure_length, measure_ratio
from benchmarks.shared import processes, report
from benchmarks.shared.options import Options, conditions, settle_device
from benchmarks.shared.rates import time_key
from benchmarks.shared.report import ABSENT, at_most, met, table, texts
from benchmarks.shared.shapes import SHAPES
from comet_pl.analysis import flops
from comet_pl.errors import UserError, run_cli

MARGIN = 1.10  # ours may take this much more than the floor
LEAST_RATE = 0.60  # of a plain matrix product, in the linear layers
NAMES = {
    "comet": "CoMeT",
    "trailing": "CoMeT, layout trailing",
    "slots_in_full": "slots in full",
    "full_attention": "full attention",
    "sliding_window": "sliding window, sinks",
}
STEADY = ("trailing", "slots_in_full", "sliding_window")  # cost the same at any length
STEADY_TO = 65536  # tokens
MEASURED = ("ms_per_token", "processor_ms_per_token", "peak_mib", "reading_mib")


def parse(argv):
    options = Options("inference.prefill", __doc__).settle(argv)
    if options.size == "only-4b" and options.given & {"lengths", "full_attention_to"}:
        flags = "--lengths or --full-attention-to"
        raise UserError(f"--only-4b: given with {flags}, but it has no lengths")
    settle_device(options)
    if options.device == "cuda" and "full_attention_to" not in options.given:
        options.full_attention_to = 262144
    return options


def measure(job):
    if "length" in job:
        return processes.measure(measure_length, job, f"{job['what']} of {job['length']} tokens")
    return processes.measure(measure_ratio, job, "the ratio")


def benchmark(options):
    usual = "paper" if options.device == "cuda" else "quarter"
    shape = SHAPES[{"small": "sixteenth", "full": "paper"}.get(options.size, usual)]
    ratio_shape = SHAPES["sixteenth" if options.size == "small" else "paper"]
    common, lengths = conditions(options), sorted(set(options.lengths))
    limits = dict.fromkeys(STEADY, STEADY_TO) | {"full_attention": options.full_attention_to}
    plan = [(what, n) for what in NAMES for n in lengths if n <= limits.get(what, n)]
    ratio, rows = ratio_alone(options, ratio_shape), []
    for what, n in track(plan, description="measuring", transient=True):
        rows.append(measure({**common, "what": what, "shape": shape.name, "length": n}))
    against = against_full_attention(rows, lengths[-1], common["clock"])
    return ratio | {
        "lengths_shape": shape.name,
        "shapes": {one.name: vars(one) for one in (ratio_shape, shape)},
        "flatness": report.flatness(rows),
        "against_full_attention": against,
        "lengths": rows,
    }


def ratio_alone(options, shape):
    """The ratio at one shape and the rate of the linear layers, both with their verdicts."""
    common = conditions(options)
    ratio = measure({**common, "what": "ratio", "shape": shape.name, "rounds": options.rounds})
    floor, rate = flops.floor(shape.comet()), ratio["achieved"]["comet"]["linear"]["share"]
    verdict = at_most(ratio[f"{common['clock']}_ratio"], MARGIN * floor)
    return {
        **common,
        "ratio": {"shape": shape.name, "floor": floor, **verdict, **ratio},
        "linear_rate": {"value": rate, "bound": LEAST_RATE, "met": rate >= LEAST_RATE},
        "shapes": {shape.name: vars(shape)},
    }


def against_full_attention(rows, furthest, clock):
    """From where on CoMeT is cheaper than full attention; how much at two lengths.

    A token after n others costs full attention a + b n: its ms a token and its memory are straight
    lines through the two longest texts."""
    key = time_key(clock)
    ours, full = (
        {row["length"]: row for row in rows if row["what"] == what}
        for what in ("comet", "full_attention")
    )

    def ratios(row):
        n = row["length"]
        memory = row["reading_mib"] / ours[n]["reading_mib"]
        return {"length": n, "time": row[key] / ours[n][key], "memory": memory}

    cheaper = report.crossover(rows, key, "full_attention")
    longest = ratios(max(full.items())[1]) if full else None
    verdict = {"cheaper_from": cheaper, "longest": longest, "extrapolated": None}
    if len(full) > 1 and furthest > max(full):
        (n, low), (n2, high) = sorted(full.items())[-2:]
        step = (furthest - n2) / (n2 - n)
        line = {name: high[name] + step * (high[name] - low[name]) for name in MEASURED}
        how = {"how": f"a straight line through {n:,} and {n2:,} tokens"}
        verdict["extrapolated"] = line | ratios(line | {"length": furthest}) | how
    return verdict


def section(result):
    """The ratio of CoMeT and slots in full and the rates of both; then the lengths, if any."""
    ratio, linear = result["ratio"], result.get("linear_rate")
    shape = report.memory_shape(result["shapes"][ratio["shape"]])
    how = f"memory full, head excluded, both ways in turn, {ratio['rounds']} rounds"
    yield f"The ratio: {shape}; {how}."
    yield ""
    value, *limits = texts(ratio, "value:.3f", "floor:.3f", "bound:.3f")
    row = ("time, CoMeT / slots in full", f"{value} ({met(ratio)})", *limits)
    yield from table(("", "measured", "floor", "at most"), [row])
    heads = ("at that shape", "GFLOP/s", "share of a plain product", "in the linear layers")
    fields = ("rate/1e9:,.1f", "share:.0%", "linear.share:.0%", "product_rate/1e9:,.1f")
    rates = ratio.get("achieved") or {}
    rows = [(NAMES[w], *texts(rates.get(w), *fields)) for w in ("comet", "slots_in_full")]
    yield from table((*heads, "plain product, GFLOP/s"), rows)
    verdict = ABSENT
    if linear:
        verdict = f"{linear['value']:.0%}, wanted: {linear['bound']:.0%} ({met(linear)})"
    yield f"CoMeT's linear layers against a plain matrix product of the same process: {verdict}."
    if "lengths" in result:
        yield ""
        yield from by_length(result)


def by_length(result):
    shape = report.memory_shape(result["shapes"][result["lengths_shape"]])
    clock, key = result["clock"], time_key(result["clock"])
    yield f"By length: {shape}. Each figure from a process of its own, {clock} time."
    yield ""
    against = result.get("against_full_attention")
    beyond = against and against["extrapolated"]
    fields = ("length:,", f"{key}:.3f", "speed:,.0f", "peak_mib:,.0f", "reading_mib:,.0f")
    shares, rows = ("achieved.share:.0%", "achieved.linear.share:.0%"), []
    for what, name in NAMES.items():
        same = [row for row in result["lengths"] if row["what"] == what]
        for row in same or [None]:
            row = row and row | {"speed": 1e3 / row[key]}
            rows.append((name, *texts(row, *fields, *shares)))
    if beyond:
        name = f"full attention, *extrapolated: {beyond['how']}*"
        rows.append((name, *texts(beyond | {"speed": 1e3 / beyond[key]}, *fields), "", ""))
    heads = ("", "tokens", "ms/token", "tokens/s", "peak MiB", "of it by reading")
    yield from table((*heads, "share of a plain product", "linear layers"), rows)
    if flat := result["flatness"]:
        spread = f"differs by {flat['peak_mib']:.1%}, allowed {report.FLAT_WITHIN:.0%}"
        yield f"- CoMeT's peak memory from {report.FLAT_FROM:,} tokens on {spread}."
    if not against:
        yield f"- CoMeT against full attention (crossover, ratios, extrapolation): {ABSENT}."
        return
    start = report.start_of(against["cheaper_from"])
    yield f"- CoMeT is cheaper than full attention from: {start}."
    for end in filter(None, (against["longest"], beyond)):
        how = f"extrapolated: {end['how']}" if "how" in end else "the longest it read"
        times = f"{end['time']:.1f} x the time and {end['memory']:.1f} x the memory"
        yield f"- at {end['length']:,} tokens ({how}) full attention takes {times}."


def plot(result):
    clock, rows, (figure, axes) = result["clock"], result["lengths"], report.panels(2)
    lines = NAMES | {"extrapolated": "full attention, extrapolated"}
    if end := result["against_full_attention"]["extrapolated"]:
        full = [row for row in rows if row["what"] == "full_attention"]
        last = max(full, key=lambda row: row["length"])
        rows = [*rows, *(point | {"what": "extrapolated"} for point in (last, end))]
    keys = {time_key(clock): f"ms a token ({clock} time)", "peak_mib": "peak memory, MiB"}
    for side, (key, label) in zip(axes, keys.items(), strict=True):
        report.curves(side, rows, lines, key, ylabel=label, xlabel="tokens read")
    axes[0].legend(frameon=False)
    return figure


def main(argv):
    options = parse(argv)
    device = "cuda" if options.device == "cuda" else None
    if options.size != "only-4b":
        name = ("prefill", options.size, device)
        report.publish(options, name, benchmark(options), section, plot=plot)
    if options.size != "small":
        result = ratio_alone(options, SHAPES["paper-4b"])
        report.publish(options, ("prefill", "4b", device), result, section)


if __name__ == "__main__":
    run_cli(main)
