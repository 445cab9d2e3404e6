"""What it costs to get data to the model: tokens a second, memory while streaming, first batch."""

import itertools
import json
import statistics
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.inference.decoders import USUAL_MODEL, load_tokenizer
from benchmarks.loading import feeding
from benchmarks.loading.feeding import training_files
from benchmarks.shared import processes, report
from benchmarks.shared.options import ROOT, Options
from benchmarks.shared.rates import turns
from benchmarks.shared.report import texts
from comet_pl.config.schema import ScrollsData
from comet_pl.errors import UserError, run_cli
from comet_pl.progress import Bar
from data.haystack import sentences
from data.jsonl import Complaints, read
from data.scrolls import texts as training_texts
from data.tokenizer import train_tokenizer

LIMIT = 1024  # MiB above the baseline that streaming may take
CHARACTERS = {None: 50_000, "small": 2_000}  # of a generated document, the median
VOCABULARY = 4096  # of a tokenizer trained on the rows
SIDES = {"ours": "ours: cut, labelled, packed too", "plain": "plain `datasets.map`"}


def parse(argv):
    options = Options("loading.data", __doc__, workers=0, max_length=16).settle(argv)
    if options.root is not None:
        try:
            files = training_files(options.root)
        except UserError as error:
            raise UserError(str(error).replace("data.root", "--root", 1)) from None
        if not files:
            raise UserError(f"--root: {options.root} has no <task>/train.jsonl[.xz|.gz|.zst]")
    if not Path("/proc/self/smaps_rollup").exists():
        raise UserError("this system has no /proc, where the memory of processes is read")
    return options


def generate(path, size, characters):
    """Writes at least `size` bytes of SCROLLS rows of filler, always the same; documents of about
    `characters`, at most thrice that."""
    known, written = sentences(), 0
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        for number in itertools.count():
            if written >= size:
                return
            random = np.random.default_rng([0, number])
            length = characters * min(3.0, random.lognormal(0, 0.5))
            # A sentence has more than 20 characters.
            drawn = random.integers(len(known), size=int(length / 20)).tolist()
            ends = np.cumsum([len(known[k]) for k in drawn])
            kept = drawn[: int(np.searchsorted(ends, length)) + 1]
            document = "".join(known[k] for k in kept)
            row = {
                "id": str(number),
                "pid": f"{number}_0",
                "input": f"What happened?\n\n{document}",
                "output": known[drawn[0]].strip(),
            }
            written += file.write(json.dumps(row).encode() + b"\n")


def text_size(root):
    """Rows, and bytes of their texts. The files are then in the system's memory for all readers."""
    sizes = [len(row["input"].encode()) + len(row["output"].encode()) for row in _rows(root)]
    return {"rows": len(sizes), "bytes": sum(sizes)}


def _rows(root):
    for path in training_files(root):
        for place, row in read(path, Complaints("raise")):
            if not (isinstance(row.get("input"), str) and isinstance(row.get("output"), str)):
                raise UserError(f"{place}: input and output are needed, each a text")
            yield row


def tokenizer_folder(options, root, work):
    usual = USUAL_MODEL.is_dir() and options.size is None
    folder = options.model or (str(USUAL_MODEL) if usual else None)
    if folder is not None:
        load_tokenizer(folder)
        return folder, str(options.model or USUAL_MODEL.relative_to(ROOT))
    few = itertools.islice(training_texts(ScrollsData(root=root)), 1000)
    train_tokenizer(few, VOCABULARY).save_pretrained(work / "tokenizer")
    return str(work / "tokenizer"), f"{VOCABULARY} entries, trained on the rows"


def measure(job, watched=False):
    """The job in a fresh process. Workers are the parallelism on both sides."""
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    what = job["what"]
    return processes.measure(getattr(feeding, what), job, what, watched, **quiet)


def benchmark(options):
    memory, rounds = [], []
    with (
        tempfile.TemporaryDirectory(prefix="data-benchmark-") as folder,
        Bar(4 + 2 * options.rounds) as bar,
    ):
        work = Path(folder)
        bar.name("generates rows")
        generated = work / "generated" / "qmsum" / "train.jsonl"
        generate(generated, options.gigabytes * 1e9, CHARACTERS[options.size])
        corpora = {"given": options.root} if options.root else {}
        corpora["generated"] = str(generated.parents[1])
        root = next(iter(corpora.values()))
        sizes = {name: text_size(path) for name, path in corpora.items()}
        tokenizer, tokenizer_name = tokenizer_folder(options, root, work)
        own = {key: getattr(options, key) for key in ("workers", "max_length")}
        common = {**own, "tokenizer": tokenizer, "batch_size": 2, "root": root}
        common["shuffle_window"] = options.window
        bar.add(1)
        bar.name("tokenises and packs")
        for k in range(options.rounds):
            cell = {}
            for what in turns(SIDES, k):
                cell[what] = measure({**common, "what": what, "cache": str(work / f"{what}-{k}")})
                bar.add(1)
            rounds.append(cell)
        cache = str(work / "ours-0")
        first = measure({**common, "what": "first_batch", "cache": cache})
        for name, path in corpora.items():
            bar.name(f"streams {name} rows")
            job = {**common, "what": "stream", "root": path, "cache": cache}
            row = measure(job, watched=True)
            memory.append({"corpus": name, **sizes[name], **row, **above(row)})
            bar.add(1)
    keys = ("gigabytes", "workers", "max_length", "window", "rounds")
    met = all(row["highest_above_mib"] < LIMIT for row in memory)
    return {
        "tokenizer": tokenizer_name,
        "corpora": sizes,
        **{key: getattr(options, key) for key in keys},
        "throughput": throughput(rounds, next(iter(sizes.values()))["bytes"]),
        "first_batch": first,
        "memory": memory,
        "verdict": {"limit_mib": LIMIT, "met": met},
    }


def throughput(rounds, size):
    """Medians over the rounds; the ratios are those within a round, > 1: ours is faster."""
    result = {"rounds": rounds}
    for what in SIDES:
        for unit, amount in (("tokens", rounds[0][what]["tokens"]), ("mb", size / 1e6)):
            speeds = (amount / one[what]["seconds"] for one in rounds)
            result[f"{what}_{unit}_per_s"] = statistics.median(speeds)
    for name, key in (("ratio", "seconds"), ("processor_ratio", "processor_seconds")):
        result[name] = statistics.median(one["plain"][key] / one["ours"][key] for one in rounds)
    return result


def above(row):
    """MiB above the baseline: of the main process, exact; of all, as sampled; the higher one."""
    main = row["peak_mib"] - row["baseline_mib"]
    everyone = row["all_mib"] - row["baseline_shared_mib"]
    return {"above_mib": main, "all_above_mib": everyone, "highest_above_mib": max(main, everyone)}


def section(result):
    through, first, corpora = (result[key] for key in ("throughput", "first_batch", "corpora"))
    size = corpora.get("given", corpora["generated"])["bytes"] / 1e6
    yield f"Rows of {size:,.0f} MB, {result['workers']} workers."
    yield ""
    rows = []
    for what, name in SIDES.items():
        rows.append([name, *texts(through, f"{what}_tokens_per_s:,.0f", f"{what}_mb_per_s:,.2f")])
    yield from report.table(("tokenise and pack", "tokens/s", "MB/s"), rows)
    rows = []
    for row in result["memory"]:
        size, *memory = texts(row, "bytes/1e6:,.0f", "above_mib:,.0f", "all_above_mib:,.0f")
        rows.append([f"{row['corpus']}, {size} MB", *memory])
    label = "memory while streaming, MiB above imports and tokenizer"
    yield from report.table((label, "main process", "all processes"), rows)
    yield f"- Time of plain `datasets.map` / ours: {through['ratio']:.2f}."
    yield f"- First batch: streamed {first['streamed']:.1f} s, cached {first['cached']:.1f} s."


def plot(result):
    figure, axes = report.panels(1, (6, 3.8))
    for row in result["memory"]:
        label = f"{row['corpus']}: {row['bytes'] / 1e6:,.0f} MB"
        axes.plot(*zip(*row["curve"], strict=True), label=label)
    limit = max(row["baseline_shared_mib"] for row in result["memory"]) + LIMIT
    axes.axhline(limit, color="black", linestyle=":", label="the limit, 1 GiB above the baseline")
    axes.set(xlabel="seconds, from the first import on", ylim=(0, None))
    axes.set(ylabel="MiB of all processes, streaming")
    axes.legend(frameon=False, fontsize=8)
    return figure


def main(argv):
    options = parse(argv)
    report.publish(options, ("data", options.size), benchmark(options), section, plot=plot)


if __name__ == "__main__":
    run_cli(main)
