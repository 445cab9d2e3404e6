"""Small event logs, and pandas' answers to questions about them."""

import csv
import functools
import gzip
import io
import json
import lzma
import re
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import zstandard

from data.behavior.events import Log
from data.behavior.examples import Behavior
from data.behavior.questions import wording
from data.tokenizer import train_tokenizer

PACK = {"": bytes, ".xz": lzma.compress, ".gz": gzip.compress, ".zst": zstandard.compress}
NAMES = ["user_id", "timestamp", "action", "item", "quantity", "price"]
GOOD = dict(zip(NAMES, ["a", "2011-01-01T10:00:00", "purchase", "7", 1, 1.5], strict=True))


def events(users: int = 9, count: int = 150, items: int = 12, seed: int = 0) -> list[dict]:
    """A random log: several events at one time, cancels between purchases, items that come back."""
    random = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        minutes = np.sort(random.integers(0, 90 * 24 * 6, count)) * 10
        for time in np.datetime64("2011-01-20T00:00:00") + minutes.astype("timedelta64[m]"):
            cancels = random.random() < 0.1
            act = ("cancel", -1) if cancels else ("purchase", int(random.integers(1, 30)))
            item = f"{1000 + int(random.zipf(1.3)) % items}"
            row = [f"u{user}", str(time), act[0], item, act[1], round(random.random() * 9, 2)]
            rows.append(dict(zip(NAMES, row, strict=True)))
    return rows


ROWS = events()
ITEMS = [{"item": str(1000 + n), "description": f"THING {n} ,  RED"} for n in range(12)]


@functools.cache
def tokenizer():
    return train_tokenizer([json.dumps(ROWS), "On which day is the last purchase of? from to"], 400)


def write(path: Path, rows: list, pack: str = "") -> Path:
    """Rows as the file's ending says; a row of bytes is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
        return path
    if ".csv" in path.name:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]) if rows else NAMES)
        writer.writeheader()
        writer.writerows(rows)
        content = text.getvalue().encode()
    else:
        lines = (row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
        content = b"".join(line + b"\n" for line in lines)
    path.write_bytes(PACK[pack](content))
    return path


def behavior(log: Log, split="train", length=3000, count=100, tokens=None, **options) -> Behavior:
    return Behavior(log, tokens or tokenizer(), 7, split, length, count, **options)


DATES = r"from (?P<first>\S+) to (?P<last>\S+)\?"
PURCHASE = r"(?P<which>last|first) purchase of (?P<x>.*)\?"
QUESTIONS = {
    "time": rf"On which day is the {PURCHASE}",
    "count": rf"How many times is there a purchase of (?P<x>.*) {DATES}",
    "most": rf"Which item has the most purchase lines {DATES}",
    "after": r"Is there a purchase of (?P<y>.*) after the last purchase of (?P<x>.*)\?",
    "followed": rf"Which item is in the next purchase after the {PURCHASE}",
    "total": r"What is the purchase total of (?P<month>\S+)\?",
    "next": r"Which item is in the next purchase\?",
}


def derive(asked: str, whole: pd.DataFrame, start: int, end: int) -> tuple[str, list[int]]:
    """(answer, events that count), from the question's words and a user's rows alone."""
    matches = ((kind, re.fullmatch(form, asked)) for kind, form in QUESTIONS.items())
    kind, said = next((kind, match.groupdict()) for kind, match in matches if match)
    if kind == "next":
        return whole.loc[end:].query("action == 'purchase'").iloc[0]["item"], []
    shown = whole.iloc[start:end].query("action == 'purchase'")
    x, y = (
        shown[shown["item"] == re.sub(r".*\((.*)\)$", r"\1", said.get(name) or "")] for name in "xy"
    )
    if "first" in said:
        shown = shown[(shown["day"] >= said["first"]) & (shown["day"] <= said["last"])]
    if kind == "time":
        row = x.iloc[-1 if said["which"] == "last" else 0]
        return row["day"], [row.name]
    if kind == "count":
        x = x[x.index.isin(shown.index)]
        return str(len(x)), x.index.tolist()
    if kind == "most":
        counts = shown["item"].value_counts()
        assert len(counts) == 1 or counts.iloc[0] > counts.iloc[1], "a tie"
        assert counts.iloc[0] > 1
        return counts.index[0], shown.index[shown["item"] == counts.index[0]].tolist()
    if kind == "after":
        last = x["timestamp"].max()
        assert y["timestamp"].max() != last, "neither before nor after"
        answer = "yes" if (y["timestamp"] > last).any() else "no"
        return answer, sorted([x.index[-1], y.index[-1]])
    if kind == "followed":
        at = x.index[-1 if said["which"] == "last" else 0]
        after = shown.loc[at + 1 :].iloc[0]
        assert after["item"] != shown.loc[at, "item"]
        return after["item"], [at, after.name]
    month = shown[shown["day"].str[:7] == said["month"]]
    lines = zip(month["price"], month["quantity"], strict=True)
    total = sum((Decimal(str(price)) * int(quantity) for price, quantity in lines), Decimal(0))
    return str(total.quantize(Decimal("0.01"), ROUND_HALF_UP)), month.index.tolist()


def frames(rows: list[dict] | Path) -> dict[str, pd.DataFrame]:
    """Each user's rows in order of time."""
    rows = [json.loads(line) for line in rows.open()] if isinstance(rows, Path) else rows
    table = pd.DataFrame(rows)
    table["day"] = table["timestamp"].str[:10]
    table = table.sort_values("timestamp", kind="stable")
    return {user: part.reset_index(drop=True) for user, part in table.groupby("user_id")}


def check(examples: Behavior, users: dict[str, pd.DataFrame], count: int, length=None) -> set[str]:
    """Derives the answers again; returns the kinds of the questions."""
    kinds = set()
    for number in range(count):
        question = examples.question(number, length)
        asked = wording(question.query, examples.log, examples.action)
        user = users[examples.log.histories[question.user].user]
        answer, evidence = derive(asked, user, question.start, question.end)
        assert (question.answer, list(question.evidence)) == (answer, evidence), asked
        assert all(question.start <= event < question.end for event in evidence)
        encoded, age = examples.encoded(question.user), None
        if evidence:
            age = int(encoded.ends[question.end - 1] - encoded.starts[evidence[0]])
            assert examples.oracle(question, question.events()) == answer
        assert question.age == age
        assert question.query.kind == "next_item" or evidence
        kinds.add(question.query.kind)
    return kinds
