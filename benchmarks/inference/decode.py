"""What decoding costs after a context of any length: ms a token and bytes of the cache, ours and Hugging Face's full attention.

    python benchmarks/decode.py            a quarter of an hour on one core, 16 GB: SmolLM2-135M, C = 512, m = 64, s = 8, K = 512
    python benchmarks/decode.py --full     with the memory of the paper (C = 2048, m = 512, K = 2048)
    python benchmarks/decode.py --small    a tiny random model, some seconds: a look, no measurement
    python benchmarks/decode.py --full --backbone qwen3_0_6b --pair    the bound by bytes at another decoder's shape, random weights

Same weights, one row, greedy, each token by one call of the model (`past_key_values`, `logits_to_keep=1`, the head included, under
inference_mode; generate() would add its own cost to all alike). Three sides:

- CoMeT, over whole cycles of C tokens, each with exactly one closing of a chunk (compression token, readout tokens, memory update, keys and
  values of all slots for the next chunk); the cost a token is the mean over cycles, the closing step is also shown alone;
- full attention: sdpa and DynamicCache, which copies all keys and values at each token;
- the same with a cache that is written in place: what full attention costs at least. Both for --tokens steps right after the context.

The floor by bytes moved (comet_pl/analysis/bandwidth.py) is for CoMeT with full memory against full attention after 1,024 tokens. --pair measures
nothing else. --layers takes some layers of a shape, where memory or time are short; the floor is then that of so many.

All lanes (a side after a context) run in one process in turn, a slice of each, so that the machine's moods meet all of them; with one
thread on a CPU processor time counts, which leaves out what other programs took. Contexts up to --read tokens are read; longer ones are
caches filled with noise, which changes no cost. What does not fit into memory is skipped, with the reason.
Results: benchmarks/results/decode*.json and .png, for --backbone NAME in decode-NAME.json; those of --pair end in -pair, without a
picture.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import decode_report
import measure_decode
import report
import torch
from decode_report import FULL_ATTENTION
from measure_decode import BACKBONES, KINDS, ROOT, TINY, USUAL_MODEL, Lane
from prefill import add_device, conditions, settle_device
from report import crossover

from comet_pl.analysis.bandwidth import decoding_floor
from comet_pl.errors import Parser, UserError, run_cli
from comet_pl.progress import Bar

HERE = Path(__file__).resolve().parent
FLAT_WITHIN = (
    0.10  # ms/token and cache bytes of ours from report.FLAT_FROM on may differ by this share
)
SLICES = 8  # a cycle
FLOOR_CONTEXT = 1024  # tokens of full attention that the floor by bytes moved is against
PAIR_CONTEXT = 131072  # tokens before ours in --pair: all memory is full
SIZES: dict[str | None, dict[str, Any]] = {
    None: {
        "chunk_size": 512,
        "global_size": 64,
        "stride": 8,
        "capacity": 512,
        "cycles": 2,
        "tokens": 64,
        "read": 1024,
    },
    "full": {
        "chunk_size": 2048,
        "global_size": 512,
        "stride": 8,
        "capacity": 2048,
        "cycles": 1,
        "tokens": 64,
        "read": 4096,
    },
    "small": {
        "chunk_size": 32,
        "global_size": 4,
        "stride": 4,
        "capacity": 16,
        "cycles": 1,
        "tokens": 16,
        "read": 64,
    },
}
CONTEXTS = {
    None: [256, 1024, 4096, 16384, 131072],
    "full": [1024, 4096, 16384, 131072],
    "small": [16, 64, 16384, 32768],
}
LEAST = {"global_size": 0}  # everything else: 1


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--small", dest="size", action="store_const", const="small", help="a tiny random model"
    )
    size.add_argument(
        "--full", dest="size", action="store_const", const="full", help="the paper's memory sizes"
    )
    decoder = parser.add_mutually_exclusive_group()
    decoder.add_argument(
        "--model",
        metavar="FOLDER",
        help="a plain decoder (default: models/smollm2_135m; else its shape at random)",
    )
    decoder.add_argument("--backbone", choices=BACKBONES, help="a shape with random weights")
    parser.add_argument("--layers", type=int, metavar="N", help="of --backbone (default: all)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--contexts", type=int, nargs="+", metavar="N", help="tokens before the first one measured"
    )
    length.add_argument(
        "--pair",
        action="store_true",
        help="ours after 131072 tokens, full attention after 1024, nothing else",
    )
    helps = {
        "chunk_size": "C, text tokens a chunk and steps a cycle",
        "global_size": "m, global slots; 0: none",
        "stride": "s, text tokens a compression token",
        "capacity": "K, temporary slots",
        "cycles": "of C tokens that ours is measured for",
        "tokens": "that full attention is measured for",
        "read": "contexts up to so many tokens are read, longer ones filled with noise",
    }
    for name, text in helps.items():
        kind = {"chunk_size": "C", "global_size": "M", "stride": "S", "capacity": "K"}.get(
            name, "N"
        )
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=int,
            metavar=kind,
            help=f"{text} (default: {SIZES[None][name]})",
        )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="default: 1")
    add_device(parser)
    parser.add_argument(
        "--out",
        type=Path,
        default=HERE / "results",
        metavar="DIR",
        help="default: benchmarks/results",
    )
    options = parser.parse_args(argv)
    if options.backbone is not None and options.size == "small":
        raise UserError(
            f"--backbone: {options.backbone} given with --small, which has a decoder of its own"
        )
    if options.layers is not None:
        most = BACKBONES[options.backbone]["num_hidden_layers"] if options.backbone else 0
        if not 1 <= options.layers <= most:
            allowed = (
                f"1 to {most} are allowed for {options.backbone}"
                if most
                else "--backbone NAME is needed with it"
            )
            raise UserError(f"--layers: {options.layers} given, {allowed}")
    options.contexts = sorted(set(options.contexts or CONTEXTS[options.size]))
    for name, usual in SIZES[options.size].items():
        if getattr(options, name) is None:
            setattr(options, name, usual)
    for name in ("contexts", "threads", *helps):
        value, least = getattr(options, name), LEAST.get(name, 1)
        value = min(value) if isinstance(value, list) else value
        if value < least:
            raise UserError(
                f"--{name.replace('_', '-')}: {value} given, a whole number >= {least} is needed"
            )
    settle_device(options)
    report.make_folder(options.out)
    return options


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """All measurements, with what they depend on, and the verdicts."""
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    machine, device = report.machine(options.device), options.device
    comet = {"chunk_size": options.chunk_size, "global_size": options.global_size}
    comet |= {"compression_stride": options.stride, "temporary_capacity": options.capacity}
    name, decoder = the_decoder(options)
    decoder = decoder.to(device, getattr(torch, options.dtype)).eval()
    model = measure_decode.plug_in(decoder, comet)

    tokens = {
        "comet": options.cycles * options.chunk_size,
        "full_attention": options.tokens,
        "in_place": options.tokens,
    }
    contexts = [PAIR_CONTEXT] if options.pair else options.contexts
    wanted = [
        (what, n)
        for what in FULL_ATTENTION
        for n in ([FLOOR_CONTEXT] if options.pair else contexts)
    ]
    kept, skipped = measure_decode.affordable(
        wanted, measure_decode.token_bytes(decoder), measure_decode.free_bytes(device)
    )
    room = measure_decode.WARM_UP + options.tokens
    with Bar(len(contexts) * tokens["comet"] + len(kept) * options.tokens) as bar:
        bar.live.auto_refresh = False  # a thread that draws would count as ours
        bar.name("reading, filling")
        bar.refresh()
        lanes = [measure_decode.open_lane("comet", model, n, options.read, room) for n in contexts]
        lanes += [
            measure_decode.open_lane(what, decoder, n, options.read, room) for what, n in kept
        ]
        bar.name("decoding")
        for done in measure_decode.measure(lanes, tokens, options.cycles * SLICES, device):
            bar.add(done)
            bar.refresh()

    common = conditions(options)
    found = [summary(lane, common["clock"]) for lane in lanes]
    result = {
        "model": name,
        "parameters": decoder.num_parameters(),
        "comet": comet,
        **common,
        "machine": machine,
        "cycles": options.cycles,
        "read": options.read,
        "verdict": verdict(
            found, report.time_key(common["clock"]), () if options.pair else FULL_ATTENTION
        ),
        "floor": {
            "context": FLOOR_CONTEXT,
            "ratio": decoding_floor(model.config, FLOOR_CONTEXT, with_head=True),
        },
        "skipped": skipped,
        "lengths": found,
    }
    return result | {"against_floor": decode_report.against_floor(result)}


def the_decoder(options: argparse.Namespace) -> tuple[str, Any]:
    """(what it is, the decoder)."""
    if options.model is not None:
        return options.model, measure_decode.load_decoder(options.model)
    if options.size == "small":
        return "a tiny random decoder", measure_decode.random_decoder(TINY)
    if options.backbone is None and USUAL_MODEL.is_dir():
        return str(USUAL_MODEL.relative_to(ROOT)), measure_decode.load_decoder(USUAL_MODEL)
    name = options.backbone or USUAL_MODEL.name
    all_layers = BACKBONES[name]["num_hidden_layers"]
    layers = options.layers or all_layers
    told = f"random weights of {name}'s shape, {layers} of {all_layers} layers"
    return told, measure_decode.random_decoder(BACKBONES[name] | {"num_hidden_layers": layers})


# ---- what was measured


def summary(lane: Lane, clock: str) -> dict[str, Any]:
    """A lane in numbers. Means are over all steps, in both clocks; single steps are in `clock`, milliseconds."""
    walls, processor = ([step[k] * 1e3 for step in lane.steps] for k in (1, 2))
    single = walls if clock == "wall" else processor
    kinds = {}
    for kind in KINDS:
        times = [ms for ms, step in zip(single, lane.steps, strict=True) if step[0] == kind]
        if times:
            kinds[kind] = {
                "steps": len(times),
                "median_ms": statistics.median(times),
                "share": sum(times) / sum(single),
            }
    return {
        "what": lane.what,
        "length": lane.length,
        "filled": lane.filled,
        "tokens": len(lane.steps),
        "ms_per_token": statistics.fmean(walls),
        "processor_ms_per_token": statistics.fmean(processor),
        "median_ms": statistics.median(single),
        "p99_ms": percentile(single, 0.99),
        "closing_ms": kinds.get("closing", {}).get("median_ms"),
        "kinds": kinds,
        "cache_bytes": lane.bytes,
    }


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed."""
    return sorted(values)[max(0, -int(-share * len(values) // 1) - 1)]


def verdict(
    found: list[dict[str, Any]], key: str, rivals: Sequence[str] = FULL_ATTENTION
) -> dict[str, Any]:
    """Is ours flat, and from which context on is it cheaper than each of `rivals`."""
    curves = {
        what: [(one["length"], one[key]) for one in found if one["what"] == what]
        for what in ("comet", *rivals)
    }
    flat = report.flatness(found, (key, "cache_bytes"))
    return {
        "flat_from": report.FLAT_FROM,
        "flat_within": FLAT_WITHIN,
        "flatness": flat,
        "flat": None if flat is None else max(flat.values()) <= FLAT_WITHIN,
        "cheaper_from": {what: crossover(curves["comet"], curves[what]) for what in rivals},
    }


def main(argv: list[str]) -> None:
    options = parse(argv)
    with torch.inference_mode():
        result = {"command": " ".join(["python benchmarks/decode.py", *argv]), **benchmark(options)}
    parts = [
        options.backbone or options.size,
        "pair" if options.pair else None,
        "cuda" if options.device == "cuda" else None,
    ]
    name = "-".join(["decode", *filter(None, parts)])
    report.write_json(options.out / f"{name}.json", result)
    if not options.pair:
        report.write_plot(options.out / f"{name}.png", result, decode_report.plot)
    decode_report.show(result)


if __name__ == "__main__":
    run_cli(main)
