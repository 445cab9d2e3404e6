"""The project's own files agree with each other: dependencies, pins, packages, make targets."""

import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]


def pins() -> dict[str, Requirement]:
    lines = [line.strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(one.name): one for one in requirements}


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {k: value for k, value in os.environ.items() if not k.startswith(("MAKE", "GIT_"))}
    options = {"cwd": cwd, "env": env, "timeout": 60}
    return subprocess.run(command, capture_output=True, text=True, **options)


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
    names = (item for item in environment["dependencies"] if isinstance(item, str))
    python = next(Requirement(item) for item in names if item.startswith("python"))
    assert "3.11" in python.specifier and "3.10" not in python.specifier
    assert environment["name"] == PROJECT["name"]


def test_every_dependency_is_pinned_inside_its_range():
    pinned = pins()
    for line in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]:
        wanted = Requirement(line)
        name = canonicalize_name(wanted.name)
        assert name in pinned, f"{name} is not in constraints.txt"
        version = next(iter(pinned[name].specifier)).version
        assert Version(version) in wanted.specifier, f"{version} lies outside {wanted}"


def test_constraints_are_exact_public_versions():
    for name, pin in pins().items():
        assert [one.operator for one in pin.specifier] == ["=="], name
        # A local build cannot be installed elsewhere.
        assert Version(next(iter(pin.specifier)).version).local is None, name


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
    hidden = ["runs/passkey/x/config.yaml", "comet_pl/__pycache__/a.pyc", ".venv/bin/python"]
    paths = ["data/passkey.py", "conf/base.yaml", *hidden]
    assert run("git", "check-ignore", *paths, cwd=tmp_path).stdout.split() == hidden


def test_make_names_an_old_python_in_one_line(make_folder: Path):
    old = make_folder / "python-old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    for python in (str(old), "no-such-python"):
        result = run("make", "setup", f"PYTHON={python}", cwd=make_folder)
        assert result.returncode != 0
        first, *rest = result.stderr.strip().splitlines()
        assert first.startswith(f"error: PYTHON={python} is not Python 3.11 or newer")
        assert all(line.startswith("make") for line in rest)
        assert not (make_folder / ".venv").exists()


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
    "target",
    ["train", "test", "test-full", "lint", "bench", "bench-full", "smollm2", "gpu-bundle"],
)
def test_every_make_target_sets_up_first(make_folder: Path, target: str):
    commands, setup = (run("make", "-n", one, cwd=make_folder).stdout for one in (target, "setup"))
    assert "pip install" in commands
    assert len(commands.splitlines()) > len(setup.splitlines())


def test_ci_runs_the_make_targets_and_is_executable():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make lint" in script.read_text() and "make test" in script.read_text()
    assert run("bash", "-n", str(script), cwd=ROOT).returncode == 0
