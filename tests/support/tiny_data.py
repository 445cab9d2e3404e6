"""Small folders of data of each kind; each function returns the folder that it writes."""

import json
import random
from datetime import datetime, timedelta


def write_scrolls(root):
    """Two small tasks: 9 questions about weather reports, 5 about contracts, with references of a
    second author."""
    draw = random.Random(3)
    words = "rain sun wind cloud north south sea town evening morning cold warm".split()
    for task, count in (("qmsum", 9), ("contract_nli", 5)):
        (root / task).mkdir(parents=True)
        for split in ("train", "validation"):
            rows = []
            for number in range(count):
                document = " ".join(draw.choices(words, k=60))
                answer = document.split()[7]
                if task == "contract_nli":
                    answer = draw.choice(["Entailment", "Contradiction"])
                row = {"id": f"{split}{number}", "pid": f"{split}{number}_0"}
                rows.append(row | {"input": f"Which?\n\n{document}", "output": answer})
            rows.append(rows[0] | {"pid": f"{split}0_1", "output": "calm"})
            _write(root / task / f"{split}.jsonl", rows)
    return root


def _write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_events(root):
    """12 users with 90 events each, an hour apart."""
    draw = random.Random(5)
    root.mkdir(parents=True)
    rows = []
    for user in range(12):
        for number in range(90):
            time = datetime(2024, 1, 1) + timedelta(hours=number)
            row = {"user_id": f"u{user}", "timestamp": time.isoformat(), "action": "purchase"}
            row |= {"item": f"{draw.randrange(12)}", "quantity": draw.randint(1, 5)}
            rows.append(row | {"price": draw.randint(1, 900) / 100})
    _write(root / "events.jsonl", rows)
    return root


def write_texts(folder):
    """Texts of 200 to 2,000 letters: four files, and a jsonl of eight rows."""
    draw = random.Random(9)
    words = "rain sun wind cloud north south sea town evening morning cold warm".split()
    texts = [" ".join(draw.choices(words, k=draw.randint(40, 400))) + "." for _ in range(12)]
    folder.mkdir()
    for number, text in enumerate(texts[:4]):
        (folder / f"tale{number}.txt").write_text(f"A tale of {words[number]}.\n\n{text}\n")
    _write(
        folder / "more.jsonl",
        [{"text": text, "id": number} for number, text in enumerate(texts[4:])],
    )
    return folder


def write_traces(folder, count=12):
    rows = []
    for k in range(count):
        function = {"name": "look_up", "arguments": json.dumps({"order": f"W{k:04}"})}
        call = {"id": "c", "type": "function", "function": function}
        messages = [
            {"role": "system", "content": "You help."},
            {"role": "user", "content": f"Where is order W{k:04}?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "name": "look_up", "content": "on its way"},
            {"role": "assistant", "content": f"Order W{k:04} is on its way."},
        ]
        row = {"uniq_id": f"task{k}-trial0", "reward": k % 3 / 2}
        rows.append(row | {"messages": messages if k % 2 else json.dumps(messages)})
    folder.mkdir()
    _write(folder / "traces.jsonl", rows)
    return folder
