"""One value of the configuration: does it have the declared type, is it possible, and how is what is allowed put in words."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping
from typing import Any, Union, get_args, get_origin

from comet_pl.errors import UserError, nearest

Rules = Mapping[str, Any]
"""What a field's metadata may say beside its meaning: min, above (exclusive), max, below (exclusive) and choices, for the value or, in a
list, for each number in it; check: a predicate of the converted value (None is not asked); needs: what is allowed, where the rest says
it badly."""

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


def describe(hint: Any, rules: Rules) -> str:
    """What a field accepts, in a few words: 'whole number >= 1 or null'."""
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
        elif arm in (int, float) and bounds:
            words.append(f"{WORDS[arm]} {bounds}")
        else:
            words.append(WORDS[arm])
    return " or ".join(words)


def as_type(value: Any, hint: Any) -> Any:
    """`value` as the declared type; an int may stand for a float, and a whole float (1e3) for an int.

    Raises:
        TypeError: it is something else.
    """
    options = arms(hint)
    if len(options) > 1:
        if (
            isinstance(value, float)
            and {int, float} <= set(options)
            and value > 1
            and value.is_integer()
        ):
            return int(value)  # a count (1e3); 1.0 stays the fraction "all"
        for option in sorted(options, key=lambda option: type(value) is not option):
            try:
                return as_type(value, option)
            except TypeError:
                continue
        raise TypeError
    if get_origin(hint) is list and isinstance(value, list) and value:
        return [as_type(item, get_args(hint)[0]) for item in value]
    if hint is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint is not float and get_origin(hint) is not list and type(value) is hint:
        return value
    raise TypeError


def _possible(value: Any, rules: Rules) -> bool:
    if "check" in rules and value is not None and not rules["check"](value):
        return False
    if isinstance(value, list):
        inner = {rule: rules[rule] for rule in rules if rule != "check"}
        return all(_possible(item, inner) for item in value)
    if isinstance(value, str):
        return value in rules.get("choices", (value,))
    if value is None or isinstance(value, bool):
        return True
    return all(test(value, rules[rule]) for rule, (_, test) in BOUNDS.items() if rule in rules)


def convert(value: Any, hint: Any, rules: Rules, key: str, place: str = "") -> Any:
    """`value` as the declared type, checked against its rules.

    Args:
        key: the dotted key, for the message. place: where the value was set (a file and line), for the message; '' = the command line.

    Raises:
        UserError: one line with the key, the value and what is allowed.
    """
    origin = f" ({place})" if place else ""
    try:
        result = as_type(value, hint)
        if _possible(result, rules):
            return result
        quotes = ""
    except TypeError:
        quotes = (
            " (a number is text only in quotes)"
            if isinstance(value, (int, float)) and str in arms(hint)
            else ""
        )
    shown = (
        {None: "null", True: "true", False: "false"}[value]
        if value is None or isinstance(value, bool)
        else repr(value)
    )
    hints = (
        nearest(value, rules["choices"]) if isinstance(value, str) and "choices" in rules else ""
    )
    raise UserError(
        f"{key}: {shown} given{origin}, allowed: {describe(hint, rules)}{quotes}{hints}"
    )
