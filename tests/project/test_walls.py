"""The layout holds: no import circle, the walls of docs/architecture.md, lengths, types, paths."""

import re
import tomllib
from pathlib import Path

import pytest

from scripts.layout import (
    ROOT,
    SOURCES,
    breaches,
    circles,
    import_graph,
    long_lines,
    measures,
    python_files,
    walls,
)

TREE = {path: path.read_text("utf-8") for path in python_files()}


@pytest.mark.parametrize(
    ("what", "value", "bound", "offenders"), measures(), ids=lambda x: str(x)[:24]
)
def test_the_tree_keeps_its_layout(what: str, value: float, bound: int, offenders: list[str]):
    assert value <= bound, f"{what}: {offenders or value}"


def test_every_package_has_a_row_in_the_table_of_walls():
    table = walls((ROOT / "docs" / "architecture.md").read_text("utf-8"))
    for path in TREE:
        name = str(path.relative_to(ROOT))
        if name.startswith(SOURCES) and not name.endswith("__init__.py"):
            rows = (name in (row, f"{row}.py") or name.startswith(f"{row}/") for row in table)
            assert any(rows), name


TOY_WALLS = """## Walls

| package | may import |
|---|---|
| `comet_pl/model` | nothing |
| `data` | `comet_pl/model` |
| `callbacks`, `train.py` | `data`, `callbacks` |

## Next

| `data` | `tests` |
"""


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A tree with a circle of three, one edge of it in a function, another under TYPE_CHECKING."""
    files = {
        "comet_pl/model/a.py": "from comet_pl.model import b\n",
        "comet_pl/model/b.py": "def f():\n    import data.c\n",
        "data/c.py": "if TYPE_CHECKING:\n    from comet_pl.model.a import x\n" + "#" * 101 + "\n",
        "callbacks/d.py": "from data.c import y\n",
        "train.py": "import callbacks.d\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_circles_breaches_and_long_lines_are_found(toy: Path):
    graph = import_graph(toy)
    ring = ["comet_pl/model/a.py", "comet_pl/model/b.py", "data/c.py"]
    assert circles(graph) == [ring]
    assert breaches(graph, walls(TOY_WALLS)) == ["comet_pl/model/b.py -> data/c.py"]
    assert long_lines(toy) == ["data/c.py:3"]


def test_no_file_edits_the_module_search_path():
    edits = re.compile(r"sys\.path(?:\.\w+\(|\[.*\] *=| *[+]?=)")
    assert [str(p.relative_to(ROOT)) for p, text in TREE.items() if edits.search(text)] == []


def test_types_are_ignored_only_where_they_are_checked():
    outside = [p for p in TREE if not str(p.relative_to(ROOT)).startswith(SOURCES)]
    ignored = re.compile(r"#\s*type:\s*ignore")
    assert [str(p.relative_to(ROOT)) for p in outside if ignored.search(TREE[p])] == []
    mypy = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    assert mypy["warn_unused_ignores"] is True
    assert f"\nTYPED := {' '.join(SOURCES)}\n" in (ROOT / "Makefile").read_text()
