"""Pieces of a text decode to the whole, whatever a tokenizer does at the beginning of a text."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from comet_pl.errors import UserError
from data import encoding
from data.chat_template import answer_start, frame, separator
from data.encoding import begins_after, encode, stream, windows
from data.messages import Message, render
from data.scrolls import Frame
from data.tokenizer import train_tokenizer

WORDS = "[INST] the quick brown fox jumps over the lazy dog [/INST] hello there is seven.\n"
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role']=='user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
)
HEADERS = (
    "{% for m in messages %}{{ '<s>' if m['role']=='user' else '<unk>' }}{{ m['content'] }}"
    "{{ eos_token if m['role']=='assistant' }}{% endfor %}{{ '<unk>' if add_generation_prompt }}"
)


def made(kind: str, template: str | None = LLAMA) -> PreTrainedTokenizerFast:
    """A tokenizer as SentencePiece's are (Prepend or Metaspace), or a byte-level one."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    space = decoders.Replace("▁", " ")
    backend.decoder = decoders.Sequence([space, decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    alphabet = []
    if kind == "prepend":
        spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        backend.normalizer = normalizers.Sequence(spaces)
    elif kind.startswith("bytes"):
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "bytes first")
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind)
    special = {"special_tokens": ["<unk>", "<s>", "</s>"], "initial_alphabet": alphabet}
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, **special)
    backend.train_from_iterator([WORDS] * 50, trainer)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **names)


KINDS = ("prepend", "first", "always", "never", "bytes", "bytes first")
CHAT = [("user", "the quick fox"), ("assistant", "hello there"), ("user", "is the dog"),
        ("assistant", "seven")]  # fmt: skip


@pytest.mark.parametrize("template", [LLAMA, HEADERS])
@pytest.mark.parametrize("kind", KINDS)
def test_a_rendered_chat_decodes_to_the_templates_own_tokens(kind, template):
    tokenizer = made(kind, template)
    chat = [{"role": role, "content": text} for role, text in CHAT]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    whole = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])
    ours = render(tokenizer, [Message(*turn) for turn in CHAT])
    assert tokenizer.decode(ours.ids.tolist()) == whole
    learned = tokenizer.decode(ours.ids[ours.mask].tolist())
    assert learned.replace(" ", "") == "hellothere</s>seven</s>"


@pytest.mark.parametrize("template", [LLAMA, HEADERS])
@pytest.mark.parametrize("kind", KINDS)
def test_question_document_and_answer_decode_to_what_the_template_writes(kind, template):
    tokenizer = made(kind, template)
    around = Frame(tokenizer, 500)
    asked = around.question("the quick fox\n\n")
    document, _ = around.document("hello there", asked)
    answer = around.answer("seven")
    ids = np.concatenate([around.before, asked, document, around.after, answer])
    said = {"user": "the quick fox\n\nhello there", "assistant": "seven"}
    chat = [{"role": role, "content": text} for role, text in said.items()]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids.tolist()) == tokenizer.decode(whole)


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_question_of_a_conversation(kind):
    tokenizer = made(kind)
    before, after = frame(tokenizer)
    between, start = separator(tokenizer), answer_start(tokenizer)
    parts = [before, encode(tokenizer, "the dog", begins_after(tokenizer, before)), after]
    parts += [encode(tokenizer, f"{start}hello"), between, encode(tokenizer, "seven"), after]
    chat = [("user", "the dog"), ("assistant", "hello"), ("user", "seven")]
    chat = [{"role": role, "content": text} for role, text in chat]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode([i for part in parts for i in part]) == tokenizer.decode(whole)


@pytest.mark.parametrize("kind", KINDS)
def test_windows_have_the_ids_of_the_whole(kind, monkeypatch):
    monkeypatch.setattr(encoding, "WINDOW", 300)
    monkeypatch.setattr(encoding, "MARGIN", 40)
    tokenizer, draw = made(kind), random.Random(kind)
    gaps = [" ", " ", " ", "\n", "  ", " \n", "\n\n", ""]
    text = "".join(draw.choice(WORDS.split()) + draw.choice(gaps) for _ in range(3000))
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = [text[start : start + 77] for start in range(0, len(text), 77)]
    assert encode(tokenizer, text, begins=True) == whole
    assert [i for ids in stream(tokenizer, pieces, begins=True) for i in ids] == whole
    parts = list(windows(tokenizer, [text], begins=True))
    assert len(parts) > 10
    for part in parts:
        spans = zip(part.starts, part.ends, strict=True)
        assert all(0 <= start <= end <= len(text) for start, end in spans)


@settings(max_examples=30)
@given(st.lists(st.text("ab \n.▁é", max_size=30), max_size=4))
@pytest.mark.parametrize("kind", ["prepend", "always", "bytes"])
def test_pieces_are_tokenised_as_one_text(kind, pieces):
    tokenizer = made(kind)
    ids = [i for part in stream(tokenizer, pieces) for i in part]
    assert ids == encode(tokenizer, "".join(pieces))


def test_a_text_without_a_place_to_cut_comes_out_whole(monkeypatch):
    monkeypatch.setattr(encoding, "WINDOW", 100)
    monkeypatch.setattr(encoding, "LARGEST_WINDOW", 400)
    tokenizer = train_tokenizer(["a b"], 300)
    # as many have it: offsets without the spaces at a token's ends
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    for text in ("\n" * 5000, "ab" * 2500, "é" * 2500, ""):
        assert tokenizer.decode(encode(tokenizer, text)) == text


def test_a_template_without_a_place_for_the_words_is_refused():
    # as multimodal ones, which take a list of parts
    template = (
        "{% for m in messages %}{% for part in m['content'] if part is mapping %}"
        "{{ part.text }}{% endfor %}{{ eos_token }}{% endfor %}"
    )
    tokenizer = made("never", template)
    for ask in (frame, separator):
        with pytest.raises(UserError, match=r"chat template .* leaves out, changes or repeats"):
            ask(tokenizer)
    tokenizer.chat_template = "{{ messages[0]['content'] + 3 }}"
    with pytest.raises(UserError, match="chat template cannot be used: can only concatenate"):
        frame(tokenizer)
