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
