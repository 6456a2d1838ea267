# SPDX-License-Identifier: Apache-2.0
"""Mistakes that gin accepts in silence, found before anything is built."""

import ast
import dataclasses
import inspect
import keyword
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nlhf_jax.checks import UserError, nearest
from nlhf_jax.gin_files import IMPORT, NO_LITERAL, Statement
from nlhf_jax.gin_types import hints_of, matches, reference_fits, spoken

REQUIRED = "%gin.REQUIRED"
# A module that is imported runs; what else may be is for the user to say.
ALLOWED_IMPORTS = ("nlhf_jax", "seqio")
_KEY = re.compile(r"[A-Za-z_]\w*(?:[./][A-Za-z_]\w*)*")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f\x85\u2028\u2029]")
# Stands for a function or a required value, whose type is checked elsewhere.
_ANYTHING = "..."
LONGEST_VALUE = 100_000  # characters
_STRING = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"")
_MACRO = re.compile(r"%([A-Za-z_][\w.]*)")
_REFERENCE = re.compile(r"@([\w./]*)\s*(\(\s*\)|)")

Registry = Mapping[str, Callable[..., Any]]


def check(job: str, statements: Sequence[Statement], registry: Registry) -> None:
    """Raises a UserError for the first mistake of a configuration.

    In order: text that is no name or no value, unknown names, macros that are undefined
    or defined by themselves, values that are no literals or of the wrong type, macros
    and bindings that nothing in the job reads, and last every required value that is
    still unset.

    Args:
      job: the configurable that will be called.
      statements: macros and bindings in order; later ones win.
      registry: configurable name -> callable.
    """
    macros = {s.key: s for s in statements if "." not in s.key}
    bindings = {s.key: s for s in statements if "." in s.key}
    for statement in statements:
        _check_form(statement)
    for statement in bindings.values():
        _check_name(statement, registry)
    for statement in (*macros.values(), *bindings.values()):
        _check_names_in_value(statement, macros, registry)
    for statement in macros.values():
        _check_ends(statement, macros)
    for statement in statements:
        _literal(statement, {})  # also what a later statement overrides
    for statement in bindings.values():
        _check_type(statement, macros, registry)
    reached, scopes, calls = _reach(job, macros, bindings)
    _check_read(job, statements, reached, scopes)
    _check_macros(statements, reached, registry)
    _check_required(job, macros, bindings, calls, registry)


def check_import(statement: Statement, allowed: Sequence[str]) -> None:
    """Raises a UserError for a module that a configuration may not import."""
    may = (*ALLOWED_IMPORTS, *allowed)
    name = statement.value
    if not any(f"{name}.".startswith(f"{one}.") for one in may):
        raise UserError(
            f"{statement.place}: import {name} is refused, since a module that is "
            f"imported runs: a configuration may import {', '.join(may)}, and with "
            f"--allow_import={name} also this"
        )


def repeated(statements: Sequence[Statement]) -> list[str]:
    """Returns a sentence for each name that one file sets twice; the later one wins."""
    found, places = [], {}
    for statement in statements:
        file, _, line = statement.place.rpartition(":")
        before = places.get((file, statement.key))
        if before and statement.key != IMPORT and line != before:
            found.append(
                f"{statement.place}: {statement.key} is set in line {before} too; this "
                "one counts"
            )
        places[file, statement.key] = line
    return found


def as_text(
    statement: Statement, statements: Sequence[Statement], registry: Registry
) -> Statement:
    """Returns a flag's statement with the quotes its value lacks, where text is meant.

    That is a value that is no literal and has no quote, function or macro in it, for
    a name that only parameters of type `str` read: a path with a blank, for instance.
    """
    bindings = [s for s in statements if "." in s.key]
    readers = [s.key for s in bindings if s.value == f"%{statement.key}"]
    if "." in statement.key:
        readers = [statement.key]
    keys = [split_key(key) for key in readers]
    are_text = keys and all(
        name in registry and hints_of(registry[name]).get(parameter) is str
        for _, name, parameter in keys
    )
    if not are_text or re.search(r"['\"@%]", statement.value):
        return statement
    try:
        ast.literal_eval(statement.value)
    except NO_LITERAL:
        return dataclasses.replace(statement, value=repr(statement.value))
    return statement


def names_in(statements: Sequence[Statement]) -> set[str]:
    """Returns the configurables that keys and values name, known or not."""
    named = {split_key(s.key)[1] for s in statements if "." in s.key}
    for statement in statements:
        found = _REFERENCE.findall(_without_strings(statement.value))
        named |= {path.rpartition("/")[2] for path, _ in found}
    return named - {""}


def places_in(sentence: str, statements: Sequence[Statement]) -> str:
    """Returns ` (FILE:LINE)` of the values that a sentence complains of, or "".

    They are the bindings of a parameter that it names, of those the ones whose value it
    shows.
    """
    macros = {s.key: s for s in statements if "." not in s.key}
    bindings = {s.key: s for s in statements if "." in s.key}
    words = set(re.findall(r"\w+", sentence))
    shown = sentence.rpartition("got")[2]
    named = [
        _written(statement, macros)
        for statement in bindings.values()
        if split_key(statement.key)[2] in words
    ]
    found = [one for one in named if one.value in shown] or named
    places = dict.fromkeys(one.place for one in found)
    return f" ({', '.join(places)})" if places else ""


def split_key(key: str) -> tuple[str, str, str]:
    """Returns (scope, configurable, parameter) of `scope/configurable.parameter`."""
    path, parameter = key.rsplit(".", 1)
    scope, _, name = path.rpartition("/")
    return scope, name, parameter


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def _check_form(statement: Statement) -> None:
    """Raises a UserError for what would be more than one statement, or no name."""
    key = statement.key
    if not _KEY.fullmatch(key) or keyword.iskeyword(key):
        raise UserError(f"{statement.place}: {key!r} is no name of a macro or binding")
    if _CONTROL.search(statement.value):
        raise UserError(
            f"{statement.place}: the value of {key} must be on one line, without "
            f"control characters, got {statement.shown!r}"
        )


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
    hint = hints_of(registry[name]).get(parameter)
    written, value = _written(statement, macros), None
    if match := _REFERENCE.fullmatch(written.value):
        fits = reference_fits(registry[match[1].rpartition("/")[2]], match[2], hint)
    else:
        value = _literal(written, macros)
        fits = matches(value, hint)
    if not fits:
        raise UserError(
            f"{written.place}: {statement.key} must be {spoken(hint, value)}, "
            f"got {written.shown}"
        )


def _literal(statement: Statement, macros: Mapping[str, Statement]) -> Any:
    """Returns the value, macros in their places and `...` for every function."""
    try:
        return ast.literal_eval(_expanded(statement.value, macros))
    except NO_LITERAL as error:
        raise UserError(
            f"{statement.place}: the value of {statement.key} is not a literal: "
            f"{statement.shown or 'nothing'} (text needs quotes, a function needs '@')"
        ) from error


def _expanded(
    value: str, macros: Mapping[str, Statement], known: dict[str, str] | None = None
) -> str:
    """Returns the value with the values of its macros in it, which all end.

    What a macro becomes is kept in `known`, so that each is written out once.

    Raises:
      ValueError: it is longer than any value is; few macros can write a long text.
    """

    def of_macro(match: re.Match) -> str:
        name = match[1]
        if name not in macros:
            return _ANYTHING
        if name not in known:
            # A flag's value may end in a comment, which must not hide the bracket.
            known[name] = f"({_expanded(macros[name].value, macros, known)}\n)"
        return known[name]

    known = {} if known is None else known
    parts, end = [], 0
    for match in [*_STRING.finditer(value), None]:
        bare = value[end : match.start() if match else len(value)]
        bare = _REFERENCE.sub(f" {_ANYTHING} ", bare)
        parts += [_MACRO.sub(of_macro, bare), match[0] if match else ""]
        end = match.end() if match else end
    text = "".join(parts).strip()
    if len(text) > LONGEST_VALUE:
        raise ValueError(f"more than {LONGEST_VALUE} characters")
    return text


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


def _check_macros(
    statements: Sequence[Statement], reached: set[str], registry: Registry
) -> None:
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
                f"{_elsewhere(statement.key, reached, registry)}"
            )


def _elsewhere(key: str, reached: set[str], registry: Registry) -> str:
    """Returns who has a parameter of the macro's name, where only others do."""
    parameter = key.lower()
    having = {n for n, one in registry.items() if parameter in _parameters(one)}
    if not having or having & reached:
        return ""
    return (
        f": {parameter!r} is a parameter of {', '.join(sorted(having))}, "
        "none of which is used here"
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
