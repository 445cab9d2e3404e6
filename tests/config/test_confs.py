"""The confs and families of the project."""

import dataclasses

import pytest

from comet_pl.config.load import load
from comet_pl.config.schema import BackboneConfig
from comet_pl.errors import UserError

FAMILIES = {one.name: one for one in dataclasses.fields(BackboneConfig)}["model_type"].metadata[
    "choices"
]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_built_from_scratch(family):
    from comet_pl.build import build_model
    from comet_pl.model.cell import SUPPORTED
    from data.tokenizer import train_tokenizer

    assert set(SUPPORTED) == set(FAMILIES)
    sizes = [
        "hidden_size=16",
        "head_dim=8",
        "num_attention_heads=2",
        "num_key_value_heads=2",
        "intermediate_size=24",
    ]
    config = load([f"backbone.model_type={family}", *(f"backbone.{size}" for size in sizes)])
    model = build_model(config, train_tokenizer(["a b c"], 300))
    assert model.config.backbone_config.model_type == family
    assert (
        model.config.backbone_config.max_position_embeddings == 8 + 16 + 64 + 8 + 8
    )  # m + K + C + C/s + m of conf=passkey


def test_a_folder_that_make_builds_is_named_with_its_target(tmp_path, monkeypatch):
    from comet_pl.build import build_tokenizer

    config = load(["backbone=smollm2_135m"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError,
        match=r"backbone.path: models/smollm2_135m is not there yet; `make smollm2` builds it",
    ):
        build_tokenizer(config)


@pytest.mark.parametrize("conf", ["scrolls_paper", "agent_paper", "user_behavior_paper"])
def test_the_paper_confs_hold_the_papers_recipe(conf):
    config = load([f"conf={conf}"])
    m, t = config.model, config.train
    assert (
        m.chunk_size,
        m.global_size,
        m.compression_stride,
        m.temporary_capacity,
        m.adapter_rank,
    ) == (2048, 512, 8, 2048, 8)
    assert (
        t.lr,
        t.memory_lr_factor,
        t.betas,
        t.weight_decay,
        t.warmup_steps,
        t.final_lr,
        t.clip,
    ) == (5e-5, 5, [0.9, 0.999], 0, 10, 0, 1)
    assert config.backbone.path == "Qwen/Qwen3-4B-Instruct-2507"
    length = config.data.train_length if conf.startswith("user") else config.data.max_length
    assert length == 32768
    assert conf.startswith("user") or (
        config.data.chunk_plan,
        config.data.dynamic_stride,
        config.trainer.max_epochs,
    ) == (
        "mixture",
        True,
        3,
    )
