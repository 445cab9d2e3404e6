"""How ask and read end before their end: by a signal, a wrong line, an output that is gone."""

import os
import select
import signal
import subprocess
import time

import pytest
import torch

from comet_pl import CometCache, ask, read
from comet_pl.chat.conversation import Conversation
from comet_pl.errors import UserError, one_line
from tests.support.chat import TEXT, call, start, typed
from tests.support.models import same_cache
from tests.support.tiny_runs import ROOT

slow = pytest.mark.slow
LONG = ["--interactive", "--max-new-tokens", 100_000]


def opened(*arguments, **options):
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        start(*arguments), cwd=ROOT, env=environment, **streams | options, bufsize=0
    )


def answered(model, tokenizer, *questions, length=9):
    talk = Conversation(model, tokenizer, CometCache())
    for question in questions:
        talk.ask(question, length)
    return talk


@pytest.mark.parametrize(
    ("busy", "name"),
    [
        (True, "SIGTERM"),
        pytest.param(False, "SIGHUP", marks=slow),
        pytest.param(True, "SIGHUP", marks=slow),
        pytest.param(False, "SIGTERM", marks=slow),
    ],
)
def test_a_signal_saves_the_conversation(name, busy, folder, model, tokenizer, tmp_path):
    """In the middle of an answer, or while it waits for a line."""
    after, number = tmp_path / "after", getattr(signal, name)
    options = LONG if busy else ["--interactive", "--max-new-tokens", 9]
    process = opened("ask", folder, *options, "--save", after)
    try:
        process.stdin.write(b"Who fell?\n")
        assert process.stdout.read(1)
        if not busy:  # the answer is done when its line is
            while b"\n" not in process.stdout.read(64):
                pass
            time.sleep(0.2)
        process.send_signal(number)
        process.send_signal(number)
        errors = process.stderr.read()
        assert process.wait(60) == 128 + number, errors
    finally:
        process.kill()
        process.wait()
    assert errors.decode() == f"wrote {after}\n"
    saved = CometCache.load(after)
    assert [file.name for file in tmp_path.iterdir()] == ["after"]
    if not busy:
        talk = answered(model, tokenizer, "Who fell?")
        assert saved.notes["opening"] == talk.opening
        same_cache(saved, talk.cache)


@pytest.mark.slow
def test_a_signal_that_is_ignored_stays_ignored(folder, tmp_path):
    """As under nohup."""
    command = ["sh", "-c", 'trap "" HUP; exec "$0" "$@"', *start("ask", folder, *LONG)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=-1, stdout=-1, stderr=-1, bufsize=0)
    try:
        process.stdin.write(b"Who fell?\n")
        assert process.stdout.read(1)
        process.send_signal(signal.SIGHUP)
        assert process.stdout.read(1) and process.poll() is None
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGHUP", marks=slow)])
def test_a_signal_leaves_no_half_of_a_memory(name, folder, tmp_path):
    number = getattr(signal, name)
    pipe = tmp_path / "text"
    os.mkfifo(pipe)
    process = opened("read", folder, pipe, "--save", tmp_path / "memory")
    try:
        with pipe.open("wb", buffering=0) as text:
            text.write(TEXT.encode())
            time.sleep(0.3)
            process.send_signal(number)
            errors = process.communicate(timeout=60)[1].decode()
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 128 + number, errors
    assert errors == f"stopped; {tmp_path / 'memory'} is not written\n"
    assert [file.name for file in tmp_path.iterdir()] == ["text"]


def test_a_signal_waits_for_a_file_that_is_being_written(model, tokenizer, tmp_path, monkeypatch):
    talk, save = answered(model, tokenizer, "Who?"), CometCache.save

    def interrupted(*arguments, **options):
        signal.raise_signal(signal.SIGINT)
        save(*arguments, **options)

    monkeypatch.setattr(CometCache, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        talk.save(tmp_path / "memory")
    same_cache(CometCache.load(tmp_path / "memory"), talk.cache, 0)


def test_lines_before_a_wrong_byte_are_answered_and_saved(
    folder, model, tokenizer, tmp_path, monkeypatch, capsys
):
    typed(monkeypatch, b"Who fell?\nWhy?\ncaf\xe9\nWhen?\n")
    options = ["--interactive", "--max-new-tokens", 9, "--save", tmp_path / "after"]
    with pytest.raises(UserError, match="standard input: line 3 is not text in UTF-8"):
        call(ask, folder, *options)
    talk, saved = answered(model, tokenizer, "Who fell?", "Why?"), CometCache.load(options[-1])
    assert capsys.readouterr().err == f"wrote {tmp_path / 'after'}\n"
    assert saved.notes["opening"] == talk.opening
    same_cache(saved, talk.cache)


@slow
def test_a_line_is_answered_before_the_next_one_comes(folder):
    process = opened("ask", folder, "--interactive", "--max-new-tokens", 3)
    try:
        process.stdin.write(b"Who fell?\n")
        assert select.select([process.stdout], [], [], 60)[0]
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("way", [["--interactive"], pytest.param(["Who fell?"], marks=slow)])
def test_an_output_that_is_gone_ends_the_answer_and_saves(way, folder, book, tmp_path):
    """As under `head -c 1`; lines behind it have no answer."""
    after = tmp_path / "after"
    options = [folder, book.memory, *way, "--max-new-tokens", 100_000, "--save", after]
    process = opened("ask", *options)
    try:
        process.stdin.write(b"Who fell?\nWhy?\n")
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read().decode() == f"wrote {after}\n"
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    assert CometCache.load(book.memory).columns < CometCache.load(after).columns < 20_000


def test_an_answer_that_breaks_off_inside_a_token_is_not_saved(
    folder, tmp_path, monkeypatch, capsys
):
    def broken(*arguments, **options):
        raise MemoryError("no room")

    typed(monkeypatch, b"Who fell?\n")
    monkeypatch.setattr("comet_pl.model.cell.Cell.forward", broken)
    with pytest.raises(UserError, match="no room"):
        call(ask, folder, *LONG, "--save", tmp_path / "after")
    assert capsys.readouterr().err.endswith("after is not written: an answer broke off\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("end", [20_000, 0])
def test_a_file_that_becomes_shorter_while_it_is_read(end, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(read, "PIECE", 10_000)
    file, text = tmp_path / "text", TEXT * 4000
    file.write_text(text)
    # The first tokens are read, and then the file is cut.
    monkeypatch.setattr(Conversation, "_prefill", lambda self, ids: os.truncate(file, end))
    message = f"became shorter while it was read: it had {len(text):,} bytes"
    with pytest.raises(UserError, match=message):
        call(read, folder, file, "--save", tmp_path / "memory")
    assert [file.name for file in tmp_path.iterdir()] == ["text"]


def test_a_file_that_grows_is_read_as_far_as_it_was_checked(tmp_path):
    file, pieces = tmp_path / "text", read.text_pieces
    file.write_text("\ufeff" + TEXT * 3)
    size = read.check_text(str(file))
    assert size == file.stat().st_size
    file.write_bytes(file.read_bytes() + b"more \xff")
    assert "".join(text for text, _ in pieces(str(file), size)) == TEXT * 3


def test_a_question_costs_no_memory_for_what_was_read(model, tokenizer):
    """A mask of all columns would: 1 GB for 10^8 tokens."""
    asked = []
    for columns in 0, 10**13:
        talk = answered(model, tokenizer, "Who?")
        talk.cache.columns += columns
        asked.append(talk.ask("Why? " * 20, 9))
        assert talk.cache.get_seq_length() == talk.cache.columns
    assert asked[0] == asked[1] and torch.is_tensor(talk.cache.memories[0].state)


def test_an_error_line_is_short_and_nothing_that_a_terminal_obeys():
    line = one_line("a\x1b[2J\x9b1m\u202eb\n c\x07 é 中 " + "x" * 100_000 + " is needed")
    assert line.startswith(r"a\x1b[2J\x9b1m\u202eb c\x07 é 中 xxx") and line.endswith(" is needed")
    assert len(line) < 2100 and "characters ...]" in line


@pytest.mark.slow
def test_a_note_of_a_memory_file_cannot_write_to_the_terminal(folder, book, tmp_path):
    cache = CometCache.load(book.memory)
    cache.weights = "other"
    cache.save(tmp_path / "memory", cache.notes | {"model": "\x1b]0;title\x07" * 5000})
    done = subprocess.run(
        start("ask", folder, tmp_path / "memory", "Who?"), cwd=ROOT, capture_output=True, timeout=60
    )
    assert done.returncode == 2 and b"\x1b" not in done.stderr and b"\x07" not in done.stderr
    assert len(done.stderr) < 2100 and b"other weights" in done.stderr
