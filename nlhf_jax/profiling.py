# SPDX-License-Identifier: Apache-2.0
"""A window of steps that is traced, for TensorBoard's profiler."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import jax

STEP_NAME = "train"
PROFILE_FOLDER = "profile"


class ProfileWindow:
    """Traces the steps from `first` to `last` into a folder.

    The trace of step s holds the host's work for it (the batch, the call) and what the
    devices did. Before the window opens and before it closes the devices are waited
    for, so that no other step's work is in it. Of several processes the first traces,
    its own devices.

    A context manager: a window that is open when it ends, since the loop failed or was
    stopped, is closed, and its trace is written.

    Args:
      folder: TensorBoard finds FOLDER/plugins/profile/DATE/HOST.xplane.pb.
      steps: (first, last), counted from 1, both included; () traces nothing.
      say: told in one sentence when a trace was written, or why it was not.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        steps: Sequence[int],
        say: Callable[[str], None],
    ):
        self._folder, self._say = os.fspath(folder), say
        self._window = tuple(steps) if jax.process_index() == 0 else ()
        self._since: int | None = None
        self._at = 0

    def __enter__(self) -> "ProfileWindow":
        return self

    def __exit__(self, *unused_exception) -> None:
        if self._since is not None:
            self._close()

    @contextlib.contextmanager
    def around(
        self, step: int, idle: Callable[[], AbstractContextManager[None]]
    ) -> Iterator[None]:
        """Runs one step of the loop, traced if it is in the window.

        Args:
          step: counted from 1.
          idle: inside it the devices have done all that they were given, and the time
            is not counted.
        """
        self._at = step
        is_inside = bool(self._window) and self._window[0] <= step <= self._window[1]
        if is_inside and self._since is None:
            with idle():
                self._open(step)
        with jax.profiler.StepTraceAnnotation(STEP_NAME, step_num=step):
            yield
        if is_inside and step == self._window[1]:
            with idle():
                self._close()

    def check_start(self, start_step: int) -> None:
        """Says so where a run continues after the window."""
        if self._window and start_step >= self._window[1]:
            self._say(
                f"no trace: the window {self._window} is over at step {start_step}"
            )

    def _open(self, step: int) -> None:
        options = jax.profiler.ProfileOptions()
        # Every Python call of every step would fill the trace and slow the host.
        options.python_tracer_level = 0
        jax.profiler.start_trace(self._folder, profiler_options=options)
        self._since = step

    def _close(self) -> None:
        since, self._since = self._since, None
        jax.profiler.stop_trace()
        self._say(
            f"steps {since} to {self._at} are traced: tensorboard --logdir "
            f"{self._folder} (with its plugin: pip install xprof)"
        )
