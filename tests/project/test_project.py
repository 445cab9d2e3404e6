"""The project's own files agree with each other: dependencies, pins, packages, make targets."""

import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]


def canonical(name: str) -> str:
    return name.lower().replace("_", "-")


def pins() -> dict[str, Requirement]:
    lines = [line.strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonical(one.name): one for one in requirements}


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "GIT_"))
    }
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=60, env=environment
    )


@pytest.fixture
def make_folder(tmp_path: Path) -> Path:
    """A folder with just what `make setup` looks at."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_conda_lists_the_same_packages_as_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip_lists = [item["pip"] for item in environment["dependencies"] if isinstance(item, dict)]
    assert pip_lists == [PROJECT["dependencies"]]
    python = next(
        Requirement(item)
        for item in environment["dependencies"]
        if isinstance(item, str) and item.startswith("python")
    )
    assert "3.11" in python.specifier and "3.10" not in python.specifier
    assert environment["name"] == PROJECT["name"]


def test_every_dependency_is_pinned_inside_its_range():
    pinned = pins()
    for line in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]:
        wanted = Requirement(line)
        assert canonical(wanted.name) in pinned, f"{wanted.name} is not in constraints.txt"
        version = next(iter(pinned[canonical(wanted.name)].specifier)).version
        assert Version(version) in wanted.specifier, (
            f"{wanted.name}=={version} lies outside {wanted.specifier}"
        )


def test_constraints_are_exact_public_versions():
    for name, pin in pins().items():
        assert [one.operator for one in pin.specifier] == ["=="], name
        assert Version(next(iter(pin.specifier)).version).local is None, (
            f"{name}: a local build cannot be installed elsewhere"
        )


def test_packages_are_the_folders_that_hold_code():
    listed = set(PYPROJECT["tool"]["setuptools"]["packages"])
    folders = {
        path.parent
        for top in ("comet_pl", "data", "callbacks", "benchmarks")
        for path in (ROOT / top).rglob("*.py")
    }
    assert listed == {".".join(folder.relative_to(ROOT).parts) for folder in folders}


def test_gitignore_hides_runs_but_not_the_package_data(tmp_path: Path):
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    run("git", "init", "-q", cwd=tmp_path)
    shutil.copy(ROOT / ".gitignore", tmp_path)
    paths = [
        "data/passkey.py",
        "runs/passkey/x/config.yaml",
        "comet_pl/__pycache__/a.pyc",
        "conf/base.yaml",
        ".venv/bin/python",
    ]
    ignored = run("git", "check-ignore", *paths, cwd=tmp_path).stdout.split()
    assert ignored == [
        "runs/passkey/x/config.yaml",
        "comet_pl/__pycache__/a.pyc",
        ".venv/bin/python",
    ]


def test_make_names_an_old_python_in_one_line(make_folder: Path):
    old = make_folder / "python-old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    for python in (str(old), "no-such-python"):
        result = run("make", "setup", f"PYTHON={python}", cwd=make_folder)
        assert result.returncode != 0
        first, *rest = result.stderr.strip().splitlines()
        assert first.startswith(f"error: PYTHON={python} is not Python 3.11 or newer")
        assert (
            all(line.startswith("make") for line in rest) and not (make_folder / ".venv").exists()
        )


def test_make_setup_installs_once_and_again_when_the_pins_change(make_folder: Path):
    stamp = make_folder / ".venv" / ".installed"
    stamp.parent.mkdir()
    stamp.touch()
    os.utime(make_folder / "constraints.txt", (1, 1))
    os.utime(make_folder / "pyproject.toml", (1, 1))
    assert run("make", "-n", "setup", cwd=make_folder).stdout.count("pip install") == 0
    os.utime(stamp, (0, 0))
    again = run("make", "-n", "setup", cwd=make_folder).stdout
    assert again.count("pip install") == 1 and "--constraint constraints.txt" in again


@pytest.mark.parametrize(
    "target", ["train", "test", "test-full", "lint", "bench", "bench-full", "smollm2"]
)
def test_every_make_target_sets_up_first(make_folder: Path, target: str):
    commands = run("make", "-n", target, cwd=make_folder).stdout
    assert "pip install" in commands and len(commands.splitlines()) > len(
        run("make", "-n", "setup", cwd=make_folder).stdout.splitlines()
    )


def test_ci_runs_the_make_targets_and_is_executable():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make lint" in script.read_text() and "make test" in script.read_text()
    assert run("bash", "-n", str(script), cwd=ROOT).returncode == 0
