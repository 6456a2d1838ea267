# SPDX-License-Identifier: Apache-2.0
"""What a row of the table of faults is: a fault, how it is put in, what must follow."""

import dataclasses
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Trial:
    """What one injected fault led to.

    Attributes:
      failure: what was not as promised, empty where all was.
      figures: what was measured, by name with its unit, as {"all gone, s": 0.4}.
    """

    failure: str = ""
    figures: Mapping[str, float | int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
      number: of the row.
      goal: what is promised, in a few words.
      injected: the fault and how it is put in.
      short: trials in CI.
      long: trials of the long form.
      trial: (seed, an empty folder) -> what came of it; the seed decides everything
        that is drawn.
      limits: figure -> (statistic, its largest value): "max", "median" or "min" of all
        trials. A figure over its limit makes the row's goal unmet in the table; it
        fails no test, for a clock on a busy machine says little.
      promise: the goal in numbers, as the table shows it.
    """

    number: int
    goal: str
    injected: str
    short: int
    long: int
    trial: Callable[[int, pathlib.Path], Trial]
    promise: str
    limits: Mapping[str, tuple[str, float | int]] = dataclasses.field(
        default_factory=dict
    )


STATISTICS: dict[str, Callable[[Sequence[float | int]], float | int]] = {
    "max": max,
    "median": statistics.median,
    "min": min,
}


def figures_of(trials: Sequence[Trial]) -> dict[str, list[float | int]]:
    """Returns every trial's value of each figure."""
    found: dict[str, list[float | int]] = {}
    for trial in trials:
        for name, value in trial.figures.items():
            found.setdefault(name, []).append(value)
    return found


def over_limit(row: Row, trials: Sequence[Trial]) -> list[str]:
    """Returns a sentence for each figure that is over its limit."""
    found, wrong = figures_of(trials), []
    for name, (statistic, limit) in row.limits.items():
        values = found.get(name, [])
        if not values:
            wrong.append(f"{name} was not measured")
            continue
        value = STATISTICS[statistic](values)
        if value > limit:
            wrong.append(f"{statistic} of {name} is {value:.3g}, over {limit:g}")
    return wrong


def measured(trials: Sequence[Trial]) -> str:
    """Returns the figures as words: median and largest of each."""
    parts = []
    for name, values in figures_of(trials).items():
        middle, largest = statistics.median(values), max(values)
        parts.append(f"{name}: median {middle:.3g}, max {largest:.3g}")
    return "; ".join(parts)
