"""Long texts out of files or the hub, one document at a time, and their splits.

A .txt file is a document, and so is each row of a .jsonl or .parquet file. A .txt file may be of
any size: it is read in parts, once to check it and again for its text.
"""

import codecs
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from comet_pl.errors import UserError, nearest
from data.behavior.tables import parquet
from data.encoding import marked, pieces
from data.jsonl import (
    OPEN,
    UNREADABLE,
    Complaints,
    Row,
    UnusableRow,
    check_content,
    check_distinct,
    hub_errors,
    is_unicode,
    read,
)

PACKED = (".txt", ".jsonl")  # may be compressed; parquet files are inside
ENDINGS = (*(kind + packed for kind in PACKED for packed in OPEN), ".parquet")
JSONL = tuple(f".jsonl{packed}" for packed in OPEN)
ALLOWED = ".txt or .jsonl[.xz|.gz|.zst] or .parquet"
SPLITS = ("train", "validation")
NAMED = re.compile(r"(train|validation|test)(-\d[\w-]*)?\.")  # train.txt, train-00000-of-00002.txt
HUB = re.compile(r"\w[\w.-]*/[\w.-]+")
BLOCK = 1 << 20  # bytes


def files(root: str, split: str) -> tuple[list[Path], bool]:
    """(files that hold a split, whether they hold the other one too and have to be split).

    Args:
        root: a file; a folder with train and validation, which are files of any kind (as train.txt)
            or folders of them; or a folder with others, which are all read, those of its folders
            too. In the order of their names.

    Raises:
        UserError: there is no such file or folder, or nothing in it; files that differ in their
            endings alone; one split by name beside other files.
    """
    path = Path(root).expanduser()
    if path.is_file():
        if not path.name.endswith(ENDINGS):
            raise UserError(f"data.root: {root} given, allowed: a folder, or a file {ALLOWED}")
        return [path], True
    if not path.is_dir():
        raise UserError(f"data.root: {root} is no file or folder")
    paths = [file for file in _inside(path) if file.name.endswith(ENDINGS)]
    if not paths:
        there = ", ".join(sorted(one.name for one in path.iterdir())) or "it is empty"
        raise UserError(f"data.root: {root} holds no file {ALLOWED}: {there:.200}")
    check_distinct(paths)
    by_split: dict[str, list[Path]] = {}
    for file in paths:
        by_split.setdefault(_split_name(file.relative_to(path)), []).append(file)
    if by_split.keys() >= {*SPLITS}:
        return by_split[split], False
    if len(by_split) > 1:
        name = next(name for name in by_split if name)
        raise UserError(
            f"data.root: {root} holds {name} beside other files, so that train and validation "
            "(files such as train.txt, or folders) are both needed; or one file or folder without "
            "them as data.root, which data.val_share splits"
        )
    return paths, True


def not_read(root: str) -> list[str]:
    """Names of a folder's files that are of no split, where others are, or of another kind."""
    path = Path(root).expanduser()
    if not path.is_dir():
        return []
    known = {file for split in SPLITS for file in files(root, split)[0]}
    return [str(file.relative_to(path)) for file in _inside(path) if file not in known]


def _inside(folder: Path) -> list[Path]:
    """Files in a folder and its folders, without hidden ones."""
    found = []
    for entry in folder.iterdir():
        inner = entry.rglob("*") if entry.is_dir() else [entry]
        found += [file for file in inner if file.is_file()]
    visible = (file for file in found if "/." not in f"/{file.relative_to(folder).as_posix()}")
    return sorted(visible)


def _split_name(path: Path) -> str:
    """train, validation or test, if that is the name of a file, or of the folder that it is in;
    else ''."""
    if len(path.parts) > 1:
        return path.parts[0] if path.parts[0] in (*SPLITS, "test") else ""
    named = NAMED.match(path.name)
    return named[1] if named else ""


@dataclass(frozen=True)
class Document:
    """A text with a name for messages.

    Args:
        path: of a .txt file, which is read whenever its text is needed; None: text is all of it.
        digest: of the text, from 0 to 2^64 - 1.
    """

    place: str
    digest: int
    text: str = ""
    path: Path | None = None

    def parts(self) -> Iterable[str]:
        """The text, in parts of any length."""
        return [self.text] if self.path is None else text_of(self.path)


def text_of(path: Path) -> Iterator[str]:
    """A .txt file in parts, without the mark that some editors begin it with.

    Raises:
        UserError: the file cannot be read or unpacked.
        UnusableRow: it is not UTF-8.
    """
    decoder, count, line = codecs.getincrementaldecoder("utf-8")(), 0, 1
    try:
        with OPEN[path.suffix if path.suffix in OPEN else ""](path) as file:
            while True:
                block, waiting = file.read(BLOCK), len(decoder.getstate()[0])
                try:
                    text = decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    line += error.object[: error.start].count(b"\n")
                    place = f"byte {count - waiting + error.start:,}, line {line:,}"
                    raise UnusableRow(f"not UTF-8 ({error.reason} at {place})") from None
                if not block:
                    return
                yield text if count else text.removeprefix("\ufeff")
                count, line = count + len(block), line + text.count("\n")
    except UNREADABLE as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: cannot be read after byte {count:,}: {reason}") from None


def digest_of(parts: Iterable[str]) -> int:
    state = hashlib.blake2b(digest_size=8)
    for part in parts:
        state.update(part.encode())
    return int.from_bytes(state.digest(), "big")


def documents(path: Path, key: str, complaints: Complaints) -> Iterator[Document]:
    """The documents of a file.

    Args:
        key: of a row's text, or the column.

    Raises:
        UserError: the file cannot be read or unpacked; it has no such column.
        UnusableRow: a malformed row, or a .txt file that is not UTF-8, and complaints raise.
    """
    check_content(path, complaints)
    if path.suffix == ".parquet":
        yield from _documents(parquet(path, key), key, complaints)
    elif path.name.endswith(JSONL):
        yield from _documents(read(path, complaints), key, complaints)
    elif path.stat().st_size:
        try:
            yield Document(str(path), digest_of(text_of(path)), path=path)
        except UnusableRow as error:
            complaints.add(str(path), *error.args)


def _documents(
    rows: Iterable[tuple[str, Row]], key: str, complaints: Complaints
) -> Iterator[Document]:
    for place, row in rows:
        if reason := _fault(row, key):
            complaints.add(place, reason)
        else:
            yield Document(place, digest_of([row[key]]), row[key])


def _fault(row: Row, key: str) -> str:
    """What is wrong with a row, or ''."""
    if key not in row:
        there = f"{nearest(key, row)}; there are: {', '.join(row):.200}" if row else ""
        return f"{key}: missing, data.text_key names the text{there}"
    if not isinstance(row[key], str):
        return f"{key}: {row[key]!r:.40} given, text is needed"
    return "" if is_unicode(row[key]) else f"{key}: not Unicode text (half of a surrogate pair)"


@dataclass
class Texts:
    """The documents of a split.

    Where the files don't tell the splits, documents with a small digest are for validation: about
    `val_share` of all, whatever their order, and equal ones alike. There is always one for either
    split. If there is only one document, its end is for validation.

    Args:
        root: see `files`; or the name of a dataset of the hub, as owner/name.
        split: train | validation.
        key: of a row's text.
        val_share: 0: nothing is for validation.
    """

    root: str
    split: str
    key: str = "text"
    val_share: float = 0.1

    def __post_init__(self) -> None:
        self.paths: list[Path] = []
        self.hub: Mapping[str, Any] | None = None
        is_name = HUB.fullmatch(self.root) and not self.root.endswith(ENDINGS)
        if is_name and not Path(self.root).exists():
            self.hub = _hub(self.root)
            self.mixed = not self.hub.keys() >= {*SPLITS}
        else:
            # of now: a file that vanishes later is missed
            self.paths, self.mixed = files(self.root, self.split)

    def documents(self, complaints: Complaints) -> Iterator[Document]:
        """Those of the other split too, if the files are mixed."""
        if self.hub is not None:
            yield from _documents(self._hub_rows(), self.key, complaints)
        for path in self.paths:
            yield from documents(path, self.key, complaints)

    def _hub_rows(self) -> Iterator[tuple[str, Row]]:
        assert self.hub is not None
        name = next(iter(self.hub)) if self.mixed and "train" not in self.hub else "train"
        name = name if self.mixed else self.split
        with hub_errors(f"data.root: {name} rows of {self.root} cannot be read"):
            for number, row in enumerate(self.hub[name], 1):
                yield f"{self.root}/{name}:{number}", dict(row)

    @cached_property
    def bound(self) -> int | None:
        """Documents with a smaller digest are for validation; None: all have the same digest.

        Reads until both splits have a document.
        """
        bound = int(self.val_share * 2**64)
        least, most = 2**64, -1
        for document in self.documents(Complaints("skip")) if bound else ():
            least, most = min(least, document.digest), max(most, document.digest)
            if least < bound <= most:
                break
        if least == most:
            return None
        return min(max(bound, least + 1), most) if least < most else bound

    def rows(self, complaints: Complaints, size: int) -> Iterator[tuple[str, Row]]:
        """(place, {"text", "begins", "ends", "last"}) of each piece of the documents.

        begins, ends: whether it is the begin, or the end, of its document. last: whether the next
        piece is another document's.

        Args:
            size: characters of a piece, up to twice as many.
        """
        bound = self.bound if self.mixed else None
        for document in self.documents(complaints):
            texts, begins, ends = document.parts(), True, True
            if self.mixed and bound is None:
                count = sum(map(len, document.parts()))
                cut = round(count * (1 - self.val_share))
                begins, ends = self.split == "train", self.split != "train"
                texts = _span(texts, 0 if begins else cut, cut if begins else count)
            elif bound is not None and (document.digest < bound) != (self.split == "validation"):
                continue
            for text, last in marked(pieces(texts, size)):
                row = {"text": text, "begins": begins, "ends": ends and last, "last": last}
                yield document.place, row
                begins = False


def _span(parts: Iterable[str], start: int, end: int) -> Iterator[str]:
    """The characters from start to end of a text."""
    place = 0
    for part in parts:
        yield part[max(0, start - place) : max(0, end - place)]
        place += len(part)


def _hub(root: str) -> Mapping[str, Any]:
    """The splits of a dataset of the hub, streamed."""
    import datasets
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()
    with hub_errors(f"data.root: {root} is no file or folder, and no dataset of the hub"):
        return dict(datasets.load_dataset(root, streaming=True))
