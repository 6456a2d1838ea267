# SPDX-License-Identifier: Apache-2.0
"""The largest entry and the sum of a vector, folded in halves.

XLA cuts a reduction of more than 32 entries into windows. On a CPU the two of a softmax
then take nearly as long as the product with the matrix in a game of 100 actions; halves
laid upon each other are plain vector arithmetic and take a few percent of it.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

FEW = 32  # entries that XLA reduces as they are
MANY = 1024  # above it the product with the matrix costs far more, and code would grow

Vector = Float[Array, "N"]
Scalar = Float[Array, ""]


def largest(values_N: Vector) -> Scalar:
    """Returns the largest entry."""
    folded_M, odd = _halves(jnp.maximum, values_N)
    result = folded_M.max()
    for value in odd:
        result = jnp.maximum(result, value)
    return result


def total(values_N: Vector) -> Scalar:
    """Returns the sum of all entries, added in pairs."""
    folded_M, odd = _halves(jnp.add, values_N)
    result = folded_M.sum()
    for value in odd:
        result = result + value
    return result


def _halves(
    pair: Callable[[Vector, Vector], Vector], values_N: Vector
) -> tuple[Float[Array, "M"], list[Scalar]]:
    """Returns at most FEW entries, and those that had no partner on the way."""
    odd = []
    while FEW < values_N.shape[0] <= MANY:
        half = values_N.shape[0] // 2
        odd += [values_N[-1]] * (values_N.shape[0] % 2)
        values_N = pair(values_N[:half], values_N[half : 2 * half])
    return values_N, odd
