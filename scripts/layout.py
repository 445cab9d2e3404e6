"""Whether the tree keeps its layout: `python -m scripts.layout` prints each measure and its bound.

It exits with 1 if a bound is broken. Imports are read with `ast`; those inside functions and under
TYPE_CHECKING count like all others. The table "Walls" of docs/architecture.md says what a package
may import.
"""

import ast
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("comet_pl", "data", "callbacks", "benchmarks", "scripts", "tests")
SOURCES = ("comet_pl", "data", "callbacks")

Graph = dict[str, set[str]]
"""The files that each file imports; paths from the root."""


def python_files(root: Path = ROOT) -> list[Path]:
    """All Python files of the project: the packages, train.py and eval.py."""
    return [
        *sorted(root.glob("*.py")),
        *sorted(f for p in PACKAGES for f in (root / p).rglob("*.py")),
    ]


def imported(tree: ast.AST) -> Iterator[tuple[str, str | None]]:
    """(module, name or None) of each absolute import statement."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ((node.module, alias.name) for alias in node.names)


def import_graph(root: Path = ROOT) -> Graph:
    """Which file of the project imports which, without the packages that an import runs through."""
    files = {str(path.relative_to(root)): path for path in python_files(root)}

    def file_of(module: str) -> str | None:
        path = module.replace(".", "/")
        return next((f for f in (f"{path}.py", f"{path}/__init__.py") if f in files), None)

    graph: Graph = {}
    for name, path in files.items():
        targets = set()
        for module, attribute in imported(ast.parse(path.read_text("utf-8"))):
            inner = file_of(f"{module}.{attribute}") if attribute else None
            targets.add(inner or file_of(module))
        graph[name] = {target for target in targets if target is not None}
    return graph


def circles(graph: Graph) -> list[list[str]]:
    """Sets of two and more files that import each other, or one that imports itself."""
    reach = {node: _reachable(graph, node) for node in graph}
    found = {
        tuple(sorted({node} | {other for other in reach[node] if node in reach[other]}))
        for node in graph
        if node in reach[node]
    }
    return sorted(map(list, found))


def _reachable(graph: Graph, start: str) -> set[str]:
    seen: set[str] = set()
    todo = list(graph[start])
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += graph.get(node, ())
    return seen


def walls(page: str) -> dict[str, list[str]]:
    """What each package or file may import, from the table of docs/architecture.md."""
    section = page.split("## Walls", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\|\s*(`[^|]*?)\s*\|([^|]*)\|", section, re.MULTILINE)
    quoted = re.compile(r"`([\w/.]+?)/?`")
    return {
        name: quoted.findall(allowed) for names, allowed in rows for name in quoted.findall(names)
    }


def breaches(graph: Graph, table: dict[str, list[str]]) -> list[str]:
    """Imports that no row of the table allows, as "file -> file"; a file's longest row decides."""

    def inside(file: str, place: str) -> bool:
        return file == place or file == f"{place}.py" or file.startswith(f"{place}/")

    broken = []
    for file, targets in graph.items():
        if file.startswith("tests/"):
            continue
        row = max((name for name in table if inside(file, name)), key=len, default=None)
        for target in sorted(targets):
            allowed = row is not None and any(inside(target, p) for p in [row, *table[row]])
            if not allowed:
                broken.append(f"{file} -> {target}")
    return broken


def long_lines(root: Path = ROOT) -> list[str]:
    """Lines of over 100 columns, as file:line."""
    return [
        f"{path.relative_to(root)}:{number}"
        for path in python_files(root)
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1)
        if len(line) > 100
    ]


def measures(root: Path = ROOT) -> list[tuple[str, int | float, int, list[str]]]:
    """(what, measured, bound, the offenders) of each rule."""
    graph = import_graph(root)
    ours = {f: targets for f, targets in graph.items() if f.startswith(SOURCES)}
    table = walls((root / "docs" / "architecture.md").read_text("utf-8"))
    lengths = {
        str(path.relative_to(root)): len(path.read_text("utf-8").splitlines())
        for path in python_files(root)
    }
    sources = [
        n for f, n in lengths.items() if f.startswith(SOURCES) and not f.endswith("__init__.py")
    ]
    long_files = [f"{f}: {n}" for f, n in lengths.items() if n > 400]
    at_root = [f for f in lengths if re.fullmatch(r"comet_pl/\w+\.py", f)]
    rings, broken, wide = circles(ours), breaches(graph, table), long_lines(root)
    return [
        ("import circles", len(rings), 0, [" <-> ".join(ring) for ring in rings]),
        ("imports through a wall", len(broken), 0, broken),
        ("files at comet_pl's root", len(at_root), 10, at_root),
        ("files over 400 lines", len(long_files), 0, long_files),
        ("median lines of a file", statistics.median(sources), 150, []),
        ("lines over 100 columns", len(wide), 0, wide),
    ]


def main() -> None:
    """Prints the measures; under each that is over its bound, what makes it so."""
    broken = False
    for what, value, bound, offenders in measures():
        over = value > bound
        broken |= over
        print(f"{'OVER' if over else 'ok  '}  {what:<26}{value:>6}  (at most {bound})")
        for offender in offenders if over else ():
            print(f"        {offender}")
    sys.exit(broken)


if __name__ == "__main__":
    main()
