# SPDX-License-Identifier: Apache-2.0
"""The training loop: batch, step, log, evaluate, save; it knows no algorithm."""

import contextlib
import logging
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax

from nlhf_jax import distributed, profiling, speed
from nlhf_jax.progress import RATES
from nlhf_jax.settings import LoopSettings
from nlhf_jax.types import TrainState

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_COUNT = "num_compilations"
_log = logging.getLogger(__name__)


class TrainingDiverged(RuntimeError):
    """A loss is not finite; nothing was saved after it became so."""


@runtime_checkable
class MetricSink(Protocol):
    """Takes one line of metrics: `write(step, {name: number})`."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...


@runtime_checkable
class ProgressSink(Protocol):
    """Shows how far the run is: `update(step, {name: number})`.

    `say(text)`, where it has one, is told what else takes long.
    """

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
        self._pending: tuple[int, Mapping[str, Any], int | None] | None = None
        self._rates: dict[str, float] = {}
        self._programs = 1
        self.clock = speed.Clock()

    def say(self, text: str) -> None:
        """Shows a sentence, where there is a place for it."""
        getattr(self._progress, "say", _log.info)(text)

    def compile(self, *args: Any) -> None:
        """Compiles the step before it runs, where it can be asked to."""
        ahead = getattr(self._step_fn, "compile", None)
        if ahead is None:
            return
        self.say("compiling the train step ...")
        with self.clock.paused():
            cost = speed.step_cost(ahead(*args), self._settings.peak_flops)
        self.clock.cost = cost
        self.say(speed.announcement(cost))

    def push(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Reports the step before this one, and keeps this one for later."""
        self.flush()
        self._pending = (step, metrics, getattr(self._step_fn, _COUNT, None))

    def flush(self) -> None:
        """Waits for the step that is kept, if any, and reports it."""
        if self._pending is None:
            return
        step, on_device, count = self._pending
        self._pending = None
        metrics = {k: float(v) for k, v in jax.device_get(dict(on_device)).items()}
        self.clock.step_done(metrics)
        if _is_due(step, self._settings.log_period, self._settings.train_steps):
            rates = self.clock.read()
            program = self._program(step, metrics, count)
            self._writer.write(step, metrics | rates | program)
            self._rates = {k: v for k, v in rates.items() if k in RATES}
        self._progress.update(step, metrics | self._rates)
        _check_finite(step, metrics)

    @contextlib.contextmanager
    def idle(self) -> Iterator[None]:
        """Waits for the step that is kept, and leaves the time inside out."""
        self.flush()
        with self.clock.paused():
            yield

    def _program(
        self, step: int, metrics: Mapping[str, float], count: int | None
    ) -> dict[str, float]:
        """What is known of the compiled step: how often it was made, what it costs."""
        found = {}
        if self.clock.cost is not None and self.clock.cost.flops is not None:
            found["compute/flops_per_step"] = self.clock.cost.flops_with(metrics)
        if count is None:
            return found
        if count > self._programs:
            self.say(f"compiled again by step {step}: shapes or dtypes have changed")
            self._programs = count
        return found | {"compile/count": float(count)}


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
    should_stop: Callable[[bool, int], bool] = lambda is_asked, done: is_asked,
    profile_folder: str | os.PathLike = "",
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
        state. Where it has `compile(state, batch, key)`, that is called and announced
        before the first step; its `num_compilations` is reported.
      state: where to start; not to be used again by the caller.
      batches: the host's batch of each step, counted from 0: a pure function.
      settings: steps and periods.
      checkpointer, writer, progress: see the protocols above.
      key: the same in every step; the step function folds `state.step` into it.
      evaluate: state -> metrics; it must not donate the state.
      meta: facts stored in every checkpoint.
      start_step: updates already done, `state.step` if None; with `train_steps` of
        them or more the loop returns at once.
      should_stop: (whether this process was asked, steps done) -> whether to stop
        now; with several processes it gives the same answer in all.
      profile_folder: for the trace of `settings.profile_steps`, if any.

    Raises:
      TrainingDiverged: a loss or gradient norm is not finite.
      CheckpointError: a checkpoint cannot be written.
    """
    last = settings.train_steps
    start_step = int(state.step) if start_step is None else start_step
    if start_step >= last:
        return state
    reporter = _Reporter(settings, writer, progress, step_fn)
    window = profiling.ProfileWindow(
        profile_folder, settings.profile_steps, reporter.say
    )
    window.check_start(start_step)
    with stop_on_signal() as stop, _all_saved(checkpointer), window:
        for step in range(start_step, last):
            done = step + 1
            with window.around(done, reporter.idle):
                batch = batches(step)
                if step == start_step:
                    reporter.compile(state, batch, key)
                state, metrics = step_fn(state, batch, key)
                reporter.push(done, metrics)
            asked_to_stop = should_stop(bool(stop), done)
            # A run that is complete is never evaluated again.
            may_evaluate = evaluate is not None and (done == last or not asked_to_stop)
            if may_evaluate and _is_due(done, settings.eval_period, last):
                with reporter.idle():
                    writer.write(done, evaluate(state))
            if asked_to_stop or _is_due(done, settings.checkpoint_period, last):
                with reporter.idle():
                    checkpointer.save(done, state, meta or {})
            if asked_to_stop:
                asked_by = stop.signal.name if stop else "another process"
                _log.warning("%s: stopped after step %d", asked_by, done)
                break
    return state


@contextlib.contextmanager
def _all_saved(checkpointer: StateSink) -> Iterator[None]:
    """Waits for the checkpoints at the end, also when the loop failed."""
    try:
        yield
    except BaseException as error:
        # The loop's own error is the one to show; who is gone is not waited for.
        if not distributed.is_peer_loss(error):
            with contextlib.suppress(RuntimeError):
                checkpointer.wait()
        raise
    checkpointer.wait()
