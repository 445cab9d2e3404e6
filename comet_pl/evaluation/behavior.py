"""Questions about users' behaviour: the history through the memory, its end, or retrieval."""

from typing import Any

from comet_pl.config.schema import Config, UserBehaviorData
from comet_pl.evaluation.generation import Engine
from comet_pl.evaluation.results import Answer, Results, answer_of
from comet_pl.metrics.behavior import BehaviorAccuracy, curves, exact_match, older_than, table
from comet_pl.metrics.passkey import short
from comet_pl.progress import Bar
from data.behavior.baselines import bm25_events, last_events
from data.behavior.questions import Question
from data.encoding import encode
from data.user_behavior import behavior_of


def evaluate_behavior(engine: Engine, config: Config, results: Results) -> dict[str, Any]:
    """{method: BehaviorAccuracy's values, "ceilings": the same of a reader without mistakes}.

    CoMeT reads the whole window; the same model reads its last config.eval.budget tokens, or as
    many tokens of the events that BM25 finds.
    """
    data = config.data
    assert isinstance(data, UserBehaviorData)
    count = config.eval.examples or 1
    questions = behavior_of(data, engine.tokenizer, config.seed, "test", count)
    asked = [questions.question(number) for number in range(len(questions))]
    budget = config.eval.budget
    methods = {
        "CoMeT": Question.events,
        f"last {short(budget)}": lambda question: last_events(questions, question, budget),
        f"BM25 {short(budget)}": lambda question: bm25_events(questions, question, budget),
    }
    values, ceilings, predictions = dict[str, Any](), dict[str, Any](), dict[str, list[Answer]]()
    references = [question.answer for question in asked]
    facts = [question.query.kind for question in asked], [question.age for question in asked]
    longest = max(len(encode(engine.tokenizer, reference)) for reference in references) + 1

    def accuracy(texts: list[str]) -> dict[str, Any]:
        metric = BehaviorAccuracy(sync_on_compute=False)
        metric.update(texts, references, *facts)
        return metric.compute()

    with Bar(None) as bar:
        for name, choose in methods.items():
            bar.name(name)
            shown = [(question, choose(question)) for question in asked]
            prompts = [questions.prompt(*pair) for pair in shown]
            texts = engine.answers(prompts, config.eval, longest, bar.add)
            values[name] = accuracy(texts)
            ceilings[name] = accuracy([questions.oracle(*pair) for pair in shown])
            predictions[name.replace(" ", "_")] = [
                answer_of(
                    engine.tokenizer,
                    str(number),
                    prompt,
                    text,
                    [question.answer],
                    float(exact_match(text, question.answer)),
                    kind=question.query.kind,
                    age=question.age,
                )
                for number, (question, prompt, text) in enumerate(
                    zip(asked, prompts, texts, strict=True)
                )
            ]
            results.write({**values, "ceilings": ceilings}, predictions)
            results.draw(curves(values))
            line = f"{name}: {values[name]['accuracy']:.1%} of {len(asked)} questions"
            old = older_than(values[name], budget)
            if old["n"]:
                share = f"{old['accuracy']:.1%} of {old['n']}"
                line += f"; {share} with evidence older than {short(budget)}"
            bar.note(line)
    title = f"questions about users' behaviour, windows of {data.train_length:,} tokens"
    results.show(title, table(values))
    return {**values, "ceilings": ceilings}
