"""A tiny model, its tokenizer, and a book that read has read."""

from types import SimpleNamespace

import pytest
import torch

from comet_pl import CometForCausalLM, read
from data.tokenizer import train_tokenizer
from tests.support.chat import (
    TEXT,
    call,
    save_model,
)


@pytest.fixture(scope="package")
def tokenizer():
    return train_tokenizer([TEXT] * 3, 300)


@pytest.fixture(scope="package")
def folder(tokenizer, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("comet"), tokenizer)


@pytest.fixture(scope="package")
def model(folder):
    return CometForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


@pytest.fixture(scope="package")
def book(folder, tmp_path_factory):
    """text: a file; memory: what read has made of it."""
    path = tmp_path_factory.mktemp("book")
    (path / "book.txt").write_text(TEXT * 3)
    call(read, folder, path / "book.txt", "--save", path / "book.memory")
    return SimpleNamespace(text=path / "book.txt", memory=path / "book.memory")
