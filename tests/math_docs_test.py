# SPDX-License-Identifier: Apache-2.0
"""docs/math.md numbers its equations without gaps; code cites only what is there."""

import pathlib
import re

import pytest

from nlhf_jax.algorithms import ALGORITHMS
from nlhf_jax.games import methods

ROOT = pathlib.Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "math.md").read_text(encoding="utf-8")
BLOCKS = "\n".join(re.findall(r"^```\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL))
NUMBERS = [int(n) for n in re.findall(r"^\((\d+)\)", BLOCKS, re.MULTILINE)]
CITED = re.compile(r"docs/math\.md\s((?:\(\d+\)(?:,\s+|\s+to\s+|\s+and\s+)?)+)")


ONE_EACH = {factory.__module__.rpartition(".")[2] for factory in ALGORITHMS.values()}


def citations(text: str) -> list[int]:
    """Returns every number cited as `docs/math.md (n)`, `(n), (m)` or `(n) to (m)`."""
    found = []
    for match in CITED.findall(text):
        first, *rest = re.split(r"(,|to|and)", re.sub(r"\s", "", match).rstrip(","))
        found.append(int(first[1:-1]))
        for word, number in zip(rest[::2], rest[1::2], strict=True):
            if word == "to":
                found += range(found[-1] + 1, int(number[1:-1]))
            found.append(int(number[1:-1]))
    return found


def test_equations_are_numbered_in_order():
    assert list(range(1, len(NUMBERS) + 1)) == NUMBERS
    assert len(NUMBERS) > 30


def test_code_cites_equations_that_are_there():
    for path in sorted((ROOT / "nlhf_jax").rglob("*.py")):
        assert {*citations(path.read_text(encoding="utf-8"))} <= {*NUMBERS}, path


def test_text_refers_to_equations_that_are_there():
    named = {int(n) for n in re.findall(r"\((\d{1,2})\)", TEXT)}
    assert named <= {*NUMBERS}


@pytest.mark.parametrize(
    "path",
    [
        "games/gaps.py",
        "games/methods.py",
        "games/solutions.py",
        "games/central_path.py",
        "games/equilibria.py",
        "games/nash.py",
        "losses.py",
        "mixture.py",
        "decoding.py",
        "loss_gradient.py",
        "train_step.py",
        *(f"algorithms/{name}.py" for name in sorted(ONE_EACH)),
        "preferences/pairwise.py",
        "preferences/reward.py",
    ],
)
def test_every_file_with_equations_cites_them(path):
    assert citations((ROOT / "nlhf_jax" / path).read_text(encoding="utf-8"))


def test_the_table_of_the_family_has_a_row_per_method():
    rows = re.findall(r"^\| `(\w+)`", TEXT, re.MULTILINE)
    assert rows == [name for name in rows if name in methods.METHODS]
    assert {*rows} == {*methods.METHODS}


def test_citations_by_hand():
    assert citations("see docs/math.md (3).") == [3]
    assert citations("docs/math.md (3), (5); and (7)") == [3, 5]
    assert citations("docs/math.md\n(26) to (29)") == [26, 27, 28, 29]
