"""read and ask: a text read in one process is asked in another; a conversation is what its template says; what is refused."""

import copy
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from comet_pl import CometCache, CometConfig, CometForCausalLM, ask, read
from comet_pl.chat import conversation
from comet_pl.chat import open_model as any_model
from comet_pl.chat.conversation import Conversation, encode, frame, separator
from comet_pl.errors import UserError, run_cli
from data.batches import train_tokenizer
from tests.support.models import backbone, same_cache

ROOT = Path(__file__).resolve().parents[2]
TEXT = "It was a dark night; the rain fell in torrents, and the wind swept up the streets of the town.\n"
MEMORY = {
    "chunk_size": 5,
    "global_size": 2,
    "compression_stride": 3,
    "temporary_capacity": 4,
    "adapter_rank": 2,
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT] * 3, 300)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A CoMeT in double precision, with its tokenizer."""
    path = tmp_path_factory.mktemp("comet")
    config = backbone()
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    CometForCausalLM(CometConfig(backbone_config=config, **MEMORY)).double().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return CometForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def book(folder, tmp_path_factory):
    """(text file, memory file)."""
    path = tmp_path_factory.mktemp("book")
    (path / "book.txt").write_text(TEXT * 4)
    read.main([str(folder), str(path / "book.txt"), "--save", str(path / "book.memory")])
    return path / "book.txt", path / "book.memory"


def start(module, *arguments):
    return [sys.executable, "-m", f"comet_pl.{module}", *map(str, arguments)]


def run(module, *arguments, **more):
    return subprocess.run(
        start(module, *arguments), cwd=ROOT, capture_output=True, text=True, timeout=120, **more
    )


def typed(monkeypatch, text):
    monkeypatch.setattr(
        sys,
        "stdin",
        io.TextIOWrapper(io.BytesIO(text if isinstance(text, bytes) else text.encode())),
    )


def one_go(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=True, logits_to_keep=1).past_key_values


def greedy(model, tokenizer, ids, count):
    """Generation from the whole text, without a stop token at its end."""
    ids = torch.tensor([ids])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
    )
    answer = out[0, ids.shape[1] :].tolist()
    return answer[:-1] if answer[-1] == tokenizer.eos_token_id else answer


# ---- from one process to another


def test_what_one_process_reads_another_answers(folder, model, tokenizer, tmp_path):
    file, memory = tmp_path / "book.txt", tmp_path / "memory.safetensors"
    file.write_text(TEXT * 5)
    done = run("read", folder, file, "--save", memory)
    assert done.returncode == 0, done.stderr
    before, after = frame(tokenizer)
    document = [*before, *encode(tokenizer, TEXT * 5)]
    cache = CometCache.load(memory)
    same_cache(cache, one_go(model, document))
    assert f"read    {len(document):,} tokens" in done.stdout
    assert (
        f"memory  {cache.nbytes:,} bytes after {-(-len(document) // 5)} chunks of 5" in done.stdout
    )
    content = memory.read_bytes()
    done = run("ask", folder, memory, "Who fell?", "--max-new-tokens", "20")
    assert done.returncode == 0, done.stderr
    ids = greedy(
        model,
        tokenizer,
        [*document, *encode(tokenizer, "\n\n"), *encode(tokenizer, "Who fell?"), *after],
        20,
    )
    assert done.stdout == tokenizer.decode(ids, skip_special_tokens=True) + "\n"
    assert done.stderr == ""
    assert memory.read_bytes() == content


def test_a_plain_decoder_is_the_same_model_in_both_programs(tokenizer, book, tmp_path, capsys):
    config = backbone()
    config.vocab_size = len(tokenizer)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    keys = ["--set", "chunk_size=6", "--set", "temporary_capacity=3", "--dtype", "bfloat16"]
    read.main([str(tmp_path / "plain"), str(book[0]), "--save", str(tmp_path / "memory"), *keys])
    cache = CometCache.load(tmp_path / "memory")
    assert cache.memories[0].state.shape == (1, 64, 16)  # global_size is the default's
    assert (
        cache.memories[0].temporary.shape == (1, 3, 16)
        and cache.memories[0].temporary.dtype == torch.bfloat16
    )
    assert "untrained" in capsys.readouterr().err
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    ask.main([str(tmp_path / "plain"), str(tmp_path / "memory"), "Who?", "--max-new-tokens", "3"])
    assert torch.equal(
        torch.random.get_rng_state(), state
    )  # sampling is as random as the process is


def test_files_are_read_one_after_the_other_at_once_or_later(folder, model, tokenizer, tmp_path):
    texts = ["\ufeff" + TEXT, "Only a line", TEXT * 2]
    files = [tmp_path / f"{n}.txt" for n in range(3)]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text, encoding="utf-8")
    read.main([str(folder), *map(str, files), "--save", str(tmp_path / "all")])
    read.main([str(folder), str(files[0]), "--save", str(tmp_path / "first")])
    read.main(
        [
            str(folder),
            str(files[1]),
            str(files[2]),
            "--onto",
            str(tmp_path / "first"),
            "--save",
            str(tmp_path / "rest"),
        ]
    )
    parts = [TEXT, "\n\n", "Only a line", "\n\n", TEXT * 2]
    whole = one_go(
        model, [*frame(tokenizer)[0], *(i for part in parts for i in encode(tokenizer, part))]
    )
    for name in ("all", "rest"):
        same_cache(CometCache.load(tmp_path / name), whole)


def test_standard_input(folder, book, tmp_path, monkeypatch):
    typed(monkeypatch, book[0].read_text())
    read.main([str(folder), "-", "--save", str(tmp_path / "memory")])
    same_cache(CometCache.load(tmp_path / "memory"), CometCache.load(book[1]), 0)


# ---- pieces of text


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
    monkeypatch.setattr(conversation, "READ_AT_ONCE", 12)
    counts, ids = [], encode(tokenizer, TEXT * 2)
    talk = Conversation(model, tokenizer, CometCache())
    talk.read([ids[:3], [], ids[3:50], ids[50:]], counts.append)
    assert set(counts[:-1]) == {10} and counts[-1] <= 10
    whole = [*frame(tokenizer)[0], *ids]
    assert sum(counts) == len(whole)
    same_cache(talk.cache, one_go(model, whole))


def test_a_model_that_does_not_roll_over_reads_at_constant_memory(folder, model, book, tmp_path):
    shutil.copytree(folder, tmp_path / "grows")
    config = json.loads((folder / "config.json").read_text()) | {"rollover": False}
    (tmp_path / "grows" / "config.json").write_text(json.dumps(config))
    read.main([str(tmp_path / "grows"), str(book[0]), "--save", str(tmp_path / "memory")])
    same_cache(CometCache.load(tmp_path / "memory"), CometCache.load(book[1]), 0)


# ---- a conversation


def rendered(tokenizer, chat, **more):
    return tokenizer(
        tokenizer.apply_chat_template(chat, tokenize=False, **more), add_special_tokens=False
    )["input_ids"]


def test_every_end_that_the_model_knows_ends_an_answer(model, tokenizer):
    """Qwen's have two."""
    other = copy.deepcopy(model)
    other.generation_config.eos_token_id = [tokenizer.eos_token_id, 7]
    assert set(Conversation(other, tokenizer, CometCache()).stops) == {tokenizer.eos_token_id, 7}
    other.generation_config.eos_token_id = 9
    assert set(Conversation(other, tokenizer, CometCache()).stops) == {tokenizer.eos_token_id, 9}


def test_without_a_template_a_text_begins_as_the_tokenizer_begins_it(tokenizer):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    assert frame(plain)[0] == []
    plain.add_special_tokens({"bos_token": "<|user|>"})
    plain.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|user|> $A", special_tokens=[("<|user|>", plain.bos_token_id)]
    )  # as Llama's
    assert frame(plain)[0] == [plain.bos_token_id]
    plain.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(UserError, match="chat template cannot be used: no"):
        frame(plain)


def test_the_frame_is_the_template(tokenizer):
    before, after = frame(tokenizer)
    between = separator(tokenizer)
    said = [("user", "It fell."), ("assistant", "Who?"), ("user", "the rain")]
    words = [encode(tokenizer, text) for _, text in said]
    chat = [{"role": role, "content": text} for role, text in said]
    ours = [*before, *words[0], *after, *words[1], *between, *words[2], *after]
    assert ours == rendered(tokenizer, chat, add_generation_prompt=True)


class StopAfter:
    """Ctrl-C after some tokens: the signal itself."""

    def __init__(self, tokens):
        self.left = tokens

    def __call__(self, input_ids, scores, **more):
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("from_memory", [True, False])
@pytest.mark.parametrize("ending", ["stop token", "length", "interrupt"])
def test_a_conversation_holds_exactly_its_turns(ending, from_memory, model, tokenizer, book):
    """After each turn: the cache is one that read all turns so far in one go, but for the opening, which then comes first."""
    before, after = frame(tokenizer)
    between = separator(tokenizer)
    ids = before
    if from_memory:
        talk = Conversation(model, tokenizer, CometCache.load(book[1]), encode(tokenizer, "\n\n"))
        ids = [*before, *encode(tokenizer, book[0].read_text()), *encode(tokenizer, "\n\n")]
    else:
        talk = Conversation(model, tokenizer, CometCache())
    for turn, question in enumerate(["Who fell?", "Why? " * 9, "x"]):
        ids = [*ids, *encode(tokenizer, question), *after]
        expected = greedy(model, tokenizer, ids, 23)
        if (
            ending == "stop token"
        ):  # it stops where the model would say its 7th token: that becomes a stop token
            talk.stops = [tokenizer.eos_token_id, expected[6]]
            expected = expected[: expected.index(expected[6])]
            answer = talk.ask(question, 23)
        elif ending == "length":
            answer = talk.ask(question, 23)
        else:
            expected = expected[:4]
            with ask.Interruptible() as interruptible:
                answer = talk.ask(question, 23, stopping_criteria=[StopAfter(4), interruptible])
        assert answer == expected
        ids = [*ids, *answer, *between]
        read_so_far = ids[: len(ids) - len(talk.opening)]
        assert ids[len(read_so_far) :] == talk.opening and read_so_far
        same_cache(talk.cache, one_go(model, read_so_far))
        assert talk.cache.nbytes == one_go(model, [1]).nbytes, turn


def test_an_answer_that_stops_at_once(model, tokenizer):
    talk = Conversation(model, tokenizer, CometCache())
    before, after = frame(tokenizer)
    ids = [*before, *encode(tokenizer, "Who?"), *after]
    talk.stops = greedy(model, tokenizer, ids, 1)
    assert talk.ask("Who?", 5) == []
    assert talk.opening == separator(tokenizer)
    same_cache(talk.cache, one_go(model, ids))


def test_a_second_interrupt_ends_the_program():
    with ask.Interruptible():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_tokenizer_without_a_template(model, tokenizer, folder):
    from transformers import AutoTokenizer

    plain = AutoTokenizer.from_pretrained(folder)
    plain.chat_template = None
    talk = Conversation(model, plain, CometCache())
    first = talk.ask("Who?", 4)
    ids = [*encode(plain, "Who?"), *encode(plain, "\n\nAnswer:\n"), *first, *encode(plain, "\n\n")]
    assert (first[-1:] + encode(plain, "\n\n")) == talk.opening
    same_cache(talk.cache, one_go(model, ids[: -len(talk.opening)]))


@pytest.mark.parametrize("with_memory", [True, False])
def test_interactive_goes_on_after_saving(
    with_memory, folder, model, tokenizer, book, tmp_path, monkeypatch, capsys
):
    """Two questions in one program, the third in another; the answers are those of one conversation."""
    questions = ["Who fell?", "Why?", "And then?"]
    memory = [str(book[1])] if with_memory else []
    typed(monkeypatch, f"{questions[0]}\n\n  {questions[1]} \n")
    ask.main(
        [
            str(folder),
            *memory,
            "--interactive",
            "--max-new-tokens",
            "9",
            "--save",
            str(tmp_path / "after"),
        ]
    )
    ask.main([str(folder), str(tmp_path / "after"), questions[2], "--max-new-tokens", "9"])
    printed = capsys.readouterr()
    assert printed.err == f"wrote {tmp_path / 'after'}\n"
    talk = Conversation(model, tokenizer, CometCache())
    if with_memory:
        talk = Conversation(model, tokenizer, CometCache.load(book[1]), encode(tokenizer, "\n\n"))
    answers = [
        tokenizer.decode(talk.ask(question, 9), skip_special_tokens=True) for question in questions
    ]
    assert printed.out == "".join(f"{answer}\n" for answer in answers)


def test_an_interrupted_answer_leaves_the_conversation_valid(folder, tmp_path):
    """The signal reaches the real program while it answers."""
    process = subprocess.Popen(
        start("ask", folder, "--interactive", "--max-new-tokens", 100_000, "--save", tmp_path / "after"),
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    try:
        process.stdin.write(b"Who fell?\n")
        process.stdin.flush()
        assert process.stdout.read(1)  # it answers
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, errors
    cache = CometCache.load(tmp_path / "after")
    assert cache.notes["opening"]
    assert not list(tmp_path.glob("*.part"))


def test_sampling(folder, book, capsys):
    def sampled():
        torch.manual_seed(3)
        ask.main(
            [str(folder), str(book[1]), "Who?", "--temperature", "5", "--max-new-tokens", "12"]
        )
        return capsys.readouterr().out

    one = sampled()
    assert one == sampled()
    ask.main([str(folder), str(book[1]), "Who?", "--max-new-tokens", "12"])
    assert capsys.readouterr().out != one


# ---- what is refused


def refusal(program, *arguments):
    with pytest.raises(UserError) as caught:
        program.main([str(argument) for argument in arguments])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_that_cannot_be_read(folder, tmp_path):
    (tmp_path / "empty").write_text("")
    (tmp_path / "blank").write_text(" \n\n")
    (tmp_path / "latin").write_bytes(b"A caf\xe9 in the town")
    (tmp_path / "cut").write_bytes("café".encode()[:-1])
    save = ["--save", tmp_path / "memory"]
    assert (
        refusal(read, folder, tmp_path / "none.txt", *save)
        == f"{tmp_path}/none.txt: cannot be read: No such file or directory"
    )
    assert "Is a directory" in refusal(read, folder, tmp_path, *save)
    assert refusal(read, folder, tmp_path / "empty", *save) == f"{tmp_path}/empty: holds no text"
    assert refusal(read, folder, tmp_path / "blank", *save) == f"{tmp_path}/blank: holds no text"
    assert "latin: is not text in UTF-8 (invalid continuation byte at byte 5)" in refusal(
        read, folder, tmp_path / "latin", *save
    )
    assert "cut: is not text in UTF-8 (unexpected end of data at byte 3)" in refusal(
        read, folder, tmp_path / "cut", *save
    )
    assert not (tmp_path / "memory").exists()


@pytest.mark.parametrize("pieces", [32, 7])
def test_the_wrong_byte_is_found_in_later_pieces(pieces, tmp_path, monkeypatch):
    monkeypatch.setattr(read, "PIECE", pieces)
    (tmp_path / "t").write_bytes("ä€ ".encode() * 30 + b"\xff rest")
    with pytest.raises(UserError, match="at byte 180"):
        read.check_text(str(tmp_path / "t"))


def test_targets_that_cannot_be_written(folder, book, tmp_path):
    file, memory = book
    assert "is there already" in refusal(read, folder, file, "--save", memory)
    assert "is there already" in refusal(ask, folder, memory, "Who?", "--save", memory)
    assert "is a folder" in refusal(read, folder, file, "--save", tmp_path)
    assert f"there is no folder {tmp_path}/none" in refusal(
        read, folder, file, "--save", tmp_path / "none" / "memory"
    )
    assert "--save" in refusal(read, folder, file)
    (tmp_path / "old").write_text("old")
    read.main([str(folder), str(file), "--save", str(tmp_path / "old"), "--force"])
    same_cache(CometCache.load(tmp_path / "old"), CometCache.load(memory), 0)


def test_models_that_cannot_be_loaded(folder, book, tmp_path):
    rest = [book[0], "--save", tmp_path / "memory"]
    assert refusal(read, "./none", *rest) == "MODEL: no such folder: ./none"
    assert "holds neither" in refusal(read, tmp_path, *rest)
    assert "not a readable checkpoint" in refusal(read, book[0], *rest)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert f"MODEL: {tmp_path}/bare: cannot be loaded" in refusal(read, tmp_path / "bare", *rest)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "bare" / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "bare" / "model.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes()[:-100]
    )
    assert f"MODEL: {tmp_path}/bare: cannot be loaded" in refusal(read, tmp_path / "bare", *rest)


def test_memories_that_do_not_fit(folder, tokenizer, book, tmp_path):
    memory = book[1]
    assert "no such memory file" in refusal(ask, folder, tmp_path / "none", "Who?")
    assert "is a folder" in refusal(ask, folder, tmp_path, "Who?")
    (tmp_path / "cut").write_bytes(memory.read_bytes()[:-100])
    assert f"{tmp_path}/cut: not a readable CometCache file" in refusal(
        ask, folder, tmp_path / "cut", "Who?"
    )
    assert "not a readable CometCache file" in refusal(ask, folder, book[0], "Who?")
    assert "chunk_size" not in refusal(
        read, folder, book[0], "--onto", tmp_path / "cut", "--save", tmp_path / "new"
    )
    CometCache.load(memory).save(tmp_path / "bare", notes={})
    assert "not one that python -m comet_pl.read wrote" in refusal(
        ask, folder, tmp_path / "bare", "Who?"
    )
    other = tmp_path / "other"
    for seed, layers, reason in ((1, 2, "other weights"), (0, 3, "another configuration")):
        config = backbone(layers=layers)
        config.vocab_size = len(tokenizer)
        torch.manual_seed(seed)
        CometForCausalLM(CometConfig(backbone_config=config, **MEMORY)).double().save_pretrained(
            other
        )
        tokenizer.save_pretrained(other)
        message = refusal(ask, other, memory, "Who?")
        assert message.startswith(f"{memory} (made with {folder}): ") and reason in message


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
    assert message in refusal(
        ask, folder, *(book[1] if one == "MEMORY" else one for one in arguments)
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(folder, book):
    assert "--device: cuda given" in refusal(ask, folder, book[1], "Who?", "--device", "cuda")


def test_one_line_and_exit_code_2(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ask", str(folder), str(tmp_path / "none"), "Who?"])
    with pytest.raises(SystemExit) as caught:
        run_cli(ask.main)
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", f"error: {tmp_path}/none: no such memory file\n")


def test_too_little_memory_for_the_cache(folder, book, tmp_path, monkeypatch):
    monkeypatch.setattr("comet_pl.model.cache.free_bytes", lambda device: 1000)
    message = refusal(read, folder, book[0], "--save", tmp_path / "memory")
    assert message.startswith(f"{folder}: the memory of 1 text")
    assert not (tmp_path / "memory").exists()


def test_reading_that_breaks_off_leaves_no_file(folder, tmp_path, monkeypatch):
    typed(monkeypatch, TEXT.encode() * 3 + b"\xff")
    assert "standard input: is not text" in refusal(
        read, folder, "-", "--save", tmp_path / "memory"
    )
    assert list(tmp_path.iterdir()) == []


# ---- a real model


@pytest.mark.slow
def test_a_real_model_reads_a_book(shared_data, tmp_path):
    real = ROOT / "models" / "smollm2_135m"
    if not real.is_dir():
        pytest.skip("no models/smollm2_135m; make smollm2 makes it")
    (tmp_path / "book.txt").write_bytes(
        (shared_data / "books" / "pride_and_prejudice.txt").read_bytes()[:20_000]
    )
    done = run("read", real, tmp_path / "book.txt", "--save", tmp_path / "memory")
    assert done.returncode == 0, done.stderr
    done = run("ask", real, tmp_path / "memory", "Who wrote this book?", "--max-new-tokens", "12")
    assert done.returncode == 0, done.stderr
    loaded = any_model.load(str(real), {})
    tokenizer, (before, after) = loaded.tokenizer, frame(loaded.tokenizer)
    text = (tmp_path / "book.txt").read_text().removeprefix("\ufeff")
    words = [encode(tokenizer, part) for part in (text, "\n\n", "Who wrote this book?")]
    ids = [*before, *(i for part in words for i in part), *after]
    assert (
        done.stdout
        == tokenizer.decode(greedy(loaded.model, tokenizer, ids, 12), skip_special_tokens=True)
        + "\n"
    )
