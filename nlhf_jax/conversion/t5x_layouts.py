# SPDX-License-Identifier: Apache-2.0
"""How T5X lays out the layers and heads of a T5, and how we do.

Our T5 has T5X's names and layouts of separate layers, so a name stands for itself,
`encoder/layers_0/mlp/wo/kernel`. Two things differ from network to network there:
    scanned   all layers of a stack lie in one array, `encoder/encoder/mlp/wo/kernel`,
              with the layer as its second axis (F, L, D)
    heads     attention's kernels keep heads apart, (D, H, K) and (H, K, D)
T5X's `examples/scalable_t5` (umT5) has both, and a relative bias in each layer; its
`examples/t5` (T5 1.0, 1.1, mT5, ByT5, Flan-T5) has neither.
"""

import re
from collections.abc import Mapping

import numpy as np

from nlhf_jax.checks import UserError
from nlhf_jax.conversion import t5x_settings
from nlhf_jax.conversion.t5x_arrays import StoredArray
from nlhf_jax.conversion.tensors import Tensor
from nlhf_jax.t5_settings import T5Settings

LAYER = t5x_settings.LAYER
SCANNED = re.compile(r"(encoder|decoder)/\1/(.+)")
STACKS = ("encoder", "decoder")
SCAN_AXIS = 1


def axis_and_length(
    arrays: Mapping[str, StoredArray], stack: str
) -> tuple[int, int] | None:
    """Returns the axis and number of a stack's scanned layers, None if separate.

    Raises:
      UserError: the norm's shape is that of none.
    """
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
    scans = {stack: axis_and_length(arrays, stack) for stack in STACKS}
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


def their_name(name: str) -> tuple[str, int | None]:
    """Returns the name that a scanned array has, and the layer of ours in it.

    What is in no layer keeps its name, and its layer is None.
    """
    found = LAYER.match(name)
    if not found:
        return name, None
    return f"{found[1]}/{found[1]}/{name[found.end() :]}", int(found[2])


def stacked(by_layer: Mapping[int, Tensor], axis: int) -> Tensor:
    """Returns equal layers' tensors as one, whose axis counts them."""
    tensors = [by_layer[layer] for layer in sorted(by_layer)]
    first = tensors[0]
    shape = (*first.shape[:axis], len(tensors), *first.shape[axis:])

    def read() -> np.ndarray:
        whole = np.empty(shape, first.dtype)
        for layer, tensor in enumerate(tensors):
            whole[(slice(None),) * axis + (layer,)] = tensor.read()
        return whole

    return Tensor(shape, first.dtype, read)


# --- heads


def apart(name: str, shape: tuple[int, ...], settings: T5Settings) -> tuple[int, ...]:
    """Returns the shape that a parameter has where heads are kept apart."""
    heads = (settings.num_heads, settings.head_dim)
    if re.search(r"attention/(query|key|value)/kernel$", name):
        return (shape[0], *heads)
    return (*heads, shape[1]) if name.endswith("attention/out/kernel") else shape


def reshaped(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Returns a tensor whose numbers are read in another shape."""
    return Tensor(shape, tensor.dtype, lambda: tensor.read().reshape(shape))


def with_heads(name: str, tensor: Tensor, settings: T5Settings) -> Tensor:
    """Returns an array like a parameter, its heads apart where T5X's network has them.

    That is the network with a bias in each layer.
    """
    if not settings.bias_in_each_layer:
        return tensor
    return reshaped(tensor, apart(name, tensor.shape, settings))
