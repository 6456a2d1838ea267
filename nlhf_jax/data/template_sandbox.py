# SPDX-License-Identifier: Apache-2.0
"""Jinja for templates that came with somebody's weights: no harm, and an end.

The language is that of Hugging Face's chat templates: blocks trimmed, `break` and
`continue`, `{% generation %}`, `raise_exception`, `strftime_now`, and `tojson` without
HTML's escapes. Python's insides are out of reach, and what a template makes is weighed:
every result of a call, filter or operator, every list and every output takes of what
one rendering may make in all. So none runs for long or fills the memory.
"""

import datetime
import functools
import json
import re
import threading
import time
from collections.abc import (
    ItemsView,
    Iterator,
    KeysView,
    Mapping,
    Sequence,
    ValuesView,
)
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from nlhf_jax.checks import UserError

MOST_SOURCE = 200_000  # characters of a template
MOST_TURNS = 20_000  # of all loops, calls, filters and tests, in one rendering
# Of all that one rendering makes; an entry of a list is one and its text.
MOST_CHARACTERS = 4_000_000
LARGEST_STEP = 64_000_000  # characters that one call might make, before it does
MOST_SECONDS = 20.0  # of the processor
LARGEST_INTEGER = 2**63
LARGEST_NUMBER = 100_000  # handed to a function or filter, a width perhaps
LARGEST_INDENT = 16
# A number of three digits in a format, or one that is said elsewhere.
WIDTH = re.compile(r"\d{3}|\{[^}]*\{")
# Filters whose cost is no multiple of what they are given, or left to chance.
LEFT_OUT = (
    *("batch", "format", "pprint", "random", "slice", "striptags", "sum", "urlize"),
    *("wordcount", "wordwrap", "xmlattr"),
)
TICK, MADE, JOINED = "_nlhf_tick", "_nlhf_made", "_nlhf_joined"
SEVERAL = (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)
# A run that resumes tomorrow must read the prompts of today; this is the date that
# Llama 3's template falls back to.
TODAY = datetime.datetime(2024, 7, 26)


class TooMuch(jinja2.TemplateError):
    """A template has used up what one rendering may use."""


class _Spent(threading.local):
    """What the rendering of this thread has used up; pipelines have several threads."""

    turns = 0
    characters = 0
    until = 0.0

    def restart(self) -> None:
        """Forgets the rendering before."""
        self.turns = self.characters = 0
        self.until = time.thread_time() + MOST_SECONDS

    def turn(self) -> None:
        """Counts one more turn."""
        self.turns += 1
        if self.turns > MOST_TURNS:
            raise TooMuch(f"it loops more than {MOST_TURNS} times")
        if time.thread_time() > self.until:
            raise TooMuch(f"it takes more than {MOST_SECONDS:.0f} seconds")

    def take(self, characters: int) -> None:
        """Counts characters that are made."""
        self.characters += characters
        if self.characters > MOST_CHARACTERS:
            raise TooMuch(f"it makes more than {MOST_CHARACTERS} characters")


_spent = _Spent()


def _weight(value: Any) -> int:
    """Returns how much a value would be, written out."""
    total, rest = 0, [value]
    while rest:
        one = rest.pop()
        total += 1
        if isinstance(one, str | bytes | range):
            total += len(one)
        elif isinstance(one, int) and abs(one) > LARGEST_INTEGER:
            raise TooMuch(f"it makes an integer beyond {LARGEST_INTEGER}")
        elif isinstance(one, Namespace):
            rest.append(one._Namespace__attrs)
        elif isinstance(one, dict):
            rest += [*one, *one.values()]
        elif isinstance(one, SEVERAL):
            rest += one
        if total + len(rest) > MOST_CHARACTERS:
            raise TooMuch(f"it makes more than {MOST_CHARACTERS} characters")
    return total


def _made(value: Any) -> Any:
    """Returns a value that is counted; what would make more later is made now."""
    if isinstance(value, Iterator) and not isinstance(value, LoopContext):
        return [_made(one) for one in value]
    _spent.take(_weight(value))
    return value


def _step(values: Sequence[Any]) -> None:
    """Counts a call of something with some values, of which it can't make too much."""
    _spent.turn()
    for value in values:
        if isinstance(value, int) and abs(value) > LARGEST_NUMBER:
            raise TooMuch(f"it asks for {value} of something")
    # A list is joined by a text, a character replaced by one, a line indented by one.
    weights = [
        abs(one) if isinstance(one, int) else _weight(one) for one in values
    ] or [0]
    largest = max(weights)
    _spent.take(len(weights))
    if (largest + 1) * (sum(weights) - largest + 1) > LARGEST_STEP:
        raise TooMuch(f"one step of it may make more than {LARGEST_STEP} characters")


class _Generation(Extension):
    """`{% generation %}` marks what an assistant said; here it only is that text."""

    tags = frozenset(("generation",))

    def parse(self, parser):
        """Returns what stands between the two tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _filtered(node, name):
    return nodes.Filter(node, name, [], [], None, None)


class _Counting(NodeTransformer):
    """Puts a tick at the beginning of what can run again, and weighs what is made."""

    def _tick(self, node):
        self.generic_visit(node)
        tick = _filtered(nodes.Const(""), TICK)
        node.body = [nodes.ExprStmt(tick), *node.body]
        if getattr(node, "test", None) is not None:  # `for x in y if test`
            node.test = nodes.Or(tick, node.test)
        return node

    visit_For = visit_Macro = visit_CallBlock = _tick

    def _weighed(self, node):
        self.generic_visit(node)
        is_read = getattr(node, "ctx", "load") == "load"  # nothing is assigned to it
        return _filtered(node, MADE) if is_read else node

    visit_List = visit_Tuple = visit_Dict = _weighed

    def visit_Getitem(self, node):
        if isinstance(node.arg, nodes.Slice):
            return self._weighed(node)
        return self.generic_visit(node)

    def visit_Concat(self, node):
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes), JOINED)

    def visit_Output(self, node):
        self.generic_visit(node)
        is_text = [isinstance(one, nodes.TemplateData) for one in node.nodes]
        pairs = list(zip(node.nodes, is_text, strict=True))
        length = sum(len(one.data) for one, text in pairs if text)
        node.nodes = [one if text else _filtered(one, MADE) for one, text in pairs]
        said = nodes.Filter(
            nodes.Const(""), TICK, [nodes.Const(length)], [], None, None
        )
        return [nodes.ExprStmt(said), node]


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("*", "**", "%", "+", "-", "/", "//"))

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
        return _made(super().call_binop(context, operator, left, right))

    def call(self, context, obj, /, *args, **kwargs):
        """Calls what a template calls, if its numbers are of a sensible size."""
        owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)
        _step((owner, *args, *kwargs.values()))
        return _made(super().call(context, obj, *args, **kwargs))


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    if indent is not None and not (type(indent) is int and indent <= LARGEST_INDENT):
        raise TooMuch(f"it indents by more than {LARGEST_INDENT}")
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
    """Returns a filter or test that makes nothing large; its numbers may be widths."""

    @functools.wraps(function)
    def limited(*args, **kwargs):
        _step((*args, *kwargs.values()))
        return _made(function(*args, **kwargs))

    return limited


# With a context, so that none is evaluated when a template is compiled.
@jinja2.pass_context
def _tick(context, value, length=None):
    if length is None:
        _spent.turn()
    else:
        _spent.take(length)
    return value


@jinja2.pass_context
def _weigh(context, value):
    return _made(value)


@jinja2.pass_context
def _join(context, parts):
    _spent.take(sum(_weight(part) for part in parts))
    return "".join(map(str, parts))


@functools.cache
def _environment() -> _Environment:
    made = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    filters = made.filters | {"tojson": _to_json}
    made.filters = {k: _limited(v) for k, v in filters.items() if k not in LEFT_OUT}
    made.filters |= {TICK: _tick, MADE: _weigh, JOINED: _join}
    made.tests = {name: _limited(one) for name, one in made.tests.items()}
    del made.globals["lipsum"]
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
        self._name = name
        if len(source) > MOST_SOURCE:
            raise UserError(
                f"{name} must have at most {MOST_SOURCE} characters, got {len(source)}"
            )
        _spent.restart()
        environment = _environment()
        try:
            tree = _Counting().visit(environment.parse(source))
            code = environment.compile(tree)
        except (jinja2.TemplateError, RecursionError, SyntaxError) as error:
            line = getattr(error, "lineno", None)
            where = f" in line {line}" if line else ""
            raise UserError(f"{name} is no template: {error!s:.200}{where}") from None
        self._template = jinja2.Template.from_code(
            environment, code, environment.make_globals(None)
        )

    def render(self, variables: Mapping[str, Any]) -> str:
        """Returns the text that the template makes of some variables.

        Raises:
          UserError: the template fails, refuses them, reaches for what it must not
            see, or does not come to an end.
        """
        _spent.restart()
        try:
            return self._template.render(dict(variables))
        except (TooMuch, SecurityError, jinja2.TemplateError) as error:
            reason = str(error)
        except (RecursionError, MemoryError):
            reason = "it calls itself without an end"
        except Exception as error:  # a template is a program: anything may be raised
            reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{self._name} can't be used: {reason:.300}")
