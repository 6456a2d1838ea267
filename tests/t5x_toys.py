# SPDX-License-Identifier: Apache-2.0
"""T5X's own checkpoints, unpacked, and weights that lie in memory.

`t5x_sample.tar.xz` was written by T5X's `Checkpointer`: a network of 384 tokens, width
8, 4 heads of 3, 2 encoder and 3 decoder layers after one step of Adafactor, as T5X's
own layout, as Orbax's, and as scanned layers; `expected.npz` holds what T5X's network
says with exactly these weights.
"""

import pathlib
import tarfile

import jax.numpy as jnp
import numpy as np

from nlhf_jax.conversion.shapes import flat, nested
from nlhf_jax.conversion.tensors import Tensor, Weights

SAMPLE = pathlib.Path(__file__).parent / "t5x_sample.tar.xz"
NATIVE, ORBAX, SCANNED = "t5_1_1", "t5_1_1_orbax", "scalable_t5_scanned"


def unpack(folder: pathlib.Path) -> pathlib.Path:
    """Unpacks all three into a folder and returns it."""
    with tarfile.open(SAMPLE) as archive:
        archive.extractall(folder, filter="data")
    return folder


def arrays_of(weights: Weights) -> dict[str, np.ndarray]:
    """Returns all tensors, read."""
    return {name: tensor.read() for name, tensor in weights.tensors.items()}


def params_of(weights: Weights):
    """Returns the parameters as a network takes them."""
    arrays = arrays_of(weights)
    return nested({name: jnp.asarray(array) for name, array in arrays.items()})


def weights_of(settings, params) -> Weights:
    """Returns weights that are read from memory."""
    tensors = {
        name: Tensor(array.shape, array.dtype, lambda array=array: array)
        for name, array in ((n, np.asarray(leaf)) for n, leaf in flat(params).items())
    }
    return Weights(settings, tensors)


def assert_same(found: Weights, wanted: Weights):
    """Compares two weights bit for bit, dtypes and names too."""
    found_arrays, wanted_arrays = arrays_of(found), arrays_of(wanted)
    assert sorted(found_arrays) == sorted(wanted_arrays)
    for name, array in wanted_arrays.items():
        assert found_arrays[name].dtype == array.dtype, name
        assert found_arrays[name].shape == found.tensors[name].shape
        np.testing.assert_array_equal(found_arrays[name], array, err_msg=name)
