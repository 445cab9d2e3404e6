"""What decoding costs after any context: ms a token and bytes of the cache, CoMeT in both layouts
and full attention."""

import statistics
from itertools import chain

import torch

from benchmarks.inference import decoders as known
from benchmarks.inference import lanes
from benchmarks.inference.decoders import BACKBONES, USUAL_MODEL
from benchmarks.shared import report
from benchmarks.shared.options import ROOT, Options, conditions, settle_device
from benchmarks.shared.rates import time_key
from benchmarks.shared.report import ABSENT, met, sizes, table, texts
from comet_pl.analysis.bandwidth import decoding_floor
from comet_pl.errors import UserError, run_cli
from comet_pl.progress import Bar

SLICES = 8  # a cycle
FLOOR_CONTEXT = 1024  # tokens before full attention in the floor by bytes
PAIR_CONTEXT = 131072  # tokens before CoMeT in --pair: all memory is full
FULL_ATTENTION = ("full_attention", "in_place")
LAYOUTS = {"comet": "interleaved", "trailing": "trailing"}
NAMES = {"full_attention": "full attention", "in_place": "full attention with its cache in place"}
# CoMeT with full memory may take this much more than the floor by bytes
MARGINS = {"comet": 1.15, "trailing": 1.07}


def parse(argv):
    options = Options("inference.decode", __doc__, global_size=0).settle(argv)
    if options.model and options.backbone:
        raise UserError("--backbone: given with --model")
    if options.pair and "contexts" in options.given:
        raise UserError("--pair: given with --contexts, but it has its own")
    most = BACKBONES.get(options.backbone, {}).get("num_hidden_layers", 0)
    if options.layers is not None and not 1 <= options.layers <= most:
        allowed = f"1 to {most} are allowed" if most else "--backbone NAME is needed with it"
        raise UserError(f"--layers: {options.layers} given, {allowed}")
    options.contexts = sorted(set(options.contexts))
    settle_device(options)
    return options


def benchmark(options):
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    common = conditions(options)
    sizes = (options.chunk_size, options.global_size, options.stride, options.capacity)
    keys = ("chunk_size", "global_size", "compression_stride", "temporary_capacity")
    comet = dict(zip(keys, sizes, strict=True))
    name, decoder = the_decoder(options)
    decoder = decoder.to(options.device, getattr(torch, options.dtype)).eval()
    models = {
        what: known.plug_in(decoder, comet | {"layout": layout}) for what, layout in LAYOUTS.items()
    }

    cycles = options.cycles * options.chunk_size
    tokens = dict.fromkeys(models, cycles) | dict.fromkeys(FULL_ATTENTION, options.tokens)
    contexts = [PAIR_CONTEXT] if options.pair else options.contexts
    full_contexts = [FLOOR_CONTEXT] if options.pair else contexts
    wanted = [(what, n) for what in FULL_ATTENTION for n in full_contexts]
    kept, skipped = lanes.affordable(
        wanted, lanes.token_bytes(decoder), lanes.free_bytes(options.device)
    )
    rest = options.read, lanes.WARM_UP + options.tokens
    with Bar(len(models) * len(contexts) * cycles + len(kept) * options.tokens) as bar:
        bar.live.auto_refresh = False  # a thread that draws would count as ours
        bar.name("prefilling")
        bar.refresh()
        opened = [lanes.open_lane(*own, n, *rest) for own in models.items() for n in contexts]
        opened += [lanes.open_lane(what, decoder, n, *rest) for what, n in kept]
        bar.name("decoding")
        for done in lanes.decode(opened, tokens, options.cycles * SLICES, options.device):
            bar.add(done)
            bar.refresh()

    rows, key = [summary(lane, common["clock"]) for lane in opened], time_key(common["clock"])
    floor = decoding_floor(models["comet"].config, FLOOR_CONTEXT, with_head=True)
    return {
        "model": name,
        "comet": comet,
        **common,
        "cycles": options.cycles,
        "read": options.read,
        "verdict": verdict(rows, key, () if options.pair else FULL_ATTENTION),
        "floor": {"context": FLOOR_CONTEXT, "ratio": floor},
        "skipped": skipped,
        "lengths": rows,
    }


def the_decoder(options):
    if options.model is not None:
        return options.model, known.load_decoder(options.model)
    if options.size == "small" and options.backbone is None:
        return "a tiny random decoder", known.random_decoder(BACKBONES["tiny"])
    if options.backbone is None and USUAL_MODEL.is_dir():
        return str(USUAL_MODEL.relative_to(ROOT)), known.load_decoder(USUAL_MODEL)
    name = options.backbone or USUAL_MODEL.name
    layers = BACKBONES[name]["num_hidden_layers"]
    shape = BACKBONES[name] | {"num_hidden_layers": options.layers or layers}
    part = f"{shape['num_hidden_layers']} of {layers} layers"
    return f"random weights of {name}'s shape, {part}", known.random_decoder(shape)


def summary(lane, clock):
    """A lane in ms: means over all steps by both clocks, the median closing step by `clock`."""
    walls, processor = ([step[k] * 1e3 for step in lane.steps] for k in (1, 2))
    steps = zip(lane.steps, walls if clock == "wall" else processor, strict=True)
    closing = [ms for (kind, *_), ms in steps if kind == "closing"]
    return {
        "what": lane.what,
        "length": lane.length,
        "filled": lane.filled,
        "ms_per_token": statistics.fmean(walls),
        "processor_ms_per_token": statistics.fmean(processor),
        "closing_ms": statistics.median(closing) if closing else None,
        "cache_bytes": lane.bytes,
    }


def verdict(rows, key, rivals=FULL_ATTENTION):
    """How flat CoMeT is, and from which context on it is cheaper than each of `rivals`."""
    return {
        "flat_from": report.FLAT_FROM,
        "flatness": report.flatness(rows, (key, "cache_bytes")),
        "cheaper_from": {what: report.crossover(rows, key, what) for what in rivals},
    }


def section(result):
    clock, verdict = result["clock"], result["verdict"]
    how = f"{clock} time, head included; CoMeT's mean over {result['cycles']} cycle(s) of C tokens"
    yield f"{result['model']}, {sizes(result['comet'])}; {how}."
    yield ""
    key, cells = time_key(clock), {(row["what"], row["length"]): row for row in result["lengths"]}
    rows, cache = [], "cache_bytes/1048576:,.1f"
    for n in sorted({length for _, length in cells}):
        sides = [cells.get((what, n)) for what in (*LAYOUTS, *FULL_ATTENTION)]
        times = [text for side in sides for text in texts(side, f"{key}:,.1f")]
        ours, _, full, _ = sides
        noise = " (noise)" if ours and ours["filled"] else ""
        rest = (*texts(ours, "closing_ms:,.0f", cache), *texts(full, cache))
        rows.append((f"{n:,}{noise}", *times, *rest))
    heads = ["after so many tokens", "CoMeT, ms/token", "trailing", "full attention"]
    heads += ["the same, cache in place", "closing step, ms", "cache, MiB", "full"]
    yield from table(heads, rows)
    bounds = {side: against_floor(result, side) for side in LAYOUTS}
    if bound := bounds["comet"]:
        sides = f"after {bound['after']:,} tokens / full attention after {bound['context']:,}"
        rows = list(chain.from_iterable(map(bound_rows, bounds, bounds.values())))
        yield from table((f"CoMeT {sides}", "measured", "floor by bytes", "at most"), rows)
    else:
        yield f"CoMeT with full memory against full attention after a short context: {ABSENT}."
        yield ""
    if flat := verdict["flatness"]:
        spread = f"ms/token differs by {flat[key]:.1%}, the cache by {flat['cache_bytes']:.1%}"
        yield f"- CoMeT from {verdict['flat_from']:,} tokens on: {spread}."
    for what, where in verdict["cheaper_from"].items():
        yield f"- CoMeT is cheaper than {NAMES[what]} from: {report.start_of(where)}."
    for row in result.get("skipped", ()):
        yield f"- Skipped: {NAMES[row['what']]} after {row['length']:,} tokens: {row['reason']}."


def bound_rows(side, bound):
    """Lines of what against_floor says of a layout."""
    for what, ratio in bound["ratios"].items() if bound else ():
        judged = "" if ratio["met"] is None else f" ({met(ratio)})"
        limits = texts(bound, "floor:.2f", "bound:.2f")
        yield (
            f"{LAYOUTS[side]}, {NAMES[what]}",
            texts(ratio, "value:.2f")[0] + judged,
            *limits,
        )


def against_floor(result, side="comet"):
    """CoMeT in a layout after the longest context against full attention after the floor's.

    Returns:
        {"after", "context", "floor", "bound", "ratios": {side: {"value", "met"}}}; None for what is
        not measured, and instead of all if no context fills the memory.
    """
    floor = result.get("floor") or {"context": 1024, "ratio": None}
    comet, key = result["comet"], time_key(result["clock"])
    times = {(row["what"], row["length"]): row[key] for row in result["lengths"]}
    after = max((n for what, n in times if what == side), default=0)
    groups = -(-comet["chunk_size"] // comet["compression_stride"])  # compression tokens a chunk
    if after < comet["chunk_size"] * -(-comet["temporary_capacity"] // groups):
        return None
    bound, ratios = floor["ratio"] and MARGINS[side] * floor["ratio"], {}
    for what in FULL_ATTENTION:
        theirs = times.get((what, floor["context"]))
        value = theirs and times[side, after] / theirs
        judged = None if value is None or bound is None else value <= bound
        ratios[what] = {"value": value, "met": judged}
    limits = {"context": floor["context"], "floor": floor["ratio"], "bound": bound}
    return {"after": after, **limits, "ratios": ratios}


def plot(result):
    """ms a token and the cache against the context."""
    figure, (left, right) = report.panels(2)
    rows = [row | {"cache_mib": row["cache_bytes"] / 2**20} for row in result["lengths"]]
    both = {"comet": "CoMeT", "trailing": "CoMeT, layout trailing"} | NAMES
    key, xlabel = time_key(result["clock"]), "tokens of context"
    label = f"ms a token ({result['clock']} time)"
    report.curves(left, rows, both, key, ylabel=label, xlabel=xlabel)
    report.curves(right, rows, both, "cache_mib", ylabel="cache, MiB", xlabel=xlabel)
    left.legend(frameon=False, fontsize=8)
    return figure


def main(argv):
    options = parse(argv)
    with torch.inference_mode():
        result = benchmark(options)
    name = ["decode", options.backbone or options.size, "pair" if options.pair else None]
    name.append("cuda" if options.device == "cuda" else None)
    plots = {} if options.pair else {"plot": plot}
    report.publish(options, name, result, section, **plots)


if __name__ == "__main__":
    run_cli(main)
