"""A measurement of the data path; data.py starts it. Times are those of this process and its
workers, in seconds; memory is in MiB.
"""

import os
import time
from functools import partial
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from benchmarks.shared.processes import proportional, resident
from comet_pl.config.schema import ScrollsData
from data.jsonl import find
from data.scrolls import ScrollsBatches, ScrollsSource
from data.scrolls_rows import tasks
from data.text.packing import pack, padding_share
from data.text.tokenized import cached

CHUNK, STRIDE = 2048, 8  # of the paper; where chunks end changes no cost
ENDLESS = 1 << 40  # steps


def data_of(job, **rest):
    names = ("root", "max_length", "batch_size", "shuffle_window", "cache")
    own = {name: job[name] for name in names}
    return ScrollsData(**own, packing="documents", num_workers=job["workers"], **rest)


def load_tokenizer(job):
    return AutoTokenizer.from_pretrained(job["tokenizer"])


def training_files(root):
    """The files of all tasks under `root`, in the order of their rows. Raises UserError."""
    files = (find(Path(root) / task, "train") for task in tasks(ScrollsData(root=root)))
    return [path for path in files if path]


class Clock:
    """Seconds since it was made; processor time counts workers once they have ended."""

    def __init__(self):
        self.start = self._now()

    def _now(self):
        return np.array([time.perf_counter(), sum(os.times()[:4])])

    def seconds(self):
        wall, processor = (self._now() - self.start).tolist()
        return {"seconds": wall, "processor_seconds": processor}


def ours(job):
    """Tokenises into a new cache and packs. Counts the tokens that are kept: a document over
    max_length is tokenised whole and cut."""
    import datasets  # noqa: F401 - both sides import it before the clock starts

    source = ScrollsSource(data_of(job), load_tokenizer(job), "train")
    clock = Clock()
    samples = cached(source, Path(job["cache"]), "train", job["workers"])
    rows = pack(samples.lengths, job["max_length"], np.random.default_rng(0))
    share = padding_share(rows, samples.lengths, job["max_length"])
    counts = {"texts": len(samples), "tokens": int(samples.lengths.sum())}
    return {**clock.seconds(), **counts, "padding_share": share}


def plain(job):
    """datasets.load_dataset and .map over the same rows: no template, no labels, nothing cut."""
    import datasets
    import pyarrow.compute as compute

    datasets.disable_progress_bars()
    tokenise = partial(_tokenise, tokenizer=load_tokenizer(job))
    files = [str(path) for path in training_files(job["root"])]
    clock = Clock()
    rows = datasets.load_dataset("json", data_files=files, split="train", cache_dir=job["cache"])
    rows = rows.map(tokenise, num_proc=job["workers"] or None, remove_columns=rows.column_names)
    times = clock.seconds()
    tokens = compute.sum(compute.list_value_length(rows.data["ids"])).as_py()
    return {**times, "texts": len(rows), "tokens": tokens}


def _tokenise(row, tokenizer):
    return {"ids": tokenizer(row["input"])["input_ids"] + tokenizer(row["output"])["input_ids"]}


class _Ended(Exception):
    pass


class _OneEpoch:
    """Windows that raise where a second epoch would begin."""

    def __init__(self, windows):
        self.windows = windows

    def window(self, epoch, number):
        samples = self.windows.window(epoch, number)
        if samples is None:
            raise _Ended
        return samples


def stream(job):
    """All batches of an epoch with data.streaming=true. baseline_mib: after imports and tokenizer;
    peak_mib: the highest of this process, workers apart."""
    tokenizer, batches, tokens = load_tokenizer(job), 0, 0
    baseline = {"baseline_mib": resident("VmRSS"), "baseline_shared_mib": proportional(os.getpid())}
    clock = Clock()
    module = data_module(job, tokenizer, streaming=True)
    module.windows = _OneEpoch(module.windows)
    try:
        for batch in module.train_loader():
            batches += 1
            tokens += int(batch["attention_mask"].sum())
    except _Ended:
        pass
    counts = {"batches": batches, "tokens": tokens, "peak_mib": resident("VmHWM")}
    return {**clock.seconds(), **baseline, **counts}


def first_batch(job):
    """Seconds from making the data module to a batch: streamed, and from the cache of `ours`."""
    import datasets  # noqa: F401 - it counts as an import in both ways

    tokenizer, waits = load_tokenizer(job), {}
    before = time.time() - job["started"]
    for name, streaming in (("streamed", True), ("cached", False)):
        start = time.perf_counter()
        batches = iter(data_module(job, tokenizer, streaming).train_loader())
        next(batches)
        waits[name] = time.perf_counter() - start
        batches.close()
    return {"imports_and_tokenizer": before, **waits}


def data_module(job, tokenizer, streaming):
    layout = {"chunk_size": CHUNK, "stride": STRIDE, "max_steps": ENDLESS}
    return ScrollsBatches(data_of(job, streaming=streaming), tokenizer, seed=0, **layout)
