"""eval.py's configuration, and what a Config becomes: dicts, yaml, pickles, older versions."""

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from comet_pl.config.load import CONF_DIR, eval_paths, from_dict, load, to_dict
from comet_pl.config.schema import DATA_KINDS, Config, ScrollsData
from comet_pl.config.sources import conf_names
from comet_pl.errors import UserError

# -- eval.py ---------------------------------------------------------------------------------------


def test_eval_starts_from_the_checkpoint_then_conf_then_keys(conf):
    folder = conf(
        base="train: {lr: 9.0}",
        scrolls="data: {kind: scrolls, max_length: 300}\nmodel: {chunk_size: 30}",
    )
    base = to_dict(
        load(["train.lr=0.5", "model.global_size=3", "data.train_length=99"], conf_dir=folder)
    )
    same = load(["ckpt=x", "out=y"], "eval", base=base, conf_dir=folder)
    assert same == from_dict(base)
    key = load(["ckpt=x", "eval.depths=2"], "eval", base=base, conf_dir=folder)
    assert key == dataclasses.replace(same, eval=dataclasses.replace(same.eval, depths=2))
    other = load(["ckpt=x", "conf=scrolls"], "eval", base=base, conf_dir=folder)
    assert other.data == ScrollsData(max_length=300)
    assert (other.conf, other.train.lr, other.model.chunk_size, other.model.global_size) == (
        "scrolls",
        0.5,
        30,
        3,
    )


def test_eval_without_a_known_configuration_takes_base_and_keys_only(conf):
    folder = conf(base="seed: 3", passkey="seed: 4")
    config = load(["ckpt=x", "data.train_length=128"], "eval", conf_dir=folder)
    assert (config.conf, config.seed, config.data.train_length) == (None, 3, 128)


def test_eval_paths():
    assert eval_paths(["ckpt=runs/a=b", "eval.depths=3", "out=o"]) == (Path("runs/a=b"), Path("o"))
    assert eval_paths(["ckpt=x"]) == (Path("x"), None)
    with pytest.raises(UserError, match=r"^ckpt: missing"):
        eval_paths(["out=x"])


def test_a_checkpoint_with_keys_of_another_version_is_one_line():
    values = to_dict(load([]))
    values["train"]["novelty"] = 3
    with pytest.raises(
        UserError, match=r"train\.novelty: no such key \(the checkpoint's configuration\)"
    ):
        from_dict(values)


# -- the result ------------------------------------------------------------------------------------


@given(
    name=st.sampled_from(conf_names(CONF_DIR)),
    lr=st.floats(1e-8, 1e3),
    steps=st.integers(1, 10**9),
    stride=st.none() | st.integers(1, 999),
)
def test_dict_yaml_and_pickle_round_trips(name: str, lr: float, steps: int, stride: int | None):
    shown = "null" if stride is None else stride
    config = load(
        [
            f"conf={name}",
            f"train.lr={lr!r}",
            f"trainer.max_steps={steps}",
            f"model.compression_stride={shown}",
        ]
    )
    assert (config.train.lr, config.trainer.max_steps, config.model.compression_stride) == (
        lr,
        steps,
        stride,
    )
    assert from_dict(to_dict(config)) == config
    assert from_dict(yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_the_result_is_frozen_and_plain():
    config = load(["data.length_schedule=[[0,8]]"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.lr = 1.0

    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return type(value) is dict and all(plain(item) for item in value.values())
        if isinstance(value, list):
            return type(value) is list and all(plain(item) for item in value)
        return value is None or type(value) in (bool, int, float, str)

    assert plain(to_dict(config))


def test_defaults_are_never_shared_between_configs():
    before = list(load([]).train.betas)
    load([]).train.betas.append(3.0)
    assert load([]).train.betas == before
    from_dict({}).train.betas.append(3.0)
    assert from_dict({}).train.betas == [0.9, 0.999]


@pytest.mark.parametrize("name", conf_names(CONF_DIR))
def test_every_conf_of_the_project_loads_and_round_trips(name: str):
    left_open = {"plug_in": ["backbone.path=DECODER"]}
    config = load([f"conf={name}", *left_open.get(name, [])])
    assert config.conf == name and from_dict(to_dict(config)) == config


@pytest.mark.parametrize("name", conf_names(CONF_DIR, "backbone"))
def test_every_backbone_of_the_project_loads(name: str):
    assert load([f"backbone={name}"]).backbone is not None


def test_every_default_satisfies_its_own_rules():
    assert from_dict({"conf": "passkey"}) == Config()
    for kind, schema in DATA_KINDS.items():
        assert from_dict({"data": {"kind": kind}}).data == schema()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"kind": "user_behavior", "day_header": True}, {"layout": "days"}),
        ({"kind": "user_behavior", "day_header": False}, {"layout": "lines"}),
        ({"kind": "user_behavior", "train_length": 64}, {"layout": "days", "whole_words": False}),
        ({"kind": "user_behavior", "train_length": 64, "whole_words": True}, {"whole_words": True}),
    ],
)
def test_a_former_versions_data_mean_what_they_meant(old: dict[str, Any], new: dict[str, Any]):
    data = to_dict(from_dict({"data": old}))["data"]
    assert {key: data[key] for key in new} == new and "day_header" not in data
    # None of the later augmentations.
    assert (data["keep_events"], data["shift_days"], data["new_days"]) == (1.0, 0, None)
