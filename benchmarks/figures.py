# SPDX-License-Identifier: Apache-2.0
"""What is divided by what, in every round, and when that is enough."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.sizes import Needed, Size

LEAST_ROUNDS = 5
LIMIT = "limit"  # the seconds that a step takes at the machine's measured peak


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: what is divided by what.

    Attributes:
      name: as it is printed, and as reasons name it.
      above: "SIDE" for the seconds of a unit, "SIDE/PART" for those of a part,
        "SIDE:FACT" for a number that the side told at its end; "limit" for the seconds
        that `Needed.step` takes at the machine's measured peak.
      below: the same; "" divides by 1.
      goals: size -> what is to be reached; none where nothing is asked.
      at_least: whether the figure should be at least the goal, or at most.
      scale: the figure is this times the quotient.
    """

    name: str
    above: str
    below: str = ""
    goals: Mapping[str, float] = dataclasses.field(default_factory=dict)
    at_least: bool = True
    scale: float = 1.0

    @property
    def sides(self) -> tuple[str, ...]:
        """Names of the sides that it needs."""
        return tuple(
            term.split("/")[0].split(":")[0]
            for term in (self.above, self.below)
            if term not in ("", LIMIT)
        )

    @property
    def is_fact(self) -> bool:
        """Whether it needs no clock, so that one figure is all there is."""
        return ":" in self.above and (not self.below or ":" in self.below)


@dataclasses.dataclass(frozen=True)
class Figure:
    """A row that was measured, or could not be.

    Attributes:
      row: what was asked.
      size: name of the size.
      values: one figure a round; a single one if no clock is needed.
      missing: why there is none, "" if there is.
    """

    row: Row
    size: str
    values: tuple[float, ...] = ()
    missing: str = ""

    @property
    def goal(self) -> float | None:
        """What is to be reached at this size, None where nothing is asked."""
        return self.row.goals.get(self.size)

    @property
    def worst(self) -> float:
        """The round furthest from the goal: the least, or the largest."""
        return min(self.values) if self.row.at_least else max(self.values)

    def verdict(self) -> str:
        """Returns "met" if the worst round meets the goal; "missed" if it does not.

        "absent" where nothing was measured, "too few rounds" below five, "" where
        nothing is asked.
        """
        if not self.values:
            return "absent"
        if self.goal is None:
            return ""
        if len(self.values) < LEAST_ROUNDS and not self.row.is_fact:
            return "too few rounds"
        is_met = (
            self.worst >= self.goal if self.row.at_least else self.worst <= self.goal
        )
        return "met" if is_met else "missed"

    def record(self) -> dict[str, Any]:
        """Returns the figure for the results file."""
        record = {"name": self.row.name, "size": self.size, "verdict": self.verdict()}
        record |= {"goal": self.goal, "at_least": self.row.at_least}
        if not self.values:
            return record | {"missing": self.missing}
        return record | {
            "values": list(self.values),
            "min": min(self.values),
            "median": statistics.median(self.values),
            "max": max(self.values),
        }


Rounds = Sequence[Mapping[str, Mapping[str, Any]]]


class Measured:
    """What a run found, to be looked up by a row's terms.

    Args:
      size: of the run.
      rounds: group -> what its sides answered, round by round.
      told: side -> what it told besides, and its state.
    """

    def __init__(
        self,
        size: Size,
        rounds: Mapping[str, Rounds],
        told: Mapping[str, Mapping[str, Any]],
    ):
        self._size, self._rounds, self._told = size, rounds, told
        self._group = {
            side: group
            for group, units in rounds.items()
            for one in units
            for side in one
        }

    def peak(self, name: str) -> float:
        """Returns the larger of what jax and torch reached; 0 if neither was asked."""
        facts = (
            self._told.get(f"peaks.{one}", {}).get("facts", {})
            for one in ("jax", "torch")
        )
        return max((fact.get(name, 0.0) for fact in facts), default=0.0)

    def _fact(self, term: str) -> float:
        side, _, name = term.partition(":")
        told = self._told.get(side, {})
        found = dict(told.get("facts", {})) | {"peak_mib": told.get("peak_mib")}
        value = found.get(name)
        return math.nan if value is None else float(value)

    def _seconds(self, term: str, units: Mapping[str, Mapping[str, Any]]) -> float:
        if not term:
            return 1.0
        if term == LIMIT:
            peak = self.peak("flops_per_s")
            return Needed.of(self._size).step / peak if peak else math.nan
        side, _, part = term.partition("/")
        unit = units.get(side)
        if unit is None:
            return math.nan
        return unit["parts"].get(part, math.nan) if part else unit["seconds"]

    def figure(self, row: Row, size: str) -> Figure:
        """Returns the row's figure, or why there is none."""
        why = self._why_missing(row)
        if why:
            return Figure(row, size, missing=why)
        if row.is_fact:
            below = self._fact(row.below) if row.below else 1.0
            values = [row.scale * self._fact(row.above) / below]
        else:
            group = self._group.get(row.sides[0], "")
            values = [
                row.scale
                * self._seconds(row.above, units)
                / self._seconds(row.below, units)
                for units in self._rounds.get(group, ())
            ]
        kept = tuple(value for value in values if math.isfinite(value))
        return Figure(row, size, kept, "" if kept else "no round with both sides")

    def _why_missing(self, row: Row) -> str:
        for name in row.sides:
            told = self._told.get(name)
            if told is None:
                return f"{name} was not asked for"
            if told["state"] in ("absent", "crashed"):
                return f"{name} {told['state']}: {told['why']}"
        return ""
