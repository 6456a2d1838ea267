# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run, and parameters alone in one portable file.

    MODEL_DIR/checkpoints/<step>/    the whole train state and a few facts (orbax)
    MODEL_DIR/checkpoints/params.safetensors    parameters alone, for an export

Nothing else is needed to resume: data order and random keys are functions of (seed,
step). Every saved state carries a checksum per array, since the format itself does not
notice a flipped bit, and a state with a NaN in it is never written.
"""

import logging
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import Array, PyTree

from nlhf_jax import distributed, global_arrays
from nlhf_jax.checks import UserError, check_integer
from nlhf_jax.checksums import inspect
from nlhf_jax.parameter_files import (
    PARAMS_FILE,
    CheckpointError,
    check_same_arrays,
    names_of,
    read_params_file,
    save_params,
)
from nlhf_jax.types import POLICY, Params, TrainState

STEPS_FOLDER = "checkpoints"
_STATE, _META = "state", "meta"

__all__ = ["CheckpointError", "Checkpointer", "load_params", "save_params"]

Result = TypeVar("Result")
_log = logging.getLogger(__name__)


class Checkpointer:
    """Saves and restores the train state of one run; at most one run per folder.

    Each process writes the parts on its own devices into one checkpoint, which any
    number of processes restores; all must call each method.

    Saving is asynchronous: `save` returns when the arrays are copied, and a failure to
    write them is raised by the next `save`, `wait` or `close`. A caller that ends
    without `close` may lose its last checkpoint unnoticed.
    """

    def __init__(self, folder: str | pathlib.Path, *, keep: int = 2):
        """Opens (or makes) the folder; only the `keep` newest checkpoints stay.

        Raises:
          UserError: `keep` < 1, or the folder cannot be made.
        """
        check_integer("keep", keep, 1)
        self.folder = pathlib.Path(folder).expanduser().absolute()
        distributed.first_does("checkpoint folder", lambda: _make(self.folder))
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, cleanup_tmp_directories=True
            ),
        )

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exception: object) -> None:
        if distributed.is_peer_loss(exception[1]):
            return  # a save that needs who is gone never ends
        try:
            self.close()
        except Exception as error:
            # The error that ended the block is the one to show.
            if exception[0] is None:
                raise
            _log.error("%s", error)

    def steps(self) -> list[int]:
        """Returns the steps of all checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """Returns the step of the newest checkpoint, or None without any."""
        return max(self.steps(), default=None)

    def save(
        self, step: int, state: TrainState, meta: Mapping[str, Any] | None = None
    ) -> None:
        """Writes the state after `step` updates, with facts that JSON can hold.

        Raises:
          CheckpointError: a number is not finite, the step is not newer than the
            newest checkpoint, or this or the previous checkpoint cannot be written.
        """
        where = f"checkpoint {step} in {self.folder}"
        distributed.barrier("checkpoint")
        finite, checksums = inspect(state)
        bad = [n for n, ok in zip(names_of(state), finite, strict=True) if not ok]
        if bad:
            raise CheckpointError(
                f"{where} not written: {bad[0]} has numbers that are not finite"
            )
        facts = {
            **(meta or {}),
            "step": step,
            "checksums": [int(checksum) for checksum in checksums],
        }
        try:
            written = self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{
                        _STATE: ocp.args.StandardSave(state),
                        _META: ocp.args.JsonSave(facts),
                    }
                ),
            )
        except Exception as error:
            raise CheckpointError(f"{where} could not be written: {error}") from error
        if not written:
            raise CheckpointError(
                f"{where} not written: checkpoint {self.latest_step()} is there already"
            )

    def read_meta(self, step: int) -> dict[str, Any]:
        """Returns the facts saved beside the state of `step`."""
        handler, folder = ocp.JsonCheckpointHandler(), self.folder / str(step) / _META
        return handler.restore(epath.Path(folder), args=ocp.args.JsonRestore())

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Returns the state saved at `step`, or at the newest good one before it.

        A damaged checkpoint is named in a warning and, once an older one has been
        read, renamed to `<step>.damaged`, so that the run can save that step again.

        Args:
          step: usually `latest_step()`.
          like: a state, concrete or abstract, with the structure, shapes, dtypes and
            (where its leaves have one) shardings that the result gets.

        Raises:
          UserError: there is no such checkpoint, it belongs to another model or
            optimiser, or none up to `step` is readable.
        """
        steps = self.steps()
        if step not in steps:
            raise UserError(
                f"no checkpoint {step} in {str(self.folder)!r}; steps there: {steps}"
            )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        damaged = []
        for candidate in [s for s in reversed(steps) if s <= step]:
            try:
                state = self._restore_one(candidate, abstract)
            except UserError:
                raise
            except Exception as error:
                _log.warning("%s", _damage(self.folder / str(candidate), error))
                damaged.append(candidate)
                continue
            self._set_aside(damaged)
            return state
        raise UserError(
            f"no readable checkpoint in {str(self.folder)!r}: {damaged} are damaged"
        )

    def _restore_one(self, step: int, abstract: TrainState) -> TrainState:
        folder = self.folder / str(step)
        stored = _together(lambda: _stored_arrays(folder))
        check_same_arrays(f"checkpoint {step} in {self.folder}", stored, abstract)
        args = ocp.args.StandardRestore(abstract)
        # Not the manager's: in it the others would wait for who finds damage.
        handler = ocp.StandardCheckpointHandler()
        place = epath.Path(folder / _STATE)
        state = _together(lambda: handler.restore(place, args=args))
        meta = _together(lambda: self.read_meta(step))
        _, checksums = inspect(state)
        _compare_checksums(names_of(state), checksums, meta)
        return state

    def _set_aside(self, steps: list[int]) -> None:
        def rename() -> None:
            for step in steps:
                folder = self.folder / str(step)
                folder.rename(folder.with_name(f"{step}.damaged"))

        if steps:
            distributed.first_does("damaged checkpoints", rename)
            self._manager.reload()

    def wait(self) -> None:
        """Waits until everything saved is on disk.

        Raises:
          CheckpointError: it could not be written.
        """
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            raise CheckpointError(
                f"a checkpoint in {self.folder} could not be written: {error}"
            ) from error

    def close(self) -> None:
        """Waits as `wait` does, and lets the folder go."""
        try:
            self.wait()
        finally:
            self._manager.close()


def _make(folder: pathlib.Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"checkpoint folder {str(folder)!r} cannot be made: {error.strerror}"
        ) from error


def _together(read: Callable[[], Result]) -> Result:
    """Returns `read()`; damage that one process finds is damage for all.

    Else some would go on to the next checkpoint while others use this one.

    Raises:
      CheckpointError: another process could not read its part.
    """
    try:
        found, wrong = read(), None
    except Exception as error:
        found, wrong = None, error
    reasons = distributed.exchange("restore", _reason(wrong))
    if wrong is not None:
        raise wrong
    for number, reason in sorted(reasons.items()):
        if reason:
            raise CheckpointError(f"process {number} found: {reason}")
    return found


def _reason(error: Exception | None) -> str:
    if error is None:
        return ""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _damage(folder: pathlib.Path, error: Exception) -> str:
    return f"checkpoint {folder} is damaged: {_reason(error)}"


def _compare_checksums(
    names: Mapping[str, Any], checksums: list[Any], meta: Mapping[str, Any]
) -> None:
    for name, found, saved in zip(names, checksums, meta["checksums"], strict=True):
        if int(found) != saved:
            raise CheckpointError(f"the checksum of {name} differs")


def _stored_arrays(step_folder: pathlib.Path) -> dict[str, Any]:
    """Returns the tree of shapes and dtypes of a stored state, reading no array."""
    metadata = ocp.PyTreeCheckpointHandler().metadata(epath.Path(step_folder / _STATE))
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), metadata.tree
    )


def load_params(
    path: str | pathlib.Path,
    like: Params | None = None,
    shardings: PyTree | None = None,
) -> dict[str, Any]:
    """Returns a policy's parameters in float32, whatever the stored dtype.

    Args:
      path: a model folder, its `checkpoints` folder, one step's folder, or a
        safetensors file. Of several steps the newest readable one is taken.
      like: parameters, concrete or abstract, whose names and shapes are required.
      shardings: where each array is to lie, a tree like `like`; of a step's folder a
        process then reads the parts on its own devices only, and all processes must
        call this. None puts everything on one device.

    Raises:
      UserError: nothing is there, it is damaged, or it does not fit `like`; the first
        parameter that differs is named with both shapes.
    """
    source = pathlib.Path(path).expanduser().absolute()
    if not source.exists():
        raise UserError(f"checkpoint {str(path)!r} does not exist")
    candidates = _param_sources(source)
    if not candidates:
        raise UserError(
            f"{str(path)!r} holds no checkpoint: expected a folder of steps, a step, "
            f"or {PARAMS_FILE}"
        )
    for candidate in candidates:
        try:
            return _load_one(candidate, like, shardings)
        except UserError:
            raise
        except Exception as error:
            _log.warning("%s", _damage(candidate, error))
    raise UserError(f"no checkpoint in {str(path)!r} is readable: all are damaged")


def _load_one(
    source: pathlib.Path, like: Params | None, shardings: PyTree | None
) -> dict[str, Any]:
    if shardings is None:
        return jax.tree.map(_to_float32, _read_params(source, like))
    params = _together(lambda: _read_params(source, like, shardings))
    return global_arrays.put(jax.tree.map(_to_float32_host, params), shardings)


def _param_sources(source: pathlib.Path) -> list[pathlib.Path]:
    """Returns files and step folders to try, in order; empty if there are none."""
    if source.is_file() or (source / _STATE).is_dir():
        return [source]
    steps = [f for f in source.iterdir() if f.name.isdecimal() and f.is_dir()]
    if steps:
        return sorted(steps, key=lambda folder: int(folder.name), reverse=True)
    if (source / PARAMS_FILE).is_file():
        return [source / PARAMS_FILE]
    inner = source / STEPS_FOLDER
    return _param_sources(inner) if inner.is_dir() else []


def _read_params(
    source: pathlib.Path, like: Params | None, shardings: PyTree | None = None
) -> dict[str, Any]:
    if source.is_file():
        return read_params_file(source, like)
    stored = _stored_arrays(source)
    abstract = {"param_sets": {POLICY: stored["param_sets"][POLICY]}}
    if like is not None:
        check_same_arrays(
            str(source), abstract["param_sets"][POLICY], like, any_dtype=True
        )
    restore_args = jax.tree.map(
        lambda leaf: ocp.ArrayRestoreArgs(restore_type=np.ndarray), abstract
    )
    if shardings is not None:
        wanted = {"param_sets": {POLICY: shardings}}
        restore_args = jax.tree.map(_restored_there, abstract, wanted)
    found = ocp.PyTreeCheckpointHandler().restore(
        epath.Path(source / _STATE),
        args=ocp.args.PyTreeRestore(
            item=abstract, restore_args=restore_args, partial_restore=True
        ),
    )
    return found["param_sets"][POLICY]


def _restored_there(leaf: jax.ShapeDtypeStruct, sharding: Any) -> ocp.ArrayRestoreArgs:
    return ocp.ArrayRestoreArgs(
        restore_type=jax.Array, sharding=sharding, dtype=_as_trained(leaf.dtype)
    )


def _as_trained(dtype: Any) -> Any:
    return jnp.float32 if jnp.issubdtype(dtype, jnp.floating) else dtype


def _to_float32(leaf: np.ndarray) -> Array:
    return jnp.asarray(leaf, _as_trained(leaf.dtype))


def _to_float32_host(leaf: Array | np.ndarray) -> Array | np.ndarray:
    return leaf if isinstance(leaf, jax.Array) else leaf.astype(_as_trained(leaf.dtype))
