# SPDX-License-Identifier: Apache-2.0
"""The training loop: batch, step, log, evaluate, save; it knows no algorithm."""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from nlhf_jax import (
    distributed,
    divergence,
    guards,
    profiling,
    speed,
    stopping,
    watchdog,
)
from nlhf_jax.progress import RATES
from nlhf_jax.settings import LoopSettings
from nlhf_jax.types import TrainState

_COUNT = "num_compilations"
_log = logging.getLogger(__name__)


class Progressed(NamedTuple):
    """What a checkpoint says of its run besides the state.

    Attributes:
      skipped_steps: how many were left out, since a number was not finite.
      owes_evaluation: the evaluation of this very step was left out, since somebody
        asked the run to stop; who continues begins with it.
    """

    skipped_steps: int = 0
    owes_evaluation: bool = False


@runtime_checkable
class MetricSink(Protocol):
    """Takes one line of metrics: `write(step, {name: number})`.

    `sync()` is called before a checkpoint: what was written must then outlast the
    machine.
    """

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def sync(self) -> None: ...


@runtime_checkable
class ProgressSink(Protocol):
    """Shows how far the run is: `update(step, {name: number})`.

    `say(text)` is told what else takes long.
    """

    def update(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def say(self, text: str) -> None: ...


@runtime_checkable
class StateSink(Protocol):
    """Keeps states: `save(step, state, meta)`, and `wait()` until they are safe.

    `retry_is_due(done)` asks for a save besides those that are due, since one has
    failed; with several processes it gives the same answer in all.
    """

    def save(self, step: int, state: TrainState, meta: Mapping[str, Any]) -> None: ...

    def wait(self) -> None: ...

    def retry_is_due(self, done: int) -> bool: ...


def _is_due(step: int, period: int, last: int) -> bool:
    return step == last or (period > 0 and step % period == 0)


_Shapes = tuple[tuple[str, tuple[int, ...], str], ...]


def _shapes(batch: Any) -> _Shapes:
    """Returns the name, the shape and the dtype of each array of a batch."""
    return tuple(
        (
            jax.tree_util.keystr(path),
            np.shape(leaf),
            str(getattr(leaf, "dtype", type(leaf))),
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch)
    )


def _news(shapes: _Shapes, known: Iterable[_Shapes]) -> str:
    """Returns what of a batch was not so in the batches before it, if there are any."""
    seen = {one for shapes in known for one in shapes}
    if not seen:
        return ""
    new = next((one for one in shapes if one not in seen), shapes[0])
    return f" for a new width, {new[0].lstrip('.') or 'a batch'} of {list(new[1])}"


class _Reporter:
    """Reads each step's metrics one step late, checks them, and passes them on."""

    def __init__(self, settings, writer, progress, step_fn, tensors, skipped):
        self._settings = settings
        self._writer, self._progress = writer, progress
        self._step_fn = step_fn
        self._tensors = tensors
        self.skipped_steps = skipped
        self._pending: tuple[Any, ...] | None = None
        self._rates: dict[str, float] = {}
        # Programs that are as they should be, and those that were made besides.
        self._expected, self._surplus = 1, 0
        self._costs: dict[_Shapes, speed.StepCost] = {}
        self._cost: speed.StepCost | None = None
        self._first: speed.FirstStep | None = None
        self._unwritten: dict[str, float] = {}
        self._has_evaluated = False
        self.clock = speed.Clock()

    def say(self, text: str) -> None:
        """Shows a sentence, where there is a place for it."""
        self._progress.say(text)

    def compile(
        self, state: TrainState, batch: Any, key: jax.Array, dog: watchdog.Watchdog
    ) -> None:
        """Compiles the step before it runs, once for all batches of the same shapes."""
        ahead = getattr(self._step_fn, "compile", None)
        if ahead is None:
            return
        shapes = _shapes(batch)
        self._cost = self._costs.get(shapes)
        if self._cost is not None:
            return
        if self._pending is not None:
            dog.now("step", "waiting for the step before a new program")
        with self.idle():
            dog.pause()
            self.say(f"compiling the train step{_news(shapes, self._costs)} ...")
            before = getattr(self._step_fn, _COUNT, 0)
            compiled = ahead(state, batch, key)
            if self._costs:
                self._expected += getattr(self._step_fn, _COUNT, 0) - before
            self._cost = speed.step_cost(compiled, self._settings.peak_flops)
        self._costs[shapes] = self._cost
        self.say(speed.announcement(self._cost))

    def push(self, step: int, metrics: Mapping[str, Any], batch: Any) -> None:
        """Reports the step before this one, and keeps this one for later."""
        self.flush()
        count = getattr(self._step_fn, _COUNT, None)
        self._pending = (step, metrics, count, batch, self._cost)

    def flush(self) -> None:
        """Waits for the step that is kept, if any, and reports it."""
        if self._pending is None:
            return
        step, on_device, count, batch, self.clock.cost = self._pending
        self._pending = None
        on_host = jax.device_get(dict(on_device))
        sizes = on_host.pop(guards.LARGEST, ())
        metrics = {name: float(value) for name, value in on_host.items()}
        if guards.SKIPPED in metrics:
            self.skipped_steps += int(metrics[guards.SKIPPED])
            metrics[guards.SKIPPED] = float(self.skipped_steps)
        self.clock.step_done(metrics)
        is_first = self._first is None
        if is_first:
            self._first = speed.FirstStep(speed.waited(), self.clock.cost)
            self._unwritten = self._first.metrics()
        if _is_due(step, self._settings.log_period, self._settings.train_steps):
            rates = self.clock.read()
            program = self._program(step, metrics, count)
            self._writer.write(step, metrics | rates | program | self._unwritten)
            self._unwritten = {}
            self._rates = {k: v for k, v in rates.items() if k in RATES}
        self._progress.update(step, metrics | self._rates)
        if is_first:
            self.say(self._first.sentence())
        limit = self._settings.max_skipped_steps
        tensors = divergence.named(self._tensors, sizes)
        left_out = divergence.check(step, metrics, tensors, batch, limit)
        if left_out:
            self.say(left_out)

    def end(self) -> None:
        """Reports the last step, and how fast all of them were."""
        self.flush()
        if self._first is not None:
            self.say(f"{self.clock.summary()}; {self._first.sentence()}")
        speed.begin()

    def evaluated(
        self, evaluate: Callable[[TrainState], Mapping[str, float]], state: TrainState
    ) -> Mapping[str, float]:
        """Evaluates; the first time its programs are made, which is announced."""
        if self._has_evaluated:
            return evaluate(state)
        self._has_evaluated = True
        self.say("compiling the evaluation ...")
        start = time.perf_counter()
        found = evaluate(state)
        seconds = time.perf_counter() - start
        self.say(f"the first evaluation took {seconds:.1f} s, its compilation included")
        return found

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
        if count - self._expected > self._surplus:
            self.say(f"compiled again by step {step}: shapes or dtypes have changed")
            self._surplus = count - self._expected
        return found | {"compile/count": float(count)}


def watchdog_of(settings: LoopSettings) -> watchdog.Watchdog:
    """Returns a watchdog for a part of the run, which tells the other processes."""
    seconds = watchdog.limit(settings.hang_seconds)
    return watchdog.Watchdog(seconds, distributed.my_name(), distributed.tell_hang)


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
    progressed: Progressed = Progressed(),  # noqa: B008 a tuple, so it can be shared
    should_stop: Callable[[bool, int], bool] = lambda is_asked, done: is_asked,
    request: stopping.Request | None = None,
    profile_folder: str | os.PathLike = "",
) -> TrainState:
    """Returns the state after `settings.train_steps` updates, or where it was stopped.

    One step is in flight: while it runs, the host makes the next batch and reads the
    metrics of the step before. The line of step s describes update s, evaluations and
    checkpoints of step s the state after it; line and evaluation are written before
    the checkpoint, so a run that resumes from it has lost none. What is written, times
    aside, depends on seed and step alone.

    SIGTERM or Ctrl-C ends the loop after the step under way with a checkpoint of it,
    without an evaluation, since the time left may be short; who continues begins with
    it. The caller sees `state.step < train_steps`. A second one ends the process. What
    takes longer than `settings.hang_seconds` ends it too, with every thread's stack and
    exit code 42.

    Args:
      step_fn: (state, batch, key) -> (state, metrics), compiled; it may donate the
        state. Where it has `compile(state, batch, key)`, that is called and announced
        before the first batch of new shapes; its `num_compilations` is reported.
      state: where to start; not to be used again by the caller.
      batches: the host's batch of each step, counted from 0: a pure function.
      settings: steps and periods.
      checkpointer, writer, progress: see the protocols above.
      key: the same in every step; the step function folds `state.step` into it.
      evaluate: state -> metrics; it must not donate the state.
      meta: facts stored in every checkpoint, beside those of `Progressed` and the
        evaluation of its step.
      start_step: updates already done, `state.step` if None; with `train_steps` of
        them or more the loop returns at once.
      progressed: what the checkpoint said that the state comes from.
      should_stop: (whether this process was asked, steps done) -> whether to stop
        now; with several processes it gives the same answer in all.
      request: listens to signals from the start of the loop on, and is closed by the
        caller; None: the loop's own, which ends with it.
      profile_folder: for the trace of `settings.profile_steps`, if any.

    Raises:
      TrainingDiverged: a loss, a gradient, a parameter or an optimiser's state is not
        finite, and no more steps may be left out.
      CheckpointError: the last checkpoint cannot be written.
    """
    last = settings.train_steps
    start_step = int(state.step) if start_step is None else start_step
    if start_step >= last:
        return state
    reporter = _Reporter(
        settings,
        writer,
        progress,
        step_fn,
        guards.tensor_names(state),
        progressed.skipped_steps,
    )
    window = profiling.ProfileWindow(
        profile_folder, settings.profile_steps, reporter.say
    )
    window.check_start(start_step)
    stop = stopping.Request() if request is None else request
    own = contextlib.nullcontext() if request is not None else stop
    with watchdog_of(settings) as dog, own, _all_saved(checkpointer, dog), window:
        stop.listen()
        if progressed.owes_evaluation and evaluate is not None:
            dog.now("evaluation", f"the evaluation after step {start_step}")
            with reporter.idle():
                writer.write(start_step, reporter.evaluated(evaluate, state))
        for step in range(start_step, last):
            done = step + 1
            with window.around(done, reporter.idle):
                dog.now("batch", f"making the batch of step {done}")
                batch = batches(step)
                reporter.compile(state, batch, key, dog)
                dog.now("step", f"step {done}, or waiting for the one before it")
                state, metrics = step_fn(state, batch, key)
                reporter.push(done, metrics, batch)
            asked_to_stop = should_stop(bool(stop), done)
            may_evaluate = evaluate is not None
            is_evaluated = may_evaluate and _is_due(done, settings.eval_period, last)
            # A run that is complete is never continued, and so never evaluated again.
            is_owed = is_evaluated and asked_to_stop and done < last
            facts = dict(meta or {})
            if is_evaluated and not is_owed:
                with reporter.idle():
                    dog.now("evaluation", f"the evaluation after step {done}")
                    found = reporter.evaluated(evaluate, state)
                    facts["evaluation"] = dict(found)
                    writer.write(done, facts["evaluation"])
            is_due = asked_to_stop or _is_due(done, settings.checkpoint_period, last)
            if is_due or checkpointer.retry_is_due(done):
                with reporter.idle():
                    dog.now("save", f"saving the checkpoint of step {done}")
                    writer.sync()
                    facts |= Progressed(reporter.skipped_steps, is_owed)._asdict()
                    checkpointer.save(done, state, facts)
            if asked_to_stop:
                asked_by = stop.signal.name if stop else "another process"
                _log.warning("%s: stopped after step %d", asked_by, done)
                break
        reporter.end()
    return state


@contextlib.contextmanager
def _all_saved(checkpointer: StateSink, dog: watchdog.Watchdog) -> Iterator[None]:
    """Waits for the checkpoints at the end, also when the loop failed."""
    waiting = "wait", "waiting until the last checkpoint is written"
    try:
        yield
    except BaseException as error:
        dog.now(*waiting)
        # The loop's own error is the one to show; who is gone is not waited for.
        if not distributed.is_peer_loss(error):
            with contextlib.suppress(RuntimeError):
                checkpointer.wait()
        raise
    dog.now(*waiting)
    checkpointer.wait()
