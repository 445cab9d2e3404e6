"""What the documentation names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAMES = re.findall(r"`([\w/]+\.py)(?:::([\w.]+))?`", (ROOT / "docs" / "equations.md").read_text("utf-8"))


def defined(path: Path) -> set[str]:
    """Functions, classes and Class.method of a file."""
    found = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
            found |= {
                f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef) and isinstance(node, ast.ClassDef)
            }
    return found


def test_many_names_were_found():
    assert len(NAMES) > 40


@pytest.mark.parametrize(("file", "name"), sorted(set(NAMES)))
def test_the_map_of_equations_names_what_exists(file: str, name: str):
    assert (ROOT / file).is_file()
    assert not name or name in defined(ROOT / file), f"{file} has no {name}"
