"""What a model would do in agents' traces, turn by turn, with a memory that is carried along."""

from collections.abc import Iterator
from typing import Any

import torch
from rich.table import Table

from comet_pl import CometCache
from comet_pl.config.schema import AgentData, Config
from comet_pl.evaluation.generation import Engine
from comet_pl.evaluation.results import Answer, Results, answer_of
from comet_pl.metrics.agent import AgentScore, by_distance, judge
from comet_pl.progress import Bar
from data.agent_traces import source_of, validation_samples
from data.text.tokenized import Sample

LONGEST = 256  # default of eval.max_new_tokens


def evaluate_agent(engine: Engine, config: Config, results: Results) -> dict[str, Any]:
    """AgentScore's values on validation traces."""
    data = config.data
    assert isinstance(data, AgentData)
    traces = validation_samples(
        source_of(data, engine.tokenizer, "validation"), config.eval.examples
    )
    metric, values, answers = AgentScore(sync_on_compute=False), dict[str, Any](), list[Answer]()
    with Bar(sum(map(len, traces))) as bar:
        for trace in traces:
            bar.name(trace.notes["id"])
            for answer in act(engine, trace, config.eval.max_new_tokens or LONGEST):
                metric.update(
                    answer["distance"],
                    answer["turn"],
                    answer["loss"],
                    answer["tokens"],
                    answer["references"][0],
                    answer["prediction"],
                )
                answers.append(answer)
            bar.add(len(trace))
            values = metric.compute()
            results.write(values, {"agent": answers})
        results.draw(by_distance(values))
    results.show(f"{len(traces)} agent traces, turn by turn, by turn distance", agent_table(values))
    return values


def act(engine: Engine, trace: Sample, max_new_tokens: int) -> Iterator[Answer]:
    """For each assistant turn of a trace: what the model would say, and its loss on what was said.

    Turns that a message's weight takes out of the loss are read, not asked for.

    A turn costs its own tokens: the memory is carried on, and a copy of it generates the answer.
    score: where a tool was called, whether the same call with the same arguments was made; else the
    F1 of the words.
    """
    ids = engine.tensor(trace.ids)
    cache, fed = CometCache(), 0
    unlearned = trace.notes.get("unlearned", ())
    turns = [
        (turn, message not in unlearned)
        for message, turn in enumerate(trace.notes["turns"])
        if turn[0] == "assistant"
    ]
    for number, ((_, _, content, end, distance), asked) in enumerate(turns, 1):
        if not asked:
            continue
        # the last token before the turn is not fed yet: generation starts from it
        if content - 1 > fed:
            engine.prefill(ids[:, fed : content - 1], cache)
            fed = content - 1
        said = engine.generate(ids[:, :content], max_new_tokens, cache=cache.clone())
        logits = engine.model(ids[:, fed:end], past_key_values=cache, use_cache=True).logits
        logits = logits[0, content - fed - 1 : -1].float()
        loss = torch.nn.functional.cross_entropy(logits, ids[0, content:end], reduction="sum")
        fed = end
        texts = [engine.text(part) for part in (said[0], ids[0, content:end])]
        f1, calls, _, action = judge(*texts)
        yield answer_of(
            engine.tokenizer,
            f"{trace.notes['id']}-{number}",
            trace.ids[:content],
            texts[0],
            [texts[1]],
            float(action) if calls else f1,
            turn=number,
            distance=distance,
            loss=float(loss),
            tokens=end - content,
        )


def agent_table(values: dict[str, Any]) -> Table:
    """A row for each turn distance, then one for all, of AgentScore's values."""
    table = Table("turn distance")
    for name in ("turns", "perplexity", "token F1", "calls", "tool right", "and arguments"):
        table.add_column(name, justify="right")
    formats = {"turns": "d", "perplexity": ".2f", "f1": ".1%", "calls": "d"}
    formats |= {"name": ".1%", "action": ".1%"}
    for name, scores in [*values["by_distance"].items(), ("all", values["all"])]:
        if name == "all":
            table.add_section()
        cells = [(scores[key], form) for key, form in formats.items()]
        table.add_row(name, *("" if cell is None else format(cell, form) for cell, form in cells))
    return table
