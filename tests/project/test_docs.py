"""What the documentation names exists."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest

from comet_pl.config.schema import DATA_KINDS, Config

ROOT = Path(__file__).resolve().parents[2]
NAMES = re.findall(
    r"`([\w/]+\.py)(?:::([\w.]+))?`", (ROOT / "docs" / "equations.md").read_text("utf-8")
)


def defined(path: Path) -> set[str]:
    """Functions, classes and Class.method of a file."""
    found = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
            found |= {
                f"{node.name}.{inner.name}"
                for inner in node.body
                if isinstance(inner, ast.FunctionDef) and isinstance(node, ast.ClassDef)
            }
    return found


PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_files_and_keys_that_exist(page: Path):
    """Paths in backquotes and link targets exist; each dotted key=value belongs to a key of the schema."""
    text = page.read_text("utf-8")
    linked = [target.split("#")[0] for target in re.findall(r"\]\((?!https?:)([^)]*)\)", text)]
    assert [target for target in linked if target and not (page.parent / target).exists()] == []
    paths = re.findall(
        r"`((?:comet_pl|data|callbacks|tests|conf|docs|benchmarks|notebooks)/[\w./]+\.\w+)`", text
    )
    assert [path for path in paths if not (ROOT / path).exists()] == []
    sections = "model|backbone|data|train|eval|checkpoint|trainer|strategy|run"
    keys = re.findall(rf"(?<![\w./])({sections})\.(\w+)=", text)
    assert [f"{section}.{name}" for section, name in keys if name not in known(section)] == []


def known(section: str) -> set[str]:
    classes = [*DATA_KINDS.values()] if section == "data" else [get_type_hints(Config)[section]]
    return {field.name for one in classes for field in fields(one)}


def test_many_names_were_found():
    assert len(NAMES) > 40


@pytest.mark.parametrize(("file", "name"), sorted(set(NAMES)))
def test_the_map_of_equations_names_what_exists(file: str, name: str):
    assert (ROOT / file).is_file()
    assert not name or name in defined(ROOT / file), f"{file} has no {name}"
