# SPDX-License-Identifier: Apache-2.0
"""Mistakes that gin accepts in silence, found before anything is built."""

import ast
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nlhf_jax.checks import UserError, nearest
from nlhf_jax.gin_files import Statement

REQUIRED = "%gin.REQUIRED"
_MACRO = re.compile(r"%([A-Za-z_][\w.]*)")
_REFERENCE = re.compile(r"@([\w./]+)")

Registry = Mapping[str, Callable[..., Any]]


def check(job: str, statements: Sequence[Statement], registry: Registry) -> None:
    """Raises a UserError for the first mistake of a configuration.

    In order: unknown names, undefined macros, values that are no literals or of the
    wrong type, macros and bindings that nothing in the job reads, and last every
    required value that is still unset.

    Args:
      job: the configurable that will be called.
      statements: macros and bindings in order; later ones win.
      registry: configurable name -> callable.
    """
    macros = {s.key: s for s in statements if "." not in s.key}
    bindings = {s.key: s for s in statements if "." in s.key}
    for statement in bindings.values():
        _check_name(statement, registry)
    for statement in (*macros.values(), *bindings.values()):
        _check_macros_defined(statement, macros)
    for statement in bindings.values():
        _check_type(statement, macros, registry)
    _check_read(job, statements, macros, bindings, registry)
    _check_required(job, macros, bindings, registry)


def split_key(key: str) -> tuple[str, str, str]:
    """Returns (scope, configurable, parameter) of `scope/configurable.parameter`."""
    path, parameter = key.rsplit(".", 1)
    scope, _, name = path.rpartition("/")
    return scope, name.rsplit(".", 1)[-1], parameter


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def _check_name(statement: Statement, registry: Registry) -> None:
    _, name, parameter = split_key(statement.key)
    if name not in registry:
        raise UserError(
            f"{statement.place}: nothing configurable is named {name!r}"
            f"{nearest(name, registry)}"
        )
    known = _parameters(registry[name])
    if parameter not in known:
        raise UserError(
            f"{statement.place}: {name} has no parameter {parameter!r}"
            f"{nearest(parameter, known)}; it has {', '.join(known)}"
        )


def _check_macros_defined(
    statement: Statement, macros: Mapping[str, Statement]
) -> None:
    for name in _MACRO.findall(_without_strings(statement.value)):
        if name != "gin.REQUIRED" and name not in macros:
            raise UserError(
                f"{statement.place}: {statement.key} reads the macro %{name}, which is "
                f"not defined{nearest(name, macros)}"
            )
    for name in _REFERENCE.findall(_without_strings(statement.value)):
        if not name.strip("/."):
            raise UserError(f"{statement.place}: '@' must be followed by a name")


def _without_strings(value: str) -> str:
    return re.sub(r"'[^']*'|\"[^\"]*\"", "''", value)


def _literal(value: str, macros: Mapping[str, Statement], seen=()) -> Any:
    """Returns the value with macros filled in, or `_OPAQUE` if it calls something."""
    bare = _without_strings(value)
    if "@" in bare or REQUIRED in bare:
        return _OPAQUE
    if match := _MACRO.fullmatch(value.strip()):
        if match[1] in seen:
            raise UserError(f"the macro %{match[1]} is defined by itself")
        return _literal(macros[match[1]].value, macros, (*seen, match[1]))
    if "%" in bare:
        return _OPAQUE
    return ast.literal_eval(value)


_OPAQUE = object()


def _check_type(
    statement: Statement, macros: Mapping[str, Statement], registry: Registry
) -> None:
    _, name, parameter = split_key(statement.key)
    try:
        value = _literal(statement.value, macros)
    except (ValueError, SyntaxError) as error:
        raise UserError(
            f"{statement.place}: the value of {statement.key} is not a literal: "
            f"{statement.value} (text needs quotes, a function needs '@')"
        ) from error
    hint = typing.get_type_hints(registry[name]).get(parameter)
    if value is not _OPAQUE and not matches(value, hint):
        raise UserError(
            f"{statement.place}: {statement.key} must be {_spoken(hint)}, got {value!r}"
        )


def matches(value: Any, hint: Any) -> bool:
    """Returns whether a literal can be what the annotation says; unknown hints pass."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(matches(value, part) for part in arguments)
    if hint in (None, type(None)):
        return value is None or hint is None
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (str, bool):
        return isinstance(value, hint)
    container = origin if isinstance(origin, type) else hint
    if container in (tuple, list):
        return isinstance(value, (tuple, list))
    if isinstance(container, type) and issubclass(container, Mapping):
        return isinstance(value, dict)
    if isinstance(container, type) and issubclass(container, Sequence):
        return isinstance(value, (tuple, list))
    # A settings class, an algorithm or a function is never a literal.
    return not inspect.isclass(hint) and origin is None


def _spoken(hint: Any) -> str:
    names = {float: "a number", int: "an integer", str: "a string in quotes"}
    return names.get(hint, "True or False" if hint is bool else f"of type {hint}")


def _references(value: str, macros: Mapping[str, Statement]) -> list[str]:
    """Returns every `scope/name` that a value refers to, through macros too."""
    bare = _without_strings(value)
    found = [name for name in _REFERENCE.findall(bare)]
    for name in _MACRO.findall(bare):
        if name in macros and macros[name].value != value:
            found += _references(macros[name].value, macros)
    return found


def _check_read(
    job: str,
    statements: Sequence[Statement],
    macros: Mapping[str, Statement],
    bindings: Mapping[str, Statement],
    registry: Registry,
) -> None:
    reached, scopes, todo = set(), {""}, [job]
    while todo:
        scope, _, name = todo.pop().rpartition("/")
        scopes.add(scope)
        name = name.rsplit(".", 1)[-1]
        if name in reached:
            continue
        reached.add(name)
        if name not in registry:
            raise UserError(
                f"nothing configurable is named {name!r}{nearest(name, registry)}"
            )
        for statement in bindings.values():
            if split_key(statement.key)[1] == name:
                todo += _references(statement.value, macros)
    for statement in bindings.values():
        scope, name, _ = split_key(statement.key)
        if name not in reached:
            raise UserError(
                f"{statement.place}: nothing in {job!r} reads {statement.key}"
            )
        if scope not in scopes:
            raise UserError(
                f"{statement.place}: nothing in {job!r} has the scope {scope!r}"
                f"{nearest(scope, scopes - {''})}"
            )
    # A macro that only an overridden binding reads is no mistake of the user's.
    used = {
        name
        for statement in statements
        for name in _MACRO.findall(_without_strings(statement.value))
    }
    for statement in macros.values():
        if statement.key not in used:
            raise UserError(
                f"{statement.place}: nothing reads the macro {statement.key}"
                f"{nearest(statement.key, set(macros) - {statement.key})}"
            )


def _check_required(
    job: str,
    macros: Mapping[str, Statement],
    bindings: Mapping[str, Statement],
    registry: Registry,
) -> None:
    unset = [
        s.key for s in (*macros.values(), *bindings.values()) if s.value == REQUIRED
    ]
    bound = {split_key(key)[2] for key in bindings if split_key(key)[1] == job}
    for name, parameter in _parameters(registry[job]).items():
        if parameter.default is inspect.Parameter.empty and name not in bound:
            unset.append(f"{job}.{name}")
    if unset:
        flags = ", ".join(f"--gin.{key}=..." for key in unset)
        raise UserError(f"{job}: required and not set: {flags}")
