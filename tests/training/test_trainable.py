"""What learns, bit for bit; the head's share of the new rows; counts; merged weights are plain ones
with the same logits."""

from __future__ import annotations

import copy
import re

import lightning
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader
from transformers import Qwen3Config

from comet_pl import CometConfig, CometForCausalLM
from comet_pl.config.load import load
from comet_pl.config.schema import PARAMETERS, TrainConfig
from comet_pl.errors import UserError
from comet_pl.training.lit_module import CometModule
from comet_pl.training.trainable import (
    add_adapters,
    count_parameters,
    describe,
    merge_adapters,
    new_rows,
)
from tests.support.models import VOCABULARY, backbone, memories, text

PARTS = [mode for mode in PARAMETERS if mode != "all"]
PROJECTION = re.compile(r"self_attn\.[qkvo]_proj\.weight$|mlp\.(gate|up|down)_proj\.weight$")


def small(tied=True, family="qwen3", dtype=torch.float32, **comet):
    torch.manual_seed(0)
    decoder = backbone(family)
    decoder.tie_word_embeddings = tied
    options = {
        "chunk_size": 5,
        "global_size": 2,
        "compression_stride": 3,
        "temporary_capacity": 4,
        "adapter_rank": 2,
    } | comet
    return CometForCausalLM(CometConfig(backbone_config=decoder, **options)).to(dtype).eval()


def adapted(model, parameters, **train):
    add_adapters(model, TrainConfig(parameters=parameters, **train))
    return model


def batch(seed=0):
    ids = text(2, 23, seed)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


class Watch(lightning.Callback):
    """Names of the parameters that have a gradient when the optimizer steps, and the optimizer."""

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.with_gradient = {
            name for name, p in module.model.named_parameters() if p.grad is not None
        }
        self.optimizer = optimizer


def fit(model, steps=2, **train):
    settings = TrainConfig(lr=1e-2, warmup_steps=0, weight_decay=0.1, **train)
    add_adapters(model, settings)
    watch = Watch()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[watch],
    )
    batches = DataLoader(
        [batch(seed) for seed in range(steps)], batch_size=None, collate_fn=lambda one: one
    )
    trainer.fit(CometModule(model.train(), settings, max_steps=steps + 1), batches)
    return watch


@pytest.mark.parametrize("recompute", ["none", "cell", "chunk"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("parameters", PARAMETERS)
def test_exactly_what_is_named_learns(parameters, tied, recompute):
    """Against the weights from before, bit for bit; weight decay is on, and must not move what is
    frozen."""
    model = small(tied)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    memory = {name for name, _ in model.memory_parameters()}
    watch = fit(model, parameters=parameters, recompute=recompute)
    for name, p in model.named_parameters():
        assert p.requires_grad == (name in watch.with_gradient), name
        assert p.requires_grad == (p in watch.optimizer.state), name
        if name.endswith("base_layer.weight"):
            assert torch.equal(p, before[name.replace(".base_layer", "")]), name
    merge_adapters(model)
    after = model.state_dict()
    assert list(after) == list(before)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    expected = set(before) if parameters == "all" else set()
    if "memory" in parameters:
        expected |= memory | {"model.embed_tokens.weight"} | ({"lm_head.weight"} if tied else set())
        old, new = before["model.embed_tokens.weight"], after["model.embed_tokens.weight"]
        rows = new_rows(model.config)
        assert rows == [VOCABULARY, VOCABULARY + 1, VOCABULARY + 2]
        assert torch.equal(old[:VOCABULARY], new[:VOCABULARY])
        assert (old[rows] != new[rows]).any(1).all()
    if "lora" in parameters:
        expected |= {name for name in before if PROJECTION.search(name) and name not in memory}
    assert changed == expected
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_only_the_memory_modules_have_another_learning_rate():
    model = small()
    optimizer = fit(model, parameters="memory+lora", memory_lr_factor=5.0).optimizer
    memory = {id(p) for _, p in model.memory_parameters()}
    rates = {
        (id(p) in memory, group["initial_lr"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert rates == {(True, 5e-2), (False, 1e-2)}


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_learn_from_the_embedding_and_from_a_tied_head(tied):
    """Their gradient is that of the same rows of the whole embedding."""
    whole = small(tied, dtype=torch.float64).train()
    part = adapted(copy.deepcopy(whole), "memory")
    for model in (whole, part):
        model(**batch(), use_cache=False).loss.backward()
    expected = whole.model.embed_tokens.weight.grad[new_rows(whole.config)]
    found = part.model.embed_tokens.trainable_tokens_delta["default"].grad
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    for name, p in part.memory_parameters():
        torch.testing.assert_close(p.grad, whole.get_parameter(name).grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("parameters", PARTS)
def test_recomputing_changes_no_gradient(parameters):
    gradients = []
    for recompute in (False, True):
        model = adapted(
            small(dtype=torch.float64).train(),
            parameters,
            lora_dropout=0.2 if "lora" in parameters else 0.0,
        )
        perturb(model)
        model.gradient_checkpointing = recompute
        torch.manual_seed(1)
        model(**batch(), use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def perturb(model):
    """Weights that learn, LoRA's zeros too, move away from where they started."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))


@given(
    memories(),
    st.sampled_from(PARTS),
    st.booleans(),
    st.sampled_from(["qwen3", "llama"]),
    st.integers(1, 5),
    st.sampled_from([1.0, 7.5]),
)
def test_merged_weights_give_the_same_logits(memory, parameters, tied, family, rank, alpha):
    if (
        "memory" in parameters
        and not memory["global_size"]
        and memory["compression_stride"] is None
    ):
        return  # refused by the configuration
    model, ids = small(tied, **memory), text(2, 19)
    names, plain = list(model.state_dict()), model(ids).logits
    lora = {"lora_rank": rank, "lora_alpha": alpha} if "lora" in parameters else {}
    adapted(model, parameters, **lora)
    torch.testing.assert_close(
        model(ids).logits, plain, rtol=0, atol=0
    )  # nothing changes before the first step
    perturb(model)
    expected = model(ids).logits
    merge_adapters(model)
    found = model(ids).logits
    assert not torch.equal(found, plain)
    torch.testing.assert_close(
        found, expected, rtol=0, atol=1e-5 * float(expected.detach().abs().max())
    )
    assert list(model.state_dict()) == names
    assert not any("peft" in type(module).__module__ for module in model.modules())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert all(p.requires_grad for p in model.parameters())


def test_merging_leaves_a_plain_model_alone():
    model = small()
    model.model.norm.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    merge_adapters(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model.model.norm.weight.requires_grad


def test_lora_never_touches_the_memory_modules():
    """They have projections of the same last names."""
    model = adapted(small(gate="elementwise", shared_adapter=True), "lora")
    memory = [
        module
        for cell in model.model.layers
        for module in (cell.global_memory, cell.temporary_memory, cell.adapter)
        if module
    ]
    assert {
        type(module)
        for one in memory
        for module in one.modules()
        if "proj" in str(type(module)) or isinstance(module, nn.Linear)
    }
    assert not any("peft" in type(module).__module__ for one in memory for module in one.modules())


# ---- counts


def test_counts_of_qwen3_4b():
    """The paper counts 3.95 M new parameters, between ours without and with the 513 new rows."""
    big = Qwen3Config(hidden_size=2560, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
                      intermediate_size=9728, vocab_size=151936, tie_word_embeddings=True)  # fmt: skip
    with torch.device("meta"):
        model = CometForCausalLM(CometConfig(backbone_config=big))
        total = model.num_parameters()
        plain = count_parameters(model)
        add_adapters(model, TrainConfig(parameters="memory+lora", lora_rank=4))
        counts = count_parameters(model)
    lora = 36 * 4 * (2 * (2560 + 4096) + 2 * (2560 + 1024) + 3 * (2560 + 9728))
    assert plain == {
        "decoder": total - 4_631_040,
        "memory": 3_317_760,
        "rows": 513 * 2560,
        "lora": 0,
        "learning": total,
    }
    assert counts == {**plain, "lora": lora, "learning": 4_631_040 + lora}
    assert counts["memory"] < 3.95e6 < counts["memory"] + counts["rows"] == 4_631_040


@pytest.mark.parametrize("tied", [True, False])
def test_counts_are_shown_in_one_line(tied):
    model = small(tied)
    decoder, memory = (
        model.num_parameters() - 3 * 16,
        sum(p.numel() for _, p in model.memory_parameters()),
    )
    decoder -= memory
    rows = f"{memory} in memory modules, 48 in rows of new tokens"
    assert (
        describe(count_parameters(model))
        == f"{decoder:,} weights of the decoder, {rows}: {decoder + memory + 48:,} learn (100 %)"
    )
    adapted(model, "memory")
    share = 100 * (memory + 48) / (decoder + memory + 48)
    line = (
        f"{decoder:,} weights of the decoder (frozen), {rows}: {memory + 48} learn ({share:.3g} %)"
    )
    assert describe(count_parameters(model)) == line


# ---- mistakes


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        (
            ["train.parameters=adapter"],
            r"^train\.parameters: 'adapter' given, allowed: all, memory, lora, memory\+lora",
        ),
        (
            ["train.lora_rank=4"],
            r"^train\.lora_rank: given, but train\.parameters is all; it needs lora or memory\+lora$",
        ),
        (
            ["train.lora_dropout=0.1", "train.parameters=memory"],
            r"^train\.lora_dropout: given, but train\.parameters is memory",
        ),
        (
            ["train.parameters=lora", "train.lora_rank=0"],
            r"^train\.lora_rank: 0 given, allowed: integer >= 1",
        ),
        (
            ["train.parameters=lora", "train.lora_dropout=1"],
            r"^train\.lora_dropout: .*>= 0 and < 1",
        ),
        (
            ["train.parameters=memory", "model.global_size=0", "model.compression_stride=null"],
            r"^train\.parameters: memory given, but .* leave no memory to train, allowed: all, lora$",
        ),
    ],
)
def test_mistakes_are_one_line(keys, match):
    with pytest.raises(UserError, match=match) as caught:
        load(keys)
    assert "\n" not in str(caught.value)


def test_keys_of_lora_go_with_lora():
    config = load(["train.parameters=memory+lora", "train.lora_rank=4", "train.lora_alpha=8"])
    assert (config.train.lora_rank, config.train.lora_alpha) == (4, 8.0)
    load(["train.parameters=lora", "model.global_size=0", "model.compression_stride=null"])
