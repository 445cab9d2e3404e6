"""eval.baselines: losses against loops with Hugging Face's decoder, differences by hand."""

import math
import statistics

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from comet_pl.config.load import load
from comet_pl.errors import UserError
from comet_pl.evaluation.baselines import Baselines
from comet_pl.evaluation.text import COMET, text_curve, text_table, text_values
from comet_pl.metrics.loss_by_position import LossByPosition, LossByRow
from comet_pl.model.plain_decoder import SINKS, rotated
from data.batches import pad_rows
from tests.support.models import FAMILIES, VOCABULARY, backbone, text, tiny
from tests.support.tiny_runs import TINY

SIZE = 5
LENGTHS = (23, 16, 2, 9)


def model_and_decoder(family="qwen3", **more):
    """A CoMeT, and Hugging Face's decoder with copies of its weights and the text's rows alone."""
    model = tiny(family, chunk_size=SIZE, **more)
    decoder = AutoModelForCausalLM.from_config(backbone(family)).double().eval()
    weights = {name: weight[:VOCABULARY] for name, weight in model.state_dict().items()}
    weights |= {n: w for n, w in model.state_dict().items() if n.startswith("model.layers")}
    missing, _ = decoder.load_state_dict(weights, strict=False)
    assert not missing
    return model, decoder


def batch_of(lengths=LENGTHS):
    rows = [text(1, n, seed=n)[0].numpy() for n in lengths]
    return rows, pad_rows([(ids, ids) for ids in rows], 0)


def measured(model, name, batch):
    """{(row, column): loss}"""
    with torch.no_grad():
        places, losses = Baselines(model).losses(
            name, batch["input_ids"], batch["labels"], batch["attention_mask"]
        )
    columns = batch["input_ids"].shape[1]
    pairs = zip(places.tolist(), losses.tolist(), strict=True)
    return {divmod(place, columns): loss for place, loss in pairs}


def by_a_loop(decoder, rows, first):
    """Each target alone, of all tokens from first(column) on."""
    losses = {}
    for row, ids in enumerate(rows):
        for column in range(len(ids) - 1):
            seen = torch.from_numpy(ids[first(column) : column + 1])[None]
            with torch.no_grad():
                logs = decoder(seen, use_cache=False).logits[0, -1].log_softmax(-1)
            losses[row, column] = -float(logs[ids[column + 1]])
    return losses


@pytest.mark.parametrize(
    ("family", "layout"), [*((family, "interleaved") for family in FAMILIES), ("qwen3", "trailing")]
)
def test_full_and_blocks_are_the_plain_decoder(family, layout):
    model, decoder = model_and_decoder(family, layout=layout)
    rows, batch = batch_of()
    starts = {"full": lambda column: 0, "blocks": lambda column: column // SIZE * SIZE}
    for name, first in starts.items():
        expected = by_a_loop(decoder, rows, first)
        assert measured(model, name, batch) == pytest.approx(expected, rel=1e-9)


def heads(attention, which, normed):
    out = getattr(attention, f"{which}_proj")(normed).unflatten(-1, (-1, 4))
    norm = getattr(attention, f"{which}_norm", None)
    return out if norm is None else norm(out)


def turned(x, rope):
    cos, sin = (part[:, None] for part in rope)
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def windowed(decoder, ids, window, sinks):
    """(N, V) logits by plain sums: keys are kept before RoPE, and get it by their place."""
    inner, ids = decoder.model, torch.from_numpy(ids)
    past = [([], []) for _ in inner.layers]
    logits = []
    for start in range(0, len(ids), SIZE):
        hidden = inner.embed_tokens(ids[start : start + SIZE])
        own = len(hidden)
        kept = list(range(start))
        if start > sinks + window:
            kept = kept[:sinks] + kept[start - window :]
        columns = len(kept) + own
        rope = [part[0] for part in inner.rotary_emb(hidden, torch.arange(columns)[None])]
        causal = torch.ones(own, columns, dtype=torch.bool).tril(len(kept))
        for layer, (keys, values) in zip(inner.layers, past, strict=True):
            attention, normed = layer.self_attn, layer.input_layernorm(hidden)
            keys.extend(heads(attention, "k", normed))
            values.extend(heads(attention, "v", normed))
            seen = [*kept, *range(start, start + own)]
            q, k = heads(attention, "q", normed), torch.stack([keys[j] for j in seen])
            if getattr(attention, "use_rope", True):
                q, k = turned(q, [part[len(kept) :] for part in rope]), turned(k, rope)
            v = torch.stack([values[j] for j in seen])
            k, v = (x.repeat_interleave(2, 1) for x in (k, v))
            scores = torch.einsum("ihd,jhd->hij", q, k) / 2
            weights = scores.masked_fill(~causal, -math.inf).softmax(-1)
            hidden = hidden + attention.o_proj(torch.einsum("hij,jhd->ihd", weights, v).flatten(1))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        logits.append(decoder.lm_head(inner.norm(hidden)))
    return torch.cat(logits)


# Memory slots: 4 sinks and 3 more; 2 sinks alone; no memory, so blocks.
SLOTS = [
    {"global_size": 3, "temporary_capacity": 4},
    {"global_size": 2, "compression_stride": None},
    {"global_size": 0, "compression_stride": None},
]


@pytest.mark.parametrize(
    ("family", "memory"), [*((family, SLOTS[0]) for family in FAMILIES), ("qwen3", SLOTS[1])]
)
def test_a_window_with_sinks(family, memory):
    model, decoder = model_and_decoder(family, **memory)
    rows, batch = batch_of()
    slots = memory["global_size"] + memory.get("temporary_capacity", 0)
    sinks = min(SINKS, slots)
    expected = {}
    for row, ids in enumerate(rows):
        with torch.no_grad():
            logs = windowed(decoder, ids, slots - sinks, sinks).log_softmax(-1)
        expected |= {(row, i): -float(logs[i, ids[i + 1]]) for i in range(len(ids) - 1)}
    # RoPE's angles are in float32
    assert measured(model, "window", batch) == pytest.approx(expected, rel=1e-6)


def test_a_window_of_nothing_is_blocks():
    model, _ = model_and_decoder(**SLOTS[2])
    _, batch = batch_of()
    blocks = measured(model, "blocks", batch)
    assert measured(model, "window", batch) == pytest.approx(blocks, rel=1e-9)


def test_moved_keys_keep_their_length_under_yarn():
    model = tiny()
    rope, keys = model.model.rotary_emb, torch.randn(1, 2, 3, 4, dtype=torch.float64)
    there = rotated(rotated(keys, rope, 7), rope, -7)
    torch.testing.assert_close(there, keys, rtol=1e-6, atol=1e-6)
    rope.attention_scaling, scaled = 1.7, rope.attention_scaling
    assert scaled == 1.0
    torch.testing.assert_close(rotated(keys, rope, 3).norm(dim=-1), keys.norm(dim=-1))


@pytest.mark.parametrize(("positions", "fitting"), [(16, 2), (20, 4), (22, 4), (5, 1), (23, 4)])
def test_full_has_the_beginning_of_rows_beyond_the_positions(positions, fitting):
    model, decoder = model_and_decoder()
    model.config.backbone_config.max_position_embeddings = positions
    rows, batch = batch_of()
    whole = by_a_loop(decoder, rows, lambda column: 0)
    fits = {
        (row, column): loss
        for (row, column), loss in whole.items()
        if len(rows[row]) <= positions or column < fitting * SIZE
    }
    assert Baselines(model).fitting == fitting
    assert measured(model, "full", batch) == pytest.approx(fits, rel=1e-9)


# ---- differences


def metrics_of(systems):
    """{name: LossByRow} of {name: rows of losses}, a chunk a token."""
    metrics = {}
    for name, rows in systems.items():
        metrics[name] = LossByRow(sync_on_compute=False)
        for losses in rows:
            chunks = np.arange(4)[None]
            metrics[name].update(torch.arange(len(losses)), torch.tensor(losses), chunks)
    return metrics


def test_differences_by_hand():
    model, blocks = [[3.0, 2.0, 2.0, 3.0], [4.0, 3.0]], [[2.5, 3.0, 4.0, 3.0], [4.5, 5.0]]
    full = [[2.5, 1.0], [4.5, 2.0]]  # of the first row the beginning
    values = text_values(metrics_of({COMET: model, "blocks": blocks, "full": full}))
    assert values["all"] == {
        "rows": 2,
        "loss": pytest.approx(17 / 6),
        "labels": 6,
        "perplexity": pytest.approx(math.exp(17 / 6)),
    }
    assert [each["loss"] for each in values["by_chunk"]] == [3.5, 2.5, 2.5]
    found = values["baselines"]["blocks"]
    # row sums -2.5 and -2.5 of 4 and 2 targets; mean -5 / 6
    error = math.sqrt(2 * ((-2.5 + 4 * 5 / 6) ** 2 + (-2.5 + 2 * 5 / 6) ** 2)) / 6
    assert found["all"] == {
        "loss": pytest.approx(22 / 6),
        "labels": 6,
        "perplexity": pytest.approx(math.exp(22 / 6)),
        "difference": pytest.approx(-5 / 6),
        "standard_error": pytest.approx(error),
        "rows": 2,
    }
    second = found["by_chunk"][1]
    assert second["difference"] == pytest.approx(-1.5) and second["rows"] == 2
    assert second["standard_error"] == pytest.approx(statistics.stdev([-1, -2]) / math.sqrt(2))
    third = found["by_chunk"][2]
    assert third["difference"] == -1.0
    assert (third["standard_error"], third["rows"]) == (None, 1)

    partial = values["baselines"]["full"]
    assert partial["all"]["labels"] == 4 and partial["all"]["loss"] == 2.5
    assert partial["all"]["difference"] == pytest.approx((0.5 + 1 - 0.5 + 1) / 4)
    blank = {"loss": None, "labels": 0, "perplexity": None, "rows": 0}
    blank |= {"difference": None, "standard_error": None, "from": 2, "to": 3}
    assert partial["by_chunk"][2] == blank
    # (blocks - model) / (blocks - full): chunk 0 has no gap
    assert values["closed"] == {
        "all": pytest.approx((-0.5 + 1 + 0.5 + 2) / (2 + 3)),
        "by_chunk": [None, pytest.approx(3 / 5), None],
    }

    console = Console(width=80, record=True, file=open("/dev/null", "w"))
    console.print(text_table(values))
    shown = console.export_text()
    heads = "chunk tokens CoMeT blocks full -blocks -full closed".split()
    assert shown.split()[: len(heads)] == heads
    assert "-1.500" in shown and "±0.500" in shown and "60%" in shown
    figure = text_curve(values)
    labels = [entry.get_text() for entry in figure.axes[0].get_legend().get_texts()]
    assert labels == [COMET, "blocks", "full"]
    assert list(figure.axes[0].lines[2].get_xdata()) == [0, 1]


def test_what_is_not_finite_is_null():
    systems = {COMET: [[1.0, math.nan]], "blocks": [[1.0, 2.0]], "full": [[1.0, 1.0]]}
    values = text_values(metrics_of(systems))
    assert values["baselines"]["blocks"]["all"]["difference"] is None
    assert values["closed"] == {"all": None, "by_chunk": [None, None]}


def test_rows_add_up_to_the_metric():
    metric, plain = LossByRow(), LossByPosition()
    chunks = np.array([[0, 0, 1, 1], [0, 1, 2, 3]])
    for each in (metric, plain):
        each.update(torch.tensor([6, 1, 4, 3]), torch.tensor([1.0, 2.0, 3.0, 5.0]), chunks)
    assert metric.compute() == plain.compute()
    (rows,) = metric.rows
    assert rows[:, :, :3].tolist() == [[[2, 5, 0], [1, 1, 0]], [[3, 0, 1], [1, 0, 1]]]


# ---- mistakes


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            ["data.kind=text", "eval.baselines=[full,blok]"],
            "eval.baselines: ['full', 'blok'] given, allowed: non-empty list of full, blocks, "
            "window or null (did you mean blocks?)",
        ),
        (
            ["data.kind=passkey", "eval.baselines=[window]"],
            "eval.baselines: ['window'] given, but data.kind is passkey; it needs text",
        ),
    ],
)
def test_mistakes(keys, message):
    with pytest.raises(UserError) as error:
        load([*TINY, *keys])
    assert str(error.value) == message


def test_a_chunk_longer_than_the_positions():
    model = tiny(chunk_size=SIZE)
    model.config.backbone_config.max_position_embeddings = SIZE - 1
    with pytest.raises(UserError, match=r"^eval.baselines: .*chunk_size is 5; .* 4 positions"):
        Baselines(model)
