"""One measurement of the data path in this process: `python measure_data.py '{"what": ..., ...}'` prints one JSON line.

feeding.py starts it. `what` is ours (tokenise into a new cache and pack), plain (datasets.load_dataset and .map over the same rows), stream
(all batches of one epoch with data.streaming=true) or first_batch (streamed, and out of the cache that `ours` has left). Times are in
seconds, wall and processor time of this process and its workers; memory is in MiB.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from process_memory import resident
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from comet_pl.config.schema import ScrollsData
from comet_pl.errors import run_cli
from data.jsonl import find
from data.scrolls import ScrollsDataModule, ScrollsSource, tasks
from data.text.packing import pack, padding_share
from data.text.tokenized import cached

CHUNK, STRIDE = 2048, 8  # of the paper; where chunks end changes no cost
ENDLESS = 1 << 40  # steps


def data_of(job: dict[str, Any], **more: Any) -> ScrollsData:
    """The data section of a job."""
    names = ("root", "max_length", "batch_size", "shuffle_window", "cache")
    return ScrollsData(
        **{name: job[name] for name in names},
        packing="documents",
        num_workers=job["workers"],
        **more,
    )


def training_files(root: str) -> list[Path]:
    """Of all tasks under `root`, in the order of their rows.

    Raises:
        UserError: root is no folder or holds no task.
    """
    found = (find(Path(root) / task, "train") for task in tasks(ScrollsData(root=root)))
    return [path for path in found if path]


class Clock:
    """Seconds since it was made: (wall, processor). The latter counts workers once they have ended."""

    def __init__(self) -> None:
        self.start = self._now()

    def _now(self) -> np.ndarray:
        return np.array([time.perf_counter(), sum(os.times()[:4])])

    def read(self) -> dict[str, float]:
        wall, processor = (self._now() - self.start).tolist()
        return {"seconds": wall, "processor_seconds": processor}


def ours(job: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Tokens are those kept: a document over max_length is tokenised whole and cut."""
    import datasets  # noqa: F401 - on both sides before the clock starts

    source = ScrollsSource(data_of(job), tokenizer, "train")
    clock = Clock()
    samples = cached(source, Path(job["cache"]), "train", job["workers"])
    packing = Clock()
    rows = pack(samples.lengths, job["max_length"], np.random.default_rng(0))
    pack_seconds = packing.read()["seconds"]
    return {
        **clock.read(),
        "pack_seconds": pack_seconds,
        "texts": len(samples),
        "tokens": int(samples.lengths.sum()),
        "padding_share": padding_share(rows, samples.lengths, job["max_length"]),
    }


def plain(job: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The shortest way there is: no template, no labels, nothing cut or packed."""
    import datasets
    import pyarrow.compute

    datasets.disable_progress_bars()
    tokenise = partial(_tokenise, tokenizer=tokenizer)
    files = [str(path) for path in training_files(job["root"])]
    clock = Clock()
    rows = datasets.load_dataset("json", data_files=files, split="train", cache_dir=job["cache"])
    load_seconds = clock.read()["seconds"]
    done = rows.map(tokenise, num_proc=job["workers"] or None, remove_columns=rows.column_names)
    times = clock.read()
    tokens = pyarrow.compute.sum(pyarrow.compute.list_value_length(done.data["ids"])).as_py()
    return {**times, "load_seconds": load_seconds, "texts": len(done), "tokens": tokens}


def _tokenise(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {"ids": tokenizer(row["input"])["input_ids"] + tokenizer(row["output"])["input_ids"]}


class _Ended(Exception):
    pass


class _OneEpoch:
    """Windows that raise where a second epoch would begin."""

    def __init__(self, windows: Any):
        self.windows = windows

    def window(self, epoch: int, number: int) -> Any:
        found = self.windows.window(epoch, number)
        if found is None:
            raise _Ended
        return found


def stream(job: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """baseline_mib: after imports and tokenizer; peak_mib: the highest of this process, workers apart."""
    found = {
        "baseline_mib": resident("VmRSS"),
        "baseline_shared_mib": proportional(os.getpid()),
        "texts": 0,
        "batches": 0,
        "tokens": 0,
    }
    clock = Clock()
    module = data_module(job, tokenizer, streaming=True)
    module.windows = _OneEpoch(module.windows)
    try:
        for batch in module.train_dataloader():
            found["batches"] += 1
            found["texts"] += sum(map(sum, batch["resets"]))
            found["tokens"] += int(batch["attention_mask"].sum())
    except _Ended:
        pass
    return {**clock.read(), **found, "peak_mib": resident("VmHWM")}


def first_batch(job: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Seconds from making the data module to having a batch."""
    import datasets  # noqa: F401 - counts among the imports, in both ways

    before = time.time() - job["started"]
    waits = {
        name: _first(job, tokenizer, streaming)
        for name, streaming in (("streamed", True), ("cached", False))
    }
    return {"imports_and_tokenizer": before, **waits}


def _first(job: dict[str, Any], tokenizer: PreTrainedTokenizerBase, streaming: bool) -> float:
    start = time.perf_counter()
    batches = iter(data_module(job, tokenizer, streaming=streaming).train_dataloader())
    next(batches)
    seconds = time.perf_counter() - start
    batches.close()  # type: ignore[attr-defined]
    return seconds


def data_module(
    job: dict[str, Any], tokenizer: PreTrainedTokenizerBase, streaming: bool
) -> ScrollsDataModule:
    return ScrollsDataModule(
        data_of(job, streaming=streaming),
        tokenizer,
        seed=0,
        chunk_size=CHUNK,
        stride=STRIDE,
        max_steps=ENDLESS,
    )


def proportional(pid: int) -> float:
    """MiB of a process, pages that n processes share counting 1/n: sums over processes are then the memory really taken. 0: it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0) / 1024


JOBS: dict[str, Callable[[dict[str, Any], PreTrainedTokenizerBase], dict[str, Any]]] = {
    "ours": ours,
    "plain": plain,
    "stream": stream,
    "first_batch": first_batch,
}


def main(argv: list[str]) -> None:
    job = json.loads(argv[0])
    print(json.dumps(JOBS[job["what"]](job, AutoTokenizer.from_pretrained(job["tokenizer"]))))


if __name__ == "__main__":
    run_cli(main)
