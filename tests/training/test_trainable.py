"""What learns, bit for bit; the head's share of the new rows; counts; merged weights are plain."""

import copy
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import Qwen3Config

from comet_pl import CometConfig, CometForCausalLM
from comet_pl.build import load_checkpoint
from comet_pl.config.load import load
from comet_pl.config.schema import PARAMETERS, TrainConfig
from comet_pl.training import trainable
from comet_pl.training.trainable import add_adapters, halve_frozen, merge_adapters, new_rows
from tests.support.models import VOCABULARY, backbone, memories, text
from tests.support.tiny_runs import TINY
from tests.support.training import fit as fit_module
from tests.support.training import norm_apart
from train import main

PARTS = [mode for mode in PARAMETERS if mode != "all"]
PROJECTION = re.compile(r"self_attn\.[qkvo]_proj\.weight$|mlp\.(gate|up|down)_proj\.weight$")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
COMET = {"chunk_size": 5, "global_size": 2, "compression_stride": 3, "temporary_capacity": 4}
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def small(tied=True, family="qwen3", dtype=torch.float32, **comet):
    torch.manual_seed(0)
    decoder, options = backbone(family), COMET | {"adapter_rank": 2} | comet
    decoder.tie_word_embeddings = tied
    return CometForCausalLM(CometConfig(backbone_config=decoder, **options)).to(dtype).eval()


def adapted(model, parameters, **train):
    add_adapters(model, TrainConfig(parameters=parameters, **train))
    return model


def batch(seed=0):
    ids = text(2, 23, seed)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def fit(model, **train):
    """Two steps; weight decay is on, and must not move what is frozen."""
    train |= {"weight_decay": 0.1}
    add_adapters(model, TrainConfig(**train))
    return fit_module(model, [batch(0), batch(1)], **train)[1]


def learning_cases():
    for parameters in PARAMETERS:
        for tied in (True, False):
            for recompute in ("none", "cell", "chunk"):
                quick = recompute == "none" or (parameters == "memory+lora" and tied)
                marks = [] if quick else pytest.mark.slow
                yield pytest.param(parameters, tied, recompute, marks=marks)


@pytest.mark.parametrize(("parameters", "tied", "recompute"), learning_cases())
def test_exactly_what_is_named_learns(parameters, tied, recompute):
    """Against the weights from before, bit for bit."""
    model = small(tied)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    memory = {name for name, _ in model.memory_parameters()}
    watch = fit(model, parameters=parameters, recompute=recompute)
    for name, p in model.named_parameters():
        assert p.requires_grad == (watch.gradients[-1][name] is not None), name
        assert p.requires_grad == (p in watch.optimizer.state), name
        if name.endswith("base_layer.weight"):
            assert torch.equal(p, before[name.replace(".base_layer", "")]), name
    merge_adapters(model)
    after = model.state_dict()
    assert list(after) == list(before)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    expected = set(before) if parameters == "all" else set()
    if "memory" in parameters:
        expected |= memory | {EMBEDDING} | ({HEAD} if tied else set())
        old, new, rows = before[EMBEDDING], after[EMBEDDING], new_rows(model.config)
        assert rows == [VOCABULARY, VOCABULARY + 1, VOCABULARY + 2]
        assert torch.equal(old[:VOCABULARY], new[:VOCABULARY])
        assert (old[rows] != new[rows]).any(1).all()
    if "lora" in parameters:
        expected |= {name for name in before if PROJECTION.search(name) and name not in memory}
    assert changed == expected
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_only_the_memory_modules_have_another_learning_rate():
    model = small()
    groups = fit(model, parameters="memory+lora", memory_lr_factor=5.0).optimizer.param_groups
    memory = {id(p) for _, p in model.memory_parameters()}
    rates = {(id(p) in memory, group["initial_lr"]) for group in groups for p in group["params"]}
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
    torch.testing.assert_close(found, expected, **EXACT)
    for name, p in part.memory_parameters():
        torch.testing.assert_close(p.grad, whole.get_parameter(name).grad, **EXACT)


@pytest.mark.parametrize("parameters", PARTS)
def test_recomputing_changes_no_gradient(parameters):
    gradients, dropout = [], {"lora_dropout": 0.2} if "lora" in parameters else {}
    for recompute in (False, True):
        model = adapted(small(dtype=torch.float64).train(), parameters, **dropout)
        perturb(model)
        model.gradient_checkpointing = recompute
        torch.manual_seed(1)
        model(**batch(), use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(*gradients, **EXACT)


def perturb(model):
    """Moves trainable weights, LoRA's zeros too, away from where they started."""
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
    has_memory = memory["global_size"] or memory["compression_stride"] is not None
    if "memory" in parameters and not has_memory:
        return  # refused by the configuration
    model, ids = small(tied, **memory), text(2, 19)
    names, plain = list(model.state_dict()), model(ids).logits
    adapted(model, parameters, lora_rank=rank, lora_alpha=alpha)
    # Nothing changes before the first step.
    torch.testing.assert_close(model(ids).logits, plain, rtol=0, atol=0)
    perturb(model)
    expected = model(ids).logits
    merge_adapters(model)
    found, scale = model(ids).logits, float(expected.detach().abs().max())
    assert not torch.equal(found, plain)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * scale)
    assert list(model.state_dict()) == names
    assert not has_peft(model)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert all(p.requires_grad for p in model.parameters())


def has_peft(module):
    return any("peft" in type(part).__module__ for part in module.modules())


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
    modules = []
    for cell in model.model.layers:
        modules += filter(None, (cell.global_memory, cell.temporary_memory, cell.adapter))
    parts = [part for module in modules for part in module.modules()]
    assert any("proj" in str(type(part)) or isinstance(part, nn.Linear) for part in parts)
    assert not any(map(has_peft, modules))


# ---- counts


def test_counts_of_qwen3_4b():
    """The paper's 3.95 M new parameters lie between ours without and with the 513 new rows."""
    sizes = {"hidden_size": 2560, "intermediate_size": 9728, "head_dim": 128}
    sizes |= {"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8}
    big = Qwen3Config(**sizes, vocab_size=151936, tie_word_embeddings=True)
    with torch.device("meta"):
        model = CometForCausalLM(CometConfig(backbone_config=big))
        total = model.num_parameters()
        plain = trainable.count_parameters(model)
        counts = trainable.count_parameters(adapted(model, "memory+lora", lora_rank=4))
    lora = 36 * 4 * (2 * (2560 + 4096) + 2 * (2560 + 1024) + 3 * (2560 + 9728))
    expected = {"decoder": total - 4_631_040, "memory": 3_317_760, "rows": 513 * 2560}
    assert plain == {**expected, "lora": 0, "learning": total}
    assert counts == {**expected, "lora": lora, "learning": 4_631_040 + lora}
    assert counts["memory"] < 3.95e6 < counts["memory"] + counts["rows"] == 4_631_040


def test_counts_are_shown_in_one_line():
    counts = {"decoder": 1000, "memory": 90, "rows": 10, "lora": 0, "learning": 1100}
    decoder, rest = "1,000 weights of the decoder", "90 in memory modules, 10 in rows of new tokens"
    assert trainable.describe(counts) == f"{decoder}, {rest}: 1,100 learn (100 %)"
    line = f"{decoder} (frozen), {rest}, 900 in LoRA: 1,000 learn (50 %)"
    assert trainable.describe(counts | {"lora": 900, "learning": 1000}) == line


def test_keys_of_lora_go_with_lora():
    config = load(["train.parameters=memory+lora", "train.lora_rank=4", "train.lora_alpha=8"])
    assert (config.train.lora_rank, config.train.lora_alpha) == (4, 8.0)
    load(["train.parameters=lora", "model.global_size=0", "model.compression_stride=null"])


# ---- frozen weights in half precision


@pytest.mark.filterwarnings("ignore")
def test_frozen_weights_are_halved_and_what_learns_is_not(tmp_path):
    """A run of the memory alone in bf16-mixed: learns, resumes, and its checkpoint is read without
    rounding what was learned."""
    keys = [*TINY, "conf=passkey", "trainer.precision=bf16-mixed", "train.parameters=memory"]
    keys += "data.train_length=48 data.length_schedule=null eval.after_fit=false".split()
    keys += "data.batch_size=2 data.val_depths=1 data.val_examples=1".split()
    keys += f"run.root={tmp_path} run.name=a checkpoint.every_steps=2".split()
    main([*keys, "trainer.max_steps=2"])
    main([*keys, "trainer.max_steps=4", "resume=true"])
    file = tmp_path / "passkey" / "a" / "checkpoints" / "last.ckpt"
    content = torch.load(file, weights_only=True)
    assert content["global_step"] == 4
    halved = {
        name: weight.dtype
        for name, weight in content["state_dict"].items()
        if "global_memory" not in name and "temporary_memory" not in name and "delta" not in name
    }
    assert set(halved.values()) == {torch.bfloat16}
    learned = {n: w for n, w in content["state_dict"].items() if n not in halved}
    assert {weight.dtype for weight in learned.values()} == {torch.float32}
    model, _, _ = load_checkpoint(file, [])
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for name, weight in model.memory_parameters():
        assert torch.equal(weight, content["state_dict"][f"model.{name}"]), name


@pytest.mark.parametrize("way", ["cell", "chunk"])
def test_halved_models_learn_alike_whatever_is_recomputed(way):
    """T keeps the memory's precision, in buffers and between chunks too."""
    model = adapted(small(), "memory+lora").train()
    perturb(model)
    halve_frozen(model)
    gradients = {}
    for recompute in ("none", way):
        one = copy.deepcopy(model)
        _, watch = fit_module(
            one, [batch()], trainer={"precision": "bf16-mixed"}, recompute=recompute
        )
        gradients[recompute] = {n: g for n, g in watch.gradients[0].items() if g is not None}
    assert norm_apart(gradients[way], gradients["none"]) < 1e-3
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache = model.eval()(text(1, 40), use_cache=True).past_key_values
    assert cache.memories[0].temporary.dtype == torch.float32
    assert cache.memories[0].keys.dtype == torch.bfloat16
