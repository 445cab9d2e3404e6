"""From conf files and the command line to one frozen, checked `Config`.

Defaults (comet_pl/config/schema.py) <- conf/base.yaml <- conf/NAME.yaml, after the confs in its `defaults:` list <- `key=value` arguments.
OmegaConf reads, merges and interpolates; comet_pl/config/rules.py checks each value. Every mistake is a UserError of one line. Neither torch
nor Lightning is imported here, so that `--help` and the message about a typo come soon.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from comet_pl.config.rules import convert
from comet_pl.config.schema import (
    DATA_KINDS,
    BackboneConfig,
    CheckpointConfig,
    Config,
    EvalConfig,
    ModelConfig,
    PasskeyData,
    RunConfig,
    ScrollsData,
    TrainConfig,
    TrainerConfig,
)
from comet_pl.config.sources import (
    Layer,
    command_line_layer,
    conf_layers,
    conf_names,
    in_a_line,
    read_arguments,
    read_file,
)
from comet_pl.errors import UserError, nearest

__all__ = [
    "DATA_KINDS",
    "BackboneConfig",
    "CheckpointConfig",
    "Config",
    "EvalConfig",
    "ModelConfig",
    "PasskeyData",
    "RunConfig",
    "ScrollsData",
    "TrainConfig",
    "TrainerConfig",
    "conf_names",
    "eval_paths",
    "from_dict",
    "help_text",
    "load",
    "to_dict",
]

CONF_DIR = Path(__file__).resolve().parents[2] / "conf"
EVAL_KEYS = {
    "ckpt": "checkpoint file, run folder or model folder to evaluate",
    "out": "folder for the results; default: the run's folder",
}


def load(
    argv: list[str],
    command: str = "train",
    base: Mapping[str, Any] | None = None,
    conf_dir: Path = CONF_DIR,
) -> Config:
    """The configuration that the arguments ask for. `--help` prints all there is and exits.

    Args:
        argv: `key=value` arguments; `conf=NAME` chooses a conf, `backbone=NAME` fills that section from conf/backbone/NAME.yaml.
        command: "train", or "eval": then `ckpt=` and `out=` are allowed (and left to `eval_paths`) and no conf is taken unless named.
        base: what a checkpoint knows (`to_dict` of its Config); it takes the place of the defaults and of conf/base.yaml.

    Raises:
        UserError: an unknown or missing key, a conf that does not exist, malformed yaml, a wrong type, an impossible value.
    """
    if {"-h", "--help"} & set(argv):
        print(help_text(command, conf_dir))
        raise SystemExit(0)
    given = read_arguments(argv)
    if command == "eval":
        given = {key: text for key, text in given.items() if key not in EVAL_KEYS}
    conf = given.pop("conf", None if command == "eval" else "passkey")
    backbone = None if given.get("backbone", "{").startswith("{") else given.pop("backbone")
    if base is None:
        layers = [read_file(conf_dir / "base.yaml", f"{conf_dir.name}/base.yaml")]
    else:
        layers = [_checkpoint_layer(base)]
    layers += conf_layers(conf, conf_dir) if conf is not None else []
    layers += conf_layers(f"backbone/{backbone}", conf_dir) if backbone is not None else []
    chosen = conf if conf is not None or base is None else base.get("conf")
    config = _merge([*layers, command_line_layer(given)], chosen)
    _check_together(config, command)
    return config


def eval_paths(argv: list[str]) -> tuple[Path | None, Path | None]:
    """(ckpt, out) of eval.py's arguments; ckpt is None only if help is asked for.

    Raises:
        UserError: ckpt is not given.
    """
    if {"-h", "--help"} & set(argv):
        return None, None
    given = read_arguments(argv)
    if not given.get("ckpt"):
        raise UserError(
            "ckpt: missing, give the checkpoint file or the run's folder: eval.py ckpt=PATH"
        )
    return Path(given["ckpt"]).expanduser(), Path(
        given["out"]
    ).expanduser() if "out" in given else None


def to_dict(config: Config) -> dict[str, Any]:
    """Plain dicts, lists and scalars: fit for yaml and for a checkpoint."""
    return dataclasses.asdict(config)


def from_dict(values: Mapping[str, Any]) -> Config:
    """The Config that `to_dict` was made from; keys that are absent take their defaults.

    Raises:
        UserError: unknown keys or impossible values.
    """
    return _merge([_checkpoint_layer(values)], values.get("conf"))


def help_text(command: str = "train", conf_dir: Path = CONF_DIR) -> str:
    """What `--help` prints: the confs, and every key with its default in the default conf, its type and its meaning."""
    from comet_pl.config.help import render

    return render(command, conf_dir)


def _checkpoint_layer(values: Mapping[str, Any]) -> Layer:
    """What a checkpoint knows; train.recompute was true or false in older ones."""
    train = dict(values.get("train", {}))
    if isinstance(train.get("recompute"), bool):
        train["recompute"] = "cell" if train["recompute"] else "none"
    return Layer("the checkpoint's configuration", {**values, "train": train})


def _merge(layers: list[Layer], conf: str | None) -> Config:
    kind, layers = _data_kind(layers)
    schemas = {**get_type_hints(Config), "data": DATA_KINDS[kind]}
    places: dict[str, str] = {}  # dotted key -> where its value comes from
    missing: dict[
        str, str
    ] = {}  # the same, of keys that were left as ??? (OmegaConf would keep the default)
    for layer in layers:
        _check_names(layer, schemas, kind)
        for key, value in _leaves(layer.values):
            places[key] = layer.place(key)
            missing.pop(key, None)
            if value == "???":
                missing[key] = layer.place(key)
    if missing:
        key, place = next(iter(missing.items()))
        raise UserError(
            f"{key}: missing{f' ({place} leaves it open)' if place else ''}, give it as {key}=VALUE"
        )
    defaults = dataclasses.asdict(Config(data=DATA_KINDS[kind]()))
    try:
        merged = OmegaConf.merge(
            *(
                OmegaConf.create(values)
                for values in (defaults, *(layer.values for layer in layers), {"conf": conf})
            )
        )
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(in_a_line(error)) from None
    return _build(Config, values, "", schemas, places)


def _leaves(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for section, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{section}.{name}", inner) for name, inner in value.items())
        else:
            yield section, value


def _data_kind(layers: list[Layer]) -> tuple[str, list[Layer]]:
    """The data.kind that the layers end with; a layer that changes it starts the data section afresh: earlier data keys are dropped."""
    kind = PasskeyData.kind
    kept: list[Layer] = []
    for layer in layers:
        data = layer.values.get("data")
        new = data.get("kind", kind) if isinstance(data, dict) else kind
        if not isinstance(new, str) or new not in DATA_KINDS:
            origin = f" ({place})" if (place := layer.place("data.kind")) else ""
            near = nearest(str(new), DATA_KINDS)
            raise UserError(
                f"data.kind: {new!r} given{origin}, allowed: {', '.join(DATA_KINDS)}{near}"
            )
        if new != kind:
            kept = [
                dataclasses.replace(
                    one, values={k: v for k, v in one.values.items() if k != "data"}
                )
                for one in kept
            ]
        kind = new
        kept.append(layer)
    return kind, kept


def _check_names(layer: Layer, schemas: dict[str, Any], kind: str) -> None:
    """Every key of the layer exists, and a section is a section. A section left empty in a file counts as absent."""
    for section, values in list(layer.values.items()):
        schema = schemas.get(section)
        if schema is None:
            first = f".{next(iter(values))}" if isinstance(values, dict) and values else ""
            raise _unknown(section + first, layer, schemas, kind)
        if not dataclasses.is_dataclass(schema):
            continue
        if values is None and layer.name:
            del layer.values[section]
        elif not isinstance(values, dict):
            origin = f" ({place})" if (place := layer.place(section)) else ""
            raise UserError(
                f"{section}: {values!r} given{origin}, but it is a section: set its keys, such as {section}.{_names(schema)[0]}="
            )
        else:
            for name in values:
                if name not in _names(schema):
                    raise _unknown(f"{section}.{name}", layer, schemas, kind)


RENAMED = {"data.day_header": "data.layout: days, which was true, or lines"}


def _unknown(key: str, layer: Layer, schemas: dict[str, Any], kind: str) -> UserError:
    section, _, name = key.rpartition(".")
    origin = f" ({place})" if (place := layer.place(key)) else ""
    if key in RENAMED:
        return UserError(f"{key}: no such key any more{origin}; it is now {RENAMED[key]}")
    for other, schema in DATA_KINDS.items():
        if section == "data" and name in _names(schema):
            return UserError(
                f"{key}: no key of data.kind={kind}{origin}; it belongs to data.kind={other}"
            )
    known = [one for one, schema in schemas.items() if not dataclasses.is_dataclass(schema)]
    known += [
        f"{one}.{leaf}"
        for one, schema in schemas.items()
        if dataclasses.is_dataclass(schema)
        for leaf in _names(schema)
    ]
    same = [
        one for one in known if one.split(".")[-1] == name
    ]  # the right key without its section, or in the wrong one
    near = f" (did you mean {same[0]}?)" if same else nearest(key, known)
    return UserError(f"{key}: no such key{origin}{near or '; --help lists all keys'}")


def _names(schema: Any) -> list[str]:
    return [one.name for one in dataclasses.fields(schema)]


def _build(
    schema: Any, values: Any, prefix: str, schemas: dict[str, Any], places: dict[str, str]
) -> Any:
    """An instance of the schema from complete, resolved values, each converted and checked."""
    built = {}
    hints = {**get_type_hints(schema), **(schemas if schema is Config else {})}
    for one in dataclasses.fields(schema):
        name, value = prefix + one.name, values[one.name]
        if dataclasses.is_dataclass(hints[one.name]):
            built[one.name] = _build(hints[one.name], value, f"{name}.", schemas, places)
        else:
            built[one.name] = convert(
                value, hints[one.name], one.metadata, name, places.get(name, "")
            )
    return schema(**built)


def _check_together(config: Config, command: str) -> None:
    """What no single value shows."""
    b = config.backbone
    if command == "train" and config.resume and config.run.name is None:
        raise UserError(
            "resume: true given without run.name, so there is no run to go on with; add run.name=NAME"
        )
    if b.path is None and b.num_attention_heads % b.num_key_value_heads:
        raise UserError(
            f"backbone.num_key_value_heads: {b.num_key_value_heads} given, it must divide num_attention_heads={b.num_attention_heads}"
        )
    if b.path is None and b.head_dim % 2:
        raise UserError(
            f"backbone.head_dim: {b.head_dim} given, allowed: an even number (rotary embedding)"
        )
    if isinstance(config.data, PasskeyData) and config.eval.examples is None:
        raise UserError(
            "eval.examples: null given, allowed with data.kind=passkey: integer >= 1 (examples a cell)"
        )
    if command == "train":
        _check_parameters(config)
        _check_recompute(config)
        _check_gate_penalty(config)
        _check_compile(config)


def _check_parameters(config: Config) -> None:
    """train.parameters fits the model, and its companions have an effect."""
    train, default = config.train, TrainConfig()
    lora = [
        name
        for name in ("lora_rank", "lora_alpha", "lora_dropout")
        if getattr(train, name) != getattr(default, name)
    ]
    if lora and "lora" not in train.parameters:
        raise UserError(
            f"train.{lora[0]}: given, but train.parameters is {train.parameters}; it needs lora or memory+lora"
        )
    if (
        "memory" in train.parameters
        and not config.model.global_size
        and config.model.compression_stride is None
    ):
        raise UserError(
            f"train.parameters: {train.parameters} given, but model.global_size=0 and model.compression_stride=null leave no memory to "
            "train, allowed: all, lora"
        )


def _check_recompute(config: Config) -> None:
    """train.recompute fits the strategy, and its companion has an effect."""
    train = config.train
    if train.offload and train.recompute != "chunk":
        raise UserError(
            f"train.offload: true given, but train.recompute is {train.recompute}; it needs chunk"
        )
    if train.recompute == "chunk" and config.trainer.strategy == "layer_pipeline":
        raise UserError(
            "train.recompute: chunk given, but trainer.strategy is layer_pipeline, whose devices keep their own chunks, allowed: none, cell"
        )


def _check_compile(config: Config) -> None:
    """train.compile fits the sharding."""
    if config.train.compile and (sharding := config.strategy.sharding) != "none":
        raise UserError(
            f"train.compile: true given, but strategy.sharding is {sharding}, which hooks itself into each layer, allowed: false, or "
            "strategy.sharding=none"
        )


def _check_gate_penalty(config: Config) -> None:
    """There are gates, gradients reach them, and the target has an effect."""
    train, model = config.train, config.model
    if train.gate_target != TrainConfig().gate_target and not train.gate_pull:
        raise UserError(
            f"train.gate_target: {train.gate_target} given, but train.gate_pull is 0; it needs a weight > 0"
        )
    for name in ("gate_pull", "gate_entropy"):
        given = f"train.{name}: {getattr(train, name)} given"
        if not getattr(train, name):
            continue
        if not model.global_size or model.gate == "none":
            key = "model.gate=none" if model.global_size else "model.global_size=0"
            raise UserError(
                f"{given}, but {key} leaves no gates, allowed: 0, or another {key.split('=')[0]}"
            )
        if train.bptt_chunks == 1:
            raise UserError(
                f"{given}, but with train.bptt_chunks=1 no gradient reaches a gate, allowed: 0, or train.bptt_chunks >= 2"
            )
