# SPDX-License-Identifier: Apache-2.0
"""What every training job does around its steps: folders, writers, resuming."""

import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jaxtyping import PyTree

from nlhf_jax import (
    checkpoints,
    distributed,
    global_arrays,
    loop,
    metrics,
    partitioning,
    prefetch,
    profiling,
    progress,
    speed,
    stopping,
)
from nlhf_jax.alarms import AlarmSettings, WatchedWriter
from nlhf_jax.jobs import failures, outside_steps, saves, steps
from nlhf_jax.jobs.first_states import InitialState, initial_state, required
from nlhf_jax.jobs.run_records import (
    REPORTED_PACKAGES,
    Continued,
    open_folder,
    operative_config,
    set_source,
    versions,
)
from nlhf_jax.settings import LoopSettings, MeshSettings
from nlhf_jax.types import POLICY, ParamSets, TrainState

__all__ = [
    "REPORTED_PACKAGES",
    "Continued",
    "InitialState",
    "Stopped",
    "Training",
    "changed_by",
    "check_layout",
    "initial_state",
    "open_folder",
    "operative_config",
    "required",
    "run",
    "set_source",
    "versions",
]


@dataclasses.dataclass(frozen=True)
class Training:
    """A training run, ready to be looped.

    Attributes:
      name: shown beside the progress bar.
      step_fn: (state, frozen, batch, key) -> (state, metrics), or its halves.
      frozen: parameter sets the step reads and never changes.
      batches: (step, rows) -> those rows of the step's batch, in host memory; a pure
        function of the seed, the step and the rows.
      evaluate: state -> metrics.
      facts: metrics that don't change, written once at the start.
      logical_axes: of the policy's parameters.
      frozen_axes: of each frozen set's; a judge may have another shape.
      alarms: when metrics give a warning; None gives none.
    """

    name: str
    step_fn: Callable[..., tuple[TrainState, dict]] | outside_steps.Halves
    frozen: ParamSets
    batches: Callable[[int, Any], Any]
    evaluate: Callable[[TrainState], dict[str, float]]
    facts: dict[str, float | int]
    logical_axes: Any
    frozen_axes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    alarms: AlarmSettings | None = None


Change = Callable[[Training, LoopSettings], tuple[Training, LoopSettings]]


def _unchanged(
    training: Training, settings: LoopSettings
) -> tuple[Training, LoopSettings]:
    return training, settings


_change: Change = _unchanged


@contextlib.contextmanager
def changed_by(change: Change) -> Iterator[None]:
    """While it is open, `run` runs what `change` makes of what it is given."""
    global _change
    _change = change
    try:
        yield
    finally:
        _change = _unchanged


class _FrozenStep:
    """The compiled step with its frozen weights bound: (state, batch, key)."""

    def __init__(self, training: Training, shapes: TrainState, mesh: Any):
        lie = partitioning.step_shardings(
            mesh,
            shapes,
            shapes.param_sets[POLICY],
            training.logical_axes,
            training.frozen,
            training.frozen_axes,
        )
        self.params_sharding, self.state_sharding = lie.params, lie.state
        self._frozen = global_arrays.put(dict(training.frozen), lie.frozen)
        self._step = steps.compiled(training.step_fn, mesh, lie)

    @property
    def num_compilations(self) -> int:
        """How often the step was compiled; 1 is right."""
        return self._step.num_compilations

    def compile(self, state: TrainState, batch: Any, key: jax.Array):
        """Makes the program before it is called: see `speed.compile_ahead`."""
        args = state, self._frozen, batch, key
        if isinstance(self._step, outside_steps.OutsideStep):
            return self._step.compile_ahead(*args)
        return speed.compile_ahead(self._step, *args)

    def __call__(self, state: TrainState, batch: Any, key: jax.Array):
        return self._step(state, self._frozen, batch, key)


class _Silence:
    """Writer and progress bar of every process but the first."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def sync(self) -> None:
        pass

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def say(self, text: str) -> None:
        pass


def check_layout(
    initial_state: InitialState,
    logical_axes: Any,
    loop: LoopSettings,
    mesh: MeshSettings,
) -> None:
    """Checks the mesh against devices, parameters and batch, before there is a folder.

    Raises:
      UserError: the mesh does not fit one of them.
    """
    device_mesh = partitioning.make_mesh(mesh)
    partitioning.check_batch_size(loop.batch_size, device_mesh, loop.num_microbatches)
    params = initial_state.shapes.param_sets[POLICY]
    partitioning.shardings_for(logical_axes, params, device_mesh)


def run(
    training: Training,
    *,
    folder: pathlib.Path,
    initial_state: InitialState,
    settings: LoopSettings,
    seed: int,
    mesh: MeshSettings,
) -> TrainState:
    """Trains from the newest checkpoint in `folder`, or from `initial_state`.

    Returns the state after `settings.train_steps` updates. A run that is already
    complete returns its last state at once. With several processes each reads its own
    rows of a batch and writes its own parts of a checkpoint; the first one writes all
    the rest.

    Raises:
      UserError: the mesh does not fit the devices or the parameters, or the folder was
        trained with another seed.
      TrainingDiverged: a number is not finite; `failures` has what it takes to see it
        again, the sentence names it and the newest checkpoint.
      CheckpointError: the last checkpoint could not be written.
      Stopped: a signal came; the state is saved. Also when it came at the last step,
        so that what would follow this run does not start.
    """
    training, settings = _change(training, settings)
    device_mesh, stop = partitioning.make_mesh(mesh), stopping.Stop()
    step = _FrozenStep(training, initial_state.shapes, device_mesh)
    # A signal counts until the last checkpoint is safe: nothing may follow this run.
    with (
        stopping.Request() as request,
        saves.checkpointer(folder, settings) as checkpointer,
    ):
        with loop.watchdog_of(settings) as dog:
            dog.now("start", "reading or making the first state")
            state = _first_or_latest(training, initial_state, step, checkpointer, mesh)
        start_step = int(state.step)
        progressed = _progressed(checkpointer, start_step, seed)
        shown = _shown(training, folder, start_step, settings)
        failed = failures.kept_in(folder, training.name, seed, checkpointer)
        made = _batches(training, settings.batch_size, device_mesh)
        ahead = prefetch.ahead(made, settings.train_steps)
        with failed, shown as (writer, bar), ahead as batches:
            state = loop.train_loop(
                step,
                state,
                batches,
                settings=settings,
                start_step=start_step,
                progressed=progressed,
                checkpointer=checkpointer,
                writer=writer,
                progress=bar,
                evaluate=training.evaluate,
                key=_everywhere(seed, device_mesh),
                meta=saves.facts(seed, device_mesh, operative_config(), versions()),
                profile_folder=folder / profiling.PROFILE_FOLDER,
                should_stop=stop,
                request=request,
            )
    done = int(state.step)
    if stop.settle(bool(request), done) or done < settings.train_steps:
        raise Stopped(done)
    return state


def _first_or_latest(
    training: Training,
    initial_state: InitialState,
    step: _FrozenStep,
    checkpointer: checkpoints.Checkpointer,
    mesh: MeshSettings,
) -> TrainState:
    """Returns the newest state in the folder, else the first one, in its place."""
    latest = checkpointer.latest_step()
    if latest is None:
        device_mesh = partitioning.make_mesh(mesh)
        return initial_state.on(device_mesh, step.params_sharding, step.state_sharding)
    like = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding
        ),
        initial_state.shapes,
        step.state_sharding,
    )
    state = checkpointer.restore(latest, like)
    folder = checkpointer.folder.parent
    if distributed.is_first():
        # A forgotten folder must not pass for a fresh start.
        print(
            f"{training.name}: continuing from step {int(state.step)} in {folder}",
            file=sys.stderr,
        )
    return state


def _progressed(
    checkpointer: checkpoints.Checkpointer, step: int, seed: int
) -> loop.Progressed:
    """Returns what a checkpoint says besides its state; of step 0 there is none.

    Raises:
      UserError: it was trained with another seed.
    """
    if step == 0:
        return loop.Progressed()
    meta = checkpointer.read_meta(step)
    saves.check_seed(checkpointer.folder.parent, step, meta, seed)
    return loop.Progressed(**{name: meta[name] for name in loop.Progressed._fields})


@contextlib.contextmanager
def _shown(
    training: Training, folder: pathlib.Path, start_step: int, settings: LoopSettings
) -> Iterator[tuple[loop.MetricSink, loop.ProgressSink]]:
    """Yields where metrics and progress go: nowhere, but for the first process."""
    if not distributed.is_first():
        yield _Silence(), _Silence()
        return
    writer = metrics.MetricWriter(folder, start_step)
    if start_step == 0:
        writer.write(0, training.facts)
    earlier = metrics.records(folder / metrics.METRICS_FILE)
    with progress.Progress(settings.train_steps, training.name) as bar:
        yield WatchedWriter(writer, training.alarms, earlier, bar.say), bar
    writer.close()


def _batches(training: Training, batch_size: int, mesh: Any) -> Callable[[int], PyTree]:
    """Returns step -> the whole batch, of which this process reads its own rows."""
    sharding = partitioning.batch_sharding(mesh)
    rows = global_arrays.rows_here(sharding, batch_size)

    def batch(step: int) -> PyTree:
        mine = training.batches(step, rows)
        return global_arrays.from_rows(mine, rows, batch_size, sharding)

    return batch


def _everywhere(seed: int, mesh: Any) -> jax.Array:
    """Returns the key of a seed, on every device of the mesh."""
    place = partitioning.replicated(mesh)
    return jax.jit(lambda: jax.random.key(seed), out_shardings=place)()


class Stopped(Exception):
    """A signal ended the run after a checkpoint; the same command continues it.

    Attributes:
      step: updates that are done and saved.
    """

    def __init__(self, step: int):
        super().__init__(f"stopped at step {step}")
        self.step = step
