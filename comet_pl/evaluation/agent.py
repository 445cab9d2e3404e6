"""What a model would do in agents' traces, turn by turn, with a memory that is carried along."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from comet_pl.config.schema import AgentData, Config
from comet_pl.evaluation.generation import generate
from comet_pl.evaluation.results import Answer, Results, prompt_end
from comet_pl.metrics.agent import AgentScore, by_distance, judge
from comet_pl.model.cache import CometCache
from comet_pl.model.modeling_comet import CometForCausalLM
from comet_pl.progress import Bar
from data.agent_traces import source_of, validation_samples
from data.text.tokenized import Sample

LONGEST = 256  # default of eval.max_new_tokens


def evaluate_agent(
    model: CometForCausalLM, tokenizer: PreTrainedTokenizerBase, config: Config, results: Results
) -> dict[str, Any]:
    """AgentScore's values on validation traces. The memory is carried from turn to turn: a turn costs its own tokens, and a fork of the
    memory for what the model would do there."""
    data = config.data
    assert isinstance(data, AgentData)
    traces = validation_samples(source_of(data, tokenizer, "validation", 0), config.eval.examples)
    metric, values, answers = AgentScore(sync_on_compute=False), dict[str, Any](), list[Answer]()
    with Bar(sum(map(len, traces))) as bar:
        for trace in traces:
            bar.name(trace.notes["id"])
            for answer in act(model, tokenizer, trace, config.eval.max_new_tokens or LONGEST):
                metric.update(
                    *(answer[name] for name in ("distance", "turn", "loss", "tokens")),
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


def act(
    model: CometForCausalLM, tokenizer: PreTrainedTokenizerBase, trace: Sample, max_new_tokens: int
) -> Iterator[Answer]:
    """For each assistant turn of a trace: what the model would say there, and its loss on what was said.

    score: where a tool was called, whether the same is called with the same arguments; else F1 of the words.
    """
    ids = torch.from_numpy(trace.ids.astype(np.int64))[None].to(model.device)
    cache, read, number = CometCache(), 0, 0
    for role, _, content, end, distance in trace.notes["turns"]:
        if role != "assistant":
            continue
        number += 1
        if (
            content - 1 > read
        ):  # the last token before the turn stays unread: generation goes on from it
            model(
                ids[:, read : content - 1], past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            read = content - 1
        mask = torch.ones(
            1, cache.get_seq_length() + content - read, dtype=torch.long, device=model.device
        )
        given = generate(
            model,
            tokenizer,
            ids[:, read:content],
            mask,
            max_new_tokens,
            past_key_values=cache.clone(),
        )
        logits = (
            model(ids[:, read:end], past_key_values=cache, use_cache=True)
            .logits[0, content - read - 1 : -1]
            .float()
        )
        loss = torch.nn.functional.cross_entropy(logits, ids[0, content:end], reduction="sum")
        read = end
        texts = [
            str(tokenizer.decode(part, skip_special_tokens=True)).strip()
            for part in (given[0], ids[0, content:end])
        ]
        f1, calls, _, action = judge(*texts)
        scored = {
            "prediction": texts[0],
            "references": [texts[1]],
            "score": float(action) if calls else f1,
        }
        facts = {"turn": number, "distance": distance, "loss": float(loss), "tokens": end - content}
        yield {
            "id": f"{trace.notes['id']}-{number}",
            "prompt_end": prompt_end(tokenizer, trace.ids[:content]),
            **scored,
            **facts,
        }


def agent_table(values: dict[str, Any]) -> Table:
    """A row each turn distance, then all, of AgentScore's values."""
    table = Table("turn distance")
    for name in ("turns", "perplexity", "token F1", "calls", "tool right", "and arguments"):
        table.add_column(name, justify="right")
    for name, found in [*values["by_distance"].items(), ("all", values["all"])]:
        if name == "all":
            table.add_section()
        shares = [
            "" if found[key] is None else f"{found[key]:.1%}" for key in ("f1", "name", "action")
        ]
        perplexity = "" if found["perplexity"] is None else f"{found['perplexity']:.2f}"
        table.add_row(
            name, str(found["turns"]), perplexity, shares[0], str(found["calls"]), *shares[1:]
        )
    return table
