# SPDX-License-Identifier: Apache-2.0
"""One number per array that any flipped bit changes, however the array is split."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree, UInt32

from nlhf_jax import global_arrays
from nlhf_jax.guards import all_finite


def _words(array: Array) -> UInt32[Array, "..."]:
    """The array's bytes as numbers, of one, two or four bytes each."""
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    word = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[min(array.dtype.itemsize, 4)]
    return jax.lax.bitcast_convert_type(array, word).astype(jnp.uint32)


def _weights(shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """An odd number for each position: twice its place in C order, plus one."""
    position = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :]) % 2**32
        along = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        position += along * jnp.uint32(stride)
    return 2 * position + 1


def checksum(array: Array) -> UInt32[Array, ""]:
    """Sum of the array's words, each times an odd number of its position, mod 2^32.

    Any one flipped bit changes it; it does not depend on the layout over devices.
    """
    words = _words(array)
    weighted = words * _weights(words.shape)
    # Along the first axes a CPU adds many at once.
    return jnp.sum(_sum_of_first_axes(weighted), dtype=jnp.uint32)


def _sum_of_first_axes(array: Array) -> Array:
    return jnp.sum(array, axis=tuple(range(array.ndim - 1)), dtype=array.dtype)


@jax.jit
def _all_finite(leaves: list[Array]) -> list[Bool[Array, ""]]:
    return [all_finite(leaf) for leaf in leaves]


@jax.jit
def _all_checksums(leaves: list[Array]) -> list[UInt32[Array, ""]]:
    return [checksum(leaf) for leaf in leaves]


def finite(state: PyTree) -> list[Any]:
    """Returns whether each array is finite, on the host of every process."""
    return global_arrays.fetch(_all_finite(jax.tree.leaves(state)))


def begin_checksums(state: PyTree) -> Callable[[], list[Any]]:
    """Begins to compute the checksum of each array; returns a function that has them.

    Of arrays that several processes hold, each sums its parts and all get the total.
    Where one device holds everything, the wait for it is the returned function's: the
    arrays may be donated meanwhile. Elsewhere it is over already, for a program that
    devices run together must not be in the way of the next one.
    """
    leaves = jax.tree.leaves(state)
    totals = _all_checksums(leaves)
    if any(len(getattr(leaf, "devices", set)()) > 1 for leaf in leaves):
        totals = global_arrays.fetch(totals)
    return lambda: jax.device_get(totals)
