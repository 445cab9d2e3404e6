"""The tasks of SCROLLS and their rows, out of files or the hub.

A row is {"id", "pid", "input", "output"} of <root>/<task>/<split>.jsonl[.xz|.gz|.zst], or of the
hub. The input is the question, a blank line and the document (gov_report and summ_screen_fd: the
document alone).
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from comet_pl.config.schema import ScrollsData
from comet_pl.errors import UserError, nearest
from data.jsonl import Complaints, Row, check_content, find, hub_errors, is_unicode, read

MAX_NEW_TOKENS = {
    "gov_report": 1024,
    "summ_screen_fd": 512,
    "qmsum": 512,
    "qasper": 128,
    "narrative_qa": 64,
    "quality": 128,
    "contract_nli": 16,
    "squality": 512,
}
TASKS = list(MAX_NEW_TOKENS)
SCROLLS = [task for task in TASKS if task != "squality"]
"""The tasks of the benchmark and of its submission; squality is ZeroSCROLLS'."""
HUB = "hf://datasets/tau/scrolls/{task}.zip"
WITHOUT_QUESTION = ("gov_report", "summ_screen_fd")


def tasks(data: ScrollsData) -> list[str]:
    """The tasks to read: data.tasks, or all that data.root (the hub: SCROLLS) has.

    Raises:
        UserError: root is no folder or holds no task; a task that SCROLLS or root lacks.
    """
    known = list(SCROLLS)
    if data.root is not None:
        root, splits = Path(data.root).expanduser(), ("train", "validation", "test")
        if not root.is_dir():
            raise UserError(f"data.root: {data.root} is no folder")
        known = [task for task in TASKS if any(find(root / task, split) for split in splits)]
        if not known:
            raise UserError(
                f"data.root: {data.root} holds no <task>/<split>.jsonl[.xz|.gz|.zst] "
                f"with a task of {', '.join(TASKS)}"
            )
    for number, task in enumerate(data.tasks or []):
        if task in (data.tasks or [])[:number]:
            raise UserError(
                f"data.tasks: {task} given twice; data.weights says how often a task is read"
            )
        if task not in known:
            reason = "no task of SCROLLS"
            if task in TASKS:
                reason = f"{data.root} has no {task}/<split>.jsonl[.xz|.gz|.zst]"
            raise UserError(
                f"data.tasks: {task!r} given, {reason}{nearest(task, known)}; "
                f"there are: {', '.join(known)}"
            )
    return data.tasks or known


def files(data: ScrollsData, split: str) -> dict[str, Path | None]:
    """{task: its file of a split; None: the hub's}, without the tasks that have no such file.

    Raises:
        UserError: see `tasks`; a task that data.tasks names has no training rows.
    """
    names = tasks(data)
    if data.root is None:
        return dict.fromkeys(names)
    root = Path(data.root).expanduser()
    found: dict[str, Path | None] = {}
    for task in names:
        if path := find(root / task, split):
            found[task] = path
        elif data.tasks and split == "train":
            there = ", ".join(sorted(path.name for path in (root / task).iterdir()))
            raise UserError(
                f"data.tasks: {task} given, but {root / task} has no "
                f"{split}.jsonl[.xz|.gz|.zst]; it holds {there:.200}"
            )
    return found


def rows(
    task: str, split: str, path: Path | None, complaints: Complaints
) -> Iterator[tuple[str, Row]]:
    """(place, row) of a task's split, with id, input and output checked.

    In the test split, which the benchmark gives without outputs, they may be missing.

    Args:
        path: of `files`.

    Raises:
        UserError: the file, or the hub, cannot be read.
        UnusableRow: a malformed row, and complaints raise.
    """
    needed = ("id", "input") if split == "test" else ("id", "input", "output")
    if path is None:
        unchecked = hub_rows(task, split)
    else:
        check_content(path, complaints)
        unchecked = read(path, complaints)
    pids: dict[str, str] = {}
    for place, row in unchecked:
        pid = row.get("pid")
        if isinstance(pid, str) and pids.setdefault(pid, place) != place:
            complaints.add(place, f"pid: {pid!r:.40} again, first at {pids[pid]}")
        elif reason := _fault(row, needed):
            complaints.add(place, reason)
        else:
            yield place, row


def _fault(row: Row, needed: Sequence[str]) -> str:
    """What is wrong with a row, or ''."""
    for key in needed:
        if not isinstance(row.get(key), str) or not row[key].strip():
            shown = f"{row[key]!r:.40} given" if key in row else "missing"
            return f"{key}: {shown}, text is needed"
    for key in ("id", "pid", "input", "output"):
        if isinstance(row.get(key), str) and not is_unicode(row[key]):
            return f"{key}: not Unicode text (half of a surrogate pair)"
    return ""


def hub_rows(task: str, split: str, archive: str = HUB) -> Iterator[tuple[str, Row]]:
    """('place:number', row) of a task of tau/scrolls, streamed out of its zip.

    Args:
        archive: address of the zip, with {task} to be filled in.

    Raises:
        UserError: the hub, or the split, cannot be read.
    """
    import datasets

    place = archive.format(task=task)
    with hub_errors(f"data.root: null given, but {split} rows of {place} cannot be read"):
        files = {split: f"zip://**/{split}.jsonl::{place}"}
        stream = datasets.load_dataset("json", data_files=files, split=split, streaming=True)
        for number, row in enumerate(stream, 1):
            yield f"{place}/{split}.jsonl:{number}", dict(row)


BLANK_LINE = re.compile(r"\r?\n[ \t]*\r?\n")
OPTION = re.compile(r"\s*\(([A-D])\)")
OPTIONS = re.compile(r"^\s*\(([A-D])\)", re.MULTILINE)


def split_input(task: str, row: Row) -> tuple[str, str]:
    """(question with the blank line after it, document) of a row's input.

    An input without a blank line is a question. A blank line may hold spaces, and lines may end as
    Windows ends them. ZeroSCROLLS' rows say where the document is, between instructions and
    question: both come before it.
    """
    text, start, end = row["input"], row.get("document_start_index"), row.get("document_end_index")
    if isinstance(start, int) and isinstance(end, int) and 0 <= start <= end <= len(text):
        return f"{text[:start].strip()}\n{text[end:].strip()}".strip() + "\n\n", text[start:end]
    if task in WITHOUT_QUESTION:
        return "", text
    blank = BLANK_LINE.search(text)
    if task == "quality":
        # its options follow the question, with blank lines between them
        letter = ""
        while blank and (option := OPTION.match(text, blank.end())) and option[1] > letter:
            start, blank = blank.end(), BLANK_LINE.search(text, option.end())
            letter = OPTIONS.findall(text, start, blank.start() if blank else len(text))[-1]
    if not blank:
        return text + "\n\n", ""
    return text[: blank.start()] + "\n\n", text[blank.end() :]


def options(task: str, question: str) -> list[str]:
    """The answers to choose from; none for tasks with free answers."""
    if task == "contract_nli":
        return ["Entailment", "Contradiction", "Not mentioned"]
    if task != "quality":
        return []
    found = re.findall(r"\([A-D]\)(.*?)(?=\([A-D]\)|$)", question, re.DOTALL)
    return [text.strip() for text in found]
