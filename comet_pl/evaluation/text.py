"""Loss and perplexity on plain texts, by position in the row."""

import math
from typing import Any

from rich.table import Table
from torch import Tensor

from comet_pl.config.schema import Config, PlainTextData
from comet_pl.evaluation.generation import Engine
from comet_pl.evaluation.results import Results
from comet_pl.metrics.loss_by_position import LossByPosition, chunk_of_columns, curve, name
from comet_pl.model.observer import Observer, observing
from comet_pl.progress import Bar
from data.batches import pad_rows
from data.plain_text import PlainTextSource, validation_rows
from data.tokenizer import pad_token

LARGEST = 700.0  # loss whose perplexity is a number


def evaluate_text(engine: Engine, config: Config, results: Results) -> dict[str, Any]:
    """{"all": scores with "rows", "by_chunk": [scores with "from" and "to", chunks of a row]}.

    scores: "loss" (nats a token), "perplexity", "labels" (predicted tokens); None if not finite.
    The rows are those of val/loss; comet_pl/metrics/loss_by_position.py says what a token's chunk
    is.
    """
    data, model = config.data, engine.model
    assert isinstance(data, PlainTextData)
    rows = validation_rows(PlainTextSource(data, engine.tokenizer, "validation"), data.val_examples)
    metric, shown = LossByPosition(sync_on_compute=False), list[tuple[Tensor, Tensor]]()
    observer = Observer(losses=lambda *losses: shown.append(losses))
    with Bar(sum(len(ids) for ids, _ in rows)) as bar, observing(model, observer):
        for start in range(0, len(rows), data.batch_size):
            batch = pad_rows(rows[start : start + data.batch_size], pad_token(engine.tokenizer))
            mask = batch["attention_mask"]
            model(**{key: value.to(model.device) for key, value in batch.items()}, use_cache=False)
            metric.update(*shown.pop(), chunk_of_columns(mask, model.config.chunk_size))
            bar.add(int(mask.sum()))
    buckets, count = metric.compute(), int(metric.count.sum())
    whole = {"rows": len(rows), "loss": float(metric.total.sum()) / count, "labels": count}
    values = {"all": _scores(whole), "by_chunk": [_scores(bucket) for bucket in buckets]}
    results.write(values, {})
    results.draw(curve(buckets))
    results.show(f"{len(rows)} rows of text, by chunk", text_table(values))
    return values


def _scores(counted: dict[str, Any]) -> dict[str, Any]:
    """With the perplexity; loss and perplexity are None if they are not finite."""
    loss = counted["loss"]
    if loss is None or not math.isfinite(loss):
        return {**counted, "loss": None, "perplexity": None}
    return {**counted, "perplexity": math.exp(loss) if loss < LARGEST else None}


def text_table(values: dict[str, Any]) -> Table:
    """A row for each bucket of chunks, then one for all, of evaluate_text's values."""
    table = Table("chunk")
    for column in ("tokens", "loss", "perplexity"):
        table.add_column(column, justify="right")
    for scores in [*values["by_chunk"], values["all"]]:
        if scores is values["all"]:
            table.add_section()
        cells = [(scores["labels"], ","), (scores["loss"], ".4f"), (scores["perplexity"], ",.2f")]
        texts = ("" if cell is None else format(cell, form) for cell, form in cells)
        table.add_row("all" if scores is values["all"] else name(scores), *texts)
    return table
