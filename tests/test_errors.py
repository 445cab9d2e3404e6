"""What is the user's or the machine's ends in one line; streams that go away, and early Ctrl-C."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from comet_pl.errors import LONGEST, UserError, fault_of, one_line, run_cli

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("train.lr: 0 given"), "train.lr: 0 given"),
        (MemoryError(), "out of memory; docs/how-to.md says how to need less"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "out of memory: CUDA out of memory."),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 byte"), "out of memory: Def"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), "/x/y: No space left on device"),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected"),
            "a file cannot be",
        ),
        (SafetensorError("Error while serializing: I/O error: No space left"), "a file cannot be"),
        (
            RuntimeError("[x/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:9"),
            "another process of this training has ended or cannot be reached: [x/gloo/",
        ),
        (RuntimeError("shapes differ"), None),
        (ValueError("the program's own"), None),
    ],
)
def test_whose_error_it_is(error, line):
    found = fault_of(error)
    assert found is None if line is None else found.startswith(line)


def test_a_line_is_printable_and_short():
    assert one_line("a\n b\x1b[31mred\x07") == "a b\\x1b[31mred\\x07"
    assert one_line("ä 漢") == "ä 漢"
    long = one_line("x" * 20_000 + "end")
    assert len(long) <= LONGEST and long.startswith("xxx") and long.endswith("end")


def run(main, monkeypatch, argv=()):
    monkeypatch.setattr(sys, "argv", ["x", *argv])
    with pytest.raises(SystemExit) as caught:
        run_cli(main)
    return caught.value.code


def test_the_traceback_is_behind_a_variable(monkeypatch, capsys):
    def main(argv):
        try:
            raise KeyError("inner")
        except KeyError:
            raise UserError("outer") from None

    assert run(main, monkeypatch) == 2
    assert capsys.readouterr().err == "error: outer\n"
    monkeypatch.setenv("COMET_DEBUG", "1")
    assert run(main, monkeypatch) == 2
    shown = capsys.readouterr().err
    assert "KeyError: 'inner'" in shown and shown.endswith("error: outer\n")


def test_arguments_are_text(monkeypatch, capsys):
    assert run(print, monkeypatch, ["run.name=\udcff"]) == 2
    assert capsys.readouterr().err == "error: 'run.name=\\udcff': is not text in UTF-8\n"


def test_a_stream_outlives_whoever_closes_it(monkeypatch, capsys):
    def main(argv):
        sys.stderr.close()
        sys.stdout.close()

    monkeypatch.setattr(sys, "argv", ["x"])
    run_cli(main)
    print("still")
    assert not sys.stderr.closed and capsys.readouterr().out == "still\n"


def test_the_programs_own_errors_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(ZeroDivisionError):
        run_cli(lambda argv: print(1 / 0))


OTHER_SHELLS = ["{} >&-", "{} > /dev/full", "{} 2>&1 | true"]
LINES = """
import sys
from comet_pl.errors import run_cli

def main(argv):
    for number in range(20_000):
        print("line", number)
    print("a line", file=sys.stderr)
    open(argv[0], "w").write("done")

run_cli(main)
"""


@pytest.mark.parametrize(
    "shell",
    [
        "{} | head -1",
        "{} <&- >&- 2>&-",
        *(pytest.param(other, marks=pytest.mark.slow) for other in OTHER_SHELLS),
    ],
)
def test_the_work_goes_on_without_its_streams(shell, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(LINES)
    done = tmp_path / "done"
    command = f"{sys.executable} {program} {done}; echo $? > {tmp_path}/code"
    whole = shell.format(f"({command})")
    ended = subprocess.run(
        ["bash", "-c", whole],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=60,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.read_text() == "done" and (tmp_path / "code").read_text() == "0\n"
    assert "rror" not in ended.stderr and "Exception" not in ended.stderr


@pytest.mark.parametrize(
    ("command", "library"),
    [
        ("train.py", "torch."),
        ("-m comet_pl.ask x --interactive", "torch."),
        ("-m comet_pl.sweep seed=[0,1]", "torch."),
        ("-m comet_pl.sweep seed=[0,1]", "matplotlib."),
    ],
)
def test_ctrl_c_while_libraries_are_imported(command, library):
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", *command.split()],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    for line in process.stderr:
        if line.rpartition("|")[2].strip().startswith(library):
            break
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in shown
