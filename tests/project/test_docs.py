"""What the documentation names exists."""

import ast
import re
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest
import torch

from comet_pl.config.schema import DATA_KINDS, Config
from comet_pl.experiment.checkpoint import KEYS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md")])
# `path/file.py::name`, name a function, a class or Class.method; or `path/file.py`.
NAMED = r"`([\w/]+\.py)(?:::([\w.]+))?`"
ARCHITECTURE = (DOCS / "architecture.md").read_text("utf-8")
NAMES = {
    pair
    for page in ("equations.md", "architecture.md")
    for pair in re.findall(NAMED, (DOCS / page).read_text("utf-8"))
}
PATHS = ("a batch", "a document", "a token in generate", "a checkpoint")


def defined(path: Path) -> set[str]:
    """Functions, classes, constants and Class.method of a file."""
    names = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.ClassDef):
            methods = [inner for inner in node.body if isinstance(inner, ast.FunctionDef)]
            names |= {f"{node.name}.{method.name}" for method in methods}
    return names


def section(page: str, title: str) -> str:
    """The text under a heading."""
    return page.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_files_and_keys_that_exist(page: Path):
    """Paths in backquotes and link targets exist; dotted key=value belongs to the schema."""
    text = page.read_text("utf-8")
    linked = [target.split("#")[0] for target in re.findall(r"\]\((?!https?:)([^)]*)\)", text)]
    assert [target for target in linked if target and not (page.parent / target).exists()] == []
    folders = "comet_pl|data|callbacks|tests|conf|docs|benchmarks|notebooks|scripts"
    paths = re.findall(rf"`((?:{folders})/[\w./]+\.\w+)`", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []
    sections = "model|backbone|data|train|eval|checkpoint|trainer|strategy|run"
    keys = re.findall(rf"(?<![\w./])({sections})\.(\w+)=", text)
    assert [f"{part}.{name}" for part, name in keys if name not in known(part)] == []
    modules = re.findall(r"python -m ((?:comet_pl|benchmarks|scripts)[\w.]*)", text)
    files = [ROOT / module.replace(".", "/") for module in modules]
    assert [str(f) for f in files if not (f.with_suffix(".py").exists() or f.is_dir())] == []


def known(part: str) -> set[str]:
    """The keys of a section of the configuration."""
    classes = [*DATA_KINDS.values()] if part == "data" else [get_type_hints(Config)[part]]
    return {field.name for one in classes for field in fields(one)}


@pytest.mark.parametrize(("file", "name"), sorted(NAMES))
def test_equations_and_architecture_name_what_exists(file: str, name: str):
    assert (ROOT / file).is_file()
    assert not name or name in defined(ROOT / file), f"{file} has no {name}"


@pytest.mark.parametrize("what", PATHS)
def test_each_path_is_a_numbered_list_of_functions(what: str):
    text = section(ARCHITECTURE, f"The path of {what}")
    items = re.findall(r"^\d\. .*?(?=^\d\. |\n\n|\Z)", text, re.MULTILINE | re.DOTALL)
    assert 4 <= len(items) <= 6
    assert all(re.search(NAMED, item) for item in items)


def test_every_key_of_a_checkpoint_has_its_owner(trained: Path):
    text = section(ARCHITECTURE, "The path of a checkpoint")
    table = re.findall(r"^\| `([\w-]+)` \| (\S+)", text, re.M)
    assert {key: owner.strip("`") for key, owner in table} == {k: o for k, (o, _) in KEYS.items()}
    file = trained / "checkpoints" / "last.ckpt"
    assert set(torch.load(file, weights_only=True)) == set(KEYS) - {"MixedPrecision"}
    for key, (owner, _) in KEYS.items():
        assert owner == "lightning" or f'checkpoint["{key}"]' in (ROOT / owner).read_text("utf-8")


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.split()) <= 1500
    for row in section(text, "Results").splitlines():
        cells = row.strip("|").split("|")[:2] if row.startswith("| ") else []
        assert all(len(cell.split()) <= 8 for cell in cells), row
    listed = re.findall(r"\]\((\S+?\.md)\)", (DOCS / "README.md").read_text("utf-8"))
    assert {page.name for page in DOCS.glob("*.md")} - {"README.md"} <= {*listed}
