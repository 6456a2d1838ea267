# SPDX-License-Identifier: Apache-2.0
"""Every bad input through the command line: one sentence, exit code 2, nothing written.

`docs/reliability.md` has these tables; a test in `rehearsal_test.py` compares them.
"""

import json
import pathlib
import resource

import pytest

from nlhf_jax import cli
from nlhf_jax.data import batches, jsonl, prompts, token_checks, vocabularies
from nlhf_jax.settings import DataSettings
from tests.jobs_test import RUN, TINY

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
SHIPPED = "nlhf_jax/pretrained/docstrings_t5"
LENGTHS = {"inputs": 16, "targets": 6}
ROW = {"prompt": "p", "response_a": "a", "response_b": "b", "preference": 0.5}
GOOD = json.dumps(ROW).encode()


def line(**changes) -> bytes:
    return json.dumps(ROW | changes).encode()


# What stands in line 2 of 3 -> what the sentence says after "FILE line 2: ".
LINES = {
    "no JSON": (b"{'prompt': 1}", "is not JSON: Expecting property name"),
    "cut line": (b'{"prompt": "p"', "is not JSON: Expecting ',' delimiter"),
    "not UTF-8": (b'{"prompt": "\xff"}', "is not UTF-8 at byte"),
    "missing field": (
        json.dumps({"promt": "p"}).encode(),
        "field 'prompt' is missing (found 'promt'; did you mean 'prompt'?)",
    ),
    "field twice": (b'{"prompt": "p", "prompt": "q"}', "'prompt' stands twice"),
    "wrong type": (line(response_a=3), "'response_a' must be text, got a number"),
    "extra nesting": (line(prompt={"text": "p"}), "must be text, got an object"),
    "too deep": (b"[" * 100_000, "is not JSON: maximum recursion"),
    "empty prompt": (line(prompt=""), "'prompt' must not be empty or blank"),
    "white space": (line(response_b=" \n"), "'response_b' must not be empty or blank"),
    "invisible": (line(response_a="\u200b\u2060"), "must not be empty or blank"),
    "NUL": (line(prompt="a\0b"), "'prompt' holds a NUL at character 1"),
    "half a pair": (line(prompt="\ud800"), "holds half a surrogate pair"),
    "out of range": (line(preference=1.7), "must be in [0, 1], got 1.7"),
    "NaN preference": (line(preference=float("nan")), "must be in [0, 1], got nan"),
    "no number": (line(preference="0.5"), "'preference' must be a number, got text"),
    "huge number": (b'{"prompt": ' + b"9" * 5000 + b"}", "is not JSON: Exceeds"),
    "id twice": (line(id="first"), "'id' 'first' stands in line 1 already"),
    "id of a list": (line(id=[1]), "'id' must be text or integer"),
}


def one_sentence(capsys, *words: str) -> str:
    """Runs the command line; returns what it says of a mistake."""
    code = cli.main(list(words))
    out, err = capsys.readouterr()
    assert (code, out) == (2, ""), (code, out, err)
    assert err.startswith("nlhf: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert "Traceback" not in err
    return err[len("nlhf: ") :].rstrip("\n")


@pytest.fixture
def run(tmp_path, capsys):
    """Returns (job, data file, more words) -> the sentence of a dry run."""

    def dry(file: pathlib.Path | str, *more: str, job: str = "preference") -> str:
        text = f"include 'configs/runs/{job}.gin'\n{TINY}{RUN}GROUP_FIELD = 'prompt'\n"
        (tmp_path / "run.gin").write_text(text + f"TRAIN_FILE = '{file}'\n")
        words = (f"--gin_file={tmp_path}/run.gin", f"--model_dir={tmp_path}/out", *more)
        try:
            return one_sentence(capsys, job, *words, "--dry_run")
        finally:
            assert not (tmp_path / "out").exists()

    return dry


@pytest.mark.parametrize("name", LINES)
def test_a_bad_line_is_named_before_anything_is_built(name, run, tmp_path):
    bad, expected = LINES[name]
    file = tmp_path / "mine.jsonl"
    file.write_bytes(b"\n".join([line(id="first"), bad, GOOD]))
    sentence = run(file)
    assert sentence.startswith(f"{file} line 2: "), sentence
    assert expected in sentence
    assert len(sentence) < 400


FILES = {
    "no file": (None, "can't be read: No such file or directory"),
    "empty file": (b"", "is empty: it must hold at least one line of JSON"),
    "blank lines": (b"\n \n", "is empty"),
    "BOM alone": (b"\xef\xbb\xbf", "is empty"),
    "one prompt": (GOOD, "must have at least two values to hold one out, got 1"),
    "bytes": (bytes(range(128, 256)), "line 1: is not UTF-8 at byte 0"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_named(name, run, tmp_path):
    content, expected = FILES[name]
    file = tmp_path / "mine.jsonl"
    if content is not None:
        file.write_bytes(content)
    assert expected in run(file)


def test_a_folder_and_a_file_that_is_no_gzip_are_named(run, tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    assert "can't be read: Is a directory" in run(tmp_path / "folder.jsonl")
    (tmp_path / "mine.jsonl.gz").write_bytes(GOOD)
    assert "can't be read: Not a gzipped file" in run(tmp_path / "mine.jsonl.gz")


def test_a_line_of_ten_megabytes_is_read_and_a_longer_one_never_held(
    tmp_path, monkeypatch
):
    file = tmp_path / "mine.jsonl"
    file.write_bytes(line(prompt="x" * 10 * 2**20) + b"\n" + GOOD)
    rows = jsonl.read_rows(str(file), jsonl.COMPARISON_FIELDS)
    assert [len(row["prompt"]) for row in rows] == [10 * 2**20, 1]
    monkeypatch.setattr(jsonl, "LONGEST_LINE", 2**20)
    with pytest.raises(jsonl.UserError, match=r"line 1: must be of at most 1 MiB"):
        jsonl.read_rows(str(file), jsonl.COMPARISON_FIELDS)


def test_a_bad_line_at_the_end_is_found_line_by_line(tmp_path):
    _long_file(tmp_path / "mine.jsonl", 20_000)


@pytest.mark.battery
def test_a_bad_line_after_many_takes_bytes_in_proportion(tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _long_file(tmp_path / "mine.jsonl", 250_000)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 200 * 2**20


def _long_file(file: pathlib.Path, number: int) -> None:
    with file.open("wb") as stream:
        for index in range(number):
            stream.write(b'{"prompt": "p%d", "response_a": "a", ' % index)
            stream.write(b'"response_b": "b", "preference": 0.5}\n')
        stream.write(b'{"prompt": "p"}\n')
    with pytest.raises(
        jsonl.UserError, match=rf" line {number + 1}: field 'response_a"
    ):
        jsonl.read_rows(str(file), jsonl.COMPARISON_FIELDS)


def test_a_split_that_overlaps_is_warned_of_once_with_the_count(tmp_path, capsys):
    train, held_out = (str(tmp_path / f"{name}.jsonl") for name in ("t", "e"))
    jsonl.write_rows(train, [ROW | {"prompt": text} for text in "abc"])
    jsonl.write_rows(held_out, [ROW | {"prompt": text} for text in "bcde"])
    settings = DataSettings(
        "jsonl", LENGTHS, train_file=train, evaluation_file=held_out
    )
    for _ in range(2):
        jsonl.read_splits(settings, jsonl.COMPARISON_FIELDS)
    assert capsys.readouterr().err == (
        f"nlhf: {held_out}: 2 of 4 rows held out have a prompt that training reads "
        "too\n"
    )


def test_an_id_may_repeat_where_it_is_the_group(tmp_path):
    file = str(tmp_path / "mine.jsonl")
    jsonl.write_rows(file, [ROW | {"id": 1}, ROW | {"id": 1}])
    assert len(jsonl.read_rows(file, jsonl.COMPARISON_FIELDS, "id")) == 2


# -------------------------------------------------------------------------- tokens


class Words:
    """A vocabulary of words in which `END` and `PAD` are the special ids."""

    pad_id, eos_id = 0, 1

    def decode(self, ids):
        return " ".join(map(str, ids))


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([1], "has no token besides padding and the end of a sequence"),
        ([0, 0, 1], "has no token besides padding"),
        ([0, 0], "has no token besides padding"),
        ([], "has no token besides padding"),
        ([5, 1, 6, 1], "has the end of a sequence before its end: '5'"),
    ],
)
def test_texts_that_became_no_tokens_are_refused(ids, expected):
    rows = [{"inputs": [5, 1]}, {"inputs": ids}]
    form = prompts.prompt_format(Words())
    with pytest.raises(token_checks.UserError) as error:
        token_checks.check_ids(rows, ("inputs",), Words(), "mine, train", form)
    assert str(error.value).startswith(f"mine, train: 'inputs' of example 2 {expected}")
    token_checks.check_ids(rows[:1], ("inputs",), Words(), "mine, train", form)


@pytest.mark.parametrize("name", ["byte", f"{ROOT / SHIPPED}/vocabulary.model"])
def test_a_text_that_spells_the_special_pieces_is_a_text(name):
    vocabulary = vocabularies.load_vocabulary(name)
    rows = [{"prompt": "say </s> and <pad>", "target": "</s></s>"}]
    data = batches.supervised_from_rows(rows, {"inputs": 64, "targets": 64}, vocabulary)
    for part in data.examples:
        (ids_T,), (mask_T,) = (array[0:1] for array in part)
        assert (ids_T[mask_T] == vocabulary.eos_id).sum() == 1
    assert vocabulary.decode(data.examples.targets.tokens_BT[0][:-1].tolist())


# ------------------------------------------------------------------------ folders


def folder_with(tmp_path, **changes) -> str:
    text = (ROOT / SHIPPED / "model.json").read_text()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.json").write_text(
        json.dumps(json.loads(text) | changes)
    )
    return str(tmp_path / "model")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"kind": "langauge_model"}, "did you mean 'language_model'?"),
        ({"vocabulary": "../../secret"}, "the vocabulary of a model must be a plain"),
        ({"vocabulary": "other.model"}, "has no other.model"),
        ({"feature_lengths": {"inputs": 0, "targets": 1}}, "must be an integer of at"),
        ({"settings": {}}, "is not a model description"),
        ({"feature_lengths": None}, "is not a model description"),
    ],
)
def test_a_broken_model_folder_is_named(changes, expected, capsys, tmp_path):
    folder = folder_with(tmp_path, **changes)
    words = ("sample", f"--checkpoint={folder}", "--prompt=x")
    assert expected in one_sentence(capsys, *words)


def test_a_judge_of_another_vocabulary_is_refused(capsys, tmp_path):
    judge = folder_with(tmp_path, kind="preference", vocabulary="byte")
    words = (
        "train",
        "--gin_file=configs/algorithms/self_play.gin",
        f"--gin.MODEL_DIR={tmp_path}/out",
        f"--gin.REFERENCE_CHECKPOINT={SHIPPED}",
        f"--gin.PREFERENCE_CHECKPOINT={judge}",
    )
    for more in ((), ("--dry_run",)):
        sentence = one_sentence(capsys, *words, *more)
        assert sentence == (
            f"the preference model {judge!r} reads other tokens than the "
            f"language_model model {SHIPPED!r}: their vocabularies differ"
        )
    assert not (tmp_path / "out").exists()
