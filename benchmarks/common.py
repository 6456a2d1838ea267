# SPDX-License-Identifier: Apache-2.0
"""Ratios of times, formed inside a round, so that a busy machine slows both sides.

Seconds on one machine say little about another, and a shared machine changes from
minute to minute. Every part therefore runs once a round, in an order that turns. What
else runs only ever adds time, so the figure is the ratio of the two sides' least times;
beside it stand the least, median and largest ratio of times of the same round, which
show how far to trust it.
"""

import dataclasses
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

LEAST_ROUNDS = 5


class Counted:
    """A jitted function that counts its compilations and names itself."""

    def __init__(self, name: str, fn: Callable[..., Any]):
        self.name = name
        self.num_compilations = 0

        def counted(*args):
            # Runs once per trace, and every trace is compiled.
            self.num_compilations += 1
            return fn(*args)

        self._jitted = jax.jit(counted)

    def __call__(self, *args: Any) -> Any:
        """Calls the function and waits for its results."""
        return jax.block_until_ready(self._jitted(*args))


def interleaved(
    parts: Mapping[str, Callable[[], Any]], rounds: int
) -> dict[str, list[float]]:
    """Returns name -> seconds in each round, after one round that is not counted.

    Args:
      parts: what to time; each call waits for its results.
      rounds: rounds that count. Each begins one part later than the one before, so
        that no part always follows the same neighbour's warm caches.
    """
    names = list(parts)
    for name in names:
        parts[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            parts[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(
    seconds: Mapping[str, Sequence[float]],
    above: Sequence[str],
    below: Sequence[str],
) -> list[float]:
    """Returns sum of `above` / sum of `below` of each round."""
    tops = zip(*(seconds[name] for name in above), strict=True)
    bottoms = zip(*(seconds[name] for name in below), strict=True)
    return [sum(top) / sum(low) for top, low in zip(tops, bottoms, strict=True)]


@dataclasses.dataclass(frozen=True)
class Figure:
    """One figure of a benchmark: a ratio, how it moved, and what it should be.

    Attributes:
      name: what is divided by what.
      quiet: ratio of the least times, which the goal is about.
      values: one ratio per round.
      goal: `quiet` should not exceed it; None where there is no goal.
    """

    name: str
    quiet: float
    values: tuple[float, ...]
    goal: float | None = None

    @classmethod
    def of(
        cls,
        name: str,
        seconds: Mapping[str, Sequence[float]],
        above: Sequence[str],
        below: Sequence[str],
        goal: float | None = None,
        share: float | int = 1,
    ) -> "Figure":
        """Returns `share` times the sum of `above` over that of `below`."""
        least = {name: min(values) for name, values in seconds.items()}
        quiet = sum(map(least.get, above)) / sum(map(least.get, below))
        values = tuple(share * value for value in ratios(seconds, above, below))
        return cls(name, share * quiet, values, goal)

    @property
    def median(self) -> float:
        """The middle ratio of the rounds."""
        return statistics.median(self.values)

    def verdict(self) -> str:
        """Returns "met", "missed", "too few rounds", or "" without a goal."""
        if self.goal is None:
            return ""
        if len(self.values) < LEAST_ROUNDS:
            return "too few rounds"
        return "met" if self.quiet <= self.goal else "missed"

    def line(self) -> str:
        """Returns the figure as one line of text."""
        low, high = min(self.values), max(self.values)
        rounds = f"rounds {low:.3f} to {high:.3f}, median {self.median:.3f}"
        text = f"{self.name}: {self.quiet:.3f} ({rounds})"
        if self.goal is None:
            return text
        return f"{text}, goal <= {self.goal:g}: {self.verdict()}"

    def record(self) -> dict[str, Any]:
        """Returns the figure for the results file."""
        return {
            "name": self.name,
            "ratio": self.quiet,
            "min": min(self.values),
            "median": self.median,
            "max": max(self.values),
            "rounds": len(self.values),
            "goal": self.goal,
            "verdict": self.verdict(),
        }


def machine() -> dict[str, Any]:
    """Returns what the figures depend on: devices, cores, versions and load."""
    devices = jax.devices()
    return {
        "platform": devices[0].platform,
        "device": devices[0].device_kind,
        "num_devices": len(devices),
        "num_cores": os.cpu_count(),
        "processor": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "load_at_start": os.getloadavg()[0],
    }


def write_results(path: str, results: Mapping[str, Any]) -> None:
    """Writes the results as indented JSON; an empty path writes nothing."""
    if path:
        text = json.dumps(dict(results), indent=2) + "\n"
        pathlib.Path(path).write_text(text)
