# SPDX-License-Identifier: Apache-2.0
"""What ends a run, and is said, when a number is not finite: the host's part of it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from nlhf_jax import guards
from nlhf_jax.checks import RunFailed


class TrainingDiverged(RunFailed):
    """A number is not finite; nothing was saved after it became so.

    Attributes:
      step: updates done with the one that made it.
      metrics: of that step.
      tensors: name -> largest absolute value of every tensor the step measured, in the
        order they were made; empty where it measures none.
      batch: what the step was given; None where that is not known.
      limit: steps that may be left out, and were.
    """

    def __init__(
        self,
        step: int,
        metrics: Mapping[str, float],
        tensors: Mapping[str, float],
        batch: Any = None,
        limit: int = 0,
    ):
        self.step, self.metrics, self.tensors = step, metrics, tensors
        self.batch, self.limit = batch, limit
        super().__init__(
            f"{self.what} at step {step}{self._skipped}; nothing was saved after it"
        )

    @property
    def first_tensor(self) -> str:
        """The first tensor that is not finite, "" without one."""
        return next((n for n, x in self.tensors.items() if not math.isfinite(x)), "")

    @property
    def what(self) -> str:
        """What is not finite, in a few words."""
        bad = [
            f"{name} is {value}"
            for name, value in self.metrics.items()
            if guards.is_watched(name) and not math.isfinite(value)
        ]
        if not self.first_tensor:
            return bad[0]
        tensor = f"the first tensor that is not finite is the {self.first_tensor}"
        return f"{bad[0]}, and {tensor}" if bad else tensor

    @property
    def _skipped(self) -> str:
        return f", after {self.limit} steps that were left out" if self.limit else ""


def named(names: Sequence[str], largest: Any) -> dict[str, float]:
    """Returns tensor -> largest absolute value.

    Args:
      names: see `guards.tensor_names`.
      largest: a number for each name; none at all where a step measures none.
    """
    if not len(largest):
        return {}
    return {n: float(x) for n, x in zip(names, largest, strict=True)}


def check(
    step: int,
    metrics: Mapping[str, float],
    tensors: Mapping[str, float],
    batch: Any = None,
    limit: int = 0,
) -> str:
    """Ends the run at a number that is not finite, or says that the step is left out.

    Args:
      step: updates done.
      metrics: of the step; under `guards.SKIPPED`, where it is there, how many steps
        of the run were left out with this one.
      tensors: name -> largest absolute value.
      batch: what the step was given.
      limit: steps that may be left out.

    Returns:
      A sentence, or "" where all is well.

    Raises:
      TrainingDiverged: no more steps may be left out.
    """
    watched = [value for name, value in metrics.items() if guards.is_watched(name)]
    if all(map(math.isfinite, [*watched, *tensors.values()])):
        return ""
    found = TrainingDiverged(step, metrics, tensors, batch, limit)
    count = metrics.get(guards.SKIPPED, math.inf)
    if count > limit:
        raise found
    return f"step {step} is left out, {count:.0f} of at most {limit}: {found.what}"
