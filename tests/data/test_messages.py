"""Messages to tokens, with loss on the assistant's texts and stop tokens and nothing else."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from comet_pl.errors import UserError
from data.jsonl import UnusableRow
from data.messages import ROLES, Message, check_messages, render
from data.tokenizer import AGENT_TOKENS, train_tokenizer
from data.tool_calls import Call, parse_action

TEXTS = [
    "the order W12 was sent to Zürich on 2024-05-01\n\n",
    '<tool_call>\n{"name": "find", "arguments": {"city": "Rome"}}\n</tool_call>',
] * 4


def tokenizer(template: str | None, *special: str, eos: str = "<|end|>") -> PreTrainedTokenizerFast:
    made = train_tokenizer(TEXTS, 330, [*AGENT_TOKENS, *special])
    made.eos_token = eos
    made.chat_template = template
    # as many have it; ours has not
    made.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return made


OURS = train_tokenizer(TEXTS, 330, AGENT_TOKENS)
BEGIN, STOP = "<|im_start|>", "<|im_end|>"
CHATML_TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
CHATML = tokenizer(
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML_TURN + "{% endfor %}",
    BEGIN,
    STOP,
)
# as Qwen3's: results in a row share one user turn, old thoughts go, the last turn gets an empty one
QWEN = tokenizer(
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if loop.first or loop.previtem.role != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') + '<|im_end|>\n' }}{% else %}"
    + CHATML_TURN
    + "{% endif %}{% endfor %}",
    BEGIN,
    STOP,
    eos=STOP,
)
# as Llama's: texts trimmed, results in JSON
LLAMA = tokenizer(
    "<|begin|>{% for m in messages %}{{ '<|header|>' + m.role + '<|header_end|>\n\n' }}"
    "{% if m.role == 'tool' %}{{ m.content | tojson }}{% else %}{{ m.content | trim }}{% endif %}"
    "<|eot|>{% endfor %}",
    "<|begin|>",
    "<|header|>",
    "<|header_end|>",
    "<|eot|>",
)
# as Mistral's first: no tools, no header for the assistant, spaces around its text
MISTRAL = tokenizer(
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + ' ' + eos_token }}"
    "{% elif m.role != 'tool' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
ALL = {"ours": OURS, "chatml": CHATML, "qwen": QWEN, "llama": LLAMA, "mistral": MISTRAL}
ALL["plain"] = tokenizer(None)
STOPS = dict.fromkeys(ALL, "<|end|>") | {"chatml": STOP, "qwen": STOP}
STOPS |= {"llama": "<|eot|>", "mistral": " <|end|>"}

names = st.sampled_from(["find", "book_flight"])
values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 999) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=2),
    max_leaves=3,
)
calls = st.builds(
    Call, names, st.dictionaries(st.text(max_size=4), values, max_size=2) | st.just("no JSON")
)
SPECIAL = ["<|end|>", "Hi<|im_end|>", "<|user|> x", "<|eot|>\n", "[INST]", "\u20631\u2063"]
SPACES = [" two  spaces ", "\n\n\nab", "\n\n"]
words = st.text('ab \n.é😀{"', max_size=8) | st.sampled_from(SPECIAL + SPACES)


@st.composite
def conversations(draw) -> list[Message]:
    found = []
    for role in draw(st.lists(st.sampled_from(ROLES), min_size=1, max_size=7)):
        made = tuple(draw(st.lists(calls, max_size=2))) if role in ("user", "assistant") else ()
        message = Message(role, draw(words), made)
        found.append(message if message.text.strip() or role == "tool" else Message(role, "so"))
    return found


@pytest.mark.parametrize("name", ALL)
@given(messages=conversations(), supervise=st.sampled_from(["assistant", 1, 2]))
def test_loss_is_on_the_assistants_texts_and_stop_tokens_and_on_nothing_else(
    name, messages, supervise
):
    tok, stop = ALL[name], STOPS[name]
    found = render(tok, messages, supervise)
    assert [turn.role for turn in found.turns] == [message.role for message in messages]
    chosen = [number for number, message in enumerate(messages) if message.role == "assistant"]
    chosen = chosen if supervise == "assistant" else chosen[-supervise:]
    expected = np.zeros(len(found.ids), dtype=bool)
    for number in chosen:
        turn, text = found.turns[number], messages[number].text
        text = text.strip() if name == "llama" else text.lstrip("\n") if name == "qwen" else text
        assert tok.decode(found.ids[turn.content : turn.end]) == text + stop
        assert not found.mask[turn.start : turn.content].any()
        expected[turn.content : turn.end] = True
    assert (found.mask == expected).all()
    ends = [0, *(turn.end for turn in found.turns)]
    assert [turn.start for turn in found.turns] == ends[:-1]
    assert all(turn.start <= turn.content <= turn.end for turn in found.turns)


@pytest.mark.parametrize("name", ["ours", "chatml", "qwen", "llama"])
@given(messages=conversations())
def test_the_tokens_are_the_templates_own(name, messages):
    tok = ALL[name]
    chat = [{"role": message.role, "content": message.text} for message in messages]
    found = render(tok, messages).ids.tolist()
    assert tok.decode(found) == tok.apply_chat_template(chat, tokenize=False)
    special = set(tok.get_added_vocab())
    as_text = any(token in message.text for message in messages for token in special)
    # a text that opens with white space merges with its header, and so do headers that end in two
    # new lines
    merging = any(
        one.role == "assistant" and (one.text[0].isspace() or name in ("qwen", "llama"))
        for one in messages
    )
    if not as_text and not merging:
        assert found == tok.apply_chat_template(chat)["input_ids"]


@pytest.mark.parametrize("name", ALL)
def test_special_tokens_in_a_text_are_only_text(name):
    tok = ALL[name]
    special = sorted(tok.get_added_vocab())
    messages = [
        Message("user", "Say it"),
        Message("assistant", "Yes"),
        Message("user", " ".join(special)),
        Message("assistant", "".join(special)),
    ]
    harmless = [Message(one.role, one.text.replace("<", "(")) for one in messages]
    count = [
        sum(int(token) in tok.get_added_vocab().values() for token in render(tok, chat).ids)
        for chat in (messages, harmless)
    ]
    assert count[0] == count[1]
    last = render(tok, messages, 1)
    assert tok.decode(last.ids[last.mask]) == "".join(special) + STOPS[name]


def said(content, *calls) -> dict:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def test_our_own_template():
    arguments = {"b": 1, "a": "é"}
    chat = [
        {"role": "system", "content": "Help."},
        {"role": "user", "content": "Rome?"},
        said(None, {"id": "1", "name": "find", "arguments": arguments}),
        {"role": "tool", "content": "", "tool_call_id": "1"},
        said("No."),
    ]
    messages = check_messages({"messages": chat})
    found = render(OURS, messages)
    call = '<tool_call>\n{"name": "find", "arguments": {"b": 1, "a": "é"}}\n</tool_call>'
    shown = f"<|system|>Help.<|user|>Rome?<|assistant|>{call}<|end|><|tool|><|assistant|>No.<|end|>"
    assert OURS.decode(found.ids) == shown
    assert OURS.decode(found.ids[found.mask]) == f"{call}<|end|>No.<|end|>"
    assert found.ids.dtype == np.int32 and found.mask.dtype == bool
    assert parse_action(messages[2].text) == ("find", arguments)
    assert [turn.content - turn.start for turn in found.turns] == [1] * 5


def test_results_are_users_turns_where_a_template_knows_no_tools():
    call = Message("assistant", "", (Call("find", {}),))
    text = MISTRAL.decode(
        render(MISTRAL, [Message("user", "u"), call, Message("tool", "found")]).ids
    )
    result = "[INST] <tool_response>\nfound\n</tool_response> [/INST]"
    assert text.endswith(f"</tool_call> <|end|>{result}")


def test_thoughts_that_the_template_drops_have_no_loss():
    thought = Message("assistant", "<think>\nhm\n</think>\n\nSo")
    later = [Message("user", "v"), Message("assistant", "Yes")]
    found = render(QWEN, [Message("user", "u"), thought, *later])
    assert QWEN.decode(found.ids[found.mask]) == f"So{STOP}Yes{STOP}"
    header = QWEN.decode(found.ids[found.turns[3].start : found.turns[3].content])
    assert header == "\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


EACH, LAST = "{% for m in messages %}", "{% endfor %}"


@pytest.mark.parametrize(
    ("template", "line"),
    [
        (
            EACH + "{{ m.content | upper }}<|end|>" + LAST,
            r"changes the text of messages\[0\]",
        ),
        (
            EACH + "{% if m.role != 'system' %}{{ m.content }}{% endif %}<|end|>" + LAST,
            r"leaves out messages\[0\], of role system",
        ),
        ("{{ raise_exception('No system role') }}", "refuses them: No system role"),
        (
            EACH + "{{ m.content }}\n" + LAST,
            "backbone.path: .* ends the assistant's turns with no special token",
        ),
    ],
)
def test_a_template_that_cannot_be_taken_apart_is_refused(template, line):
    messages = [Message("system", "abc"), Message("user", "u"), Message("assistant", "a")]
    with pytest.raises(UserError, match=line):
        render(tokenizer(template), messages)


# -- rows


def test_messages_in_every_shape():
    parts = [{"type": "text", "text": "one, "}, {"type": "text", "text": "two"}]
    function = {"name": "f", "arguments": '{"x": [1, 2.5]}'}
    several = [{"id": "b", "name": "g", "arguments": {}}, {"name": "h", "arguments": ""}]
    texts = [{"name": "broken", "arguments": "{x: 1"}, {"name": "list", "arguments": "[1]"}]
    row = [
        {"role": "user", "content": parts, "name": "Ann"},
        {
            "role": "assistant",
            "tool_calls": [{"id": "a", "type": "function", "function": function}],
        },
        {"role": "tool", "content": "1", "tool_call_id": "a", "name": "f"},
        said("then", *several),
        {"role": "tool", "content": "2", "tool_call_ids": ["b"]},
        {"role": "tool", "content": None},
        {"role": "user", "content": "", "tool_calls": texts},
        {"role": "assistant", "content": "done", "tool_calls": None},
    ]
    expected = [
        Message("user", "one, two"),
        Message("assistant", "", (Call("f", {"x": [1, 2.5]}),)),
        Message("tool", "1"),
        Message("assistant", "then", (Call("g", {}), Call("h", {}))),
        Message("tool", "2"),
        Message("tool", ""),
        Message("user", "", (Call("broken", "{x: 1"), Call("list", "[1]"))),
        Message("assistant", "done"),
    ]
    assert check_messages({"messages": row}) == expected
    assert check_messages({"messages": json.dumps(row)}) == expected
    assert parse_action(expected[6].text) == ("broken", "{x: 1")


def user(content, **keys) -> dict:
    return {"role": "user", "content": content, **keys}


def result(**ids) -> dict:
    return {"role": "tool", "content": "1", **ids}


ASKS = said("", {"id": "call_1", "function": {"name": "f"}})
UNKNOWN = "given, no call before it has this id"


@pytest.mark.parametrize(
    ("messages", "key", "line"),
    [
        (None, "", "None given, a list of messages is needed"),
        ([], "", "empty, a list of messages is needed"),
        ("[{", "", "text that is not JSON: Expecting property name"),
        ({"role": "user"}, "", "{'role': 'user'} given, a list"),
        (["hi"], "[0]", "an object is needed, but this is a str"),
        (
            [user("u"), {"role": "asistant", "content": "x"}],
            "[1].role",
            "'asistant' given (did you mean assistant?), allowed: system, user, assistant, tool",
        ),
        ([{"content": "x"}], "[0].role", "missing, allowed: system, user"),
        ([user("u"), said(None)], "[1].content", "null, and no tool_calls"),
        ([user(" \n")], "[0].content", "empty, and no tool_calls"),
        ([user(5)], "[0].content", "5 given, allowed: text, null, or a list of text parts"),
        ([user([{"type": "image"}])], "[0].content[0]", "type 'image' given, allowed: text"),
        ([user("\ud800")], "[0].content", "not Unicode text"),
        (
            [{**ASKS, "role": "system"}],
            "[0].tool_calls",
            "given with role system, allowed: with user and assistant",
        ),
        (
            [said("", "f")],
            "[0].tool_calls[0]",
            "'f' given, a name is needed, in it or in its function",
        ),
        ([user("", tool_calls="f")], "[0].tool_calls", "'f' given, a list is needed"),
        ([user("u"), result()], "[1]", "a tool's result, but no message before it calls a tool"),
        (
            [ASKS, result(tool_call_id="call_2")],
            "[1].tool_call_id",
            f"'call_2' {UNKNOWN} (did you mean call_1?)",
        ),
        ([ASKS, result(tool_call_id={"id": 1})], "[1].tool_call_id", f"{{'id': 1}} {UNKNOWN}"),
        (
            [ASKS, result(tool_call_ids=["call_1", "x"])],
            "[1].tool_call_ids[1]",
            f"'x' {UNKNOWN}",
        ),
    ],
)
def test_malformed_messages_are_named(messages, key, line):
    with pytest.raises(UnusableRow, match=re.escape(f"messages{key}: {line}")) as error:
        check_messages({"messages": messages})
    assert "\n" not in str(error.value)


def test_no_messages_at_all():
    with pytest.raises(UnusableRow, match="messages: missing"):
        check_messages({"uniq_id": "1"})


# -- real rows


@pytest.mark.parametrize("name", ["ours", "qwen"])
def test_real_traces(shared_data, name):
    tok, paths = ALL[name], sorted((shared_data / "agent").glob("*.jsonl"))
    for path in paths:
        for line in path.read_text().splitlines()[:6]:
            messages = check_messages(json.loads(line))
            found = render(tok, messages)
            said = [message.text for message in messages if message.role == "assistant"]
            said = [text.lstrip("\n") for text in said] if name == "qwen" else said
            assert tok.decode(found.ids[found.mask]) == "".join(text + STOPS[name] for text in said)
    assert paths


def test_smollm2(shared_data):
    folder = Path(__file__).parents[2] / "models" / "smollm2_135m"
    if not folder.is_dir():
        pytest.skip("no models/smollm2_135m: make smollm2 makes it")
    tok = AutoTokenizer.from_pretrained(folder)
    for path in sorted((shared_data / "agent").glob("*.jsonl")):
        messages = check_messages(json.loads(path.open().readline()))
        found = render(tok, messages)
        assert tok.decode(found.ids) == tok.apply_chat_template(
            [{"role": one.role, "content": one.text} for one in messages], tokenize=False
        )
        assert tok.decode(found.ids[found.mask]) == "".join(
            one.text + STOP for one in messages if one.role == "assistant"
        )
