# SPDX-License-Identifier: Apache-2.0
"""The table of faults: `python -m tests.faults.table [--long] [--rows=1,4] [--write]`.

`--most=20` makes at most so many trials of a row.

Every row puts its fault in as often as it says, each time with another seed and in an
empty folder, and prints what came of it. `--write` puts the table, with date, machine
and versions, between its two marks in docs/reliability.md. Without `--long` a row makes
as few trials as CI does.
"""

import argparse
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


def play(row: Row, count: int) -> tuple[list[Trial], float]:
    """Returns what `count` trials came to, and the seconds they took."""
    trials, started = [], time.monotonic()
    for seed in range(count):
        with tempfile.TemporaryDirectory(prefix=f"row_{row.number}_") as folder:
            try:
                trial = row.trial(seed, pathlib.Path(folder))
            except Exception as error:
                trial = Trial(f"{type(error).__name__}: {error}")
        trials.append(trial)
        show = trial.failure.strip().splitlines()[-1][:200] if trial.failure else "ok"
        print(f"row {row.number} trial {seed + 1}/{count}: {show}", file=sys.stderr)
    return trials, time.monotonic() - started


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


def conditions() -> str:
    """Returns when, where and with what the table was made."""
    from nlhf_jax.jobs import runs

    versions = ", ".join(f"{k} {v}" for k, v in runs.versions().items())
    today = datetime.date.today().strftime("%-d %B %Y")
    return f"{today}, {os.cpu_count()} cores, {platform.system()}, {versions}"


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
    parser.add_argument("--json", default="", help="file that gets every trial")
    given = parser.parse_args(words)
    chosen = {int(number) for number in given.rows.split(",") if number}
    rows = [row for row in all_rows() if not chosen or row.number in chosen]
    counts = [min(row.long if given.long else row.short, given.most) for row in rows]
    played = [(row, *play(row, n)) for row, n in zip(rows, counts, strict=True)]
    lines = [line(row, trials) for row, trials, _ in played]
    table = "\n".join([conditions(), "", HEAD, *lines])
    print(table)
    for row, _, seconds in played:
        print(f"row {row.number} took {seconds:.0f} s", file=sys.stderr)
    if given.json:
        kept = {
            row.number: [{"failure": t.failure, **t.figures} for t in trials]
            for row, trials, _ in played
        }
        pathlib.Path(given.json).write_text(json.dumps(kept, indent=1))
    if given.write:
        write(table)
    return int(any(t.failure for _, trials, _ in played for t in trials))


if __name__ == "__main__":
    sys.exit(main())
