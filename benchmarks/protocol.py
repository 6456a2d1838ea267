# SPDX-License-Identifier: Apache-2.0
"""What a side says and hears: lines, one unit of work each.

    side   > @side ready {"seconds": ..., "versions": {...}}
    parent > unit
    side   > @side unit {"seconds": 0.25, "parts": {"score": 0.1}}
    parent > end
    side   > @side end {"peak_mib": 812.0, "facts": {...}}

or, instead of the first line, `@side absent {"why": ...}` where a package of the side
is not installed. Whatever else is printed is noise. Standard library only: peers
import it in environments of their own.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TextIO

from benchmarks.sizes import SIZES, Size

MARK = "@side "
STATUS = pathlib.Path("/proc/self/status")


class Work(NamedTuple):
    """What a side does.

    Attributes:
      unit: does one unit and waits for its end; returns seconds of parts that it timed
        by itself, or nothing.
      facts: called at the end: counts and other numbers that no clock is needed for.
      num_warm_ups: units that are done before the first that counts.
    """

    unit: Callable[[], Mapping[str, float] | None]
    facts: Callable[[], Mapping[str, Any]] = dict
    num_warm_ups: int = 2


Make = Callable[[Size], Work]


class Absent(Exception):
    """A side that cannot run here, with the reason."""


def peak_mib() -> float:
    """Returns the largest resident memory of this process so far, MiB; NaN if unknown.

    Not `ru_maxrss`: a process starts with that of the one which started it.
    """
    if not STATUS.exists():
        return float("nan")
    lines = STATUS.read_text().splitlines()
    kib = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(kib[0]) / 1024 if kib else float("nan")


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Returns package -> installed version, of those that are installed."""
    found = {"python": sys.version.split()[0]}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def timed(fn: Callable[[], Any]) -> tuple[float, Any]:
    """Returns the seconds of a blocking call, and what it returned."""
    start = time.perf_counter()
    result = fn()
    return time.perf_counter() - start, result


def _say(stream: TextIO, kind: str, **fields: Any) -> None:
    stream.write(f"{MARK}{kind} {json.dumps(fields)}\n")
    stream.flush()


def serve(
    make: Callable[[], Work],
    packages: Sequence[str],
    commands: TextIO,
    answers: TextIO,
) -> None:
    """Answers commands until `end` or until nobody asks any more.

    Args:
      make: builds the work; ModuleNotFoundError of one of `packages`, and `Absent`,
        mean that the side is absent.
      packages: distributions whose versions are told; modules of the same name.
      commands: one a line.
      answers: one a line.
    """
    try:
        seconds, work = timed(make)
    except ModuleNotFoundError as error:
        root = (error.name or "").split(".")[0]
        if root not in {name.replace("-", "_") for name in packages}:
            raise  # what a package forgot to ask for is an error of that package
        _say(answers, "absent", why=f"{root} is not installed")
        return
    except Absent as reason:
        _say(answers, "absent", why=str(reason))
        return
    warm = [timed(work.unit)[0] for _ in range(work.num_warm_ups)]
    _say(answers, "ready", made_s=seconds, warm_s=warm, versions=versions(packages))
    for line in commands:
        if line.strip() == "unit":
            seconds, parts = timed(work.unit)
            _say(answers, "unit", seconds=seconds, parts=dict(parts or {}))
        elif line.strip() == "end":
            peak = peak_mib()  # before the facts, which may compile again
            _say(answers, "end", peak_mib=peak, facts=dict(work.facts()))
            return


def main(
    variants: Mapping[str, Make],
    packages: Sequence[str],
    words: Sequence[str] | None = None,
) -> int:
    """Serves one variant at one size over standard input and output.

    Libraries print where they like: this process's standard output becomes its
    standard error, and only protocol lines go where standard output went.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("variant", choices=sorted(variants))
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    options = parser.parse_args(words)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    size = SIZES[options.size]
    serve(lambda: variants[options.variant](size), packages, sys.stdin, answers)
    return 0
