"""Where values come from: `key=value` arguments and conf files, each as a Layer, unchecked."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from comet_pl.config.rules import is_text
from comet_pl.config.schema import DATA_KINDS, Config
from comet_pl.errors import UserError, nearest


@dataclass(frozen=True)
class Layer:
    """Values from one source."""

    name: str  # of the source in a message; '': the command line
    values: dict[str, Any]
    lines: dict[str, int] = field(default_factory=dict)  # of each dotted key

    def place(self, key: str) -> str:
        """File and line of a key."""
        return f"{self.name}:{self.lines[key]}" if key in self.lines else self.name

    def origin(self, key: str) -> str:
        """The place in brackets; '' for the command line."""
        place = self.place(key)
        return f" ({place})" if place else ""

    def without(self, section: str) -> Layer:
        """The same layer, without a section."""
        values = {name: value for name, value in self.values.items() if name != section}
        return dataclasses.replace(self, values=values)


def conf_names(conf_dir: Path, section: str = "") -> list[str]:
    """What conf= can name: NAME or FOLDER/NAME; with section="backbone" what backbone= can."""
    names = sorted(path.stem for path in (conf_dir / section).glob("*.yaml") if path.stem != "base")
    if not section:
        folders = sorted(path.name for path in conf_dir.glob("*/") if not is_section(path.name))
        names += [f"{folder}/{name}" for folder in folders for name in conf_names(conf_dir, folder)]
    return names


def is_section(folder: str) -> bool:
    """Whether conf/<folder>/ holds values of one section, not whole confs."""
    return dataclasses.is_dataclass(get_type_hints(Config).get(folder))


def read_arguments(argv: list[str]) -> dict[str, str]:
    """{key: text} of `key=text` arguments. Raises UserError."""
    arguments = {}
    for argument in argv:
        key, equals, text = argument.partition("=")
        if not equals or not key or key.startswith("-"):
            raise UserError(
                f"{argument!r}: arguments are written key=value, without dashes, such as "
                "train.lr=1e-3 (--help lists the keys)"
            )
        if not text.strip():
            raise UserError(f"{key}=: no value given; write {key}=null for none")
        arguments[key] = text
    return arguments


def command_line_layer(arguments: dict[str, str]) -> Layer:
    """Arguments as nested values. A key that takes only text has its text as it stands (007)."""
    values: dict[str, Any] = {}
    for key, text in arguments.items():
        *path, leaf = key.split(".")
        inner = values
        for name in path:
            inner = inner.setdefault(name, {})
            if not isinstance(inner, dict):
                raise UserError(
                    f"{key}: given together with a value for the whole of {'.'.join(path)}"
                )
        hints = hints_of(key)
        plain = hints and all(map(is_text, hints)) and text not in ("null", "~")
        value = text if plain and text[0] not in "'\"" else read_yaml(key, text)
        if isinstance(inner.get(leaf), dict) and not isinstance(value, dict):
            raise UserError(f"{key}: {value!r} given together with keys of it")
        inner[leaf] = merged(inner.get(leaf), value)
    return Layer("", values)


def merged(old: Any, new: Any) -> Any:
    """Two values of one key; of two sections all keys, the later of those that both have."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return old | {key: merged(old.get(key), value) for key, value in new.items()}


def read_yaml(key: str, text: str) -> Any:
    """The value of a text in OmegaConf's dialect of yaml; interpolations stay as they are.

    Raises:
        UserError: malformed yaml.
    """
    try:
        values: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
        return values["value"]
    except RecursionError:
        raise UserError(f"{key}: nested too deep") from None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        why = getattr(error, "problem", None) or in_a_line(error)
        raise UserError(f"{key}: {text!r} cannot be read: {why}") from None


def in_a_line(error: Exception) -> str:
    """'key: what is wrong', from an error of OmegaConf."""
    key = getattr(error, "full_key", None)
    return f"{key}: {str(error).splitlines()[0]}" if key else str(error).splitlines()[0]


def hints_of(key: str) -> list[Any]:
    """The declared types of a dotted key, one for each kind of data that has it; [] if unknown."""
    section, dot, name = key.rpartition(".")
    schemas: list[Any] = [Config]
    if section == "data":
        schemas = list(DATA_KINDS.values())
    elif dot:
        schema = get_type_hints(Config).get(section)
        schemas = [schema] if dataclasses.is_dataclass(schema) else []
    hints = [get_type_hints(schema) for schema in schemas]
    return [types[name] for types in hints if name in types]


def conf_layers(
    name: str, conf_dir: Path, asked_by: str = "", path: tuple[str, ...] = ()
) -> Iterator[Layer]:
    """The layers of conf/<name>.yaml: those of its `defaults:` in order, then its own.

    'backbone/small' holds that section's keys.
    """
    section, _, stem = name.rpartition("/")
    if not is_section(section):
        section, stem = "", name
    option = section or "conf"
    if name in path:
        raise UserError(f"{asked_by}: defaults go round in a circle: {' -> '.join([*path, name])}")
    if stem not in (known := conf_names(conf_dir, section)):
        where = f" ({asked_by})" if asked_by else ""
        raise UserError(
            f"{option}={stem}: no such conf{where}{nearest(stem, known)}; there are: "
            f"{', '.join(known) or 'none'}"
        )
    layer = read_file(conf_dir / f"{name}.yaml", f"{conf_dir.name}/{name}.yaml")
    defaults = layer.values.pop("defaults", None) or []
    if not isinstance(defaults, list) or not all(isinstance(item, str) for item in defaults):
        raise UserError(
            f"{layer.place('defaults')}: defaults: a list of confs is needed, such as "
            "[backbone/small]"
        )
    for item in defaults:
        yield from conf_layers(item, conf_dir, layer.place("defaults"), (*path, name))
    if section:
        lines = {f"{section}.{key}": line for key, line in layer.lines.items()}
        layer = Layer(layer.name, {section: layer.values}, lines)
    if "conf" in layer.values:
        raise UserError(
            f"{layer.place('conf')}: conf is chosen on the command line; use defaults: to build on "
            "another conf"
        )
    yield layer


def read_file(file: Path, name: str) -> Layer:
    """One conf file, called `name` in messages. Raises UserError."""
    try:
        text = file.read_text(encoding="utf-8")
        node = yaml.compose(text)
        if node is not None and not isinstance(node, yaml.MappingNode):
            raise UserError(f"{name}:{node.start_mark.line + 1}: lines of 'key: value' are needed")
        # OmegaConf's dialect: 1e-3 is a number, a key given twice an error.
        values: Any = OmegaConf.to_container(OmegaConf.create(text))
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name}: not a text file in UTF-8 ({error.reason} at byte {error.start})"
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line, why = f":{mark.line + 1}" if mark else "", getattr(error, "problem", None) or error
        raise UserError(f"{name}{line}: malformed yaml: {why}") from None
    except OmegaConfBaseException as error:
        raise UserError(f"{name}: {in_a_line(error)}") from None
    except RecursionError:
        raise UserError(f"{name}: nested too deep") from None
    return Layer(name, {str(key): value for key, value in values.items()}, dict(_lines(node, "")))


def _lines(node: yaml.Node | None, prefix: str) -> Iterator[tuple[str, int]]:
    """(dotted key, line) of every key in a yaml document."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            yield f"{prefix}{name.value}", name.start_mark.line + 1
            yield from _lines(value, f"{prefix}{name.value}.")
