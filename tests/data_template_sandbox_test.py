# SPDX-License-Identifier: Apache-2.0
"""Templates that would run for long or fill the memory, and ones that only look so."""

import pytest

from nlhf_jax.checks import UserError
from nlhf_jax.data import template_sandbox
from nlhf_jax.data.template_sandbox import Compiled

NESTED = "{% set n = namespace(x=1) %}{% for i in range(60) %}"
LONG = "{% set a = 'a' | center(90000) %}"


@pytest.mark.parametrize(
    "source, complaint",
    [
        (f"{NESTED}{{% set n.x = n.x * 9 %}}{{% endfor %}}", "an integer beyond"),
        ("{% set x = 9223372036854775807 %}{{ x - -x }}", "an integer beyond"),
        ("{{ [[1]] | tojson(indent=99999) }}", "indents by more than 16"),
        (
            "{% for i in range(9) %}{% for j in range(9999) if false %}"
            "{% endfor %}{% endfor %}",
            "loops more than",
        ),
        ("{{ range(99999) | map('upper') | list | length }}", "loops more than"),
        ("{{ range(99999) | select('odd') | list | length }}", "loops more than"),
        ("{{ range(9999) | map('center', 9999) | list | length }}", "more than"),
        (LONG + "{{ a.replace(' ', a) | length }}", "one step of it may make more"),
        (LONG + "{{ a | replace(' ', a) | length }}", "one step of it may make more"),
        (LONG + "{{ ('{0}' * 1).format(a) }}", r"operator \* is not allowed"),
        (
            LONG + "{{ (a | replace(' ', '{0}')).format(a) | length }}",
            "one step of it may make more",
        ),
        (
            LONG + "{% for i in range(99) %}{% set b = [a[1:]] %}{% endfor %}",
            "makes more than",
        ),
        (f"{NESTED}{{% set n.x = [n.x, n.x] %}}{{% endfor %}}", "makes more than"),
        (
            f"{NESTED}{{% set m = namespace() %}}{{% set m.x = n.x %}}"
            "{% set m.y = n.x %}{% set n.x = m %}{% endfor %}{{ n.x }}",
            "makes more than",
        ),
        (
            "{% set x %}{% for i in range(9000) %}" + "x" * 999 + "{% endfor %}"
            "{% endset %}",
            "makes more than",
        ),
        ("{{ [[1], [2]] | sum(start=[]) }}", "No filter named 'sum'"),
        ("{{ _nlhf_tick.restart() }}", "'_nlhf_tick' is undefined"),
    ],
)
def test_nothing_that_a_template_makes_is_large(source, complaint):
    with pytest.raises(UserError, match=complaint):
        Compiled(source, "T").render({})


def test_a_template_that_takes_long_is_stopped(monkeypatch):
    compiled = Compiled("{% for i in range(9) %}{% endfor %}", "T")
    monkeypatch.setattr(template_sandbox, "MOST_SECONDS", -1.0)
    with pytest.raises(UserError, match="T can't be used: it takes more than"):
        compiled.render({})


def test_a_template_as_long_as_a_book_is_refused():
    with pytest.raises(UserError, match="at most 200000 characters, got 200001"):
        Compiled("x" * 200_001, "T")


def test_long_prompts_are_no_trouble():
    text = "Which pipe? " * 25_000
    said = [{"role": "user", "content": text}]
    source = (
        "{% for m in messages if m.role in ['user', 'system'] %}"
        "{{ m.content.replace('<a>', '').split('</think>')[-1] | trim }}{% endfor %}"
    )
    assert Compiled(source, "T").render({"messages": said}) == text.strip()
