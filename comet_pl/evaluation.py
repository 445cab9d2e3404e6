"""A trained model's results: passkeys by length and depth, SCROLLS' official scores; as files, figures and a table.

Files are written again after each length or task, so that an interrupted evaluation leaves what it has (see comet_pl/results.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from comet_pl.config import Config, PasskeyData, ScrollsData
from comet_pl.conversation import encode
from comet_pl.errors import UserError
from comet_pl.metrics.agent import AgentScore, by_distance
from comet_pl.metrics.behavior import BehaviorAccuracy, curves, exact_match
from comet_pl.metrics.behavior import table as behavior_table
from comet_pl.metrics.passkey import PasskeyAccuracy, heatmap, means, short
from comet_pl.metrics.scrolls import METRICS, ScrollsScore, average, scores
from comet_pl.model.cache import CometCache
from comet_pl.model.comet import CometForCausalLM
from comet_pl.results import Answer, Bar, Results
from comet_pl.schema import AgentData, UserBehaviorData
from data.agent_traces import source_of, validation_samples
from data.base import pad_rows, pad_token, stop_token
from data.passkey import ANSWER, DIGITS, PasskeyExamples, even_depths
from data.samples import Sample
from data.scrolls import MAX_NEW_TOKENS, Corpus, tasks
from data.user_behavior import Behavior, log_of

TIMES = (1, 4, 16, 32)  # default lengths, in train_lengths
READ_AT_ONCE = 16  # chunks a call
WIDEST = 2**15  # rows * chunk_size of one batch: bounds the activations of a chunk
AGENT_TOKENS = 256  # default of eval.max_new_tokens
MOST_TOKENS = 2**26  # rows * length of one batch: bounds its ids (8 bytes each)
Count = Callable[[int], None]
"""Is told how many tokens have been read."""


def evaluate(model: CometForCausalLM, tokenizer: PreTrainedTokenizerBase, config: Config, out: Path) -> dict[str, Any]:
    """Evaluates on what config.data names, as config.eval says; writes the files into `out` and prints a table.

    Returns:
        What <out>/eval/<kind>.json holds.

    Raises:
        UserError: lengths that are too short for a passkey; data that cannot be read.
    """
    training = model.training
    try:
        with torch.no_grad():
            return EVALUATE[type(config.data)](model.eval(), tokenizer, config, Results(out, config.data.kind))
    finally:
        model.train(training)


# -- passkey ----------------------------------------------------------------------------------------------------------------------------


def evaluate_passkey(model: CometForCausalLM, tokenizer: PreTrainedTokenizerBase, config: Config, results: Results) -> dict[str, Any]:
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
    kept = [cell for cell in before.get("cells", []) if before.get("weights") == weights and cell["length"] not in lengths]
    answers = [answer for answer in results.answers("passkey") if answer["length"] in {cell["length"] for cell in kept}]
    with Bar(len(depths) * sum(lengths)) as bar:
        if repeated := [short(length) for length in lengths if examples.repeats(length)]:
            bar.note(f"{data.haystack} has {len(examples.filler):,} tokens: at {', '.join(repeated)} it is read more than once")
        for length in lengths:
            bar.name(f"passkey at {short(length)}")
            rows = max(1, min(WIDEST // model.config.chunk_size, MOST_TOKENS // length))
            for start in range(0, len(depths), rows):
                indices = range(start, min(start + rows, len(depths)))
                here = depths[start : start + rows]
                ids = examples.batch(indices, length, here)["input_ids"].to(model.device)
                given, wanted = answer_digits(model, tokenizer, ids[:, :-ANSWER], bar.add), ids[:, -ANSWER:-1]
                correct = (given == wanted).all(1)
                metric.update(length, here, correct)
                for index, depth, digits, key, right in zip(indices, here, given, wanted, correct.tolist(), strict=True):
                    texts = {"prediction": tokenizer.decode(digits), "references": [tokenizer.decode(key)]}
                    answers.append({"id": f"{length}-{index}", **texts, "score": float(right), "length": length, "depth": depth})
            cells = sorted(kept + metric.compute(), key=lambda cell: (cell["length"], cell["depth"]))
            values = {"train_length": data.train_length, "cells": cells, "mean": means(cells), "weights": weights}
            results.draw(heatmap(cells, data.train_length))
            results.write(values, {"passkey": answers})
            bar.note(f"passkey at {short(length)}: {values['mean'][str(length)]:.1%} of {len(depths)} exact")
    results.show(f"passkeys found, by length in tokens and depth; trained at {data.train_length:,} tokens", _passkey_table(values))
    return values


def _made_with(model: CometForCausalLM, config: Config) -> str:
    """Digest of what a cell's accuracy depends on: weights, memory sizes, haystack, seed."""
    facts = [model.weight_digest(), model.config.to_json_string(), config.seed, getattr(config.data, "haystack", None)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _passkey_table(values: dict[str, Any]) -> Table:
    means, cells = values["mean"], values["cells"]
    table = Table("depth")
    for length in means:
        table.add_column(f"{int(length):,}", justify="right")
    for depth in sorted({cell["depth"] for cell in cells}):
        found = {str(cell["length"]): f"{cell['accuracy']:.0%}" for cell in cells if cell["depth"] == depth}
        table.add_row(f"{depth:.0%}", *(found.get(length, "") for length in means))
    table.add_section()
    table.add_row("mean", *(f"{mean:.1%}" for mean in means.values()))
    return table


def answer_digits(model: CometForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: Tensor, count: Count = lambda n: None) -> Tensor:
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
        chunks = [size] * (piece.shape[1] // size)  # listed, they close even in a model that does not roll over
        cache = model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1, chunk_sizes=chunks).past_key_values
        count(piece.numel())
    given = _generate(model, tokenizer, prompt, torch.ones_like(prompt), DIGITS, past_key_values=cache)
    count(batch * (total - whole + ANSWER))
    return torch.nn.functional.pad(given, (0, DIGITS - given.shape[1]), value=pad_token(tokenizer))


# -- SCROLLS ----------------------------------------------------------------------------------------------------------------------------


def evaluate_scrolls(model: CometForCausalLM, tokenizer: PreTrainedTokenizerBase, config: Config, results: Results) -> dict[str, Any]:
    """{task: {"scrolls_score", its metrics, "n"}, "average"}, in percent, on the validation questions that config.eval.examples allows."""
    data = config.data
    assert isinstance(data, ScrollsData)
    corpus = Corpus(data, tokenizer, "validation")
    asked = {task: questions for task in tasks(data) if (questions := corpus.questions(task, config.eval.examples))}
    if not asked:
        raise UserError(f"data.root: {data.root} has no validation rows for {', '.join(tasks(data))}, so there is nothing to evaluate")
    scored, predictions, values = dict[str, Any](), dict[str, list[Answer]](), dict[str, Any]()
    with Bar(sum(len(corpus.prompt(one)) for questions in asked.values() for one in questions)) as bar:
        for task, questions in asked.items():
            bar.name(task)
            longest = config.eval.max_new_tokens or MAX_NEW_TOKENS[task]
            prompts = [corpus.prompt(one) for one in questions]
            texts = answer_prompts(model, tokenizer, prompts, longest, config.eval.batch_size, bar.add)
            metric = ScrollsScore(task, sync_on_compute=False)
            metric.update(texts, [one.references for one in questions])
            scored[task] = metric.compute()
            values = {**scored, "average": average(scored)}
            predictions[task] = []
            for one, text in zip(questions, texts, strict=True):
                score = scores(task, text, one.references)["scrolls_score"]
                predictions[task].append({"id": one.id, "prediction": text, "references": one.references, "score": score})
            results.write(values, predictions)
            bar.note(f"{task}: {scored[task]['scrolls_score']:.2f} on {len(questions)} questions")
    results.show("SCROLLS, validation, in percent", _scrolls_table(scored, values["average"]))
    return values


def _scrolls_table(scored: dict[str, Any], mean: float) -> Table:
    table = Table("task", "score", "of", "questions")
    for task, found in scored.items():
        parts = ", ".join(f"{name} {found[name]:.2f}" for name in METRICS[task])
        table.add_row(task, f"{found['scrolls_score']:.2f}", parts, str(found["n"]))
    table.add_section()
    table.add_row("average", f"{mean:.2f}")
    return table


# -- agents -----------------------------------------------------------------------------------------------------------------------------


def evaluate_agent(model: CometForCausalLM, tokenizer: PreTrainedTokenizerBase, config: Config, results: Results) -> dict[str, Any]:
    """AgentScore's values on validation traces. The memory is carried from turn to turn: a turn costs its own tokens, and a fork of the
    memory for what the model would do there."""
    data = config.data
    assert isinstance(data, AgentData)
    traces = validation_samples(source_of(data, tokenizer, "validation", 0), config.eval.examples)
    metric, values, answers = AgentScore(sync_on_compute=False), dict[str, Any](), list[Answer]()
    with Bar(sum(map(len, traces))) as bar:
        for trace in traces:
            bar.name(trace.notes["id"])
            for answer in act(model, tokenizer, trace, config.eval.max_new_tokens or AGENT_TOKENS):
                metric.update(
                    *(answer[name] for name in ("distance", "turn", "loss", "tokens")), answer["references"][0], answer["prediction"]
                )
                answers.append(answer)
            bar.add(len(trace))
            values = metric.compute()
            results.write(values, {"agent": answers})
        results.draw(by_distance(values))
    results.show(f"{len(traces)} agent traces, turn by turn, by turn distance", _agent_table(values))
    return values


def act(model: CometForCausalLM, tokenizer: PreTrainedTokenizerBase, trace: Sample, max_new_tokens: int) -> Iterator[Answer]:
    """For each assistant turn of a trace: what the model would say there, and its loss on what was said."""
    ids = torch.from_numpy(trace.ids.astype(np.int64))[None].to(model.device)
    cache, read, number = CometCache(), 0, 0
    for role, _, content, end, distance in trace.notes["turns"]:
        if role != "assistant":
            continue
        number += 1
        if content - 1 > read:  # the last token before the turn stays unread: generation goes on from it
            model(ids[:, read : content - 1], past_key_values=cache, use_cache=True, logits_to_keep=1)
            read = content - 1
        mask = torch.ones(1, cache.get_seq_length() + content - read, dtype=torch.long, device=model.device)
        given = _generate(model, tokenizer, ids[:, read:content], mask, max_new_tokens, past_key_values=cache.clone())
        logits = model(ids[:, read:end], past_key_values=cache, use_cache=True).logits[0, content - read - 1 : -1].float()
        loss = torch.nn.functional.cross_entropy(logits, ids[0, content:end], reduction="sum")
        read = end
        texts = [str(tokenizer.decode(part, skip_special_tokens=True)).strip() for part in (given[0], ids[0, content:end])]
        facts = {"turn": number, "distance": distance, "loss": float(loss), "tokens": end - content}
        yield {"id": f"{trace.notes['id']}-{number}", "prediction": texts[0], "references": [texts[1]], **facts}


def _agent_table(values: dict[str, Any]) -> Table:
    table = Table("turn distance")
    for name in ("turns", "perplexity", "token F1", "calls", "tool right", "and arguments"):
        table.add_column(name, justify="right")
    for name, found in [*values["by_distance"].items(), ("all", values["all"])]:
        if name == "all":
            table.add_section()
        shares = ["" if found[key] is None else f"{found[key]:.1%}" for key in ("f1", "name", "action")]
        perplexity = "" if found["perplexity"] is None else f"{found['perplexity']:.2f}"
        table.add_row(name, str(found["turns"]), perplexity, shares[0], str(found["calls"]), *shares[1:])
    return table


# -- users' behaviour -------------------------------------------------------------------------------------------------------------------


def evaluate_behavior(model: CometForCausalLM, tokenizer: PreTrainedTokenizerBase, config: Config, results: Results) -> dict[str, Any]:
    """{method: BehaviorAccuracy's values}: CoMeT reads the whole window; the same model reads the last config.eval.budget tokens of it, or
    as many of the events that BM25 finds. "ceilings": what a reader without mistakes would get of each."""
    data = config.data
    assert isinstance(data, UserBehaviorData)
    questions = Behavior(
        log_of(data), tokenizer, config.seed, "test", data.train_length, config.eval.examples or 1, data.kinds, data.action, data.day_header
    )
    asked = [questions.question(number) for number in range(len(questions))]
    budget = config.eval.budget
    methods = {
        "CoMeT": questions.window,
        f"last {short(budget)}": lambda one: questions.truncate(one, budget),
        f"BM25 {short(budget)}": lambda one: questions.retrieve(one, budget),
    }
    values, ceilings, predictions = dict[str, Any](), dict[str, Any](), dict[str, list[Answer]]()
    longest = max(len(encode(tokenizer, one.answer)) for one in asked) + 1
    kinds, ages, references = [one.query.kind for one in asked], [one.age for one in asked], [one.answer for one in asked]
    with Bar(None) as bar:
        for name, choose in methods.items():
            bar.name(name)
            events = [choose(one) for one in asked]
            prompts = [questions.prompt(one, shown) for one, shown in zip(asked, events, strict=True)]
            texts = answer_prompts(model, tokenizer, prompts, longest, config.eval.batch_size, bar.add)
            found, ceiling = BehaviorAccuracy(sync_on_compute=False), BehaviorAccuracy(sync_on_compute=False)
            found.update(texts, references, kinds, ages)
            ceiling.update([questions.oracle(one, shown) for one, shown in zip(asked, events, strict=True)], references, kinds, ages)
            values[name], ceilings[name] = found.compute(), ceiling.compute()
            predictions[name.replace(" ", "_")] = [
                {"id": str(number), "prediction": text, "references": [one.answer], "score": float(exact_match(text, one.answer)),
                 "kind": one.query.kind, "age": one.age} for number, (one, text) in enumerate(zip(asked, texts, strict=True))
            ]  # fmt: skip
            results.write({**values, "ceilings": ceilings}, predictions)
            results.draw(curves(values))
            bar.note(f"{name}: {values[name]['accuracy']:.1%} of {len(asked)} questions")
    results.show(f"questions about users' behaviour, windows of {data.train_length:,} tokens", behavior_table(values))
    return {**values, "ceilings": ceilings}


# ---------------------------------------------------------------------------------------------------------------------------------------


def answer_prompts(
    model: CometForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    batch_size: int,
    count: Count = lambda n: None,
) -> list[str]:
    """Greedy answers in the order of the prompts, generated in left-padded batches of prompts of similar length."""
    texts = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        batch = pad_rows([(prompts[number], prompts[number]) for number in numbers], pad_token(tokenizer), left=True)
        ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
        given = _generate(model, tokenizer, ids, mask, max_new_tokens)
        for number, answer in zip(numbers, given, strict=True):
            texts[number] = str(tokenizer.decode(answer, skip_special_tokens=True)).strip()
        count(int(mask.sum()))
    return texts


def _generate(
    model: CometForCausalLM, tokenizer: PreTrainedTokenizerBase, ids: Tensor, mask: Tensor, max_new_tokens: int, **more: Any
) -> Tensor:
    """(B, <= max_new_tokens) greedy continuation; whatever the model's folder says of sampling is set aside."""
    greedy: dict[str, Any] = {
        "do_sample": False,
        "num_beams": 1,
        "num_return_sequences": 1,
        "temperature": None,
        "top_p": None,
        "top_k": None,
    }
    ends: dict[str, Any] = {"eos_token_id": stop_token(tokenizer), "pad_token_id": pad_token(tokenizer)}
    more |= {"attention_mask": mask, "max_new_tokens": max_new_tokens}
    all_ids: Any = model.generate(ids, **greedy, **ends, **more)  # type: ignore[misc]
    return all_ids[:, ids.shape[1] :]


EVALUATE = {
    PasskeyData: evaluate_passkey,
    ScrollsData: evaluate_scrolls,
    AgentData: evaluate_agent,
    UserBehaviorData: evaluate_behavior,
}
