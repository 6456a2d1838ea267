# SPDX-License-Identifier: Apache-2.0
"""The arrays of a T5X checkpoint, in either of its two layouts, read when asked for.

MODEL_DIR/checkpoint_STEP/          T5X's own layout
  checkpoint                        the index, see `t5x_index`
  target.encoder.../{.zarray,0.0}   one TensorStore array each

MODEL_DIR/checkpoint_STEP/          Orbax's
  state/_METADATA                   names of all arrays
  state/manifest.ocdbt, ...         their bytes, in one database
"""

import dataclasses
import json
import logging
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorstore

from nlhf_jax.checks import UserError
from nlhf_jax.conversion import t5x_index

NATIVE, ORBAX = "native", "orbax"
LAYOUTS = (NATIVE, ORBAX)
PREFIX = "checkpoint_"  # of the folders, before the step
METADATA_FILE = "_METADATA"
STATE = "state"
TARGET = "target"
STATES = "param_states"
BLOCK = 2**28  # bytes of an array that are read at once, unless its chunks are larger
_log = logging.getLogger(__name__)

Index = tuple[int | slice, ...]


class StoredArray(NamedTuple):
    """An array in a checkpoint.

    Attributes:
      shape: of the whole array.
      dtype: of the whole array.
      read: index -> that part of it, `()` for all.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a folder of T5X holds.

    Attributes:
      folder: of the checkpoint.
      arrays: the parameters by T5X's names, joined by slashes, without `target/`.
      has_optimizer: whether the optimiser's state lies beside them.
      states: that state's arrays, without `param_states/`, where they were asked for.
      step: updates that were made, where the state was asked for.
    """

    folder: pathlib.Path
    arrays: Mapping[str, StoredArray]
    has_optimizer: bool
    states: Mapping[str, StoredArray] = dataclasses.field(default_factory=dict)
    step: StoredArray | None = None


def layout_of(folder: pathlib.Path) -> str | None:
    """Returns "native" or "orbax" of a checkpoint's folder, None of any other."""
    if t5x_index.looks_like_index(folder / t5x_index.INDEX_FILE):
        return NATIVE
    metadata = folder / STATE / METADATA_FILE
    if metadata.is_file() and "('target', " in metadata.read_text(errors="replace"):
        return ORBAX
    return None


def find_checkpoint(path: pathlib.Path) -> pathlib.Path | None:
    """Returns the checkpoint's folder: `path`, or the newest step in it, else None."""
    if not path.is_dir():
        return None
    if layout_of(path):
        return path
    steps = {
        int(number): child
        for child in path.glob(f"{PREFIX}*")
        if (number := child.name.removeprefix(PREFIX)).isdecimal()
    }
    newest = steps[max(steps)] if steps else None
    return newest if newest is not None and layout_of(newest) else None


def open_checkpoint(path: pathlib.Path, with_optimizer: bool = False) -> Checkpoint:
    """Opens what `find_checkpoint` finds; no array is read yet.

    Args:
      path: see `find_checkpoint`.
      with_optimizer: whether the optimiser's state is opened, too.

    Raises:
      UserError: there is no checkpoint, its index is damaged, or an array is missing;
        names the array.
    """
    folder = find_checkpoint(path)
    if folder is None:
        raise UserError(
            f"{str(path)!r} holds no T5X checkpoint: neither a file "
            f"{t5x_index.INDEX_FILE!r} nor {STATE}/{METADATA_FILE} in it or in a "
            f"folder {PREFIX}STEP"
        )
    opened = _open_native if layout_of(folder) == NATIVE else _open_orbax
    try:
        return opened(folder, with_optimizer)
    except RecursionError:
        raise UserError(f"{folder}: its index is nested too deeply") from None


# --- T5X's own layout


def _open_native(folder: pathlib.Path, with_optimizer: bool) -> Checkpoint:
    optimizer = t5x_index.read_index(folder)

    def arrays(tree: Any, before: str = "") -> dict[str, StoredArray]:
        leaves = _leaves(tree) if isinstance(tree, dict) else []
        return {
            name: _native_array(folder, f"{before}{name}", leaf)
            for name, leaf in leaves
        }

    found = arrays(optimizer[TARGET])
    state = optimizer.get("state")
    has_optimizer = isinstance(state, dict) and STATES in state
    if not has_optimizer or not with_optimizer:
        return Checkpoint(folder, found, has_optimizer)
    states = arrays(state[STATES], f"{STATES}/")
    step = arrays({"step": state.get("step")}).get("step")
    return Checkpoint(folder, found, True, states, step)


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, dict) and "driver" in leaf and "kvstore" in leaf


def _leaves(tree: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, value in tree.items():
        name = f"{before}{key}"
        is_inner = isinstance(value, dict) and not _is_spec(value)
        if is_inner and not t5x_index.is_chunked(value):
            found += _leaves(value, f"{name}/")
        elif value is not None:
            found.append((name, value))
    return found


def _native_array(folder: pathlib.Path, name: str, leaf: Any) -> StoredArray:
    """Returns an array that lies in the index, or is named by it."""
    try:
        if t5x_index.is_chunked(leaf):
            leaf = t5x_index.joined(leaf)
        if isinstance(leaf, np.ndarray):
            return StoredArray(leaf.shape, leaf.dtype, lambda index: leaf[index])
        if not _is_spec(leaf):
            raise ValueError(f"the index says {leaf!r:.60} of it")
        place = _place(folder, leaf["kvstore"].get("path", leaf.get("path")))
        has_metadata = (place / ".zarray").is_file()
        said = None if has_metadata else _assumed(leaf)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise _damage(folder, name, error) from None
    if not place.is_dir():
        raise UserError(f"tensor {name} is missing: there is no folder {place}")
    return _opened(folder, name, {"driver": "file", "path": f"{place}/"}, "zarr", said)


def _place(folder: pathlib.Path, path: Any) -> pathlib.Path:
    """Returns the folder of an array; it must be one of the checkpoint's own.

    The specification's driver and bucket say where the checkpoint was written once.
    """
    name = path.rstrip("/") if isinstance(path, str) else ""
    if not name.strip(".") or "/" in name or "\\" in name or "\0" in name:
        raise ValueError(
            f"the path in the index must be a plain name, got {path!r:.80}"
        )
    place = folder / name
    if place.resolve().parent != folder.resolve():
        raise ValueError(f"{name!r:.80} leads out of the checkpoint's folder")
    return place


def _assumed(leaf: Mapping[str, Any]) -> dict[str, Any]:
    """Returns zarr metadata that the index alone says, for lack of a `.zarray`."""
    dtype = t5x_index.dtype_of(leaf["dtype"])
    metadata = leaf["metadata"]
    return {
        "zarr_format": 2,
        "shape": metadata["shape"],
        "chunks": metadata["chunks"],
        "dtype": "bfloat16" if leaf["dtype"] == "bfloat16" else dtype.str,
        "compressor": metadata["compressor"],
        "fill_value": None,
        "filters": None,
        "order": "C",
    }


# --- Orbax's layout


def _open_orbax(folder: pathlib.Path, with_optimizer: bool) -> Checkpoint:
    state = folder / STATE
    try:
        metadata = json.loads((state / METADATA_FILE).read_text(encoding="utf-8"))
        names = [
            [part["key"] for part in entry["key_metadata"]]
            for entry in metadata["tree_metadata"].values()
        ]
        driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
        is_database = bool(metadata.get("use_ocdbt", True))
        if not all(isinstance(part, str) for name in names for part in name):
            raise ValueError("a name in it is no text")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{state / METADATA_FILE} is no metadata of Orbax: {error!s:.200}"
        ) from None

    def arrays(before: list[str], said: str = "") -> dict[str, StoredArray]:
        opened = {}
        for parts in names:
            if parts[: len(before)] == before:
                name = "/".join(parts[len(before) :])
                store = _orbax_store(folder, name, ".".join(parts), is_database)
                opened[name] = _opened(folder, f"{said}{name}", store, driver)
        return opened

    found, place = arrays([TARGET]), [STATE, STATES]
    has_optimizer = any(parts[:2] == place for parts in names)
    if not has_optimizer or not with_optimizer:
        return Checkpoint(folder, found, has_optimizer)
    step = arrays([STATE, "step"], "step").get("")
    return Checkpoint(folder, found, True, arrays(place, f"{STATES}/"), step)


def _orbax_store(
    folder: pathlib.Path, name: str, path: str, is_database: bool
) -> dict[str, Any]:
    state = (folder / STATE).resolve()
    try:
        place = _place(state, path)
    except ValueError as error:
        raise _damage(folder, name, error) from None
    if is_database:
        return {"driver": "ocdbt", "base": f"file://{state}/", "path": f"{path}/"}
    return {"driver": "file", "path": f"{place}/"}


# --- both


def _opened(
    folder: pathlib.Path,
    name: str,
    store: Mapping[str, Any],
    driver: str,
    assumed: Mapping[str, Any] | None = None,
) -> StoredArray:
    """Returns an array of TensorStore; missing chunks are an error, not zeros."""
    spec: dict[str, Any] = {"driver": driver, "kvstore": dict(store)}
    if assumed is not None:
        spec["metadata"] = assumed
    mode = {"open": True, "read": True, "assume_metadata": assumed is not None}
    try:
        array = tensorstore.open(spec, **mode).result()
        if array.fill_value is None:
            spec["fill_missing_data_reads"] = False
            array = tensorstore.open(spec, **mode).result()
    except Exception as error:  # of many kinds, all about the files
        raise _damage(folder, name, error) from None

    def read(index: Index) -> np.ndarray:
        try:
            return _read_by_rows(array[index] if index else array)
        except Exception as error:
            raise _damage(folder, name, error) from None

    return StoredArray(tuple(array.shape), np.dtype(array.dtype.numpy_dtype), read)


def _read_by_rows(part: Any) -> np.ndarray:
    """Returns an array of TensorStore; beside it some chunks' rows are in memory."""
    if not part.shape or part.size * part.dtype.numpy_dtype.itemsize <= BLOCK:
        return np.asarray(part.read().result())
    row_bytes = part.size // part.shape[0] * part.dtype.numpy_dtype.itemsize
    # Whole chunks, since one is unpacked as a whole however little is asked of it.
    of_chunk = part.chunk_layout.read_chunk.shape[0] or part.shape[0]
    rows = of_chunk * max(1, BLOCK // (of_chunk * row_bytes))
    whole = np.empty(part.shape, part.dtype.numpy_dtype)
    for first in range(0, part.shape[0], rows):
        last = min(first + rows, part.shape[0])
        whole[first:last] = part[first:last].read().result()
    return whole


def _damage(folder: pathlib.Path, name: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split(" [tensorstore_spec=")[0].split())
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__} "
    return UserError(f"tensor {name} of {folder} cannot be read: {kind}{reason:.300}")
