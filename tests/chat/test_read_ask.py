"""read and ask: from one process to another, what a conversation holds, and what is refused."""

import copy
import json
import os
import shutil
import signal
import subprocess

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from comet_pl import CometCache, ask, read
from comet_pl.chat import conversation
from comet_pl.chat.conversation import Conversation
from comet_pl.chat.open_model import load
from data.chat_template import encode, frame, separator
from tests.support.chat import (
    TEXT,
    call,
    greedy,
    joined,
    one_go,
    run,
    start,
    typed,
)
from tests.support.models import backbone, same_cache
from tests.support.tiny_runs import ROOT

# -- from one process to another


def test_what_is_read_is_asked(folder, model, tokenizer, book, capsys):
    before, after = frame(tokenizer)
    document = joined(tokenizer, before, TEXT * 3)
    same_cache(CometCache.load(book.memory), one_go(model, document))
    content = book.memory.read_bytes()
    call(ask, folder, book.memory, "Who fell?", "--max-new-tokens", "20")
    ids = greedy(model, tokenizer, joined(tokenizer, document, "\n\n", "Who fell?", after), 20)
    assert capsys.readouterr() == (tokenizer.decode(ids, skip_special_tokens=True) + "\n", "")
    assert book.memory.read_bytes() == content


@pytest.mark.slow
def test_what_one_process_reads_another_answers(folder, book, tmp_path, capsys):
    done = run("read", folder, book.text, "--save", tmp_path / "memory")
    assert done.returncode == 0, done.stderr
    cache = CometCache.load(tmp_path / "memory")
    same_cache(cache, CometCache.load(book.memory), 0)
    tokens = cache.get_seq_length()
    assert f"read    {tokens:,} tokens" in done.stdout
    memory = f"memory  {cache.nbytes:,} bytes after {-(-tokens // 5)} chunks of 5"
    assert memory in done.stdout
    done = run("ask", folder, tmp_path / "memory", "Who fell?", "--max-new-tokens", "20")
    call(ask, folder, book.memory, "Who fell?", "--max-new-tokens", "20")
    assert (done.returncode, done.stderr, done.stdout) == (0, "", capsys.readouterr().out)


def test_a_plain_decoder_is_the_same_model_in_both_programs(tokenizer, book, tmp_path, capsys):
    config, plain, memory = backbone(), tmp_path / "plain", tmp_path / "memory"
    config.vocab_size = len(tokenizer)
    AutoModelForCausalLM.from_config(config).save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    keys = ["--set", "chunk_size=6", "--set", "temporary_capacity=3", "--dtype", "bfloat16"]
    call(read, plain, book.text, "--save", memory, *keys)
    layer = CometCache.load(memory).memories[0]
    # global_size is the default's
    assert layer.state.shape == (1, 64, 16)
    assert layer.temporary.shape == (1, 3, 16) and layer.temporary.dtype == torch.bfloat16
    assert "untrained" in capsys.readouterr().err
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    call(ask, plain, memory, "Who?", "--max-new-tokens", "3")
    # sampling is as random as the process is
    assert torch.equal(torch.random.get_rng_state(), state)


def test_files_are_read_one_after_the_other_at_once_or_later(folder, model, tokenizer, tmp_path):
    texts = ["\ufeff" + TEXT, "Only a line", TEXT * 2]
    files = [tmp_path / f"{n}.txt" for n in range(3)]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text, encoding="utf-8")
    first, rest, whole = (tmp_path / name for name in ("first", "rest", "whole"))
    call(read, folder, *files, "--save", whole)
    call(read, folder, files[0], "--save", first)
    call(read, folder, *files[1:], "--onto", first, "--save", rest)
    parts = [frame(tokenizer)[0], TEXT, "\n\n", "Only a line", "\n\n", TEXT * 2]
    expected = one_go(model, joined(tokenizer, *parts))
    for memory in (whole, rest):
        same_cache(CometCache.load(memory), expected)


def test_standard_input(folder, book, tmp_path, monkeypatch):
    typed(monkeypatch, book.text.read_bytes())
    call(read, folder, "-", "--save", tmp_path / "memory")
    same_cache(CometCache.load(tmp_path / "memory"), CometCache.load(book.memory), 0)


# -- pieces of text


@pytest.mark.parametrize(
    "text",
    [
        "a line\n" * 40,
        "words and words " * 20,
        "x" * 300,
        "ä€𝄞 " * 50,
        "ä€𝄞" * 50,
        "line\n" + "€" * 100 + " end",
        "\ufeffmark",
    ],
)
def test_pieces_are_the_whole_text(text, tmp_path, monkeypatch):
    monkeypatch.setattr(read, "PIECE", 32)
    (tmp_path / "t").write_text(text, encoding="utf-8")
    pieces = list(read.text_pieces(str(tmp_path / "t")))
    assert "".join(piece for piece, _ in pieces) == text.removeprefix("\ufeff")
    assert max(len(piece) for piece, _ in pieces) <= 64
    assert sum(size for _, size in pieces) == read.check_text(str(tmp_path / "t"))


def test_reading_in_small_calls_is_reading_at_once(model, tokenizer, monkeypatch):
    monkeypatch.setattr(conversation, "PREFILL", 12)
    counts, ids = [], encode(tokenizer, TEXT * 2)
    talk = Conversation(model, tokenizer, CometCache())
    talk.read([ids[:3], [], ids[3:50], ids[50:]], counts.append)
    assert set(counts[:-1]) == {10} and counts[-1] <= 10
    whole = [*frame(tokenizer)[0], *ids]
    assert sum(counts) == len(whole)
    same_cache(talk.cache, one_go(model, whole))


def test_a_model_that_does_not_roll_over_reads_at_constant_memory(folder, book, tmp_path):
    grows = shutil.copytree(folder, tmp_path / "grows")
    config = json.loads((folder / "config.json").read_text()) | {"rollover": False}
    (grows / "config.json").write_text(json.dumps(config))
    call(read, grows, book.text, "--save", tmp_path / "memory")
    same_cache(CometCache.load(tmp_path / "memory"), CometCache.load(book.memory), 0)


# -- a conversation


def test_every_end_that_the_model_knows_ends_an_answer(model, tokenizer):
    """Qwen's have two."""
    other = copy.deepcopy(model)
    for ends, stops in (([tokenizer.eos_token_id, 7], {7}), (9, {9})):
        other.generation_config.eos_token_id = ends
        talk = Conversation(other, tokenizer, CometCache())
        assert set(talk.stops) == {tokenizer.eos_token_id} | stops


class StopAfter:
    """Ctrl-C after some tokens: the signal itself."""

    def __init__(self, tokens):
        self.left = tokens

    def __call__(self, input_ids, scores, **_):
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)
        return torch.zeros(len(input_ids), dtype=torch.bool)


def talk_about(book, model, tokenizer):
    """A conversation about the book, or about nothing, and the ids that it holds or opens with."""
    ids = frame(tokenizer)[0]
    if book is None:
        return Conversation(model, tokenizer, CometCache()), ids
    blank = encode(tokenizer, "\n\n")
    talk = Conversation(model, tokenizer, CometCache.load(book.memory), blank)
    return talk, joined(tokenizer, ids, book.text.read_text(), blank)


@pytest.mark.parametrize("from_memory", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("ending", ["stop token", "length", "interrupt"])
def test_a_conversation_holds_exactly_its_turns(ending, from_memory, model, tokenizer, book):
    """After each turn the cache has read all turns so far, except the opening of the next text."""
    talk, ids = talk_about(book if from_memory else None, model, tokenizer)
    for turn, question in enumerate(["Who fell?", "Why? " * 9, "x"]):
        ids = joined(tokenizer, ids, question, talk.after)
        expected = greedy(model, tokenizer, ids, 13)
        options = {}
        with ask.Interruptible() as interruptible:
            if ending == "stop token":
                # it stops where the model would say its 7th token
                talk.stops = [tokenizer.eos_token_id, expected[6]]
                expected = expected[: expected.index(expected[6])]
            elif ending == "interrupt":
                options = {"stopping_criteria": [StopAfter(4), interruptible]}
                expected = expected[:4]
            answer = talk.ask(question, 13, **options)
        assert answer == expected
        ids = [*ids, *answer, *talk.between]
        fed = ids[: len(ids) - len(talk.opening)]
        assert ids[len(fed) :] == talk.opening and fed
        same_cache(talk.cache, one_go(model, fed))
        assert talk.cache.nbytes == one_go(model, [1]).nbytes, turn


def test_an_answer_that_stops_at_once(model, tokenizer):
    talk, before = talk_about(None, model, tokenizer)
    ids = joined(tokenizer, before, "Who?", talk.after)
    talk.stops = greedy(model, tokenizer, ids, 1)
    assert talk.ask("Who?", 5) == []
    assert talk.opening == separator(tokenizer)
    same_cache(talk.cache, one_go(model, ids))


def test_a_second_interrupt_ends_the_program():
    before = signal.getsignal(signal.SIGINT)
    with ask.Interruptible():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_tokenizer_without_a_template(model, folder):
    plain = AutoTokenizer.from_pretrained(folder)
    plain.chat_template = None
    talk = Conversation(model, plain, CometCache())
    first = talk.ask("Who?", 4)
    assert talk.opening == joined(plain, first[-1:], "\n\n")
    same_cache(talk.cache, one_go(model, joined(plain, "Who?", "\n\nAnswer:\n", first[:-1])))


@pytest.mark.parametrize("with_memory", [True, False])
def test_interactive_goes_on_after_saving(
    with_memory, folder, model, tokenizer, book, tmp_path, monkeypatch, capsys
):
    """Two questions in one program, a third in another: the answers are of one conversation."""
    questions, after, length = ["Who fell?", "Why?", "And then?"], tmp_path / "after", 9
    memory = [book.memory] if with_memory else []
    typed(monkeypatch, f"{questions[0]}\n\n  {questions[1]} \n".encode())
    options = ["--max-new-tokens", length]
    call(ask, folder, *memory, "--interactive", *options, "--save", after)
    call(ask, folder, after, questions[2], *options)
    printed = capsys.readouterr()
    assert printed.err == f"wrote {after}\n"
    talk, _ = talk_about(book if with_memory else None, model, tokenizer)
    answers = [talk.ask(question, length) for question in questions]
    lines = [tokenizer.decode(answer, skip_special_tokens=True) + "\n" for answer in answers]
    assert printed.out == "".join(lines)


def test_an_interrupted_answer_leaves_the_conversation_valid(folder, tmp_path):
    """The signal reaches the real program while it answers."""
    after = tmp_path / "after"
    options = ["--interactive", "--max-new-tokens", 100_000, "--save", after]
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(start("ask", folder, *options), cwd=ROOT, env=environment, **streams)
    try:
        process.stdin.write(b"Who fell?\n")
        process.stdin.flush()
        # it answers
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, errors
    assert CometCache.load(after).notes["opening"]
    assert not list(tmp_path.glob("*.part"))


def test_sampling(folder, book, capsys):
    def answer(*options):
        torch.manual_seed(3)
        call(ask, folder, book.memory, "Who?", "--max-new-tokens", "12", *options)
        return capsys.readouterr().out

    sampled = answer("--temperature", "5")
    assert sampled == answer("--temperature", "5") != answer()
    assert answer() == answer("--temperature", "1e-300") != answer("--temperature", "1e300")


# -- what is refused


# -- a real model


@pytest.mark.slow
def test_a_real_model_reads_a_book(shared_data, tmp_path):
    real, question = ROOT / "models" / "smollm2_135m", "Who wrote this book?"
    if not real.is_dir():
        pytest.skip("no models/smollm2_135m; make smollm2 makes it")
    content = (shared_data / "books" / "pride_and_prejudice.txt").read_bytes()[:20_000]
    (tmp_path / "book.txt").write_bytes(content)
    memory = tmp_path / "memory"
    done = run("read", real, tmp_path / "book.txt", "--save", memory)
    assert done.returncode == 0, done.stderr
    done = run("ask", real, memory, question, "--max-new-tokens", "12")
    assert done.returncode == 0, done.stderr
    model, tokenizer, _ = load(str(real), {})
    before, after = frame(tokenizer)
    text = (tmp_path / "book.txt").read_text().removeprefix("\ufeff")
    answer = greedy(model, tokenizer, joined(tokenizer, before, text, "\n\n", question, after), 12)
    assert done.stdout == tokenizer.decode(answer, skip_special_tokens=True) + "\n"
