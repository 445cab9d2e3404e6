"""What `--help` prints."""

import dataclasses
import io
import shutil
import sys
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from rich.console import Console
from rich.table import Table

from comet_pl.config.load import CONF_DIR, EVAL_KEYS, load
from comet_pl.config.rules import describe
from comet_pl.config.schema import DATA_KINDS
from comet_pl.config.sources import conf_names

USAGE = {
    "train": "train.py [conf=NAME] [key=value ...]",
    "eval": "eval.py ckpt=PATH|FOLDER [out=DIR] [conf=NAME] [key=value ...]",
}


def help_asked(argv: list[str], command: str = "train") -> None:
    """Prints the help and exits if the arguments ask for it."""
    if {"-h", "--help"} & set(argv):
        print(help_text(command))
        sys.exit(0)


def help_text(command: str = "train", conf_dir: Path = CONF_DIR) -> str:
    """The confs with the first comment of each, and every key with default, type and meaning.

    It is as wide as the terminal, from 100 to 160 columns.
    """
    columns = max(100, shutil.get_terminal_size((140, 24)).columns)
    page = io.StringIO()
    plain: dict[str, Any] = {"highlight": False, "emoji": False, "markup": False}
    console = Console(file=page, width=min(columns, 160), color_system=None, **plain)
    console.print(f"usage: python {USAGE[command]}\n")
    for section, option in (("", "conf"), ("backbone", "backbone")):
        table = _table(f"{option}=NAME", "")
        for name in conf_names(conf_dir, section):
            table.add_row(f"{option}={name}", _first_comment(conf_dir / section / f"{name}.yaml"))
        console.print(table, "")
    default = load([], conf_dir=conf_dir)
    console.print(
        f"Keys, with their values in conf={default.conf}; those of other kinds of data with their "
        "own defaults:\n"
    )
    table = _table("key", "default", "allowed", "meaning")
    for name, meaning in EVAL_KEYS.items() if command == "eval" else ():
        table.add_row(name, "", "text", meaning)
    _rows(table, default, "")
    for entry in dataclasses.fields(default):
        values = getattr(default, entry.name)
        if not dataclasses.is_dataclass(values):
            continue
        kinds = DATA_KINDS if entry.name == "data" else {None: type(values)}
        for kind, schema in kinds.items():
            table.add_row("")
            own = values if kind in (None, getattr(values, "kind", None)) else schema()
            _rows(table, own, f"{entry.name}.")
    console.print(table)
    return "\n".join(line.rstrip() for line in page.getvalue().rstrip().splitlines())


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, show_header=len(columns) > 2)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column == "key")
    return table


def _rows(table: Table, values: Any, prefix: str) -> None:
    hints = get_type_hints(type(values))
    for one in dataclasses.fields(values):
        value, name, rules = getattr(values, one.name), prefix + one.name, dict(one.metadata)
        if dataclasses.is_dataclass(value):
            continue
        if name == "data.kind":
            rules["choices"] = tuple(DATA_KINDS)
        table.add_row(name, _yaml(value), describe(hints[one.name], rules), rules["help"])


def _yaml(value: Any) -> str:
    """The value as one writes it on the command line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000)
    return text.removesuffix("...\n").strip()


def _first_comment(file: Path) -> str:
    lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    return next((line.lstrip("# ") for line in lines if line.startswith("#")), "")
