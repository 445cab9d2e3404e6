"""Loss and perplexity on plain texts, by position in the row, beside the decoder without memory."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from torch import Tensor

from comet_pl import CometForCausalLM
from comet_pl.config.schema import Config, PlainTextData
from comet_pl.evaluation.baselines import Baselines
from comet_pl.evaluation.generation import Engine
from comet_pl.evaluation.results import Results
from comet_pl.metrics.loss_by_position import Bucket, LossByRow, chunk_of_columns, curve, name
from comet_pl.metrics.paired import closed, differences
from comet_pl.model.observer import Observer, observing
from comet_pl.progress import Bar
from data.batches import pad_rows
from data.plain_text import PlainTextSource, validation_rows
from data.tokenizer import pad_token

LARGEST = 700.0  # loss whose perplexity is a number
COMET = "CoMeT"
NOTE = "the decoder without memory, weights as they are (LoRA merged)"


def evaluate_text(engine: Engine, config: Config, results: Results) -> dict[str, Any]:
    """{"all": scores with "rows", "by_chunk": [scores with "from" and "to", chunks of a row]}.

    scores: "loss" (nats a token), "perplexity", "labels" (predicted tokens); None if not finite.
    The rows are those of val/loss; comet_pl/metrics/loss_by_position.py says what a token's chunk
    is.

    With eval.baselines also "baselines", {baseline: the same, its scores with "difference",
    "standard_error", "rows" of comet_pl/metrics/paired.py}; "decoder", what they are of;
    "long_rows", the number of rows of which `full` has only the beginning; and with full and blocks
    "closed", the share of the gap between them that CoMeT closes.
    """
    data, model = config.data, engine.model
    assert isinstance(data, PlainTextData)
    names = list(dict.fromkeys(config.eval.baselines or ()))
    baselines = Baselines(model) if names else None
    systems: dict[str, Any] = {COMET: partial(comet_losses, model)}
    systems |= {each: partial(baselines.losses, each) for each in names if baselines}
    rows = validation_rows(PlainTextSource(data, engine.tokenizer, "validation"), data.val_examples)
    lengths = [len(ids) for ids, _ in rows]
    long = sum(length > baselines.positions for length in lengths) if baselines else 0
    metrics, values = dict[str, LossByRow](), dict[str, Any]()
    with Bar(sum(lengths) * len(systems)) as bar:
        for system, losses in systems.items():
            bar.name(system)
            # one rank evaluates
            metrics[system] = metric = LossByRow(sync_on_compute=False)
            for start in range(0, len(rows), data.batch_size):
                batch = pad_rows(rows[start : start + data.batch_size], pad_token(engine.tokenizer))
                mask = batch["attention_mask"]
                parts = (batch[key].to(model.device) for key in ("input_ids", "labels"))
                places, found = losses(*parts, mask.to(model.device))
                metric.update(places, found, chunk_of_columns(mask, model.config.chunk_size))
                bar.add(int(mask.sum()))
            values = text_values(metrics) | ({"decoder": NOTE, "long_rows": long} if names else {})
            results.write(values, {})
            results.draw(text_curve(values))
    title = f"{len(rows)} rows of text, by chunk"
    if baselines:
        title += f"; {', '.join(names)}: {NOTE}"
    if baselines and long and "full" in names:
        title += (
            f"\nfull: {long} of {len(rows)} rows are longer than the decoder's "
            f"{baselines.positions:,} positions; of each its first {baselines.fitting} chunk(s)"
        )
    results.show(title, text_table(values))
    return values


def comet_losses(
    model: CometForCausalLM, ids: Tensor, labels: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """(places, losses) of a padded batch, as an Observer gets them."""
    shown = list[tuple[Tensor, Tensor]]()
    with observing(model, Observer(losses=lambda *losses: shown.append(losses))):
        model(ids, attention_mask=mask, labels=labels, use_cache=False)
    return shown.pop()


def text_values(metrics: Mapping[str, LossByRow]) -> dict[str, Any]:
    """evaluate_text's values of CoMeT and the baselines that are measured so far."""
    rows = {system: torch.cat(metric.rows) for system, metric in metrics.items()}
    values = _of_system(metrics[COMET])
    whole, by_chunk = values["all"], values["by_chunk"]
    values["all"] = {"rows": len(rows[COMET]), **whole}
    baselines = dict[str, Any]()
    for system in [each for each in metrics if each != COMET]:
        own, (total, each) = _of_system(metrics[system]), differences(rows[COMET], rows[system])
        # What `full` cannot have at all is there without a loss.
        missing = [bucket | {"loss": None, "perplexity": None, "labels": 0} for bucket in by_chunk]
        buckets = [*own["by_chunk"], *missing[len(own["by_chunk"]) :]]
        pairs = zip(buckets, each, strict=False)
        baselines[system] = {
            "all": {**own["all"], **total},
            "by_chunk": [{**bucket, **apart} for bucket, apart in pairs],
        }
    if baselines:
        values["baselines"] = baselines
    if {"full", "blocks"} <= baselines.keys():
        share = closed(rows[COMET], rows["blocks"], rows["full"])
        values["closed"] = {**share, "by_chunk": share["by_chunk"][: len(by_chunk)]}
    return values


def _of_system(metric: LossByRow) -> dict[str, Any]:
    count = int(metric.count.sum())
    whole = {"loss": float(metric.total.sum()) / count if count else None, "labels": count}
    return {"all": _scores(whole), "by_chunk": [_scores(bucket) for bucket in metric.compute()]}


def _scores(counted: dict[str, Any]) -> dict[str, Any]:
    """With the perplexity; loss and perplexity are None if they are not finite."""
    loss = counted["loss"]
    if loss is None or not math.isfinite(loss):
        return {**counted, "loss": None, "perplexity": None}
    return {**counted, "perplexity": math.exp(loss) if loss < LARGEST else None}


def text_curve(values: dict[str, Any]) -> Figure:
    """The loss by chunk, a line each system, of evaluate_text's values."""
    baselines: dict[str, Any] = values.get("baselines", {})
    others: dict[str, list[Bucket]] = {k: each["by_chunk"] for k, each in baselines.items()}
    return curve(values["by_chunk"], **others)


def text_table(values: dict[str, Any]) -> Table:
    """A row for each bucket of chunks, then one for all, of evaluate_text's values.

    With baselines a column of losses for each system and, "-NAME", one of CoMeT's minus the
    baseline's with its standard error; the last row has the perplexities.
    """
    baselines, shares = values.get("baselines", {}), values.get("closed")
    heads = ["loss", "perplexity"]
    if baselines:
        heads = [COMET, *baselines, *(f"-{each}" for each in baselines)]
    # Three baselines fit into 80 columns without frames.
    narrow: dict[str, Any] = {"box": box.SIMPLE, "padding": 0} if baselines else {}
    table = Table("chunk", **narrow)
    for head in ["tokens", *heads, *["closed"] * bool(shares)]:
        table.add_column(head, justify="right")
    systems = [[*each["by_chunk"], each["all"]] for each in (values, *baselines.values())]
    closing = [*shares["by_chunk"], shares["all"]] if shares else [None] * len(systems[0])
    for (own, *others), share in zip(zip(*systems, strict=True), closing, strict=True):
        if own is values["all"]:
            table.add_section()
        cells = [_cell(own["labels"], ",")]
        if not baselines:
            cells += [_cell(own["loss"], ".4f"), _cell(own["perplexity"], ",.2f")]
        else:
            cells += [_cell(each["loss"], ".3f") for each in (own, *others)]
            cells += [_apart(each) for each in others]
            cells += [_cell(share, ".0%")] * bool(shares)
        table.add_row("all" if own is values["all"] else name(own), *cells)
    if baselines:
        perplexities = (each[-1]["perplexity"] for each in systems)
        table.add_row("perplexity", "", *(_cell(each, ",.2f") for each in perplexities))
    return table


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _apart(scores: dict[str, Any]) -> str:
    error = scores["standard_error"]
    return _cell(scores["difference"], "+.3f") + ("" if error is None else f" ±{error:.3f}")
