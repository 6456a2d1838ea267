# SPDX-License-Identifier: Apache-2.0
"""The next batch, made in a thread of its own while this step is under way."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

from jaxtyping import PyTree

from nlhf_jax import daemon_threads

Batches = Callable[[int], PyTree]
# What a batch may take that nobody asks for any more: who was stopped has seconds.
PATIENCE = 0.5


class Ahead:
    """Gives the batch of each step, and has that of the step after it made meanwhile.

    A batch is a pure function of its step, so what is made ahead is what would be
    made later, and one that nobody asks for is lost without harm. What goes wrong while
    a batch is made is raised where that batch is asked for, as without a thread.

    One batch is made ahead and no more: it and the two steps that may be under way are
    all that is in memory.
    """

    def __init__(self, batches: Batches, end: int):
        """Makes nothing yet.

        Args:
          batches: step -> its batch, a pure function.
          end: the first step that is not asked for.
        """
        self._batches, self._end = batches, end
        self._step: int | None = None
        self._made: Future[Any] = Future()
        self._thread: threading.Thread | None = None

    def __call__(self, step: int) -> PyTree:
        """Returns the batch of a step, and begins the next one's."""
        if step != self._step:
            self.close()
            self._begin(step)
        batch = self._made.result()
        if step + 1 < self._end:
            self._begin(step + 1)
        return batch

    def _begin(self, step: int) -> None:
        made: Future[Any] = Future()

        def work() -> None:
            try:
                made.set_result(self._batches(step))
            # Whatever it is, it is raised where the batch is asked for.
            except BaseException as error:
                made.set_exception(error)

        self._step, self._made = step, made
        # A daemon: a read that never returns cannot hold a process that has ended.
        self._thread = daemon_threads.start(work, "batch")

    def close(self, patience: float | None = None) -> None:
        """Waits for the batch that is being made, if any, and drops it.

        Args:
          patience: seconds after which it is left to itself; None waits for its end.
        """
        if self._thread is not None:
            self._thread.join(patience)
        self._step, self._thread = None, None


@contextlib.contextmanager
def ahead(batches: Batches, end: int) -> Iterator[Ahead]:
    """Yields the batches, each made one step ahead.

    In the end the batch under way is waited for briefly, and after an exception not at
    all: reading it may be what hangs. Its thread cannot hold the process.
    """
    one = Ahead(batches, end)
    yield one
    one.close(PATIENCE)
