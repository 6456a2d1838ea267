# SPDX-License-Identifier: Apache-2.0
"""Jinja for templates that came with somebody's weights: no harm, and an end.

The language is that of Hugging Face's chat templates: blocks trimmed, `break` and
`continue`, `{% generation %}`, `raise_exception`, `strftime_now`, and `tojson` without
HTML's escapes. Python's insides are out of reach, and every loop, call, text and the
output are counted, so no template runs for long or fills the memory.
"""

import datetime
import functools
import json
import re
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer

from nlhf_jax.checks import UserError

MOST_TURNS = 20_000  # of all loops and calls of macros, in one rendering
MOST_CHARACTERS = 4_000_000
LARGEST_NUMBER = 1_000_000  # handed to a function or filter, a width perhaps
# A number of five digits in a format, or one that is said elsewhere.
WIDTH = re.compile(r"\d{5}|\{[^}]*\{")
TICK, JOINED = "_nlhf_tick", "_nlhf_joined"
# A run that resumes tomorrow must read the prompts of today; this is the date that
# Llama 3's template falls back to.
TODAY = datetime.datetime(2024, 7, 26)


class TooMuch(jinja2.TemplateError):
    """A template has used up what one rendering may use."""


class Counted(threading.local):
    """Counts one rendering's turns; a new one begins with `restart`.

    Pipelines render in several threads, each of which counts its own.
    """

    turns = 0

    def restart(self) -> None:
        """Forgets the turns of the rendering before."""
        self.turns = 0

    def __call__(self) -> str:
        """Counts one more turn, and writes nothing.

        Raises:
          TooMuch: it is one more than there may be.
        """
        self.turns += 1
        if self.turns > MOST_TURNS:
            raise TooMuch(f"it loops more than {MOST_TURNS} times")
        return ""


class _Generation(Extension):
    """`{% generation %}` marks what an assistant said; here it only is that text."""

    tags = frozenset(("generation",))

    def parse(self, parser):
        """Returns what stands between the two tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Counting(NodeTransformer):
    """Puts a tick at the beginning of what can run again, and joins texts counted."""

    def _tick(self, node):
        self.generic_visit(node)
        tick = nodes.Call(nodes.Name(TICK, "load"), [], [], None, None)
        node.body = [nodes.ExprStmt(tick), *node.body]
        return node

    visit_For = visit_Macro = visit_CallBlock = _tick

    def visit_Concat(self, node):
        self.generic_visit(node)
        return nodes.Filter(nodes.List(node.nodes), JOINED, [], [], None, None)


def _bounded(text: Any) -> Any:
    if isinstance(text, str | list | tuple) and len(text) > MOST_CHARACTERS:
        raise TooMuch(f"it makes a text of more than {MOST_CHARACTERS} characters")
    return text


def _check_widths(values) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > LARGEST_NUMBER:
            raise TooMuch(f"it asks for {value} of something")


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("*", "**", "%", "+"))

    def wrap_str_format(self, value):
        """Returns a text's `format`, if it asks for no large widths."""
        made = super().wrap_str_format(value)
        if made is not None and WIDTH.search(value.__self__):
            raise SecurityError("a text's format may not ask for such widths")
        return made

    def call_binop(self, context, operator, left, right):
        """Computes an operation whose result can be larger than its parts."""
        if operator == "**" or (
            operator == "*"
            and not all(isinstance(x, int | float) for x in (left, right))
        ):
            raise SecurityError(f"the operator {operator} is not allowed there")
        if operator == "%" and isinstance(left, str):
            raise SecurityError("the operator % is not allowed on texts")
        return _bounded(super().call_binop(context, operator, left, right))

    def call(self, context, obj, /, *args, **kwargs):
        """Calls what a template calls, if its numbers are of a sensible size."""
        _check_widths((*args, *kwargs.values()))
        return _bounded(super().call(context, obj, *args, **kwargs))


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _strftime_now(form: str) -> str:
    return TODAY.strftime(re.sub(r"%[-_0^#]*\d+", "%", form))  # C's widths left out


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(str(message))


def _limited(function):
    """Returns a filter that makes nothing large; its numbers may be widths."""

    @functools.wraps(function)
    def limited(*args, **kwargs):
        _check_widths((*args, *kwargs.values()))
        return _bounded(function(*args, **kwargs))

    return limited


@functools.cache
def _environment() -> _Environment:
    made = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    made.filters = {name: _limited(one) for name, one in made.filters.items()}
    made.filters["tojson"] = _to_json
    made.filters[JOINED] = lambda parts: _bounded("".join(map(str, parts)))
    del made.filters["format"]
    made.globals["raise_exception"] = _raise_exception
    made.globals["strftime_now"] = _strftime_now
    return made


class Compiled:
    """A template that is ready to be rendered.

    Args:
      source: Jinja.
      name: what it is called in an error's sentence.

    Raises:
      UserError: it is no Jinja.
    """

    def __init__(self, source: str, name: str):
        self._name, self._counted = name, Counted()
        environment = _environment()
        try:
            tree = _Counting().visit(environment.parse(source))
            code = environment.compile(tree)
        except (jinja2.TemplateError, RecursionError, SyntaxError) as error:
            line = getattr(error, "lineno", None)
            where = f" in line {line}" if line else ""
            raise UserError(f"{name} is no template: {error!s:.200}{where}") from None
        self._template = jinja2.Template.from_code(
            environment, code, environment.make_globals({TICK: self._counted})
        )

    def render(self, variables: Mapping[str, Any]) -> str:
        """Returns the text that the template makes of some variables.

        Raises:
          UserError: the template fails, refuses them, reaches for what it must not
            see, or does not come to an end.
        """
        self._counted.restart()
        try:
            return "".join(self._pieces(variables))
        except (TooMuch, SecurityError, jinja2.TemplateError) as error:
            reason = str(error)
        except (RecursionError, MemoryError):
            reason = "it calls itself without an end"
        except Exception as error:  # a template is a program: anything may be raised
            reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{self._name} can't be used: {reason:.300}")

    def _pieces(self, variables: Mapping[str, Any]) -> Iterator[str]:
        length = 0
        for piece in self._template.generate(dict(variables)):
            length += len(piece)
            if length > MOST_CHARACTERS:
                raise TooMuch(f"it writes more than {MOST_CHARACTERS} characters")
            yield piece
