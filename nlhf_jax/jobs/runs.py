# SPDX-License-Identifier: Apache-2.0
"""What every training job does around its steps: folders, writers, resuming."""

import dataclasses
import datetime
import importlib.metadata
import json
import pathlib
import platform
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax

from nlhf_jax import (
    checkpoints,
    loop,
    metrics,
    optimizers,
    partitioning,
    progress,
)
from nlhf_jax.checks import UserError
from nlhf_jax.jobs import folders
from nlhf_jax.settings import LoopSettings, MeshSettings, OptimizerSettings
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

    Raises:
      UserError: the path is empty, is a file, or cannot be written.
    """
    if not model_dir:
        raise UserError("MODEL_DIR must be a folder to write to, got an empty string")
    folder = pathlib.Path(model_dir).expanduser()
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
    return folder


@dataclasses.dataclass(frozen=True)
class Training:
    """A training run, ready to be looped.

    Attributes:
      name: shown beside the progress bar.
      step_fn: (state, frozen, batch, key) -> (state, metrics).
      frozen: parameter sets the step reads and never changes.
      batches: step -> host batch; a pure function of the seed and the step.
      evaluate: state -> metrics.
      facts: metrics that don't change, written once at the start.
      logical_axes: of the policy's parameters.
      frozen_axes: of each frozen set's; a judge may have another shape.
    """

    name: str
    step_fn: Callable[..., tuple[TrainState, dict]]
    frozen: ParamSets
    batches: Callable[[int], Any]
    evaluate: Callable[[TrainState], dict[str, float]]
    facts: dict[str, float | int]
    logical_axes: Any
    frozen_axes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class _FrozenStep:
    """The compiled step with its frozen weights bound: (state, batch, key)."""

    def __init__(self, training: Training, state: TrainState, mesh: Any):
        params = state.param_sets[POLICY]
        lie = partitioning.shardings_for(training.logical_axes, params, mesh)
        self.state_sharding = partitioning.state_shardings(state, lie, params)
        frozen_sharding = {
            name: partitioning.shardings_for(training.frozen_axes[name], tree, mesh)
            for name, tree in training.frozen.items()
        }
        self._frozen = jax.device_put(dict(training.frozen), frozen_sharding)
        self._step = partitioning.compile_step(
            training.step_fn,
            mesh,
            self.state_sharding,
            frozen_sharding,
            partitioning.batch_sharding(mesh),
            partitioning.replicated(mesh),
        )

    @property
    def num_compilations(self) -> int:
        """How often the step was compiled; 1 is right."""
        return self._step.num_compilations

    def __call__(self, state: TrainState, batch: Any, key: jax.Array):
        return self._step(state, self._frozen, batch, key)


def run(
    training: Training,
    *,
    folder: pathlib.Path,
    initial_state: TrainState,
    settings: LoopSettings,
    seed: int,
    mesh: MeshSettings,
) -> TrainState:
    """Trains from the newest checkpoint in `folder`, or from `initial_state`.

    Returns the state after `settings.train_steps` updates. A run that is already
    complete returns its last state at once.

    Raises:
      UserError: the mesh does not fit the devices, the parameters or the batch.
      Stopped: a signal ended the run early; its state is saved.
    """
    device_mesh = partitioning.make_mesh(mesh)
    partitioning.check_batch_size(
        settings.batch_size, device_mesh, settings.num_microbatches
    )
    step = _FrozenStep(training, initial_state, device_mesh)
    checkpointer = checkpoints.Checkpointer(
        folder / "checkpoints", keep=settings.keep_checkpoints
    )
    with checkpointer:
        state = jax.device_put(initial_state, step.state_sharding)
        latest = checkpointer.latest_step()
        if latest is not None:
            state = checkpointer.restore(latest, state)
            # A forgotten folder must not pass for a fresh start.
            print(
                f"{training.name}: continuing from step {latest} in {folder}",
                file=sys.stderr,
            )
        start_step = int(state.step)
        writer = metrics.MetricWriter(folder, start_step)
        if start_step == 0:
            writer.write(0, training.facts)
        with progress.Progress(settings.train_steps, training.name) as bar:
            state = loop.train_loop(
                step,
                state,
                training.batches,
                settings=settings,
                start_step=start_step,
                checkpointer=checkpointer,
                writer=writer,
                progress=bar,
                evaluate=training.evaluate,
                key=jax.random.key(seed),
                meta={"seed": seed, "versions": versions()},
            )
        writer.close()
    if int(state.step) < settings.train_steps:
        raise Stopped(int(state.step))
    return state


class Stopped(Exception):
    """A signal ended the run after a checkpoint; the same command continues it.

    Attributes:
      step: updates that are done and saved.
    """

    def __init__(self, step: int):
        super().__init__(f"stopped at step {step}")
        self.step = step


def optimizer_and_rate(settings: OptimizerSettings, train_steps: int):
    """Returns the optax transformation and the schedule it follows."""
    return (
        optimizers.make_optimizer(settings, train_steps),
        optimizers.learning_rate_schedule(settings, train_steps),
    )


def required(name: str, value: Any) -> Any:
    """Returns `value`; raises a UserError where it is None."""
    if value is None:
        raise UserError(f"{name} must be set when no checkpoint is named, got None")
    return value


def initial_params(
    init: Callable[[jax.Array], Params], checkpoint: str, seed: int
) -> Params:
    """Returns fresh parameters, or those of `checkpoint` where one is named.

    Raises:
      UserError: the checkpoint is missing or has other names or shapes.
    """
    key = jax.random.key(seed)
    if not checkpoint:
        return jax.jit(init)(key)
    folders.find_model_dir(checkpoint)
    source = folders.resolve(checkpoint)
    return checkpoints.load_params(source, jax.eval_shape(init, key))
