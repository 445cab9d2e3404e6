"""The page names the results, and each section says all that its benchmark measured."""

import json
import subprocess
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks import performance
from benchmarks.shared.options import RESULTS, ROOT, SIZES
from comet_pl.errors import UserError


def test_the_page_of_the_committed_results():
    """Every result that has a section is on the page, with its command, and every link is there."""
    text = performance.page(RESULTS)
    for name, *_ in SIZES["page"]:
        file = RESULTS / f"{name}.json"
        if file.exists():
            command = json.loads(file.read_text())["command"]
            assert command in text and command.startswith("python -m benchmarks.")
    links = [part.split(")")[0] for part in text.split("](")[1:]]
    assert "../benchmarks/results/prefill.png" in links
    assert all((ROOT / "docs" / link).exists() for link in links)
    assert "## Reading a million tokens" in (ROOT / "docs" / "performance.md").read_text()


def program(module):
    """What `python -m module` runs: a package's __main__."""
    package = Path(ROOT, *module.split(".")).is_dir()
    return import_module(f"{module}.__main__" if package else module)


def test_without_results_nothing_is_measured(tmp_path):
    """Every section names a program that exists."""
    commands = performance.page(tmp_path).split("Not measured: `")[1:]
    assert len(commands) == len(SIZES["page"])
    for command in commands:
        python, option, module, *_ = command.split("`")[0].split()
        assert (python, option) == ("python", "-m") and program(module).main


@pytest.mark.parametrize("content", ["{", "[]", '{"command": "x"}'])
def test_a_broken_file_is_named_in_one_line(tmp_path, content):
    (tmp_path / "startup.json").write_text(content)
    named = r"startup\.json: not a result of `python -m benchmarks\.loading\.startup`"
    with pytest.raises(UserError, match=named) as caught:
        performance.page(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_program_writes_the_page(tmp_path):
    page = tmp_path / "new" / "page.md"
    performance.main(["--results", str(tmp_path), "--out", str(page)])
    text = page.read_text()
    assert text.startswith("# Performance\n") and text.endswith(performance.page(tmp_path))
    with pytest.raises(UserError, match=r"--results: .*/nowhere is no folder$"):
        performance.main(["--results", str(tmp_path / "nowhere"), "--out", str(page)])
    assert page.read_text() == text


@pytest.mark.parametrize("target", ["bench", "bench-full"])
def test_the_make_targets_measure_everything(target):
    make = ["make", "--no-print-directory", "-n", target]
    lines = subprocess.run(make, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for module in {command.split()[0] for _, _, command in SIZES["page"]}:
        (line,) = (line for line in lines.splitlines() if f"-m benchmarks.{module}" in line)
        assert Path(program(f"benchmarks.{module}").__file__).is_relative_to(ROOT / "benchmarks")
        small = any(flag in line for flag in ("--small", "--tiny", "--name small", "--rounds 1 "))
        assert small or target == "bench-full"
    assert (lines.splitlines()[-1].endswith("-m benchmarks.performance")) == (
        target == "bench-full"
    )
