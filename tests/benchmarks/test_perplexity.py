"""Perplexity of short inputs: paired differences, even pieces, the loss of next tokens."""

import json
import math
from itertools import pairwise

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks.inference import decoders, perplexity
from comet_pl.errors import UserError
from data.tokenizer import train_tokenizer
from tests.support.models import backbone, text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny decoder with a tokenizer, and a book."""
    folder = tmp_path_factory.mktemp("plain")
    words = ("whale", "sea", "ship", "old", "small", "and", "the")
    book = " ".join(words[k * k % 7] for k in range(3000))
    tokenizer = train_tokenizer([book], 300)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = backbone("llama")
    config.vocab_size = len(tokenizer)
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "book.txt").write_text(book)
    return folder


def test_perplexity_of_a_tiny_decoder(folder, tmp_path):
    """The fresh model, saved and given as the fine-tuned one, has the fresh one's losses again."""
    book, saved, out = str(folder / "book.txt"), tmp_path / "saved", tmp_path / "out"
    decoders.load_tokenizer(str(folder)).save_pretrained(saved)
    torch.manual_seed(0)
    memory = perplexity.MEMORY | {"chunk_size": 16}
    decoders.plug_in(decoders.load_decoder(folder), memory).save_pretrained(saved)
    argv = [book, book, "--model", str(folder), "--pieces", "5", "--tokens", "48"]
    perplexity.main([*argv, "--ckpt", str(saved), "--out", str(out)])
    result = json.loads((out / "perplexity.json").read_text())
    models = {row["name"]: row for row in result["models"]}
    ways = ("one chunk", "chunks of 16")
    kinds = [f"{name}, {way}" for name in ("plugged in", "fine-tuned") for way in ways]
    assert list(models) == ["plain", "memories off", "plain, blocks of 16", *kinds]
    losses = {name: pytest.approx(row["losses"], abs=1e-5) for name, row in models.items()}
    assert result["law_5"]["met"] and models["memories off"]["losses"] == losses["plain"]
    for way in ways:
        assert models[f"fine-tuned, {way}"]["losses"] == losses[f"plugged in, {way}"]
    one, chunks = (models[f"plugged in, {way}"]["losses"] for way in ways)
    assert len(one) == 5 and one != losses["plain"] and one != pytest.approx(chunks, abs=1e-6)


def test_memory_that_is_plugged_in_without_harm(folder, tmp_path):
    """In one chunk the trailing layout is the plain decoder."""
    argv = [str(folder / "book.txt"), "--model", str(folder), "--pieces", "3", "--tokens", "32"]
    argv += ["--chunk-size", "8", "--start", "s", "--out", str(tmp_path)]
    perplexity.main([*argv, "--set", "layout=trailing", "sink=learned", "global_size=3"])
    result = json.loads((tmp_path / "perplexity.json").read_text())
    losses = {row["name"]: row["losses"] for row in result["models"]}
    assert losses["plugged in, one chunk"] == pytest.approx(losses["plain"], abs=1e-5)
    with pytest.raises(UserError, match=r"^model.start: 'the sea' given, a text of"):
        perplexity.main([*argv[:-4], "--start", "the sea", "--out", str(tmp_path)])


def test_plain_loss_is_that_of_next_tokens(folder):
    """The mean loss by hand, from logits."""
    model, ids = decoders.load_decoder(folder), text(1, 20)
    none = {"chunk_size": 20, "global_size": 0, "compression_stride": None}
    off = decoders.plug_in(model, none)
    with torch.inference_mode():
        logs = model(ids).logits[0].log_softmax(-1)
        expected = -sum(logs[k, ids[0, k + 1]].item() for k in range(19)) / 19
        assert perplexity.in_chunks(off, 20)(ids) == pytest.approx(expected, rel=1e-5)
        assert perplexity.neutral(model, off, ids) < perplexity.NEUTRAL


def test_blocks_are_read_alone(folder):
    """Each token is predicted by those of its block before it, or by the whole block before."""
    model, ids, logs = decoders.load_decoder(folder), text(1, 20), []
    with torch.inference_mode():
        for k in range(19):
            seen = ids[:, k // 6 * 6 : k + 1]
            logs.append(model(seen).logits[0, -1].log_softmax(-1)[ids[0, k + 1]].item())
        assert perplexity.in_blocks(model, 6)(ids) == pytest.approx(-sum(logs) / 19, rel=1e-5)


@pytest.mark.parametrize(("tokens", "size", "count"), [(500, 7, 9), (5, 5, 3), (9, 2, 1)])
def test_pieces_are_evenly_spaced(tokens, size, count):
    starts = perplexity.starts(tokens, size, count)
    assert len(starts) == count and starts[0] == 0
    assert count == 1 or starts[-1] + size == tokens
    gaps = [b - a for a, b in pairwise(starts)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_differences_are_paired():
    """A constant difference has no error, however much the pieces differ."""
    row = perplexity.summary("x", [2.0, 4.0, 6.0], [1.5, 3.5, 5.5])
    assert (row["loss"], row["loss_error"]) == pytest.approx((4, 2 / math.sqrt(3)))
    assert (row["difference"], row["difference_error"]) == (0.5, 0)
    assert row["perplexity"] == pytest.approx(math.exp(4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["{}/none.txt"], "BOOK: {}/none.txt cannot be read"),
        (["{}/book.txt", "--tokens", "100000"], "a longer book or fewer --tokens"),
        (["{}/book.txt"] * 3 + ["--pieces", "2"], "--pieces: 2 given for 3 books"),
        (["{}/book.txt", "--ckpt", "{}/nowhere"], "ckpt: {}/nowhere does not exist"),
        (["{}/model.safetensors"], "cannot be read"),
    ],
)
def test_mistakes_are_one_line(options, message, folder, tmp_path):
    argv = [option.replace("{}", str(folder)) for option in options]
    with pytest.raises(UserError) as caught:
        perplexity.main(["--model", str(folder), "--out", str(tmp_path), *argv])
    assert message.replace("{}", str(folder)) in str(caught.value)
    assert not list(tmp_path.iterdir())
