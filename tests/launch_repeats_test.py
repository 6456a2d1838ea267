# SPDX-License-Identifier: Apache-2.0
"""Which deaths of a job are alike, as its exit codes and its log say."""

import pytest

from launch import repeats
from launch.repeats import Repeats, last_step


@pytest.mark.parametrize(
    ("text", "step"),
    [
        ("", None),
        ("compiling the train step ...\n", None),
        ("train 12/500  0:41 left  loss 1.0\n", 12),
        ("train 9/500  ? left\ntrain 10/500  1:02:03 left\nKilled\n", 10),
        ("train 12/500  0:41 left\nworker 1 hangs: step 13, or waiting\n", 13),
        ("ratio 3/4 of 7 left\n", None),
    ],
)
def test_the_last_step_of_a_log(text, step, tmp_path):
    log = tmp_path / "log"
    log.write_text(text)
    assert last_step(log) == step


def test_no_log_is_no_step(tmp_path):
    assert last_step(tmp_path / "nowhere") is None


def test_only_the_end_of_a_long_log_is_read(tmp_path, monkeypatch):
    log = tmp_path / "log"
    log.write_text("train 1/9  0:01 left\n" + "x" * 100 + "\n")
    monkeypatch.setattr(repeats, "TAIL_BYTES", 50)
    assert last_step(log) is None
    monkeypatch.setattr(repeats, "TAIL_BYTES", 500)
    assert last_step(log) == 1


@pytest.fixture
def note(tmp_path):
    """Returns (code, step) -> what is said of that death."""
    seen, log = Repeats(), tmp_path / "log"

    def one(code: int, step: int | None) -> str:
        log.write_text("" if step is None else f"train {step}/99  0:10 left\n")
        return seen.note(code, log)

    return one


def test_the_third_of_a_kind_is_one_too_many(note, tmp_path):
    assert [note(139, 5), note(139, 5)] == ["", ""]
    said = note(139, 5)
    assert "exit code 139 after step 5 3 times in a row" in said
    assert str(tmp_path / "log") in said


@pytest.mark.parametrize("other", [(139, 6), (137, 5), (139, None)])
def test_another_death_between_begins_the_count_anew(note, other):
    deaths = [(139, 5), (139, 5), other, (139, 5), (139, 5)]
    assert [note(*death) for death in deaths] == [""] * 5
    assert note(139, 5)


def test_who_asks_for_a_restart_before_the_first_step_gets_it(note):
    assert [note(42, None) for _ in range(5)] == [""] * 5
    assert [bool(note(42, 3)) for _ in range(3)] == [False, False, True]
