# SPDX-License-Identifier: Apache-2.0
"""Writes weights as a checkpoint that T5X reads, one of its arrays at a time.

What lies in a file is what T5X's own writer puts there: names, shapes, dtypes, chunks,
compression. So does the optimiser's state, where it is one that T5X has.
"""

import json
import pathlib
import shutil
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorstore

from nlhf_jax.checks import UserError, check_choice
from nlhf_jax.conversion import t5x, t5x_arrays, t5x_index, t5x_optimizers
from nlhf_jax.conversion import t5x_layouts as layouts
from nlhf_jax.conversion.formats import Format, Options
from nlhf_jax.conversion.shapes import nested
from nlhf_jax.conversion.tensors import Moments, Tensor, Weights, of_array
from nlhf_jax.t5_settings import T5Settings

LARGEST_CHUNK = 2**28  # bytes; larger arrays are cut along their first axis
COMPRESSORS = {
    t5x_arrays.NATIVE: {"id": "gzip", "level": 1},
    t5x_arrays.ORBAX: {"id": "zstd", "level": 1},
}
COMMITTED = "Checkpoint commit was successful to checkpoint"
_DICT_KEY = 2  # Orbax's number of a key of a dict
TARGET, STATES = t5x_arrays.TARGET, t5x_arrays.STATES
PLACES = {TARGET: (TARGET,), STATES: ("state", STATES)}


def write_t5x(folder: pathlib.Path, weights: Weights, options: Options) -> None:
    """Writes `folder/checkpoint_STEP`, and the vocabulary beside it.

    Peak memory is that of one of T5X's arrays, which holds all layers of a kind where
    they are scanned.

    Args:
      folder: an empty one.
      weights: of an encoder-decoder; float32 or bfloat16 as they are to be stored.
      options: `t5x_layout` "native" (the default) or "orbax"; `scan_layers` "true" (the
        default) or "false" of networks with a bias in each layer; `optimizer` "true"
        (the default) or "false", whether the optimiser's state is written, where there
        is one; `step`, the updates that this state has seen, else 0.

    Raises:
      UserError: the network is of another family, or an option has no such value.
    """
    settings = weights.settings
    if not isinstance(settings, T5Settings):
        raise UserError(
            "only encoder-decoders of T5's can be written as T5X checkpoints, got a "
            "decoder-only model"
        )
    layout = options.get("t5x_layout") or t5x_arrays.NATIVE
    check_choice("t5x_layout", layout, t5x_arrays.LAYOUTS)
    moments = weights.moments if t5x.with_optimizer(options) else None
    step = _step(options.get("step"), moments)
    scan = _scans(settings, options.get("scan_layers") or "")
    arrays = {TARGET: their_arrays(weights, scan)}
    if moments is not None:
        shapes = {name: tensor.shape for name, tensor in weights.tensors.items()}
        states = t5x_optimizers.their_states(moments, shapes, settings, scan)
        arrays[STATES] = states
    target = folder / f"{t5x_arrays.PREFIX}{step}"
    target.mkdir(parents=True)
    write = _write_native if layout == t5x_arrays.NATIVE else _write_orbax
    write(target, arrays, step)
    if t5x.VOCABULARY in weights.files:
        shutil.copyfile(weights.files[t5x.VOCABULARY], folder / t5x.VOCABULARY)


def _step(text: str | None, moments: Moments | None) -> int:
    """Returns the checkpoint's number: T5X's Adafactor counts its updates by it."""
    count = 0 if moments is None else moments.count
    if text is None:
        return count
    if not str(text).isdecimal() or int(text) > np.iinfo(np.int32).max:
        raise UserError(f"step must be an integer from 0 to 2147483647, got {text!r}")
    is_counted = moments is not None and moments.optimizer == t5x_optimizers.ADAFACTOR
    if is_counted and int(text) != count:
        raise UserError(
            f"step must be {count}, the updates that Adafactor's state has seen, got "
            f"{text}: --optimizer=false leaves that state out"
        )
    return int(text)


def _scans(settings: T5Settings, text: str) -> bool:
    check_choice("scan_layers", text, ("", "false", "true"))
    if text == "true" and not settings.bias_in_each_layer:
        raise UserError(
            "scan_layers must be false for a network with one relative bias for a "
            "stack, since T5X scans only layers that have their own, got 'true'"
        )
    return settings.bias_in_each_layer and text != "false"


# --- layouts of the network


def their_arrays(weights: Weights, scan: bool) -> dict[str, Tensor]:
    """Returns the arrays that T5X has, in its order, by its names."""
    layers: dict[str, dict[int, Tensor]] = {}
    arrays = {}
    for name, tensor in weights.tensors.items():
        tensor = layouts.with_heads(name, tensor, weights.settings)
        theirs, layer = layouts.their_name(name) if scan else (name, None)
        if layer is None:
            arrays[theirs] = tensor
        else:
            layers.setdefault(theirs, {})[layer] = tensor
    for name, of in layers.items():
        arrays[name] = layouts.stacked(of, layouts.SCAN_AXIS)
    return dict(sorted(arrays.items()))


# --- layouts of the folder


Arrays = Mapping[str, Mapping[str, Tensor]]


def _write_native(folder: pathlib.Path, arrays: Arrays, step: int) -> None:
    specs: dict[str, dict[str, Any]] = {part: {} for part in arrays}
    for part, tensors in arrays.items():
        for name, tensor in tensors.items():
            is_own = t5x_optimizers.is_like_parameter(name, tensor.shape)
            if part == STATES and not is_own:
                specs[part][name] = tensor.read()
                continue
            place = ".".join((*PLACES[part], *name.split("/")))
            specs[part][name] = _write_natively(folder, place, tensor)
    trees = {part: nested(leaves) for part, leaves in specs.items()}
    t5x_index.write_index(folder, trees[TARGET], step, trees.get(STATES))


def _write_natively(folder: pathlib.Path, place: str, tensor: Tensor) -> dict[str, Any]:
    """Writes an array and returns what the index says of it."""
    store = {"driver": "file", "path": f"{folder / place}/"}
    metadata = _write_array(store, tensor, t5x_arrays.NATIVE)
    return {
        "driver": "zarr",
        "dtype": np.dtype(tensor.dtype).name,
        "kvstore": {"driver": "file", "path": f"{place}/"},
        "metadata": metadata,
    }


def _write_orbax(folder: pathlib.Path, arrays: Arrays, step: int) -> None:
    begun = time.time_ns()
    state = folder / t5x_arrays.STATE
    state.mkdir()
    base = f"file://{state.resolve()}/"
    whole = {("state", "step"): of_array(np.asarray(step, np.int32))}
    for part, tensors in arrays.items():
        for name, tensor in tensors.items():
            whole[(*PLACES[part], *name.split("/"))] = tensor
    for parts, tensor in whole.items():
        path = f"{'.'.join(parts)}/"
        store = {"driver": "ocdbt", "base": base, "path": path}
        _write_array(store, tensor, t5x_arrays.ORBAX)
    tree = dict(_entry(parts, list(one.shape)) for parts, one in whole.items())
    _write_json(state / t5x_arrays.METADATA_FILE, _tree_metadata(tree))
    _write_json(folder / "_CHECKPOINT_METADATA", _times(begun))
    for place in (folder, state):
        (place / "commit_success.txt").write_text(COMMITTED)


def _entry(parts: tuple[str, ...], shape: list[int]) -> tuple[str, dict[str, Any]]:
    # Of numpy arrays Orbax asks no sharding; T5X names its own when it restores.
    value = {"value_type": "np.ndarray", "skip_deserialize": False}
    keys = [{"key": part, "key_type": _DICT_KEY} for part in parts]
    return str(parts), {
        "key_metadata": keys,
        "value_metadata": value | {"write_shape": shape},
    }


def _tree_metadata(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "tree_metadata": tree,
        "use_ocdbt": True,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }


def _times(begun: int) -> dict[str, Any]:
    handler = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler"
    return {
        "item_handlers": {t5x_arrays.STATE: f"{handler}.PyTreeCheckpointHandler"},
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": begun,
        "commit_timestamp_nsecs": time.time_ns(),
        "custom_metadata": {},
    }


def _write_json(file: pathlib.Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")


# --- arrays


def chunks_of(shape: tuple[int, ...], item_bytes: int) -> list[int]:
    """Returns the shape of the pieces of an array: all of it, unless it is large."""
    rows = shape[0] if shape else 1
    row_bytes = item_bytes * int(np.prod(shape[1:], dtype=np.int64))
    pieces = 1
    while rows > pieces and -(-rows // pieces) * row_bytes > LARGEST_CHUNK:
        pieces *= 2
    return [-(-rows // pieces), *shape[1:]] if shape else []


def _write_array(
    store: Mapping[str, Any], tensor: Tensor, layout: str
) -> dict[str, Any]:
    """Writes an array and returns what T5X's index says of its file."""
    dtype = np.dtype(tensor.dtype)
    metadata = {
        "shape": list(tensor.shape),
        "chunks": chunks_of(tensor.shape, dtype.itemsize),
        "compressor": COMPRESSORS[layout],
    }
    spec = {
        "driver": "zarr",
        "kvstore": dict(store),
        "metadata": metadata,
        "dtype": dtype.name,
        "store_data_equal_to_fill_value": True,
    }
    array = tensorstore.open(spec, create=True, open=False).result()
    found = tensor.read()
    rows = metadata["chunks"][0] if found.ndim else 0
    if not rows or rows == len(found):
        array.write(found).result()
        return metadata
    for first in range(0, len(found), rows):
        last = min(first + rows, len(found))
        array[first:last].write(found[first:last]).result()
    return metadata


OPTIMIZER_FLAG = "true (the default) or false: whether its state comes along"
FORMAT = Format(
    looks_for="a folder checkpoint_STEP of T5X's, or a folder of them",
    recognises=t5x.recognises,
    open=t5x.open_t5x,
    write=write_t5x,
    open_flags={
        "mlp_activations": "gelu,linear (the default of T5 1.1), relu (1.0), ...",
        "optimizer": OPTIMIZER_FLAG,
    },
    write_flags={
        "t5x_layout": "native (the default) or orbax",
        "scan_layers": "true (the default) or false; of umT5 only",
        "step": "number of the checkpoint; default: the optimiser's updates, or 0",
        "optimizer": OPTIMIZER_FLAG,
    },
)
