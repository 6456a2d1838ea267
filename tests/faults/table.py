# SPDX-License-Identifier: Apache-2.0
"""The table of faults: `python -m tests.faults.table [--long] [--rows=1,4] [--write]`.

`--most=20` makes at most so many trials of a row.

Every row puts its fault in as often as it says, each time with another seed and in an
empty folder, and prints what came of it. `--write` puts the table, with date, machine
and versions, between its two marks in docs/reliability.md. Without `--long` a row makes
as few trials as CI does.

The long form takes hours. `--json=FILE` keeps each trial as soon as it has ended: the
same command goes on where it was stopped, and the table has all rows of the file.
"""

import argparse
import dataclasses
import datetime
import importlib
import json
import os
import pathlib
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from tests.faults.rows import Row, Trial, measured, over_limit

MODULES = ("checkpoint_rows", "host_rows", "input_rows", "number_rows", "resume_rows")
DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- table of faults -->", "<!-- end of the table of faults -->"
HEAD = (
    "| # | goal | fault | trials | as promised | measured | promise | met |\n"
    "|---|---|---|---|---|---|---|---|"
)


def all_rows() -> list[Row]:
    """Returns every row, by number."""
    found = []
    for name in MODULES:
        found += importlib.import_module(f"tests.faults.{name}").ROWS
    return sorted(found, key=lambda row: row.number)


class Kept:
    """The trials that were made, in a file where there is one.

    Each stands with the day it was made on, since a table may take several.
    """

    def __init__(self, file: str = ""):
        self._file = pathlib.Path(file) if file else None
        self._rows: dict[str, list[dict[str, Any]]] = {}
        if self._file is not None and self._file.is_file():
            self._rows = json.loads(self._file.read_text())

    def add(self, row: Row, trial: Trial) -> None:
        """Keeps a trial; the file has it when this returns."""
        made = dataclasses.asdict(trial) | {"day": datetime.date.today().isoformat()}
        self._rows.setdefault(str(row.number), []).append(made)
        if self._file is not None:
            partial = self._file.with_name(self._file.name + ".partial")
            partial.write_text(json.dumps(self._rows, indent=1))
            partial.replace(self._file)

    def trials(self, row: Row) -> list[Trial]:
        """Returns a row's trials, in the order of their seeds."""
        made = self._rows.get(str(row.number), [])
        return [Trial(one["failure"], one["figures"]) for one in made]

    def days(self) -> list[datetime.date]:
        """Returns the first and the last day of all trials, once where they are one."""
        days = {one["day"] for made in self._rows.values() for one in made}
        found = sorted(map(datetime.date.fromisoformat, days))
        return found[:1] + found[1:][-1:]


def play(row: Row, count: int, kept: Kept) -> float:
    """Makes the first `count` trials, where they are not kept; returns the seconds."""
    started = time.monotonic()
    for seed in range(len(kept.trials(row)), count):
        with tempfile.TemporaryDirectory(prefix=f"row_{row.number}_") as folder:
            try:
                trial = row.trial(seed, pathlib.Path(folder))
            except Exception as error:
                trial = Trial(f"{type(error).__name__}: {error}")
        kept.add(row, trial)
        show = trial.failure.strip().splitlines()[-1][:200] if trial.failure else "ok"
        print(f"row {row.number} trial {seed + 1}/{count}: {show}", file=sys.stderr)
    return time.monotonic() - started


def line(row: Row, trials: Sequence[Trial]) -> str:
    """Returns a row of the table; what failed stands in it."""
    kept = sum(not trial.failure for trial in trials)
    wrong = over_limit(row, trials)
    failures = sorted({t.failure.strip().splitlines()[-1] for t in trials if t.failure})
    met = "yes" if kept == len(trials) and not wrong else "**no**: "
    met += "; ".join([*failures, *wrong])
    cells = (
        row.number,
        row.goal,
        row.injected,
        len(trials),
        f"{kept} of {len(trials)}",
        measured(trials) or "-",
        row.promise,
        met,
    )
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def conditions(kept: Kept) -> str:
    """Returns when, where and with what the table was made."""
    from nlhf_jax.jobs import runs

    versions = ", ".join(f"{k} {v}" for k, v in runs.versions().items())
    days = " to ".join(day.strftime("%-d %B %Y") for day in kept.days())
    return f"{days}, {os.cpu_count()} cores, {platform.system()}, {versions}"


def write(table: str) -> None:
    """Puts the table into the document, in place of the one that is there."""
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")


def main(words: Sequence[str] | None = None) -> int:
    """Plays rows and prints their table; 1 where a trial was not as promised."""
    # As in tests/conftest.py: faults are put in on the CPU, whatever else is here.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("NPROC", "16")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--long", action="store_true", help="the long form")
    parser.add_argument("--rows", default="", help="numbers, split at commas")
    parser.add_argument("--most", type=int, default=10**6, help="trials of a row")
    parser.add_argument("--write", action="store_true", help="into docs/reliability.md")
    parser.add_argument("--json", default="", help="keeps every trial; goes on")
    given = parser.parse_args(words)
    chosen = {int(number) for number in given.rows.split(",") if number}
    rows = [row for row in all_rows() if not chosen or row.number in chosen]
    counts = [min(row.long if given.long else row.short, given.most) for row in rows]
    kept = Kept(given.json)
    for row, count in zip(rows, counts, strict=True):
        seconds = play(row, count, kept)
        print(f"row {row.number} took {seconds:.0f} s", file=sys.stderr)
    made = [(row, kept.trials(row)) for row in all_rows() if kept.trials(row)]
    lines = [line(row, trials) for row, trials in made]
    table = "\n".join([conditions(kept), "", HEAD, *lines])
    print(table)
    if given.write:
        write(table)
    return int(any(trial.failure for _, trials in made for trial in trials))


if __name__ == "__main__":
    sys.exit(main())
