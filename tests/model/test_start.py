"""What memory begins as beside a decoder that has learnt without it, and that it is kept."""

import hashlib
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from comet_pl import CometConfig, CometForCausalLM
from comet_pl.config.load import load
from comet_pl.errors import UserError
from comet_pl.experiment.new_model import new_model, start_token
from comet_pl.model.identity import RUNTIME, SETTINGS, Fingerprint
from comet_pl.model.memory import is_memory
from comet_pl.training.trainable import count_parameters
from data.tokenizer import train_tokenizer
from tests.support.models import EXACT, FAMILIES, MEMORY, VOCABULARY, backbone, text, tiny
from tests.support.tiny_runs import TINY

NEW = 1 + MEMORY["global_size"]


def decoder(family="qwen3", **more):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(backbone(family, **more)).double().eval()


@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_begin_as_a_tokens(tied):
    row = decoder(tie_word_embeddings=tied).model.embed_tokens.weight[7].clone()
    heads = decoder(tie_word_embeddings=tied).lm_head.weight[7].clone()
    model = CometForCausalLM.from_decoder(decoder(tie_word_embeddings=tied), MEMORY, start=7)
    assert torch.equal(model.model.embed_tokens.weight[VOCABULARY:], row.expand(NEW, -1))
    assert torch.equal(model.lm_head.weight[VOCABULARY:], heads.expand(NEW, -1))
    other = CometForCausalLM.from_decoder(decoder(tie_word_embeddings=tied), MEMORY)
    assert not torch.equal(other.model.embed_tokens.weight[VOCABULARY:], row.expand(NEW, -1))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sink_begins_as_the_first_token_read_alone(family):
    plain, options = decoder(family, bos_token_id=5), MEMORY | {"sink": "learned"}
    with torch.no_grad():
        found = plain(torch.tensor([[5]]), output_hidden_states=True).hidden_states
    model = CometForCausalLM.from_decoder(plain, options)
    for cell, hidden in zip(model.model.layers, found, strict=False):
        torch.testing.assert_close(cell.sink.detach(), hidden[0, 0], **EXACT)
    counts = count_parameters(model)
    without = count_parameters(CometForCausalLM.from_decoder(decoder(family), MEMORY))
    assert counts["memory"] == without["memory"] + len(model.model.layers) * 16
    assert counts["decoder"] == without["decoder"]


@pytest.mark.parametrize("start", [-1, VOCABULARY])
def test_a_start_that_is_no_text_is_refused(start):
    with pytest.raises(ValueError, match=f"start: {start} given, allowed: ids of text, 0 to 39"):
        CometForCausalLM.from_decoder(decoder(), MEMORY, start=start)


def test_model_start_is_a_token():
    tokenizer = train_tokenizer(["the dog ran " * 9], 300)
    word = tokenizer.encode(" the", add_special_tokens=False)
    assert start_token("mean", tokenizer) is None and start_token("7", tokenizer) == 7
    assert [start_token(tokenizer.decode(word), tokenizer)] == word
    for start, what in {"zebra crossing": r"a text of \d+ tokens", "9999": "no token"}.items():
        with pytest.raises(UserError, match=f"^model.start: '{start}' given, .*{what}"):
            start_token(start, tokenizer)


def test_a_new_run_has_them(tmp_path):
    tokenizer = train_tokenizer(["the dog ran " * 9], 300)
    keys = [*TINY, "data.kind=passkey", "model.layout=trailing", "model.sink=learned"]
    model = new_model(load([*keys, "model.start=65"]), tokenizer)
    rows = model.model.embed_tokens.weight
    assert torch.equal(rows[len(tokenizer) :], rows[65].expand(3, -1))
    first = model.model.layers[0].sink
    assert torch.equal(first, rows[tokenizer.bos_token_id or tokenizer.eos_token_id])


def test_a_factor_begins_where_it_is_told(tmp_path):
    """Around a decoder, from its folder, and in a folder of its own; it changes what slots give."""
    plain, options = decoder("qwen3"), MEMORY | {"slot_scale": 0.4}
    plain.save_pretrained(tmp_path / "plain")
    model = CometForCausalLM.from_decoder(plain, options)
    other = CometForCausalLM.from_pretrained(tmp_path / "plain", comet=options)
    factors = {n: p for n, p in model.named_parameters() if n.endswith("_memory.factor")}
    assert len(factors) == 2 * len(model.model.layers)
    for name, factor in factors.items():
        assert float(factor) == pytest.approx(0.4) == float(other.get_parameter(name))
        assert is_memory(name)
    ids, plan = text(1, 12), {"chunk_sizes": [6, 6], "use_cache": False}
    with torch.no_grad():
        before = model(ids, **plan).logits
        for factor in factors.values():
            factor.fill_(0.5)
        after = model(ids, **plan).logits
    assert torch.equal(before[:, :6], after[:, :6]) and not torch.equal(before, after)
    model.save_pretrained(tmp_path / "own")
    again = CometForCausalLM.from_pretrained(tmp_path / "own", dtype=torch.float64)
    assert all(float(again.get_parameter(name)) == 0.5 for name in factors)
    with pytest.raises(ValueError, match=r"comet\['slot_scale'\]: None given, but this checkp"):
        CometForCausalLM.from_pretrained(tmp_path / "own", comet={"slot_scale": None})


def test_layout_and_sink_are_saved(tmp_path):
    model, ids = tiny(layout="trailing", sink="learned"), text(2, 17)
    model.save_pretrained(tmp_path)
    again = CometForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert (again.config.layout, again.config.sink) == ("trailing", "learned")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match=r"comet\['sink'\]: 'none' given, but this checkpoint"):
        CometForCausalLM.from_pretrained(tmp_path, comet={"sink": "none"})
    other = CometForCausalLM.from_pretrained(tmp_path, comet={"layout": "interleaved"})
    assert other.config.layout == "interleaved"


@pytest.mark.parametrize("made", [{"sink": "learned"}, {"slot_scale": 1.0}, {}])
def test_a_memory_of_another_layout_or_sink_is_refused(made):
    used = {} if made else {"layout": "trailing", "sink": "learned"}
    with torch.no_grad():
        cache = tiny(**made)(text(1, 12)).past_key_values
        with pytest.raises(ValueError, match="made by a model of another configuration"):
            tiny(**used)(text(1, 2), past_key_values=cache)


def test_memories_of_before_are_known():
    """Their fingerprint was that of a configuration without layout and sink."""
    config = CometConfig(backbone(), **MEMORY)
    facts = config.backbone_config.to_dict().items()
    settings = {key: value for key, value in facts if not key.startswith(RUNTIME)}
    content = json.dumps([settings, SETTINGS(config)], sort_keys=True, default=str)
    assert Fingerprint().of(config) == hashlib.sha256(content.encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("layout", "trail", "layout: 'trail' given, one of interleaved, trailing is needed"),
        ("slot_scale", "half", "slot_scale: 'half' given, a number or None"),
        ("sink", "yes", "sink: 'yes' given, one of none, learned is needed"),
    ],
)
def test_impossible_values(key, value, line):
    with pytest.raises(ValueError, match=line):
        CometConfig(backbone(), **MEMORY | {key: value})


def test_a_sink_without_memory_is_refused():
    with pytest.raises(ValueError, match="a model without memory has no slots"):
        CometConfig(backbone(), global_size=0, compression_stride=None, sink="learned")
