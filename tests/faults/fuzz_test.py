# SPDX-License-Identifier: Apache-2.0
"""The short form of `python -m tests.faults.fuzz`, and proof that it can fail.

NLHF_FUZZ_INPUTS says how many inputs each reader gets; the default suits the suite.
"""

import os

import pytest

from nlhf_jax import gin_bindings
from nlhf_jax.checks import UserError
from nlhf_jax.data import jsonl
from nlhf_jax.games import win_tables
from nlhf_jax.jobs import folders
from tests.faults import fuzz

NUM_INPUTS = int(os.environ.get("NLHF_FUZZ_INPUTS", "120"))


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_a_valid_result_or_one_sentence(name):
    number = (
        NUM_INPUTS // 4 if name.startswith("gin") else NUM_INPUTS
    )  # ten times dearer
    fuzz.run(name, number, seed=0 if NUM_INPUTS < 1000 else None)


READERS = {
    "JSON lines": (jsonl, "read_rows"),
    "win tables": (win_tables, "load_table"),
    "gin files and flags": (gin_bindings, "load"),
    "model descriptions": (folders, "read_description"),
}


def other_end(reader, place):
    raise KeyError("prompt")


def no_sentence(reader, place):
    raise UserError("a b " * 1000)


def left_behind(reader, place):
    (place / "half.partial").write_text("x")
    raise UserError("the disk is full")


@pytest.mark.parametrize("name", fuzz.TARGETS)
@pytest.mark.parametrize("fault", [other_end, no_sentence, left_behind])
def test_a_reader_that_breaks_the_promise_is_seen(name, fault, monkeypatch, tmp_path):
    module, function = READERS[name]
    places = []

    def broken(*arguments, **settings):
        return fault(getattr(module, function), places[-1])

    target, inputs = fuzz.TARGETS[name]

    def noting(place, one):
        places.append(place)
        target(place, one)

    monkeypatch.setattr(module, function, broken)
    monkeypatch.setitem(fuzz.TARGETS, name, (noting, inputs))
    with pytest.raises((AssertionError, KeyError)):
        fuzz.run(name, 3, seed=0)


def test_a_row_that_no_reader_may_pass_is_seen(monkeypatch):
    passed = [{"prompt": " ", "response_a": "a", "response_b": "b", "preference": 2}]
    monkeypatch.setattr(jsonl, "read_rows", lambda *_: passed)
    with pytest.raises(AssertionError):
        fuzz.run("JSON lines", 3, seed=0)


def test_the_command_counts_faults(monkeypatch, capsys):
    monkeypatch.setattr(fuzz, "TARGETS", dict([*fuzz.TARGETS.items()][:1]))
    assert fuzz.main(["20"]) == 0
    assert "JSON lines: 20 inputs, 0 faults" in capsys.readouterr().out
    monkeypatch.setattr(jsonl, "read_rows", lambda *_: [])
    assert fuzz.main(["20"]) == 1
    assert "JSON lines: AssertionError" in capsys.readouterr().out
