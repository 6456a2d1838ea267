# SPDX-License-Identifier: Apache-2.0
"""The file `checkpoint` of T5X's own layout: one msgpack map of everything.

    {"version": 3, "optimizer": {"target": {...}, "state": {"step": ..., ...}}}

A leaf is an array within the file, or a map that says where a TensorStore array lies.
Nothing in it is ever executed.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import msgpack
import numpy as np

from nlhf_jax.checks import UserError

INDEX_FILE = "checkpoint"
VERSION = 3
OLDEST_VERSION = 2
LARGEST_INDEX = 2**31  # bytes; of the largest public models it is below a megabyte
_ARRAY, _SCALAR = 1, 3  # numbers of msgpack's extension types, as flax gives them
_CHUNKED = "__msgpack_chunked_array__"


def dtype_of(name: str) -> np.dtype:
    """Returns the dtype of numbers by its name.

    Raises:
      ValueError: it is no dtype of integers, floats or booleans.
    """
    if name == "bfloat16":
        return np.dtype(jnp.bfloat16)
    try:
        dtype = np.dtype(name)
    except TypeError:
        raise ValueError(f"dtype {name!r} is not known") from None
    if dtype.kind not in "fiub":
        raise ValueError(f"dtype {name!r} is none of numbers")
    return dtype


def _unpacked(code: int, payload: bytes) -> np.ndarray:
    if code not in (_ARRAY, _SCALAR):
        raise ValueError(f"extension type {code} is not known")
    shape, name, data = msgpack.unpackb(payload, raw=False)
    return np.frombuffer(data, dtype_of(name)).reshape(shape)


def is_chunked(leaf: Any) -> bool:
    """Returns whether a map is an array that was too large for one message."""
    return isinstance(leaf, Mapping) and _CHUNKED in leaf


def joined(leaf: Mapping[str, Any]) -> np.ndarray:
    """Returns the array of which `is_chunked`."""
    shape = [leaf["shape"][str(i)] for i in range(len(leaf["shape"]))]
    chunks = [leaf["chunks"][str(i)].ravel() for i in range(len(leaf["chunks"]))]
    return np.concatenate(chunks).reshape(shape)


def looks_like_index(file: pathlib.Path) -> bool:
    """Returns whether a file begins as a msgpack map of a few keys does."""
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(1)[:1] in (b"\x82", b"\x83", b"\x84")


def read_index(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the maps `target` and `state` of the checkpoint in a folder.

    Raises:
      UserError: the file is no msgpack map of a version that T5X still reads.
    """
    file = folder / INDEX_FILE
    if file.stat().st_size > LARGEST_INDEX:
        raise UserError(f"{file} must have at most {LARGEST_INDEX} bytes, got more")
    try:
        index = msgpack.unpackb(file.read_bytes(), raw=False, ext_hook=_unpacked)
    except Exception as error:  # msgpack raises many kinds, all of damaged bytes
        raise UserError(f"{file} is no T5X index: {error!s:.200}") from None
    is_map = isinstance(index, dict)
    version = index.get("version") if is_map else None
    if not isinstance(version, int) or not OLDEST_VERSION <= version <= VERSION:
        raise UserError(
            f"{file} must be a T5X index of version {OLDEST_VERSION} or {VERSION}, "
            f"got {'version ' + repr(version) if is_map else 'no map'}"
        )
    optimizer = index.get("optimizer")
    if not isinstance(optimizer, dict) or not isinstance(optimizer.get("target"), dict):
        raise UserError(f"{file} must hold optimizer/target, which it does not")
    return optimizer


def _packed(value: Any) -> msgpack.ExtType:
    array = np.asarray(value)
    payload = (array.shape, array.dtype.name, array.tobytes())
    return msgpack.ExtType(_ARRAY, msgpack.packb(payload, use_bin_type=True))


def _with_arrays_packed(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {name: _with_arrays_packed(leaf) for name, leaf in tree.items()}
    return _packed(tree) if isinstance(tree, np.ndarray) else tree


def write_index(
    folder: pathlib.Path,
    target: Mapping[str, Any],
    step: int,
    states: Mapping[str, Any] | None = None,
) -> pathlib.Path:
    """Writes the index of parameters and an optimiser's state, and returns its path.

    Without a state the key `param_states` is left out: T5X restores such a file, and
    refuses one in which it is empty.

    Args:
      folder: of the checkpoint.
      target: nested maps whose leaves say where the arrays lie.
      step: number of steps done.
      states: nested maps of the optimiser's, whose leaves are arrays or say where they
        lie; None without.
    """
    state: dict[str, Any] = {"step": _packed(np.int32(step))}
    if states is not None:
        state["param_states"] = _with_arrays_packed(states)
    index = {
        "version": VERSION,
        "optimizer": {"state": state, "target": target},
    }
    file = folder / INDEX_FILE
    file.write_bytes(msgpack.packb(index, use_bin_type=True, strict_types=True))
    return file
