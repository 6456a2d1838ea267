# SPDX-License-Identifier: Apache-2.0
"""The training loop: batch, step, log, save, evaluate. It knows no algorithm."""

import signal
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from nlhf_jax.settings import LoopSettings
from nlhf_jax.types import TrainState

Step = Callable[[TrainState, Any, jax.Array], tuple[TrainState, Mapping[str, Any]]]


class Writer(Protocol):
    """Where metrics go."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one line."""


class Display(Protocol):
    """What shows progress to a person."""

    def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Shows that `step` steps are done."""


class Saver(Protocol):
    """What makes a state durable."""

    def save(self, step: int, state: TrainState) -> None:
        """Writes a checkpoint, perhaps in the background."""

    def wait(self) -> None:
        """Returns when the last checkpoint is durable."""


class NotFiniteError(RuntimeError):
    """A loss or gradient is NaN or infinite; the state was not saved."""


class _StopRequest:
    """Turns the first SIGTERM into a flag; the second kills as usual."""

    def __init__(self):
        self.is_set = False

    def __enter__(self):
        self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *unused_exception):
        signal.signal(signal.SIGTERM, self._previous)

    def _note(self, *unused_arguments):
        self.is_set = True
        signal.signal(signal.SIGTERM, self._previous)


def train_loop(
    step_fn: Step,
    state: TrainState,
    batches: Callable[[int], Any],
    *,
    settings: LoopSettings,
    checkpointer: Saver,
    writer: Writer,
    progress: Display,
    key: jax.Array,
    evaluate: Callable[[TrainState], Mapping[str, float]] | None = None,
) -> TrainState:
    """Updates `state` until `settings.train_steps`, and returns it.

    The step is compiled once, its state donated. While a step runs, the host prepares
    the next batch and reads the metrics of the step before, so that at most one step
    is in flight. On SIGTERM the current state is saved and the process exits with
    code 143; the same command continues from there.

    Args:
      step_fn: (state, batch, key) -> (state, metrics); it counts in `state.step`.
      state: where to begin; its `step` is the number of updates done.
      batches: step -> host batch, a pure function.
      settings: steps and periods.
      checkpointer: saves the state at every period and at the end.
      writer: receives metrics at every log period.
      progress: receives every finished step.
      key: the run's random key.
      evaluate: state -> metrics, at every evaluation period and at the end.

    Raises:
      NotFiniteError: a metric is NaN or infinite; the state is not saved.
    """
    compiled = jax.jit(step_fn, donate_argnums=0)
    done, last_saved = int(state.step), int(state.step)
    clock = _Clock(done)
    with _StopRequest() as stop:
        while done < settings.train_steps:
            batch = jax.device_put(batches(done))
            state, pending = compiled(state, batch, key)
            done += 1
            is_last = done == settings.train_steps
            metrics = _read(pending, done)
            progress.update(done, metrics)
            if is_last or done % settings.log_period == 0:
                writer.write(done, metrics | clock.lap(done, compiled))
            if evaluate and _is_due(done, settings.eval_period, is_last):
                writer.write(done, evaluate(state))
                clock.skip()
            if stop.is_set or _is_due(done, settings.checkpoint_period, is_last):
                checkpointer.save(done, state)
                last_saved = done
                clock.skip()
            if stop.is_set:
                checkpointer.wait()
                print(
                    f"nlhf: stopped by SIGTERM, saved at step {last_saved}; the same "
                    "command continues",
                    file=sys.stderr,
                )
                sys.exit(128 + signal.SIGTERM)
    checkpointer.wait()
    return state


def _is_due(step: int, period: int, is_last: bool) -> bool:
    return is_last or bool(period and step % period == 0)


def _read(pending: Mapping[str, Any], step: int) -> dict[str, float]:
    metrics = {name: float(x) for name, x in jax.device_get(dict(pending)).items()}
    for name, value in metrics.items():
        if not np.isfinite(value):
            raise NotFiniteError(
                f"{name} is {value} at step {step}; the newest checkpoint is older and "
                "intact (a smaller learning rate or more clipping may help)"
            )
    return metrics


class _Clock:
    """Seconds per step since the last line, without evaluation and saving."""

    def __init__(self, step: int):
        self._step, self._start = step, time.perf_counter()

    def lap(self, step: int, compiled: Any) -> dict[str, float]:
        """Returns the time metrics of the steps since the last lap."""
        now = time.perf_counter()
        seconds = (now - self._start) / max(1, step - self._step)
        self._step, self._start = step, now
        return {
            "time/seconds_per_step": seconds,
            "compile/count": float(compiled._cache_size()),
        }

    def skip(self) -> None:
        """Leaves out the time since the lap was taken."""
        self._start = time.perf_counter()
