"""What --help prints, and how a mistake ends a command."""

import dataclasses
import subprocess
import sys
from typing import get_type_hints

import pytest

from comet_pl.config.help import help_asked, help_text
from comet_pl.config.load import CONF_DIR, load
from comet_pl.config.schema import DATA_KINDS, Config
from comet_pl.config.sources import conf_names
from comet_pl.errors import UserError, run_cli

ROOT = CONF_DIR.parent

# -- help and errors at the command line -----------------------------------------------------------


@pytest.mark.parametrize("command", ["train", "eval"])
def test_help_lists_every_conf_and_every_key_with_default_and_meaning(command: str, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    text = help_text(command)
    flat = " ".join(text.split())
    for name in conf_names(CONF_DIR):
        comment = (
            (CONF_DIR / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        )
        assert f"conf={name} {comment}" in flat
    keys = [line for line in text.splitlines() if line and not line.startswith(" ")]
    lines = {line.split()[0]: line for line in reversed(keys)}
    starts = [number for number, line in enumerate(keys) if line.split()[0] == "data.kind"]
    parts = [
        {line.split()[0]: line for line in keys[start:end]}
        for start, end in zip(starts, [*starts[1:], None], strict=True)
    ]
    hints = get_type_hints(Config)
    for one in dataclasses.fields(Config):
        schemas = [*DATA_KINDS.values()] if one.name == "data" else [hints[one.name]]
        for schema, part in zip(schemas, parts if one.name == "data" else [lines], strict=True):
            for leaf in dataclasses.fields(schema) if dataclasses.is_dataclass(schema) else ():
                assert leaf.metadata["help"].split()[0] in part[f"{one.name}.{leaf.name}"]
    assert " 1024 " in lines["data.train_length"]
    assert " scalar, elementwise, none " in lines["model.gate"]
    assert {"conf", "resume", "seed"} <= set(lines) and ({"ckpt", "out"} <= set(lines)) == (
        command == "eval"
    )


@pytest.mark.parametrize("columns", [20, 100, 500])
def test_help_fits_the_terminal(columns: int, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    widest = max(len(line) for line in help_text().splitlines())
    assert widest <= min(max(columns, 100), 160)


def test_help_shows_the_values_of_the_default_conf(conf):
    folder = conf(passkey="# My job.\ntrain: {lr: 0.125}")
    assert "conf=passkey  My job." in help_text(conf_dir=folder)
    assert any(
        line.startswith("train.lr ") and " 0.125 " in line
        for line in help_text(conf_dir=folder).splitlines()
    )


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_load_prints_help_and_exits_with_success(flag: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        help_asked(["conf=nonsense", flag])
    assert caught.value.code == 0 and "train.memory_lr_factor" in capsys.readouterr().out


def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "train.lrr=1"])
    with pytest.raises(SystemExit) as caught:
        run_cli(lambda argv: print(load(argv)))
    output = capsys.readouterr()
    assert caught.value.code == 2 and output.out == ""
    assert output.err == "error: train.lrr: no such key (did you mean train.lr?)\n"


def test_an_error_of_several_lines_is_printed_as_one(capsys):
    def main(argv: list[str]) -> None:
        raise UserError("first\n  second")

    with pytest.raises(SystemExit) as caught:
        run_cli(main)
    assert caught.value.code == 2 and capsys.readouterr().err == "error: first second\n"


def test_the_configuration_needs_neither_torch_nor_lightning():
    """Loaded without comet_pl/__init__.py (which offers the model), help and errors come without
    the heavy imports."""
    code = (
        "import sys, types; package = types.ModuleType('comet_pl'); package.__path__ = "
        "['comet_pl']; sys.modules['comet_pl'] = package\n"
        "from comet_pl.config.help import help_text\nfrom comet_pl.config.load import load\n"
        "load(['conf=scrolls']); help_text()\n"
        "print(sorted({'torch', 'lightning', 'transformers', 'datasets', 'matplotlib'} & "
        "set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.stdout.strip() == "[]", result.stderr
