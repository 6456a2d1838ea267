# SPDX-License-Identifier: Apache-2.0
"""Made-up inputs for every reader: a valid result, or one sentence; never another end.

    python -m tests.faults.fuzz 25000        inputs for each of the four readers

Each target takes one made-up input and raises an AssertionError where the reader does
anything else than return what it promises or raise a UserError of one line, or where it
leaves a file behind.
"""

import argparse
import contextlib
import io
import json
import math
import pathlib
import platform
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import hypothesis
import jaxtyping
import numpy as np
from hypothesis import strategies as st

from nlhf_jax import cli, gin_bindings
from nlhf_jax.checks import UserError
from nlhf_jax.data import jsonl
from nlhf_jax.games import win_tables
from nlhf_jax.jobs import folders

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
PHASES = [
    hypothesis.Phase.generate,
    hypothesis.Phase.target,
    hypothesis.Phase.shrink,
    hypothesis.Phase.explain,
]
LONGEST = 2000  # characters that a person can still read
FORBIDDEN = "fuzz_forbidden_module"  # on the path, and never to be imported


@contextlib.contextmanager
def refusals(place: pathlib.Path) -> Iterator[None]:
    """Lets a UserError pass that prints as one line, and counts the folder's files."""
    before = sorted(p.name for p in place.iterdir())
    try:
        yield
    except UserError as error:
        sentence = cli.on_one_line(str(error))  # as the command line prints it
        assert sentence, "a sentence without words"
        assert len(sentence.splitlines()) == 1, f"more than one line: {sentence!r}"
        assert len(sentence) < LONGEST, f"{len(sentence)} characters: {sentence}"
    after = sorted(p.name for p in place.iterdir())
    assert after == before, f"left behind: {set(after) - set(before)}"


# ------------------------------------------------------------------------ mutations


NASTY = [
    b"\xff",
    b"\x00",
    b"\xef\xbb\xbf",
    b"\n",
    b"\r",
    b"\\ud800",
    b"NaN",
    b"1e999",
    b"-1",
    b'"',
    b"{",
    b"]",
    b"," * 5,
    b"[" * 3000,
    b"9" * 5000,
    "\u2028\u202e".encode(),
    b"null",
    b"\t",
]


@st.composite
def mutated(draw, texts: st.SearchStrategy[bytes]) -> bytes:
    """Draws a text and breaks it in up to four places."""
    data = bytearray(draw(texts))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        kind = draw(
            st.sampled_from(["insert", "nasty", "delete", "flip", "copy", "cut"])
        )
        end = min(len(data), at + draw(st.integers(1, 20)))
        if kind == "insert":
            data[at:at] = draw(st.binary(max_size=8))
        elif kind == "nasty":
            data[at:at] = draw(st.sampled_from(NASTY))
        elif kind == "delete":
            del data[at:end]
        elif kind == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "copy":
            data[at:at] = data[at:end]
        elif kind == "cut":
            del data[at:]
    return bytes(data)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["", " ", "\u200b", "a\0b", "</s>", "0.5", "1/2", "-", "NA"]),
)
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


# --------------------------------------------------------------------------- readers


FIELDS = ("prompt", "response_a", "response_b", "preference", "id", "promt")
ROWS = st.dictionaries(st.sampled_from(FIELDS), SCALARS, max_size=6).map(
    lambda changes: {
        "prompt": "p",
        "response_a": "a",
        "response_b": "b",
        "preference": 0.25,
        **changes,
    }
)
JSONL_FILES = mutated(
    st.lists(ROWS | JSON, max_size=4).map(
        lambda rows: b"\n".join(json.dumps(row).encode() for row in rows)
    )
)


def read_jsonl(place: pathlib.Path, data: bytes) -> None:
    """Holds the reader of comparisons to its promise on one file."""
    file = place / "rated.jsonl"
    file.write_bytes(data)
    with refusals(place):
        rows = jsonl.read_rows(str(file), jsonl.COMPARISON_FIELDS)
        assert rows
        for row in rows:
            texts = [row["prompt"], row["response_a"], row["response_b"]]
            assert all(type(text) is str and text.strip() for text in texts)
            assert all("\0" not in text for text in texts)
            assert type(row["preference"]) in (int, float)
            assert 0 <= row["preference"] <= 1
        ids = [row["id"] for row in rows if "id" in row]
        assert len(ids) == len(set(ids))


CELLS = st.one_of(
    st.sampled_from(
        ["0.5", "0.25", "0.75", "3/4", "1/4", "", "-", "NA", "1", "0", "7"]
    ),
    st.text(max_size=6),
    st.floats().map(str),
)


@st.composite
def tables(draw) -> tuple[str, bytes, dict]:
    """Draws the name, the text and the settings of a table of wins."""
    size = draw(st.integers(0, 5))
    name = st.sampled_from("ABCDE") | st.text(max_size=4)
    names = draw(
        st.lists(name, min_size=size, max_size=size, unique=draw(st.booleans()))
    )
    if draw(st.booleans()):
        rows = [[draw(CELLS) for _ in names] for _ in names]
        lines = [["", *names], *([n, *row] for n, row in zip(names, rows, strict=True))]
        text = "\n".join(",".join(line) for line in lines)
        return "table.csv", draw(mutated(st.just(_utf8(text)))), draw(SETTINGS)
    cell = CELLS | JSON
    rows = [[draw(cell) for _ in names] for _ in names]
    kind = draw(st.sampled_from(["preference", "wins", "names"]))
    text = json.dumps({"names": names, kind: rows})
    return "table.json", draw(mutated(st.just(_utf8(text)))), draw(SETTINGS)


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


SETTINGS = st.fixed_dictionaries(
    {
        "cells": st.sampled_from(["preference", "wins"]),
        "fill": st.sampled_from(["", "half", "bradley_terry"]),
    }
)


def read_table(place: pathlib.Path, table: tuple[str, bytes, dict]) -> None:
    """Holds the reader of win tables to its promise on one file."""
    name, data, settings = table
    (place / name).write_bytes(data)
    with refusals(place):
        names, preference_NN = win_tables.load_table(place / name, **settings)
        assert preference_NN.shape == (len(names),) * 2
        assert len(set(names)) == len(names) and all(names)
        assert np.isfinite(preference_NN).all()
        assert ((preference_NN >= 0) & (preference_NN <= 1)).all()
        np.testing.assert_allclose(preference_NN + preference_NN.T, 1, atol=1e-12)


NAMES = ["TAU", "TRAIN_STEPS", "self_play.tau", "train.seed", "LoopSettings.batch_size"]
NAMES += [
    "train.algorithm",
    "MODEL_DIR",
    "BETA",
    "a/train.seed",
    "import",
    "train.loop",
]
VALUES = [
    "0.1",
    "-1",
    "1e999",
    "'x'",
    "runs/x",
    "%TAU",
    "%gin.REQUIRED",
    "@self_play()",
]
VALUES += ["@self_play", "@train", "[@self_play(), 1]", "(%TAU,)", "None", "True", "{}"]
VALUES += ["9" * 400, "(" * 400, "\\", "'", '"""', "@x/nash_md_pg()", "", "10 # %X"]
LINES = st.one_of(
    st.builds("{} = {}".format, st.sampled_from(NAMES), st.sampled_from(VALUES)),
    st.builds("{} = {}".format, st.sampled_from(NAMES), JSON.map(repr)),
    st.builds("{} = {}".format, st.text(max_size=8), st.text(max_size=8)),
    st.sampled_from(
        [
            f"import {FORBIDDEN}",
            f"from {FORBIDDEN} import x",
            "from __gin__ import dynamic_registration",
            "include 'nowhere.gin'",
            "include '.'",
            "include 'configs/runs/train.gin'",
        ]
    ),
)
RUN = b"""
include 'configs/runs/train.gin'
MODEL_DIR = 'x'
REFERENCE_CHECKPOINT = 'r'
PREFERENCE_CHECKPOINT = 'p'
ALGORITHM = @self_play()
TAU = 0.02
self_play.tau = %TAU
"""
GIN_FILES = mutated(
    st.lists(LINES, max_size=3).map(lambda lines: RUN + _utf8("\n".join(lines)))
)
FLAGS = st.dictionaries(
    st.sampled_from(NAMES) | st.text(max_size=8),
    st.sampled_from(VALUES)
    | st.text(max_size=8)
    | st.just(f"[@self_play()]\nimport {FORBIDDEN}"),
    max_size=2,
)


@contextlib.contextmanager
def integers_are_numbers() -> Iterator[None]:
    """Lets pass what only the type checks of a test run refuse: 1 for a float."""
    try:
        yield
    except jaxtyping.TypeCheckError as error:
        one_for_a_float = r"Actual value: -?\d+\s+Expected type: <class 'float'>"
        if not re.search(one_for_a_float, str(error)):
            raise


def read_gin(place: pathlib.Path, run: tuple[bytes, dict[str, str]]) -> None:
    """Holds the lint to its promise on one file and a few flags; nothing is run."""
    data, flags = run
    (place / "run.gin").write_bytes(data)
    with (
        refusals(place),
        contextlib.redirect_stderr(io.StringIO()),
        integers_are_numbers(),
    ):
        gin_bindings.load("train", [str(place / "run.gin")], flags)
        (_, arguments), *_ = gin_bindings.rehearse("train")
        assert arguments["loop"].batch_size >= 1
        assert math.isfinite(arguments["seed"])
    assert FORBIDDEN not in sys.modules


DESCRIPTION = {
    "kind": "language_model",
    "settings": {
        "vocab_size": 384,
        "emb_dim": 8,
        "num_heads": 2,
        "head_dim": 4,
        "mlp_dim": 16,
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
        "mlp_activations": ["gelu", "linear"],
    },
    "feature_lengths": {"inputs": 8, "targets": 4},
    "vocabulary": "vocabulary.model",
}


@st.composite
def descriptions(draw) -> bytes:
    """Draws the text of a model's description with other values here and there."""
    whole = json.loads(json.dumps(DESCRIPTION))
    for part in draw(
        st.lists(st.sampled_from([(), ("settings",), ("feature_lengths",)]))
    ):
        inner = whole
        for key in part:
            inner = inner.get(key) if isinstance(inner, dict) else None
        if isinstance(inner, dict) and inner:
            name = draw(st.sampled_from(sorted(inner)) | st.text(max_size=4))
            inner[name] = draw(JSON | st.sampled_from(["../x", "byte", "/etc/passwd"]))
    return draw(mutated(st.just(json.dumps(whole).encode())))


def read_description(place: pathlib.Path, data: bytes) -> None:
    """Holds the reader of a model folder to its promise on one `model.json`."""
    (place / "model.json").write_bytes(data)
    with refusals(place):
        found = folders.read_description(place)
        assert found.settings.emb_dim >= 1
        assert all(found.feature_lengths[name] >= 1 for name in ("inputs", "targets"))
        file = pathlib.Path(folders.vocabulary_file(place))
        assert file.name == "byte" or file.parent == place


TARGETS: dict[str, tuple[Callable, st.SearchStrategy]] = {
    "JSON lines": (read_jsonl, JSONL_FILES),
    "win tables": (read_table, tables()),
    "gin files and flags": (read_gin, st.tuples(GIN_FILES, FLAGS)),
    "model descriptions": (read_description, descriptions()),
}


def run(name: str, num_inputs: int, seed: int | None = None) -> float:
    """Tries a reader on made-up inputs; returns the seconds it took.

    Args:
      name: of `TARGETS`.
      num_inputs: how many.
      seed: of the inputs; None draws one.
    """
    target, inputs = TARGETS[name]
    settings = hypothesis.settings(
        max_examples=num_inputs,
        deadline=None,
        database=None,
        print_blob=False,
        # To make a fault's input smaller takes longer than to find it in a few.
        phases=PHASES if num_inputs >= len(PHASES) else PHASES[:1],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        (place / f"{FORBIDDEN}.py").write_text("")
        sys.path.insert(0, folder)
        try:

            @hypothesis.seed(
                random.SystemRandom().getrandbits(64) if seed is None else seed
            )
            @settings
            @hypothesis.given(inputs)
            def trial(one):
                for file in place.iterdir():
                    if file.suffix != ".py":
                        file.unlink()
                target(place, one)

            trial()
        finally:
            sys.path.remove(folder)
    return time.monotonic() - began


def main(argv: list[str] | None = None) -> int:
    """Prints a line for each reader; returns 1 where one broke its promise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("inputs", type=int, help="for each reader")
    number = parser.parse_args(argv).inputs
    failed = 0
    for name in TARGETS:
        try:
            seconds = run(name, number)
        except Exception as error:
            failed = 1
            for one in getattr(error, "exceptions", [error]):
                print(f"{name}: {type(one).__name__}: {one}", flush=True)
            continue
        rate = number / seconds
        print(f"{name}: {number:,} inputs, 0 faults, {rate:,.0f} a second", flush=True)
    print(f"Python {platform.python_version()}, hypothesis {hypothesis.__version__}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
