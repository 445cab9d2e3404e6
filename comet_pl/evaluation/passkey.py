"""Passkeys found, by length and depth."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from comet_pl.config.schema import Config, PasskeyData
from comet_pl.evaluation.generation import Count, generate
from comet_pl.evaluation.results import TAIL, Results, prompt_end
from comet_pl.metrics.passkey import PasskeyAccuracy, heatmap, means, short
from comet_pl.model.modeling_comet import CometForCausalLM
from comet_pl.progress import Bar
from data.batches import pad_token
from data.passkey import ANSWER, DIGITS, PasskeyExamples, even_depths

TIMES = (1, 4, 16, 32)  # default lengths, in train_lengths
READ_AT_ONCE = 16  # chunks a call
WIDEST = 2**15  # rows * chunk_size of one batch: bounds the activations of a chunk
MOST_TOKENS = 2**26  # rows * length of one batch: bounds its ids (8 bytes each)


def evaluate_passkey(
    model: CometForCausalLM, tokenizer: PreTrainedTokenizerBase, config: Config, results: Results
) -> dict[str, Any]:
    """{"train_length", "cells": [{"length", "depth", "accuracy", "n"}], "mean": {"<length>": accuracy}, "weights"}; exact match of all five
    digits. Other lengths that the same weights were evaluated at before stay in the files."""
    data = config.data
    assert isinstance(data, PasskeyData)
    lengths = sorted(set(config.eval.lengths or [times * data.train_length for times in TIMES]))
    examples = PasskeyExamples(data, tokenizer, config.seed, "evaluation")
    examples.check(lengths, "eval.lengths", wrap=True)
    depths = even_depths(config.eval.depths) * (config.eval.examples or 1)
    metric, values = PasskeyAccuracy(sync_on_compute=False), dict[str, Any]()  # one rank evaluates
    weights = _made_with(model, config)
    before = results.read()
    kept = [
        cell
        for cell in before.get("cells", [])
        if before.get("weights") == weights and cell["length"] not in lengths
    ]
    answers = [
        answer
        for answer in results.answers("passkey")
        if answer["length"] in {cell["length"] for cell in kept}
    ]
    with Bar(len(depths) * sum(lengths)) as bar:
        if repeated := [short(length) for length in lengths if examples.repeats(length)]:
            bar.note(
                f"{data.haystack} has {len(examples.filler):,} tokens: at {', '.join(repeated)} it is read more than once"
            )
        for length in lengths:
            bar.name(f"passkey at {short(length)}")
            rows = max(1, min(WIDEST // model.config.chunk_size, MOST_TOKENS // length))
            for start in range(0, len(depths), rows):
                indices = range(start, min(start + rows, len(depths)))
                here = depths[start : start + rows]
                ids = examples.batch(indices, length, here)["input_ids"].to(model.device)
                given, wanted = (
                    answer_digits(model, tokenizer, ids[:, :-ANSWER], bar.add),
                    ids[:, -ANSWER:-1],
                )
                correct = (given == wanted).all(1)
                metric.update(length, here, correct)
                ends = [
                    prompt_end(tokenizer, row) for row in ids[:, -ANSWER - TAIL : -ANSWER].tolist()
                ]
                for index, depth, end, digits, key, right in zip(
                    indices, here, ends, given, wanted, correct.tolist(), strict=True
                ):
                    texts = {
                        "prompt_end": end,
                        "prediction": tokenizer.decode(digits),
                        "references": [tokenizer.decode(key)],
                    }
                    answers.append(
                        {
                            "id": f"{length}-{index}",
                            **texts,
                            "score": float(right),
                            "length": length,
                            "depth": depth,
                        }
                    )
            cells = sorted(
                kept + metric.compute(), key=lambda cell: (cell["length"], cell["depth"])
            )
            values = {
                "train_length": data.train_length,
                "cells": cells,
                "mean": means(cells),
                "weights": weights,
            }
            results.draw(heatmap(cells, data.train_length))
            results.write(values, {"passkey": answers})
            bar.note(
                f"passkey at {short(length)}: {values['mean'][str(length)]:.1%} of {len(depths)} exact"
            )
    results.show(
        f"passkeys found, by length in tokens and depth; trained at {data.train_length:,} tokens",
        _passkey_table(values),
    )
    return values


def _made_with(model: CometForCausalLM, config: Config) -> str:
    """Digest of what a cell's accuracy depends on: weights, memory sizes, haystack, seed."""
    facts = [
        model.weight_digest(),
        model.config.to_json_string(),
        config.seed,
        getattr(config.data, "haystack", None),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _passkey_table(values: dict[str, Any]) -> Table:
    means, cells = values["mean"], values["cells"]
    table = Table("depth")
    for length in means:
        table.add_column(f"{int(length):,}", justify="right")
    for depth in sorted({cell["depth"] for cell in cells}):
        found = {
            str(cell["length"]): f"{cell['accuracy']:.0%}"
            for cell in cells
            if cell["depth"] == depth
        }
        table.add_row(f"{depth:.0%}", *(found.get(length, "") for length in means))
    table.add_section()
    table.add_row("mean", *(f"{mean:.1%}" for mean in means.values()))
    return table


def answer_digits(
    model: CometForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Tensor,
    count: Count = lambda n: None,
) -> Tensor:
    """Greedy continuation of prompts, read at constant memory: whole chunks go into the cache, and their logits are never made.

    Args:
        prompt: (B, N) without padding, N >= 1.

    Returns:
        (B, DIGITS); a row that stops early ends in padding.
    """
    batch, total = prompt.shape
    size = model.config.chunk_size
    cache = None
    whole = (total - 1) // size * size  # generate needs a token to go on from
    for start in range(0, whole, READ_AT_ONCE * size):
        piece = prompt[:, start : min(start + READ_AT_ONCE * size, whole)]
        chunks = [size] * (
            piece.shape[1] // size
        )  # listed, they close even in a model that does not roll over
        cache = model(
            piece, past_key_values=cache, use_cache=True, logits_to_keep=1, chunk_sizes=chunks
        ).past_key_values
        count(piece.numel())
    given = generate(
        model, tokenizer, prompt, torch.ones_like(prompt), DIGITS, past_key_values=cache
    )
    count(batch * (total - whole + ANSWER))
    return torch.nn.functional.pad(given, (0, DIGITS - given.shape[1]), value=pad_token(tokenizer))
