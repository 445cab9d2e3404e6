"""The public surface: configuration, loading and saving, the cache on disk, and what is refused.
Generation: test_generation.py."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, Qwen3Config

from comet_pl import CometCache, CometConfig, CometForCausalLM
from comet_pl.model.cell import SUPPORTED
from comet_pl.model.configuration_comet import buffer_dtype
from comet_pl.training.windows import cut_windows
from tests.support.models import FAMILIES, VOCABULARY, backbone, text, tiny

# ---- folders


def test_our_folder_round_trips(tmp_path):
    model = tiny(gate_bias=2.0, shared_adapter=True)
    model.save_pretrained(tmp_path)
    loaded = CometForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    auto = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    ids = text(1, 17)
    with torch.no_grad():
        for other in (loaded, auto):
            assert isinstance(other, CometForCausalLM)
            torch.testing.assert_close(model(ids).logits, other(ids).logits, atol=1e-12, rtol=1e-12)


def test_memory_keys_can_be_overridden_at_loading(tmp_path):
    tiny().save_pretrained(tmp_path)
    model = CometForCausalLM.from_pretrained(
        tmp_path, comet={"chunk_size": 3, "temporary_capacity": 7, "global_size": 1}
    )
    assert (
        model.config.chunk_size,
        model.config.temporary_capacity,
        model.config.readout_token_ids,
    ) == (3, 7, [41])
    with pytest.raises(ValueError, match="adapter_rank"):
        CometForCausalLM.from_pretrained(tmp_path, comet={"adapter_rank": 5})
    with pytest.raises(ValueError, match="rollover: 'no' given, True or False is needed"):
        CometForCausalLM.from_pretrained(tmp_path, comet={"rollover": "no"})
    with pytest.raises(ValueError, match="resize the plain decoder"):
        model.resize_token_embeddings(120)
    with pytest.raises(ValueError, match="chunksize"):
        CometForCausalLM.from_pretrained(tmp_path, comet={"chunksize": 5})


@pytest.mark.parametrize("tied", [True, False])
def test_a_plain_decoder_gets_fresh_memory(tied, tmp_path):
    config = backbone()
    config.tie_word_embeddings = tied
    plain = AutoModelForCausalLM.from_config(config)
    plain.save_pretrained(tmp_path)
    comet = {
        "chunk_size": 4,
        "global_size": 3,
        "compression_stride": 2,
        "temporary_capacity": 4,
        "gate_bias": 5.0,
    }
    model = CometForCausalLM.from_pretrained(tmp_path, comet=comet)
    assert model.config.vocab_size == VOCABULARY + 4
    old, new = (
        model.model.embed_tokens.weight[:VOCABULARY],
        model.model.embed_tokens.weight[VOCABULARY:],
    )
    assert torch.equal(old, plain.model.embed_tokens.weight)
    torch.testing.assert_close(new, old.mean(0).expand(4, -1), atol=1e-2, rtol=0)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    gate = model.model.layers[0].global_memory.gate.proj
    assert gate.bias.item() == 5.0
    assert 0 < gate.weight.std() < 1
    assert torch.equal(
        model.model.layers[1].mlp.up_proj.weight, plain.model.layers[1].mlp.up_proj.weight
    )
    assert torch.equal(model.model.layers[0].global_memory.norm.weight, torch.ones(16))


def test_an_authors_folder_round_trips_as_ours(tmp_path):
    from tests.laws.test_reference import GOLDEN

    model = CometForCausalLM.from_pretrained(GOLDEN / "fixed", comet={"chunk_size": 8})
    model.save_pretrained(tmp_path)
    again = CometForCausalLM.from_pretrained(tmp_path)
    assert again.config.chunk_size == 8
    ids = text(1, 30)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
    assert 294 in again.config.new_token_ids  # the authors' placeholder means nothing


def test_memory_parameters_are_the_new_modules():
    model = tiny()
    names = {name for name, _ in model.memory_parameters()}
    plain = {name for name, _ in AutoModelForCausalLM.from_config(backbone()).named_parameters()}
    assert {name for name, _ in model.named_parameters()} == names | plain
    assert not names & plain


def test_count_of_new_parameters():
    """Qwen3-4B's shape: a layer has two norms (2d), a gate (2d) and two adapters (4dr). The paper
    counts 3.95 M, between ours without and with the 513 new rows of the embedding."""
    big = Qwen3Config(
        hidden_size=2560,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=9728,
        vocab_size=151936,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = CometForCausalLM(CometConfig(backbone_config=big))
    modules = sum(p.numel() for _, p in model.memory_parameters())
    assert modules == 36 * (2 + 2 + 4 * 8) * 2560
    assert modules < 3.95e6 < modules + 513 * 2560


@pytest.mark.parametrize("kind", ["ours", "authors", "decoder"])
def test_dtype_shards_and_attention_are_as_asked_for(kind, tmp_path):
    from tests.laws.test_reference import GOLDEN

    if kind == "authors":
        tmp_path = GOLDEN / "fixed"
    elif kind == "ours":
        tiny(dtype=torch.float32).save_pretrained(tmp_path, max_shard_size="5KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
    else:
        AutoModelForCausalLM.from_config(backbone()).save_pretrained(tmp_path, max_shard_size="5KB")
    for dtype in (torch.bfloat16, torch.float32):
        model = CometForCausalLM.from_pretrained(tmp_path, dtype=dtype, attn_implementation="eager")
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert model.config.backbone_config._attn_implementation == "eager"
        with torch.no_grad():
            out = model(text(1, 9), use_cache=True)
        assert out.logits.dtype == dtype and out.logits.isfinite().all()
        for memory in out.past_key_values.memories:
            for name, held in memory._asdict().items():
                assert held is None or held.dtype == buffer_dtype(name, dtype)


def test_gradient_checkpointing_flag_recomputes_every_cell():
    """Hugging Face's switch: cells run again in the backward pass, gradients stay."""
    calls, grads = [], []
    for recompute in (False, True):
        model, ids = tiny().train(), text(2, 14)
        if recompute:
            model.gradient_checkpointing_enable()
            assert model.gradient_checkpointing
        seen = [0]
        for cell in model.model.layers:
            cell.self_attn.q_proj.register_forward_hook(
                lambda *_, seen=seen: seen.__setitem__(0, seen[0] + 1)
            )
        model(ids, labels=ids).loss.backward()
        calls.append(seen[0])
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert calls[1] == 2 * calls[0]
    torch.testing.assert_close(*grads, atol=1e-12, rtol=1e-12)


# ---- labels


def test_targets_only_between_real_tokens_and_across_chunks():
    model, ids = tiny().train(), text(2, 11)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.clone()
    labels[0, 4] = -100
    out = model(
        ids, attention_mask=mask, labels=labels, chunk_sizes=[[5, 6], [6]], logits_to_keep=0
    )
    logits = out.logits.log_softmax(-1)
    terms = [
        -logits[b, k, labels[b, k + 1]]
        for b, k in [(0, k) for k in range(10) if k != 3] + [(1, k) for k in range(5)]
    ]
    torch.testing.assert_close(out.loss, torch.stack(terms).mean(), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": 7}, {"num_items_in_batch": 0}])
@pytest.mark.parametrize("columns", [6, 1, 0])
def test_no_targets_give_a_loss_of_zero_with_a_graph(columns, options):
    """As of other decoders: Trainer backpropagates every batch."""
    model, ids = tiny().train(), text(2, columns)
    model.lm_head.weight.requires_grad_(False)
    none = torch.full_like(ids, -100)
    labels = ids if columns < 2 else none
    for targets in {"labels": labels}, {"shift_labels": none}:
        model.zero_grad()
        out = model(ids, **targets, **options)
        assert out.loss.item() == 0 and out.logits is None
        out.loss.backward()
        found = [p.grad for p in model.parameters() if p.grad is not None]
        assert found and not any(gradient.any() for gradient in found)
        assert model.lm_head.weight.grad is None


def test_no_targets_leave_the_gradients_of_other_calls_alone():
    """Of accumulation, and of weights that are not finite."""
    model, ids = tiny().train(), text(2, 8)
    model(ids, labels=ids).loss.backward()
    trained = [(name, p) for name, p in model.named_parameters() if p.grad is not None]
    before = {name: p.grad.clone() for name, p in trained}
    model.model.embed_tokens.weight.data[3] = torch.inf
    model(ids[:, :1], labels=ids[:, :1]).loss.backward()
    assert len(trained) > 20 and all(torch.equal(p.grad, before[name]) for name, p in trained)


def test_a_loop_of_windows_pays_for_a_loss_and_nothing_else():
    for model in (tiny().train(), tiny()):
        ids = text(1, 6)
        none = model(ids, labels=torch.full_like(ids, -100), loss_only=True)
        assert none.loss.item() == 0 and not none.loss.requires_grad and none.logits is None
        assert model(ids, labels=ids, loss_only=True).logits is None
        assert model(ids, labels=ids, loss_only=True, logits_to_keep=2).logits.shape[1] == 2
    heads = []
    window = cut_windows({"input_ids": ids, "attention_mask": ids >= 0, "labels": ids}, 5, None)
    model.lm_head.register_forward_hook(lambda *_: heads.append(1))
    model(**window[0].inputs(), use_cache=False)
    assert len(heads) == 1


def test_logits_come_beside_the_loss_in_eval_mode():
    model, ids = tiny(), text(2, 12)
    assert model.train()(ids, labels=ids).logits is None
    out = model.eval()(ids, labels=ids)
    torch.testing.assert_close(out.logits, model(ids).logits, atol=0, rtol=0)
    loss, logits, cache = model(ids, labels=ids, return_dict=False)
    assert loss == out.loss and torch.equal(logits, out.logits) and isinstance(cache, CometCache)
    model.config.keys_to_ignore_at_inference = ["past_key_values", "logits"]
    assert model(ids, labels=ids).logits is None and model(ids).logits is not None


def test_logits_to_keep():
    model, ids = tiny(), text(2, 12)
    with torch.no_grad():
        everything = model(ids).logits
        torch.testing.assert_close(
            model(ids, logits_to_keep=3).logits, everything[:, -3:], atol=1e-12, rtol=1e-12
        )
        assert torch.equal(model(ids, logits_to_keep=0).logits, everything)
        assert torch.equal(model(ids, logits_to_keep=99).logits, everything)


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chunk_sizes": [3, 3]}, "sums to 6, but it has 8 real tokens"),
        ({"chunk_sizes": [[8]]}, "lists for 1 rows"),
        ({"chunk_sizes": [9, -1]}, "negative"),
        ({"resets": [True]}, "without chunk_sizes"),
        ({"chunk_sizes": [4, 4], "resets": [True]}, "one bool for each"),
        (
            {
                "labels": torch.zeros(2, 8, dtype=torch.long),
                "shift_labels": torch.zeros(2, 8, dtype=torch.long),
            },
            "give one of the two",
        ),
        ({"labels": torch.zeros(2, 7, dtype=torch.long)}, "labels: shape"),
        (
            {"attention_mask": torch.tensor([[1] * 8, [1, 1, 0, 1, 1, 1, 1, 1]])},
            "row 1 has padding between",
        ),
        ({"attention_mask": torch.ones(2, 9)}, "attention_mask: shape"),
        ({"strides": [2]}, "strides"),
        ({"strides": 2}, "strides"),
        ({"strides": [2.7, 2]}, "strides"),
        ({"chunk_sizes": 8}, "chunk_sizes: 8 given"),
        ({"chunk_sizes": [4.0, 4.0]}, "no whole number"),
        ({"logits_to_keep": -1}, "logits_to_keep"),
        ({"strides": [2, 0]}, "strides"),
        ({"past_key_values": ()}, "CometCache is needed"),
        ({"labels": torch.full((2, 8), 1000)}, "labels: 1000 given, allowed: 0 to 42, or -100"),
        ({"shift_labels": torch.full((2, 8), -5)}, "labels: -5 given"),
        (
            {"attention_mask": torch.tensor([[1.0] * 8, [0.0, -1e9] * 4])},
            "attention_mask: -1000000000.0 given, 1",
        ),
    ],
)
def test_contradictions_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny()(text(2, 8), **arguments)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (99, r"input_ids: 99 given \(row 1, column 2\), allowed: 0 to 39$"),
        (-1, r"input_ids: -1 given \(row 1, column 2\), allowed: 0 to 39$"),
        (41, r"41 given .* the ids behind are compression and readout tokens"),
    ],
)
def test_ids_that_are_no_text_are_refused_unless_they_are_padding(wrong, message):
    model, ids, mask = tiny(), text(2, 5), torch.ones(2, 5, dtype=torch.long)
    ids[1, 2] = wrong
    with pytest.raises(ValueError, match=message):
        model(ids)
    mask[1, 2:] = 0
    assert model(ids, attention_mask=mask).logits.isfinite().all()
    with pytest.raises(ValueError, match="whole numbers are needed"):
        model(ids.float())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("chunk_size", 0),
        ("global_size", -1),
        ("compression_stride", 0),
        ("temporary_capacity", 0),
        ("gate", "soft"),
        ("gate_bias", "high"),
    ],
)
def test_impossible_configurations_name_their_key(key, value):
    with pytest.raises(ValueError, match=key):
        CometConfig(backbone_config=backbone(), **{key: value})


def test_foreign_decoders_are_refused_with_what_is_supported():
    assert set(SUPPORTED) == set(FAMILIES)
    with pytest.raises(
        ValueError, match=r"gpt2.*supported: llama \(Llama 2 and 3, SmolLM2\); mistral.*cell.py"
    ):
        CometForCausalLM(
            CometConfig(
                backbone_config=GPT2Config(
                    vocab_size=30, n_embd=8, n_head=2, n_layer=1, bos_token_id=0, eos_token_id=0
                )
            )
        )


@pytest.mark.parametrize(
    ("family", "window", "way_out"),
    [
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
            "use_sliding_window=False",
        ),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
            "use_sliding_window=False",
        ),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window=False"),
        ("mistral", {"sliding_window": 8}, "sliding_window=None"),
    ],
)
def test_a_sliding_window_is_refused_with_the_reason_and_the_way_out(
    family, window, way_out, tmp_path
):
    plain = AutoModelForCausalLM.from_config(backbone(family, **window))
    plain.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError,
        match=f"sliding window of 8 tokens would cut the memory slots off; set {way_out}",
    ):
        CometForCausalLM.from_pretrained(tmp_path)
    key, _, value = way_out.partition("=")
    more = {"layer_types": ["full_attention"] * 2} if family != "mistral" else {}
    model = CometForCausalLM.from_pretrained(
        tmp_path, comet={"chunk_size": 4}, **{key: None if value == "None" else False}, **more
    )
    assert model(text(1, 9)).logits.shape[1] == 9


def test_attention_dropout_is_refused():
    with pytest.raises(ValueError, match=r"attention_dropout: .* given, but"):
        CometForCausalLM(CometConfig(backbone_config=backbone(attention_dropout=0.1)))


def test_the_configuration_survives_json(tmp_path):
    config = tiny().config
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "comet"
    again = CometConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.get_text_config().model_type == "qwen3"
