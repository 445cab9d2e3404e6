"""Writes docs/performance.md from the results of the other benchmarks: `python benchmarks/performance.py`, some seconds.

Nothing is measured here, and the same results give the same page, byte by byte. What a file of results does not have is told as "not
measured". The figures are those of the files, whatever machine they come from; predicted floors stand beside them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import decode_report
import report

from comet_pl.errors import Parser, UserError, run_cli

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "performance.md"
RESULTS = HERE / "results"
ABSENT = "not measured"
MEMORIES = ("tensors_mib", "process_mib", "boundaries_mib")  # of a training step
SIDES = {"ours": "ours: cut, labelled, packed too", "plain": "plain `datasets.map`"}  # of the data

Result = dict[str, Any]
TOP = """# Performance

Written by `python benchmarks/performance.py` from the files in [benchmarks/results](../benchmarks/results): don't edit, measure.
`make bench` is a look at a small size (minutes; no measurement), `make bench-full` measures at full size what about an hour of a CPU that
nothing else uses allows (reading and decoding on a GPU where there is one), and writes this page again. Each section tells its own command;
PATH stands for a folder of yours.

*Floor* is what operation counts (`comet_pl/analysis/flops.py`) or bytes moved (`comet_pl/analysis/bandwidth.py`) allow, if both sides run at the same speed;
it is a prediction. Everything else on this page is measured, unless it says *extrapolated* or *simulated*. With one thread on a CPU the
clock is processor time, which leaves out what other programs took.
"""


# ---- Markdown


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """First column left, the others right."""
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (heads, rule, *rows)] + [""]


def number(value: float | None, digits: int = 2) -> str:
    return ABSENT if value is None else f"{value:,.{digits}f}"


def share(value: float | None, digits: int = 0) -> str:
    return ABSENT if value is None else f"{value:.{digits}%}"


def met(verdict: Result | None) -> str:
    return (
        ABSENT
        if verdict is None or verdict["met"] is None
        else "met"
        if verdict["met"]
        else "missed"
    )


def judged(verdict: Result) -> str:
    """The value, and whether it meets its bound where there is one."""
    return number(verdict["value"]) + ("" if verdict["met"] is None else f" ({met(verdict)})")


def machine(result: Result) -> str:
    """What the figures depend on."""
    one = result["machine"]
    where = one.get("gpu") or f"{one['processor']}, {one['cores']} cores, {one['cpu_kernels']}"
    threads = [f"{result['threads']} thread(s)"] if "threads" in result else []
    parts = [
        where,
        *threads,
        *([result["dtype"]] if "dtype" in result else []),
        f"torch {one['torch']}, transformers {one['transformers']}",
    ]
    return f"{', '.join(parts)}; load before: {one['load_before']:.1f}."


def memory_shape(shape: Result) -> str:
    memory = (
        f"C={shape['chunk']}, m={shape['global_size']}, s={shape['stride']}, K={shape['capacity']}"
    )
    return f"{shape['layers']} layers x {shape['hidden']}, {memory}"


# ---- sections: each gives the lines of its file


def prefill_ratio(result: Result) -> Iterator[str]:
    ratio, shapes = result["ratio"], result["shapes"]
    linear, rates = result.get("linear_rate"), ratio.get("achieved") or {}
    shape = shapes[ratio["shape"]]
    yield f"The ratio: {memory_shape(shape)}; memory full, head excluded, both ways in turn, {ratio['rounds']} rounds."
    yield ""
    yield from table(
        ("", "measured", "floor", "at most"),
        [
            (
                "time, CoMeT / slots in full",
                f"{ratio['value']:.3f} ({met(ratio)})",
                f"{ratio['floor']:.3f}",
                f"{ratio['bound']:.3f}",
            )
        ],
    )
    ways = [
        (name, rates.get(what))
        for what, name in report.NAMES.items()
        if what in ("comet", "slots_in_full")
    ]
    yield from table(
        (
            "at that shape",
            "GFLOP/s",
            "share of a plain product",
            "in the linear layers",
            "plain product, GFLOP/s",
        ),
        [
            (
                name,
                number(one["rate"] / 1e9, 1),
                share(one["share"]),
                share(one["linear"]["share"]),
                number(one["product_rate"] / 1e9, 1),
            )
            if one
            else (name, *[ABSENT] * 4)
            for name, one in ways
        ],
    )
    found = (
        f"{share(linear['value'])}, wanted: {linear['bound']:.0%} ({met(linear)})"
        if linear
        else ABSENT
    )
    yield f"CoMeT's linear layers against a plain matrix product of the same process: {found}."


def prefill(result: Result) -> Iterator[str]:
    yield from prefill_ratio(result)
    yield ""
    shape = result["shapes"][result["lengths_shape"]]
    yield f"By length: {memory_shape(shape)}. Each figure from a process of its own, {result['clock']} time."
    yield ""
    key = report.time_key(result["clock"])
    rows = []
    for what, name in report.NAMES.items():
        found = [one for one in result["lengths"] if one["what"] == what]
        for one in found:
            rate = one.get("achieved")
            of_product = (
                (share(rate["share"]), share(rate["linear"]["share"])) if rate else (ABSENT, ABSENT)
            )
            times = (f"{one[key]:.3f}", f"{1e3 / one[key]:,.0f}")
            rows.append(
                (
                    name,
                    f"{one['length']:,}",
                    *times,
                    f"{one['peak_mib']:,.0f}",
                    f"{one['reading_mib']:,.0f}",
                    *of_product,
                )
            )
        if not found:
            rows.append((name, *[ABSENT] * 7))
    against = result.get("against_full_attention")
    beyond = against and against["extrapolated"]
    if beyond:
        memory = f"{beyond['peak_mib']:,.0f}", f"{beyond['reading_mib']:,.0f}"
        rows.append(
            (
                f"full attention, *extrapolated: {beyond['how']}*",
                f"{beyond['length']:,}",
                f"{beyond[key]:.3f}",
                f"{1e3 / beyond[key]:,.0f}",
                *memory,
                "",
                "",
            )
        )
    yield from table(
        (
            "",
            "tokens",
            "ms/token",
            "tokens/s",
            "peak MiB",
            "of it by reading",
            "share of a plain product",
            "linear layers",
        ),
        rows,
    )
    flat = result["flatness"]
    if flat:
        spread = f"differs by {flat['peak_mib']:.1%}, allowed {report.FLAT_WITHIN:.0%}"
        yield f"- CoMeT's peak memory from {report.FLAT_FROM:,} tokens on {spread}."
    if against:
        for line in report.against_full_attention(result):
            yield f"- {line}."
    else:
        yield f"- CoMeT against full attention (crossover, ratios, extrapolation): {ABSENT}."


def reading(result: Result) -> Iterator[str]:
    found, last = result["verdict"], result["marks"][-1]
    clock = f"{result['clock']} time for ms a token"
    yield f"{result['parameters'] / 1e6:,.1f} million weights, {memory_shape(result['shape'])}; {clock}."
    yield ""
    minutes, times = (
        last["seconds"] / 60,
        (number(found["first_ms"], 3), number(found["last_ms"], 3)),
    )
    held = (
        number(last["process_mib"], 0),
        number(result["cache_bytes"] / 2**20, 1),
        number(result["full_attention_bytes"] / 2**20, 0),
    )
    yield from table(
        (
            "tokens read",
            "minutes",
            "ms/token, first quarter",
            "last quarter",
            "process, MiB",
            "memory of the text, MiB",
            "full attention's keys and values (computed), MiB",
        ),
        [(f"{last['tokens']:,}", number(minutes, 1), *times, *held)],
    )
    memory = found["memory"]
    yield f"- After the first quarter the process grew by {share(memory['grown'], 1)}, allowed {share(memory['allowed'])} ({met(memory)})."


def decode(result: Result) -> Iterator[str]:
    comet, clock = result["comet"], result["clock"]
    names = {
        "full_attention": "full attention",
        "in_place": "full attention with its cache in place",
    }
    sizes = f"C={comet['chunk_size']}, m={comet['global_size']}, s={comet['compression_stride']}, K={comet['temporary_capacity']}"
    yield f"{result['model']}, {sizes}; {clock} time, head included; CoMeT's mean over {result['cycles']} cycle(s) of C tokens."
    yield ""
    key = report.time_key(clock)
    found = {(one["what"], one["length"]): one for one in result["lengths"]}
    rows = []
    for n in sorted({length for _, length in found}):
        ours, full, in_place = (
            found.get((what, n)) for what in ("comet", "full_attention", "in_place")
        )
        times = [number(one and one[key], 1) for one in (ours, full, in_place)]
        caches = [number(one and one["cache_bytes"] / 2**20, 1) for one in (ours, full)]
        closing = number(ours and ours["closing_ms"], 0)
        rows.append(
            (f"{n:,}{' (noise)' if ours and ours['filled'] else ''}", *times, closing, *caches)
        )
    heads = (
        "after so many tokens",
        "CoMeT, ms/token",
        "full attention",
        "the same, cache in place",
        "closing step, ms",
        "cache, MiB",
        "full",
    )
    yield from table(heads, rows)
    bound = decode_report.against_floor(result)
    if bound:
        limits = number(bound["floor"]), number(bound["bound"])
        yield from table(
            (
                f"CoMeT after {bound['after']:,} tokens / full attention after {bound['context']:,}",
                "measured",
                "floor by bytes",
                "at most",
            ),
            [(names[what], judged(one), *limits) for what, one in bound["ratios"].items()],
        )
    else:
        yield f"CoMeT with full memory against full attention after a short context: {ABSENT}."
        yield ""
    flat = result["verdict"]["flatness"]
    if flat:
        start = f"CoMeT from {result['verdict']['flat_from']:,} tokens on"
        yield f"- {start}: ms/token differs by {flat[key]:.1%}, the cache by {flat['cache_bytes']:.1%}."
    for what, where in result["verdict"]["cheaper_from"].items():
        told = f"{where['tokens']:,} tokens ({where['how']})" if where else "not found"
        yield f"- CoMeT is cheaper than {names[what]} from: {told}."


def training(result: Result) -> Iterator[str]:
    yield f"Full backpropagation through one text: {memory_shape(result['shape'])}; {result['clock']} time."
    yield ""
    rows = []
    for one in result["lengths"]:
        times = (
            number(one["seconds"]),
            f"{one['length'] / one['seconds']:,.0f}",
            share(one.get("share")),
        )
        rows.append(
            (
                one["what"],
                f"{one['length']:,}",
                *times,
                *(number(one[name], 1) for name in MEMORIES),
            )
        )
    heads: Sequence[str] = (
        "`train.recompute`",
        "tokens",
        "seconds a step",
        "tokens/s",
        "share of a plain product",
    )
    yield from table(
        [*heads, "MiB of tensors", "MiB of the process", "boundaries between chunks"], rows
    )
    yield "The share counts the operations of `none`. Forward passes, with one backward pass that counts as two: none 1, cell 2, chunk 3."
    yield ""
    if "ratio" in result:
        one = result["ratio"]
        told = f"{number(one['value'], 3)}, floor {number(one['floor'], 3)}, allowed {number(one['bound'], 3)} ({met(one)})"
        pairs = len(one["seconds"]["comet"]["wall"])
        told += f"; median of {pairs} pairs" if pairs > 1 else "; one pair"
        yield f"- A step of {one['length']:,} tokens / the same with slots in full, {one['shape']} shape: {told}."
        yield ""
    found = result["verdict"]
    heads = (
        "tokens",
        "memory, chunk / cell",
        "of the process",
        "time, chunk / cell (floor: 1.25)",
        "chunk / none (floor: 1.67)",
        "loss, gradient norm differ by",
    )
    names = ("tensors_mib", "process_mib", "seconds_to_cell", "seconds_to_none")
    yield from table(
        heads,
        [
            (f"{one['length']:,}", *(number(one[name]) for name in names), f"{one['differs']:.0e}")
            for one in found["ratios"]
        ],
    )
    start, grown = f"from {found['flat_from']:,} tokens on", found["growth"]["beyond_boundaries"]
    yield f"- Memory of chunk against cell {start}: at most {found['less']['allowed']} wanted ({met(found['less'])})."
    allowed = f"allowed {found['growth']['allowed']:.0%} ({met(found['growth'])})"
    yield f"- Memory of chunk beyond the boundaries {start} grows by {share(grown, 1)}, {allowed}."
    yield f"- Loss and gradient norm within {found['same']['allowed']:g} ({met(found['same'])})."


def startup(result: Result) -> Iterator[str]:
    yield f"Seconds, the quickest of {result['rounds']} rounds on a warm disk."
    yield ""
    names = {
        "beyond": "`import comet_pl` beyond torch and transformers",
        "first step": "first step of `python train.py conf=passkey`",
    }
    rows = []
    for case, seconds in result["seconds"].items():
        verdict = result["verdicts"].get(case)
        bound = f"{verdict['bound']:g} ({met(verdict)})" if verdict else ""
        rows.append(
            (names.get(case, case), number(seconds["wall"]), number(seconds["processor"]), bound)
        )
    yield from table(("", "wall", "processor", "at most"), rows)


def pipeline(result: Result) -> Iterator[str]:
    how = f"{result['chunks']} chunks, a training step, best of {result['rounds']}; {result['clock']} time decides"
    yield f"Two processes, gloo: {memory_shape(result['shape'])}; {how}."
    yield ""
    rows = []
    for row in result["arrangements"]:
        seconds = (
            number(row["wall"]["step"]),
            number(row["wall"]["step_speedup"]),
            number(row["processor"]["step_speedup"]),
        )
        name = {"alone": "one process", "at_the_same_time": "two, each its own text"}.get(
            row["what"], f"`{row['what']}`"
        )
        rows.append(
            (
                name,
                *seconds,
                number(row["predicted"]) if "predicted" in row else "",
                share(row["others"]),
            )
        )
    yield from table(
        ("", "seconds", "speed-up", "by processor time", "simulated", "taken by other programs"),
        rows,
    )
    verdict = result["verdict"][result["clock"]]
    ceiling = f"two independent processes give {verdict['ceiling']:.2f}"
    yield f"- `layer_level`: {verdict['speedup']:.2f}; {ceiling}, at least {verdict['bound']:.2f} wanted ({met(verdict)})."
    ranks = next(row["ranks"] for row in result["arrangements"] if row["what"] == "layer_level")
    talk = max(
        sum(rank[name] for name in ("transfer", "sending", "flushing")) / rank["seconds"]
        for rank in ranks
    )
    yield f"- A rank's time in communication, `layer_level`: at most {talk:.1%}."
    agreement = result["agreement"]
    apart = f"{agreement['loss_differs']:.0e} and {agreement['gradients_differ']:.0e}"
    yield f"- Loss and gradients against one process: {apart} apart, allowed {agreement['tolerance']:.0e} ({met(agreement)})."
    yield ""
    peaks = {(one["ranks"], one["recompute"]): max(one["mib"]) for one in result["memory"]}
    rows = [
        (str(p), *(number(peaks.get((p, how)), 0) for how in (False, True)))
        for p in sorted({p for p, _ in peaks})
    ]
    yield from table(("ranks", "peak activations of the fullest, MiB", "recomputed"), rows)


def data(result: Result) -> Iterator[str]:
    through, first = result["throughput"], result["first_batch"]
    yield f"Rows of {result['corpora'].get('given', result['corpora']['generated'])['bytes'] / 1e6:,.0f} MB, {result['workers']} workers."
    yield ""
    rows = [
        (name, f"{through[f'{what}_tokens_per_s']:,.0f}", number(through[f"{what}_mb_per_s"]))
        for what, name in SIDES.items()
    ]
    yield from table(("tokenise and pack", "tokens/s", "MB/s"), rows)
    rows = [
        (
            f"{one['corpus']}, {one['bytes'] / 1e6:,.0f} MB",
            number(one["above_mib"], 0),
            number(one["all_above_mib"], 0),
        )
        for one in result["memory"]
    ]
    yield from table(
        (
            "memory while streaming, MiB above imports and tokenizer",
            "main process",
            "all processes",
        ),
        rows,
    )
    yield f"- Time of plain `datasets.map` / ours: {through['ratio']:.2f}."
    yield f"- First batch: streamed {first['streamed']:.1f} s, cached {first['cached']:.1f} s."


SECTIONS: list[
    tuple[str, str, str, Callable[[Result], Iterator[str]]]
] = [  # title, file, command, lines
    ("Reading", "prefill", "python benchmarks/prefill.py --threads 1 --rounds 5", prefill),
    (
        "Reading, Qwen3-4B's layer",
        "prefill-4b",
        "python benchmarks/prefill.py --only-4b --threads 1 --rounds 5",
        prefill_ratio,
    ),
    ("Reading on a GPU", "prefill-cuda", "python benchmarks/prefill.py --device cuda", prefill),
    (
        "Reading on a GPU, Qwen3-4B's layer",
        "prefill-4b-cuda",
        "python benchmarks/prefill.py --only-4b --device cuda",
        prefill_ratio,
    ),
    (
        "Reading a million tokens",
        "reading-small",
        "python benchmarks/reading.py conf=passkey FILE... --name small",
        reading,
    ),
    (
        "Reading books with SmolLM2-135M",
        "reading-smollm2",
        "python benchmarks/reading.py models/smollm2_135m FILE... --name smollm2 --minutes 60",
        reading,
    ),
    ("Decoding", "decode", "python benchmarks/decode.py", decode),
    (
        "Decoding with the paper's memory",
        "decode-full-pair",
        "python benchmarks/decode.py --full --pair",
        decode,
    ),
    (
        "Decoding, Qwen3-0.6B's shape",
        "decode-qwen3_0_6b-pair",
        "python benchmarks/decode.py --full --backbone qwen3_0_6b --pair",
        decode,
    ),
    (
        "Decoding, Qwen3-4B's shape",
        "decode-qwen3_4b-pair",
        "python benchmarks/decode.py --full --backbone qwen3_4b --layers 4 --pair",
        decode,
    ),
    ("Decoding on a GPU", "decode-cuda", "python benchmarks/decode.py --device cuda", decode),
    ("A training step", "training", "python benchmarks/training.py", training),
    (
        "A training step, the ratio at the paper's shape",
        "training-full",
        "python benchmarks/training.py --full",
        training,
    ),
    ("Start-up", "startup", "python benchmarks/startup.py", startup),
    ("Two processes share a text", "pipeline", "python benchmarks/pipeline.py", pipeline),
    ("Data", "data", "python benchmarks/data.py", data),
]


# ---- the page


def page(results: Path) -> str:
    """The whole page.

    Raises:
        UserError: a file of results is broken, or lacks what its section cannot do without.
    """
    lines = [TOP]
    for title, name, command, section in SECTIONS:
        lines += [f"## {title}", ""]
        file = results / f"{name}.json"
        if not file.exists():
            lines += [f"{ABSENT.capitalize()}: `{command}`.", ""]
            continue
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            lines += [
                "```bash",
                result["command"],
                "```",
                machine(result),
                "",
                *section(result),
                "",
            ]
        except (ValueError, KeyError, TypeError, StopIteration) as error:
            raise UserError(
                f"{file}: not a result of `{command}`: {type(error).__name__} {error}"
            ) from None
        pictures = [f"{name}.png", f"{name}-simulated.png"]
        lines += [
            f"![{title}](../benchmarks/results/{picture})\n"
            for picture in pictures
            if (results / picture).exists()
        ]
    return "\n".join(lines).rstrip() + "\n"


def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results"
    )
    parser.add_argument(
        "--out", type=Path, default=PAGE, metavar="FILE", help="default: docs/performance.md"
    )
    options = parser.parse_args(argv)
    if not options.results.is_dir():
        raise UserError(f"--results: {options.results} is no folder")
    text = page(options.results)
    report.write(options.out, lambda file: file.write_text(text, encoding="utf-8"))
    print(f"written: {options.out}")


if __name__ == "__main__":
    run_cli(main)
