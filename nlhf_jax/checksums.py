# SPDX-License-Identifier: Apache-2.0
"""One number per array that any flipped bit changes, however the array is split."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree, UInt32

from nlhf_jax import global_arrays


def checksum(array: Array) -> UInt32[Array, ""]:
    """Sum of the array's words, each times an odd number of its position, mod 2^32.

    Any one flipped bit changes it; it does not depend on the layout over devices.
    """
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    width = min(array.dtype.itemsize, 4)
    word = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[width]
    words = jax.lax.bitcast_convert_type(array, word).astype(jnp.uint32)
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        stride = math.prod(words.shape[axis + 1 :]) % 2**32
        along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        position += along * jnp.uint32(stride)
    return jnp.sum(words * (2 * position + 1), dtype=jnp.uint32)


@jax.jit
def _summaries(
    leaves: list[Array],
) -> tuple[list[Bool[Array, ""]], list[UInt32[Array, ""]]]:
    return [jnp.isfinite(leaf).all() for leaf in leaves], [
        checksum(leaf) for leaf in leaves
    ]


def inspect(state: PyTree) -> tuple[list[Any], list[Any]]:
    """Returns whether each array is finite, and the checksum of each, on the host.

    Of arrays that several processes hold, each sums its parts and all get the total.
    """
    return global_arrays.fetch(_summaries(jax.tree.leaves(state)))
