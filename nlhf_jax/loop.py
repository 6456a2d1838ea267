# SPDX-License-Identifier: Apache-2.0
"""The training loop: batch, step, log, evaluate, save; it knows no algorithm."""

import contextlib
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax

from nlhf_jax.settings import LoopSettings
from nlhf_jax.types import TrainState

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_log = logging.getLogger(__name__)


class TrainingDiverged(RuntimeError):
    """A loss is not finite; nothing was saved after it became so."""


@runtime_checkable
class MetricSink(Protocol):
    """Takes one line of metrics: `write(step, {name: number})`."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...


@runtime_checkable
class ProgressSink(Protocol):
    """Shows how far the run is: `update(step, {name: number})`."""

    def update(self, step: int, metrics: Mapping[str, float]) -> None: ...


@runtime_checkable
class StateSink(Protocol):
    """Keeps states: `save(step, state, meta)`, and `wait()` until they are safe."""

    def save(self, step: int, state: TrainState, meta: Mapping[str, Any]) -> None: ...

    def wait(self) -> None: ...


class StopRequest:
    """Whether somebody asked the run to stop."""

    def __init__(self):
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turns the first SIGTERM or SIGINT into a request; a second one acts at once.

    Outside the main thread signals cannot be caught, and the request never comes.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {number: signal.getsignal(number) for number in _SIGNALS}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def handle(number: int, frame: object) -> None:
        del frame
        request.signal = signal.Signals(number)
        restore()

    for number in _SIGNALS:
        signal.signal(number, handle)
    try:
        yield request
    finally:
        restore()


class _Clock:
    """Seconds of training per step since the last line, pauses left out."""

    def __init__(self):
        self._steps, self._seconds, self._tokens = 0, 0.0, 0.0
        self._since = time.perf_counter()

    def step_done(self, metrics: Mapping[str, float]) -> None:
        self._steps += 1
        self._tokens += metrics.get("token/count", 0.0)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self._seconds += time.perf_counter() - self._since
        yield
        self._since = time.perf_counter()

    def read(self) -> dict[str, float]:
        """Returns the metrics of time, and starts anew."""
        now = time.perf_counter()
        seconds = max(self._seconds + now - self._since, 1e-9)
        rates = {"time/seconds_per_step": seconds / max(self._steps, 1)}
        if self._tokens:
            rates["time/tokens_per_second"] = self._tokens / seconds
        self._steps, self._seconds, self._tokens, self._since = 0, 0.0, 0.0, now
        return rates


def _check_finite(step: int, metrics: Mapping[str, float]) -> None:
    for name, value in metrics.items():
        watched = name.startswith("loss/") or name == "optimizer/gradient_norm"
        if watched and not math.isfinite(value):
            raise TrainingDiverged(
                f"{name} is {value} at step {step}; the last checkpoint is older. "
                "Lower the learning rate, or look at the data of this step."
            )


def _is_due(step: int, period: int, last: int) -> bool:
    return step == last or (period > 0 and step % period == 0)


class _Reporter:
    """Reads each step's metrics one step late, checks them, and passes them on."""

    def __init__(self, settings, writer, progress, step_fn):
        self._settings = settings
        self._writer, self._progress = writer, progress
        self._step_fn = step_fn
        self._pending: tuple[int, Mapping[str, Any]] | None = None
        self.clock = _Clock()

    def push(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Reports the step before this one, and keeps this one for later."""
        self.flush()
        self._pending = (step, metrics)

    def flush(self) -> None:
        """Waits for the step that is kept, if any, and reports it."""
        if self._pending is None:
            return
        step, on_device = self._pending
        self._pending = None
        metrics = {k: float(v) for k, v in jax.device_get(dict(on_device)).items()}
        self.clock.step_done(metrics)
        if _is_due(step, self._settings.log_period, self._settings.train_steps):
            self._writer.write(step, metrics | self.clock.read() | self._compiled())
        self._progress.update(step, metrics)
        _check_finite(step, metrics)

    def _compiled(self) -> dict[str, float]:
        count = getattr(self._step_fn, "num_compilations", None)
        return {} if count is None else {"compile/count": float(count)}


def train_loop(
    step_fn: Callable[[TrainState, Any, jax.Array], tuple[TrainState, dict]],
    state: TrainState,
    batches: Callable[[int], Any],
    *,
    settings: LoopSettings,
    checkpointer: StateSink,
    writer: MetricSink,
    progress: ProgressSink,
    key: jax.Array,
    evaluate: Callable[[TrainState], Mapping[str, float]] | None = None,
    meta: Mapping[str, Any] | None = None,
    start_step: int | None = None,
) -> TrainState:
    """Returns the state after `settings.train_steps` updates, or where it was stopped.

    One step is in flight: while it runs, the host makes the next batch and reads the
    metrics of the step before. The line of step s describes update s, evaluations and
    checkpoints of step s the state after it; line and evaluation are written before
    the checkpoint, so a run that resumes from it has lost none. What is written, times
    aside, depends on seed and step alone.

    SIGTERM or Ctrl-C ends the loop after the step under way with a checkpoint of it,
    without an evaluation, since the time left may be short; the caller sees
    `state.step < train_steps`. A second one ends the process.

    Args:
      step_fn: (state, batch, key) -> (state, metrics), compiled; it may donate the
        state. Its `num_compilations`, where it has one, is reported.
      state: where to start; not to be used again by the caller.
      batches: the host's batch of each step, counted from 0: a pure function.
      settings: steps and periods.
      checkpointer, writer, progress: see the protocols above.
      key: the same in every step; the step function folds `state.step` into it.
      evaluate: state -> metrics; it must not donate the state.
      meta: facts stored in every checkpoint.
      start_step: updates already done, `state.step` if None; with `train_steps` of
        them or more the loop returns at once.

    Raises:
      TrainingDiverged: a loss or gradient norm is not finite.
      CheckpointError: a checkpoint cannot be written.
    """
    last = settings.train_steps
    start_step = int(state.step) if start_step is None else start_step
    if start_step >= last:
        return state
    reporter = _Reporter(settings, writer, progress, step_fn)
    with stop_on_signal() as stop, _all_saved(checkpointer):
        for step in range(start_step, last):
            state, metrics = step_fn(state, batches(step), key)
            done = step + 1
            reporter.push(done, metrics)
            asked_to_stop = bool(stop)
            may_evaluate = evaluate is not None and not asked_to_stop
            if may_evaluate and _is_due(done, settings.eval_period, last):
                reporter.flush()
                with reporter.clock.paused():
                    writer.write(done, evaluate(state))
            if asked_to_stop or _is_due(done, settings.checkpoint_period, last):
                reporter.flush()
                with reporter.clock.paused():
                    checkpointer.save(done, state, meta or {})
            if asked_to_stop:
                _log.warning("%s: stopped after step %d", stop.signal.name, done)
                break
    return state


@contextlib.contextmanager
def _all_saved(checkpointer: StateSink) -> Iterator[None]:
    """Waits for the checkpoints at the end, also when the loop failed."""
    try:
        yield
    except BaseException:
        # The loop's own error is the one to show.
        with contextlib.suppress(RuntimeError):
            checkpointer.wait()
        raise
    checkpointer.wait()
