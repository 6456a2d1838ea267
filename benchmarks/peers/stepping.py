# SPDX-License-Identifier: Apache-2.0
"""A trainer's own loop, let go one step at a time. Standard library only."""

import queue
import threading
from collections.abc import Callable


class Stepper:
    """Runs a loop in a thread that stands still between its steps.

    The loop calls `begin` before a step and `done` after it; `step` lets it go once and
    waits for `done`. So a trainer is timed as it is shipped, callbacks and all.
    """

    def __init__(self, loop: Callable[["Stepper"], None]):
        """Starts nothing yet: the first `step` does.

        Args:
          loop: given this stepper, runs until its last step.
        """
        self._go: queue.Queue[None] = queue.Queue()
        self._ends: queue.Queue[BaseException | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, args=(loop,), daemon=True)

    def _run(self, loop: Callable[["Stepper"], None]) -> None:
        try:
            loop(self)
            self._ends.put(RuntimeError("the loop has ended"))
        except BaseException as error:
            self._ends.put(error)

    def begin(self) -> None:
        """Waits until a step is asked for; the loop calls it."""
        self._go.get()

    def done(self) -> None:
        """Says that a step has ended; the loop calls it."""
        self._ends.put(None)

    def step(self) -> None:
        """Lets the loop do one step.

        Raises:
          BaseException: what the loop raised; RuntimeError if it has ended.
        """
        if self._thread.ident is None:
            self._thread.start()
        self._go.put(None)
        error = self._ends.get()
        if error is not None:
            raise error
