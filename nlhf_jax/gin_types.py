# SPDX-License-Identifier: Apache-2.0
"""Whether a gin value can be what a parameter's annotation says."""

import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

LARGEST_INTEGER = 2**63  # what an array can hold


def hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Returns parameter -> annotation; empty where a name in one is not known."""
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError):  # of a module that is not ours
        return {}


def reference_fits(configurable: Callable[..., Any], called: str, hint: Any) -> bool:
    """Returns whether `@name` (a function) or `@name()` (its result) can be `hint`."""
    if hint is None:
        return True
    result = configurable
    if not inspect.isclass(configurable):
        result = hints_of(configurable).get("return")
    for part in typing.get_args(hint) if isinstance(hint, types.UnionType) else [hint]:
        if inspect.isclass(part) and called and part is not types.NoneType:
            if inspect.isclass(result) and issubclass(result, part):
                return True
        elif typing.get_origin(part) is Callable and not called:
            return True
    return False


def matches(value: Any, hint: Any) -> bool:
    """Returns whether a literal can be what the annotation says; unknown hints pass.

    `...` stands for what is checked elsewhere, and passes too.
    """
    if value is ...:
        return True
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(matches(value, part) for part in arguments)
    if hint in (None, Any):
        return True
    if hint is types.NoneType:
        return value is None
    if hint is float:
        is_finite = isinstance(value, float) and math.isfinite(value)
        return is_finite or matches(value, int)
    if hint is int:
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        return is_integer and abs(value) < LARGEST_INTEGER
    if hint in (str, bool):
        return isinstance(value, hint)
    container = origin if isinstance(origin, type) else hint
    if isinstance(container, type) and issubclass(container, Mapping):
        return isinstance(value, dict) and _all_match(value.values(), arguments[1:])
    if isinstance(container, type) and issubclass(container, Sequence):
        return isinstance(value, (tuple, list)) and _all_match(value, arguments[:1])
    # A settings class, an algorithm or a function is never a literal.
    return not inspect.isclass(hint) and origin is None


def _all_match(values: Iterable[Any], hints: Sequence[Any]) -> bool:
    return not hints or all(matches(value, hints[0]) for value in values)


def spoken(hint: Any, value: Any = None) -> str:
    """Returns an annotation in the words of an error about `value`."""
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return f"an integer below 2**{LARGEST_INTEGER.bit_length() - 1}"
    names = {float: "a number", int: "an integer", str: "a string in quotes"}
    if hint in names:
        return names[hint]
    if hint is bool:
        return "True or False"
    if typing.get_origin(hint) is Callable:
        return "a function (@NAME)"
    if dataclasses.is_dataclass(hint):
        return f"of type {hint.__name__} (@NAME())"
    return f"of type {hint}"
