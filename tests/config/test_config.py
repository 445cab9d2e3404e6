"""The configuration: what is merged in which order, and one clear line for every mistake."""

import re
from pathlib import Path
from typing import Any

import pytest

from comet_pl.config.load import load
from comet_pl.config.schema import PasskeyData, ScrollsData
from comet_pl.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def message(argv: list[str], command: str = "train", **more: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(argv, command, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- the order of merging --------------------------------------------------------------------------


def test_defaults_then_base_then_conf_then_command_line(conf):
    folder = conf(
        base="train: {lr: 0.1, clip: 2.0, warmup_steps: 3}",
        passkey="train: {lr: 0.2, clip: 3.0}",
        other="train: {lr: 0.3}\nseed: 7\n",
    )
    config = load(["train.lr=0.4"], conf_dir=folder)
    assert (
        config.train.lr,
        config.train.clip,
        config.train.warmup_steps,
        config.train.accumulate,
    ) == (0.4, 3.0, 3, 1)
    other = load(["conf=other"], conf_dir=folder)
    assert (other.conf, other.train.lr, other.train.clip, other.seed) == ("other", 0.3, 2.0, 7)
    assert config.conf == "passkey"


def test_a_defaults_list_is_merged_in_order_before_its_conf(conf):
    folder = conf(
        one="seed: 1\ntrain: {lr: 0.1, clip: 0.1}",
        two="defaults: [one]\nseed: 2\ntrain: {clip: 0.2}",
        backbone__tiny="hidden_size: 16\nnum_hidden_layers: 1\n",
        top="defaults: [two, backbone/tiny]\nbackbone: {num_hidden_layers: 3}\n",
    )
    config = load(["conf=top"], conf_dir=folder)
    assert (config.seed, config.train.lr, config.train.clip) == (2, 0.1, 0.2)
    assert (config.backbone.hidden_size, config.backbone.num_hidden_layers) == (16, 3)


def test_backbone_by_name_goes_over_the_conf_and_under_the_keys(conf):
    folder = conf(
        passkey="backbone: {hidden_size: 32, head_dim: 8}",
        backbone__wide="hidden_size: 512\nnum_hidden_layers: 6\n",
    )
    for argv in (
        ["backbone=wide", "backbone.num_hidden_layers=2"],
        ["backbone.num_hidden_layers=2", "backbone=wide"],
    ):
        backbone = load(argv, conf_dir=folder).backbone
        assert (backbone.hidden_size, backbone.num_hidden_layers, backbone.head_dim) == (512, 2, 8)


def test_data_kind_chooses_the_schema_and_starts_the_section_afresh(conf):
    folder = conf(passkey="data: {train_length: 77, batch_size: 3}")
    assert load([], conf_dir=folder).data == PasskeyData(train_length=77, batch_size=3)
    assert load(["data.root=x", "data.kind=scrolls"], conf_dir=folder).data == ScrollsData(root="x")


def test_interpolation_sees_defaults_and_the_command_line(conf):
    size = "${model.chunk_size}"
    folder = conf(passkey=f"data: {{train_length: '{size}'}}\nrun: {{name: 'chunk-{size}'}}")
    config = load(["model.chunk_size=48"], conf_dir=folder)
    assert (config.data.train_length, config.run.name) == (48, "chunk-48")
    assert "model.chunks" in message(["train.lr=${model.chunks}"], conf_dir=folder)


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("train.lr=1e-3", 1e-3),
        ("train.lr=2", 2.0),
        ("train.clip=null", None),
        ("trainer.max_steps=1e3", 1000),
        ("trainer.max_steps=1_500", 1500),
        ("data.length_schedule=[[0,64],[10,128]]", [[0, 64], [10, 128]]),
        ("data.haystack=/a b/c=d.txt", "/a b/c=d.txt"),
        ("run.name=007", "007"),
        ("run.name=1e3", "1e3"),
        ("run.name='null'", "null"),
        ("run.name=null", None),
        ("resume=false", False),
        ("eval.lengths=[1000000]", [1_000_000]),
        ("trainer.devices=2", 2),
        ("trainer.devices=auto", "auto"),
        ("trainer.devices=[0,1]", [0, 1]),
        ("trainer.val_check_interval=0.5", 0.5),
        ("trainer.val_check_interval=1.0", 1.0),
        ("trainer.val_check_interval=1e2", 100),
        ("trainer.limit_val_batches=0", 0),
        ("train.betas=[0.9,0.95]", [0.9, 0.95]),
        ("model={chunk_size: 9}", None),
    ],
)
def test_values_from_the_command_line(argument: str, value: Any):
    config = load([argument])
    if argument.startswith("model="):
        assert (
            config.model.chunk_size == 9 and config.model.global_size == load([]).model.global_size
        )
        return
    key = argument.partition("=")[0]
    got: Any = config
    for name in key.split("."):
        got = getattr(got, name)
    assert got == value and type(got) is type(value)


def test_yaml_files_read_numbers_as_people_write_them(conf):
    config = load(
        [],
        conf_dir=conf(
            passkey="train: {lr: 1e-3, clip: 3e0}\ntrainer:\n  max_steps: 2e2\n# empty:\nrun:\n"
        ),
    )
    assert (config.train.lr, config.train.clip, config.trainer.max_steps) == (1e-3, 3.0, 200)


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("train.lr=fast", ["train.lr", "'fast'", "number > 0"]),
        ("train.lr=0", ["train.lr", "0", "number > 0"]),
        ("train.lr=.nan", ["train.lr", "number > 0"]),
        ("train.lr=true", ["train.lr: true", "number > 0"]),
        ("train.betas=[0.9,1.0]", ["train.betas", ">= 0 and < 1"]),
        ("train.betas=[0.9]", ["train.betas", "two numbers"]),
        ("train.final_lr=2", ["train.final_lr", "<= 1"]),
        ("trainer.max_steps=1.5", ["trainer.max_steps", "1.5", "integer >= 1"]),
        ("trainer.max_steps=-1", ["trainer.max_steps", "-1", "integer >= 1"]),
        ("trainer.max_steps=true", ["trainer.max_steps", "integer >= 1"]),
        ("model.chunk_size=0", ["model.chunk_size", "integer >= 1"]),
        ("model.compression_stride=0", ["model.compression_stride", "integer >= 1 or null"]),
        (
            "model.gate=scaler",
            ["model.gate", "'scaler'", "scalar, elementwise, none", "did you mean scalar?"],
        ),
        ("trainer.precision=bf16", ["trainer.precision", "bf16-mixed, bf16-true"]),
        ("checkpoint.mode=least", ["checkpoint.mode", "min, max"]),
        ("data.length_schedule=[[0,64],[0,128]]", ["data.length_schedule", "growing steps"]),
        ("data.length_schedule=[[5,64]]", ["data.length_schedule", "[[0, length]"]),
        ("data.length_schedule=[64,128]", ["data.length_schedule", "[[0, length]"]),
        ("data.val_lengths=[0]", ["data.val_lengths", ">= 1"]),
        ("data.val_lengths=[]", ["data.val_lengths", "list"]),
        ("data.val_lengths=64", ["data.val_lengths", "64", "list"]),
        (
            "data.kind=scrols",
            ["data.kind", "'scrols'", "passkey, scrolls", "did you mean scrolls?"],
        ),
        ("trainer.val_check_interval=1.5", ["trainer.val_check_interval", "1.5", "fraction"]),
        ("trainer.val_check_interval=0", ["trainer.val_check_interval", "0", "integer >= 1"]),
        ("trainer.devices=0", ["trainer.devices", "0", "auto"]),
        ("trainer.devices=many", ["trainer.devices", "'many'", "auto"]),
        ("trainer.accelerator=gpus", ["trainer.accelerator", "did you mean gpu?"]),
        ("seed=-1", ["seed", "-1"]),
        ("resume=maybe", ["resume", "'maybe'", "true or false"]),
        ("resume=true", ["resume", "run.name"]),
        ("run.name=a/b", ["run.name", "'a/b'", "folder name (no slashes)"]),
        (
            "backbone.num_key_value_heads=5",
            ["backbone.num_key_value_heads", "5", "num_attention_heads=6"],
        ),
        ("backbone.head_dim=33", ["backbone.head_dim", "33", "even"]),
        ("eval.examples=null", ["eval.examples", "null"]),
        ("train=3", ["train", "3", "section"]),
        ("data=scrolls", ["data", "section", "data.kind="]),
        ("train.lr=", ["train.lr=", "null"]),
        ("train.lr", ["'train.lr'", "key=value"]),
        ("--train.lr=3", ["'--train.lr=3'", "key=value"]),
        ("train.betas=[0.9", ["train.betas", "'[0.9'"]),
    ],
)
def test_impossible_values_are_named_in_one_line(argument: str, parts: list[str]):
    text = message([argument])
    assert [part for part in parts if part not in text] == []


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.new_days=[400,30]", "[least, most] with 1 <= least <= most"),
        ("data.new_days=[5]", "[least, most]"),
        ("data.new_days=[0,3]", "[least, most]"),
        ("data.new_days=[1,100000000000000000000]", "<= 36500"),
        ("data.shift_days=40000", "integer >= 0 and <= 36500"),
        ("data.layout=item", "did you mean items?"),
        ("data.day_header=false", "data.day_header: no such key any more; it is now data.layout"),
        ("backbone.lookback=[-1,2]", "backbone.lookback: [-1, 2]"),
    ],
)
def test_mistakes_about_user_behaviour(override: str, expected: str):
    with pytest.raises(UserError, match=re.escape(expected)):
        load(["conf=user_behavior", override])


@pytest.mark.parametrize(
    ("argument", "near"),
    [
        ("train.lrr=1", "train.lr"),
        ("trainn.lr=1", "train.lr"),
        ("lr=1e-3", "train.lr"),
        ("train.chunk_size=3", "model.chunk_size"),
        ("seeed=1", "seed"),
        ("data.train_lenght=1", "data.train_length"),
        ("backbone.hiden_size=1", "backbone.hidden_size"),
    ],
)
def test_unknown_keys_get_the_nearest_match(argument: str, near: str):
    text = message([argument])
    assert (
        text.startswith(f"{argument.partition('=')[0]}: no such key")
        and f"did you mean {near}?" in text
    )


def test_a_key_of_another_kind_of_data_is_said_to_be_one():
    assert "belongs to data.kind=scrolls" in message(["data.tasks=[qmsum]"])


def test_eval_only_keys_are_unknown_to_training():
    assert message(["ckpt=x"]).startswith("ckpt: no such key")


# -- conf files ------------------------------------------------------------------------------------


def test_unknown_confs_get_the_nearest_match_and_the_list(conf):
    folder = conf(
        scrolls="", backbone__tiny="hidden_size: 16", top="seed: 1\ndefaults: [nowhere]\n"
    )
    assert (
        message(["conf=scrols"], conf_dir=folder)
        == "conf=scrols: no such conf (did you mean scrolls?); there are: passkey, scrolls, top"
    )
    assert (
        "backbone=tine" in (text := message(["backbone=tine"], conf_dir=folder))
        and "did you mean tiny?" in text
    )
    assert "conf/top.yaml:2" in message(["conf=top"], conf_dir=folder)
    assert "no such conf" in message(["conf=base"], conf_dir=folder)
    assert "no such conf" in message(["conf=../passkey"], conf_dir=folder)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            "train:\n  lr: 1\n  lrr: 2\n",
            ["train.lrr", "conf/passkey.yaml:3", "did you mean train.lr?"],
        ),
        ("train:\n\n  lr: fast\n", ["train.lr", "'fast'", "conf/passkey.yaml:3"]),
        ("train: 3\n", ["train", "3", "conf/passkey.yaml:1", "section"]),
        ("run:\n  name: 2024\n", ["run.name", "2024", "conf/passkey.yaml:2", "quotes"]),
        ("data:\n  kind: other\n", ["data.kind", "'other'", "conf/passkey.yaml:2"]),
        ("train: [1\nseed: 2\n", ["conf/passkey.yaml:2", "malformed yaml"]),
        ("train:\n\t lr: 1\n", ["conf/passkey.yaml:2", "malformed yaml"]),
        ("seed: 1\nseed: 2\n", ["conf/passkey.yaml:2", "duplicate"]),
        ("- seed\n", ["conf/passkey.yaml:1", "key: value"]),
        ("seed\n", ["conf/passkey.yaml:1", "key: value"]),
        ("conf: scrolls\n", ["conf/passkey.yaml:1", "command line"]),
        ("defaults: {a: b}\n", ["conf/passkey.yaml:1", "list of confs"]),
        ("train: {lr: '${'}\n", ["train.lr"]),
    ],
)
def test_mistakes_in_a_conf_name_file_and_line(conf, text: str, parts: list[str]):
    got = message([], conf_dir=conf(passkey=text))
    assert [part for part in parts if part not in got] == []


def test_defaults_in_a_circle_are_refused(conf):
    folder = conf(one="defaults: [two]", two="defaults: [one]")
    assert "one -> two -> one" in message(["conf=one"], conf_dir=folder)


def test_a_missing_value_names_its_key_and_its_place(conf):
    folder = conf(passkey="data:\n  haystack: ???\n")
    text = message([], conf_dir=folder)
    assert text.startswith(
        "data.haystack: missing (conf/passkey.yaml:2 leaves it open), give it as "
        "data.haystack=VALUE"
    )
    assert load(["data.haystack=x.txt"], conf_dir=folder).data.haystack == "x.txt"


def test_binary_and_unreadable_files_are_one_line(conf):
    folder = conf()
    (folder / "passkey.yaml").write_bytes(b"\xff\xfe\x00seed: 1")
    assert "conf/passkey.yaml" in message([], conf_dir=folder)
    (folder / "folder.yaml").mkdir()
    assert "conf/folder.yaml: cannot be read" in message(["conf=folder"], conf_dir=folder)
