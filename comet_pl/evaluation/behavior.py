"""Questions about users' behaviour: the whole history through the memory, against its end and against retrieval."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from comet_pl.chat.conversation import encode
from comet_pl.config.schema import Config, UserBehaviorData
from comet_pl.evaluation.generation import answer_prompts
from comet_pl.evaluation.results import Answer, Results, prompt_end
from comet_pl.metrics.behavior import BehaviorAccuracy, curves, exact_match, older_than, table
from comet_pl.metrics.passkey import short
from comet_pl.model.modeling_comet import CometForCausalLM
from comet_pl.progress import Bar
from data.user_behavior import Behavior, log_of


def evaluate_behavior(
    model: CometForCausalLM, tokenizer: PreTrainedTokenizerBase, config: Config, results: Results
) -> dict[str, Any]:
    """{method: BehaviorAccuracy's values}: CoMeT reads the whole window; the same model reads the last config.eval.budget tokens of it, or
    as many of the events that BM25 finds. "ceilings": what a reader without mistakes would get of each."""
    data = config.data
    assert isinstance(data, UserBehaviorData)
    questions = Behavior(
        log_of(data),
        tokenizer,
        config.seed,
        "test",
        data.train_length,
        config.eval.examples or 1,
        data.kinds,
        data.action,
        data.layout,
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
    kinds, ages, references = (
        [one.query.kind for one in asked],
        [one.age for one in asked],
        [one.answer for one in asked],
    )
    with Bar(None) as bar:
        for name, choose in methods.items():
            bar.name(name)
            events = [choose(one) for one in asked]
            prompts = [
                questions.prompt(one, shown) for one, shown in zip(asked, events, strict=True)
            ]
            texts = answer_prompts(model, tokenizer, prompts, config.eval, longest, bar.add)
            found, ceiling = (
                BehaviorAccuracy(sync_on_compute=False),
                BehaviorAccuracy(sync_on_compute=False),
            )
            found.update(texts, references, kinds, ages)
            ceiling.update(
                [questions.oracle(one, shown) for one, shown in zip(asked, events, strict=True)],
                references,
                kinds,
                ages,
            )
            values[name], ceilings[name] = found.compute(), ceiling.compute()
            predictions[name.replace(" ", "_")] = [
                {"id": str(number), "prompt_end": prompt_end(tokenizer, prompt), "prediction": text, "references": [one.answer],
                 "score": float(exact_match(text, one.answer)), "kind": one.query.kind, "age": one.age}
                for number, (one, prompt, text) in enumerate(zip(asked, prompts, texts, strict=True))
            ]  # fmt: skip
            results.write({**values, "ceilings": ceilings}, predictions)
            results.draw(curves(values))
            old = older_than(values[name], budget)
            beyond = (
                f"; {old['accuracy']:.1%} of {old['n']} with evidence older than {short(budget)}"
                if old["n"]
                else ""
            )
            bar.note(f"{name}: {values[name]['accuracy']:.1%} of {len(asked)} questions{beyond}")
    results.show(
        f"questions about users' behaviour, windows of {data.train_length:,} tokens", table(values)
    )
    return {**values, "ceilings": ceilings}
