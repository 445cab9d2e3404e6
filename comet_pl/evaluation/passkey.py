"""Passkeys found, by length and depth."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from comet_pl import CometForCausalLM
from comet_pl.config.schema import Config, PasskeyData
from comet_pl.evaluation.generation import Count, Engine
from comet_pl.evaluation.results import TAIL, Answer, Results, answer_of
from comet_pl.files import sha256
from comet_pl.metrics.passkey import PasskeyAccuracy, heatmap, means, short
from comet_pl.progress import Bar
from data.passkey import ANSWER, DIGITS, PasskeyExamples, even_depths
from data.tokenizer import pad_token

TIMES = (1, 4, 16, 32)  # default lengths, in train_lengths
PREFILL = 16  # chunks a forward call
WIDEST = 2**15  # rows * chunk_size of one batch: bounds the activations of a chunk
CELL = {"length", "depth", "accuracy", "n"}
MOST_TOKENS = 2**26  # rows * length of one batch: bounds its ids (8 bytes each)


def evaluate_passkey(engine: Engine, config: Config, results: Results) -> dict[str, Any]:
    """{"train_length", "cells": [{"length", "depth", "accuracy", "n"}], "mean", "weights"}.

    accuracy: exact match of all five digits; mean: accuracy by length. Results of the same weights
    at other lengths stay in the files.
    """
    model, tokenizer, data = engine.model, engine.tokenizer, config.data
    assert isinstance(data, PasskeyData)
    lengths = sorted(set(config.eval.lengths or [times * data.train_length for times in TIMES]))
    examples = PasskeyExamples(data, tokenizer, config.seed, "evaluation")
    examples.check(lengths, "eval.lengths", wrap=True)
    depths = even_depths(config.eval.depths) * (config.eval.examples or 1)
    # one rank evaluates
    metric, values = PasskeyAccuracy(sync_on_compute=False), dict[str, Any]()
    weights = _made_with(model, config)
    kept, answers = _earlier(results, weights, lengths)
    with Bar(len(depths) * sum(lengths)) as bar:
        if repeated := [short(length) for length in lengths if examples.repeats(length)]:
            size = f"{data.haystack} has {len(examples.filler):,} tokens"
            bar.note(f"{size}: at {', '.join(repeated)} it is read more than once")
        for length in lengths:
            bar.name(f"passkey at {short(length)}")
            rows = max(1, min(WIDEST // model.config.chunk_size, MOST_TOKENS // length))
            for start in range(0, len(depths), rows):
                batch_depths = depths[start : start + rows]
                indices = range(start, start + len(batch_depths))
                ids = examples.batch(indices, length, batch_depths)["input_ids"].to(model.device)
                prompts, keys = ids[:, :-ANSWER], ids[:, -ANSWER:-1]
                digits = answer_digits(engine, prompts, bar.add)
                correct = (digits == keys).all(1)
                metric.update(length, batch_depths, correct)
                answers += [
                    answer_of(
                        tokenizer,
                        f"{length}-{index}",
                        prompts[row, -TAIL:].tolist(),
                        str(tokenizer.decode(digits[row])),
                        [str(tokenizer.decode(keys[row]))],
                        float(correct[row]),
                        length=length,
                        depth=batch_depths[row],
                    )
                    for row, index in enumerate(indices)
                ]
            cells = kept + metric.compute()
            cells.sort(key=lambda cell: (cell["length"], cell["depth"]))
            values = {"train_length": data.train_length, "cells": cells}
            values |= {"mean": means(cells), "weights": weights}
            results.draw(heatmap(cells, data.train_length))
            results.write(values, {"passkey": answers})
            share = values["mean"][str(length)]
            bar.note(f"passkey at {short(length)}: {share:.1%} of {len(depths)} exact")
    title = "passkeys found, by length in tokens and depth; trained at"
    results.show(f"{title} {data.train_length:,} tokens", _passkey_table(values))
    return values


def _made_with(model: CometForCausalLM, config: Config) -> str:
    """Digest of what a cell's accuracy depends on: weights, memory sizes, haystack, seed."""
    haystack = getattr(config.data, "haystack", None)
    content = haystack and sha256(Path(haystack).expanduser())
    facts = [model.weight_digest(), model.config.to_json_string(), config.seed, content]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _earlier(
    results: Results, weights: str, lengths: list[int]
) -> tuple[list[dict[str, Any]], list[Answer]]:
    """(cells, answers) that the files have of the same weights at other lengths."""
    before = results.read()
    found = before.get("cells")
    if before.get("weights") != weights or not isinstance(found, list):
        return [], []
    whole = [cell for cell in found if isinstance(cell, dict) and cell.keys() >= CELL]
    cells = [cell for cell in whole if cell["length"] not in lengths]
    kept = [cell["length"] for cell in cells]
    return cells, [one for one in results.answers("passkey") if one.get("length") in kept]


def _passkey_table(values: dict[str, Any]) -> Table:
    table = Table("depth")
    for length in values["mean"]:
        table.add_column(f"{int(length):,}", justify="right")
    shares: dict[float, dict[str, str]] = {}
    for cell in values["cells"]:
        by_length = shares.setdefault(cell["depth"], {})
        by_length[str(cell["length"])] = f"{cell['accuracy']:.0%}"
    for depth, by_length in sorted(shares.items()):
        table.add_row(f"{depth:.0%}", *(by_length.get(length, "") for length in values["mean"]))
    table.add_section()
    table.add_row("mean", *(f"{mean:.1%}" for mean in values["mean"].values()))
    return table


def answer_digits(engine: Engine, prompt: Tensor, count: Count = lambda n: None) -> Tensor:
    """Greedy continuation of prompts, at constant memory: whole chunks make no logits.

    Args:
        prompt: (B, N) without padding, N >= 1.

    Returns:
        (B, DIGITS); a row that stops early ends in padding.
    """
    batch, total = prompt.shape
    size = engine.model.config.chunk_size
    cache = None
    # generate() needs at least one token that is not in the cache
    whole = (total - 1) // size * size
    for start in range(0, whole, PREFILL * size):
        piece = prompt[:, start : min(start + PREFILL * size, whole)]
        # chunks that are listed close even in a model that does not roll over
        sizes = [size] * (piece.shape[1] // size)
        cache = engine.prefill(piece, cache, chunk_sizes=sizes)
        count(piece.numel())
    digits = engine.generate(prompt, DIGITS, cache=cache)
    count(batch * (total - whole + ANSWER))
    padding = (0, DIGITS - digits.shape[1])
    return torch.nn.functional.pad(digits, padding, value=pad_token(engine.tokenizer))
