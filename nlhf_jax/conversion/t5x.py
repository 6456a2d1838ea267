# SPDX-License-Identifier: Apache-2.0
"""T5X checkpoints as weights, and weights as T5X checkpoints.

Our T5 has T5X's names and layouts of separate layers, so a name stands for itself,
`encoder/layers_0/mlp/wo/kernel`. Two things differ from network to network there:
    scanned   all layers of a stack lie in one array, `encoder/encoder/mlp/wo/kernel`,
              with the layer as its second axis (F, L, D)
    heads     attention's kernels keep heads apart, (D, H, K) and (H, K, D)
T5X's `examples/scalable_t5` (umT5) has both, and a relative bias in each layer; its
`examples/t5` (T5 1.0, 1.1, mT5, ByT5, Flan-T5) has neither.
"""

import functools
import logging
import pathlib
import re
from collections.abc import Mapping

import numpy as np

from nlhf_jax.checks import UserError, nearest
from nlhf_jax.conversion import t5x_arrays, t5x_settings
from nlhf_jax.conversion.formats import Options
from nlhf_jax.conversion.shapes import flat, parameter_shapes
from nlhf_jax.conversion.t5x_arrays import StoredArray
from nlhf_jax.conversion.tensors import Tensor, Weights
from nlhf_jax.settings import T5Settings

LAYER = t5x_settings.LAYER
SCANNED = re.compile(r"(encoder|decoder)/\1/(.+)")
VOCABULARY = "vocabulary.model"
STACKS = ("encoder", "decoder")
SCAN_AXIS = 1
_log = logging.getLogger(__name__)


def recognises(path: pathlib.Path) -> bool:
    """Returns whether a path is a T5X checkpoint, or a folder of them."""
    return t5x_arrays.find_checkpoint(path) is not None


def wanted_shapes(settings: T5Settings) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of our parameters by name."""
    shapes = flat(parameter_shapes(settings))
    return {name: tuple(leaf.shape) for name, leaf in shapes.items()}


def open_t5x(path: pathlib.Path, options: Options) -> Weights:
    """Opens a checkpoint of an encoder-decoder that T5X wrote.

    The optimiser's state is left out, and that is said.

    Args:
      path: folder of one checkpoint, or of several, of which the newest is opened.
      options: see `t5x_settings.settings_of`.

    Raises:
      UserError: the checkpoint is damaged or of another network; names the tensor.
    """
    checkpoint = t5x_arrays.open_checkpoint(path)
    layers = separate_layers(checkpoint.arrays)
    shapes = {name: array.shape for name, array in layers.items()}
    settings = t5x_settings.settings_of(shapes, options, checkpoint.folder)
    if checkpoint.has_optimizer:
        _log.warning("%s: the optimiser's state is left out", checkpoint.folder)
    # T5X keeps no vocabulary there, but our exports do.
    vocabulary = checkpoint.folder.parent / VOCABULARY
    files = {VOCABULARY: vocabulary} if vocabulary.is_file() else {}
    return Weights(settings, _fitted(layers, settings), files)


# --- layers


def _axis_and_length(
    arrays: Mapping[str, StoredArray], stack: str
) -> tuple[int, int] | None:
    """Returns the axis and number of a stack's scanned layers, None if separate."""
    norm = f"{stack}/{stack}/pre_mlp_layer_norm/scale"
    if norm not in arrays:
        return None
    shape, final = arrays[norm].shape, arrays.get(f"{stack}/{stack}_norm/scale")
    if len(shape) != 2 or final is None or final.shape[0] not in shape:
        raise UserError(
            f"tensor {norm} must have two axes, the width and the layers, got the "
            f"shape {shape}"
        )
    axis = SCAN_AXIS if shape[0] == final.shape[0] else 0
    return axis, shape[axis]


def separate_layers(arrays: Mapping[str, StoredArray]) -> dict[str, StoredArray]:
    """Returns the arrays with those of scanned layers cut into `layers_0`, ....

    Raises:
      UserError: a scanned array has another number of layers than its stack.
    """
    scans = {stack: _axis_and_length(arrays, stack) for stack in STACKS}
    layers: dict[str, StoredArray] = {}
    for name, array in arrays.items():
        found = SCANNED.fullmatch(name)
        if not found or scans[found[1]] is None:
            layers[name] = array
            continue
        stack, rest = found[1], found[2]
        axis, length = scans[stack]
        if len(array.shape) <= axis or array.shape[axis] != length:
            raise UserError(
                f"tensor {name} must have {length} layers on axis {axis}, got the "
                f"shape {array.shape}"
            )
        for layer in range(length):
            layers[f"{stack}/layers_{layer}/{rest}"] = _layer(array, axis, layer)
    return layers


def _layer(array: StoredArray, axis: int, layer: int) -> StoredArray:
    index = (slice(None),) * axis + (layer,)
    shape = array.shape[:axis] + array.shape[axis + 1 :]
    return StoredArray(shape, array.dtype, lambda _: array.read(index))


# --- heads


def apart(name: str, shape: tuple[int, ...], settings: T5Settings) -> tuple[int, ...]:
    """Returns the shape that a parameter has where heads are kept apart."""
    heads = (settings.num_heads, settings.head_dim)
    if re.search(r"attention/(query|key|value)/kernel$", name):
        return (shape[0], *heads)
    return (*heads, shape[1]) if name.endswith("attention/out/kernel") else shape


def _fitted(
    layers: Mapping[str, StoredArray], settings: T5Settings
) -> dict[str, Tensor]:
    """Returns the tensors of our network.

    Raises:
      UserError: names the first that is missing, is not known, or has another shape.
    """
    wanted = wanted_shapes(settings)
    for name in wanted:
        if name not in layers:
            raise UserError(f"tensor {name} is missing{nearest(name, layers)}")
    for name in layers:
        if name not in wanted:
            raise UserError(
                f"tensor {name} has no place in this network{nearest(name, wanted)}"
            )
    tensors = {}
    for name, shape in wanted.items():
        array = layers[name]
        if array.shape not in (shape, apart(name, shape, settings)):
            raise UserError(
                f"tensor {name} must have the shape {shape}, got {array.shape}"
            )
        if np.dtype(array.dtype).name not in ("float32", "bfloat16"):
            raise UserError(
                f"tensor {name} must be of float32 or bfloat16, got {array.dtype}"
            )
        read = functools.partial(_read_as, array, shape)
        tensors[name] = Tensor(shape, array.dtype, read)
    return tensors


def _read_as(array: StoredArray, shape: tuple[int, ...]) -> np.ndarray:
    return array.read(()).reshape(shape)
