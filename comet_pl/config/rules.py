"""Which values of a key are possible, and what is allowed in words. OmegaConf checks the types."""

import dataclasses
import math
import types
from collections.abc import Callable, Mapping
from typing import Any, Union, get_args, get_origin

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from comet_pl.errors import UserError, nearest

Rules = Mapping[str, Any]
"""What a field's metadata may hold: min, above (exclusive), max, below (exclusive) and choices, for
the value or each number in a list; check: a predicate of the value (not called with None);
needs: what is allowed, if these words are better than those made from the rest."""

BOUNDS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "min": (">=", lambda value, bound: value >= bound),
    "above": (">", lambda value, bound: value > bound),
    "max": ("<=", lambda value, bound: value <= bound),
    "below": ("<", lambda value, bound: value < bound),
}
WORDS = {bool: "true or false", int: "integer", float: "number", str: "text", type(None): "null"}


def arms(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union; a plain type is its own only one."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def is_text(hint: Any) -> bool:
    """Whether a key takes nothing but text (or null)."""
    return set(arms(hint)) <= {str, type(None)}


def describe(hint: Any, rules: Rules) -> str:
    """What a field accepts, in a few words: 'integer >= 1 or null'."""
    if "needs" in rules:
        return rules["needs"]
    bounds = " and ".join(
        f"{sign} {rules[rule]}" for rule, (sign, _) in BOUNDS.items() if rule in rules
    )
    words = []
    for arm in arms(hint):
        if get_origin(arm) is list:
            words.append(f"non-empty list of {describe(get_args(arm)[0], rules)}")
        elif arm is str and "choices" in rules:
            words.append(", ".join(rules["choices"]))
        else:
            words.append(f"{WORDS[arm]} {bounds}".strip() if arm in (int, float) else WORDS[arm])
    return " or ".join(words)


def as_written(value: Any, hint: Any) -> Any:
    """A value before OmegaConf converts it: a whole float (1e3) is an integer where one is needed.

    Raises:
        TypeError: a number where text is needed, or text where none is.
    """
    options = arms(hint)
    if isinstance(value, list):
        inner = next((get_args(arm)[0] for arm in options if get_origin(arm) is list), Any)
        return [as_written(item, inner) for item in value]
    if isinstance(value, float) and int in options and value.is_integer():
        # 1.0 of a count or fraction stays the fraction "all".
        return int(value) if float not in options or value > 1 else value
    if type(value) is int and float in options and int not in options:
        return float(value)
    number, interpolation = isinstance(value, (int, float)), str(value).startswith("${")
    text = isinstance(value, str) and not interpolation and value != "???"
    if (number and is_text(hint)) or (text and not {str, Any} & set(options)):
        raise TypeError
    if isinstance(value, int) and not isinstance(value, bool) and options == (bool,):
        raise TypeError
    return value


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has the type; an empty list has none."""
    probe = OmegaConf.structured(dataclasses.make_dataclass("Probe", [("value", hint, MISSING)]))
    try:
        OmegaConf.update(probe, "value", as_written(value, hint), merge=False)
    except (TypeError, OmegaConfBaseException):
        return False
    return value != []


def possible(value: Any, rules: Rules) -> bool:
    """Whether a value of the right type keeps its rules."""
    if value is None or isinstance(value, bool):
        return "check" not in rules or value is None or rules["check"](value)
    if "check" in rules and not rules["check"](value):
        return False
    if isinstance(value, list):
        inner = {rule: rules[rule] for rule in rules if rule != "check"}
        return bool(value) and all(possible(item, inner) for item in value)
    if isinstance(value, str):
        return value in rules.get("choices", (value,))
    finite = not isinstance(value, float) or math.isfinite(value)
    return finite and all(
        test(value, rules[rule]) for rule, (_, test) in BOUNDS.items() if rule in rules
    )


def refusal(value: Any, hint: Any, rules: Rules, key: str, place: str = "") -> UserError:
    """One line with the key, the value and what is allowed.

    Args:
        place: file and line of the value; '': the command line.
    """
    origin = f" ({place})" if place else ""
    shown = repr(value)
    if value is None or isinstance(value, bool):
        shown = {None: "null", True: "true", False: "false"}[value]
    hints = ""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and str in arms(hint):
        hints = " (a number is text only in quotes)"
    elif "choices" in rules:
        names = value if isinstance(value, list) else [value]
        wrong = [one for one in names if isinstance(one, str) and one not in rules["choices"]]
        hints = nearest(wrong[0], rules["choices"]) if wrong else ""
    return UserError(f"{key}: {shown} given{origin}, allowed: {describe(hint, rules)}{hints}")
