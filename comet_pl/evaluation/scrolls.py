"""SCROLLS' official scores, and the option that the model finds likeliest."""

from typing import Any

import numpy as np
import torch
from rich.table import Table

from comet_pl.config.schema import Config, ScrollsData
from comet_pl.errors import UserError
from comet_pl.evaluation.generation import Count, Engine
from comet_pl.evaluation.results import Answer, Results, answer_of
from comet_pl.metrics.scrolls import (
    METRICS,
    ScrollsScore,
    average,
    exact_match,
    scores,
    submission_csv,
)
from comet_pl.progress import Bar
from data.batches import IGNORED, pad_rows
from data.chat_template import answer_start
from data.encoding import begins_after, encode
from data.scrolls import Corpus, Example
from data.scrolls_rows import MAX_NEW_TOKENS, SCROLLS, tasks
from data.tokenizer import pad_token, stop_token


def evaluate_scrolls(engine: Engine, config: Config, results: Results) -> dict[str, Any]:
    """{task: {"scrolls_score", its metrics, "n"}, "average"}, in percent.

    The questions are those of config.eval.split, config.eval.examples a task. Tasks whose test
    answers are secret are answered but not scored; predictions/submission.csv is for the
    benchmark's site.
    """
    tokenizer, data = engine.tokenizer, config.data
    assert isinstance(data, ScrollsData)
    split = config.eval.split
    corpus = Corpus(data, tokenizer, split)
    asked = {task: corpus.questions(task, config.eval.examples) for task in tasks(data)}
    asked = {task: questions for task, questions in asked.items() if questions}
    if not asked:
        missing = f"{split} rows for {', '.join(tasks(data))}, so there is nothing to evaluate"
        raise UserError(f"data.root: {data.root} has no {missing}")
    scored, predictions, values = dict[str, Any](), dict[str, list[Answer]](), dict[str, Any]()
    total = sum(len(corpus.prompt(each)) for questions in asked.values() for each in questions)
    with Bar(total) as bar:
        for task, questions in asked.items():
            bar.name(task)
            prompts = [corpus.prompt(question) for question in questions]
            longest = config.eval.max_new_tokens or MAX_NEW_TOKENS[task]
            options: list[str] = []
            if all(question.options for question in questions):
                pairs = [
                    choose(engine, *pair, longest, bar.add)
                    for pair in zip(prompts, questions, strict=True)
                ]
                texts, options = ([pair[side] for pair in pairs] for side in (0, 1))
            else:
                texts = engine.answers(prompts, config.eval, longest, bar.add)
            known = all(question.references for question in questions)
            if known:
                scored[task] = _scored(task, questions, texts, options)
            values = {**scored, "average": average(scored)} if scored else {}
            predictions[task] = []
            for question, prompt, text in zip(questions, prompts, texts, strict=True):
                references = question.references
                score = scores(task, text, references)["scrolls_score"] if known else None
                words = str(tokenizer.decode(question.question)).strip()
                answer = answer_of(tokenizer, question.id, prompt, text, references, score)
                predictions[task].append({"id": question.id, "question": words} | answer)
            results.write(values, predictions)
            line = f"{len(questions)} questions answered"
            if known:
                line = f"{scored[task]['scrolls_score']:.2f} on {len(questions)} questions"
            bar.note(f"{task}: {line}")
    if split == "test":
        _submit(predictions, results)
    if scored:
        results.show(f"SCROLLS, {split}, in percent", _scrolls_table(scored, values["average"]))
    return values


def _scored(
    task: str, questions: list[Example], texts: list[str], options: list[str]
) -> dict[str, Any]:
    metric = ScrollsScore(task, sync_on_compute=False)
    metric.update(texts, [question.references for question in questions])
    values: dict[str, Any] = metric.compute()
    if options:
        right = [
            any(exact_match(option, reference) for reference in question.references)
            for option, question in zip(options, questions, strict=True)
        ]
        values["likeliest_option"] = 100 * sum(right) / len(right)
    return values


def _submit(predictions: dict[str, list[Answer]], results: Results) -> None:
    """Writes the submission if no task is missing, and says what it holds or lacks."""
    if lacking := ", ".join(task for task in SCROLLS if task not in predictions):
        reason = f"it needs all seven tasks, and there are no predictions for {lacking}"
        print(f"no submission written: {reason}")
        return
    path = results.predictions / "submission.csv"
    texts = {
        task: {answer["id"]: answer["prediction"] for answer in predictions[task]}
        for task in SCROLLS
    }
    submission_csv(texts, path)
    total = sum(map(len, texts.values()))
    print(f"submission: {path}, {total} answers (all questions: eval.examples=null)")


def choose(
    engine: Engine, prompt: np.ndarray, question: Example, longest: int, count: Count
) -> tuple[str, str]:
    """(greedy answer, likeliest option) of a prompt that is read once.

    The memory is copied for each. An option's probability is that of all its tokens and of the
    stop token.
    """
    model, tokenizer, ids = engine.model, engine.tokenizer, engine.tensor(prompt)
    cache = engine.prefill(ids[:, :-1])
    text = engine.generate(ids, longest, cache=cache.clone())
    start, begins = answer_start(tokenizer), begins_after(tokenizer, prompt)
    answers = [encode(tokenizer, start + option, begins) for option in question.options]
    endings = [[*answer, stop_token(tokenizer)] for answer in answers]
    rows = [(np.array([prompt[-1], *ids]), np.array([IGNORED, *ids])) for ids in endings]
    batch = pad_rows(rows, pad_token(tokenizer))
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    cache.batch_repeat_interleave(len(endings))
    output = model(
        batch["input_ids"], attention_mask=batch["attention_mask"], past_key_values=cache
    )
    losses = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].float().transpose(1, 2),
        batch["labels"][:, 1:],
        reduction="none",
        ignore_index=IGNORED,
    )
    count(len(prompt))
    return engine.text(text[0]), question.options[int(losses.sum(1).argmin())]


def _scrolls_table(scored: dict[str, Any], mean: float) -> Table:
    table = Table("task", "score", "of", "questions")
    for task, values in scored.items():
        names = [name for name in (*METRICS[task], "likeliest_option") if name in values]
        parts = ", ".join(f"{name} {values[name]:.2f}" for name in names)
        table.add_row(task, f"{values['scrolls_score']:.2f}", parts, str(values["n"]))
    table.add_section()
    table.add_row("average", f"{mean:.2f}")
    return table
