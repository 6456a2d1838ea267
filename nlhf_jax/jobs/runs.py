# SPDX-License-Identifier: Apache-2.0
"""What every training job does around its steps: folders, writers, resuming."""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import pathlib
import platform
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
    profiling,
    progress,
    speed,
)
from nlhf_jax.checks import UserError, check_local_folder
from nlhf_jax.jobs import folders, steps
from nlhf_jax.settings import LoopSettings, MeshSettings
from nlhf_jax.types import POLICY, Params, ParamSets, TrainState

REPORTED_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "seqio", "tensorflow")

_config_source: Callable[[], str] = str


def set_config_source(source: Callable[[], str]) -> None:
    """Says where the text of the operative configuration comes from."""
    global _config_source
    _config_source = source


def operative_config() -> str:
    """Returns the operative configuration as text; empty outside the command line."""
    return _config_source()


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for name in REPORTED_PACKAGES:
        found[name] = importlib.metadata.version(name)
    return found


def open_folder(model_dir: str) -> pathlib.Path:
    """Makes the output folder and writes `config.gin` and `versions.json` into it.

    Process 0 writes; all processes must see the folder, for they share checkpoints.

    Raises:
      UserError: the path is empty, is a file, cannot be written, or is not shared.
    """
    folder = pathlib.Path(check_local_folder("MODEL_DIR", model_dir)).expanduser()
    distributed.first_does("folder", lambda: _describe_run(folder, model_dir))
    distributed.all_do("shared folder", lambda: _check_seen(folder, model_dir))
    return folder


def _check_seen(folder: pathlib.Path, model_dir: str) -> None:
    if not folder.is_dir():
        raise UserError(
            f"MODEL_DIR {model_dir!r} must be a folder that all processes share; "
            "process 0 made it, and another one does not see it"
        )


def _describe_run(folder: pathlib.Path, model_dir: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.gin").write_text(operative_config())
        written = {"written": datetime.datetime.now(datetime.UTC).isoformat()}
        text = json.dumps(versions() | written, indent=2) + "\n"
        (folder / "versions.json").write_text(text)
    except OSError as error:
        raise UserError(
            f"MODEL_DIR {model_dir!r} cannot be written: {error.strerror}"
        ) from error


@dataclasses.dataclass(frozen=True)
class Training:
    """A training run, ready to be looped.

    Attributes:
      name: shown beside the progress bar.
      step_fn: (state, frozen, batch, key) -> (state, metrics).
      frozen: parameter sets the step reads and never changes.
      batches: (step, rows) -> those rows of the step's batch, in host memory; a pure
        function of the seed, the step and the rows.
      evaluate: state -> metrics.
      facts: metrics that don't change, written once at the start.
      logical_axes: of the policy's parameters.
      frozen_axes: of each frozen set's; a judge may have another shape.
    """

    name: str
    step_fn: Callable[..., tuple[TrainState, dict]]
    frozen: ParamSets
    batches: Callable[[int, Any], Any]
    evaluate: Callable[[TrainState], dict[str, float]]
    facts: dict[str, float | int]
    logical_axes: Any
    frozen_axes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class InitialState:
    """How a run's first state is made, each array where it will lie.

    Attributes:
      params: shapes and dtypes of the parameters it starts from.
      load: shardings -> parameters of a checkpoint; None makes fresh ones.
      init: random key -> parameters.
      make: parameters -> state; pure, and run inside a compiled program.
      seed: of fresh parameters.
    """

    params: PyTree
    load: Callable[[PyTree], Params] | None
    init: Callable[[jax.Array], Params]
    make: Callable[[Params], TrainState]
    seed: int

    @property
    def shapes(self) -> TrainState:
        """The state's shapes and dtypes."""
        return jax.eval_shape(self.make, self.params)

    def on(self, mesh: Any, params: PyTree, state: PyTree) -> TrainState:
        """Returns the state, made on the mesh: no device ever holds all of it.

        Args:
          mesh: see `partitioning.make_mesh`.
          params: shardings of the parameters.
          state: shardings of the state.
        """
        if self.load is not None:
            loaded = self.load(params)
            return partitioning.CompiledFunction(
                self.make, mesh, out_shardings=state, donate_argnums=0
            )(loaded)

        def fresh(key: jax.Array) -> TrainState:
            return self.make(self.init(key))

        return partitioning.initialize(fresh, mesh, state, jax.random.key(self.seed))


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
        return speed.compile_ahead(self._step, state, self._frozen, batch, key)

    def __call__(self, state: TrainState, batch: Any, key: jax.Array):
        return self._step(state, self._frozen, batch, key)


class _Silence:
    """Writer and progress bar of every process but the first."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
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
      UserError: the mesh does not fit the devices or the parameters.
      Stopped: a signal came; the state is saved. Also when it came at the last step,
        so that what would follow this run does not start.
    """
    device_mesh, stop = partitioning.make_mesh(mesh), distributed.Stop()
    step = _FrozenStep(training, initial_state.shapes, device_mesh)
    checkpointer = checkpoints.Checkpointer(
        folder / "checkpoints", keep=settings.keep_checkpoints
    )
    with checkpointer:
        state = _first_or_latest(training, initial_state, step, checkpointer, mesh)
        start_step = int(state.step)
        with _shown(training, folder, start_step, settings) as (writer, bar):
            state = loop.train_loop(
                step,
                state,
                _batches(training, settings.batch_size, device_mesh),
                settings=settings,
                start_step=start_step,
                checkpointer=checkpointer,
                writer=writer,
                progress=bar,
                evaluate=training.evaluate,
                key=_everywhere(seed, device_mesh),
                meta={"seed": seed, "versions": versions()},
                profile_folder=folder / profiling.PROFILE_FOLDER,
                should_stop=stop,
            )
    distributed.barrier("end of the run")
    if int(state.step) < settings.train_steps or stop.was_asked:
        raise Stopped(int(state.step))
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
            f"{training.name}: continuing from step {latest} in {folder}",
            file=sys.stderr,
        )
    return state


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
    with progress.Progress(settings.train_steps, training.name) as bar:
        yield writer, bar
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


def required(name: str, value: Any) -> Any:
    """Returns `value`; raises a UserError where it is None."""
    if value is None:
        raise UserError(f"{name} must be set when no checkpoint is named, got None")
    return value


def initial_state(
    init: Callable[[jax.Array], Params],
    checkpoint: str,
    seed: int,
    make: Callable[[Params], TrainState],
) -> InitialState:
    """Returns a first state with fresh parameters, or those of `checkpoint` if named.

    Args:
      init: random key -> parameters.
      checkpoint: model folder; empty starts from scratch.
      seed: of fresh parameters.
      make: parameters -> state.

    Raises:
      UserError: the checkpoint is missing.
    """
    shapes = jax.eval_shape(init, jax.random.key(seed))
    load = None
    if checkpoint:
        folders.find_model_dir(checkpoint)
        source = folders.resolve(checkpoint)

        def load(shardings: PyTree) -> Params:
            return checkpoints.load_params(source, shapes, shardings)

    return InitialState(shapes, load, init, make, seed)
