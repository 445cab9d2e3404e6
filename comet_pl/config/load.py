"""From conf files and the command line to one frozen, checked `Config`.

Defaults (schema.py) <- conf/base.yaml <- conf/NAME.yaml, after the confs in its `defaults:` list,
<- `key=value` arguments. OmegaConf's structured configs hold the types, merge and interpolate;
rules.py has what is possible beyond a type. Every mistake is a UserError of one line. Neither torch
nor Lightning is imported here, so that `--help` and the message about a typo come soon.
"""

import copy
import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from comet_pl.config.rules import as_written, possible, refusal
from comet_pl.config.schema import DATA_KINDS, Config, PasskeyData
from comet_pl.config.sources import (
    Layer,
    command_line_layer,
    conf_layers,
    in_a_line,
    is_section,
    read_arguments,
    read_file,
)
from comet_pl.config.together import check_together
from comet_pl.errors import UserError, nearest

CONF_DIR = Path(__file__).resolve().parents[2] / "conf"
EVAL_KEYS = {
    "ckpt": "checkpoint file, run folder or model folder to evaluate",
    "out": "folder for the results; default: the run's folder",
}
# Keys of former versions and of Lightning's Trainer -> what they are called here.
ELSEWHERE = {
    "data.day_header": "no such key any more{}; it is now data.layout: days, was true, or lines",
    "trainer.gradient_clip_val": "no such key{}; it is train.clip here",
    "trainer.accumulate_grad_batches": "no such key{}; it is train.accumulate here",
}


def load(
    argv: list[str],
    command: str = "train",
    base: Mapping[str, Any] | None = None,
    conf_dir: Path = CONF_DIR,
) -> Config:
    """The configuration that the arguments ask for.

    Args:
        argv: `key=value` arguments; `conf=NAME` chooses a conf, `backbone=NAME` fills that section
            from conf/backbone/NAME.yaml.
        command: "train", or "eval": then `ckpt=` and `out=` are allowed (and left to `eval_paths`)
            and no conf is taken unless named.
        base: what a checkpoint or a run's folder knows (`to_dict` of its Config), instead of the
            defaults and conf/base.yaml. A training then takes no conf file: the run has its own.

    Raises:
        UserError: an unknown or missing key, a conf that does not exist, malformed yaml, a wrong
            type, an impossible value.
    """
    arguments = read_arguments(argv)
    if command == "eval":
        arguments = {key: text for key, text in arguments.items() if key not in EVAL_KEYS}
    conf = arguments.pop("conf", None if command == "eval" else "passkey")
    backbone = None
    if not arguments.get("backbone", "{").startswith("{"):
        backbone = arguments.pop("backbone")
    if base is None:
        layers = [read_file(conf_dir / "base.yaml", f"{conf_dir.name}/base.yaml")]
    else:
        strategy = base.get("trainer", {}).get("strategy")
        if arguments.get("trainer.strategy", strategy) != strategy:
            # The section's values are for the strategy that the run had.
            base = {key: value for key, value in base.items() if key != "strategy"}
        layers = [checkpoint_layer(base)]
    if conf is not None and (base is None or command == "eval"):
        section, slash, name = conf.partition("/")
        if slash and is_section(section):
            raise UserError(f"conf={conf}: holds keys of one section; write {section}={name}")
        layers += conf_layers(conf, conf_dir)
    if backbone is not None:
        layers += conf_layers(f"backbone/{backbone}", conf_dir)
    layers.append(command_line_layer(arguments))
    config = merge(layers, base.get("conf") if conf is None and base is not None else conf)
    check_together(config, command)
    return config


def eval_paths(argv: list[str]) -> tuple[Path, Path | None]:
    """(ckpt, out) of eval.py's arguments.

    Raises:
        UserError: ckpt is missing.
    """
    arguments = read_arguments(argv)
    if not arguments.get("ckpt"):
        raise UserError(
            "ckpt: missing, give the checkpoint file or the run's folder: eval.py ckpt=PATH"
        )
    out = arguments.get("out")
    return Path(arguments["ckpt"]).expanduser(), None if out is None else Path(out).expanduser()


def to_dict(config: Config) -> dict[str, Any]:
    """Plain dicts, lists and scalars: fit for yaml and for a checkpoint."""
    return dataclasses.asdict(config)


def from_dict(values: Mapping[str, Any]) -> Config:
    """The Config that `to_dict` was made from; keys that are absent take their defaults.

    Raises:
        UserError: unknown keys or impossible values.
    """
    return merge([checkpoint_layer(values)], values.get("conf"))


def upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of any former version in today's keys; an absent key means what the code did
    before it had the key."""
    sections = {k: dict(v) if isinstance(v, Mapping) else v for k, v in values.items()}
    train, data = sections.get("train"), sections.get("data")
    if isinstance(train, dict) and isinstance(train.get("recompute"), bool):
        train["recompute"] = "cell" if train["recompute"] else "none"
    if isinstance(data, dict) and data.get("kind") == "user_behavior":
        if "day_header" in data:
            data["layout"] = "days" if data.pop("day_header") else "lines"
        # The tokenizer spelt every number digit by digit.
        if "train_length" in data:
            data.setdefault("whole_words", False)
    return sections


def checkpoint_layer(values: Mapping[str, Any]) -> Layer:
    """What a checkpoint or a run's folder knows."""
    return Layer("the checkpoint's configuration", upgraded(values))


def merge(layers: list[Layer], conf: str | None) -> Config:
    """One Config from layers, the last one first in rank."""
    kind, layers = data_kind(layers)
    schemas, root = schemas_of(kind), copy.deepcopy(defaults(kind))
    places, written = {"conf": ""}, dict[str, Any]()
    for layer in layers:
        for key, value in leaves(layer, schemas, kind):
            places[key], written[key] = layer.place(key), value
            section = key.partition(".")[0]
            assign(root, key, value, schemas[section] if section != key else Config, places[key])
    assign(root, "conf", conf, Config)
    try:
        for key in sorted(OmegaConf.missing_keys(root)):
            origin = f" ({places[key]} leaves it open)" if places.get(key) else ""
            raise UserError(f"{key}: missing{origin}, give it as {key}=VALUE")
        merged = OmegaConf.to_object(root)
    except OmegaConfBaseException as error:
        raise UserError(in_a_line(error)) from None
    config = Config(**{name: getattr(merged, name) for name in schemas})
    check_values(config, "", places, written)
    return config


def schemas_of(kind: str) -> dict[str, Any]:
    """The types of Config's fields with this data.kind."""
    return {**get_type_hints(Config), "data": DATA_KINDS[kind]}


@functools.cache
def defaults(kind: str) -> DictConfig:
    """The defaults with this data.kind as OmegaConf's typed nodes, open for values."""
    schemas = schemas_of(kind)
    fields: list[Any] = []
    for one in dataclasses.fields(Config):
        schema = schemas[one.name]
        section = dataclasses.is_dataclass(schema)
        default = dataclasses.field(default_factory=schema) if section else one.default
        fields.append((one.name, schema, default))
    root = OmegaConf.structured(dataclasses.make_dataclass("Config", fields))
    for name, schema in schemas.items():
        # Frozen classes make read-only nodes.
        if dataclasses.is_dataclass(schema):
            OmegaConf.set_readonly(root[name], False)
    return root


def assign(
    root: DictConfig, key: str, value: Any, schema: type, place: str = "", prefix: str = ""
) -> None:
    """Sets a key of the schema that holds it. Raises UserError for a value of another type."""
    name = key.rpartition(".")[2]
    hint = get_type_hints(schema)[name]
    try:
        OmegaConf.update(root, key, as_written(value, hint), merge=False)
    except (TypeError, OmegaConfBaseException):
        rules = next(one.metadata for one in dataclasses.fields(schema) if one.name == name)
        raise refusal(value, hint, rules, prefix + key, place) from None


def check_values(
    values: Any, prefix: str, places: Mapping[str, str], written: Mapping[str, Any]
) -> None:
    """Raises UserError for the first value that its rules do not allow.

    Args:
        places, written: where the value of a key stands, and as what.
    """
    hints = get_type_hints(type(values))
    for one in dataclasses.fields(values):
        value, key = getattr(values, one.name), prefix + one.name
        if dataclasses.is_dataclass(value):
            check_values(value, f"{key}.", places, written)
        elif not possible(value, one.metadata):
            # An interpolation shows what it stands for.
            if not isinstance(written.get(key), str):
                value = written.get(key, value)
            raise refusal(value, hints[one.name], one.metadata, key, places.get(key, ""))


def filled(schema: type, values: Mapping[str, Any], prefix: str) -> Any:
    """An instance of a schema from values of the command line, each checked.

    Args:
        prefix: of the keys in messages.

    Raises:
        UserError: a wrong type or an impossible value.
    """
    root = OmegaConf.structured(schema)
    OmegaConf.set_readonly(root, False)
    for name, value in values.items():
        assign(root, name, value, schema, prefix=prefix)
    made = OmegaConf.to_object(root)
    check_values(made, prefix, {}, {})
    return made


def data_kind(layers: list[Layer]) -> tuple[str, list[Layer]]:
    """The data.kind that the layers end with. A layer that changes it starts the data section
    afresh: earlier data keys are dropped."""
    kind = PasskeyData.kind
    kept: list[Layer] = []
    for layer in layers:
        data = layer.values.get("data")
        new = data.get("kind", kind) if isinstance(data, dict) else kind
        if not isinstance(new, str) or new not in DATA_KINDS:
            rules = {"choices": tuple(DATA_KINDS)}
            raise refusal(new, str, rules, "data.kind", layer.place("data.kind"))
        if new != kind:
            kept = [layer.without("data") for layer in kept]
        kind = new
        kept.append(layer)
    return kind, kept


def leaves(layer: Layer, schemas: Mapping[str, Any], kind: str) -> list[tuple[str, Any]]:
    """(dotted key, value) of a layer. A section left empty in a file counts as absent.

    Raises:
        UserError: a key that does not exist, or a value for a whole section.
    """
    found: list[tuple[str, Any]] = []
    for section, values in layer.values.items():
        schema = schemas.get(section)
        if schema is None:
            first = f".{next(iter(values))}" if isinstance(values, dict) and values else ""
            raise unknown(section + first, layer, schemas, kind)
        if not dataclasses.is_dataclass(schema):
            found.append((section, values))
        elif isinstance(values, dict):
            for name in values:
                if name not in names(schema):
                    raise unknown(f"{section}.{name}", layer, schemas, kind)
            found += [(f"{section}.{name}", value) for name, value in values.items()]
        elif values is not None or not layer.name:
            raise UserError(
                f"{section}: {values!r} given{layer.origin(section)}, but it is a section: set its "
                f"keys, such as {section}.{names(schema)[0]}="
            )
    return found


def unknown(key: str, layer: Layer, schemas: Mapping[str, Any], kind: str) -> UserError:
    """The line for a key that does not exist, with the nearest one that does."""
    section, _, name = key.rpartition(".")
    origin = layer.origin(key)
    if key in ELSEWHERE:
        return UserError(f"{key}: {ELSEWHERE[key].format(origin)}")
    for other, schema in DATA_KINDS.items():
        if section == "data" and name in names(schema):
            return UserError(
                f"{key}: no key of data.kind={kind}{origin}; it belongs to data.kind={other}"
            )
    known = []
    for section, schema in schemas.items():
        inner = dataclasses.is_dataclass(schema)
        known += [f"{section}.{leaf}" for leaf in names(schema)] if inner else [section]
    # The right key without its section, or in the wrong one.
    same = [other for other in known if other.split(".")[-1] == name]
    near = f" (did you mean {same[0]}?)" if same else nearest(key, known)
    return UserError(f"{key}: no such key{origin}{near or '; --help lists all keys'}")


def names(schema: Any) -> list[str]:
    """Its keys."""
    return [one.name for one in dataclasses.fields(schema)]


# ---- what no single value shows
