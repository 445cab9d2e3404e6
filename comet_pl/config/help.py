"""What `--help` prints."""

from __future__ import annotations

import dataclasses
import io
import shutil
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from rich.console import Console
from rich.table import Table

from comet_pl.config.load import DATA_KINDS, EVAL_KEYS, conf_names, load
from comet_pl.config.rules import describe


def render(command: str, conf_dir: Path) -> str:
    """The confs with the first comment line of each, and every key with default, type and meaning; as wide as the terminal, 100 to 160."""
    columns = max(100, shutil.get_terminal_size((140, 24)).columns)
    page = io.StringIO()
    console = Console(
        file=page,
        width=min(columns, 160),
        color_system=None,
        highlight=False,
        emoji=False,
        markup=False,
    )
    usage = (
        "train.py [conf=NAME] [key=value ...]"
        if command == "train"
        else "eval.py ckpt=PATH|FOLDER [out=DIR] [conf=NAME] [key=value ...]"
    )
    console.print(f"usage: python {usage}\n")
    for section, option in (("", "conf"), ("backbone", "backbone")):
        table = _table(f"{option}=NAME", "")
        for name in conf_names(conf_dir, section):
            table.add_row(f"{option}={name}", _first_comment(conf_dir / section / f"{name}.yaml"))
        console.print(table, "")
    default = load([], conf_dir=conf_dir)
    console.print(
        f"Keys, with their values in conf={default.conf}; those of other kinds of data with their own defaults:\n"
    )
    table = _table("key", "default", "allowed", "meaning")
    for name, meaning in EVAL_KEYS.items() if command == "eval" else ():
        table.add_row(name, "", "text", meaning)
    _rows(table, default, "")
    for entry in dataclasses.fields(default):
        schema = getattr(default, entry.name)
        if entry.name == "data":
            for kind, data in DATA_KINDS.items():
                table.add_row("")
                _rows(table, schema if kind == schema.kind else data(), "data.")
        elif dataclasses.is_dataclass(schema):
            table.add_row("")
            _rows(table, schema, f"{entry.name}.")
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
        value = getattr(values, one.name)
        if dataclasses.is_dataclass(value):
            continue
        rules = (
            {**one.metadata, "choices": tuple(DATA_KINDS)}
            if prefix + one.name == "data.kind"
            else one.metadata
        )
        table.add_row(
            prefix + one.name, _yaml(value), describe(hints[one.name], rules), one.metadata["help"]
        )


def _yaml(value: Any) -> str:
    """The value as one would write it on the command line."""
    return (
        yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
    )


def _first_comment(file: Path) -> str:
    lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    return next((line.lstrip("# ") for line in lines if line.startswith("#")), "")
