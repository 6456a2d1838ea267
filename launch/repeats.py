# SPDX-License-Identifier: Apache-2.0
"""Notices a job that dies in the same way at the same step: no restart mends that."""

import pathlib
import re

from launch.errors import AGAIN, CONNECTION_LOST

# Deaths of one kind at one place before it is taken to be the job's own doing.
MOST = 3
# Enough of a log's end to hold the last line of progress before any traceback.
TAIL_BYTES = 2**18
# A line of progress, as in "train 12/500  0:41 left", or a sentence that names a step.
_STEP = re.compile(rb"\b(\d+)/\d+  \S+ left|\bstep (\d+)\b")


def last_step(log: pathlib.Path) -> int | None:
    """Returns the last step that the end of a log names; None if it names none."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL_BYTES))
            text = file.read()
    except OSError:
        return None
    found = _STEP.findall(text)
    return int(max(found[-1])) if found else None


class Repeats:
    """Counts a job's deaths in a row that are alike: one exit code after one step.

    Attempts that ended for another reason (a preemption, a connection that was lost)
    say nothing of the job, and are not to be shown to this.
    """

    def __init__(self):
        self._last: tuple[int, int | None] | None = None
        self._count = 0

    def note(self, code: int, log: pathlib.Path) -> str:
        """Notes a death; returns a clause that says so where it was one too many.

        Args:
          code: the job's exit code, as a shell gives it.
          log: the output of the attempt's first process.

        Returns:
          "" as long as another attempt may help.
        """
        step = last_step(log)
        # Before its first step a job that asks for a restart (42) waits for others.
        if step is None and code in (AGAIN, CONNECTION_LOST):
            return ""
        self._count = self._count + 1 if (code, step) == self._last else 1
        self._last = code, step
        if self._count < MOST:
            return ""
        where = "before its first step" if step is None else f"after step {step}"
        return (
            f"the job has ended with exit code {code} {where} {self._count} times in a "
            f"row, which no restart mends: {log} says more"
        )
