# SPDX-License-Identifier: Apache-2.0
"""Every row of the table of faults in its short form, and the table's own parts."""

import dataclasses
import json

import pytest

from tests.faults import table
from tests.faults.rows import Row, Trial, measured, over_limit

ROWS = table.all_rows()


def toy(**changed):
    given = {"limits": {"gone, s": ("max", 2.0)}} | changed
    return Row(90, "goal", "fault", 1, 2, lambda *_: Trial(), "< 2 s", **given)


@pytest.mark.battery
@pytest.mark.timeout(600)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"row_{row.number}")
def test_a_fault_leads_to_what_is_promised(row, tmp_path):
    for seed in range(row.short):
        folder = tmp_path / str(seed)
        folder.mkdir()
        assert row.trial(seed, folder).failure == ""


def test_every_row_stands_once():
    numbers = [row.number for row in ROWS]
    assert len(set(numbers)) == len(numbers)
    for row in ROWS:
        assert row.goal and row.injected and row.promise
        assert 1 <= row.short <= row.long


def test_what_is_over_its_limit_is_said_and_is_no_failure():
    trials = [Trial(figures={"gone, s": value}) for value in (0.5, 2.5, 1.0)]
    assert over_limit(toy(), trials) == ["max of gone, s is 2.5, over 2"]
    assert over_limit(toy(limits={"gone, s": ("median", 2.0)}), trials) == []
    assert over_limit(toy(), [Trial()]) == ["gone, s was not measured"]
    assert measured(trials) == "gone, s: median 1, max 2.5"
    assert "**no**: max of gone, s is 2.5" in table.line(toy(), trials)
    assert "3 of 3" in table.line(toy(), trials)


def test_a_failure_and_an_exception_stand_in_the_table():
    def fail(seed, folder):
        assert folder.is_dir() and not list(folder.iterdir())
        if seed == 1:
            raise ValueError("lost | found")
        return Trial("" if seed else "first line\nwrong numbers")

    row = Row(91, "goal", "fault", 1, 3, fail, "none lost")
    kept = table.Kept()
    table.play(row, 3, kept)
    trials = kept.trials(row)
    assert [bool(trial.failure) for trial in trials] == [True, True, False]
    line = table.line(row, trials)
    assert "1 of 3" in line and "wrong numbers" in line
    assert "ValueError: lost \\| found" in line


@pytest.mark.parametrize(
    ("words", "count"),
    [([], 1), (["--long"], 2), (["--long", "--most=1"], 1), (["--rows=90"], 1)],
)
def test_the_form_says_how_many_trials(words, count, monkeypatch, capsys):
    monkeypatch.setattr(table, "all_rows", lambda: [toy(limits={})])
    assert table.main(words) == 0
    out, err = capsys.readouterr()
    assert f"| {count} | {count} of {count} |" in out
    assert f"trial {count}/{count}" in err


def test_a_table_that_was_stopped_goes_on(tmp_path, monkeypatch, capsys):
    made = []

    def trial(seed, folder):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(seed)
        return Trial(figures={"seed": seed})

    rows = [
        dataclasses.replace(toy(limits={}), number=number, trial=trial, long=2)
        for number in (90, 91)
    ]
    monkeypatch.setattr(table, "all_rows", lambda: rows)
    words = ["--long", f"--json={tmp_path / 'trials.json'}"]
    with pytest.raises(KeyboardInterrupt):
        table.main(words)
    assert made == [0, 1, 0]
    rows[1] = dataclasses.replace(rows[1], trial=lambda seed, _: Trial(f"bad {seed}"))
    assert table.main(words) == 1
    out, err = capsys.readouterr()
    assert "| 90 | goal | fault | 2 | 2 of 2 | seed: median 0.5, max 1 |" in out
    assert "| 91 | goal | fault | 2 | 1 of 2 | seed: median 0, max 0 |" in out
    assert "bad 1" in out and "row 91 trial 1/2: ok" in err
    # A part of the rows still prints all that are there.
    assert table.main(["--rows=90", words[1]]) == 1
    assert "| 91 | goal |" in capsys.readouterr().out


def test_a_table_of_several_days_says_so(tmp_path):
    file = tmp_path / "trials.json"
    trial = {"failure": "", "figures": {}}
    days = ["2026-11-22", "2026-11-20", "2026-11-21"]
    file.write_text(json.dumps({"90": [trial | {"day": day} for day in days]}))
    assert table.conditions(table.Kept(str(file))).startswith(
        "20 November 2026 to 22 November 2026, "
    )


def test_the_table_is_put_between_its_marks(tmp_path, monkeypatch):
    document = tmp_path / "reliability.md"
    document.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    monkeypatch.setattr(table, "DOCUMENT", document)
    monkeypatch.setattr(table, "all_rows", lambda: [toy(limits={})])
    assert table.main(["--write"]) == 0
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    assert "old" not in text and "| 90 | goal |" in text and "jax " in text
