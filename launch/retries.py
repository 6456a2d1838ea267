# SPDX-License-Identifier: Apache-2.0
"""How often a job is started again, and how long before each time."""

import random

FAILURE, PREEMPTION = "failure", "preemption"
LONGEST_PAUSE, JITTER = 600.0, 0.2
STABLE_SECONDS = 600.0


class RetryBudget:
    """Counts failures and preemptions apart; pauses double from one to the next.

    The counts are never set back, so every job ends; the pause is, after an attempt
    that was long enough. A preempted job restarts after the first pause: nothing was
    wrong.
    """

    def __init__(
        self,
        max_failures: int,
        max_preemptions: int,
        first_pause: float,
        jitter: random.Random | None = None,
        stable_seconds: float = STABLE_SECONDS,
    ):
        self.left = {FAILURE: max_failures, PREEMPTION: max_preemptions}
        self._first = self._next = first_pause
        self._jitter = jitter or random.Random()
        self._stable_seconds = stable_seconds

    def spend(self, kind: str, lasted: float = 0.0) -> float | None:
        """Returns the pause before the next attempt, or None: no attempt is left.

        Args:
          kind: FAILURE or PREEMPTION.
          lasted: the length of the attempt that ended, in seconds.
        """
        if self.left[kind] <= 0:
            return None
        self.left[kind] -= 1
        if kind == PREEMPTION or lasted >= self._stable_seconds:
            self._next = self._first
        pause = self._next * (1 + self._jitter.uniform(-JITTER, JITTER))
        if kind == FAILURE:
            self._next = min(2 * self._next, LONGEST_PAUSE)
        return pause
