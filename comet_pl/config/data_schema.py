"""The data section, one class for each data.kind; schema.py has the other sections."""

from dataclasses import dataclass

from comet_pl.config.key import key

PACKING = ("none", "documents", "shared")
PLANS = ("fixed", "right_aligned", "random", "uniform", "sentence", "mixture")
MOST_DAYS = 36_500  # a century, so that years keep four digits


def _length_schedule(pairs: list[list[int]]) -> bool:
    if not pairs or any(len(pair) != 2 or pair[1] < 1 for pair in pairs):
        return False
    steps = [pair[0] for pair in pairs]
    return steps[0] == 0 and sorted(set(steps)) == steps


def _least_most(values: list[int]) -> bool:
    return len(values) == 2 and values[0] <= values[1]


@dataclass(frozen=True)
class PasskeyData:
    kind: str = key("passkey", "which data: chooses the keys of this section")
    train_length: int = key(
        1024, "tokens of a training example, question and answer included", min=1
    )
    length_schedule: list[list[int]] | None = key(
        None,
        "lengths by step, clipped to trainer.max_steps; null: always train_length",
        check=_length_schedule,
        needs="[[0, length], [step, length], ...] with growing steps and lengths >= 1, or null",
    )
    haystack: str | None = key(
        None, "a text file to hide the keys in; null: sentences that the project makes itself"
    )
    batch_size: int = key(32, "rows a batch", min=1)
    num_workers: int = key(0, "worker processes that make batches", min=0)
    val_lengths: list[int] | None = key(
        None, "lengths of the validation heat-map; null: [train_length]", min=1
    )
    val_depths: int = key(5, "depths of the validation heat-map, evenly spaced from 0 to 1", min=1)
    val_examples: int = key(4, "examples a cell of the validation heat-map", min=1)


@dataclass(frozen=True)
class TextData:
    """What all data of texts share (data/text/batches.py)."""

    kind: str = key("", "which data: chooses the keys of this section")
    max_length: int = key(
        2048,
        "tokens of a row; what a longer text loses depends on data.kind, and is counted",
        min=1,
    )
    batch_size: int = key(4, "rows a batch", min=1)
    packing: str = key(
        "none",
        "several texts in a row; documents: each with a memory of its own; shared: one memory, as "
        "the authors",
        choices=PACKING,
    )
    chunk_plan: str = key(
        "fixed",
        "how training texts are cut into chunks; mixture: one kind drawn for each, as the authors",
        choices=PLANS,
    )
    dynamic_stride: bool = key(
        False, "draw each training row's compression stride from s, 2s, 4s, ... up to 128"
    )
    streaming: bool = key(
        False, "read and tokenise rows when they are needed, instead of once into data.cache"
    )
    shuffle_window: int = key(
        1024, "with streaming: rows that are shuffled, and packed, together", min=1
    )
    cache: str = key(
        "runs/cache",
        "folder for tokenised texts, by tokenizer, files and options; used again, never cleared",
    )
    num_workers: int = key(0, "worker processes that tokenise and make batches", min=0)
    on_error: str = key(
        "raise",
        "a malformed row: raise (one line, naming file and line) or skip (counted and shown)",
        choices=("raise", "skip"),
    )


@dataclass(frozen=True)
class ScrollsData(TextData):
    kind: str = key("scrolls", "which data: chooses the keys of this section")
    root: str | None = key(
        None, "folder with <task>/<split>.jsonl[.xz|.gz|.zst]; null: the hub's tau/scrolls"
    )
    tasks: list[str] | None = key(None, "tasks to read; null: every task folder in root")
    weights: list[float] | None = key(
        None,
        "how often an epoch has the rows of each task, in the order of tasks; null: once",
        min=0,
    )
    max_length: int = key(
        2048,
        "tokens of a row; a longer document loses its left part, never question or answer",
        min=1,
    )
    val_examples: int | None = key(64, "validation questions a task; null: all", min=1)


@dataclass(frozen=True)
class AgentData(TextData):
    kind: str = key("agent", "which data: chooses the keys of this section")
    root: str | None = key(
        None,
        "traces: a jsonl file, or a folder of them, plain, .xz, .gz or .zst; or one with train.* "
        "and validation.*",
    )
    max_length: int = key(
        16384, "tokens of a row; a longer trace is unusable (see on_error)", min=1
    )
    val_share: float = key(
        0.1, "share of the tasks to validate on, where the files don't tell", min=0, below=1
    )
    min_reward: float | None = key(
        None,
        "traces with less reward, or without one, are left out and counted; null: all are used",
    )
    last_turns: int | None = key(
        None, "loss on the last so many turns of the assistant; null: on all", min=1
    )
    val_examples: int | None = key(16, "validation traces; null: all", min=1)


@dataclass(frozen=True)
class PlainTextData(TextData):
    kind: str = key("text", "which data: chooses the keys of this section")
    root: str | None = key(
        None,
        "texts: a .txt file (one document), a .jsonl (a document a row), each plain, .xz, .gz or "
        ".zst, or a .parquet file; a folder of them, or one with train.* and validation.* (or "
        "folders of these names); or a dataset of the hub, owner/name",
    )
    text_key: str = key("text", "key of a row's text in jsonl files, or the column")
    max_length: int = key(
        2048, "tokens of a row; a longer document is cut into several, and nothing is lost", min=4
    )
    val_share: float = key(
        0.1,
        "share of the documents to validate on, where the files don't tell; of a single document, "
        "its end",
        min=0,
        below=1,
    )
    val_examples: int | None = key(64, "validation rows; null: all", min=1)


@dataclass(frozen=True)
class UserBehaviorData:
    kind: str = key("user_behavior", "which data: chooses the keys of this section")
    root: str | None = key(
        None, "event log: a jsonl, csv or parquet file, or a folder with one named events"
    )
    items: str | None = key(
        None, "table of item descriptions; null: items.* beside the events, if it is there"
    )
    user_column: str = key("user_id", "name of the column")
    time_column: str = key("timestamp", "name of the column; ISO times")
    action_column: str | None = key(
        "action", "name of the column; null: all events are of data.action"
    )
    item_column: str = key("item", "name of the column, in the item table too")
    quantity_column: str | None = key("quantity", "name of the column; null: none")
    price_column: str | None = key("price", "name of the column; null: none")
    description_column: str = key("description", "name of the column of the item table")
    descriptions: bool = key(
        True, "items by description and number; false: by number alone, which is shorter"
    )
    action: str = key("purchase", "the action that questions are about")
    kinds: list[str] | None = key(
        None, "kinds of questions (data/behavior/questions.py); null: all that the columns allow"
    )
    questions: int = key(
        1, "questions that a training row asks about its window, one after the other", min=1
    )
    layout: str = key(
        "days",
        "history: the day once above its events, in each of the lines, or lines that begin with "
        "item and day (then questions name numbers)",
        choices=("days", "lines", "items"),
    )
    whole_words: bool = key(
        True,
        "a tokenizer trained here: an item, day, time or price is one token where vocab_size "
        "allows; false: digit by digit",
    )
    keep_events: float = key(
        1.0,
        "training windows leave out events at random: the least share that is kept (next_item is "
        "then the next kept)",
        above=0,
        max=1,
    )
    shift_days: int = key(
        0,
        "training windows have their days moved, all alike, by up to so many",
        min=0,
        max=MOST_DAYS,
    )
    new_days: list[int] | None = key(
        None,
        "training windows have their events spread over a span of [least, most] days, within "
        "shift_days of the log; null: as they are",
        min=1,
        max=MOST_DAYS,
        check=_least_most,
        needs=f"[least, most] with 1 <= least <= most <= {MOST_DAYS}, or null",
    )
    duplicates: str = key(
        "keep", "equal rows: keep, or drop all but the first", choices=("keep", "drop")
    )
    train_length: int = key(
        4096, "tokens of a training example, question and answer included", min=1
    )
    length_schedule: list[list[int]] | None = key(
        None,
        "lengths by step, clipped to trainer.max_steps; null: always train_length",
        check=_length_schedule,
        needs="[[0, length], [step, length], ...] with growing steps and lengths >= 1, or null",
    )
    batch_size: int = key(16, "rows a batch", min=1)
    num_workers: int = key(0, "worker processes that make batches", min=0)
    on_error: str = key(
        "raise",
        "a malformed row: raise (one line, naming file and line) or skip (counted and shown)",
        choices=("raise", "skip"),
    )
    val_examples: int = key(64, "validation questions", min=1)


DATA_KINDS: dict[str, type] = {
    "passkey": PasskeyData,
    "scrolls": ScrollsData,
    "agent": AgentData,
    "user_behavior": UserBehaviorData,
    "text": PlainTextData,
}
"""data.kind -> the schema of the data section."""
