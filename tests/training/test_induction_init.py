"""A decoder from scratch that starts with lookups: what its heads do before any training, and what
it learns in a few steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, Qwen2Config

from comet_pl import CometConfig, CometForCausalLM
from comet_pl.build import build_model
from comet_pl.config.load import load
from comet_pl.training.induction_init import start_lookups
from data.tokenizer import train_tokenizer

KEYS, VALUES, PAIRS = 200, 30, 6
FILLER, ASK = 0, 1


def model(offsets: list[int] | None, kind: type = Qwen2Config, **options: int) -> CometForCausalLM:
    sizes = {
        "hidden_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 64,
    } | options
    more = {"intermediate_size": 192, "initializer_range": 0.1, "tie_word_embeddings": True}
    rope = {"rope_type": "default", "rope_theta": 1e4}
    torch.manual_seed(0)
    decoder = kind(vocab_size=2 + KEYS + VALUES, rope_parameters=rope, **more, **sizes)
    made = CometForCausalLM(
        CometConfig(
            backbone_config=decoder,
            chunk_size=64,
            global_size=2,
            compression_stride=32,
            temporary_capacity=4,
        )
    )
    if offsets is not None:
        start_lookups(made, offsets)
    return made


def rows(count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """`KEY . VALUE . ` six times and `KEY ?`, (count, 4 * 6 + 3); and the value that is asked for,
    each (count,)."""
    keys = torch.stack([torch.randperm(KEYS, generator=random)[:PAIRS] for _ in range(count)]) + 2
    values = (
        torch.stack([torch.randperm(VALUES, generator=random)[:PAIRS] for _ in range(count)])
        + 2
        + KEYS
    )
    filler = torch.full_like(keys, FILLER)
    history = torch.stack([keys, filler, values, filler], dim=2).flatten(1)
    asked = torch.randint(PAIRS, (count, 1), generator=random)
    ends = [torch.full((count, 1), token) for token in (FILLER, ASK)]
    return torch.cat([history, keys.gather(1, asked), *ends], dim=1), values.gather(1, asked)[:, 0]


def right_after(made: CometForCausalLM, steps: int) -> float:
    """Share of lookups that are right, of 400 with new keys, after so many steps of 32 rows."""
    random = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(made.parameters(), lr=2e-3, weight_decay=0.0)
    for _ in range(steps):
        ids, answers = rows(32, random)
        torch.nn.functional.cross_entropy(
            made(ids, use_cache=False, logits_to_keep=1).logits[:, -1], answers
        ).backward()
        optimizer.step()
        optimizer.zero_grad()
    ids, answers = rows(400, random)
    with torch.no_grad():
        return float(
            (made(ids, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(-1) == answers)
            .float()
            .mean()
        )


def test_heads_of_the_first_layer_look_back_as_far_as_they_are_told():
    """Scores of the biases alone, by the rotation's definition, are highest at the offset and fall
    on both sides."""
    made = model([2, 5])
    attention = made.model.layers[0].self_attn
    query, key = (
        bias.detach().view(2, 2, 32) for bias in (attention.q_proj.bias, attention.k_proj.bias)
    )  # (heads, halves, 32)
    theta = 1e4 ** (-torch.arange(32) / 32)
    for head, offset in enumerate([2, 5]):
        scores = []
        for distance in range(20):  # the query's position minus the key's
            turn = torch.polar(torch.ones(32), theta * distance)
            q, k = (torch.complex(halves[head, 0], halves[head, 1]) for halves in (query, key))
            scores.append(float((q * turn * k.conj()).real.sum()) / 64**0.5)
        assert max(range(20), key=scores.__getitem__) == offset
        assert scores[offset] == pytest.approx(35.0, rel=1e-5)
        assert (
            scores[offset] - scores[offset + 2] > 1.5 and scores[offset] - scores[offset - 2] > 1.5
        )


def test_lookups_are_learnt_at_once():
    assert right_after(model([2, 2]), 60) > 0.9
    assert right_after(model(None), 60) < 0.4  # of six values one is right by chance


def test_a_conf_asks_for_it():
    keys = ["model_type=qwen2", "num_attention_heads=2", "num_key_value_heads=2"]
    tokenizer = train_tokenizer(["a key"], 300)
    for more, expected in ([], 0.0), (["lookback=[1,2]"], 35.0):
        made = build_model(
            load(["conf=passkey", *(f"backbone.{key}" for key in [*keys, *more])]), tokenizer
        )
        attention = made.model.layers[0].self_attn
        assert float(
            (attention.q_proj.bias.norm() * attention.k_proj.bias.norm()).detach()
        ) / 2 / 32**0.5 == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("offsets", "kind", "options", "message"),
    [
        ([1], Qwen2Config, {}, r"lookback: \[1\] given, one offset for each of the 2 heads"),
        (
            [1, 2],
            Qwen2Config,
            {"num_key_value_heads": 1},
            "as many key/value heads as the 2 query heads, not 1",
        ),
        ([1, 2], Qwen2Config, {"num_hidden_layers": 1}, "two layers or more"),
        ([1, 2], LlamaConfig, {}, "model_type: qwen2"),
    ],
)
def test_decoders_that_cannot_start_so(
    offsets: list[int], kind: type, options: dict[str, int], message: str
):
    with pytest.raises(ValueError, match=message):
        model(offsets, kind, **options)
