# SPDX-License-Identifier: Apache-2.0
"""JSON lines: what is read, and the sentence for each kind of mistake."""

import gzip
import json

import pytest

from nlhf_jax.checks import UserError
from nlhf_jax.data import jsonl
from nlhf_jax.settings import DataSettings

LENGTHS = {"inputs": 8, "targets": 8}
GOOD = {"prompt": "p", "response_a": "a", "response_b": "b", "preference": 0.5}


def _line(**changes) -> bytes:
    return json.dumps(GOOD | changes).encode()


def _without(field, **more) -> bytes:
    row = {key: value for key, value in GOOD.items() if key != field}
    return json.dumps(row | more).encode()


BAD_LINES = {
    "not JSON": (b"{'prompt': 1}", "is not JSON: Expecting property name"),
    "cut": (b'{"prompt": "p"', "is not JSON: Expecting ',' delimiter"),
    "two values": (_line() + _line(), "is not JSON: Extra data"),
    "list": (b"[1]", "must be a JSON object, got a list"),
    "text": (b'"prompt"', "must be a JSON object, got text"),
    "null": (b"null", "must be a JSON object, got null"),
    "no prompt": (
        _without("prompt"),
        "field 'prompt' is missing, found 'response_a', 'response_b', 'preference'",
    ),
    "nearest": (
        _without("prompt", promt="p"),
        "field 'prompt' is missing (found 'promt'; did you mean 'prompt'?)",
    ),
    "nearest response": (
        _without("response_b", responseB="b"),
        "field 'response_b' is missing (found 'responseB'; did you mean 'response_b'?)",
    ),
    "no fields": (b"{}", "field 'prompt' is missing, found none"),
    "number": (_line(prompt=3), "'prompt' must be text, got a number"),
    "null text": (_line(response_a=None), "'response_a' must be text, got null"),
    "list text": (_line(response_b=["b"]), "'response_b' must be text, got a list"),
    "empty": (_line(prompt=""), "'prompt' must not be empty or blank"),
    "blank": (_line(response_a=" \n\t"), "'response_a' must not be empty or blank"),
    "surrogate": (
        _line(prompt="ab\ud800"),
        "'prompt' holds half a surrogate pair at character 2",
    ),
    "above": (_line(preference=1.5), "'preference' must be in [0, 1], got 1.5"),
    "below": (_line(preference=-1), "'preference' must be in [0, 1], got -1"),
    "NaN": (_line(preference=float("nan")), "'preference' must be in [0, 1], got nan"),
    "infinite": (_line(preference=float("inf")), "must be in [0, 1], got inf"),
    "truth": (_line(preference=True), "'preference' must be a number, got a truth"),
    "quoted": (_line(preference="1"), "'preference' must be a number, got text"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_line_gives_one_sentence_with_file_and_line(tmp_path, name):
    bad, expected = BAD_LINES[name]
    path = tmp_path / "rated.jsonl"
    path.write_bytes(b"\n".join([_line(), b"", bad, _line()]))
    with pytest.raises(UserError) as error:
        jsonl.read_rows(str(path), jsonl.COMPARISON_FIELDS)
    sentence = str(error.value)
    assert sentence.startswith(f"{path} line 3: ")
    assert expected in sentence
    assert "\n" not in sentence


def test_byte_that_is_not_utf8_is_named_by_its_place_in_the_file(tmp_path):
    path = tmp_path / "rated.jsonl"
    start = _line() + b"\n" + '{"prompt": "é'.encode()
    path.write_bytes(start + b'\xff"}\n')
    with pytest.raises(UserError) as error:
        jsonl.read_rows(str(path), jsonl.COMPARISON_FIELDS)
    expected = f"{path} line 2: is not UTF-8 at byte {len(start)} of the file"
    assert str(error.value) == expected


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_file_without_lines_is_a_user_error(tmp_path, content):
    path = tmp_path / "rated.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is empty"):
        jsonl.read_rows(str(path), jsonl.COMPARISON_FIELDS)


@pytest.mark.parametrize("damage", ["missing", "no gzip", "cut gzip"])
def test_file_that_cannot_be_read_is_a_user_error(tmp_path, damage):
    path = tmp_path / "rated.jsonl.gz"
    if damage != "missing":
        packed = gzip.compress(_line() * 50)
        path.write_bytes(_line() if damage == "no gzip" else packed[:-10])
    with pytest.raises(UserError, match=r"rated\.jsonl\.gz can't be read: \w"):
        jsonl.read_rows(str(path), jsonl.COMPARISON_FIELDS)


@pytest.mark.parametrize("name", ["rated.jsonl", "deep/rated.jsonl.gz"])
def test_written_rows_are_read_back(tmp_path, name):
    rows = [
        GOOD | {"preference": 0},
        GOOD | {"prompt": 'línea\n"zwei" \u2028 😀\\', "preference": 1.0, "group": 7},
    ]
    path = tmp_path / name
    jsonl.write_rows(str(path), rows)
    assert jsonl.read_rows(str(path), jsonl.COMPARISON_FIELDS) == rows
    assert (path.read_bytes()[:2] == b"\x1f\x8b") == name.endswith(".gz")
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path):
    path = tmp_path / "rated.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + _line() + b"\r\n" + _line() + b"\r\n\r\n")
    assert jsonl.read_rows(str(path), jsonl.COMPARISON_FIELDS) == [GOOD, GOOD]


def test_rows_in_memory_are_checked_alike():
    assert jsonl.check_rows([GOOD], jsonl.COMPARISON_FIELDS) == [GOOD]
    with pytest.raises(UserError, match=r"^rows row 2: 'preference' must be in"):
        jsonl.check_rows([GOOD, GOOD | {"preference": 2}], jsonl.COMPARISON_FIELDS)
    with pytest.raises(UserError, match="at least one example"):
        jsonl.check_rows([], jsonl.COMPARISON_FIELDS)


# ------------------------------------------------------------------------- splits


def _grouped(num_groups, each=3):
    return [
        GOOD | {"prompt": f"p{group}.{number}", "group": f"topic {group}"}
        for number in range(each)
        for group in range(num_groups)
    ]


@pytest.mark.parametrize(
    ("num_groups", "share", "num_held_out"),
    [(10, 0.2, 2), (32, 0.2, 6), (2, 0.01, 1), (2, 0.99, 1), (3, 0.5, 2)],
)
def test_whole_groups_are_held_out(num_groups, share, num_held_out):
    rows = _grouped(num_groups)
    splits = jsonl.split_by_group(rows, "group", share)
    train, evaluation = (
        {row["group"] for row in splits[split]} for split in ("train", "evaluation")
    )
    assert len(evaluation) == num_held_out
    assert len(train) == num_groups - num_held_out
    assert not train & evaluation
    assert len(splits["train"]) + len(splits["evaluation"]) == len(rows)
    assert splits["train"] == [row for row in rows if row["group"] in train]


def test_split_does_not_depend_on_the_order_of_lines():
    rows = _grouped(20)
    key = lambda row: row["prompt"]  # noqa: E731
    one, other = (
        sorted(jsonl.split_by_group(r, "group", 0.2)["evaluation"], key=key)
        for r in (rows, rows[::-1])
    )
    assert one == other


def test_one_group_cannot_be_split():
    with pytest.raises(UserError, match="at least two values to hold one out, got 1"):
        jsonl.split_by_group(_grouped(1), "group", 0.2)


def _settings(**files):
    return DataSettings("jsonl", LENGTHS, vocabulary_path="byte", **files)


def test_splits_follow_the_files_that_are_set(tmp_path):
    train, evaluation = (str(tmp_path / f"{name}.jsonl") for name in ("t", "e"))
    jsonl.write_rows(train, _grouped(5))
    jsonl.write_rows(evaluation, [GOOD])
    read = lambda **files: {  # noqa: E731
        split: len(rows)
        for split, rows in jsonl.read_splits(
            _settings(**files), jsonl.COMPARISON_FIELDS
        ).items()
    }
    assert read(train_file=train) == {"train": 15}
    assert read(evaluation_file=evaluation) == {"evaluation": 1}
    both = {"train_file": train, "evaluation_file": evaluation}
    assert read(**both) == {"train": 15, "evaluation": 1}
    assert read(**both, group_field="group") == {"train": 15, "evaluation": 1}
    grouped = read(train_file=train, group_field="group", evaluation_share=0.4)
    assert grouped == {"train": 9, "evaluation": 6}
    with pytest.raises(UserError, match="set one"):
        read()


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (GOOD | {"topic": "t"}, "field 'group' is missing, found 'prompt'"),
        (GOOD | {"group": None}, "'group' must be text or integer, got null"),
    ],
)
def test_group_field_must_be_in_every_line(tmp_path, row, expected):
    path = str(tmp_path / "rated.jsonl")
    jsonl.write_rows(path, [GOOD | {"group": "g"}, row])
    settings = _settings(train_file=path, group_field="group")
    with pytest.raises(UserError) as error:
        jsonl.read_splits(settings, jsonl.COMPARISON_FIELDS)
    assert f"{path} line 2: {expected}" in str(error.value)
