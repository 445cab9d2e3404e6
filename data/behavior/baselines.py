"""What methods without memory see of a question's window: its end, or what retrieval finds."""

import logging

import numpy as np

from data.behavior.event_text import lines
from data.behavior.examples import Behavior
from data.behavior.questions import Question


def last_events(examples: Behavior, question: Question, budget: int) -> np.ndarray:
    """The window's last events, as many as fit into `budget` tokens."""
    first = examples.encoded(question.user).fitting(question.end, budget)
    return np.arange(max(question.start, first), question.end)


def bm25_events(examples: Behavior, question: Question, budget: int) -> np.ndarray:
    """The window's events that BM25 ranks highest for the question, in order of time.

    As many as fit into `budget` tokens. Of equal scores the latest events come first, so that a
    rest of the budget shows the recent past.
    """
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)
    log, encoded = examples.log, examples.encoded(question.user)
    events = question.events()
    layout = "lines" if examples.layout == "days" else examples.layout
    history = log.histories[question.user].select(events)
    documents = [line for _, line in lines(history, log, layout)]
    options = {"token_pattern": r"\w+", "stopwords": [], "return_ids": False}
    words = [documents, examples.wording(question.query)]
    documents, query = (bm25s.tokenize(text, show_progress=False, **options) for text in words)
    index = bm25s.BM25()
    index.index(documents, show_progress=False)
    scores = index.get_scores(query[0])
    chosen, days = list[int](), set[int]()
    for event in events[np.lexsort([-events, -scores])].tolist():
        day = encoded.heads[event]
        size = encoded.ends[event] - encoded.starts[event]
        size += 0 if day in days else encoded.bodies[event] - day
        if size > budget:
            break
        budget -= size
        days.add(day)
        chosen.append(event)
    return np.array(sorted(chosen), dtype=np.int64)
