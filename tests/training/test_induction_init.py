"""A decoder from scratch that starts with lookups: its heads before any training, and what it
learns in a few steps."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, Qwen2Config

from comet_pl import CometConfig, CometForCausalLM
from comet_pl.build import build_model
from comet_pl.config.load import load
from comet_pl.training.induction_init import start_lookups
from data.tokenizer import train_tokenizer

KEYS, VALUES, PAIRS = 200, 30, 6
FILLER, ASK = 0, 1
SIZES = {
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 192,
    "initializer_range": 0.1,
    "tie_word_embeddings": True,
    "vocab_size": 2 + KEYS + VALUES,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
COMET = {"chunk_size": 64, "global_size": 2, "compression_stride": 32, "temporary_capacity": 4}


def model(offsets, kind=Qwen2Config, **options):
    torch.manual_seed(0)
    made = CometForCausalLM(CometConfig(backbone_config=kind(**SIZES | options), **COMET))
    if offsets is not None:
        start_lookups(made, offsets)
    return made


def rows(count, random):
    """`KEY . VALUE . ` six times and `KEY ?`, (count, 4 * 6 + 3); and the values asked for."""
    keys = torch.stack([torch.randperm(KEYS, generator=random)[:PAIRS] for _ in range(count)]) + 2
    values = torch.stack([torch.randperm(VALUES, generator=random)[:PAIRS] for _ in range(count)])
    values += 2 + KEYS
    filler = torch.full_like(keys, FILLER)
    history = torch.stack([keys, filler, values, filler], dim=2).flatten(1)
    asked = torch.randint(PAIRS, (count, 1), generator=random)
    ends = [torch.full((count, 1), token) for token in (FILLER, ASK)]
    return torch.cat([history, keys.gather(1, asked), *ends], dim=1), values.gather(1, asked)[:, 0]


def right_after(made, steps):
    """Share of right answers to 400 lookups of new keys, after so many steps of 32 rows."""
    random = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(made.parameters(), lr=2e-3, weight_decay=0.0)
    for _ in range(steps):
        ids, answers = rows(32, random)
        logits = made(ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        cross_entropy(logits, answers).backward()
        optimizer.step()
        optimizer.zero_grad()
    ids, answers = rows(400, random)
    with torch.no_grad():
        guesses = made(ids, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(-1)
    return float((guesses == answers).float().mean())


def test_heads_of_the_first_layer_look_back_by_their_offsets():
    """Scores of the biases alone, by the rotation's definition, peak at the offset."""
    attention = model([2, 5]).model.layers[0].self_attn
    biases = attention.q_proj.bias, attention.k_proj.bias
    halves = [bias.detach().view(2, 2, 32) for bias in biases]  # (heads, halves, 32)
    theta = 1e4 ** (-torch.arange(32) / 32)
    for head, offset in enumerate([2, 5]):
        q, k = (torch.complex(half[head, 0], half[head, 1]) for half in halves)
        scores = []
        for distance in range(20):  # the query's position minus the key's
            turn = torch.polar(torch.ones(32), theta * distance)
            scores.append(float((q * turn * k.conj()).real.sum()) / 64**0.5)
        assert max(range(20), key=scores.__getitem__) == offset
        assert scores[offset] == pytest.approx(35.0, rel=1e-5)
        assert scores[offset] - max(scores[offset + 2], scores[offset - 2]) > 1.5


@pytest.mark.slow
def test_lookups_are_learnt_at_once():
    assert right_after(model([2, 2]), 60) > 0.9
    assert right_after(model(None), 60) < 0.4  # of six values one is right by chance


def test_a_conf_asks_for_it():
    tokenizer = train_tokenizer(["a key"], 300)
    keys = ["conf=passkey", "backbone.model_type=qwen2"]
    keys += ["backbone.num_attention_heads=2", "backbone.num_key_value_heads=2"]
    for more, expected in ([], 0.0), (["backbone.lookback=[1,2]"], 35.0):
        attention = build_model(load([*keys, *more]), tokenizer).model.layers[0].self_attn
        norms = attention.q_proj.bias.norm() * attention.k_proj.bias.norm()
        assert float(norms.detach()) / 2 / 32**0.5 == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("offsets", "kind", "options", "message"),
    [
        ([1], Qwen2Config, {}, r"lookback: \[1\] given, one offset for each of the 2 heads"),
        ([1, 2], Qwen2Config, {"num_key_value_heads": 1}, "as the 2 query heads, not 1"),
        ([1, 2], Qwen2Config, {"num_hidden_layers": 1}, "two layers or more"),
        ([1, 2], LlamaConfig, {}, "model_type: qwen2"),
    ],
)
def test_decoders_that_cannot_start_so(offsets, kind, options, message):
    with pytest.raises(ValueError, match=message):
        model(offsets, kind, **options)
