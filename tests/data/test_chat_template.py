"""The frame of a chat template: what the tokenizer itself renders around the texts."""

import copy

import pytest
from tokenizers.processors import TemplateProcessing

from comet_pl.errors import UserError
from data.chat_template import encode, frame, separator
from data.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["It was a dark night; the rain fell in torrents.\n"] * 3, 300)


def test_without_a_template_a_text_begins_as_the_tokenizer_begins_it(tokenizer):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    assert frame(plain)[0] == []
    plain.add_special_tokens({"bos_token": "<|user|>"})
    # as Llama's
    start = TemplateProcessing("<|user|> $A", special_tokens=[("<|user|>", plain.bos_token_id)])
    plain.backend_tokenizer.post_processor = start
    assert frame(plain)[0] == [plain.bos_token_id]
    plain.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(UserError, match="chat template cannot be used: no"):
        frame(plain)


def test_the_frame_is_the_template(tokenizer):
    before, after = frame(tokenizer)
    said = [("user", "It fell."), ("assistant", "Who?"), ("user", "the rain")]
    first, answer, last = (text for _, text in said)
    chat = [{"role": role, "content": text} for role, text in said]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    texts = [encode(tokenizer, text) for text in (first, answer, last)]
    parts = [before, texts[0], after, texts[1], separator(tokenizer), texts[2], after]
    ours = [i for part in parts for i in part]
    assert ours == tokenizer(rendered, add_special_tokens=False)["input_ids"]


PARTS = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize("use", [frame, separator])
@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (PARTS, "leaves out"),
        ("{{ '<|user|>always the same' }}", "leaves out"),
        ("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}", "changes"),
        ("{% for m in messages %}{{ m['content'][:3] }}{% endfor %}", "changes"),
        ("{% for m in messages %}{{ m['content'] + m['content'] }}{% endfor %}", "repeats"),
        ("{% for m in messages %}{{ m['content'] + 3 }}{% endfor %}", "can only concatenate"),
        ("{% for m in messages %}{{ 1 // 0 }}{% endfor %}", "division"),
        ("{% for m in messages %}{{ m['content'] }", "unexpected"),
    ],
)
def test_a_template_that_loses_the_words_is_refused(tokenizer, use, template, reason):
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    with pytest.raises(UserError, match=reason):
        use(other)


def test_a_template_that_forgets_earlier_turns_is_refused(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ messages[-1]['content'] }}"
    assert frame(other) == ([], [])
    with pytest.raises(UserError, match="leaves out"):
        separator(other)
