# SPDX-License-Identifier: Apache-2.0
"""Debian descriptions and TL;DR files, on made-up samples."""

import hashlib
import json

import pytest

from nlhf_jax.checks import UserError
from nlhf_jax.data import debian, jsonl, tasks, tldr
from nlhf_jax.settings import DataSettings

LENGTHS = {"inputs": 8, "targets": 8}
TEXT = (
    "This program measures the pressure of every pipe in the house and tells the "
    "people who live there when one of them is about to break."
)

DESCRIPTIONS = """\
Package: pressure
Description-md5: 00
Description-en: program that watches pipes
 This program measures the pressure
 of every pipe: colons are kept.
 .
 It has modes:
  * loud
  * quiet

Package: short
Description-en: short one of all

Package: nothing
"""


# -------------------------------------------------------------------------- debian


def test_records_and_paragraphs_of_a_control_file():
    records = list(debian.read_records(DESCRIPTIONS.splitlines(keepends=True)))
    assert [record["Package"] for record in records] == ["pressure", "short", "nothing"]
    assert debian.read_description(records[0]) == (
        "program that watches pipes",
        [
            "This program measures the pressure of every pipe: colons are kept.",
            "It has modes: * loud * quiet",
        ],
    )
    assert debian.read_description(records[1]) == ("short one of all", [])
    assert debian.read_description(records[2]) == ("", [])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"text": "word " * 19}, "text too short"),
        ({"text": "word " * 301}, "text too long"),
        ({"package": "librust-pipe-dev"}, "librust"),
        ({"package": "pressure-l10n-de"}, "language pack"),
        ({"package": "hunspell-de-ch"}, "language pack"),
        ({"package": "kde-l10n-fr"}, "language pack"),
        ({"synopsis": "transitional package for pressure"}, "empty package"),
        ({"text": f"{TEXT} This is a dummy package."}, "empty package"),
        ({"text": f"{TEXT} It has the debugging symbols."}, "empty package"),
        ({"package": "gcc-12-aarch64-linux-gnu"}, "toolchain copy"),
        ({"package": "clang-14"}, "toolchain copy"),
        ({"package": "pressure-dbg"}, "debug"),
        ({"section": "contrib/oldlibs"}, "section"),
        ({"section": "introspection"}, "section"),
        ({"synopsis": "pipe watcher"}, "synopsis length"),
        ({"synopsis": "word " * 15}, "synopsis length"),
    ],
)
def test_each_debian_filter_drops_its_example(changes, reason):
    kept = {
        "package": "pressure",
        "section": "utils",
        "synopsis": "program that watches pipes",
        "text": TEXT,
    }
    assert debian.reason_to_drop(**(kept | changes)) == reason


def _description(package, synopsis, text):
    body = text.replace("\n\n", "\n .\n ")
    return {"Package": package, "Description-en": f"{synopsis}\n {body}"}


def test_pairs_are_unique_and_know_their_source_package():
    descriptions = [
        _description("b-tools", "tools that watch pipes", f"{TEXT} Two."),
        _description("a", "program that watches pipes", f"{TEXT}\n\nMore of it."),
        _description("a-doc", "manual of the program", f"{TEXT}\n\nThe manual."),
        _description("c", "Program that watches PIPES", f"{TEXT} Three."),
        _description("d", "too short a text", "Short."),
    ]
    packages = [{"Package": "b-tools", "Source": "b (1.2-3)", "Section": "utils"}]
    rows, counts = debian.make_pairs(descriptions, packages)
    assert rows == [
        {
            "prompt": f"{TEXT} More of it.",
            "target": "program that watches pipes",
            "source": "a",
        },
        {"prompt": f"{TEXT} Two.", "target": "tools that watch pipes", "source": "b"},
    ]
    assert counts == {
        "records": 5,
        "pairs": 2,
        "dropped: seen before": 2,
        "dropped: text too short": 1,
    }


def test_split_is_a_function_of_the_source_package(tmp_path):
    rows = [
        {"prompt": f"p{number}", "target": "t", "source": f"source{number % 40}"}
        for number in range(80)
    ]
    jsonl.write_rows(str(tmp_path / "debian.jsonl.gz"), rows)
    settings = DataSettings("debian", LENGTHS, data_dir=str(tmp_path))
    splits = debian.splits(settings)
    for split, rows_of_split in splits.items():
        for row in rows_of_split:
            digest = hashlib.sha256(row["source"].encode()).hexdigest()
            assert split == ("train" if int(digest, 16) % 100 < 90 else "evaluation")
    assert sum(map(len, splits.values())) == 80
    assert all(splits.values())


@pytest.mark.parametrize(
    "has_apt, has_corpus, taken",
    [
        (True, False, "debian"),
        (False, True, "debian"),
        (False, False, "docstrings"),
    ],
)
def test_docstrings_stand_in_for_debian_where_there_is_no_apt(
    has_apt, has_corpus, taken, monkeypatch, tmp_path
):
    monkeypatch.setattr(debian, "_has_apt", lambda: has_apt)
    if has_corpus:
        (tmp_path / "debian.jsonl.gz").touch()
    asked = []
    for name in ("debian", "docstrings"):
        monkeypatch.setitem(
            tasks._BUILDERS[tasks.SUPERVISED],
            name,
            lambda settings, _: asked.append(settings.mixture_or_task_name),
        )
    settings = DataSettings("debian_or_docstrings", LENGTHS, data_dir=str(tmp_path))
    tasks.get_task(settings, None, tasks.SUPERVISED)
    assert asked == [taken]


def test_system_without_apt_is_told_so_in_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(debian.shutil, "which", lambda _: None)
    settings = DataSettings("debian", LENGTHS, data_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"through apt-get, which this system has not"):
        debian.splits(settings)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------- tldr


def _judged(post, choice=0, split="train", title="Help"):
    return {
        "info": {"id": "t3_1", "post": post, "title": title, "subreddit": "AskPipes"},
        "summaries": [{"text": " left one"}, {"text": "right one"}],
        "choice": choice,
        "split": split,
    }


def _write(folder, name, lines):
    (folder / name).write_text("\n".join(json.dumps(line) for line in lines))


def _settings(folder):
    return DataSettings("tldr", LENGTHS, data_dir=str(folder))


def test_tldr_comparisons_by_split(tmp_path):
    news = {"info": {"article": "News."}, "summaries": [], "choice": 0}
    _write(tmp_path, "batch3.json", [_judged("My\n\npipe  leaks."), news])
    _write(
        tmp_path,
        "batch4.json",
        [_judged("Other.", 1, "valid1"), _judged("My pipe leaks.", 1, "valid2")],
    )
    _write(tmp_path, "other.json", [{"not": "read"}])
    splits = tldr.comparison_splits(_settings(tmp_path))
    assert splits["train"] == [
        {
            "prompt": "SUBREDDIT: r/AskPipes TITLE: Help POST: My pipe leaks.",
            "response_a": "left one",
            "response_b": "right one",
            "preference": 1.0,
            "split": "train",
        }
    ]
    # The second evaluation line is on a post of the training split.
    assert [
        (row["prompt"][-6:], row["preference"]) for row in splits["evaluation"]
    ] == [("Other.", 0.0)]


def test_tldr_prompts_are_posts_with_the_preferred_summary(tmp_path):
    lines = [_judged("One.", 1), _judged("One.", 0), _judged("Two.", 0)]
    _write(tmp_path, "batch3.json", lines)
    head = "SUBREDDIT: r/AskPipes TITLE: Help POST: "
    assert tldr.prompt_splits(_settings(tmp_path)) == {
        "train": [
            {"prompt": f"{head}One.", "target": "right one"},
            {"prompt": f"{head}Two.", "target": "left one"},
        ],
        "evaluation": [],
    }


@pytest.mark.parametrize("folder", ["", "nowhere", "."])
def test_tldr_without_files_is_a_user_error(tmp_path, folder):
    settings = DataSettings("tldr", LENGTHS, data_dir=folder and str(tmp_path / folder))
    with pytest.raises(UserError, match=r"batch\*\.json"):
        tldr.comparison_splits(settings)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"choice": 2}, "is no comparison"),
        ({"choice": None}, "is no comparison"),
        ({"summaries": [{"text": "one"}]}, "is no comparison"),
        ({"summaries": [{"text": " "}, {"text": "b"}]}, "must not be empty or blank"),
        ({"info": None}, "is no comparison"),
        ({"info": {"title": "no post"}}, "is no comparison"),
    ],
)
def test_tldr_line_that_is_wrong_is_named(tmp_path, change, expected):
    _write(tmp_path, "batch3.json", [_judged("One."), _judged("Two.") | change])
    with pytest.raises(UserError) as error:
        tldr.comparison_splits(_settings(tmp_path))
    assert str(error.value).startswith(f"{tmp_path / 'batch3.json'} line 2: ")
    assert expected in str(error.value)


def test_a_home_folder_that_is_nobodys_is_one_sentence():
    said = "data_dir: there is no home folder for '~no_such_user/x'"
    with pytest.raises(UserError, match=said):
        tldr.read_comparisons("~no_such_user/x")
    settings = DataSettings("debian", LENGTHS, data_dir="~no_such_user/x")
    with pytest.raises(UserError, match=said):
        debian._corpus_path(settings)
