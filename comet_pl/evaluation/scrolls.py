"""SCROLLS' official scores, and which option the model finds likeliest."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from comet_pl.chat.conversation import encode
from comet_pl.config.schema import Config, ScrollsData
from comet_pl.errors import UserError
from comet_pl.evaluation.generation import Count, answer_prompts, generate
from comet_pl.evaluation.results import Answer, Results, prompt_end
from comet_pl.metrics.scrolls import (
    METRICS,
    SCROLLS,
    ScrollsScore,
    average,
    exact_match,
    scores,
    submission_csv,
)
from comet_pl.model.cache import CometCache
from comet_pl.model.modeling_comet import CometForCausalLM
from comet_pl.progress import Bar
from data.batches import IGNORED, pad_rows, pad_token, stop_token
from data.scrolls import MAX_NEW_TOKENS, Corpus, Example, tasks


def evaluate_scrolls(
    model: CometForCausalLM, tokenizer: PreTrainedTokenizerBase, config: Config, results: Results
) -> dict[str, Any]:
    """{task: {"scrolls_score", its metrics, "n"}, "average"}, in percent, on the questions of config.eval.split that config.eval.examples
    allows. Tasks whose test answers are secret are answered and left out of it; predictions/submission.csv is for the benchmark's site."""
    data = config.data
    assert isinstance(data, ScrollsData)
    split = config.eval.split
    corpus = Corpus(data, tokenizer, split)
    asked = {
        task: questions
        for task in tasks(data)
        if (questions := corpus.questions(task, config.eval.examples))
    }
    if not asked:
        raise UserError(
            f"data.root: {data.root} has no {split} rows for {', '.join(tasks(data))}, so there is nothing to evaluate"
        )
    scored, predictions, values = dict[str, Any](), dict[str, list[Answer]](), dict[str, Any]()
    with Bar(
        sum(len(corpus.prompt(one)) for questions in asked.values() for one in questions)
    ) as bar:
        for task, questions in asked.items():
            bar.name(task)
            longest = config.eval.max_new_tokens or MAX_NEW_TOKENS[task]
            prompts = [corpus.prompt(one) for one in questions]
            chosen: list[str] = []
            if all(one.options for one in questions):
                pairs = [
                    choose(model, tokenizer, *pair, longest, bar.add)
                    for pair in zip(prompts, questions, strict=True)
                ]
                texts, chosen = ([pair[side] for pair in pairs] for side in (0, 1))
            else:
                texts = answer_prompts(model, tokenizer, prompts, config.eval, longest, bar.add)
            known = all(one.references for one in questions)
            if known:
                scored[task] = _scored(task, questions, texts, chosen)
            values = {**scored, "average": average(scored)} if scored else {}
            predictions[task] = []
            for one, prompt, text in zip(questions, prompts, texts, strict=True):
                score = scores(task, text, one.references)["scrolls_score"] if known else None
                asked_with = {
                    "question": str(tokenizer.decode(one.question)).strip(),
                    "prompt_end": prompt_end(tokenizer, prompt),
                }
                predictions[task].append(
                    {
                        "id": one.id,
                        **asked_with,
                        "prediction": text,
                        "references": one.references,
                        "score": score,
                    }
                )
            results.write(values, predictions)
            found = (
                f"{scored[task]['scrolls_score']:.2f} on {len(questions)} questions"
                if known
                else f"{len(questions)} questions answered"
            )
            bar.note(f"{task}: {found}")
    if split == "test":
        _submit(predictions, results)
    if scored:
        results.show(f"SCROLLS, {split}, in percent", _scrolls_table(scored, values["average"]))
    return values


def _scored(
    task: str, questions: list[Example], texts: list[str], chosen: list[str]
) -> dict[str, Any]:
    metric = ScrollsScore(task, sync_on_compute=False)
    metric.update(texts, [one.references for one in questions])
    found: dict[str, Any] = metric.compute()
    if chosen:
        right = [
            any(exact_match(option, one) for one in asked.references)
            for option, asked in zip(chosen, questions, strict=True)
        ]
        found["likeliest_option"] = 100 * sum(right) / len(right)
    return found


def _submit(predictions: dict[str, list[Answer]], results: Results) -> None:
    """Writes the submission, if it would be whole; says what it holds or lacks."""
    path = results.out / "predictions" / "submission.csv"
    if lacking := [task for task in SCROLLS if task not in predictions]:
        print(
            f"no submission written: it needs all seven tasks, and there are no predictions for {', '.join(lacking)}"
        )
        return
    submission_csv(
        {task: {one["id"]: one["prediction"] for one in predictions[task]} for task in SCROLLS},
        path,
    )
    print(
        f"submission: {path}, {sum(len(predictions[task]) for task in SCROLLS)} answers (all questions: eval.examples=null)"
    )


def choose(
    model: CometForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: np.ndarray,
    asked: Example,
    longest: int,
    count: Count,
) -> tuple[str, str]:
    """(greedy answer, likeliest option) with one reading of the prompt: the memory is forked for each. An option's probability is that of
    all its tokens and of the stop token."""
    ids = torch.from_numpy(prompt.astype(np.int64))[None].to(model.device)
    cache = CometCache()
    model(ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
    text = generate(
        model, tokenizer, ids, torch.ones_like(ids), longest, past_key_values=cache.clone()
    )
    endings = [
        np.array([*encode(tokenizer, option), stop_token(tokenizer)]) for option in asked.options
    ]
    batch = pad_rows(
        [(np.concatenate([prompt[-1:], one]), np.concatenate([[IGNORED], one])) for one in endings],
        pad_token(tokenizer),
    )
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    cache.batch_repeat_interleave(len(endings))
    logits = (
        model(batch["input_ids"], attention_mask=batch["attention_mask"], past_key_values=cache)
        .logits[:, :-1]
        .float()
    )
    losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none", ignore_index=IGNORED
    )
    count(len(prompt))
    return str(tokenizer.decode(text[0], skip_special_tokens=True)).strip(), asked.options[
        int(losses.sum(1).argmin())
    ]


def _scrolls_table(scored: dict[str, Any], mean: float) -> Table:
    table = Table("task", "score", "of", "questions")
    for task, found in scored.items():
        parts = ", ".join(
            f"{name} {found[name]:.2f}"
            for name in (*METRICS[task], "likeliest_option")
            if name in found
        )
        table.add_row(task, f"{found['scrolls_score']:.2f}", parts, str(found["n"]))
    table.add_section()
    table.add_row("average", f"{mean:.2f}")
    return table
