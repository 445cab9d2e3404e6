"""What it costs to get data to the model: tokens a second, memory while streaming, time to the first batch.

    python benchmarks/data.py --root FOLDER --gigabytes 1    the real run; FOLDER/<task>/train.jsonl[.xz|.gz|.zst] as of SCROLLS
    python benchmarks/data.py                                generated rows only, 0.1 GB
    python benchmarks/data.py --small                        1 MB, half a minute: a look, no measurement

1. Tokenise and pack: our cached path against plain datasets.load_dataset and .map(num_proc) of the same rows with the same tokenizer, each
   from an empty cache, in turn, --rounds times; the ratio is that of the times, its median over the rounds. Ours also writes the template
   and labels, cuts and packs.
2. Memory while all batches of an epoch are streamed (data.streaming=true), of the rows in --root and of a generated file: above what the
   process has after its imports and the tokenizer. "All processes" adds up the workers too, shared pages once, sampled as it runs.
3. Seconds from the start of the data module to the first batch: streamed, and out of a cache that is there.

Each measurement runs in a process of its own (measure_data.py). Results: benchmarks/results/data*.json and .png.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import data_report
import numpy as np
import report
from measure_data import proportional, training_files
from measure_decode import USUAL_MODEL
from perplexity import load_tokenizer

from comet_pl.config.schema import ScrollsData
from comet_pl.errors import Parser, UserError, run_cli
from comet_pl.progress import Bar
from data.haystack import sentences
from data.jsonl import Complaints, read
from data.scrolls import texts
from data.tokenizer import train_tokenizer

HERE = Path(__file__).resolve().parent
LIMIT = 1024  # MiB above the baseline that streaming may take
EVERY = 0.25  # seconds between two looks at the processes
SIZES: dict[str | None, dict[str, Any]] = {
    None: {"gigabytes": 0.1, "max_length": 32768, "window": 1024},
    "small": {"gigabytes": 0.001, "max_length": 2048, "window": 64},
}
CHARACTERS = {
    None: 50_000,
    "small": 2_000,
}  # of a generated document, in the middle; QMSum's have 56,000
VOCABULARY = 4096  # of a tokenizer trained on the rows


def parse(argv: list[str]) -> argparse.Namespace:
    usual = SIZES[None]
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--small", dest="size", action="store_const", const="small", help="little data, short rows"
    )
    parser.add_argument(
        "--root",
        metavar="FOLDER",
        help="rows to measure with, as <task>/train.jsonl[.xz|.gz|.zst] (default: generated)",
    )
    parser.add_argument(
        "--gigabytes",
        type=float,
        metavar="X",
        help=f"10^9 bytes of generated rows (default: {usual['gigabytes']})",
    )
    parser.add_argument(
        "--model",
        metavar="FOLDER",
        help="of the tokenizer (default: models/smollm2_135m; else one trained on the rows)",
    )
    parser.add_argument(
        "--workers", type=int, default=2, metavar="N", help="worker processes; 0: none (default: 2)"
    )
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help=f"tokens of a row (default: {usual['max_length']})",
    )
    parser.add_argument(
        "--window", type=int, metavar="N", help=f"data.shuffle_window (default: {usual['window']})"
    )
    parser.add_argument(
        "--rounds", type=int, default=1, metavar="N", help="of the throughput (default: 1)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=HERE / "results",
        metavar="DIR",
        help="default: benchmarks/results",
    )
    options = parser.parse_args(argv)
    for name, value in SIZES[options.size].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for name, least in (("workers", 0), ("max_length", 16), ("window", 1), ("rounds", 1)):
        if getattr(options, name) < least:
            raise UserError(
                f"--{name.replace('_', '-')}: {getattr(options, name)} given, a whole number >= {least} is needed"
            )
    if not 0 < options.gigabytes < float("inf"):
        raise UserError(f"--gigabytes: {options.gigabytes} given, a number > 0 is needed")
    if options.root is not None:
        try:
            files = training_files(options.root)
        except UserError as error:
            raise UserError(str(error).replace("data.root", "--root", 1)) from None
        if not files:
            raise UserError(f"--root: {options.root} has no <task>/train.jsonl[.xz|.gz|.zst]")
    if not Path("/proc/self/smaps_rollup").exists():
        raise UserError("the memory of processes is read in /proc, which this system does not have")
    report.make_folder(options.out)
    return options


# ---- rows, tokenizer


def generate(path: Path, size: float, characters: int) -> None:
    """A file of at least `size` bytes: SCROLLS rows of filler, always the same; documents of about `characters`, thrice that at most."""
    known = sentences()
    path.parent.mkdir(parents=True)
    written = 0
    with path.open("wb") as file:
        for number in itertools.count():
            if written >= size:
                return
            random = np.random.default_rng([0, number])
            length = characters * min(3.0, random.lognormal(0, 0.5))
            few = [
                known[k] for k in random.integers(len(known), size=int(length / 20)).tolist()
            ]  # a sentence has more than 20
            ends = np.cumsum([len(one) for one in few])
            document = "".join(few[: int(np.searchsorted(ends, length)) + 1])
            row = {
                "id": str(number),
                "pid": f"{number}_0",
                "input": f"What happened?\n\n{document}",
                "output": few[0].strip(),
            }
            written += file.write(json.dumps(row).encode() + b"\n")


def text_size(root: str) -> dict[str, int]:
    """rows, and bytes of their texts; the files are then in the system's memory, for whoever reads them next."""
    sizes = [len(row["input"].encode()) + len(row["output"].encode()) for row in _rows(root)]
    return {"rows": len(sizes), "bytes": sum(sizes)}


def _rows(root: str) -> Iterator[dict[str, Any]]:
    for path in training_files(root):
        for place, row in read(path, Complaints("raise")):
            if not (isinstance(row.get("input"), str) and isinstance(row.get("output"), str)):
                raise UserError(f"{place}: input and output are needed, each a text")
            yield row


def tokenizer_folder(options: argparse.Namespace, root: str, work: Path) -> tuple[str, str]:
    """(folder, what it is)."""
    folder = options.model or (
        str(USUAL_MODEL) if USUAL_MODEL.is_dir() and options.size is None else None
    )
    if folder is not None:
        load_tokenizer(folder)
        return folder, Path(folder).name
    train_tokenizer(texts(ScrollsData(root=root)), VOCABULARY).save_pretrained(work / "tokenizer")
    return str(work / "tokenizer"), f"trained on the rows, {VOCABULARY} ids at most"


# ---- measurements in processes of their own


def measure(job: dict[str, Any], watched: bool = False) -> dict[str, Any]:
    """What measure_data.py finds. watched: with what was seen of its processes."""
    quiet = {
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }  # workers are the parallelism, on both sides
    command = [
        sys.executable,
        str(HERE / "measure_data.py"),
        json.dumps(job | {"started": time.time()}),
    ]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=os.environ | quiet)
        try:
            seen = watch(process) if watched else {}
            process.wait()
        finally:
            if (
                process.poll() is None
            ):  # interrupted; workers, which ignore that, would outlive their parent
                for pid in family(process.pid):
                    os.kill(pid, signal.SIGKILL)
        out.seek(0)
        err.seek(0)
        if process.returncode:
            why = (err.read().strip().splitlines() or ["killed, most likely for want of memory"])[
                -1
            ].removeprefix("error: ")
            raise UserError(
                f"measuring {job['what']} ended with status {process.returncode}: {why}"
            )
        return json.loads(out.read().splitlines()[-1]) | seen


def watch(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Memory of a process and all below it until it ends, in MiB: the highest sums seen, and the curve of the second.

    all_rss_mib counts a page once for each process that has it; all_mib once.
    """
    start, rss, processes, curve = time.perf_counter(), 0.0, 0, []
    while process.poll() is None:
        pids = family(process.pid)
        curve.append((time.perf_counter() - start, sum(map(proportional, pids))))
        rss, processes = max(rss, sum(map(resident_now, pids))), max(processes, len(pids))
        time.sleep(EVERY)
    thinned = curve[:: max(1, len(curve) // 300)]
    return {
        "all_rss_mib": rss,
        "all_mib": max((mib for _, mib in curve), default=0.0),
        "processes": processes,
        "curve": thinned,
    }


def family(pid: int) -> list[int]:
    """A process and those that it, or they, started."""
    found = [pid]
    for one in found:
        try:
            found += [
                int(child)
                for task in Path(f"/proc/{one}/task").iterdir()
                for child in (task / "children").read_text().split()
            ]
        except OSError:  # it has ended
            continue
    return found


def resident_now(pid: int) -> float:
    """MiB; 0: it has ended."""
    try:
        return (
            int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            * os.sysconf("SC_PAGE_SIZE")
            / 2**20
        )
    except OSError:
        return 0.0


# ---- what was measured


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """All measurements, with what they depend on, and the verdict."""
    machine = report.machine("cpu")
    with (
        tempfile.TemporaryDirectory(prefix="data-benchmark-") as folder,
        Bar(4 + 2 * options.rounds) as bar,
    ):
        work = Path(folder)

        def done(name: str) -> None:
            bar.add(1)
            bar.name(name)

        bar.name("generates rows")
        generated = work / "generated" / "qmsum" / "train.jsonl"
        generate(generated, options.gigabytes * 1e9, CHARACTERS[options.size])
        corpora = ({"given": options.root} if options.root else {}) | {
            "generated": str(generated.parents[1])
        }
        root = next(iter(corpora.values()))
        sizes = {name: text_size(place) for name, place in corpora.items()}
        tokenizer, tokenizer_name = tokenizer_folder(options, root, work)
        common = {
            "tokenizer": tokenizer,
            "workers": options.workers,
            "max_length": options.max_length,
            "batch_size": 2,
        }
        common |= {"root": root, "shuffle_window": options.window}

        done("tokenises and packs")
        rounds = []
        for k in range(options.rounds):
            found = {}
            for what in ("ours", "plain")[:: -1 if k % 2 else 1]:
                found[what] = measure({**common, "what": what, "cache": str(work / f"{what}-{k}")})
                done("tokenises and packs")
            rounds.append(found)
        cache = str(work / "ours-0")
        first = measure({**common, "what": "first_batch", "cache": cache})
        memory = []
        for name, place in corpora.items():
            done(f"streams {name} rows")
            found = measure(
                {**common, "what": "stream", "root": place, "cache": cache}, watched=True
            )
            memory.append({"corpus": name, **sizes[name], **found, **above(found)})
    return {
        "machine": machine,
        "tokenizer": tokenizer_name,
        "corpora": sizes,
        **{
            name: getattr(options, name)
            for name in ("gigabytes", "workers", "max_length", "window", "rounds")
        },
        "throughput": throughput(rounds, next(iter(sizes.values()))["bytes"]),
        "first_batch": first,
        "memory": memory,
        "verdict": {
            "limit_mib": LIMIT,
            "met": all(one["highest_above_mib"] < LIMIT for one in memory),
        },
    }


def throughput(rounds: list[dict[str, dict[str, Any]]], size: int) -> dict[str, Any]:
    """Medians over the rounds; the ratios are those within a round, > 1: ours is faster."""
    found: dict[str, Any] = {"rounds": rounds}
    for what in ("ours", "plain"):
        for unit, amount in (("tokens", rounds[0][what]["tokens"]), ("mb", size / 1e6)):
            found[f"{what}_{unit}_per_s"] = statistics.median(
                amount / one[what]["seconds"] for one in rounds
            )
    for name, key in (("ratio", "seconds"), ("processor_ratio", "processor_seconds")):
        found[name] = statistics.median(one["plain"][key] / one["ours"][key] for one in rounds)
    return found


def above(found: dict[str, Any]) -> dict[str, float]:
    """MiB above the baseline: of the main process, exact; of all processes, as often as they were looked at; the higher one."""
    main, everyone = (
        found["peak_mib"] - found["baseline_mib"],
        found["all_mib"] - found["baseline_shared_mib"],
    )
    return {"above_mib": main, "all_above_mib": everyone, "highest_above_mib": max(main, everyone)}


def main(argv: list[str]) -> None:
    options = parse(argv)
    result = {"command": " ".join(["python benchmarks/data.py", *argv]), **benchmark(options)}
    name = "-".join(["data", *filter(None, [options.size])])
    report.write_json(options.out / f"{name}.json", result)
    report.write_plot(options.out / f"{name}.png", result, data_report.plot)
    data_report.show(result)


if __name__ == "__main__":
    run_cli(main)
