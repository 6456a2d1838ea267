# SPDX-License-Identifier: Apache-2.0
"""Mistakes that gin accepts in silence, found before anything is built."""

import ast
import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from nlhf_jax.checks import UserError, nearest
from nlhf_jax.gin_files import Statement

REQUIRED = "%gin.REQUIRED"
_STRING = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"")
_MACRO = re.compile(r"%([A-Za-z_][\w.]*)")
_REFERENCE = re.compile(r"@([\w./]*)\s*(\(\s*\)|)")

Registry = Mapping[str, Callable[..., Any]]


def check(job: str, statements: Sequence[Statement], registry: Registry) -> None:
    """Raises a UserError for the first mistake of a configuration.

    In order: unknown names, macros that are undefined or defined by themselves, values
    that are no literals or of the wrong type, macros and bindings that nothing in the
    job reads, and last every required value that is still unset.

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
        _check_names_in_value(statement, macros, registry)
    for statement in macros.values():
        _check_ends(statement, macros)
    for statement in bindings.values():
        _check_type(statement, macros, registry)
    reached, scopes, calls = _reach(job, macros, bindings)
    _check_read(job, statements, reached, scopes)
    _check_required(job, macros, bindings, calls, registry)


def split_key(key: str) -> tuple[str, str, str]:
    """Returns (scope, configurable, parameter) of `scope/configurable.parameter`."""
    path, parameter = key.rsplit(".", 1)
    scope, _, name = path.rpartition("/")
    return scope, name, parameter


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


def _check_names_in_value(
    statement: Statement, macros: Mapping[str, Statement], registry: Registry
) -> None:
    bare = _without_strings(statement.value)
    for name in _MACRO.findall(bare):
        if name != "gin.REQUIRED" and name not in macros:
            raise UserError(
                f"{statement.place}: {statement.key} reads the macro %{name}, which is "
                f"not defined{nearest(name, macros)}"
            )
    for path, _ in _REFERENCE.findall(bare):
        name = path.rpartition("/")[2]
        if name not in registry:
            raise UserError(
                f"{statement.place}: nothing configurable is named {name!r}"
                f"{nearest(name, registry)}"
            )


def _check_ends(statement: Statement, macros: Mapping[str, Statement]) -> None:
    """Raises a UserError for a macro whose value leads back to itself."""
    if statement.key in _macros_in(statement.value, macros):
        raise UserError(
            f"{statement.place}: the macro {statement.key} is defined by itself"
        )


def _macros_in(value: str, macros: Mapping[str, Statement]) -> set[str]:
    """Returns the names of the macros a value reads, through macros too."""
    found: set[str] = set()
    todo = _MACRO.findall(_without_strings(value))
    while todo:
        name = todo.pop()
        if name in macros and name not in found:
            found.add(name)
            todo += _MACRO.findall(_without_strings(macros[name].value))
    return found


def _without_strings(value: str) -> str:
    return _STRING.sub("''", value)


def _written(statement: Statement, macros: Mapping[str, Statement]) -> Statement:
    """Returns the statement where a value is written out: through `X = %Y` to Y's."""
    while match := _MACRO.fullmatch(statement.value):
        if match[1] not in macros:
            break
        statement = macros[match[1]]
    return statement


def _check_type(
    statement: Statement, macros: Mapping[str, Statement], registry: Registry
) -> None:
    _, name, parameter = split_key(statement.key)
    hint = typing.get_type_hints(registry[name]).get(parameter)
    written = _written(statement, macros)
    if match := _REFERENCE.fullmatch(written.value):
        fits = _reference_fits(registry[match[1].rpartition("/")[2]], match[2], hint)
    else:
        bare = _without_strings(written.value)
        fits = "@" in bare or "%" in bare or matches(_literal(written), hint)
    if not fits:
        raise UserError(
            f"{written.place}: {statement.key} must be {_spoken(hint)}, "
            f"got {written.value}"
        )


def _literal(statement: Statement) -> Any:
    try:
        return ast.literal_eval(statement.value)
    except (ValueError, SyntaxError) as error:
        raise UserError(
            f"{statement.place}: the value of {statement.key} is not a literal: "
            f"{statement.value or 'nothing'} (text needs quotes, a function needs '@')"
        ) from error


def _reference_fits(configurable: Callable[..., Any], called: str, hint: Any) -> bool:
    """Returns whether `@name` (a function) or `@name()` (its result) can be `hint`."""
    if hint is None:
        return True
    result = configurable
    if not inspect.isclass(configurable):
        result = typing.get_type_hints(configurable).get("return")
    for part in typing.get_args(hint) if isinstance(hint, types.UnionType) else [hint]:
        if inspect.isclass(part) and called and part is not types.NoneType:
            if inspect.isclass(result) and issubclass(result, part):
                return True
        elif typing.get_origin(part) is Callable and not called:
            return True
    return False


def matches(value: Any, hint: Any) -> bool:
    """Returns whether a literal can be what the annotation says; unknown hints pass."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(matches(value, part) for part in arguments)
    if hint in (None, Any):
        return True
    if hint is types.NoneType:
        return value is None
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
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


def _spoken(hint: Any) -> str:
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


def _reach(
    job: str, macros: Mapping[str, Statement], bindings: Mapping[str, Statement]
) -> tuple[set[str], set[str], set[str]]:
    """Returns (configurables, scopes, called configurables) that the job reads."""
    reached, scopes, calls, todo = set(), {""}, set(), [job]
    while todo:
        scope, _, name = todo.pop().rpartition("/")
        scopes.add(scope)
        if name in reached:
            continue
        reached.add(name)
        for statement in bindings.values():
            if split_key(statement.key)[1] == name:
                found = _references(statement.value, macros)
                todo += [path for path, _ in found]
                calls |= {path.rpartition("/")[2] for path, called in found if called}
    return reached, scopes, calls


def _references(value: str, macros: Mapping[str, Statement]) -> list[tuple[str, str]]:
    """Returns (`scope/name`, `()` or '') that a value holds, through macros too."""
    values = [value, *(macros[name].value for name in _macros_in(value, macros))]
    return [
        pair for text in values for pair in _REFERENCE.findall(_without_strings(text))
    ]


def _check_read(
    job: str, statements: Sequence[Statement], reached: set[str], scopes: set[str]
) -> None:
    for statement in statements:
        if "." not in statement.key:
            continue
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
    macros = {s.key: s for s in statements if "." not in s.key}
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
    calls: set[str],
    registry: Registry,
) -> None:
    """Raises a UserError that names every value that must be given and is not."""
    read = set().union(*(_macros_in(s.value, macros) for s in bindings.values()))
    live = [s for s in macros.values() if s.key in read] + list(bindings.values())
    unset = [f"--gin.{s.key}=... ({s.place})" for s in live if s.value == REQUIRED]
    bound = {split_key(key)[1:] for key in bindings}
    for name in (job, *sorted(calls - {job})):
        unset += [
            f"--gin.{name}.{parameter}=..."
            for parameter, description in _parameters(registry[name]).items()
            if description.default is inspect.Parameter.empty
            and (name, parameter) not in bound
        ]
    if unset:
        raise UserError(f"{job}: required and not set: {', '.join(unset)}")
