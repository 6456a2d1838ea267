# SPDX-License-Identifier: Apache-2.0
"""Reads what checkpoints hold, and uses nothing that differs from its manifest."""

import logging
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import Array, PyTree

from nlhf_jax import distributed, global_arrays, manifests, retention
from nlhf_jax.checks import CheckpointError, UserError
from nlhf_jax.checksums import begin_checksums
from nlhf_jax.parameter_files import (
    PARAMS_FILE,
    check_same_arrays,
    names_of,
    read_params_file,
)
from nlhf_jax.types import POLICY, Params, TrainState

STEPS_FOLDER = "checkpoints"
STATE = "state"

Result = TypeVar("Result")
_log = logging.getLogger(__name__)


def together(
    name: str, act: Callable[[], Result], seconds: float | int | None = None
) -> Result:
    """Returns `act()`; what goes wrong in one process goes wrong in all.

    Else some would go on to the next checkpoint while others use this one.

    Args:
      name: of the barrier at which all processes meet afterwards.
      act: what this process does.
      seconds: how long to wait for the last process; as `exchange` if None.

    Raises:
      CheckpointError: another process could not do its part.
      PeerLost: another process is gone.
    """
    try:
        found, wrong = act(), None
    except Exception as error:
        if distributed.is_peer_loss(error):
            raise
        found, wrong = None, error
    mine = "" if wrong is None else reason(wrong)
    reasons = distributed.exchange(name, mine, seconds)
    if wrong is not None:
        raise wrong
    for number, text in sorted(reasons.items()):
        if text:
            raise CheckpointError(f"process {number} found: {text}")
    return found


def reason(error: BaseException) -> str:
    """Returns why something failed, on one line that is not long and never empty.

    Of a page about a file that could not be written, what the system said.
    """
    text = str(error)
    code = re.search(r"\[os_error_code='(\d+)'\]", text)
    if code:
        return os.strerror(int(code[1]))
    lines = text.strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]


def read_checked_manifest(folder: pathlib.Path) -> manifests.Manifest:
    """Returns a step's manifest once all its files are as they were written.

    Several processes share the work, so all must call it.

    Raises:
      CheckpointError: names the file that is missing or differs.
    """
    manifest = together("manifest", lambda: manifests.read(folder))
    share = (jax.process_index(), distributed.num_processes())
    together("files", lambda: manifests.check_files(folder, manifest, share))
    more = manifests.unlisted_files(folder, manifest)
    if more and distributed.is_first():
        others = f" and {len(more) - 1} more" if len(more) > 1 else ""
        _log.warning(
            "checkpoint %s holds %s%s, which is not in its manifest and is not read",
            folder,
            more[0],
            others,
        )
    return manifest


def restore_state(folder: pathlib.Path, abstract: TrainState) -> TrainState:
    """Returns the state in a step's folder, checked before and after it is read.

    Args:
      folder: of the step.
      abstract: the structure, shapes, dtypes and shardings that the result gets.

    Raises:
      UserError: it is of another model or optimiser; the first array that differs is
        named with both shapes.
      CheckpointError: it is damaged; names the file or the array.
    """
    manifest = together("manifest", lambda: manifests.read(folder))
    check_continues(folder, manifest, abstract)
    read_checked_manifest(folder)
    # Not a checkpointer's: in it the others would wait for who finds damage.
    handler, place = ocp.StandardCheckpointHandler(), epath.Path(folder / STATE)
    args = ocp.args.StandardRestore(abstract)
    state = together("restore", lambda: handler.restore(place, args=args))
    named = names_of(state)
    together("pieces", lambda: manifests.check_pieces(named, manifest))
    totals = begin_checksums(state)()
    for name, checksum in zip(named, totals, strict=True):
        if int(checksum) != manifest["arrays"][name]["checksum"]:
            raise CheckpointError(f"the checksum of {name} differs")
    return state


def check_continues(
    folder: pathlib.Path, manifest: manifests.Manifest, abstract: TrainState
) -> None:
    """Checks that a step's folder holds the arrays that a state has.

    Raises:
      UserError: as `restore_state`.
    """
    found = manifests.stored_shapes(manifest)
    check_same_arrays(f"checkpoint {folder}", found, abstract)


def name_strangers(folder: pathlib.Path) -> None:
    """Says which folders are named as a step and are no checkpoint."""
    for step in retention.strangers(folder):
        _log.warning(
            "%s has no %s, so it is no checkpoint and is ignored",
            folder / str(step),
            manifests.MANIFEST_FILE,
        )


def load_params(
    path: str | pathlib.Path,
    like: Params | None = None,
    shardings: PyTree | None = None,
) -> dict[str, Any]:
    """Returns a policy's parameters in float32, whatever the stored dtype.

    Args:
      path: a model folder, its `checkpoints` folder, one step's folder, or a
        safetensors file. Of several steps the newest good one is taken; a step's files
        are compared with its manifest before they are read.
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
    candidates = param_sources(source)
    if not candidates:
        raise UserError(
            f"{str(path)!r} holds no checkpoint: expected a folder of steps, a step "
            f"with its {manifests.MANIFEST_FILE}, or {PARAMS_FILE}"
        )
    wrong = []
    for candidate in candidates:
        try:
            return _load_one(candidate, like, shardings)
        except UserError:
            raise
        except Exception as error:
            if distributed.is_peer_loss(error):
                raise
            _log.warning("%s", damage(candidate, error))
            wrong.append(f"{candidate.name}: {reason(error)}")
    raise UserError(f"no checkpoint in {str(path)!r} is readable: {'; '.join(wrong)}")


def damage(folder: pathlib.Path, error: Exception) -> str:
    """Returns the sentence that names a damaged checkpoint."""
    return f"checkpoint {folder} is damaged: {reason(error)}"


def _load_one(
    source: pathlib.Path, like: Params | None, shardings: PyTree | None
) -> dict[str, Any]:
    if shardings is None:
        if source.is_dir():
            manifests.check_files(source, manifests.read(source))
        return jax.tree.map(_to_float32, _read_params(source, like))
    if source.is_dir():
        read_checked_manifest(source)
    params = together("parameters", lambda: _read_params(source, like, shardings))
    return global_arrays.put(jax.tree.map(_to_float32_host, params), shardings)


def param_sources(source: pathlib.Path) -> list[pathlib.Path]:
    """Returns files and step folders to try, in order; empty if there are none."""
    if source.is_file() or manifests.is_complete(source):
        return [source]
    steps = retention.committed(source)
    if retention.step_folders(source):
        name_strangers(source)
        return [source / str(step) for step in reversed(steps)]
    if (source / PARAMS_FILE).is_file():
        return [source / PARAMS_FILE]
    inner = source / STEPS_FOLDER
    return param_sources(inner) if inner.is_dir() else []


def stored_arrays(step_folder: pathlib.Path) -> dict[str, Any]:
    """Returns the tree of shapes and dtypes of a stored state, reading no array."""
    metadata = ocp.PyTreeCheckpointHandler().metadata(epath.Path(step_folder / STATE))
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), metadata.tree
    )


def read_stored_array(step_folder: pathlib.Path, name: str, leaf: Any) -> np.ndarray:
    """Returns one of a policy's parameters in a step's folder, and reads no other.

    Args:
      step_folder: of the step.
      name: the parameter's path, `a/b/c`.
      leaf: its shape and dtype.
    """
    wanted: dict[str, Any] = leaf
    for part in reversed(["param_sets", POLICY, *name.split("/")]):
        wanted = {part: wanted}
    restore_args = jax.tree.map(
        lambda leaf: ocp.ArrayRestoreArgs(restore_type=np.ndarray), wanted
    )
    args = ocp.args.PyTreeRestore(
        item=wanted, restore_args=restore_args, partial_restore=True
    )
    place = epath.Path(step_folder / STATE)
    (found,) = jax.tree.leaves(ocp.PyTreeCheckpointHandler().restore(place, args=args))
    return found


def read_stored_leaf(
    step_folder: pathlib.Path, stored: dict[str, Any], name: str
) -> np.ndarray:
    """Returns one array of a stored state, and reads no other.

    Args:
      step_folder: of the step.
      stored: what `stored_arrays` says of it.
      name: the array's path, `a/0/b`.
    """

    def only(path: Any, leaf: Any) -> Any:
        named = jax.tree_util.keystr(path, simple=True, separator="/")
        return leaf if named == name else ocp.PLACEHOLDER

    wanted = jax.tree_util.tree_map_with_path(only, stored)
    restore_args = jax.tree.map(
        lambda leaf: ocp.ArrayRestoreArgs(restore_type=np.ndarray), wanted
    )
    found = ocp.PyTreeCheckpointHandler().restore(
        epath.Path(step_folder / STATE),
        args=ocp.args.PyTreeRestore(item=wanted, restore_args=restore_args),
    )
    return names_of(found)[name]


def _read_params(
    source: pathlib.Path, like: Params | None, shardings: PyTree | None = None
) -> dict[str, Any]:
    if source.is_file():
        return read_params_file(source, like)
    stored = stored_arrays(source)
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
        epath.Path(source / STATE),
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
