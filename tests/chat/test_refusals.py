"""What read and ask refuse, in one line each."""

import shutil
import sys

import pytest
import torch

from comet_pl import CometCache, ask, read
from comet_pl.errors import UserError, run_cli
from tests.support.chat import (
    TEXT,
    call,
    save_model,
    typed,
)
from tests.support.models import same_cache


def refusal(program, *arguments):
    with pytest.raises(UserError) as caught:
        call(program, *arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"", "holds no text"),
        (b" \n\n", "holds no text"),
        (b"A caf\xe9 in the town", "is not text in UTF-8 (invalid continuation byte at byte 5)"),
        ("café".encode()[:-1], "is not text in UTF-8 (unexpected end of data at byte 3)"),
    ],
)
def test_files_that_cannot_be_read(content, message, folder, tmp_path):
    file, save = tmp_path / "text", ["--save", tmp_path / "memory"]
    if content is not None:
        file.write_bytes(content)
    assert refusal(read, folder, file, *save) == f"{file}: {message}"
    assert "Is a directory" in refusal(read, folder, tmp_path, *save)
    assert not (tmp_path / "memory").exists()


@pytest.mark.parametrize("pieces", [32, 7])
def test_the_wrong_byte_is_found_in_later_pieces(pieces, tmp_path, monkeypatch):
    monkeypatch.setattr(read, "PIECE", pieces)
    (tmp_path / "t").write_bytes("ä€ ".encode() * 30 + b"\xff rest")
    with pytest.raises(UserError, match="at byte 180"):
        read.check_text(str(tmp_path / "t"))


def test_targets_that_cannot_be_written(folder, book, tmp_path):
    reading = [folder, book.text, "--save"]
    assert "is there already" in refusal(read, *reading, book.memory)
    assert "is there already" in refusal(ask, folder, book.memory, "?", "--save", book.memory)
    assert "is a folder" in refusal(read, *reading, tmp_path)
    none = f"there is no folder {tmp_path}/none"
    assert none in refusal(read, *reading, tmp_path / "none" / "memory")
    assert "--save" in refusal(read, folder, book.text)
    (tmp_path / "old").write_text("old")
    call(read, *reading, tmp_path / "old", "--force")
    same_cache(CometCache.load(tmp_path / "old"), CometCache.load(book.memory), 0)


def test_models_that_cannot_be_loaded(folder, book, tmp_path):
    rest, bare = [book.text, "--save", tmp_path / "memory"], tmp_path / "bare"
    assert refusal(read, "./none", *rest) == "MODEL: no such folder: ./none"
    assert "holds neither" in refusal(read, tmp_path, *rest)
    assert "not a readable checkpoint" in refusal(read, book.text, *rest)
    weights = shutil.copytree(folder, bare) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert f"MODEL: {bare}: cannot be loaded" in refusal(read, bare, *rest)
    for file in bare.iterdir():
        if file.name != "config.json":
            file.unlink()
    assert f"MODEL: {bare}: cannot be loaded" in refusal(read, bare, *rest)


def test_memories_that_do_not_fit(folder, tokenizer, book, tmp_path):
    cut, bare = tmp_path / "cut", tmp_path / "bare"
    assert "no such memory file" in refusal(ask, folder, tmp_path / "none", "Who?")
    assert "is a folder" in refusal(ask, folder, tmp_path, "Who?")
    cut.write_bytes(book.memory.read_bytes()[:-100])
    unreadable = "not a readable CometCache file"
    assert f"{cut}: {unreadable}" in refusal(ask, folder, cut, "Who?")
    assert unreadable in refusal(ask, folder, book.text, "Who?")
    onto = refusal(read, folder, book.text, "--onto", cut, "--save", tmp_path / "new")
    assert "chunk_size" not in onto
    CometCache.load(book.memory).save(bare, notes={})
    wrote = "not one that python -m comet_pl.read wrote"
    assert wrote in refusal(ask, folder, bare, "Who?")
    for seed, layers, reason in ((1, 2, "other weights"), (0, 3, "another configuration")):
        other = save_model(tmp_path / "other", tokenizer, seed, layers)
        message = refusal(ask, other, book.memory, "Who?")
        assert message.startswith(f"{book.memory} (made with {folder}): ") and reason in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MEMORY", ""], "QUESTION: is empty"),
        (["MEMORY", " \n"], "QUESTION: is empty"),
        (["MEMORY", "caf\udce9"], "QUESTION: is not text in UTF-8"),
        (["MEMORY"], "QUESTION: missing"),
        ([], "QUESTION: missing"),
        (["MEMORY", "Who?", "--max-new-tokens", "0"], "--max-new-tokens: '0' given"),
        (["MEMORY", "Who?", "--temperature", "nan"], "--temperature: 'nan' given"),
        (["MEMORY", "Who?", "--temperature", "-1"], "--temperature: '-1' given"),
        (["MEMORY", "Who?", "--set", "chunk_size=8"], "--set: given, but"),
        (["MEMORY", "Who?", "--dtype", "float32"], "--dtype: given, but"),
        (["MEMORY", "Who?", "--dtype", "int8"], "--dtype"),
        (["MEMORY", "Who?", "--interactiv"], "--interactiv"),
        (["--interactive", "--set", "chunk_sise=8"], "did you mean chunk_size"),
        (["--interactive", "--set", "chunk_size"], "KEY=VALUE"),
        (["--interactive", "--set", "rollover=false"], "rollover is always true here"),
        (["--interactive", "--set", "chunk_size=["], "--set chunk_size: '[' given"),
        (["--interactive", "--set", "chunk_size=0"], "--set chunk_size: 0 given"),
        (["--interactive", "--set", "adapter_rank=3"], "adapter_rank"),
    ],
)
def test_options_that_cannot_be_meant(arguments, message, folder, book):
    arguments = [book.memory if argument == "MEMORY" else argument for argument in arguments]
    assert message in refusal(ask, folder, *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(folder, book):
    assert "--device: cuda given" in refusal(ask, folder, book.memory, "Who?", "--device", "cuda")


def test_one_line_and_exit_code_2(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ask", str(folder), str(tmp_path / "none"), "Who?"])
    with pytest.raises(SystemExit) as caught:
        run_cli(ask.main)
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", f"error: {tmp_path}/none: no such memory file\n")


def test_too_little_memory_for_the_cache(folder, book, tmp_path, monkeypatch):
    monkeypatch.setattr("comet_pl.model.room.free_bytes", lambda device: 1000)
    message = refusal(read, folder, book.text, "--save", tmp_path / "memory")
    assert message.startswith(f"{folder}: the memory of 1 text")
    assert not (tmp_path / "memory").exists()


def test_reading_that_breaks_off_leaves_no_file(folder, tmp_path, monkeypatch):
    typed(monkeypatch, TEXT.encode() * 3 + b"\xff")
    message = refusal(read, folder, "-", "--save", tmp_path / "memory")
    assert "standard input: is not text" in message
    assert list(tmp_path.iterdir()) == []
