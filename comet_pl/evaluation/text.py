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


def evaluate_text(engine: Engine, config: Config, results: Results) -> dict[str, Any]:
    """{"all": scores with "rows", "by_chunk": [scores with "from" and "to", chunks of a row]}.

    scores: "loss" (nats a token), "perplexity", "tokens" that are predicted; None if not finite.
    The rows are those of val/loss. A token's chunk is that of the token which it is predicted from.
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
    buckets = metric.compute()
    total = float(metric.total.sum() / metric.count.sum())
    count = int(metric.count.sum())
    values = {
        "all": {"rows": len(rows), **_scores(total, count)},
        "by_chunk": [
            {"from": each["from"], "to": each["to"], **_scores(each["loss"], each["labels"])}
            for each in buckets
        ],
    }
    results.write(values, {})
    results.draw(curve(buckets))
    results.show(f"{len(rows)} rows of text, by chunk", text_table(values))
    return values


def _scores(loss: float | None, tokens: int) -> dict[str, Any]:
    finite = loss if loss is not None and math.isfinite(loss) else None
    perplexity = None if finite is None or finite > 700 else math.exp(finite)
    return {"loss": finite, "perplexity": perplexity, "tokens": tokens}


def text_table(values: dict[str, Any]) -> Table:
    """A row for each bucket of chunks, then one for all, of evaluate_text's values."""
    table = Table("chunk")
    for column in ("tokens", "loss", "perplexity"):
        table.add_column(column, justify="right")
    for scores in [*values["by_chunk"], values["all"]]:
        if scores is values["all"]:
            table.add_section()
        cells = [(scores["tokens"], ","), (scores["loss"], ".4f"), (scores["perplexity"], ",.2f")]
        texts = ("" if cell is None else format(cell, form) for cell, form in cells)
        table.add_row("all" if scores is values["all"] else name(scores), *texts)
    return table
